"""The job `evaluate`: a checkpoint on the sets of `config.evaluation`.

WORKDIR/evaluation.json             settings of the sets and their numbers
WORKDIR/detections_SET.json         what was found, in COCO's results form
WORKDIR/report.html                 the page of the run
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from etils import epath

from glip_jax.assets import AssetError
from glip_jax.checkpoint import CheckpointError, latest_step, restore_parameters, saved_config
from glip_jax.config import Config, ConfigError, differences
from glip_jax.evaluation.average_precision import GroundTruthError, coco_results
from glip_jax.evaluation.evaluate import Evaluated, EvaluationError, evaluate_set
from glip_jax.evaluation.page import table
from glip_jax.inference import Detector
from glip_jax.jobs.command_line import Arguments, CommandLineError, parse
from glip_jax.jobs.report import ReportError, write_page
from glip_jax.prompts import PromptError
from glip_jax.training.loop import enable_compilation_cache

__all__ = ["EvaluateArguments", "evaluate_checkpoint", "main"]

_FAULTS = (
    AssetError, CheckpointError, CommandLineError, ConfigError, EvaluationError, GroundTruthError,
    PromptError, ReportError,
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateArguments(Arguments):
    """Evaluate the newest checkpoint of --workdir on the sets of config.evaluation."""

    step: int | None = None
    """Step of the checkpoint; default: the newest complete one."""


def main(argv: Sequence[str]) -> int:
    """Runs the job; returns 0, or 2 after a message about settings, checkpoint or sets."""
    try:
        arguments = parse(argv, EvaluateArguments, "evaluate")
        if not arguments.workdir:
            raise CommandLineError("evaluate: no working folder: expected --workdir=DIR with a checkpoint of `train`")
        evaluate_checkpoint(arguments.config, arguments.workdir, arguments.step)
    except _FAULTS as fault:
        print(f"evaluate: {fault}", file=sys.stderr)
        return 2
    return 0


def evaluate_checkpoint(config: Config, workdir: str, step: int | None = None) -> dict[str, Evaluated]:
    """Evaluates a checkpoint on all sets, prints the table, writes the files named above; returns the evaluations.

    Raises CommandLineError if the config names no set or describes another network than the checkpoint's.
    """
    if not config.evaluation.sets:
        raise CommandLineError("evaluate: config.evaluation.sets is empty: name a set with annotations and images")
    saved = saved_config(workdir, step)
    step = latest_step(workdir) if step is None else step
    changed = [line for line in differences(saved, config) if line.startswith("model.")]
    if changed:
        listed = "\n  ".join(changed)
        raise CommandLineError(f"{workdir} holds a checkpoint of another network than the config says:\n  {listed}")
    enable_compilation_cache()
    print(f"{workdir}: step {step}, parameters: {config.evaluation.parameters}", flush=True)
    detector = Detector(config, restore_parameters(workdir, config.evaluation.parameters, step))
    results, content = {}, {}
    for name, dataset in config.evaluation.sets.items():
        result = evaluate_set(detector, config, dataset, name=name, report=lambda line: print(line, flush=True))
        results[name], content[name] = result, _numbers(result, asdict(dataset))
        rows = coco_results(result.truth, result.detections)
        (epath.Path(workdir) / f"detections_{name}.json").write_text(json.dumps(rows))
    summary = {"step": step, "parameters": config.evaluation.parameters, "sets": content}
    (epath.Path(workdir) / "evaluation.json").write_text(json.dumps(summary, indent=1))
    print(table({name: (result.precision, len(result.image_ids)) for name, result in results.items()}))
    print(f"drawn page: {write_page(workdir)}")
    return results


def _numbers(result: Evaluated, dataset: dict[str, Any]) -> dict[str, Any]:
    return {
        **dataset,
        "prompts": list(result.prompts),
        "image_ids": list(result.image_ids),
        "numbers": result.precision.numbers,
        "per_class": result.precision.per_class,
        "per_class_50": result.precision.per_class_50,
    }
