import json

import pytest

from glip_jax.data import shards
from glip_jax.jobs import scenes


def _run(out, *more):
    return scenes.main([f"--out={out}", "--count=5", "--validation=2", "--names=6", "--size=128", *more])


def test_scenes_become_shards_and_a_validation_set(tmp_path, capsys):
    assert _run(tmp_path) == 0
    manifests = {kind: shards.Shards(tmp_path / "shards" / kind).manifest for kind in ("detection", "grounding")}
    assert {kind: manifest.records for kind, manifest in manifests.items()} == {"detection": 3, "grounding": 2}
    assert not any(sum(manifest.drops.values()) for manifest in manifests.values())
    validation = json.loads((tmp_path / "validation" / "annotations.json").read_text())
    assert len(validation["images"]) == 2
    assert tuple(c["name"] for c in validation["categories"]) == manifests["detection"].names
    assert "5 training and 2 validation scenes with 6 names" in capsys.readouterr().out


def test_what_is_finished_stays_and_what_is_missing_is_made(tmp_path, capsys):
    assert _run(tmp_path) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "shards" / "grounding" / "manifest.json").rename(tmp_path / "aside")
    for path in (tmp_path / "shards" / "grounding").iterdir():
        path.unlink()
    (tmp_path / "shards" / "grounding").rmdir()
    assert _run(tmp_path) == 0
    assert shards.finished(tmp_path / "shards" / "grounding") is not None
    kept = {path: time for path, time in before.items() if "grounding" not in path.parts}
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--count=1"], "count is 1"),
        (["--names=9999"], "9999 were asked for"),
        (["--pictures=/nowhere/at/all"], "names.json is not there"),
        (["--size=50"], "50 x 50 is smaller"),
    ],
)
def test_bad_settings_give_one_line(tmp_path, capsys, more, message):
    assert _run(tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_other_settings_in_the_same_folder_are_refused(tmp_path, capsys):
    assert _run(tmp_path) == 0
    assert _run(tmp_path, "--seed=1") == 2
    assert "differ in seed" in capsys.readouterr().err
