"""Writes sets of synthetic scenes as files, in public formats that the importers read.

detection: COCO detection JSON, on request with the names that are absent from each image (`known_absent`); grounding: MDETR's JSON, with the kind of every phrase; captions: COCO captions JSON without
boxes, with the ground truth (MDETR's format) in truth.json. Images are JPEGs under images/.
"""

import contextlib
import hashlib
import json
import multiprocessing
import shutil
import signal
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from tqdm import tqdm

from glip_jax.config import current_names
from glip_jax.data.scenes.draw import Scene, SceneError, SceneStyle, draw_scene
from glip_jax.data.scenes.nouns import conflict, recolored, without_color
from glip_jax.data.scenes.pictures import Picture
from glip_jax.io.cores import available_cores
from glip_jax.io.processes import end_with_parent

__all__ = ["Kind", "SceneSet", "finished", "make_scenes"]

_VERSION = 1
"""Incremented whenever the same settings give other scenes; files without a version have version 1."""


Kind = Literal["detection", "grounding", "captions"]


@dataclass(frozen=True)
class SceneSet:
    """Definition of a set of scenes."""

    kind: Kind
    count: int
    seed: int
    pictures: Sequence[Picture]
    """Pictures of one name must be consecutive."""
    style: SceneStyle = SceneStyle()
    known_absent: bool = False
    """Detection: whether each image lists the names that it does not show."""
    look_alikes: bool = False
    """With `known_absent`: whether names of the same things in other colors are categories too, which no scene shows."""

    @property
    def other_colors(self) -> tuple[str, ...]:
        """With `look_alikes` the names of the same things in other colors ("yellow apple" for "red apple"); no picture has them."""
        if not self.look_alikes:
            return ()
        colors: dict[str, set[str]] = {}
        for picture in self.pictures:
            colors.setdefault(picture.name, set()).add(picture.color)
        others = [recolored(name, own.pop() if len(own) == 1 else "") for name, own in colors.items()]
        return tuple(dict.fromkeys(name for name in others if name and name not in colors))

    @property
    def names(self) -> tuple[str, ...]:
        """The names that the set may show, in order; each is a category."""
        return tuple(dict.fromkeys(picture.name for picture in self.pictures))

    def settings(self) -> dict[str, Any]:
        """Everything that determines the files, as JSON."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            digest.update(picture.name.encode())
            digest.update(picture.image.tobytes())
        return {
            "description": "picture scenes of glip_jax", "kind": self.kind, "count": self.count, "seed": self.seed,
            "style": json.loads(json.dumps(asdict(self.style))), "names": list(self.names),
            "picture_styles": list(dict.fromkeys(picture.style for picture in self.pictures)),
            "pictures": digest.hexdigest(), "version": _VERSION,
            **({"other_colors": list(self.other_colors)} if self.look_alikes else {}),
        }  # fmt: skip


def finished(out: Path, scenes: SceneSet) -> bool:
    """Whether `out` holds exactly this set.

    Raises:
        SceneError: it holds scenes with other settings (the message names them), or other files.
    """
    target = out / "annotations.json"
    if not out.exists():
        return False
    try:
        found = {"version": 1} | json.loads(target.read_text())["info"]
        found["style"] = current_names(found["style"])
        settings = scenes.settings()
        changed = sorted(key for key in settings if found.get(key) != settings[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SceneError(f"{out} exists but holds no finished scenes ({error!r}): name another folder") from error
    if changed:
        raise SceneError(f"{out} holds scenes that differ in {', '.join(changed)}: name another folder or delete it")
    return True


def make_scenes(out: Path, scenes: SceneSet, processes: int = 0, progress: bool = False) -> bool:
    """Draws the set into the local folder `out`; returns False if it exists already.

    `processes`: number of worker processes, 0: one per core; the files do not depend on it. The folder gets its name only when
    it is complete; an interrupted set is drawn again.

    Raises:
        SceneError: `count` is below 1, `out` holds scenes with other settings, or a process died.
    """
    if scenes.count < 1:
        raise SceneError(f"count is {scenes.count}: expected at least 1 scene")
    if processes < 0:
        raise SceneError(f"processes is {processes}: expected at least 1, or 0 for one per core")
    if finished(out, scenes):
        return False
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    try:
        # Closed before the folder is removed in any case, so that no process still writes into it.
        with contextlib.closing(_drawn(partial / "images", scenes, processes)) as drawn:
            for file, content in _contents(drawn, scenes, f"{out.name} scenes" if progress else "").items():
                (partial / file).write_text(json.dumps(content))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


class _Drawn(NamedTuple):
    """A scene without its image, which has been written to `file`."""

    file: str
    scene: Scene


def _contents(drawn: Iterator[_Drawn], scenes: SceneSet, title: str) -> dict[str, dict[str, Any]]:
    """The JSON files of a set by file name; `title`: title of the progress bar, "" for none."""
    bar = tqdm(drawn, title, scenes.count, unit="scene", disable=not title)
    category = {name: i + 1 for i, name in enumerate((*scenes.names, *scenes.other_colors))}
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for identity, (file, scene) in enumerate(bar, 1):
        image = {"id": identity, "file_name": file, "height": scenes.style.height, "width": scenes.style.width}
        captions.append({"id": identity, "image_id": identity, "caption": scene.caption})
        if scenes.kind != "detection":
            phrases = [{"span": list(phrase.span), "kind": phrase.kind} for phrase in scene.phrases]
            image |= {"caption": scene.caption, "phrases": phrases}
        elif scenes.known_absent:
            image |= _absent(scene.names, scenes.names, scenes.other_colors)
        images.append(image)
        for annotation in _annotations(scene, scenes.kind, category):
            boxes.append({"id": len(boxes) + 1, "image_id": identity, "iscrowd": 0} | annotation)
    info = scenes.settings()
    truth = {"info": info, "images": images, "annotations": boxes}
    match scenes.kind:
        case "detection":
            return {
                "annotations.json": truth | {"categories": [{"id": i, "name": name} for name, i in category.items()]}
            }
        case "grounding":
            return {"annotations.json": truth}
        case "captions":
            without_captions = [{key: image[key] for key in ("id", "file_name", "height", "width")} for image in images]
            return {
                "truth.json": truth,
                "annotations.json": {"info": info, "images": without_captions, "annotations": captions},
            }


def _absent(shown: Sequence[str], names: Sequence[str], other_colors: Sequence[str]) -> dict[str, list[str]]:
    """The names that an image does not show, and those of them that differ from a shown one in the color only.

    A name that begins or ends with the words of a shown one, or the reverse, may be true of what is shown and is left out;
    `other_colors` are true of nothing.
    """
    absent = [n for n in names if not any(n == other or conflict(n, other) for other in shown)] + list(other_colors)
    things = {without_color(name) for name in shown}
    return {"known_absent": absent, "look_alikes": [name for name in absent if without_color(name) in things]}


def _annotations(scene: Scene, kind: str, category: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Yields the scene's boxes in COCO's or MDETR's format (bbox = x, y, width, height)."""
    for i, (box, name) in enumerate(zip(scene.boxes.tolist(), scene.names, strict=True)):
        x1, y1, x2, y2 = box
        geometry = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        spans = [list(phrase.span) for phrase in scene.phrases if i in phrase.boxes]
        if kind == "detection":
            yield geometry | {"category_id": category[name]}
        elif spans:
            yield geometry | {"category_id": 1, "tokens_positive": spans}


def _drawn(images: Path, scenes: SceneSet, processes: int) -> Generator[_Drawn, None, None]:
    """Draws all scenes in order, in `processes` processes."""
    # Starting a process takes about as long as drawing some dozens of scenes.
    processes = min(processes or available_cores(), -(-scenes.count // 64))
    if processes == 1:
        for index in range(scenes.count):
            yield _draw(images, scenes, index)
        return
    # Spawned, as forking a process with threads may deadlock. A scene depends only on its index.
    executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (images, scenes))
    try:
        yield from executor.map(_draw_in_process, range(scenes.count), chunksize=16)
    except BrokenProcessPool as error:
        raise SceneError(f"a worker process died ({error}); --processes=1 shows its error") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _draw(images: Path, scenes: SceneSet, index: int) -> _Drawn:
    scene = draw_scene(scenes.pictures, scenes.seed, index, scenes.style, captioned=scenes.kind != "detection")
    file = f"{index:06d}.jpg"
    Image.fromarray(scene.image).save(images / file, quality=92)
    return _Drawn(file, scene._replace(image=scene.image[:0]))


_work: tuple[Path, SceneSet] | None = None
"""Arguments of `_draw` in a worker process, sent once."""


def _start(images: Path, scenes: SceneSet) -> None:
    global _work
    _work = images, scenes
    end_with_parent()
    # The parent handles Ctrl-C and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _draw_in_process(index: int) -> _Drawn:
    assert _work is not None, "the initializer of the pool has not run"
    return _draw(*_work, index)
