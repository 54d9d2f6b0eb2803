"""Trains GLIP-T on one GPU beside two PyTorch networks: correctness first, then images/s, MFU and memory for growing batches.

    benchmarks/on_gpu.sh --out=gpu            # a bare machine: finds Python, takes packages from wheels/ where they are missing
    benchmarks/on_gpu.sh --tiny --out=gpu     # small sizes, also on a CPU: whether the script runs

1. `check`: one step on the GPU and on the CPU of the machine from the same parameters, float32 and bfloat16, relative to the largest
   gradient of each array.
2. For each number of images: `forward` and `step` (all of it: targets, losses, gradients, clipping, AdamW), alternating between
   glip_jax (bfloat16, compiled), the network that `export` writes and MM-Grounding-DINO-T of transformers (eager, autocast to bfloat16,
   SDPA where it has it). The exported network has no losses: its step is a random projection of its outputs, its gradients and AdamW.
3. A profile of a step: the ten largest kernels.

What does not fit into --minutes is left out and said. Writes OUT/on_gpu.json after every number, and prints tables.
"""

import argparse
import collections
import concurrent.futures
import functools
import gzip
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

from benchmarks.alternating import Device, Runs, Settings, Worker, work
from glip_jax.config import Remat
from glip_jax.training.monitoring.chips import chip_of
from glip_jax.training.monitoring.flops import flops_per_image

CANVAS, TINY_CANVAS = (800, 1344), (64, 96)
TOKENS, BOXES = 256, 10
LIMIT = 1e-5
"""Of a float32 gradient on the GPU to that on the CPU, relative to the largest of its array."""


def _own(settings: Settings) -> argparse.Namespace:
    """The arguments that a side gets: sizes, numbers of images."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--images", type=int, nargs="+")
    parser.add_argument("--kernels", type=Path, help="JSON file for the profile's table")
    return parser.parse_args(settings.arguments)


def _config(tiny: bool, dtype: str, remat: str, images: int) -> Any:
    """GLIP-T, or a network of its parts with few channels."""
    from dataclasses import replace

    from benchmarks import sample
    from configs import debug

    if not tiny:
        config = sample.tiny(dtype, remat)
    else:
        config = debug.get_config()
        config = replace(config, model=replace(config.model, dtype=dtype, remat=remat))
    return replace(config, train=replace(config.train, batch_size=images), mesh=replace(config.mesh, fsdp=1))


def glip_runs(settings: Settings) -> Runs:
    """glip_jax: all programs are compiled at once, at the start."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from benchmarks.sample import made_batch
    from glip_jax.distributed.mesh import AXES
    from glip_jax.models.glip import GLIP, normalize
    from glip_jax.training.state import fresh_parameters, initial_state
    from glip_jax.training.step import glip_objective, make_step

    own = _own(settings)
    canvas = TINY_CANVAS if own.tiny else CANVAS
    mesh = Mesh(np.reshape(jax.devices()[:1], (1, 1, 1)), AXES)
    first = _config(own.tiny, "bfloat16", settings.remat, 1)
    held = {"state": initial_state(fresh_parameters(first, mesh), first)}
    model = GLIP(first.model)

    def forward(params: Any, batch: Any) -> Any:
        image = normalize(batch.image, batch.size, first.model.input)
        return model.apply({"params": params}, image, batch.extent, batch.tokens, batch.token_mask)

    begin = time.perf_counter()
    batches, compiled, failed = {}, {}, {}
    # Programs compile while others are traced; the largest, which take longest, first.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = {}
        for images in sorted(own.images, reverse=True):
            config = _config(own.tiny, "bfloat16", settings.remat, images)
            batches[images] = jax.device_put(made_batch(config, *canvas, images, BOXES), jax.devices()[0])
            step: Any = make_step(config, mesh, glip_objective(config), held["state"])
            futures[f"step {images}"] = pool.submit(step.lower(held["state"], batches[images]).compile)
            lowered = jax.jit(forward).lower(held["state"].params, batches[images])
            futures[f"forward {images}"] = pool.submit(lowered.compile)
        for name, future in futures.items():
            try:
                compiled[name] = future.result()
            except jax.errors.JaxRuntimeError as error:  # it needs more memory than there is
                failed[name] = error
    print(f"glip_jax: {len(compiled)} programs ready in {time.perf_counter() - begin:.0f} s", file=sys.stderr)

    def run(name: str, images: int) -> int:
        if name in failed:
            raise failed[name]
        program = compiled[name]
        if name.startswith("forward"):
            jax.block_until_ready(program(held["state"].params, batches[images]))
        else:
            held["state"], metrics = program(held["state"], batches[images])
            jax.block_until_ready(metrics)
        memory = program.memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )

    def profile(images: int) -> int:
        """Five steps under the profiler; writes the table."""
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(5):
                    run(f"step {images}", images)
            own.kernels.write_text(json.dumps(kernels(Path(folder), 5)))
        return 0

    runs: dict[str, Callable[[], int | None]] = {
        f"{kind} {n}": functools.partial(run, f"{kind} {n}", n) for kind in ("forward", "step") for n in own.images
    }
    return (
        runs
        | {f"profile {n}": lambda n=n: profile(n) for n in own.images}
        | {f"warm profile {n}": lambda: 0 for n in own.images}
    )


def kernels(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The ten operations of a trace on the accelerator (on a CPU: of XLA's threads) that take longest, ms and calls a step, and the sum."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    on_chip = {process for process, name in names.items() if "GPU" in name}
    seconds, calls = collections.Counter[str](), collections.Counter[str]()
    for event in events:
        inside = event.get("pid") in on_chip if on_chip else "hlo_op" in event.get("args", {})
        if event.get("ph") == "X" and inside:
            seconds[event["name"]] += event["dur"] / 1000
            calls[event["name"]] += 1
    total = sum(seconds.values())
    rows = [(name, each, calls[name]) for name, each in seconds.most_common(10)] + [("all", total, sum(calls.values()))]
    return [
        {"kernel": name, "ms": each / steps, "calls": count / steps, "share": each / total}
        for name, each, count in rows
    ]


def _on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _measured(function: Callable[[], None]) -> Callable[[], int | None]:
    """A run of a PyTorch side that returns when its result is there, with the peak of the memory that it allocates."""
    import torch

    def run() -> int | None:
        if not _on_cuda():
            function()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    return run


def exported_runs(settings: Settings) -> Runs:
    """The network that `export` writes, eager, under autocast."""
    import torch

    from glip_jax.structures import boxes as box
    from glip_jax.weights.export import network_settings
    from glip_jax.weights.portable.glip_network import GlipNetwork

    own = _own(settings)
    height, width = TINY_CANVAS if own.tiny else CANVAS
    config = _config(own.tiny, "float32", "none", 1)
    device = "cuda" if _on_cuda() else "cpu"
    torch.manual_seed(0)
    network = GlipNetwork(network_settings(config.model)).to(device)
    for parameter in network.parameters():
        if not parameter.any():  # it is made to be filled by weights
            torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6)
    tokens = config.model.text.max_tokens
    count = sum(h * w for h, w in (box.level_shape((height, width), s) for s in config.model.pyramid.strides))

    def runs_of(images: int) -> tuple[Callable[[], None], Callable[[], None]]:
        pixels = torch.randn(images, 3, height, width, device=device)
        ids = torch.randint(1000, 20000, (images, tokens), device=device)
        mask = torch.ones_like(ids)
        weights = [torch.randn(images, count, *last, device=device) / count for last in ((tokens,), (4,), ())]

        def forward() -> None:
            network.eval()
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                network(pixels, ids, mask)

        def step() -> None:
            network.train()
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                outputs = network(pixels, ids, mask)
            torch.stack([(x.float() * w).sum() for x, w in zip(outputs, weights)]).sum().backward()
            optimizer.step()

        return forward, step

    return _both(own.images, runs_of)


def peer_runs(settings: Settings) -> Runs:
    """MM-Grounding-DINO-T of transformers, eager, under autocast."""
    import torch
    import transformers

    own = _own(settings)
    height, width = TINY_CANVAS if own.tiny else CANVAS
    device = "cuda" if _on_cuda() else "cpu"
    torch.manual_seed(0)
    small: Any = {"depths": [1, 1, 1, 1], "embed_dim": 24} if own.tiny else {"depths": [2, 2, 6, 2], "embed_dim": 96}
    backbone = transformers.SwinConfig(
        **small,
        num_heads=[3, 6, 12, 24],
        window_size=7,
        image_size=224,
        out_indices=[2, 3, 4],  # pyright: ignore[reportCallIssue]
        drop_path_rate=0.2,
    )
    few: Any = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 50} if own.tiny else {}
    config = transformers.MMGroundingDinoConfig(
        backbone_config=backbone, text_config=transformers.BertConfig(), max_text_len=TOKENS, **few
    )
    # Of its own accord it takes SDPA for the parts that have it.
    model: Any = transformers.MMGroundingDinoForObjectDetection(config)
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    # [CLS] name . name . ... [SEP]: 127 phrases fill 256 tokens; 1012 is the full stop.
    names = torch.randint(2000, 30000, (TOKENS // 2 - 1,))
    dots = torch.full_like(names, 1012)
    prompt = torch.cat([torch.tensor([101]), torch.stack([names, dots], 1).flatten(), torch.tensor([102])])

    def runs_of(images: int) -> tuple[Callable[[], None], Callable[[], None]]:
        ids = prompt.expand(images, -1).to(device)
        inputs = {
            "pixel_values": torch.randn(images, 3, height, width, device=device),
            "pixel_mask": torch.ones(images, height, width, dtype=torch.long, device=device),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        boxes = torch.cat([torch.rand(BOXES, 2) * 0.5 + 0.25, torch.rand(BOXES, 2) * 0.25 + 0.05], 1).to(device)
        labels = [{"class_labels": torch.arange(BOXES, device=device), "boxes": boxes}] * images

        def forward() -> None:
            model.eval()
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                model(**inputs)

        def step() -> None:
            model.train()
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16):
                loss = model(**inputs, labels=labels).loss
            loss.backward()
            optimizer.step()

        return forward, step

    return _both(own.images, runs_of)


def _both(
    every: Sequence[int], runs_of: Callable[[int], tuple[Callable[[], None], Callable[[], None]]]
) -> dict[str, Callable[[], int | None]]:
    """`forward N` and `step N` for each number of images, whose inputs are made at the first run."""
    made = functools.cache(runs_of)
    return {
        f"{kind} {images}": _measured(lambda images=images, which=which: made(images)[which]())
        for images in every
        for which, kind in enumerate(("forward", "step"))
    }


SIDES = {"glip_jax": glip_runs, "exported torch network": exported_runs, "mm_grounding_dino": peer_runs}


def check() -> dict[str, Any]:
    """A step on the first accelerator and on the CPU: the largest difference of the loss and the gradients, relative to the largest of each.

    The network is the small one, which a CPU computes in time; versions and chips stand beside it.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from benchmarks.sample import made_batch
    from glip_jax.distributed.mesh import AXES
    from glip_jax.training.state import fresh_parameters
    from glip_jax.training.step import first_gradients, glip_objective

    jax.config.update("jax_default_matmul_precision", "highest")
    devices = [jax.devices("cpu")[0], jax.devices()[0]]
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
    installed = {each.name.lower(): each.version for each in metadata.distributions()}
    found: dict[str, Any] = {
        "device": devices[1].device_kind, "reference": devices[0].device_kind, "limit": LIMIT,
        "versions": {"python": sys.version.split()[0]} | {name: installed.get(name) for name in packages},
    }  # fmt: skip
    for dtype in ("float32", "bfloat16"):
        config = _config(True, dtype, "none", 2)
        batch, results = made_batch(config, *TINY_CANVAS, 2, BOXES), []
        params = jax.device_get(fresh_parameters(config, Mesh(np.reshape(devices[:1], (1, 1, 1)), AXES)))
        for device in devices:
            mesh = Mesh(np.reshape([device], (1, 1, 1)), AXES)
            placed, images = jax.device_put((params, batch), device)
            results.append(jax.device_get(first_gradients(placed, images, config, mesh, glip_objective(config))))
        theirs, ours = results
        differences = {
            name: float(np.abs(ours[name] - theirs[name]).max() / max(1e-12, np.abs(theirs[name]).max()))
            for name in theirs
        }
        loss = differences.pop("loss")
        worst = max(differences, key=differences.__getitem__)
        found[dtype] = {"loss": loss, "gradients": differences[worst], "worst": worst}
    return found


def _checked(ends: float) -> dict[str, Any]:
    """`check` in a process of its own, whose memory is free afterwards. SystemExit if it ends with an error, or its numbers are too far off."""
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--check"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=max(1.0, ends - time.monotonic()))
    if done.returncode:
        raise SystemExit(f"the check ended with code {done.returncode}; its error stands above")
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{found['device']}, {found['versions']}")
    for dtype in ("float32", "bfloat16"):
        one = found[dtype]
        print(
            f"{dtype} against {found['reference']}: loss {one['loss']:.1e}, gradients {one['gradients']:.1e} ({one['worst']})"
        )
    if max(found["float32"]["loss"], found["float32"]["gradients"]) > LIMIT:
        raise SystemExit(f"float32 differs by more than {LIMIT:g} of the largest: nothing is measured")
    return found


def _row(
    found: Sequence[dict[str, Any]], error: str | None, side: str, kind: str, images: int, device: str
) -> dict[str, Any]:
    """A row of the table; the MFU of glip_jax by its own formula of FLOPs, where the peak of the chip is known."""
    row: dict[str, Any] = {"images": images, "mode": kind, "side": side, "error": error, "seconds": None}
    if not found:
        return row
    seconds = [each["seconds"] for each in found]
    median = statistics.median(seconds)
    row |= {
        "seconds": median,
        "least": min(seconds),
        "most": max(seconds),
        "peak_bytes": max(each["peak"] for each in found),
    }
    row["images_per_second"] = images / median
    if side == "glip_jax" and (chip := chip_of(device)):
        flops = flops_per_image(_config(False, "bfloat16", "none", 1).model, *CANVAS, TOKENS)
        row["mfu"] = (flops.training if kind == "step" else flops.forward) * images / median / chip.flops
    return row


def _markdown(row: dict[str, Any]) -> str:
    start = f"| {row['images']} | {row['mode']} | {row['side']} |"
    if row["seconds"] is None:
        return f"{start} {row['error']} | | | | |"
    mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
    return (
        f"{start} {1000 * row['seconds']:.1f} | {1000 * row['least']:.1f} to {1000 * row['most']:.1f} | "
        f"{row['images_per_second']:.2f} | {mfu} | {row['peak_bytes'] / 2**30:.2f} |"
    )


def _started(side: str, settings: Settings) -> Worker | None:
    """The process of a side; None if it ends with an error, which does not end the others."""
    try:
        return Worker("benchmarks.on_gpu", side, settings)
    except SystemExit as error:
        print(f"{side}: {error}", file=sys.stderr)
        return None


def _answered(worker: Worker, mode: str) -> dict[str, Any] | None:
    """A run of a side, or the error with which its process ended."""
    try:
        return worker.measure(mode)
    except (SystemExit, BrokenPipeError) as error:
        return {"error": str(error)}


def measure(arguments: argparse.Namespace, result: dict[str, Any], ends: float) -> None:
    """Fills `result`, written after every number; what would begin after `ends` is left out and named."""
    file, table = arguments.out / "on_gpu.json", arguments.out / "kernels.json"

    def save() -> None:
        file.write_text(json.dumps(result, indent=1) + "\n")

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the sides share the memory
    result["check"] = _checked(ends)
    save()
    device = result["check"]["device"]
    own = ["--images", *map(str, arguments.images), "--kernels", str(table), *(["--tiny"] if arguments.tiny else [])]
    kind_of_device = "cpu" if device.lower() == "cpu" else "gpu"
    settings = Settings(len(os.sched_getaffinity(0)), arguments.remat, kind_of_device, tuple(own))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        started = pool.map(lambda side: _started(side, settings), arguments.sides)
        workers = {side: worker for side, worker in zip(arguments.sides, started) if worker is not None}
    result["not_started"] = [side for side in arguments.sides if side not in workers]
    print("| images | mode | side | median ms | range ms | images/s | MFU | peak GiB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for images, kind in itertools.product(arguments.images, ("forward", "step")):
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
        errors: dict[str, str] = {}
        for _, (side, worker) in itertools.product(range(arguments.rounds), workers.items()):
            if side in errors:
                continue
            if time.monotonic() > ends:
                errors[side] = "not run: no time was left"
            elif one := _answered(worker, f"{kind} {images}"):
                if "error" in one:
                    errors[side] = one["error"]
                else:
                    found[side].append(one)
        for side in workers:
            result["rows"].append(
                _row(found[side], errors.get(side), side, kind, images, "" if arguments.tiny else device)
            )
            print(_markdown(result["rows"][-1]), flush=True)
            save()
    done = [
        row["images"]
        for row in result["rows"]
        if row["side"] == "glip_jax" and row["mode"] == "step" and row["seconds"]
    ]
    if (
        done
        and time.monotonic() < ends
        and "error" not in (_answered(workers["glip_jax"], f"profile {max(done)}") or {})
    ):
        result["kernels"] = json.loads(table.read_text())
        table.unlink()
        save()
        print(f"\n| kernel, a step of {max(done)} images | ms | calls | share |\n|---|---|---|---|")
        for row in result["kernels"]:
            print(f"| {row['kernel'][:90]} | {row['ms']:.2f} | {row['calls']:.0f} | {row['share']:.1%} |")
    for worker in workers.values():
        worker.close()
    print(f"written: {file}")


def main() -> None:
    """Parses the command line."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"), help="folder to write into")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.5, help="after which nothing new begins")
    parser.add_argument("--tiny", action="store_true", help="small networks and images, one of them, also on a CPU")
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=tuple(SIDES))
    parser.add_argument("--remat", choices=get_args(Remat), default="none")
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=get_args(Device), help=argparse.SUPPRESS)
    parser.add_argument("--kernels", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(*arguments.images, arguments.rounds) < 1:
        parser.error(f"--images={arguments.images} --rounds={arguments.rounds}: expected numbers of at least 1")
    if arguments.check:
        print(json.dumps(check()))
        return
    if arguments.worker:
        own = [
            "--images",
            *map(str, arguments.images),
            "--kernels",
            arguments.kernels,
            *(["--tiny"] if arguments.tiny else []),
        ]
        work(
            arguments.worker,
            SIDES[arguments.worker](Settings(arguments.threads, arguments.remat, arguments.device, tuple(own))),
        )
        return
    if arguments.tiny:
        arguments.images, arguments.rounds = arguments.images[:1], min(2, arguments.rounds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"canvas": TINY_CANVAS if arguments.tiny else CANVAS, "remat": arguments.remat, "rows": []}
    measure(arguments, result, begin + 60 * arguments.minutes)


if __name__ == "__main__":
    main()
