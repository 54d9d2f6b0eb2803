"""GLIP (Grounded Language-Image Pre-training, arXiv 2112.03857) in plain PyTorch, with torch's own operators, in evaluation mode.

Modules have the names of microsoft/GLIP's checkpoints, so such a state dict loads as it is (without the `module.` prefix and the unused
`cls_logits`). Maps are [B C h w]. All of `pixels` counts as image, as in microsoft/GLIP, where scores depend on the size that images are padded
to; `modeling_glip.py` runs each image padded to its own multiple of 32.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cell_places import PLACE_FEATURES, place_features
from .phrase_mask import segments
from .sinks import Sinks
from .text_encoder import Bert, BertLayer, clamped
from .tuned_prompts import TunedPrompts

__all__ = ["GlipNetwork", "deformable_convolution"]

Side = Any
"""Number of cells or pixels: an int, or a tensor while torch traces the network for ONNX."""


def _hard_sigmoid(x: Tensor) -> Tensor:
    return F.relu6(x + 3) / 6


# --- Swin Transformer v1 (arXiv 2103.14030) ---------------------------------------------------------------------------


def _missing(length: Side, multiple: int) -> Any:
    """Padding of `length` to a multiple; without negative numbers, whose remainders differ in ONNX and Python."""
    return (multiple - length % multiple) % multiple


def _windows(x: Tensor, window: int) -> Tensor:
    """[B H W C] to [B windows cells C], both row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c)
    return x.transpose(2, 3).reshape(b, -1, window * window, c)


class WindowAttention(nn.Module):
    """Attention inside windows with a bias for every relative position."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        cell = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        delta = cell[:, :, None] - cell[:, None, :] + window - 1
        self.register_buffer("relative_position_index", delta[0] * (2 * window - 1) + delta[1])
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        """`x`: [B windows cells C]; `apart` is added to the logits: [windows cells cells]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        index: Any = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()].reshape(*index.shape, -1).permute(2, 0, 1)
        if apart is not None:
            bias = bias + apart[:, None]
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
        return self.proj((logits.softmax(-1) @ v).transpose(2, 3).flatten(3))


class SwinBlock(nn.Module):
    """Windowed attention and MLP; every other block's windows are shifted by half their side."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def _apart(self, height: Side, width: Side, like: Tensor) -> Tensor:
        """-100 between cells that are not neighbors before the shift: [windows cells cells]."""

        def region(length: Side) -> Tensor:
            cell = torch.arange(length, device=like.device)
            return (cell >= length - self.window).int() + (cell >= length - self.shift).int()

        label = 3 * region(height)[:, None] + region(width)[None, :]
        label = _windows(label[None, :, :, None], self.window)[0, :, :, 0]
        return (label[:, :, None] != label[:, None, :]).to(like.dtype) * -100.0

    def forward(self, x: Tensor) -> Tensor:
        """[B H W C] to the same. Maps are padded to whole windows after the norm, and attention includes the zeros."""
        b, h, w, c = x.shape
        y = F.pad(self.norm1(x), (0, 0, 0, _missing(w, self.window), 0, _missing(h, self.window)))
        height, width, apart = y.shape[1], y.shape[2], None
        if self.shift:
            y, apart = y.roll((-self.shift, -self.shift), (1, 2)), self._apart(height, width, y)
        y = self.attn(_windows(y, self.window), apart)
        y = y.reshape(b, height // self.window, width // self.window, self.window, self.window, c)
        y = y.transpose(2, 3).reshape(b, height, width, c)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + y[:, :h, :w]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PatchMerging(nn.Module):
    """Merges four neighboring cells into one with twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        quarters = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(quarters, -1)))


class SwinStage(nn.Module):
    """Blocks of one width, then the merge to the next."""

    def __init__(self, width: int, depth: int, heads: int, window: int, last: bool) -> None:
        super().__init__()
        shifts = [window // 2 if block % 2 else 0 for block in range(depth)]
        self.blocks = nn.ModuleList(SwinBlock(width, heads, window, shift) for shift in shifts)
        self.downsample = None if last else PatchMerging(width)


class Swin(nn.Module):
    """Maps of strides 8, 16, 32 (each with its own norm) from normalized pixels."""

    def __init__(self, width: int, depths: Sequence[int], heads: Sequence[int], window: int) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 4, 4), "norm": nn.LayerNorm(width)})
        self.layers = nn.ModuleList(
            SwinStage(width * 2**stage, depths[stage], heads[stage], window, stage == 3) for stage in range(4)
        )
        for stage in (1, 2, 3):
            self.add_module(f"norm{stage}", nn.LayerNorm(width * 2**stage))
        self.channels = [width * 2**stage for stage in (1, 2, 3)]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        pixels = F.pad(pixels, (0, _missing(pixels.shape[3], 4), 0, _missing(pixels.shape[2], 4)))
        x = self.patch_embed["norm"](self.patch_embed["proj"](pixels).permute(0, 2, 3, 1))
        maps, stages = [], cast(Iterable[SwinStage], self.layers)
        for number, stage in enumerate(stages):
            for block in stage.blocks:
                x = block(x)
            if number:
                maps.append(self.get_submodule(f"norm{number}")(x).permute(0, 3, 1, 2))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps


# --- EfficientNet-Lite0 (arXiv 1905.11946) ----------------------------------------------------------------------------

EFFICIENTNET_STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
"""Blocks, kernel, stride of the first block, expansion, output channels."""


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """SAME padding of TensorFlow for even sizes."""
    before = (kernel - stride) // 2
    after = kernel - stride - before
    return F.pad(x, (before, after, before, after))


class ChannelAffine(nn.Module):
    """Batch normalization with its statistics folded in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project."""

    def __init__(self, inputs: int, kernel: int, stride: int, expansion: int, outputs: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.kernel, self.stride, self.residual = kernel, stride, stride == 1 and inputs == outputs
        self.expand = nn.Conv2d(inputs, wide, 1, bias=False) if expansion > 1 else None
        self.expand_norm = ChannelAffine(wide) if expansion > 1 else None
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self.depthwise_norm = ChannelAffine(wide)
        self.project = nn.Conv2d(wide, outputs, 1, bias=False)
        self.project_norm = ChannelAffine(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = F.relu6(self.expand_norm(self.expand(y)))
        y = F.relu6(self.depthwise_norm(self.depthwise(_same(y, self.kernel, self.stride))))
        y = self.project_norm(self.project(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """Maps of strides 8, 16, 32, each normed over its channels; sides of images are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self.stem_norm = ChannelAffine(32)
        self.stages, inputs = nn.ModuleList(), 32
        for blocks, kernel, stride, expansion, outputs in EFFICIENTNET_STAGES:
            stage = nn.ModuleList()
            for block in range(blocks):
                stage.append(InvertedResidual(inputs, kernel, stride if block == 0 else 1, expansion, outputs))
                inputs = outputs
            self.stages.append(stage)
        self.channels = [40, 112, 320]
        for number, channels in enumerate(self.channels, start=1):
            self.add_module(f"norm{number}", nn.LayerNorm(channels))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = F.relu6(self.stem_norm(self.stem(_same(pixels, 3, 2))))
        maps = []
        for number, stage in enumerate(cast(Iterable[nn.ModuleList], self.stages), start=1):
            for block in stage:
                x = block(x)
            if number in (3, 5, 7):
                norm = self.get_submodule(f"norm{len(maps) + 1}")
                maps.append(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return maps


# --- Feature pyramid (arXiv 1612.03144) -------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """P3 to P7, or the part of them that `strides` names; P6 from P5, P7 from the rectified P6."""

    def __init__(self, inputs: Sequence[int], channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        for level, width in zip((3, 4, 5), inputs):
            if 2**level in strides:
                self.add_module(f"fpn_inner{level - 1}", nn.Conv2d(width, channels, 1))
                self.add_module(f"fpn_layer{level - 1}", nn.Conv2d(channels, channels, 3, padding=1))
        extra = {f"p{n}": nn.Conv2d(channels, channels, 3, 2, padding=1) for n in (6, 7) if 2**n in strides}
        self.top_blocks = nn.ModuleDict(extra)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        outputs: dict[int, Tensor] = {}
        merged = None
        for level in (level for level in (5, 4, 3) if 2**level in self.strides):
            lateral = self.get_submodule(f"fpn_inner{level - 1}")(maps[level - 3])
            if merged is not None:
                lateral = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode="nearest")
            merged = lateral
            outputs[2**level] = self.get_submodule(f"fpn_layer{level - 1}")(merged)
        for name, convolution in self.top_blocks.items():
            finer = outputs[2 ** int(name[1]) // 2]
            outputs[2 ** int(name[1])] = convolution(finer if name == "p6" else F.relu(finer))
        return [outputs[stride] for stride in self.strides]


# --- The head: deep fusion (paper section 3.2) and dynamic convolutions (arXiv 2106.08322) ----------------------------


class FusionAttention(nn.Module):
    """Image and text attend to each other through one map of logits (equations 4 to 6)."""

    def __init__(self, width: int, text_width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.v_proj, self.values_v_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.l_proj, self.values_l_proj = nn.Linear(text_width, inner), nn.Linear(text_width, inner)
        self.out_v_proj, self.out_l_proj = nn.Linear(inner, width), nn.Linear(inner, text_width)

    def forward(self, visual: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key = split(self.v_proj(visual)), split(self.l_proj(text))
        logits = clamped(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2))
        over_text = logits.masked_fill(~mask[:, None, None, :], torch.finfo(logits.dtype).min).softmax(-1)
        over_image = logits.transpose(-1, -2).softmax(-1)
        for_image = (over_text @ split(self.values_l_proj(text))).transpose(1, 2).flatten(2)
        for_text = (over_image @ split(self.values_v_proj(visual))).transpose(1, 2).flatten(2)
        return self.out_v_proj(for_image), self.out_l_proj(for_text)


class Fusion(nn.Module):
    """Adds the residual to the normalized inputs, as microsoft/GLIP does."""

    def __init__(self, width: int, text_width: int, inner: int, heads: int) -> None:
        super().__init__()
        attention = nn.Module()
        attention.layer_norm_v, attention.layer_norm_l = nn.LayerNorm(width), nn.LayerNorm(text_width)
        attention.gamma_v = nn.Parameter(torch.ones(width))
        attention.gamma_l = nn.Parameter(torch.ones(text_width))
        attention.attn = FusionAttention(width, text_width, inner, heads)
        self.b_attn = attention

    def forward(self, levels: Sequence[Tensor], text: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        part: Any = self.b_attn
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        visual = part.layer_norm_v(torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1))
        text = part.layer_norm_l(text)
        for_image, for_text = part.attn(visual, text, mask)
        visual, text = visual + part.gamma_v * for_image, text + part.gamma_l * for_text
        pieces = visual.transpose(1, 2).split([height * width for height, width in shapes], 2)
        return [piece.reshape(*piece.shape[:2], *shape) for piece, shape in zip(pieces, shapes)], text


def deformable_convolution(
    x: Tensor, weight: Tensor, bias: Tensor, offset: Tensor, mask: Tensor, stride: int
) -> Tensor:
    """Modulated deformable convolution (arXiv 1811.11168), 3 x 3, padding 1, one group.

    `offset` [B 18 h w] holds (dy, dx) of tap k = 3 i + j in channels 2k and 2k + 1, `mask` [B 9 h w] its factor.
    Output (y, x) samples bilinearly at (y * stride - 1 + i + dy, x * stride - 1 + j + dx); outside counts zero.
    """
    b, channels, height, width = x.shape
    h, w = offset.shape[2], offset.shape[3]
    tap = torch.arange(9, device=x.device)
    top = (torch.arange(h, device=x.device) * stride - 1)[None, :, None] + (tap // 3)[:, None, None]
    left = (torch.arange(w, device=x.device) * stride - 1)[None, None, :] + (tap % 3)[:, None, None]
    rows, columns = offset[:, 0::2] + top, offset[:, 1::2] + left
    # Coordinates of grid_sample run from -1 to 1 between the outer edges of the map.
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1).flatten(1, 2)
    samples = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    samples = samples.reshape(b, channels, 9, h, w) * mask[:, None]
    out = weight.flatten(1) @ samples.reshape(b, channels * 9, h * w)
    return out.reshape(b, -1, h, w) + bias[:, None, None]


def bounded(offset: Tensor, bound: int) -> Tensor:
    """Offsets clamped to `bound` cells less 1/256; a gradient passes unless it drives a clamped one further out."""
    near = offset.clamp(1 / 256 - bound, bound - 1 / 256)
    if not offset.requires_grad:
        return near
    offset.register_hook(lambda gradient: torch.where((offset - near) * gradient < 0, 0.0, gradient))
    return near.detach() + (offset - offset.detach())


class DeformableNorm(nn.Module):
    """Deformable convolution, then group normalization."""

    def __init__(self, channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels, 3)
        self.bn = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        bias: Any = self.conv.bias
        return self.bn(deformable_convolution(x, self.conv.weight, bias, offset, mask, self.stride))


class DynamicReLU(nn.Module):
    """max(a1 y + b1, a2 y + b2) with coefficients from the pooled map (arXiv 2003.10027)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, 4 * channels))

    def forward(self, y: Tensor) -> Tensor:
        theta = _hard_sigmoid(self.fc(y.mean((2, 3))))[:, :, None, None] - 0.5
        a1, b1, a2, b2 = theta.chunk(4, 1)
        return torch.maximum(y * (a1 * 2 + 1) + b1, y * (a2 * 2) + b2)


class DynamicConvolution(nn.Module):
    """Combines each level with its neighbors; the terms are weighted by pooled attention.

    `coarse_offsets`: "flat" reads the offsets for the coarser level as microsoft/GLIP does, with the strides of the coarser
    level on the same buffer, which released weights need; "resized" resizes the map. `offset_bound`: offsets are clamped to
    this many cells, as in training; 0: no bound.
    """

    def __init__(self, channels: int, groups: int, coarse_offsets: str, offset_bound: int) -> None:
        super().__init__()
        self.coarse_offsets, self.offset_bound = coarse_offsets, offset_bound
        self.DyConv = nn.ModuleList(DeformableNorm(channels, groups, stride) for stride in (1, 1, 2))
        self.AttnConv = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 1, 1), nn.ReLU())
        self.relu = DynamicReLU(channels)
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)

    def _coarser(self, part: Tensor, shape: Sequence[Side]) -> Tensor:
        if self.coarse_offsets == "flat":
            count = part.shape[1] * shape[0] * shape[1]
            return part.flatten(1)[:, :count].reshape(part.shape[0], part.shape[1], shape[0], shape[1])
        return F.interpolate(part, size=tuple(shape), mode="bilinear", align_corners=True)

    def _resized_coarse(self, x: Tensor, maps: Tensor, shape: Sequence[Side]) -> Tensor:
        """The term of the coarser level `x`, at this level's `shape`; `maps` are this level's offsets and mask logits."""
        offset, mask = (self._coarser(part, x.shape[-2:]) for part in (maps[:, :18], maps[:, 18:]))
        term = self.DyConv[0](x, offset, mask.sigmoid())
        return F.interpolate(term, size=tuple(shape), mode="bilinear", align_corners=True)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        outputs = []
        for number, x in enumerate(levels):
            maps = self.offset(x)
            if self.offset_bound:
                maps = torch.cat([bounded(maps[:, :18], self.offset_bound), maps[:, 18:]], 1)
            offset, mask = maps[:, :18], maps[:, 18:].sigmoid()
            terms = [self.DyConv[1](x, offset, mask)]
            if number > 0:
                terms.append(self.DyConv[2](levels[number - 1], offset, mask))
            if number < len(levels) - 1:
                terms.append(self._resized_coarse(levels[number + 1], maps, x.shape[-2:]))
            weighed = [term * _hard_sigmoid(self.AttnConv(term)) for term in terms]
            outputs.append(self.relu(torch.stack(weighed).mean(0)))
        return outputs


class Scale(nn.Module):
    """A learned factor of the box deltas of a level."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Head(nn.Module):
    """The head blocks and the three outputs at every location: alignment with each token, box deltas, centerness."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        text, fusion, head = settings["text"], settings["fusion"], settings["head"]
        channels, count = settings["pyramid"]["channels"], len(settings["pyramid"]["strides"])
        tower: list[nn.Module] = []
        for _ in range(head["blocks"]):
            if fusion["enabled"]:
                tower.append(Fusion(channels, text["width"], fusion["width"], fusion["heads"]))
                tower.append(BertLayer(text["width"], text["heads"], text["hidden"], clip=True))
            tower.append(
                DynamicConvolution(channels, head["groups"], head["coarse_offsets"], head.get("offset_bound", 0))
            )
        self.fused = fusion["enabled"]
        self.dyhead_tower = nn.ModuleList(tower)
        self.bbox_pred, self.centerness = nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 1, 1)
        self.scales = nn.ModuleList(Scale() for _ in range(count))
        self.dot_product_projection_text = nn.Linear(text["width"], channels)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.bias_lang = nn.Parameter(torch.zeros(text["width"]))
        self.bias0 = nn.Parameter(torch.full((1,), -math.log(99)))
        self.placed = head.get("positions", False)
        if self.placed:
            self.positions = nn.Linear(PLACE_FEATURES, channels, bias=False)
            self.directions = nn.Linear(text["width"], PLACE_FEATURES, bias=False)

    def forward(self, levels: Sequence[Tensor], text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pyramid levels, text states [B T D] and `GlipNetwork.text_mask` to logits [B A T], deltas [B A 4], centerness [B A]."""
        places = [place_features(x) for x in levels] if self.placed else []
        if self.placed:
            levels = [x + self.positions(place).permute(2, 0, 1) for x, place in zip(levels, places)]
        for part in self.dyhead_tower:
            match part:
                case Fusion():
                    levels, text = part(levels, text, mask != 0)
                case BertLayer():
                    text = part(text, mask)
                case _:
                    levels = part(levels)
        embedding = F.normalize(text if self.fused else text * (mask != 0)[..., None], dim=-1)
        tokens = self.dot_product_projection_text(embedding / 2)
        token_bias = embedding @ self.bias_lang + self.bias0

        def packed(maps: Sequence[Tensor]) -> Tensor:
            return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)

        aligned = packed(levels) @ tokens.transpose(1, 2)
        if self.placed:
            cells = torch.cat([place.flatten(0, 1) for place in places])
            aligned = aligned + cells @ self.directions(embedding).transpose(1, 2)
        aligned = aligned / self.log_scale.exp()
        deltas: list[Tensor] = [self.bbox_pred(x) * s.scale for x, s in zip(levels, self.scales)]  # type: ignore[attr-defined]
        center = packed([self.centerness(x) for x in levels])[..., 0]
        return clamped(aligned + token_bias[:, None, :]), packed(deltas), center


class GlipNetwork(nn.Module):
    """The whole network. `settings` holds the sizes: backbone, pyramid, text, fusion, head and anchors, see config.json."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        backbone, pyramid, text = settings["backbone"], settings["pyramid"], settings["text"]
        self.strides = tuple(pyramid["strides"])
        if backbone["kind"] == "swin":
            body = Swin(backbone["width"], backbone["depths"], backbone["heads"], backbone["window"])
        else:
            body = EfficientNetLite0()
        fpn = Pyramid(body.channels, pyramid["channels"], self.strides)
        self.backbone = nn.ModuleDict({"body": body, "fpn": fpn})
        bert = Bert(*(text[k] for k in ("vocabulary_size", "width", "layers", "heads", "hidden", "positions")))
        self.language_backbone = nn.ModuleDict({"body": nn.ModuleDict({"model": bert})})
        anchors = nn.Module()
        anchors.cell_anchors = nn.Module()
        for level, (stride, size) in enumerate(zip(self.strides, settings["anchors"]["sizes"])):
            middle, reach = (stride - 1) / 2, (size - 1) / 2
            cell = torch.tensor([[middle - reach] * 2 + [middle + reach] * 2])
            anchors.cell_anchors.register_buffer(str(level), cell)
        self.rpn = nn.ModuleDict({"head": Head(settings), "anchor_generator": anchors})
        if settings.get("prompts", {}).get("names"):  # text states of names that were tuned
            self.prompts = TunedPrompts(**settings["prompts"], width=text["width"])
        self.sinks = Sinks(**settings["sinks"]) if "sinks" in settings else None
        self.separators = text["separators"] if text.get("mask") == "phrase" else None

    def encode_image(self, pixels: Tensor) -> list[Tensor]:
        """Normalized pixels [B 3 H W], without padding, to pyramid levels."""
        return self.backbone["fpn"](self.backbone["body"](pixels))

    def text_mask(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask [B T] to what tokens read of one another, see `readable`."""
        return mask.bool() if self.separators is None else segments(tokens, mask, self.separators)

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask [B T] to states [B T D]."""
        body: Any = self.language_backbone["body"]
        states = body["model"](tokens, self.text_mask(tokens, mask))
        return self.prompts(states, tokens, mask) if hasattr(self, "prompts") else states

    def ground(self, levels: Sequence[Tensor], text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels, text states and `text_mask` to logits [B A T], with sinks [B A T + N], deltas [B A 4] and centerness [B A]."""
        if self.sinks is not None:
            text, mask = self.sinks.behind(text, mask, self)
        return self.rpn["head"](levels, text, mask)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, deltas and centerness; anchors are ordered by level from fine to coarse, then row by row."""
        return self.ground(self.encode_image(pixels), self.encode_text(tokens, mask), self.text_mask(tokens, mask))

    def boxes(self, deltas: Tensor, height: Side, width: Side) -> Tensor:
        """Corners (x1, y1, x2, y2) [B A 4] in pixels of an image of that size; a box is x2 - x1 + 1 wide."""
        anchors, cells = [], self.rpn["anchor_generator"].get_submodule("cell_anchors")
        for stride, cell in zip(self.strides, cells.buffers()):
            y = torch.arange((height + stride - 1) // stride, device=deltas.device) * stride
            x = torch.arange((width + stride - 1) // stride, device=deltas.device) * stride
            y, x = torch.meshgrid(y, x, indexing="ij")
            anchors.append(torch.stack([x, y, x, y], -1).reshape(-1, 4) + cell)
        anchor = torch.cat(anchors)
        sides = anchor[:, 2:] - anchor[:, :2] + 1
        center = deltas[..., :2] / 10 * sides + (anchor[:, :2] + anchor[:, 2:]) / 2
        half = ((deltas[..., 2:] / 5).clamp(max=math.log(1000 / 16)).exp() * sides - 1) / 2
        return torch.cat([center - half, center + half], -1)
