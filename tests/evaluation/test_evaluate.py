import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from glip_jax.config import Config, EvaluationConfig, EvaluationSet
from glip_jax.evaluation.evaluate import EvaluationError, evaluate, evaluate_set
from glip_jax.evaluation.page import draw_evaluated, render, table
from glip_jax.structures import Detections

NAMES = ["RBC", "<WBC>"]


@pytest.fixture
def dataset(tmp_path):
    """Three images of different sizes; image k has one box at (k, k) of 20 x 10, of category k % 2."""
    images, annotations = [], []
    (tmp_path / "images").mkdir()
    for k in range(3):
        height, width = 40 + k, 60
        Image.new("RGB", (width, height), (k, 0, 0)).save(tmp_path / "images" / f"{k}.png")
        images.append({"id": 10 + k, "file_name": f"{k}.png", "height": height, "width": width})
        annotations.append({"id": k + 1, "image_id": 10 + k, "category_id": 1 + k % 2, "bbox": [k, k, 20, 10]})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    return EvaluationSet(str(tmp_path / "truth.json"), str(tmp_path / "images"), {"RBC": "red blood cell"})


class Oracle:
    """Knows where the boxes are: image k is filled with red value k."""

    def __init__(self):
        self.groups, self.names = [], []

    def categories(self, images, names, /):
        self.groups.append(len(images))
        self.names = list(names)
        found = []
        for image in images:
            k = int(image[0, 0, 0])
            # Inclusive corners, as GLIP's boxes are: a width of 20 pixels ends at k + 19.
            boxes = np.array([[k, k, k + 19, k + 9], [0, 0, 0, 0]], np.float32)
            found.append(Detections(boxes, np.array([0.9, 0], np.float32), np.array([k % 2, -1], np.int32)))
        return found


def _config(**changes):
    return Config(evaluation=EvaluationConfig(batch_size=2, **changes))


def test_a_perfect_detector_scores_one(dataset):
    oracle = Oracle()
    result = evaluate_set(oracle, _config(), dataset, name="cells", progress=False)
    assert result.precision.numbers["AP"] == pytest.approx(1)
    assert oracle.groups == [2, 1]
    assert oracle.names == ["red blood cell", "<WBC>"]
    assert result.image_ids == (10, 11, 12)


def test_only_so_many_images_count(dataset):
    result = evaluate_set(Oracle(), _config(max_images=1), dataset, progress=False)
    assert result.image_ids == (10,)
    assert result.precision.numbers["AP"] == pytest.approx(1)
    assert result.precision.per_class == {"RBC": pytest.approx(1), "<WBC>": -1}


def test_numbers_are_named_by_set(dataset, monkeypatch):
    monkeypatch.setattr("glip_jax.evaluation.evaluate.Detector", lambda config, params: Oracle())
    numbers = evaluate(_config(), {}, {"cells": dataset}, progress=False)
    assert numbers["evaluation/cells/AP50"] == pytest.approx(1)
    assert numbers["evaluation/cells/images"] == 3
    assert "evaluation/cells/APl" not in numbers, "no box is large: there is nothing to measure"


def test_the_prompts_are_told(dataset):
    lines = []
    evaluate_set(Oracle(), _config(), dataset, name="cells", progress=False, report=lines.append)
    assert lines == ["cells: 2 categories, asked for as: red blood cell, <WBC>"]


def _missing(dataset):
    (epath.Path(dataset.images) / "1.png").unlink()


def _broken(dataset):
    (epath.Path(dataset.images) / "1.png").write_bytes(b"no picture")


def _other_size(dataset):
    Image.new("RGB", (10, 10)).save(str(epath.Path(dataset.images) / "1.png"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, r"1\.png is not there"),
        (_broken, r"1\.png is no readable picture"),
        (_other_size, r"1\.png has 10 x 10 .* 41 x 60"),
        (lambda dataset: dataset.names.update(XYZ="x"), "names XYZ are no categories .* RBC, <WBC>"),
    ],
)
def test_sets_that_do_not_fit_give_one_message(dataset, spoil, message):
    spoil(dataset)
    with pytest.raises(EvaluationError, match=message):
        evaluate_set(Oracle(), _config(), dataset, progress=False)


def test_true_and_found_boxes_are_drawn(dataset):
    result = evaluate_set(Oracle(), _config(), dataset, progress=False)
    pictures, captions = draw_evaluated(result, epath.Path(dataset.images), limit=2)
    assert captions == ["0.png: 1 true boxes, 1 found", "1.png: 1 true boxes, 1 found"]
    assert all(len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 2 for picture in pictures)
    _, captions = draw_evaluated(result, epath.Path(dataset.images), limit=1, least=0.95)
    assert captions == ["0.png: 1 true boxes, 0 found"]


def test_the_page_needs_no_other_file_and_escapes_names(dataset):
    result = evaluate_set(Oracle(), _config(), dataset, progress=False)
    curves = {"loss": {"loss": ([1, 2], [2.0, 1.0])}}
    page = render("run <1>", {"cells": (result, epath.Path(dataset.images))}, curves, ["a note"])
    assert page.count("data:image/png;base64,") == 2
    assert "src=" in page and "http" not in page and 'src="/' not in page
    assert "&lt;WBC&gt;" in page and "<WBC>" not in page and "run &lt;1&gt;" in page
    assert "1.0000" in page


def test_a_table_for_the_terminal(dataset):
    result = evaluate_set(Oracle(), _config(), dataset, progress=False)
    head, line = table({"cells": (result.precision, 3)}).splitlines()
    assert len(head) == len(line)
    assert head.split()[:3] == ["set", "images", "AP"]
    assert line.split() == ["cells", "3", *["1.0000"] * 4, "-", "-", *["1.0000"] * 4, "-", "-"]
