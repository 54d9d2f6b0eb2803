"""Shards in a bucket: the same bytes as from a local folder, whatever the storage does meanwhile, or one clear line.

Against an emulator on loopback, behind a proxy that injects faults (`tests.io.faulty_storage`).
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from glip_jax.__main__ import main
from glip_jax.config import SourceConfig
from glip_jax.data import shard_cache, shards
from glip_jax.data.importers.build import excluded_hashes
from glip_jax.data.mixture import Mixture
from glip_jax.data.records import Record, RecordError, boxes_array
from glip_jax.data.shards import ShardError, Shards
from glip_jax.distributed import exit_codes
from glip_jax.io import gcs
from glip_jax.io.gcs import StorageError
from glip_jax.io.paths import PathError
from tests.data.importers.test_build import command, contents, same_but_for_the_command, source, whole  # noqa: F401 (fixtures)
from tests.data.test_mixture import config, digest, draw
from tests.io.faulty_storage import FAULTS
from tests.run_job import run_job

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4


@pytest.fixture
def bucket(running, tmp_path, monkeypatch) -> str:
    """A new bucket, and a cache of its own; with short timeouts, and retries for longer than all injected errors."""
    return running.fresh(monkeypatch, tmp_path / "cache", timeout=0.4, retry_seconds=60)


def send(folder: Path, place: str) -> str:
    gcs.upload_files({path.name: path for path in folder.iterdir()}, place, "manifest.json")
    return place


@pytest.fixture
def remote(folders, bucket) -> dict[str, SourceConfig]:
    return {
        "boxes": SourceConfig(send(folders["boxes"], f"{bucket}/boxes"), 3.0),
        "captions": SourceConfig(send(folders["captions"], f"{bucket}/captions"), 1.0),
    }


@pytest.fixture(scope="module")
def expected(folders) -> list[str]:
    """Digests of the local folders' first batches."""
    local = {"boxes": SourceConfig(str(folders["boxes"]), 3.0), "captions": SourceConfig(str(folders["captions"]), 1.0)}
    return [digest(batch) for batch in draw(Mixture(config(local)), STEPS)]


def pictures(count: int, size: int = 8000) -> Iterator[Record]:
    rng = np.random.default_rng(0)
    for i in range(count):
        yield Record(str(i), "detection", rng.bytes(size + 37 * i), 10, 20, boxes_array([]))


def test_ends_of_records_follow_the_riegeli_format(tmp_path):
    # Small ones, one longer than a block, ones that end near the end of a block: the range alone is enough to read a record.
    sizes = [1, 30, 65_400, 65_536, 65_537, 131_072, 200_000, *range(60_000, 60_060, 7), 5] * 2
    rng = np.random.default_rng(1)
    made = [Record(str(i), "detection", rng.bytes(n), 1, 1, boxes_array([])) for i, n in enumerate(sizes)]
    shards.write(made, tmp_path / "s", name="s", shards=2)
    with np.load(tmp_path / "s" / "columns.npz") as columns:
        ends = columns["end"]
    (file, *_) = sorted((tmp_path / "s").glob("*.array_record"))
    assert (np.diff(ends[: len(sizes) // 2].astype(np.int64)) > 0).all()
    with pytest.raises(OSError, match="has no record"):
        shard_cache.record_ends(file, len(sizes))
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "grouped"), "group_size:4")
    for _ in range(8):
        writer.write(b"abc")
    writer.close()
    with pytest.raises(OSError, match="in a chunk of its own"):
        shard_cache.record_ends(tmp_path / "grouped", 8)


def test_batches_from_the_bucket_equal_those_from_the_disk(remote, expected, running, tmp_path):
    mixture = Mixture(config(remote))
    assert [digest(batch) for batch in draw(mixture, STEPS)] == expected
    for opened in mixture.shards:
        before = [opened.read(index) for index in range(len(opened))]
        asked = running.requests.total()
        assert [opened.read(index) for index in range(len(opened))] == before
        assert running.requests.total() == asked  # the records are cached now
    assert all(
        path.stat().st_blocks * 512 < path.stat().st_size + 4096
        for path in (tmp_path / "cache/shards").glob("*.sparse")
    )


def test_faults_cost_time_but_no_record(remote, expected, running):
    with running.arm(share=0.3, stall=1.0) as injected:
        assert [digest(batch) for batch in draw(Mixture(config(remote, threads=8)), STEPS)] == expected
    assert set(injected) == set(FAULTS) and injected.total() > 20


@pytest.mark.slow
def test_worker_processes_share_a_small_cache_despite_faults(remote, expected, running, monkeypatch):
    monkeypatch.setenv("GLIP_JAX_CACHE_GB", "0.0004")
    with running.arm("503", "reset", "truncate", share=0.3) as injected:
        assert [digest(batch) for batch in draw(Mixture(config(remote, workers=2)), STEPS)] == expected
    assert injected.total() > 10


def test_a_cache_smaller_than_the_data_gives_the_same_records(bucket, tmp_path, monkeypatch):
    shards.write(pictures(60, 30_000), tmp_path / "s", name="s", shards=6)
    place, local = send(tmp_path / "s", f"{bucket}/s"), Shards(tmp_path / "s")
    monkeypatch.setenv("GLIP_JAX_CACHE_GB", "0.0006")
    monkeypatch.setattr(shard_cache, "_OPEN_FILES", 2)
    opened, order = Shards(place), np.random.default_rng(0).permutation(120) % 60
    most = 0
    for index in order.tolist():
        assert opened.read(index) == local.read(index)
        most = max(most, cached_bytes(tmp_path / "cache" / "shards"))
    assert 200_000 < most < 1_000_000 < sum(entry["bytes"] for entry in local.manifest.shards)


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def test_local_copies_that_were_damaged_or_removed_are_fetched_again(bucket, tmp_path, running):
    shards.write(pictures(12), tmp_path / "s", name="s", names=["a"])
    place, local = send(tmp_path / "s", f"{bucket}/s"), Shards(tmp_path / "s")
    opened = pickle.loads(pickle.dumps(Shards(place)))
    values = [local.read(i) for i in range(12)]
    assert [opened.read(i) for i in range(12)] == values
    (copy,) = (tmp_path / "cache" / "shards").glob("*.sparse")
    size = copy.stat().st_size
    with copy.open("r+b") as file:
        file.seek(20_000)
        file.write(b"x" * 40_000)
    assert [opened.read(i) for i in range(12)] == values
    asked = running.requests.total()
    assert [opened.read(i) for i in range(12)] == values
    assert running.requests.total() == asked  # the copy is repaired
    os.truncate(copy, 5000)
    assert [opened.read(i) for i in range(12)] == values
    copy.unlink()
    assert [opened.read(i) for i in range(12)] == values
    copy.write_bytes(b"y" * size)
    assert [Shards(place).read(i) for i in range(12)] == values
    shutil.rmtree(tmp_path / "cache")
    assert [opened.read(i) for i in range(12)] == values


def test_corrupt_data_in_the_bucket_are_corrupt_records(bucket, tmp_path):
    shards.write(pictures(12), tmp_path / "s", name="s", names=["a"])
    file = next((tmp_path / "s").glob("*.array_record"))
    data = bytearray(file.read_bytes())
    data[40_000:40_050] = bytes(50)
    file.write_bytes(data)
    opened, bad = Shards(send(tmp_path / "s", f"{bucket}/s")), []
    for index in range(12):
        try:
            assert int(opened[index].id) == index
        except RecordError:
            bad.append(index)
    assert bad == [4]
    with pytest.raises(ShardError, match=f"{bucket}/s/records.*: sha256 is"):
        shards.verify(f"{bucket}/s")


def test_folders_without_the_column_of_ends_are_fetched_whole(bucket, tmp_path):
    shards.write(pictures(12), tmp_path / "s", name="s", names=["a"], shards=2)
    side = tmp_path / "s" / "columns.npz"
    with np.load(side) as columns:
        np.savez(side, allow_pickle=False, **{key: columns[key] for key in columns if key != "end"})
    manifest = tmp_path / "s" / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["columns"]["sha256"] = shards._sha256(side)
    manifest.write_text(json.dumps(fields))
    place, local = send(tmp_path / "s", f"{bucket}/s"), Shards(tmp_path / "s")
    opened = Shards(place)
    assert [opened.read(i) for i in range(12)] == [local.read(i) for i in range(12)]
    kept = sorted(path.suffix for path in (tmp_path / "cache" / "shards").iterdir())
    assert kept == ["", ".whole", ".whole"] or kept == [".whole", ".whole"]
    for path in (tmp_path / "cache" / "shards").glob("*.whole"):
        path.write_bytes(bytes(path.stat().st_size))
    assert Shards(place).read(3) == local.read(3)
    file = next((tmp_path / "s").glob("records-00000*"))
    data = bytearray(file.read_bytes())
    data[20_000] ^= 1
    file.write_bytes(data)
    send(tmp_path / "s", f"{bucket}/spoilt")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(StorageError, match="its sha256 is .*, the manifest says"):
        Shards(f"{bucket}/spoilt").read(3)


def test_exhausted_retries_are_one_line_and_no_placeholder(remote, running, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "0.5")
    mixture = Mixture(config(remote))
    with running.arm("503", share=1.0), pytest.raises(StorageError, match=r"failed \d+ times in a row.*last: .*503"):
        draw(mixture, 1)
    with (
        running.arm("stall", share=1.0),
        pytest.raises(StorageError, match=r"the time for retries was over \(last: .*timed out"),
    ):
        Shards(remote["boxes"].path)
    with running.arm("reset", share=1.0, only="array_record"):
        assert main(["inspect", remote["boxes"].path, f"--out={tmp_path}/page.html"]) == exit_codes.STORAGE_UNAVAILABLE
    line = capsys.readouterr().err
    assert line.startswith(f"inspect: {remote['boxes'].path}/records-") and line.count("\n") == 1
    # The error of a worker process keeps its message.
    with (
        running.arm("503", share=1.0, only="array_record"),
        pytest.raises(Exception, match="time for retries was over") as caught,
    ):
        draw(Mixture(config(remote, workers=1)), 1)
    assert "placeholder" not in str(caught.value)


def test_inspect_reads_from_the_bucket(remote, tmp_path, capsys):
    assert main(["inspect", remote["boxes"].path, f"--out={tmp_path}/page.html"]) == 0
    assert "17 of 17 records" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("manifest.json", "has no manifest.json: expected a folder of shards"),
        ("columns.npz", "columns.npz cannot be read"),
        ("records-00001-of-00003.array_record", "found nothing .no such file."),
        ("other columns.npz", "columns.npz differs from the manifest"),
        ("cut manifest.json", "is not a manifest of shards"),
        ("cut columns.npz", "columns.npz (cannot be read|is not the file)"),
        ("cut records-00001-of-00003.array_record", r"found \d+ .it is truncated."),
    ],
)
def test_missing_or_truncated_files_are_one_line(folders, bucket, change, message, capsys):
    name = change.rpartition(" ")[2]
    files = {path.name: path for path in folders["boxes"].iterdir()}
    cut = folders["root"] / "cut"
    cut.write_bytes(files[name].read_bytes()[:-9])
    if change.startswith("other"):
        with np.load(files[name]) as columns, cut.open("wb") as file:
            np.savez(file, allow_pickle=False, **{key: columns[key] + 1 for key in columns})
    for other, path in files.items():
        if other != name or change != name:
            gcs.upload_files({other: cut if other == name else path}, f"{bucket}/s", other)
    with pytest.raises(ShardError, match=message):
        Shards(f"{bucket}/s")
    assert main(["inspect", f"{bucket}/s", "--out=page.html"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_large_files_go_in_parts(bucket, running, tmp_path):
    data = np.random.default_rng(0).bytes(20_000_000)
    (tmp_path / "large").write_bytes(data)
    with running.arm("503", "429", "reset", share=0.2, only="upload"):
        gcs.upload_files({"large": tmp_path / "large"}, bucket, "large")
    with running.arm("truncate", "short", "reset", share=0.2):
        assert b"".join(gcs.read_chunks(f"{bucket}/large", len(data))) == data
        with gcs.open_file(f"{bucket}/large") as file:
            assert file.seek(-5, 2) == len(data) - 5 and file.read() == data[-5:]
            file.seek(7)
            assert file.read(9_000_000) == data[7:9_000_007]
    asked = running.requests["POST upload"]
    gcs.upload_files({"large": tmp_path / "large"}, bucket, "large")
    assert running.requests["POST upload"] == asked
    assert (gcs.kind(f"{bucket}/large"), gcs.kind(bucket), gcs.kind(f"{bucket}/none")) == (
        "file",
        "folder",
        "",
    )


def test_missing_buckets_and_folders(bucket, capsys):
    with pytest.raises(ShardError, match="absent does not exist"):
        Shards(f"{bucket}/absent")
    with pytest.raises(StorageError, match="there is no bucket nobucket"):
        Shards("gs://nobucket/s")
    assert main(["inspect", "gs://nobucket/s", "--out=page.html"]) == 2
    assert capsys.readouterr().err.startswith("inspect: gs://nobucket/s: there is no bucket nobucket")
    with pytest.raises(StorageError, match="is no path in a bucket"):
        Shards("gs://")
    assert main(["data", "tfds", f"{bucket}/voc", f"--out={bucket}/s"]) == 2
    assert "array_record reads local files" in capsys.readouterr().err
    with pytest.raises(PathError, match=r"s3:// is not read"):
        shards.write(pictures(2), "s3://bucket/s", name="s")


def fetched(place: str, folder: Path) -> Path:
    """A remote folder, copied."""
    folder.mkdir()
    for name in gcs.list_files(place):
        (folder / name).write_bytes(gcs.read(f"{place}/{name}"))
    return folder


def test_written_to_the_bucket(bucket, tmp_path):
    shards.write(pictures(9), tmp_path / "s", name="s", names=["a"], shards=2)
    shards.write(pictures(9), Path(f"{bucket}/s"), name="s", names=["a"], shards=2)
    assert contents(fetched(f"{bucket}/s", tmp_path / "copy")) == contents(tmp_path / "s")
    assert shards.verify(f"{bucket}/s")
    with pytest.raises(ShardError, match="finished: existing shards are never overwritten"):
        shards.write(pictures(9), f"{bucket}/s", name="s", names=["a"])
    (tmp_path / "mine.txt").write_text("mine")
    gcs.upload_files({"mine.txt": tmp_path / "mine.txt"}, f"{bucket}/other", "mine.txt")
    with pytest.raises(ShardError, match="not empty, without a manifest"):
        shards.write(pictures(2), f"{bucket}/other", name="s")
    assert not list((tmp_path / "cache").rglob("*.array_record"))


@pytest.mark.slow
def test_built_from_and_to_the_bucket_with_faults(source, whole, bucket, running, tmp_path, capsys):  # noqa: F811
    send_tree(source, bucket)
    arguments = ["coco", f"{bucket}/boxes.json", f"--images={bucket}/pictures", f"--out={bucket}/set", "--shards=6"]
    with running.arm(share=0.1, stall=1.0) as injected:
        assert run_job("data", [*arguments, "--processes=1"]) == 0
    assert injected.total() > 10
    built = fetched(f"{bucket}/set", tmp_path / "built")
    names = {"manifest.json", "report.json"}
    assert {k: v for k, v in contents(built).items() if k not in names} == {
        k: v for k, v in contents(whole).items() if k not in names
    }
    assert (
        json.loads((built / "report.json").read_text())["drops"]
        == json.loads((whole / "report.json").read_text())["drops"]
    )
    assert not list((tmp_path / "cache").rglob("*.array_record"))
    capsys.readouterr()
    assert run_job("data", arguments) == 0
    assert f"{bucket}/set is finished (39 records" in capsys.readouterr().out
    for place in ("set", "set/manifest.json", "set/columns.npz"):
        assert excluded_hashes([f"{bucket}/{place}"])[0] == set(Shards(whole).hash.tolist())


def send_tree(folder: Path, place: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            gcs.upload_files({path.name: path}, f"{place}/{name}".rpartition("/")[0], path.name)


def test_images_are_not_dropped_if_the_storage_does_not_answer(source, bucket, running, monkeypatch, capsys):  # noqa: F811
    send_tree(source, bucket)
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "0.3")
    arguments = ["data", "coco", f"{source}/boxes.json", f"--images={bucket}/pictures", f"--out={bucket}/set"]
    with running.arm("503", share=1.0, only="img9.png"):
        assert main([*arguments, "--processes=1"]) == exit_codes.STORAGE_UNAVAILABLE
    line = capsys.readouterr().err
    assert line.splitlines()[-1].startswith(f"data: {bucket}/pictures/img9.png: the storage failed")
    assert gcs.list_files(f"{bucket}/set") == {}
    assert main(arguments) == 0
    assert Shards(f"{bucket}/set").manifest.records == 39


def test_a_killed_upload_continues_with_the_same_bytes(source, whole, bucket, running, tmp_path):  # noqa: F811
    arguments = command(source, Path("OUT"))
    arguments = [a.replace("--out=OUT", f"--out={bucket}/set") for a in arguments]
    with running.arm("slow", "stall", share=0.7, only="/upload/", stall=0.5):
        child = subprocess.Popen([sys.executable, "-m", "glip_jax", "data", *arguments], cwd=ROOT)
        until = time.monotonic() + 60
        while len(gcs.list_files(f"{bucket}/set")) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        child.kill()
        child.wait()
    there = gcs.list_files(f"{bucket}/set")
    assert 2 <= len(there) and "manifest.json" not in there
    with pytest.raises(ShardError, match="no manifest.json"):
        Shards(f"{bucket}/set")
    before = running.requests["POST upload"]
    assert run_job("data", arguments) == 0
    assert running.requests["POST upload"] - before <= 9 - len(there)  # existing files are not uploaded again
    built = fetched(f"{bucket}/set", tmp_path / "built")
    (built / "manifest.json").write_bytes(
        (built / "manifest.json").read_bytes().replace(f"{bucket}/set".encode(), b"OUT")
    )
    shutil.copytree(whole, tmp_path / "local")
    (tmp_path / "local/manifest.json").write_bytes(
        (whole / "manifest.json").read_bytes().replace(str(whole).encode(), b"OUT").replace(b" --processes=1", b"")
    )
    assert same_but_for_the_command(tmp_path / "local", built)


def test_files_of_another_build_are_refused(source, bucket, capsys, tmp_path):  # noqa: F811
    (tmp_path / "x").write_text("x")
    name = "records-00000-of-00009.array_record"
    gcs.upload_files({name: tmp_path / "x"}, f"{bucket}/set", name)
    arguments = [a.replace("--out=OUT", f"--out={bucket}/set") for a in command(source, Path("OUT"))]
    assert run_job("data", arguments) == 2
    line = capsys.readouterr().err
    assert f"{bucket}/set holds 1 files of another build ({name})" in line
    assert set(gcs.list_files(f"{bucket}/set")) == {name}


@pytest.mark.slow
def test_a_thousand_shards_open_quickly(bucket, tmp_path, running):
    shards.write(pictures(2, 10), tmp_path / "s", name="s", names=["a"], shards=2)
    manifest = tmp_path / "s" / "manifest.json"
    fields = json.loads(manifest.read_text())
    half, tiny = fields["shards"][0], tmp_path / "tiny"
    tiny.write_bytes(b"x")
    fields |= {
        "records": 1000, "boxes": 0, "kinds": {"detection": 1000},
        "shards": [half, *({**half, "file": f"records-{i:05d}-of-01000.array_record", "bytes": 1} for i in range(999))],
    }  # fmt: skip
    side = tmp_path / "s" / "columns.npz"
    with np.load(side) as columns:
        np.savez(side, allow_pickle=False, **{key: np.repeat(columns[key][:1], 1000) for key in columns})
    fields["columns"]["sha256"] = shards._sha256(side)
    manifest.write_text(json.dumps(fields))
    files = {entry["file"]: tiny for entry in fields["shards"]}
    files |= {half["file"]: tmp_path / "s" / half["file"], "columns.npz": side, "manifest.json": manifest}
    gcs.upload_files(files, f"{bucket}/s", "manifest.json")
    before, began = running.requests.total(), time.monotonic()
    opened = Shards(f"{bucket}/s")
    seconds, asked = time.monotonic() - began, running.requests.total() - before
    print(f"{seconds:.2f} s, {asked} requests")
    assert seconds < 5 and asked <= 5 and len(opened) == 1000
    assert opened[0].id == "0"


def test_invalid_environment_variables_are_refused(bucket, monkeypatch):
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "long")
    monkeypatch.setenv("GLIP_JAX_STORAGE_TIMEOUT", "-1")
    with pytest.raises(StorageError, match="GLIP_JAX_STORAGE_TIMEOUT is '-1': expected a positive number"):
        Shards(f"{bucket}/s")
    # The name of older versions.
    monkeypatch.delenv("GLIP_JAX_STORAGE_TIMEOUT")
    monkeypatch.setenv("GLIP_JAX_STORAGE_SILENCE", "-2")
    with pytest.raises(StorageError, match="GLIP_JAX_STORAGE_SILENCE is '-2': expected a positive number"):
        Shards(f"{bucket}/s")
