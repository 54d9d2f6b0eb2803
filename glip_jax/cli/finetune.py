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
import math
import shlex
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from etils import epath

from glip_jax.cli.command_line import Arguments, CommandLineError, load_config, parse, split_settings
from glip_jax.config import Config, EvaluationSet, InitFromConfig, PathStr, SourceConfig
from glip_jax.config.ranges import Count, Fraction, Limit, Range
from glip_jax.distributed import exit_codes

if TYPE_CHECKING:
    from glip_jax.cli.finetune_data import OwnData, Run
    from glip_jax.cli.finetune_result import Done
    from glip_jax.data.mixture import Mixture
    from glip_jax.inference import Detector
    from glip_jax.io.checkpoint import Checkpoint
    from glip_jax.training.finetuning.schedule import Rules
    from glip_jax.training.state import State

__all__ = ["FinetuneArguments", "main"]

logger = logging.getLogger(__name__)

_ENCODERS = "configs/own_data.py"
_MEASURED = 8
"""Steps whose median time --minutes is divided by."""
Tune = Literal["full", "head", "linear", "prompt", "text", "lora"]
Recipe = Literal["full", "linear_prob", "language_prompt_v2"]


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
    minutes: Annotated[float, Range(0, 1e6, "minutes", above=True)] = 10.0
    """Time of training, without compilation and evaluations: it gives the number of steps, by the measured time of a step."""
    steps: Limit = 0
    """Number of steps, instead of --minutes."""
    shots: tuple[Count, ...] = ()
    """Few-shot runs, such as 1,3,5,10: a shot is an image that holds the name. Prepared files fewshot_train_shot{k}_seed{s}.json
    are read where the data have them. Default: all training images."""
    seeds: tuple[Limit, ...] = (0,)
    """A run for each, such as 3,30,300; of several the mean and the deviation are reported."""
    replay: tuple[str, ...] = ()
    """Shards of earlier data that are mixed in against forgetting, and their share of the examples: SHARDS:0.25."""
    keep: tuple[str, ...] = ()
    """Sets that are measured before and after: names of the checkpoint's evaluation sets, or ANNOTATIONS.json:IMAGES."""
    interpolate: tuple[Fraction, ...] = ()
    """Shares of the tuned weights, such as 0,0.25,0.5,0.75,1: mixtures with those of the base, measured at the end."""
    as_glip: Recipe | None = None
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
        FinetuneJob(arguments, argv).run()
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
        (not arguments.seeds, "--seeds is empty: expected at least one"),
        (len({*arguments.seeds}) < len(arguments.seeds) or len({*arguments.shots}) < len(arguments.shots),
         f"--seeds={_listed(arguments.seeds)} --shots={_listed(arguments.shots)}: a number is there twice"),
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


class FinetuneJob:
    """The phases of the job, in order."""

    def __init__(self, arguments: FinetuneArguments, argv: Sequence[str]) -> None:
        """`argv`: the command line; its settings are applied after what follows from the data."""
        self.arguments, self.command = arguments, shlex.join(["python", "-m", "glip_jax", "finetune", *argv])
        self.changes = [each for each in split_settings(argv)[0] if each.startswith("--config.")]
        self.folder = epath.Path(arguments.workdir)
        self.tune: Tune = arguments.tune
        self.base: Checkpoint | None = None
        self.detector: Detector | None = None
        self.kept: dict[str, EvaluationSet] = {}
        self.own: "OwnData"

    def run(self) -> None:
        """Runs all phases that are not done."""
        from glip_jax.cli.finetune_data import kept_set, read_own_data
        from glip_jax.cli.finetune_result import finish
        from glip_jax.distributed.runtime import enable_compilation_cache
        from glip_jax.io import fsspec_gcs
        from glip_jax.io.workdir import write_atomic
        from glip_jax.training.finetuning.glip_recipes import RECIPES
        from glip_jax.weights.readers import open_checkpoint_or_export

        fsspec_gcs.do_without(enable_compilation_cache(str(self.folder)))
        self._check_same_command()
        if (self.folder / "finetune.json").exists():
            logger.info(f"{self.folder} is finished: {self.folder / 'finetune.json'}, {self.folder / 'report.html'}")
            return
        if self.arguments.as_glip:
            self.tune = RECIPES[self.arguments.as_glip].tune
        if self.arguments.checkpoint:
            self.base = open_checkpoint_or_export(self.arguments.checkpoint)
        self.kept = {name: kept_set(name, self.arguments.config) for name in self.arguments.keep}
        given, text = self.arguments, self.arguments.config.model.text
        self.own = read_own_data(given.data, given.layout, given.names, self.folder / "data", text)
        # Options are kept from here on: a command that was refused can be corrected.
        write_atomic(self.folder / "command.json", json.dumps(self._asked(), indent=1))
        finish(self, [self._train(run) for run in self.own.runs(given.shots, given.seeds, bool(given.as_glip))])

    def _asked(self) -> dict[str, Any]:
        """The options of the command, as JSON holds them."""
        asked = {n: v for n, v in dataclasses.asdict(self.arguments).items() if n not in ("config", "workdir")}
        return json.loads(json.dumps(asked | {"settings": sorted(self.changes)}))

    def _check_same_command(self) -> None:
        """Raises CommandLineError where the folder began with other options."""
        path = self.folder / "command.json"
        before = json.loads(path.read_text()) if path.exists() else self._asked()
        if changed := [f"{n}: {before.get(n)!r} -> {v!r}" for n, v in self._asked().items() if before.get(n) != v]:
            raise CommandLineError(
                f"{self.folder} began with other options ({'; '.join(changed)}): give the same, or another --workdir"
            )

    def _settings(self, run: "Run") -> Config:
        """The settings of a run, without its length."""
        from glip_jax.cli import data
        from glip_jax.data.shards import Shards
        from glip_jax.io.assets import resolve
        from glip_jax.structures.prompts import load_tokenizer, prompt_from_categories
        from glip_jax.training.finetuning.glip_recipes import RECIPES, as_glip, read_shots
        from glip_jax.training.finetuning.modes import tuned_config
        from glip_jax.training.finetuning.recipe import fitted, with_rates

        base, out = self.arguments.config, self.folder / "data" / f"shards_{epath.Path(run.file).stem}"
        names = [f"--names={self.own.names_file}"] if self.own.rename else []
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
            base, list(zip(shards.height.tolist(), shards.width.tolist())), _box_sides(run), max(boxes.values()),
            len(tokenizer.encode(prompt.caption).ids), sources, self.own.mirrored,
        )  # fmt: skip
        config = dataclasses.replace(
            config,
            name=f"{base.name} on {epath.Path(self.arguments.data).name}",
            train=dataclasses.replace(config.train, seed=run.seed, batch_size=_batch_size(config)),
            evaluation=dataclasses.replace(config.evaluation, sets={"valid": self.own.sets["valid"]}),
        )
        if self.base is not None:
            config = tuned_config(config, self.tune, shards.manifest.names)
            config = dataclasses.replace(
                with_rates(config, self.tune), init_from=InitFromConfig(model=self.arguments.checkpoint)
            )
        if self.arguments.as_glip:
            # Before anything is measured: the recipe says at which size.
            images = len(run.train.coco["images"])
            config = as_glip(config, RECIPES[self.arguments.as_glip], read_shots(str(run.shots)), images)
        return self._changed(config)

    def _start(self, config: Config) -> dict[str, Any]:
        """The parameters before training, on the host: the step donates its own."""
        import jax

        from glip_jax.data.shards import Shards
        from glip_jax.distributed.mesh import make_mesh
        from glip_jax.training.state import abstract_state, fresh_parameters
        from glip_jax.weights.pretrained import initialize
        from glip_jax.weights.tuned_parameters import starting_parameters

        mesh = make_mesh(config.mesh)
        if self.base is None:
            return jax.device_get(initialize(fresh_parameters(config, mesh), config)[0])
        names = Shards(config.data.sources["own"].path).manifest.names
        # Only low-rank deltas have initial values: without them shapes are enough, and nothing is compiled.
        fresh = fresh_parameters(config, mesh) if config.model.lora.rank else abstract_state(config, mesh).params
        return jax.device_get(starting_parameters(fresh, self.base.parameters("ema"), config, names))

    def measured(
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

    def _train(self, run: "Run") -> "Done":
        """Measures the base, trains, and chooses the best step on the validation set."""
        from glip_jax.cli.finetune_result import Done
        from glip_jax.evaluation.average_precision import average_precision, load_ground_truth
        from glip_jax.evaluation.evaluate import evaluate
        from glip_jax.io.checkpoint import open_checkpoint
        from glip_jax.training.finetuning.schedule import Schedule
        from glip_jax.training.loop import train

        config = self._settings(run)
        start = self._start(config)
        before = self.measured(config, start, self.before(run), self.own.sets)
        truth = load_ground_truth(self.own.sets["valid"].annotations, self.own.sets["valid"], "valid")
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
            self.own.notes.append(
                f"{run.name}: no step is better on the validation set than before training: the base stays"
            )
            logger.warning(self.own.notes[-1])
        done = Done(run, config, start, best, schedule.best_step, int(state.step))
        self.measured(config, best, f"tuned_{run.name}", self.own.sets)
        return done

    def before(self, run: "Run") -> str:
        """The name of the evaluation before training: one for all runs that begin with the same parameters."""
        return "before" if self.base is not None else f"before_{run.name}"

    def _with_length(self, run: "Run", config: Config, start: Any) -> "tuple[Config, Rules]":
        """The settings with the number of steps, and the rules by which the run stops."""
        from glip_jax.training.finetuning.glip_recipes import glip_rules
        from glip_jax.training.finetuning.recipe import METRIC, every_steps, with_steps
        from glip_jax.training.finetuning.schedule import Rules

        train = config.train
        if self.arguments.as_glip:
            config, rules = with_steps(config, train.steps, train.evaluate_every), glip_rules(run.shots, METRIC)
        else:
            every = every_steps(len(run.train.coco["images"]), train.batch_size)
            # The rates fall along their own schedule, without cuts.
            config, rules = with_steps(config, self._steps(config, start), every), Rules(METRIC, factor=1.0)
        return self._changed(config), rules

    def _changed(self, config: Config) -> Config:
        """`config` with the settings of the command line, which have the last word."""
        return parse(self.changes, Arguments, "finetune", settings=config).config

    def _feed(self, config: Config, mixture: "Mixture", state: "State") -> Any:
        """Encoded examples where the encoders are frozen, else images."""
        from glip_jax.cli.name_vectors import give_vectors
        from glip_jax.io import gcs
        from glip_jax.training import optimizer as optim
        from glip_jax.training.finetuning import encoded
        from glip_jax.training.finetuning.recipe import rate_factor
        from glip_jax.training.loop import Feed
        from glip_jax.training.step import glip_objective

        give_vectors(mixture, state.params, self.folder)
        rate = None if self.arguments.as_glip else functools.partial(rate_factor, steps=config.train.steps)
        images = Feed(mixture.batches, glip_objective(config), rate)
        if not encoded.encodes_images(config, list(optim.flat(state.params))) or gcs.is_remote(str(self.folder)):
            return images
        needed, free = encoded.bytes_needed(mixture, state.params), shutil.disk_usage(self.folder).free
        if needed > free / 2:
            logger.info(
                f"note: features of the frozen backbone would take {needed / 1e9:.1f} GB, free are {free / 1e9:.1f} GB: each step encodes "
                "its images instead"
            )
            return images
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
        from glip_jax.training.state import fresh_state
        from glip_jax.training.step import make_step

        config = with_steps(config, 1, 1)
        mesh, mixture = make_mesh(config.mesh), Mixture(config)
        state = fresh_state(start, config, mesh)
        feed = self._feed(config, mixture, state)
        step = make_step(config, mesh, feed.objective, state, tuple(mixture.source_names), True)
        batch = place_batch(next(iter(feed.batches(0, 0, 1))), mesh)
        scale = Decisions(None, mesh, logger.info).scale(0.0)
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


def _box_sides(run: "Run") -> list[float]:
    """Sides of the boxes of a run, relative to the long side of their image: of a square of the same area."""
    coco = run.train.coco
    longest = {image["id"]: max(image["height"], image["width"]) for image in coco["images"]}
    return [
        math.sqrt(max(0.0, note["bbox"][2] * note["bbox"][3])) / longest[note["image_id"]]
        for note in coco["annotations"]
    ]


def _batch_size(config: Config) -> int:
    """The batch of `config`, made larger where it does not split over the devices."""
    import jax

    size, devices = config.train.batch_size, jax.device_count()
    larger = -(-size // devices) * devices
    if larger != size:
        logger.info(f"note: batches of {larger} instead of {size}, for {devices} devices")
    return larger


def _file_name(text: str) -> str:
    """A name of a set as part of a file name."""
    return "".join(character if character.isalnum() else "_" for character in text)
