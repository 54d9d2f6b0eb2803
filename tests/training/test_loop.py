"""The loop on real data with a small network: resume, signals, records, evaluation, errors."""

import contextlib
import dataclasses
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from glip_jax.config import ConfigError, EvaluationConfig, EvaluationSet, InitFromConfig, MeshConfig
from glip_jax.data.mixture import Mixture
from glip_jax.distributed.exit_codes import CANCELLED, PREEMPTED
from glip_jax.distributed.mesh import MeshError, make_mesh
from glip_jax.io import claims
from glip_jax.io.checkpoint import CheckpointError, Checkpoints, Saved, complete_steps, fingerprint, latest_step
from glip_jax.io.checkpoint_reader import open_checkpoint
from glip_jax.io.claims import owned_workdir
from glip_jax.io.workdir import started_from
from glip_jax.training import loop, programs
from glip_jax.training.finetuning.schedule import Rules, Schedule
from glip_jax.training.loop import NonFiniteLossError, train
from glip_jax.training.monitoring import metrics
from glip_jax.training.monitoring.source_counts import CorruptDataError
from glip_jax.training.state import fresh_parameters
from tests import tiny_run
from tests.training import stand_in

pytestmark = pytest.mark.compiles


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    stand_in.install(monkeypatch)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_run.config(tiny_run.write_sources(tmp_path_factory.mktemp("sources")))


@pytest.fixture
def workdir(tmp_path):
    return str(tmp_path / "run")


def _losses(workdir):
    return {line["step"]: line["loss"] for line in metrics.read(workdir) if "loss" in line}


def test_a_run_leaves_its_records(config, workdir, tmp_path, capsys):
    drawn, evaluated = [], []

    def evaluate(params, step, _):
        evaluated.append((step, float(np.sum(params["head"]["box"]["kernel"]))))
        return {"evaluation/set/AP": 0.5}

    config = tiny_run.replace(config, "train", evaluate_every=4, draw_first_batch=True)
    state = train(config, workdir, evaluate, lambda batch: drawn.append(batch.image.shape) or b"png")
    out = capsys.readouterr().out
    assert f"fingerprint: {fingerprint(state.params)}" in out and "starting at step 0 from random values" in out
    assert int(state.step) == 6 and latest_step(workdir) == 6
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["4", "6"], "keep = 2"
    assert list(_losses(workdir)) == [2, 4, 6] and drawn == [(8, 16, 16, 48)]
    assert (tmp_path / "run" / "first_batch.png").read_bytes() == b"png"
    averages = float(np.sum(state.ema["head"]["box"]["kernel"]))
    assert [step for step, _ in evaluated] == [4, 6] and evaluated[-1][1] == pytest.approx(averages)
    assert any(line.get("evaluation/set/AP") == 0.5 for line in metrics.read(workdir))
    line = metrics.read(workdir)[0]
    wanted = {"wait_seconds", "images_per_second", "rate", "text_rate", "gradient_norm", "positives", "loss/token"}
    assert wanted | {"source/boxes/loss/token", "dropped/corrupt_records"} <= set(line)
    assert {"step_seconds", "images_per_second_per_chip", "compile_seconds"} <= set(line)
    assert not {"mfu", "memory_bytes", "checkpoint_seconds"} & set(line), (
        "a CPU has no published peak and counts no memory"
    )
    assert 0 < line["step_seconds"] * line["steps"] <= line["seconds"] - line["compile_seconds"] + 1e-3
    assert "checkpoint_seconds" in metrics.read(workdir)[1]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["name"] == "tiny"
    assert "head/projection/kernel" in (tmp_path / "run" / "parameters.txt").read_text()


@pytest.mark.slow
def test_canvases_compiled_beside_the_training_give_the_same_bits(config, tmp_path, monkeypatch, capsys):
    config = tiny_run.replace(tiny_run.replace(config, "data", short_sides=(64, 128), long_side=128), "train", steps=8)
    found = {}
    for cores in (1_000_000, 1):
        monkeypatch.setattr(programs, "_CORES", cores)
        found[cores] = fingerprint(train(config, str(tmp_path / str(cores))).params)
        lines = capsys.readouterr().out
        assert lines.count("step ready in") + lines.count("compiled beside the training") == 2, lines
    assert found[1] == found[1_000_000]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, PREEMPTED), pytest.param(signal.SIGINT, CANCELLED, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_same_call_ends_with_the_same_bits(config, workdir, tmp_path, monkeypatch, number, code):
    straight = fingerprint(train(config, str(tmp_path / "straight")).params)
    real = loop.place_batch
    calls = []

    def interrupted(batch, mesh):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return real(batch, mesh)

    monkeypatch.setattr(loop, "place_batch", interrupted)
    with pytest.raises(SystemExit) as caught:
        train(config, workdir)
    assert caught.value.code == code and latest_step(workdir) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # Lines that a killed run wrote after its checkpoint are removed.
    with open(f"{workdir}/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 77.0}\n{"step": 6, "lo')
    assert fingerprint(train(config, workdir).params) == straight
    assert [*_losses(workdir)] == [2, 3, 4, 6] and 77.0 not in _losses(workdir).values()
    assert _losses(workdir)[6] == _losses(str(tmp_path / "straight"))[6]


@pytest.mark.parametrize(
    ("end", "every", "steps"),
    [
        ("SIGTERM", 3, 4),
        pytest.param("SIGTERM", 0, 3, marks=pytest.mark.slow),
        pytest.param("kill", 3, 4, marks=pytest.mark.slow),
    ],
)
def test_an_evaluation_that_is_cut_short_is_made_after_the_resume(config, workdir, capsys, end, every, steps):
    """It is left at once, the step is saved, and metrics.jsonl has no hole. A finished run is not evaluated again."""
    config = tiny_run.replace(config, "train", evaluate_every=every, steps=steps)
    config = tiny_run.replace(config, "checkpoint", every=100)
    evaluated = []

    def evaluate(params, step, _):
        evaluated.append(step)
        if len(evaluated) == 1 and end == "kill":
            raise RuntimeError("killed")
        if len(evaluated) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not left")
        return {"evaluation/set/AP": 0.5}

    with pytest.raises(RuntimeError if end == "kill" else SystemExit) as caught:
        train(config, workdir, evaluate)
    if end == "SIGTERM":
        assert getattr(caught.value, "code", None) == PREEMPTED and "SIGTERM: saved step 3" in capsys.readouterr().out
    assert latest_step(workdir) == 3
    for _ in range(2):
        train(config, workdir, evaluate)
        assert evaluated == [3, 3, 4][: steps - 1]
        lines = metrics.read(workdir)
        assert [line["step"] for line in lines if "evaluation/set/AP" in line] == [3, 4][: steps - 2]


def test_a_second_training_in_a_working_folder_is_refused(config, workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "_RETRY_SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    with owned_workdir(workdir), pytest.raises(CheckpointError, match=rf"in use: a training \(pid {os.getpid()} on"):
        train(config, workdir)
    assert os.listdir(workdir) == [], "nothing was written beside the first one"


def test_after_a_damaged_checkpoint_the_run_continues_from_the_one_before(config, workdir, tmp_path, capsys):
    straight = fingerprint(train(config, workdir).params)
    written = metrics.read(workdir)
    folder = tmp_path / "run" / "checkpoints"
    file = max((folder / "6" / "params" / "d").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size - 1)
    capsys.readouterr()
    assert fingerprint(train(config, workdir).params) == straight
    out = capsys.readouterr().out
    assert "checkpoint 6 is damaged (params/d/" in out and "resuming at step 4" in out
    assert sorted(os.listdir(folder)) == ["4", "6", "6.damaged"]
    assert [line["loss"] for line in metrics.read(workdir)] == [line["loss"] for line in written]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("sgd", {}), pytest.param("adafactor", {"min_dim_size_to_factor": 4}, marks=pytest.mark.slow)],
)
def test_a_run_with_another_optimizer_resumes_with_the_same_bits(
    config, workdir, tmp_path, monkeypatch, name, arguments
):
    """The state of sgd is empty, that of adafactor has other shapes than the parameters."""
    config = tiny_run.replace(config, "optimizer", name=name, arguments=arguments)
    config = tiny_run.replace(config, "train", steps=4)
    straight = fingerprint(train(config, str(tmp_path / "straight")).params)
    real, calls = loop.place_batch, []

    def killed(batch, mesh):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return real(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "place_batch", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(config, workdir)
    assert latest_step(workdir) == 2
    assert fingerprint(train(config, workdir).params) == straight
    with pytest.raises(CheckpointError, match=rf"optimizer.name: {name} -> adamw"):
        train(tiny_run.replace(config, "optimizer", name="adamw", arguments={}), workdir)


@pytest.mark.slow
def test_a_run_begun_without_the_ramp_resumes_without_it_and_what_the_averages_are_is_said(
    config, workdir, tmp_path, capsys
):
    config = tiny_run.replace(tiny_run.replace(config, "optimizer", ema_decay=0.999), "train", steps=2)
    before = tiny_run.replace(config, "optimizer", ema_ramp=False)
    straight = train(before, str(tmp_path / "straight"))
    train(tiny_run.replace(before, "train", steps=1), workdir)
    run = tmp_path / "run" / "checkpoints" / "1" / "run" / "metadata"
    for state in (train(config, workdir, resume_with_changes=True), train(config, workdir)):
        assert fingerprint(state.ema) == fingerprint(straight.ema)
    assert run.exists() and json.loads((tmp_path / "run" / "config.json").read_text())["optimizer.ema_ramp"] is False
    said = "100% those of step 0"
    assert capsys.readouterr().err.count(said) == 4
    open_checkpoint(workdir).parameters("ema")
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_best_checkpoints_by_an_evaluation_are_kept_over_a_restart(config, workdir):
    sets = {"set": EvaluationSet("nowhere.json", "nowhere")}
    config = dataclasses.replace(config, evaluation=EvaluationConfig(sets=sets))
    config = tiny_run.replace(config, "train", evaluate_every=2, steps=8)
    config = tiny_run.replace(config, "checkpoint", keep=1, best=1, best_by="evaluation/set/AP")
    scores = {2: 0.5, 4: 0.3, 6: 0.1, 8: 0.2, 10: 0.1}

    def evaluate(params, step, _):
        return {"evaluation/set/AP": scores[step]}

    train(tiny_run.replace(config, "train", steps=4), workdir, evaluate)
    train(config, workdir, evaluate, resume_with_changes=True)
    assert complete_steps(workdir) == [2, 8], "the best, and the final one"
    other = tiny_run.replace(config, "checkpoint", best_by="evaluation/set/AP_50")
    other = tiny_run.replace(other, "train", steps=10)
    with pytest.raises(ConfigError, match=r"best_by is 'evaluation/set/AP_50': the evaluation gave evaluation/set/AP"):
        train(other, workdir, evaluate, resume_with_changes=True)


def test_a_killed_run_makes_the_same_decisions_and_ends_with_the_same_bits(config, tmp_path, monkeypatch, capsys):
    """The rates are cut after step 6, the run stops after step 8, and the first of two equal evaluations is the best."""
    config = dataclasses.replace(config, evaluation=EvaluationConfig(sets={"set": EvaluationSet("a.json", "a")}))
    config = tiny_run.replace(config, "train", evaluate_every=2, steps=20)
    config = tiny_run.replace(config, "checkpoint", every=100, keep=1, best=1, best_by="evaluation/set/AP")
    values, evaluated = {2: 0.5, 4: 0.5, 6: 0.4, 8: 0.1}, []
    rules = Rules("evaluation/set/AP", patience=3, plateau=1)

    def evaluate(params, step, _):
        evaluated.append(step)
        return {"evaluation/set/AP": values[step]}

    def run(workdir):
        return train(config, str(workdir), evaluate, decide=Schedule(rules))

    straight = run(tmp_path / "straight")
    assert int(straight.step) == 8 and evaluated == [2, 4, 6, 8]
    assert complete_steps(str(tmp_path / "straight")) == [2, 8]
    rates = {line["step"]: line["rate"] for line in metrics.read(str(tmp_path / "straight")) if "loss" in line}
    assert rates[8] == pytest.approx(0.1 * rates[6]) and rates[6] == rates[4]
    assert "stops early: no better evaluation/set/AP since step 2 (0.5000) in 3 evaluations" in capsys.readouterr().out
    real, calls = loop.place_batch, []

    def interrupted(batch, mesh):
        calls.append(1)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(batch, mesh)

    monkeypatch.setattr(loop, "place_batch", interrupted)
    with pytest.raises(SystemExit):
        run(tmp_path / "killed")
    assert latest_step(str(tmp_path / "killed")) == 7
    again = run(tmp_path / "killed")
    assert fingerprint(again.params) == fingerprint(straight.params)
    assert complete_steps(str(tmp_path / "killed")) == [2, 8]
    assert int(run(tmp_path / "killed").step) == 8 and evaluated == [2, 4, 6, 8] * 2, "it has ended"


def test_changed_settings_are_refused_or_start_a_phase(config, workdir, tmp_path, capsys):
    train(config, workdir)
    longer = tiny_run.replace(config, "train", steps=8)
    with pytest.raises(CheckpointError, match=r"train.steps: 6 -> 8"):
        train(longer, workdir)
    free = tiny_run.replace(config, "train", log_every=1)
    assert int(train(free, workdir).step) == 6
    capsys.readouterr()
    assert int(train(longer, workdir, resume_with_changes=True).step) == 8
    assert "new phase from step 6: train.steps: 6 -> 8" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "phases.json").read_text())[0]["step"] == 6
    assert int(train(longer, workdir).step) == 8, "the run has the new settings now"


def test_a_changed_mixture_is_refused_or_starts_a_phase_and_the_counts_continue(config, workdir, tmp_path):
    train(tiny_run.replace(config, "train", steps=2), workdir)
    first = [line for line in metrics.read(workdir) if "source/boxes/seen" in line][-1]
    assert first["source/boxes/seen"] + first["source/captions/seen"] == 16
    assert first["source/boxes/epochs"] == first["source/boxes/seen"] / 8
    heavier = dataclasses.replace(config.data.sources["boxes"], weight=3.0)
    other = tiny_run.replace(config, "data", sources={**config.data.sources, "boxes": heavier})
    other = tiny_run.replace(other, "train", steps=4)
    with pytest.raises(CheckpointError, match=r"data.sources.boxes.weight: 1.0 -> 3.0"):
        train(other, workdir)
    train(other, workdir, resume_with_changes=True)
    phase = json.loads((tmp_path / "run" / "phases.json").read_text())[0]
    assert phase["step"] == 2 and "data.sources.boxes.weight: 1.0 -> 3.0" in phase["differences"]
    last = metrics.read(workdir)[-1]
    assert last["source/boxes/seen"] == first["source/boxes/seen"] + 12 and last["source/captions/seen"] == 12


def test_too_many_corrupt_records_stop_the_run(config, workdir, monkeypatch):
    """All of one source from step 3 on, as when a mount disappears: the checkpoint of step 2 stays."""
    real = Mixture.batches

    def corrupt(self, *arguments, **options):
        for number, batch in enumerate(real(self, *arguments, **options), 1):
            yield batch._replace(valid=batch.valid & ((batch.source == 0) | (number < 3)))

    monkeypatch.setattr(Mixture, "batches", corrupt)
    with pytest.raises(CorruptDataError, match=r"data\.sources\.captions: 4 of its last 12 .*captions\[\d\] \(image g"):
        train(tiny_run.replace(config, "data", corrupt_window=100, max_corrupt_rate=0.03), workdir)
    assert latest_step(workdir) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_examples(config, workdir, monkeypatch):
    """A box is NaN at step 3: nothing after the checkpoint of step 2 is saved."""
    real = loop.place_batch
    calls = []

    def poisoned(batch, mesh):
        calls.append(1)
        if len(calls) == 3:
            boxes = batch.boxes.copy()
            boxes[1, 0] = np.nan
            batch = batch._replace(boxes=boxes)
        return real(batch, mesh)

    def objective(config, train=True):
        inner = stand_in.objective(config, train)

        def sums(params, batch, targets, key):
            bad = jnp.isnan(batch.boxes).any((1, 2))
            result = inner.sums(params, batch, targets, key)
            return result._replace(token=jnp.where(bad, jnp.nan, result.token))

        return inner._replace(sums=sums)

    monkeypatch.setattr(loop, "place_batch", poisoned)
    monkeypatch.setattr(loop, "glip_objective", objective)
    with pytest.raises(NonFiniteLossError) as caught:
        train(config, workdir)
    message = str(caught.value)
    assert message.startswith("step 3: loss or gradient is not finite") and "loss/token nan" in message
    examples = message.splitlines()[1]
    assert "examples with a non-finite loss: " in examples and examples.count("[") == 1 and "(image " in examples
    assert "Newest checkpoint: step 2" in message and latest_step(workdir) == 2


def test_settings_that_do_not_fit_are_refused_before_anything_is_written(config, workdir):
    with pytest.raises(MeshError, match="its product is 3, but there are 1 devices"):
        train(dataclasses.replace(config, mesh=MeshConfig(data=3)), workdir)
    named = dataclasses.replace(config, init_from=InitFromConfig(text="nowhere"))
    with pytest.raises(ConfigError, match="gave no `initial_parameters`"):
        train(named, workdir)
    with contextlib.suppress(FileNotFoundError):
        assert os.listdir(f"{workdir}/checkpoints") == []


@pytest.mark.slow
def test_a_run_starts_from_a_checkpoint_of_parameters_alone(config, workdir, capsys):
    """As the job `import` writes it."""
    params = fresh_parameters(config, make_mesh(config.mesh))
    params["text"]["embeddings"]["word"] = jnp.full_like(params["text"]["embeddings"]["word"], 0.25)
    with Checkpoints(workdir, 1) as checkpoints:
        checkpoints.save(0, Saved(params, {}, {}), config)
    config = tiny_run.replace(config, "model", text=dataclasses.replace(config.model.text, frozen=True))
    config = tiny_run.replace(config, "train", steps=2)
    state = train(config, workdir, resume_with_changes=True)
    assert int(state.step) == 2 and latest_step(workdir) == 2
    assert (np.asarray(state.params["text"]["embeddings"]["word"]) == 0.25).all()
    assert "starting at step 0 from imported weights" in capsys.readouterr().out


def test_initial_parameters_are_read(config, workdir, capsys):
    def initial_parameters(params, config):
        assert config.init_from.text == "somewhere"
        return {**params, "text": {"embeddings": {"word": jnp.full((512, stand_in.WIDTH), 0.25)}}}, {"sources": ["x"]}

    config = dataclasses.replace(config, init_from=InitFromConfig(text="somewhere"))
    config = tiny_run.replace(config, "model", text=dataclasses.replace(config.model.text, frozen=True))
    state = train(config, workdir, initial_parameters=initial_parameters)
    assert (np.asarray(state.params["text"]["embeddings"]["word"]) == 0.25).all()
    assert "from pretrained text, the rest random" in capsys.readouterr().out
    assert started_from(workdir) == {"sources": ["x"]}
