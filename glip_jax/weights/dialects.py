"""Translates tensor names of other libraries into those of microsoft/GLIP, which `names.entries` lists.

Four libraries store these networks: microsoft/GLIP itself, mmdetection (glip-reference 8), timm and Hugging Face's
transformers. Values change in two cases only: patch merging in mmdetection has its columns in another order, and
transformers stores query, key and value separately. Other names are left as they are, for `gather` to refuse.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from glip_jax.models.efficientnet import STAGES

__all__ = ["bert_state", "efficientnet_state", "glip_state", "swin_state"]

State = dict[str, Any]
"""Tensors by name."""

_EFFICIENTNET_EPSILON = 1e-3
"""Epsilon of its batch normalization: the default of TensorFlow, not of PyTorch."""

_MMDETECTION = (
    (r"backbone\.", "backbone.body."),
    (r"(backbone\.body\.)stages\.", r"\1layers."),
    (r"(backbone\.body\.patch_embed\.)projection\.", r"\1proj."),
    (r"(backbone\.body\..*\.attn\.)w_msa\.", r"\1"),
    (r"(backbone\.body\..*\.)ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
    (r"(backbone\.body\..*\.)ffn\.layers\.1\.", r"\1mlp.fc2."),
    *((rf"neck\.lateral_convs\.{i}\.conv\.", f"backbone.fpn.fpn_inner{i + 2}.") for i in range(3)),
    *((rf"neck\.fpn_convs\.{i}\.conv\.", f"backbone.fpn.fpn_layer{i + 2}.") for i in range(3)),
    *((rf"neck\.fpn_convs\.{i}\.conv\.", f"backbone.fpn.top_blocks.p{i + 3}.") for i in (3, 4)),
    (r"language_model\.", ""),
    (r"bbox_head\.", "rpn."),
    (r"(rpn\..*\.)dyconvs\.", r"\1DyConv."),
    (r"(rpn\..*\.)attnconv\.", r"\1AttnConv."),
)
_TRANSFORMERS_SWIN = (
    (r"swin\.", ""),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.norm\.", "patch_embed.norm."),
    (r"encoder\.layers\.", "layers."),
    (r"layernorm\.", "norm."),
    (r"classifier\.", "head."),
    (r"(.*\.)layernorm_before\.", r"\1norm1."),
    (r"(.*\.)layernorm_after\.", r"\1norm2."),
    (r"(.*\.attention\.)(?:self|relative_position_bias)\.(relative_position_\w+)", r"\1\2"),
    (r"(.*\.attention\.)self\.(query|key|value)\.", r"\1\2."),
    (r"(.*\.attention\.)(?:output\.dense|o_proj)\.", r"\1proj."),
    (r"(.*\.attention\.)q_proj\.", r"\1query."),
    (r"(.*\.attention\.)k_proj\.", r"\1key."),
    (r"(.*\.attention\.)v_proj\.", r"\1value."),
    (r"(.*\.)attention\.", r"\1attn."),
    (r"(.*\.)intermediate\.dense\.", r"\1mlp.fc1."),
    (r"(.*\.)output\.dense\.", r"\1mlp.fc2."),
)
"""Names of transformers in files, and those of its version 5 in memory."""
_BERT = (
    (r"bert\.", ""),
    (r"(.*)\.gamma", r"\1.weight"),
    (r"(.*)\.beta", r"\1.bias"),
)
"""Prefix of task models, and names in the first BERT files."""


def glip_state(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> tuple[str, State]:
    """The library that wrote the file, and the tensors of a whole GLIP under the names of microsoft/GLIP."""
    prefixes = {"network.": "glip_jax's Hugging Face export", "module.": "GLIP", "": "GLIP"}
    prefix = next(prefix for prefix in prefixes if all(name.startswith(prefix) for name in arrays))
    bare = {name.removeprefix(prefix): array for name, array in arrays.items()}
    if not any(name.startswith("bbox_head.") for name in bare):
        return prefixes[prefix], bare
    renamed = _renamed(bare, _MMDETECTION)
    return "mmdetection's GLIP", {name: _reordered_merging(name, array) for name, array in renamed.items()}


def swin_state(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> tuple[str, State]:
    """The library that wrote the file, and the tensors of an ImageNet Swin under the original names (no prefix)."""
    if any(name.removeprefix("swin.").startswith("embeddings.patch_embeddings.") for name in arrays):
        return "transformers' Swin", _joined(_renamed(arrays, _TRANSFORMERS_SWIN))
    if any(name.startswith("layers.3.downsample.") for name in arrays):
        # Since timm 0.9 merging is the first part of a stage, not the last of the one before; the order of its four cells is the same.
        earlier = tuple((rf"layers\.{stage}\.downsample\.", f"layers.{stage - 1}.downsample.") for stage in (1, 2, 3))
        return "timm's Swin", _renamed(arrays, earlier)
    return "the original's Swin", dict(arrays)


def bert_state(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> State:
    """Tensors under the names of BertModel in current transformers."""
    return _renamed(arrays, _BERT)


def efficientnet_state(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> State:
    """EfficientNet-Lite0 of lukemelas' EfficientNet-PyTorch, under the names that `names.efficientnet_entries` lists.

    EfficientNet-PyTorch numbers blocks through all stages; batch normalization becomes a scale and a shift.
    """
    blocks_of_stages = [(stage, block) for stage, (blocks, *_) in enumerate(STAGES) for block in range(blocks)]
    parts = (
        ("_expand_conv.weight", "expand.weight"), ("_depthwise_conv.weight", "depthwise.weight"),
        ("_project_conv.weight", "project.weight"), ("_bn1.", "depthwise_norm."), ("_bn2.", "project_norm."),
        ("_bn0.", "expand_norm."),
    )  # fmt: skip
    rules = [(r"_conv_stem\.", "stem."), (r"_bn0\.", "stem_norm.")]
    rules += [
        (rf"_blocks\.{number}\.{re.escape(old)}", f"stages.{stage}.{block}.{new}")
        for number, (stage, block) in enumerate(blocks_of_stages)
        for old, new in parts
    ]
    state = _renamed(arrays, tuple(rules))
    for name in [name.removesuffix(".running_var") for name in state if name.endswith("_norm.running_var")]:
        names = [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if all(part in state for part in names):
            weight, bias, mean, variance = (np.asarray(state.pop(part), np.float32) for part in names)
            scale = weight / np.sqrt(variance + _EFFICIENTNET_EPSILON)
            state[f"{name}.weight"], state[f"{name}.bias"] = scale, bias - mean * scale
    return state


def _renamed(arrays: Mapping[str, Any], rules: tuple[tuple[str, str], ...]) -> State:
    """Applies every rule once, in order, to the beginning of each name."""
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    state: State = {}
    for name, array in arrays.items():
        for pattern, new in compiled:
            if match := pattern.match(name):
                name = match.expand(new) + name[match.end() :]
        state[name] = array
    return state


def _joined(state: State) -> State:
    """Concatenates `attn.query`, `attn.key` and `attn.value`, where all exist, into `attn.qkv`."""
    for query in [name for name in state if re.search(r"\.attn\.query\.(weight|bias)$", name)]:
        parts = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in state for name in parts):
            state[query.replace(".query.", ".qkv.")] = np.concatenate([state.pop(name) for name in parts])
    return state


def _reordered_merging(name: str, value: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Reorders norm [4C] and columns [O 4C] of patch merging: from (channel, cell), cells by row, to (cell, channel), by column.

    The inverse of what tools/model_converters/glip_to_mmdet.py of mmdetection does.
    """
    if ".downsample." not in name or value.shape[-1] % 4:
        return value
    cells = value.reshape(*value.shape[:-1], -1, 4).swapaxes(-1, -2)[..., [0, 2, 1, 3], :]
    return np.ascontiguousarray(cells.reshape(value.shape))
