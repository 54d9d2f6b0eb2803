"""Size and MD5 of every file of a folder, in a file of the folder itself: what was damaged since is found and named.

Arrays of a checkpoint have no checksums of their own all the way down: a flipped bit would be read as another number. MD5,
since a bucket knows that of its files, so a folder there is compared by one listing and nothing of it is read.
"""

import errno
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from etils import epath

from glip_jax.io import gcs
from glip_jax.io.gcs import Listed

__all__ = ["NAME", "fault", "seal"]

NAME = "checksums.json"
_AT_A_TIME = 8


def seal(folder: epath.PathLike, without: str = "", wanted: Iterable[str] = ()) -> None:
    """Writes the checksums of all files below `folder`, local or gs://, but `without`.

    OSError if that cannot be, or if one of the `wanted` files is not there.
    """
    place = gcs.address(folder)
    if gcs.is_remote(place):
        files = gcs.everything(place)
    else:
        names = _below(Path(place))
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
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


def fault(folder: epath.PathLike, within: Sequence[str] = ()) -> str | None:
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
        wanted = {name: Listed(*values) for name, values in json.loads(text)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} is no list of files and checksums"
    if within:
        wanted = {name: values for name, values in wanted.items() if name.partition("/")[0] in within}
    if gcs.is_remote(place):
        there = gcs.everything(place)
        found = {name: there[name] for name in wanted if name in there}
    else:
        found = _local(Path(place), wanted)
    faults = [text for name in sorted(wanted) if (text := _difference(name, wanted[name], found.get(name)))]
    more = f", and {len(faults) - 1} more files" if len(faults) > 1 else ""
    return f"{faults[0]}{more}" if faults else ""


def _local(folder: Path, wanted: dict[str, Listed]) -> dict[str, Listed]:
    """The files that are there; read only where the size is right and they changed since they were read last."""

    def of(name: str) -> Listed | None:
        path = folder / name
        try:
            seen = path.stat()
        except OSError:
            return None
        if seen.st_size != wanted[name].bytes:
            return Listed(seen.st_size, "")
        key = (str(path), seen.st_size, seen.st_mtime_ns, seen.st_ino)
        if key not in _READ:
            _READ[key] = _measured(path)
        return _READ[key]

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        found = dict(zip(wanted, pool.map(of, wanted)))
    return {name: each for name, each in found.items() if each is not None}


_READ: dict[tuple[str, int, int, int], Listed] = {}
"""What this process read before: a job asks several times for the same checkpoint."""


def _difference(name: str, wanted: Listed, found: Listed | None) -> str:
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


def _measured(path: Path) -> Listed:
    return Listed(path.stat().st_size, gcs.md5_of(path))
