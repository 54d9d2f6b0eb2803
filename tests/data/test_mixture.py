"""The mixture: the step is the state of the data, weights are shares of examples, corrupt records are masked and counted."""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glip_jax.config import (
    Config,
    ConfigError,
    CropConfig,
    DataConfig,
    InputConfig,
    JitterConfig,
    ModelConfig,
    PackingConfig,
    SourceConfig,
    TextConfig,
    TrainConfig,
)
from glip_jax.data.mixture import DataWorkerError, Mixture, schedule
from glip_jax.data.shards import Shards
from glip_jax.structures.batch import DROPS, Batch
from glip_jax.structures.canvas import pixels_of
from tests import tiny_run

VOCABULARY = str(Path(__file__).parents[1] / "fixtures" / "vocab_tiny1.txt")
STEPS = 7


def config(sources: dict[str, SourceConfig], batch_size: int = 8, seed: int = 0, **data: object) -> Config:
    data = {"short_sides": (32, 64), "long_side": 96, "max_boxes": 4, "threads": 2, "prefetch": 2} | data
    return Config(
        model=ModelConfig(text=TextConfig(vocabulary=VOCABULARY, vocabulary_size=512, max_tokens=32)),
        data=DataConfig(sources=sources, **data),  # type: ignore[arg-type]
        train=TrainConfig(batch_size=batch_size, seed=seed),
    )


@pytest.fixture
def sources(folders: dict[str, Path]) -> dict[str, SourceConfig]:
    return {"boxes": SourceConfig(str(folders["boxes"]), 3.0), "captions": SourceConfig(str(folders["captions"]), 1.0)}


def draw(mixture: Mixture, count: int, start: int = 0, host: int = 0, hosts: int = 1) -> list[Batch]:
    iterator = mixture.batches(start, host, hosts)
    batches = list(itertools.islice(iterator, count))
    iterator.close()  # type: ignore[attr-defined]
    return batches


def digest(batch: Batch) -> str:
    content = hashlib.sha256()
    for field in jax.tree.leaves(batch):
        content.update(f"{field.dtype}{field.shape}".encode() + np.ascontiguousarray(field).tobytes())
    return content.hexdigest()


@pytest.fixture
def expected(sources: dict[str, SourceConfig]) -> list[str]:
    return [digest(batch) for batch in draw(Mixture(config(sources)), STEPS)]


@pytest.mark.parametrize(("hosts", "start"), [(2, 0), (8, 3)])
def test_hosts_read_slices_of_the_same_batches(
    sources: dict[str, SourceConfig], expected: list[str], hosts: int, start: int
) -> None:
    mixture = Mixture(config(sources))
    slices = [draw(mixture, 3, start, host, hosts) for host in range(hosts)]
    joined = [jax.tree.map(lambda *rows: np.concatenate(rows), *parts) for parts in zip(*slices)]
    assert [digest(batch) for batch in joined] == expected[start : start + 3]


def test_any_start_step_continues_the_same_stream(sources: dict[str, SourceConfig], expected: list[str]) -> None:
    mixture = Mixture(config(sources))
    for start in range(1, STEPS):
        assert digest(draw(mixture, 1, start)[0]) == expected[start]


@pytest.mark.processes
def test_batches_do_not_depend_on_workers_and_threads(sources: dict[str, SourceConfig], expected: list[str]) -> None:
    for settings_ in ({"workers": 2}, {"threads": 1, "prefetch": 1}, {"threads": 8, "prefetch": 4}):
        mixture = Mixture(config(sources, **settings_))
        assert [digest(b) for b in draw(mixture, STEPS)] == expected, settings_
    assert [digest(b) for b in draw(Mixture(config(sources, workers=2)), 2, 3)] == expected[3:5]


@pytest.mark.processes
def test_workers_outlast_the_signals_of_a_group_and_their_death_is_one_line(sources: dict[str, SourceConfig]) -> None:
    batches = Mixture(config(sources, workers=1, prefetch=1)).batches()
    try:
        next(batches)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker.pid, number)
        for _ in range(4):  # more than is ahead
            next(batches)
        assert worker.is_alive()
        worker.kill()
        line = r"worker process of the data loader ended with code -9 .*fewer data.workers"
        with pytest.raises(DataWorkerError, match=line) as fault:
            list(itertools.islice(batches, 4))
        assert fault.value.exit_code == 76, "launchers start the run again"
    finally:
        batches.close()  # type: ignore[attr-defined]


def test_with_every_later_setting_off_batches_are_those_of_before(tmp_path: Path) -> None:
    """The digest was written by the code before empty prompts, the dictionary, look-alikes and descriptions (commit 3f226e5)."""
    content = hashlib.sha256()
    for batch in draw(Mixture(tiny_run.config(tiny_run.write_sources(tmp_path))), 20):
        parts = (
            batch.size,
            batch.extent,
            batch.tokens,
            batch.token_mask,
            batch.boxes,
            batch.box_mask,
            batch.positive_map,
        )
        for part in (*parts, batch.token_loss_mask, batch.record):
            content.update(np.ascontiguousarray(part).tobytes())
    assert content.hexdigest() == "f5f96ea548f15fc00153a51e248bc0a9a5ede0d1132fc82b0943bd47d10bbb2f"


def test_batches_depend_on_the_seed_and_do_not_repeat(sources: dict[str, SourceConfig], expected: list[str]) -> None:
    other = [digest(batch) for batch in draw(Mixture(config(sources, seed=1)), STEPS)]
    assert len({*expected, *other}) == 2 * STEPS


def test_batches_of_patches_hold_the_same_pixels(sources: dict[str, SourceConfig]) -> None:
    """With the channels in the order of the network."""
    pixels = draw(Mixture(config(sources)), 4)
    made = Mixture(config(sources)).batches(patches=True)
    for one, other in zip(pixels, itertools.islice(made, 4), strict=True):
        count, height, width, _ = one.image.shape
        assert other.image.shape == (count, height // 4, width // 4, 48)
        assert other.canvas == one.canvas == (height, width)
        # The second pixel of the third row of a patch; its channels are blue, green, red.
        np.testing.assert_array_equal(other.image[:, 3, 2, 27:30], one.image[:, 3 * 4 + 2, 2 * 4 + 1, ::-1])
        np.testing.assert_array_equal(pixels_of(other.image), one.image[..., ::-1])
        np.testing.assert_array_equal(other.boxes, one.boxes)
    made.close()  # type: ignore[attr-defined]


def test_shapes_contents_and_canvases(sources: dict[str, SourceConfig]) -> None:
    mixture = Mixture(config(sources))
    assert mixture.source_names == ("boxes", "captions")
    seen = set()
    for step, batch in enumerate(draw(mixture, 16)):
        height, width = mixture.canvas(step)
        seen.add((height, width))
        assert batch.image.shape == (8, height, width, 3)
        assert batch.image.dtype == np.uint8
        assert batch.valid.all()
        for i in range(8):
            h, w = batch.size[i]
            assert h <= batch.extent[i, 0] <= height
            assert w <= batch.extent[i, 1] <= width
            assert (batch.extent[i] % 32 == 0).all()
            assert batch.image[i, :h, :w].any()
            assert not batch.image[i, h:].any()
            assert not batch.image[i, :, w:].any()
            boxes = batch.boxes[i, batch.box_mask[i]]
            assert len(boxes)
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert (boxes[:, 2:] < [w, h]).all()
            assert not batch.boxes[i, ~batch.box_mask[i]].any()
            assert batch.positive_map[i].any(1).tolist() == batch.box_mask[i].tolist()
            assert not batch.positive_map[i, :, ~batch.token_mask[i]].any()
            assert batch.tokens[i][0] == 6
    assert seen == set(mixture.canvases)
    assert len(seen) == 6


def test_boxes_keep_the_tokens_of_their_names(sources: dict[str, SourceConfig]) -> None:
    """After sampling, shuffling and batching, the positive map of each box is that of its category."""
    mixture = Mixture(config(sources))
    names = mixture.shards[0].manifest.names
    tokenizer = mixture.captioners[0].tokenizer
    for batch in draw(mixture, 5):
        for i in np.flatnonzero(batch.source == 0):
            record = mixture.shards[0][int(batch.record[i])]
            for slot, label in enumerate(record.categories):
                found = batch.tokens[i][batch.positive_map[i, slot]].tolist()
                assert found == tokenizer.encode(names[label].replace("_(animal)", "")).ids[1:-1]


def test_flip_probability(sources: dict[str, SourceConfig]) -> None:
    mixture = Mixture(config(sources, flip=0.0))
    left = draw(mixture, 3)
    right = draw(Mixture(config(sources, flip=1.0)), 3)
    for a, b in zip(left, right):
        for i in range(8):
            h, w = a.size[i]
            assert np.array_equal(a.image[i, :h, :w], b.image[i, :h, :w][:, ::-1])
            assert np.array_equal(a.tokens[i], b.tokens[i])
            mask = a.box_mask[i]
            assert np.allclose(a.boxes[i, mask, 0], w - 1 - b.boxes[i, mask, 2])
            record = mixture.shards[a.source[i]][int(a.record[i])]
            ratio = [w / record.width, h / record.height] * 2
            assert np.allclose(a.boxes[i, mask], record.boxes * ratio)


@pytest.mark.long
@pytest.mark.parametrize(("weights", "size"), [((3.0, 1.0), 8), ((1.0, 9.0), 10)])
def test_weights_are_the_shares_of_examples(folders: dict[str, Path], weights: tuple[float, float], size: int) -> None:
    sources = {name: SourceConfig(str(folders[name]), w) for name, w in zip(("boxes", "captions"), weights)}
    plan = Mixture(config(sources, batch_size=size, short_sides=(32,)))
    counts = Counter(s for batch in draw(plan, 20) for s in batch.source.tolist())
    assert counts[0] / (counts[0] + counts[1]) == pytest.approx(weights[0] / sum(weights), abs=0.03)


@pytest.mark.long
def test_copies_are_shares_of_examples_by_records(folders: dict[str, Path]) -> None:
    """As in the original: each record of `boxes` is used twice as often as one of `captions`."""
    sources = {name: SourceConfig(str(folders[name]), copies=n) for name, n in (("boxes", 2), ("captions", 1))}
    plan = Mixture(config(sources, short_sides=(32,)))
    assert plan.shares == pytest.approx((34 / 48, 14 / 48)) and plan.records == (17, 14)
    counts = Counter(s for batch in draw(plan, 18) for s in batch.source.tolist())
    assert counts[0] / 144 == pytest.approx(34 / 48, abs=0.03)


def test_caption_records_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from glip_jax.data import shards

    opened = Shards(folders["captions"])
    bare = [
        dataclasses.replace(opened[i], kind="caption", boxes=opened[i].boxes[:0], spans=(), provenance="")
        if i < 3
        else opened[i]
        for i in range(5)
    ]
    shards.write(bare, tmp_path / "bare", name="bare")
    with pytest.raises(ConfigError, match=r"data\.sources\.x: .*bare has 3 records of kind caption.* job `label`"):
        Mixture(config({"x": SourceConfig(str(tmp_path / "bare"))}))


def test_a_source_without_boxes_is_said_and_a_run_without_boxes_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("boxes", "empty"):
        shutil.copytree(folders["boxes"], tmp_path / name)
    manifest = tmp_path / "empty" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"boxes": 0}))
    sources = {name: SourceConfig(str(tmp_path / name)) for name in ("boxes", "empty")}
    (note,) = [note for note in Mixture(config(sources)).notes if "has a box" in note]
    assert "data.sources.empty: none of the" in note and str(tmp_path / "empty") in note
    with pytest.raises(ConfigError, match=r"data.sources.empty: none of the \d+ records .* has a box"):
        Mixture(config({"empty": sources["empty"]}))


def test_names_that_exceed_the_budget_and_empty_negatives_are_refused(folders: dict[str, Path]) -> None:
    every = dataclasses.replace(DataConfig().captions, mode="all_names")
    source = {"boxes": SourceConfig(str(folders["boxes"]))}
    batch = draw(Mixture(config(source, captions=every)), 1)[0]
    assert len({int(mask.sum()) for mask in batch.token_mask}) == 1
    base = config(source, captions=every)
    text = dataclasses.replace(base.model.text, max_tokens=10)
    short = dataclasses.replace(base, model=dataclasses.replace(base.model, text=text))
    with pytest.raises(
        ConfigError, match=r"its 6 names take 15 tokens .*max_tokens is 10: data.captions.mode all_names"
    ):
        Mixture(short)
    with pytest.raises(ConfigError, match=r"sources\.boxes\.negatives: '\(x\)' has no word"):
        Mixture(config({"boxes": SourceConfig(str(folders["boxes"]), negatives=("(x)",))}))


def test_names_that_the_vocabulary_does_not_know(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Refused before the first step if nothing of a name is read; noted if it is read in part, or as another name."""

    def mixture(names: tuple[str, ...], **source: Any) -> Mixture:
        for file in folders["boxes"].iterdir():
            shutil.copy(file, tmp_path)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        manifest["names"] = list(names) + manifest["names"][len(names) :]
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return Mixture(config({"own": SourceConfig(str(tmp_path), **source)}))

    with pytest.raises(ConfigError, match=r"sources.own: '斑马', '长颈鹿' have no word .*--names=FILE.json`\), or set"):
        mixture(("cat", "斑马", "长颈鹿"))
    with pytest.raises(ConfigError, match=r"sources.own.negatives: '消防栓' has no word .*: remove it, or set"):
        mixture(("cat",), negatives=("消防栓",))
    notes = mixture(("cat", "斑马 dog", "Café", "cafe"), negatives=("CAT",)).notes
    for words in ("does not know all of '斑马 dog'", "the same to the model: 'cafe = Café'", "negatives anyway: 'CAT'"):
        assert any(words in note for note in notes), notes


@pytest.mark.processes
def test_augmentation_and_packing_are_functions_of_the_step(sources: dict[str, SourceConfig]) -> None:
    loud: dict[str, Any] = {
        "crop": CropConfig(0.5),
        "jitter": JitterConfig(0.5),
        "captions": dataclasses.replace(
            DataConfig().captions, hard_share=0.5, packing=PackingConfig(2, kinds=("grounding", "pseudo")), dictionary=0.5, look_alikes=0.5
        ),
    }  # fmt: skip
    sources = {name: dataclasses.replace(source, complete="all") for name, source in sources.items()}
    whole = [digest(batch) for batch in draw(Mixture(config(sources, **loud)), 4)]
    parts = [draw(Mixture(config(sources, workers=1, **loud)), 2, 2, host, 2) for host in range(2)]
    joined = [jax.tree.map(lambda *rows: np.concatenate(rows), *pair) for pair in zip(*parts)]
    assert [digest(batch) for batch in joined] == whole[2:]


@pytest.mark.long
def test_every_record_of_a_source_is_used_equally_often(folders: dict[str, Path]) -> None:
    mixture = Mixture(config({"boxes": SourceConfig(str(folders["boxes"]))}, short_sides=(32,)))
    counts = Counter(r for batch in draw(mixture, 17 * 3) for r in batch.record.tolist())
    assert set(counts) == set(range(17))
    assert min(counts.values()) >= 18
    assert max(counts.values()) <= 30


def test_aspects_without_records_have_no_step(folders: dict[str, Path]) -> None:
    only = config({"captions": SourceConfig(str(folders["captions"]))}, aspects=(0.25, 0.75, 1.333333, 4.0))
    mixture = Mixture(only)
    assert mixture.schedule.counts.tolist()[0] == mixture.schedule.counts.tolist()[3] == 0
    assert {b.image.shape[1:3] for b in draw(mixture, 8)} == {(32, 64), (64, 96), (64, 32), (96, 64)}


def test_extent_of_the_batch_is_the_canvas(sources: dict[str, SourceConfig]) -> None:
    base = config(sources)
    whole = dataclasses.replace(base, model=dataclasses.replace(base.model, input=InputConfig(extent="batch")))
    for batch in draw(Mixture(whole), 3):
        assert (batch.extent == batch.image.shape[1:3]).all()


def test_boxes_over_the_limit_are_counted(sources: dict[str, SourceConfig]) -> None:
    for batch in draw(Mixture(config(sources, max_boxes=2)), 3):
        over = batch.dropped[:, DROPS.index("boxes_over_limit")]
        assert over.tolist() == [1 if s == 0 else 0 for s in batch.source]


@pytest.mark.long
def test_corrupt_records_are_masked_and_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    """A record whose image does not decode becomes a masked example; the rest of the batch is unchanged."""
    from glip_jax.data import shards

    def damaged():
        opened = Shards(folders["boxes"])
        for i in range(len(opened)):
            record = opened[i]
            yield dataclasses.replace(record, image=record.image[:50]) if i == 4 else record

    shards.write(damaged(), tmp_path / "spoilt", name="s", names=Shards(folders["boxes"]).manifest.names)
    mixture = Mixture(config({"s": SourceConfig(str(tmp_path / "spoilt"))}))
    batches, again = draw(mixture, 12), draw(mixture, 12)
    assert [digest(b) for b in batches] == [digest(b) for b in again]
    bad = 0
    for batch in batches:
        assert (batch.valid == (batch.record != 4)).all()
        assert batch.dropped[:, DROPS.index("corrupt_records")].tolist() == (~batch.valid).tolist()
        for i in np.flatnonzero(~batch.valid):
            bad += 1
            assert not batch.image[i].any()
            assert not batch.box_mask[i].any()
            assert batch.tokens[i, :3].tolist() == [6, 7, 0]
    assert bad > 0
    assert mixture.describe(0, 4).startswith("s[4] (corrupt: record '13', field image: cannot be decoded")
    assert mixture.describe(0, 5) == "s[5] (image 16, boxes.json)"


def test_invalid_settings_are_refused(
    sources: dict[str, SourceConfig], tmp_path: Path, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        Mixture(config({}))
    with pytest.raises(ConfigError, match=r"data\.sources\.x: .*absent does not exist.*python -m glip_jax data coco"):
        Mixture(config({"x": SourceConfig(str(tmp_path / "absent"))}))
    shutil.copytree(folders["boxes"], tmp_path / "copy")
    next((tmp_path / "copy").glob("*.array_record")).unlink()
    with pytest.raises(ConfigError, match=r"data\.sources\.x: .*found nothing"):
        Mixture(config({"x": SourceConfig(str(tmp_path / "copy"))}))
    with pytest.raises(ConfigError, match="not a multiple of the 3 hosts"):
        Mixture(config(sources)).batches(0, 0, 3)
    with pytest.raises(ConfigError, match="host 2 of 2"):
        Mixture(config(sources)).batches(0, 2, 2)
    base = config(sources)
    for text, message in (
        (dataclasses.replace(base.model.text, vocabulary="absent.txt"), "absent.txt"),
        (dataclasses.replace(base.model.text, vocabulary_size=100), "512 tokens, model.text.vocabulary_size is 100"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mixture(dataclasses.replace(base, model=dataclasses.replace(base.model, text=text)))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5).filter(lambda s: sum(s) > 0.1), st.integers(0, 10**6))
def test_schedule_is_periodic_even_and_counts_right(shares: list[float], step: int) -> None:
    plan = schedule(shares, 64)
    weights = np.array(shares) / sum(shares)
    assert plan.counts.sum() == 64
    assert ((plan.counts > 0) == (weights > 0)).all()
    assert (np.abs(plan.counts - weights * 64) <= len(shares)).all()
    assert plan.aspect(step) == plan.aspect(step + 64)
    assert plan.occurrence(step + 64) == plan.occurrence(step) + plan.counts[plan.aspect(step)]
    for aspect in range(len(shares)):
        seen = np.flatnonzero(plan.aspects == aspect)
        assert [plan.occurrence(int(s)) for s in seen] == list(range(len(seen)))
        # Smooth weighted round robin: close to the share at every point of the period.
        running = np.cumsum(plan.aspects == aspect) - np.arange(1, 65) * plan.counts[aspect] / 64
        assert np.abs(running).max() < len(shares)
