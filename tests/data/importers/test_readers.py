"""Streamed reading of JSON files, NaN and Infinity included, and joins of images and annotations."""

import json
import random
import tracemalloc
from pathlib import Path

import pytest

from glip_jax.data.importers import readers
from glip_jax.data.importers.entry import SourceError
from glip_jax.data.importers.readers import Join, JsonFile


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"not JSON that can be used \(parse error: premature EOF\)"),
        (b"", "not JSON that can be used"),
        (b"\xff\xfe", "is text in UTF-16: save it as UTF-8"),
        (b"[]", "holds a list, expected an object with a"),
        (b"3", "holds a number"),
        (b'{"a":{}}', "expected a list under 'a', found dict"),
        (b'{"a":null}', "expected a list under 'a', found null"),
        (b'{"b":[]}', "expected a list under 'a', found nothing"),
        (b'{"a":[{},5]}', r"a\[1\] is 5, expected an object"),
        (b'{"a":[{"x":1e999}]}', "numeric .* overflow"),
        (b'{"a":[{"x":123456789012345678901234567890}]}', "integer overflow, near"),
        (b'{"a":' + b"[" * 1000, "nests 64 deep"),
    ],
)
def test_invalid_json_gives_a_one_line_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(SourceError, match=message) as found:
        list(JsonFile(tmp_path / "x.json").objects("a"))
    assert "\n" not in str(found.value) and "x.json" in str(found.value)


@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_nan_and_infinity_are_texts_at_any_block_boundary(tmp_path, monkeypatch, block):
    monkeypatch.setattr(readers, "_BLOCK", block)
    chosen = random.Random(0)
    numbers = {float("inf"): "Infinity", float("-inf"): "-Infinity"}
    values = [float("nan"), *numbers, 1.5, "NaN", 'a \\" NaN, ', 'say "NaN"', "-Infinity\\", "\u00e9 NaN"]
    for _ in range(60):
        items = [{"k": chosen.choice(values), "l": [chosen.choice(values)]} for _ in range(5)]
        (tmp_path / "x.json").write_text(json.dumps({"a": items, "b": "NaN"}))
        wanted = json.loads(json.dumps(items), parse_constant=str)
        assert list(JsonFile(tmp_path / "x.json").objects("a")) == wanted


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    def peak(count):
        note = {"bbox": [1.5, 2, 3, 4], "segmentation": [[1.5] * 40]}
        with (tmp_path / "x.json").open("w") as file:
            file.write('{"images": [' + ",".join(json.dumps({"id": i}) for i in range(count)) + '], "annotations": [')
            file.write(",".join(json.dumps(note | {"id": i, "image_id": i}) for i in range(count)) + "]}")
        data, join = JsonFile(tmp_path / "x.json"), Join(tmp_path)
        tracemalloc.start()
        join.add_images((item["id"], []) for item in data.objects("images"))
        join.add_annotations((item["image_id"], item["id"], item["bbox"]) for item in data.objects("annotations"))
        assert sum(len(notes) for _, _, notes in join) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    monkeypatch.setattr(readers, "_BLOCK", 1 << 13)
    assert peak(6000) < 1.1 * peak(1500) + 50_000


def test_a_join_keeps_order_and_finds_unmatched_annotations(tmp_path):
    join = Join()
    join.add_annotations([("b", 1, ["x"]), (2, 2, ["y"]), ("b", 3, ["z"]), (10**30, 4, [])])
    join.add_images([(2, ["two"]), ("b", ["bee"]), ("2", ["text"])])
    assert list(join) == [(2, ["two"], [(2, ["y"])]), ("b", ["bee"], [(1, ["x"]), (3, ["z"])]), ("2", ["text"], [])]
    assert list(join.without_image()) == [(4, f"integer {10**30}")]
    assert join.count == 3 and join.duplicate_key("images") is None and join.duplicate_key("annotations") is None
    join.add_annotations([(2, 3, []), (2, None, []), (2, None, [])])
    assert join.duplicate_key("annotations") == 3
