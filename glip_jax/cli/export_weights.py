"""The job `export`: a checkpoint as a file or folder for other programs, compared with the checkpoint before it is kept.

--format=glip-pth      OUT is a `.pth` with the tensors of microsoft/GLIP's files
--format=huggingface   OUT is a folder for transformers' Auto classes, PyTorch network included; --space: and a page to try it
--format=onnx          OUT is a folder with model.onnx, its vocabulary and settings, and run_onnx.py, which runs it with NumPy
"""

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from etils import epath
from jaxtyping import UInt8
from tqdm import tqdm

from glip_jax.cli import checkpoint_argument
from glip_jax.cli.command_line import CommandLineError, flags, split_settings
from glip_jax.cli.score_thresholds import carried_report
from glip_jax.config import Config, PathStr
from glip_jax.config.ranges import Limit
from glip_jax.distributed import exit_codes
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.io.errors import full_disk
from glip_jax.io.image_files import listed, read_upright
from glip_jax.weights.torch_files import sha256

if TYPE_CHECKING:
    from glip_jax.weights.verification import Difference

__all__ = ["Export", "export", "main"]

logger = logging.getLogger(__name__)

_EXAMPLE = "--checkpoint=runs/demo --format=huggingface --out=exported/demo"
_UNFINISHED = ".unfinished"
_PHOTOGRAPHS = 4
"""Images of --images that are compared."""


@dataclass(frozen=True)
class Export:
    """Write a checkpoint for PyTorch, Hugging Face or ONNX.

    The export is read back as its users read it and run beside the checkpoint on sample images; if logits differ by more
    than 1e-4 or boxes by more than 0.05 pixels it is thrown away. Needs: pip install -r requirements-export.txt
    """

    checkpoint: PathStr = ""
    """The checkpoint to export: WORKDIR of a run (its newest complete checkpoint), WORKDIR/checkpoints/STEP, a folder that `export` wrote, or a delta;
    local or gs://."""
    workdir: PathStr = ""
    """The same as --checkpoint=WORKDIR."""
    out: PathStr = ""
    """File (glip-pth) or folder (huggingface, onnx) to make, local or gs://; it may not exist yet."""
    format: Literal["glip-pth", "huggingface", "onnx"] = "huggingface"
    """glip-pth: microsoft/GLIP's format; huggingface: transformers' Auto classes; onnx: a graph for onnxruntime."""
    images: PathStr = ""
    """Folder of photographs, or one photograph, to compare on (the first four); default: synthetic images."""
    step: Limit | None = None
    """Step of the checkpoint of a WORKDIR; default: the newest complete one."""
    space: bool = False
    """huggingface: also write app.py, requirements.txt and the head of README.md that make the folder a Space: a page to try it."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; raises what `export` raises."""
    settings, own = split_settings(argv)
    export(flags(own, Export, "export", _EXAMPLE), settings)
    return exit_codes.DONE


def export(job: Export, settings: Sequence[str] = ()) -> "Difference":
    """Writes, reads back, compares and keeps; returns the largest differences.

    `settings`: --config arguments, such as --config.evaluation.parameters=raw for the parameters that were trained
    instead of their averages. Raises CommandLineError, ConfigError, CheckpointError, AssetError,
    ImageFileError, PromptError, WeightError or ExportError; nothing is left then.
    """
    from glip_jax.weights.export import needed, write, write_space
    from glip_jax.weights.tuned_parameters import merged
    from glip_jax.weights.verification import sample_images

    if not job.out:
        raise CommandLineError("nowhere to write to: expected --out=FILE.pth or --out=FOLDER")
    out = epath.Path(job.out)
    if out.exists():
        raise CommandLineError(f"--out={job.out} is there already: give another name, or remove it first")
    if job.format == "glip-pth" and out.suffix != ".pth":
        raise CommandLineError(f"--out={job.out}: --format=glip-pth writes one file, expected a name that ends in .pth")
    if job.space and job.format != "huggingface":
        raise CommandLineError(
            f"--space makes a page for --format=huggingface, found --format={job.format}: leave one out"
        )
    needed(job.format)
    checkpoint = checkpoint_argument.open_named(job.checkpoint, job.workdir, job.step)
    config = checkpoint_argument.settings_of(checkpoint, settings, "export")
    images = _images(job.images) if job.images else sample_images()
    enable_compilation_cache()
    which = config.evaluation.parameters
    params = checkpoint.parameters(which)
    logger.info(f"{checkpoint_argument.describe(checkpoint)}, parameters: {which}, {_size(params):,} values")
    with _staged(out) as local:
        write(job.format, local, *merged(params, config))
        if job.space:
            write_space(local, config)
        found = _compared(job.format, local, params, config, images)
        logger.info(
            f"largest difference over {len(images)} images: logits {found.logits:.1e}, boxes {found.boxes:.4f} pixels"
        )
        found.check(f"{job.out} ({job.format})")
        if local.is_dir() and (report := carried_report(checkpoint, config)):
            (local / "evaluation.json").write_text(report)
        names = {file: sha256(epath.Path(file)) for file in _heavy_files(local)}
    for file, digest in names.items():
        where = job.out if file == local else f"{job.out}/{file.name}"
        logger.info(f"written: {where} sha256 {digest}")
    return found


def _heavy_files(local: Path) -> list[Path]:
    files = [local] if local.is_file() else sorted(local.iterdir())
    return [file for file in files if file.suffix in (".pth", ".safetensors", ".onnx")]


def _size(params: dict[str, Any]) -> int:
    return sum(_size(child) if isinstance(child, dict) else int(np.size(child)) for child in params.values())


def _images(given: str) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    return [read_upright(path)[0] for path in listed(epath.Path(given))[0][:_PHOTOGRAPHS]]


def _compared(
    form: Any, local: Path, params: Any, config: Config, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
) -> "Difference":
    from glip_jax.weights.verification import differences, reader

    exported = reader(form, local, config)
    with tqdm(total=len(images), desc="comparing", unit="image", disable=None) as bar:

        def counted(sample: Any) -> Any:
            found = exported(sample)
            bar.update()
            return found

        return differences(params, config, images, counted)


@contextlib.contextmanager
def _staged(out: epath.Path) -> Iterator[Path]:
    """A local place to write to, which becomes `out` at the end, or vanishes if anything stops the job before."""
    remote = "://" in str(out)
    base = Path(tempfile.mkdtemp()) if remote else Path(str(out)).absolute().parent / f"{out.name}{_UNFINISHED}"
    if base.exists() and not remote:
        logger.info(f"{base} was left by a killed export: removed")
        shutil.rmtree(base)
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if full_disk(error):
            raise
        raise CommandLineError(f"--out={out} cannot be written ({error}): give another path") from None
    local = base / out.name
    try:
        yield local
        if not remote:
            local.replace(Path(str(out)).absolute())
        elif local.is_file():
            epath.Path(local).copy(out)
        else:
            out.mkdir(parents=True)
            # config.json last: a folder without it is recognizably unfinished.
            for file in sorted(local.iterdir(), key=lambda file: file.name == "config.json"):
                epath.Path(file).copy(out / file.name)
    finally:
        shutil.rmtree(base)
