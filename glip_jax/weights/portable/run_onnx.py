"""Detects with the model.onnx beside this file; needs numpy, onnxruntime, pillow and tokenizers, no other library.

    python run_onnx.py photo.jpg --names="red apple,snail" --threshold=0.3 --draw=drawn

or, from Python with this folder as the current one:

    from run_onnx import Detector

    boxes, scores, labels = Detector(".")(Image.open("photo.jpg"), ["red apple", "snail"])
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw, ImageOps
from tokenizers import Tokenizer

__all__ = ["Detector"]


class Detector:
    """The exported network with its settings, called with an image and names."""

    def __init__(self, folder: str | Path, providers: Sequence[str] | None = None) -> None:
        """`folder`: what `export --format=onnx` wrote. `providers`: of onnxruntime, such as CUDAExecutionProvider; default: all there are."""
        self.settings = json.loads((Path(folder) / "settings.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        providers = providers or onnxruntime.get_available_providers()
        self.session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), providers=list(providers))

    def __call__(self, image: Image.Image, names: Sequence[str], threshold: float = 0.3) -> tuple[np.ndarray, ...]:
        """Boxes [N 4] (x1, y1, x2, y2 in pixels of the upright image), scores [N], and labels [N], indices of `names`; best first.

        A list that is longer than a prompt is asked in several. Raises ValueError for names that cannot be asked, and for images of
        more than 8 bits a channel.
        """
        image = upright(image)
        pixels, size = self._pixels(image)
        found = []
        for part in self.split(names):
            ids, phrases = self._prompt([clean(names[index]) for index in part])
            feed = {"pixel_values": pixels, "input_ids": ids, "attention_mask": np.ones_like(ids)}
            boxes, centerness, logits = self.session.run(["boxes", "centerness", "logits"], feed)
            best = self._best(
                np.asarray(boxes)[0], np.asarray(centerness)[0], np.asarray(logits)[0], phrases, size, pixels.shape[2:]
            )
            found.append((*best[:2], np.array(part)[best[2]]))
        boxes, scores, labels = map(np.concatenate, zip(*found))
        scores = self._competed(boxes, scores, labels)
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] > threshold]
        scale = np.array([image.width / size[1], image.height / size[0]] * 2, np.float32)
        return boxes[order] * scale, scores[order], labels[order]

    def split(self, names: Sequence[str]) -> list[list[int]]:
        """Indices of the names of each prompt. Raises ValueError for names that are empty, unknown, equal or too long."""
        parts, first, most = list[list[int]](), dict[tuple[int, ...], str](), self.settings["names_per_prompt"]
        if isinstance(names, str) or not names:
            raise ValueError(f"names are {names!r}: expected a list with at least one")
        for index, name in enumerate(names):
            ids = tuple(self.tokenizer.encode(clean(name)).ids)
            if not clean(name).strip() or set(ids[1:-1]) <= {self.tokenizer.token_to_id("[UNK]")}:
                raise ValueError(f"{name!r} has no word that the model's vocabulary knows: say it otherwise")
            if first.setdefault(ids, name) is not name:
                raise ValueError(f"{name!r} is the same to the model as {first[ids]!r}: remove one")
            if len(ids) > self.settings["max_tokens"]:
                raise ValueError(f"{name!r} has {len(ids)} tokens, a prompt {self.settings['max_tokens']}: shorten it")
            longer = self._caption([clean(names[other]) for other in [*(parts[-1] if parts else []), index]])
            fits = len(self.tokenizer.encode(longer).ids) <= self.settings["max_tokens"]
            if parts and fits and not 0 < most <= len(parts[-1]):
                parts[-1].append(index)
            else:
                parts.append([index])
        return parts

    def _caption(self, names: Sequence[str]) -> str:
        return self.settings["separator"].join(names)

    def _prompt(self, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [1 T], and the tokens of each name [P T]."""
        encoded = self.tokenizer.encode(self._caption(names))
        phrases, begin = np.zeros((len(names), len(encoded.ids)), np.float32), 0
        for row, name in enumerate(names):
            end = begin + len(name)
            for token, (left, right) in enumerate(encoded.offsets):
                phrases[row, token] = begin <= left < right <= end
            begin = end + len(self.settings["separator"])
        return np.array([encoded.ids], np.int64), phrases

    def _pixels(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int]]:
        """Normalized pixels [1 3 H W], sides of multiples of the extent, and the height and width of the resized image in them."""
        s, (short, long) = self.settings, sorted(image.size)
        side = (
            s["short_side"]
            if long / short * s["short_side"] <= s["long_side"]
            else max(1, round(s["long_side"] * short / long))
        )
        width, height = (
            image.size if side == short
            else (side, int(side * image.height / image.width)) if image.width < image.height
            else (int(side * image.width / image.height), side)
        )  # fmt: skip
        values = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        values = (values[..., ::-1] if s["order"] == "bgr" else values) - np.array(s["mean"], np.float32)
        padded = np.zeros(
            (1, 3, *(-(-n // s["extent_multiple"]) * s["extent_multiple"] for n in (height, width))), np.float32
        )
        padded[0, :, :height, :width] = (values / np.array(s["std"], np.float32)).transpose(2, 0, 1)
        return padded, (height, width)

    def _best(
        self, boxes: np.ndarray, centerness: np.ndarray, logits: np.ndarray, phrases: np.ndarray, size: tuple[int, int], canvas: Any
    ) -> tuple[np.ndarray, ...]:  # fmt: skip
        """Boxes, scores and phrases: candidates of each level, then non-maximum suppression by phrase, boxes x2 - x1 + 1 wide."""
        s = self.settings["detection"]
        tokens, count = 1 / (1 + np.exp(-logits)), phrases.shape[1]
        if s["token_scores"] == "max":
            aligned = np.stack([(tokens[:, :count] * own).max(1) for own in phrases], 1)
        else:
            aligned = tokens[:, :count] @ (phrases / phrases.sum(1, keepdims=True)).T
        candidate = aligned > s["threshold"]
        if s["sinks"]:
            candidate &= aligned.max(1, keepdims=True) >= tokens[:, count:].max(1, keepdims=True)
        scores, kept, begin = (
            np.where(candidate, aligned / (1 + np.exp(-centerness[:, None])), 0),
            list[np.ndarray](),
            0,
        )
        for stride in self.settings["strides"]:
            end = begin + -(-canvas[0] // stride) * -(-canvas[1] // stride) * len(phrases)
            best = begin + np.argsort(-scores.flat[begin:end], kind="stable")[: s["candidates_per_level"]]
            kept.append(best[scores.flat[best] > 0])
            begin = end
        chosen = np.concatenate(kept)
        chosen = chosen[np.argsort(-scores.flat[chosen], kind="stable")]
        boxes = np.clip(boxes[chosen // len(phrases)], 0, np.array([size[1], size[0]] * 2, np.float32) - 1)
        labels, result, alive = chosen % len(phrases), list[int](), np.ones(len(chosen), bool)
        area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
        while alive.any() and len(result) < s["max_detections"]:
            best = int(alive.argmax())
            result.append(best)
            sides = np.minimum(boxes[:, 2:], boxes[best, 2:]) - np.maximum(boxes[:, :2], boxes[best, :2]) + 1
            overlap = np.maximum(sides, 0).prod(1)
            alive &= (overlap / (area + area[best] - overlap) <= s["nms_iou"]) | (labels != labels[best])
            alive[best] = False
        return boxes[result], np.sqrt(scores.flat[chosen[result]]).astype(np.float32), labels[result]

    def _competed(self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Scores times (own / highest)^name_decay: the highest of the boxes of other names in the same place, if that is higher."""
        s = self.settings["detection"]
        sides = np.minimum(boxes[:, None, 2:], boxes[:, 2:]) - np.maximum(boxes[:, None, :2], boxes[:, :2])
        overlap, area = np.maximum(sides, 0).prod(2), (boxes[:, 2:] - boxes[:, :2]).prod(1)
        near = (overlap > s["name_decay_iou"] * (area[:, None] + area - overlap)) & (labels[:, None] != labels)
        highest = np.maximum(np.where(near, scores, 0).max(1, initial=0), np.maximum(scores, 1e-9))
        return (scores * (scores / highest) ** s["name_decay"]).astype(np.float32)


def clean(name: str) -> str:
    """A name as it stands in a prompt, as in training: without text in parentheses, spaces for underscores."""
    return re.sub(r"\(.*\)", "", name).replace("_", " ").replace("  ", " ")


def upright(image: Image.Image) -> Image.Image:
    """RGB, turned by its EXIF orientation; what is transparent is white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(f"an image of mode {image.mode}: expected 8 bits a channel, scale it first")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return image.convert("RGB")


def main() -> None:
    """Prints a line of JSON an image."""
    parser = argparse.ArgumentParser(description="Detects names in images with model.onnx.")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--names", required=True, help="names with commas between them")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score, default 0.3")
    parser.add_argument(
        "--folder", default=str(Path(__file__).parent), help="folder of model.onnx; default: that of this file"
    )
    parser.add_argument("--draw", default="", metavar="FOLDER", help="folder to write the images with boxes to")
    given = parser.parse_args()
    detector, names = Detector(given.folder), [name.strip() for name in given.names.split(",")]
    for path in given.images:
        with Image.open(path) as image:
            found = detector(image, names, given.threshold)
            drawn = upright(image)
        rows = [
            {"box": [round(float(x), 2) for x in box], "score": round(float(score), 5), "name": names[label]} for box, score, label in zip(*found)
        ]  # fmt: skip
        print(json.dumps({"file": path, "detections": rows}, ensure_ascii=False))
        if given.draw:
            pen = ImageDraw.Draw(drawn)
            for row in rows:
                pen.rectangle(row["box"], outline="red", width=2)
                pen.text((row["box"][0] + 3, row["box"][1] + 3), f"{row['name']} {row['score']:.2f}", fill="red")
            Path(given.draw).mkdir(parents=True, exist_ok=True)
            drawn.save(Path(given.draw) / f"{Path(path).stem}.png")


if __name__ == "__main__":
    main()
