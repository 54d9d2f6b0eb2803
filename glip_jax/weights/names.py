"""Our parameter paths and the original's names: one table, read both ways.

Names are those of GLIP's checkpoints (glip-reference 6.2) without the `module.` prefix. Ours stack equal layers along
a leading axis, so one of our arrays answers to several of theirs.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from glip_jax.config import ModelConfig
from glip_jax.models.efficientnet import OUTPUTS, STAGES
from glip_jax.models.glip import GLIP

__all__ = ["IGNORED", "Entry", "WeightError", "entries", "export_state", "import_state", "parameter_shapes"]

IGNORED = (
    "rpn.head.cls_logits.", "relative_position_index", "rpn.anchor_generator.cell_anchors.",
    "embeddings.position_ids", ".pooler.", "rpn.resizer.",
)  # fmt: skip
"""Parts of names that the original stores and nothing needs: a frozen dead branch, and buffers made again from sizes."""


class WeightError(ValueError):
    """Weights that do not fit the network; the message names what is missing, left over or of another shape."""


class Entry(NamedTuple):
    """One of the original's tensors and its place in our tree."""

    name: str
    path: str
    """Slash-separated path in our tree."""
    index: int | None
    """Position along our leading, stacked axis; None if ours is not stacked."""
    layout: Literal["same", "linear", "conv", "pointwise", "scalar"]
    """How theirs becomes ours: as it is; [O I] -> [I O]; OIHW -> HWIO; [O I 1 1] -> [I O]; [1] -> []."""


def _to_ours(value: Shaped[np.ndarray, "..."], layout: str) -> Shaped[np.ndarray, "..."]:
    match layout:
        case "linear":
            return value.T
        case "conv":
            return value.transpose(2, 3, 1, 0)
        case "pointwise":
            return value[:, :, 0, 0].T
        case "scalar":
            return value.reshape(())
        case _:
            return value


def _to_theirs(value: Shaped[np.ndarray, "..."], layout: str) -> Shaped[np.ndarray, "..."]:
    match layout:
        case "linear":
            return value.T
        case "conv":
            return value.transpose(3, 2, 0, 1)
        case "pointwise":
            return value.T[:, :, None, None]
        case "scalar":
            return value.reshape(1)
        case _:
            return value


def _layer(name: str, path: str, index: int | None, layout: Any = "linear", joint: str = "/") -> Iterator[Entry]:
    """Weight and bias of a layer; `joint` stands between our path and 'kernel' or 'bias'."""
    yield Entry(f"{name}.weight", f"{path}{joint}kernel", index, layout)
    yield Entry(f"{name}.bias", f"{path}{joint}bias", index, "same")


def _norm(name: str, path: str, index: int | None) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", f"{path}/scale", index, "same")
    yield Entry(f"{name}.bias", f"{path}/bias", index, "same")


def _swin(config: ModelConfig) -> Iterator[Entry]:
    body = "backbone.body"
    yield from _layer(f"{body}.patch_embed.proj", "backbone/patch_embedding", None, "conv")
    yield from _norm(f"{body}.patch_embed.norm", "backbone/patch_norm", None)
    for stage, depth in enumerate(config.backbone.depths):
        for block in range(depth):
            theirs, ours = f"{body}.layers.{stage}.blocks.{block}", f"backbone/stage{stage + 1}"
            if block == depth - 1 and depth % 2:
                place, index = f"{ours}/last", None
            else:
                place, index = f"{ours}/pairs/{('plain', 'shifted')[block % 2]}", block // 2
            yield from _norm(f"{theirs}.norm1", f"{place}/norm1", index)
            yield Entry(f"{theirs}.attn.relative_position_bias_table", f"{place}/bias_table", index, "same")
            yield from _layer(f"{theirs}.attn.qkv", f"{place}/qkv", index)
            yield from _layer(f"{theirs}.attn.proj", f"{place}/projection", index)
            yield from _norm(f"{theirs}.norm2", f"{place}/norm2", index)
            yield from _layer(f"{theirs}.mlp.fc1", f"{place}/mlp_in", index)
            yield from _layer(f"{theirs}.mlp.fc2", f"{place}/mlp_out", index)
        if stage < 3:
            merge = f"{body}.layers.{stage}.downsample"
            yield from _norm(f"{merge}.norm", f"backbone/merge{stage + 1}/norm", None)
            yield Entry(f"{merge}.reduction.weight", f"backbone/merge{stage + 1}/reduction/kernel", None, "linear")
        if stage > 0:
            yield from _norm(f"{body}.norm{stage}", f"backbone/norm{stage}", None)


def _efficientnet() -> Iterator[Entry]:
    """Names of our own, as the original has no such backbone; `weights/portable` has them too."""

    def norm(name: str, path: str) -> Iterator[Entry]:
        yield Entry(f"{name}.weight", f"{path}/frozen_scale", None, "same")
        yield Entry(f"{name}.bias", f"{path}/frozen_shift", None, "same")

    body = "backbone.body"
    yield Entry(f"{body}.stem.weight", "backbone/stem/kernel", None, "conv")
    yield from norm(f"{body}.stem_norm", "backbone/stem_norm")
    for stage, (blocks, _, _, expansion, _) in enumerate(STAGES):
        for block in range(blocks):
            theirs, ours = f"{body}.stages.{stage}.{block}", f"backbone/stage{stage + 1}/block{block + 1}"
            for part in ("expand", "project") if expansion > 1 else ("project",):
                yield Entry(f"{theirs}.{part}.weight", f"{ours}/{part}/kernel", None, "pointwise")
                yield from norm(f"{theirs}.{part}_norm", f"{ours}/{part}_norm")
            yield Entry(f"{theirs}.depthwise.weight", f"{ours}/depthwise", None, "conv")
            yield from norm(f"{theirs}.depthwise_norm", f"{ours}/depthwise_norm")
    for number in range(1, len(OUTPUTS) + 1):
        yield from _norm(f"{body}.norm{number}", f"backbone/norm{number}", None)


def _pyramid(config: ModelConfig) -> Iterator[Entry]:
    strides = config.pyramid.strides
    for level in (3, 4, 5):
        if 2**level >= strides[0]:
            yield from _layer(f"backbone.fpn.fpn_inner{level - 1}", f"pyramid/lateral{level}", None, "conv")
            yield from _layer(f"backbone.fpn.fpn_layer{level - 1}", f"pyramid/output{level}", None, "conv")
    for level in (6, 7):
        if 2**level in strides:
            yield from _layer(f"backbone.fpn.top_blocks.p{level}", f"pyramid/extra{level}", None, "conv")


_BERT_LAYER = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}
_BERT_NORM = {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "output_norm"}


def _bert_layer(name: str, path: str, index: int) -> Iterator[Entry]:
    for theirs, ours in _BERT_LAYER.items():
        yield from _layer(f"{name}.{theirs}", f"{path}/{ours}", index)
    for theirs, ours in _BERT_NORM.items():
        yield from _norm(f"{name}.{theirs}", f"{path}/{ours}", index)


def bert_entries(config: ModelConfig, prefix: str = "language_backbone.body.model.") -> Iterator[Entry]:
    """The text encoder's tensors under Hugging Face's names after `prefix`."""
    for theirs, ours in (
        ("word_embeddings", "word"),
        ("position_embeddings", "position"),
        ("token_type_embeddings", "type"),
    ):
        yield Entry(f"{prefix}embeddings.{theirs}.weight", f"text/embeddings/{ours}", None, "same")
    yield from _norm(f"{prefix}embeddings.LayerNorm", "text/embeddings/norm", None)
    for layer in range(config.text.layers):
        yield from _bert_layer(f"{prefix}encoder.layer.{layer}", "text/layers", layer)


_FUSION = {
    "v_proj": "visual_query",
    "l_proj": "text_key",
    "values_v_proj": "visual_value",
    "values_l_proj": "text_value",
    "out_v_proj": "visual_output",
    "out_l_proj": "text_output",
}


def _block(config: ModelConfig, block: int) -> Iterator[Entry]:
    tower, per_block = "rpn.head.dyhead_tower", 3 if config.fusion.enabled else 1
    if config.fusion.enabled:
        fusion, ours = f"{tower}.{per_block * block}.b_attn", "head/tower/fusion"
        yield Entry(f"{fusion}.gamma_v", f"{ours}/visual_gamma", block, "same")
        yield Entry(f"{fusion}.gamma_l", f"{ours}/text_gamma", block, "same")
        yield from _norm(f"{fusion}.layer_norm_v", f"{ours}/visual_norm", block)
        yield from _norm(f"{fusion}.layer_norm_l", f"{ours}/text_norm", block)
        for theirs, name in _FUSION.items():
            yield from _layer(f"{fusion}.attn.{theirs}", f"{ours}/{name}", block, joint="_")
        yield from _bert_layer(f"{tower}.{per_block * block + 1}", "head/tower/text", block)
    dynamic, ours = f"{tower}.{per_block * (block + 1) - 1}", "head/tower/convolution"
    for number, name in enumerate(("coarse", "same", "fine")):
        yield from _layer(f"{dynamic}.DyConv.{number}.conv", f"{ours}/{name}", block, "conv", joint="_")
        yield from _norm(f"{dynamic}.DyConv.{number}.bn", f"{ours}/{name}_norm", block)
    yield from _layer(f"{dynamic}.AttnConv.1", f"{ours}/attention", block, "pointwise")
    yield from _layer(f"{dynamic}.relu.fc.0", f"{ours}/relu/squeeze", block)
    yield from _layer(f"{dynamic}.relu.fc.2", f"{ours}/relu/expand", block)
    yield from _layer(f"{dynamic}.offset", f"{ours}/offset", block, "conv")


def entries(config: ModelConfig) -> list[Entry]:
    """Every parameter of the network under the original's name."""
    match config.backbone.kind:
        case "swin":
            backbone = _swin(config)
        case "efficientnet_lite0":
            backbone = _efficientnet()
    head = "rpn.head"
    table = [*backbone, *_pyramid(config), *bert_entries(config)]
    for block in range(config.head.blocks):
        table += _block(config, block)
    table += _layer(f"{head}.bbox_pred", "head/box", None, "pointwise")
    table += _layer(f"{head}.centerness", "head/centerness", None, "pointwise")
    table += _layer(f"{head}.dot_product_projection_text", "head/projection", None)
    table += [
        Entry(f"{head}.log_scale", "head/log_scale", None, "same"),
        Entry(f"{head}.bias0", "head/bias0", None, "same"),
        Entry(f"{head}.bias_lang", "head/bias_text", None, "same"),
    ]
    table += [Entry(f"{head}.scales.{i}.scale", "head/scales", i, "scalar") for i in range(len(config.pyramid.strides))]
    return table


def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of our parameters by slash-separated path, without computing any."""
    image, extent = jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64)
    tokens = jnp.zeros((1, 4), jnp.int32)
    tree = jax.eval_shape(GLIP(config).init, jax.random.key(0), image, extent, tokens, tokens == 0)["params"]
    return dict(flax.traverse_util.flatten_dict(tree, sep="/"))  # pyright: ignore[reportReturnType]


def import_state(state: Mapping[str, Shaped[np.ndarray, "..."]], config: ModelConfig) -> dict[str, Any]:
    """Our parameter tree from tensors under the original's names. Strict.

    Raises:
      WeightError: naming every missing, unknown or wrongly shaped tensor.
    """
    table, shapes = entries(config), parameter_shapes(config)
    names = {entry.name for entry in table}
    unknown = sorted(name for name in set(state) - names if not any(part in name for part in IGNORED))
    missing = sorted(names - set(state))
    if missing or unknown:
        raise WeightError(
            f"weights do not fit the network: {len(missing)} missing {missing[:5]}, {len(unknown)} unknown {unknown[:5]}; "
            "check the config's sizes against the checkpoint's"
        )
    ours = {path: np.full(shape.shape, np.nan, np.float32) for path, shape in shapes.items()}
    for entry in table:
        value = _to_ours(np.asarray(state[entry.name], np.float32), entry.layout)
        place = () if entry.index is None else entry.index
        room = ours[entry.path][place].shape
        if value.shape != room:
            raise WeightError(
                f"{entry.name} has shape {state[entry.name].shape}, {entry.path} wants {room} (after layout)"
            )
        ours[entry.path][place] = value
    unfilled = sorted(path for path, value in ours.items() if np.isnan(value).any())
    if unfilled:
        raise WeightError(f"parameters without a tensor, or with NaN in it: {unfilled[:5]} ({len(unfilled)} in all)")
    return flax.traverse_util.unflatten_dict(ours, sep="/")


def export_state(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Tensors under the original's names from our tree (parameters, gradients, or anything of their shape)."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    state = {}
    for entry in entries(config):
        value = np.asarray(flat[entry.path])
        state[entry.name] = _to_theirs(value if entry.index is None else value[entry.index, ...], entry.layout)
    return state
