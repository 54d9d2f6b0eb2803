"""Picture scenes: named pictures pasted on made backgrounds, with the exact boxes of what stays visible and captions.

A scene is a pure function of (pictures, style, seed, index): the same arguments give the same pixels on any machine
with the same Pillow. Scenes are detection data (boxes with names) and grounding data (a caption whose phrases have
boxes) at once; `make_scenes` writes either form in the public formats that the importers read (COCO detection JSON,
MDETR's grounding JSON).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Float32, Int32, UInt8
from PIL import Image
from tqdm import tqdm

from glip_jax.data.scene_captions import describe

__all__ = ["Picture", "Scene", "SceneError", "SceneStyle", "draw_scene", "load_pictures", "make_scenes"]


class SceneError(ValueError):
    """Pictures or settings from which no scene can be drawn."""


class Picture(NamedTuple):
    """A named picture with its transparency."""

    name: str
    image: Image.Image
    """RGBA."""


@dataclass(frozen=True)
class SceneStyle:
    """What scenes look like; lengths in pixels."""

    height: int = 256
    width: int = 256
    objects: tuple[int, int] = (3, 9)
    """Fewest and most pictures that are tried per scene."""
    sides: tuple[int, int] = (40, 110)
    """Smallest and largest side of a picture before rotation."""
    rotation: float = 25.0
    """Largest angle either way, degrees."""
    repeat: float = 0.35
    """Chance that a picture repeats a name that the scene already shows."""
    least_visible: float = 0.5
    """Share of a picture's own pixels that must stay visible."""


class Scene(NamedTuple):
    """A drawn scene."""

    image: UInt8[np.ndarray, "H W 3"]
    boxes: Float32[np.ndarray, "N 4"]
    """xyxy pixels, end exclusive, around exactly the visible pixels."""
    names: Int32[np.ndarray, " N"]
    """Index into the pictures that the scene was drawn from."""
    caption: str
    spans: tuple[tuple[int, int], ...]
    """Per box the characters of its phrase, end exclusive; (0, 0): the caption does not speak of it."""


def load_pictures(
    folder: str, split: Literal["training", "held-out", "all"] = "training", limit: int = 0
) -> list[Picture]:
    """Reads the pictures that `folder`/names.json (file -> name, split) lists, sorted by name.

    `limit` keeps so many of them, evenly spread over the alphabet; 0: all.

    Raises:
        SceneError: names.json or a picture of it is missing or unreadable, or fewer than `limit` are there.
    """
    root = epath.Path(folder)
    listing = root / "names.json"
    if not listing.exists():
        raise SceneError(
            f"{listing} is not there: expected a folder with pictures and names.json (file -> name, split)"
        )
    try:
        entries = json.loads(listing.read_text())
        chosen = sorted((v["name"], file) for file, v in entries.items() if split in ("all", v["split"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SceneError(f"{listing} cannot be read ({error!r}): expected file -> {{name, split}} as JSON") from error
    if not chosen or limit > len(chosen):
        raise SceneError(f"{listing} has {len(chosen)} pictures of split {split!r}, {max(limit, 1)} were asked for")
    if limit:
        chosen = [chosen[i * len(chosen) // limit] for i in range(limit)]
    pictures = []
    for name, file in chosen:
        try:
            with (root / file).open("rb") as stream, Image.open(stream) as image:
                pictures.append(Picture(name, image.convert("RGBA")))
        except OSError as error:
            raise SceneError(f"{root / file} ({name!r}) is no readable picture: {error}") from error
    return pictures


def draw_scene(pictures: Sequence[Picture], seed: int, index: int, style: SceneStyle = SceneStyle()) -> Scene:
    """Draws scene `index` of the endless series that `seed` names.

    Pictures are pasted one over the other; one that would leave an earlier one with less than `least_visible` of its
    pixels is tried elsewhere a few times, then left out. Boxes and caption speak of what is visible in the end.

    Raises:
        SceneError: no pictures, or a canvas smaller than the largest picture.
    """
    if not pictures:
        raise SceneError("a scene needs at least one picture")
    if min(style.height, style.width) < style.sides[1]:
        raise SceneError(
            f"a canvas of {style.height} x {style.width} is smaller than the pictures' side {style.sides[1]}"
        )
    # A fixed word apart from seed and index, so that these streams cross no other that is seeded by two numbers.
    rng = np.random.default_rng([0x5CE0E, seed, index])
    canvas = _background(rng, style.height, style.width)
    owner = np.full((style.height, style.width), -1, np.int32)
    names: list[int] = []
    areas: list[int] = []
    for _ in range(int(rng.integers(style.objects[0], style.objects[1] + 1))):
        name = _next_name(rng, names, len(pictures), style.repeat)
        side = float(np.exp(rng.uniform(np.log(style.sides[0]), np.log(style.sides[1]))))
        sprite = _sprite(pictures[name].image, side, float(rng.uniform(-style.rotation, style.rotation)))
        if sprite.shape[0] > style.height or sprite.shape[1] > style.width:
            continue
        solid = sprite[..., 3] > 0.5
        place = _find_place(rng, solid, owner, np.asarray(areas), style.least_visible)
        if place is None:
            continue
        rows, columns = slice(place[0], place[0] + solid.shape[0]), slice(place[1], place[1] + solid.shape[1])
        alpha = sprite[..., 3:]
        canvas[rows, columns] = canvas[rows, columns] * (1 - alpha) + sprite[..., :3] * alpha
        owner[rows, columns][solid] = len(names)
        names.append(name)
        areas.append(int(solid.sum()))
    boxes = np.array([_box(owner == i) for i in range(len(names))], np.float32).reshape(-1, 4)
    caption, spans = describe(rng, [pictures[i].name for i in names], boxes, style.sides)
    image = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Scene(image, boxes, np.array(names, np.int32), caption, spans)


def make_scenes(
    out: str,
    kind: Literal["detection", "grounding"],
    count: int,
    seed: int,
    pictures: Sequence[Picture],
    style: SceneStyle = SceneStyle(),
    progress: bool = False,
) -> epath.Path:
    """Writes `count` scenes as `out`/images/*.jpg and `out`/annotations.json; returns the path of the latter.

    detection: COCO JSON with every name of `pictures` as a category; grounding: MDETR's JSON, one image per caption,
    boxes with `tokens_positive`. annotations.json is written last and renamed into place, and says under `info` what
    made it: a folder that is finished with the same settings is left as it is.

    Raises:
        SceneError: `count` below 1, or `out` holds scenes of other settings.
    """
    if count < 1:
        raise SceneError(f"count is {count}: expected at least 1 scene")
    root = epath.Path(out)
    info = {
        "description": "picture scenes of glip_jax", "kind": kind, "count": count, "seed": seed,
        "style": json.loads(json.dumps(asdict(style))), "names": [picture.name for picture in pictures],
    }  # fmt: skip
    target = root / "annotations.json"
    if target.exists():
        found = json.loads(target.read_text()).get("info", {})
        changed = sorted(key for key in info if found.get(key) != info[key])
        if changed:
            raise SceneError(
                f"{root} holds scenes that differ in {', '.join(changed)}: take another folder or delete it"
            )
        return target
    (root / "images").mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in tqdm(range(count), desc=f"{kind} scenes", unit="scene", disable=not progress):
        scene = draw_scene(pictures, seed, index, style)
        file = f"{index:06d}.jpg"
        with (root / "images" / file).open("wb") as stream:
            Image.fromarray(scene.image).save(stream, "JPEG", quality=92)
        entry = {"id": index + 1, "file_name": file, "height": style.height, "width": style.width}
        images.append(entry | {"caption": scene.caption} if kind == "grounding" else entry)
        for annotation in _annotations(scene, kind):
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0} | annotation)
    content: dict[str, Any] = {"info": info, "images": images, "annotations": annotations}
    if kind == "detection":
        content["categories"] = [{"id": i + 1, "name": picture.name} for i, picture in enumerate(pictures)]
    unfinished = root / "annotations.json.unfinished"
    unfinished.write_text(json.dumps(content))
    unfinished.rename(target)
    return target


def _annotations(scene: Scene, kind: Literal["detection", "grounding"]) -> Iterator[dict[str, Any]]:
    """Yields the scene's boxes in COCO's or MDETR's form (bbox = x, y, width, height)."""
    for box, name, span in zip(scene.boxes.tolist(), scene.names.tolist(), scene.spans, strict=True):
        x1, y1, x2, y2 = box
        form = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
        if kind == "detection":
            yield form | {"category_id": name + 1}
        elif span[1] > span[0]:
            yield form | {"category_id": 1, "tokens_positive": [list(span)]}


def _next_name(rng: np.random.Generator, names: Sequence[int], count: int, repeat: float) -> int:
    if names and rng.random() < repeat:
        return int(rng.choice(names))
    return int(rng.integers(count))


def _sprite(image: Image.Image, side: float, angle: float) -> Float32[np.ndarray, "h w 4"]:
    """The picture at `side` pixels, rotated by `angle` degrees, cut to what is not transparent; alpha in [0, 1]."""
    scale = side / max(image.size)
    small = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    # Pillow resizes and rotates RGBA with premultiplied colours, so nothing transparent bleeds into the edge.
    values = np.asarray(small.rotate(angle, Image.Resampling.BICUBIC, expand=True), np.float32)
    values[..., 3] /= 255
    inside = values[..., 3] > 0.5
    x1, y1, x2, y2 = (int(v) for v in _box(inside))
    return values[y1:y2, x1:x2]


def _find_place(
    rng: np.random.Generator,
    solid: Bool[np.ndarray, "h w"],
    owner: Int32[np.ndarray, "H W"],
    areas: np.ndarray,
    least_visible: float,
) -> tuple[int, int] | None:
    """Row and column at which `solid` leaves every earlier picture visible enough; None after eight tries."""
    for _ in range(8):
        row = int(rng.integers(owner.shape[0] - solid.shape[0] + 1))
        column = int(rng.integers(owner.shape[1] - solid.shape[1] + 1))
        if not len(areas):
            return row, column
        visible = np.bincount(owner[owner >= 0], minlength=len(areas))
        under = owner[row : row + solid.shape[0], column : column + solid.shape[1]][solid]
        visible = visible - np.bincount(under[under >= 0], minlength=len(areas))
        if (visible >= least_visible * areas).all():
            return row, column
    return None


def _box(mask: Bool[np.ndarray, "H W"]) -> tuple[int, int, int, int]:
    """xyxy, end exclusive, around the true pixels; zeros if there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _background(rng: np.random.Generator, height: int, width: int) -> Float32[np.ndarray, "H W 3"]:
    """Gradient, stripes, blurred patches or a plain colour, with noise on top; values 0-255."""
    first, second = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    match int(rng.integers(4)):
        case 0:
            share = (along - along.min()) / (np.ptp(along) + 1)
        case 1:
            share = (np.sin(along * np.float32(2 * np.pi / rng.uniform(12, 60))) > 0).astype(np.float32)
        case 2:
            cells = Image.fromarray(rng.random((int(rng.integers(3, 12)), int(rng.integers(3, 12)))).astype(np.float32))
            share = np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC))
        case _:
            share = np.zeros((height, width), np.float32)
    canvas = first + (second - first) * share[..., None]
    noise = rng.standard_normal((height, width, 3), np.float32) * np.float32(rng.uniform(2, 22))
    return np.clip(canvas + noise, 0, 255).astype(np.float32)
