"""A finished folder is left as it is if the same is asked for, and named with the difference if it is not."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from glip_jax.cli.command_line import flags
from glip_jax.cli.data import Format
from glip_jax.data import shards
from tests.data.conftest import coco_json, write_image
from tests.data.importers.layouts import LAYOUTS
from tests.run_job import run_job


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        write_image(tmp_path / "pictures" / f"img{i}.png", 24, 32, i)
    return tmp_path


@pytest.mark.parametrize(
    "form", [pytest.param(name, marks=pytest.mark.slow if name == "tfds" else ()) for name in LAYOUTS]
)
def test_every_format_names_its_inputs(place: Path, form: str) -> None:
    layout = LAYOUTS[form]
    layout.make(place)
    job = flags([*shlex.split(layout.command.format(p=place)), "--out=o"], Format, "data")
    assert job.inputs == layout.open(place).inputs


@pytest.mark.parametrize(
    "form", [pytest.param(name, marks=() if name == "tsv-detection" else pytest.mark.slow) for name in LAYOUTS]
)
def test_every_format_compares_its_inputs(place: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    layout = LAYOUTS[form]
    files = layout.make(place)
    command = shlex.split(layout.command.format(p=place))
    command += [f"--out={place}/out", "--processes=1"]
    assert run_job("data", command) == 0
    before = (place / "out" / "manifest.json").stat().st_mtime_ns
    assert run_job("data", [*command[:-1], "--processes=2"]) == 0
    capsys.readouterr()
    changed = place / next(name for name in files if not name.endswith((".img.tsv", ".lineidx")))
    changed.write_bytes(changed.read_bytes() + b"\n")
    assert run_job("data", command) == 2
    error = capsys.readouterr().err
    assert "is finished, of something else" in error and "has changed since" in error and error.count("\n") == 1
    assert (place / "out" / "manifest.json").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished folder `out`, and what else may be asked for in its place."""
    place = tmp_path_factory.mktemp("made")
    (place / "pictures").mkdir()
    for i in range(3):
        write_image(place / "pictures" / f"img{i}.png", 24, 32, i)
    (place / "a.json").write_text(json.dumps(coco_json([(24, 32)] * 3)))
    (place / "names.json").write_text('{"dog": "small dog"}')
    assert run_job("data", command(place)) == 0
    shutil.copy(place / "a.json", place / "copy.json")
    (place / "other.json").write_text(json.dumps(coco_json([(24, 32)] * 3, 2)))
    (place / "names2.json").write_text('{"dog": "big dog"}')
    (place / "hashes.txt").write_text("7\n")
    (place / "link").symlink_to(place / "pictures")
    shutil.copytree(place / "pictures", place / "more")
    return place


def command(place: Path, **changes: str) -> list[str]:
    options = {"images": f"{place}/pictures", "out": f"{place}/out", "names": f"{place}/names.json", "processes": "1"}
    file = changes.pop("file", f"{place}/a.json")
    return [
        changes.pop("form", "coco"),
        file,
        *(f"--{key}={value}" for key, value in (options | changes).items() if value),
    ]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"file": "{}/copy.json"}, ""),  # moved, of the same content
        ({"file": "{}/absent.json"}, "absent.json, which does not exist"),
        ({"file": "{}/other.json"}, "a.json -> {}/other.json (sha256"),
        ({"images": "{}/link"}, ""),
        ({"images": "{}/more"}, "images: {}/pictures -> {}/more"),
        ({"names": ""}, "names: sha256"),
        ({"names": "{}/names2.json"}, "names: sha256"),
        ({"licence": "CC0"}, "licence: unknown -> CC0"),
        ({"name": "mine"}, "name: out -> mine"),
        ({"boxes": "xyxy"}, "boxes: default -> xyxy"),
        ({"shards": "1"}, ""),
        ({"shards": "2"}, "shards: default -> 2"),
        ({"exclude": "{}/hashes.txt"}, "exclude: 0 lists of images -> 1"),
        ({"form": "lvis"}, "format: Coco -> Lvis"),
    ],
)  # fmt: skip
def test_options_are_compared(made: Path, change: dict[str, str], found: str, capsys) -> None:
    capsys.readouterr()
    words = command(made, **{key: value.format(made) for key, value in change.items()})
    assert run_job("data", words) == (2 if found else 0)
    out, err = capsys.readouterr()
    assert ("nothing is made twice" in out) if not found else (found.format(made, made) in err and err.count("\n") == 1)


def test_strict_is_asked_for_where_something_was_dropped(place: Path, capsys) -> None:
    data = coco_json([(24, 32)] * 3)
    data["annotations"][0]["bbox"] = [500, 3, 5, 5]
    (place / "a.json").write_text(json.dumps(data))
    assert run_job("data", command(place, names="")) == 0
    assert run_job("data", [*command(place, names=""), "--strict"]) == 2
    assert "1 items were dropped -> --strict" in capsys.readouterr().err


def test_folders_of_other_jobs_and_of_earlier_versions(made: Path, tmp_path: Path, capsys) -> None:
    """Those have no settings in their report: the options are those of the command in the manifest."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    (tmp_path / "b.json").write_bytes((made / "a.json").read_bytes())
    report = json.loads((out / "report.json").read_text())
    del report["settings"]
    report["inputs"][0]["file"] = f"{tmp_path}/b.json"
    (out / "report.json").write_text(json.dumps(report))
    words = command(made, out=str(out), file=f"{tmp_path}/b.json")
    assert run_job("data", words) == 0
    assert run_job("data", [*words, "--licence=CC0"]) == 2
    assert "licence: unknown -> CC0" in capsys.readouterr().err
    (tmp_path / "b.json").unlink()
    assert run_job("data", words) == 0
    assert "b.json does not exist any more: not compared" in capsys.readouterr().out
    names = shards.Shards(out).manifest.names
    shards.write([shards.Shards(out)[0]], tmp_path / "own", name="own", names=names)
    assert run_job("data", command(made, out=f"{tmp_path}/own")) == 2
    assert "no import made it" in capsys.readouterr().err
