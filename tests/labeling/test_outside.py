"""A teacher from a COCO results file: assignment of boxes to phrases by category, and files that are refused."""

import json

import numpy as np
import pytest

from glip_jax.data.importers.entry import SourceError
from glip_jax.labeling.matching import ListedImages
from glip_jax.labeling.outside import category_of, open_detections
from glip_jax.labeling.teacher import ImageQueries

CATEGORIES = {1: "person", 2: "bear", 3: "teddy bear", 4: "dining table", 5: "dog", 6: "bus_(vehicle)", 7: "wine glass"}


def files(tmp_path, rows, **extra):
    names = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    images = [
        {"id": 9, "file_name": "val/000000000009.jpg", "height": 50, "width": 100},
        {"id": 10, "file_name": "b.png"},
    ]
    (tmp_path / "names.json").write_text(json.dumps({"categories": names, "images": images} | extra))
    (tmp_path / "found.json").write_text(json.dumps(rows))
    return tmp_path / "found.json", tmp_path / "names.json"


def row(image, category, box, score):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def detect(teacher, key, caption, *phrases, size=(50, 100), file="", image_id=""):
    spans = tuple((caption.index(words), caption.index(words) + len(words)) for words in phrases)
    picture = ImageQueries(np.zeros((*size, 3), np.uint8), [teacher.make_query(key, caption, spans, file, image_id)])
    return teacher.detect_async([picture])()[0][0]


@pytest.mark.parametrize(
    ("phrase", "name"),
    [
        ("two big Teddy Bears", "teddy bear"), ("the bears", "bear"), ("a bear", "bear"), ("a teddy-bear", "teddy bear"),
        ("a table", None), ("the dining table", "dining table"), ("a man", None), ("three buses", "bus_(vehicle)"),
        ("a bear of a dog", "bear"), ("two wine glasses", "wine glass"), ("wine", None), ("a dog house", None),
    ],
)  # fmt: skip
def test_a_phrase_gets_the_longest_category_name_that_ends_at_its_head(tmp_path, phrase, name):
    teacher = open_detections(*files(tmp_path, []), 0.5)
    number = category_of(f"see {phrase} here", (4, 4 + len(phrase)), teacher._names)
    assert CATEGORIES.get(number or 0) == name


def test_boxes_are_assigned_to_the_phrase_of_their_category(tmp_path):
    rows = [
        row(9, 3, [10, 5, 20, 30], 0.7), row(9, 3, [40, 5, 20, 30], 0.9), row(9, 2, [0, 0, 9, 9], 0.8),
        row(9, 3, [1, 1, 9, 9], 0.4), row(9, 3, [1, 1, 1, 9], 0.9), row(10, 3, [0, 0, 9, 9], 0.9),
    ]  # fmt: skip
    teacher = open_detections(*files(tmp_path, rows), 0.5)
    (note,) = teacher.notes
    assert note.startswith("1 boxes of a pixel's width or height left out (first: ") and "item [4]" in note
    keys = [
        {"key": "9#123"},
        {"key": "val/000000000009.jpg"},
        {"key": "000000000009"},
        {"key": "7", "file": "000000000009.jpg"},
    ]
    for given in [*keys, {"key": "1#2", "image_id": "9"}]:
        key = given.pop("key")
        result = detect(teacher, key, "two teddy bears on a sofa", "two teddy bears", "a sofa", **given)
        assert result.detections[0].boxes.tolist() == [[40, 5, 59, 34], [10, 5, 29, 34]]
        assert result.detections[0].scores.tolist() == pytest.approx([0.9, 0.7]) and not len(
            result.detections[1].scores
        )
        assert result.skipped == {1: "names no category of the detections"} and not result.skip_reason


def test_boxes_of_two_categories_of_the_same_words_belong_to_the_phrase_of_either(tmp_path):
    rows = [row(9, 3, [10, 5, 20, 30], 0.7), row(9, 8, [40, 5, 20, 30], 0.9)]
    names = [{"id": 3, "name": "teddy bear"}, {"id": 8, "name": "Teddy Bears"}]
    teacher = open_detections(*files(tmp_path, rows, categories=names), 0.5)
    result = detect(teacher, "val/000000000009.jpg", "a teddy bear on a sofa", "a teddy bear")
    assert result.detections[0].scores.tolist() == pytest.approx([0.9, 0.7])
    (note,) = teacher.notes
    assert note.startswith("1 categories of the name of another, taken together (first: ") and "8" in note


def test_two_phrases_of_one_category_stay_unlabelled(tmp_path):
    teacher = open_detections(*files(tmp_path, [row(9, 5, [0, 0, 9, 9], 0.9)]), 0.5)
    result = detect(teacher, "9#1", "a black dog and a white dog", "a black dog", "a white dog")
    assert not any(len(phrase.scores) for phrase in result.detections)
    assert result.skipped == dict.fromkeys((0, 1), "shares its category with another phrase")


def test_an_image_that_is_not_in_the_file_is_skipped(tmp_path):
    teacher = open_detections(*files(tmp_path, [row(77, 5, [0, 0, 9, 9], 0.9)]), 0.5)
    assert detect(teacher, "11#1", "a dog", "a dog").skip_reason == "image: not among the detections"
    assert detect(teacher, "9#1", "a dog", "a dog", size=(60, 100)).skip_reason.startswith("image: size differs")
    found = detect(teacher, "77#1", "a dog", "a dog", size=(60, 100))
    assert found.detections[0].scores.tolist() == pytest.approx([0.9])
    assert not detect(teacher, "10#1", "a dog", "a dog").skip_reason, "listed, without detections"


LISTED = {1: "a/0.jpg", 2: "a/1.jpg", 3: "b/1.jpg", 4: "c\\2.jpg", 5: ""}


@pytest.mark.parametrize(
    ("record", "file", "image_id", "found"),
    [
        ("1", "a/0.jpg", "", "1"),  # line 1: not the id 1, though it is the same here
        ("3", "2.jpg", "", "4"),
        ("2", "1.jpg", "", "several images"),
        ("2", "b/1.jpg", "", "3"),
        ("2", "x/b/1.jpg", "", "without its folder"),
        ("2", "x/1.jpg", "", "not among"),
        ("2", "9.jpg", "", "not among"),
        ("1#7", "a/0.jpg", "1", "1"),
        ("5#7", "a/9.jpg", "5", "5"),  # no file is listed: the id counts
        ("2#7", "a/0.jpg", "2", "1"),  # the same path: the ids are of different spaces
        ("2#7", "0.jpg", "2", "different images"),
        ("2#7", "z.jpg", "2", "id is that of another file"),
        # Records of earlier versions.
        ("2", "", "", "numbered by line"),
        ("2.1", "", "", "numbered by line"),
        ("2#0", "", "", "2"),
        ("c/2", "", "", "4"),
        ("1#x", "", "", "1"),
    ],
)
def test_ids_and_file_names_are_different_things(record, file, image_id, found):
    images = ListedImages()
    assert all(images.add(str(key), name) for key, name in LISTED.items())
    image, reason = images.find(record, file, image_id)
    assert image == found if image else found in reason


def test_how_images_are_matched_can_be_said():
    for match, given, wanted in [
        ("id", ("2", "", ""), "2"), ("id", ("2#7", "z.jpg", "2"), "2"), ("id", ("8", "a/0.jpg", ""), None),
        ("name", ("8", "x/y/0.jpg", ""), "1"), ("name", ("8", "1.jpg", ""), None),
    ]:  # fmt: skip
        images = ListedImages(match)
        assert all(images.add(str(key), name) for key, name in LISTED.items())
        assert images.find(*given)[0] == wanted, (match, given)
    images = ListedImages()
    assert images.add_unlisted(12) == "12" and images.add_unlisted("val/0012") == "val/0012"
    assert images.find("1", "0012.jpg", "") == ("val/0012", "") and images.find("3", "12.jpg", "")[0] is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image_id": 9}], r"found\.json: item \[0\] lacks category_id, bbox, score"),
        ([row(9, 99, [0, 0, 9, 9], 0.9)], "category_id 99, which .*names.json does not name"),
        ([row(9, 1, [0, 0, 9], 0.9)], r"bbox \[0, 0, 9\] and score .*expected four numbers"),
        ([row(9, 1, [0, 0, 9, 9], 7)], "expected four numbers in pixels"),
        ([row(9, 1, [50 + i, 20, 90, 40], 0.9) for i in range(10)], "bbox seems to hold corners"),
        ({"annotations": []}, "found.json"),
    ],
)
def test_malformed_files_are_refused(tmp_path, rows, message):
    with pytest.raises(SourceError, match=message):
        open_detections(*files(tmp_path, rows), 0.5)
    with pytest.raises(SourceError, match="does not exist"):
        open_detections(tmp_path / "none.json", tmp_path / "names.json", 0.5)
