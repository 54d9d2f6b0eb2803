import json
import os

import pytest

from glip_jax import __main__ as door
from glip_jax.cli import scenes
from glip_jax.data import shards
from tests.run_job import run_job

PARTS = {
    "detection", "grounding", "captions", "validation", "validation_style", "validation_grounding_names",
    "validation_caption_names", "validation_unseen", "validation_phrases", "validation_absent",
}  # fmt: skip


def _run(out, *more):
    few = [f"--names.{split}=6" for split in ("detection", "grounding", "captions", "unseen")]
    return run_job("scenes", [f"--out={out}", "--count=5", "--captions=2", "--validation=2", "--size=96", *few, *more])


def _read(out, part, file="annotations.json"):
    return json.loads((out / part / file).read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    assert _run(out, "--processes=1") == 0
    return out


def test_all_sets_and_shards_are_there(made):
    assert set(os.listdir(made)) == PARTS | {"shards"}
    manifests = {kind: shards.Shards(made / "shards" / kind).manifest for kind in ("detection", "grounding")}
    assert {kind: manifest.records for kind, manifest in manifests.items()} == {"detection": 3, "grounding": 2}
    assert not any(sum(manifest.drops.values()) for manifest in manifests.values())
    validation = _read(made, "validation")
    assert len(validation["images"]) == 2
    assert tuple(c["name"] for c in validation["categories"]) == manifests["detection"].names


def test_every_set_shows_the_names_and_styles_of_its_split_only(made):
    info = {part: _read(made, part)["info"] for part in PARTS}
    names = {part: set(content["names"]) for part, content in info.items()}
    detection, grounding = names["detection"], names["validation_grounding_names"]
    captions, unseen = names["validation_caption_names"], names["validation_unseen"]
    assert len(detection | grounding | captions | unseen) == 24, "a name is in two splits"
    assert names["validation"] == names["validation_style"] == names["validation_absent"] == detection
    assert names["grounding"] == names["validation_phrases"] == detection | grounding
    assert names["captions"] == detection | grounding | captions
    styles = {part: content["picture_styles"] for part, content in info.items()}
    assert styles.pop("validation_style") == ["noto"]
    assert all(style == ["fluent"] for style in styles.values())
    assert len({content["seed"] for content in info.values()}) == len(PARTS), "two sets show the same scenes"


def test_captions_are_bare_and_phrases_have_kinds(made):
    assert all(set(a) == {"id", "image_id", "caption"} for a in _read(made, "captions")["annotations"])
    assert _read(made, "captions", "truth.json")["annotations"]
    assert all(image["phrases"] for image in _read(made, "validation_phrases")["images"])


def test_what_is_finished_stays_and_what_is_missing_is_made(tmp_path, capsys):
    assert _run(tmp_path, "--captions=0") == 0
    assert "captions" not in os.listdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for path in (tmp_path / "shards" / "grounding").iterdir():
        path.unlink()
    (tmp_path / "shards" / "grounding").rmdir()
    assert _run(tmp_path, "--captions=0") == 0
    assert shards.finished(tmp_path / "shards" / "grounding") is not None
    kept = {path: time for path, time in before.items() if path.parent != tmp_path / "shards" / "grounding"}
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert "5 training scenes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--names.unseen=9999"], "expected 9999"),
        (["--pictures=/nowhere/at/all"], "names.json does not exist"),
        (["--styles", "flaunt"], "available styles: fluent, noto, twemoji"),
        (["--styles", "fluent", "noto"], "the held-out one is noto"),
    ],
)
def test_bad_settings_give_one_line_and_write_nothing(tmp_path, capsys, more, message):
    assert _run(tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_other_settings_in_the_same_folder_are_refused_before_anything_is_drawn(made, capsys):
    files = sorted(made.rglob("*"))
    assert _run(made, "--seed=1") == 2
    assert "differ in seed" in capsys.readouterr().err
    assert _run(made, "--validation=3") == 2
    assert "validation holds scenes that differ in count" in capsys.readouterr().err
    assert sorted(made.rglob("*")) == files


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "make_scenes", stops)
    assert door.main(["scenes", f"--out={tmp_path}"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
