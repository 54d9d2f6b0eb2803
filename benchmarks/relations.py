"""Relational phrases of synthetic scenes: whether a run resolves the relation, or only finds objects of the name.

    python -m benchmarks.relations runs/ablations/scenes/validation_phrases runs/ablations/a-0 runs/ablations/b-0 ...

A relational phrase ("the smaller snail", "a snail left of two red apples") refers to some of the boxes of its name. recall@1 of the
evaluation requires one of those; here the best box of every phrase is classified as *meant*, *another of the name* (which only the
relation distinguishes) or *elsewhere*. A run that finds the name and ignores relations is correct with a probability that is the
fraction of meant boxes among those of the name: *by chance*. Needs the detections that `evaluate` wrote into the runs' folders. Boxes
that no phrase refers to are not in the annotations, so the scenes are drawn again.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from glip_jax.cli.reports.run_report import aligned
from glip_jax.config import current_names
from glip_jax.data.scenes.draw import Scene, SceneStyle, draw_scene
from glip_jax.data.scenes.pictures import load_pictures
from glip_jax.data.scenes.sets import SceneSet, finished
from glip_jax.evaluation.recall import MIN_IOU, overlaps

PICTURES = Path(__file__).parent.parent / "gcs" / "sample" / "pictures"


class RelationalPhrase(NamedTuple):
    """A relational phrase, the index of its detections, and the boxes of its name."""

    image: int
    phrase: int
    size: bool
    """Whether it is selected by a size word; otherwise by a relation to other objects."""
    boxes: Any
    """Float32[N 4]: all boxes of the name, xyxy."""
    meant: tuple[bool, ...]
    """Which of them the phrase refers to."""


def relational_phrases(folder: Path) -> list[RelationalPhrase]:
    """The relational phrases of a set of scenes."""
    if not (folder / "annotations.json").is_file():
        raise SystemExit(f"{folder} holds no annotations.json: expected a grounding set of `python -m glip_jax scenes`")
    truth = json.loads((folder / "annotations.json").read_text())
    info = truth["info"]
    pictures = load_pictures(PICTURES, tuple(info["picture_styles"]), ("detection", "grounding"), {})
    pictures = [picture for picture in pictures if picture.name in set(info["names"])]
    style: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in current_names(info["style"]).items()
    }
    scenes = SceneSet(info["kind"], info["count"], info["seed"], pictures, SceneStyle(**style))
    if not finished(folder, scenes):
        raise SystemExit(f"{folder} holds no scenes")
    found = []
    for index in tqdm(range(scenes.count), "drawing", unit="scene", disable=None):
        scene = draw_scene(pictures, scenes.seed, index, scenes.style)
        found += _of_scene(index + 1, scene)
    return found


def _of_scene(image: int, scene: Scene) -> list[RelationalPhrase]:
    result = []
    for number, phrase in enumerate(scene.phrases):
        if phrase.kind == "relational":
            name = scene.names[phrase.boxes[0]]
            same_name = [i for i, other in enumerate(scene.names) if other == name]
            words = scene.caption[phrase.span[0] : phrase.span[1]].split()
            size = any(word.startswith(("small", "big")) for word in words)
            result.append(
                RelationalPhrase(
                    image, number, size, scene.boxes[same_name], tuple(i in phrase.boxes for i in same_name)
                )
            )
    return result


def counted(phrases: Sequence[RelationalPhrase], run: Path) -> Counter[str]:
    """Counts of the classes of the best boxes of a run, and the expected number that chance would get right."""
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for entry in json.loads((run / "detections_phrases.json").read_text()):
        key = entry["image_id"], entry["phrase"]
        if key not in best or entry["score"] > best[key]["score"]:
            best[key] = entry
    counts: Counter[str] = Counter()
    for phrase in phrases:
        entry = best.get((phrase.image, phrase.phrase))
        if entry is None:
            counts["elsewhere"] += 1
            continue
        x, y, width, height = entry["bbox"]
        met = overlaps(np.array([[x, y, x + width, y + height]], np.float32), phrase.boxes)[0]
        if met.max() < MIN_IOU:
            counts["elsewhere"] += 1
            continue
        counts["meant" if phrase.meant[int(met.argmax())] else "another of the name"] += 1
        counts["chance"] += sum(phrase.meant) / len(phrase.meant)  # pyright: ignore[reportArgumentType]
    return counts


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, help="folder of the grounding set, with annotations.json")
    parser.add_argument("runs", type=Path, nargs="+", help="folders with detections_phrases.json")
    arguments = parser.parse_args()
    for run in arguments.runs:
        if not (run / "detections_phrases.json").is_file():
            parser.error(
                f"{run} holds no detections_phrases.json: expected a folder that `evaluate` wrote to, with the set phrases"
            )
    phrases = relational_phrases(arguments.scenes)
    rows = [["run", "phrases", "of", "meant", "another of the name", "elsewhere", "meant of the name", "by chance"]]
    for run in arguments.runs:
        for words, group in (
            ("size", [p for p in phrases if p.size]),
            ("relation", [p for p in phrases if not p.size]),
            ("both", phrases),
        ):
            counts = counted(group, run)
            named = counts["meant"] + counts["another of the name"]
            if not named:
                parser.error(
                    f"{run}: no box of its {len(group)} phrases of {words} is on an object of their names, so its detections are of another set "
                    f"than {arguments.scenes}, or the network has learnt nothing"
                )
            shares = [f"{counts[key] / len(group):.3f}" for key in ("meant", "another of the name", "elsewhere")]
            rows.append(
                [
                    run.name,
                    words,
                    str(len(group)),
                    *shares,
                    f"{counts['meant'] / named:.3f}",
                    f"{counts['chance'] / named:.3f}",
                ]
            )
    print(aligned(rows))


if __name__ == "__main__":
    main()
