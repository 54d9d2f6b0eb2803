"""Verifies an export: runs it on sample images as its users would, and compares its outputs with those of the reference.

Every format is read back from disk: the `.pth` into the PyTorch network, the folder through the Auto classes of
transformers, the graph through onnxruntime. The reference is the network in glip_jax, in float32 at full precision.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw

from glip_jax.config import Config
from glip_jax.data.scenes.backgrounds import background
from glip_jax.inference import category_prompts
from glip_jax.inference.sinks import sink_states
from glip_jax.io import assets
from glip_jax.models.bert import text_mask
from glip_jax.models.glip import GLIP, normalize
from glip_jax.models.tuned_prompts import NONE, SEPARATOR, SPECIAL_ROWS
from glip_jax.structures import boxes as box
from glip_jax.structures import prompts
from glip_jax.structures.canvas import pad_to_canvas, resize, target_size
from glip_jax.weights.export import ExportError, Format, network_settings

__all__ = ["Outputs", "Difference", "NAMES", "Sample", "differences", "reader", "sample_images"]

LOGITS, BOXES = 1e-4, 0.05
"""Allowed differences: of logits (relative to the largest if that exceeds 1), of boxes in pixels."""
NAMES = ("red ball", "blue box", "a green book", "dog")
"""Names in the prompt of the samples."""


class Sample(NamedTuple):
    """An image with its names, and both as inputs of the network: one image at its own extent."""

    image: UInt8[np.ndarray, "H W 3"]
    names: tuple[str, ...]
    tokens: Int[np.ndarray, "1 T"]
    pixels: Float[np.ndarray, "1 3 h w"]


class Outputs(NamedTuple):
    """Outputs of a network for every anchor of a sample."""

    logits: Float[np.ndarray, "A T"]
    boxes: Float[np.ndarray, "A 4"]
    """xyxy in pixels of the resized image, not clipped."""


class Difference(NamedTuple):
    """Largest differences over all samples."""

    logits: float
    boxes: float

    def check(self, what: str) -> None:
        """Raises ExportError beyond LOGITS or BOXES."""
        if not (self.logits <= LOGITS and self.boxes <= BOXES):
            raise ExportError(
                f"{what} differs from the network it came from: logits by {self.logits:.1e} (at most {LOGITS:.0e}), boxes "
                f"by {self.boxes:.3f} pixels (at most {BOXES}); nothing was kept. Please report it with the settings"
            )


Reader = Callable[[Sample], Outputs]


def sample_images(count: int = 2) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Synthetic images of different shapes: colored shapes on patterned backgrounds, the same at every call."""
    pictures = []
    for number, (height, width) in zip(range(count), ((240, 320), (320, 214), (256, 256))):
        rng = np.random.default_rng(number)
        picture = Image.fromarray(background(rng, height, width).astype(np.uint8))
        pen = ImageDraw.Draw(picture)
        for _ in range(8):
            x, y = rng.uniform(0, 0.8, 2) * (width, height)
            w, h = rng.uniform(0.1, 0.5, 2) * (width, height)
            draw = pen.ellipse if rng.random() < 0.5 else pen.rectangle
            draw((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
        pictures.append(np.asarray(picture))
    return pictures


def differences(
    params: Mapping[str, Any], config: Config, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], exported: Reader
) -> Difference:
    """Largest differences between `exported` and the reference network with `params` on the images."""
    logits = boxes = 0.0
    tuned = _tuned_names(params, config)
    names = (*tuned, *(name for name in NAMES if name not in tuned))
    samples = [_sample(image, config, names) for image in images]
    for sample, size, reference in zip(samples, _sizes(images, config), _reference(params, config, images, samples)):
        outputs = exported(sample)
        if outputs.logits.shape != reference.logits.shape or outputs.boxes.shape != reference.boxes.shape:
            raise ExportError(
                f"the exported network has outputs of shapes {outputs.logits.shape} and {outputs.boxes.shape}, "
                f"the reference {reference.logits.shape} and {reference.boxes.shape}"
            )
        scale = max(1.0, float(np.abs(reference.logits).max()))
        logits = max(logits, float(np.abs(outputs.logits - reference.logits).max()) / scale)
        limit = np.asarray(size, np.float32)[None]
        boxes = max(boxes, float(np.abs(box.clip(outputs.boxes, limit) - box.clip(reference.boxes, limit)).max()))
        # A comparison with NaN is false, so it would pass.
        if not (np.isfinite(outputs.logits).all() and np.isfinite(outputs.boxes).all()):
            logits = float("inf")
    return Difference(logits, boxes)


def _sizes(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], config: Config) -> list[tuple[int, int]]:
    rule = config.evaluation
    return [target_size(image.shape[0], image.shape[1], rule.short_side, rule.long_side) for image in images]


def _extent(size: tuple[int, int], config: Config) -> tuple[int, int]:
    multiple = config.model.input.extent_multiple
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def _sample(image: UInt8[np.ndarray, "H W 3"], config: Config, names: Sequence[str]) -> Sample:
    ((height, width),) = _sizes([image], config)
    canvas = _extent((height, width), config)
    pixels = normalize(
        jnp.asarray(pad_to_canvas(resize(image, (height, width)), canvas)[None]),
        jnp.asarray([[height, width]]),
        config.model.input,
    )
    return Sample(image, *_prompt(config, names), np.array(pixels).transpose(0, 3, 1, 2))


def _tuned_names(params: Mapping[str, Any], config: Config, most: int = 2) -> list[str]:
    """The first names with tuned prompts, read from the tokens of the table; none where the vocabulary does not exist here."""
    if not config.model.prompts.names:
        return []
    try:
        tokenizer: Any = prompts.load_tokenizer(assets.resolve(config.model.text.vocabulary))
    except assets.AssetError:
        return []
    table = np.asarray(params["prompts"]["tokens"])
    separator = int((table[SEPARATOR - SPECIAL_ROWS] != NONE).sum())
    rows = [[token for token in row.tolist() if token != NONE] for row in table[:-SPECIAL_ROWS][:most]]
    return [tokenizer.decode(row[: len(row) - separator]) for row in rows]


def _prompt(config: Config, names: Sequence[str]) -> tuple[tuple[str, ...], Int[np.ndarray, "1 T"]]:
    """Those of `names` that fit into a prompt, and its token ids; any ids if the vocabulary does not exist on this machine."""
    text = config.model.text
    try:
        tokenizer = prompts.load_tokenizer(assets.resolve(text.vocabulary))
    except assets.AssetError:
        count = min(15, text.max_tokens, text.vocabulary_size - 1)
        return NAMES, np.arange(1, 1 + count, dtype=np.int64)[None]
    prompt, fitting = category_prompts(names, tokenizer, config)[0]
    return tuple(names[index] for index in fitting), np.asarray(tokenizer.encode(prompt.caption).ids, np.int64)[None]


def _reference(
    params: Mapping[str, Any], config: Config, images: Sequence[UInt8[np.ndarray, "_ _ 3"]], samples: Sequence[Sample]
) -> Iterator[Outputs]:
    """Outputs of the network in glip_jax, on one canvas for all images, so that it is compiled once; each keeps its extent."""
    model = dataclasses.replace(config.model, dtype="float32", remat="none")
    sizes = _sizes(images, config)
    extents = [_extent(size, config) for size in sizes]
    canvas = (max(height for height, _ in extents), max(width for _, width in extents))
    anchors = box.anchors(canvas, model.pyramid.strides, model.anchors.sizes)

    exact = dataclasses.replace(config, model=model)
    sinks = None
    if config.detection.sinks:
        sinks = sink_states(params, exact, prompts.load_tokenizer(assets.resolve(model.text.vocabulary)))

    @jax.jit
    def run(params: Any, image: Any, size: Any, extent: Any, tokens: Any) -> Any:
        pixels, mask = normalize(image, size, model.input), jnp.ones(tokens.shape, bool)
        network, variables = GLIP(model), {"params": params}
        if sinks is None:
            return network.apply(variables, pixels, extent, tokens, mask)
        text: Any = network.apply(variables, tokens, mask, method="encode_text")
        text, behind = jnp.concatenate([text, sinks[None]], 1), ((0, 0), (0, len(sinks)))
        mask = text_mask(jnp.pad(tokens, behind), jnp.pad(mask, behind, constant_values=True), model.text)
        levels = network.apply(variables, pixels, extent, method="encode_image")
        return network.apply(variables, levels, extent, text, mask, method="ground")

    for image, size, extent, sample in zip(images, sizes, extents, samples):
        with jax.default_matmul_precision("highest"):
            found: Any = run(
                params, pad_to_canvas(resize(image, size), canvas)[None], np.asarray([size], np.int32),
                np.asarray([extent], np.int32), sample.tokens.astype(np.int32),
            )  # fmt: skip
        inside = _anchors_of(canvas, extent, model.pyramid.strides)
        boxes = box.decode(np.asarray(found.deltas[0])[inside], anchors[inside])
        yield Outputs(np.asarray(found.logits[0])[inside], np.asarray(boxes, np.float32))


def _anchors_of(canvas: tuple[int, int], extent: tuple[int, int], strides: Sequence[int]) -> Int[np.ndarray, " a"]:
    """Indices of the anchors of the canvas that belong to an image of `extent`, in order."""
    parts, begin = [], 0
    for stride in strides:
        height, width = box.level_shape(canvas, stride)
        h, w = box.level_shape(extent, stride)
        parts.append(begin + np.arange(height * width).reshape(height, width)[:h, :w].reshape(-1))
        begin += height * width
    return np.concatenate(parts)


def reader(form: Format, path: Path, config: Config) -> Reader:
    """The exported network at `path`, loaded as its users load it."""
    match form:
        case "glip-pth":
            return _pth_reader(path, config)
        case "huggingface":
            return _huggingface_reader(path)
        case "onnx":
            return _onnx_reader(path)


def _pth_reader(path: Path, config: Config) -> Reader:
    import torch

    from glip_jax.weights.portable.glip_network import GlipNetwork

    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    state = {name.removeprefix("module."): value for name, value in state.items() if "cls_logits" not in name}
    network = GlipNetwork(network_settings(config.model)).eval()
    network.load_state_dict(state, strict=True)

    def read(sample: Sample) -> Outputs:
        pixels, tokens = torch.from_numpy(sample.pixels), torch.from_numpy(sample.tokens)
        with torch.inference_mode():
            logits, deltas, _ = network(pixels, tokens, torch.ones_like(tokens))
            boxes = network.boxes(deltas, *pixels.shape[-2:])
        return Outputs(logits[0].numpy(), boxes[0].numpy())

    return read


def _huggingface_reader(folder: Path) -> Reader:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    # Its progress bars and advice are not meant for a verification.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = {"trust_remote_code": True, "local_files_only": True}
    processor: Any = transformers.AutoProcessor.from_pretrained(folder, **where)
    model: Any = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(folder, **where).eval()

    def read(sample: Sample) -> Outputs:
        inputs = processor(images=sample.image, text=list(sample.names), return_tensors="pt")
        if inputs["input_ids"].tolist() != sample.tokens.tolist():
            raise ExportError(
                f"the exported tokenizer gives {inputs['input_ids'].tolist()} for {sample.names}, the reference {sample.tokens.tolist()}"
            )
        with torch.inference_mode():
            outputs = model(**inputs)
        return Outputs(outputs.logits[0].numpy(), outputs.pred_boxes[0].numpy())

    return read


def _onnx_reader(folder: Path) -> Reader:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])

    def read(sample: Sample) -> Outputs:
        mask = np.ones_like(sample.tokens)
        inputs = {"pixel_values": sample.pixels, "input_ids": sample.tokens, "attention_mask": mask}
        boxes, _, logits = session.run(None, inputs)
        return Outputs(np.asarray(logits)[0], np.asarray(boxes)[0])

    return read
