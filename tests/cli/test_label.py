"""The job `label`: with a random network of a few thousand parameters, with detections of a file, killed, and in three parts at once, in a bucket too."""

import dataclasses
import json
import re
import resource
import time

import jax
import numpy as np
import pytest

from glip_jax import __main__ as door
from glip_jax.config import SourceConfig
from glip_jax.data import shards
from glip_jax.data.captions import Captioner, rng_of
from glip_jax.data.records import Record, boxes_array
from glip_jax.distributed import exit_codes
from glip_jax.io import gcs
from glip_jax.io.checkpoint import Checkpoints, Saved, fingerprint, open_checkpoint
from glip_jax.structures.prompts import load_tokenizer
from tests import tiny_run
from tests.labeling import slow_label
from tests.labeling.test_teacher import png
from tests.run_job import run_job

pytestmark = pytest.mark.compiles

TEXTS = ("a cat and a dog", "the person", "and so on", "a dog by a person", "two cats", "a red dog")


def captions(folder, count=12, files=3, name="cc"):
    """Shards of pictures with captions, one of which names nothing and one of which cannot be decoded."""
    records = [
        Record(
            f"{i}", "caption", png(i, corrupt=i == 3), 50, 100, boxes_array(()), caption=TEXTS[i % len(TEXTS)],
            file=f"{i}.png",
        )
        for i in range(count)
    ]  # fmt: skip
    shards.write(iter(records), folder, name=name, shards=files, licence="CC0")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A working folder with a checkpoint whose averages differ from its parameters, and captions."""
    folder = tmp_path_factory.mktemp("label")
    captions(folder / "captions")
    config = tiny_run.replace(tiny_run.config(dropout=0.0), "evaluation", batch_size=4, short_side=64, long_side=128)
    params = tiny_run.parameters(config.model)
    average = jax.tree.map(lambda value: value * np.float32(0.9), params)
    with Checkpoints(str(folder / "run"), keep=1) as checkpoints:
        checkpoints.save(7, Saved(params, {"count": np.zeros(1, np.float32)}, average), config)
    # Somebody else's detections of the same images.
    names = {"categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
    images = {"images": [{"id": i, "file_name": f"{i}.png", "height": 50, "width": 100} for i in range(60)]}
    rows = [
        {"image_id": i, "category_id": c, "bbox": [10 * c, 5, 30, 30], "score": 0.4 + 0.01 * i}
        for i in range(60)
        for c in (1, 2)
    ]
    (folder / "names.json").write_text(json.dumps(names | images))
    (folder / "found.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def labelled(run):
    """What a network of random numbers finds, which is something everywhere."""
    command = [
        run / "captions",
        f"--workdir={run / 'run'}",
        f"--out={run / 'out'}",
        "--threshold=0.02",
        "--most-boxes=2",
    ]
    assert run_job("label", list(map(str, command))) == 0
    return command, shards.Shards(run / "out")


@pytest.mark.slow
def test_captions_become_pseudo_records(run, labelled):
    _, made = labelled
    assert made.manifest.kinds == {"pseudo": len(made)} and made.manifest.licence == "CC0"
    assert [shard["file"] for shard in made.manifest.shards] == shards.shard_files(3)
    assert not list((run / "out").glob(".partial")), "nothing but the result is left"
    by_id = {record.id: record for record in (made[i] for i in range(len(made)))}
    assert set(by_id) == {"0", "1", "4", "5", "6", "7", "9", "10", "11"}
    assert made.manifest.drops["caption: no noun phrase"] == 2 and made.manifest.drops["image: cannot be decoded"] == 1
    first = by_id["0"]
    assert first.caption == TEXTS[0] and first.image == png(0)
    phrases = [first.caption[begin:end] for ((begin, end),) in (*first.spans, *first.unknown)]
    assert set(phrases) == {"a cat", "a dog"} and max(map(phrases.count, phrases)) <= 2
    about = json.loads(first.provenance)
    assert about["teacher"] == fingerprint(open_checkpoint(str(run / "run")).parameters("ema"))[:16]
    assert about["threshold"] == 0.02 and about["most_boxes"] == 2 and about["finder"].startswith("lexicon ")
    assert {"config", "code", "nms", "most_phrases"} <= set(about)


@pytest.mark.slow
def test_the_report_says_what_was_kept(run, labelled):
    report = json.loads((run / "out" / "report.json").read_text())
    output = report["summary"]
    assert (output["captions"], output["kept"]) == (12, 9) and output["boxes"] == labelled[1].manifest.boxes
    assert (
        sum(output["box_scores"]) == output["boxes"]
        and sum(output["phrases_by_boxes"].values()) == output["phrases"] == 12
    )
    assert report["settings"]["thresholds"] == {"cc": 0.02} and report["versions"]["jax"]
    page = (run / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 9 and page.count("data:image/svg+xml") == 2
    assert "75.0%" in page and not re.search(r'(src|href)="(?!data:)', page), "the page needs no other file"


@pytest.mark.slow
def test_training_and_inspect_take_what_was_made(run, labelled, tmp_path):
    config = tiny_run.config({"cc": SourceConfig(str(run / "out"))})
    captioner = Captioner((), load_tokenizer(tiny_run.VOCABULARY), config.data.captions, config.model.text.max_tokens)
    record = labelled[1][0]
    text = captioner(record, rng_of(0, 0))
    assert text.keep.all() and text.positive_map.any(1).all()
    assert run_job("inspect", [str(run / "out"), f"--out={tmp_path / 'page.html'}"]) == 0


@pytest.mark.slow
def test_a_finished_folder_is_not_made_again_but_its_page_is(run, labelled, capsys):
    command, _ = labelled
    (run / "out" / "report.html").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (run / "out").iterdir()}
    assert run_job("label", list(map(str, command))) == 0
    out = capsys.readouterr().out
    assert "nothing is made twice" in out and "HTML report" in out
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in (run / "out").iterdir()}.items()


def test_a_finished_folder_of_other_settings_is_refused_and_left_as_it_is(run, many, tmp_path, capsys):
    source, _ = many
    made = str(tmp_path / "made")
    assert run_job("label", outside(run, source, made)) == 0
    (tmp_path / "made" / ".partial").mkdir()  # what another process may be at
    capsys.readouterr()
    assert run_job("label", outside(run, source, made, "--threshold=0.7")) == exit_codes.BAD_INPUT
    assert "is finished, with other settings (existing -> given: thresholds" in capsys.readouterr().err
    assert (tmp_path / "made" / ".partial").exists()
    # Other captions of the same images.
    records = shards.Shards(source)
    other = (dataclasses.replace(records[i], caption=f"{records[i].caption} outside") for i in range(len(records)))
    shards.write(other, tmp_path / source.name, name=records.manifest.name)
    assert run_job("label", outside(run, tmp_path / source.name, made)) == exit_codes.BAD_INPUT
    assert re.search("is finished, with other settings .*records: {", capsys.readouterr().err)
    # The same shards by another path are the same captions.
    assert run_job("label", outside(run, f"{source}/../{source.name}/", made)) == 0
    assert "nothing is made twice" in capsys.readouterr().out and not (tmp_path / "made" / ".partial").exists()


@pytest.mark.slow
def test_the_last_parameters_and_a_mirrored_view(run, tmp_path):
    command = [
        "--no-ema",
        "--flip",
        "--scales=48,64",
        "--threshold=0.02",
        f"--workdir={run / 'run'}",
        f"--out={tmp_path / 'out'}",
    ]
    assert run_job("label", [str(run / "captions"), *command]) == 0
    about = json.loads(shards.Shards(tmp_path / "out")[0].provenance)
    assert about["teacher"] == fingerprint(open_checkpoint(str(run / "run")).parameters("raw"))[:16]
    assert about["views"] == "flip 48,64"


@pytest.mark.slow
def test_the_round_after_labels_the_captions_anew(run, labelled, tmp_path):
    """Pseudo records are captions too, and nothing of the first teacher's boxes is left."""
    _, first = labelled
    again = ["--threshold=0.05", f"--detections={run / 'found.json'}", f"--categories={run / 'names.json'}"]
    assert run_job("label", [str(run / "out"), *again, f"--out={tmp_path / 'again'}"]) == 0
    second = shards.Shards(tmp_path / "again")
    assert second.manifest.kinds == {"pseudo": len(second)} and 0 < len(second) <= len(first)
    old = {first[i].id: first[i] for i in range(len(first))}
    for record in (second[i] for i in range(len(second))):
        before = old[record.id]
        assert record.caption == before.caption and record.image == before.image
        assert record.boxes.tolist() != before.boxes.tolist()
        teachers = [json.loads(each.provenance)["teacher"] for each in (record, before)]
        assert teachers[0].startswith("detections ") and teachers[0] != teachers[1]


def outside(run, source, out, *more):
    return [
        str(source),
        f"--detections={run / 'found.json'}",
        f"--categories={run / 'names.json'}",
        f"--out={out}",
        *more,
    ]


@pytest.fixture(scope="module")
def many(run):
    """Captions of sixty images in six files, and what comes of them when nothing disturbs."""
    captions(run / "many", 60, 6, "many")
    assert run_job("label", outside(run, run / "many", run / "whole")) == 0
    return run / "many", run / "whole"


def contents(folder):
    """All that does not tell of time, command and commit (others may commit while tests run)."""
    made = shards.Shards(folder)
    records = [made[i] for i in range(len(made))]
    rows = [(r.id, r.image, r.boxes.tolist(), r.spans, r.scores, r.unknown) for r in records]
    about = [json.loads(r.provenance) | {"code": ""} for r in records]
    output = json.loads((folder / "report.json").read_text())["summary"]
    return rows, about, {k: v for k, v in output.items() if k not in ("seconds", "code")}, [*made.hash, *made.width]


def test_detections_of_a_file(many):
    source, whole = many
    made = shards.Shards(whole)
    output = json.loads((whole / "report.json").read_text())["summary"]
    assert output["captions"] == 60 and 0 < output["kept"] == len(made) < 50
    assert output["notes"]["phrase: names no category of the detections"]["count"] > 0
    assert all(json.loads(made[i].provenance)["teacher"].startswith("detections ") for i in range(len(made)))
    assert min(score for i in range(len(made)) for score in made[i].scores) > 0.5
    assert shards.verify(whole) and source.is_dir()


def second(run, folder, category=1, images=range(0, 60, 2)):
    """Flags of a verifier's file of the same images that finds a category, the cat, in every second one."""
    folder.mkdir(exist_ok=True)
    rows = [{"image_id": i, "category_id": category, "bbox": [1, 1, 30, 30], "score": 0.9} for i in images]
    (folder / "judge.json").write_text(json.dumps(rows))
    (folder / "judge_names.json").write_text((run / "names.json").read_text())
    return [f"--verifier={folder / 'judge.json'}", f"--verifier-categories={folder / 'judge_names.json'}"]


def test_a_verifier_vetoes_phrases_and_belongs_to_the_settings(run, many, tmp_path, capsys):
    source, whole = many
    judge = second(run, tmp_path)
    assert run_job("label", outside(run, source, tmp_path / "out", *judge)) == 0
    before, made = shards.Shards(whole), shards.Shards(tmp_path / "out")
    kept = {made[i].id: made[i] for i in range(len(made))}
    lost = 0
    for record in (before[i] for i in range(len(before))):
        own, spans = kept.get(record.id), {s for s in record.spans if "cat" in record.caption[slice(*s[0])]}
        left = spans if int(record.id) % 2 == 0 else set()  # no dog is found anywhere
        lost += len(record.spans) - len(left)
        assert set(own.spans if own else ()) == left
        assert own is None or {*own.unknown, *own.spans} == {*record.unknown, *record.spans}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made.manifest.drops["box: vetoed by the verifier"] == lost > 0
    assert report["summary"]["phrases_judged"] == before.manifest.boxes, "a box a phrase, all of known names"
    about = json.loads(made[0].provenance)
    assert about["verifier"].startswith("detections ") and about["verifier_threshold"] == 0.3
    assert "judged phrases" in (tmp_path / "out" / "report.html").read_text()
    assert "vetoed; not judged 0" in capsys.readouterr().out
    # Another verifier, another threshold and none at all are other settings; the same command is not.
    for other in (
        second(run, tmp_path / "other", 2),
        [*judge, "--verifier-threshold=0.4"],
        [*judge, "--verifier-iou=0.5"],
        [],
    ):
        assert run_job("label", outside(run, source, tmp_path / "out", *other)) == exit_codes.BAD_INPUT
        assert re.search("is finished, with other settings .*verifier", capsys.readouterr().err)
    assert run_job("label", outside(run, source, tmp_path / "out", *judge)) == 0


@pytest.mark.processes
def test_killed_and_resumed_with_another_verifier(run, many, tmp_path, capsys):
    source, _ = many
    judge = second(run, tmp_path)
    child = slow_label.start(outside(run, source, tmp_path / "out", *judge), tmp_path / "said")
    wait_for(lambda: list((tmp_path / "out").glob("records*")))
    child.kill()
    child.join()
    other = second(run, tmp_path / "other", 2)
    assert run_job("label", outside(run, source, tmp_path / "out", *other)) == exit_codes.BAD_INPUT
    assert re.search("was begun with other settings .*verifier: ", capsys.readouterr().err)
    assert run_job("label", outside(run, source, tmp_path / "out", *judge)) == 0
    assert run_job("label", outside(run, source, tmp_path / "straight", *judge)) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--verifier={run}/found.json"], "--verifier-categories=ANNOTATIONS.json"),
        (["--verifier={run}/none.json", "--verifier-categories={run}/names.json"], "none.json"),
        (["--verifier={run}/found.json", "--verifier-categories={run}/none.json"], "none.json"),
        (["--verifier={run}/nothing"], "{run}/nothing"),
        (["--verifier={run}/run", "--verifier-categories={run}/names.json"], "no meaning with a checkpoint"),
        (["--verifier={run}/run", "--verifier-threshold=1.5"], "--verifier-threshold=1.5: expected 0 to less than 1"),
        (["--verifier={run}/run", "--verifier-iou=2"], "--verifier-iou=2"),
        (["--verifier-threshold=0.4"], "--verifier-threshold has no meaning without --verifier"),
        (["--verifier={run}/found.json", "--verifier-categories={run}/names.json", "--verifier-asks=caption"], "--verifier-asks has"),
        (["--verifier={tmp}/judge.json", "--verifier-categories={tmp}/judge_names.json"], "knows none of 60 images tried of"),
    ],
)  # fmt: skip
def test_a_verifier_that_cannot_be_used_gives_one_line(run, many, tmp_path, capsys, flags, message):
    second(run, tmp_path, images=range(77, 78))
    names = json.loads((tmp_path / "judge_names.json").read_text())
    (tmp_path / "judge_names.json").write_text(json.dumps({"categories": names["categories"]}))
    given = [flag.format(run=run, tmp=tmp_path) for flag in flags]
    assert run_job("label", outside(run, many[0], tmp_path / "out", *given)) == exit_codes.BAD_INPUT
    error = capsys.readouterr().err
    assert message.format(run=run) in error and error.startswith("label: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_teacher_as_its_own_verifier_is_taken_but_said(run, tmp_path, capsys):
    command = [str(run / "captions"), f"--workdir={run / 'run'}", f"--out={tmp_path / 'out'}", "--threshold=0.02"]
    assert run_job("label", [*command, f"--verifier={run / 'run'}", "--verifier-threshold=0.01"]) == 0
    printed = capsys.readouterr()
    assert "is the teacher itself, which repeats its own mistakes" in printed.out + printed.err
    about = json.loads(shards.Shards(tmp_path / "out")[0].provenance)
    assert about["verifier"] == about["teacher"] and about["verifier_asks"] == "phrase"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["summary"]["phrases_judged"] > 0


def slow(run, source, out, said, *more):
    return slow_label.start(outside(run, source, out, *more), said)


def wait_for(what, seconds=60):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


@pytest.mark.processes
def test_killed_then_other_settings_then_run_again(run, many, tmp_path, capsys):
    source, whole = many
    out = tmp_path / "out"
    child = slow(run, source, out, tmp_path / "said")
    wait_for(lambda: len(list(out.glob("records*"))) >= 2 and list((out / ".partial").glob("*.writing")))
    child.kill()
    child.join()
    there = {path.name: path.stat().st_ino for path in out.glob("records*")}
    assert 2 <= len(there) < 6 and not (out / "manifest.json").exists()
    with pytest.raises(shards.ShardError, match="no manifest"):
        shards.Shards(out)
    assert run_job("label", outside(run, source, out, "--threshold=0.6")) == exit_codes.BAD_INPUT
    error = capsys.readouterr().err
    assert 'thresholds: {"many": 0.5} -> {"many": 0.6}' in error and error.count("\n") == 1
    assert run_job("label", outside(run, source, out)) == 0
    assert contents(out) == contents(whole)
    now = {path.name: path.stat().st_ino for path in out.glob("records*")}
    assert there.items() <= now.items(), "what was finished is not made again"


PARTS = ("1/3", "2/3", "3/3")


def ended(started, said):
    """Both that were not killed have done their part, and see that the folder is not complete."""
    for process in started:
        process.join(120)
    texts = [path.read_text() for path in said]
    assert [process.exitcode for process in started] == [-9, 0, 0], texts
    assert all(re.search("part ./3 is done; . of 6 files are missing", text) for text in texts[1:]), texts


def test_parts_do_what_is_theirs_and_the_last_completes(run, many, tmp_path, capsys):
    source, whole = many
    out = tmp_path / "out"
    for part, files, missing in (("2/3", (1, 4), 4), ("3/3", (1, 2, 4, 5), 2)):
        assert run_job("label", outside(run, source, out, f"--part={part}")) == 0
        assert f"part {part} is done; {missing} of 6 files are missing (first: records-00000" in capsys.readouterr().out
        assert sorted(int(path.name[8:13]) for path in out.glob("records*")) == [*files]
        assert not (out / "manifest.json").exists()
    assert run_job("label", outside(run, source, out, "--part", "1/3", "--threshold=0.6")) == exit_codes.BAD_INPUT
    assert 'thresholds: {"many": 0.5} -> {"many": 0.6}' in capsys.readouterr().err
    assert run_job("label", outside(run, source, out, "--part", "1/3")) == 0
    assert "finished" in capsys.readouterr().out and contents(out) == contents(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}
    assert "--part" not in shards.Shards(out).manifest.command
    assert run_job("label", outside(run, source, out, "--part=3/3")) == 0
    assert "nothing is made twice" in capsys.readouterr().out


@pytest.mark.slow
def test_three_parts_at_once_and_one_is_killed(run, many, tmp_path):
    source, whole = many
    out, said = tmp_path / "out", [tmp_path / f"said{i}" for i in range(3)]
    started = [slow(run, source, out, path, f"--part={part}") for path, part in zip(said, PARTS)]
    wait_for(lambda: len(list((out / ".partial").glob("*.writing"))) >= 3)
    started[0].kill()
    ended(started, said)
    assert run_job("label", outside(run, source, out, "--part=1/3")) == 0
    assert contents(out) == contents(whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.fixture
def out_in_a_bucket(running, tmp_path, monkeypatch):
    return running, f"{running.fresh(monkeypatch, tmp_path / 'cache', timeout=2)}/out"


@pytest.mark.slow
def test_three_parts_at_once_on_a_bucket_that_loses_answers_and_one_is_killed(
    run, many, tmp_path, out_in_a_bucket, capsys, monkeypatch
):
    (source, whole), (running, out) = many, out_in_a_bucket

    def fetched(name):
        (tmp_path / name).mkdir()
        for file in gcs.list_files(out):
            (tmp_path / name / file).write_bytes(gcs.read(f"{out}/{file}"))
        return tmp_path / name

    said = [tmp_path / f"said{i}" for i in range(3)]
    with running.arm("lost", "late", share=0.4, only="ifGenerationMatch") as came:
        started = [slow(run, source, out, path, f"--part={part}") for path, part in zip(said, PARTS)]
        wait_for(lambda: gcs.list_files(out) and any(name.startswith("records") for name in gcs.list_files(out)))
        started[0].kill()
        there = {name: gcs.stat(f"{out}/{name}") for name in gcs.list_files(out)}
        ended(started, said)
        assert run_job("label", outside(run, source, out)) == 0
    assert came.total() > 5
    assert contents(fetched("copy")) == contents(whole) and shards.verify(out)
    assert set(gcs.list_files(out)) == {path.name for path in whole.iterdir()}
    assert not gcs.list_files(f"{out}/.partial"), "nothing but the result is left"
    now = {name: gcs.stat(f"{out}/{name}") for name in gcs.list_files(out)}
    assert there and there.items() <= now.items(), "what was finished is not made again"
    # The same command again; one that was killed after the manifest left things behind, and the page was not drawn.
    gcs.put(f"{out}/.partial/left", b"")
    gcs.remove(f"{out}/report.html")
    assert run_job("label", outside(run, source, out)) == 0
    printed = capsys.readouterr().out
    assert f"{out} is finished" in printed and f"HTML report: {out}/report.html" in printed
    assert not gcs.list_files(f"{out}/.partial")
    again = {name: gcs.stat(f"{out}/{name}") for name in gcs.list_files(out)}
    assert {name for name, found in again.items() if now[name] != found} == {"report.html"}
    # When the storage stays silent: a line, and the code that says so.
    monkeypatch.setenv("GLIP_JAX_STORAGE_RETRY_SECONDS", "0.3")
    with running.arm("503", share=1.0):
        assert door.main(["label", *outside(run, source, f"{out}2")]) == exit_codes.STORAGE_UNAVAILABLE
    assert capsys.readouterr().err.startswith(f"label: {out}2/manifest.json: the storage failed")


def test_a_full_disk_ends_in_a_line_and_the_same_command_goes_on(run, many, tmp_path, capsys):
    source, whole = many
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        code = door.main(["label", *outside(run, source, out)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == exit_codes.NOT_WRITTEN and "give the same command again" in capsys.readouterr().err
    assert {path.name for path in (out / ".partial").iterdir()} <= {"plan.json"}
    assert run_job("label", outside(run, source, out)) == 0 and contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to label"),
        (["{run}/captions"], "expected --out=DIR"),
        (
            ["{run}/captions", "--out=s3://bucket/x", "--workdir=x"],
            "--out=s3://bucket/x: s3:// is not read",
        ),
        (
            ["{run}/captions", "--out=x"],
            "expected one teacher, --checkpoint=DIR or --detections=FILE.json, found neither",
        ),
        (["{run}/captions", "--out=x", "--workdir=y", "--detections=z"], "found both"),
        (["{run}/captions", "--out=x", "--detections={run}/found.json"], "--categories=ANNOTATIONS.json"),
        (
            ["{run}/captions", "--out=x", "--workdir={run}/run", "--threshold=1.5"],
            "--threshold=1.5: expected 0 to less than 1",
        ),
        (["{run}/captions", "--out=x", "--workdir={run}/run", "--threshold-for=cc"], "expected SOURCE=0.4"),
        (
            ["{run}/captions", "--out=x", "--workdir={run}/run", "--threshold-for=sbu=0.4"],
            "no such source; there are: cc",
        ),
        (["{run}/captions", "--out=x", "--workdir={run}/run", "--max-boxes=0"], "--max-boxes=0: expected 1 to"),
        (["{run}/captions", "{run}/captions", "--out=x", "--workdir={run}/run"], "two of the folders are named cc"),
        (["{run}/nothing", "--out=x", "--workdir={run}/run"], "does not exist"),
        (["{run}/captions", "--out=x", "--workdir={run}/nothing"], "holds no complete checkpoint"),
        (
            ["{run}/captions", "--out=x", "--workdir={run}/run", "--config.model.head.blocks=2"],
            "model.head.blocks: 1 -> 2",
        ),
        (["{run}/captions", "--out={run}/names.json/x", "--workdir={run}/run"], "names.json"),
        (
            ["{run}/captions", "--out={run}", "--detections={run}/found.json", "--categories={run}/names.json"],
            "not empty",
        ),
        (["{run}/captions", "--out=x", "--detections={run}/names.json", "--categories={run}/names.json"], "names.json"),
        (["{run}/captions", "--out=x", "--workdir={run}/run", "--treshold=0.4"], "did you mean --threshold"),
        (
            ["{run}/captions", "--out=x", "--workdir={run}/run", "--part=17/16"],
            "--part=17/16: expected I/N with I from 1 to N",
        ),
        (["{run}/captions", "--out=x", "--workdir={run}/run", "--part=0/16"], "to an index that counts from 0 add 1"),
        (["{run}/captions", "--out=x", "--workdir={run}/run", "--part=1/2", "--ray=auto"], "give one of them"),
        (
            ["{run}/captions", "--out=x", "--workdir={run}/run", "--ray-workers=4"],
            "--ray-workers=4 has no meaning without --ray",
        ),
        (
            ["{run}/captions", "--out=x", "--workdir={run}/run", "--ray=auto", "--ray-resources=TPU"],
            "'TPU' is not NAME=NUMBER",
        ),
        (["{run}/captions", "--out=x", "--workdir=y", "--categories=z"], "--categories has no meaning"),
        (["{run}/captions", "--out=x", "--detections=y", "--categories=z", "--step=3"], "--step has no meaning"),
        (["{run}/captions", "--out=x", "--detections=y", "--categories=z", "--no-ema"], "--no-ema has no meaning"),
        (
            [
                "{run}/captions",
                "--out={run}/captions",
                "--detections={run}/found.json",
                "--categories={run}/names.json",
            ],
            "captions holds shards that no labelling made",
        ),
    ],
)
def test_what_cannot_be_done_gives_one_line(run, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run_job("label", [argument.format(run=run) for argument in arguments]) == exit_codes.BAD_INPUT
    error = capsys.readouterr().err
    assert message in error and error.startswith("label: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_records_with_boxes_that_people_made_are_refused(run, tmp_path, capsys):
    sources = tiny_run.write_sources(tmp_path)
    for name, reason in (("boxes", "has no caption"), ("captions", "boxes that people made")):
        assert (
            run_job("label", [sources[name].path, f"--out={tmp_path / 'x'}", f"--workdir={run / 'run'}"])
            == exit_codes.BAD_INPUT
        )
        assert reason in capsys.readouterr().err


def test_nothing_found_anywhere_leaves_nothing(run, many, tmp_path, capsys):
    assert run_job("label", outside(run, many[0], tmp_path / "out", "--threshold=0.999")) == exit_codes.BAD_INPUT
    error = capsys.readouterr().err
    assert "of 60 captions none got a box; caption: no box above the threshold" in error
    assert not (tmp_path / "out").exists()
