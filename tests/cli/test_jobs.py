"""Every job once, through the entry point, on two images and the network of configs/debug.py."""

import json

import pytest

from glip_jax.__main__ import JOBS, main
from glip_jax.data import shards
from glip_jax.data.records import Record, boxes_array
from glip_jax.distributed import exit_codes
from glip_jax.io.checkpoint import fingerprint, latest_step, open_checkpoint
from glip_jax.training.monitoring import metrics

pytestmark = pytest.mark.compiles


@pytest.fixture
def job(capsys):
    """Runs a job, which must succeed; returns what it printed."""

    def run(name, *arguments):
        capsys.readouterr()
        code = main([name, *map(str, arguments)])
        said = capsys.readouterr()
        assert code == exit_codes.DONE, said.err
        return said.out

    return run


def boxes(trained, out):
    """The arguments of `data` for the two images of the run's detection set."""
    validation = trained.scenes / "validation"
    return "coco", validation / "annotations.json", f"--images={validation / 'images'}", f"--out={out}", "--processes=1"


def captions(folder, trained):
    """Shards of the two images with a caption each."""
    records = [
        Record(path.stem, "caption", path.read_bytes(), 96, 96, boxes_array(()), caption="a cat and a dog")
        for path in sorted((trained.scenes / "validation" / "images").iterdir())
    ]
    shards.write(iter(records), folder, name="cc")
    return folder


def test_scenes_and_train(trained):
    """The fixture has run them: two steps of two images each."""
    for name in ("detection", "grounding"):
        assert len(shards.Shards(trained.scenes / "shards" / name)) == 2
    assert latest_step(str(trained.workdir)) == 2
    assert [line["step"] for line in metrics.read(str(trained.workdir)) if "loss" in line] == [1, 2]
    assert (trained.workdir / "config.json").is_file()


def test_data_and_verify(job, trained, tmp_path):
    assert "2 records, " in job("data", *boxes(trained, tmp_path / "out"))
    assert "2 records" in job("verify", tmp_path / "out")
    assert ": 1, 2\n" in job("verify", trained.workdir), "checkpoints too"


@pytest.mark.processes
def test_upload(job, trained, tmp_path, running, monkeypatch):
    job("data", *boxes(trained, tmp_path / "out"))
    target = running.fresh(monkeypatch, tmp_path / "cache", timeout=2.0) + "/shards/out"
    job("upload", tmp_path / "out", target)
    assert "2 records" in job("verify", target)


def test_inspect(job, trained, tmp_path):
    job("inspect", trained.scenes / "shards" / "detection", f"--out={tmp_path / 'page.html'}", "--records=2")
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 2


def test_plan(job, trained):
    """By a config, and by the settings of a checkpoint, with one of them changed."""
    chips = ("--topology=a100:2", "--canvas=96x96")
    said = job("plan", f"--config={trained.config}", *chips)
    assert "2 images a step (1 a chip)" in said
    assert job("plan", f"--checkpoint={trained.workdir}", *chips) == said
    changed = job("plan", f"--checkpoint={trained.workdir}", "--config.train.batch-size=4", *chips)
    assert "4 images a step (2 a chip)" in changed


def test_label(job, trained, tmp_path):
    given = captions(tmp_path / "captions", trained)
    job("label", given, f"--workdir={trained.workdir}", f"--out={tmp_path / 'out'}", "--threshold=0.001")
    assert shards.Shards(tmp_path / "out").manifest.kinds == {"pseudo": 2}


def test_evaluate_score_report_and_compare(job, trained, tmp_path):
    command = (f"--config={trained.config}", f"--workdir={trained.workdir}", f"--out={tmp_path / 'out'}")
    said = job("evaluate", *command)
    assert "AP50" in said
    assert "R@1" in said
    assert set(json.loads((tmp_path / "out" / "evaluation.json").read_text())["sets"]) == {"scenes", "phrases"}
    scored = job(
        "score",
        "coco",
        f"--annotations={trained.scenes / 'validation' / 'annotations.json'}",
        f"--predictions={tmp_path / 'out' / 'detections_scenes.json'}",
    )
    evaluated = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sets"]["scenes"]["numbers"]
    assert json.loads(scored).items() >= {key: evaluated[key] for key in ("AP", "AP50", "AR100")}.items()
    (tmp_path / "out" / "report.html").unlink()
    job("report", f"--workdir={trained.workdir}", f"--out={tmp_path / 'out'}")
    assert (tmp_path / "out" / "report.html").is_file()
    job("compare", tmp_path / "out", f"--out={tmp_path / 'compared'}")
    assert (tmp_path / "compared" / "compare.html").is_file()


def test_benchmark(job, trained, tmp_path):
    """A set of one's own at the size of `evaluate`; the second time everything is there, and the third nothing is detected."""
    validation = trained.scenes / "validation"
    own = f"scenes,{validation / 'annotations.json'},{validation / 'images'}"
    sides = ("--config.evaluation.short-side=96", "--config.evaluation.long-side=96")
    command = (f"--checkpoint={trained.workdir}", "--own", own, f"--workdir={tmp_path / 'out'}", *sides)
    assert "scenes" in job("benchmark", *command)
    results = tmp_path / "out" / "results.json"
    first = json.loads(results.read_text())["sets"]["scenes"]
    assert first["overlap"]["images"]["images"] == 2
    assert first["asks"]["names"]["protocol"]["short_side"] == 96
    results.unlink()
    job("benchmark", *command)
    job("benchmark", "--score-only", "--own", own, f"--workdir={tmp_path / 'out'}")
    assert json.loads(results.read_text())["sets"]["scenes"] == first
    assert (tmp_path / "out" / "report.html").is_file()
    assert "scenes: scenes (as coco)" in job("benchmark", "--list", "--own", own)


def test_predict(job, trained, tmp_path):
    job(
        "predict",
        trained.scenes / "validation" / "images",
        f"--workdir={trained.workdir}",
        "--names=cat,dog",
        f"--out={tmp_path / 'out'}",
    )
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 2


def test_export_and_import(job, trained, tmp_path):
    """The export compares itself with the network it came from; imported again it has the same bits."""
    job("export", f"--workdir={trained.workdir}", f"--out={tmp_path / 'model'}", "--format=huggingface")
    job("import", tmp_path / "model", f"--workdir={tmp_path / 'run'}")
    saved = open_checkpoint(str(trained.workdir)).parameters("ema")
    assert fingerprint(open_checkpoint(str(tmp_path / "run")).parameters()) == fingerprint(saved)


def test_doctor(job):
    assert "jax" in job("doctor")


def test_every_job_has_run_here():
    here = set("_".join(name for name in globals() if name.startswith("test_")).split("_"))
    assert set(JOBS) <= here | {"finetune", "precompile", "serve"}  # in files of their own
