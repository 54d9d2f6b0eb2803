"""What weights mean beside their shapes: the input, the vocabulary, the attention heads and the geometry they were trained with.

A file of weights fits a network by its shapes. These settings change what the network computes with them, and no shape.
"""

import fnmatch
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from glip_jax.config import Config, ModelConfig, TextConfig
from glip_jax.io.assets import AssetError, resolve
from glip_jax.io.checkpoint_steps import is_workdir
from glip_jax.weights.delta import is_delta
from glip_jax.weights.names import WeightError
from glip_jax.weights.readers import folder_config, open_checkpoint_or_export, open_export
from glip_jax.weights.sizes import variant

__all__ = ["check_meaning", "input_note", "trained_in", "vocabulary_of_folder"]

_PARTS = {
    "input.order": ("backbone/*",),
    "input.mean": ("backbone/*",),
    "input.std": ("backbone/*",),
    "text.vocabulary": ("text/*",),
    "text.mask": ("text/*", "head/tower/text/*"),
    "text.heads": ("text/*", "head/tower/text/*"),
    "fusion.heads": ("head/tower/fusion/*",),
    "head.groups": ("head/tower/convolution/*",),
    "head.coarse_offsets": ("head/tower/convolution/*",),
    "head.offset_bound": ("head/tower/convolution/*",),
    "anchors.sizes": ("head/box/*",),
}
"""Setting below `model`: patterns of the parameters whose meaning depends on it."""
_GUESSED = ("text.heads", "fusion.heads", "head.groups", "anchors.sizes")
"""Settings that a `.pth` of other sizes than the released ones may have at other values than GLIP's code has by default."""
_BERT_BASE_UNCASED = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
"""SHA-256 of the vocabulary (30522 lines) of bert-base-uncased, with which released weights were trained."""
_IMAGENET = {
    "swin": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "efficientnet_lite0": ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
}
"""Mean and deviation of RGB images with which backbones were trained on ImageNet."""


def trained_in(name: str) -> ModelConfig | None:
    """The network that a working folder, a delta or a folder of `export` says it was trained in; None for other files."""
    if is_workdir(name) or is_delta(name):
        return open_checkpoint_or_export(name, verify=()).config.model
    path = resolve(name)
    return open_export(name).config.model if path.is_dir() and "glip_jax" in folder_config(path) else None


def check_meaning(
    theirs: ModelConfig,
    config: Config,
    paths: Iterable[str],
    where: str,
    vocabulary: epath.Path | None = None,
    *,
    inferred: bool = False,
) -> list[str]:
    """Compares the network `theirs`, of which weights are read, with that of `config`; returns notes for the log.

    Args:
        paths: the parameters that are read; settings of other parts may differ.
        where: names the setting and the file in messages.
        vocabulary: the vocabulary beside the weights, where there is one.
        inferred: `theirs` follows from the tensors of a file.

    Raises:
        WeightError: listing the settings that differ and are not among `init_from.accept`.
    """
    paths, wrong, notes = list(paths), [], []
    for name, patterns in _PARTS.items():
        used = any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in patterns)
        line = _difference(name, theirs, config.model, vocabulary) if used else ""
        if line and any(fnmatch.fnmatchcase(f"model.{name}", pattern) for pattern in config.init_from.accept):
            notes.append(f"{where}: accepted: {line}")
        elif line and inferred and name in _GUESSED and not variant(theirs).startswith("GLIP-"):
            notes.append(
                f"{where}: the file does not say its model.{name}; GLIP's default would be {line.partition(': ')[2]} (given)"
            )
        elif line and name == "head.offset_bound":
            notes.append(f"{where}: {line}: offsets beyond the bound are clamped and counted (offsets_clamped)")
        elif line:
            wrong.append((name, line))
    if wrong:
        listed = ",".join(f"model.{name}" for name, _ in wrong)
        raise WeightError(
            f"{where}: the shapes fit, but the weights were trained in another network ({'; '.join(line for _, line in wrong)}): "
            f"set these as they were, or --config.init_from.accept={listed} if the difference is meant"
        )
    return notes


def input_note(config: Config) -> str:
    """A line where the input of a run is not what backbones of ImageNet were trained with; empty if it is."""
    pixels, init = config.model.input, config.init_from
    mean, std = _IMAGENET[config.model.backbone.kind]
    flip = -1 if pixels.order == "bgr" else 1
    parts = []
    if (pixels.order == "bgr") != (init.backbone_channels == "reversed"):
        parts.append(f"its first filters, of RGB in such files, are applied to {pixels.order.upper()}, as in the original"
                     if pixels.order == "bgr" else "its first filters are reversed, and model.input.order is rgb")  # fmt: skip
    if any(abs(a - b) > 1 for a, b in zip((*pixels.mean, *pixels.std), (*mean[::flip], *std[::flip]))):
        parts.append(f"model.input.mean {pixels.mean} and std {pixels.std} are not ImageNet's of such files")
    return f"init_from.backbone={init.backbone}: {'; '.join(parts)}" if parts else ""


def vocabulary_of_folder(name: str) -> epath.Path | None:
    """vocab.txt of a Hugging Face folder, if it has one."""
    path = resolve(name)
    return path / "vocab.txt" if path.is_dir() and (path / "vocab.txt").exists() else None


def _difference(name: str, theirs: ModelConfig, ours: ModelConfig, vocabulary: epath.Path | None) -> str:
    part, _, field = name.partition(".")
    if name == "text.vocabulary":
        return _other_vocabulary(theirs, ours, vocabulary)
    if not ours.fusion.enabled and part == "fusion":
        return ""
    old, new = _plain(getattr(getattr(theirs, part), field)), _plain(getattr(getattr(ours, part), field))
    return "" if old == new else f"model.{name}: {old} -> {new}"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _other_vocabulary(theirs: ModelConfig, ours: ModelConfig, vocabulary: epath.Path | None) -> str:
    """A line where the tokens of both vocabularies differ; empty also where one of them is not there to be compared."""
    new = _tokens(ours.text.vocabulary)
    old = _tokens(str(vocabulary or theirs.text.vocabulary))
    released = theirs.text.vocabulary == TextConfig().vocabulary and theirs.text.vocabulary_size == 30522
    if old is None and new is not None and released and _hash(new) != _BERT_BASE_UNCASED:
        return f"model.text.vocabulary: that of bert-base-uncased -> {ours.text.vocabulary} ({len(new)} tokens)"
    if new is None or old is None or old == new:
        return ""
    first = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
    return (
        f"model.text.vocabulary: {vocabulary or theirs.text.vocabulary} ({len(old)} tokens) -> {ours.text.vocabulary} "
        f"({len(new)} tokens, from number {first} on others)"
    )


def _hash(tokens: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{token}\n" for token in tokens).encode()).hexdigest()


def _tokens(path: str) -> list[str] | None:
    try:
        return resolve(path).read_text().splitlines()
    except (AssetError, OSError, UnicodeDecodeError):
        return None
