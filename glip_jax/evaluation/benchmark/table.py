"""The table of all sets of the benchmark and of their groups.

Facts (files, protocols, licences) and published numbers have their source beside them. What is not known is left out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from glip_jax.evaluation.benchmark.sets import (
    ABSENCE,
    BenchmarkSet,
    Group,
    Metric,
    PromptMode,
    Published,
    SetFile,
    read_values,
)

__all__ = ["GROUPS", "SETS"]

_COCO_LICENCE = "annotations CC BY 4.0; each photograph has its own licence"
_LVIS_LICENCE = "annotations CC BY 4.0; photographs as of COCO"
_GLIP = "arXiv 2112.03857"
_GDINO = "arXiv 2303.05499"
_MMDET_GLIP = "mmdetection, configs/glip/README.md"
_MMDET = "mmdetection, configs/mm_grounding_dino/README.md"
_NOT_STATED: Mapping[str, Any] = {"protocol": "not stated"}

_AS_GLIP: Mapping[str, Any] = {"short_side": 800, "long_side": 1333, "threshold": 0.05, "token_scores": "mean", "order": "by id"}  # fmt: skip
_ONE_PROMPT = {**_AS_GLIP, "chunk": 0, "boxes": 100, "widths": "plus_one"}
_MMDET_ONE = {**_AS_GLIP, "chunk": 0, "boxes": 300, "widths": "plain"}


def _rows(
    mode: str, metric: str, keys: str, rows: Mapping[str, str], source: str, protocol: Mapping[str, Any]
) -> tuple[Published, ...]:
    """Published numbers: `keys` separated by "|" or spaces, and per model as many numbers ("-" for none)."""
    return tuple(
        Published(model, mode, metric, key, float(value), source, protocol)
        for model, values in rows.items()
        for key, value in zip(keys.split("|" if "|" in keys else None), values.split(), strict=True)
        if value != "-"
    )


def _below(folders: Iterable[str], path: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{path}" if folder else path for folder in folders)


def _coco() -> BenchmarkSet:
    return BenchmarkSet(
        name="coco", title="COCO val2017", layout="categories", form="coco",
        files=(
            SetFile("annotations", _below(("coco", "", "COCO"), "annotations/instances_val2017.json")),
            SetFile("images", (*_below(("coco", "", "COCO"), "val2017"), "coco/images/val2017")),
        ),
        modes=(PromptMode("names", prompts=1),), metrics=(Metric("AP", "coco", "AP"),), licence=_COCO_LICENCE,
        counts={"images": 5000, "categories": 80}, prompt_rule="the 80 names in the order of their ids, joined by \". \"", widths="plus_one",
        published=(
            *_rows("names", "AP", "AP", {"GLIP-T (A)": "42.9", "GLIP-T (B)": "44.9", "GLIP-T (C)": "46.7", "GLIP-T": "46.3", "GLIP-L": "49.8"},
                   f"{_GLIP}, Table 2 (best checkpoint)", _ONE_PROMPT),
            *_rows("names", "AP", "AP", {"GLIP-T (CC3M, SBU)": "46.6", "GLIP-L (released)": "51.4"}, "microsoft/GLIP README", _ONE_PROMPT),
            *_rows("names", "AP", "AP", {"GLIP-T (A), mmdetection": "43.0", "GLIP-T (B), mmdetection": "44.9", "GLIP-T (C), mmdetection": "46.7",
                                         "GLIP-T (CC3M, SBU), mmdetection": "46.6", "GLIP-L, mmdetection": "51.3"}, _MMDET_GLIP, _MMDET_ONE),
            *_rows("names", "AP", "AP", {"Grounding DINO-T": "48.4", "MM-Grounding-DINO-T": "50.4"}, _MMDET, _MMDET_ONE),
        ),
    )  # fmt: skip


_AT_FALSE_ALARMS = {
    "Grounding DINO-T": "3.7 9.8 21.1", "MM-Grounding-DINO-T": "7.6 14.8 25.7", "LLMDet-T": "4.5 14.0 25.8",
    "YOLO-World-L": "18.9 23.8 24.5", "OV-DINO-T": "27.4 31.6 33.6",
}  # fmt: skip
"""Standard AP in percent at 0.01, 0.05 and 0.25 false alarms; one name a prompt."""


def _lvis() -> tuple[BenchmarkSet, BenchmarkSet]:
    metrics = (
        Metric("fixed AP", "lvis", "AP", {"fixed": True, "top": 10_000}),
        Metric("standard AP", "lvis", "AP", {"fixed": False, "top": 300}),
        ABSENCE,
    )
    modes = (
        PromptMode("names", chunk=40, boxes=300, prompts=31),
        PromptMode("names_parallel", chunk=1, boxes=300, prompts=1203, default=False),
    )
    chunks = {**_AS_GLIP, "chunk": 40, "boxes": 300, "boxes_per_image": 0, "widths": "plain"}
    keys, mmdet = "APr APc APf AP", {**chunks, "max_per_img": 300}
    val_files = (
        *_below(("lvis", "coco/annotations", "annotations", "lvis/annotations", ""), "lvis_v1_val.json"),
        "coco/annotations/lvis_od_val.json",
    )
    mini_files = (
        *_below(("lvis", "coco/annotations", "mdetr_annotations", "lvis/annotations", ""), "lvis_v1_minival.json"),
        *_below(("coco/annotations", "lvis", ""), "lvis_v1_minival_inserted_image_name.json"),
    )  # fmt: skip
    images = SetFile("images", ("coco", "COCO", "lvis", "."))
    rule = 'names without parentheses, 40 a prompt in the order of their ids, joined by ". "'
    minival = BenchmarkSet(
        name="lvis_minival", title="LVIS v1 minival", layout="categories", form="coco",
        files=(SetFile("annotations", (*mini_files, *val_files)), images), modes=modes, metrics=metrics, licence=_LVIS_LICENCE,
        counts={"images": 4809, "categories": 1203}, prompt_rule=rule, image_rule="val2017",
        stems_sha256="0b3fa2758c8605c73a4b16fa47fab35f42546144f7dc21f4e99aeb6335a0c9ab",
        published=(
            *_rows("names", "fixed AP", keys, {
                "GLIP-T (A)": "14.2 13.9 23.4 18.5", "GLIP-T (B)": "13.5 12.8 22.2 17.8", "GLIP-T (C)": "17.7 19.5 31.0 24.9",
                "GLIP-T": "20.8 21.4 31.0 26.0", "GLIP-L": "28.2 34.3 41.5 37.3"}, f"{_GLIP}, Table 3 (best checkpoint on this set)", chunks),
            *_rows("names", "fixed AP", keys, {"GLIP-T (CC3M, SBU)": "20.1 21.3 31.1 25.9"}, f"{_GLIP}, Table 6", chunks),
            *_rows("names", "fixed AP", keys, {
                "GLIP-T (C, released)": "14.3 19.4 31.1 24.6", "GLIP-L (released)": "29.2 34.9 42.1 37.9"}, f"{_MMDET_GLIP}, official code", chunks),
            *_rows("names", "fixed AP", keys, {
                "GLIP-T (A), mmdetection": "12.1 15.5 25.8 20.2", "GLIP-T (B), mmdetection": "8.6 13.9 26.0 19.3",
                "GLIP-T (C), mmdetection": "14.4 19.8 31.9 25.2", "GLIP-T (CC3M, SBU), mmdetection": "18.1 21.2 33.1 26.7",
                "GLIP-L, mmdetection": "27.9 33.7 39.7 36.1"}, _MMDET_GLIP, mmdet),
            *_rows("names", "fixed AP", keys, {
                "Grounding DINO-T": "18.8 24.2 34.7 28.8", "MM-Grounding-DINO-T": "34.2 37.4 46.2 41.4"}, _MMDET, mmdet),
            *_rows("names_parallel", ABSENCE.label, "rates.0.01.AP rates.0.05.AP rates.0.25.AP", _AT_FALSE_ALARMS, "Tractor-Dogs (ICLR 2026), second hand",
                   {**_NOT_STATED, "chunk": 1}),
            *_rows("names", "fixed AP", "APr AP", {"LLMDet-T": "37.3 44.7", "LLMDet-L": "45.1 51.1"}, "iSEE-Laboratory/LLMDet README", mmdet),
        ),
        notes=("the paper says 5,000 images, the set has 4,809",),
    )  # fmt: skip
    val = BenchmarkSet(
        name="lvis_val", title="LVIS v1 val", layout="categories", form="coco", files=(SetFile("annotations", val_files), images),
        modes=modes, metrics=metrics, licence=_LVIS_LICENCE, counts={"images": 19809, "categories": 1203}, prompt_rule=rule,
        published=(
            *_rows("names", "fixed AP", keys, {
                "GLIP-T (A)": "6.0 8.0 19.4 12.3", "GLIP-T (B)": "4.2 7.6 18.6 11.3", "GLIP-T (C)": "7.5 11.6 26.1 16.5",
                "GLIP-T": "10.1 12.5 25.5 17.2", "GLIP-L": "17.1 23.3 35.4 26.9"}, f"{_GLIP}, Table 3 (best checkpoint)", chunks),
            *_rows("names", "fixed AP", keys, {
                "GLIP-T (A), mmdetection": "6.2 10.9 22.8 14.7", "GLIP-T (B), mmdetection": "4.6 9.8 22.6 13.9",
                "GLIP-T (C), mmdetection": "8.3 13.2 28.1 18.2", "GLIP-T (CC3M, SBU), mmdetection": "10.8 14.7 29.0 19.6",
                "GLIP-L, mmdetection": "20.2 25.8 35.3 28.5"}, _MMDET_GLIP, mmdet),
            *_rows("names", "fixed AP", "AP", {"Grounding DINO-T": "20.1", "MM-Grounding-DINO-T": "31.9"}, _MMDET, mmdet),
        ),
        notes=("its images are of train2017 and val2017 of COCO: a model that trained on COCO or its captions has seen most",),
    )  # fmt: skip
    return minival, val


_FLICKR = {
    "val": ({"GLIP-T (GoldG only)": "84.0 95.1 96.8", "GLIP-T (C)": "84.8 94.9 96.3", "GLIP-T": "85.7 95.4 96.9", "GLIP-L": "86.7 96.4 97.9"},
            {"GLIP-T (C), mmdetection": "84.9 94.9 96.3", "GLIP-T (CC3M, SBU), mmdetection": "85.3 95.5 96.9"},
            {"MDETR-R101": "82.3 91.8 93.7"}),
    "test": ({"GLIP-T (GoldG only)": "84.4 95.3 97.0", "GLIP-T (C)": "85.5 95.4 96.6", "GLIP-T": "85.7 95.8 97.2", "GLIP-L": "87.1 96.9 98.1"},
             {"GLIP-T (C), mmdetection": "85.6 95.4 96.7", "GLIP-T (CC3M, SBU), mmdetection": "86.0 95.9 97.2"},
             {"MDETR-R101": "83.8 92.7 94.4"}),
}  # fmt: skip


def _flickr(split: str) -> BenchmarkSet:
    any_box, merged_boxes = ("any_box.1.all any_box.5.all any_box.10.all", "merged_boxes.1.all merged_boxes.5.all merged_boxes.10.all")  # fmt: skip
    paper, mmdet, mdetr = _FLICKR[split]
    release = ("flickr30k/flickr30k_entities", "flickr30k_entities", "flickr30k/flickr30k", "flickr30k")
    captions = [f"{folder}final_flickr_{kind}GT_{split}.json" for folder in ("mdetr_annotations/", "flickr30k/", "") for kind in ("separate", "merged")]  # fmt: skip
    return BenchmarkSet(
        name=f"flickr_{split}", title=f"Flickr30k Entities {split}", layout="flickr", form="flickr",
        files=(
            SetFile("annotations", _below(release, f"{split}.txt")),
            SetFile("captions", tuple(captions), optional=True),
            SetFile("images", ("flickr30k/flickr30k-images", "flickr30k-images", f"flickr30k/flickr30k_images/{split}", "flickr30k/flickr30k_images",
                               "flickr30k/images")),
        ),
        modes=(PromptMode("caption", prompts=5),),
        metrics=(Metric("R@1 (any box)", "flickr", "any_box.1.all"), Metric("R@1 (merged boxes)", "flickr", "merged_boxes.1.all")),
        licence="not known: see the page of Flickr30k Entities", counts={"images": 1000},
        prompt_rule="the caption as it is; the phrases that have a box",
        published=(
            *_rows("caption", "R@1 (any box)", any_box, paper, f"{_GLIP}, Table 4 (best checkpoint)", {**_AS_GLIP, "boxes": 100}),
            *_rows("caption", "R@1 (any box)", any_box, mmdet, _MMDET_GLIP, {**_AS_GLIP, "boxes": 100}),
            *_rows("caption", "R@1 (merged boxes)", merged_boxes, mdetr, "arXiv 2104.12763, tuned for merged boxes", _NOT_STATED),
        ),
    )  # fmt: skip


_REFEXP = {
    "refcoco": ("RefCOCO", ("val", "testA", "testB"), {
        "GLIP-T (O365, GoldG)": "49.96 54.69 43.06", "GLIP-T": "50.42 54.30 43.83", "Grounding DINO-T": "50.41 57.24 43.21"}),
    "refcoco+": ("RefCOCO+", ("val", "testA", "testB"), {
        "GLIP-T (O365, GoldG)": "49.01 53.44 43.42", "GLIP-T": "49.50 52.78 44.59", "Grounding DINO-T": "51.40 57.59 45.81"}),
    "refcocog": ("RefCOCOg", ("val", "test"), {
        "GLIP-T (O365, GoldG)": "65.58 66.08", "GLIP-T": "66.09 66.89", "Grounding DINO-T": "67.46 67.13"}),
}  # fmt: skip
_REFEXP_IMAGES = {"refcoco": (1500, 750, 750), "refcoco+": (1500, 750, 750), "refcocog": (1300, 2600)}
"""Images of the splits above (unc; of RefCOCOg umd), by the catalog of TensorFlow Datasets, ref_coco."""
_EXPRESSION = PromptMode("expression", boxes=30, token_scores="max")
_SEEN = "its images are of COCO train2014: GoldG's mixed data and COCO train hold them unless they were removed"


def _expression_files(name: str, split: str) -> tuple[SetFile, ...]:
    return (
        SetFile("annotations", _below(("mdetr_annotations", name, "refexp", ""), f"finetune_{name}_{split}.json")),
        SetFile("images", (*_below(("coco", "", "COCO"), "train2014"), "coco/images/train2014")),
    )


def _refexp(name: str, split: str) -> BenchmarkSet:
    title, splits, rows = _REFEXP[name]
    mmdet = {"Grounding DINO-T, mmdetection": "50.8 89.5 94.9", "MM-Grounding-DINO-T, mmdetection": "53.1 - -"}
    protocol = {**_AS_GLIP, "token_scores": "max", "boxes": 30}
    return BenchmarkSet(
        name=f"{name}_{split.lower()}", title=f"{title} {split}", layout="expressions", form="expressions",
        files=_expression_files(name, split), modes=(_EXPRESSION,),
        metrics=(Metric("P@1 (GIoU)", "refexp", f"{name}.0", {"overlap": "giou"}), Metric("P@1 (IoU)", "refexp", f"{name}.0", {"overlap": "iou"})),
        licence="not known: see the page of the refer data sets; " + _COCO_LICENCE,
        prompt_rule="the expression and a full stop; a box has the highest score of the tokens", notes=(_SEEN,),
        reported={"images": _REFEXP_IMAGES[name][splits.index(split)]},
        published=(
            *(Published(model, "expression", "P@1 (GIoU)", f"{name}.0", float(values.split()[splits.index(split)]), f"{_GDINO}, Table 5", _NOT_STATED)
              for model, values in rows.items()),
            *(_rows("expression", "P@1 (IoU)", f"{name}.0 {name}.1 {name}.2", mmdet, _MMDET, protocol) if (name, split) == ("refcoco", "val") else ()),
        ),
    )  # fmt: skip


_GREFCOCO = {
    "val": {0.5: "39.3 70.4", 0.6: "40.5 83.8", 0.7: "41.3 91.8", 0.8: "41.5 96.8"}, "testA": {0.7: "27.2 90.2"}, "testB": {0.7: "29.7 93.5"},
}  # fmt: skip
_GREFCOCO_MM = {"val": "41.0 91.3", "testA": "26.1 93.0", "testB": "30.4 92.3"}


def _grefcoco(split: str) -> BenchmarkSet:
    first_target = {"metric": "mmdetection's, which reads only the first target"}
    return BenchmarkSet(
        name=f"grefcoco_{split.lower()}", title=f"gRefCOCO {split}", layout="expressions", form="expressions",
        files=_expression_files("grefcoco", split), modes=(_EXPRESSION,),
        metrics=tuple(
            Metric(f"Pr@(F1=1), threshold {threshold}{'' if overlap == 'giou' else ' (IoU)'}", "grefcoco", "F1_score",
                   {"overlap": overlap, "threshold": threshold})
            for threshold, overlap in ((0.7, "giou"), (0.7, "iou"), (0.3, "giou"), (0.4, "giou"), (0.5, "giou"), (0.6, "giou"), (0.8, "giou"))
        ) + (Metric("cgF1 at 0.05 false alarms", "absence", "rates.0.05.cgF1"),),
        licence="not known: see the page of gRefCOCO; " + _COCO_LICENCE,
        prompt_rule="the expression and a full stop; a box has the highest score of the tokens",
        published=(
            *(each for threshold, values in _GREFCOCO[split].items() for each in _rows(
                "expression", f"Pr@(F1=1), threshold {threshold}", "F1_score N_acc", {"Grounding DINO-T, mmdetection": values}, _MMDET, first_target)),
            *_rows("expression", "Pr@(F1=1), threshold 0.7", "F1_score N_acc", {"MM-Grounding-DINO-T, mmdetection": _GREFCOCO_MM[split]}, _MMDET,
                   first_target),
        ),
        notes=(_SEEN, "the official threshold is 0.7; choose another on val, then report it on testA and testB"),
    )  # fmt: skip


def _d3() -> BenchmarkSet:
    keys = "FULL PRES ABS"
    intra = ("intra_parallel", "intra_concat")
    metrics = (
        Metric("AP (FULL)", "d3", "FULL", modes=intra),
        Metric("AP (FULL), inter", "d3", "FULL", {"inter": True}, modes=("inter_parallel", "inter_concat")),
        Metric(
            "AP (FULL), inter, boxes of all groups",
            "d3",
            "all_groups.FULL",
            {"inter": True},
            modes=("inter_parallel", "inter_concat"),
        ),
        Metric(
            f"{ABSENCE.label}, boxes of all groups",
            "absence",
            ABSENCE.main,
            {"exhaustive": True},
            modes=("inter_parallel", "inter_concat"),
        ),
    )
    inter = {
        "GroundingDINO-B": "2.7 2.4 3.5",
        "UNINEXT-H": "3.3 3.9 1.6",
        "OFA-DOD": "5.7 6.9 2.3",
        "APE-L": "21.0 22.0 17.9",
    }
    one_each = {
        "GLIP-T (second hand)": "19.1 18.3 21.5", "FIBER-B": "22.7 21.5 26.0", "GroundingDINO-B": "20.7 20.1 22.5", "OWL-ViT-L": "9.6 10.7 6.4",
        "UNINEXT-H": "20.0 20.6 18.1", "OFA-DOD": "21.6 23.7 15.4", "APE-L": "37.5 38.8 33.9",
    }  # fmt: skip
    return BenchmarkSet(
        name="d3", title="D3, Described Object Detection", layout="d3", form="coco",
        files=(
            SetFile("annotations", _below(("d3/d3_json", "D3/d3_json", "d3_json", "d3"), "d3_full_annotations.json")),
            SetFile("pickles", ("d3/d3_pkl", "D3/d3_pkl", "d3_pkl")),
            SetFile("images", ("d3/d3_images", "D3/d3_images", "d3_images")),
        ),
        modes=(
            PromptMode("intra_parallel", chunk=1, prompts=4), PromptMode("intra_concat", prompts=1), PromptMode("inter_concat"),
            PromptMode("inter_parallel", chunk=1, prompts=422, default=False),
        ),
        metrics=metrics, licence="CC BY-NC 4.0 (as the package ddd-dataset states)", counts={"categories": 422},
        prompt_rule="intra: the sentences of the image's group; inter: all 422. parallel: one a prompt; concat: joined by \". \"",
        published=(
            *_rows("intra_parallel", "AP (FULL)", keys, {"MM-Grounding-DINO-T": "22.9 21.9 26.0"}, _MMDET, {"chunk": 1}),
            *_rows("intra_concat", "AP (FULL)", keys, {"MM-Grounding-DINO-T": "17.5 18.0 15.9"}, _MMDET, {"chunk": 0}),
            *_rows("intra_parallel", "AP (FULL)", keys, one_each, "shikras/d-cube README; GLIP-T from a later paper's table", _NOT_STATED),
            *_rows("inter_parallel", "AP (FULL), inter", keys, inter, "shikras/d-cube README", _NOT_STATED),
        ),
        notes=("ABS are 106 descriptions with a negation, which have targets: it does not measure absence, inter does",),
    )  # fmt: skip


def _omnilabel() -> BenchmarkSet:
    final = "harmonic mean of AP categ and AP descr"
    keys = (
        f"{final}|AP categ|AP descr|AP descr-pos|AP descr short (<=3 words)|AP descr medium (4-8)|AP descr long (>=9)"
    )
    return BenchmarkSet(
        name="omnilabel", title="OmniLabel val v0.1.3", layout="omnilabel", form="omnilabel",
        files=(
            SetFile("annotations", _below(("omnilabel", "omnilabel/annotations", ""), "dataset_all_val_v0.1.3.json")),
            SetFile("images", ("omnilabel/images", "omnilabel", ".")),
        ),
        modes=(PromptMode("descriptions", chunk=20),), metrics=(Metric("AP", "omnilabel", final),),
        licence="omnilabeltools MIT; photographs as of COCO, Objects365 and Open Images",
        notes=("some 28,000 descriptions and 25,000 images (README of omnilabeltools)",), prompt_rule="20 descriptions a prompt without the full stop at their end, joined by \". \"",
        published=_rows("descriptions", "AP", keys, {
            "GLIP-T": "19.3 23.6 16.4 25.8 29.4 14.8 8.2", "GLIP-L": "25.8 32.9 21.2 33.2 37.7 18.9 10.8",
            "FIBER-B": "25.7 30.3 22.3 34.8 38.6 19.5 12.4", "Detic": "8.0 15.6 5.4 8.0 5.7 5.4 6.2",
            "MDETR": "- - 4.7 9.1 6.4 4.6 4.0"}, "GLEE paper, Table 5", _NOT_STATED)
        + _rows("descriptions", "AP", f"{final}|AP categ", {"DesCo-GLIP-T": "23.8 -", "DesCo-FIBER": "29.3 -"}, "liunian-harold-li/DesCo README", {"chunk": 20}),
    )  # fmt: skip


def _v3det() -> BenchmarkSet:
    return BenchmarkSet(
        name="v3det", title="V3Det val", layout="categories", form="coco",
        files=(
            SetFile("annotations", _below(("v3det/annotations", "V3Det/annotations", "v3det"), "v3det_2023_v1_val.json")),
            SetFile("images", ("v3det", "V3Det")),
        ),
        # The cheap pass has some 240 prompts of a sixth of the pixels, then 300 names are 8 prompts.
        modes=(PromptMode("retrieved", chunk=40, boxes=300, prompts=46, retrieved=300),
               PromptMode("names", chunk=40, boxes=300, prompts=331, default=False)),
        metrics=(Metric("AP", "coco", "AP", {"top": 300}),),
        licence="annotations CC BY 4.0; photographs as V3Det states", counts={"images": 29821, "categories": 13204},
        prompt_rule="the 300 names with the highest scores in a pass over all 13,204 with small images, 40 a prompt in the order of their ids; or all",
        published=tuple(row for mode in ("retrieved", "names") for row in _rows(
            mode, "AP", "AP", {"Faster R-CNN R50 (supervised)": "25.4", "Cascade Swin-B (supervised)": "42.5"}, "V3Det/V3Det",
            {"training": "on V3Det"})),
    )  # fmt: skip


def _odinw(key: str, values: Mapping[str, Any], split: str) -> BenchmarkSet:
    folder, file = values[split]
    doubled = f"{folder.split('/')[0]}/"
    roots = ("odinw/", f"odinw/{doubled}", "", doubled)
    plain = file.replace("annotations_without_background.json", "_annotations.coco.json")
    modes = (
        (PromptMode("names", prompts=1), PromptMode("prompts", prompts=1))
        if values["prompts"]
        else (PromptMode("names", prompts=1),)
    )
    hand = "prompts" if values["prompts"] else "names"
    images = values["images"][split]
    published: tuple[Published, ...] = ()
    if split == "test":
        # GLIP-T (A) and (B) were asked with the other words of Rabbits and Mushrooms only.
        words = key in ("cottontailrabbits", "northamericamushrooms")
        published = tuple(
            Published(model, hand if words or not model.endswith(("(A)", "(B)")) else "names", "AP", "AP", value,
                      f"{_GLIP}, Table 14 (best checkpoint)", _ONE_PROMPT)
            for model, value in values.get("paper_test", {}).items()
        ) + tuple(
            Published(model, "names", "AP", "AP", value, f"{_GLIP}, Table 10", _ONE_PROMPT) for model, value in values.get("paper_test_names", {}).items()
        )  # fmt: skip
    else:
        published = tuple(
            Published(f"{model}, mmdetection's split", "names", "AP", "AP", value, f"{_MMDET_GLIP}, table of ODinW-35",
                      _ONE_PROMPT if model.startswith("GLIP") else _MMDET_ONE)
            for model, value in values["mmdet_valid"].items()
        )  # fmt: skip
    return BenchmarkSet(
        name=f"odinw_{key}{'' if split == 'test' else '_valid'}", title=f"ODinW {values['title']} {split}", layout="categories", form="coco",
        files=(
            SetFile("annotations", tuple(f"{root}{name}" for name in (file, plain) for root in roots)),
            SetFile("images", tuple(f"{root}{folder}" for root in roots)),
        ),
        modes=modes, metrics=(Metric("AP", "coco", "AP"),), licence="not known: each set has its own, see its Roboflow page",
        counts={"categories": len(values["classes"])}, reported={"images": images} if images else {}, widths="plus_one",
        prompt_rule="all names in one prompt in the order of their ids; GLIP's hand-written prompts where it has them",
        prompts={name: tuple(texts) for name, texts in values["prompts"].items()}, published=published,
        notes=("the published test numbers of PascalVOC are of its valid part",) if key == "pascalvoc" and split == "test" else (),
    )  # fmt: skip


def _rf100vl(name: str, values: Mapping[str, Any]) -> BenchmarkSet:
    roots = [f"{top}/{folder}" for top in ("rf100vl", "rf100-vl", "RF100-VL") for folder in (name, *values["folders"])]
    return BenchmarkSet(
        name=f"rf100vl_{name}", title=f"RF100-VL {name}", layout="categories", form="coco",
        files=(SetFile("annotations", _below(roots, "test/_annotations.coco.json")), SetFile("images", _below(roots, "test"))),
        modes=(PromptMode("names", boxes=500, prompts=1),),
        metrics=(Metric("AP", "coco", "AP", {"top": 100}), Metric("AP (500 boxes)", "coco", "AP", {"top": 500})),
        licence="Apache-2.0 (repository); sets mostly MIT or CC, each its own", domain=values["domain"],
        prompt_rule="all names in the order of their ids, without the unused class of the export",
        notes=("the download gives the latest version of each set: compare the hashes of the annotation files; all 100 sets together have "
               "14,237 test images (card of LibreYOLO/rf100-vl)",),
    )  # fmt: skip


def _groups(odinw: Mapping[str, Any]) -> dict[str, Group]:
    thirteen = [key for key, values in odinw.items() if values["odinw13"]]
    means = {
        "prompts": {"GLIP-T (C)": "44.4", "GLIP-T": "46.5", "GLIP-L": "52.1"},
        "names": {"GLIP-T (A)": "28.8", "GLIP-T (B)": "33.2"},
    }
    groups = [
        Group("odinw13", "ODinW-13, test", tuple(f"odinw_{key}" for key in thirteen), ("names", "prompts"), published=(
            *_rows("prompts", "AP", "mean", means["prompts"], f"{_GLIP}, Table 14 (best checkpoint)", _ONE_PROMPT),
            *_rows("names", "AP", "mean", means["names"], f"{_GLIP}, Table 14 (with the words of Rabbits and Mushrooms)",
                   {"prompts": "of Rabbits and Mushrooms only"}),
            *_rows("prompts", "AP", "mean", {"GLIP-T (released)": "42.7", "GLIP-L (released)": "51.2"}, "microsoft/GLIP README", _NOT_STATED),
        )),
        Group("odinw13_valid", "ODinW-13, valid (mmdetection's split)", tuple(f"odinw_{key}_valid" for key in thirteen), ("names", "prompts"), published=(
            *_rows("names", "AP", "mean", {"GLIP-T (A)": "32.4", "GLIP-T (B)": "31.8", "GLIP-T (C)": "39.2"}, f"{_MMDET_GLIP}, official code", _ONE_PROMPT),
            *_rows("prompts", "AP", "mean", {"Grounding DINO-T": "51.4", "MM-Grounding-DINO-T": "53.3"}, _MMDET, _MMDET_ONE),
        )),
        Group("odinw35", "ODinW-35, test", tuple(f"odinw_{key}" for key in odinw), ("names", "prompts"), published=(
            *_rows("prompts", "AP", "mean median", {"GLIP-T": "19.6 5.1"}, f"{_GDINO} (second hand)", _NOT_STATED),
            *_rows("prompts", "AP", "mean", {"Grounding DINO-T": "22.3", "Grounding DINO-L": "26.1"}, f"{_GDINO}, Table 4", _NOT_STATED),
        )),
        Group("odinw35_valid", "ODinW-35, valid (mmdetection's split)", tuple(f"odinw_{key}_valid" for key in odinw), ("names", "prompts"),
              published=_rows("names", "AP", "mean median", {"GLIP-T (C)": "18.3 2.8", "Grounding DINO-T": "22.7 8.9"},
                              f"averages of the rows of {_MMDET_GLIP}", {"prompts": "hand, package and holes only"})),
        Group("rf100vl", "RF100-VL, test", tuple(f"rf100vl_{name}" for name in read_values("rf100vl.json")), ("names",), published=_rows(
            "names", "AP", "mean", {"Grounding DINO": "15.7", "SAM 3": "15.2", "OWLv2 (second hand)": "13.6"}, "RF100-VL and SAM 3 papers", _NOT_STATED)),
        *(Group(name, title, tuple(f"{name}_{split.lower()}" for split in splits), ("expression",), summary=False)
          for name, (title, splits, _) in _REFEXP.items()),
        Group("grefcoco", "gRefCOCO", ("grefcoco_val", "grefcoco_testa", "grefcoco_testb"), ("expression",), summary=False),
        Group("lvis", "LVIS", ("lvis_minival", "lvis_val"), ("names",), summary=False),
        Group("flickr", "Flickr30k Entities", ("flickr_val", "flickr_test"), ("caption",), summary=False),
    ]  # fmt: skip
    return {group.name: group for group in groups}


def _sets(odinw: Mapping[str, Any]) -> dict[str, BenchmarkSet]:
    sets = [
        _coco(), *_lvis(), _flickr("val"), _flickr("test"),
        *(_odinw(key, values, split) for split in ("test", "valid") for key, values in odinw.items()),
        *(_refexp(name, split) for name, (_, splits, _) in _REFEXP.items() for split in splits),
        *(_grefcoco(split) for split in _GREFCOCO), _d3(), _omnilabel(), _v3det(),
        *(_rf100vl(name, values) for name, values in read_values("rf100vl.json").items()),
    ]  # fmt: skip
    return {item.name.lower(): item for item in sets}


_ODINW = read_values("odinw.json")
SETS: Mapping[str, BenchmarkSet] = _sets(_ODINW)
"""Every set by its name."""
GROUPS: Mapping[str, Group] = _groups(_ODINW)
"""Names that stand for several sets."""
