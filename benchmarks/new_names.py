"""Fine-tuning onto 20 names that the demo never saw: what each mode of `finetune` learns from few shots, and what it forgets.

    scripts/pretrain.sh                       # or any checkpoint of the scenes
    python -m benchmarks.new_names --checkpoint=runs/demo --workdir=runs/new_names

Draws scenes of names of the split "unseen" into WORKDIR/data (200 training, 100 validation and 200 test images), and runs the job
`finetune` on them: each of `--shots` with the first seed, and the largest number with every seed; then each of `--modes` with the largest
number, without and with a quarter of earlier scenes (`--replay`). The latter measure the demo's own set `scenes` (120 names) before and after, and
mixtures of the weights. Runs that are finished are not made again, one that was stopped goes on. Prints the table: AP50 of the new names
on test, AP of the set `scenes`, and both AP of the mixtures, on valid.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glip_jax.cli.reports.run_report import aligned
from glip_jax.data.scenes.pictures import load_pictures
from glip_jax.data.scenes.sets import SceneSet, make_scenes

PICTURES = Path(__file__).parent.parent / "gcs" / "sample" / "pictures"
NAMES = 20
IMAGES = {"train": 200, "valid": 100, "test": 200}
SEED = 1 << 20
"""Far from the streams of the demo's scenes."""
KEPT = "scenes"
SHARES = (0.25, 0.5, 0.75)
WITHOUT_REPLAY = ("prompt",)
"""Modes that leave every other name as it is: there is nothing to replay for."""


def draw(folder: Path) -> None:
    """The scenes, in COCO's layout: annotations/{train,valid,test}.json and images/."""
    pictures = load_pictures(PICTURES, splits=("unseen",), limit=NAMES)
    for stream, (split, count) in enumerate(IMAGES.items()):
        part = folder / "images" / split
        make_scenes(part, SceneSet("detection", count, SEED + stream, pictures), progress=True)
        coco = json.loads((part / "annotations.json").read_text())
        for image in coco["images"]:
            image["file_name"] = f"{split}/images/{image['file_name']}"
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(coco))


def finetune(arguments: argparse.Namespace, name: str, *options: str) -> dict[str, Any]:
    """The result of a run of the job, which is made if it is not there."""
    workdir = arguments.workdir / name
    command = [
        sys.executable, "-m", "glip_jax", "finetune", f"--data={arguments.workdir / 'data'}",
        f"--checkpoint={arguments.checkpoint}", f"--workdir={workdir}", f"--minutes={arguments.minutes:g}", *options,
    ]  # fmt: skip
    if not (workdir / "finetune.json").exists():
        print("+", " ".join(command[1:]), flush=True)
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(f"{name} ended with {code}: the same command goes on")
    return json.loads((workdir / "finetune.json").read_text())


def row(results: Sequence[dict[str, Any]]) -> list[str]:
    """The numbers of runs that differ by the seed, in percent, their means, with the standard deviation of more than one."""
    runs = [run for result in results for run in result["runs"] or [result]]
    cells = [f"{100 * runs[0]['zero_shot']['AP50']:.1f}", _mean([run["tuned"]["AP50"] for run in runs])]
    kept = [result["kept"][KEPT] for result in results if KEPT in result["kept"]]
    cells += [_mean([own[end] for own in kept]) for end in ("before", "after")]
    for share in SHARES:
        points = [point for result in results for point in result["interpolation"] if point["share"] == share]
        cells.append(
            f"{_mean([p['new'] for p in points])} / {_mean([p['kept'][KEPT] for p in points])}" if points else ""
        )
    return [*cells, _mean([result["valid"]["tuned"]["AP"] for result in results])]


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=3.0, help="of training, for each run")
    parser.add_argument("--shots", type=int, nargs="*", default=[1, 3, 5, 10])
    parser.add_argument("--seeds", type=int, nargs="*", default=[3, 30, 300], help="none: the modes alone")
    parser.add_argument("--modes", nargs="*", default=["full", "head", "lora", "linear", "prompt"])
    parser.add_argument("--modes-seeds", type=int, nargs="+", default=[3], help="seeds of the comparison of modes")
    parser.add_argument(
        "--replay", type=float, nargs="+", default=[0, 0.25], help="shares of earlier scenes, of each mode"
    )
    arguments = parser.parse_args(argv)
    draw(arguments.workdir / "data")
    rows, most = [], max(arguments.shots)
    for shots in sorted(arguments.shots) if arguments.seeds else ():
        seeds = arguments.seeds if shots == most else arguments.seeds[:1]
        results = [finetune(arguments, f"shots{shots}_{seed}", f"--shots={shots}", f"--seeds={seed}") for seed in seeds]
        rows.append(["full", "", str(shots), str(len(seeds)), *row(results)])
    shares = ",".join(map(str, SHARES))
    for mode in arguments.modes:
        for share in [0.0] if mode in WITHOUT_REPLAY else arguments.replay:
            replay = [f"--replay={arguments.checkpoint}/scenes/shards/detection:{share}"] if share else []
            options = [f"--tune={mode}", f"--shots={most}", f"--keep={KEPT}", f"--interpolate={shares}", *replay]
            results = [
                finetune(arguments, f"{mode}_{share:g}_{seed}", *options, f"--seeds={seed}")
                for seed in arguments.modes_seeds
            ]
            rows.append([mode, f"{share:g}" if share else "", str(most), str(len(results)), *row(results)])
    header = ["mode", "replay", "shots", "seeds", "test AP50 before", "after", "kept AP before", "after"]
    print(
        aligned([[*header, *(f"share {share:g}: valid AP / kept AP" for share in SHARES), "share 1: valid AP"], *rows])
    )


if __name__ == "__main__":
    main()
