"""Folders of shards: complete or absent, written once, read lazily, errors that name the damage."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from glip_jax.data import shards
from glip_jax.data.records import Record, RecordError, boxes_array, content_hash
from glip_jax.data.shards import ShardError, Shards


def records(count: int, failing: int = -1):
    for i in range(count):
        if i == failing:
            raise KeyboardInterrupt
        yield Record(str(i), "detection", b"image %d" % i, 10 + i, 20, boxes_array([(0, 0, 5, 5)]), (i % 2,))


@pytest.mark.parametrize(("count", "files"), [(7, 3), (2, 3), (4, 1)])
def test_columns_are_in_reading_order(tmp_path: Path, count: int, files: int) -> None:
    manifest = shards.write(records(count), tmp_path / "s", name="s", names=["a", "b"], shards=files)
    opened = Shards(tmp_path / "s")
    assert len(opened) == manifest.records == manifest.boxes == count
    assert sum(entry["records"] for entry in manifest.shards) == count
    found = [opened[i] for i in range(count)]
    assert sorted(r.id for r in found) == [str(i) for i in range(count)]
    assert [r.height for r in found] == opened.height.tolist()
    assert [content_hash(r.image) for r in found] == opened.hash.tolist()
    assert set(opened.kind.tolist()) == {0}
    assert shards.verify(tmp_path / "s")


def test_manifest_records_the_origin(tmp_path: Path) -> None:
    shards.write(
        records(2), tmp_path / "s", name="n", names=["a", "b"], licence="CC0", source="a.json", command="make it",
        drops=lambda: {"box: no area": 3},
    )  # fmt: skip
    fields = json.loads((tmp_path / "s" / "manifest.json").read_text())
    expected = {"name": "n", "names": ["a", "b"], "licence": "CC0", "source": "a.json", "command": "make it"}
    assert fields | expected == fields
    assert fields["drops"] == {"box: no area": 3}
    assert fields["kinds"] == {"detection": 2}


def test_a_finished_folder_is_not_overwritten(tmp_path: Path) -> None:
    first = shards.write(records(2), tmp_path / "s", name="s", names=["a", "b"])
    assert shards.finished(tmp_path / "s") == first
    with pytest.raises(ShardError, match="finished: existing shards are never overwritten"):
        shards.write(records(2), tmp_path / "s", name="s", names=["a", "b"])


def test_an_interrupted_import_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        shards.write(records(5, failing=3), tmp_path / "s", name="s", names=["a", "b"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ShardError, match="has no records"):
        shards.write(records(0), tmp_path / "s", name="s")
    with pytest.raises(ShardError, match="record '1' has category 1, there are 1 names"):
        shards.write(records(2), tmp_path / "s", name="s", names=["a"])
    assert list(tmp_path.iterdir()) == []


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ShardError, match="not empty, without a manifest"):
        shards.write(records(2), tmp_path, name="s", names=["a", "b"])
    assert (tmp_path / "mine.txt").exists()
    with pytest.raises(ShardError, match="is a file: expected the name of a new folder"):
        shards.write(records(2), tmp_path / "mine.txt", name="s", names=["a", "b"])


def test_pickles_and_reads_after_it(tmp_path: Path) -> None:
    shards.write(records(3), tmp_path / "s", name="s", names=["a", "b"])
    opened = Shards(tmp_path / "s")
    assert opened[0].id == "0"
    assert pickle.loads(pickle.dumps(opened))[1].id == "1"


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="expected a folder of shards with a manifest.json"):
        Shards(tmp_path / "absent")
    shards.write(records(3), tmp_path / "s", name="s", names=["a", "b"])
    file = next((tmp_path / "s").glob("*.array_record"))
    data = bytearray(file.read_bytes())
    damaged = data.copy()
    for i in range(len(data) // 2, len(data) // 2 + 40):
        damaged[i] ^= 0xFF
    file.write_bytes(damaged)
    with pytest.raises(ShardError, match="sha256"):
        shards.verify(tmp_path / "s")
    file.write_bytes(data[:-5])
    with pytest.raises(ShardError, match=r"manifest says \d+ bytes, found \d+"):
        Shards(tmp_path / "s")
    file.write_bytes(data)
    np.savez(tmp_path / "s" / "columns.npz", height=np.zeros(1))
    with pytest.raises(ShardError, match=r"columns\.npz cannot be read"):
        Shards(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="is not a manifest"):
        Shards(tmp_path / "s")


def test_a_damaged_block_is_a_corrupt_record(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def large():
        for i in range(40):
            yield Record(str(i), "detection", rng.bytes(8000), 10, 20, boxes_array([]))

    shards.write(large(), tmp_path / "s", name="s", names=["a"])
    file = next((tmp_path / "s").glob("*.array_record"))
    data = bytearray(file.read_bytes())
    data[100_000:101_000] = bytes(1000)
    file.write_bytes(data)
    opened, bad = Shards(tmp_path / "s"), 0
    for i in range(40):
        try:
            opened[i]
        except RecordError:
            bad += 1
    assert 0 < bad < 40
