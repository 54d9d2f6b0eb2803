"""The documents point at what is there: files, jobs, exit codes, variables."""

import re
from pathlib import Path

from glip_jax.__main__ import JOBS
from glip_jax.config import Config, DataConfig, EvaluationConfig, EvaluationSet, OptimizerConfig, SourceConfig, flatten
from glip_jax.distributed import exit_codes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "gcs" / "README.md", ROOT / "benchmarks" / "README.md"]
PAGES += [page for page in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in page.parts]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_links_lead_to_files():
    lost = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path = target.partition("#")[0]
            if path and "://" not in target and not (page.parent / path).exists():
                lost.append(f"{page.relative_to(ROOT)}: {target}")
    assert not lost


def test_jobs_named_are_there():
    named = {
        (job, page.name)
        for page in PAGES
        for job in re.findall(
            r"(?:python -m glip_jax|^\s*(?:[$] )?glip-jax|`glip-jax) ([a-z]+)", page.read_text(), re.MULTILINE
        )
    }
    assert len(named) > 20
    assert not {(job, page) for job, page in named if job not in JOBS}


def test_settings_named_are_there():
    config = Config(
        data=DataConfig(sources={"NAME": SourceConfig("")}),
        evaluation=EvaluationConfig(sets={"NAME": EvaluationSet("", "", {"NAME": ""})}),
        optimizer=OptimizerConfig(arguments={"NAME": 1.0}),
    )
    fields = {name for name, _ in flatten(config)}
    known = {name[: place.start()] for name in fields for place in re.finditer(r"\.|$", name)}
    sections = "|".join({name.split(".")[0] for name in fields if "." in name})
    lost = []
    for page in PAGES:
        for name in re.findall(rf"(?:--config\.|`)((?:{sections})\.[a-z][\w.-]*)", page.read_text()):
            setting = re.sub(r"\b(sources|sets)\.\w+", r"\1.NAME", name.replace("-", "_")).rstrip(".")
            if setting not in known and not name.endswith((".json", ".yaml")):  # evaluation.json is a file
                lost.append(f"{page.relative_to(ROOT)}: {name}")
    assert not lost


def test_exit_codes_are_listed():
    codes = {value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    listed = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "reference" / "exit-codes.md").read_text(), re.MULTILINE)
    assert sorted(map(int, listed)) == sorted(codes)


def test_variables_are_listed():
    files = [*(ROOT / "glip_jax").rglob("*.py"), *(ROOT / "scripts").iterdir(), ROOT / "Dockerfile"]
    used = {name for path in files for name in re.findall(r"\bGLIP_JAX_[A-Z_]+\b", path.read_text())}
    listed = set(re.findall(r"\bGLIP_JAX_[A-Z_]+\b", (ROOT / "docs" / "reference" / "environment.md").read_text()))
    assert used == listed
