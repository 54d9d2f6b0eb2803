"""The cells of docs/tutorials/first_steps.ipynb run in their order, on the network of configs/debug.py."""

import json
import shlex
from pathlib import Path
from typing import Any

import jax
import pytest
from PIL import Image

from glip_jax.distributed import mesh
from glip_jax.distributed.mesh import make_mesh
from glip_jax.training import loop
from tests.run_job import run_job

pytestmark = pytest.mark.compiles

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorials" / "first_steps.ipynb"
# A network of two steps has no high scores, and learns nothing in two more.
SHORTER = {"threshold=0.5": "threshold=0.01", "--minutes=2": "--steps=2"}


def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_no_outputs_are_stored():
    assert not [cell for cell in cells() if cell["outputs"] or cell["execution_count"]]


@pytest.mark.slow
def test_the_cells_run(trained, tmp_path, monkeypatch, capsys):
    demo = tmp_path / "runs" / "demo"
    demo.mkdir(parents=True)
    for path in trained.workdir.iterdir():
        (demo / path.name).symlink_to(path)
    (demo / "scenes").symlink_to(trained.scenes)
    monkeypatch.chdir(tmp_path)
    for module in (mesh, loop):  # on one device less is compiled
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    variables: dict[str, Any] = {}
    for cell in cells():
        code = "".join(cell["source"])
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        if code.startswith("!python -m glip_jax "):
            job, *arguments = shlex.split(code)[3:]
            assert run_job(job, arguments) == 0
        else:
            exec(compile(code, NOTEBOOK.name, "exec"), variables)
    said = capsys.readouterr().out
    assert f"{variables['images'][0].name} ['" in said and "AP50 before" in said
    assert len(variables["found"]) == 2 and len(variables["found"][0].names) > 0
    drawn = variables["draw"](variables["image"], variables["found_now"])
    assert drawn.size == (192, 192) and set(variables["found_now"].names) <= {"square", "triangle"}
    assert drawn.tobytes() != Image.open(variables["image"]).resize((192, 192), Image.Resampling.BILINEAR).tobytes()
