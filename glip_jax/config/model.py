"""Settings of the network: type, unit, default. Offered by `glip_jax.config`. Every field affects the results of training."""

from dataclasses import dataclass
from typing import Annotated, Literal

from glip_jax.config.data import AssetStr
from glip_jax.config.ranges import BelowOne, Channels, Factor, Pixels, Range, Size

__all__ = [
    "AnchorConfig", "BackboneConfig", "FusionConfig", "HeadConfig", "InputConfig", "LoraConfig", "ModelConfig", "PromptsConfig",
    "PyramidConfig", "Remat", "TextConfig",
]  # fmt: skip


_Blocks = Annotated[int, Range(1, 1000)]
_Token = Annotated[int, Range(0, 10_000_000)]
_Level = Annotated[float, Range(0, 255)]
_Spread = Annotated[float, Range(0.001, 1000)]
Remat = Literal["none", "elementwise", "kernels", "blocks"]
"""What the backward pass recomputes of Swin blocks, BERT layers and head blocks (rematerialization)."""


@dataclass(frozen=True)
class InputConfig:
    """Normalization of uint8 RGB images: (pixel - mean) / std with channels in `order`; `mean` and `std` are in that order."""

    order: Literal["bgr", "rgb"] = "bgr"
    mean: tuple[_Level, _Level, _Level] = (103.53, 116.28, 123.675)
    std: tuple[_Spread, _Spread, _Spread] = (57.375, 57.12, 58.395)
    extent_multiple: Annotated[int, Range(1, 1024, "pixels")] = 32
    """The extent of an image is its size rounded up to a multiple of this, pixels."""
    extent: Literal["image", "batch"] = "image"
    """`image`: each image has its own extent, so its result does not depend on the batch; `batch`: the extent of every image is
    the canvas, as in the original."""


@dataclass(frozen=True)
class BackboneConfig:
    """Swin v1 of any size, or EfficientNet-Lite0, which reads `kind` and `frozen_stages` only."""

    kind: Literal["swin", "efficientnet_lite0"] = "swin"
    width: Channels = 96
    """Channels of the first stage; each stage doubles them."""
    depths: tuple[_Blocks, _Blocks, _Blocks, _Blocks] = (2, 2, 6, 2)
    """Blocks per stage."""
    heads: tuple[Channels, Channels, Channels, Channels] = (3, 6, 12, 24)
    """Attention heads per stage."""
    window: Annotated[int, Range(1, 256, "cells")] = 7
    """Side of an attention window, cells."""
    drop_path: BelowOne = 0.2
    """Stochastic depth rate of the last block; the rate rises linearly from 0 at the first."""
    frozen_stages: Annotated[int, Range(0, 7)] = 0
    """Number of first stages, and with them the stem, that get no gradient and run in evaluation mode (GLIP-L: 1; EfficientNet-Lite0: 0 to 7)."""


@dataclass(frozen=True)
class PyramidConfig:
    """Feature pyramid network."""

    channels: Channels = 256
    """Channels of every level."""
    strides: tuple[Pixels, ...] = (8, 16, 32, 64, 128)
    """Strides of the levels: consecutive powers of two, from 8 or 16 to 32 or more."""
    drop_block: BelowOne = 0.3
    """DropBlock rate in training, on the merged laterals of strides 8 and 16; 0 disables it."""
    drop_block_size: Annotated[int, Range(1, 1024, "cells")] = 3
    """Side of a dropped block, cells."""
    drop_block_over: Literal["image", "batch"] = "image"
    """Set over which the kept activations are renormalized; the original uses the batch of one GPU."""


@dataclass(frozen=True)
class TextConfig:
    """BERT text encoder; sizes as in Hugging Face's BertConfig."""

    vocabulary: AssetStr = "assets/bert-base-uncased/vocab.txt"
    """Path of the WordPiece vocabulary, one token per line; a relative path starts at the current folder."""
    vocabulary_size: Annotated[int, Range(1, 10_000_000)] = 30522
    """Rows of the word embedding."""
    width: Channels = 768
    layers: _Blocks = 12
    heads: Channels = 12
    hidden: Channels = 3072
    """Width of the feed-forward layers."""
    positions: Size = 512
    """Rows of the position embedding."""
    dropout: BelowOne = 0.1
    max_tokens: Annotated[int, Range(3, 1_000_000, "tokens")] = 256
    """Length of every prompt after padding, [CLS] and [SEP] included."""
    frozen: bool = False
    """The text encoder gets no gradient and runs without dropout."""
    mask: Literal["padding", "phrase"] = "padding"
    """Tokens that a token attends to, here and in the BERT layers of the head: `padding`, all of the prompt, as released weights; `phrase`, those of its own
    name, [CLS] and [SEP], as in Grounding DINO (arXiv 2303.05499, 3.4). Then the states of a name depend on no other name of the prompt before fusion."""
    separators: tuple[_Token, ...] = (101, 102, 1012)
    """For `mask` phrase and `head.presence`: ids of [CLS], of [SEP], and of the tokens between names (the full stop), in the vocabulary."""


@dataclass(frozen=True)
class FusionConfig:
    """Bidirectional image-text attention (deep fusion) of each head block."""

    enabled: bool = True
    """False: image and text meet in the alignment alone, so that the text is encoded once for all images, as in GLIP-T (A)."""
    width: Channels = 2048
    """Width of queries, keys and values over all attention heads."""
    heads: Channels = 8
    """Attention heads, each of `width` / `heads` channels."""
    dropout: BelowOne = 0.1
    """Rate of dropped attention weights, in both directions."""
    drop_path: BelowOne = 0.0
    """Stochastic depth rate of both directions. Grounding DINO trains with 0.1, a width of 1024, 4 heads and no dropout."""
    gamma: Annotated[float, Range(-100, 100)] = 1 / 6
    """Initial value of both residual scales."""


@dataclass(frozen=True)
class HeadConfig:
    """Detection head: blocks of [fusion, BERT layer,] DyConv, then the three outputs."""

    blocks: _Blocks = 6
    groups: Channels = 16
    """Groups of GroupNorm."""
    coarse_offsets: Literal["flat", "resized"] = "resized"
    """Offsets that DyConv uses for the coarser neighbor level: `flat`, the original's read of the buffer with wrong strides, or
    `resized`, the offset map resized bilinearly."""
    offset_bound: Annotated[int, Range(0, 7, "cells")] = 0
    """Maximum deformable offset in cells of the level that is sampled, 1 to 7; larger offsets are clamped and counted
    (`offsets_clamped`). 0: unbounded, as for released weights. On TPUs bounded offsets use matrix products instead of gathers."""
    offset_scale: Annotated[float, Range(0, 1000)] = 1.0
    """Scale of the initial weights of the offset convolution relative to the original; near 0 DyConv starts as a regular convolution."""
    deformable: bool = True
    """False: offsets stay 0, so that DyConv is made of regular convolutions. The parameters of the offsets are there, and are 0. A training
    step on a CPU takes a third of the time."""
    presence: bool = False
    """Whether the image shows a phrase at all: a logit, the mean of one of each of its tokens, from their states after the last block. Trained by a
    loss of its own (`loss.presence_weight`); its probability is a factor of the phrase's alignment. For networks with fusion."""
    positions: bool = False
    """Where a cell is in its image: a linear map of its place is added to the pyramid before the first block, and the alignment of a token with a cell
    has a second product, of a linear map of the token's state with that place. Without it the finest level hardly knows where a cell is, and "left of" cannot be answered."""
    log_scale: Annotated[float, Range(-20, 20)] = 0.0
    """Initial log scale of the alignment logits, which are divided by exp(log_scale)."""
    box_scale: Annotated[float, Range(0, 1000, above=True)] = 1.0
    """Initial scale of the box deltas of every level."""
    unroll: _Blocks = 1
    """Blocks per iteration of the compiled loop. All of them: longer to compile, up to twice as fast on a CPU."""


@dataclass(frozen=True)
class AnchorConfig:
    """One square anchor per location."""

    sizes: tuple[Pixels, ...] = (64, 128, 256, 512, 1024)
    """Side per level, pixels of the resized image."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank deltas (arXiv 2106.09685) of the attention projections of BERT, of the BERT layers of the head, and of the fusion."""

    rank: Annotated[int, Range(0, 1024)] = 0
    """Rank of a delta; 0: none."""
    scale: Factor = 1.0
    """Factor on the product of the two low-rank matrices (alpha / rank in the paper)."""


@dataclass(frozen=True)
class PromptsConfig:
    """Tuned prompts: text states by name, P0 + delta, in place of BERT's (paper section 4, prompt tuning)."""

    names: Annotated[int, Range(0, 100_000)] = 0
    """Number of names with tuned states; 0: none."""
    tokens: Annotated[int, Range(0, 10_000, "tokens")] = 0
    """Tokens of the longest name, its separator included."""


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
    """Type of activations. Parameters, statistics, boxes and losses are float32."""
    remat: Remat = "none"
    """Recomputation in the backward pass: `elementwise` recomputes norms, activations and dropout; `blocks` everything but the inputs of a block;
    `kernels` the same, but keeps what the attention of the fusion and the deformable convolutions give, which are costly."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the paths of parameters that are trained; * matches any characters, slashes included. All others are frozen, as are
    `backbone.frozen_stages` and, with `text.frozen`, the text encoder."""
    lora: LoraConfig = LoraConfig()
    prompts: PromptsConfig = PromptsConfig()

    @property
    def patches(self) -> bool:
        """Whether training batches hold patches (`structures.canvas.patches_of`), which Swin begins with."""
        return self.backbone.kind == "swin" and self.input.extent_multiple % 4 == 0


def model_checks(model: ModelConfig) -> list[tuple[bool, str]]:
    """Checks of the network settings: (fits, message if it does not)."""
    text, strides = model.text, model.pyramid.strides
    return [
        (len(model.anchors.sizes) == len(strides),
         f"model.anchors.sizes has {len(model.anchors.sizes)} entries, model.pyramid.strides {len(strides)}: give one size per level"),
        (all(b == 2 * a for a, b in zip(strides, strides[1:])) and strides[:1] in ((8,), (16,)) and strides[-1] >= 32,
         f"model.pyramid.strides is {strides}: expected consecutive powers of two from 8 or 16 to 32 or more"),
        (model.pyramid.channels % model.head.groups == 0,
         f"model.pyramid.channels {model.pyramid.channels} is not a multiple of model.head.groups {model.head.groups}"),
        ((text.mask == "padding" and not model.head.presence) or len(text.separators) > 2,
         f"model.text.separators is {text.separators}: mask phrase and presence need the ids of [CLS], of [SEP] and of at least one token between names"),
        (model.fusion.enabled or not model.head.presence,
         "model.head.presence is true, and model.fusion.enabled false: only with fusion do the states of the text know the image"),
        (text.width % text.heads == 0, f"model.text.width {text.width} is not a multiple of model.text.heads {text.heads}"),
        (model.fusion.width % model.fusion.heads == 0,
         f"model.fusion.width {model.fusion.width} is not a multiple of model.fusion.heads {model.fusion.heads}"),
        (text.max_tokens <= text.positions,
         f"model.text.max_tokens {text.max_tokens} exceeds model.text.positions {text.positions}"),
        (all(model.backbone.width * 2**i % h == 0 for i, h in enumerate(model.backbone.heads)),
         f"model.backbone.heads {model.backbone.heads} do not divide width {model.backbone.width} times 1, 2, 4, 8"),
        (model.head.blocks % model.head.unroll == 0,
         f"model.head.blocks {model.head.blocks} is not a multiple of model.head.unroll {model.head.unroll}"),
        (model.backbone.kind == "swin" or model.input.extent_multiple % 32 == 0,
         f"model.input.extent_multiple is {model.input.extent_multiple}: efficientnet_lite0 needs a multiple of 32"),
        (bool(model.prompts.names) == bool(model.prompts.tokens),
         f"model.prompts.names is {model.prompts.names}, model.prompts.tokens {model.prompts.tokens}: set both, or 0 for both"),
    ]  # fmt: skip
