"""Times GLIP-T here beside MM-Grounding-DINO-T of `transformers` on torch, on one CPU, alternating in one run.

Full sizes, random weights, 480 x 640 pixels, 256 tokens, batch 1, float32: `forward` in evaluation mode, and `step`,
forward + loss + backward in training mode (dropout on; targets assigned, no optimizer). Each side lives in a process of
its own, pinned to the first cores; rounds alternate between them, so that other load hits both. Both get huge pages
from the allocator, as `scripts/` sets it. Memory is the peak of what is resident after two uncounted runs: parameters
and gradients, but no compilation.

    python -m benchmarks.compare_mm_grounding_dino --threads 1 2 --rounds 3
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from glip_jax.config import Remat

HEIGHT, WIDTH, TOKENS, BOXES = 480, 640, 256, 10
SIDES = ("glip_jax", "mm_grounding_dino")
MODES = ("forward", "step")
Runs = dict[str, Callable[[], None]]


def glip_runs(remat: str) -> Runs:
    """Ours, compiled at the first call."""
    import jax

    from benchmarks.sample import abstract_params, made_batch, tiny
    from glip_jax.models.glip import GLIP, normalize
    from glip_jax.parallel import make_mesh
    from glip_jax.training.step import first_gradients, glip_objective

    config = tiny(remat=remat)
    init, _ = abstract_params(config)
    params = jax.block_until_ready(jax.jit(init)(jax.random.key(0)))
    batch = jax.tree.map(jax.numpy.asarray, made_batch(config, HEIGHT, WIDTH, boxes=BOXES))
    model = GLIP(config.model)

    def forward(params: dict, batch: Any) -> object:
        image = normalize(batch.image, batch.size, config.model.input)
        return model.apply({"params": params}, image, batch.extent, batch.tokens, batch.token_mask)

    mesh = make_mesh(config.mesh)
    objective = glip_objective(config)
    compiled_forward = jax.jit(forward)

    def gradients(params: dict, batch: Any) -> object:
        return first_gradients(params, batch, config, mesh, objective)

    compiled_step = jax.jit(gradients)
    return {
        "forward": lambda: jax.block_until_ready(compiled_forward(params, batch)) and None,
        "step": lambda: jax.block_until_ready(compiled_step(params, batch)) and None,
    }


def peer_runs(threads: int) -> Runs:
    """Theirs, eager."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, image_size=224,
        out_indices=[2, 3, 4], drop_path_rate=0.2,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    model = transformers.MMGroundingDinoForObjectDetection(
        transformers.MMGroundingDinoConfig(
            backbone_config=backbone, text_config=transformers.BertConfig(), max_text_len=TOKENS
        )
    )
    pixels = torch.randn(1, 3, HEIGHT, WIDTH)
    # [CLS] name . name . ... [SEP]: 127 phrases fill 256 tokens; 1012 is the full stop.
    names = torch.randint(2000, 30000, (TOKENS // 2 - 1,))
    dots = torch.full_like(names, 1012)
    tokens = torch.cat([torch.tensor([101]), torch.stack([names, dots], 1).flatten(), torch.tensor([102])])[None]
    inputs = {
        "pixel_values": pixels,
        "pixel_mask": torch.ones(1, HEIGHT, WIDTH, dtype=torch.long),
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    boxes = torch.cat([torch.rand(BOXES, 2) * 0.5 + 0.25, torch.rand(BOXES, 2) * 0.25 + 0.05], 1)
    labels = [{"class_labels": torch.arange(BOXES), "boxes": boxes}]

    def forward() -> None:
        model.eval()
        with torch.inference_mode():
            model(**inputs)

    def step() -> None:
        model.train()
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()

    return {"forward": forward, "step": step}


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Starts the peak of resident memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def work(side: str, threads: int, remat: str) -> None:
    """Answers each line `mode` on standard input with its seconds and the peak of memory so far."""
    runs = glip_runs(remat) if side == "glip_jax" else peer_runs(threads)
    warm: set[str] = set()
    print("ready", flush=True)
    for line in sys.stdin:
        mode = line.strip()
        if mode not in warm:
            start = time.perf_counter()
            runs[mode]()
            print(f"{side}: first {mode} (with compilation) {time.perf_counter() - start:.1f} s", file=sys.stderr)
            runs[mode]()
            forget_peak()
            warm.add(mode)
        start = time.perf_counter()
        runs[mode]()
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_bytes()}), flush=True)


class Worker:
    """A side in its own process, pinned to the first `threads` cores."""

    def __init__(self, side: str, threads: int, remat: str) -> None:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        if len(cores) < threads:
            raise SystemExit(f"--threads {threads}: this process may use {len(cores)} cores only")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        command = [sys.executable, "-m", "benchmarks.compare_mm_grounding_dino", "--worker", side, "--remat", remat]
        self.process = subprocess.Popen(
            ["taskset", "-c", ",".join(map(str, cores)), *command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> str:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}; its error stands above")
        return line

    def measure(self, mode: str) -> dict:
        """One run after a first that is not counted."""
        assert self.process.stdin is not None
        print(mode, file=self.process.stdin, flush=True)
        return json.loads(self._answer())


def compare(threads: int, rounds: int, modes: list[str], remat: str) -> None:
    """Prints a table of medians for one number of threads."""
    workers = {side: Worker(side, threads, remat) for side in SIDES}
    for mode in modes:
        results: dict[str, list[dict]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side in SIDES:
                results[side].append(workers[side].measure(mode))
        medians = {side: statistics.median(r["seconds"] for r in results[side]) for side in SIDES}
        for side in SIDES:
            seconds = [r["seconds"] for r in results[side]]
            peak = max(r["peak"] for r in results[side]) / 2**30
            print(
                f"| {threads} | {mode} | {side} | {medians[side]:.2f} | {min(seconds):.2f} to {max(seconds):.2f} | "
                f"{peak:.2f} | {medians[side] / medians['mm_grounding_dino']:.2f} |",
                flush=True,
            )
    for worker in workers.values():
        if worker.process.stdin:
            worker.process.stdin.close()
        worker.process.wait()


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--remat", choices=get_args(Remat), default="none")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.threads[0], arguments.remat)
        return
    print(
        "| threads | mode | side | median s | range s | peak GiB | ratio |\n|---|---|---|---|---|---|---|", flush=True
    )
    for threads in arguments.threads:
        compare(threads, arguments.rounds, arguments.modes, arguments.remat)


if __name__ == "__main__":
    main()
