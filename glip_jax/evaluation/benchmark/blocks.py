"""Detections of a set on disk: blocks of images, each one file, written atomically; and the detections of all blocks, in order.

    FOLDER/plan.json             what the detections depend on, and the number of images and blocks
    FOLDER/block_00000.npz       per image the SHA-256 of its file; the detections, one member a part
    FOLDER/predictions.json      all detections in the form that the evaluator reads; or of a set in parts,
    FOLDER/predictions/00000.json    those of part 0
    FOLDER/done.json             written last: hashes of the files of the images, counts, seconds

A block has a fixed number of images, whatever the number of devices, so a job that was stopped goes on elsewhere. A block that is
there is complete. A part is one of the prompts that all images of a set share, as in LVIS: only the detections of one part are in
memory at a time.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
from etils import epath

from glip_jax.evaluation.benchmark.sets import BenchmarkError
from glip_jax.io.workdir import write_atomic

__all__ = ["BLOCK", "FORMAT", "ROW", "Blocks", "Cut", "RunningTop", "concatenated", "joined"]

BLOCK = 128
"""Images of a block."""

FORMAT = 1
"""Version of plan.json and of the blocks."""

ROW = np.dtype(
    [("image", "<i4"), ("prompt", "<i4"), ("phrase", "<i4"), ("score", "<f4"), ("box", "<f4", (4,)), ("best", "?")]
)
"""A detection: index of the image in its set, of the prompt of the image and of the phrase of the prompt; score; box, xyxy in pixels
of the image; whether it is among the best of its image (`Cut.per_image`)."""


@dataclass(frozen=True)
class Cut:
    """The detections that are kept of a set: the union of both rules; 0 and 0 keep all.

    LVIS needs the first for fixed AP, which counts the 10,000 highest scores of a category over all images, and the second for
    standard AP, which counts the 300 highest of an image over all categories.
    """

    per_class: int = 0
    per_image: int = 0


class RunningTop:
    """The lowest score that can be among the highest `count` of its class, as more and more detections are seen."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._scores: dict[tuple[int, int], Any] = {}
        self._floors: dict[tuple[int, int], float] = {}

    def kept(self, rows: Any) -> Any:
        """Bool[N]: which of the rows may be among the highest of their class. Those of equal score are kept."""
        kept = np.ones(len(rows), bool)
        keys = rows["prompt"].astype(np.int64) << 32 | rows["phrase"]
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
        for own in np.split(order, starts[1:]) if len(order) else ():
            key = (int(rows["prompt"][own[0]]), int(rows["phrase"][own[0]]))
            scores = rows["score"][own]
            kept[own] = fits = scores >= self._floors.get(key, -np.inf)
            best = np.concatenate([self._scores.get(key, np.zeros(0, np.float32)), scores[fits]])
            if len(best) >= self._count:
                best = np.partition(best, len(best) - self._count)[-self._count :]
                self._floors[key] = float(best[0])
            self._scores[key] = best
        return kept


def marked_best(rows: Any, count: int) -> Any:
    """The rows with `best` set for the `count` highest scores of each image; equal scores in the order of the rows."""
    order = np.lexsort((np.arange(len(rows)), -rows["score"], rows["image"]))
    images = rows["image"][order]
    rank = np.arange(len(rows)) - np.searchsorted(images, images)
    rows["best"][order] = rank < count
    return rows


class Blocks:
    """The folder of a set's detections, which several processes share; see the module."""

    def __init__(self, folder: epath.Path, plan: Mapping[str, Any], images: int, parts: int, cut: Cut) -> None:
        """`plan`: what the detections depend on, and under `about` what else is recorded; `parts`: prompts that all images share, or
        1 to write one file.

        Raises BenchmarkError if the folder holds detections of another plan.
        """
        self.folder, self.images, self.parts, self.cut = folder, images, parts, cut
        self.count = -(-images // BLOCK)
        self._top = RunningTop(cut.per_class)
        self._plan = json.loads(
            json.dumps({"format": FORMAT, **plan, "images": images, "parts": parts, "block": BLOCK, "cut": vars(cut)})
        )
        self._check()

    def _check(self) -> None:
        saved = _read_json(self.folder / "plan.json")
        if saved is None:
            return
        keys = (saved.keys() | self._plan.keys()) - {"about"}
        other = sorted(key for key in keys if saved.get(key) != self._plan.get(key))
        if other:
            changes = [change for key in other for change in _changes(key, saved.get(key), self._plan.get(key))]
            shown = "; ".join(changes[:6])
            raise BenchmarkError(
                f"{self.folder} holds detections of another checkpoint, other settings or other files ({shown}): give another "
                "--workdir, or remove that folder to detect again"
            )

    def begin(self) -> None:
        """Writes plan.json, which later calls compare. Process 0 does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / "plan.json", json.dumps(self._plan, indent=1))

    @property
    def protocol(self) -> dict[str, Any]:
        """How the set is asked; see `scoring.Protocol`."""
        return self._plan["about"]["protocol"]

    @property
    def done(self) -> dict[str, Any] | None:
        """The content of done.json, if the predictions are complete. Raises BenchmarkError for damaged files."""
        return None if _read_json(self.folder / "done.json") is None else read_done(self.folder)

    def pending(self, blocks: Iterable[int]) -> list[int]:
        """Those of `blocks` that are not detected yet."""
        here = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
        return [block for block in blocks if self._path(block).name not in here]

    def members(self, block: int) -> range:
        """Positions of the images of a block in the order of detection."""
        return range(block * BLOCK, min((block + 1) * BLOCK, self.images))

    def write(self, block: int, rows: Any, digests: Sequence[str], seconds: float) -> None:
        """Writes the detections (`ROW`) of a block, without those that `cut` leaves out, and the hashes of its images' files."""
        if self.cut.per_image:
            rows = marked_best(rows, self.cut.per_image)
        if self.cut.per_class:
            rows = rows[rows["best"] | self._top.kept(rows)]
        elif self.cut.per_image:
            rows = rows[rows["best"]]
        stream = io.BytesIO()
        parts = (
            {f"part_{n}": rows[rows["prompt"] == n] for n in range(self.parts)} if self.parts > 1 else {"part_0": rows}
        )
        np.savez(stream, digests=np.array(digests, "S64"), seconds=np.float64(seconds), **parts)  # pyright: ignore[reportArgumentType]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._path(block), stream.getvalue())

    def rows(self) -> Iterator[Any]:
        """Yields the detections of each block, of all parts. Raises BenchmarkError if a block is missing or damaged."""
        for n in range(self.count):
            with self._open(n) as block:
                yield joined([block[f"part_{part}"] for part in range(self.parts)])

    def merge(
        self, order: Any, files: Sequence[str], ids: Mapping[str, str], write: Callable[[epath.Path, Any], None]
    ) -> dict[str, Any]:
        """Writes the predictions of all blocks and done.json, then removes the blocks. Returns the content of done.json.

        `order`: Int[images], indices of the images in the order of detection; `files`: the file of each image, by index; `ids`: its
        file by the ids that predictions use. `write` gets a path and the rows of a part, by image and descending score. Parts that
        are there already are not written again.
        Raises BenchmarkError if a block is missing or damaged.
        """
        if self.done is not None:
            return self.done
        missing = [n for n in range(self.count) if not self._path(n).exists()]
        if missing:
            raise BenchmarkError(
                f"{self.folder} lacks {len(missing)} of {self.count} blocks, the first {self._path(missing[0]).name}: give the "
                "same command without --score-only to detect them"
            )
        digests, seconds, kept = dict[str, str](), 0.0, 0
        for n in range(self.count):
            with self._open(n) as block:
                own = block["digests"].tolist()
                seconds += float(block["seconds"])
                digests |= {files[order[i]]: d.decode() for i, d in zip(self.members(n), own, strict=True)}
        sizes = {}
        for part in range(self.parts):
            name = "predictions.json" if self.parts == 1 else f"predictions/{part:05}.json"
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = self._part(part)
            kept += len(rows)
            if not path.exists():
                write(path, rows)
            sizes[name] = path.stat().length
        done = {
            "detections": kept, "seconds": round(seconds, 3), "bytes": sizes, "digests": digests, "files": dict(ids),
        }  # fmt: skip
        write_atomic(self.folder / "done.json", json.dumps(done))
        for n in range(self.count):
            self._path(n).unlink(missing_ok=True)
        return done

    def _part(self, part: int) -> Any:
        """The rows of a part over all blocks, cut, by image and descending score."""
        pieces = []
        for n in range(self.count):
            with self._open(n) as block:
                pieces.append(block[f"part_{part}"])
        rows = joined(pieces)
        if self.cut.per_class:
            # The floors of blocks rise as they are detected, and each process has its own: what they keep is a superset.
            order = np.lexsort((rows["image"], -rows["score"], rows["phrase"], rows["prompt"]))
            keys = rows["prompt"].astype(np.int64)[order] << 32 | rows["phrase"][order]
            rank = np.arange(len(rows)) - np.searchsorted(keys, keys)
            kept = np.zeros(len(rows), bool)
            kept[order] = rank < self.cut.per_class
            rows = rows[kept | rows["best"]]
        return rows[np.lexsort((-rows["score"], rows["image"]))]

    @contextlib.contextmanager
    def _open(self, block: int) -> Iterator[Any]:
        """The members of a block by name, which are read, and checked, when they are taken."""
        path = self._path(block)
        try:
            with np.load(io.BytesIO(path.read_bytes()) if "://" in str(path) else str(path)) as members:
                yield members
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise BenchmarkError(
                f"{path} cannot be read ({error}): remove it and give the same command again"
            ) from None

    def _path(self, block: int) -> epath.Path:
        return self.folder / f"block_{block:05}.npz"


def read_done(folder: epath.Path) -> dict[str, Any]:
    """done.json of finished predictions. Raises BenchmarkError if it is damaged, or if predictions are gone or of another size."""
    done = _read_json(folder / "done.json") or {}
    try:
        for name, size in done["bytes"].items():
            path = folder / name
            found = path.stat().length if path.exists() else None
            if found != size:
                what = "is gone" if found is None else f"has {found:,} bytes, {size:,} were written"
                raise BenchmarkError(f"{path} {what}: remove {folder} and detect again, without --score-only")
    except (KeyError, AttributeError) as error:
        raise BenchmarkError(
            f"{folder / 'done.json'} is damaged ({error!r}): remove {folder} and detect again"
        ) from None
    return done


def joined(pieces: Sequence[Any]) -> Any:
    """The rows of all pieces, in order."""
    return np.concatenate([np.zeros(0, ROW), *pieces])


def concatenated(found: Iterator[tuple[int, int, Any]]) -> Any:
    """Rows of (image, prompt, `Detections`), in the order given; unused rows (phrase -1) are left out."""
    pieces = []
    for image, prompt, detections in found:
        phrases = np.asarray(detections.phrases)
        used = phrases >= 0
        rows = np.zeros(int(used.sum()), ROW)
        rows["image"], rows["prompt"], rows["phrase"] = image, prompt, phrases[used]
        rows["score"], rows["box"] = np.asarray(detections.scores)[used], np.asarray(detections.boxes)[used]
        pieces.append(rows)
    return joined(pieces)


def _read_json(path: epath.Path) -> dict[str, Any] | None:
    """The object in a file of this folder; None without the file. Raises BenchmarkError if it holds no object."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise BenchmarkError(f"{path} is damaged ({error}): remove {path.parent} and detect again") from None
    if not isinstance(found, dict):
        raise BenchmarkError(f"{path} is damaged (no object): remove {path.parent} and detect again")
    return found


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """What differs, of objects by key."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return [change for key in keys for change in _changes(f"{name}.{key}", old.get(key), new.get(key))]
    return [f"{name}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
