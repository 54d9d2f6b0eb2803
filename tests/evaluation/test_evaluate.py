"""Evaluation of detection and grounding sets with detectors whose results are known."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from PIL import Image

from glip_jax.config import Config, EvaluationConfig, EvaluationSet, ModelConfig, TextConfig
from glip_jax.evaluation.average_precision import GroundTruthError
from glip_jax.evaluation.evaluate import (
    EvaluationError,
    check_set,
    evaluate,
    evaluate_detection,
    evaluate_grounding,
    scalars,
)
from glip_jax.structures import prompts
from glip_jax.structures.batch import Detections
from tests.tiny_run import VOCABULARY

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
    """Returns the true boxes: image k is filled with red value k."""

    batch_size = group_size = 2

    def __init__(self):
        self.groups, self.names = [], []

    def categories_async(self, images, names, /):
        found = self.categories(images, names)
        return lambda: found

    def categories(self, images, names, /):
        self.groups.append(len(images))
        self.names = list(names)
        found = []
        for image in images:
            k = int(image[0, 0, 0])
            # Inclusive corners, as in GLIP: a width of 20 pixels ends at k + 19.
            boxes = np.array([[k, k, k + 19, k + 9], [0, 0, 0, 0]], np.float32)
            found.append(Detections(boxes, np.array([0.9, 0], np.float32), np.array([k % 2, -1], np.int32)))
        return found


def _config(**changes):
    return Config(evaluation=EvaluationConfig(batch_size=2, **changes))


def test_a_perfect_detector_scores_one(dataset):
    oracle = Oracle()
    result = evaluate_detection(oracle, _config(), dataset, name="cells", progress=False)
    assert result.precision.numbers["AP"] == pytest.approx(1)
    assert oracle.groups == [2, 1]
    assert oracle.names == ["red blood cell", "<WBC>"]
    assert result.image_ids == (10, 11, 12)


def test_max_images(dataset):
    result = evaluate_detection(Oracle(), _config(max_images=1), dataset, progress=False)
    assert result.image_ids == (10,)
    assert result.precision.numbers["AP"] == pytest.approx(1)
    assert result.precision.per_class == {"RBC": pytest.approx(1), "<WBC>": -1}


def test_a_set_as_tools_write_it_is_evaluated_as_it_is_imported(dataset):
    path = epath.Path(dataset.annotations)
    content = json.loads(path.read_text())
    for image, size in zip(
        content["images"], ({}, {"height": None, "width": None}, {"height": "42", "width": "x"}), strict=True
    ):
        image["file_name"] = f"C:\\me\\{image['file_name']}"
        del image["height"], image["width"]
        image |= size
    content["annotations"] = [note | {"id": None, "area": None, "iscrowd": None} for note in content["annotations"]]
    content["categories"] += [{"id": 0, "name": "cells", "supercategory": "none"}, {"id": 9, "name": "__background__"}]
    for category in content["categories"][:2]:
        category["supercategory"] = "cells"
    usual = evaluate_detection(Oracle(), _config(), dataset, progress=False)
    for kind in (int, str):
        for note in content["annotations"]:
            note["category_id"], note["image_id"] = kind(note["category_id"]), kind(note["image_id"])
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
        result = evaluate_detection(Oracle(), _config(), dataset, progress=False)
        assert (result.precision, result.prompts, result.pictures) == (usual.precision, usual.prompts, usual.pictures)
    # Ids of images and categories may be texts altogether.
    for entry in (*content["images"], *content["categories"]):
        entry["id"] = f"id {entry['id']}"
    for note in content["annotations"]:
        note["category_id"], note["image_id"] = f"id {note['category_id']}", f"id {note['image_id']}"
    path.write_text(json.dumps(content))
    result = evaluate_detection(Oracle(), _config(), dataset, progress=False)
    assert result.precision == usual.precision and result.image_ids == ("id 10", "id 11", "id 12")


def test_metrics_are_named_by_set(dataset, monkeypatch):
    monkeypatch.setattr("glip_jax.evaluation.evaluate.Detector", Both)
    numbers = evaluate(_config(), {}, {"cells": dataset}, progress=False)
    assert numbers["evaluation/cells/AP50"] == pytest.approx(1)
    assert numbers["evaluation/cells/images"] == 3
    assert numbers["evaluation/cells/AP50_permuted"] == 0, "with permuted names nothing is right"
    assert "evaluation/cells/APl" not in numbers, "no box is large: not defined"


def test_the_prompts_are_reported(dataset):
    lines = []
    evaluate_detection(Oracle(), _config(), dataset, name="cells", progress=False, report=lines.append)
    assert lines == ["cells: 2 categories, prompted as: red blood cell, <WBC>"]


def test_images_are_turned_upright_where_the_listed_size_says_so(dataset):
    path, exif = epath.Path(dataset.images) / "1.png", Image.Exif()
    exif[0x0112] = 6
    with Image.open(str(path)) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(str(path), exif=exif)
    seen, lines = [], []

    class Seeing(Oracle):
        def categories(self, images, names, /):
            seen.extend(image.shape[:2] for image in images)
            return super().categories(images, names)

    result = evaluate_detection(Seeing(), _config(), dataset, name="cells", progress=False, report=lines.append)
    assert sorted(seen) == [(40, 60), (41, 60), (42, 60)] and result.precision.numbers["AP"] == pytest.approx(1)
    assert lines[-1] == "cells: noted image: turned upright by its EXIF orientation 1"
    with pytest.raises(EvaluationError, match=r"1\.png has 60 x 41 .* 41 x 60"):
        evaluate_detection(Oracle(), _config(), dataclasses.replace(dataset, orientation="stored"), progress=False)


def _missing(dataset):
    (epath.Path(dataset.images) / "1.png").unlink()


def _broken(dataset):
    (epath.Path(dataset.images) / "1.png").write_bytes(b"no image")


def _other_size(dataset):
    Image.new("RGB", (10, 10)).save(str(epath.Path(dataset.images) / "1.png"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, r"1\.png does not exist"),
        (_broken, r"1\.png is no image that can be read"),
        (_other_size, r"1\.png has 10 x 10 .* 41 x 60"),
        (
            lambda dataset: dataset.names.update(XYZ="x"),
            r"sets\.cells\.names has 'XYZ', .* no category: expected some of 'RBC' \(id 1\)",
        ),
    ],
)
def test_sets_that_do_not_fit_give_one_message(dataset, spoil, message):
    spoil(dataset)
    with pytest.raises((EvaluationError, GroundTruthError), match=message):
        evaluate_detection(Oracle(), _config(), dataset, name="cells", progress=False)


def test_the_order_in_the_prompts_does_not_change_the_result(dataset):
    class Reordered(Oracle):
        def categories(self, images, names, /):
            found = super().categories(images, names)
            assert names == ["<WBC>", "red blood cell"]
            return [one._replace(phrases=np.where(one.phrases >= 0, 1 - one.phrases, -1)) for one in found]

    straight = evaluate_detection(Oracle(), _config(), dataset, progress=False)
    reordered = evaluate_detection(Reordered(), _config(), dataset, progress=False, order=[1, 0])
    assert reordered.precision == straight.precision and reordered.prompts == straight.prompts


def test_the_hash_of_the_images_is_of_names_and_contents(dataset):
    first = evaluate_detection(Oracle(), _config(), dataset, progress=False).pictures
    assert len(first) == 64
    assert evaluate_detection(Oracle(), _config(), dataset, progress=False).pictures == first
    picture = epath.Path(dataset.images) / "1.png"
    Image.new("RGB", (60, 41), (1, 1, 0)).save(str(picture))
    assert evaluate_detection(Oracle(), _config(), dataset, progress=False).pictures != first


CAPTIONS = ("a cat left of a dog", "a person, a cat, a dog", "nothing at all")


@pytest.fixture
def grounding(tmp_path):
    """Three captions on two images; phrase p of caption k has one box at (10 p, 0), 9 x 9; the third has none."""
    (tmp_path / "pictures").mkdir()
    images, annotations = [], []
    for k, caption in enumerate(CAPTIONS):
        file = f"{k % 2}.png"
        Image.new("RGB", (60, 40), (k % 2, 0, 0)).save(tmp_path / "pictures" / file)
        words = [word for word in ("a person", "a cat", "a dog") if word in caption]
        spans = [[caption.index(word), caption.index(word) + len(word)] for word in words]
        phrases = [{"span": span, "kind": ("plain", "relational")[p % 2]} for p, span in enumerate(spans)]
        images.append(
            {"id": 5 - k, "file_name": file, "height": 40, "width": 60, "caption": caption, "phrases": phrases}
        )
        annotations += [
            {"id": 10 * k + p, "image_id": 5 - k, "bbox": [10 * p, 0, 9, 9], "tokens_positive": [span]}
            for p, span in enumerate(spans)
        ]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return EvaluationSet(str(tmp_path / "captions.json"), str(tmp_path / "pictures"), kind="grounding")


class Reader:
    """Returns the right box of "a cat", and a wrong box before the right one for other phrases; records the captions."""

    batch_size = group_size = 2

    def __init__(self):
        self.tokenizer = prompts.load_tokenizer(VOCABULARY)
        self.seen = []

    def detect_async(self, images, prompts, /):
        asked = [(image, prompt) for image, own in zip(images, prompts, strict=True) for prompt in own]
        found = iter(self.caption([image for image, _ in asked], [prompt for _, prompt in asked]))
        return lambda: [[next(found) for _ in own] for own in prompts]

    def caption(self, images, prompts, /):
        assert len(images) == len(prompts)
        self.seen += [prompt.caption for prompt in prompts]
        return [self._found(prompt) for prompt in prompts]

    def _found(self, prompt):
        places = {"a person": 0, "a cat": 10, "a dog": 20} if "person" in prompt.caption else {"a cat": 0, "a dog": 10}
        rows = []
        for number, ((begin, end),) in enumerate(prompt.spans):
            words = prompt.caption[begin:end]
            rows.append((0.5, places[words], number))
            rows += [(0.9, 45, number)] if words != "a cat" else []
        rows.sort(reverse=True)
        boxes = np.array([[x, 0, x + 9, 9] for _, x, _ in rows], np.float32)
        return Detections(
            boxes, np.array([s for s, _, _ in rows], np.float32), np.array([n for *_, n in rows], np.int32)
        )


class Both(Oracle, Reader):
    def __init__(self, *_):
        Oracle.__init__(self)
        Reader.__init__(self)


def _budget(tokens):
    return Config(
        evaluation=EvaluationConfig(batch_size=2), model=ModelConfig(text=TextConfig(max_tokens=tokens, positions=512))
    )


def test_recall_of_a_grounding_set(grounding):
    lines = []
    result = evaluate_grounding(Reader(), _budget(256), grounding, name="x", progress=False, report=lines.append)
    assert result.image_ids == (5, 4)
    assert result.recall.phrases == {"": 5, "plain": 3, "relational": 2}
    numbers = scalars(result)
    assert numbers["recall@1"] == pytest.approx(2 / 5) and numbers["recall@5"] == 1
    assert numbers["relational/recall@1"] == pytest.approx(1 / 2) and numbers["plain/recall@1"] == pytest.approx(1 / 3)
    assert numbers["merged_recall@1"] == pytest.approx(2 / 5)
    assert numbers["phrases"] == 5 and numbers["relational/phrases"] == 2 and numbers["images"] == 2
    assert not {name for name in numbers if "over_budget" in name}
    assert lines == ["x: 5 phrases in 2 captions; left out: 1 captions without a phrase that has a box"]


def test_phrases_beyond_the_budget_are_missed_and_reported(grounding):
    reader, lines = Reader(), []
    budget = len(reader.tokenizer.encode("a person, a cat").ids)
    assert budget < len(reader.tokenizer.encode(CAPTIONS[0]).ids)
    result = evaluate_grounding(reader, _budget(budget), grounding, progress=False, report=lines.append)
    assert sorted(reader.seen) == ["a cat", "a person, a cat"]
    # Two of five phrases are in no prompt, but in the denominator.
    assert result.recall.phrases[""] == 5 and result.recall.numbers["recall@10"] == pytest.approx(3 / 5)
    assert result.unasked == {5: (1,), 4: (2,)}
    assert scalars(result)["phrases_over_budget"] == 2 and scalars(result)["captions_cut"] == 2
    assert "2 captions cut; 2 phrases over budget" in lines[0]


def test_a_caption_of_which_nothing_fits_counts_as_missed(grounding):
    reader = Reader()
    result = evaluate_grounding(reader, _budget(3), grounding, progress=False)
    assert reader.seen == [] and result.recall.numbers["recall@10"] == 0
    assert result.counts == {"captions": 2, "captions_cut": 2, "phrases_over_budget": 5, "phrases_without_token": 0}


def test_detections_index_the_phrases_of_the_caption_not_of_the_prompt(grounding):
    content = json.loads(epath.Path(grounding.annotations).read_text())
    # In another order than in the caption: the first in the list is cut off.
    content["images"][0]["phrases"].reverse()
    epath.Path(grounding.annotations).write_text(json.dumps(content))
    budget = len(Reader().tokenizer.encode("a cat").ids)
    result = evaluate_grounding(Reader(), _budget(budget), grounding, progress=False)
    assert result.unasked[5] == (0,) and set(result.detections[5].phrases.tolist()) == {1}


def test_evaluation_in_training_runs_both_kinds(dataset, grounding, monkeypatch):
    monkeypatch.setattr("glip_jax.evaluation.evaluate.Detector", Both)
    config = dataclasses.replace(_budget(256), evaluation=EvaluationConfig(sets={"cells": dataset, "x": grounding}))
    numbers = evaluate(config, {}, progress=False)
    assert numbers["evaluation/x/relational/recall@1"] == pytest.approx(1 / 2)
    assert numbers["evaluation/cells/AP"] == pytest.approx(1)


TINY = Config(model=ModelConfig(text=TextConfig(vocabulary=str(VOCABULARY), vocabulary_size=512, max_tokens=24)))


def test_sets_are_checked_before_a_long_run(dataset, grounding, tmp_path):
    (note,) = check_set("cells", dataset, TINY)
    assert "does not know all of '<WBC>'" in note
    assert check_set("x", grounding, TINY) == []
    with pytest.raises(EvaluationError, match=r"sets.x.images: .*gone does not exist"):
        check_set("x", dataclasses.replace(grounding, images=str(tmp_path / "gone")), TINY)
    with pytest.raises(GroundTruthError, match="categories"):
        check_set("x", dataclasses.replace(grounding, kind="detection"), TINY)
    with pytest.raises(GroundTruthError, match="caption"):
        check_set("x", dataclasses.replace(dataset, kind="grounding", names={}), TINY)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("斑马", "长颈鹿"), r"'斑马', '长颈鹿' have no word .* evaluation.sets.x.names, or .* of that language"),
        (("RBC", "rbc"), r"1 \('RBC'\) and 2 \('rbc'\) are the same to the model, .*sets\.x\.names"),
        (("RBC", "cat " * 30), "alone takes 32 tokens"),
    ],
)
def test_names_that_the_model_cannot_read_or_tell_apart_are_refused(dataset, names, message):
    content = json.loads(epath.Path(dataset.annotations).read_text())
    for entry, name in zip(content["categories"], names):
        entry["name"] = name
    epath.Path(dataset.annotations).write_text(json.dumps(content))
    with pytest.raises((EvaluationError, GroundTruthError), match=message):
        check_set("x", dataclasses.replace(dataset, names={}), TINY)


def test_names_that_differ_in_parentheses_and_phrases_that_are_not_read_are_noted(dataset, grounding):
    """As LVIS has them; the released models were trained and evaluated with these."""
    names = {"RBC": "bow_(weapon)", "<WBC>": "bow_(ribbon)"}
    (note,) = check_set("x", dataclasses.replace(dataset, names=names), TINY)
    assert "the same to the model: 'bow_(ribbon) = bow_(weapon)'" in note
    path = epath.Path(grounding.annotations)
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False).replace("a dog", "⺅⺅ ⺅⺅"))
    (note,) = check_set("x", grounding, TINY)
    assert "of 3 phrases the model's vocabulary knows nothing of 1: '⺅⺅ ⺅⺅'" in note
    path.write_text(path.read_text().replace("a cat", "⺅⺅⺅⺅⺅").replace("a person", "⺅⺅⺅ ⺅⺅⺅⺅"))
    with pytest.raises(EvaluationError, match="knows no word of the phrases"):
        check_set("x", grounding, TINY)
