"""The calls of docs/tools/ run as they stand there, on the network of configs/debug.py."""

import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from glip_jax.weights import verification
from tests.io.videos import write_video
from tests.run_job import run_job

pytestmark = pytest.mark.compiles

PAGES = Path(__file__).resolve().parents[1] / "docs" / "tools"
# Those of Label Studio ask a server: tests/cli/test_serve.py.
ORDER = ("coco-files", "fiftyone", "videos", "supervision", "transformers", "onnx", "space")
TEXT = "\n".join((PAGES / f"{name}.md").read_text() for name in ORDER)
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A folder with what the pages name: runs/demo, pictures/, photo.jpg, and clip.mp4 where PyAV is installed."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "runs").mkdir()
    (folder / "runs" / "demo").symlink_to(trained.workdir)
    (folder / "pictures").symlink_to(trained.scenes / "validation" / "images")
    pixels = np.asarray(Image.open(next((folder / "pictures").iterdir())))
    Image.fromarray(pixels).save(folder / "photo.jpg", quality=95)
    if importlib.util.find_spec("av"):
        write_video(folder / "clip.mp4", frames=25, rate=30)
    return folder


def run_command(line):
    """A command of a page: a job, with a low threshold where it detects, or a script in this process."""
    words = shlex.split(line)
    if words[1:3] == ["-m", "glip_jax"]:
        assert run_job(words[3], [*words[4:], *(["--threshold=0.02"] if words[3] == "predict" else [])]) == 0
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")


def check(code, variables):
    """What a block in Python must have found."""
    if "sv.Detections" in code:
        found, names = variables["found"], variables["names"]
        boxes = found["boxes"].numpy() if isinstance(found, dict) else found.boxes
        words = found["text_labels"] if isinstance(found, dict) else found.names
        detections = variables["detections"]
        np.testing.assert_array_equal(detections.xyxy, boxes)
        assert (
            list(detections.data["class_name"]) == [names[label] for label in detections.class_id] == list(words) != []
        )
    else:
        assert len(variables[next(name for name in ("boxes", "found") if name in variables)]) > 0


@pytest.mark.slow
def test_the_calls_run(place, monkeypatch, capsys):
    """In the order of the pages, but exports first, which others use."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(verification, "differences", lambda *_: verification.Difference(0.0, 0.0))  # tested elsewhere
    libraries = {"import fiftyone": "fiftyone", "import supervision": "supervision", "clip.mp4": "av"}
    missing = {word: name for word, name in libraries.items() if importlib.util.find_spec(name) is None}
    ran, left = [], set()
    for language, code in sorted(BLOCKS, key=lambda block: "glip_jax export" not in block[1]):
        if lacking := {name for word, name in missing.items() if word in code}:
            left |= lacking
            continue
        code = code.replace("threshold=0.3", "threshold=0.0")  # of a network of two steps no score is high
        ran.append(code)
        if language == "bash":
            run_command(code)
        else:
            variables: dict[str, Any] = {}
            exec(compile(code, str(PAGES), "exec"), variables)
            check(code, variables)
    assert len(ran) >= 7 and sum("glip_jax" in code for code in ran) >= 3
    assert '"file": "photo.jpg"' in capsys.readouterr().out
    assert (place / "drawn" / "photo.png").is_file() and (place / "exported" / "demo" / "app.py").is_file()
    if left - {"fiftyone"}:
        pytest.skip(f"not installed: {', '.join(sorted(left))}; their calls did not run, all others did")
