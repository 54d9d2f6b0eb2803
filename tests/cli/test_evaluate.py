"""The job `evaluate` on a random network of a few thousand parameters: what it writes, and what it refuses."""

import hashlib
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from glip_jax.cli import evaluate
from glip_jax.config import EvaluationConfig
from glip_jax.io.checkpoint import Checkpoints, Saved, fingerprint, open_checkpoint
from glip_jax.io.workdir import write_atomic, write_started_from
from tests import tiny_run
from tests.run_job import run_job, two_processes

pytestmark = pytest.mark.compiles

NAMES = ("cat", "dog", "person")


def _sets(folder):
    """Four pictures of 64 x 64 with a box each: as a detection set, and as captions, one of them too long."""
    (folder / "images").mkdir()
    absent, boxes, captions, spans = [], [], [], []
    for k in range(4):
        Image.new("RGB", (64, 64), (60 * k, 0, 0)).save(folder / "images" / f"{k}.png")
        entry = {"id": k, "file_name": f"{k}.png", "height": 64, "width": 64}
        box = {"id": k, "image_id": k, "bbox": [8 * k, 8, 24, 24]}
        boxes.append(box | {"category_id": k % 3})
        absent.append(entry | ({"known_absent": ["dog", "person"]} if k == 0 else {}))
        caption = NAMES[k % 3] + (" and so on" * 20 + " dog" if k == 3 else "")
        captions.append(entry | {"caption": caption})
        spans.append(box | {"tokens_positive": [[len(caption) - 3, len(caption)]]})
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    detection = {"images": absent, "annotations": boxes, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(detection))
    (folder / "captions.json").write_text(json.dumps({"images": captions, "annotations": spans}))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A config file, a working folder with a checkpoint whose averages differ from its parameters, and two sets."""
    folder = tmp_path_factory.mktemp("evaluate")
    _sets(folder)
    (folder / "tiny.py").write_text(
        "import dataclasses\n"
        "from glip_jax.config import EvaluationConfig, EvaluationSet\n"
        "from tests import tiny_run\n\n"
        "def get_config():\n"
        f"    boxes = EvaluationSet('{folder}/boxes.json', '{folder}/images', {{'cat': 'a cat'}})\n"
        f"    words = EvaluationSet('{folder}/captions.json', '{folder}/images', kind='grounding')\n"
        "    sets = EvaluationConfig({'boxes': boxes, 'words': words}, batch_size=4, short_side=64, long_side=64)\n"
        "    config = tiny_run.replace(tiny_run.config(dropout=0.0), 'detection', max_detections=5, threshold=0.0)\n"
        "    return dataclasses.replace(config, evaluation=sets)\n"
    )
    config = tiny_run.config(dropout=0.0)
    params = tiny_run.parameters(config.model)
    average = jax.tree.map(lambda value: value * np.float32(0.9), params)
    with Checkpoints(str(folder / "run"), keep=1) as checkpoints:
        checkpoints.save(7, Saved(params, {"count": np.zeros(1, np.float32)}, average), config)
    write_started_from(str(folder / "run"), {"sources": [{"path": "glip.pth", "sha256": "00ff"}]})
    return folder


@pytest.fixture(scope="module")
def evaluated(run):
    """The job has run once, into a folder of its own; its output and evaluation.json."""
    import contextlib
    import io

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = run_job(
            "evaluate",
            [
                f"--config={run / 'tiny.py'}",
                f"--workdir={run / 'run'}",
                f"--out={run / 'out'}",
                "--measure-chunking",
                "--false-alarms=0.5",
            ],
        )
    assert code == 0
    return output.getvalue(), json.loads((run / "out" / "evaluation.json").read_text())


@pytest.mark.slow
def test_two_processes_of_two_devices_write_what_one_process_writes(run):
    """Bit for bit, but for the date; with a device for each image."""
    arguments = [f"--config={run / 'tiny.py'}", f"--workdir={run / 'run'}", "--config.evaluation.batch-size=1"]
    assert run_job("evaluate", [*arguments, f"--out={run / 'one'}"]) == 0
    codes, output = two_processes("evaluate", *arguments, f"--out={run / 'two'}")
    assert codes == [0, 0], output
    assert "AP50" in output[0] and "AP50" not in output[1], "the first prints the tables"
    one, two = (json.loads((run / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one["sets"] == two["sets"] and one["hashes"] == two["hashes"]
    for name in ("boxes", "words"):
        ours, theirs = ((run / folder / f"detections_{name}.json").read_text() for folder in ("one", "two"))
        assert ours == theirs and len(json.loads(ours)) > 10


@pytest.mark.slow
def test_the_table_has_both_kinds(evaluated):
    output, _ = evaluated
    assert "step 7, parameters: ema" in output
    assert "boxes: 3 categories, prompted as: a cat, dog, person" in output
    assert "words: 4 phrases in 4 captions; 1 captions cut; 1 phrases over budget" in output
    assert re.search(
        r"^boxes, as many names a prompt as fit, shuffled with seed 0: AP50 0\.\d{4}, [+-]0\.\d{4}$",
        output,
        re.MULTILINE,
    )
    assert re.search(r"^set +images +AP +AP50 +permuted +ratio", output, re.MULTILINE)
    assert re.search(r"^set +captions +phrases +R@1", output, re.MULTILINE)


@pytest.mark.slow
def test_the_report_holds_what_moves_the_score(run, evaluated):
    _, summary = evaluated
    assert summary["step"] == 7 and summary["parameters"] == "ema"
    assert summary["settings"]["detection.max_detections"] == 5 and summary["settings"]["evaluation.short_side"] == 64
    assert summary["started_from"]["sources"] == [{"path": "glip.pth", "sha256": "00ff"}]
    hashes = summary["hashes"]
    assert hashes["checkpoint"] == fingerprint(open_checkpoint(str(run / "run")).parameters("raw"))
    assert (
        hashes["parameters"] == fingerprint(open_checkpoint(str(run / "run")).parameters("ema")) != hashes["checkpoint"]
    )
    assert len({hashes["config"], hashes["checkpoint's config"]}) == 2 and "files" in hashes["code"]
    boxes, words = summary["sets"]["boxes"], summary["sets"]["words"]
    assert boxes["chunks"] == [["a cat", "dog", "person"]]
    assert [(line["chunk"], line["seed"]) for line in boxes["chunking"]] == [(0, None), (0, 0), (2, None), (2, 0)]
    assert "chunking" not in words
    assert boxes["hashes"]["annotations"] == hashlib.sha256((run / "boxes.json").read_bytes()).hexdigest()
    assert boxes["hashes"]["pictures"] == words["hashes"]["pictures"]
    assert {"AP", "AP50", "AP50_permuted", "AP50_ratio"} <= set(boxes["numbers"])
    assert words["phrases"] == {"": 4} and words["unasked"] == [[3, [0]]] and words["counts"]["captions_cut"] == 1
    assert {"recall@1", "merged_recall@10"} <= set(words["numbers"])


@pytest.mark.slow
def test_absent_names_are_measured_beside_others_and_alone(run, evaluated):
    output, summary = evaluated
    absence = summary["sets"]["boxes"]["absence"]
    assert absence["absent_pairs"] == 2 == absence["alone"]["absent_pairs"] and absence["alone"]["present_pairs"] == 4
    assert set(absence["rates"]) == {"0.01", "0.05", "0.25", "0.5"}
    for name in ("boxes", "words"):
        at = summary["sets"][name]["at_false_alarms"]
        assert at["set"] == "boxes" and at["threshold"] == absence["rates"]["0.5"]["threshold"]
    assert summary["sets"]["boxes"]["at_false_alarms"]["numbers"]["false_alarms"] <= 0.5
    assert re.search(r"^absent names +pairs +alarms 0.3", output, re.MULTILINE)
    assert "words, at 0.5 false alarms (boxes: from " in output


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--false-alarms=0", "--false-alarms=0.0: expected more than 0"), ("--report=x", "--report=x gives thresholds for --false-alarms"),
     ("--alone=-1", "--alone=-1: expected 0 to"), ("--false-alarms=0.05 --report={run}", "is no report of `evaluate`")],
)  # fmt: skip
def test_flags_of_absent_names_that_cannot_be(run, capsys, argument, message):
    command = [f"--config={run / 'tiny.py'}", f"--workdir={run / 'run'}", *argument.format(run=run).split()]
    assert run_job("evaluate", command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_lies_where_it_was_asked_for_and_is_whole(run, evaluated):
    names = {path.name for path in (run / "out").iterdir()}
    assert names == {"evaluation.json", "detections_boxes.json", "detections_words.json", "report.html"}
    assert not (run / "run" / "evaluation.json").exists()
    rows = json.loads((run / "out" / "detections_words.json").read_text())
    assert rows and set(rows[0]) == {"image_id", "phrase", "bbox", "score"}
    assert {row["image_id"] for row in rows} == {0, 1, 2}, "of the last caption nothing was asked"
    assert str(run / "out" / "report.html") in evaluated[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config={run}/tiny.py"], "no checkpoint: expected --checkpoint="),
        (["--config={run}/tiny.py", "--workdir={run}/nothing"], "holds no complete checkpoint"),
        (["--config={run}/tiny.py", "--workdir={run}/run", "--step=5"], "no checkpoint of step 5; there are: [7]"),
        (
            ["--config={run}/tiny.py", "--workdir={run}/run", "--config.model.head.blocks=2"],
            "model.head.blocks: 1 -> 2",
        ),
        (
            ["--config={run}/tiny.py", "--workdir={run}/run", "--config.evaluation.sets.boxes.images=x"],
            "x does not exist",
        ),
        (
            ["--config={run}/tiny.py", "--workdir={run}/run", "--config.evaluation.sets.words.kind=detection"],
            "categories",
        ),
        (["--config={run}/tiny.py", "--workdir={run}/run", "--out={run}/tiny.py/below"], "tiny.py"),
        (
            ["--config={run}/tiny.py", "--workdir={run}/run", "--chunk=20,-1"],
            "--chunk=-1: expected 0 to",
        ),
    ],
)
def test_what_cannot_be_evaluated_gives_one_line(run, capsys, arguments, message):
    assert run_job("evaluate", [argument.format(run=run) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (run / "run" / "evaluation.json").exists()


def test_a_config_without_sets_is_refused(run):
    config = tiny_run.config()
    assert config.evaluation == EvaluationConfig()
    with pytest.raises(evaluate.CommandLineError, match="evaluation.sets is empty"):
        evaluate.evaluate_checkpoint(config, open_checkpoint(str(run / "run")), str(run / "out"))


@pytest.mark.slow
def test_an_evaluation_that_is_there_is_left_unless_something_moved(run, tmp_path, evaluated, capsys):
    """`evaluated` has put one into run / "out"."""
    out = run / "out" / "evaluation.json"
    before = out.read_text()
    command = [
        f"--config={run / 'tiny.py'}",
        f"--workdir={run / 'run'}",
        f"--out={run / 'out'}",
        "--unless-done",
        "--false-alarms=0.5",
    ]
    assert run_job("evaluate", command) == 0
    assert "nothing is measured twice" in capsys.readouterr().out and out.read_text() == before

    def done(*more):
        arguments = evaluate.parse([*command, *more], evaluate.EvaluateArguments, "evaluate")
        return evaluate._done(arguments, open_checkpoint(arguments.workdir), arguments.out)

    assert done() and done("--measure-chunking") and done("--chunk=0,2", "--chunk-seeds=0")
    assert not done("--chunk=0,2") and not done("--chunk=0,2", "--chunk-seeds=0", "--chunk-images=1")
    assert not done("--config.detection.nms-iou=0.5") and not done("--config.evaluation.parameters=raw")
    assert not done(f"--out={tmp_path}") and not done("--alone=2") and not done("--false-alarms=0.25")
    for change in ({"seed": 5}, {"versions": {}}, {"hashes": {}}, {"sets": {}}):
        out.write_text(json.dumps(json.loads(before) | change))
        assert not done(), change
    out.write_text(before)
    truth = (run / "boxes.json").read_text()
    (run / "boxes.json").write_text(truth + " ")
    assert not done()
    (run / "boxes.json").write_text(truth)
    picture = run / "images" / "0.png"
    pixels = picture.read_bytes()
    picture.write_bytes(pixels + b" ")
    assert not done(), "another image behind the same annotations"
    picture.write_bytes(pixels)
    detections = run / "out" / "detections_words.json"
    detections.rename(tmp_path / "aside")
    assert not done()
    (tmp_path / "aside").rename(detections)
    assert done()


def test_what_is_interrupted_leaves_the_earlier_report(tmp_path):
    from etils import epath

    path = epath.Path(tmp_path) / "evaluation.json"
    write_atomic(path, "old")

    class Full(type(path)):
        def write_bytes(self, data):
            super().write_bytes(data[:1])
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomic(Full(path), "new")
    assert path.read_text() == "old" and [p.name for p in epath.Path(tmp_path).iterdir()] == ["evaluation.json"]
