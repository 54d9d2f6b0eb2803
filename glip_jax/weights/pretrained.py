"""Starts the towers from pretrained files: EfficientNet-Lite0 from a `.pth`, the text encoder from a BERT folder.

Strict on both sides: every parameter of ours is filled, every tensor of theirs is used or is on the short list of what
a detector has no use for (classifiers, poolers, counters).
"""

import io
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util
from jaxtyping import Float, Shaped

from glip_jax.assets import resolve
from glip_jax.config import Config, TextConfig
from glip_jax.models.efficientnet import OUTPUTS, STAGES
from glip_jax.weights.torch_files import load_arrays, sha256

__all__ = ["PretrainedError", "fingerprints", "initialize"]

_EFFICIENTNET_EPSILON = 1e-3
"""Of its batch normalisation: TensorFlow's, not PyTorch's."""
_EFFICIENTNET_UNUSED = re.compile(r"_conv_head\.weight|_bn1\.\w+|_fc\.\w+|.*\.num_batches_tracked")
_BERT_UNUSED = re.compile(r"embeddings\.position_ids|pooler\.dense\.\w+|cls\..*")
_BERT_LAYER = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attention_output": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense", "output": "output.dense", "output_norm": "output.LayerNorm",
}  # fmt: skip
_BERT_SIZES = {
    "vocab_size": "vocabulary_size", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "hidden", "max_position_embeddings": "positions",
}  # fmt: skip
_BERT_FIXED = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2}


class PretrainedError(ValueError):
    """A pretrained file that does not fit the model."""


class _Tensors:
    """Named arrays that are taken out one by one, so that what nobody took is known."""

    def __init__(self, arrays: Mapping[str, Shaped[np.ndarray, "..."]], origin: str) -> None:
        self._left = dict(arrays)
        self._origin = origin

    def take(self, name: str) -> Float[np.ndarray, "..."]:
        """The array as float32; raises PretrainedError if it is not there."""
        if name not in self._left:
            near = [other for other in self._left if other.rsplit(".", 2)[0] == name.rsplit(".", 2)[0]][:4]
            beside = f"; beside it: {', '.join(near)}" if near else ""
            raise PretrainedError(f"{self._origin} lacks {name}{beside}: it is of another network or layout")
        return np.asarray(self._left.pop(name), np.float32)

    def expect_only(self, unused: re.Pattern[str]) -> None:
        """Raises PretrainedError if a tensor is left that `unused` does not match."""
        odd = sorted(name for name in self._left if not unused.fullmatch(name))
        if odd:
            raise PretrainedError(
                f"{self._origin} holds {len(odd)} tensors that the model has no place for: {', '.join(odd[:6])}: "
                "it is of another or a larger network"
            )


def fingerprints(config: Config) -> dict[str, str]:
    """SHA-256 of every pretrained file that `config.init` names, by path; empty if it names none."""
    files: dict[str, epath.Path] = {}
    if config.init.backbone:
        files[config.init.backbone] = resolve(config.init.backbone)
    if config.init.text:
        weights = _bert_weights(resolve(config.init.text))
        files[f"{config.init.text.rstrip('/')}/{weights.name}"] = weights
    return {name: sha256(path) for name, path in files.items()}


def initialize(params: dict[str, Any], config: Config) -> dict[str, Any]:
    """`params` with the towers that `config.init` names replaced by pretrained ones; prints what was read, with SHA-256.

    Keeps the dtype and placement of each parameter. Raises AssetError for files that are not there, TorchFileError for
    unreadable ones and PretrainedError, naming parameters and both shapes, for ones that do not fit.
    """
    params = dict(params)
    if config.init.backbone:
        if config.model.backbone.kind != "efficientnet_lite0":
            raise PretrainedError(
                f"init.backbone is {config.init.backbone!r}, but model.backbone.kind is {config.model.backbone.kind!r}: "
                "only 'efficientnet_lite0' starts from a file of its own; leave init.backbone empty"
            )
        path = resolve(config.init.backbone)
        params["backbone"] = _fill(
            params["backbone"], _efficientnet(load_arrays(path), str(path)), "backbone", str(path)
        )
    if config.init.text:
        folder = resolve(config.init.text)
        params["text"] = _fill(params["text"], _bert(folder, config.model.text), "text", str(folder))
    for name, digest in fingerprints(config).items():
        print(f"pretrained: {name} sha256 {digest}")
    return params


def _fill(tree: Mapping[str, Any], values: Mapping[str, Float[np.ndarray, "..."]], tower: str, origin: str) -> Any:
    """`tree` with every leaf replaced by the value of its path."""
    leaves: dict[str, Any] = dict(traverse_util.flatten_dict(tree, sep="/"))
    missing, extra = sorted(set(leaves) - set(values)), sorted(set(values) - set(leaves))
    if missing or extra:
        raise PretrainedError(
            f"{origin} does not fit the model's {tower}: "
            + "; ".join(
                f"{len(names)} parameters {what}: {', '.join(f'{tower}/{name}' for name in names[:6])}"
                for names, what in ((missing, "stay unfilled"), (extra, "have no place"))
                if names
            )
        )
    wrong = [
        f"{tower}/{name} is {tuple(leaf.shape)}, the file's {values[name].shape}"
        for name, leaf in leaves.items()
        if tuple(leaf.shape) != values[name].shape
    ]
    if wrong:
        raise PretrainedError(f"{origin} does not fit the model's {tower}: {'; '.join(wrong[:6])}")

    def placed(value: Float[np.ndarray, "..."], leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jax.device_put(value.astype(leaf.dtype), leaf.sharding)
        return jnp.asarray(value, leaf.dtype)

    return traverse_util.unflatten_dict({name: placed(values[name], leaf) for name, leaf in leaves.items()}, sep="/")


def _efficientnet(arrays: Mapping[str, Shaped[np.ndarray, "..."]], origin: str) -> dict[str, Float[np.ndarray, "..."]]:
    """Our backbone's parameters from lukemelas' EfficientNet-PyTorch names (blocks numbered through all stages)."""
    tensors = _Tensors(arrays, origin)
    values: dict[str, Any] = {}

    def norm(ours: str, theirs: str) -> None:
        weight, bias, mean, variance = (
            tensors.take(f"{theirs}.{part}") for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / np.sqrt(variance + _EFFICIENTNET_EPSILON)
        values[f"{ours}/frozen_scale"] = scale
        values[f"{ours}/frozen_shift"] = bias - mean * scale

    def pointwise(ours: str, theirs: str) -> None:
        values[f"{ours}/kernel"] = tensors.take(f"{theirs}.weight")[:, :, 0, 0].T

    values["stem/kernel"] = tensors.take("_conv_stem.weight").transpose(2, 3, 1, 0)
    norm("stem_norm", "_bn0")
    number = 0
    for stage, (blocks, _, _, expansion, _) in enumerate(STAGES, start=1):
        for block in range(1, blocks + 1):
            ours, theirs = f"stage{stage}/block{block}", f"_blocks.{number}"
            if expansion > 1:
                pointwise(f"{ours}/expand", f"{theirs}._expand_conv")
                norm(f"{ours}/expand_norm", f"{theirs}._bn0")
            values[f"{ours}/depthwise"] = tensors.take(f"{theirs}._depthwise_conv.weight").transpose(2, 3, 1, 0)
            norm(f"{ours}/depthwise_norm", f"{theirs}._bn1")
            pointwise(f"{ours}/project", f"{theirs}._project_conv")
            norm(f"{ours}/project_norm", f"{theirs}._bn2")
            number += 1
    for output, stage in enumerate(OUTPUTS, start=1):
        # Ours alone: the classifier that the file was trained with has no norm there.
        values[f"norm{output}/scale"] = np.ones(STAGES[stage - 1][-1], np.float32)
        values[f"norm{output}/bias"] = np.zeros(STAGES[stage - 1][-1], np.float32)
    tensors.expect_only(_EFFICIENTNET_UNUSED)
    return values


def _bert_weights(folder: epath.Path) -> epath.Path:
    """The file of weights in a Hugging Face folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return folder / name
    raise PretrainedError(f"{folder} holds neither model.safetensors nor pytorch_model.bin: init.text is a BERT folder")


def _bert_arrays(path: epath.Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Tensors by the names of a bare BertModel: without the `bert.` of task models, LayerNorm's names the newer ones."""
    if path.suffix == ".bin":
        arrays = load_arrays(path)
    else:
        try:
            arrays = safetensors.numpy.load(path.read_bytes())
        except safetensors.SafetensorError as error:
            raise PretrainedError(
                f"{path} cannot be read as safetensors ({error}): it is damaged or incomplete"
            ) from error
    names = {name: name.removeprefix("bert.") for name in arrays}
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        names = {name: plain.removesuffix(old) + new if plain.endswith(old) else plain for name, plain in names.items()}
    return {names[name]: array for name, array in arrays.items()}


def _check_bert_config(folder: epath.Path, text: TextConfig) -> None:
    """Raises PretrainedError where the folder's config.json and ours differ."""
    path = folder / "config.json"
    if not path.exists():
        raise PretrainedError(f"{folder} has no config.json: init.text is the folder of a Hugging Face BERT")
    try:
        found = json.load(io.StringIO(path.read_text()))
    except json.JSONDecodeError as error:
        raise PretrainedError(f"{path} is no JSON ({error})") from error
    wrong = [
        f"{theirs} is {found.get(theirs)}, model.text.{ours} {getattr(text, ours)}"
        for theirs, ours in _BERT_SIZES.items()
        if found.get(theirs) != getattr(text, ours)
    ]
    wrong += [
        f"{name} is {found[name]!r}, the encoder's {value!r}"
        for name, value in _BERT_FIXED.items()
        if found.get(name, value) != value
    ]
    if wrong:
        raise PretrainedError(f"{path} does not fit the model: {'; '.join(wrong)}")


def _bert(folder: epath.Path, text: TextConfig) -> dict[str, Float[np.ndarray, "..."]]:
    """Our text encoder's parameters from a Hugging Face folder; layers stacked along a leading axis."""
    _check_bert_config(folder, text)
    path = _bert_weights(folder)
    tensors = _Tensors(_bert_arrays(path), str(path))
    values = {
        f"embeddings/{kind}": tensors.take(f"embeddings.{name}.weight")
        for kind, name in (
            ("word", "word_embeddings"),
            ("position", "position_embeddings"),
            ("type", "token_type_embeddings"),
        )
    }
    values["embeddings/norm/scale"] = tensors.take("embeddings.LayerNorm.weight")
    values["embeddings/norm/bias"] = tensors.take("embeddings.LayerNorm.bias")
    for ours, theirs in _BERT_LAYER.items():
        names = [f"encoder.layer.{layer}.{theirs}" for layer in range(text.layers)]
        weights = [tensors.take(f"{name}.weight") for name in names]
        values[f"layers/{ours}/bias"] = np.stack([tensors.take(f"{name}.bias") for name in names])
        if ours.endswith("_norm"):
            values[f"layers/{ours}/scale"] = np.stack(weights)
        else:
            values[f"layers/{ours}/kernel"] = np.stack([weight.T for weight in weights])
    tensors.expect_only(_BERT_UNUSED)
    return values
