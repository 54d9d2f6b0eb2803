"""The table of tensor names: microsoft/GLIP name <-> parameter path in glip_jax, for import and export.

Names are those of GLIP's checkpoints (glip-reference 6.2) without the `module.` prefix. glip_jax stacks equal layers along
a leading axis, so one of its arrays corresponds to several GLIP tensors.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from glip_jax import UserError
from glip_jax.config import ModelConfig
from glip_jax.models.efficientnet import OUTPUTS, STAGES
from glip_jax.models.glip import GLIP

__all__ = [
    "IGNORED",
    "Entry",
    "Gathered",
    "WeightError",
    "bert_entries",
    "check_shapes",
    "efficientnet_entries",
    "entries",
    "export_state",
    "gather",
    "import_state",
    "parameter_shapes",
    "rule_of",
    "swin_entries",
]

IGNORED = {
    "rpn.head.cls_logits.": "a frozen branch whose loss counts zero times",
    "relative_position_index": "recomputed from the size of the window",
    "rpn.anchor_generator.cell_anchors.": "recomputed from the sizes of the anchors",
    "embeddings.position_ids": "0, 1, 2, ...",
    ".pooler.": "of BERT, after the layers that GLIP reads",
    "rpn.resizer.": "of older code, not part of the network",
}
"""Parts of names of GLIP tensors that nothing needs (glip-reference 6.2, 6.3), and why."""

_TUNED = "rpn.tunable_linear."
"""Prompts tuned for one data set: without them the network is not the saved one."""


class WeightError(UserError, ValueError):
    """Weights that do not fit the network; the message names tensors that are missing, unknown or of another shape."""


class Entry(NamedTuple):
    """A GLIP tensor and its place in the parameter tree."""

    name: str
    path: str
    """Slash-separated path in the parameter tree."""
    index: int | None
    """Index along the leading axis of stacked layers; None if the parameter is not stacked."""
    layout: Literal["same", "linear", "conv", "pointwise", "scalar", "ids"]
    """Conversion from GLIP to glip_jax: none; [O I] -> [I O]; OIHW -> HWIO; [O I 1 1] -> [I O]; [1] -> []; int64 -> int32."""


class Gathered(NamedTuple):
    """Tensors of a file under parameter paths."""

    values: dict[str, Shaped[np.ndarray, "..."]]
    """Float32 arrays by path, with the sizes in the file."""
    ignored: dict[str, int]
    """Number of tensors that each rule ignored."""


def _from_torch(value: Shaped[np.ndarray, "..."], layout: str) -> Shaped[np.ndarray, "..."]:
    match layout:
        case "linear":
            return value.T
        case "conv":
            return value.transpose(2, 3, 1, 0)
        case "pointwise":
            return value[:, :, 0, 0].T
        case "scalar":
            return value.reshape(())
        case "ids":
            return value.astype(np.int32)
        case _:
            return value


def _to_torch(value: Shaped[np.ndarray, "..."], layout: str) -> Shaped[np.ndarray, "..."]:
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
    """Weight and bias of a layer; `joint` separates the path from 'kernel' or 'bias'."""
    yield Entry(f"{name}.weight", f"{path}{joint}kernel", index, layout)
    yield Entry(f"{name}.bias", f"{path}{joint}bias", index, "same")


def _norm(name: str, path: str, index: int | None) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", f"{path}/scale", index, "same")
    yield Entry(f"{name}.bias", f"{path}/bias", index, "same")


def swin_entries(config: ModelConfig, body: str = "backbone.body.") -> Iterator[Entry]:
    """The tensors of a Swin, under the original names with the prefix `body`."""
    yield from _layer(f"{body}patch_embed.proj", "backbone/patch_embedding", None, "conv")
    yield from _norm(f"{body}patch_embed.norm", "backbone/patch_norm", None)
    for stage, depth in enumerate(config.backbone.depths):
        for block in range(depth):
            name, path = f"{body}layers.{stage}.blocks.{block}", f"backbone/stage{stage + 1}"
            if block == depth - 1 and depth % 2:
                path, index = f"{path}/last", None
            else:
                path, index = f"{path}/pairs/{('plain', 'shifted')[block % 2]}", block // 2
            yield from _norm(f"{name}.norm1", f"{path}/norm1", index)
            yield Entry(f"{name}.attn.relative_position_bias_table", f"{path}/bias_table", index, "same")
            yield from _layer(f"{name}.attn.qkv", f"{path}/qkv", index)
            yield from _layer(f"{name}.attn.proj", f"{path}/projection", index)
            yield from _norm(f"{name}.norm2", f"{path}/norm2", index)
            yield from _layer(f"{name}.mlp.fc1", f"{path}/mlp_in", index)
            yield from _layer(f"{name}.mlp.fc2", f"{path}/mlp_out", index)
        if stage < 3:
            merge = f"{body}layers.{stage}.downsample"
            yield from _norm(f"{merge}.norm", f"backbone/merge{stage + 1}/norm", None)
            yield Entry(f"{merge}.reduction.weight", f"backbone/merge{stage + 1}/reduction/kernel", None, "linear")
        if stage > 0:
            yield from _norm(f"{body}norm{stage}", f"backbone/norm{stage}", None)


def efficientnet_entries(body: str = "backbone.body.") -> Iterator[Entry]:
    """EfficientNet-Lite0 with the prefix `body`: GLIP has no such backbone, so the names are those of `weights/portable`."""

    def norm(name: str, path: str) -> Iterator[Entry]:
        yield Entry(f"{name}.weight", f"{path}/frozen_scale", None, "same")
        yield Entry(f"{name}.bias", f"{path}/frozen_shift", None, "same")

    yield Entry(f"{body}stem.weight", "backbone/stem/kernel", None, "conv")
    yield from norm(f"{body}stem_norm", "backbone/stem_norm")
    for stage, (blocks, _, _, expansion, _) in enumerate(STAGES):
        for block in range(blocks):
            name, path = f"{body}stages.{stage}.{block}", f"backbone/stage{stage + 1}/block{block + 1}"
            for part in ("expand", "project") if expansion > 1 else ("project",):
                yield Entry(f"{name}.{part}.weight", f"{path}/{part}/kernel", None, "pointwise")
                yield from norm(f"{name}.{part}_norm", f"{path}/{part}_norm")
            yield Entry(f"{name}.depthwise.weight", f"{path}/depthwise", None, "conv")
            yield from norm(f"{name}.depthwise_norm", f"{path}/depthwise_norm")
    for number in range(1, len(OUTPUTS) + 1):
        yield from _norm(f"{body}norm{number}", f"backbone/norm{number}", None)


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
    for torch_name, part in _BERT_LAYER.items():
        yield from _layer(f"{name}.{torch_name}", f"{path}/{part}", index)
    for torch_name, part in _BERT_NORM.items():
        yield from _norm(f"{name}.{torch_name}", f"{path}/{part}", index)


def bert_entries(config: ModelConfig, prefix: str = "language_backbone.body.model.") -> Iterator[Entry]:
    """The tensors of the text encoder, under the names of transformers with the prefix `prefix`."""
    for torch_name, part in (
        ("word_embeddings", "word"),
        ("position_embeddings", "position"),
        ("token_type_embeddings", "type"),
    ):
        yield Entry(f"{prefix}embeddings.{torch_name}.weight", f"text/embeddings/{part}", None, "same")
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
        fusion, path = f"{tower}.{per_block * block}.b_attn", "head/tower/fusion"
        yield Entry(f"{fusion}.gamma_v", f"{path}/visual_gamma", block, "same")
        yield Entry(f"{fusion}.gamma_l", f"{path}/text_gamma", block, "same")
        yield from _norm(f"{fusion}.layer_norm_v", f"{path}/visual_norm", block)
        yield from _norm(f"{fusion}.layer_norm_l", f"{path}/text_norm", block)
        for torch_name, part in _FUSION.items():
            yield from _layer(f"{fusion}.attn.{torch_name}", f"{path}/{part}", block, joint="_")
        yield from _bert_layer(f"{tower}.{per_block * block + 1}", "head/tower/text", block)
    dynamic, path = f"{tower}.{per_block * (block + 1) - 1}", "head/tower/convolution"
    for number, name in enumerate(("coarse", "same", "fine")):
        yield from _layer(f"{dynamic}.DyConv.{number}.conv", f"{path}/{name}", block, "conv", joint="_")
        yield from _norm(f"{dynamic}.DyConv.{number}.bn", f"{path}/{name}_norm", block)
    yield from _layer(f"{dynamic}.AttnConv.1", f"{path}/attention", block, "pointwise")
    yield from _layer(f"{dynamic}.relu.fc.0", f"{path}/relu/squeeze", block)
    yield from _layer(f"{dynamic}.relu.fc.2", f"{path}/relu/expand", block)
    yield from _layer(f"{dynamic}.offset", f"{path}/offset", block, "conv")


def entries(config: ModelConfig) -> list[Entry]:
    """The table of every parameter of the network."""
    match config.backbone.kind:
        case "swin":
            backbone = swin_entries(config)
        case "efficientnet_lite0":
            backbone = efficientnet_entries()
    head = "rpn.head"
    table = [*backbone, *_pyramid(config), *bert_entries(config)]
    for block in range(config.head.blocks):
        table += _block(config, block)
    table += _layer(f"{head}.bbox_pred", "head/box", None, "pointwise")
    table += _layer(f"{head}.centerness", "head/centerness", None, "pointwise")
    if config.head.presence:  # in exports of glip_jax only, as the next
        table += _layer(f"{head}.presence", "head/presence", None)
    if config.head.positions:
        table += [
            Entry(f"{head}.{name}.weight", f"head/{name}/kernel", None, "linear")
            for name in ("positions", "directions")
        ]
    table += _layer(f"{head}.dot_product_projection_text", "head/projection", None)
    table += [
        Entry(f"{head}.log_scale", "head/log_scale", None, "same"),
        Entry(f"{head}.bias0", "head/bias0", None, "same"),
        Entry(f"{head}.bias_lang", "head/bias_text", None, "same"),
    ]
    table += [Entry(f"{head}.scales.{i}.scale", "head/scales", i, "scalar") for i in range(len(config.pyramid.strides))]
    if config.prompts.names:  # in exports of glip_jax only
        table += [Entry("prompts.tokens", "prompts/tokens", None, "ids")]
        table += [Entry(f"prompts.{name}", f"prompts/{name}", None, "same") for name in ("embeddings", "deltas")]
    return table


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters by slash-separated path, without computing any."""
    image, extent = jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64)
    tokens = jnp.zeros((1, 4), jnp.int32)
    tree = jax.eval_shape(GLIP(config).init, jax.random.key(0), image, extent, tokens, tokens == 0)["params"]
    return dict(flax.traverse_util.flatten_dict(tree, sep="/"))  # pyright: ignore[reportReturnType]


def rule_of(name: str) -> str | None:
    """The rule of `IGNORED` that matches a tensor; None if it may not be ignored."""
    return next((part for part in IGNORED if part in name), None)


def gather(
    state: Mapping[str, Shaped[np.ndarray, "..."]],
    table: Iterable[Entry],
    ignorable: Callable[[str], str | None] = rule_of,
    origin: str = "the state dict",
) -> Gathered:
    """Parameters by path from tensors by name, of any size.

    Strict: raises WeightError if a tensor of `table` is missing, a tensor is neither in `table` nor `ignorable`, layers
    that are stacked differ in shape, or a value is not finite.
    """
    table = list(table)
    names = {entry.name for entry in table}
    missing = sorted(names - state.keys())
    rules = {name: ignorable(name) for name in state.keys() - names}
    unknown = sorted(name for name, rule in rules.items() if rule is None)
    if any(_TUNED in name for name in unknown):
        raise WeightError(
            f"{origin} holds prompts tuned for one data set ({_TUNED}*), which glip_jax does not support: give the file "
            "that the tuning started from"
        )
    faults = [
        f"it {what} {', '.join(listed[:5])} ({len(listed)} in all)"
        for what, listed in (("lacks", missing), ("holds the unknown", unknown))
        if listed
    ]
    if faults:
        raise WeightError(f"{origin} does not fit the network: {'; '.join(faults)}")
    parts: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    stacked = {entry.path for entry in table if entry.index is not None}
    for entry in sorted(table, key=lambda entry: entry.index or 0):
        value = _checked(state[entry.name], entry, origin)
        if parts[entry.path] and parts[entry.path][0].shape != value.shape:
            raise WeightError(
                f"{entry.name} of {origin} has shape {state[entry.name].shape}, unlike that of other layers"
            )
        parts[entry.path].append(value)
    values = {path: np.stack(part) if path in stacked else part[0] for path, part in parts.items()}
    return Gathered(values, dict(Counter(rule for rule in rules.values() if rule)))


def _checked(tensor: Shaped[np.ndarray, "..."], entry: Entry, origin: str) -> Shaped[np.ndarray, "..."]:
    """One tensor in the layout of glip_jax, float32."""
    axes = {"linear": 2, "conv": 4, "pointwise": 4}.get(entry.layout, tensor.ndim)
    if tensor.ndim != axes or (entry.layout == "scalar" and tensor.size != 1):
        expected = "1 value" if entry.layout == "scalar" else f"{axes} axes"
        raise WeightError(f"{entry.name} of {origin} has shape {tensor.shape}, expected {expected}")
    value = np.asarray(tensor, np.float32)
    if not np.isfinite(value).all():
        raise WeightError(f"{entry.name} of {origin} holds NaN or infinite values: the run that made it diverged")
    return _from_torch(value, entry.layout)


def check_shapes(
    values: Mapping[str, Shaped[np.ndarray, "..."]], shapes: Mapping[str, Any], origin: str = "the state dict"
) -> None:
    """Raises WeightError, naming parameters and both shapes, unless `values` have exactly the paths and `shapes`."""
    faults = [
        f"{path} is {values[path].shape} in the file, {tuple(shapes[path].shape)} in the network"
        for path in shapes
        if path in values and values[path].shape != tuple(shapes[path].shape)
    ]
    faults += [f"{path} is in the network only" for path in shapes if path not in values]
    faults += [f"{path} is in the file only" for path in values if path not in shapes]
    if faults:
        more = f"; {len(faults) - 3} more" if len(faults) > 3 else ""
        raise WeightError(f"{origin} does not fit the network: {'; '.join(faults[:3])}{more}")


def import_state(state: Mapping[str, Shaped[np.ndarray, "..."]], config: ModelConfig) -> dict[str, Any]:
    """The parameter tree from tensors under GLIP names. Strict.

    Raises:
      WeightError: naming every missing, unknown or wrongly shaped tensor.
    """
    values = gather(state, entries(config)).values
    check_shapes(values, parameter_shapes(config))
    return flax.traverse_util.unflatten_dict(values, sep="/")


def export_state(params: Mapping[str, Any], config: ModelConfig) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Tensors under GLIP names from a tree of parameters, gradients, or anything of their shape."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    state = {}
    for entry in entries(config):
        value = np.asarray(flat[entry.path])
        state[entry.name] = _to_torch(value if entry.index is None else value[entry.index, ...], entry.layout)
    return state
