"""Preprocessing of images and text, and postprocessing to detections: `AutoProcessor` of an exported GLIP.

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=image, text=["cat", "remote control"], return_tensors="pt")
    found = processor.post_process_grounded_object_detection(model(**inputs), target_sizes=[image.size[::-1]])

A list of strings is a list of names, each asked as it is typed ("St. Bernard" is one name). A string is a caption with a full
stop after each phrase ("a cat. a remote control."); where full stops stand alone ("St. Bernard . poodle"), only those count. See
`GlipProcessor.__call__`. Detections refer to phrases by index; text is never rebuilt from tokens.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

if TYPE_CHECKING:
    # transformers copies what a module imports where it saves the module: the pipeline goes with its processor.
    from .pipeline_glip import GlipPipeline  # noqa: F401

__all__ = ["GlipImageProcessor", "GlipProcessor", "best_detections", "compete"]


class GlipImageProcessor(BaseImageProcessor):
    """Resizes (the short side to `short_side`, the long one at most `long_side`), normalizes, pads to multiples of the extent."""

    model_input_names = ("pixel_values", "pixel_mask")

    def __init__(
        self,
        short_side: int = 800,
        long_side: int = 1333,
        extent_multiple: int = 32,
        order: str = "bgr",
        mean: Sequence[float] = (103.53, 116.28, 123.675),
        std: Sequence[float] = (57.375, 57.12, 58.395),
        detection: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """`mean` and `std`: of values from 0 to 255, in the channel order `order`: "bgr" as in microsoft/GLIP, or "rgb".

        `detection`: as for `GlipProcessor`.
        """
        super().__init__(**kwargs)
        self.detection = detection or {}
        self.short_side, self.long_side, self.extent_multiple = short_side, long_side, extent_multiple
        self.order, self.mean, self.std = order, list(mean), list(std)

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: the rule of microsoft/GLIP, with Python's rounding of halves to even."""
        short, long = sorted((height, width))
        side = self.short_side
        if long / short * side > self.long_side:
            side = max(1, round(self.long_side * short / long))
        if side == short:
            return height, width
        return (int(side * height / width), side) if width < height else (side, int(side * width / height))

    def __call__(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """`preprocess`."""
        return self.preprocess(images, return_tensors, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """One image or several (PIL, or arrays [H W 3] of RGB bytes) to pixels [B 3 H W] and their mask [B H W].

        An image with an EXIF orientation is turned upright, as are the boxes that are found in it.
        """
        listed = images if isinstance(images, list | tuple) else [images]
        pictures = [self._pixels(image) for image in listed]
        multiple = self.extent_multiple
        height, width = (-(-max(p.shape[axis] for p in pictures) // multiple) * multiple for axis in (0, 1))
        values = np.zeros((len(pictures), 3, height, width), np.float32)
        mask = np.zeros((len(pictures), height, width), np.int64)
        for row, picture in enumerate(pictures):
            values[row, :, : picture.shape[0], : picture.shape[1]] = picture.transpose(2, 0, 1)
            mask[row, : picture.shape[0], : picture.shape[1]] = 1
        return BatchFeature({"pixel_values": values, "pixel_mask": mask}, tensor_type=return_tensors)

    def to_rgb(self, image: Image.Image) -> Image.Image:
        """The image upright and in RGB, as boxes refer to it."""
        return to_rgb(image)

    def _pixels(self, image: Any) -> np.ndarray:
        image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)))
        height, width = self.target_size(image.height, image.width)
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        pixels = pixels[..., ::-1] if self.order == "bgr" else pixels
        return (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.1, target_sizes: Any = None
    ) -> list[dict[str, Tensor]]:
        """Detections of one phrase that is the whole text, best first: scores [D], boxes [D 4], labels [D] (all 0).

        For the pipeline of transformers where it is not given `GlipPipeline`: it asks each label in a text of its own.
        """
        share = outputs.logits.new_zeros(len(outputs.logits), 1, outputs.logits.shape[-1])
        share[:, :, 1:-1] = 1  # without [CLS] and [SEP]
        rows = zip(outputs.logits, outputs.pred_boxes, outputs.centerness, share, outputs.image_sizes)
        return [
            _detections(
                row,
                outputs.level_sizes.tolist(),
                self.detection,
                threshold,
                None if target_sizes is None else target_sizes[i],
            )
            for i, row in enumerate(rows)
        ]


class GlipProcessor(ProcessorMixin):
    """Image processor and tokenizer in one call, and postprocessing of outputs to detections."""

    # transformers 5 reads the parts from __init__ and warns of these attributes; transformers 4 needs them.
    if int(transformers.__version__.partition(".")[0]) < 5:
        attributes = ("image_processor", "tokenizer")
        image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"

    def __init__(
        self,
        image_processor: GlipImageProcessor,
        tokenizer: Any,
        separator: str = ". ",
        max_tokens: int = 256,
        detection: dict[str, Any] | None = None,
        names_per_prompt: int = 0,
        **kwargs: Any,
    ) -> None:
        """`detection`: threshold, token_scores, candidates_per_level, nms_iou and max_detections of `best_detections`.

        `names_per_prompt`: the most names of `split_names`; 0: as many as `max_tokens` allow.
        """
        super().__init__(image_processor, tokenizer, **kwargs)
        self.separator, self.max_tokens, self.names_per_prompt = separator, max_tokens, names_per_prompt
        self.detection = detection or {}

    def __call__(self, images: Any = None, text: Any = None, return_tensors: str = "pt", **_: Any) -> BatchFeature:
        """Processes images and text.

        `text` is one of

        - a list of strings, ["cat", "St. Bernard"]: names for all images, each asked as it is typed;
        - a list of such lists, one per image (or one for all);
        - a string, "a cat. a dog.": a caption for all images, a phrase before each full stop;
        - a list of captions, one per image (or one for all): every one ends with a full stop, or has one with spaces around,
          and at least one has several phrases. Any other list of strings is one of names.

        Raises ValueError for a text that names nothing, for names that are the same to the model or of which the vocabulary knows
        nothing, and for a text with more than `max_tokens` tokens (`split_names` gives the parts of a long list).
        """
        data: dict[str, Any] = {}
        if images is not None:
            data |= dict(self.image_processor(images, return_tensors="np"))
        if text is not None:
            count = len(data["pixel_values"]) if images is not None else None
            data |= self._encoded(self._per_image(text, count))
        return BatchFeature(data, tensor_type=return_tensors)

    def _per_image(self, text: Any, count: int | None) -> list[tuple[str, list[tuple[int, int]]]]:
        """Caption and spans of phrases for each image."""
        if isinstance(text, str):
            texts: list[Any] = [text]
        elif all(isinstance(item, str) for item in text):
            stopped = all(item.rstrip().endswith(".") or _ALONE.search(item) for item in text)
            captions = stopped and any(len(_phrases(item)) > 1 for item in text)
            texts = list(text) if captions else [list(text)]
        else:
            texts = list(text)
        if count is not None and len(texts) == 1:
            texts = texts * count
        if count is not None and len(texts) != count:
            raise ValueError(f"{count} images and {len(texts)} texts: give one text per image, or one for all")
        return [self._spans(item) for item in texts]

    def _spans(self, text: str | Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
        if isinstance(text, str):
            spans = _phrases(text)
            if not spans:
                raise ValueError(f"the text {text!r} names nothing: expected phrases with full stops between them")
            return text, spans
        names = self._checked(text)
        begins = np.cumsum([0] + [len(name) + len(self.separator) for name in names]).tolist()
        return self.separator.join(names), [(begin, begin + len(name)) for begin, name in zip(begins, names)]

    def _checked(self, given: Sequence[str]) -> list[str]:
        """The names as they stand in a caption. As in training: text in parentheses is removed, underscores become spaces."""
        if wrong := [name for name in given if not isinstance(name, str)]:
            raise ValueError(
                f"names that are no text: {wrong[:3]}; expected a list of strings, or of such lists, one per image"
            )
        names = [re.sub(r"\(.*\)", "", name).replace("_", " ").replace("  ", " ") for name in given]
        empty = [name for name, cleaned in zip(given, names) if not cleaned.strip()]
        if empty or not names:
            raise ValueError(
                f"names that are empty after cleaning: {empty}; expected at least one name, each with letters"
            )
        first: dict[tuple[int, ...], str] = {}
        for name, ids in zip(given, self._ids(names)):
            if set(ids[1:-1]) <= {self.tokenizer.unk_token_id}:
                raise ValueError(
                    f"{name!r} has no word or character that the model's vocabulary knows: say it otherwise"
                )
            if first.setdefault(tuple(ids), name) is not name:
                raise ValueError(f"{name!r} is the same to the model as {first[tuple(ids)]!r}: remove one")
        return names

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids, [CLS] and [SEP] included; without the advice that transformers gives on long texts."""
        return self.tokenizer(texts, return_offsets_mapping=True, verbose=False)["input_ids"]

    def split_names(self, names: Sequence[str]) -> list[list[int]]:
        """Splits a list of names into prompts: lists of consecutive indices, each as long as a prompt holds.

        Raises ValueError as `__call__`, and for a name that exceeds `max_tokens` alone.
        """
        cleaned, parts = self._checked(names), list[list[int]]()

        def tokens(part: Sequence[int]) -> int:
            caption = self.separator.join(cleaned[index] for index in part)
            return len(self._ids([caption])[0])

        for index, name in enumerate(names):
            full = not parts or 0 < self.names_per_prompt <= len(parts[-1])
            if not full and tokens([*parts[-1], index]) <= self.max_tokens:
                parts[-1].append(index)
                continue
            if tokens([index]) > self.max_tokens:
                raise ValueError(f"{name!r} alone has more than the {self.max_tokens} tokens of a prompt: shorten it")
            parts.append([index])
        return parts

    def _encoded(self, texts: list[tuple[str, list[tuple[int, int]]]]) -> dict[str, np.ndarray]:
        """Token ids and mask [B T], and the tokens of each phrase [B P T]."""
        encoded = self.tokenizer([caption for caption, _ in texts], return_offsets_mapping=True)
        longest = max(len(ids) for ids in encoded["input_ids"])
        if longest > self.max_tokens:
            raise ValueError(
                f"the text has {longest} tokens, the network was trained with {self.max_tokens}: ask in several calls; "
                "processor.split_names(names) gives the indices of the names of each"
            )
        phrases = max(len(spans) for _, spans in texts)
        ids = np.zeros((len(texts), longest), np.int64)
        mask, phrase_map = np.zeros_like(ids), np.zeros((len(texts), phrases, longest), bool)
        for row, (_, spans) in enumerate(texts):
            tokens, offsets = encoded["input_ids"][row], encoded["offset_mapping"][row]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            token_of: dict[int, int] = {}
            for token, (begin, end) in enumerate(offsets):
                for character in range(begin, end):
                    token_of.setdefault(character, token)
            for phrase, (begin, end) in enumerate(spans):
                # If a span begins or ends in white space, the next two characters inward are tried.
                first = next((token_of[c] for c in range(begin, begin + 3) if c in token_of), None)
                last = next((token_of[c] for c in range(end - 1, end - 4, -1) if c in token_of), None)
                if first is not None and last is not None:
                    phrase_map[row, phrase, first : last + 1] = True
        return {"input_ids": ids, "attention_mask": mask, "phrase_map": phrase_map}

    def post_process_grounded_object_detection(
        self,
        outputs: Any,
        input_ids: Tensor | None = None,
        threshold: float = 0.25,
        text_threshold: float | None = None,  # noqa: ARG002
        target_sizes: Any = None,
        text_labels: Sequence[Sequence[str]] | None = None,
        name_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Detections of each image, best first: scores [D], boxes [D 4], labels [D] (phrase numbers), text_labels.

        A score is the square root of alignment times centerness; only those above `threshold` are returned. Boxes are x1,
        y1, x2, y2 in pixels of `target_sizes` (height, width) if given, else of the processed image. `text_labels` replace
        the texts of the phrases; `text_threshold` is not used, since the tokens of a phrase are known. `name_decay`: of
        `compete`, as it was exported by default; 0 for captions, whose phrases may be of one object.
        """
        results = []
        levels = outputs.level_sizes.tolist()
        for row in range(len(outputs.logits)):
            share = outputs.phrase_map[row].to(outputs.logits.dtype)
            fields = (
                outputs.logits[row],
                outputs.pred_boxes[row],
                outputs.centerness[row],
                share,
                outputs.image_sizes[row],
            )
            target = None if target_sizes is None else target_sizes[row]
            settings = self.detection if name_decay is None else {**self.detection, "name_decay": name_decay}
            found = _detections(fields, levels, settings, threshold, target)
            if text_labels is not None:
                words = list(text_labels[row])
            else:
                ids = outputs.input_ids[row] if input_ids is None else input_ids[row]
                words = [self.tokenizer.decode(ids[phrase > 0]) for phrase in share]
            results.append(found | {"text_labels": [words[label] for label in found["labels"].tolist()]})
        return results

    def compete(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`compete` by the exported settings, for detections of several prompts whose `labels` are those of all names."""
        return compete(boxes, scores, labels, **{k: v for k, v in self.detection.items() if k.startswith("name_decay")})


_ALONE = re.compile(r"(?<!\S)\.(?!\S)")
"""A full stop with spaces around."""


def _phrases(text: str) -> list[tuple[int, int]]:
    """Spans of what stands between full stops: those that stand alone if one does between words, else those at the end of a word."""
    for stop in (_ALONE, re.compile(r"\.(?!\S)")):
        edges = [0, *(edge for match in stop.finditer(text) for edge in match.span()), len(text)]
        pieces = [(begin, end) for begin, end in zip(edges[::2], edges[1::2]) if text[begin:end].strip()]
        if len(pieces) > 1:
            break
    return [(end - len(text[begin:end].lstrip()), begin + len(text[begin:end].rstrip())) for begin, end in pieces]


def _detections(
    fields: Sequence[Any], levels: Sequence[int], settings: dict[str, Any], threshold: float, target: Any
) -> dict[str, Tensor]:
    """Scores, boxes and labels of one image above `threshold`; `fields`: logits, boxes, centerness, phrase map and size.

    Boxes are in pixels of `target` (height, width) if given.
    """
    size, settings = fields[-1], dict(settings)
    decay = settings.pop("name_decay", 0.0), settings.pop("name_decay_iou", 0.7)
    boxes, scores, labels = compete(*best_detections(*fields, level_sizes=levels, **settings), *decay)
    keep = scores > threshold
    boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
    if target is not None:
        height, width = (float(n) for n in target)
        below, across = float(size[0]), float(size[1])
        if abs(height * below - width * across) < abs(height * across - width * below):
            raise ValueError(
                f"target_sizes has {height:g} x {width:g} of an image that was processed at {below:g} x {across:g}: its EXIF "
                "orientation turns it; give the size of ImageOps.exif_transpose(image)"
            )
        boxes = boxes * boxes.new_tensor([width / float(size[1]), height / float(size[0])] * 2)
    return {"scores": scores, "boxes": boxes, "labels": labels}


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright and in RGB, with the pixels that the network was trained on.

    Gray of 16 bits is divided by the largest value of the smallest of 8, 10, 12, 14 and 16 bits that holds it; of 32 bits or
    floating point it is scaled from the lowest to the highest value. What is transparent is white.
    """
    image.load()
    try:
        tag = image.getexif().get(0x0112, 1) if image.format != "TIFF" else 1  # Pillow turns TIFF itself
    except Exception:  # damaged metadata beside sound pixels
        tag = 1
    values = np.asarray(image)
    hidden = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        finite = np.isfinite(values)
        known = values[finite]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        if image.mode != "F" and low >= 0 and high < 2**16:
            low, high = 0.0, next(2.0**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
        shares = (np.where(finite, values, low).astype(np.float64) - low) / (high - low if high > low else 1.0)
        gray = np.rint(255 * shares).astype(np.uint8)
        if isinstance(hidden, int):
            gray[values == hidden] = 255
        rgb = Image.fromarray(gray).convert("RGB")
    elif image.has_transparency_data:
        layers = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    else:
        rgb = image.convert("RGB")
    rgb.info = {}  # the orientation, which would turn it again where it is given here once more
    turns = Image.Transpose
    order = (turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE, turns.ROTATE_270,
             turns.TRANSVERSE, turns.ROTATE_90)  # fmt: skip
    return rgb.transpose(order[int(tag) - 2]) if tag in range(2, 9) else rgb


def best_detections(
    logits: Tensor,
    boxes: Tensor,
    centerness: Tensor,
    phrase_map: Tensor,
    size: Tensor,
    level_sizes: Sequence[int],
    threshold: float = 0.05,
    candidates_per_level: int = 1000,
    nms_iou: float = 0.6,
    max_detections: int = 100,
    token_scores: str = "mean",
    sinks: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [D 4], scores [D] and phrases [D] of one image, best first, selected as in microsoft/GLIP.

    logits [A T], boxes [A 4], centerness [A] (logits), phrase_map [P T] (1 for the tokens of the phrase), size (height,
    width) of the image. The alignment of a phrase at an anchor is the mean probability of its tokens, or with `token_scores`
    "max" the highest; a candidate has more than `threshold`; boxes are x2 - x1 + 1 wide; non-maximum suppression at `nms_iou`
    is per phrase. The last `sinks` logits are of tokens without a meaning; anchors that fit one of them better than every phrase
    are left out.
    """
    share = phrase_map / phrase_map.sum(-1, keepdim=True).clamp(min=1)
    tokens = logits.sigmoid()
    tokens, nothing = tokens[:, : tokens.shape[1] - sinks], tokens[:, tokens.shape[1] - sinks :]
    aligned = tokens @ share.T
    if token_scores == "max":
        aligned = torch.stack([(tokens * own).amax(-1) for own in phrase_map], -1)
    if sinks:
        aligned = torch.where(aligned.amax(1, True) >= nothing.amax(1, True), aligned, torch.zeros_like(aligned))
    scores = torch.where(aligned > threshold, aligned * centerness.sigmoid()[:, None], torch.zeros_like(aligned))
    kept, begin = [], 0
    for count in level_sizes:
        level = scores[begin : begin + count].flatten()
        best, index = level.topk(min(candidates_per_level, level.numel()))
        kept.append(index[best > 0] + begin * scores.shape[1])
        begin += count
    chosen = torch.cat(kept)
    chosen = chosen[scores.flatten()[chosen].argsort(descending=True, stable=True)]
    score, phrase = scores.flatten()[chosen].sqrt(), chosen % scores.shape[1]
    limit = torch.stack([size[1], size[0], size[1], size[0]]).to(boxes.dtype) - 1
    box = torch.minimum(boxes[chosen // scores.shape[1]].clamp(min=0), limit)
    alive, result = torch.ones_like(phrase, dtype=torch.bool), []
    area = (box[:, 2] - box[:, 0] + 1) * (box[:, 3] - box[:, 1] + 1)
    while len(result) < max_detections and bool(alive.any()):
        best = int(alive.int().argmax())
        result.append(best)
        sides = torch.minimum(box[:, 2:], box[best, 2:]) - torch.maximum(box[:, :2], box[best, :2]) + 1
        overlap = sides.clamp(min=0).prod(-1)
        covered = overlap / (area + area[best] - overlap) > nms_iou
        alive &= ~(covered & (phrase == phrase[best]))
        alive[best] = False
    order = torch.tensor(result, dtype=torch.long, device=boxes.device)
    return box[order], score[order], phrase[order]


def compete(
    boxes: Tensor, scores: Tensor, labels: Tensor, name_decay: float = 0.0, name_decay_iou: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [D 4], scores [D] and labels [D], best first, after the names have competed.

    A score is multiplied by (own / highest)^name_decay: the highest of the boxes of other names whose IoU with it is above
    `name_decay_iou`, if that is higher.
    """
    if name_decay and len(scores):
        sides = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
        overlap, area = sides.clamp(min=0).prod(-1), (boxes[:, 2:] - boxes[:, :2]).prod(-1)
        near = (overlap / (area[:, None] + area - overlap) > name_decay_iou) & (labels[:, None] != labels)
        highest = torch.maximum(torch.where(near, scores, torch.zeros_like(scores)).amax(1), scores)
        scores = torch.where(highest > 0, scores * (scores / highest) ** name_decay, scores)
    order = scores.argsort(descending=True, stable=True)
    return boxes[order], scores[order], labels[order]
