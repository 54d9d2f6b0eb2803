"""The job `benchmark` with a stand-in for checkpoint and detector: files, exit codes, bad input, kill -9; two processes with a network."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glip_jax.distributed import exit_codes
from glip_jax.io.checkpoint import Checkpoints, Saved
from tests import tiny_run
from tests.evaluation.benchmark.stand_in import IMAGES, files, small, stand_in, write_made
from tests.evaluation.official_layouts import write_set
from tests.run_job import run_job


@pytest.fixture
def made(tmp_path):
    return write_made(tmp_path)


def arguments(made, out="out", like="lvis_minival", name="made"):
    return [
        "--checkpoint=run",
        "--own",
        f"{name},{made / 'truth.json'},{made / 'images'},{like}",
        f"--workdir={made / out}",
    ]


def results(made, out="out"):
    return json.loads((made / out / "results.json").read_text())


def test_a_missing_set_is_a_line_and_the_others_are_done(made, monkeypatch, capsys):
    stand_in(monkeypatch)
    code = run_job("benchmark", [*arguments(made), "--sets=refcoco_val,coco", f"--data={made}", "--drawn=1"])
    said = capsys.readouterr()
    assert code == exit_codes.BAD_INPUT
    assert re.search(r"missing: coco: annotations: .*instances_val2017.json", said.err)
    assert "2 of 3 sets have no numbers: refcoco_val, coco" in said.err
    assert {"results.json", "results.csv", "results.tex", "report.html"} <= {
        path.name for path in (made / "out").iterdir()
    }
    assert list(results(made)["missing"]) == ["refcoco_val", "coco"]
    assert "fixed AP" in said.out
    assert "step 3, ema" in said.out
    assert "absent names: false alarms" in said.out


def test_a_half_downloaded_set_and_one_of_another_version_are_named(made, monkeypatch, capsys):
    stand_in(monkeypatch)
    write_set("coco", made)
    (made / "images" / "6.png").unlink()
    code = run_job("benchmark", [*arguments(made), "--sets=coco", f"--data={made}"])
    said = capsys.readouterr().err
    assert code == exit_codes.BAD_INPUT
    assert "1 of 7 images of made are missing or empty" in said
    assert "3 images, 3 categories, expected 5,000 images, 80 categories" in said
    assert "none of the 2 sets has a number" in said
    assert not (made / "out" / "results.json").exists()


@pytest.mark.long
def test_later_sets_join_the_table_and_scoring_alone_gives_the_same(made, monkeypatch, capsys):
    calls = stand_in(monkeypatch)
    assert run_job("benchmark", arguments(made)) == exit_codes.DONE
    assert sum(calls) == 7
    assert run_job("benchmark", arguments(made, name="again", like="coco")) == exit_codes.DONE
    assert list(results(made)["sets"]) == ["made", "again"]
    assert run_job("benchmark", ["--score-only", *arguments(made)]) == exit_codes.DONE
    both = results(made)["sets"]
    assert list(both) == ["made", "again"], "a set that is scored again keeps its place"
    (made / "out" / "results.json").unlink()
    calls.clear()
    monkeypatch.setattr("glip_jax.inference.Detector", None)
    for name, like in (("made", "lvis_minival"), ("again", "coco")):
        assert run_job("benchmark", ["--score-only", *arguments(made, like=like, name=name)]) == exit_codes.DONE
    assert results(made)["sets"] == both
    assert not calls
    # A folder is of one checkpoint.
    stand_in(monkeypatch, step=4)
    assert run_job("benchmark", arguments(made)) == exit_codes.BAD_INPUT
    assert "holds results of another checkpoint (run, step 3, ema parameters)" in capsys.readouterr().err


@pytest.mark.long
def test_what_the_command_changes_is_part_of_the_protocol(made, monkeypatch):
    stand_in(monkeypatch)
    changes = [
        "--config.evaluation.chunk=2",
        "--config.detection.max-detections=7",
        "--order=5",
        "--config.evaluation.short-side=64",
    ]
    assert run_job("benchmark", [*arguments(made), *changes]) == exit_codes.DONE
    protocol = results(made)["sets"]["made"]["asks"]["names"]["protocol"]
    assert (protocol["chunk"], protocol["boxes"], protocol["order"], protocol["short_side"]) == (2, 7, "seed 5", 64)
    assert protocol["long_side"] == 1333, "as the set says, not as the checkpoint was trained"


@pytest.mark.long
def test_other_sizes_and_orders_of_prompts_are_compared(made, monkeypatch, capsys):
    calls = stand_in(monkeypatch)
    command = [*arguments(made, like="coco"), "--chunk=2,0", "--chunk-seeds=3", "--chunk-images=4"]
    assert run_job("benchmark", command) == exit_codes.DONE
    assert sum(calls) == IMAGES + 4 * 4, "all images once, and the four with four kinds of prompts"
    said = capsys.readouterr().out
    asked = results(made)["sets"]["made"]["asks"]["names"]
    found = asked["chunking"]
    assert [(one["chunk"], one["seed"], one["images"]) for one in found] == [
        (0, None, 4),
        (0, 3, 4),
        (2, None, 4),
        (2, 3, 4),
    ]
    assert found[0]["difference"] == 0 and len({one["value"] for one in found}) > 1
    assert found[3]["difference"] == found[3]["value"] - found[0]["value"]
    line = f"names, at most 2 names a prompt, shuffled with seed 3: AP {found[3]['value']:.4f}"
    assert line in said and line in (made / "out" / "report.html").read_text()
    calls.clear()
    assert run_job("benchmark", [*command[:-1], "--chunk-images=0"]) == exit_codes.BAD_INPUT
    assert "holds detections of" in capsys.readouterr().err
    assert run_job("benchmark", command) == exit_codes.DONE and not calls, "nothing is detected twice"
    assert run_job("benchmark", ["--score-only", *arguments(made, like="coco")]) == exit_codes.DONE
    assert results(made)["sets"]["made"]["asks"]["names"] == asked
    # Of all images the predictions of the set are the reference.
    assert run_job("benchmark", [*command[:-2], f"--workdir={made / 'whole'}", "--chunk-seeds="]) == exit_codes.DONE
    whole = results(made, "whole")["sets"]["made"]["asks"]["names"]
    assert [(one["chunk"], one["images"]) for one in whole["chunking"]] == [(0, "all"), (2, "all")]
    assert whole["chunking"][0]["value"] == whole["metrics"]["AP"]["numbers"]["AP"] and sum(calls) == 2 * IMAGES


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--chunk=20,-1"], "--chunk=-1: expected 0 to"),
        (["--workdir="], "expected --workdir=DIR"),
        (["--sets=coco"], "expected --data=DIR"),
        (["--drawn=-1"], "--drawn=-1: expected 0 to"),
        (["--workdir=run"], "--workdir=run is the working folder of a run"),
        (["--own="], "expected NAME,ANNOTATIONS,IMAGES"),
        (["--own=made,a.json,b", "c.json,d"], "expected NAME,ANNOTATIONS,IMAGES"),
        (["--own=made,a.json,images,nothing"], "no set 'nothing'"),
        (["--own=coco,a.json,images"], "named 'coco'"),
        (["--sets=cocoo", "--data=."], "did you mean"),
        (["--asks=prompts"], "made is asked by names, names_parallel, not by prompts"),
        (["--own=a,a.json,b", "--own", "c,c.json,d"], "--own is given twice"),
        (["--score-only"], "holds no finished predictions: run without --score-only"),
    ],
)
def test_bad_commands(made, monkeypatch, capsys, changed, message):
    stand_in(monkeypatch)
    monkeypatch.chdir(made)
    (made / "run" / "checkpoints").mkdir(parents=True)
    names = {argument.partition("=")[0] for argument in changed}
    usual = [a for a in arguments(made) if a.partition("=")[0] not in names]
    if "--own" in names:
        usual = [argument for argument in usual if not argument.startswith("made,")]
    assert run_job("benchmark", [*usual, *changed]) == exit_codes.BAD_INPUT
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "made/names/predictions.json",
            "[",
            "predictions.json has 1 bytes, .* were written: remove .*names and detect again",
        ),
        ("made/names/predictions.json", None, "predictions.json is gone"),
        ("made/names/plan.json", "{", "plan.json is damaged"),
        ("made/names/plan.json", "[]", "plan.json is damaged"),
        ("made/names/done.json", "{}", "done.json is damaged"),
        ("made/names/annotations.json", None, "annotations.json is gone, the annotations of the images asked"),
        ("results.json", "{", "results.json is damaged .*remove it"),
        ("results.json", '{"format": 0}', "results.json is of another version"),
    ],
)
def test_damaged_results_are_named(once, monkeypatch, tmp_path, capsys, file, content, message):
    """By --score-only, by the whole job where it reads them, and not by --list."""
    made = Path(shutil.copytree(once, tmp_path / "copy"))
    stand_in(monkeypatch)
    path = made / "out" / file
    path.unlink() if content is None else path.write_text(content)
    code = run_job("benchmark", ["--score-only", *arguments(made, like="coco")])
    assert code == exit_codes.BAD_INPUT
    assert re.search(message, capsys.readouterr().err)
    assert run_job("benchmark", ["--list", *arguments(made, like="coco")]) == exit_codes.DONE
    if "annotations" not in file:
        run_job("benchmark", [*arguments(made, like="coco"), "--config.evaluation.max-images=2"])
        assert re.search("damaged|is gone|were written|another version", capsys.readouterr().err)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A finished job on the first two images."""
    made = write_made(tmp_path_factory.mktemp("once"))
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        few = ["--config.evaluation.max-images=2", "--drawn=0"]
        assert run_job("benchmark", [*arguments(made, like="coco"), *few]) == exit_codes.DONE
    return made


def test_list_says_what_is_missing(made, capsys):
    write_set("coco", made)
    assert run_job("benchmark", ["--list", "--sets=coco,d3", f"--data={made}"]) == exit_codes.DONE
    said = capsys.readouterr().out
    assert "COCO val2017" in said
    assert "MISSING" in said
    assert "5,000 images" in said


def process(*own, kill="", network=False):
    flags = re.sub(r"(device_count)=\d+", r"\1=2", os.environ["XLA_FLAGS"])
    environment = {**os.environ, "KILL": kill, "NETWORK": "yes" * network, "XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.evaluation.benchmark.worker", *own], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("kill", ["block", "predictions"])
def test_kill_and_the_same_command_give_the_same_numbers(made, monkeypatch, kill):
    stand_in(monkeypatch)
    assert run_job("benchmark", arguments(made, "straight")) == exit_codes.DONE
    killed = process(*arguments(made), kill=kill)
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert not files(made / "out")
    assert run_job("benchmark", arguments(made)) == exit_codes.DONE
    assert files(made / "out") == files(made / "straight")
    scored = [results(made, out)["sets"]["made"]["asks"]["names"]["metrics"] for out in ("out", "straight")]
    assert scored[0] == scored[1]


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_give_the_numbers_of_one(made, monkeypatch):
    """With a network. Also where a set cannot be used: both end with the exit code of a missing set."""
    small(monkeypatch)
    config = tiny_run.config(dropout=0.0)
    with Checkpoints(str(made / "network"), keep=1) as checkpoints:
        checkpoints.save(7, Saved(tiny_run.parameters(config.model), {"count": np.zeros(1, np.float32)}, None), config)
    settings = [
        f"--checkpoint={made / 'network'}", "--config.evaluation.parameters=raw", "--config.evaluation.batch-size=1",
        "--config.evaluation.short-side=64", "--config.evaluation.long-side=64", "--config.detection.threshold=0.0",
        "--config.detection.max-detections=5", "--drawn=0", "--sets=coco", f"--data={made}",
    ]  # fmt: skip
    assert run_job("benchmark", [*arguments(made, "straight")[1:], *settings]) == exit_codes.BAD_INPUT
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    both = [
        process(*arguments(made)[1:], *settings, where, "--processes=2", f"--index={index}", network=True)
        for index in range(2)
    ]
    said = [each.communicate(timeout=300)[0] for each in both]
    assert [each.returncode for each in both] == [exit_codes.BAD_INPUT] * 2, said
    found = files(made / "out")
    assert found == files(made / "straight") and len(json.loads(next(iter(found.values())))) > 20
    assert (
        results(made)["sets"]["made"]["asks"]["names"]["metrics"]
        == results(made, "straight")["sets"]["made"]["asks"]["names"]["metrics"]
    )
    assert "fixed AP" in said[0]
    assert "fixed AP" not in said[1]
