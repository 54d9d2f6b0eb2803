"""The settings of the network, each once: type, unit, default. `config` offers them to everyone else.

Every field changes the numbers that training produces.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "AnchorConfig", "BackboneConfig", "FusionConfig", "HeadConfig", "InputConfig", "ModelConfig", "PyramidConfig",
    "Remat", "TextConfig", "model_checks",
]  # fmt: skip


Remat = Literal["none", "elementwise", "blocks"]
"""What the backward pass computes again of Swin blocks, BERT layers and head blocks."""


@dataclass(frozen=True)
class InputConfig:
    """Pixels in: uint8 RGB images become (pixel - mean) / std in `order`. Means are written in that order."""

    order: Literal["bgr", "rgb"] = "bgr"
    mean: tuple[float, float, float] = (103.53, 116.28, 123.675)
    std: tuple[float, float, float] = (57.375, 57.12, 58.395)
    extent_multiple: int = 32
    """An image's extent is its size rounded up to this many pixels."""
    extent: Literal["image", "batch"] = "image"
    """`image`: each image stands alone; `batch`: every image has the canvas as extent, as in the original."""


@dataclass(frozen=True)
class BackboneConfig:
    """Swin v1 of any size, or EfficientNet-Lite0. Swin's fields are ignored by the latter."""

    kind: Literal["swin", "efficientnet_lite0"] = "swin"
    width: int = 96
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    window: int = 7
    drop_path: float = 0.2
    """Rate of the last block; rates rise linearly from 0."""
    frozen_stages: int = 0
    """Stem and so many first stages get no gradient and stay in evaluation mode (GLIP-L: 1; EfficientNet-Lite0: 0-7)."""


@dataclass(frozen=True)
class PyramidConfig:
    """Feature pyramid. `strides` says which levels there are; consecutive powers of two from 8 or 16 on."""

    channels: int = 256
    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    drop_block: float = 0.3
    """DropBlock rate in training on the merged laterals below the coarsest one; 0 switches it off."""
    drop_block_size: int = 3
    drop_block_over: Literal["image", "batch"] = "image"
    """What kept activations are renormalised over; the original: the batch of one GPU."""


@dataclass(frozen=True)
class TextConfig:
    """BERT encoder, in Hugging Face's sizes."""

    vocabulary: str = "assets/bert-base-uncased/vocab.txt"
    """Path of the WordPiece vocabulary, one token a line; relative paths are looked up from the working folder."""
    vocabulary_size: int = 30522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    dropout: float = 0.1
    max_tokens: int = 256
    """Length of every prompt after padding, [CLS] and [SEP] included."""
    frozen: bool = False


@dataclass(frozen=True)
class FusionConfig:
    """Bidirectional image-text attention of each head block."""

    enabled: bool = True
    width: int = 2048
    heads: int = 8
    dropout: float = 0.1
    gamma: float = 1 / 6
    """Initial value of both residual scales."""


@dataclass(frozen=True)
class HeadConfig:
    """Tower of [fusion, BERT layer,] DyConv blocks and the three outputs."""

    blocks: int = 6
    groups: int = 16
    """Groups of GroupNorm."""
    coarse_offsets: Literal["flat", "resized"] = "resized"
    """Offsets for the coarser neighbour: the original's flat re-read, or the map resized bilinearly."""
    offset_bound: int = 0
    """Largest deformable offset in cells of the level read, 1 to 7; what is larger is clamped and counted. 0: unbounded, as
    released weights are. On a TPU bounded offsets are read by matrix products instead of gathers."""
    offset_scale: float = 1.0
    """Initial deformable offsets, relative to the original's; near 0 the head starts as regular convolutions."""
    log_scale: float = 0.0
    """Initial value of the alignment's log scale: logits are divided by its exponential."""
    box_scale: float = 1.0
    """Initial value of every level's scale of box deltas."""
    unroll: int = 1
    """Blocks per turn of the tower's loop. All of them: longer to compile, up to twice as fast on a CPU."""


@dataclass(frozen=True)
class AnchorConfig:
    """One square anchor per location and level, in pixels of the resized image."""

    sizes: tuple[int, ...] = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    input: InputConfig = InputConfig()
    backbone: BackboneConfig = BackboneConfig()
    pyramid: PyramidConfig = PyramidConfig()
    text: TextConfig = TextConfig()
    fusion: FusionConfig = FusionConfig()
    head: HeadConfig = HeadConfig()
    anchors: AnchorConfig = AnchorConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations; parameters, statistics, boxes and losses are float32."""
    remat: Remat = "none"
    """`elementwise` computes norms, activations and dropout again, `blocks` all of a block but its inputs."""


def model_checks(model: ModelConfig) -> list[tuple[bool, str]]:
    """What the settings of a network must keep, each with the message for where it is broken."""
    text, strides = model.text, model.pyramid.strides
    return [
        (len(model.anchors.sizes) == len(strides),
         f"model.anchors.sizes has {len(model.anchors.sizes)} entries, model.pyramid.strides {len(strides)}: give one size per level"),
        (all(b == 2 * a for a, b in zip(strides, strides[1:])) and strides[0] in (8, 16) and strides[-1] >= 32,
         f"model.pyramid.strides is {strides}: expected consecutive powers of two from 8 or 16 to 32 or more"),
        (model.pyramid.channels % model.head.groups == 0,
         f"model.pyramid.channels {model.pyramid.channels} is not a multiple of model.head.groups {model.head.groups}"),
        (text.width % text.heads == 0, f"model.text.width {text.width} is not a multiple of model.text.heads {text.heads}"),
        (model.fusion.width % model.fusion.heads == 0,
         f"model.fusion.width {model.fusion.width} is not a multiple of model.fusion.heads {model.fusion.heads}"),
        (text.max_tokens <= text.positions,
         f"model.text.max_tokens {text.max_tokens} exceeds model.text.positions {text.positions}"),
        (all(model.backbone.width * 2**i % h == 0 for i, h in enumerate(model.backbone.heads)),
         f"model.backbone.heads {model.backbone.heads} do not divide width {model.backbone.width} times 1, 2, 4, 8"),
        (0 <= model.head.offset_bound <= 7,
         f"model.head.offset_bound is {model.head.offset_bound}: expected 1 to 7 cells, or 0 for offsets without a bound"),
        (model.head.blocks % model.head.unroll == 0,
         f"model.head.blocks {model.head.blocks} is not a multiple of model.head.unroll {model.head.unroll}"),
        (model.backbone.kind == "swin" or model.input.extent_multiple % 32 == 0,
         f"model.input.extent_multiple is {model.input.extent_multiple}: efficientnet_lite0 needs a multiple of 32"),
    ]  # fmt: skip
