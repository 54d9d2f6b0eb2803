"""The Python API: a detector loaded from a working folder, called with what users have."""

import numpy as np
import pytest
from PIL import Image

import glip_jax
from glip_jax import UserError
from glip_jax.inference import Detector
from glip_jax.io.checkpoint import Checkpoints, Saved
from tests import tiny_run

pytestmark = pytest.mark.compiles

CONFIG = tiny_run.config(dropout=0.0)
CONFIG = tiny_run.replace(CONFIG, "evaluation", short_side=64, long_side=64, batch_size=2)
CONFIG = tiny_run.replace(CONFIG, "detection", threshold=0.0)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    params = tiny_run.parameters(CONFIG.model)
    with Checkpoints(str(folder), keep=1) as checkpoints:
        checkpoints.save(3, Saved(params, {}, {}), CONFIG)
    return folder


def test_a_detector_takes_paths_pil_images_and_arrays(workdir, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 3  # stored upside down
    path = tmp_path / "rotated.png"
    picture.rotate(180).save(path, exif=exif)
    detector = glip_jax.load_detector(workdir, batch_size=2)
    assert isinstance(detector, Detector) and detector.batch_size == 2 and detector.config == CONFIG
    found = detector([pixels, picture, path], ["cat", "dog"], threshold=0.0)
    assert len(found) == 3 and len(found[0].names) > 0
    for each in found[1:]:
        np.testing.assert_allclose(each.boxes, found[0].boxes, atol=1e-3)
        assert each.names == found[0].names
    (expected,) = detector.categories([pixels], ["cat", "dog"])
    assert found[0].names == [["cat", "dog"][phrase] for phrase in expected.phrases]
    middle = float(np.median(found[0].scores))
    (best,) = detector([pixels], ["cat", "dog"], middle)
    assert (
        0 < len(best.scores) < len(found[0].scores)
        and best.scores.min() >= middle
        and len(best.names) == len(best.boxes)
    )


@pytest.mark.slow
def test_a_caption_is_phrases_or_a_sentence(workdir):
    pixels = np.zeros((64, 64, 3), np.uint8)
    detector = glip_jax.load_detector(workdir / "checkpoints" / "3")
    (found,) = detector([pixels], "cat . dog", threshold=0.0)
    assert set(found.names) == {"cat", "dog"}
    (found,) = detector([pixels], "a cat and a dog", threshold=0.0)
    assert set(found.names) == {"a cat", "a dog"}


def test_what_is_wrong_is_said(workdir, tmp_path):
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        glip_jax.load_detector(tmp_path)
    with pytest.raises(ValueError, match="parameters='best': expected 'ema' or 'raw'"):
        glip_jax.load_detector(workdir, parameters="best")
    with pytest.raises(UserError, match="evaluation.sets is empty"):
        glip_jax.evaluate(workdir)
    with pytest.raises(ValueError, match=r"an image is float32\[4, 4, 3\]: expected a path, a PIL image or uint8"):
        glip_jax.load_detector(workdir)([np.zeros((4, 4, 3), np.float32)], ["cat"])
