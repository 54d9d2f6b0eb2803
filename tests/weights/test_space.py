"""`export --space`: the folder alone serves a page; its functions, and, where gradio and a chromium are, `python app.py` in a browser."""

import contextlib
import importlib.util
import io
import os
import shutil
import socket
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image

from glip_jax.distributed import exit_codes
from glip_jax.io.checkpoint import Checkpoints, Saved
from glip_jax.weights import verification
from tests import tiny_run
from tests.run_job import run_job

pytestmark = pytest.mark.compiles

CONFIG = tiny_run.replace(tiny_run.config(dropout=0.0), "evaluation", short_side=64, long_side=96)
CONFIG = tiny_run.replace(CONFIG, "detection", threshold=0.0, max_detections=9)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(str(folder), keep=1) as checkpoints:
        checkpoints.save(3, Saved(tiny_run.parameters(CONFIG.model), {}, {}), CONFIG)
    return folder


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
    out = tmp_path_factory.mktemp("space") / "model"
    with pytest.MonkeyPatch.context() as patch:  # that the export equals the network is tested elsewhere
        patch.setattr(verification, "differences", lambda *_: verification.Difference(0.0, 0.0))
        assert run_job("export", [f"--workdir={workdir}", f"--out={out}", "--space"]) == exit_codes.DONE
    return out


@pytest.fixture(scope="module")
def app(folder) -> Any:
    """app.py of the folder as a module."""
    spec = importlib.util.spec_from_file_location("app_of_folder", folder / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        spec.loader.exec_module(module)
        module.model()
    return module


def test_the_head_and_the_requirements_are_those_of_a_space(folder):
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    said = yaml.safe_load(head)
    assert said["sdk"] == "gradio" and (folder / said["app_file"]).is_file() and said["title"] == "tiny"
    assert "pipeline(" in text and not text.startswith("---")
    names = {
        Requirement(line).name for line in (folder / "requirements.txt").read_text().splitlines() if line[0] != "#"
    }
    assert names == {"torch", "transformers", "pillow", "numpy"}


def test_the_page_finds_what_the_pipeline_finds(folder, app):
    exif, pixels = Image.Exif(), np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8)
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "lying.png", exif=exif)
    with Image.open(folder / "lying.png") as image:
        upright, detections = found = app.detect(image, "cat, dog,")
        wanted = app.model()(str(folder / "lying.png"), candidate_labels=["cat", "dog"], threshold=app.LOWEST)
    assert upright.size == (40, 90) and detections == wanted and len(wanted) > 3
    scores = sorted(each["score"] for each in wanted)
    (shown, boxes), text = app.above(found, scores[2])
    assert shown is upright and len(boxes) == len(scores) - 2 and text.startswith("found: ")
    (x1, y1, x2, y2), label = boxes[0]
    assert 0 <= x1 <= x2 <= 40 and 0 <= y1 <= y2 <= 90 and label in ("cat", "dog")
    assert app.above(found, 0.99) == ((upright, []), "nothing found with a score of 0.99 or more")


@pytest.mark.parametrize(
    ("size", "names", "message"),
    [
        (None, "cat", "no image"),
        ((9, 9), " , ", "nothing to look for"),
        ((9, 9), "cat, CAT", "is the same to the model"),
        ((10_000, 5_001), "cat", "10000 x 5001 pixels: at most 50,000,000"),
    ],
)
def test_what_cannot_be_asked_is_said(app, size, names, message):
    with pytest.raises(ValueError, match=message):
        app.detect(size and Image.new("L", size), names)


WITH_GRADIO = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install gradio"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@WITH_GRADIO
def test_the_page_is_built_and_its_functions_answer(app):
    """Without a server: the events' functions, and an error as a message of the page."""
    import gradio  # pyright: ignore[reportMissingImports]

    blocks = app.page()
    search, _, slide = (event.fn for event in blocks.fns.values())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    found, (shown, boxes), text = search(image, "cat, dog", 0.1)
    assert (
        shown.size == (64, 64) and boxes and text.startswith("found: ") and slide(found, 0.1) == ((shown, boxes), text)
    )
    with pytest.raises(gradio.Error, match="nothing to look for"):
        search(image, "", 0.1)


@contextlib.contextmanager
def served(folder, log):
    """The address of `python app.py` of the folder, in a process of its own, without the network."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "GRADIO_SERVER_PORT": address.rpartition(":")[2],
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
    }
    deadline = time.monotonic() + 240
    with log.open("w") as stream, contextlib.ExitStack() as ended:
        while "public link" not in log.read_text():
            process = subprocess.Popen(
                [sys.executable, "app.py"], cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )
            ended.callback(process.wait)
            ended.callback(process.terminate)
            while process.poll() is None and "public link" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            # On a busy machine gradio gives up after three seconds without an answer of its own.
            assert process.poll() is None or "localhost is not accessible" in log.read_text(), log.read_text()
        yield address


@WITH_GRADIO
@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
def test_the_page_in_a_browser(folder, app, tmp_path):
    """`python app.py` as the Space runs it: an image and names in, boxes where the pipeline finds them, the slider, an error."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements-test.txt")
    pixels = np.random.default_rng(1).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    detections = app.model()(str(tmp_path / "photo.png"), candidate_labels=["cat", "dog"], threshold=app.LOWEST)
    scores = sorted(each["score"] for each in detections)
    least = round((scores[-3] + scores[-4]) / 2, 2)
    kept = [each for each in detections if each["score"] >= least]
    assert 0 < len(kept) < len(detections)
    with served(folder, tmp_path / "log") as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(address, timeout=120_000)
        page.get_by_role("button", name="search").click()
        sync_api.expect(page.get_by_text("no image: drop one")).to_be_visible(timeout=120_000)
        page.set_input_files("input[type=file]", str(tmp_path / "photo.png"))
        sync_api.expect(page.get_by_test_id("image").locator("img")).to_be_visible(timeout=120_000)
        page.get_by_label("look for").fill("cat, dog")
        page.get_by_label("look for").press("Enter")
        sync_api.expect(page.get_by_text("nothing found with a score of 0.3 or more")).to_be_visible(timeout=120_000)
        number = page.get_by_label("number input for lowest score")
        number.fill(str(least))
        number.press("Enter")
        text = app.above((None, detections), least)[1]
        sync_api.expect(page.get_by_text(text, exact=True)).to_be_visible(timeout=120_000)
        masks = [
            np.asarray(Image.open(io.BytesIO(page.request.get(mask.get_attribute("src")).body())).convert("RGBA"))[
                ..., 3
            ]
            for mask in page.locator("img.mask").all()
        ]
        browser.close()
    for mask, found in zip(masks, kept, strict=True):
        rows, columns = np.nonzero(mask)
        drawn = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert mask.shape == (64, 96) and drawn == pytest.approx(
            [found["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")], abs=1
        )


def test_another_format_has_no_page(workdir, tmp_path, capsys):
    command = [f"--workdir={workdir}", f"--out={tmp_path / 'x'}", "--format=onnx", "--space"]
    assert run_job("export", command) == exit_codes.BAD_INPUT
    assert "--space makes a page for --format=huggingface, found --format=onnx" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
