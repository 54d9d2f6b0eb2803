"""The manifest of a folder of shards: what marks it as finished, and what its files are checked against."""

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

__all__ = ["Manifest", "ShardError", "finished", "names_in", "nothing", "opened", "read_file"]


class ShardError(UserError, ValueError):
    """A folder of shards that is missing, unfinished or damaged, or cannot be written."""


@dataclass(frozen=True)
class Manifest:
    """What is in a folder of shards and where it came from."""

    name: str
    licence: str
    source: str
    """The annotation file (or whatever the records were made of)."""
    command: str
    """The command that made the folder."""
    names: tuple[str, ...]
    """Category names; `Record.categories` are indices into them."""
    records: int
    boxes: int
    kinds: dict[str, int]
    drops: dict[str, int]
    """What was left out, by reason."""
    shards: tuple[dict[str, Any], ...]
    """Per shard: file, records, bytes, sha256."""
    columns: dict[str, Any]
    """The side file: file, sha256."""
    format: int = FORMAT


def finished(directory: epath.PathLike) -> Manifest | None:
    """The manifest of a finished folder, None where there is none yet; ShardError for one that cannot be read."""
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
        raise ShardError(f"{path} is no manifest of shards ({error}): remove the folder and import again") from None
    if manifest.format != FORMAT:
        raise ShardError(f"{path} has format {manifest.format}, this version reads {FORMAT}: import again")
    return manifest


def opened(place: str) -> Manifest:
    """The manifest of a finished folder whose files are there in their sizes, local ones with their number of records.

    Raises ShardError for any other folder, OSError (`gcs.StorageError`) if its bucket does not answer.
    """
    manifest = finished(place)
    if manifest is None:
        raise ShardError(f"{place} {nothing(place)}")
    _check_counts(epath.Path(place), manifest)
    faults = _remote_faults if gcs.is_remote(place) else _local_faults
    for fault in faults(epath.Path(place), manifest.shards):
        if fault:
            raise ShardError(f"{fault}: import again, or copy the folder again")
    return manifest


def nothing(place: str) -> str:
    """Why there is no manifest."""
    names, what = names_in(place), gcs.kind(place)
    found = {"folder": "is empty", "file": "is a file", "": "does not exist"}[what]
    found = "has no manifest.json" if names else found
    return f"{found}: expected a folder of shards, there are no finished shards here"


def names_in(place: str) -> list[str]:
    """Names of what is in a folder; none if there is no such folder."""
    if gcs.is_remote(place):
        return list(gcs.list_files(place))
    return os.listdir(place) if os.path.isdir(place) else []


def read_file(place: str) -> bytes:
    """A whole file; FileNotFoundError if it is not there, OSError as `gcs.read`."""
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
    """What of the files is not as the manifest says, "" for each that is."""

    def of(shard: dict[str, Any]) -> str:
        file = path / shard["file"]
        try:
            size = file.stat().length
        except OSError:
            size = None
        fault = _size_fault(file, shard, size)
        if fault:
            return fault
        reader = ArrayRecordReader(str(file))
        found = reader.num_records() if reader.ok() else None
        with contextlib.suppress(RuntimeError):  # what made it not ok, once more
            reader.close()
        if found != shard["records"]:
            found = "no readable end" if found is None else f"{found} records"
            return f"{file}: the manifest says {shard['records']} records, found {found}"
        return ""

    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(of, shards)


def _remote_faults(path: epath.Path, shards: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The same by one listing; the end of a file is looked at when its first record is read."""
    there = gcs.list_files(path)
    for shard in shards:
        found = there.get(shard["file"])
        yield _size_fault(path / shard["file"], shard, found and found.bytes)


def _size_fault(file: epath.Path, shard: dict[str, Any], size: int | None) -> str:
    """What is wrong with a file's size; None: there is no such file."""
    if size is None:
        return f"{file}: the manifest says {shard['bytes']} bytes, found nothing (no such file)"
    if size != shard["bytes"]:
        short = "it is truncated" if size < shard["bytes"] else "it is another file"
        return f"{file}: the manifest says {shard['bytes']} bytes, found {size} ({short})"
    return ""
