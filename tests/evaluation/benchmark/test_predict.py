"""The detector over made sets: blocks, resuming, several processes, one file of predictions whatever happened meanwhile."""

import json

import pytest
from etils import epath
from PIL import Image

from glip_jax.cli.reports.benchmark_report import render, table
from glip_jax.evaluation.benchmark import blocks as blocks_module
from glip_jax.evaluation.benchmark import predict as module
from glip_jax.evaluation.benchmark.blocks import Cut
from glip_jax.evaluation.benchmark.predict import predict
from glip_jax.evaluation.benchmark.results import collect, groups, measured_rate
from glip_jax.evaluation.benchmark.sets import BenchmarkError, number
from glip_jax.evaluation.benchmark.table import SETS
from glip_jax.evaluation.shares import Share
from glip_jax.io.workdir import workdir_path
from tests.evaluation.benchmark.stand_in import IMAGES, NAMES, files, own, run, small, write_made
from tests.evaluation.official_layouts import write_set


class OneOfTwo(Share):
    """A process whose partner has nothing to say."""

    def gather(self, value):
        return [value]


@pytest.fixture
def made(tmp_path, monkeypatch):
    small(monkeypatch)
    return write_made(tmp_path)


def mode(item, chunk):
    return module.dataclasses.replace(item.modes[0], chunk=chunk)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_job_that_stops_anywhere_ends_with_the_same_files(made, monkeypatch, chunk):
    """Nine prompts are written in parts, three in one file; it stops after each of the three blocks, and before a part is written."""
    item = own(made)
    predict(run(made, "straight"), item, mode(item, chunk))
    straight = files(made / "straight")
    assert len(straight) == (9 if chunk == 1 else 1)
    assert not list((made / "straight").rglob("*.npz")), "the blocks are in the predictions"

    for where in ("write", "_part"):
        original = getattr(blocks_module.Blocks, where)

        def stops(self, *arguments, original=original):
            original(self, *arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(blocks_module.Blocks, where, stops)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                predict(run(made, "stopped"), item, mode(item, chunk))
        monkeypatch.setattr(blocks_module.Blocks, where, original)
    predict(run(made, "stopped"), item, mode(item, chunk))
    assert files(made / "stopped") == straight

    calls = []
    predict(run(made, "stopped", calls), item, mode(item, chunk))
    assert calls == [], "nothing is detected twice"


def test_processes_share_the_blocks(made):
    """Two processes write what one writes, whichever is first."""
    item = own(made)
    predict(run(made, "one"), item, item.modes[0])
    calls = {0: [], 1: []}
    shares = [OneOfTwo(0, 2), OneOfTwo(1, 2)]
    predict(run(made, "two", calls[1], shares[1]), item, item.modes[0])
    predict(run(made, "two", calls[0], shares[0]), item, item.modes[0])
    assert sum(calls[0]) == 4
    assert sum(calls[1]) == 3
    assert files(made / "two") == files(made / "one")


def test_a_cheap_pass_chooses_the_names_of_each_image(made, monkeypatch):
    """The best two of nine; the same files where the job stops after each block of both passes."""
    item = own(made, "v3det")
    mode = module.dataclasses.replace(item.mode("retrieved"), retrieved=2, chunk=1)
    predict(run(made, "w"), item, mode)
    predict(run(made, "all"), item, module.dataclasses.replace(item.mode("names"), chunk=0))
    found, every = (
        json.loads((made / path / "predictions.json").read_text()) for path in ("w/made/retrieved", "all/made/names")
    )
    for image in range(10, 10 + IMAGES):
        best = dict[int, float]()
        for row in every:
            if row["image_id"] == image:
                best[row["category_id"]] = max(row["score"], best.get(row["category_id"], 0.0))
        chosen = {row["category_id"] for row in found if row["image_id"] == image}
        assert sorted(best[name] for name in chosen) == sorted(best.values())[-2:]
    plan = json.loads((made / "w/made/retrieved/plan.json").read_text())
    assert plan["about"]["prompts"] == 2 * IMAGES and plan["about"]["protocol"]["retrieved"] == 2
    assert not collect([item], epath.Path(made / "w"), str(made), print)[2]

    write = blocks_module.Blocks.write

    def stops(self, *arguments):
        write(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(blocks_module.Blocks, "write", stops)
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            predict(run(made, "stopped"), item, mode)
    predict(run(made, "stopped"), item, mode)
    assert files(made / "stopped") == files(made / "w")
    with pytest.raises(BenchmarkError, match="retrieved"):
        predict(run(made, "w"), item, module.dataclasses.replace(mode, retrieval_side=160))


def test_the_numbers_do_not_depend_on_what_is_cut(made, monkeypatch):
    """Fixed AP of ten thousand a category, and standard AP, of cut predictions are those of all predictions."""
    item = own(made)
    item = module.dataclasses.replace(item, metrics=tuple(
        module.dataclasses.replace(metric, options={**metric.options, "top": 5 if metric.options["fixed"] else 4})
        for metric in item.metrics if metric.module == "lvis"
    ))  # fmt: skip
    predict(run(made, "cut"), item, item.modes[0])
    monkeypatch.setattr(module, "_LVIS_CUT", Cut())
    predict(run(made, "all"), item, item.modes[0])
    assert not collect([item], epath.Path(made / "all"), str(made), print)[2]
    cut, whole = (
        collect([item], epath.Path(made / name), str(made), print)[0]["made"]["asks"]["names"]
        for name in ("cut", "all")
    )
    assert cut["detections"] < whole["detections"] == IMAGES * 2 * len(NAMES)
    for label, metric in whole["metrics"].items():
        ours, theirs = (
            {k: v for k, v in each["numbers"].items() if k != "counts"} for each in (cut["metrics"][label], metric)
        )
        assert ours == theirs
    assert 0 < whole["metrics"]["fixed AP"]["numbers"]["AP50"] < 1


def test_other_parameters_are_refused(made):
    item = own(made)
    predict(run(made, "w"), item, item.modes[0])
    with pytest.raises(BenchmarkError, match='another checkpoint.*parameters: "abc" -> "xyz"'):
        predict(run(made, "w", parameters="xyz"), item, item.modes[0])
    predict(run(made, "w", batch_size=1), item, item.modes[0])


def test_the_first_images_are_scored_alone(made):
    item = own(made, "coco")
    predict(run(made, "w", max_images=2), item, item.modes[0])
    sets_, checkpoint, failed = collect([item], epath.Path(made / "w"), str(made), print)
    assert not failed
    scored = sets_["made"]["asks"]["names"]
    assert checkpoint["step"] == 3
    assert scored["metrics"]["AP"]["numbers"]["counts"]["images"] == 2
    assert scored["protocol"]["images"] == 2
    # Without the cut file, images that were not asked would be missed.
    (made / "w/made/names/annotations.json").unlink()
    _, _, failed = collect([item], epath.Path(made / "w"), str(made), print)
    assert "is gone, the annotations of the images asked: remove" in failed["made"]


def test_ids_as_text_on_one_side_are_cut_alike(made):
    truth = json.loads((made / "truth.json").read_text())
    for box in truth["annotations"]:
        box["image_id"] = str(box["image_id"])
    (made / "truth.json").write_text(json.dumps(truth))
    item = own(made, "coco")
    predict(run(made, "w", max_images=2), item, item.modes[0])
    sets_, _, _ = collect([item], epath.Path(made / "w"), str(made), print)
    assert sets_["made"]["asks"]["names"]["metrics"]["AP"]["numbers"]["counts"]["boxes"] == 2


def test_scoring_says_which_files_it_scored(made):
    """An annotation file that was corrected since, predictions that were cut off, records that were damaged."""
    item, folder = own(made, "coco"), epath.Path(made / "w")
    predict(run(made, "w"), item, item.modes[0])
    before = collect([item], folder, str(made), print)[0]["made"]["asks"]["names"]
    assert measured_rate(str(folder)) is not None
    truth = json.loads((made / "truth.json").read_text())
    (made / "truth.json").write_text(json.dumps({**truth, "annotations": truth["annotations"][1:]}))
    after = collect([item], folder, str(made), print)[0]["made"]["asks"]["names"]
    assert after["files"]["annotations"]["sha256"] != before["files"]["annotations"]["sha256"]
    assert after["notes"] == ["annotations: changed since the detection; scored as now"]
    assert not before["notes"]
    path = made / "w/made/names/predictions.json"
    path.write_bytes(path.read_bytes()[:100])
    assert f"or remove {path.parent} to detect again" in collect([item], folder, str(made), print)[2]["made"]
    (path.parent / "plan.json").write_text("{")
    assert measured_rate(str(folder)) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "images" / "6.png").unlink(),
            "1 of 7 images of made are missing or empty in .*images, the first is 6.png",
        ),
        (lambda folder: (folder / "images" / "3.png").write_bytes(b"\x89PNG"), "image 13"),
        (
            lambda folder: Image.new("RGB", (9, 9)).save(folder / "images" / "3.png"),
            "has 9 x 9 pixels .*annotations say 40 x 60",
        ),
    ],
)
def test_images_that_do_not_fit_stop_the_set_and_not_the_blocks_before(made, spoil, message):
    item = own(made)
    spoil(made)
    with pytest.raises(BenchmarkError, match=message):
        predict(run(made, "w"), item, item.modes[0])


def test_the_report_draws_the_worst_errors(made):
    """From predictions to HTML: numbers, protocol, published numbers, bars by name, cards."""
    item = own(made)
    predict(run(made, "w"), item, item.modes[0])
    folder = epath.Path(made / "w")
    found, checkpoint, _ = collect([item], folder, str(made), print)
    results = {
        "command": "benchmark <&>", "date": "today", "checkpoint": {**checkpoint, "started_from": None, "versions": {}}, "sets": found,
        "groups": {}, "missing": {"coco": ["annotations: a.json"]}, "failed": {"d3": "it is broken"},
    }  # fmt: skip
    page = render(results, [item], str(made), folder, 3)
    assert page.count("data:image/jpeg") == 3
    for text in (
        "benchmark &lt;&amp;&gt;",
        "missing: coco: annotations: a.json",
        "no numbers: d3: it is broken",
        "red cat",
        "By name",
    ):
        assert text in page
    json.dumps(results, allow_nan=False)


EVERY = (
    "coco",
    "lvis_minival",
    "flickr_test",
    "odinw_aquarium",
    "refcoco_val",
    "grefcoco_testa",
    "d3",
    "omnilabel",
    "rf100vl_actions",
    "v3det",
)


@pytest.mark.long
def test_every_set_from_official_files_to_the_report(tmp_path):
    """Made files of two to five images; counts of the real sets are left out."""
    items = [module.dataclasses.replace(write_set(name, tmp_path), counts={}) for name in EVERY]
    for item in items:
        for each in item.modes:
            predict(run(tmp_path, "w"), item, each)
    folder = epath.Path(tmp_path / "w")
    found, checkpoint, failed = collect(items, folder, str(tmp_path), print)
    assert not failed
    assert list(found) == list(EVERY)
    results = {
        "command": "", "date": "", "checkpoint": {**checkpoint, "started_from": None, "versions": {}}, "sets": found,
        "groups": groups(found), "missing": {}, "failed": {},
    }  # fmt: skip
    json.dumps(results, allow_nan=False)
    for item in items:
        for name, asked in found[item.name]["asks"].items():
            for label, metric in asked["metrics"].items():
                assert number(metric["numbers"], metric["main"]) is not None, (item.name, name, label)
    measured = {
        name for name, own in found.items() for asked in own["asks"].values() for metric in asked["metrics"].values()
        if metric["module"] == "absence" and "refused" not in metric
    }  # fmt: skip
    assert measured == {"lvis_minival", "grefcoco_testa", "d3"}
    page = render(results, items, str(tmp_path), folder, 2)
    assert page.count("data:image/jpeg") > len(EVERY)
    text = table(results)
    assert all(f"\n{name} " in text for name in EVERY)
    # The annotation file of another version.
    with pytest.raises(BenchmarkError, match="3 images, 3 categories, expected 5,000 images, 80 categories"):
        predict(run(tmp_path, "other"), SETS["coco"], SETS["coco"].modes[0])


@pytest.mark.slow
def test_a_working_folder_in_a_bucket(made, running, monkeypatch):
    """The same predictions and numbers as in a local folder."""
    item = own(made)
    predict(run(made, "local"), item, item.modes[0])
    place = workdir_path(running.fresh(monkeypatch, made / "cache", timeout=5.0) + "/benchmark")
    remote = module.dataclasses.replace(run(made, "local"), workdir=place)
    predict(remote, item, item.modes[0])
    paths = [path for path in (made / "local" / "made" / "names").iterdir() if path.is_file()]
    assert {path.name for path in (place / "made" / "names").iterdir()} == {path.name for path in paths}
    assert (place / "made" / "names" / "predictions.json").read_bytes() == (
        made / "local/made/names/predictions.json"
    ).read_bytes()
    ours, theirs = (collect([item], workdir, str(made), print)[0] for workdir in (place, epath.Path(made / "local")))
    assert ours["made"]["asks"]["names"]["metrics"] == theirs["made"]["asks"]["names"]["metrics"]
