"""What a user gets wrong, and what happens to a job: one line on stderr, an exit code that says which, nothing half-made."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from contextlib import contextmanager
from importlib import metadata
from typing import Any
from unittest import mock

import jax
import pytest

from glip_jax import __main__
from glip_jax.cli import environment, errors
from glip_jax.config import ConfigError, SourceConfig
from glip_jax.data import shards
from glip_jax.data.importers import entry
from glip_jax.distributed import exit_codes
from glip_jax.io.checkpoint import Checkpoints, NotSavedError, latest_step, open_checkpoint, unfinished
from glip_jax.io.errors import full_disk
from glip_jax.io.image_files import PIXEL_LIMIT
from glip_jax.io.retry import StorageError
from glip_jax.training import loop
from tests import tiny_run
from tests.data.conftest import coco_json, mdetr_json, write_image
from tests.run_job import run_job
from tests.training import stand_in


def written(folder):
    """Everything below a folder but the bytecode of a config file that was loaded there."""
    return [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts]


def run(capture, *argv):
    """Exit code and the line on stderr, or what was printed where all went well."""
    capture.readouterr()
    code = __main__.main([str(argument) for argument in argv])
    out, err = capture.readouterr()
    if code == exit_codes.DONE:
        return code, out
    assert err.endswith("\n") and err.count("\n") == 1, err
    assert err.startswith(f"{argv[0]}: ") and "Traceback" not in err
    return code, err


# What is found before anything is made ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tiny_run.write_sources(folder)
    return folder


@pytest.fixture
def place(whole, tmp_path):
    """A folder with sources of its own to spoil, and the config that names them."""
    for name in ("boxes", "captions"):
        shutil.copytree(whole / name, tmp_path / name)
    tiny_run.config_file(tmp_path, {name: SourceConfig(str(tmp_path / name)) for name in ("boxes", "captions")})
    return tmp_path


def _edited(change):
    """Edits the manifest of the boxes."""

    def spoil(place):
        path = place / "boxes" / "manifest.json"
        fields = json.loads(path.read_text())
        change(fields)
        path.write_text(json.dumps(fields))

    return spoil


def _one_less(fields):
    fields["records"] -= 1
    fields["kinds"]["detection"] -= 1
    fields["shards"][0]["records"] -= 1


def _shard(place):
    return next((place / "boxes").glob("*.array_record"))


def _emptied(place):
    shutil.rmtree(place / "boxes")
    (place / "boxes").mkdir()


def _cut(place):
    _shard(place).write_bytes(_shard(place).read_bytes()[:-100])


def _blank_end(place):
    data = _shard(place).read_bytes()
    _shard(place).write_bytes(data[:64] + bytes(len(data) - 64))


def _other_columns(place):
    path = place / "boxes" / "columns.npz"
    path.write_bytes((place / "captions" / "columns.npz").read_bytes())


def _long_name(place):
    records = [shards.Shards(place / "boxes")[i] for i in range(8)]
    shutil.rmtree(place / "boxes")
    shards.write(iter(records), place / "boxes", name="boxes", names=("cat", "dog dog " * 20, "person"))


def _a_file(place):
    (place / "run").write_text("mine")


@pytest.mark.parametrize(
    ("spoil", "options", "messages"),
    [
        (None, ["--config.train.stpes=3"], ["unknown option --config.train.stpes", "did you mean --config.train.steps"]),
        (None, ["--config.train.steps=many"], ["--config.train.steps=many: expected an integer"]),
        (lambda p: shutil.rmtree(p / "boxes"), [], ["data.sources.boxes", "boxes does not exist", "glip_jax data coco"]),
        (_emptied, [], ["data.sources.boxes", "boxes is empty: expected a folder of shards"]),
        (lambda p: (p / "boxes" / "manifest.json").unlink(), [], ["boxes has no manifest.json"]),
        (_edited(lambda f: f.update(records=9)), [], ["says 9 records, but its shards add up to 8", "import again"]),
        (_edited(lambda f: f["kinds"].update(grounding=1)), [], ["says 8 records, but its kinds add up to 9"]),
        (_edited(_one_less), [], [".array_record: the manifest says 7 records, found 8 records", "import again"]),
        (_edited(lambda f: f.pop("shards")), [], ["manifest.json is not a manifest of shards", "import again"]),
        (lambda p: _shard(p).unlink(), [], ["found nothing", "import again"]),
        (_cut, [], ["bytes, found", "it is truncated", "import again"]),
        (_blank_end, [], ["the manifest says 8 records, found no readable end"]),
        (_other_columns, [], ["columns.npz differs from the manifest"]),
        (_long_name, [], ["the name 'dog dog", "takes 43 tokens", "model.text.max_tokens is 16", "--names=FILE"]),
        (None, ["--config.train.batch_size=6"], ["train.batch_size 6 does not split", "over 8 rows", "a multiple of 8"]),
        (None, ["--config.mesh.data=16"], ["its product is 16, but there are 8 devices", "use -1"]),
        (None, ["--config.data.sources.boxes.weight=0"], ["data.sources.boxes.weight is 0.0"]),
        (_a_file, [], ["--workdir=", "run cannot be written (File exists)", "expected a folder"]),
    ],
)  # fmt: skip
def test_train_finds_it_before_anything_is_made(place, capsys, spoil, options, messages):
    if spoil is not None:
        spoil(place)
    before = written(place)
    code, line = run(capsys, "train", f"--config={place / 'tiny.py'}", f"--workdir={place / 'run'}", *options)
    assert code == exit_codes.BAD_INPUT
    for message in messages:
        assert message in line
    assert written(place) == before


def test_a_workdir_below_a_file_or_on_a_system_that_forbids_it(training, place, capsys, monkeypatch):
    _a_file(place)
    config = training[1]
    code, line = run(capsys, "train", config, f"--workdir={place / 'run' / 'deeper'}")
    assert code == exit_codes.BAD_INPUT and "deeper cannot be written (Not a directory)" in line

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "makedirs", forbidden)
    code, line = run(capsys, "train", config, f"--workdir={place / 'other'}")
    assert code == exit_codes.BAD_INPUT and "other cannot be written (Permission denied)" in line


def test_a_missing_library_refuses_every_job_before_anything_is_imported(capsys, monkeypatch):
    lines = ["jax>=0.1,<0.2", "no-such-package>=3", "numpy>=1", 'absent>=1; python_version < "3"']
    monkeypatch.setattr(environment, "required", lambda: lines)
    monkeypatch.setattr(__main__.importlib, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    for job in set(__main__.JOBS) - {"doctor"}:
        code, line = run(capsys, job)
        assert code == exit_codes.BAD_INPUT
        assert "no-such-package is not installed, expected >=3" in line and "jax" not in line.partition(";")[0]
        assert "-m pip install -r " in line and "requirements.txt" in line


def test_another_version_is_a_warning_and_the_job_runs(capsys, monkeypatch):
    monkeypatch.setattr(environment, "required", lambda: ["jax>=0.1,<0.2", "numpy>=1"])
    assert __main__.main(["verify"]) == exit_codes.BAD_INPUT
    warning, error = capsys.readouterr().err.splitlines()
    assert f"jax is {metadata.version('jax')}, expected <0.2,>=0.1" in warning and "glip_jax doctor" in warning
    assert "numpy" not in warning and error.startswith("verify: nothing to verify")


def test_doctor_lists_what_is_there_and_what_is_missing(capsys, monkeypatch):
    assert run_job("doctor", []) == exit_codes.DONE
    out = capsys.readouterr().out
    for name in ("Python", "libraries", "extra export", "devices", "compile cache", "disk of this folder"):
        assert re.search(rf"^(ok|note) +{name} ", out, re.MULTILINE), name
    monkeypatch.setattr(environment, "required", lambda: ["no-such-package>=3", "numpy<1"])
    code = run_job("doctor", [])
    out, err = capsys.readouterr()
    assert code == exit_codes.BAD_INPUT and "missing: no-such-package" in err
    assert re.search(r"^missing +no-such-package ", out, re.MULTILINE) and re.search(
        r"^note +numpy ", out, re.MULTILINE
    )


def test_this_environment_is_right_and_the_ranges_are_the_files(monkeypatch):
    assert environment.mismatches() == []
    assert any(line.startswith("jax>=") for line in environment.required())
    project = (environment._ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={environment.PYTHON[0]}.{environment.PYTHON[1]}"' in project
    monkeypatch.setattr(environment, "PYTHON", (9, 1))
    assert "expected >=9.1" in environment.absent(environment.mismatches())


# What happens while training -------------------------------------------------------------------------------------------


@pytest.fixture
def training(place, monkeypatch):
    """Arguments of a run with the stand-in network on one device."""
    stand_in.install(monkeypatch)
    return ["train", f"--config={place / 'tiny.py'}", f"--workdir={place / 'run'}", "--config.checkpoint.keep=1"]


@contextmanager
def _files_up_to(size):
    """The system refuses to write files beyond so many bytes, as a full disk would refuse: within C++ as well."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.compiles
def test_a_full_disk_in_the_middle_of_a_checkpoint(training, place, capfd, monkeypatch):
    workdir, real = str(place / "run"), Checkpoints.save
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self, step, saved, config, lines=()):
        if step == 4:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, soft[1]))
        real(self, step, saved, config, lines)

    monkeypatch.setattr(Checkpoints, "save", save)
    try:
        code, line = run(capfd, *training)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert code == exit_codes.NOT_WRITTEN
    assert f"the checkpoint of step 4 could not be written to {workdir}/checkpoints (File too large)" in line
    assert "the one of step 2 is complete and untouched: make room there" in line
    # keep=1: the older one would have gone if the newer had come.
    assert os.listdir(f"{workdir}/checkpoints") == ["2"] and unfinished(workdir) == []
    assert "head" in open_checkpoint(workdir).parameters()
    monkeypatch.setattr(Checkpoints, "save", real)
    code, out = run(capfd, *training)
    assert code == exit_codes.DONE and "resuming at step 2" in out and latest_step(workdir) == 6


@pytest.mark.compiles
def test_a_full_disk_between_checkpoints(training, place, capfd, monkeypatch):
    real = loop.Writer.write

    def write(self, step, metrics):
        if step == 6:
            raise OSError(28, "No space left on device")
        real(self, step, metrics)

    monkeypatch.setattr(loop.Writer, "write", write)
    code, line = run(capfd, *training)
    assert code == exit_codes.NOT_WRITTEN
    assert (
        f"{place / 'run'} cannot be written (No space left on device); checkpoints: the one of step 4 is compl" in line
    )


@pytest.mark.compiles
def test_a_first_checkpoint_that_fails_says_there_is_no_earlier_one(training, place, capfd, monkeypatch):
    real = Checkpoints.save

    def save(self, step, saved, config, lines=()):
        with monkeypatch.context() as patch:
            patch.setattr("orbax.checkpoint.CheckpointManager.save", lambda *_, **__: _no_space())
            real(self, step, saved, config, lines)

    def _no_space():
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: OS error 28: No space left on device [source loc]")

    monkeypatch.setattr(Checkpoints, "save", save)
    code, line = run(capfd, *training)
    assert code == exit_codes.NOT_WRITTEN and latest_step(str(place / "run")) is None
    assert "(No space left on device); there is no earlier one: make room there" in line


@pytest.mark.compiles
def test_a_checkpoint_of_another_network_or_other_settings(training, place, capsys):
    assert run(capsys, *training, "--config.train.steps=2")[0] == exit_codes.DONE
    before = {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*") if path.is_file()}
    options = ["--config.model.text.vocabulary-size=600", "--config.train.steps=2"]
    code, line = run(capsys, *training, *options)
    assert code == exit_codes.BAD_INPUT
    assert "holds step 2 of a run with another network (saved -> given: model.text.vocabulary_size: 512 -> 600)" in line
    assert "a new --workdir" in line
    code, line = run(capsys, *training, "--config.optimizer.rate=0.5", "--config.train.steps=2")
    assert code == exit_codes.BAD_INPUT and "with other settings (saved -> given: optimizer.rate: 0.001 -> 0.5)" in line
    assert {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*") if path.is_file()} == before
    code, line = run(capsys, *training, *options, "--resume-with-changes")
    assert code == exit_codes.BAD_INPUT and "is of another network (" in line and "saved, (600, 16) wanted" in line


# Imports ---------------------------------------------------------------------------------------------------------------


def _header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def imported(tmp_path):
    """Six pictures with three boxes or two phrases each, and the arguments that import them."""
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        write_image(tmp_path / "pictures" / f"img{i}.png", 24, 32, i)
    (tmp_path / "boxes.json").write_text(json.dumps(coco_json([(24, 32)] * 6)))
    (tmp_path / "captions.json").write_text(json.dumps(mdetr_json([(24, 32)] * 6)))
    return ["data", "coco", tmp_path / "boxes.json", f"--images={tmp_path / 'pictures'}", f"--out={tmp_path / 'out'}"]


def test_bad_pictures_are_counted_by_reason(imported, tmp_path, capsys):
    content = coco_json([(24, 32)] * 6)
    content["images"][4].update(height=0)
    content["images"][5].update(height=40_000, width=30_000)
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    pictures = [tmp_path / "pictures" / f"img{i}.png" for i in range(6)]
    pictures[0].write_bytes(b"no picture")
    pictures[1].write_bytes(b"")
    pictures[2].write_bytes(_header(10_000, 9_000))
    code, out = run(capsys, *imported)
    assert code == exit_codes.DONE and PIXEL_LIMIT < 10_000 * 9_000
    drops = shards.Shards(tmp_path / "out").manifest.drops
    assert drops == {
        "image: cannot be decoded": 1, "image: file empty": 1, "image: too large": 2,
        "box: image dropped": 12,
    }  # fmt: skip
    for reason, count in drops.items():
        assert f"dropped {reason}" in out and str(count) in out
    assert "img2.png is huge: 10000 x 9000 pixels, at most 80,000,000 pixels are read" in out

    # One bad picture is the end with --strict, and so is a source of which nothing is left.
    shutil.rmtree(tmp_path / "out")
    code, line = run(capsys, *imported, "--strict")
    assert code == exit_codes.BAD_INPUT and "image: cannot be decoded (image 1, img0.png" in line
    for picture in pictures[3:5]:
        picture.write_bytes(_header(0, 0))
    code, line = run(capsys, *imported)
    assert (
        code == exit_codes.BAD_INPUT and "no record came out" in line and "image: cannot be decoded 3 (first: " in line
    )
    assert not (tmp_path / "out").exists()


def test_spans_beyond_the_caption_are_counted(imported, tmp_path, capsys):
    content = mdetr_json([(24, 32)] * 6)
    content["annotations"][0]["tokens_positive"] = [[2, 999]]
    content["annotations"][1]["tokens_positive"] = [[-1, 5], [2, 5]]
    (tmp_path / "captions.json").write_text(json.dumps(content))
    command = ["data", "mdetr", tmp_path / "captions.json", *imported[3:]]
    code, out = run(capsys, *command)
    assert code == exit_codes.DONE and "dropped span: beyond the caption" in out
    assert shards.Shards(tmp_path / "out").manifest.drops == {"span: beyond the caption": 2, "box: no span left": 1}
    shutil.rmtree(tmp_path / "out")
    code, line = run(capsys, *command, "--strict")
    assert code == exit_codes.BAD_INPUT and "span: beyond the caption (annotation 1 of image 1, (2, 999) in " in line


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, exit_codes.CANCELLED), (signal.SIGTERM, exit_codes.PREEMPTED)]
)
def test_an_import_that_is_stopped_goes_on(imported, tmp_path, capsys, monkeypatch, number, code):
    before, calls, real = sorted(tmp_path.iterdir()), [], entry._load_image

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(entry, "_load_image", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        found, line = run(capsys, *imported)
    except SystemExit as stop:
        found, line = stop.code, capsys.readouterr().err
    assert found == code and f"stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'}" in line
    assert line.count("\n") == 1 and "the same command" in line
    # What goes on: the index of the entries, no half-made shard.
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / ".out.partial"])
    assert not list((tmp_path / ".out.partial").glob("records*")) and signal.getsignal(signal.SIGTERM) == handler
    assert run(capsys, *imported)[0] == exit_codes.DONE
    assert len(shards.Shards(tmp_path / "out")) == 6 and sorted(tmp_path.iterdir()) == sorted(
        [*before, tmp_path / "out"]
    )


def test_a_worker_that_its_pool_ends_says_nothing(capsys, monkeypatch):
    """Forked workers inherit the handler; a pool ends them by SIGTERM, which then acts as it does by default."""
    own, sent = os.getpid(), []
    monkeypatch.setattr(os, "kill", lambda *arguments: sent.append(arguments))
    with __main__._sigterm_exits("scenes"):
        handler: Any = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(os, "getpid", lambda: own + 1)
        handler(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert sent == [(own + 1, signal.SIGTERM)] and capsys.readouterr().err == ""


def test_an_import_onto_a_full_disk(imported, tmp_path, capsys):
    before = written(tmp_path)
    with _files_up_to(1500):
        code, line = run(capsys, *imported)
    assert code == exit_codes.NOT_WRITTEN and "out): make room, then give the same command again" in line
    assert {path.name for path in set(tmp_path.iterdir()) - set(before)} == {".out.partial"}
    assert run(capsys, *imported)[0] == exit_codes.DONE and not (tmp_path / ".out.partial").exists()


def test_a_killed_import_does_not_stand_in_the_way(imported, tmp_path, capsys):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "records").write_text("half")
    assert run(capsys, *imported)[0] == exit_codes.DONE and not (tmp_path / ".out.partial").exists()


# Exit codes ------------------------------------------------------------------------------------------------------------


def test_every_exit_code_is_explained():
    codes = {
        name: getattr(exit_codes, name) for name in exit_codes.__all__ if isinstance(getattr(exit_codes, name), int)
    }
    assert len(set(codes.values())) == len(codes) == 10
    for code in codes.values():
        assert f"\n    {code:<4} " in (exit_codes.__doc__ or "") and f"{code} " in exit_codes.SHORT


@pytest.mark.processes
def test_the_exit_code_comes_although_a_library_waits():
    """As Orbax does for five minutes where the folders of a checkpoint cannot be made."""
    script = """
import sys, threading, time
from glip_jax import __main__

def failing(job, argv):
    threading.Thread(target=time.sleep, args=(600,)).start()
    return 74

__main__._run, sys.argv = failing, ["glip-jax", "doctor"]
sys.exit(__main__.main())
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == exit_codes.NOT_WRITTEN


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        ("SIGINT", exit_codes.CANCELLED, "doctor: stopped by Ctrl-C; nothing is half-made, the same command goes on"),
        ("SIGTERM", exit_codes.PREEMPTED, "doctor: stopped by SIGTERM; nothing is half-made, give the same command again"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["collector", "library"])
def test_a_signal_is_heard_wherever_it_comes(number: str, code: int, line: str, place: str) -> None:
    """In a callback of the garbage collector, as jax has one, no exception goes on; Orbax raises others in its place."""
    script = f"""
import gc, os, signal, sys, time
from glip_jax import __main__
from glip_jax.cli import doctor

def signalled(*_):
    gc.callbacks.clear()
    os.kill(os.getpid(), signal.{number})
    time.sleep(1)

def in_collector(argv):
    gc.callbacks.append(signalled)
    gc.collect()
    time.sleep(60)

def in_library(argv):
    try:
        signalled()
    except BaseException as error:
        raise Exception("while reading") from error

doctor.main, sys.argv = in_{place}, ["glip-jax", "doctor"]
sys.exit(__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=120, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, {*done.stderr.splitlines()}) == (code, {line})


def test_a_full_disk_is_known_by_number_and_by_words():
    def raised(error, cause=None):
        error.__cause__ = cause
        return full_disk(error)

    assert (
        raised(OSError(28, "x")) == "No space left on device" == raised(RuntimeError("a: No space left on device; b"))
    )
    assert raised(ValueError("x"), OSError(122, "y")) == "Disk quota exceeded"
    assert raised(OSError(13, "Permission denied")) == "" == full_disk(None)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("train.steps is 0:\nexpected more"), 2, "train.steps is 0: expected more"),
        (loop.NonFiniteLossError("step 3: no number"), exit_codes.NOT_FINITE, "step 3: no number"),
        (NotSavedError("no room"), exit_codes.NOT_WRITTEN, "no room"),
        (StorageError(errno.ETIMEDOUT, "gave up", "gs://a/b"), exit_codes.STORAGE_UNAVAILABLE, "gs://a/b: gave up"),
        (StorageError(errno.EACCES, "refused", "gs://a/b"), exit_codes.BAD_INPUT, "gs://a/b: refused"),
        (OSError(28, "No space", "/a/b"), exit_codes.NOT_WRITTEN, "No space left on device (/a/b): make room, then"),
        (FileNotFoundError(2, "No such file", "/a/b"), exit_codes.BAD_INPUT, "No such file (/a/b): expected a file or"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: full\nx"), exit_codes.BAD_INPUT, "full x): give fewer images (train.b"),
        (KeyboardInterrupt(), exit_codes.CANCELLED, "stopped by Ctrl-C"),
    ],
)  # fmt: skip
def test_what_ends_a_job_has_its_code_and_line(capsys, monkeypatch, error, code, line):
    monkeypatch.setattr(__main__.importlib, "import_module", lambda _: mock.Mock(main=mock.Mock(side_effect=error)))
    found, err = run(capsys, "report")
    assert (found == code and err.startswith(f"report: {line}")) or f"small (RESOURCE_EXHAUSTED: {line}" in err
    assert errors.exit_code_of(error) == code, "what the other processes of a cluster hear"


@pytest.mark.parametrize("argv", [["--debug", "verify"], ["verify", "--debug"]])
def test_debug_shows_the_traceback(capsys, argv):
    assert __main__.main(argv) == exit_codes.BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("verify: nothing to verify")
    assert run(capsys, "verify")[0] == exit_codes.BAD_INPUT, "no traceback without it"


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    for error in (OSError(5, "Input/output error"), ZeroDivisionError(), FileNotFoundError("no name")):
        monkeypatch.setattr(
            __main__.importlib, "import_module", lambda _, e=error: mock.Mock(main=mock.Mock(side_effect=e))
        )
        with pytest.raises(type(error)):
            __main__.main(["report"])
        assert errors.exit_code_of(error) == exit_codes.UNEXPECTED
