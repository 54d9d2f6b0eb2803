"""The job `data`: from the command line to a finished folder, or to one line and exit code 2."""

import json
import shutil
from pathlib import Path

import pytest

from glip_jax.data.shards import Shards
from tests.data.conftest import coco_json, mdetr_json, write_image
from tests.run_job import run_job
from tests.tiny_run import VOCABULARY


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    write_image(tmp_path / "pictures" / "img0.png", 24, 32, 0)
    (tmp_path / "boxes.json").write_text(json.dumps(coco_json([(24, 32)])))
    (tmp_path / "captions.json").write_text(json.dumps(mdetr_json([(24, 32)])))
    return tmp_path


def test_imports_both_forms(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "names.json").write_text('{"dog": "small dog"}')
    coco = ["coco", f"{place}/boxes.json", f"--images={place}/pictures", f"--out={place}/out", "--licence=CC0"]
    coco.append(f"--names={place}/names.json")
    assert run_job("data", coco) == 0
    printed = capsys.readouterr().out
    assert "kept boxes          3" in printed
    assert "1 records, 3 boxes, 6 names" in printed
    manifest = Shards(place / "out").manifest
    assert manifest.names[1] == "small dog"
    assert manifest.licence == "CC0"
    assert manifest.command.startswith("python -m glip_jax data coco ")
    assert run_job("data", coco) == 0
    assert "nothing is made twice" in capsys.readouterr().out
    assert run_job("data", ["mdetr", f"{place}/captions.json", f"--images={place}/pictures", f"--out={place}/two"]) == 0
    assert Shards(place / "two").manifest.kinds == {"grounding": 1}


@pytest.mark.processes
def test_names_that_the_vocabulary_does_not_know_are_said(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default vocabulary, where it is; training and evaluation with it refuse them."""
    (place / "assets" / "bert-base-uncased").mkdir(parents=True)
    shutil.copy(VOCABULARY, place / "assets" / "bert-base-uncased" / "vocab.txt")
    monkeypatch.chdir(place)
    (place / "names.json").write_text('{"dog": "斑马"}')
    coco = ["coco", "boxes.json", "--images=pictures", "--out=out", "--names=names.json", "--processes=1"]
    assert run_job("data", coco) == 0
    assert "note: read with assets/bert-base-uncased/vocab.txt: '斑马' has no word" in capsys.readouterr().out
    assert run_job("inspect", ["out", "--out=page.html"]) == 0
    assert "note: out: read with assets/bert-base-uncased/vocab.txt: '斑马' has no word" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco", "{}/absent.json", "--images={}/pictures", "--out={}/out"], "absent.json does not exist"),
        (["coco", "{}/boxes.json", "--images={}/absent", "--out={}/out"], "image folder"),
        (["coco", "{}/boxes.json", "--images={}/pictures", "--out={}/pictures"], "not empty, without a manifest"),
        (["coco", "{}/boxes.json", "--images={}/pictures", "--out={}/out", "--names={}/boxes.json"], "--names"),
        (["mdetr", "{}/boxes.json", "--images={}/pictures", "--out={}/out"], "lacks caption"),
    ],
)
def test_bad_input_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_job("data", [argument.format(place) for argument in arguments]) == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert printed.count("\n") == 0
    assert not (place / "out").exists()
