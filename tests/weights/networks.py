"""A small GLIP under the original's names, and how other people would store it."""

import collections

import flax.traverse_util
import numpy as np

from glip_jax.config import (
    AnchorConfig,
    BackboneConfig,
    FusionConfig,
    HeadConfig,
    ModelConfig,
    PyramidConfig,
    TextConfig,
)
from glip_jax.weights.names import export_state, parameter_shapes

SMALL = ModelConfig(
    backbone=BackboneConfig(width=8, depths=(1, 2, 3, 1), heads=(1, 1, 2, 2), window=3),
    pyramid=PyramidConfig(channels=16),
    text=TextConfig(vocabulary_size=20, width=12, layers=2, heads=2, hidden=24, positions=16, max_tokens=8),
    fusion=FusionConfig(width=16, heads=2),
    head=HeadConfig(blocks=2, groups=4, coarse_offsets="flat"),
    anchors=AnchorConfig((64, 128, 256, 512, 1024)),
)


def parameters(config=SMALL, seed=0):
    """Random parameters, {our path: array}."""
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=v.shape).astype(np.float32) for k, v in parameter_shapes(config).items()}


def state(config=SMALL, seed=0):
    """The same under the original's names, as released files hold it: buffers and the dead branch included."""
    tensors = export_state(flax.traverse_util.unflatten_dict(parameters(config, seed), sep="/"), config)
    if config.backbone.kind == "swin":
        tensors["backbone.body.layers.0.blocks.0.attn.relative_position_index"] = np.zeros((9, 9), np.int64)
    return tensors | {
        "rpn.head.cls_logits.weight": np.zeros((80, config.pyramid.channels, 1, 1), np.float32),
        "rpn.anchor_generator.cell_anchors.0": np.zeros((1, 4), np.float32),
        "language_backbone.body.model.embeddings.position_ids": np.arange(16)[None],
        "language_backbone.body.model.pooler.dense.weight": np.zeros((12, 12), np.float32),
        "rpn.resizer.weight": np.zeros(3, np.float32),
    }


def mmdetection(state):
    """As tools/model_converters/glip_to_mmdet.py makes it, and mmdetection saves it again (scales without axes)."""
    converted = collections.OrderedDict()
    for name, value in state.items():
        if "downsample.reduction" in name:
            out, cells = value.shape
            value = value.reshape(out, 4, cells // 4)[:, [0, 2, 1, 3]].transpose(0, 2, 1).reshape(out, cells)
        if "downsample.norm" in name:
            value = value.reshape(4, -1)[[0, 2, 1, 3]].T.reshape(-1)
        if name.startswith("backbone.body."):
            for old, new in (
                ("backbone.body.", "backbone."), ("patch_embed.proj.", "patch_embed.projection."), ("layers.", "stages."),
                ("mlp.fc1.", "ffn.layers.0.0."), ("mlp.fc2.", "ffn.layers.1."), ("attn.", "attn.w_msa."),
            ):  # fmt: skip
                name = name.replace(old, new)
        for number in range(3):
            name = name.replace(f"backbone.fpn.fpn_inner{number + 2}.", f"neck.lateral_convs.{number}.conv.")
            name = name.replace(f"backbone.fpn.fpn_layer{number + 2}.", f"neck.fpn_convs.{number}.conv.")
        for number in (3, 4):
            name = name.replace(f"backbone.fpn.top_blocks.p{number + 3}.", f"neck.fpn_convs.{number}.conv.")
        if name.startswith("language_backbone."):
            name = f"language_model.{name}"
        if name.startswith("rpn."):
            name = name.replace("rpn.", "bbox_head.").replace("DyConv", "dyconvs").replace("AttnConv", "attnconv")
        if ".scales." in name:
            value = value.reshape(())
        if not any(part in name for part in ("pooler", "resizer", "anchor_generator", "cls_logits")):
            converted[name] = value
    return converted
