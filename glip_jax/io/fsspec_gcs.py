"""gs:// for everything that goes through `etils.epath` (checkpoints, reports, assets), with the retries of `glip_jax.io.gcs`.

epath opens gs:// through fsspec, whose default is gcsfs: it gives up after six attempts in half a minute, waits five minutes
for a dead connection, reports a write whose response was lost as failed, and caches listings that other processes have
changed since. `install` replaces it. Arrays of checkpoints go through TensorStore's own driver, which retries by itself;
`install` sets its timeout.
"""

import io
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.spec import AbstractFileSystem

from glip_jax.io import gcs, retry

__all__ = ["BucketFiles", "do_without", "install"]

logger = logging.getLogger(__name__)

_AT_A_TIME = 16
"""Files that are removed or copied at the same time."""


def install() -> None:
    """Registers `BucketFiles` for gs:// with fsspec in this process. Call it before the first use of a gs:// path."""
    for name in ("gs", "gcs"):
        fsspec.register_implementation(name, BucketFiles, clobber=True)
    # libcurl's threads read them when TensorStore opens its first file in a bucket: a connection with fewer bytes a second
    # for this long counts as dead.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", str(max(1, round(retry.timeout()))))
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


_spare: dict[str, bool] = {}
"""Folders that a run can do without, and whether it does."""


def do_without(folder: str) -> str:
    """Marks a folder, and returns it: after a request in it has failed in spite of retries, one warning says so, and from then on it counts as empty,
    and what is written there is dropped. For the compilation cache: each program would wait for as long again.
    """
    if gcs.is_remote(folder):
        _spare[gcs.address(folder)] = False
    return folder


def _is_given_up(place: str, fault: gcs.StorageError | None = None) -> bool:
    """Whether the run does without the folder of `place`, or from this fault on."""
    folder = place.rpartition("/")[0]
    if folder not in _spare:
        return False
    if fault is not None and not _spare[folder]:
        _spare[folder] = True
        logger.warning(f"{folder} is not used any more: {gcs.describe(fault)}")
    return _spare[folder]


class BucketFiles(AbstractFileSystem):
    """Buckets as a file system of fsspec. A folder exists if a file is below it; creating one does nothing.

    A file that is written is a local temporary file until it is closed, and is uploaded then. Raises as `glip_jax.io.gcs`.
    """

    protocol = ("gs", "gcs")

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """The entries of a folder, or the file itself."""
        place = _place(path)
        files, folders = gcs.list_folder(place)
        bare = place.removeprefix("gs://")
        found = [{"name": f"{bare}/{name}", "size": each.bytes, "type": "file"} for name, each in files.items()]
        found += [{"name": f"{bare}/{name}", "size": 0, "type": "directory"} for name in folders]
        if not found:
            found = [self.info(path)]
            if found[0]["type"] == "directory":  # a bucket without files
                found = []
        return found if detail else [entry["name"] for entry in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size, kind and, of a file, time; FileNotFoundError if the path does not exist."""
        place = _place(path)
        bare = place.removeprefix("gs://")
        if "/" in bare:
            try:
                stamp = gcs.stat(place)
                return {"name": bare, "size": stamp.bytes, "type": "file", "mtime": stamp.updated}
            except FileNotFoundError:
                if gcs.kind(place) != "folder":
                    raise
        return {"name": bare, "size": 0, "type": "directory"}

    def exists(self, path: str, **_: Any) -> bool:
        """Whether a file or a folder exists; a storage that does not answer is an error, not an absence."""
        place = _place(path)
        try:
            return not _is_given_up(place) and bool(gcs.kind(place))
        except gcs.StorageError as fault:
            if _is_given_up(place, fault):
                return False
            raise

    def isdir(self, path: str) -> bool:
        """Whether the path is a folder."""
        return gcs.kind(_place(path)) == "folder"

    def isfile(self, path: str) -> bool:
        """Whether the path is a file."""
        return gcs.kind(_place(path)) == "file"

    def find(
        self, path: str, maxdepth: int | None = None, withdirs: bool = False, detail: bool = False, **_: Any
    ) -> Any:
        """All files below a folder, from one listing."""
        if maxdepth is not None or withdirs:
            return super().find(path, maxdepth=maxdepth, withdirs=withdirs, detail=detail)
        bare = _place(path).removeprefix("gs://")
        below = gcs.list_recursive(_place(path))
        found = {
            f"{bare}/{name}": {"name": f"{bare}/{name}", "size": each.bytes, "type": "file"}
            for name, each in below.items()
        }
        if not found and self.isfile(path):
            found = {bare: self.info(path)}
        return found if detail else sorted(found)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """Does nothing: folders are prefixes of names."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Does nothing, as `mkdir`."""

    def rmdir(self, path: str) -> None:
        """Does nothing: a folder ends with its last file."""

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Removes a file, or with `recursive` all files below a folder; FileNotFoundError if the path does not exist."""
        del maxdepth
        for each in [path] if isinstance(path, str) else list(path):
            place = _place(each)
            kind = gcs.kind(place)
            if not kind:
                raise FileNotFoundError(place)
            if kind == "folder" and not recursive:
                raise IsADirectoryError(place)
            names = [place] if kind == "file" else [f"{place}/{name}" for name in gcs.list_recursive(place)]
            _each(gcs.remove, [(name,) for name in names])

    def cp_file(self, path1: str, path2: str, **_: Any) -> None:
        """Copies a file inside the storage."""
        gcs.copy(_place(path1), _place(path2))

    def mv(self, path1: str, path2: str, recursive: bool = False, maxdepth: int | None = None, **_: Any) -> None:
        """Copies a file or a folder inside the storage, then removes it: a bucket has no atomic rename."""
        del recursive, maxdepth
        old, new = _place(path1), _place(path2)
        if gcs.kind(old) == "file":
            gcs.copy(old, new)
            gcs.remove(old)
            return
        names = list(gcs.list_recursive(old))
        _each(gcs.copy, [(f"{old}/{name}", f"{new}/{name}") for name in names])
        _each(gcs.remove, [(f"{old}/{name}",) for name in names])

    def created(self, path: str) -> Any:
        """Time of writing in seconds."""
        return self.info(path)["mtime"]

    modified = created

    def _open(self, path: str, mode: str = "rb", **_: Any) -> IO[bytes]:
        if mode == "rb":
            return gcs.open_file(_place(path))
        if mode in ("wb", "xb"):
            return _UploadOnClose(_place(path))
        raise ValueError(f"{path}: mode {mode!r} is not supported in a bucket: expected rb or wb")


class _UploadOnClose(io.FileIO):
    """A temporary file that is uploaded when it is closed, unless its `with` block ends in an exception."""

    def __init__(self, place: str) -> None:
        handle, self._local = tempfile.mkstemp()
        self._place = place
        super().__init__(handle, "wb")

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            self._place = ""
        super().__exit__(kind, *rest)

    def close(self) -> None:
        """Uploads the file, the first time."""
        if self.closed:
            return
        super().close()
        try:
            if self._place and not _is_given_up(self._place):
                gcs.upload_file(Path(self._local), self._place)
        except gcs.StorageError as fault:
            if not _is_given_up(self._place, fault):
                raise
        finally:
            os.unlink(self._local)


def _place(path: str) -> str:
    return gcs.address("gs://" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/"))


def _each(act: Any, arguments: list[tuple[str, ...]]) -> None:
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in pool.map(lambda each: act(*each), arguments):
            pass
