"""The table of the benchmark's sets, and the prompts of the official layouts."""

import dataclasses
import hashlib
import importlib
import json
import re
import shutil

import numpy as np
import pytest
from etils import epath

from glip_jax.evaluation.benchmark import blocks, sets
from glip_jax.evaluation.benchmark.prompted import join_rows, prediction_rows
from glip_jax.evaluation.benchmark.prompts import missing_images, mode_config, read_prompts
from glip_jax.evaluation.benchmark.retrieval import best_of_names, narrowed, retrieved_names
from glip_jax.evaluation.benchmark.table import GROUPS, SETS
from glip_jax.evaluation.metrics import flickr, grefcoco, refexp
from glip_jax.evaluation.metrics.files import MetricError
from glip_jax.structures.batch import Detections
from glip_jax.structures.prompts import load_tokenizer, tokenize
from tests import tiny_run
from tests.evaluation.official_layouts import boxes_of, write_set

CONFIG = tiny_run.replace(tiny_run.config(), "model", text=dataclasses.replace(tiny_run.model().text, max_tokens=256))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_run.VOCABULARY)


@pytest.fixture
def read(tmp_path, tokenizer):
    """Writes a set and reads its prompts, without the counts of the real one."""

    def made(name, mode="", **changes):
        item = dataclasses.replace(write_set(name, tmp_path), counts={}, stems_sha256="", **changes)
        return read_prompts(item, str(tmp_path), item.mode(mode or item.modes[0].name), tokenizer, CONFIG)

    return made


def _phrases(image_prompt):
    assert image_prompt.prompt is not None
    return [image_prompt.prompt.caption[slice(*spans[0])] for spans in image_prompt.prompt.spans]


def _found(*rows):
    """Detections of one prompt from (box xyxy, score, phrase)."""
    boxes, scores, phrases = zip(*rows) if rows else ((), (), ())
    return Detections(
        np.reshape(np.asarray(boxes, np.float32), (-1, 4)),
        np.asarray(scores, np.float32),
        np.asarray(phrases, np.int32),
    )


def test_the_table_is_consistent():
    for item in SETS.values():
        roles = {each.role for each in item.files}
        assert {"annotations", "images"} <= roles and {metric.file for metric in item.metrics} <= roles, item.name
        modes, labels = {each.name for each in item.modes}, {each.label for each in item.metrics}
        assert len(labels) == len(item.metrics) and all(set(metric.modes) <= modes for metric in item.metrics), (
            item.name
        )
        for each in item.published:
            assert each.mode in modes and each.metric in labels and 0 <= each.value <= 100 and each.source, (
                item.name,
                each,
            )
    for group in GROUPS.values():
        assert group.sets and all(SETS[name].mode(column) for name in group.sets for column in group.columns), (
            group.name
        )
    assert (len(GROUPS["odinw13"].sets), len(GROUPS["odinw35"].sets), len(GROUPS["rf100vl"].sets)) == (13, 35, 100)
    # The rows of the paper's Table 14 have the mean that it prints.
    rows = [
        each
        for name in GROUPS["odinw13"].sets
        for each in SETS[name].published
        if each.model == "GLIP-T" and "14" in each.source
    ]
    assert len(rows) == 13 and round(np.mean([each.value for each in rows]), 1) == 46.5
    assert all(each.mode == "prompts" for each in rows if each.value in (18.4, 70.2, 50.0, 73.8, 72.3, 17.7))


def test_a_published_number_stands_only_beside_its_protocol():
    item = SETS["lvis_minival"]
    (paper,) = [each for each in item.published if each.model == "GLIP-T" and each.key == "AP"]
    (peer,) = [each for each in item.published if each.model == "MM-Grounding-DINO-T" and each.key == "AP"]
    measured = sets.protocol(item, item.mode("names"))
    assert paper.value == 26.0 and sets.agrees(paper, measured) and not sets.agrees(peer, measured)
    for change in ({"chunk": 20}, {"boxes": 100}, {"short_side": 480}, {"threshold": 0.1}):
        assert not sets.agrees(paper, sets.protocol(item, dataclasses.replace(item.mode("names"), **change))), change
    assert not sets.agrees(paper, sets.protocol(item, item.mode("names"), order=0))
    assert sets.number({"any_box": {"1": {"all": 0.5}}}, "any_box.1.all") == 0.5
    assert (
        sets.number({"refcoco+": [0.1, 0.2]}, "refcoco+.1") == 0.2
        and sets.number({"AP d @IoU.5": 1.0}, "AP d @IoU.5") == 1
    )
    assert sets.number({"rates": {"0.05": {"AP": 0.5}}}, "rates.0.05.AP") == 0.5
    assert sets.number({"AP": -1.0}, "AP") is None and sets.number({"AP": 1.0}, "AR") is None


def test_names_groups_and_sets_of_ones_own(tmp_path):
    assert [item.name for item in sets.find_sets(["RefCOCO", "coco", "refcoco_val"])] == [
        "refcoco_val",
        "refcoco_testa",
        "refcoco_testb",
        "coco",
    ]
    with pytest.raises(sets.BenchmarkError, match="no set 'odinw31': did you mean odinw"):
        sets.find_sets(["odinw31"])
    own = sets.own_set("harbor", "a.json", "gs://bucket/images", like="odinw_aquarium")
    assert (
        own.path("images", "/data").as_posix() == "gs://bucket/images"
        and own.path("annotations", "/data").is_absolute()
    )
    assert not own.counts and not own.published and own.prompts == SETS["odinw_aquarium"].prompts
    (tmp_path / "a.json").write_text('{"images": [{"id": 1}, {"id": 2, "known_absent": ["dog"]}]}')
    pier = sets.own_set("pier", str(tmp_path / "a.json"), "b")
    assert [each.label for each in pier.metrics] == ["AP", sets.ABSENCE.label]
    assert [(each.name, each.chunk, each.default) for each in pier.modes] == [
        ("names", 0, True),
        ("names_parallel", 1, False),
    ]
    for arguments, message in ((("coco", "a", "b"), "none of the names"), (("..", "a", "b"), "a letter or digit first"), (("x", "a", "b", "d3"), "also needs pickles"),
                               (("x", "~/a", "b"), "~ is not replaced")):  # fmt: skip
        with pytest.raises(sets.UserError, match=message):
            sets.own_set(*arguments)


def test_the_listing_says_what_is_there_and_what_is_missing(tmp_path):
    item = write_set("lvis_minival", tmp_path)
    text = sets.listing([item, SETS["d3"]], str(tmp_path), prompts_per_second=10.0)
    digest = hashlib.sha256((tmp_path / "lvis/lvis_v1_val.json").read_bytes()).hexdigest()
    assert (
        f"lvis_v1_val.json (found; SHA-256 expected: not known, found: {digest})" in text
        and "4,809 images, 1,203 categories" in text
    )
    assert "149,079 prompts, about 4.1 h" in text and "CC BY-NC 4.0" in text and "(MISSING" in text
    text = sets.listing([write_set("refcoco_val", tmp_path), SETS["odinw_bccd"]], str(tmp_path))
    assert re.search(r"time: \d prompts", text) and "time: not known before the annotations are read" in text
    alone = sets.listing([SETS["lvis_val"]], "")
    assert "MISSING" not in alone and "found" not in alone and "no --data=DIR is given" in alone
    assert not sets.missing(item, str(tmp_path)) and [each.split(":")[0] for each in sets.missing(SETS["d3"], str(tmp_path))] == [
        "annotations", "pickles", "images",
    ]  # fmt: skip


def test_another_version_of_a_file_is_refused_with_both_counts(tmp_path, tokenizer):
    item = write_set("coco", tmp_path)
    with pytest.raises(sets.BenchmarkError, match="has 3 images, 3 categories, expected 5,000 images, 80 categories"):
        read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG)
    prompted = read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG, other_counts=True)
    assert "another version" in prompted.notes[0] and not prompted.as_published
    # ODinW's counts are those of the paper: other ones are noted, and the paper's numbers are of another version.
    item = write_set("odinw_aquarium", tmp_path)
    prompted = read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG)
    assert "has 3 images, expected 63 images, as reported" in prompted.notes[0] and not prompted.as_published


def test_boxes_that_cannot_be_scored_are_refused_before_the_detection(tmp_path, tokenizer):
    write_set("coco", tmp_path)
    path = tmp_path / "coco/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": content["annotations"] * 2}))
    item = sets.own_set("mine", str(path), str(tmp_path / "coco/val2017"))
    with pytest.raises(sets.UserError, match="id 1 occurs twice in annotations"):
        read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG)


@pytest.mark.parametrize(("name", "change", "message"), [
    ("refcoco_val", lambda c: c["annotations"].append({**c["annotations"][0], "id": 999}), "has 2 true boxes"),
    ("refcoco_val", lambda c: c["images"].append(c["images"][0]), "occurs twice in images"),
    ("grefcoco_val", lambda c: c["annotations"].pop(0), "have no annotation"),
])  # fmt: skip
def test_expressions_that_cannot_be_scored_are_refused_before_the_detection(tmp_path, tokenizer, name, change, message):
    item = write_set(name, tmp_path)
    path = item.path("annotations", str(tmp_path))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(sets.UserError, match=message):
        read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG)


def test_an_own_set_with_a_damaged_file_is_refused_when_it_is_read(tmp_path, tokenizer):
    (tmp_path / "half.json").write_text('{"images": [{"id": 1,')
    item = sets.own_set("mine", str(tmp_path / "half.json"), str(tmp_path))
    with pytest.raises(sets.UserError, match=r"half.json is not JSON"):
        read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG)


def test_coco_asks_all_names_in_the_order_of_ids(read):
    prompted = read("coco")
    assert prompted.counts == {"images": 3, "categories": 3, "boxes": 4, "prompts": 3}
    first, last = prompted.images[0], prompted.images[-1]
    assert (first.id, first.file, first.height, first.width) == (11, "000000000011.jpg", 48, 64)
    assert first.prompts[0].caption == "cat. dog. person" and first.image_prompts[0].keys == (1, 2, 3)
    assert [image.id for image in prompted.images[1:]] == [13, 12] and last.image_prompts[0].id == 12
    (row, other) = prediction_rows(
        prompted.item, first, [_found(([1, 2, 11, 22], 0.25, 2), ([0, 0, 5, 5], 0.5, 0), ([0, 0, 0, 0], 0, -1))]
    )
    assert row == {"image_id": 11, "category_id": 1, "bbox": [0, 0, 6, 6], "score": 0.5}
    assert (other["category_id"], other["bbox"]) == (3, [1, 2, 11, 21])  # w = x2 - x1 + 1


def test_lvis_asks_chunks_and_minival_is_a_part_of_val(read, tmp_path, tokenizer):
    prompted = read("lvis_minival", modes=(sets.PromptMode("names", chunk=2, boxes=300),))
    assert [image.id for image in prompted.images] == [139, 632, 724] and prompted.images[
        0
    ].file == "val2017/000000000139.jpg"
    assert (prompted.folder / prompted.images[0].file).exists() and prompted.counts["boxes"] == 4
    assert [prompt.caption for prompt in prompted.images[0].prompts] == ["aerosol can. cat", "bow . person"]
    assert [image.id for image in read("lvis_val").images] == [139, 285, 632, 724]
    path = sets.scored_annotations(prompted.item, str(tmp_path), "annotations", epath.Path(tmp_path / "derived"))
    content = json.loads(path.read_text())
    assert [each["id"] for each in content["images"]] == [139, 632, 724] and len(content["categories"]) == 4
    assert len(content["annotations"]) == 4 and "segmentation" not in content["annotations"][0]
    shuffled = read_prompts(prompted.item, str(tmp_path), prompted.mode, tokenizer, CONFIG, order=3)
    keys = [key for image_prompt in shuffled.images[0].image_prompts for key in image_prompt.keys]
    assert sorted(keys) == [1, 2, 3, 4] != keys
    assert (
        sets.scored_annotations(SETS["lvis_val"], str(tmp_path), "annotations", epath.Path(tmp_path / "derived")).name
        == "lvis_v1_val.json"
    )


def test_an_image_list_with_another_hash_is_noted(tmp_path, tokenizer):
    item = dataclasses.replace(write_set("lvis_minival", tmp_path), counts={})
    prompted = read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG)
    assert any("it is another image list" in note for note in prompted.notes)
    lines = "".join(f"{key:012d}\n" for key in (139, 632, 724))
    item = dataclasses.replace(item, stems_sha256=hashlib.sha256(lines.encode()).hexdigest())
    assert not read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG).notes


def test_odinw_asks_names_and_hand_written_prompts(read):
    assert read("odinw_northamericamushrooms").images[0].prompts[0].caption == "CoW. chanterelle"
    prompted = read("odinw_northamericamushrooms", "prompts")
    assert _phrases(prompted.images[0].image_prompts[0]) == ["flat mushroom", "yellow mushroom"]
    (image_prompt,) = read("odinw_packages", "prompts").images[0].image_prompts
    assert image_prompt.prompt.caption == "there is a package on the porch" and _phrases(image_prompt) == ["package"]
    (image_prompt,) = read("odinw_aquarium", "prompts").images[0].image_prompts
    assert image_prompt.prompt.caption.startswith(
        " fish. jellyfish. penguin , which is black and white. puffin with orange beaks . shark"
    )
    assert image_prompt.keys == (1, 2, 3, 4, 5, 6, 7) and _phrases(image_prompt)[2:4] == ["penguin", "puffin"]


def test_rf100vl_leaves_out_the_unused_class_of_the_export_only(read, tmp_path, tokenizer):
    prompted = read("rf100vl_actions")
    assert (
        prompted.images[0].image_prompts[0].keys == (1, 2, 3)
        and "category 0, 'animals', is not asked" in prompted.notes[0]
    )
    path = prompted.annotations
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0  # a list that counts from 0
    path.write_text(json.dumps(content))
    again = read_prompts(prompted.item, str(tmp_path), prompted.mode, tokenizer, CONFIG)
    assert again.images[0].image_prompts[0].keys == (0, 1, 2, 3) and not again.notes


def test_names_that_cannot_be_asked_are_said(read, tmp_path, tokenizer):
    prompted = read("odinw_bccd")
    content = json.loads(prompted.annotations.read_text())
    content["categories"] += [{"id": 8, "name": "  "}, {"id": 9, "name": "cat " * 300}]
    prompted.annotations.write_text(json.dumps(content))
    again = read_prompts(prompted.item, str(tmp_path), prompted.mode, tokenizer, CONFIG)
    assert again.images[0].image_prompts[0].keys == (1, 2) and again.names.keys() == {1, 2, 8, 9}
    assert [note[:40] for note in again.notes] == ["1 of 4 are not asked and count as not fo"] * 2


@pytest.mark.parametrize("source", ["captions", "release"])
def test_flickr_asks_the_phrases_of_captions(source, read, tmp_path, tokenizer):
    prompted = read("flickr_test")
    if source == "release":
        prompted.item.path("captions", str(tmp_path)).unlink()
        prompted = read_prompts(prompted.item, str(tmp_path), prompted.mode, tokenizer, CONFIG)
    assert prompted.counts["captions"] == 2 and prompted.counts["phrases"] == 4 and prompted.counts["images"] == 2
    first, second = prompted.images
    (image_prompt,) = first.image_prompts
    assert (first.file, image_prompt.id, image_prompt.phrases) == ("1001.jpg", (1001, 0), 2)
    assert _phrases(image_prompt) == ["The man", "a red hat"] and _phrases(second.image_prompts[0]) == [
        "A hat",
        "a man",
    ]
    x, y, w, h = boxes_of(1)[0]
    rows = prediction_rows(prompted.item, first, [_found(([x, y, x + w, y + h], 0.5, 0), ([0, 0, 1, 1], 0.9, 0))])
    rows += prediction_rows(prompted.item, second, [_found()])
    assert rows[0]["boxes"] == [[[0, 0, 1, 1], [x, y, x + w, y + h], [0, 0, 0, 0]], [[0, 0, 0, 0]]]
    (tmp_path / "found.json").write_text(json.dumps(join_rows(prompted.item, rows)))
    numbers = flickr.score(str(prompted.annotations), str(tmp_path / "found.json"))
    assert (numbers["any_box"]["1"]["all"], numbers["any_box"]["5"]["all"]) == (0, 0.25)


def test_a_caption_beyond_the_budget_keeps_its_lists(read, tmp_path, tokenizer):
    prompted = read("flickr_test")
    short = tiny_run.replace(CONFIG, "model", text=dataclasses.replace(CONFIG.model.text, max_tokens=6))
    again = read_prompts(prompted.item, str(tmp_path), prompted.mode, tokenizer, short)
    assert (
        again.images[0].image_prompts[0].keys == (0,)
        and "phrases cannot be asked and count as missed" in again.notes[0]
    )
    rows = prediction_rows(again.item, again.images[0], [_found()])
    assert len(rows[0]["boxes"]) == 2


def test_expressions_are_one_phrase_and_share_their_image(read, tmp_path, tokenizer):
    prompted = read("refcoco+_testa")
    assert [(image.file[-6:], len(image.image_prompts)) for image in prompted.images] == [("21.jpg", 2), ("22.jpg", 1)]
    assert [prompt.caption for prompt in prompted.images[0].prompts] == ["the red thing. ", "blue thing on the right."]
    one, two = prompted.images[0].image_prompts
    assert _phrases(one) == ["the red thing."] and (one.id, two.id, one.keys) == (0, 1, (0,))
    # All tokens of the caption, [CLS] and [SEP] excepted.
    tokens = tokenize(one.prompt, tokenizer, 32)
    assert tokens.phrase_map.sum() == tokens.mask.sum() - 2
    config = mode_config(CONFIG, prompted.mode)
    assert (config.detection.token_scores, config.detection.max_detections) == ("max", 30)
    rows = [row for image in prompted.images for row in prediction_rows(prompted.item, image, [
        _found(([x, y, x + w, y + h], 0.8, 0)) for x, y, w, h in [boxes_of(2)[image_prompt.id] for image_prompt in image.image_prompts]])]  # fmt: skip
    (tmp_path / "found.json").write_text(json.dumps(join_rows(prompted.item, rows)))
    assert refexp.score(str(prompted.annotations), str(tmp_path / "found.json"))["refcoco+"] == [1, 1, 1]


def test_expressions_without_target_are_asked_too(read, tmp_path):
    prompted = read("grefcoco_val")
    assert prompted.counts["expressions"] == 5 and prompted.counts["expressions without target"] == 1
    rows = [
        row
        for image in prompted.images
        for row in prediction_rows(prompted.item, image, [_found()] * len(image.prompts))
    ]
    (tmp_path / "found.json").write_text(json.dumps(join_rows(prompted.item, rows)))
    assert grefcoco.score(str(prompted.annotations), str(tmp_path / "found.json"))["N_acc"] == 1


def test_d3_asks_the_group_or_all(read):
    def keys(name):
        return [[image_prompt.keys for image_prompt in image.image_prompts] for image in read("d3", name).images]

    assert keys("intra_parallel") == [[(1,), (2,)]] * 2 + [[(3,), (4,)]] * 2
    assert keys("intra_concat") == [[(1, 2)]] * 2 + [[(3, 4)]] * 2
    assert keys("inter_parallel") == [[(1,), (2,), (3,), (4,)]] * 4 and keys("inter_concat") == [[(1, 2, 3, 4)]] * 4
    prompted = read("d3", "intra_concat")
    assert prompted.images[2].prompts[0].caption == "the blue thing on the right of it. a dog"
    assert prompted.images[0].file == "scene/0.jpg" and prompted.counts["groups"] == 2


def test_omnilabel_asks_the_label_space_of_each_image(read):
    prompted = read("omnilabel")
    assert [[image_prompt.keys for image_prompt in image.image_prompts] for image in prompted.images] == [
        [(30, 31, 21, 22)],
        [(30, 22)],
    ]
    assert (
        prompted.images[0].prompts[0].caption
        == "Person. Cat. the red thing that stands on the left. not the blue thing"
    )
    (row,) = prediction_rows(prompted.item, prompted.images[1], [_found(([1, 2, 11, 22], 0.5, 1))])
    assert row == {"image_id": 9, "bbox": [1, 2, 10, 20], "description_ids": [22], "scores": [0.5]}


def _true_boxes(prompted, image_prompt, key):
    """The true boxes xywh of a key, in the files of the made sets."""
    content = json.loads(prompted.annotations.read_text()) if prompted.item.layout != "flickr" else {}
    own = [
        each
        for each in content.get("annotations", ())
        if each["image_id"] == image_prompt.id and not each.get("iscrowd")
    ]
    match prompted.item.layout:
        case "categories" | "d3":
            return [each["bbox"] for each in own if each["category_id"] == key]
        case "omnilabel":
            return [each["bbox"] for each in own if key in each["description_ids"]]
        case "expressions":
            return [each["bbox"] for each in own if each["category_id"] == 1]
        case "flickr":
            sentences = {
                (int(each.image), each.index): each for each in flickr.read_sentences(str(prompted.annotations))
            }
            return [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in sentences[image_prompt.id].phrases[key].boxes]
    raise AssertionError(prompted.item.layout)


@pytest.mark.parametrize(
    "name", ["coco", "lvis_minival", "flickr_val", "odinw_bccd", "refcocog_test", "grefcoco_testb", "d3", "omnilabel", "rf100vl_actions", "v3det"]
)  # fmt: skip
def test_perfect_answers_score_one_in_every_metric_of_the_table(name, read, tmp_path):
    for way in [each for each in SETS[name].modes if each.chunk != 1]:  # one sentence a prompt gives the same answers
        prompted, rows = read(name, way.name), []
        extra = 1 if prompted.item.widths == "plus_one" else 0
        for image in prompted.images:
            found = [
                _found(*(([x, y, x + w - extra, y + h - extra], 0.9, phrase) for phrase, key in enumerate(image_prompt.keys)
                         for x, y, w, h in _true_boxes(prompted, image_prompt, key)))
                for image_prompt in image.image_prompts
            ]  # fmt: skip
            rows += prediction_rows(prompted.item, image, found)
        (tmp_path / "found.json").write_text(json.dumps(join_rows(prompted.item, rows)))
        scored = [metric for metric in prompted.item.metrics if not metric.modes or way.name in metric.modes]
        assert scored
        for metric in scored:
            truth = sets.scored_annotations(prompted.item, str(tmp_path), metric.file, epath.Path(tmp_path / "derived"))
            module = importlib.import_module(f"glip_jax.evaluation.metrics.{metric.module}")
            result = module.score(str(truth), str(tmp_path / "found.json"), **metric.options)
            keys = {
                metric.main,
                *(each.key for each in prompted.item.published if (each.mode, each.metric) == (way.name, metric.label)),
            }
            numbers = {key: sets.number(result, key) for key in keys}
            # Of D3's boxes of all groups, one is not in the file of the groups that answers come from.
            expected = (3 + 51 / 101) / 4 if "all groups" in metric.label else 1
            assert numbers[metric.main] == pytest.approx(expected, abs=1e-4), (metric, result)
            assert all(sets._under(result, key) is not None for key in keys), (keys, result)


def test_retrieved_names_are_prompted_alone(read, tokenizer):
    """Keys are ids; the best detection of a name counts once, in whatever prompt it is."""
    prompted = read("v3det", modes=(sets.PromptMode("retrieved", chunk=1, retrieved=2),))
    assert prompted.images[0].file == "images/a0001/000000000011.jpg" and prompted.counts["prompts"] == 9
    rows = np.zeros(5, blocks.ROW)
    rows["image"], rows["prompt"], rows["score"] = [0, 0, 0, 2, 2], [2, 2, 0, 1, 1], [0.3, 0.2, 0.1, 0.5, 0.5]
    best = best_of_names(rows)
    assert best["score"].tolist() == pytest.approx([0.3, 0.1, 0.5])
    names = retrieved_names(prompted, [best[:2], best[:0], best[2:]])
    assert names == {11: [1, 3], 12: [2]}
    few = narrowed(prompted, names, tokenizer, CONFIG)
    assert [[each.keys for each in image.image_prompts] for image in few.images] == [[(1,), (3,)], [], [(2,)]]
    assert few.counts["prompts"] == 3 and few.images[2].prompts[0].caption == "dog"
    assert len(few.images[:2]) == 2 and few.images[:2][0] == few.images[0]
    with pytest.raises(sets.BenchmarkError, match="only for sets whose images have the same prompts"):
        narrowed(few, names, tokenizer, CONFIG)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("coco", lambda c: c["images"].append(c["images"][0]), "occurs twice in images"),
        ("coco", lambda c: c["categories"].append(c["categories"][0]), "occurs twice in categories"),
        ("coco", lambda c: c["images"][0].pop("file_name"), "expected it, or coco_url"),
        ("coco", lambda c: c["images"].clear(), "list no images: there is nothing to score"),
        ("refcoco_val", lambda c: c["images"][0].update(caption=" "), "expected a text"),
        ("omnilabel", lambda c: c["descriptions"][0].pop("image_ids"), "expected image_ids"),
        ("flickr_test", lambda c: c["images"].pop(), "lacks 1 of the 2 sentences"),
    ],
)  # fmt: skip
def test_bad_files_are_one_clear_message(name, change, message, tmp_path, tokenizer):
    item = dataclasses.replace(write_set(name, tmp_path), counts={})
    path = tmp_path / item.file("captions" if name.startswith("flickr") else "annotations").paths[0]
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises((sets.BenchmarkError, MetricError), match=message):
        read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG)


def test_images_of_a_set_that_was_downloaded_in_part(read, tmp_path):
    prompted = read("lvis_val")
    assert missing_images(prompted) == []
    (tmp_path / "coco/val2017/000000000632.jpg").write_bytes(b"")
    shutil.rmtree(tmp_path / "coco/train2017")
    assert sorted(missing_images(prompted)) == ["train2017/000000000285.jpg", "val2017/000000000632.jpg"]


def test_a_set_of_one_image_with_ids_as_text(tmp_path, tokenizer):
    item = dataclasses.replace(write_set("coco", tmp_path), counts={})
    path = tmp_path / item.file("annotations").paths[0]
    content = json.loads(path.read_text())
    content["images"] = [content["images"][0] | {"id": "11", "height": "48"}]
    content["annotations"] = [each | {"image_id": "11"} for each in content["annotations"] if each["image_id"] == 11]
    path.write_text(json.dumps(content))
    prompted = read_prompts(item, str(tmp_path), item.modes[0], tokenizer, CONFIG)
    assert (len(prompted.images), prompted.images[0].id, prompted.images[0].height) == (1, "11", 48)
