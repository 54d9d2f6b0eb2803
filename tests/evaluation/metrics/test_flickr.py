"""Recall on the release of Flickr30k Entities: the official numbers, what is scored, files that are refused."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from glip_jax.evaluation.metrics import flickr
from glip_jax.evaluation.metrics.files import MetricError

MADE = Path(__file__).parents[2] / "fixtures/eval_parity/flickr_made"
MAN, HAT = [10, 10, 60, 110], [20, 0, 40, 20]
XML = """<annotation><size><width>200</width><height>150</height><depth>3</depth></size>
<object><name>1</name><bndbox><xmin>10</xmin><ymin>10</ymin><xmax>60</xmax><ymax>110</ymax></bndbox></object>
<object><name>1</name><name>2</name><bndbox><xmin>20</xmin><ymin>0</ymin><xmax>40</xmax><ymax>20</ymax></bndbox></object>
<object><name>2</name><bndbox><xmin>100</xmin><ymin>100</ymin><xmax>100</xmax><ymax>100</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object>
</annotation>"""
SENTENCES = """[/EN#1/people A man] in [/EN#3/scene the street] , [/EN#2/clothing/other a hat] .
[/EN#0/notvisual It] rains .

The hat of [/EN#1/people A man] .
"""


@pytest.fixture
def release(tmp_path):
    """A release of one image with three sentences, of which two are scored."""
    for folder, name, text in (("Annotations", "7.xml", XML), ("Sentences", "7.txt", SENTENCES)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    (tmp_path / "val.txt").write_text("7\n")
    return tmp_path


def _score(release, rows):
    rows = [
        {"image_id": id, "sentence_id": each, "boxes": boxes}
        for id, (each, boxes) in zip(itertools.cycle([7, "7"]), rows)
    ]
    (release / "found.json").write_text(json.dumps(rows))
    return flickr.score(str(release), str(release / "found.json"))


def test_official_numbers():
    found = flickr.score(str(MADE), str(MADE / "predictions.json"))
    assert found.pop("counts") == {"duplicate_predictions": 0, "unlisted_predictions": 0}
    assert found == json.loads((MADE / "expected.json").read_text())


def test_sentences_are_read_as_they_are_scored(release):
    (release / "lists").mkdir()
    shutil.copy(release / "val.txt", release / "lists/first.txt")
    first, rain, last = flickr.read_sentences(str(release / "lists/first.txt"), str(release))
    assert [(each.text, each.chain, each.types) for each in first.phrases] == [
        ("A man", "1", ("people",)), ("a hat", "2", ("clothing", "other"))
    ]  # fmt: skip
    assert first.phrases[0].boxes.tolist() == [MAN, HAT]
    assert (rain.index, rain.phrases, last.index) == (1, (), 2)


def test_ranks_types_and_protocols(release):
    far = [150, 0, 160, 10]
    found = _score(release, [
        (2, [[far] * 5 + [MAN]]),  # found at 10
        # Any-box at 1; merged-box never. The hat: a box without an area beside one of the truth makes the maximum nan.
        (0, [[HAT, far], [HAT, [0, 0, 0, 0]]]),
        (0, [[far], [far]]),  # the second prediction of a sentence
        (1, [[MAN]]),  # not scored
    ])  # fmt: skip
    assert found["any_box"]["1"] == {"all": 2 / 3, "people": 1 / 2, "clothing": 1, "other": 1}
    assert found["any_box"]["10"] == found["any_box"]["-1"] == {"all": 2 / 3, "people": 1, "clothing": 0, "other": 0}
    assert found["merged_boxes"]["-1"] == {"all": 1 / 3, "people": 1 / 2, "clothing": 0, "other": 0}
    assert (found["phrases"], found["sentences"]) == (3, 2)
    assert found["counts"] == {"duplicate_predictions": 1, "unlisted_predictions": 1}
    assert _score(release, [(0, [[], []]), (2, [[]])])["any_box"]["-1"]["all"] == 0


def test_predictions_that_cannot_be_scored(release):
    for rows, message in (
        ([(0, [[], []])], "lack 1 of 2 sentences .* first sentence 2 of image 7"),
        ([(0, [[]]), (2, [[]])], "sentence 0 of image 7: boxes has 1 lists, expected 2"),
        ([(0, [[[1, 2, 3]], []])], r"boxes\[0\]\[0\] is \[1, 2, 3\], expected four finite numbers"),
        ([("a", [])], "sentence_id 'a', expected an integer"),
        ([(0, [5])], "expected a list of boxes for each phrase"),
    ):
        with pytest.raises(MetricError, match=message):
            _score(release, rows)


def test_a_release_that_is_not_whole(release):
    (release / "val.txt").write_text("7\n8\n")
    with pytest.raises(MetricError, match=r"2 of the 4 files of the images in .*val.txt do not exist, first .*8\.xml"):
        _score(release, [])
    (release / "val.txt").write_text("7\n7\n")
    with pytest.raises(MetricError, match="lists 1 images twice, first 7"):
        _score(release, [])
    (release / "val.txt").write_text("7\n")
    (release / "Annotations/7.xml").write_text(XML[:200])
    with pytest.raises(MetricError, match=r"7\.xml cannot be read"):
        _score(release, [])
    shutil.rmtree(release / "Annotations")
    (release / "val.txt").unlink()
    with pytest.raises(MetricError, match=r"none of test\.txt, val\.txt, train\.txt"):
        _score(release, [])
