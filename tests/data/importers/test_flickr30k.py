"""Flickr30k Entities as released: sentences with markup and XML of boxes become grounding records."""

import json
from pathlib import Path
from typing import Any

import pytest

from glip_jax.data.importers.entry import SourceError, make_record
from glip_jax.data.importers.flickr30k import open_flickr30k, plain_sentence
from glip_jax.data.records import Record
from tests.data.conftest import write_image
from tests.run_job import run_job

SENTENCES = """[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at [/EN#3/bodyparts their hands] .
[/EN#1/people Two men] in [/EN#4/clothing/other green shirts] stand in [/EN#5/scene a yard] .
[/EN#5/scene A garden] on [/EN#0/notvisual a day] .
"""

XML = """<annotation>
  <filename>1000.jpg</filename>
  <size><width>32</width><height>24</height><depth>3</depth></size>
  <object><name>1</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax></bndbox></object>
  <object><name>1</name><name>4</name>
    <bndbox><xmin>12</xmin><ymin>2</ymin><xmax>32</xmax><ymax>24</ymax></bndbox></object>
  <object><name>2</name><bndbox><xmin>3</xmin><ymin>2</ymin><xmax>6</xmax><ymax>5</ymax></bndbox></object>
  <object><name>5</name><scene>1</scene><nobndbox>0</nobndbox></object>
  <object><name>3</name><scene>0</scene><nobndbox>1</nobndbox></object>
</annotation>
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for folder in ("Annotations", "Sentences", "images"):
        (tmp_path / folder).mkdir()
    (tmp_path / "Annotations" / "1000.xml").write_text(XML)
    (tmp_path / "Sentences" / "1000.txt").write_text(SENTENCES)
    (tmp_path / "train.txt").write_text("1000\n")
    write_image(tmp_path / "images" / "1000.jpg", 24, 32, 0)
    return tmp_path


def read(place: Path, **options: Any) -> tuple[list[Record], Any]:
    opened = open_flickr30k(place, place / "images", **options)
    records = [make_record(entry, opened.images, opened.report) for entry in opened.entries]
    return [record for record in records if record is not None], opened.report


def test_markup_is_removed_and_spans_refer_to_the_caption() -> None:
    caption, phrases = plain_sentence(SENTENCES.splitlines()[0])
    assert caption == "Two young guys with shaggy hair look at their hands ."
    assert [(chain, caption[b:e]) for chain, (b, e) in phrases] == [
        ("1", "Two young guys"), ("2", "shaggy hair"), ("3", "their hands"),
    ]  # fmt: skip


def test_spaces_in_markup_are_not_part_of_a_phrase() -> None:
    assert plain_sentence("[/EN#1/people  A man ] sits") == ("A man sits", [("1", (0, 5))])


def test_not_visual_phrases_have_no_box(place: Path) -> None:
    (place / "Annotations" / "1000.xml").write_text(XML.replace("<name>2</name>", "<name>0</name>"))
    (place / "Sentences" / "1000.txt").write_text(SENTENCES.splitlines()[0].replace("EN#2", "EN#0"))
    ((record,), report) = read(place)
    assert len(record.boxes) == 2
    assert [record.caption[b:e] for ((b, e),) in record.unknown] == ["their hands"]
    assert report.noted == {"phrase: without a box, kept as unknown": 1, "phrase: not visual, kept as text": 1}


def test_a_sentence_is_a_record_with_every_pair_of_phrase_and_box(place: Path) -> None:
    records, report = read(place)
    first, second = records
    assert (first.id, first.kind, first.height, first.width) == ("1000#1", "grounding", 24, 32)
    # Pixels from 0; the release counts from 1.
    assert first.boxes.tolist() == [[0, 1, 9, 19], [11, 1, 31, 23], [2, 1, 5, 4]]
    assert [first.caption[b:e] for ((b, e),) in first.spans] == ["Two young guys", "Two young guys", "shaggy hair"]
    # A box with two names belongs to both phrases.
    assert second.boxes.tolist() == [[0, 1, 9, 19], [11, 1, 31, 23], [11, 1, 31, 23]]
    assert [second.caption[b:e] for ((b, e),) in second.spans] == ["Two men", "Two men", "green shirts"]
    assert report.dropped == {"image: sentence without a box": 1}
    assert [[record.caption[b:e] for ((b, e),) in record.unknown] for record in records] == [
        ["their hands"],
        ["a yard"],
    ]
    assert report.noted == {"phrase: without a box, kept as unknown": 2}
    assert report.kept["images"] == 2 and report.kept["boxes"] == 6


def test_a_split_list_selects_and_orders_images(place: Path) -> None:
    (place / "Sentences" / "7.txt").write_text("[/EN#9/other A cat] sleeps .\n")
    (place / "Annotations" / "7.xml").write_text(
        "<annotation><size><width>32</width><height>24</height></size><object><name>9</name><bndbox><xmin>1</xmin>"
        "<ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"
    )
    write_image(place / "images" / "7.jpg", 24, 32, 1)
    assert [record.id for record in read(place)[0]] == ["1000#1", "1000#2", "7#1"]
    assert [record.id for record in read(place, split=place / "train.txt")[0]] == ["1000#1", "1000#2"]
    (place / "x.txt").write_text("A secret .")
    (place / "val.txt").write_text("7\n7\n8\n../x\n")
    records, report = read(place, split=place / "val.txt")
    assert [record.id for record in records] == ["7#1"]
    assert report.dropped == {"image: listed twice": 1, "image: no sentence file": 2}


@pytest.mark.parametrize(
    ("file", "old", "new", "reason", "example"),
    [
        ("Sentences/1000.txt", "[/EN#1/people Two young", "[/EN#1 Two young", "image: sentence with broken markup", "sentence 1"),
        ("Sentences/1000.txt", "[/EN#1/people Two young", "[/en#1/people Two young",
         "image: sentence with broken markup", "sentence 1"),
        ("Sentences/1000.txt", SENTENCES, " \n", "image: no sentence", "1000.txt is empty"),
        ("Sentences/1000.txt", "shaggy hair]", "shaggy hair", "image: sentence with broken markup", "expected [/EN#CHAIN/TYPE"),
        ("Sentences/1000.txt", "shaggy hair]", " ]", "phrase: no words", "chain 2"),
        ("Annotations/1000.xml", "<xmin>3<", "<xmin>x<", "box: not four numbers", "object 2"),
        ("Annotations/1000.xml", "<ymax>5</ymax>", "", "box: not four numbers", "expected xmin"),
        ("Annotations/1000.xml", "<xmin>3<", "<xmin>nan<", "box: not finite", "object 2 for chain 2"),
        ("Annotations/1000.xml", "<xmax>6<", "<xmax>2<", "box: no area", "object 2 for chain 2"),
        ("Annotations/1000.xml", "</object>", "", "image: annotation file is no XML", "1000.xml"),
        ("Annotations/1000.xml", "<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>',
         "image: annotation file is no XML", "EntitiesForbidden"),
        ("Annotations/1000.xml", "<width>32", "<width>33", "image: size differs", "(24, 33)"),
    ],
)  # fmt: skip
def test_invalid_items_are_counted(place: Path, file: str, old: str, new: str, reason: str, example: str) -> None:
    text = (place / file).read_text()
    assert old in text
    (place / file).write_text(text.replace(old, new, 1))
    _, report = read(place)
    assert report.dropped[reason] >= 1
    assert example in report.first[reason]
    with pytest.raises(SourceError):
        read(place, strict=True)


def test_a_box_with_coordinate_zero_is_noted(place: Path) -> None:
    (place / "Annotations" / "1000.xml").write_text(XML.replace("<xmin>3<", "<xmin>0<"))
    records, report = read(place)
    assert records[0].boxes.tolist()[2] == [0, 1, 5, 4]
    assert report.noted["box: begins before pixel 1, cut there"] == 1


def test_missing_files_are_refused(place: Path) -> None:
    (place / "Annotations" / "1000.xml").unlink()
    assert read(place)[1].dropped == {"image: no annotation file": 1}
    (place / "Sentences" / "1000.txt").unlink()
    with pytest.raises(SourceError, match="has no ID.txt"):
        read(place)
    with pytest.raises(SourceError, match="absent.txt cannot be read"):
        read(place, split=place / "absent.txt")
    with pytest.raises(SourceError, match="with Sentences/, found no such folder"):
        open_flickr30k(place / "images", place / "images")


def test_a_changed_sentence_invalidates_the_index(place: Path, tmp_path: Path) -> None:
    def report(name: str) -> dict[str, Any]:
        command = ["flickr30k", str(place), f"--images={place}/images", f"--out={tmp_path}/{name}", "--processes=1"]
        assert run_job("data", command) == 0
        return json.loads((tmp_path / name / "report.json").read_text())

    first, same = report("one"), report("two")
    (place / "Sentences" / "1000.txt").write_text(SENTENCES.replace("shaggy", "curly"))
    other = report("three")
    assert first["inputs_sha256"] == same["inputs_sha256"] != other["inputs_sha256"]
    assert [Path(item["file"]).name for item in first["inputs"]] == ["Sentences", "Annotations"]
    assert first["inputs"][0]["bytes"] == len(SENTENCES)
