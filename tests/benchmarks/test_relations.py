"""Relational phrases: classes of the best boxes, chance level, and redrawn scenes."""

import json
import sys

import numpy as np
import pytest

from benchmarks.relations import RelationalPhrase, counted, main, relational_phrases
from glip_jax.cli.scenes import Names, Scenes, _sets
from glip_jax.data.scenes.draw import SceneError
from glip_jax.data.scenes.sets import make_scenes

BOXES = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]], np.float32)


def _found(image, phrase, x, score):
    return {"image_id": image, "phrase": phrase, "bbox": [x, 0, 10, 10], "score": score}


def test_best_boxes_are_classified(tmp_path):
    phrases = [
        RelationalPhrase(1, 0, True, BOXES, (True, False, False, False)),
        RelationalPhrase(1, 2, False, BOXES[:2], (False, True)),
        RelationalPhrase(2, 0, False, BOXES[:2], (False, True)),
        RelationalPhrase(3, 0, False, BOXES[:2], (True, False)),
    ]
    detections = [
        _found(1, 0, 20, 0.6), _found(1, 0, 0, 0.5),  # another of the name; the meant one only second
        _found(1, 2, 0, 0.1), _found(1, 2, 20, 0.3),  # the meant one
        _found(2, 0, 100, 0.9),  # elsewhere
        _found(3, 1, 0, 0.9),  # another phrase's
    ]  # fmt: skip
    (tmp_path / "detections_phrases.json").write_text(json.dumps(detections))
    counts = counted(phrases, tmp_path)
    assert counts == {"another of the name": 1, "meant": 1, "elsewhere": 2, "chance": 0.25 + 0.5}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    few = Scenes(folder, count=2, captions=0, validation=12, names=Names(12, 4, 1, 1))
    make_scenes(folder / "phrases", _sets(few)["validation_phrases"], processes=1)
    return folder / "phrases"


def test_scenes_are_redrawn_identically(scenes):
    truth = json.loads((scenes / "annotations.json").read_text())
    phrases = relational_phrases(scenes)
    listed = [
        (image["id"], number)
        for image in truth["images"] for number, phrase in enumerate(image["phrases"]) if phrase["kind"] == "relational"
    ]  # fmt: skip
    assert listed and [(phrase.image, phrase.phrase) for phrase in phrases] == listed
    for phrase in phrases:
        assert 0 < sum(phrase.meant) < len(phrase.meant), "another of the name is there"
        drawn = [note["bbox"] for note in truth["annotations"] if note["image_id"] == phrase.image]
        for (x1, y1, x2, y2), meant in zip(phrase.boxes.tolist(), phrase.meant):
            assert not meant or [x1, y1, x2 - x1, y2 - y1] in drawn


def test_scenes_of_other_pictures_are_refused(scenes, tmp_path):
    truth = json.loads((scenes / "annotations.json").read_text())
    truth["info"]["pictures"] = "others"
    (tmp_path / "annotations.json").write_text(json.dumps(truth))
    with pytest.raises(SceneError, match="differ in pictures"):
        relational_phrases(tmp_path)


def test_detections_of_another_set_are_refused(scenes, tmp_path, monkeypatch, capsys):
    (tmp_path / "detections_phrases.json").write_text(json.dumps([_found(999, 0, 0, 0.9)]))
    monkeypatch.setattr(sys, "argv", ["relations", str(scenes), str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert "its detections are of another set than" in capsys.readouterr().err
