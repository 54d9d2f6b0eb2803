"""What a result depends on: the settings that affect scores, and hashes of parameters, settings, data and code."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from glip_jax.config import Config, first_names, flatten
from glip_jax.io import gcs

__all__ = ["code", "config_hash", "file_hash", "score_settings", "source_hash", "versions"]

_PACKAGE = Path(__file__).resolve().parents[1]
_LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "pillow", "tokenizers", "pycocotools", "orbax-checkpoint", "etils")
_SCORE = ("model.", "detection.", "data.captions.separator", "data.captions.descriptions.", "evaluation.parameters", "evaluation.short_side",
          "evaluation.long_side", "evaluation.max_images", "evaluation.chunk", "evaluation.batch_size")  # fmt: skip
_TRAINING_ONLY = ("model.remat", "model.text.frozen", "model.backbone.frozen_stages", "model.pyramid.drop_block",
                  "model.backbone.drop_path", "model.head.offset_scale", "model.head.log_scale", "model.head.box_scale",
                  "model.fusion.gamma", "model.fusion.drop_path", "model.head.unroll", "model.trainable",
                  "data.captions.descriptions.probability")  # fmt: skip


def score_settings(config: Config) -> dict[str, Any]:
    """The settings that an evaluation depends on, flat: the network's, thresholds and suppression, sizes, chunks.

    The batch size is among them because an `extent` of `batch` makes scores depend on it.
    """
    return {
        name: value
        for name, value in flatten(config)
        if name.startswith(_SCORE) and not name.startswith(_TRAINING_ONLY) and not name.endswith("dropout")
    }


def config_hash(settings: Config | dict[str, Any]) -> str:
    """SHA-256 of all settings, flat, as JSON with sorted keys. Equal for a Config, for the flat settings that a checkpoint
    saved of it, and for the same settings under the names of an earlier version.
    """
    flat = first_names(dict(flatten(settings)) if isinstance(settings, Config) else settings)
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()


def file_hash(path: str) -> str:
    """SHA-256 of a file, local or gs://."""
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()


def source_hash(folder: str) -> str:
    """SHA-256 of what the records of a finished folder of shards hold: of the hashes of its shards, and of its names.

    "" if its manifest cannot be read.
    """
    try:
        place = gcs.address(folder)
        fields = json.loads(
            gcs.read(f"{place}/manifest.json") if gcs.is_remote(place) else Path(place, "manifest.json").read_bytes()
        )
        parts = [*(shard["sha256"] for shard in fields["shards"]), *fields["names"]]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def code() -> dict[str, Any]:
    """Hash of the files of the package, and of a git checkout its commit and whether files differ from it.

    `files` is the SHA-256 over relative path and content of every Python file of the package, sorted; the configs that an
    installed package carries in `bundled` are not among them, so that it is equal in a checkout and installed from it.
    """
    digest = hashlib.sha256()
    files = (path for path in _PACKAGE.rglob("*.py") if path.relative_to(_PACKAGE).parts[0] != "bundled")
    for path in sorted(files):
        digest.update(
            f"{path.relative_to(_PACKAGE).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode()
        )
    found: dict[str, Any] = {"files": digest.hexdigest()}
    top = _git("rev-parse", "--show-toplevel")
    # The repository that a package is installed below is not its own.
    if top and Path(top.strip()).resolve() == _PACKAGE.parent and (commit := _git("rev-parse", "HEAD")):
        changed = _git("status", "--porcelain", "--", _PACKAGE.name)
        found |= {"commit": commit.strip(), "changed_since_commit": bool(changed is None or changed.strip())}
    return found


def _git(*arguments: Sequence[str] | str) -> str | None:
    """Output of git in the parent folder of the package; None without git or repository."""
    command = ["git", "-C", str(_PACKAGE.parent), *map(str, arguments)]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect a score, and the devices that it is computed on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    import jax  # only now: hashes do not need it

    device = jax.devices()[0]
    return found | {"device": f"{jax.device_count()} x {device.device_kind} ({device.platform})"}
