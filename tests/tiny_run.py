"""A minute run: two sources of eight drawn pictures each, and a network of a few thousand parameters.

`Run` is the run of configs/debug.py; the fixture `trained` makes one for a whole session.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import pytest
from PIL import Image, ImageDraw

from glip_jax.config import (  # fmt: skip
    AnchorConfig,
    BackboneConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    FusionConfig,
    HeadConfig,
    ModelConfig,
    OptimizerConfig,
    PyramidConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
)
from glip_jax.data import shards
from glip_jax.data.records import Record
from glip_jax.weights.names import parameter_shapes

VOCABULARY = Path(__file__).parent / "fixtures" / "vocab_tiny1.txt"
NAMES = ("cat", "dog", "person")
COLORS = ((220, 30, 30), (30, 30, 220), (30, 160, 30))


def _record(index: int, kind: Any) -> Record:
    rng = np.random.default_rng([index, kind == "grounding"])
    picture = Image.new("RGB", (64, 64), (200, 200, 200))
    pen, boxes, labels = ImageDraw.Draw(picture), [], []
    for _ in range(1 + index % 3):
        x, y = rng.integers(2, 34, 2).tolist()
        side, label = int(rng.integers(16, 28)), int(rng.integers(3))
        pen.rectangle((x, y, x + side, y + side), fill=COLORS[label])
        boxes.append((x, y, x + side, y + side))
        labels.append(label)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    common: dict[str, Any] = {
        "image": stream.getvalue(),
        "height": 64,
        "width": 64,
        "boxes": np.array(boxes, np.float32),
    }
    if kind == "detection":
        return Record(f"d{index}", kind, categories=tuple(labels), **common)
    words = [NAMES[label] for label in labels]
    starts = np.cumsum([0] + [len(word) + 1 for word in words]).tolist()
    spans = tuple(((start, start + len(word)),) for start, word in zip(starts, words))
    return Record(f"g{index}", kind, caption=" ".join(words), spans=spans, **common)


def write_sources(folder: Path) -> dict[str, SourceConfig]:
    """Shards of both sources below `folder`."""
    for name, kind, names in (("boxes", "detection", NAMES), ("captions", "grounding", ())):
        shards.write((_record(i, kind) for i in range(8)), folder / name, name=name, names=names)
    return {name: SourceConfig(str(folder / name)) for name in ("boxes", "captions")}


def model(dropout: float = 0.1) -> ModelConfig:
    """Swin of width 8, one head block, three levels."""
    return ModelConfig(
        backbone=BackboneConfig(width=8, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), window=4, drop_path=dropout),
        pyramid=PyramidConfig(channels=16, strides=(16, 32, 64), drop_block=dropout),
        text=TextConfig(
            vocabulary=str(VOCABULARY), vocabulary_size=512, width=16, layers=1, heads=2, hidden=32, positions=32,
            max_tokens=16, dropout=dropout,
        ),
        fusion=FusionConfig(width=16, heads=2, dropout=dropout),
        head=HeadConfig(blocks=1, groups=4),
        anchors=AnchorConfig(sizes=(16, 32, 64)),
    )  # fmt: skip


def config(sources: dict[str, SourceConfig] | None = None, dropout: float = 0.1, **train: Any) -> Config:
    """A run of few steps; `train` are fields of TrainConfig."""
    return Config(
        name="tiny",
        model=model(dropout),
        data=DataConfig(sources=sources or {}, short_sides=(64,), long_side=64, aspects=(1.0,), max_boxes=4, threads=1),
        optimizer=OptimizerConfig(rate=1e-3, text_rate=1e-4, warmup_steps=2, ema_decay=0.9),
        train=TrainConfig(**{"steps": 6, "batch_size": 8, "log_every": 2, "draw_first_batch": False, **train}),
        checkpoint=CheckpointConfig(every=2, keep=2),
    )


def parameters(model: ModelConfig, seed: int = 5) -> dict[str, Any]:
    """Random values on the host, far from the initial ones, so that every path contributes. Nothing is compiled."""
    rng, values = np.random.default_rng(seed), {}
    for path, shape in parameter_shapes(model).items():
        name = path.rsplit("/", 1)[-1]
        deviation = 0.15 if len(shape.shape) > 1 else 0.3
        mean = 1.0 if name in ("scale", "scales") else -2.0 if name == "bias0" else 0.0
        values[path] = (mean + deviation * rng.normal(size=shape.shape)).astype(np.float32)
        if np.issubdtype(shape.dtype, np.integer):  # ids of a table of tuned prompts that holds no name
            values[path] = np.full(shape.shape, -1, np.int32)
    return flax.traverse_util.unflatten_dict(values, sep="/")


def replace(config: Config, section: str, **values: Any) -> Config:
    """`config` with some fields of one section replaced."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def config_file(folder: Path, sources: dict[str, SourceConfig]) -> Path:
    """A config file of this run, for processes."""
    path = folder / "tiny.py"
    paths = {name: source.path for name, source in sources.items()}
    path.write_text(
        "from glip_jax.config import SourceConfig\n"
        "from tests import tiny_run\n\n"
        "def get_config():\n"
        f"    return tiny_run.config({{name: SourceConfig(path) for name, path in {paths!r}.items()}})\n"
    )
    return path


@dataclasses.dataclass(frozen=True)
class Run:
    """What lies in `folder` once `make` has been there."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "debug.py"

    @property
    def workdir(self) -> Path:
        """With checkpoints of steps 1 and 2."""
        return self.folder / "run"

    @property
    def scenes(self) -> Path:
        """Two shards of two scenes each, and validation sets of two."""
        return self.folder / "scenes"


SCENES = ("--count=4", "--captions=0", "--validation=2", "--size=96", "--processes=1", "--names.detection=4",
          "--names.grounding=2", "--names.captions=1", "--names.unseen=1")  # fmt: skip


def make(folder: Path) -> Run:
    """A new `folder` with the run of configs/debug.py, by the jobs `scenes` and `train`, on one device."""
    from glip_jax.__main__ import main
    from glip_jax.distributed.mesh import make_mesh
    from glip_jax.training import loop

    folder.mkdir()
    run = Run(folder)
    run.config.write_text(
        f"from configs.debug import debug\n\n\ndef get_config():\n    return debug({str(run.scenes)!r})\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
        assert main(["scenes", f"--out={run.scenes}", *SCENES]) == 0
        assert main(["train", f"--config={run.config}", f"--workdir={run.workdir}"]) == 0
    return run
