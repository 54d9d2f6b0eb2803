"""The job finetune, from a folder of drawn images and the checkpoint of the minute run."""

import json
import shutil

import jax
import pytest
from PIL import Image, ImageDraw

from glip_jax.__main__ import main
from glip_jax.cli import finetune, finetune_data
from glip_jax.cli.command_line import CommandLineError
from glip_jax.cli.finetune_data import kept_set
from glip_jax.cli.reports import finetune_report
from glip_jax.config import Config, EvaluationConfig, EvaluationSet
from glip_jax.distributed import mesh
from glip_jax.distributed.mesh import make_mesh
from glip_jax.evaluation import average_precision
from glip_jax.training import loop
from tests.tiny_run import COLORS

NAMES = ("red square", "blue square")


def write_data(folder, splits=("train", "valid", "test"), names=NAMES, images=4):
    """Roboflow's layout: squares on gray."""
    for split in splits:
        (folder / split).mkdir(parents=True)
        coco = {"images": [], "annotations": [], "categories": [{"id": i + 1, "name": n} for i, n in enumerate(names)]}
        for i in range(images):
            label, corner = i % len(names), 8 + 4 * i + sum(map(ord, split)) % 17
            image = Image.new("RGB", (96, 96), (200, 200, 200))
            ImageDraw.Draw(image).rectangle((corner, corner, corner + 30, corner + 30), fill=COLORS[label])
            image.save(folder / split / f"{split}{i}.png")
            coco["images"].append({"id": i, "file_name": f"{split}{i}.png", "height": 96, "width": 96})
            coco["annotations"].append(
                {"id": i + 1, "image_id": i, "category_id": label + 1, "bbox": [corner, corner, 31, 31]}
            )
        (folder / split / "_annotations.coco.json").write_text(json.dumps(coco))
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def said(capsys, monkeypatch):
    """The lines of a command that ends with a code; it runs on one device, for which less is compiled."""
    for module in (mesh, loop):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def run(*argv, code=2):
        assert main(["finetune", *map(str, argv)]) == code
        return capsys.readouterr()

    return run


@pytest.mark.compiles
def test_from_a_folder_to_a_table(trained, tmp_path, said):
    """Two steps of the head; then the same command again, and another one."""
    data, workdir = write_data(tmp_path / "data"), tmp_path / "run"
    before = contents(data)
    command = (
        f"--data={data}", f"--checkpoint={trained.workdir}", f"--workdir={workdir}", "--tune=head", "--steps=2",
    )  # fmt: skip
    out = said(*command, code=0).out
    assert contents(data) == before
    result = json.loads((workdir / "finetune.json").read_text())
    assert result["split"] == "test" and result["tune"] == "head" and set(result["per_class"]) == set(NAMES)
    for numbers in (result["zero_shot"], result["tuned"], result["valid"]["tuned"], result["test"]["zero_shot"]):
        assert 0 <= numbers["AP"] <= numbers["AP50"] <= 1
    assert [point["step"] for point in result["curve"]] == [2]
    assert "red square" in out and "<html" in (workdir / "report.html").read_text()
    # The result is a delta on the base, and the large checkpoints are gone.
    assert json.loads((workdir / "run" / "delta" / "delta.json").read_text())["mode"] == "head"
    assert not (workdir / "run" / "checkpoints").exists()
    assert "is finished" in said(*command, code=0).out
    assert "steps: 2 -> 3" in said(*command[:-1], "--steps=3").err


@pytest.mark.compiles
def test_the_recipe_of_the_original_and_the_last_word_of_the_command(trained, tmp_path, monkeypatch):
    """The settings that a run has: measured before and after at the recipe's size, evaluated every epoch; 6 images are 2 steps."""
    seen = []
    monkeypatch.setattr(finetune.FinetuneJob, "_start", lambda self, config: seen.append(config))
    monkeypatch.setattr(finetune.FinetuneJob, "measured", lambda self, config, *_: seen.append(config) or {"valid": []})

    def stop(config, *_, **__):
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", stop)
    data = write_data(tmp_path / "data", images=6)
    command = (f"--data={data}", f"--checkpoint={trained.workdir}", f"--workdir={tmp_path / 'run'}", "--as-glip=full")
    assert main(["finetune", *command, "--config.optimizer.rate=0.5", "--config.train.log-every=7"]) == 130
    (before, trains) = seen[1], seen[2]
    assert (
        before.evaluation == trains.evaluation and trains.evaluation.short_side == 800 and trains.train.batch_size == 4
    )
    assert (trains.train.steps, trains.train.evaluate_every) == (400, 2)
    assert trains.optimizer.rate == 0.5 and trains.train.log_every == 7


@pytest.mark.compiles
@pytest.mark.slow
def test_shots_seeds_kept_sets_and_ctrl_c_in_each_phase(trained, tmp_path, said, monkeypatch):
    """Two few-shot runs of tuned prompts, with earlier shards, a kept set and mixtures of the weights; each saves what differs."""
    data, workdir = write_data(tmp_path / "data", images=6), tmp_path / "run"
    command = (
        f"--data={data}", f"--checkpoint={trained.workdir}", f"--workdir={workdir}", "--tune=prompt", "--steps=2", "--shots=1",
        "--seeds=3,30", "--keep=scenes", "--interpolate=0,1", f"--replay={trained.scenes}/shards/detection:0.25",
    )  # fmt: skip

    def stop(*_, **__):
        raise KeyboardInterrupt

    phases = (
        (finetune_data, "findings"), (average_precision, "load_ground_truth"), (loop, "train"), (finetune_report, "render"),
    )  # fmt: skip
    for phase in phases:
        with monkeypatch.context() as patch:
            patch.setattr(*phase, stop)
            said(*command, code=130)
    measured = contents(workdir / "evaluations")
    said(*command, code=0)
    assert measured and measured.items() <= contents(workdir / "evaluations").items(), "nothing is measured again"
    result = json.loads((workdir / "finetune.json").read_text())
    assert [(run["seed"], run["shots"], run["images"]) for run in result["runs"]] == [(3, 1, 2), (30, 1, 2)]
    assert result["seeds"]["1"]["AP"]["tuned"]["count"] == 2
    assert all((workdir / f"shots1_seed{seed}" / "delta" / "delta.json").exists() for seed in (3, 30))
    ends = {point["share"]: point for point in result["interpolation"]}
    assert ends[0.0]["kept"]["scenes"] == result["kept"]["scenes"]["before"]
    assert ends[1.0]["kept"]["scenes"] == result["kept"]["scenes"]["after"]
    assert ends[0.0]["new"] == result["valid"]["zero_shot"]["AP"] and ends[1.0]["new"] == result["valid"]["tuned"]["AP"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no --data"),
        (["--data=DATA"], "no --workdir"),
        (["--data=DATA", "--workdir=DATA/run"], "nothing is written"),
        (["--data=EMPTY", "--workdir=RUN"], "no data set"),
        (["--data=NONE", "--workdir=RUN"], "does not exist"),
        (["--data=DATA", "--workdir=RUN", "--tune=prompt"], "give a --checkpoint"),
        (["--data=DATA", "--workdir=RUN", "--replay=shards"], "expected SHARDS:SHARE"),
        (["--data=DATA", "--workdir=RUN", "--seeds=3,3"], "twice"),
        (["--data=DATA", "--workdir=RUN", "--mode=lora"], "unknown option --mode"),
        (["--data=DATA", "--workdir=RUN", "--checkpoint=NONE"], "NONE"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, said, arguments, message):
    places = {
        "DATA": write_data(tmp_path / "DATA"),
        "EMPTY": tmp_path / "EMPTY",
        "NONE": tmp_path / "NONE",
        "RUN": tmp_path / "RUN",
    }
    places["EMPTY"].mkdir()
    for name, place in places.items():
        arguments = [each.replace(f"={name}", f"={place}") for each in arguments]
    shown = said(*arguments)
    assert message in shown.err and "Traceback" not in shown.err and shown.err.count("\n") == 1
    assert not list((tmp_path / "DATA").glob("run*"))


def test_a_kept_set_without_its_files_is_refused_before_training(tmp_path):
    """It is measured only at the end."""
    missing = EvaluationSet(str(tmp_path / "missing.json"), str(tmp_path))
    config = Config(evaluation=EvaluationConfig(sets={"scenes": missing}))
    for name in ("scenes", f"{tmp_path}/missing.json:{tmp_path}"):
        with pytest.raises(CommandLineError, match=rf"--keep={name}: .*missing\.json does not exist"):
            kept_set(name, config)
    with pytest.raises(
        CommandLineError, match="expected ANNOTATIONS.json:IMAGES, or a detection set of the checkpoint"
    ):
        kept_set("houses", config)


def test_a_corrected_command_goes_on_in_the_same_folder(tmp_path, said, monkeypatch):
    """What was refused is not remembered; what began is: other options, and other data."""

    def stop(*_):
        raise KeyboardInterrupt

    data, workdir = write_data(tmp_path / "data"), tmp_path / "run"
    assert "does not exist" in said("--data=nowhere", f"--workdir={workdir}").err
    monkeypatch.setattr(finetune.FinetuneJob, "_train", stop)
    said(f"--data={data}", f"--workdir={workdir}", code=130)
    assert json.loads((workdir / "data" / "train.json").read_text())["images"]
    assert "minutes: 10.0 -> 5.0" in said(f"--data={data}", f"--workdir={workdir}", "--minutes=5").err
    shutil.rmtree(data)
    write_data(data, images=3)
    assert "the data changed" in said(f"--data={data}", f"--workdir={workdir}").err
