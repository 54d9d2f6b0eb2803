"""Compares what an import is asked for with what a finished folder was made of: options, names, and hashes of the inputs."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from glip_jax.data.importers.build import excluded_hashes, file_digest
from glip_jax.data.importers.options import BuildOptions
from glip_jax.data.manifest import Manifest, read_file
from glip_jax.io import gcs

__all__ = ["differences", "input_differences", "options_of", "read_report"]

logger = logging.getLogger(__name__)

_ELSEWHERE = (
    "out", "name", "processes", "strict", "shards", "exclude", "part", "ray", "ray_workers", "ray_resources",
)  # fmt: skip
"""Options that do not decide the result, or are compared in a way of their own."""


def options_of(job: BuildOptions) -> dict[str, Any]:
    """The options that decide the records, as JSON: folders as absolute paths, files as their SHA-256.

    The annotation files (`job.inputs`) are not among them: the report has their hashes.
    """
    inputs = {str(path) for path in job.inputs}
    found: dict[str, Any] = {"format": type(job).__name__}
    for item in dataclasses.fields(job):
        value = getattr(job, item.name)
        if item.name in _ELSEWHERE or str(value) in inputs:
            continue
        found[item.name] = _content(value) if isinstance(value, epath.Path) else value
    return found


def _content(path: epath.Path) -> str:
    if gcs.kind(path) == "file":
        return f"sha256 {file_digest(path)['sha256']}"
    return gcs.address(path) if gcs.is_remote(path) else os.path.realpath(path)


def read_report(out: epath.PathLike) -> dict[str, Any]:
    """report.json of a finished folder; {} where it has none, as folders of `shards.write`."""
    try:
        found = json.loads(read_file(f"{gcs.address(out)}/report.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def differences(
    job: BuildOptions, manifest: Manifest, report: Mapping[str, Any], earlier: BuildOptions | None
) -> list[str]:
    """How the finished folder `job.out` differs from what `job` would make, `existing -> given` each; empty if it does not.

    `report`: its report.json, {} without one. `earlier`: the options of its command, for folders whose report has none.
    An input that does not exist any more is not compared, and a line of the log says so. Raises SourceError for a new
    input that does not exist.
    """
    lines = []
    if given := job.strict and sum(manifest.drops.values()):
        lines.append(f"{given} items were dropped -> --strict")
    name = job.name or gcs.address(job.out).rstrip("/").rpartition("/")[2]
    if name != manifest.name:
        lines.append(f"name: {manifest.name} -> {name}")
    asked, made = options_of(job), report.get("settings") or (options_of(earlier) if earlier else {})
    if made:
        # A folder of an earlier version lacks options that were added since: it was made with their defaults.
        defaults = {item.name: item.default for item in dataclasses.fields(job)}
        lines += [
            f"{key.replace('_', '-')}: {_short(made.get(key, defaults.get(key)))} -> {_short(asked.get(key))}"
            for key in dict.fromkeys((*made, *asked))
            if made.get(key, defaults.get(key)) != asked.get(key)
        ]
    if job.shards != len(manifest.shards) and earlier is not None and earlier.shards != job.shards:
        lines.append(f"shards: {_short(earlier.shards)} -> {_short(job.shards)}")
    lines += _exclude_differences(job, report)
    # Of another format, other files were read: they are no news.
    if made.get("format") in (None, asked["format"]):
        lines += input_differences(job.inputs, report)
    return lines


def input_differences(inputs: tuple[epath.Path, ...], report: Mapping[str, Any]) -> list[str]:
    """How the annotation files differ from those that the report of a finished folder names, by size and SHA-256."""
    known = report.get("inputs")
    if not isinstance(known, list):
        return []
    if len(known) != len(inputs):
        return [f"annotation files: {len(known)} -> {len(inputs)}"]
    recorded = [item["file"] for item in known]
    for path in inputs:
        if not gcs.kind(path) and str(path) in recorded:
            logger.info(f"{path} does not exist any more: not compared with what was imported")
    with ThreadPoolExecutor(4) as pool:
        lines = pool.map(_input_difference, inputs, known)
    return [line for line in lines if line]


def _input_difference(path: epath.Path, known: Mapping[str, Any]) -> str:
    if not gcs.kind(path):
        return "" if str(path) == known["file"] else f"annotations: {known['file']} -> {path}, which does not exist"
    found = file_digest(path)
    if found["sha256"] == known["sha256"]:
        return ""
    hashes = f"sha256 {known['sha256'][:12]} -> {found['sha256'][:12]}"
    if str(path) == known["file"]:
        return f"annotations: {path} has changed since ({hashes})"
    return f"annotations: {known['file']} -> {path} ({hashes})"


def _exclude_differences(job: BuildOptions, report: Mapping[str, Any]) -> list[str]:
    known = sorted(item["sha256"] for item in report.get("exclude") or ())
    given = sorted(item["sha256"] for item in excluded_hashes(job.exclude)[1])
    return [] if known == given else [f"exclude: {len(known)} lists of images -> {len(given)}, not the same"]


def _short(value: Any) -> str:
    if value is None or value == "":
        return "default"
    return str(value) if len(str(value)) <= 80 else f"{str(value)[:77]}..."
