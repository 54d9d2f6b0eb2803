"""The job `compare`: evaluated runs side by side, those of one config as replicas.

OUT/compare.json   every number of every run, means and spreads, steps
OUT/compare.png    the plot
OUT/compare.html   table, plot and differences as an HTML report
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from etils import epath

from glip_jax.cli.command_line import CommandLineError, flags
from glip_jax.cli.report import FORMAT
from glip_jax.cli.reports.compare_report import label, labels, render
from glip_jax.cli.reports.drawing import draw_groups
from glip_jax.cli.reports.run_report import aligned
from glip_jax.config import PathStr
from glip_jax.distributed import exit_codes
from glip_jax.evaluation.comparison import (
    Comparison,
    ComparisonError,
    DifferenceRequest,
    Run,
    Spread,
    compare,
    headlines,
    run_of,
)
from glip_jax.io.workdir import prepare, write_atomic
from glip_jax.training.monitoring import metrics

__all__ = ["Compare", "main", "table", "write_comparison"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compare:
    """Compare evaluated runs: those of one config, which differ in config.train.seed, become a mean and a spread.

    Reads evaluation.json of each folder, as `evaluate` wrote it; prints a table and writes compare.json, compare.png and
    the HTML report compare.html.
    """

    runs: Annotated[tyro.conf.Positional[tuple[PathStr, ...]], tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders with evaluation.json, local or gs://."""
    out: PathStr = ""
    """Folder to write to, local or gs://."""
    steps: tuple[str, ...] = ()
    """Differences to take seed by seed: NEW/OLD, two names of configs, or NEW/OLD=NUMBER,NUMBER with the numbers in which
    they are compared, such as B/A=scenes/AP50,phrases/relational/recall@1."""


def main(argv: Sequence[str]) -> int:
    """Runs `compare RUN ... --out=DIR`. Raises CommandLineError, ComparisonError or CheckpointError."""
    example = "runs/a-0 runs/a-1 runs/b-0 runs/b-1 --out=runs/compared --steps b/a"
    job = flags(argv, Compare, "compare", example)
    if not job.out:
        raise CommandLineError("no folder to write to: expected --out=DIR")
    compared = _compared(job.runs, job.steps)  # first: what is refused leaves no folder
    prepare(job.out)
    write_comparison(compared, job.out)
    return exit_codes.DONE


def write_comparison(compared: Comparison, out: str) -> None:
    """Prints the table and writes the three files."""
    folder = epath.Path(out)
    panels = {
        label(key): {name: compared.numbers[name][key].values for name in compared.runs}
        for key in headlines(next(iter(compared.numbers.values())))
    }
    picture = draw_groups(panels)
    temporary = folder / "compare.png.unfinished"
    temporary.write_bytes(picture)
    temporary.replace(folder / "compare.png")
    write_atomic(folder / "compare.json", json.dumps(_content(compared), indent=1))
    write_atomic(folder / "compare.html", render(compared, draw_groups(panels, format="svg")))
    logger.info(table(compared))
    logger.info(f"every run's numbers: {folder / 'compare.json'}, plot: {folder / 'compare.png'}")
    logger.info(f"HTML report: {folder / 'compare.html'}")


def table(compared: Comparison) -> str:
    """The numbers as aligned lines for a terminal: a row each, a column a config; then the steps."""
    keys = list(next(iter(compared.numbers.values())))
    rows = [["", *(f"{name} ({_count(len(own), 'run')})" for name, own in compared.runs.items())]]
    rows += [
        [text, *(_cell(compared.numbers[name][key]) for name in compared.runs)] for key, text in labels(keys).items()
    ]
    tables = [aligned(rows)]
    for step in compared.steps:
        head = [f"{step.new} - {step.old}", "mean", "up", *(f"seed {seed}" for seed in step.seeds)]
        rows = [
            [label(key), _cell(own, "+"), _up(own), *(f"{value:+.4f}" for value in own.values)]
            for key, own in step.differences.items()
        ]  # fmt: skip
        tables.append(aligned([head, *rows]))
    notes = []
    if any(len(own) > 1 for own in compared.runs.values()):
        notes.append("mean ± standard deviation over seeds (n - 1)")
    notes += [
        f"not the same everywhere: {name}: "
        + "; ".join(f"{group} {value}" for group, value in zip(compared.runs, values, strict=True))
        for name, values in compared.differing
    ]
    return "\n".join(["\n\n".join(tables), *notes])


def _compared(folders: Sequence[str], steps: Sequence[str]) -> Comparison:
    known: dict[str, str] = {}
    for folder in folders:
        path = folder if "://" in folder else os.path.realpath(folder)
        if path in known:
            raise ComparisonError(f"{known[path]} and {folder} are the same folder: expected each run once")
        known[path] = folder
    return compare([_read(folder) for folder in folders], [_wanted(step) for step in steps])


def _wanted(text: str) -> DifferenceRequest:
    names, _, numbers = text.partition("=")
    new, slash, old = names.partition("/")
    if not slash or not new or not old:
        raise CommandLineError(f"--steps {text}: expected NEW/OLD or NEW/OLD=NUMBER,NUMBER, such as b/a")
    return DifferenceRequest(new, old, tuple(filter(None, numbers.split(","))))


def _read(folder: str) -> Run:
    path = epath.Path(folder) / "evaluation.json"
    try:
        summary = json.loads(path.read_text())
        if summary.get("format") != FORMAT or "seed" not in summary:
            raise ComparisonError(f"{path} is of another version of glip_jax: run `evaluate` again")
        return run_of(folder, summary, _step_seconds(folder, summary.get("workdir", "")))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ComparisonError(
            f"{folder} holds no evaluation.json: expected a folder that `python -m glip_jax evaluate` wrote to"
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ComparisonError):
            raise
        raise ComparisonError(f"{path} cannot be read ({error!r}): run `evaluate` again") from error


def _step_seconds(folder: str, workdir: str) -> list[float]:
    """Of the training whose metrics.jsonl lies beside the evaluation or, if that is elsewhere, in its working folder; empty without one."""
    for where in (folder, workdir):
        if where and (found := [line["step_seconds"] for line in metrics.read(where) if "step_seconds" in line]):
            return found
    return []


def _content(compared: Comparison) -> dict[str, Any]:
    """compare.json."""
    first = next(iter(compared.runs.values()))[0]
    return {
        "format": 1,
        "runs": [
            {"path": run.path, "config": run.name, "seed": run.seed, "step": run.summary["step"],
             "checkpoint": run.summary["hashes"]["checkpoint"], "numbers": dict(run.numbers)}
            for own in compared.runs.values() for run in own
        ],
        "configs": {name: {key: own._asdict() for key, own in numbers.items()} for name, numbers in compared.numbers.items()},
        "steps": [
            {"new": step.new, "old": step.old, "seeds": list(step.seeds),
             "differences": {key: own._asdict() for key, own in step.differences.items()}}
            for step in compared.steps
        ],
        "sets": {name: entry["hashes"] for name, entry in first.summary["sets"].items()},
        "differing": {name: dict(zip(compared.runs, values, strict=True)) for name, values in compared.differing},
    }  # fmt: skip


def _cell(own: Spread, sign: str = "") -> str:
    deviation = "" if own.deviation is None else f" ±{own.deviation:.4f}"
    return f"{own.mean:{sign}.4f}{deviation}"


def _up(own: Spread) -> str:
    return f"{sum(value > 0 for value in own.values)} of {len(own.values)}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
