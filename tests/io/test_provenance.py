import dataclasses
import hashlib
import json
import shutil
import subprocess

import pytest

from glip_jax.config import Config, DetectionConfig, EvaluationConfig, ModelConfig, OptimizerConfig, TextConfig
from glip_jax.io import provenance
from glip_jax.io.workdir import write_config


def test_every_setting_that_affects_a_score_is_recorded():
    config = Config(detection=DetectionConfig(nms_iou=0.7), model=ModelConfig(text=TextConfig(max_tokens=99)))
    found = provenance.score_settings(config)
    assert found["detection.nms_iou"] == 0.7 and found["model.text.max_tokens"] == 99
    for name in ("detection.threshold", "evaluation.short_side", "evaluation.chunk", "evaluation.parameters",
                 "data.captions.separator", "model.input.extent", "model.dtype", "model.head.coarse_offsets"):  # fmt: skip
        assert name in found
    assert not {name for name in found if "drop" in name or name.startswith(("optimizer", "train.", "loss"))}


def test_the_hash_of_settings(tmp_path):
    config = Config()
    assert provenance.config_hash(config) == provenance.config_hash(Config())
    assert provenance.config_hash(config) != provenance.config_hash(Config(optimizer=OptimizerConfig(rate=2e-4)))
    assert provenance.config_hash(config) != provenance.config_hash(Config(evaluation=EvaluationConfig(chunk=3)))
    write_config(str(tmp_path), config)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert provenance.config_hash(saved) == provenance.config_hash(dataclasses.replace(config))


def test_the_hash_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert provenance.file_hash(str(tmp_path / "a")) == hashlib.sha256(b"abc").hexdigest()


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "glip_jax"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "_PACKAGE", folder)
    return folder


def test_the_code_without_a_repository_is_its_files(package):
    before = provenance.code()
    assert set(before) == {"files"}
    (package / "a.py").write_text("x = 2\n")
    assert provenance.code() != before


def _git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def commit(package):
    """The package is committed; its commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, so no repository can be made to look at")
    for arguments in (("init",), ("add", "."), ("commit", "-m", "one")):
        _git(package.parent, *arguments)
    return _git(package.parent, "rev-parse", "HEAD").strip()


def test_the_code_in_a_repository_has_its_commit(package, commit):
    found = provenance.code()
    assert found | {"files": ""} == {"files": "", "commit": commit, "changed_since_commit": False}
    (package / "a.py").write_text("x = 3\n")
    assert provenance.code()["changed_since_commit"]


@pytest.mark.usefixtures("commit")
def test_an_enclosing_repository_is_not_that_of_the_package(package, monkeypatch):
    inner = package.parent / "site-packages" / "glip_jax"
    inner.mkdir(parents=True)
    monkeypatch.setattr(provenance, "_PACKAGE", inner)
    assert set(provenance.code()) == {"files"}


def test_versions_and_devices():
    found = provenance.versions()
    assert {"python", "jax", "numpy", "pycocotools", "device"} <= set(found) and "not installed" not in found.values()
