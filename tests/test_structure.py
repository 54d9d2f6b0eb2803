"""The shape of the project: imports only go down, modules stay short and say what they offer, every config builds."""

import ast
import importlib
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

from glip_jax.cli.command_line import load_config
from glip_jax.config import Config, validate

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "glip_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [p for folder in ("glip_jax", "configs", "gcs", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")]

# A package imports packages of lower layers only, never another of its own.
LAYERS = {
    "config": 1, "structures": 1,
    "models": 2, "distributed": 2, "io": 2,
    "data": 3, "inference": 3,
    "training": 4, "evaluation": 4, "labeling": 4, "weights": 4,
    "planning": 5,
    "cli": 6,
    "__main__": 7,
    "__init__": 8,  # the Python API: imports when it is used
}  # fmt: skip
# What a training run never needs.
ASIDE = (
    "data/importers", "data/scenes", "labeling/phrases", "cli/reports", "training/monitoring", "training/finetuning", "weights/portable",
    "models/kernels", "data/negatives", "distributed/ray_tasks",
)  # fmt: skip
# What exports carry: its files import one another as they will lie there, and the network is one file to read.
CARRIED = PACKAGE / "weights" / "portable"


def package(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def parsed(path):
    return ast.parse(path.read_text())


@cache
def imports(path):
    """(module, line) of every import of a file; `from glip_jax.a import b` is glip_jax.a.b where that is a module."""
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            for alias in node.names:
                inner = PACKAGE.parent / Path(*node.module.split(".")) / alias.name
                below = inner.with_suffix(".py").exists() or inner.is_dir()
                found.append((f"{node.module}.{alias.name}" if below else node.module, node.lineno))
    return found


def arrows():
    """package -> packages it imports."""
    found = defaultdict(set)
    for path in MODULES:
        for module, _ in imports(path):
            parts = module.split(".")
            if parts[0] == "glip_jax" and len(parts) > 1 and parts[1] != package(path):
                found[package(path)].add(parts[1])
    return found


def core():
    """The modules that a training run needs and a newcomer reads."""
    chosen = ("config", "structures", "models", "distributed", "data", "training")
    paths = [path for path in MODULES if package(path) in chosen and path.name != "__init__.py"]
    return [p for p in paths if not str(p.relative_to(PACKAGE)).startswith(ASIDE)]


def test_imports_go_down():
    unknown = {package(path) for path in MODULES} - set(LAYERS)
    assert not unknown, f"{unknown}: give the package a layer in this test, in CONTRIBUTING.md and in the design"
    wrong = [(one, other) for one, others in arrows().items() for other in others if LAYERS[other] >= LAYERS[one]]
    assert not wrong
    outside = {"configs", "tests", "benchmarks", "gcs"}
    assert not [(p.name, m) for p in MODULES for m, _ in imports(p) if m.split(".")[0] in outside]


def test_contributing_draws_the_measured_arrows():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawn = {
        row[1]: {*re.findall(r"`(\w+)`", row[2])} for row in re.finditer(r"^\| `(\w+)` \|([^|]*)\|", text, re.MULTILINE)
    }
    assert drawn == {one: others for one, others in arrows().items() if not one.startswith("__")} | {
        one: set() for one in LAYERS if one not in arrows() and not one.startswith("__")
    }


def test_the_top_has_few_entries():
    entries = [p.name for p in PACKAGE.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 15, entries


def test_the_core_is_small_and_imports_nothing_aside():
    lines = {path: len(path.read_text().splitlines()) for path in core()}
    assert len(lines) <= 48 and sum(lines.values()) <= 9300, (len(lines), sum(lines.values()))
    aside = [
        f"glip_jax.{folder.replace('/', '.')}"
        for folder in ASIDE
        if folder not in ("training/monitoring", "models/kernels", "data/negatives")
    ]
    assert not [(str(p), m) for p in lines for m, _ in imports(p) if any(m.startswith(name) for name in aside)]


def test_data_and_words_know_no_jax():
    # boxes serves numpy and jax arrays alike through the array's own namespace; batch only names types.
    wanted = [p for p in MODULES if package(p) in ("config", "data", "structures")]
    # What those use of files, buckets and exit codes.
    beside = ("assets", "checkpoint_steps", "checksums", "errors", "fsspec_gcs", "gcs", "retry", "sharing", "task_results")  # fmt: skip
    wanted += [PACKAGE / "io" / f"{name}.py" for name in beside]
    wanted += [PACKAGE / "distributed" / "exit_codes.py", PACKAGE / "training" / "monitoring" / "chips.py"]
    accelerated = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
    assert not [(str(p), m) for p in wanted for m, _ in imports(p) if m.split(".")[0] in accelerated]


def test_what_exports_carry_knows_nothing_of_us():
    assert not {m.split(".")[0] for p in CARRIED.glob("*.py") for m, _ in imports(p)} & {"glip_jax", "jax", "flax"}


def test_imports_are_absolute_and_annotations_no_strings():
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom):
                assert not node.level or path.parent == CARRIED, f"{path}:{node.lineno}: relative import"
                # With annotations as strings, jaxtyping's import hook would check nothing.
                assert node.module != "__future__", path


def test_sizes():
    wrong = [(str(path), "lines") for path in SOURCES if len(path.read_text().splitlines()) > 600]
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                wrong += [(f"{path}:{node.lineno}", node.name, length)] if length > 90 else []
    assert not wrong, "at most 600 lines a module and 90 a function"


def test_modules_say_what_they_offer():
    for path in MODULES:
        if path.name == "__init__.py":
            continue
        module = "glip_jax." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        assert ast.get_docstring(parsed(path)), f"{path} has no docstring"
        loaded = importlib.import_module(module)
        assert hasattr(loaded, "__all__"), f"{path} has no __all__"
        missing = [name for name in loaded.__all__ if not hasattr(loaded, name)]
        assert not missing, f"{module}.__all__ names {missing}, which are not there"


def test_no_package_without_a_name():
    nameless = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [str(p) for p in SOURCES if nameless & {*p.relative_to(ROOT).parts, p.stem}]


def test_every_config_builds_and_fits():
    paths = [path for path in sorted((ROOT / "configs").rglob("*.py")) if path.name != "__init__.py"]
    assert "demo.py" in {path.name for path in paths}
    for path in paths:
        config = load_config(str(path))
        assert isinstance(config, Config), path
        validate(config)
