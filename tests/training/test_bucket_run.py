"""A working folder on gs:// gives the same run as a local one while the storage fails.

The storage is an emulator on loopback behind a proxy that injects faults (`tests.io.faulty_storage`).
"""

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from glip_jax.config import Config
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.io import checksums, fsspec_gcs, gcs
from glip_jax.io.assets import resolve
from glip_jax.io.checkpoint import (
    CheckpointError,
    Checkpoints,
    NotSavedError,
    complete_steps,
    fingerprint,
    latest_step,
    open_checkpoint,
    unfinished,
)
from glip_jax.io.workdir import prepare
from glip_jax.planning import precompile
from glip_jax.structures.prompts import PromptError, load_tokenizer
from glip_jax.training.loop import train
from glip_jax.training.monitoring import metrics, writer
from glip_jax.training.monitoring.cached_programs import program_counts
from tests import tiny_run
from tests.io.test_checkpoint import _equal, _saved
from tests.training import stand_in

pytestmark = pytest.mark.compiles


@pytest.fixture
def place(running, tmp_path, monkeypatch) -> str:
    """A working folder in a new bucket, with a network that compiles in a second."""
    stand_in.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # what fsspec would take
    return running.fresh(monkeypatch, tmp_path / "cache", timeout=1.0, retry_seconds=60) + "/runs/one"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_run.config(tiny_run.write_sources(tmp_path_factory.mktemp("sources")))


def test_the_vocabulary_can_be_in_the_bucket(config, place):
    fsspec_gcs.install()
    vocabulary = f"{place.removesuffix('/runs/one')}/assets/vocab.txt"
    with pytest.raises(PromptError, match=r"gs://.*vocab.txt' is not a file"):
        load_tokenizer(vocabulary)
    gcs.put(vocabulary, resolve(config.model.text.vocabulary).read_bytes())
    here, there = (load_tokenizer(resolve(path)) for path in (config.model.text.vocabulary, vocabulary))
    assert here.encode("A cat beside two dogs.").ids == there.encode("A cat beside two dogs.").ids
    assert here.get_vocab_size() == there.get_vocab_size()


@pytest.fixture
def cache(place, monkeypatch) -> Iterator[str]:
    """The compilation cache lies where the working folder does, and keeps what compiles quickly too."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    fsspec_gcs.install()
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    stand_in._STEPS.clear()
    jax.clear_caches()
    yield place.removesuffix("/runs/one") + "/compilation_cache"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    monkeypatch.undo()
    enable_compilation_cache()


def _again() -> None:
    """What the process has compiled is gone, as after a restart."""
    stand_in._STEPS.clear()
    jax.clear_caches()


@pytest.mark.slow
def test_a_second_start_compiles_nothing_from_the_cache_in_the_bucket(config, place, cache, running, capsys):
    first = fingerprint(train(config, place).params)
    assert [name for name in gcs.list_files(cache) if name.startswith("jit_step-")]
    # A run of another name in the same bucket reads the same programs.
    _again()
    before = program_counts()
    assert fingerprint(train(config, f"{place}-again").params) == first
    found = program_counts().since(before)
    assert found.compiled == 0 and 3 <= found.cached < 10, found  # not one for each shape
    assert "from the cache" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cache_of_another_jax_is_missed_and_does_not_fail(config, place, cache, recwarn):
    first = fingerprint(train(config, place).params)
    names = list(gcs.list_files(cache))
    for name in names:
        value = gcs.read(f"{cache}/{name}")
        gcs.remove(f"{cache}/{name}")
        # Keys of other versions are other keys; and once the same one, as of another compressor.
        other = name if name.startswith("jit_step-") else name.replace("-cache", "0-cache")
        gcs.put(f"{cache}/{other}", b"another format" + value)
    _again()
    before = program_counts()
    assert fingerprint(train(config, f"{place}-again").params) == first
    assert program_counts().since(before).cached == 0
    said = [str(warning.message) for warning in recwarn if "persistent compilation cache" in str(warning.message)]
    assert len(said) == 1 and "'jit_step'" in said[0]


@pytest.mark.slow
def test_a_cache_that_does_not_answer_any_more_is_done_without(config, place, cache, running, monkeypatch, capsys):
    first = fingerprint(train(config, place).params)
    _again()
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "0.5")
    with running.arm("503", share=1.0, only="compilation_cache") as injected:
        assert fingerprint(train(config, f"{place}-again").params) == first
    captured = capsys.readouterr()
    assert captured.err.count(f"{cache} is not used any more: ") == 1 and captured.err.count("\n") == 1, captured.err
    assert injected["503"] < 12, "one request was tried for half a second; later programs ask for nothing"
    # Precompiling would be for nothing: it ends.
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(precompile, "glip_objective", stand_in.objective)
    fsspec_gcs._spare.clear()
    with running.arm("503", share=1.0, only="compilation_cache"), pytest.raises(gcs.StorageError, match="in a row"):
        list(precompile.precompile(config, None, place))
    jax.config.update("jax_raise_persistent_cache_errors", False)
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "60")
    # The next start asks again.
    _again()
    before = program_counts()
    train(config, f"{place}-third")
    assert program_counts().since(before).compiled == 0


def _losses(workdir):
    return {line["step"]: line["loss"] for line in metrics.read(workdir) if "loss" in line}


@pytest.mark.slow
def test_faults_of_the_storage_change_nothing_in_the_run(config, place, running, tmp_path, capsys):
    straight = fingerprint(train(config, str(tmp_path / "straight")).params)
    drawing = tiny_run.replace(config, "train", draw_first_batch=True)
    with running.arm("503", "reset", "lost", "late", "truncate", "stall", share=0.05, stall=1.5) as injected:
        state = train(drawing, place, draw=lambda batch: b"picture")
    assert set(injected) == {"503", "reset", "lost", "late", "truncate", "stall"}
    assert fingerprint(state.params) == straight
    # The last checkpoint is incomplete now: the run continues from the one before.
    gcs.remove(f"{place}/checkpoints/6/commit_success.txt")
    capsys.readouterr()
    assert fingerprint(train(config, place).params) == straight
    assert f"resuming at step 4 from {place}" in capsys.readouterr().out
    assert _losses(place) == _losses(str(tmp_path / "straight")) and [*_losses(place)] == [2, 4, 6]
    assert complete_steps(place) == [4, 6] and unfinished(place) == []
    assert checksums.mismatch(f"{place}/checkpoints/6") == ""
    assert gcs.read(f"{place}/first_batch.png") == b"picture"
    assert {"config.json", "parameters.txt", "metrics.jsonl"} <= set(gcs.list_files(place))
    events = gcs.list_files(f"{place}/tensorboard")
    assert len(events) == 2 and all(each.bytes > 100 for each in events.values())


@pytest.mark.slow
def test_metrics_that_cannot_be_uploaded_delay_nothing_and_are_there_after_the_next_start(
    config, place, running, monkeypatch, capsys
):
    monkeypatch.setattr(writer, "_UPLOAD_SECONDS", 0.1)
    train(tiny_run.replace(config, "train", steps=2), place)
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "0.5")
    with contextlib.ExitStack() as stack:

        def evaluate(params, step, _):
            if step == 4:
                stack.enter_context(running.arm("503", share=1.0, only="runs/one/metrics.jsonl"))
            return {}

        at = tiny_run.replace(config, "train", evaluate_every=1)
        state = train(at, place, evaluate, resume_with_changes=True)
        assert int(state.step) == 6
    captured = capsys.readouterr()
    assert f"{place}: metrics could not be uploaded" in captured.err and "503" in captured.err
    local = Path(re.findall(r"all of them are in (\S+)", captured.err)[0])
    assert 6 in [json.loads(line)["step"] for line in (local / "metrics.jsonl").read_text().splitlines()]
    assert 6 not in _losses(place)
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "60")
    train(at, place)
    assert [*_losses(place)] == [2, 3, 4, 5, 6], (
        "the checkpoint holds the lines; each step that is evaluated is saved before"
    )


def test_a_writer_never_waits_and_reports_what_it_drops(place, running, monkeypatch, capsys):
    monkeypatch.setattr(writer, "_MAX_QUEUED", 5)
    monkeypatch.setattr(writer, "_UPLOAD_SECONDS", 0.05)
    monkeypatch.setenv("GLIP_JAX_STORAGE_TIMEOUT", "20")
    # The thread waits in a request without an answer.
    stall = running.arm("stall", share=1.0, stall=4.0, only="runs/one/metrics.jsonl")
    with writer.Writer(place, 0) as log, stall:
        log.write(1, {"loss": 1.0})
        time.sleep(0.5)
        began = time.monotonic()
        for step in range(2, 12):
            log.write(step, {"loss": 1.0})
        assert time.monotonic() - began < 0.5
        assert len(log.unwritten()) == 6
    captured = capsys.readouterr().out
    assert "5 are queued, from here on they are dropped" in captured and "5 windows of metrics were dropped" in captured
    assert [line["step"] for line in metrics.read(place)] == [1, 2, 3, 4, 5, 6]
    assert not [thread for thread in threading.enumerate() if thread.name == "writer"]


def test_half_written_and_damaged_ones_in_a_bucket(place, capsys):
    with Checkpoints(place, keep=4) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _saved(step), Config())
    gcs.remove(f"{place}/checkpoints/3/commit_success.txt")
    assert unfinished(place) == [f"{place}/checkpoints/3"] and complete_steps(place) == [1, 2]
    assert _equal(open_checkpoint(place).parameters("raw"), _saved(2).params)
    # As a kill in the middle of a write leaves it; then bytes of the checkpoint before change.
    file = next(name for name in gcs.list_recursive(f"{place}/checkpoints/2") if name.startswith("params/d/"))
    old = gcs.read(f"{place}/checkpoints/2/{file}")
    gcs.put(f"{place}/checkpoints/2/{file}", old[:-1] + bytes([old[-1] ^ 1]))
    assert latest_step(place) == 1
    assert f"checkpoints/2 is damaged ({file} has other bytes than were written" in capsys.readouterr().err
    with Checkpoints(place, keep=4) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, _saved(5), Config())
    captured = capsys.readouterr().out
    assert f"{place}/checkpoints/3 was left half-written" in captured
    assert f"set aside as {place}/checkpoints/2.damaged, step 1 is used" in captured
    assert f"{file}" in gcs.list_recursive(f"{place}/checkpoints/2.damaged")
    assert not gcs.list_recursive(f"{place}/checkpoints/3")
    assert np.array_equal(open_checkpoint(place).parameters("raw")["text"]["embeddings"]["type"], np.ones((2, 8)))
    assert _equal(open_checkpoint(place).parameters("raw"), _saved(5).params)


def save(place, step):
    with Checkpoints(place, keep=2) as checkpoints:
        checkpoints.save(step, _saved(step), Config())
        checkpoints.wait()


def torn(path):
    with path.open("wb") as file:
        file.write(b"half")
        raise ZeroDivisionError


def test_a_storage_that_does_not_answer_is_one_line(place, running, monkeypatch):
    save(place, 1)
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "0.5")
    with running.arm("503", share=1.0, only="uploadType=multipart"), pytest.raises(NotSavedError) as caught:
        save(place, 2)
    message = str(caught.value)
    assert (
        "the checkpoint of step 2 could not be written to gs://" in message
        and "the one of step 1 is complete" in message
    )
    assert latest_step(place) == 1
    # A thread of Orbax that asks on a little longer than the others may write after them; the next start removes that, too.
    with Checkpoints(place, 2):
        assert unfinished(place) == []


def test_paths_in_a_bucket_are_files_and_folders(place, running):
    prepare(place)
    folder = epath.Path(place)
    (folder / "a" / "b").mkdir(parents=True)
    with running.arm("503", "reset", "lost", "late", share=0.3):
        for name in ("a/one.txt", "a/b/two.txt", "a/b/three.txt"):
            (folder / name).write_text(name)
        assert sorted(path.name for path in (folder / "a").iterdir()) == ["b", "one.txt"]
        assert sorted(path.name for path in folder.glob("a/b/*.txt")) == ["three.txt", "two.txt"]
        assert (folder / "a").is_dir() and (folder / "a/one.txt").is_file() and not (folder / "a/on").exists()
        assert (folder / "a/b/two.txt").read_text() == "a/b/two.txt"
        assert (folder / "a/one.txt").stat().length == 9 and (folder / "a/one.txt").stat().mtime > 1.7e9
        (folder / "a/b").rename(folder / "a/c")
        (folder / "a/one.txt").copy(folder / "a/c/one.txt")
        (folder / "a/one.txt").replace(folder / "a/uno.txt")
        assert {*gcs.list_recursive(place)} == {"a/c/two.txt", "a/c/three.txt", "a/c/one.txt", "a/uno.txt"}
        (folder / "a/c").rmtree()
        (folder / "a/uno.txt").unlink()
        assert not folder.exists()
    with pytest.raises(FileNotFoundError):
        (folder / "a/one.txt").read_text()
    with pytest.raises(ZeroDivisionError):
        torn(folder / "torn")
    assert not (folder / "torn").exists()
    with pytest.raises(CheckpointError, match="cannot be written"):
        prepare("gs://no-such-bucket/run")
