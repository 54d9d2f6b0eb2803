"""Reads weight files of this and other projects into glip_jax parameters: whole networks, backbones, text encoders.

A path is a `.pth` or `.bin` of PyTorch, a `.safetensors`, a Hugging Face folder that holds one of them, or a working folder.
Reading is strict: every tensor of a file becomes (part of) a parameter or is on a short list of tensors that a detector
does not use. Arrays keep the sizes of the file; the caller compares them with those of its network.
"""

import fnmatch
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import safetensors.numpy
from etils import epath
from flax import traverse_util
from jaxtyping import Shaped
from numpy import ndarray

from glip_jax.config import ModelConfig, TextConfig
from glip_jax.io.assets import AssetError, resolve
from glip_jax.io.checkpoint_reader import Checkpoint, Which, fingerprint, open_checkpoint
from glip_jax.io.checkpoint_steps import is_workdir
from glip_jax.io.formats import explain_bytes
from glip_jax.io.retry import StorageError
from glip_jax.io.workdir import CheckpointError, workdir_path
from glip_jax.weights import dialects, names
from glip_jax.weights.delta import is_delta, open_delta
from glip_jax.weights.names import WeightError
from glip_jax.weights.sizes import infer_model, infer_swin, variant
from glip_jax.weights.torch_files import load_arrays, sha256

__all__ = [
    "Weights",
    "folder_config",
    "open_checkpoint_or_export",
    "open_export",
    "read_arrays",
    "read_backbone",
    "read_network",
    "read_text",
    "read_workdir",
    "weight_file",
]

_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")
"""Weight files of a Hugging Face folder, in the order in which they are looked for."""
_OUTPUT_NORMS = ("backbone/norm[123]/*",)
"""Parameters of a detector's backbone that a classifier's file does not have."""
_SWIN_IGNORED = {
    "norm.*": "of the classifier",
    "head.*": "of the classifier",
    "*.attn_mask": "recomputed from the size of the map",
    "*.relative_position_index": "recomputed from the size of the window",
}
_EFFICIENTNET_IGNORED = {
    "_conv_head.*": "of the classifier",
    "_bn1.*": "of the classifier",
    "_fc.*": "of the classifier",
    "*.num_batches_tracked": "a counter of training",
}
_BERT_IGNORED = {
    "embeddings.position_ids": "0, 1, 2, ...",
    "pooler.*": "after the layers that GLIP reads",
    "cls.*": "of the pretraining tasks of BERT",
}
_BERT_SIZES = {
    "vocab_size": "vocabulary_size", "hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "intermediate_size": "hidden", "max_position_embeddings": "positions",
}  # fmt: skip
_BERT_FIXED = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "type_vocab_size": 2}
_SWIN_FIXED = {"model_type": "swin", "hidden_act": "gelu", "layer_norm_eps": 1e-5}


class Weights(NamedTuple):
    """Parameters read from a file or a working folder."""

    origin: str
    """The path as the setting or the command gave it."""
    layout: str
    """Which project's tensor names the file has."""
    values: dict[str, Shaped[ndarray, "..."]]
    """Parameters by their slash-separated paths in glip_jax, float32, of the sizes in the file."""
    ignored: dict[str, int]
    """Number of tensors that each rule ignored."""
    proof: dict[str, Any]
    """What identifies the content: `file` and `sha256`, or `step` and `fingerprint`."""
    never: tuple[str, ...] = ()
    """Patterns of parameters that files of this kind never hold."""


def read_network(name: str, parameters: Literal["model", "model_ema"] = "model") -> tuple[Weights, ModelConfig]:
    """A whole GLIP from a `.pth` of microsoft/GLIP or mmdetection or a folder of `export`, and its inferred network.

    `parameters`: which state dict of a training checkpoint; GLIP's authors evaluate `model`. Raises AssetError,
    TorchFileError or WeightError.
    """
    file = weight_file(resolve(name))
    keys = ("model", "state_dict") if parameters == "model" else (parameters,)
    layout, state = dialects.glip_state(read_arrays(file, keys, required=parameters != "model"))
    model = infer_model(state, name)
    values, ignored = names.gather(state, names.entries(model), origin=name)
    return Weights(name, layout, values, ignored, _hashed(name, file)), model


def open_checkpoint_or_export(
    path: str, step: int | None = None, *, verify: Sequence[str] = ("params", "ema")
) -> Checkpoint:
    """Opens what `--checkpoint` names: WORKDIR, WORKDIR/checkpoints/STEP, a Hugging Face folder of `export`, or a delta.

    `step`, `verify`: see `glip_jax.io.checkpoint_reader.open_checkpoint`. Raises CheckpointError or, for an export, WeightError.
    """
    delta = is_delta(path)
    if not delta and (not (workdir_path(path) / "config.json").exists() or is_workdir(path)):
        return open_checkpoint(path, step, verify=verify)
    if step is not None:
        raise CheckpointError(
            f"{path} is {'a delta' if delta else 'an exported folder'}, which has no steps: leave --step out"
        )
    return open_delta(path, open_checkpoint_or_export) if delta else open_export(path)


def open_export(path: str) -> Checkpoint:
    """A Hugging Face folder that `export` wrote, as a checkpoint without step and metrics; ema and raw are the same here.

    If the vocabulary that its settings name is not on this machine, the folder's own is used. Parameters are read when
    they are asked for. Raises WeightError for a folder of another origin, and then for files that cannot be read.
    """
    folder = workdir_path(path)
    settings = folder_config(folder).get("glip_jax")
    if not isinstance(settings, dict):
        raise WeightError(
            f"{folder / 'config.json'} has no settings of glip_jax: expected a folder of `export --format=huggingface`; "
            "read other weights with the job `import`"
        )
    vocabulary = "model.text.vocabulary"
    if (folder / "vocab.txt").exists() and not _exists(str(settings.get(vocabulary, ""))):
        settings = settings | {vocabulary: str(folder / "vocab.txt")}

    def read(_: Which) -> dict[str, Any]:
        weights, model = read_network(path)
        names.check_shapes(
            weights.values, names.parameter_shapes(checkpoint.config.model), f"{path}, {variant(model)},"
        )
        return dict(traverse_util.unflatten_dict(weights.values, sep="/"))

    checkpoint = Checkpoint(path, folder, None, settings, (), read)
    return checkpoint


def read_workdir(name: str) -> Weights | None:
    """The newest checkpoint of a working folder, averaged parameters where it has them, or a delta; None if `name` is neither."""
    if not is_workdir(name) and not is_delta(name):
        return None
    checkpoint = open_checkpoint_or_export(name)
    parameters = checkpoint.parameters("ema")
    values = traverse_util.flatten_dict(parameters, sep="/")
    proof = {"step": checkpoint.step, "fingerprint": fingerprint(parameters)}
    layout = "a delta of glip_jax" if is_delta(name) else "a working folder of glip_jax"
    return Weights(name, layout, dict(values), {}, proof)  # pyright: ignore[reportArgumentType]


def read_backbone(name: str, model: ModelConfig, channels: Literal["as_stored", "reversed"]) -> Weights:
    """A backbone trained on ImageNet, of the kind that `model` has: Swin (three libraries' names) or EfficientNet-Lite0.

    `channels`: the order of the first convolution's input. Raises AssetError, TorchFileError or WeightError.
    """
    path = resolve(name)
    file = weight_file(path)
    arrays = read_arrays(file)
    match model.backbone.kind:
        case "swin":
            layout, state = dialects.swin_state(arrays)
            if layout.startswith("transformers"):
                _check_folder(path, _SWIN_FIXED)
            found = replace(model, backbone=infer_swin(state, origin=name))
            table = [entry for entry in names.swin_entries(found, "") if not matches(entry.path, _OUTPUT_NORMS)]
            ignored, first = _SWIN_IGNORED, "backbone/patch_embedding/kernel"
        case "efficientnet_lite0":
            layout, state = "EfficientNet-Lite0 of lukemelas", dialects.efficientnet_state(arrays)
            table = [entry for entry in names.efficientnet_entries("") if not matches(entry.path, _OUTPUT_NORMS)]
            ignored, first = _EFFICIENTNET_IGNORED, "backbone/stem/kernel"
    gathered = names.gather(state, table, _rules(ignored), name)
    if channels == "reversed":
        gathered.values[first] = gathered.values[first][:, :, ::-1]
    return Weights(name, layout, *gathered, _hashed(name, file), _OUTPUT_NORMS)


def read_text(name: str, model: ModelConfig) -> Weights:
    """The text encoder from a Hugging Face folder, whose config.json must agree with `model.text`."""
    path = resolve(name)
    if not path.is_dir():
        raise WeightError(f"{path} is a file: expected the folder of a Hugging Face BERT, with its config.json")
    _check_folder(path, _BERT_FIXED, model.text)
    file = weight_file(path)
    state = dialects.bert_state(read_arrays(file))
    gathered = names.gather(state, names.bert_entries(model, ""), _rules(_BERT_IGNORED), str(file))
    return Weights(name, "transformers' BERT", *gathered, _hashed(name, file))


def weight_file(path: epath.Path) -> epath.Path:
    """The file of weights that `path` means: itself, or the one in a Hugging Face folder.

    Raises WeightError for a folder without one and for an empty file.
    """
    if path.is_dir():
        found = next((path / name for name in _IN_FOLDERS if (path / name).exists()), None)
        if found is None:
            parts = " (its weights are in several parts: save them as one)" if any(path.glob("*.index.json")) else ""
            raise WeightError(f"{path} is a folder that holds neither {' nor '.join(_IN_FOLDERS)}{parts}")
        path = found
    if path.stat().length == 0:
        raise WeightError(f"{path} is empty: expected a file of weights, fetch it again")
    return path


def folder_config(path: epath.Path) -> dict[str, Any]:
    """config.json of a Hugging Face folder, {} for a file. Raises WeightError where a folder has none, or no JSON."""
    if not path.is_dir():
        return {}
    file = path / "config.json"
    if not file.exists():
        raise WeightError(f"{path} has no config.json: expected the folder of a Hugging Face model")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise WeightError(f"{file} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise WeightError(f"{file} holds a {type(found).__name__}, expected an object of settings")
    return found


def read_arrays(
    file: epath.Path, keys: Sequence[str] = ("model", "state_dict"), *, required: bool = False
) -> dict[str, Shaped[ndarray, "..."]]:
    """The tensors of a file by name; `keys`, `required`: see `load_arrays`, of PyTorch's files alone.

    Raises WeightError or TorchFileError, in one line, for what cannot be read.
    """
    if required and file.suffix == ".safetensors":
        raise WeightError(f"{file} holds one state dict; {' or '.join(keys)} beside another is a matter of .pth files")
    try:
        if file.suffix != ".safetensors":
            return load_arrays(file, keys, required=required)
        if found := explain_bytes(file):
            raise WeightError(f"{file} {found}")
        # From a local disk tensor by tensor, so that the file is not in memory beside them.
        return dict(safetensors.numpy.load_file(file) if "://" not in str(file) else _load(file))
    except StorageError:
        raise
    except OSError as error:
        raise WeightError(f"{file} cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise WeightError(f"{file} cannot be read as safetensors ({error}): it is damaged or incomplete") from error


def _load(file: epath.Path) -> dict[str, Shaped[ndarray, "..."]]:
    try:
        return safetensors.numpy.load(file.read_bytes())
    except KeyError as error:
        raise WeightError(
            f"{file} has tensors of type {error}, which are read from local files only: copy it"
        ) from error


def _exists(path: str) -> bool:
    try:
        return resolve(path).exists()
    except AssetError:
        return False


def _check_folder(path: epath.Path, fixed: Mapping[str, Any], text: TextConfig | None = None) -> None:
    """Raises WeightError where config.json of a folder and the encoder in `glip_jax.models` differ."""
    found = folder_config(path)
    wrong = [
        f"{name} is {found[name]!r}, the encoder's {value!r}"
        for name, value in fixed.items()
        if found.get(name, value) != value
    ]
    if text is not None:
        wrong += [
            f"{key} is {found.get(key)}, model.text.{field} {getattr(text, field)}"
            for key, field in _BERT_SIZES.items()
            if found.get(key) != getattr(text, field)
        ]
    if wrong:
        raise WeightError(f"{path / 'config.json'} does not fit the model: {'; '.join(wrong)}")


def _rules(patterns: Mapping[str, str]) -> Callable[[str], str | None]:
    return lambda name: next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns fits the path; `*` is any run of characters, slashes included."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _hashed(name: str, file: epath.Path) -> dict[str, Any]:
    folder = not name.endswith(file.name)
    return {"file": f"{name.rstrip('/')}/{file.name}" if folder else name, "sha256": sha256(file)}
