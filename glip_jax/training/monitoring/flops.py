"""Floating point operations (FLOPs) per image by formula, for model FLOPs utilization (MFU) and planning.

Counts matrix products and convolutions, two operations per multiply-add, as this network computes them (folded fusion, windows
padded to whole ones, all cells of the canvas). Does not count norms, activations, softmax, bilinear weights, resizes (products
that copy values), losses, the optimizer, and recomputation (rematerialization, logits of the fusion), which is not useful work.
"""

import math
from typing import NamedTuple

from glip_jax.config import ModelConfig
from glip_jax.models import efficientnet

__all__ = ["Flops", "flops_per_image"]

_OFFSETS_AND_MASKS = 27


class Flops(NamedTuple):
    """FLOPs for one image with its prompt."""

    parts: dict[str, float]
    """Forward pass by part: backbone, pyramid, text, fusion, head_text, dynamic, outputs."""
    forward: float
    """Their sum."""
    training: float
    """Forward and backward pass. The backward pass of a trained product costs twice its forward pass; that of frozen first layers
    costs nothing."""


def flops_per_image(model: ModelConfig, height: int, width: int, tokens: int | None = None) -> Flops:
    """FLOPs for a canvas of `height` x `width` pixels and a prompt of `tokens` tokens (default: max_tokens)."""
    tokens = model.text.max_tokens if tokens is None else tokens
    channels, blocks = model.pyramid.channels, model.head.blocks
    cells = [math.ceil(height / stride) * math.ceil(width / stride) for stride in model.pyramid.strides]
    trained, frozen = (
        _swin(model, height, width) if model.backbone.kind == "swin" else _efficientnet(model, height, width)
    )
    text = model.text.layers * _bert_layer(model, tokens)
    fused = model.fusion.enabled
    parts = {
        "backbone": trained + frozen,
        "pyramid": _pyramid(model, height, width),
        "text": text,
        "fusion": blocks * _fusion(model, sum(cells), tokens) if fused else 0,
        "head_text": blocks * _bert_layer(model, tokens) if fused else 0,
        "dynamic": blocks * _dynamic(cells, channels),
        "outputs": sum(cells) * channels * (5 + tokens) + tokens * model.text.width * (channels + 1),
    }
    forward = sum(parts.values())
    frozen += text if model.text.frozen else 0
    # The first trained product needs no gradient of its input.
    first = math.ceil(height / 4) * math.ceil(width / 4) * 48 * model.backbone.width
    unneeded = first if model.backbone.kind == "swin" and not model.backbone.frozen_stages else 0
    flops = {name: 2.0 * count for name, count in parts.items()}
    return Flops(flops, 2.0 * forward, 2.0 * (3 * forward - 2 * frozen - unneeded))


def _swin(model: ModelConfig, height: int, width: int) -> tuple[int, int]:
    """Multiply-adds of (trained, frozen) stages. Patch merging belongs to the stage before it, patch embedding to the first."""
    config = model.backbone
    h, w, channels = math.ceil(height / 4), math.ceil(width / 4), config.width
    stages = [h * w * 48 * channels]
    for stage, depth in enumerate(config.depths):
        whole = math.prod(math.ceil(side / config.window) * config.window for side in (h, w))
        attention = whole * (4 * channels**2 + 2 * config.window**2 * channels)
        count = depth * (attention + h * w * 8 * channels**2)
        if stage < 3:
            h, w = math.ceil(h / 2), math.ceil(w / 2)
            count += h * w * 8 * channels**2
            channels *= 2
        stages.append(count)
    frozen = config.frozen_stages + 1 if config.frozen_stages else 0
    return sum(stages[frozen:]), sum(stages[:frozen])


def _efficientnet(model: ModelConfig, height: int, width: int) -> tuple[int, int]:
    """Multiply-adds of (trained, frozen) stages; the stem belongs to the first."""
    h, w, channels = height // 2, width // 2, efficientnet.STEM
    stages = [h * w * 27 * channels]
    for blocks, kernel, stride, expansion, outputs in efficientnet.STAGES:
        count = 0
        for block in range(blocks):
            wide = expansion * channels
            count += h * w * channels * wide if expansion > 1 else 0
            if block == 0:
                h, w = h // stride, w // stride
            count += h * w * wide * (kernel**2 + outputs)
            channels = outputs
        stages.append(count)
    frozen = model.backbone.frozen_stages + 1 if model.backbone.frozen_stages else 0
    return sum(stages[frozen:]), sum(stages[:frozen])


def _pyramid(model: ModelConfig, height: int, width: int) -> int:
    if model.backbone.kind == "swin":
        inputs = [model.backbone.width * 2**level for level in (1, 2, 3)]
    else:
        inputs = [efficientnet.STAGES[stage - 1][-1] for stage in efficientnet.OUTPUTS]
    channels, count = model.pyramid.channels, 0
    for stride in model.pyramid.strides:
        lateral = {8: inputs[0], 16: inputs[1], 32: inputs[2]}.get(stride, 0)
        count += math.ceil(height / stride) * math.ceil(width / stride) * channels * (lateral + 9 * channels)
    return count


def _bert_layer(model: ModelConfig, tokens: int) -> int:
    text = model.text
    return tokens * (4 * text.width**2 + 2 * tokens * text.width + 2 * text.width * text.hidden)


def _fusion(model: ModelConfig, cells: int, tokens: int) -> int:
    """Three products of all cells with all tokens per head; all other products are on the text side."""
    channels, width, depth = model.pyramid.channels, model.fusion.width, model.text.width
    over_text = tokens * width * (3 * depth + 3 * channels)
    return 3 * model.fusion.heads * cells * tokens * channels + over_text


def _dynamic(cells: list[int], channels: int) -> int:
    """Three 3 x 3 convolutions, with outputs at all levels and twice at all but the finest, and the offsets of every level.

    Products of the dynamic ReLU and of the attention have one row per level and are neglected.
    """
    convolved = sum(cells) + 2 * sum(cells[1:])
    return convolved * 9 * channels**2 + sum(cells) * 9 * channels * _OFFSETS_AND_MASKS
