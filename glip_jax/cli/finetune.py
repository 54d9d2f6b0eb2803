"""The job `finetune`: a folder of own data in, a fine-tuned detector and a table out.

WORKDIR/data/                        the splits as COCO JSON, and the shards of the training set
WORKDIR/RUN/                         a working folder as of `train`, for each run: `run`, or `shots10_seed3`
WORKDIR/evaluations/                 numbers and detections, before and after, of each set
WORKDIR/finetune.json, report.html   the result

Each phase leaves a file, and the same command goes on behind the last one. Nothing is written below --data.
"""

import dataclasses
import functools
import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from etils import epath

from glip_jax.cli.command_line import Arguments, CommandLineError, load_config, parse, split_settings
from glip_jax.config import Config, EvaluationSet, InitFromConfig, PathStr, SourceConfig
from glip_jax.distributed import exit_codes

if TYPE_CHECKING:
    from glip_jax.data.importers.layouts import Dataset, Split
    from glip_jax.data.mixture import Mixture
    from glip_jax.evaluation.evaluate import Evaluated
    from glip_jax.inference import Detector
    from glip_jax.training.state import State

__all__ = ["FinetuneArguments", "main"]

logger = logging.getLogger(__name__)

_ENCODERS = "configs/own_data.py"
_MEASURED = 8
"""Steps whose median time --minutes is divided by."""


@dataclass(frozen=True)
class FinetuneArguments(Arguments):
    """Fine-tune a detector on a folder of own data, and compare it with the one before.

    Finds the annotations in --data (COCO, Roboflow, ODinW, Pascal VOC, YOLO, ODVG, LabelMe, Label Studio, CVAT), checks them, measures
    the detector that it starts from, trains, chooses the best step on the validation set and reports the test set once. The same command
    goes on where it was stopped. Settings are those of the checkpoint, or of configs/own_data.py; single ones are overridden as
    --config.section.field=value.
    """

    data: PathStr = ""
    """The folder of the data; it is only read."""
    layout: str = ""
    """Its layout, where a folder has several."""
    names: PathStr = ""
    """JSON object with the text of names that a text encoder does not know, such as {"RBC": "red blood cell"}."""
    checkpoint: PathStr = ""
    """The detector to start from: WORKDIR of a run, WORKDIR/checkpoints/STEP, or a folder that `export` wrote. Default: pretrained
    encoders, with a new pyramid and head."""
    minutes: float = 10.0
    """Time of training, without compilation and evaluations: it gives the number of steps, by the measured time of a step."""
    steps: int = 0
    """Number of steps, instead of --minutes."""
    seeds: tuple[int, ...] = (0,)
    """A run for each; of several the mean and its deviation are reported."""


def main(argv: Sequence[str]) -> int:
    """Runs the job. Raises CommandLineError, ConfigError, and a UserError for data, checkpoints and folders that do not fit."""
    from glip_jax.io.claims import owned_workdir
    from glip_jax.io.workdir import prepare

    example = "--data=photographs --workdir=runs/photographs --minutes=10"
    arguments = parse(argv, FinetuneArguments, "finetune", example, settings=_base(argv))
    for name, what in (
        ("data", "the folder of the data"),
        ("workdir", "the folder of the run, made if it is not there"),
    ):
        if not getattr(arguments, name):
            raise CommandLineError(f"no --{name}: expected --{name}=DIR, {what}")
    _check_apart(arguments)
    prepare(arguments.workdir)
    with owned_workdir(arguments.workdir):
        _Job(arguments, split_settings(argv)[0]).run()
    return exit_codes.DONE


def _base(argv: Sequence[str]) -> Config | None:
    """The settings to start from, where no --config=FILE.py names them: those of --checkpoint, or of the pretrained encoders."""
    from glip_jax.weights.readers import open_checkpoint_or_export

    if any(argument == "--config" or argument.startswith("--config=") for argument in argv):
        return None
    for number, argument in enumerate(argv):
        option, equals, value = argument.partition("=")
        if option == "--checkpoint":
            name = value if equals else next(iter(argv[number + 1 : number + 2]), "")
            return open_checkpoint_or_export(name).config if name else None
    return load_config(_ENCODERS)


def _check_apart(arguments: FinetuneArguments) -> None:
    """Raises CommandLineError where the working folder lies in the data, which is only read."""
    data, workdir = (epath.Path(place).resolve() for place in (arguments.data, arguments.workdir))
    if data == workdir or data in workdir.parents:
        raise CommandLineError(
            f"--workdir={arguments.workdir} lies in --data={arguments.data}, where nothing is written: name another folder"
        )
    if arguments.minutes <= 0 or arguments.steps < 0:
        raise CommandLineError(
            f"--minutes={arguments.minutes:g} --steps={arguments.steps}: expected minutes above 0, or a number of steps"
        )


@dataclass(frozen=True)
class _Run:
    """One training: its seed, and what it trains on."""

    name: str
    seed: int
    train: "Split"


@dataclass
class _Measured:
    """The numbers of a detector on a set, and what they are of."""

    numbers: dict[str, float]
    per_class: dict[str, dict[str, float]]
    images: int
    boxes: int


class _Job:
    """The phases of the job, in order."""

    def __init__(self, arguments: FinetuneArguments, settings: Sequence[str]) -> None:
        """`settings`: the arguments that begin with --config; they are applied after what follows from the data."""
        self.arguments, self.settings = arguments, [each for each in settings if each.startswith("--config.")]
        self.folder = epath.Path(arguments.workdir)
        self._detector: Detector | None = None

    def run(self) -> None:
        """Runs all phases."""
        from glip_jax.distributed.runtime import enable_compilation_cache

        enable_compilation_cache()
        self._same_command()
        self.dataset, mirrored = self._data()
        self.sets = {name: self._set(split) for name, split in self.dataset.splits.items() if name != "train"}
        runs = [_Run("run" if len(self.arguments.seeds) == 1 else f"seed{seed}", seed, self.dataset.splits["train"])
                for seed in self.arguments.seeds]  # fmt: skip
        results = []
        for run in runs:
            results.append(self._train(run, mirrored))
        self._finish(results)

    def _same_command(self) -> None:
        """Writes what was asked for. Raises CommandLineError where the folder began with something else."""
        from glip_jax.io.workdir import write_atomic

        asked = {
            name: value
            for name, value in dataclasses.asdict(self.arguments).items()
            if name not in ("config", "workdir")
        }
        asked = json.loads(json.dumps(asked | {"settings": sorted(self.settings)}))
        path = self.folder / "command.json"
        if path.exists():
            before = json.loads(path.read_text())
            if changed := [
                f"{name}: {before.get(name)!r} -> {value!r}"
                for name, value in asked.items()
                if before.get(name) != value
            ]:
                raise CommandLineError(
                    f"{self.folder} began with other options ({'; '.join(changed)}): give the same, or another --workdir"
                )
        else:
            write_atomic(path, json.dumps(asked, indent=1))

    # 1. The data.

    def _data(self) -> tuple["Dataset", bool]:
        """Finds and checks the data, and writes WORKDIR/data. Also whether images may be mirrored."""
        from glip_jax.data.importers.checks import findings
        from glip_jax.data.importers.coco import rename_map
        from glip_jax.data.importers.layouts import LayoutError, carve, find
        from glip_jax.io.assets import resolve
        from glip_jax.structures.prompts import load_tokenizer

        dataset = find(self.arguments.data, self.arguments.layout)
        if "valid" not in dataset.splits:
            dataset = carve(dataset)
        rename = rename_map(epath.Path(self.arguments.names)) if self.arguments.names else None
        found = findings(dataset, rename, load_tokenizer(resolve(self.arguments.config.model.text.vocabulary)))
        counts = ", ".join(
            f"{name} {len(split.coco['images'])} images, {split.boxes} boxes" for name, split in dataset.splits.items()
        )
        logger.info(f"{dataset.folder}: {dataset.layout}; {counts}; {len(dataset.names)} names")
        for note in (*dataset.notes, *(each.text for each in found if not each.error)):
            logger.info(f"note: {note}")
        if wrong := [each.text for each in found if each.error]:
            raise LayoutError(f"{self.arguments.data}: {'; '.join(wrong)}")
        for name, split in dataset.splits.items():
            self._write(self.folder / "data" / f"{name}.json", split.coco, "the data")
        if rename:
            self._write(self.folder / "data" / "names.json", rename, "the names")
        self.rename = rename or {}
        return dataset, not any(each.no_flip for each in found)

    def _write(self, path: epath.Path, content: Any, what: str) -> None:
        """Writes a JSON file. Raises CommandLineError where there is another one of an earlier start."""
        from glip_jax.io.workdir import write_atomic

        text = json.dumps(content)
        if path.exists() and path.read_text() != text:
            raise CommandLineError(f"{what} changed since {self.folder} began ({path} differs): name another --workdir")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)

    def _set(self, split: "Split") -> EvaluationSet:
        """A split as a set of an evaluation."""
        known = {category["name"] for category in split.coco["categories"]}
        names = {name: text for name, text in self.rename.items() if name in known}
        return EvaluationSet(str(self.folder / "data" / f"{split.name}.json"), split.images, names=names)

    # 2. Settings and parameters.

    def _shards(self, run: _Run) -> str:
        """The shards of the training set of a run."""
        from glip_jax.cli import data

        out = self.folder / "data" / "shards"
        names = [f"--names={self.folder / 'data' / 'names.json'}"] if self.rename else []
        data.main([
            "coco", str(self.folder / "data" / "train.json"), f"--images={run.train.images}", f"--out={out}", "--licence=own data", *names,
        ])  # fmt: skip
        return str(out)

    def _settings(self, run: _Run, mirrored: bool) -> Config:
        """The settings of a run, without its length."""
        from glip_jax.data.shards import Shards
        from glip_jax.io.assets import resolve
        from glip_jax.structures.prompts import load_tokenizer, prompt_from_categories
        from glip_jax.training.finetuning.recipe import fitted

        base, shards = self.arguments.config, Shards(path := self._shards(run))
        tokenizer = load_tokenizer(resolve(base.model.text.vocabulary))
        prompt = prompt_from_categories(shards.manifest.names, base.data.captions.separator)
        boxes = Counter(note["image_id"] for note in run.train.coco["annotations"])
        config = fitted(
            base, list(zip(shards.height.tolist(), shards.width.tolist())), max(boxes.values()),
            len(tokenizer.encode(prompt.caption).ids), {"own": SourceConfig(path)}, mirrored,
        )  # fmt: skip
        config = dataclasses.replace(
            config,
            name=epath.Path(self.arguments.data).name or "own_data",
            train=dataclasses.replace(config.train, seed=run.seed),
            evaluation=dataclasses.replace(config.evaluation, sets={"valid": self.sets["valid"]}),
            init_from=InitFromConfig(model=self.arguments.checkpoint)
            if self.arguments.checkpoint
            else config.init_from,
        )
        return parse(self.settings, Arguments, "finetune", settings=config).config

    def _start(self, config: Config) -> dict[str, Any]:
        """The parameters before training."""
        from glip_jax.distributed.mesh import make_mesh
        from glip_jax.training import optimizer as optim
        from glip_jax.training.state import fresh_parameters
        from glip_jax.weights.pretrained import initialize
        from glip_jax.weights.readers import open_checkpoint_or_export

        fresh = fresh_parameters(config, make_mesh(config.mesh))
        if not self.arguments.checkpoint:
            return initialize(fresh, config)[0]
        saved = open_checkpoint_or_export(self.arguments.checkpoint).parameters("ema")
        return optim.merge(fresh, saved)

    # 3. Measuring.

    def _evaluate(self, config: Config, params: Any, name: str, split: str) -> _Measured:
        """Measures parameters on a set, unless that was done; `name` says which parameters."""
        from glip_jax.evaluation.average_precision import coco_results
        from glip_jax.evaluation.evaluate import Evaluated, evaluate_set
        from glip_jax.io.workdir import write_atomic

        path = self.folder / "evaluations" / f"{name}_{split}.json"
        if path.exists():
            return _Measured(**json.loads(path.read_text()))
        result = evaluate_set(self._detector_of(config, params), config, self.sets[split], name=f"{name} on {split}")
        assert isinstance(result, Evaluated)
        measured = _measured(result)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(
            path.parent / f"detections_{name}_{split}.json", json.dumps(coco_results(result.truth, result.detections))
        )
        write_atomic(path, json.dumps(dataclasses.asdict(measured)))
        return measured

    def _detector_of(self, config: Config, params: Any) -> "Detector":
        """The detector of the settings, which all evaluations share, with these parameters."""
        from glip_jax.inference import Detector

        if self._detector is None or self._detector.config.model != config.model:
            self._detector = Detector(config, None)
        self._detector.use(params)
        return self._detector

    # 4. Training.

    def _train(self, run: _Run, mirrored: bool) -> dict[str, dict[str, _Measured]]:
        """Trains, chooses on the validation set, and measures the choice: {"zero_shot" or "tuned": {split: numbers}}."""
        from glip_jax.evaluation.evaluate import evaluate
        from glip_jax.io.checkpoint import open_checkpoint
        from glip_jax.training.finetuning.recipe import METRIC, with_steps
        from glip_jax.training.finetuning.schedule import Rules, Schedule
        from glip_jax.training.loop import train

        config = self._settings(run, mirrored)
        start = self._start(config)
        splits = [name for name in ("valid", "test") if name in self.sets]
        before = {split: self._evaluate(config, start, f"zero_shot_{run.name}", split) for split in splits}
        logger.info("; ".join(f"before training, {split}: {_shown(each)}" for split, each in before.items()))
        records = len(run.train.coco["images"])
        config = with_steps(config, self._steps(config, start), records)
        schedule = Schedule(Rules(METRIC), before["valid"].numbers["AP"])
        workdir = str(self.folder / run.name)

        def evaluate_valid(params: Any, step: int, meet: Any) -> dict[str, float]:
            del step, meet
            detector = self._detector_of(config, params)
            try:
                return evaluate(config, detector=detector)
            finally:
                detector.use(None)  # training needs the memory

        train(
            config, workdir, evaluate=evaluate_valid, initial_parameters=lambda *_: (start, {}), decide=schedule,
            feed=functools.partial(self._feed, config),
        )  # fmt: skip
        best = start
        if schedule.best_step:
            best = open_checkpoint(workdir, schedule.best_step).parameters("ema")
        else:
            logger.warning(
                f"{run.name}: no step is better on the validation set than the detector before training, which stays"
            )
        after = {split: self._evaluate(config, best, f"tuned_{run.name}", split) for split in splits}
        return {"zero_shot": before, "tuned": after}

    def _feed(self, config: Config, mixture: "Mixture", state: "State") -> Any:
        """Encoded examples where the encoders are frozen, else images."""
        from glip_jax.training import optimizer as optim
        from glip_jax.training.finetuning import encoded
        from glip_jax.training.finetuning.recipe import rate_factor
        from glip_jax.training.loop import Feed
        from glip_jax.training.step import glip_objective

        def rate(step: int) -> float:
            return rate_factor(step, config.train.steps)

        if not encoded.encodes_images(config, list(optim.flat(state.params))):
            return Feed(mixture.batches, glip_objective(config), rate)
        examples = encoded.EncodedMixture(mixture, state.params, self.folder / "features", int(state.step))
        return Feed(examples.batches, encoded.objective_of_encoded(config, examples.canvas), rate)

    def _steps(self, config: Config, start: Any) -> int:
        """The steps that fit into --minutes, by the median time of a few of them; measured once."""
        from glip_jax.io.workdir import write_atomic

        if self.arguments.steps:
            return self.arguments.steps
        path = self.folder / "step_time.json"
        if not path.exists():
            write_atomic(path, json.dumps({"seconds": self._step_seconds(config, start)}))
        seconds = json.loads(path.read_text())["seconds"]
        steps = max(10, round(60 * self.arguments.minutes / seconds))
        logger.info(f"a step takes {seconds:.3f} s: {steps} steps in {self.arguments.minutes:g} minutes")
        return steps

    def _step_seconds(self, config: Config, start: Any) -> float:
        """The median time of a step, which is compiled for it."""
        import jax

        from glip_jax.data.mixture import Mixture
        from glip_jax.distributed.mesh import make_mesh, place_batch
        from glip_jax.io.compiler_lines import without_slow_compile_alarms
        from glip_jax.training.finetuning.recipe import with_steps
        from glip_jax.training.monitoring.decisions import Decisions
        from glip_jax.training.state import initial_state
        from glip_jax.training.step import make_step

        config = with_steps(config, 1, 1)
        mesh, mixture = make_mesh(config.mesh), Mixture(config)
        state = initial_state(jax.tree.map(jax.numpy.copy, start), config)
        feed = self._feed(config, mixture, state)
        step = make_step(config, mesh, feed.objective, state, tuple(mixture.source_names), True)
        batch, scale = (
            place_batch(next(iter(feed.batches(0, 0, 1))), mesh),
            Decisions(None, mesh, logger.info).scale(0.0),
        )
        height, width = mixture.canvas(0)
        logger.info(f"compiling 1 of 1 ({height}x{width})")
        begin = time.perf_counter()
        with without_slow_compile_alarms():
            state, metrics = step(state, batch, scale)
        jax.block_until_ready(metrics)
        logger.info(f"compiled in {time.perf_counter() - begin:.0f} s")
        times = []
        for _ in range(_MEASURED):
            begin = time.perf_counter()
            state, metrics = step(state, batch, scale)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    # 5. The result.

    def _finish(self, results: list[dict[str, dict[str, _Measured]]]) -> None:
        """Writes finetune.json and logs the table."""
        from glip_jax.io.workdir import write_atomic

        split = "test" if "test" in self.sets else "valid"

        def mean(which: str, on: str) -> dict[str, float]:
            values = [result[which][on].numbers for result in results]
            return {name: statistics.fmean(each[name] for each in values) for name in values[0]}

        splits = [name for name in ("valid", "test") if name in self.sets]
        content = {
            **{which: mean(which, split) for which in ("zero_shot", "tuned")},
            "split": split,
            **{on: {which: mean(which, on) for which in ("zero_shot", "tuned")} for on in splits},
            "per_class": results[0]["tuned"][split].per_class,
        }
        write_atomic(self.folder / "finetune.json", json.dumps(content, indent=1))
        for which in ("zero_shot", "tuned"):
            logger.info(f"{which} on {split}: AP {content[which]['AP']:.3f} AP50 {content[which]['AP50']:.3f}")


def _shown(measured: _Measured) -> str:
    return f"AP {measured.numbers['AP']:.3f}, AP50 {measured.numbers['AP50']:.3f}"


def _measured(result: "Evaluated") -> _Measured:
    """The numbers of an evaluation; images and boxes of each class are those of the set."""
    truth = result.truth
    boxes = Counter(note["category_id"] for note in truth.content["annotations"])
    pairs = {(note["category_id"], note["image_id"]) for note in truth.content["annotations"]}
    images = Counter(category for category, _ in pairs)
    per_class = {
        name: {"AP": result.precision.per_class[name], "AP50": result.precision.per_class_50[name], "images": images[key], "boxes": boxes[key]}
        for key, name in zip(truth.category_ids, truth.names)
    }  # fmt: skip
    return _Measured(result.precision.numbers, per_class, len(result.image_ids), sum(boxes.values()))
