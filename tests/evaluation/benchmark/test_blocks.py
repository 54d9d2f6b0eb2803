"""Blocks of detections: what a cut keeps, resuming, and the order of the predictions."""

import numpy as np
import pytest
from etils import epath

from glip_jax.evaluation.benchmark import blocks as module
from glip_jax.evaluation.benchmark.blocks import ROW, Blocks, Cut
from glip_jax.evaluation.benchmark.sets import BenchmarkError

IMAGES, PROMPTS, PHRASES = 11, 3, 2
FILES = [f"{i}.jpg" for i in range(IMAGES)]
IDS = {str(100 + i): file for i, file in enumerate(FILES)}
ORDER = np.array([3, 1, 2, 0, 10, 9, 8, 7, 6, 5, 4])


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4)


@pytest.fixture
def rows():
    """Detections of all images, few different scores, so that many are equal."""
    rng = np.random.default_rng(3)
    found = np.zeros(600, ROW)
    found["image"], found["prompt"] = rng.integers(0, IMAGES, 600), rng.integers(0, PROMPTS, 600)
    found["phrase"], found["score"] = rng.integers(0, PHRASES, 600), rng.integers(1, 40, 600) / 40
    found["box"] = rng.random((600, 4))
    return found[np.lexsort((-found["score"], found["prompt"], found["image"]))]


def write(blocks, rows, chosen):
    for block in chosen:
        images = ORDER[blocks.members(block).start : blocks.members(block).stop]
        own = rows[np.isin(rows["image"], images)]
        blocks.write(block, own.copy(), [f"{i:064}" for i in images], 1.0)


def merged(blocks):
    """Detections as they are written, by file."""
    found = {}

    def keep(path, rows):
        found[path.name] = rows
        path.write_text("")

    return blocks.merge(ORDER, FILES, IDS, keep), found


def expected(rows, cut):
    """The kept rows, by a full sort; equal scores of a category in the order of images."""
    kept = np.zeros(len(rows), bool)
    for prompt in range(PROMPTS):
        for phrase in range(PHRASES):
            own = np.flatnonzero((rows["prompt"] == prompt) & (rows["phrase"] == phrase))
            kept[sorted(own, key=lambda i: (-rows["score"][i], rows["image"][i]))[: cut.per_class]] = True
    for image in range(IMAGES):
        own = np.flatnonzero(rows["image"] == image)
        kept[sorted(own, key=lambda i: -rows["score"][i])[: cut.per_image]] = True
    return rows[kept]


def same(rows, other):
    first, second = ([(*row.tolist()[:4], *row["box"].tolist()) for row in each] for each in (rows, other))
    return len(first) > 0 and sorted(first) == sorted(second)


@pytest.mark.parametrize("visits", [[[0, 1, 2]], [[2, 1, 0]], [[0, 2], [1]]])
def test_the_running_cut_keeps_what_a_full_sort_keeps(tmp_path, rows, visits):
    """Whatever the order of the blocks, and whichever process detects them."""
    cut = Cut(per_class=20, per_image=5)
    for visit in visits:
        blocks = Blocks(epath.Path(tmp_path), {"about": {}}, IMAGES, PROMPTS, cut)
        blocks.begin()
        write(blocks, rows, visit)
    done, parts = merged(blocks)
    assert sorted(parts) == ["00000.json", "00001.json", "00002.json"]
    assert all((part["prompt"] == n).all() for n, part in enumerate(parts.values()))
    assert same(np.concatenate(list(parts.values())), expected(rows, cut))
    assert 0 < done["detections"] < len(rows)


def test_predictions_are_in_the_order_of_the_set(tmp_path, rows):
    blocks = Blocks(epath.Path(tmp_path), {"about": {}}, IMAGES, 1, Cut())
    write(blocks, rows, range(3))
    done, parts = merged(blocks)
    (found,) = parts.values()
    assert same(found, rows)
    assert (np.diff(found["image"]) >= 0).all()
    within = np.diff(found["image"]) == 0
    assert (np.diff(found["score"])[within] <= 0).all()
    assert done["digests"] == {f"{i}.jpg": f"{i:064}" for i in range(IMAGES)}
    assert done["files"] == IDS
    assert not list(tmp_path.glob("block_*")), "the predictions hold everything"


def test_a_stopped_job_goes_on(tmp_path, rows):
    folder = epath.Path(tmp_path)
    first = Blocks(folder, {"about": {"step": 1}, "a": (1, 2)}, IMAGES, 1, Cut())
    first.begin()
    write(first, rows, [1])
    (tmp_path / "block_00002.npz.unfinished").write_bytes(b"half of it")
    again = Blocks(folder, {"about": {"step": 2}, "a": [1, 2]}, IMAGES, 1, Cut())
    assert again.pending(range(3)) == [0, 2]
    with pytest.raises(BenchmarkError, match="lacks 2 of 3 blocks, the first block_00000.npz"):
        merged(again)
    write(again, rows, [0, 2])
    _, parts = merged(again)
    assert same(parts["predictions.json"], rows)
    assert again.done is not None
    assert merged(again)[1] == {}, "nothing is written twice"


def test_detections_of_something_else_are_refused(tmp_path):
    folder = epath.Path(tmp_path)
    Blocks(folder, {"about": {}, "parameters": "abc"}, IMAGES, 1, Cut()).begin()
    with pytest.raises(BenchmarkError, match='parameters: "abc" -> "def".*give another --workdir'):
        Blocks(folder, {"about": {}, "parameters": "def"}, IMAGES, 1, Cut())
    folder /= "other"
    Blocks(folder, {"about": {}, "settings": {"chunk": 0, "short_side": 800}}, IMAGES, 1, Cut()).begin()
    with pytest.raises(BenchmarkError, match=r"files \(settings.short_side: 800 -> 64\): give"):
        Blocks(folder, {"about": {}, "settings": {"chunk": 0, "short_side": 64}}, IMAGES, 1, Cut())


@pytest.mark.parametrize(
    "damage", [lambda content: content[:100], lambda content: content[:-2000] + b"\0" * 500 + content[-1500:]]
)
def test_a_damaged_block_is_named(tmp_path, rows, damage):
    blocks = Blocks(epath.Path(tmp_path), {"about": {}}, IMAGES, 1, Cut())
    write(blocks, rows, range(3))
    path = tmp_path / "block_00001.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BenchmarkError, match="block_00001.npz cannot be read .*remove it"):
        merged(blocks)


def test_a_set_without_detections(tmp_path):
    blocks = Blocks(epath.Path(tmp_path), {"about": {}}, IMAGES, PROMPTS, Cut(10, 5))
    write(blocks, np.zeros(0, ROW), range(3))
    done, parts = merged(blocks)
    assert done["detections"] == 0
    assert [len(part) for part in parts.values()] == [0, 0, 0]
