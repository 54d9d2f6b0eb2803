"""A stand-in for checkpoint and detector, and a made set in LVIS's layout, for tests of a benchmark without a network."""

import json
from types import SimpleNamespace

import numpy as np
from etils import epath
from PIL import Image

from glip_jax.config import Config, EvaluationConfig, ModelConfig, TextConfig
from glip_jax.evaluation.benchmark import blocks, predict
from glip_jax.evaluation.benchmark.blocks import Cut
from glip_jax.evaluation.benchmark.predict import Run
from glip_jax.evaluation.benchmark.sets import own_set
from glip_jax.evaluation.shares import Share
from glip_jax.inference import bucket
from glip_jax.structures.batch import Detections
from tests.tiny_run import VOCABULARY

NAMES = ("cat", "dog", "person", "red cat", "red dog", "blue cat", "blue dog", "a person", "cats")
IMAGES = 7
CONFIG = Config(model=ModelConfig(text=TextConfig(vocabulary=str(VOCABULARY), vocabulary_size=512, max_tokens=32)))


class Fake:
    """A detector whose boxes depend on the pixels and the prompt only; it finds two boxes of every phrase."""

    group_size = 2

    def __init__(self, config, params, **_):
        """`params`: a list, which gets the number of images of each call."""
        self.config, self.params = config, params

    def canvas(self, height, width):
        return bucket(height, width, self.config)

    def detect_async(self, images, prompts):
        self.params.append(len(images))
        found = [[self._found(image, prompt) for prompt in own] for image, own in zip(images, prompts, strict=True)]
        return lambda: found

    def _found(self, image, prompt):
        rng = np.random.default_rng([int(image.sum()), *prompt.caption.encode()])
        count = 2 * len(prompt.spans)
        corners = rng.random((count, 2)) * 20
        boxes = np.concatenate([corners, corners + 5 + rng.random((count, 2)) * 20], 1).astype(np.float32)
        k = int(image[0, 0, 0])
        boxes[0] = k, k, k + 20, k + 10  # a true box of some name
        scores = np.sort(rng.integers(1, 30, count))[::-1].astype(np.float32) / 30
        return Detections(boxes, scores, (np.arange(count) % len(prompt.spans)).astype(np.int32))


def small(monkeypatch):
    """Blocks of three images, and a cut that leaves out most."""
    monkeypatch.setattr(blocks, "BLOCK", 3)
    monkeypatch.setattr(predict, "_LVIS_CUT", Cut(5, 4))


def stand_in(monkeypatch, step=3):
    """The job reads no checkpoint and computes nothing on a device. Returns the list of the detector's calls."""
    from glip_jax.cli import benchmark, checkpoint_argument
    from glip_jax.io import checkpoint

    calls = []
    opened = SimpleNamespace(workdir="run", step=step, config=CONFIG, settings={}, parameters=lambda _: calls)
    small(monkeypatch)
    monkeypatch.setattr(checkpoint_argument, "open_named", lambda *_: opened)
    monkeypatch.setattr(benchmark, "checkpoint_fingerprint", lambda *_: {})
    monkeypatch.setattr(checkpoint, "fingerprint", lambda _: f"of step {step}")
    monkeypatch.setattr("glip_jax.inference.Detector", Fake)
    return calls


def write_made(folder):
    """Seven images of two shapes with a box each, nine names."""
    (folder / "images").mkdir()
    images, annotations = [], []
    for k in range(IMAGES):
        height, width = (40, 60) if k % 2 else (60, 40)
        Image.new("RGB", (width, height), (k, 9, 9)).save(folder / "images" / f"{k}.png")
        images.append({"id": 10 + k, "file_name": f"{k}.png", "height": height, "width": width, "neg_category_ids": [4, 6],
                       "not_exhaustive_category_ids": []})  # fmt: skip
        annotations.append(
            {"id": k + 1, "image_id": 10 + k, "category_id": 1 + k % 3, "bbox": [k, k, 20, 10], "area": 200}
        )
    categories = [{"id": i + 1, "name": name, "frequency": "rcf"[i % 3]} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(content))
    return folder


def own(folder, like="lvis_minival"):
    """The made set."""
    return own_set("made", str(folder / "truth.json"), str(folder / "images"), like)


def run(folder, name, calls=None, share=None, parameters="abc", **evaluation):
    """What `predict` needs; it writes to the folder `name`."""
    config = Config(model=CONFIG.model, evaluation=EvaluationConfig(**evaluation))
    calls = [] if calls is None else calls
    about = {"name": "tiny", "workdir": "run", "step": 3, "parameters": "ema", "hashes": {"parameters": parameters},
             "sources": {}}  # fmt: skip
    workdir = epath.Path(folder / name)
    return Run(str(folder), workdir, config, lambda config: Fake(config, calls), about, share or Share())


def files(folder):
    """Every file of predictions below a working folder."""
    paths = [path for path in sorted(folder.rglob("*.json")) if "predictions" in str(path.relative_to(folder))]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
