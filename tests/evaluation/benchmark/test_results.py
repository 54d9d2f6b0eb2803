"""Numbers beside their protocol, published numbers, groups, tables; the worst errors."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from etils import epath

from glip_jax.cli.reports.benchmark_report import overlap_lines, protocol_line, table
from glip_jax.evaluation.benchmark import results as module
from glip_jax.evaluation.benchmark.mistakes import mistakes
from glip_jax.evaluation.benchmark.scoring import compared, group_numbers, leaves, score_set
from glip_jax.evaluation.benchmark.sets import Group, Published, protocol
from glip_jax.evaluation.benchmark.table import GROUPS, SETS

COCO = SETS["coco"]


def used(item=COCO, **changes):
    """The protocol of the set's first way of asking, with changes."""
    return {**protocol(item, item.modes[0]), "images": "all", "counts": "as published", **changes}


def asked(item, value, key="AP", label="AP", own=None):
    """An ask of results.json with one metric."""
    own = own or used(item)
    published = [compared(each, own) for each in item.published if each.metric == label]
    metric = {
        "main": key,
        "module": "coco",
        "evaluator": "coco 1",
        "options": {},
        "numbers": {key: value, "AP50": 0.5, "counts": {"images": 63, "boxes": 1584}},
        "published": published,
    }
    return {
        "protocol": own, "counts": {"images": 5000, "prompts": 5000}, "files": {"annotations": {"path": "a.json", "sha256": "f" * 64, "known": ""}}, "notes": [],
        "prompts": 5, "longest_prompt": 80, "detections": 9, "seconds": 1.0, "metrics": {label: metric},
    }  # fmt: skip


def content(sets):
    """results.json of sets, by name their asks."""
    own = {
        name: {"title": name, "licence": "", "notes": [], "overlap": {"unread": {}, "sources": 0}, "asks": modes}
        for name, modes in sets.items()
    }
    checkpoint = {"name": "tiny_run", "step": 7, "parameters": "ema"}
    return {"checkpoint": checkpoint, "sets": own, "groups": module.groups(own), "missing": {}, "failed": {}}


def test_a_published_number_needs_the_same_protocol():
    glip = next(each for each in COCO.published if each.model == "GLIP-T")
    assert compared(glip, used())["differs"] == []
    assert compared(glip, used(chunk=20))["differs"] == ["chunk: 20 here, published with 0"]
    assert compared(glip, used(images=100))["differs"] == ["images: 100 here, published with all"]
    assert compared(glip, used(counts="other"))["differs"] == ["other counts of images or categories"]
    assert compared(glip, used(prompts_per_image=1), prompts=1)["differs"] == []
    assert compared(glip, used(prompts_per_image=2), prompts=1)["differs"] == [
        "prompts_per_image: 2 here, published with 1"
    ]
    usual = protocol(COCO, COCO.modes[0])
    bare = dataclasses.replace(glip, protocol={})
    assert compared(bare, used(short_side=96), usual)["differs"] == ["short_side: 96 here, published with 800"]
    unknown = dataclasses.replace(glip, protocol={"protocol": "not stated"})
    assert compared(unknown, used())["differs"] == ["protocol: not stated"]
    other = content({"coco": {"names": asked(COCO, 0.463, own=used(order="seed 3"))}})
    assert "other protocol" in table(other)
    assert "GLIP-T 46.3" not in table(other)
    assert "GLIP-T 46.3" in table(content({"coco": {"names": asked(COCO, 0.463)}}))


def test_every_number_has_its_protocol():
    results = content({"coco": {"names": asked(COCO, 0.463)}})
    line = protocol_line(results, results["sets"]["coco"]["asks"]["names"])
    for part in (
        "step 7, ema",
        "800 to 1333",
        "images: all, 63 images, 1,584 boxes",
        "longest 80",
        "order by id",
        "100 a prompt",
        "threshold 0.05",
        "coco 1",
        "ffffffffffffffff",
    ):
        assert part in line
    rows = list(csv.DictReader(io.StringIO(module.csv_text(results))))
    first = rows[0]
    assert len(rows) == 4
    assert (first["set"], first["key"], float(first["value"]), first["step"], first["chunk"], first["widths"]) == (
        "coco", "AP", 0.463, "7", "0", "plus_one",
    )  # fmt: skip
    assert "GLIP-T 46.3" in first["published"]
    assert re.search(r"^coco AP +names +46.3 +63 +1,584 +GLIP", table(results), re.MULTILINE)


def test_a_group_has_mean_and_median_of_the_sets_that_have_numbers():
    names = GROUPS["odinw13"].sets
    values = dict(zip(names, (0.1, 0.2, 0.6, 0.1, 0.2, 0.6, 0.3), strict=False))
    sets = {name: {"asks": {"names": asked(SETS[name], value)}} for name, value in values.items()}
    sets[names[7]] = {"asks": {"names": asked(SETS[names[7]], -1.0)}}
    own = group_numbers(sets, GROUPS["odinw13"])["names, AP"]
    assert (own["mean"], own["median"], own["sets"]) == (pytest.approx(0.3), pytest.approx(0.2), 7)
    assert own["missing"] == list(names[7:])
    assert all("sets: some here, published with all" in each["differs"] for each in own["published"])
    del sets[names[0]]
    assert group_numbers(sets, GROUPS["odinw13"]) == {}, "most sets are missing"


def test_the_prompt_column_takes_names_where_a_set_has_no_prompts():
    group = Group("g", "G", ("odinw_aquarium", "odinw_raccoon"), ("prompts",), published=(
        Published("GLIP-T", "prompts", "AP", "mean", 46.5, "paper", {"chunk": 0}),))  # fmt: skip
    sets = {
        "odinw_aquarium": {
            "asks": {"names": asked(SETS["odinw_aquarium"], 0.1), "prompts": asked(SETS["odinw_aquarium"], 0.3)}
        },
        "odinw_raccoon": {"asks": {"names": asked(SETS["odinw_raccoon"], 0.5)}},
    }
    own = group_numbers(sets, group)["prompts, AP"]
    assert own["mean"] == pytest.approx(0.4)
    assert own["published"][0]["differs"] == [], "ask is not compared: it is the column"


def test_latex_rows_are_in_percent_and_say_what_is_not_measured():
    lvis = {"APr": 0.1, "APc": 0.2, "APf": 0.3, "AP": 0.2604}
    own = asked(SETS["lvis_minival"], 0.2604, label="fixed AP")
    own["metrics"]["fixed AP"]["numbers"] = lvis
    rows = module.latex(content({"lvis_minival": {"names": own}}), "tiny_run").splitlines()
    assert rows[1] == r"tiny\_run & -- \\"
    assert rows[3] == r"tiny\_run & 10.0 & 20.0 & 30.0 & 26.0 & -- & -- & -- & -- \\"


def test_overlap_is_said():
    lines = overlap_lines({
        "unread": {"b": "gone"}, "sources": 1, "images": {"images": 9, "found": 2, "by_source": {"a": 2}, "examples": []},
        "names": {"names": 5, "found": 4, "by_source": {"a": 4}, "missing": []},
    })  # fmt: skip
    assert "2 of 9 image files" in lines[0]
    assert "4 of 5 names" in lines[1]
    assert "source b is not compared: gone" in lines[2]
    assert "not known" in overlap_lines({"unread": {}, "sources": 0})[0]


def test_leaves():
    assert dict(leaves({"a": [1, 2.0], "b": {"c": 3}, "d": "x", "e": True})) == {"a.0": 1.0, "a.1": 2.0, "b.c": 3.0}


@pytest.fixture
def made(tmp_path):
    """Two images: a confident wrong box on the second, a right one on the first."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 50, "width": 60} for i in (1, 2)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0},
                        {"id": 2, "image_id": 2, "category_id": 4, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
    }  # fmt: skip
    rows = [
        (1, 3, [10, 10, 20, 20], 0.9),
        (1, 4, [10, 10, 20, 20], 0.2),
        (2, 3, [0, 0, 10, 10], 0.8),
        (2, 4, [0, 0, 10, 10], 0.3),
    ]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    rows = [dict(zip(("image_id", "category_id", "bbox", "score"), row, strict=True)) for row in rows]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    return tmp_path


def test_a_set_is_scored_by_all_its_metrics(made):
    found = score_set(
        COCO, COCO.modes[0], used(), epath.Path(made / "found.json"), {"annotations": str(made / "truth.json")}
    )
    assert found["AP"]["numbers"]["AP50"] == pytest.approx(1.0)
    assert found["AP"]["evaluator"].startswith("glip_jax ")
    assert "pycocotools" in found["AP"]["evaluator"]


def test_the_worst_errors_come_first(made):
    files = {"1": "1.jpg", "2": "2.jpg"}
    first, second = mistakes(COCO, str(made / "truth.json"), epath.Path(made / "found.json"), files, 5)
    assert (first.file, first.badness, first.names, first.right) == ("2.jpg", 0.8, ("cat", "dog"), (False, True))
    assert (second.file, second.badness, second.true_names) == ("1.jpg", 0.2, ("cat",))
    assert np.array_equal(second.true, [[10, 10, 30, 30]])


def test_of_lvis_only_what_is_known_to_be_absent_is_wrong(made):
    path = made / "truth.json"
    content = json.loads(path.read_text())
    for image, absent in zip(content["images"], ([], [3]), strict=True):
        image |= {"neg_category_ids": absent, "not_exhaustive_category_ids": []}
    path.write_text(json.dumps(content))
    (only,) = mistakes(SETS["lvis_minival"], str(path), epath.Path(made / "found.json"), {"2": "2.jpg"}, 5)
    assert only.file == "2.jpg"
