"""The manifest of a folder of shards. It marks the folder as finished, and its files are checked against it."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from glip_jax import UserError
from glip_jax.data.records import FORMAT
from glip_jax.io import gcs
from glip_jax.io.formats import explain

__all__ = ["Manifest", "ShardError", "finished", "names_in", "opened", "read_file", "why_unfinished"]


class ShardError(UserError, ValueError):
    """A folder of shards that is missing, unfinished or damaged, or cannot be written."""


@dataclass(frozen=True)
class Manifest:
    """Content and origin of a folder of shards."""

    name: str
    licence: str
    source: str
    """The annotation file, or what else the records were made from."""
    command: str
    """The command that made the folder."""
    names: tuple[str, ...]
    """Category names; `Record.categories` are indices into them."""
    records: int
    boxes: int
    kinds: dict[str, int]
    drops: dict[str, int]
    """Number of dropped items by reason."""
    shards: tuple[dict[str, Any], ...]
    """Per shard: file, records, bytes, sha256."""
    columns: dict[str, Any]
    """The file with one row of columns per record: file, sha256."""
    format: int = FORMAT


def finished(directory: epath.PathLike) -> Manifest | None:
    """The manifest of a folder, or None if it has none. Raises ShardError for an invalid one."""
    path = f"{gcs.address(directory)}/manifest.json"
    try:
        fields = json.loads(read_file(path))
        fields.update(names=tuple(fields["names"]), shards=tuple(fields["shards"]))
        manifest = Manifest(**fields)
        for shard in manifest.shards:
            _ = shard["file"], shard["records"] + shard["bytes"], shard["sha256"]
        _ = manifest.columns["file"], manifest.columns["sha256"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except gcs.StorageError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ShardError(f"{path} is not a manifest of shards ({error}): remove the folder and import again") from None
    if manifest.format != FORMAT:
        raise ShardError(f"{path} has format {manifest.format}, this version reads {FORMAT}: import again")
    return manifest


def opened(place: str) -> Manifest:
    """The manifest of a finished folder, after checking that its files exist with the stated size and, if local, number of
    records.

    Raises ShardError if they do not, OSError (`gcs.StorageError`) if the bucket does not answer.
    """
    manifest = finished(place)
    if manifest is None:
        raise ShardError(f"{place} {why_unfinished(place)}")
    _check_counts(epath.Path(place), manifest)
    faults = _remote_faults if gcs.is_remote(place) else _local_faults
    for fault in faults(epath.Path(place), manifest.shards):
        if fault:
            raise ShardError(f"{fault}: import again, or copy the folder again")
    return manifest


def why_unfinished(place: str) -> str:
    """Error message: why a folder has no manifest."""
    names, kind = names_in(place), gcs.kind(place)
    state = "has no manifest.json" if names else {"folder": "is empty", "file": "is a file"}.get(kind, "does not exist")
    found = explain(place) if kind == "file" or names else ""
    return f"{state}: expected a folder of shards with a manifest.json{f'; it {found}' if found else ''}"


def names_in(place: str) -> list[str]:
    """Names of the files in a folder; empty if it does not exist."""
    if gcs.is_remote(place):
        return list(gcs.list_files(place))
    return os.listdir(place) if os.path.isdir(place) else []


def read_file(place: str) -> bytes:
    """Content of a file. Raises FileNotFoundError, and OSError as `gcs.read`."""
    return gcs.read(place) if gcs.is_remote(place) else Path(place).read_bytes()


def _check_counts(path: epath.Path, manifest: Manifest) -> None:
    """Raises ShardError if the manifest contradicts itself."""
    parts = {"shards": sum(shard["records"] for shard in manifest.shards), "kinds": sum(manifest.kinds.values())}
    for name, count in parts.items():
        if count != manifest.records:
            raise ShardError(
                f"{path / 'manifest.json'} says {manifest.records} records, but its {name} add up to {count}: "
                "import again, or copy the folder again"
            )


def _local_faults(path: epath.Path, shards: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Per file how it differs from the manifest, "" if it does not."""

    def fault(shard: dict[str, Any]) -> str:
        file = path / shard["file"]
        try:
            size = file.stat().length
        except OSError:
            size = None
        if wrong_size := _size_fault(file, shard, size):
            return wrong_size
        reader = ArrayRecordReader(str(file))
        records = reader.num_records() if reader.ok() else None
        with contextlib.suppress(RuntimeError):  # closing repeats the error of opening
            reader.close()
        if records != shard["records"]:
            found = "no readable end" if records is None else f"{records} records"
            return f"{file}: the manifest says {shard['records']} records, found {found}"
        return ""

    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(fault, shards)


def _remote_faults(path: epath.Path, shards: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Same, from one listing of the bucket. The end of a file is read together with its first record."""
    remote = gcs.list_files(path)
    for shard in shards:
        entry = remote.get(shard["file"])
        yield _size_fault(path / shard["file"], shard, entry and entry.bytes)


def _size_fault(file: epath.Path, shard: dict[str, Any], size: int | None) -> str:
    """How the size of a file differs from the manifest, "" if it does not; `size` None: no such file."""
    if size is None:
        return f"{file}: the manifest says {shard['bytes']} bytes, found nothing (no such file)"
    if size != shard["bytes"]:
        short = "it is truncated" if size < shard["bytes"] else "it is another file"
        return f"{file}: the manifest says {shard['bytes']} bytes, found {size} ({short})"
    return ""
