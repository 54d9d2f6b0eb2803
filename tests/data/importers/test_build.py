"""Builds: identical bytes after interruptions and for any number of processes, and the report."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from glip_jax.data.importers import build as build_module
from glip_jax.data.importers import published, shared_build, workers
from glip_jax.data.importers.build import BuildPlan, build, excluded_hashes
from glip_jax.data.importers.coco import open_coco
from glip_jax.data.importers.entry import (
    Entry,
    ImageFolder,
    ImportSource,
    Report,
    SourceError,
    image_folder,
    pack,
    unpack,
)
from glip_jax.data.records import content_hash
from glip_jax.data.shards import ShardError, Shards, verify
from glip_jax.distributed import exit_codes
from glip_jax.io import gcs
from glip_jax.io.task_results import TaskError
from tests.data.conftest import coco_json, write_image
from tests.run_job import run_job

ROOT = Path(__file__).resolve().parents[3]
COUNT = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Forty images, one of them duplicated and one missing, with three boxes each, some of them invalid."""
    root = tmp_path_factory.mktemp("source")
    (root / "pictures").mkdir()
    for i in range(COUNT):
        write_image(root / "pictures" / f"img{i}.png", 24, 32, min(i, COUNT - 2))
    (root / "pictures" / "img7.png").unlink()
    data = coco_json([(24, 32)] * COUNT)
    data["annotations"][30]["bbox"] = [100, 3, 5, 5]
    data["annotations"][31] |= {"bbox": [-9, 3, 20, 5]}
    data["annotations"][34] |= {key: data["annotations"][33][key] for key in ("bbox", "category_id")}
    (root / "boxes.json").write_text(json.dumps(data))
    return root


def command(source: Path, out: Path | str, *more: str) -> list[str]:
    return ["coco", f"{source}/boxes.json", f"--images={source}/pictures", f"--out={out}", "--shards=6", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """The result of an uninterrupted build in one process."""
    out = tmp_path_factory.mktemp("whole") / "set"
    assert run_job("data", command(source, out, "--processes=1")) == 0
    return out


def same_but_for_the_command(one: Path, other: Path) -> bool:
    """Whether two folders are equal except for the command in the manifest, which names the folder."""
    left, right = contents(one), contents(other)
    for folder, files in ((one, left), (other, right)):
        files["manifest.json"] = files["manifest.json"].replace(str(folder).encode(), b"OUT")
    return left == right


def test_the_report_counts_kept_and_dropped_items(source, whole):
    manifest, report = Shards(whole).manifest, json.loads((whole / "report.json").read_text())
    assert verify(whole) and len(manifest.shards) == 6
    assert set(contents(whole)) == {
        "manifest.json",
        "columns.npz",
        "report.json",
        *(s["file"] for s in manifest.shards),
    }
    assert (report["records"], report["images"], report["listed_records"]) == (COUNT - 1, COUNT - 2, COUNT)
    assert report["boxes"] == manifest.boxes == report["listed_boxes"] - 5 == 3 * COUNT - 5
    assert {reason: drop["count"] for reason, drop in report["drops"].items()} == manifest.drops == {
        "box: outside the image": 1, "box: there twice": 1, "box: image dropped": 3, "image: file missing": 1,
    }  # fmt: skip
    assert report["drops"]["image: file missing"]["first"] == "image 8, img7.png"
    assert "annotation 35 of image 12" in report["drops"]["box: there twice"]["first"]
    assert report["notes"]["box: cut at the edge of the image"]["count"] == 1
    assert report["duplicates"] == {"records": 1, "first": [37, 38]}
    assert report["inputs"][0]["file"] == f"{source}/boxes.json" and report["published"] is None


@pytest.mark.processes
def test_any_number_of_processes_gives_the_same_bytes(source, whole, tmp_path):
    for number in (2, 3):
        assert run_job("data", command(source, tmp_path / "set", f"--processes={number}")) == 0
        assert same_but_for_the_command(whole, tmp_path / "set")
        shutil.rmtree(tmp_path / "set")


def test_parts_give_the_same_bytes(source, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GLIP_JAX_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "set"
    for part, missing in (("2/4", 4), ("4/4", 3), ("3/4", 2)):
        assert run_job("data", command(source, out, "--processes=1", f"--part={part}")) == 0
        assert f"part {part} is done; {missing} of 6 files are missing (first: records-00000" in capsys.readouterr().out
        assert not (out / "manifest.json").exists()
    # Another command into the same folder, as a part and alone; and a part that does not exist.
    for more in (["--part=1/4", "--licence=CC0"], ["--licence=CC1"]):
        assert run_job("data", command(source, out, *more)) == exit_codes.BAD_INPUT
        assert "was begun with other settings (existing -> given: licence: " in capsys.readouterr().err
    assert run_job("data", command(source, out, "--part=5/4")) == exit_codes.BAD_INPUT
    assert "--part=5/4: expected I/N with I from 1 to N" in capsys.readouterr().err
    # One is interrupted, and the command without --part does what is missing.
    interrupt_in(monkeypatch, shared_build, "_publish", 1)
    assert run_job("data", command(source, out, "--processes=1", "--part=1/4")) == exit_codes.CANCELLED
    monkeypatch.undo()
    monkeypatch.setenv("GLIP_JAX_CACHE", str(tmp_path / "cache"))
    there = {path.name: path.stat().st_ino for path in out.glob("records*")}
    assert run_job("data", command(source, out, "--processes=1")) == 0
    assert "kept boxes" in capsys.readouterr().out and same_but_for_the_command(whole, out) and len(there) == 4
    assert there.items() <= {path.name: path.stat().st_ino for path in out.glob("records*")}.items()
    assert run_job("data", command(source, out, "--part=1/4")) == 0
    assert "nothing is made twice" in capsys.readouterr().out


def test_parts_into_a_bucket_give_the_same_bytes(source, whole, tmp_path, running, monkeypatch):
    out = f"{running.fresh(monkeypatch, tmp_path / 'cache', timeout=2)}/set"
    with running.arm("lost", "late", share=0.3, only="ifGenerationMatch") as came:
        for part in (1, 2):
            assert run_job("data", command(source, out, "--processes=2", f"--part={part}/2")) == 0
    assert came.total() and set(gcs.list_files(out)) == {path.name for path in whole.iterdir()}
    (tmp_path / "set").mkdir()
    for name in gcs.list_files(out):
        (tmp_path / "set" / name).write_bytes(
            gcs.read(f"{out}/{name}").replace(out.encode(), str(tmp_path / "set").encode())
        )
    assert same_but_for_the_command(whole, tmp_path / "set")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()], "nothing is left on this machine"


def test_a_machine_without_the_images_is_refused(source, tmp_path):
    """It would drop every image as missing."""
    job = workers.Job(tmp_path, tmp_path / "none", ImageFolder(epath.Path(tmp_path / "absent")), 0, False, "auto")
    with pytest.raises(SourceError, match="absent does not exist"):
        shared_build.ImportWorker(str(tmp_path), ["a"], {}, job, frozenset())
    with pytest.raises(TaskError, match="is not the folder of this job on .* all nodes see"):
        shared_build.ImportWorker(
            str(tmp_path), ["a"], {}, dataclasses.replace(job, images=ImageFolder(epath.Path(source))), frozenset()
        )


@pytest.mark.processes
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_build_that_is_resumed_gives_the_same_bytes(source, whole, tmp_path, processes):
    out, partial = tmp_path / "set", tmp_path / ".set.partial"
    arguments = command(source, out, f"--processes={processes}")
    child = subprocess.Popen([sys.executable, "-m", "tests.data.importers.slow_build", *arguments], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(partial.glob("records*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert not out.exists()
    before = {path.name: path.stat().st_ino for path in partial.glob("records*.array_record")}
    assert 0 < len(before) < 6
    assert run_job("data", arguments) == 0 and same_but_for_the_command(whole, out) and not partial.exists()
    after_resume = {path.name: path.stat().st_ino for path in out.glob("records*")}
    assert {name for name in before if after_resume[name] == before[name]}  # complete shards are reused


def interrupt_in(monkeypatch, module, name, after):
    """Makes a function raise KeyboardInterrupt at its call number `after`."""
    real, calls = getattr(module, name), []

    def function(*arguments, **options):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize(
    ("module", "name", "after"),
    [
        (build_module, "pack", 5),
        (workers, "make_record", 20),
        (build_module, "summary", 1),
        (build_module, "file_digest", 1),
    ],
)
def test_a_build_interrupted_at_any_stage_can_be_resumed(source, whole, tmp_path, monkeypatch, module, name, after):
    arguments = command(source, tmp_path / "set", "--processes=1")
    with monkeypatch.context() as patch:
        interrupt_in(patch, module, name, after)
        assert run_job("data", arguments) == exit_codes.CANCELLED
    assert not (tmp_path / "set").exists()
    assert run_job("data", arguments) == 0 and same_but_for_the_command(whole, tmp_path / "set")


def test_an_index_of_other_inputs_or_settings_is_not_used(source, whole, tmp_path, monkeypatch):
    shutil.copy(source / "boxes.json", tmp_path / "boxes.json")
    arguments = [f"--images={source}/pictures", f"--out={tmp_path}/set", "--processes=1", "--shards=6"]
    arguments = ["coco", f"{tmp_path}/boxes.json", *arguments]
    with monkeypatch.context() as patch:
        interrupt_in(patch, workers, "make_record", 20)
        assert run_job("data", arguments) == exit_codes.CANCELLED
    data = json.loads((tmp_path / "boxes.json").read_text())
    data["annotations"] = data["annotations"][:60]
    (tmp_path / "boxes.json").write_text(json.dumps(data))
    assert run_job("data", arguments) == 0
    assert json.loads((tmp_path / "set" / "report.json").read_text())["listed_boxes"] == 60


def test_a_second_build_of_the_same_folder_is_refused(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build_module, "_WAIT", 0.3)
    with build_module.build_lock((tmp_path / ".set.partial").absolute(), tmp_path / "set"):
        assert run_job("data", command(source, tmp_path / "set")) == 2
    assert "another process is making this folder" in capsys.readouterr().err
    assert run_job("data", command(source, tmp_path / "set")) == 0


@pytest.mark.processes
def test_a_killed_worker_gives_a_one_line_error(source, whole, tmp_path, capfd, monkeypatch):
    out = tmp_path / "set"

    def open_killing(scratch: Path) -> ImportSource:
        found = open_coco(source / "boxes.json", source / "pictures", scratch=scratch)
        return dataclasses.replace(found, images=KillingReader(image_folder(source / "pictures")))

    with monkeypatch.context() as patch:
        patch.setattr("glip_jax.cli.data.build", lambda plan, _: build(plan, open_killing))
        assert run_job("data", command(source, out, "--processes=2")) == 2
    line = capfd.readouterr().err
    assert (
        "a worker ended with code -9" in line and "fewer --processes" in line and (tmp_path / ".set.partial").exists()
    )


class KillingReader:
    """An image reader that kills its process at one of the images."""

    def __init__(self, folder: ImageFolder) -> None:
        self.folder = folder

    def __call__(self, image: str) -> bytes:
        if image == "img9.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.folder(image)


@pytest.mark.processes
def test_strict_mode_stops_workers(source, tmp_path, capsys):
    assert run_job("data", command(source, tmp_path / "set", "--strict", "--processes=2")) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "without --strict it would be dropped" in line
    assert list(tmp_path.iterdir()) == []


def test_excluded_images_are_dropped_and_counted(source, whole, tmp_path, capsys):
    one, other = ((source / "pictures" / f"img{i}.png").read_bytes() for i in (3, 5))
    (tmp_path / "hashes.txt").write_text(f"{content_hash(one)}\n0x{content_hash(other):016x}\n{'ab' * 32}\n")
    arguments = command(source, tmp_path / "set", f"--exclude={tmp_path}/hashes.txt", "--licence=CC0")
    assert run_job("data", arguments) == 0
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert report["drops"]["image: excluded"] == {"count": 2, "first": "image 4, img3.png"}
    assert report["records"] == COUNT - 3 and report["drops"]["box: image dropped"]["count"] == 9
    assert report["exclude"][0]["hashes"] == 3
    printed = capsys.readouterr().out
    assert "overlap with --exclude" in printed and "of 3 images in 1 lists" in printed
    assert not {content_hash(one), content_hash(other)} & set(Shards(tmp_path / "set").hash.tolist())
    # All records of a folder, given as folder, manifest or columns.
    for place in (whole, whole / "manifest.json", whole / "columns.npz"):
        assert excluded_hashes([place])[0] == set(Shards(whole).hash.tolist())
    more = [f"--exclude={whole}", f"--exclude={tmp_path}/hashes.txt"]
    assert run_job("data", command(source, tmp_path / "none", *more)) == 2
    assert f"image: excluded {COUNT - 1} (first: image 1, img0.png)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("12 x7", "word 2 is 'x7'"),
        ("1" * 30, "more than 64 bits"),
        (None, "cannot be read"),
        (b"\xff\xfe", "cannot be"),
    ],
)
def test_invalid_lists_of_hashes_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "list").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match=message):
        excluded_hashes([tmp_path / "list"])


def test_invalid_build_settings_are_refused(source, tmp_path):
    opened = lambda scratch: open_coco(source / "boxes.json", source / "pictures", scratch=scratch)  # noqa: E731
    for change, message in [
        ({"processes": -1}, "processes is -1"),
        ({"shards": 0}, "shards is 0"),
        ({"published": "coco"}, "there is no published set 'coco'"),
    ]:
        with pytest.raises((ShardError, SourceError), match=message):
            build(BuildPlan(tmp_path / "set", "boxes.json", **change), opened)
    nothing = ImportSource(iter(()), image_folder(source), Report())
    with pytest.raises(ShardError, match="no record came out of x"):
        build(BuildPlan(tmp_path / "set", "x"), lambda _: nothing)
    assert list(tmp_path.iterdir()) == []


def test_entries_round_trip_through_the_index():
    entry = Entry(
        "\ud800", "a.png", "grounding", 10**30, 7, ((0.1, 1e-9, 3.0, 4.0),), caption="a \udc00", spans=(((0, 1), (2, 3)),),
        scores=(0.5,), known_absent=("x",), not_exhaustive=("y",), unknown=(((0, 1),),), ids=("1",), provenance="p",
    )  # fmt: skip
    assert unpack(pack(entry)) == entry


def test_published_sets_are_compared_and_variants_explained(source, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "manifests"
    folder.mkdir()
    fields = {
        "title": "Tiny 2026", "files": ["boxes.json"], "counts": {"records": 40, "boxes": 99, "names": 7}, "units": {},
        "source": "its paper", "licence": "CC BY 9.0", "variants": [{"boxes": 120, "why": "with the second release"}],
    }  # fmt: skip
    (folder / "tiny.json").write_text(json.dumps(fields))
    monkeypatch.setattr(published, "MANIFESTS", folder)
    assert run_job("data", command(source, tmp_path / "set")) == 0
    printed = capsys.readouterr().out
    assert "Tiny 2026 (its paper)" in printed and "licence: CC BY 9.0" in printed
    assert "  40 records, as published" in printed
    assert "  120 boxes, published are 99: with the second release" in printed
    assert "  6 names, published are 7: no variant with this number is known" in printed
    (folder / "bad.json").write_text("{}")
    assert run_job("data", command(source, tmp_path / "other")) == 2
    assert "bad.json is not a manifest of a published set" in capsys.readouterr().err


def test_the_bundled_manifests_are_complete():
    sets = published.load()
    assert {"coco_2017_train", "coco_2017_val", "lvis_v1_train", "objects365_v2_train"} <= set(sets)
    files = [file for known in sets.values() for file in known.files]
    assert len(files) == len(set(files))
    for known in sets.values():
        assert known.counts and known.source and known.licence
        assert all(set(variant) - {"why"} <= set(known.counts) and variant["why"] for variant in known.variants)
    assert np.all([count > 0 for known in sets.values() for count in known.counts.values()])


def test_an_index_of_others_is_not_unpickled(source, tmp_path, monkeypatch):
    """The folder of an interrupted build lies beside --out, where others may write."""
    interrupt_in(monkeypatch, build_module, "merge", 1)
    with pytest.raises(KeyboardInterrupt):
        build(
            _plan(tmp_path, source),
            lambda scratch: open_coco(source / "boxes.json", source / "pictures", scratch=scratch),
        )
    with sqlite3.connect(tmp_path / ".set.partial" / "index.sqlite") as base:
        (value,) = base.execute("SELECT value FROM meta").fetchone()
        assert json.loads(value)["images"] == {"path": f"{source}/pictures"}
        base.execute("UPDATE meta SET value = ?", (pickle.dumps(_Harmful(tmp_path / "run")),))
    monkeypatch.undo()
    build(
        _plan(tmp_path, source), lambda scratch: open_coco(source / "boxes.json", source / "pictures", scratch=scratch)
    )
    assert (tmp_path / "set" / "manifest.json").exists() and not (tmp_path / "run").exists()


def _plan(folder, source):
    return BuildPlan(folder / "set", str(source / "boxes.json"), processes=1)


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
