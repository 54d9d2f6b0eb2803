"""The job `precompile`: programs that a run reads, and what is refused in one line."""

import contextlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import jax
import pytest

from glip_jax.distributed.mesh import make_mesh
from glip_jax.distributed.runtime import enable_compilation_cache
from glip_jax.io.checkpoint import fingerprint
from glip_jax.planning import precompile
from glip_jax.planning.compile import PlanError
from glip_jax.training.loop import train
from glip_jax.training.monitoring.cached_programs import program_counts
from tests import tiny_run
from tests.run_job import run_job
from tests.training import stand_in


@pytest.fixture
def config(tmp_path):
    return tiny_run.config_file(tmp_path, {})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology=h100:8"], "programs of GPUs are compiled where the GPUs are"),
        (["--topology=v5e:2x2"], "libtpu is not installed: pip install -r requirements-tpu.txt"),
        (["--topology=v5e:1x1"], "the program of one chip has another key there"),
        (["--topology=v9:2x2"], "expected one of v4"),
        (["--workers=-1"], "--workers"),
        (["--config.mesh.data=3"], "mesh is"),
    ],
)
def test_chips_that_are_not_there_are_one_line(config, tmp_path, monkeypatch, capsys, flags, message):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else real(name))
    assert run_job("precompile", [f"--config={config}", f"--workdir={tmp_path}", *flags]) == 2
    line = capsys.readouterr().err
    assert line.startswith("precompile: ") and message in line and line.count("\n") == 1


def test_a_topology_that_the_batch_does_not_fit_is_refused_before_anything_is_compiled(
    config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert run_job("precompile", [f"--config={config}", f"--workdir={tmp_path}", "--topology=v5e:8x16"]) == 2
    assert "train.batch_size" in capsys.readouterr().err
    assert run_job("precompile", [f"--config={config}"]) == 2
    assert "no working folder" in capsys.readouterr().err


def _die(canvas):
    os._exit(3)


def test_the_canvases_are_those_of_the_config_the_largest_first():
    config = tiny_run.replace(tiny_run.config(), "data", short_sides=(64, 96), aspects=(0.5, 1.0), long_side=128)
    assert precompile.canvases(config) == [(96, 96), (64, 128), (64, 64)]


@pytest.mark.processes
def test_a_compiler_that_dies_is_one_line(monkeypatch):
    @contextlib.contextmanager
    def pool(job, workers):
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            yield pool, _die

    monkeypatch.setattr(precompile, "_pool", pool)
    with pytest.raises(PlanError, match="ended without a result.*fewer --workers"):
        list(precompile.precompile(tiny_run.config(), None, "/tmp"))


@pytest.mark.compiles
def test_training_finds_what_threads_have_compiled(tmp_path, monkeypatch):
    """As where accelerators are: one process holds them."""
    stand_in.install(monkeypatch)
    sources = tiny_run.write_sources(tmp_path)
    config = tiny_run.config(sources)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(precompile, "glip_objective", stand_in.objective)
    monkeypatch.setattr(precompile, "make_mesh", lambda config, devices: make_mesh(config, jax.devices()[:1]))
    names = ("jax_persistent_cache_min_compile_time_secs", "jax_raise_persistent_cache_errors")
    before_it = {name: jax.config.values[name] for name in names}
    try:
        (done,) = precompile.precompile(config, None, str(tmp_path), workers=2)
        assert done.canvas == (64, 64) and not done.cached
        jax.clear_caches()
        assert all(each.cached for each in precompile.precompile(config, None, str(tmp_path)))
        kept = sorted(path.name for path in (tmp_path / "cache").glob("jit_step-*"))
        assert len(kept) == 1
        jax.clear_caches()
        stand_in._STEPS.clear()
        before = program_counts()
        fingerprint(train(config, str(tmp_path / "run")).params)
        assert sorted(path.name for path in (tmp_path / "cache").glob("jit_step-*")) == kept
        assert program_counts().since(before).cached >= 1
    finally:
        for name, value in before_it.items():
            jax.config.update(name, value)
        monkeypatch.undo()
        enable_compilation_cache()


# Less to compile.
_SMALL = ("--config.model.fusion.enabled=False", "--config.model.head.deformable=False")


def _job(name, config, folder, *flags):
    environment = {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"]),
    }  # fmt: skip
    command = [sys.executable, "-m", "glip_jax", name, f"--config={config}", f"--workdir={folder / 'run'}", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_training_finds_what_processes_have_compiled(tmp_path):
    config = tiny_run.config_file(tmp_path, tiny_run.write_sources(tmp_path))
    out = _job("precompile", config, tmp_path, *_SMALL)
    assert "compiling 1 canvases for 1 x cpu of this machine" in out and "1 canvases compiled, 0 found" in out
    (program,) = (tmp_path / "cache").glob("jit_step-*")
    out = _job("train", config, tmp_path, *_SMALL, "--config.train.steps=6")
    assert re.search(r"step ready in [\d.]+ s; programs so far: \d+ compiled, [1-9]\d* from the cache", out), out
    assert list((tmp_path / "cache").glob("jit_step-*")) == [program], "the step was not compiled again"


@pytest.mark.tpu
def test_programs_for_absent_chips_have_the_same_keys_in_every_process(tmp_path):
    config = tiny_run.config_file(tmp_path, tiny_run.write_sources(tmp_path))
    out = _job("precompile", config, tmp_path, *_SMALL, "--topology=v5e:2x2")
    assert "1 canvases compiled, 0 found" in out and "the run finds these programs only with the same jax" in out
    out = _job("precompile", config, tmp_path, *_SMALL, "--topology=v5e:2x2")
    assert "canvas 1 of 1 (64x64): was in the cache" in out
