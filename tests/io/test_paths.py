"""Every path of every job and setting goes through one check; names in data do not lead out of their folder."""

import dataclasses
import inspect
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from glip_jax import __main__
from glip_jax.cli.command_line import Arguments
from glip_jax.config import Config, EvaluationSet, SourceConfig
from glip_jax.data.importers.entry import ImageFolder
from glip_jax.data.shards import Shards
from glip_jax.io import assets, gcs, paths, workdir
from tests.data.conftest import coco_json, write_image
from tests.jobs import FORMATS, JOBS
from tests.run_job import run_job

ADDRESSES = {
    "https://example.org/a": "https:// is not read", "s3://bucket/a": "s3:// is not read", "file:///a": "write /a",
    "hf://a/b": "hf:// is not read", "gcs://bucket/a": "write gs://bucket/a", "GS://bucket/a": "write gs://bucket/a",
    "C:\\data\\a": "a path of Windows", "C:/data": "a path of Windows", "\\\\host\\share": "a path of Windows",
    "me@host:/a": "an address of another host", "~/a": "~ is not replaced", "a\0b": "null character",
}  # fmt: skip


def flags_of(kind: type) -> dict[str, tuple[str, bool]]:
    """Of a job's flags those that may be paths by their type: what is written before the value, and whether it is required."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {}
    for item in dataclasses.fields(kind):
        positional = "POSITIONAL" in repr(hints[item.name]).upper()
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        found[item.name] = ("" if positional else f"--{item.name.replace('_', '-')}=", required)
    return found


def documents(kind: type) -> dict[str, str]:
    """The text below each field, of the class and those that it derives from."""
    found: dict[str, str] = {}
    for part in reversed(kind.__mro__[:-1]):
        source = inspect.getsource(part) if dataclasses.is_dataclass(part) else ""
        found |= dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, re.DOTALL | re.MULTILINE))
    return found


def is_path(kind: type, name: str) -> bool:
    hint = typing.get_type_hints(kind, include_extras=True)[name]
    return any(word in repr(hint) for word in ("'path", "epath", "pathlib"))


EVERY = [(job, kind, name) for job, kind in JOBS.items() for name in flags_of(kind) if is_path(kind, name)]
# Of the formats those of their own: they share the others.
_OWN = {
    name: (f"data {job}", kind, name) for job, kind in FORMATS.items() for name in flags_of(kind) if is_path(kind, name)
}
EVERY += _OWN.values()


def _case(job: str, kind: type, name: str) -> Any:
    """Jobs with settings take half a second each: of their flags one of each job, the others are slow."""
    repeated = issubclass(kind, Arguments) and name != {"import": "file", "plan": "out"}.get(job, "workdir")
    return pytest.param(job, kind, name, id=f"{job}-{name}", marks=pytest.mark.slow if repeated else ())


@pytest.mark.parametrize(("job", "kind", "name"), [_case(*case) for case in EVERY])
def test_every_flag_of_every_job(job: str, kind: type, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, values = [], {"kind": "detection", "metric": "coco"}
    for other, (before, required) in flags_of(kind).items():
        if other == name:
            words.append(f"{before}https://example.org/a")
        elif required or (job == "upload" and not before):
            words.append(f"{before}{values.get(other, 'x')}")
    if "config" in words[0] or job in ("evaluate", "train", "plan"):
        words = [word for word in words if not word.startswith("--config")] + ["--config=configs/debug.py"]
    if job == "plan":
        words.append("--topology=v5e:8")
    assert __main__.main([*job.split(), *words]) == 2
    error = capsys.readouterr().err
    assert "https://example.org/a: https:// is not read" in error and error.count("\n") == 1, error


@pytest.mark.parametrize(("job", "kind"), [*JOBS.items(), *FORMATS.items()])
def test_texts_that_speak_of_files_are_paths(job: str, kind: type) -> None:
    """A flag that names a file or folder and is not marked as a path would not be checked."""
    names = {
        "name",
        "names",
        "text",
        "published",
        "files",
        "folders",
        "caption_key",
        "image_key",
        "columns",
        "split",
        "licence",
        "layout",
    }
    for name, text in documents(kind).items():
        if name in flags_of(kind) and re.search(r"\b([Ff]older|[Ff]ile|path|local or gs)", text.split(";")[0]):
            hint = repr(typing.get_type_hints(kind)[name])
            assert is_path(kind, name) or name in names or "str" not in hint, f"{job}: {name} is no PathStr"


def settings() -> Config:
    return dataclasses.replace(
        Config(),
        data=dataclasses.replace(Config().data, sources={"one": SourceConfig("a")}),
        evaluation=dataclasses.replace(Config().evaluation, sets={"val": EvaluationSet("a.json", "b")}),
        init_from=dataclasses.replace(Config().init_from, model="m", backbone="b", text="t"),
    )


def test_every_setting() -> None:
    found = {name: package for name, _, package in paths.paths_of(settings())}
    assert found == {
        "data.sources.one.path": False, "evaluation.sets.val.annotations": False, "evaluation.sets.val.images": False,
        "init_from.model": True, "init_from.backbone": True, "init_from.text": True, "model.text.vocabulary": True,
    }  # fmt: skip


def test_settings_of_a_file_are_checked_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.py").write_text(
        "import dataclasses\nfrom glip_jax.config import *\n"
        "def get_config():\n    data = dataclasses.replace(Config().data, sources={'one': SourceConfig('s3://bucket/a')})\n"
        "    return dataclasses.replace(Config(), data=data)\n"
    )
    assert run_job("train", [f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/run"]) == 2
    assert "config.data.sources.one.path=s3://bucket/a: s3:// is not read" in capsys.readouterr().err
    assert run_job("train", ["--config=https://example.org/c.py", f"--workdir={tmp_path}/run"]) == 2
    assert "--config=https://example.org/c.py: https:// is not read" in capsys.readouterr().err
    assert run_job("train", [f"--config={tmp_path}", f"--workdir={tmp_path}/run"]) == 2
    assert "is a folder: expected a Python file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ADDRESSES)
def test_what_is_not_read_is_named_with_the_remedy(address: str) -> None:
    for reads in (paths.checked, gcs.address, workdir.workdir_path, assets.resolve, Shards):
        with pytest.raises(paths.PathError, match=re.escape(ADDRESSES[address])):
            reads(address)


def test_what_is_read() -> None:
    for path in ("a", "/a/b", "../a", "a:b.jpg", "data/x:y/z", "./c:/x", "a~", "gs://bucket/a", "gs:/bucket/a", "a b"):
        assert paths.checked(path) == path
    assert paths.checked("package:a/b", package=True)
    with pytest.raises(paths.PathError, match="weights and vocabularies only"):
        paths.checked("package:a/b")


def test_names_in_data_stay_below_their_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_image(folder / "img0.png", 24, 32, 0)
    write_image(tmp_path / "secret.png", 24, 32, 1)
    for name in ("img0.png", "a/../img0.png", f"{folder}/img0.png"):
        assert paths.within(epath.Path(folder), name)
    for name in ("../secret.png", "a/../../secret.png", f"{tmp_path}/secret.png", "..", "x\0y"):
        with pytest.raises(paths.OutsideError, match="leads out of"):
            ImageFolder(epath.Path(folder))(name)
    lines = [{"image": name, "caption": "a dog"} for name in ("img0.png", "../secret.png", f"{tmp_path}/secret.png")]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["caption-lines", tmp_path / "c.jsonl", f"--images={folder}", f"--out={tmp_path}/out", "--processes=1"]
    assert run_job("data", words) == 0
    assert re.search("kept images +1\n.*\ndropped image: file missing +2", capsys.readouterr().out)


def test_a_container_and_a_set_for_evaluation_stay_in_their_folders(tmp_path: Path, capsys) -> None:
    from glip_jax.evaluation.evaluate import EvaluationError, read_image

    (tmp_path / "x.yaml").write_text("img: ../x.tsv\nlabel: y.tsv\n")
    assert run_job("data", ["tsv", tmp_path / "x.yaml", "--kind=pseudo", f"--out={tmp_path}/out"]) == 2
    assert "img names ../x.tsv leads out of" in capsys.readouterr().err
    entry = coco_json([(24, 32)])["images"][0] | {"file_name": "../../etc/passwd"}
    with pytest.raises(EvaluationError, match="leads out of"):
        read_image(epath.Path(tmp_path), entry)
