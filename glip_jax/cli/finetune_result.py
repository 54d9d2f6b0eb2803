"""The result of the job `finetune`: kept sets, mixtures of weights, deltas, finetune.json, the table and the report."""

import dataclasses
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etils import epath

from glip_jax.cli.finetune_data import Run
from glip_jax.cli.reports import finetune_report
from glip_jax.config import Config
from glip_jax.evaluation.average_precision import average_precision, load_ground_truth
from glip_jax.evaluation.detection_errors import detection_errors, operating_points
from glip_jax.evaluation.transfer import (
    MAIN,
    CurvePoint,
    Interpolated,
    KeptSet,
    SeedResult,
    Transfer,
    split_result,
    summary,
)
from glip_jax.io.provenance import code, config_hash, file_hash
from glip_jax.io.workdir import write_atomic
from glip_jax.training.monitoring.metrics import read
from glip_jax.weights.delta import save_delta
from glip_jax.weights.tuned_parameters import interpolated

if TYPE_CHECKING:
    from glip_jax.cli.finetune import FinetuneJob

__all__ = ["Done", "finish"]

logger = logging.getLogger(__name__)

_DELTAS = ("prompt", "lora", "linear", "head", "text")
"""Modes whose result is a delta on the base."""


@dataclass(frozen=True)
class Done:
    """A training that ended."""

    run: Run
    config: Config
    base: Any
    """Parameters before training."""
    params: Any
    """Those of the best step."""
    best_step: int
    """0: no step is better than the base."""
    steps: int


def finish(job: "FinetuneJob", done: Sequence[Done]) -> None:
    """Measures kept sets and mixtures of weights, and writes deltas, finetune.json and the report; logs the table."""
    first, split = done[0], "test" if "test" in job.own.sets else "valid"
    truths = {name: load_ground_truth(own.annotations, own, name) for name, own in job.own.sets.items()}
    before = job.measured(first.config, first.base, job.before(first.run), job.own.sets)
    after = job.measured(first.config, first.params, f"tuned_{first.run.name}", job.own.sets)
    splits = {name: split_result(truths[name], before[name], after[name]) for name in job.own.sets}
    thresholds = {name: point.threshold for name, point in operating_points(truths["valid"], after["valid"]).items()}
    results = [_delta(job, each) for each in done]
    transfer = Transfer(
        name=epath.Path(job.arguments.data).name, tune=job.tune, base=job.arguments.checkpoint, split=split, splits=splits,
        best_step=first.best_step, steps=first.steps, minutes=_minutes(str(job.folder / first.run.name)),
        curve=_curve(str(job.folder / first.run.name)), kept=_kept(job, first), interpolation=_interpolation(job, first),
        thresholds=thresholds, runs=_all_runs(job, done, truths[split], split) if len(done) > 1 else (), notes=tuple(job.own.notes),
        commands=_commands(job, results[0], thresholds), settings=_provenance(job, first),
    )  # fmt: skip
    errors = finetune_report.Errors(
        detection_errors(truths[split], before[split]), detection_errors(truths[split], after[split], thresholds)
    )
    write_atomic(job.folder / "report.html", finetune_report.render(transfer, errors, job.own.sets[split].images))
    write_atomic(job.folder / "finetune.json", json.dumps(summary(transfer), indent=1))
    for each in done if job.tune in _DELTAS and job.base is not None else ():
        (job.folder / each.run.name / "checkpoints").rmtree(missing_ok=True)
    (job.folder / "features").rmtree(missing_ok=True)
    logger.info(finetune_report.table(transfer))
    logger.info(f"numbers: {job.folder / 'finetune.json'}; report: {job.folder / 'report.html'}")


def _delta(job: "FinetuneJob", done: Done) -> str:
    """What `--checkpoint` names to use the result; a delta is written."""
    folder = job.folder / done.run.name
    if job.base is None or job.tune not in _DELTAS:
        return str(folder / "checkpoints" / str(done.best_step)) if done.best_step else job.arguments.checkpoint
    save_delta(str(folder / "delta"), job.tune, done.params, done.config, job.base, "ema", job.own.dataset.names)
    return str(folder / "delta")


def _kept(job: "FinetuneJob", done: Done) -> dict[str, KeptSet]:
    """The kept sets before and after."""
    before, after = (
        _kept_numbers(job, done, params, name)
        for params, name in ((done.base, "before"), (done.params, f"tuned_{done.run.name}"))
    )
    return {name: KeptSet("AP", before[name], after[name]) for name in job.kept}


def _kept_numbers(job: "FinetuneJob", done: Done, params: Any, name: str) -> dict[str, float]:
    """AP of parameters on every kept set, at the size of the base's own evaluation."""
    base = job.arguments.config
    text = dataclasses.replace(done.config.model.text, max_tokens=base.model.text.max_tokens)
    config = dataclasses.replace(
        done.config,
        model=dataclasses.replace(done.config.model, text=text),
        data=base.data,
        evaluation=base.evaluation,
    )
    found = job.measured(config, params, f"{name}_kept", job.kept)
    return {
        key: average_precision(load_ground_truth(own.annotations, own, key), found[key]).numbers["AP"]
        for key, own in job.kept.items()
    }


def _interpolation(job: "FinetuneJob", done: Done) -> tuple[Interpolated, ...]:
    """Mixtures of the weights before and after, on the validation set and the kept sets."""
    valid = {"valid": job.own.sets["valid"]}
    truth, points = load_ground_truth(valid["valid"].annotations, valid["valid"], "valid"), []
    for share in sorted(job.arguments.interpolate):
        params, name = interpolated(done.base, done.params, share), f"share{share:g}_{done.run.name}"
        new = average_precision(truth, job.measured(done.config, params, name, valid)["valid"]).numbers["AP"]
        points.append(Interpolated(share, new, _kept_numbers(job, done, params, name)))
    return tuple(points)


def _all_runs(job: "FinetuneJob", done: Sequence[Done], truth: Any, split: str) -> tuple[SeedResult, ...]:
    """The numbers of every run on the reported split."""
    results = []
    for each in done:
        numbers = [
            average_precision(
                truth, job.measured(each.config, params, name, {split: job.own.sets[split]})[split]
            ).numbers
            for params, name in ((each.base, job.before(each.run)), (each.params, f"tuned_{each.run.name}"))
        ]
        before, after = ({name: own[name] for name in MAIN} for own in numbers)
        results.append(SeedResult(each.run.seed, each.run.shots, len(each.run.train.coco["images"]), before, after))
    return tuple(results)


def _commands(job: "FinetuneJob", result: str, thresholds: Mapping[str, float]) -> tuple[tuple[str, str], ...]:
    """What one does next with the result; nothing where new parts learned nothing.

    `thresholds`: of the best F1 by name. `predict` takes one for all: the smallest.
    """
    if not result:
        return ()
    texts = [job.own.rename.get(name, name) for name in job.own.dataset.names]
    names = ",".join(f'"{text}"' if "," in text else text for text in texts)
    least = min((value for value in thresholds.values() if value > 0), default=0.3)
    command, images = ["python", "-m", "glip_jax"], job.own.dataset.splits["valid"].images
    predict = [
        *command, "predict", images, f"--checkpoint={result}", f"--names={names}", f"--threshold={least:.2f}",
        f"--out={job.folder / 'predictions'}",
    ]  # fmt: skip
    export = [*command, "export", f"--checkpoint={result}", "--format=huggingface", f"--out={job.folder / 'export'}"]
    return ("detect in images", shlex.join(predict)), ("export to PyTorch", shlex.join(export))


def _provenance(job: "FinetuneJob", done: Done) -> dict[str, str]:
    """What the result depends on."""
    hashes = {
        f"{name}.json": file_hash(str(job.folder / "data" / f"{name}.json"))[:16] for name in job.own.dataset.splits
    }
    base = {} if job.base is None else {"fingerprint of the base": job.base.fingerprint("ema")}
    return {
        "command": job.command, "settings": config_hash(done.config)[:16], "code": str(code()), "batch": str(done.config.train.batch_size),
        "rate": f"{done.config.optimizer.rate:g}", "canvas": " x ".join(map(str, (done.config.evaluation.short_side, done.config.evaluation.long_side))),
        **hashes, **base,
    }  # fmt: skip


def _curve(workdir: str) -> tuple[CurvePoint, ...]:
    """The evaluations while training."""
    lines = [line for line in read(workdir) if "evaluation/valid/AP" in line]
    return tuple(CurvePoint(line["step"], line["evaluation/valid/AP"], line["evaluation/valid/AP50"]) for line in lines)


def _minutes(workdir: str) -> float:
    """Time of the steps."""
    seconds, last = 0.0, 0
    for line in read(workdir):
        if "step_seconds" in line:
            seconds, last = seconds + line["step_seconds"] * (line["step"] - last), line["step"]
    return seconds / 60
