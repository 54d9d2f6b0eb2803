"""The original GLIP's TSV containers, of boxes with names and of pseudo-labelled captions."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from glip_jax.data.importers.entry import SourceError, make_record
from glip_jax.data.importers.tsv import open_tsv
from glip_jax.data.records import Record
from tests.data.conftest import write_image

DETECTION = [
    [{"class": "dog", "rect": [1, 2, 9, 10], "conf": 0.9}, {"class": "person", "rect": [3.5, 4, 31, 23]}],
    {"objects": [{"class": "person", "rect": [0, 0, 4, 4]}]},
    [],
]
V1 = {
    "img_h": 24, "img_w": 32, "caption": "a man near two dogs",
    "bboxes": [[1, 2, 9, 10], [3, 4, 31, 23]], "scores": [0.9, 0.5], "tokens_positive": [[[2, 5]], [[11, 14], [15, 19]]],
}  # fmt: skip
V2 = V1 | {"bboxes": [[[1, 2, 9, 10]], [[3, 4, 31, 23], [0, 0, 5, 5]]], "scores": [[0.9], [0.5, 0.25]]}


def write_tsv(path: Path, rows: list[list[str]], index: bool = True) -> None:
    lines = [("\t".join(row) + "\n").encode() for row in rows]
    path.write_bytes(b"".join(lines))
    if index:
        offsets = [sum(map(len, lines[:i])) for i in range(len(lines))]
        path.with_suffix(".lineidx").write_text("".join(f"{offset}\n" for offset in offsets))


def container(folder: Path, labels: list[Any], columns: int = 2, index: bool = True) -> Path:
    """train.yaml with pictures of 24 x 32 in rows of `columns` columns."""
    keys, pictures = [f"k{i}" for i in range(len(labels))], []
    for i, key in enumerate(keys):
        write_image(folder / "one.jpg", 24, 32, i)
        cells = [key, *["x"] * (columns - 2), base64.b64encode((folder / "one.jpg").read_bytes()).decode()]
        pictures.append(cells)
    write_tsv(folder / "train.img.tsv", pictures, index)
    write_tsv(folder / "train.label.tsv", [[k, json.dumps(label)] for k, label in zip(keys, labels)], index)
    write_tsv(folder / "train.hw.tsv", [[k, json.dumps([{"height": 24, "width": 32}])] for k in keys], index)
    (folder / "map.json").write_text(json.dumps({"label_to_idx": {"person": 2, "dog": 1, "__background__": 0}}))
    fields = {"img": "train.img.tsv", "label": "train.label.tsv", "hw": "train.hw.tsv", "labelmap": "map.json"}
    (folder / "train.yaml").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()))
    return folder / "train.yaml"


def read(path: Path, kind: Any = "detection", **options: Any) -> tuple[list[Record], Any]:
    opened = open_tsv(path, kind=kind, **options)
    records = [make_record(entry, opened.images, opened.report) for entry in opened.entries]
    return [record for record in records if record is not None], opened


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("index", [True, False])
def test_detection(tmp_path: Path, columns: int, index: bool) -> None:
    records, opened = read(container(tmp_path, DETECTION, columns, index))
    assert opened.names == ("dog", "person")
    assert opened.count == 3
    assert [record.id for record in records] == ["k0", "k1", "k2"]
    # rect is already inclusive.
    assert records[0].boxes.tolist() == [[1, 2, 9, 10], [3.5, 4, 31, 23]]
    assert records[0].categories == (0, 1)
    assert records[1].categories == (1,)
    assert records[2].boxes.shape == (0, 4)
    assert not opened.report.dropped
    assert {file.name for file in opened.inputs} == {"train.yaml", "train.label.tsv", "train.hw.tsv", "map.json"}


def test_pseudo_labels_of_both_versions(tmp_path: Path) -> None:
    records, opened = read(container(tmp_path, [V1, V2]), "pseudo")
    first, second = records
    assert (first.kind, first.caption, first.scores) == ("pseudo", "a man near two dogs", (0.9, 0.5))
    assert first.spans == (((2, 5),), ((11, 14), (15, 19)))
    assert second.boxes.tolist() == [[1, 2, 9, 10], [3, 4, 31, 23], [0, 0, 5, 5]]
    # Every box of an entity has all spans of the entity.
    assert second.spans == (first.spans[0], first.spans[1], first.spans[1])
    assert second.scores == (0.9, 0.5, 0.25)
    assert not opened.report.dropped


def test_a_line_list_repeats_rows_or_is_noted(tmp_path: Path) -> None:
    path = container(tmp_path, DETECTION)
    (tmp_path / "cas.linelist").write_text("2\n0\n2\n2\n9\nx\n")
    path.write_text(path.read_text() + "linelist: cas.linelist\n")
    records, opened = read(path)
    assert [record.id for record in records] == ["k0", "k2"]
    assert opened.report.noted == {"row: mentioned again in the linelist": 2}
    assert opened.report.dropped == {"row: not there": 2}
    records, opened = read(path, oversample=True)
    assert [record.id for record in records] == ["k0", "k2", "k2*2", "k2*3"]


def test_images_by_id(tmp_path: Path) -> None:
    path = container(tmp_path, [V1 | {"img_id": "b"}, V2 | {"img_id": "a"}, V1 | {"img_id": "z"}])
    (tmp_path / "id2idx.json").write_text(json.dumps({"a": 0, "b": 2}))
    path.write_text(path.read_text() + "imageid2idx: id2idx.json\n")
    records, opened = read(path, "pseudo")
    assert [record.id for record in records] == ["k2", "k0"]
    assert opened.report.dropped == {"image: id not listed": 1}


def test_label_maps_as_a_bare_object_and_as_a_tsv(tmp_path: Path) -> None:
    path = container(tmp_path, DETECTION)
    (tmp_path / "map.json").write_text(json.dumps({"person": 1, "dog": 7}))
    assert read(path)[1].names == ("person", "dog")
    (tmp_path / "map.tsv").write_text("person\ndog\t5\n")
    path.write_text(path.read_text().replace("labelmap: map.json", "labelmap: map.tsv"))
    records, opened = read(path)
    assert opened.names == ("person", "dog")
    assert records[0].categories == (1, 0)


def test_sizes_as_two_numbers(tmp_path: Path) -> None:
    path = container(tmp_path, DETECTION)
    write_tsv(tmp_path / "train.hw.tsv", [["k0", "24 32"], ["k1", "25 32"], ["k2", "?"]])
    records, opened = read(path)
    assert [record.id for record in records] == ["k0", "k2"]
    assert opened.report.dropped == {"image: size differs": 1, "box: image dropped": 1}
    assert opened.report.noted == {"image: size unreadable, taken from the picture": 1}


BOX = {"class": "dog", "rect": [1, 2, 9, 10]}


@pytest.mark.parametrize(
    ("kind", "label", "reason"),
    [
        ("detection", None, "image: label without objects"),
        ("detection", {"boxes": []}, "image: label without objects"),
        ("detection", [5], "box: class or rect missing"),
        ("detection", [{"class": "dog"}], "box: class or rect missing"),
        ("detection", [BOX | {"class": "cat"}], "box: category not listed"),
        ("detection", [BOX | {"class": ["dog"]}], "box: category not listed"),
        ("detection", [BOX | {"rect": [1, 2, 3]}], "box: not four numbers"),
        ("detection", [BOX | {"rect": [1, 2, float("nan"), 10]}], "box: not finite"),
        ("detection", [BOX | {"rect": [9, 2, 1, 10]}], "box: no area"),
        ("pseudo", [], "image: label without caption"),
        ("pseudo", V1 | {"caption": None}, "image: label without caption"),
        ("pseudo", V1 | {"scores": [1]}, "image: label lists differ"),
        ("pseudo", V1 | {"bboxes": 3}, "image: label lists differ"),
        ("pseudo", V1 | {"scores": [0.9, "x"]}, "box: score is no number"),
        ("pseudo", V1 | {"scores": [0.9, 1.5]}, "box: score outside (0, 1]"),
        ("pseudo", V1 | {"tokens_positive": [[[2, 5]], [[11, 99]]]}, "span: beyond the caption"),
        ("pseudo", V1 | {"bboxes": [[1, 2, 3, 4], 7]}, "box: not four numbers"),
        ("pseudo", V2 | {"scores": [[0.9], [0.5]]}, "box: boxes and scores of an entity differ"),
        ("pseudo", V1 | {"img_h": 25}, "image: size differs"),
    ],
)
def test_invalid_labels_are_counted(tmp_path: Path, kind: Any, label: Any, reason: str) -> None:
    path = container(tmp_path, [label, DETECTION[0] if kind == "detection" else V1])
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("hw")))
    records, opened = read(path, kind)
    assert records[-1].id == "k1"
    assert reason in opened.report.dropped
    with pytest.raises(SourceError):
        read(path, kind, strict=True)


def test_invalid_rows_are_counted(tmp_path: Path) -> None:
    path = container(tmp_path, [DETECTION[0]] * 5)
    good = json.dumps(DETECTION[0])
    write_tsv(tmp_path / "train.label.tsv", [["k0"], ["k1", "{"], ["other", good], ["k3", good], ["k4", good]])
    rows = [line.split("\t") for line in (tmp_path / "train.img.tsv").read_text().splitlines()]
    rows[3][1] = "!no base64!"
    write_tsv(tmp_path / "train.img.tsv", rows)
    records, opened = read(path)
    assert [record.id for record in records] == ["k4"]
    assert opened.report.dropped == {
        "image: row without label": 1, "image: no JSON": 1, "image: keys differ": 1, "image: file unreadable": 1,
        "box: image dropped": 2,
    }  # fmt: skip


def test_an_offset_inside_a_row_is_refused(tmp_path: Path) -> None:
    path = container(tmp_path, DETECTION)
    rows = [[f"k{i}", base64.b64encode(bytes(9000)).decode()] for i in range(3)]
    write_tsv(tmp_path / "train.img.tsv", rows)
    index = tmp_path / "train.img.lineidx"
    first, second, third = index.read_text().split()
    index.write_text(f"{first}\n{second}\n{int(third) + 3}\n")
    with pytest.raises(SourceError, match="line 3 and the one after do not bound a row of train.img.tsv"):
        read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "train.yaml").write_text("img: ["), "is not valid yaml"),
        (lambda p: (p / "train.yaml").write_text("5"), "expected `img: FILE.tsv`"),
        (lambda p: (p / "train.yaml").write_text("img: train.img.tsv"), "expected `img: FILE.tsv`"),
        (lambda p: (p / "train.yaml").unlink(), "cannot be read"),
        (lambda p: (p / "train.label.tsv").unlink(), "label names train.label.tsv, which is not beside it"),
        (lambda p: (p / "train.label.lineidx").write_text("0\nx\n"), "line 2: found b'x', expected the byte"),
        (lambda p: (p / "train.label.lineidx").write_text("0\n9999999\n"), "below"),
        (lambda p: (p / "train.label.lineidx").write_text("3\n"), "begins with 3, expected 0"),
        (lambda p: (p / "train.label.lineidx").write_text("0\n5\n9\n"), "do not bound a row"),
        (lambda p: write_tsv(p / "train.label.tsv", [["k0", "[]"]]), "has 3 rows and train.label.tsv 1"),
        (lambda p: write_tsv(p / "train.hw.tsv", [["k0", "[]"]]), "train.hw.tsv has 1 rows"),
        (lambda p: write_tsv(p / "train.label.tsv", []), "train.label.tsv is empty"),
        (lambda p: (p / "map.json").write_text("["), "label map .* cannot be read as JSON"),
        (lambda p: (p / "map.json").write_text('{"a": "b"}'), "expected an object from name to number"),
        (lambda p: (p / "map.json").write_text('{"a": 1, "b": 1}'), "gives two names the same number"),
        (lambda p: (p / "map.json").write_text('{"a": 0}'), "no name besides the background"),
    ],
)
def test_errors_of_the_whole_file_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    path = container(tmp_path, DETECTION)
    change(tmp_path)
    with pytest.raises(SourceError, match=message):
        read(path)
