"""The data of the job `finetune`: found, checked, and written to WORKDIR/data as COCO JSON."""

import dataclasses
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from glip_jax import UserError
from glip_jax.cli.command_line import CommandLineError
from glip_jax.config import Config, EvaluationSet, TextConfig
from glip_jax.data.importers.checks import findings
from glip_jax.data.importers.coco import rename_map
from glip_jax.data.importers.layouts import Dataset, LayoutError, Split, carve, find
from glip_jax.data.importers.shots import draw_shots, prepared_shots
from glip_jax.evaluation.evaluate import check_set
from glip_jax.io.assets import resolve
from glip_jax.io.workdir import write_atomic
from glip_jax.structures.prompts import listed, load_tokenizer
from glip_jax.training.finetuning.glip_recipes import without_empty_images

__all__ = ["OwnData", "Run", "kept_set", "read_own_data"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One training: what it trains on, and its seed."""

    name: str
    shots: int
    """0: all data."""
    seed: int
    train: Split
    file: str
    """COCO JSON of the training images."""


@dataclass(frozen=True)
class OwnData:
    """A data set that was found and checked."""

    folder: epath.Path
    """WORKDIR/data."""
    dataset: Dataset
    rename: dict[str, str]
    """Texts of names, as --names has them."""
    mirrored: bool
    """Whether images may be mirrored: not if names say left or right."""
    notes: list[str]

    @property
    def names_file(self) -> str:
        """JSON of `rename`; "" without texts."""
        return str(self.folder / "names.json") if self.rename else ""

    @property
    def sets(self) -> dict[str, EvaluationSet]:
        """The splits that are measured: valid, and test where there is one."""
        own = self.dataset.splits
        return {
            name: EvaluationSet(str(self.folder / f"{name}.json"), own[name].images, names=self.rename)
            for name in ("valid", "test") if name in own
        }  # fmt: skip

    def write(self, name: str, content: Any) -> str:
        """Writes a JSON file and returns its path. Raises CommandLineError where an earlier start wrote something else."""
        path, text = self.folder / name, json.dumps(content)
        if path.exists() and path.read_text() != text:
            raise CommandLineError(
                f"the data changed since {self.folder.parent} began ({path} differs): name another --workdir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
        return str(path)

    def runs(self, all_shots: Sequence[int], seeds: Sequence[int], boxed: bool) -> list[Run]:
        """The runs: each number of shots with each seed. `boxed`: training images without a box are left out."""
        runs, whole = [], self.dataset.splits["train"]
        for shots, seed in itertools.product(all_shots or (0,), seeds):
            name = "_".join([f"shots{shots}"] * bool(shots) + [f"seed{seed}"] * (len(seeds) > 1)) or "run"
            train, file = whole, "train.json"
            if shots:
                prepared = prepared_shots(self.dataset, shots, seed)
                train = prepared or dataclasses.replace(whole, coco=draw_shots(whole.coco, shots, seed))
                file = f"fewshot_train_shot{shots}_seed{seed}.json"
                origin = f"as prepared in {prepared.source}" if prepared else "drawn from the training set"
                logger.info(f"{name}: {len(train.coco['images'])} images, {train.boxes} boxes, {origin}")
            if boxed:
                coco, empty = without_empty_images(train.coco)
                train, file = dataclasses.replace(train, coco=coco), f"boxed_{file}"
                if empty:
                    self.notes.append(
                        f"{name}: {empty} training images without a box are left out, as the original does"
                    )
            runs.append(Run(name, shots, seed, train, self.write(file, train.coco)))
        if all_shots:
            self.notes.append(
                "few-shot runs choose their best step on the whole validation set, which has more images than they train on"
            )
        return runs


def read_own_data(data: str, layout: str, names: str, folder: epath.Path, text: TextConfig) -> OwnData:
    """Finds and checks the data in a folder, logs what is to be known, and writes the splits to `folder`.

    Raises LayoutError where there is no data set that can be used, SourceError for files that cannot be read, CommandLineError where
    `folder` has other data.
    """
    dataset = find(data, layout)
    if "valid" not in dataset.splits:
        dataset = carve(dataset)
    rename = (rename_map(epath.Path(names)) if names else None) or {}
    if unknown := [name for name in rename if name not in dataset.names]:
        raise CommandLineError(
            f"--names={names} has {listed(unknown)}, which the data do not have: expected names of {listed(dataset.names, 20)}"
        )
    found = findings(dataset, rename, load_tokenizer(resolve(text.vocabulary)), text.max_tokens)
    counts = [
        f"{name} {len(split.coco['images'])} images, {split.boxes} boxes" for name, split in dataset.splits.items()
    ]
    logger.info(f"{dataset.folder}: {dataset.layout}; {'; '.join(counts)}; {len(dataset.names)} names")
    notes = [*dataset.notes, *(each.text for each in found if not each.error)]
    for note in notes:
        logger.info(f"note: {note}")
    if wrong := [each.text for each in found if each.error]:
        raise LayoutError(f"{data}: {'; '.join(wrong)}")
    own = OwnData(folder, dataset, rename, not any(each.no_flip for each in found), notes)
    for name, split in dataset.splits.items():
        own.write(f"{name}.json", split.coco)
    if rename:
        own.write("names.json", rename)
    return own


def kept_set(name: str, config: Config) -> EvaluationSet:
    """A set that --keep names; it is only evaluated after training, so what it lacks is said now. Raises CommandLineError, UserError."""
    known = {key: own for key, own in config.evaluation.sets.items() if own.kind == "detection"}
    annotations, colon, images = name.rpartition(":")
    if name not in known and (not colon or not annotations.endswith(".json")):
        raise CommandLineError(
            f"--keep={name}: expected ANNOTATIONS.json:IMAGES, or a detection set of the checkpoint ({', '.join(known) or 'it has none'})"
        )
    kept = known[name] if name in known else EvaluationSet(annotations, images)
    try:
        notes = check_set(name, kept, config)
    except UserError as fault:
        raise CommandLineError(f"--keep={name}: {fault}") from None
    for note in notes:
        logger.info(f"--keep={name}: {note}")
    return kept
