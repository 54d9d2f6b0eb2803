"""Size and MD5 of every file of a folder, in a file of that folder, so that later damage is found and named.

Array files of a checkpoint have no checksum of every byte: a flipped bit would be read as another number. MD5 is used
because a bucket lists the MD5 of its files, so that a remote folder is compared by one listing and none of it is read.
"""

import errno
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from glip_jax.io import gcs
from glip_jax.io.gcs import FileInfo

__all__ = ["NAME", "mismatch", "write"]

NAME = "checksums.json"
_THREADS = 8


def write(folder: epath.PathLike, without: str = "", wanted: Iterable[str] = ()) -> None:
    """Writes the checksums of all files below `folder`, local or gs://, except the file `without`.

    Raises OSError if they cannot be written, or if one of the `wanted` files does not exist.
    """
    place = gcs.address(folder)
    if gcs.is_remote(place):
        files = gcs.list_recursive(place)
    else:
        names = _below(Path(place))
        with ThreadPoolExecutor(_THREADS) as pool:
            files = dict(zip(names, pool.map(lambda name: _measured(Path(place) / name), names)))
    for name in (NAME, without):
        files.pop(name, None)
    missing = sorted(set(wanted) - set(files))
    if missing:
        raise OSError(errno.ENOENT, f"{missing[0]} was not written", place)
    text = json.dumps({"files": files}, indent=0)
    if gcs.is_remote(place):
        gcs.put(f"{place}/{NAME}", text.encode())
    else:
        (Path(place) / NAME).write_text(text)


def mismatch(folder: epath.PathLike, within: Sequence[str] = ()) -> str | None:
    """Which files differ from the checksums, in one line; "" if none does, None if the folder has no checksums.

    `within`: folders in it, of whose files alone this is asked (no other is read); () for all. Files without a checksum
    are not looked at. Raises StorageError for a bucket that does not answer.
    """
    place = gcs.address(folder)
    path = f"{place}/{NAME}"
    try:
        text = gcs.read(path) if gcs.is_remote(place) else Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        wanted = {name: FileInfo(*values) for name, values in json.loads(text)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} is no list of files and checksums"
    if within:
        wanted = {name: values for name, values in wanted.items() if name.partition("/")[0] in within}
    if gcs.is_remote(place):
        remote = gcs.list_recursive(place)
        found = {name: remote[name] for name in wanted if name in remote}
    else:
        found = _local(Path(place), wanted)
    faults = [text for name in sorted(wanted) if (text := _difference(name, wanted[name], found.get(name)))]
    more = f", and {len(faults) - 1} more files" if len(faults) > 1 else ""
    return f"{faults[0]}{more}" if faults else ""


def _local(folder: Path, wanted: dict[str, FileInfo]) -> dict[str, FileInfo]:
    """The files that exist; one is read only if its size is right and it changed since this process read it last."""

    def of(name: str) -> FileInfo | None:
        path = folder / name
        try:
            status = path.stat()
        except OSError:
            return None
        if status.st_size != wanted[name].bytes:
            return FileInfo(status.st_size, "")
        key = (str(path), status.st_size, status.st_mtime_ns, status.st_ino)
        if key not in _HASHED:
            _HASHED[key] = _measured(path)
        return _HASHED[key]

    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(wanted, pool.map(of, wanted)))
    return {name: each for name, each in found.items() if each is not None}


_HASHED: dict[tuple[str, int, int, int], FileInfo] = {}
"""What this process hashed before: training verifies the same checkpoint several times."""


def _difference(name: str, wanted: FileInfo, found: FileInfo | None) -> str:
    if found is None:
        return f"{name} is missing"
    if found.bytes != wanted.bytes:
        return f"{name} has {found.bytes} bytes, expected {wanted.bytes}"
    if found.md5 and wanted.md5 and found.md5 != wanted.md5:
        return f"{name} has other bytes than were written (MD5 {found.md5[:8]}, expected {wanted.md5[:8]})"
    return ""


def _below(folder: Path) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(root, name), folder) for root, _, names in os.walk(folder) for name in names
    )


def _measured(path: Path) -> FileInfo:
    return FileInfo(path.stat().st_size, gcs.md5_of(path))
