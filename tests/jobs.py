"""The flags of every job: what walks all jobs, walks these."""

import re
import typing

from glip_jax import __main__
from glip_jax.cli import (
    benchmark,
    compare,
    doctor,
    evaluate,
    export_weights,
    finetune,
    import_weights,
    label,
    plan,
    precompile,
    predict,
    report,
    scenes,
    score,
    serve,
    train,
    upload,
    verify,
)
from glip_jax.cli import inspect as inspect_job
from glip_jax.cli.data import Format

JOBS: dict[str, type] = {
    "benchmark": benchmark.Benchmark, "compare": compare.Compare, "doctor": doctor.Doctor, "evaluate": evaluate.EvaluateArguments,
    "export": export_weights.Export, "finetune": finetune.FinetuneArguments, "import": import_weights.Import,
    "inspect": inspect_job.InspectShards, "label": label.Label, "plan": plan.PlanArguments, "precompile": precompile.PrecompileArguments, "predict": predict.Predict,
    "report": report.Report, "scenes": scenes.Scenes, "score": score.Score, "serve": serve.Serve, "train": train.TrainArguments,
    "upload": upload.Upload, "verify": verify.Verify,
}  # fmt: skip
FORMATS: dict[str, type] = {
    re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower(): kind
    for part in typing.get_args(Format) for kind in (typing.get_args(part)[0],)
}  # fmt: skip
"""Those of `data`, by format."""

assert {*JOBS, "data"} == {*__main__.JOBS}
