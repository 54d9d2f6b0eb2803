"""The shape of the project itself: floors of imports, sizes of modules and functions, names of rooms, configs."""

import ast
import importlib
from pathlib import Path

import pytest

from glip_jax.config import Config, validate
from glip_jax.jobs.command_line import load_config

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "glip_jax").rglob("*.py"))
SOURCES = [p for folder in ("glip_jax", "configs", "gcs", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")]

# Floors: a module imports floors below its own, and on its own floor what SAME says. `drawing` is a part for the eye.
FLOORS = {
    "config": 0, "model_config": 0, "structures": 0, "boxes": 0, "prompts": 0, "assets": 0, "exits": 0, "environment": 0,
    "data_config": 0, "patience": 0, "storage": 0, "bucket_files": 0, "checksums": 0, "chips": 0,
    "data": 1, "models": 1, "drawing": 1,
    "parallel": 2, "workdir": 2, "step_folders": 2, "checkpoint": 2, "collectives": 2, "flops": 2, "processes": 2,
    "inference": 2,
    "training": 2, "weights": 2,
    "evaluation": 3, "labeling": 3, "planning": 3, "jobs": 3, "__main__": 4, "__init__": 0,
}  # fmt: skip
GROUND = (
    "exits", "environment", "patience", "storage", "bucket_files", "checksums", "chips", "model_config", "data_config", "config",
    "structures", "boxes", "prompts", "assets",
)  # fmt: skip
SAME = {2: ("parallel", "workdir", "step_folders", "checkpoint", "flops", "processes")}
# What exports carry: its files import one another as they will lie there, and the network is one file to read.
CARRIED = ROOT / "glip_jax" / "weights" / "portable"


def room(path):
    return path.relative_to(ROOT / "glip_jax").parts[0].removesuffix(".py")


def imports(path):
    """(module, line, inside a function) of every import of a file; `from a import b` gives a.b as well as a."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.parent == CARRIED, f"{path}:{node.lineno}: relative import"
            assert node.module
            yield node.module, node.lineno, id(node) in inside
            if node.module == "glip_jax":
                for alias in node.names:
                    yield f"glip_jax.{alias.name}", node.lineno, id(node) in inside


def _allowed(mine, other):
    if mine == other or mine == "jobs":
        return True
    if FLOORS[mine] == FLOORS[other] == 0:
        return GROUND.index(other) < GROUND.index(mine) or other == "assets"
    if FLOORS[mine] == FLOORS[other]:
        return other in SAME.get(FLOORS[mine], ())
    return FLOORS[other] < FLOORS[mine]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    wrong = []
    for module, line, _ in imports(path):
        parts = module.split(".")
        if parts[0] in ("configs", "tests", "benchmarks", "gcs"):
            wrong.append(f"{path.name}:{line} imports {module}")
        if parts[0] == "glip_jax" and len(parts) > 1:
            assert parts[1] in FLOORS, f"{module}: give the room a floor in this test and in the design"
            if not _allowed(room(path), parts[1]):
                wrong.append(f"{path.name}:{line} ({room(path)}) imports {parts[1]}")
    assert not wrong, wrong


def test_what_exports_carry_knows_nothing_of_us():
    for path in CARRIED.glob("*.py"):
        assert {m.split(".")[0] for m, _, _ in imports(path)} & {"glip_jax", "jax", "flax"} == set()


def test_every_room_has_a_floor():
    assert {room(path) for path in MODULES} <= set(FLOORS)


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in ("data", *GROUND)], ids=lambda p: p.stem)
def test_data_and_words_know_no_jax(path):
    found = [m for m, _, _ in imports(path) if m.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax", "chex")]
    # boxes serves numpy and jax arrays alike through the array's own namespace.
    assert not found, f"{path} imports {found}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    text, most = path.read_text(), 600 if path == CARRIED / "glip_network.py" else 450
    assert len(text.splitlines()) <= most, f"{path} has more than {most} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 90, f"{path}:{node.lineno} {node.name} has {length} lines, at most 90"


@pytest.mark.parametrize("path", [p for p in MODULES if p.name != "__init__.py"], ids=lambda p: p.stem)
def test_modules_say_what_they_offer(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    names = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
    assert "__all__" in names, f"{path} has no __all__"
    module = "glip_jax." + ".".join(path.relative_to(ROOT / "glip_jax").with_suffix("").parts)
    loaded = importlib.import_module(module)
    missing = [name for name in loaded.__all__ if not hasattr(loaded, name)]
    assert not missing, f"{module}.__all__ names {missing}, which are not there"


def test_no_room_without_a_name():
    nameless = {"utils", "util", "common", "helpers", "helper", "misc"}
    found = [str(p) for p in SOURCES if nameless & {*p.relative_to(ROOT).parts, p.stem}]
    assert not found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_annotations_of_arrays_are_no_strings(path):
    # With them as strings, jaxtyping's import hook would check nothing.
    assert "__future__" not in {module for module, _, _ in imports(path)}


CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def test_there_are_configs():
    assert "demo.py" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.name != "__init__.py"], ids=lambda p: p.stem)
def test_every_config_builds_and_fits(path):
    config = load_config(str(path))
    assert isinstance(config, Config)
    validate(config)
