"""Files of weights: which one a path means, the arrays in it, and the hash by which it is known again.

A path is a `.pth` or `.bin` of PyTorch, a `.safetensors`, or a Hugging Face folder that holds one of them.
"""

import json
from collections.abc import Sequence
from typing import Any

import safetensors.numpy
from etils import epath
from jaxtyping import Shaped
from numpy import ndarray

from glip_jax.weights.names import WeightError
from glip_jax.weights.torch_files import load_arrays

__all__ = ["folder_config", "read_arrays", "weight_file"]

_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")


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
        # From a local disk tensor by tensor, so that the file is not in memory beside them.
        return dict(safetensors.numpy.load_file(file) if "://" not in str(file) else _load(file))
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
