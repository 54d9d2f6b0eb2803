"""What the wheel holds, its extras, and what `import glip_jax` and `glip_jax.__all__` give."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import glip_jax
from glip_jax.io import assets

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def distribution(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    importlib.import_module("setuptools")  # provides distutils
    run_setup = importlib.import_module("distutils.core").run_setup
    return run_setup("setup.py", ["--quiet", "build_py", f"--build-lib={tmp_path}"], stop_after="commandline")


def test_the_wheel_holds_the_code_its_data_and_the_bundled_files(distribution, tmp_path):
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    held = {Path(file).relative_to(tmp_path).as_posix() for file in command.get_outputs(include_bytecode=False)}
    wanted = [path for path in (ROOT / "glip_jax").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    wanted += [ROOT / "gcs" / "sample" / name for name in ("names.txt", "descriptions.json", "LICENSE-unicode.txt")]
    wanted += (ROOT / "gcs" / "manifests").iterdir()
    wanted += [path for path in (ROOT / "gcs" / "sample" / "pictures").rglob("*") if path.is_file()]
    wanted += (ROOT / "configs").rglob("*.py")
    names = {path.relative_to(ROOT).as_posix() for path in wanted}
    assert held == {name if name.startswith("glip_jax/") else f"glip_jax/bundled/{name}" for name in names}


def test_each_requirements_file_is_an_extra(distribution):
    files = {path.stem.removeprefix("requirements-") for path in ROOT.glob("requirements-*.txt")}
    # These two are installed without what they depend on, which an extra cannot say.
    assert set(distribution.extras_require) == files - {"pretrained", "spacy-model"}
    assert any(line.startswith("jax[tpu]") for line in distribution.extras_require["tpu"])
    assert any(line.startswith("orbax-checkpoint") for line in distribution.install_requires)


def test_bundled_files_are_found_in_a_checkout_and_installed(monkeypatch, tmp_path):
    assert assets.bundled("gcs/manifests") == ROOT / "gcs" / "manifests"
    (tmp_path / "glip_jax" / "bundled").mkdir(parents=True)
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path / "glip_jax")
    assert assets.bundled("gcs/manifests") == tmp_path / "glip_jax" / "bundled" / "gcs" / "manifests"


@pytest.mark.processes
def test_the_import_is_light_and_every_name_is_there():
    heavy = ("jax", "numpy", "flax", "orbax", "tyro")
    code = f"import sys, glip_jax; print([name for name in {heavy} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "[]"
    assert all(getattr(glip_jax, name) for name in glip_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'detect'"):
        _ = glip_jax.detect  # pyright: ignore[reportAttributeAccessIssue]
