"""Infers the network of a GLIP weight file from the names and shapes of its tensors.

Settings that shapes do not determine follow the released models: heads of 64 channels in BERT, 8 heads in the fusion,
GroupNorm of 16 groups, the flat re-read of coarser offsets, anchors of 8 strides.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from glip_jax.config import (
    AnchorConfig,
    BackboneConfig,
    FusionConfig,
    HeadConfig,
    ModelConfig,
    PromptsConfig,
    PyramidConfig,
    TextConfig,
)
from glip_jax.models.tuned_prompts import SPECIAL_ROWS
from glip_jax.weights.names import WeightError

__all__ = ["infer_model", "infer_swin", "variant"]

_TEXT = "language_backbone.body.model."
_TOWER = "rpn.head.dyhead_tower."
_PROMPTS = "prompts.tokens"
_POSITIONS = "rpn.head.positions.weight"
_LARGE = 192
"""Minimum width of a Swin that is trained as that of GLIP-L: stem and first stage frozen, drop path 0.4, gamma 1/8."""


def infer_model(state: Mapping[str, Any], origin: str = "the state dict") -> ModelConfig:
    """The network of a state dict under GLIP names. Raises WeightError if it is not a whole GLIP."""
    sizes = _Sizes(state, origin)
    text_width = sizes.of(f"{_TEXT}embeddings.word_embeddings.weight", 1)
    fused = sizes.has(f"{_TOWER}0.b_attn.gamma_v")
    levels = [level + 1 for level in (2, 3, 4) if sizes.has(f"backbone.fpn.fpn_inner{level}.weight")]
    levels += [level for level in (6, 7) if sizes.has(f"backbone.fpn.top_blocks.p{level}.weight")]
    strides = tuple(2**level for level in levels)
    positions = sizes.of(f"{_TEXT}embeddings.position_embeddings.weight", 0)
    swin = any(name.startswith("backbone.body.patch_embed.") for name in state)
    backbone = infer_swin(state, "backbone.body.", origin) if swin else BackboneConfig(kind="efficientnet_lite0")
    large = swin and backbone.width >= _LARGE
    return ModelConfig(
        backbone=backbone,
        pyramid=PyramidConfig(channels=sizes.of("backbone.fpn.fpn_inner4.weight", 0), strides=strides),
        text=TextConfig(
            vocabulary_size=sizes.of(f"{_TEXT}embeddings.word_embeddings.weight", 0),
            width=text_width,
            layers=sizes.count(rf"{re.escape(_TEXT)}encoder\.layer\.(\d+)\."),
            heads=max(text_width // 64, 1),
            hidden=sizes.of(f"{_TEXT}encoder.layer.0.intermediate.dense.weight", 0),
            positions=positions,
            max_tokens=min(positions, 256),
        ),
        fusion=FusionConfig(width=sizes.of(f"{_TOWER}0.b_attn.attn.v_proj.weight", 0), gamma=1 / 8 if large else 1 / 6)
        if fused
        else FusionConfig(enabled=False),
        head=HeadConfig(
            blocks=sizes.count(rf"{re.escape(_TOWER)}(\d+)\.DyConv\."),
            coarse_offsets="flat",
            positions=sizes.has(_POSITIONS),
        ),
        anchors=AnchorConfig(tuple(8 * stride for stride in strides)),
        prompts=PromptsConfig(sizes.of(_PROMPTS, 0) - SPECIAL_ROWS, sizes.of(_PROMPTS, 1))
        if sizes.has(_PROMPTS)
        else PromptsConfig(),
    )


def infer_swin(state: Mapping[str, Any], body: str = "", origin: str = "the state dict") -> BackboneConfig:
    """The Swin whose tensors have the prefix `body`. Raises WeightError if there is none of four stages."""
    sizes = _Sizes(state, origin)

    def stage(number: int) -> tuple[int, int]:
        blocks = sizes.count(rf"{re.escape(body)}layers\.{number}\.blocks\.(\d+)\.")
        return blocks, sizes.of(f"{body}layers.{number}.blocks.0.attn.relative_position_bias_table", 1)

    (b1, h1), (b2, h2), (b3, h3), (b4, h4) = (stage(number) for number in range(4))
    table = f"{body}layers.0.blocks.0.attn.relative_position_bias_table"
    window = (math.isqrt(sizes.of(table, 0)) + 1) // 2
    if (2 * window - 1) ** 2 != sizes.of(table, 0):
        raise WeightError(f"{table} of {origin} has {sizes.of(table, 0)} rows, expected (2 window - 1)^2")
    width = sizes.of(f"{body}patch_embed.proj.weight", 0)
    found = BackboneConfig(width=width, depths=(b1, b2, b3, b4), heads=(h1, h2, h3, h4), window=window)
    return replace(found, drop_path=0.4, frozen_stages=1) if width >= _LARGE else found


def variant(model: ModelConfig) -> str:
    """The published name of a network, or its sizes."""
    backbone = model.backbone
    sizes = (backbone.width, backbone.depths, backbone.window, model.head.blocks, model.text.width, model.text.layers)
    if backbone.kind == "swin" and sizes == (96, (2, 2, 6, 2), 7, 6, 768, 12):
        return "GLIP-T (B), (C) or GLIP-T" if model.fusion.enabled else "GLIP-T (A)"
    if backbone.kind == "swin" and sizes == (192, (2, 2, 18, 2), 12, 8, 768, 12) and model.fusion.enabled:
        return "GLIP-L"
    of = (
        "EfficientNet-Lite0" if backbone.kind != "swin" else f"Swin of width {backbone.width}, depths {backbone.depths}"
    )
    fused = "with" if model.fusion.enabled else "without"
    return f"{of}, {model.head.blocks} head blocks {fused} fusion, BERT of {model.text.layers} layers"


class _Sizes:
    """Sizes and counts of named tensors; a missing one is a WeightError with its name."""

    def __init__(self, state: Mapping[str, Any], origin: str) -> None:
        self._state, self._origin = state, origin

    def has(self, name: str) -> bool:
        return name in self._state

    def of(self, name: str, axis: int) -> int:
        """Length of an axis."""
        if name not in self._state:
            found = ", ".join(sorted(self._state)[:3])
            raise WeightError(
                f"{self._origin} lacks {name}: it is of another network, or incomplete; it holds "
                f"{len(self._state)} tensors: {found}, ..."
            )
        shape = self._state[name].shape
        if len(shape) <= axis:
            raise WeightError(f"{name} of {self._origin} has shape {shape}, expected more than {axis} axes")
        return int(shape[axis])

    def count(self, pattern: str) -> int:
        """How many different values the group of `pattern` has; at least 1."""
        return max(len({match[1] for name in self._state if (match := re.match(pattern, name))}), 1)
