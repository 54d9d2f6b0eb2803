"""scripts/environment.sh with stand-ins for Python, and the paths that the other scripts hand on."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
# A Python in .venv: it has pip or not; what it is asked to run is written down.
INNER = """#!/usr/bin/env bash
case "$*" in
"-m pip --version") exit {pip} ;;
*) echo "$PWD|$*" >>"$ASKED" ;;
esac
"""
OUTER = """#!/usr/bin/env bash
case "$1 $2" in
"--version ") echo "Python {version}" ;;
"-m venv")
    echo "{name} ${{*:2}}" >>"$ASKED"
    [ "$3" = --clear ] && rm -rf "$4"
    mkdir -p .venv/bin && cp "$(dirname "$0")/inner-{made}" .venv/bin/python
    exit {fails} ;;
*) printf '%s' "{reason}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    place = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", place / "scripts")
    for name in ("requirements.txt", "requirements-pretrained.txt", "requirements-export.txt", "requirements-tfds.txt"):
        (place / name).write_text("")
    (tmp_path / "bin").mkdir()
    for name, code in (("inner-whole", 0), ("inner-half", 1)):
        _write(tmp_path / "bin" / name, INNER.format(pip=code))
    return place


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def python(checkout: Path, name: str, reason: str = "", made: str = "whole", fails: int = 0, version: str = "3.12.1"):
    _write(
        checkout.parent / "bin" / name,
        OUTER.format(name=name, reason=reason, made=made, fails=fails, version=version),
    )


def run(checkout: Path, *words: str, cwd: Path | None = None, **variables: str) -> tuple[int, str, list[str]]:
    """Exit code, what was said, and what the Pythons were asked."""
    asked = checkout.parent / "asked"
    asked.write_text("")
    command = words or ("bash", "-c", "set -euo pipefail; source scripts/environment.sh; environment requirements.txt")
    variables = {
        "PATH": f"{checkout.parent}/bin:/usr/bin:/bin",
        "ASKED": str(asked),
        "HOME": str(checkout.parent),
    } | variables
    done = subprocess.run(command, cwd=cwd or checkout, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, asked.read_text().splitlines()


def test_a_half_made_environment_is_made_again(checkout: Path) -> None:
    python(checkout, "python3.13", made="half", fails=1)
    code, said, asked = run(checkout)
    assert code == 1 and "apt install python3-venv" in said and (checkout / ".venv").exists()
    python(checkout, "python3.13")
    code, said, asked = run(checkout)
    assert code == 0 and "not whole" in said, said
    assert asked[0] == "python3.13 venv --clear .venv" and "pip install" in asked[1]
    assert run(checkout)[2] == [], "what is whole is left as it is"
    shutil.copy(checkout.parent / "bin" / "inner-half", checkout / ".venv" / "bin" / "python")
    assert run(checkout)[2][0] == "python3.13 venv --clear .venv", "of a Python that was replaced"


def test_the_first_python_that_can_make_an_environment_is_taken(checkout: Path) -> None:
    python(checkout, "python3.13", reason="3.13.0, without venv: on Debian, apt install python3-venv")
    python(checkout, "python3.11", reason="3.10.2")
    python(checkout, "python3.12")
    assert run(checkout)[2][0] == "python3.12 venv --clear .venv"
    shutil.rmtree(checkout / ".venv")
    python(checkout, "python3.12", reason="late", version="3.14.0")
    python(checkout, "python3", reason="3.9.1")
    python(checkout, "python", reason="2.7.18")
    code, said, asked = run(checkout)
    assert code == 0 and "Python 3.14.0 is newer than 3.13" in said and asked[0] == "python3.12 venv --clear .venv"
    shutil.rmtree(checkout / ".venv")
    python(checkout, "mine", reason="3.8.0")
    code, said, asked = run(checkout, PYTHON="mine")
    assert code == 1 and asked == [] and "found: mine (3.8.0). Install one, or set PYTHON" in said


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["pretrain.sh", "--config=my.py", "--workdir=runs/x"], "train --config=my.py --workdir=runs/x"),
        (["build_data.sh", "coco", "a.json"], "data coco a.json"),
        (["label.sh", "shards", "--out=o"], "label shards --out=o"),
        (["export.sh", "ckpt", "out", "--format=onnx"], "export --workdir=ckpt --out=out --format=onnx"),
    ],
)
def test_paths_are_those_of_the_callers_folder(checkout: Path, tmp_path: Path, words: list[str], asked: str) -> None:
    python(checkout, "python3.13")
    (tmp_path / "elsewhere").mkdir()
    script = str(checkout / "scripts" / words[0])
    code, said, found = run(checkout, "bash", script, *words[1:], cwd=tmp_path / "elsewhere")
    assert code == 0 and found[-1] == f"{tmp_path}/elsewhere|-m glip_jax {asked}", said


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_every_script_has_a_help_from_anywhere(checkout: Path, tmp_path: Path, script: str) -> None:
    if script in ("environment.sh", "build_data.sh", "label.sh"):  # sourced; handed on to the job
        return
    code, said, _ = run(checkout, "bash", str(checkout / "scripts" / script), "--help", cwd=tmp_path)
    assert code == 0 and len(said.splitlines()) > 1 and "set -euo" not in said, said
