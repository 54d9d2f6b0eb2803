"""Prediction as a user meets it: a tiny run with a checkpoint, what is written, and what a mistake is output."""

import io
import json
import math
import os
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from glip_jax.config import Config, ConfigError, EvaluationSet, flatten
from glip_jax.config.saved import unflatten
from glip_jax.distributed import exit_codes
from glip_jax.inference import Detector, phrase_spans
from glip_jax.io.checkpoint import Checkpoint, Checkpoints, Saved, open_checkpoint
from glip_jax.io.claims import owned_workdir
from glip_jax.io.workdir import write_config
from tests import tiny_run
from tests.run_job import run_job, two_processes

pytestmark = pytest.mark.compiles
ALL = ("--threshold=0",)
CONFIG = tiny_run.replace(tiny_run.config(), "evaluation", short_side=64, long_side=64, batch_size=2)
# Settings of all tests here, which so share their programs.
CONFIG = tiny_run.replace(CONFIG, "detection", threshold=0.0, max_detections=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A working folder with a checkpoint of random parameters at step 3."""
    workdir = str(tmp_path_factory.mktemp("run"))
    params = tiny_run.parameters(CONFIG.model)
    with Checkpoints(workdir, keep=1) as checkpoints:
        checkpoints.save(3, Saved(params, {"count": np.zeros(1)}, {}), CONFIG)
    write_config(workdir, CONFIG)
    return workdir


def _image(path, width=64, height=64, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return str(path)


def _predict(run, *arguments, code=0):
    assert run_job("predict", [f"--workdir={run}", *map(str, arguments)]) == code


def _content(out):
    return json.loads((out / "predictions.json").read_text())


@pytest.mark.slow
def test_names_are_chunked_and_numbered_as_given(run, tmp_path, capsys):
    names = ["cat", "dog", "person", "red car", "traffic light", "bottle", "cup", "tree", "potted plant"]
    files = [_image(tmp_path / "a.png"), _image(tmp_path / "b.png", 128, 64), _image(tmp_path / "c.png", 50, 60)]
    _predict(run, *files, f"--names={','.join(names)}", f"--out={tmp_path / 'out'}", *ALL)
    content = _content(tmp_path / "out")
    assert content["query"] == "names" and len(content["prompts"]) == 2 and content["step"] == 3
    assert [phrase["text"] for phrase in content["phrases"]] == names
    for phrase in content["phrases"]:
        begin, end = phrase["span"]
        assert content["prompts"][phrase["prompt"]][begin:end] == phrase["text"]
    assert [(image["file"], image["width"], image["height"]) for image in content["images"]] == [
        (files[0], 64, 64), (files[1], 128, 64), (files[2], 50, 60)]  # fmt: skip
    for image in content["images"]:
        assert image["detections"], "with a threshold of 0 something is found"
        scores = [found["score"] for found in image["detections"]]
        assert scores == sorted(scores, reverse=True)
        for found in image["detections"]:
            assert 0 <= found["phrase"] < len(names)
            assert found["score"] == pytest.approx(math.sqrt(found["alignment"] * found["centerness"]), abs=2e-3)
            x1, y1, x2, y2 = found["box"]
            assert 0 <= x1 <= x2 <= image["width"] and 0 <= y1 <= y2 <= image["height"]
        with Image.open(tmp_path / "out" / image["drawn"]) as drawn:
            assert drawn.width / drawn.height == pytest.approx(image["width"] / image["height"], rel=0.02)
    output = capsys.readouterr().out
    assert "a.png (64 x 64)" in output and "sqrt(" in output and "prompts 2" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pictures", "predictions.json"]


@pytest.mark.slow
def test_phrases_with_dots_keep_the_text_as_typed(run, tmp_path):
    text = "a red cup .  two dogs . cat ."
    _predict(run, _image(tmp_path / "a.png"), f"--text={text}", f"--out={tmp_path / 'out'}", *ALL)
    content = _content(tmp_path / "out")
    assert content["query"] == "phrases" and content["prompts"] == [text]
    assert [(p["text"], p["span"]) for p in content["phrases"]] == [
        ("a red cup", [0, 9]), ("two dogs", [13, 21]), ("cat", [24, 27])]  # fmt: skip


@pytest.mark.slow
def test_a_sentence_goes_through_the_phrase_finder(run, tmp_path, capsys):
    text = "a view of a red cup near a dog"
    _predict(run, _image(tmp_path / "a.png"), f"--text={text}", f"--out={tmp_path / 'out'}", *ALL)
    assert "note: left out of the sentence's phrases: 'a view' (abstract)" in capsys.readouterr().out
    content = _content(tmp_path / "out")
    assert content["query"] == "caption" and content["phrase_finder"].startswith("lexicon 3 (textblob ")
    assert [phrase["text"] for phrase in content["phrases"]] == ["a red cup", "a dog"]


def test_the_threshold_and_what_is_not_found(run, tmp_path, capsys):
    image, out = _image(tmp_path / "a.png"), tmp_path / "out"
    _predict(run, image, "--names=cat,dog", f"--out={out}", *ALL)
    scores = [found["score"] for found in _content(out)["images"][0]["detections"]]
    threshold = sorted(scores)[len(scores) // 2]
    capsys.readouterr()
    _predict(run, image, "--names=cat,dog", f"--out={out}", *ALL, f"--least={threshold}")
    assert "--least is renamed: use --threshold" in capsys.readouterr().err
    kept = _content(out)["images"][0]["detections"]
    again = [found["score"] for found in kept]
    assert 0 < len(again) < len(scores) and min(again) >= threshold
    _predict(run, image, "--names=cat,dog", f"--out={out}")
    assert _content(out)["images"][0]["detections"] == []
    assert "no score of 0.3 or more: cat, dog" in capsys.readouterr().out
    # The same from a report: cats from the threshold on, no dog.
    own = {"absent_pairs": 40, "thresholds": {"0.05": threshold}}
    absence = {"absent_pairs": 80, "rates": {"0.05": {"threshold": 0.99}}, "per_name": {"cat": own}}
    (tmp_path / "evaluation.json").write_text(json.dumps({"step": 3, "sets": {"x": {"absence": absence}}}))
    _predict(run, image, "--names=cat,dog", f"--out={out}", f"--report={tmp_path}", "--false-alarms=0.05")
    chosen = _content(out)["images"][0]["detections"]
    assert chosen == [found for found in kept if found["phrase"] == 0] != []
    assert _content(out)["settings"]["thresholds"] == pytest.approx([threshold, 0.99])


@pytest.mark.slow
def test_folders_files_with_names_and_many_images(run, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(9):
        _image(folder / f"{number}.png", seed=number)
    (folder / "notes.txt").write_text("none")
    (tmp_path / "more").mkdir()
    _image(tmp_path / "more" / "0.png", 60, 40)
    (tmp_path / "names.txt").write_text("\ufeffcat\n\n dog \n")
    _predict(
        run, folder, tmp_path / "more", f"--names-file={tmp_path / 'names.txt'}", f"--out={tmp_path / 'out'}", *ALL
    )
    content = _content(tmp_path / "out")
    assert [phrase["text"] for phrase in content["phrases"]] == ["cat", "dog"]
    assert [image["drawn"] for image in content["images"]] == [f"pictures/{n}.png" for n in range(9)] + [
        "pictures/0_1.png"
    ]
    output = capsys.readouterr()
    assert "files with other endings skipped 1" in output.out
    assert "images 10, shapes 1, prompts 1, programs compiled or read from the cache " in output.out
    assert "images, best" in output.out and "predict:" in output.err


def test_an_exif_rotated_image_is_upright(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = _image(tmp_path / "upright.png", 40, 60)
    with Image.open(upright) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "rotated.png", exif=exif)
    _predict(run, upright, tmp_path / "rotated.png", "--names=cat", f"--out={tmp_path / 'out'}", *ALL)
    first, second = _content(tmp_path / "out")["images"]
    assert (first["turned"], second["turned"]) == (False, True)
    assert (second["width"], second["height"]) == (40, 60)
    assert first["detections"] == second["detections"]


@pytest.mark.slow
def test_the_settings_are_the_checkpoints(run, tmp_path, capsys):
    assert open_checkpoint(str(run)).config == CONFIG
    image = _image(tmp_path / "a.png")
    _predict(run, image, "--names=cat", f"--out={tmp_path / 'out'}", "--config.detection.nms_iou=0.25")
    assert _content(tmp_path / "out")["settings"]["detection"]["nms_iou"] == 0.25
    _predict(run, image, "--names=cat", f"--out={tmp_path / 'no'}", "--config.model.head.blocks=2", code=2)
    assert (
        "another network than the settings say (saved -> given: model.head.blocks: 1 -> 2)" in capsys.readouterr().err
    )
    path = tiny_run.config_file(tmp_path, {})
    _predict(run, image, "--names=cat", f"--out={tmp_path / 'out'}", f"--config={path}", "--step=3")
    assert _content(tmp_path / "out")["settings"]["short_side"] == 800


@pytest.mark.slow
def test_a_checkpoint_is_named_by_working_folder_or_step(run, tmp_path, capsys):
    image, contents = _image(tmp_path / "a.png"), []
    for option in (f"--workdir={run}", f"--checkpoint={run}", f"--checkpoint={run}/checkpoints/3"):
        assert run_job("predict", [image, "--names=cat", f"--out={tmp_path / 'out'}", option, *ALL]) == 0
        contents.append(_content(tmp_path / "out"))
        assert (contents[-1]["workdir"], contents[-1]["step"]) == (str(run), 3)
    assert contents[0]["images"] == contents[1]["images"] == contents[2]["images"]
    capsys.readouterr()
    for options, message in (
        ([], "no checkpoint: expected --checkpoint="),
        ([f"--workdir={run}", f"--checkpoint={run}"], "both name a checkpoint"),
        ([f"--checkpoint={run}/checkpoints/3", "--step=4"], "--step=4"),
    ):
        assert run_job("predict", [image, "--names=cat", f"--out={tmp_path / 'no'}", *options]) == exit_codes.BAD_INPUT
        assert message in capsys.readouterr().err


def test_saved_settings_come_back_through_json():
    sources = {"a.b": tiny_run.SourceConfig("x"), "c": tiny_run.SourceConfig("y", 2.0)}
    dataset = EvaluationSet("a.json", "images", names={"R.B C": "red blood cell"})
    config = tiny_run.replace(tiny_run.config(sources), "evaluation", sets={"v.1": dataset})
    saved = json.loads(json.dumps(dict(flatten(config))))
    assert unflatten(saved) == config
    del saved["model.head.blocks"]
    assert unflatten(saved).model.head.blocks == Config().model.head.blocks
    with pytest.raises(ConfigError, match=r"does not know \(model.head.colour\)"):
        unflatten({**saved, "model.head.colour": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --text, --names, --names-file, found none"),
        (["--names=cat", "--text=a dog"], "found --text and --names"),
        (["--names=cat,dog, Cat"], r"name 3 ('Cat') is the same to the model as name 1 ('cat')"),
        (["--names=cat,Café,cafe"], "name 3 ('cafe') is the same to the model as name 2 ('Café')"),
        (["--names=cat,bow (red, blue)"], "a comma in parentheses splits a name, 'bow (red' is a part of it"),
        (['--names="a" b,cat'], "double quotes stand around a whole name"),
        (["--names=cat", "--names=dog"], "--names is given 2 times, and only one would be asked"),
        (["--names=cat,,dog"], "name 2 of 3 is empty"),
        (["--names=cat,(x)"], "name 2 of 2 is empty ('(x)'"),
        (["--names=ca\x07t"], "has the character U+0007"),
        (["--names=caf\udce9"], "has the character U+DCE9"),
        (["--names=cat,中文"], "'中文' has no word or character that the model's vocabulary knows"),
        ([f"--names=cat,{'dog ' * 20}"], "alone takes 22 tokens with [CLS] and [SEP], the budget is 16"),
        (["--text=" + "a dog . " * 2 + "cat"], "phrase 2 ('a dog') is the same"),
        (["--text=cat . . dog"], "phrase 2 of 3 is empty"),
        (["--text=" + " . ".join(tiny_run.NAMES) + " . " + "red dog " * 8], "the first phrase beyond is 'red dog"),
        (["--text=they are running"], "no noun phrase found"),
        (["--names-file=/nowhere/names.txt"], "--names-file=/nowhere/names.txt cannot be read"),
        (["--names=cat", "--threshold=2"], "expected 0 to less than 1"),
        (["--names=cat", "--threshold=much"], "--threshold=much: expected a number"),
        (["--names=cat", "--treshold=0.1"], "did you mean --threshold"),
        (["--names=cat", "--step=7"], "holds no checkpoint of step 7; there are: [3]"),
        (["--names=cat", "--config.detection.nms=3"], "did you mean --config.detection.nms_iou"),
        (["--names=cat", "--workdir=/nowhere"], "no complete checkpoint"),
    ],
)  # fmt: skip
def test_a_mistaken_command_gets_one_line(run, tmp_path, capsys, arguments, message):
    _refused(run, tmp_path, capsys, message, _image(tmp_path / "a.png"), *arguments)


def _refused(run, tmp_path, capsys, message, *arguments, lines=1):
    _predict(run, f"--out={tmp_path / 'out'}", *arguments, code=2)
    error = capsys.readouterr().err
    assert message in error and error.splitlines()[-1].startswith("predict: ") and len(error.splitlines()) == lines, (
        error
    )
    assert not (tmp_path / "out").exists()


def _bytes(path, content):
    path.write_bytes(content)
    return path


def _truncated(path):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(stream, "JPEG")
    return _bytes(path, stream.getvalue()[:-600])


def _huge(path):
    """A PNG whose head says 20,000 x 20,000."""
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    head = bytearray(stream.getvalue())
    head[16:24] = (20_000).to_bytes(4, "big") * 2
    head[29:33] = zlib.crc32(bytes(head[12:29])).to_bytes(4, "big")
    return _bytes(path, bytes(head))


def _folder(path):
    path.mkdir()
    (path / "notes.txt").write_text("x")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "does not exist: expected an image or a folder"),
        (lambda path: _bytes(path, b""), "is no image that can be read (0 bytes)"),
        (lambda path: _bytes(path, b"text"), "is no image that can be read (4 bytes)"),
        (_truncated, "cannot be decoded"),
        (_huge, "huge"),
        (lambda path: _image(path.with_suffix(".png"), 2000, 1), "too long and narrow"),
        (_folder, "has no images (of 1 files)"),
    ],
    ids=["missing", "empty", "text", "truncated", "huge", "narrow", "empty folder"],
)
def test_an_image_that_cannot_be_used_gets_one_line(run, tmp_path, capsys, make, message):
    good = _image(tmp_path / "a.png")
    _refused(run, tmp_path, capsys, message, good, make(tmp_path / "bad.jpg"), "--names=cat")


def test_an_output_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    _predict(run, _image(tmp_path / "a.png"), "--names=cat", f"--out={tmp_path / 'file' / 'out'}", code=2)
    assert "cannot be written" in capsys.readouterr().err


def test_parameters_of_another_network_get_one_line(run, tmp_path, monkeypatch, capsys):
    saved = Checkpoint.parameters
    monkeypatch.setattr(Checkpoint, "parameters", lambda *which: {**saved(*which), "head": {}})
    _predict(run, _image(tmp_path / "a.png"), "--names=cat", f"--out={tmp_path / 'out'}", code=2)
    output = capsys.readouterr().err
    assert output.startswith("predict: the checkpoint's parameters do not fit the network") and output.count("\n") == 1


def _stopping(monkeypatch, error, at):
    """The detector raises `error` once, in call number `at`; returns the list of the numbers of images of its calls."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    calls, categories, left = [], Detector.categories_async, [error]

    def stopped(self, images, names):
        calls.append(len(images))
        if len(calls) == at and left:
            raise left.pop()
        return categories(self, images, names)

    monkeypatch.setattr(Detector, "categories_async", stopped)
    return calls


def test_bad_images_of_a_folder_are_left_out_and_named(run, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        _image(folder / f"{number}.png", seed=number)
    _bytes(folder / "3.jpg", b"<html>not found</html>")
    _truncated(folder / "4.jpg")
    _huge(folder / "5.png")
    _image(folder / "6.png", 2000, 1)
    _bytes(folder / "7.heic", b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic")
    _bytes(folder / "._0.png", b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    _bytes(folder / "8.png", b"")
    _predict(run, folder, "--names=cat", f"--out={tmp_path / 'out'}", *ALL)
    content = _content(tmp_path / "out")
    assert [image["file"] for image in content["images"]] == [str(folder / f"{n}.png") for n in range(3)]
    reasons = {entry["file"].rpartition("/")[2]: entry["reason"] for entry in content["left_out"]}
    words = {
        "3.jpg": "an HTML page", "4.jpg": "cannot be decoded", "5.png": "huge", "6.png": "too long and narrow", "7.heic": "HEIC",
        "8.png": "the file is empty",
    }  # fmt: skip
    assert reasons.keys() == words.keys() and all(words[name] in reason for name, reason in reasons.items())
    output = capsys.readouterr()
    assert all(f"left out: {folder / name}" in output.err for name in words)
    assert "left out 6 of 9 images" in output.err and "files with other endings skipped 1" in output.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["pictures", "predictions.json"]


def test_a_folder_of_bad_images_alone_is_no_success(run, tmp_path, capsys):
    for name, message in (("head", "none of the 1 images can be used"), ("cut", "no image could be read, of 1")):
        (tmp_path / name).mkdir()
        (_truncated if name == "cut" else lambda path: _bytes(path, b"x"))(tmp_path / name / "1.jpg")
        _refused(run, tmp_path, capsys, message, tmp_path / name, "--names=cat", lines=2)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), RuntimeError("killed")])
def test_what_is_done_survives_what_stops_the_job(run, tmp_path, monkeypatch, capsys, error):
    images, out = [_image(tmp_path / f"{n}.png", seed=n) for n in range(5)], tmp_path / "out"
    (out / "pictures").mkdir(parents=True)
    (out / "predictions.json").write_text("old")
    # An error comes after the results of the images before; Ctrl-C gives up the two batches that are on the device.
    calls = _stopping(monkeypatch, error, 3 if isinstance(error, KeyboardInterrupt) else 2)
    arguments = [*images, "--names=cat", f"--out={out}", *ALL]
    if isinstance(error, RuntimeError):
        monkeypatch.setattr(
            "glip_jax.cli.predict._keep", lambda results: None
        )  # as a SIGKILL, which lets nothing be done
        with pytest.raises(RuntimeError):
            _predict(run, *arguments)
    else:
        code = exit_codes.CANCELLED if isinstance(error, KeyboardInterrupt) else exit_codes.NOT_WRITTEN
        _predict(run, *arguments, code=code)
        assert "2 of 5 images are done" in capsys.readouterr().err
    assert (out / "predictions.json").read_text() == "old"
    done = _content(out / "unfinished")
    assert [entry["file"] for entry in done["images"]] == images[:2] and done["complete"] is False
    assert all((out / "unfinished" / entry["drawn"]).exists() for entry in done["images"])
    if isinstance(error, KeyboardInterrupt):
        _predict(run, *images, "--names=dog", f"--out={out}", *ALL, code=2)
        assert "holds 2 images of another command" in capsys.readouterr().err
    _image(images[0], seed=9)  # of another content, and time
    os.utime(images[0], (1, 1))
    calls.clear()
    monkeypatch.setattr("glip_jax.cli.predict._keep", lambda results: None)
    _predict(run, *arguments)
    assert sum(calls) == 4, "the image that changed and the three that were not done"
    content = _content(out)
    assert [entry["file"] for entry in content["images"]] == images and content["complete"] and "stamps" not in content
    assert sorted(path.name for path in out.iterdir()) == ["pictures", "predictions.json"]
    assert len(list((out / "pictures").iterdir())) == 5


@pytest.mark.slow
def test_two_processes_share_the_images_and_go_on_after_a_stop(run, tmp_path, monkeypatch):
    """One process was stopped after some images; two finish the folder, and what they write is what one writes."""
    images = [_image(tmp_path / f"{n}.png", seed=n) for n in range(5)]
    (tmp_path / "bad").mkdir()
    _truncated(tmp_path / "bad" / "6.jpg")
    _image(tmp_path / "bad" / "7.png", seed=7)
    arguments = [*images, tmp_path / "bad", "--names=cat", *ALL]
    _predict(run, *arguments, f"--out={tmp_path / 'one'}")
    _stopping(monkeypatch, OSError(28, "No space left on device"), 2)
    _predict(run, *arguments, f"--out={tmp_path / 'two'}", code=exit_codes.NOT_WRITTEN)
    codes, output = two_processes("predict", f"--workdir={run}", *arguments, f"--out={tmp_path / 'two'}")
    assert codes == [0, 0], output
    assert "going on after" in output[0] and "left out 1 of 7 images" in output[0] and "written" not in output[1]
    one, two = (_content(tmp_path / name) for name in ("one", "two"))
    # Programs for another number of devices round otherwise: the last of the five written digits may differ by one.
    found, wanted = ([entry.pop("detections") for entry in content["images"]] for content in (two, one))
    for boxes, expected in zip(found, wanted, strict=True):
        for box, other in zip(boxes, expected, strict=True):
            assert box.pop("box") == pytest.approx(other.pop("box"), abs=0.0101) and box == pytest.approx(
                other, abs=1.1e-5
            )
    assert {**one, "command": ""} == {**two, "command": ""}
    for entry in one["images"]:
        assert (tmp_path / "one" / entry["drawn"]).read_bytes() == (tmp_path / "two" / entry["drawn"]).read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["pictures", "predictions.json"]


def test_a_stop_before_anything_is_done_leaves_nothing(run, tmp_path, monkeypatch):
    _stopping(monkeypatch, KeyboardInterrupt(), 1)
    _predict(run, _image(tmp_path / "a.png"), "--names=cat", f"--out={tmp_path / 'new'}", code=exit_codes.CANCELLED)
    assert not (tmp_path / "new").exists()


def test_a_second_job_in_the_same_folder_is_refused(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with owned_workdir(str(out)):
        _predict(run, _image(tmp_path / "a.png"), "--names=cat", f"--out={out}", code=2)
    assert f"--out={out} is in use: another job (pid {os.getpid()} on" in capsys.readouterr().err
    assert not list(out.iterdir())


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        run_job("predict", ["--help"])
    output = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("example: python -m glip_jax predict", "--names-file", "--text=", "alignment", "exit codes"):
        assert words in output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a . b", ["a", "b"]),
        ("a .b . c. d", ["a .b", "c. d"]),
        (". a . b .", ["", "a", "b"]),
        ("a man rides .", []),
        ("a. b", []),
        ("", []),
        (" . ", []),
    ],
)
def test_separators(text, words):
    assert [text[begin:end] for begin, end in phrase_spans(text)] == words
