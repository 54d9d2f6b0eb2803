"""Reads a folder of fixtures made with the original GLIP: a Config from meta.json, inputs and outputs from npz files.

The format: `meta.json` (option names and values of the original, text encoder and fusion sizes, sha256 of the files),
`model_t.safetensors`, `model_a_rpn_only.safetensors`, and npz files of inputs and outputs (README of the fixtures).
"""

import ast
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from glip_jax.config import (
    AnchorConfig,
    BackboneConfig,
    Config,
    FusionConfig,
    HeadConfig,
    InputConfig,
    LossConfig,
    ModelConfig,
    PyramidConfig,
    TextConfig,
    validate,
)
from glip_jax.structures.batch import DROPS, Batch
from glip_jax.weights.names import import_state


class FixtureError(ValueError):
    """A folder in another format; the message says where."""


def read_meta(folder: Path) -> dict[str, Any]:
    """Content of meta.json, after the hashes of the files were checked."""
    path = folder / "meta.json"
    if not path.is_file():
        raise FixtureError(f"{path} is missing: give a folder of fixtures")
    meta = json.loads(path.read_text())
    for name, expected in meta.get("sha256", {}).items():
        if not (folder / name).is_file():
            continue
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            raise FixtureError(f"{folder / name} has sha256 {found}, meta.json says {expected}: the file was changed")
    return meta


_OPTIONS = {
    "MODEL.SWINT.EMBED_DIM": "backbone.width",
    "MODEL.SWINT.OUT_CHANNELS": None,
    "MODEL.SWINT.DEPTHS": "backbone.depths",
    "MODEL.SWINT.NUM_HEADS": "backbone.heads",
    "MODEL.SWINT.WINDOW_SIZE": "backbone.window",
    "MODEL.BACKBONE.OUT_CHANNELS": "pyramid.channels",
    "MODEL.DYHEAD.CHANNELS": None,
    "MODEL.DYHEAD.NUM_CONVS": "head.blocks",
    "MODEL.DYHEAD.FUSE_CONFIG.JOINT_EMB_SIZE": None,
    "MODEL.DYHEAD.FUSE_CONFIG.JOINT_OUT_SIZE": None,
    "MODEL.LANGUAGE_BACKBONE.LANG_DIM": None,
    "MODEL.LANGUAGE_BACKBONE.MAX_QUERY_LEN": "text.max_tokens",
    "MODEL.GROUP_NORM.NUM_GROUPS": "head.groups",
}
"""Option of the original -> field of Config; None: implied by another size, and compared with it."""


def model_config(meta: Mapping[str, Any]) -> ModelConfig:
    """The network of a folder, with settings compatible with the original.

    Raises FixtureError for an option that the format does not know, or sizes that contradict one another.
    """
    absent = [key for key in ("config", "opts", "bert", "fuse", "vocab") if key not in meta]
    if absent:
        raise FixtureError(f"meta.json lacks {', '.join(absent)}")
    if meta["config"] != "glip_t":
        raise FixtureError(f"meta.json is of config {meta['config']!r}: the format's folders override 'glip_t'")
    if len(meta["opts"]) % 2:
        raise FixtureError(f"meta.json's opts has {len(meta['opts'])} entries: expected names and values in turn")
    options = dict(zip(meta["opts"][::2], meta["opts"][1::2], strict=True))
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise FixtureError(f"meta.json has options that this reader does not know: {', '.join(unknown)}")
    values = {name: _literal(name, value) for name, value in options.items()}
    fields: dict[str, dict[str, Any]] = {"backbone": {}, "pyramid": {}, "head": {}, "text": {}}
    for name, place in _OPTIONS.items():
        if place and name in values:
            part, field = place.split(".")
            fields[part][field] = values[name]
    bert, fuse = meta["bert"], meta["fuse"]
    text = TextConfig(
        vocabulary_size=bert["vocab_size"], width=bert["hidden_size"], layers=bert["num_hidden_layers"],
        heads=bert["num_attention_heads"], hidden=bert["intermediate_size"],
        positions=bert["max_position_embeddings"], **fields["text"],
    )  # fmt: skip
    model = ModelConfig(
        input=InputConfig(extent="batch"),
        backbone=dataclasses.replace(BackboneConfig(), **fields["backbone"]),
        pyramid=dataclasses.replace(PyramidConfig(drop_block_over="batch"), **fields["pyramid"]),
        text=text,
        fusion=FusionConfig(width=fuse["embed_dim"], heads=fuse["n_head"]),
        head=HeadConfig(coarse_offsets="flat", **fields["head"]),
    )
    implied = {
        "MODEL.SWINT.OUT_CHANNELS": tuple(model.backbone.width * 2**i for i in range(4)),
        "MODEL.DYHEAD.CHANNELS": model.pyramid.channels,
        "MODEL.DYHEAD.FUSE_CONFIG.JOINT_EMB_SIZE": model.pyramid.channels,
        "MODEL.DYHEAD.FUSE_CONFIG.JOINT_OUT_SIZE": model.pyramid.channels,
        "MODEL.LANGUAGE_BACKBONE.LANG_DIM": text.width,
    }
    for name, expected in implied.items():
        if values.get(name, expected) != expected:
            raise FixtureError(f"{name} is {values[name]}, the other sizes of meta.json imply {expected}")
    return model


def _literal(name: str, value: str) -> Any:
    """A value of `opts`; sequences as tuples."""
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise FixtureError(f"meta.json: {name} is {value!r}, which is no number and no tuple") from None
    return tuple(found) if isinstance(found, list) else found


def _columns(rows: np.ndarray, tokens: int) -> np.ndarray:
    """Token maps cut to the number of tokens of the caption: the original always stores 256 columns."""
    rows = rows[:, :tokens] > 0
    return np.pad(rows, ((0, 0), (0, tokens - rows.shape[1])))


class Case(NamedTuple):
    """Inputs and outputs of one npz file (or two)."""

    name: str
    config: Config
    state: Mapping[str, np.ndarray]
    """Weights under the names of the original."""
    params: dict[str, Any]
    """The same as parameters of GLIP."""
    batch: Batch
    image: np.ndarray
    """Float32[B H W 3], normalised, zero beyond each image's size."""
    class_map: np.ndarray
    """Bool[B P T]: the tokens of each class label."""
    captions: tuple[str, ...]
    wanted: Mapping[str, np.ndarray]


def _batch(name: str, inputs: Mapping[str, np.ndarray], prefix: str) -> tuple[Batch, np.ndarray, np.ndarray]:
    def get(field: str) -> np.ndarray:
        if prefix + field not in inputs:
            raise FixtureError(f"the inputs of {name} lack {prefix + field}")
        return inputs[prefix + field]

    tokens = get("input_ids").shape[1]
    height, width = (int(n) for n in get("images_padded_shape")[2:])
    counts = get("num_boxes").tolist()
    images, number = len(counts), max(max(counts), 1)
    image = np.zeros((images, height, width, 3), np.float32)
    boxes = np.zeros((images, number, 4), np.float32)
    box_mask = np.zeros((images, number), bool)
    positive_map = np.zeros((images, number, tokens), bool)
    begin = 0
    for i, count in enumerate(counts):
        pixels = get(f"image{i}").transpose(1, 2, 0)
        image[i, : pixels.shape[0], : pixels.shape[1]] = pixels
        boxes[i, :count] = get("boxes")[begin : begin + count]
        box_mask[i, :count] = True
        positive_map[i, :count] = _columns(get("positive_map")[begin : begin + count], tokens)
        begin += count
    extent = np.tile(np.asarray([height, width], np.int32), (images, 1))
    class_map = np.tile(_columns(get("eval_class_token_map"), tokens)[None], (images, 1, 1))
    batch = Batch(
        image=np.zeros((images, height, width, 3), np.uint8), size=get("image_sizes").astype(np.int32), extent=extent,
        tokens=get("input_ids").astype(np.int32), token_mask=get("attention_mask") > 0, boxes=boxes,
        box_mask=box_mask, box_weight=box_mask.astype(np.float32), positive_map=positive_map, token_loss_mask=np.ones((images, tokens), bool), valid=np.ones(images, bool), source=np.zeros(images, np.int32),
        record=np.arange(images, dtype=np.int32), dropped=np.zeros((images, len(DROPS)), np.int32),
    )  # fmt: skip
    return batch, image, class_map


def read_cases(folder: Path) -> tuple[list[Case], list[str]]:
    """Cases of the folder, and names of files that belong to no case or to one that cannot run."""
    meta = read_meta(folder)
    model = model_config(meta)
    if not (folder / "model_t.safetensors").is_file():
        raise FixtureError(f"{folder / 'model_t.safetensors'} is missing: every case needs its weights")
    state = load_file(folder / "model_t.safetensors")
    cases, used, left = [], {"model_t.safetensors", "meta.json", "inputs.npz"}, []
    for name in ("out_t", "out_a", "odd_t", "full_caption_t", "levels_t"):
        path = folder / f"{name}.npz"
        if not path.is_file():
            continue
        wanted = dict(np.load(path))
        needs = [] if "in.input_ids" in wanted else ["inputs.npz"]
        needs += ["model_a_rpn_only.safetensors"] if name == "out_a" else []
        missing = [need for need in needs if not (folder / need).is_file()]
        used |= {path.name, *needs}
        if missing:
            left.append(f"{path.name} ({', '.join(missing)} missing)")
            continue
        own_model, own_state = model, state
        if name == "out_a":
            own_model = dataclasses.replace(model, fusion=dataclasses.replace(model.fusion, enabled=False))
            rest = {k: v for k, v in state.items() if not k.startswith("rpn.")}
            own_state = rest | load_file(folder / "model_a_rpn_only.safetensors")
        if "anchor_sizes" in wanted or "in.anchor_sizes" in wanted:
            sizes = wanted["anchor_sizes"] if "anchor_sizes" in wanted else wanted["in.anchor_sizes"]
            own_model = dataclasses.replace(own_model, anchors=AnchorConfig(tuple(int(n) for n in sizes)))
        inputs, prefix = (wanted, "in.") if "in.input_ids" in wanted else (dict(np.load(folder / "inputs.npz")), "")
        batch, image, class_map = _batch(name, inputs, prefix)
        captions = tuple(np.atleast_1d(inputs.get(f"{prefix}captions", np.array([], str))).tolist())
        config = validate(Config(name=name, model=own_model, loss=LossConfig(last_token_negative=False)))
        params = import_state(own_state, own_model)
        cases.append(Case(name, config, own_state, params, batch, image, class_map, captions, wanted))
    others = sorted(p.name for p in folder.iterdir() if p.is_file() and p.name not in used)
    return cases, [*left, *others]
