"""Batch invariance: results of an image do not depend on canvas, batch, position in the batch and text padding."""

from functools import cache, partial
from typing import Any, Literal

import jax
import numpy as np
import pytest

from glip_jax.config import (
    AnchorConfig,
    BackboneConfig,
    Config,
    DetectionConfig,
    FusionConfig,
    HeadConfig,
    ModelConfig,
    PyramidConfig,
    TextConfig,
)
from glip_jax.inference.postprocess import detect
from glip_jax.models.glip import GLIP
from glip_jax.structures import boxes as box
from glip_jax.structures.batch import DROPS, Batch
from glip_jax.training.assignment import assign
from glip_jax.training.losses import loss_sums
from tests import tiny_run

pytestmark = pytest.mark.compiles

CANVAS, TOKENS, SLOTS = (136, 168), 12, 4
CANVASES = {"flat": CANVAS, "resized": (168, 136)}
CLOSE = 2e-5

Coarse = Literal["flat", "resized"]


def _config(coarse: Coarse) -> Config:
    """`flat`: a network as GLIP's; `resized`: one with all that GLIP's has not."""
    new = coarse == "resized"
    model = ModelConfig(
        backbone=BackboneConfig(width=8, depths=(2, 2, 1, 1), heads=(1, 1, 2, 2), window=3),
        pyramid=PyramidConfig(channels=16),
        text=TextConfig(
            vocabulary_size=64,
            width=16,
            layers=1,
            heads=2,
            hidden=32,
            positions=TOKENS,
            max_tokens=TOKENS,
            mask="phrase" if new else "padding",
            separators=(1, 2, 3),
        ),
        fusion=FusionConfig(width=16, heads=2),
        head=HeadConfig(blocks=2, groups=4, coarse_offsets=coarse, presence=new, positions=new),
        anchors=AnchorConfig((16, 32, 64, 128, 256)),
    )
    # All candidates are kept, so that no tie decides which of them is the last.
    return Config(model=model, detection=DetectionConfig(threshold=1e-3, candidates_per_level=10**6))


@cache
def _params(coarse: Coarse) -> Any:
    return tiny_run.parameters(_config(coarse).model)


def _example(seed: int, size: tuple[int, int], extent: tuple[int, int]) -> dict[str, Any]:
    """One image of `size` at `extent` with tokens and boxes."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(5, TOKENS - 2))
    corner = rng.uniform(0, 0.6, (SLOTS, 2)) * size[::-1]
    sides = rng.uniform(0.2, 0.4, (SLOTS, 2)) * size[::-1]
    return {
        "pixels": rng.normal(size=(*size, 3)).astype(np.float32),
        "size": size,
        "extent": extent,
        "tokens": rng.integers(1, 64, count),
        "boxes": np.concatenate([corner, corner + sides], 1).astype(np.float32),
        "map": rng.uniform(size=(SLOTS, count)) < 0.4,
    }


def _batch(examples: list[dict[str, Any]], canvas: tuple[int, int], tokens: int) -> tuple[np.ndarray, Batch]:
    count = len(examples)
    image = np.zeros((count, *canvas, 3), np.float32)
    ids, mask = np.zeros((count, tokens), np.int32), np.zeros((count, tokens), bool)
    positive = np.zeros((count, SLOTS, tokens), bool)
    for i, e in enumerate(examples):
        image[i, : e["size"][0], : e["size"][1]] = e["pixels"]
        ids[i, : len(e["tokens"])], mask[i, : len(e["tokens"])] = e["tokens"], True
        ids[i, len(e["tokens"]) :] = 7  # values of padding must not matter
        positive[i, :, : len(e["tokens"])] = e["map"]
    batch = Batch(
        image=np.zeros((count, *canvas, 3), np.uint8),
        size=np.asarray([e["size"] for e in examples], np.int32),
        extent=np.asarray([e["extent"] for e in examples], np.int32),
        tokens=ids, token_mask=mask, boxes=np.stack([e["boxes"] for e in examples]),
        box_mask=np.ones((count, SLOTS), bool), box_weight=np.ones((count, SLOTS), np.float32), positive_map=positive, token_loss_mask=np.ones_like(mask), valid=np.ones(count, bool),
        source=np.zeros(count, np.int32), record=np.zeros(count, np.int32), dropped=np.zeros((count, len(DROPS)), np.int32),
    )  # fmt: skip
    return image, batch


@partial(jax.jit, static_argnums=0)
def _run(coarse: Coarse, params: Any, image: Any, batch: Batch) -> Any:
    config, canvas = _config(coarse), image.shape[1:3]
    found = GLIP(config.model).apply({"params": params}, image, batch.extent, batch.tokens, batch.token_mask)
    targets = assign(batch.boxes, batch.box_mask, batch.extent, canvas, config.model, config.loss)
    sums = loss_sums(found, targets, batch, canvas, config)  # pyright: ignore[reportArgumentType]
    detections = detect(
        found, batch.positive_map, batch.size, batch.extent, canvas, config.model, config.detection  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return found, sums, detections


def _valid(flat: np.ndarray, extent: tuple[int, int], canvas: tuple[int, int]) -> np.ndarray:
    """Selects from [A ...] on the canvas the anchors of the extent, in their order for the image alone."""
    parts, begin = [], 0
    for stride in PyramidConfig().strides:
        h, w = box.level_shape(canvas, stride)
        valid = box.level_shape(extent, stride)
        grid = flat[begin : begin + h * w].reshape(h, w, *flat.shape[1:])[: valid[0], : valid[1]]
        parts.append(grid.reshape(valid[0] * valid[1], *flat.shape[1:]))
        begin += h * w
    return np.concatenate(parts)


def _results(coarse: Coarse, examples: list[dict[str, Any]], row: int, canvas: tuple[int, int], tokens: int) -> Any:
    """All outputs, losses and detections of one image, in an order that does not depend on canvas and padding."""
    image, batch = _batch(examples, canvas, tokens)
    found, sums, detections = jax.tree.map(np.asarray, _run(coarse, _params(coarse), image, batch))
    example = examples[row]
    result = {
        name: _valid(value[row], example["extent"], canvas) for name, value in found._asdict().items() if name != "presence"
    }  # fmt: skip
    if len(found.presence):
        result["presence"] = found.presence[row][: len(example["tokens"])]
    result["logits"] = result["logits"][:, : len(example["tokens"])]
    # The fraction of clamped offsets is empty in a network without a bound.
    result |= {f"loss {name}": value[row] for name, value in sums._asdict().items() if len(value)}
    return result | {f"detected {name}": value[row] for name, value in detections._asdict().items()}


def _assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        bound = CLOSE * max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(found[name], value, rtol=0, atol=bound, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("coarse", "size", "extent"),
    [
        ("flat", (90, 121), (96, 128)),  # the default policy: rounded up to 32
        ("flat", (75, 109), (75, 109)),  # every level odd or cut
        ("resized", (150, 41), (150, 41)),  # a single cell on the coarse levels
    ],
)
def test_equals_the_image_alone(coarse: Coarse, size: tuple[int, int], extent: tuple[int, int]) -> None:
    """On a larger canvas with another image and more text padding, results equal those of the image alone."""
    example = _example(1, size, extent)
    other = _example(2, (130, 130), (136, 136))
    alone = _results(coarse, [example], 0, extent, TOKENS - 2)
    assert alone["detected scores"].max() > 0 and alone["loss box"] > 0
    # Three images on the canvas of the test below: one program serves both.
    _assert_same(_results(coarse, [other, example, other], 1, CANVASES[coarse], TOKENS), alone)


@pytest.mark.parametrize(
    ("seed", "coarse"),
    [(seed, "flat") for seed in range(8)]
    + [pytest.param(seed, "resized", marks=pytest.mark.slow) for seed in range(8, 12)],
)
def test_batch_invariance(seed: int, coarse: Coarse) -> None:
    """Random extents in one compiled shape: position in the batch and the other images have no effect."""
    rng, canvas = np.random.default_rng([seed, 99]), CANVASES[coarse]

    def draw(number: int) -> dict[str, Any]:
        extent = int(rng.integers(33, canvas[0] + 1)), int(rng.integers(33, canvas[1] + 1))
        if seed % 2:
            extent = min(-(-extent[0] // 32) * 32, 128), min(-(-extent[1] // 32) * 32, 128)
        size = extent[0] - int(rng.integers(0, 9)), extent[1] - int(rng.integers(0, 9))
        return _example(100 * seed + number, size, extent)

    example, *others = (draw(number) for number in range(5))
    first = _results(coarse, [example, *others[:2]], 0, canvas, TOKENS)
    _assert_same(_results(coarse, [others[2], others[3], example], 2, canvas, TOKENS), first)


def test_the_extent_itself_matters() -> None:
    """The tests above can fail: the same image at another extent has other scores."""
    example = _example(3, (64, 64), (64, 64))
    other = example | {"extent": (96, 96)}
    a = _results("flat", [example] * 3, 0, CANVAS, TOKENS)
    b = _results("flat", [other] * 3, 0, CANVAS, TOKENS)
    assert abs(a["loss token"] - b["loss token"]) > 1e-2
