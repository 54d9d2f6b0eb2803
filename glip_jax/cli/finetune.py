"""The job `finetune`: a folder of own data in, a fine-tuned detector and a table out.

WORKDIR/data/                        the splits as COCO JSON, and the shards of the training sets
WORKDIR/RUN/                         a working folder as of `train`, for each run: `run`, or `shots10_seed3`
WORKDIR/RUN/delta/                   the result of a mode that leaves the base as it is: what differs from the base
WORKDIR/evaluations/                 detections before and after, of each set
WORKDIR/finetune.json, report.html   the result

Each phase leaves a file, and the same command goes on behind the last one. Nothing is written below --data.
"""

import dataclasses
import functools
import itertools
import json
import logging
import shlex
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from etils import epath

from glip_jax.cli.command_line import Arguments, CommandLineError, load_config, parse, split_settings
from glip_jax.config import Config, EvaluationSet, InitFromConfig, PathStr, SourceConfig
from glip_jax.distributed import exit_codes

if TYPE_CHECKING:
    from glip_jax.data.importers.layouts import Dataset, Split
    from glip_jax.data.mixture import Mixture
    from glip_jax.evaluation.transfer import Interpolated, KeptSet, SeedResult
    from glip_jax.inference import Detector
    from glip_jax.io.checkpoint import Checkpoint
    from glip_jax.training.finetuning.schedule import Rules
    from glip_jax.training.state import State

__all__ = ["FinetuneArguments", "main"]

logger = logging.getLogger(__name__)

_ENCODERS = "configs/own_data.py"
_MEASURED = 8
"""Steps whose median time --minutes is divided by."""
_DELTAS = ("prompt", "lora", "linear", "head", "text")
"""Modes whose result is a delta on the base."""

Tune = Literal["full", "head", "linear", "prompt", "text", "lora"]
Recipe = Literal["", "full", "linear_prob", "language_prompt_v2"]


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
    tune: Tune = "full"
    """What is trained: full (what the base trained), head (pyramid and head), linear (the output layers), prompt (text states of the
    names), text (the text encoder), lora (low-rank deltas of attention). All but full save what differs from the base, which stays as it is."""
    minutes: float = 10.0
    """Time of training, without compilation and evaluations: it gives the number of steps, by the measured time of a step."""
    steps: int = 0
    """Number of steps, instead of --minutes."""
    shots: tuple[int, ...] = ()
    """Few-shot runs, such as 1,3,5,10: a shot is an image that holds the name. Prepared files fewshot_train_shot{k}_seed{s}.json
    are read where the data have them. Default: all training images."""
    seeds: tuple[int, ...] = (0,)
    """A run for each, such as 3,30,300; of several the mean and the deviation are reported."""
    replay: tuple[str, ...] = ()
    """Shards of earlier data that are mixed in against forgetting, and their share of the examples: SHARDS:0.25."""
    keep: tuple[str, ...] = ()
    """Sets that are measured before and after: names of the checkpoint's evaluation sets, or ANNOTATIONS.json:IMAGES."""
    interpolate: tuple[float, ...] = ()
    """Shares of the tuned weights, such as 0,0.25,0.5,0.75,1: mixtures with those of the base, measured at the end."""
    as_glip: Recipe = ""
    """A mode of the original code with its recipe: epochs, copies, plateau and patience. It chooses the steps; see --shots."""


def main(argv: Sequence[str]) -> int:
    """Runs the job. Raises CommandLineError, ConfigError, and a UserError for data, checkpoints and folders that do not fit."""
    from glip_jax.io.claims import owned_workdir
    from glip_jax.io.workdir import prepare

    example = "--data=photographs --workdir=runs/photographs --minutes=10"
    arguments = parse(argv, FinetuneArguments, "finetune", example, settings=_base(argv))
    _check(arguments)
    prepare(arguments.workdir)
    with owned_workdir(arguments.workdir):
        _Job(arguments, argv).run()
    return exit_codes.DONE


def _base(argv: Sequence[str]) -> Config | None:
    """The settings to start from, where no --config=FILE.py names them: those of --checkpoint, or of the pretrained encoders."""
    from glip_jax.weights.readers import open_checkpoint_or_export

    if any(argument == "--config" or argument.startswith("--config=") for argument in argv):
        return None
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        option, equals, value = argument.partition("=")
        if option == "--checkpoint" and (name := value if equals else following):
            return open_checkpoint_or_export(name).config
    return load_config(_ENCODERS)


def _check(arguments: FinetuneArguments) -> None:
    """Raises CommandLineError for flags that do not fit one another."""
    for name, what in (
        ("data", "the folder of the data"),
        ("workdir", "the folder of the run, made if it is not there"),
    ):
        if not getattr(arguments, name):
            raise CommandLineError(f"no --{name}: expected --{name}=DIR, {what}")
    data, workdir = (epath.Path(place).resolve() for place in (arguments.data, arguments.workdir))
    shares = [share for _, share in map(_replayed, arguments.replay)]
    wrong = [
        (data == workdir or data in workdir.parents,
         f"--workdir={arguments.workdir} lies in --data={arguments.data}, where nothing is written: name another folder"),
        (arguments.minutes <= 0 or arguments.steps < 0,
         f"--minutes={arguments.minutes:g} --steps={arguments.steps}: expected minutes above 0, or a number of steps"),
        (any(k < 1 for k in arguments.shots), f"--shots={_listed(arguments.shots)}: expected numbers of at least 1"),
        (any(seed < 0 for seed in arguments.seeds) or not arguments.seeds,
         f"--seeds={_listed(arguments.seeds)}: expected numbers of at least 0"),
        (len({*arguments.seeds}) < len(arguments.seeds) or len({*arguments.shots}) < len(arguments.shots),
         f"--seeds={_listed(arguments.seeds)} --shots={_listed(arguments.shots)}: a number is there twice"),
        (any(not 0 <= share <= 1 for share in arguments.interpolate),
         f"--interpolate={_listed(arguments.interpolate)}: expected shares of the tuned weights between 0 and 1"),
        (sum(shares) >= 1, f"--replay takes {sum(shares):g} of the examples: expected less than 1, for the own data"),
        (not arguments.checkpoint and arguments.tune != "full",
         f"--tune={arguments.tune} without --checkpoint: pyramid and head are new then and are trained as a whole; give a --checkpoint"),
        (not arguments.checkpoint and bool(arguments.interpolate or arguments.keep or arguments.as_glip),
         "--keep, --interpolate and --as-glip are about a detector to start from: give a --checkpoint"),
        (bool(arguments.as_glip) and arguments.tune != "full", "--as-glip says what is tuned: leave --tune out"),
        (bool(arguments.as_glip) and bool(arguments.steps), "--as-glip says how many steps there are: leave --steps out"),
    ]  # fmt: skip
    for fails, message in wrong:
        if fails:
            raise CommandLineError(message)


def _listed(values: Sequence[Any]) -> str:
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _replayed(text: str) -> tuple[str, float]:
    """`SHARDS:0.25` as its two parts. Raises CommandLineError."""
    path, colon, share = text.rpartition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not colon or not path or not 0 < value < 1:
        raise CommandLineError(
            f"--replay={text}: expected SHARDS:SHARE, a folder of shards and its share, such as shards/coco:0.25"
        )
    return path, value


@dataclass(frozen=True)
class _Run:
    """One training: what it trains on, and its seed."""

    name: str
    shots: int
    """0: all data."""
    seed: int
    train: "Split"
    file: str
    """COCO JSON of the training images."""


class _Done:
    """A finished training."""

    def __init__(self, run: _Run, config: Config, base: Any, params: Any, best_step: int, steps: int) -> None:
        self.run, self.config, self.base, self.params = run, config, base, params
        self.best_step, self.steps = best_step, steps


class _Job:
    """The phases of the job, in order."""

    def __init__(self, arguments: FinetuneArguments, argv: Sequence[str]) -> None:
        """`argv`: the command line; its settings are applied after what follows from the data."""
        self.arguments, self.command = arguments, shlex.join(["python", "-m", "glip_jax", "finetune", *argv])
        self.changes = [each for each in split_settings(argv)[0] if each.startswith("--config.")]
        self.folder = epath.Path(arguments.workdir)
        self.tune: Tune = arguments.tune
        self.base: Checkpoint | None = None
        self.detector: Detector | None = None
        self.notes: list[str] = []

    def run(self) -> None:
        """Runs all phases that are not done."""
        from glip_jax.distributed.runtime import enable_compilation_cache
        from glip_jax.training.finetuning.glip_recipes import RECIPES
        from glip_jax.weights.readers import open_checkpoint_or_export

        enable_compilation_cache()
        self._same_command()
        if (self.folder / "finetune.json").exists():
            logger.info(f"{self.folder} is finished: {self.folder / 'finetune.json'}, {self.folder / 'report.html'}")
            return
        if self.arguments.as_glip:
            self.tune = RECIPES[self.arguments.as_glip].tune
        if self.arguments.checkpoint:
            self.base = open_checkpoint_or_export(self.arguments.checkpoint)
        self.dataset, self.mirrored = self._data()
        self.sets = {name: self._set(split) for name, split in self.dataset.splits.items() if name != "train"}
        self.kept = {name: _kept_set(name, self.arguments.config) for name in self.arguments.keep}
        done = [self._train(run) for run in self._runs()]
        self._finish(done)

    def _same_command(self) -> None:
        """Writes what was asked for. Raises CommandLineError where the folder began with something else."""
        from glip_jax.io.workdir import write_atomic

        asked = {n: v for n, v in dataclasses.asdict(self.arguments).items() if n not in ("config", "workdir")}
        asked = json.loads(json.dumps(asked | {"settings": sorted(self.changes)}))
        path = self.folder / "command.json"
        if not path.exists():
            write_atomic(path, json.dumps(asked, indent=1))
            return
        before = json.loads(path.read_text())
        if changed := [f"{n}: {before.get(n)!r} -> {v!r}" for n, v in asked.items() if before.get(n) != v]:
            raise CommandLineError(
                f"{self.folder} began with other options ({'; '.join(changed)}): give the same, or another --workdir"
            )

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
        self.rename = (rename_map(epath.Path(self.arguments.names)) if self.arguments.names else None) or {}
        found = findings(dataset, self.rename, load_tokenizer(resolve(self.arguments.config.model.text.vocabulary)))
        counts = [
            f"{name} {len(split.coco['images'])} images, {split.boxes} boxes" for name, split in dataset.splits.items()
        ]
        logger.info(f"{dataset.folder}: {dataset.layout}; {'; '.join(counts)}; {len(dataset.names)} names")
        self.notes = [*dataset.notes, *(each.text for each in found if not each.error)]
        for note in self.notes:
            logger.info(f"note: {note}")
        if wrong := [each.text for each in found if each.error]:
            raise LayoutError(f"{self.arguments.data}: {'; '.join(wrong)}")
        for name, split in dataset.splits.items():
            self._write(f"{name}.json", split.coco)
        if self.rename:
            self._write("names.json", self.rename)
        return dataset, not any(each.no_flip for each in found)

    def _write(self, name: str, content: Any) -> str:
        """Writes WORKDIR/data/NAME. Raises CommandLineError where an earlier start wrote something else."""
        from glip_jax.io.workdir import write_atomic

        path, text = self.folder / "data" / name, json.dumps(content)
        if path.exists() and path.read_text() != text:
            raise CommandLineError(
                f"the data changed since {self.folder} began ({path} differs): name another --workdir"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
        return str(path)

    def _set(self, split: "Split") -> EvaluationSet:
        """A split as a set of an evaluation."""
        known = {category["name"] for category in split.coco["categories"]}
        names = {name: text for name, text in self.rename.items() if name in known}
        return EvaluationSet(str(self.folder / "data" / f"{split.name}.json"), split.images, names=names)

    def _runs(self) -> list[_Run]:
        """The runs: each number of shots with each seed."""
        from glip_jax.data.importers.shots import draw_shots, prepared_shots

        runs, whole = [], self.dataset.splits["train"]
        for shots, seed in itertools.product(self.arguments.shots or (0,), self.arguments.seeds):
            name = (
                "_".join([f"shots{shots}"] * bool(shots) + [f"seed{seed}"] * (len(self.arguments.seeds) > 1)) or "run"
            )
            train, file = whole, "train.json"
            if shots:
                prepared = prepared_shots(self.dataset, shots, seed)
                train = prepared or dataclasses.replace(whole, coco=draw_shots(whole.coco, shots, seed))
                file = f"fewshot_train_shot{shots}_seed{seed}.json"
                origin = f"as prepared in {prepared.source}" if prepared else "drawn from the training set"
                logger.info(f"{name}: {len(train.coco['images'])} images, {train.boxes} boxes, {origin}")
            if self.arguments.as_glip:
                boxed = {note["image_id"] for note in train.coco["annotations"]}
                images = [image for image in train.coco["images"] if image["id"] in boxed]
                train = dataclasses.replace(train, coco={**train.coco, "images": images})
                file = f"boxed_{file}"
            runs.append(_Run(name, shots, seed, train, self._write(file, train.coco)))
        if self.arguments.shots:
            self.notes.append(
                "few-shot runs choose their best step on the whole validation set, which has more images than they train on"
            )
        return runs

    # 2. Settings and parameters.

    def _settings(self, run: _Run) -> Config:
        """The settings of a run, without its length."""
        from glip_jax.cli import data
        from glip_jax.data.shards import Shards
        from glip_jax.io.assets import resolve
        from glip_jax.structures.prompts import load_tokenizer, prompt_from_categories
        from glip_jax.training.finetuning.modes import tuned_config
        from glip_jax.training.finetuning.recipe import fitted, with_rates

        base, out = self.arguments.config, self.folder / "data" / f"shards_{epath.Path(run.file).stem}"
        names = [f"--names={self.folder / 'data' / 'names.json'}"] if self.rename else []
        options = [f"--images={run.train.images}", f"--out={out}", "--licence=own data", *names]
        data.main(["coco", run.file, *options])
        shards = Shards(out)
        tokenizer = load_tokenizer(resolve(base.model.text.vocabulary))
        prompt = prompt_from_categories(shards.manifest.names, base.data.captions.separator)
        boxes = Counter(note["image_id"] for note in run.train.coco["annotations"])
        replayed = [_replayed(text) for text in self.arguments.replay]
        own = SourceConfig(str(out), weight=1 - sum(share for _, share in replayed))
        sources = {"own": own} | {
            f"replay{i}": SourceConfig(path, weight=share) for i, (path, share) in enumerate(replayed)
        }
        config = fitted(
            base, list(zip(shards.height.tolist(), shards.width.tolist())), max(boxes.values()),
            len(tokenizer.encode(prompt.caption).ids), sources, self.mirrored,
        )  # fmt: skip
        config = dataclasses.replace(
            config,
            name=self.arguments.config.name
            if self.base is None
            else f"{base.name} on {epath.Path(self.arguments.data).name}",
            train=dataclasses.replace(config.train, seed=run.seed),
            evaluation=dataclasses.replace(config.evaluation, sets={"valid": self.sets["valid"]}),
        )
        if self.base is not None:
            config = tuned_config(config, self.tune, shards.manifest.names)
            config = dataclasses.replace(
                with_rates(config, self.tune), init_from=InitFromConfig(model=self.arguments.checkpoint)
            )
        return parse(self.changes, Arguments, "finetune", settings=config).config

    def _start(self, config: Config) -> dict[str, Any]:
        """The parameters before training."""
        from glip_jax.data.shards import Shards
        from glip_jax.distributed.mesh import make_mesh
        from glip_jax.training.state import fresh_parameters
        from glip_jax.weights.pretrained import initialize
        from glip_jax.weights.tuned_parameters import starting_parameters

        fresh = fresh_parameters(config, make_mesh(config.mesh))
        if self.base is None:
            return initialize(fresh, config)[0]
        names = Shards(config.data.sources["own"].path).manifest.names
        return starting_parameters(fresh, self.base.parameters("ema"), config, names)

    # 3. Measuring.

    def _measured(
        self, config: Config, params: Any, name: str, sets: Mapping[str, EvaluationSet]
    ) -> dict[str, list[dict[str, Any]]]:
        """Detections of parameters on sets, COCO's results format; `name` says which parameters. What was detected is read."""
        from glip_jax.evaluation.average_precision import coco_results
        from glip_jax.evaluation.evaluate import Evaluated, evaluate_set
        from glip_jax.io.workdir import write_atomic

        found = {}
        for key, dataset in sets.items():
            path = self.folder / "evaluations" / f"{name}_{_file_name(key)}.json"
            if not path.exists():
                result = evaluate_set(self._detector_of(config, params), config, dataset, name=f"{name}, {key}")
                assert isinstance(result, Evaluated)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, json.dumps(coco_results(result.truth, result.detections)))
            found[key] = json.loads(path.read_text())
        return found

    def _detector_of(self, config: Config, params: Any) -> "Detector":
        """The detector with these parameters; evaluations of the same settings share one."""
        from glip_jax.inference import Detector

        if self.detector is None or self.detector.config != config:
            self.detector = Detector(config, None)
        self.detector.use(params)
        return self.detector

    # 4. Training.

    def _train(self, run: _Run) -> "_Done":
        """Measures the base, trains, and chooses the best step on the validation set."""
        from glip_jax.evaluation.average_precision import average_precision, load_ground_truth
        from glip_jax.evaluation.evaluate import evaluate
        from glip_jax.io.checkpoint import open_checkpoint
        from glip_jax.training.finetuning.schedule import Schedule
        from glip_jax.training.loop import train

        config = self._settings(run)
        start = self._start(config)
        before = self._measured(config, start, self._before(run), self.sets)
        truth = load_ground_truth(self.sets["valid"].annotations, self.sets["valid"], "valid")
        numbers = average_precision(truth, before["valid"]).numbers
        logger.info(f"{run.name}, before training, valid: AP {numbers['AP']:.3f}, AP50 {numbers['AP50']:.3f}")
        config, rules = self._with_length(run, config, start)
        schedule = Schedule(rules, numbers["AP"])
        workdir = str(self.folder / run.name)

        def evaluate_valid(params: Any, step: int, meet: Any) -> dict[str, float]:
            del step, meet
            detector = self._detector_of(config, params)
            try:
                return evaluate(config, detector=detector)
            finally:
                detector.use(None)  # training needs the memory

        state = train(
            config, workdir, evaluate=evaluate_valid, initial_parameters=lambda *_: (start, {}), decide=schedule,
            feed=functools.partial(self._feed, config),
        )  # fmt: skip
        best = start
        if schedule.best_step:
            best = open_checkpoint(workdir, schedule.best_step).parameters(config.evaluation.parameters)
        else:
            self.notes.append(
                f"{run.name}: no step is better on the validation set than before training: the base stays"
            )
            logger.warning(self.notes[-1])
        done = _Done(run, config, start, best, schedule.best_step, int(state.step))
        self._measured(config, best, f"tuned_{run.name}", self.sets)
        return done

    def _before(self, run: _Run) -> str:
        """The name of the evaluation before training: one for all runs that begin with the same parameters."""
        return "before" if self.base is not None else f"before_{run.name}"

    def _with_length(self, run: _Run, config: Config, start: Any) -> "tuple[Config, Rules]":
        """The settings with the number of steps, and the rules by which the run stops."""
        from glip_jax.training.finetuning.glip_recipes import RECIPES, as_glip, glip_rules, read_shots
        from glip_jax.training.finetuning.recipe import METRIC, with_steps
        from glip_jax.training.finetuning.schedule import Rules

        records = len(run.train.coco["images"])
        if self.arguments.as_glip:
            shots = read_shots(str(run.shots))
            config = as_glip(config, RECIPES[self.arguments.as_glip], shots, records)
            steps, every = config.train.steps, config.train.evaluate_every
            return with_steps(config, steps, every), glip_rules(run.shots, METRIC)
        return with_steps(config, self._steps(config, start), records), Rules(METRIC)

    def _feed(self, config: Config, mixture: "Mixture", state: "State") -> Any:
        """Encoded examples where the encoders are frozen, else images."""
        from glip_jax.training import optimizer as optim
        from glip_jax.training.finetuning import encoded
        from glip_jax.training.finetuning.recipe import rate_factor
        from glip_jax.training.loop import Feed
        from glip_jax.training.step import glip_objective

        rate = None if self.arguments.as_glip else functools.partial(rate_factor, steps=config.train.steps)
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
        from glip_jax.distributed.mesh import make_mesh, place_batch, shardings
        from glip_jax.io.compiler_lines import without_slow_compile_alarms
        from glip_jax.training.finetuning.recipe import with_steps
        from glip_jax.training.monitoring.decisions import Decisions
        from glip_jax.training.state import initial_state
        from glip_jax.training.step import make_step

        config = with_steps(config, 1, 1)
        mesh, mixture = make_mesh(config.mesh), Mixture(config)
        state = initial_state(jax.tree.map(jax.numpy.copy, start), config)
        state = jax.device_put(state, shardings(state, mesh))
        feed = self._feed(config, mixture, state)
        step = make_step(config, mesh, feed.objective, state, tuple(mixture.source_names), True)
        batch, scale = (
            place_batch(next(iter(feed.batches(0, 0, 1))), mesh),
            Decisions(None, mesh, logger.info).scale(0.0),
        )
        height, width = mixture.canvas(0)
        logger.info(f"compiling 1 of 1 ({height}x{width})")
        times = []
        for _ in range(1 + _MEASURED):
            begin = time.perf_counter()
            with without_slow_compile_alarms():
                state, metrics = step(state, batch, scale)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begin)
        logger.info(f"compiled in {times[0]:.0f} s")
        return statistics.median(times[1:])

    # 5. The result.

    def _finish(self, done: Sequence["_Done"]) -> None:
        """Measures kept sets and mixtures of weights, and writes deltas, finetune.json and the report; logs the table."""
        from glip_jax.cli.reports import finetune_report
        from glip_jax.evaluation.average_precision import load_ground_truth
        from glip_jax.evaluation.detection_errors import detection_errors, operating_points
        from glip_jax.evaluation.transfer import Transfer, split_result, summary
        from glip_jax.io.workdir import write_atomic

        first, split = done[0], "test" if "test" in self.sets else "valid"
        truths = {name: load_ground_truth(own.annotations, own, name) for name, own in self.sets.items()}
        before = self._measured(first.config, first.base, self._before(first.run), self.sets)
        after = self._measured(first.config, first.params, f"tuned_{first.run.name}", self.sets)
        splits = {name: split_result(truths[name], before[name], after[name]) for name in self.sets}
        thresholds = {
            name: point.threshold for name, point in operating_points(truths["valid"], after["valid"]).items()
        }
        results = [self._delta(each) for each in done]
        transfer = Transfer(
            name=epath.Path(self.arguments.data).name, tune=self.tune, base=self.arguments.checkpoint, split=split, splits=splits,
            best_step=first.best_step, steps=first.steps, minutes=_minutes(str(self.folder / first.run.name)),
            curve=_curve(str(self.folder / first.run.name)), kept=self._kept(first), interpolation=self._interpolation(first),
            thresholds=thresholds, runs=self._all_runs(done, truths[split], split) if len(done) > 1 else (), notes=tuple(self.notes),
            commands=self._commands(results[0]), settings=self._provenance(first),
        )  # fmt: skip
        errors = finetune_report.Errors(
            detection_errors(truths[split], before[split]), detection_errors(truths[split], after[split], thresholds)
        )
        write_atomic(self.folder / "report.html", finetune_report.render(transfer, errors, self.sets[split].images))
        write_atomic(self.folder / "finetune.json", json.dumps(summary(transfer), indent=1))
        for each in done if self.tune in _DELTAS and self.base is not None else ():
            shutil.rmtree(self.folder / each.run.name / "checkpoints", ignore_errors=True)
        shutil.rmtree(self.folder / "features", ignore_errors=True)
        logger.info(finetune_report.table(transfer))
        logger.info(f"numbers: {self.folder / 'finetune.json'}; report: {self.folder / 'report.html'}")

    def _delta(self, done: "_Done") -> str:
        """What `--checkpoint` names to use the result; a delta is written."""
        from glip_jax.weights.delta import save_delta

        folder = self.folder / done.run.name
        if self.base is None or self.tune not in _DELTAS:
            return str(folder / "checkpoints" / str(done.best_step)) if done.best_step else self.arguments.checkpoint
        save_delta(str(folder / "delta"), self.tune, done.params, done.config, self.base, "ema", self.dataset.names)
        return str(folder / "delta")

    def _kept(self, done: "_Done") -> "dict[str, KeptSet]":
        """The kept sets before and after."""
        from glip_jax.evaluation.transfer import KeptSet

        before, after = (
            self._kept_numbers(done, params, name)
            for params, name in ((done.base, "before"), (done.params, f"tuned_{done.run.name}"))
        )
        return {name: KeptSet("AP", before[name], after[name]) for name in self.kept}

    def _kept_numbers(self, done: "_Done", params: Any, name: str) -> dict[str, float]:
        """AP of parameters on every kept set, at the size of the base's own evaluation."""
        from glip_jax.evaluation.average_precision import average_precision, load_ground_truth

        base = self.arguments.config
        text = dataclasses.replace(done.config.model.text, max_tokens=base.model.text.max_tokens)
        config = dataclasses.replace(
            done.config,
            model=dataclasses.replace(done.config.model, text=text),
            data=base.data,
            evaluation=base.evaluation,
        )
        found = self._measured(config, params, f"{name}_kept", self.kept)
        return {
            key: average_precision(load_ground_truth(own.annotations, own, key), found[key]).numbers["AP"]
            for key, own in self.kept.items()
        }

    def _interpolation(self, done: "_Done") -> "tuple[Interpolated, ...]":
        """Mixtures of the weights before and after, on the validation set and the kept sets."""
        from glip_jax.evaluation.average_precision import average_precision, load_ground_truth
        from glip_jax.evaluation.transfer import Interpolated
        from glip_jax.weights.tuned_parameters import interpolated

        valid = {"valid": self.sets["valid"]}
        truth, points = load_ground_truth(valid["valid"].annotations, valid["valid"], "valid"), []
        for share in sorted(self.arguments.interpolate):
            params, name = interpolated(done.base, done.params, share), f"share{share:g}_{done.run.name}"
            new = average_precision(truth, self._measured(done.config, params, name, valid)["valid"]).numbers["AP"]
            points.append(Interpolated(share, new, self._kept_numbers(done, params, name)))
        return tuple(points)

    def _all_runs(self, done: Sequence["_Done"], truth: Any, split: str) -> "tuple[SeedResult, ...]":
        """The numbers of every run on the reported split."""
        from glip_jax.evaluation.average_precision import average_precision
        from glip_jax.evaluation.transfer import MAIN, SeedResult

        results = []
        for each in done:
            numbers = [
                average_precision(
                    truth, self._measured(each.config, params, name, {split: self.sets[split]})[split]
                ).numbers
                for params, name in ((each.base, self._before(each.run)), (each.params, f"tuned_{each.run.name}"))
            ]
            before, after = ({name: own[name] for name in MAIN} for own in numbers)
            results.append(SeedResult(each.run.seed, each.run.shots, len(each.run.train.coco["images"]), before, after))
        return tuple(results)

    def _commands(self, result: str) -> tuple[tuple[str, str], ...]:
        """What one does next with the result."""
        names = ",".join(
            f'"{name}"' if "," in name else name
            for name in (self.rename.get(name, name) for name in self.dataset.names)
        )
        command = ["python", "-m", "glip_jax"]
        predict = [
            *command,
            "predict",
            self.dataset.splits["valid"].images,
            f"--checkpoint={result}",
            f"--names={names}",
        ]
        export = [
            *command,
            "export",
            f"--checkpoint={result}",
            "--format=huggingface",
            f"--out={self.folder / 'export'}",
        ]
        return (
            ("detect in images", shlex.join([*predict, f"--out={self.folder / 'predictions'}"])),
            ("export to PyTorch", shlex.join(export)),
        )

    def _provenance(self, done: "_Done") -> dict[str, str]:
        """What the result depends on."""
        from glip_jax.io.provenance import code, config_hash, file_hash

        hashes = {
            f"{name}.json": file_hash(str(self.folder / "data" / f"{name}.json"))[:16] for name in self.dataset.splits
        }
        base = {} if self.base is None else {"fingerprint of the base": self.base.fingerprint("ema")}
        return {
            "command": self.command, "settings": config_hash(done.config)[:16], "code": str(code()), "batch": str(done.config.train.batch_size),
            "rate": f"{done.config.optimizer.rate:g}", "canvas": " x ".join(map(str, (done.config.evaluation.short_side, done.config.evaluation.long_side))),
            **hashes, **base,
        }  # fmt: skip


def _kept_set(name: str, config: Config) -> EvaluationSet:
    """A set that --keep names. Raises CommandLineError."""
    known = {key: own for key, own in config.evaluation.sets.items() if own.kind == "detection"}
    if name in known:
        return known[name]
    annotations, colon, images = name.rpartition(":")
    if not colon or not annotations.endswith(".json"):
        raise CommandLineError(
            f"--keep={name}: expected ANNOTATIONS.json:IMAGES, or a detection set of the checkpoint ({', '.join(known) or 'it has none'})"
        )
    return EvaluationSet(annotations, images)


def _file_name(text: str) -> str:
    """A name of a set as part of a file name."""
    return "".join(character if character.isalnum() else "_" for character in text)


def _curve(workdir: str) -> tuple[Any, ...]:
    """The evaluations while training."""
    from glip_jax.evaluation.transfer import CurvePoint
    from glip_jax.training.monitoring.metrics import read

    lines = [line for line in read(workdir) if "evaluation/valid/AP" in line]
    return tuple(CurvePoint(line["step"], line["evaluation/valid/AP"], line["evaluation/valid/AP50"]) for line in lines)


def _minutes(workdir: str) -> float:
    """Time of the steps."""
    from glip_jax.training.monitoring.metrics import read

    seconds, last = 0.0, 0
    for line in read(workdir):
        if "step_seconds" in line:
            seconds, last = seconds + line["step_seconds"] * (line["step"] - last), line["step"]
    return seconds / 60
