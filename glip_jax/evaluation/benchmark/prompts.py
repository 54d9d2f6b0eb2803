"""From official annotation files to prompts: the prompts of each image, and the keys of their phrases.

`read_prompts` gives the prompts of each image, the detector returns one `Detections` per prompt, and `prediction_rows` turns these
into rows of the file of predictions. No pixels are held.
"""

import dataclasses
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from etils import epath

from glip_jax.config import Config
from glip_jax.data.importers.coco_json import ImagePaths
from glip_jax.data.importers.entry import SourceError
from glip_jax.data.importers.readers import as_integer, identity
from glip_jax.evaluation.benchmark.prompted import (
    ImageEntry,
    ImagePrompt,
    PromptedImage,
    PromptedSet,
    SharedPrompts,
)
from glip_jax.evaluation.benchmark.sets import (
    BenchmarkError,
    BenchmarkSet,
    PromptMode,
    check_counts,
    in_val2017,
    version_notes,
)
from glip_jax.evaluation.metrics import d3, flickr
from glip_jax.evaluation.metrics.annotations import read_annotations
from glip_jax.evaluation.metrics.expressions import read_targets
from glip_jax.evaluation.metrics.files import Ids, objects
from glip_jax.evaluation.metrics.refexp import check_expression
from glip_jax.evaluation.recall import CaptionedImage, Phrase, fit_caption
from glip_jax.io import gcs
from glip_jax.structures.batch import Prompt
from glip_jax.structures.prompts import Tokenizer, clean_name, listed

__all__ = ["PromptBuilder", "missing_images", "mode_config", "read_prompts"]

_THREADS = 16

Texts = Mapping[Any, tuple[str, str, str]]
"""By key: prefix, the text that is scored, suffix."""
Parts = list[tuple[Prompt, tuple[Any, ...]]]
"""Prompts, each with the keys of its phrases."""


def mode_config(config: Config, mode: PromptMode) -> Config:
    """`config` with the input size, boxes kept, threshold, token scores and names per prompt of `mode`.

    Names do not compete (`detection.name_decay`), as in the published numbers.
    """
    detection = dataclasses.replace(
        config.detection, threshold=mode.threshold, max_detections=mode.boxes, token_scores=mode.token_scores, name_decay=0.0, rivals=()
    )  # fmt: skip
    evaluation = dataclasses.replace(
        config.evaluation, short_side=mode.short_side, long_side=mode.long_side, chunk=mode.chunk
    )
    return dataclasses.replace(config, detection=detection, evaluation=evaluation)


def read_prompts(
    item: BenchmarkSet,
    data: str,
    mode: PromptMode,
    tokenizer: Tokenizer,
    config: Config,
    order: Sequence[int] | int | None = None,
    other_counts: bool = False,
) -> PromptedSet:
    """Reads the annotation files of a set below `data`.

    `order`: order of the categories, or the seed of a shuffled order of categories, sentences or descriptions; None: by id. `other_counts`: files
    of another version than expected are only noted.

    Raises:
        MetricError: a file is missing, is not JSON or lacks a field, or ids are not unique.
        BenchmarkError: the counts are not those expected (another version of the file), no image or nothing to ask.
    """
    reader = _Reader(item, data, mode, tokenizer, config, order, other_counts)
    match item.layout:
        case "categories":
            return reader.categories()
        case "flickr":
            return reader.captions()
        case "expressions":
            return reader.expressions()
        case "d3":
            return reader.sentences()
        case "omnilabel":
            return reader.descriptions()


def missing_images(prompted: PromptedSet) -> list[str]:
    """The files of images that are missing or empty, by folder listings: a set that was downloaded in part."""
    folders = defaultdict[str, list[str]](list)
    for image in prompted.images:
        parent, _, name = image.file.rpartition("/")
        folders[parent].append(name)
    with ThreadPoolExecutor(_THREADS) as pool:
        sizes = dict(zip(folders, pool.map(lambda parent: _sizes(prompted.folder / parent), folders), strict=True))
    return [
        f"{parent}/{name}".lstrip("/")
        for parent, names in folders.items()
        for name in names
        if not sizes[parent].get(name)
    ]


def _sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of the files in a folder by name; empty if there is none."""
    if gcs.is_remote(folder):
        return {name: info.bytes for name, info in gcs.list_files(folder).items()}
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as found:
        return {each.name: each.stat().st_size for each in found if each.is_file()}


class PromptBuilder:
    """Builds the prompts of many texts."""

    def __init__(self, mode: PromptMode, tokenizer: Tokenizer, config: Config) -> None:
        self.tokenizer, self.limit = tokenizer, mode.chunk
        self.separator, self.budget = config.data.captions.separator, config.model.text.max_tokens
        self._lengths: dict[str, int] = {}

    def length(self, text: str) -> int:
        """Number of tokens without [CLS] and [SEP]."""
        return len(self.tokenizer.encode(text).ids) - 2

    def unasked(self, texts: Texts) -> tuple[list[Any], list[Any]]:
        """Keys of texts without a token, and of those that exceed the budget alone."""
        empty = [key for key, (_, text, _) in texts.items() if self._known(text) <= 0]
        return empty, [key for key, text in texts.items() if self._known("".join(text)) + 2 > self.budget]

    def grouped(self, texts: Texts) -> Parts:
        """Consecutive texts in prompts, as many as the limit and the token budget allow; each alone fits."""
        groups: list[list[Any]] = []
        for key in texts:
            full = not groups or (self.limit > 0 and len(groups[-1]) >= self.limit)
            if not full and self._fit([texts[each] for each in (*groups[-1], key)]):
                groups[-1].append(key)
            else:
                groups.append([key])
        return [(self.prompt([texts[key] for key in group]), tuple(group)) for group in groups]

    def prompt(self, texts: Sequence[tuple[str, str, str]]) -> Prompt:
        """The texts joined by the separator; a phrase is what stands between prefix and suffix (glip-reference 5.1)."""
        caption, spans = "", []
        for prefix, text, suffix in texts:
            caption += (self.separator if spans else "") + prefix
            spans.append(((len(caption), len(caption) + len(text)),))
            caption += text + suffix
        return Prompt(caption, tuple(spans))

    def _fit(self, texts: Sequence[tuple[str, str, str]]) -> bool:
        # The sum is exact where the separator ends in a space; the caption itself decides near the budget.
        separators = (len(texts) - 1) * self._known(self.separator)
        if sum(self._known("".join(text)) for text in texts) + separators + 2 <= 0.9 * self.budget:
            return True
        return self.length(self.prompt(texts).caption) + 2 <= self.budget

    def _known(self, text: str) -> int:
        if text not in self._lengths:
            self._lengths[text] = self.length(text)
        return self._lengths[text]


class _Reader:
    """Reads the prompts of one set in one prompt mode."""

    def __init__(
        self, item: BenchmarkSet, data: str, mode: PromptMode, tokenizer: Tokenizer, config: Config, order: Sequence[int] | int | None,
        other_counts: bool,
    ) -> None:  # fmt: skip
        self.item, self.data, self.mode, self.order = item, data, mode, order
        self.prompts = PromptBuilder(mode, tokenizer, config)
        self.annotations, self.folder = item.path("annotations", data), item.path("images", data)
        self.counts, self.notes = Counter[str](), list[str]()
        self._paths = ImagePaths(self.folder)
        self._by_url: bool | None = None
        self._other_counts = other_counts

    def categories(self) -> PromptedSet:
        """All categories are asked of all images."""
        entries = self._images()
        names, boxes = self._categories()
        hand = self.item.prompts if self.mode.name == "prompts" else {}
        texts = {key: hand.get(name, ("", clean_name(name), "")) for key, name in names.items()}
        if hand and not any(name in hand for name in names.values()):
            self.notes.append(
                f"none of the categories has a hand-written prompt: expected {listed(list(hand))}, found {listed(list(names.values()))}"
            )
        parts = self._parts(texts, names)
        self.counts |= {"images": len(entries), "categories": len(names), "boxes": boxes}
        return self._made(SharedPrompts(entries, parts), names)

    def captions(self) -> PromptedSet:
        """The phrases of Flickr30k's captions that have a box; an image has about five captions."""
        every = [*flickr.read_sentences(str(self.annotations))]
        sentences = {(each.image, each.index): each for each in every if each.phrases}
        captions = self._mdetr_captions(sentences) if self._has("captions") else self._release_captions(sentences)
        prompted = defaultdict[str, list[ImagePrompt]](list)
        sizes: dict[str, tuple[int | None, int | None]] = {}
        for (image, index), (file, size, caption, spans) in captions.items():
            self.counts |= {"captions": self.counts["captions"] + 1, "phrases": self.counts["phrases"] + len(spans)}
            whole = CaptionedImage(None, {}, caption, tuple(Phrase(each, None) for each in spans))
            fitted = fit_caption(whole, self.prompts.tokenizer, self.prompts.budget)
            self.counts["captions cut"] += bool(fitted.over_budget)
            self.counts["phrases over budget or without token"] += len(fitted.over_budget) + len(fitted.without_token)
            number = as_integer(image)
            key = (image if number is None else number, index)
            prompted[file].append(ImagePrompt(key, fitted.prompt, fitted.included, len(spans)))
            sizes[file] = size
        self.counts["images"] = len({each.image for each in every})
        if left_out := self.counts["phrases over budget or without token"]:
            self.notes.append(f"{left_out} of {self.counts['phrases']} phrases cannot be asked and count as missed")
        return self._made([PromptedImage(file, file, *sizes[file], tuple(each)) for file, each in prompted.items()], {})

    def expressions(self) -> PromptedSet:
        """Whole expressions; those of one image file are asked together."""
        prompted = defaultdict[str, list[ImagePrompt]](list)
        sizes: dict[str, tuple[int | None, int | None]] = {}
        data_sets: dict[Any, str] = {}
        for entry, fields in self._entries():
            if entry.id in data_sets:
                raise BenchmarkError(
                    f"{self.annotations}: the id {entry.id!r} occurs twice in images: ids must be unique"
                )
            caption = self._text(fields, "caption")
            caption = caption if caption.endswith(".") else f"{caption}. "
            prompt = self._fitting(caption, entry.id)
            prompted[entry.file].append(ImagePrompt(entry.id, prompt, (entry.id,) if prompt else ()))
            sizes[entry.file] = entry.height, entry.width
            data_sets[entry.id] = str(fields.get("dataset_name") or "")
        ids = Ids(data_sets, "images", str(self.annotations))
        targets = read_targets(str(self.annotations), ids)
        if any(metric.module == "refexp" for metric in self.item.metrics):
            for key, own in zip(ids.keys, targets, strict=True):
                check_expression(str(self.annotations), key, data_sets[key], len(own))
        boxes, without = sum(map(len, targets)), sum(not len(own) for own in targets)
        self.counts |= {
            "images": len(prompted),
            "expressions": len(ids),
            "boxes": boxes,
            "expressions without target": without,
        }
        return self._made([PromptedImage(file, file, *sizes[file], tuple(each)) for file, each in prompted.items()], {})

    def sentences(self) -> PromptedSet:
        """D3: the sentences of the image's group (intra), or all (inter)."""
        entries = self._images()
        names = {key: text for key, text, _ in self._listed_categories()}
        texts = {key: ("", text.strip().removesuffix("."), "") for key, text in names.items()}
        boxes = sum(1 for _ in objects(self.annotations, "annotations", "annotations"))
        self.counts |= {"images": len(entries), "categories": len(names), "boxes": boxes}
        if self.mode.name.startswith("inter"):
            return self._made(SharedPrompts(entries, self._parts(texts, names)), names)
        pickles = d3.read_pickles(str(self.item.path("pickles", self.data)))
        images, groups = pickles["images"], pickles["groups"]
        made: dict[Any, Parts] = {}

        def parts_of(entry: ImageEntry) -> Parts:
            group = images.get(entry.id, {}).get("group_id")
            inner = groups.get(group, {}).get("inner_sent_id")
            if inner is None:
                raise BenchmarkError(
                    f"{self.item.name}: images.pkl and groups.pkl give no sentences for image {entry.id}, which {self.annotations} lists"
                )
            if group not in made:
                keys = sorted(key for key in inner if key in texts)
                made[group] = self._parts({key: texts[key] for key in keys}, names) if keys else []
            return made[group]

        prompted = [
            PromptedImage(*entry, tuple(ImagePrompt(entry.id, *part) for part in parts_of(entry))) for entry in entries
        ]
        self.counts["groups"] = len(made)
        return self._made(prompted, names)

    def descriptions(self) -> PromptedSet:
        """OmniLabel: the descriptions of the label space of each image."""
        entries = self._images()
        texts: dict[Any, str] = {}
        spaces = defaultdict[Any, list[Any]](list)
        for item in objects(self.annotations, "descriptions", "annotations"):
            key = self._id(item, "descriptions")
            if not isinstance(item.get("image_ids"), list):
                raise BenchmarkError(
                    f"{self.annotations}, description {key!s:.40}: expected image_ids, the images whose label space holds it"
                )
            if key in texts:
                raise BenchmarkError(
                    f"{self.annotations}: the id {key!r} occurs twice in descriptions: ids must be unique"
                )
            texts[key] = self._text(item, "text")
            for image in item["image_ids"]:
                spaces[self._ids.find(image)].append(key)
        boxes = sum(1 for _ in objects(self.annotations, "annotations", "annotations"))
        self.counts |= {"images": len(entries), "descriptions": len(texts), "boxes": boxes}
        pieces = {key: ("", text.strip().removesuffix("."), "") for key, text in texts.items()}
        left_out = self._unasked(pieces, texts)

        def image_prompts(entry: ImageEntry) -> tuple[ImagePrompt, ...]:
            keys = [key for key in self._ordered(spaces.get(self._ids.find(entry.id), [])) if key not in left_out]
            return tuple(
                ImagePrompt(entry.id, *part) for part in self.prompts.grouped({key: pieces[key] for key in keys})
            )

        return self._made([PromptedImage(*entry, image_prompts(entry)) for entry in entries], texts)

    # The parts that the layouts share.

    def _made(self, images: Sequence[PromptedImage], names: Mapping[Any, str]) -> PromptedSet:
        self.counts["prompts"] = (
            len(images) * len(images[0].prompts) if isinstance(images, SharedPrompts) and images
            else sum(len(image.prompts) for image in images)
        )  # fmt: skip
        counts = dict(self.counts)
        if not self._other_counts:
            check_counts(self.item, counts, str(self.annotations))
        versions = version_notes(self.item, counts, str(self.annotations))
        if not images or not counts["prompts"]:
            raise BenchmarkError(
                f"{self.item.name}: {self.annotations} asks nothing of {len(images)} images: is it the published file?"
            )
        versions += self._other_list(images)
        return PromptedSet(
            self.item,
            self.mode,
            self.annotations,
            self.folder,
            images,
            counts,
            names,
            (*self.notes, *versions),
            not versions,
        )

    def _other_list(self, images: Sequence[PromptedImage]) -> list[str]:
        """A note on an image list whose hash is not the expected one. Whether the list ends in a line end is not published."""
        if not self.item.stems_sha256:
            return []
        lines = "\n".join(sorted(PurePosixPath(image.file).stem.rpartition("_")[2].zfill(12) for image in images))
        found = [hashlib.sha256(text.encode()).hexdigest() for text in (lines, f"{lines}\n")]
        if self.item.stems_sha256 in found:
            return []
        return [
            f"the SHA-256 of the names of its images is {found[0]}, expected {self.item.stems_sha256}: it is another image list"
        ]

    def _has(self, role: str) -> bool:
        known = any(each.role == role for each in self.item.files)
        return known and gcs.kind(self.item.path(role, self.data)) == "file"

    def _entries(self, role: str = "annotations") -> Iterator[tuple[ImageEntry, dict[str, Any]]]:
        """The images of an annotation file with all their fields."""
        path = self.item.path(role, self.data)
        for item in objects(path, "images", "annotations"):
            url, file, key = item.get("coco_url"), item.get("file_name"), self._id(item, "images")
            if not isinstance(file or url, str):
                raise BenchmarkError(
                    f"{path}: image {key!s:.40} has the file_name {file!r:.40}: expected it, or coco_url"
                )
            if self.item.image_rule == "val2017" and not in_val2017(item):
                continue
            # LVIS v1 has no file_name: the last two parts of the address are folder and file.
            tail = "/".join(url.split("/")[-2:]) if isinstance(url, str) else ""
            if self._by_url is None:
                self._by_url = not file or bool(tail and not self._exists(file) and self._exists(tail))
            try:
                place = self._paths.find(tail if self._by_url or not file else str(file))
            except SourceError as error:
                raise BenchmarkError(f"{self.item.name}: {error}") from None
            yield ImageEntry(key, place, as_integer(item.get("height")), as_integer(item.get("width"))), item

    def _exists(self, name: str) -> bool:
        parts = ImagePaths.parts(name)
        return any(gcs.kind(self.folder / "/".join(parts[i:])) == "file" for i in range(len(parts)))

    def _images(self) -> list[ImageEntry]:
        if self.item.form == "coco":
            read_annotations(str(self.annotations))  # what scoring refuses is refused before hours of detection
        entries = [entry for entry, _ in self._entries()]
        self._ids = Ids((entry.id for entry in entries), "images", str(self.annotations))
        return entries

    def _id(self, item: Mapping[str, Any], what: str) -> int | str:
        """The id of an object; 1.0 is 1."""
        try:
            return identity({"id": None, **item}, "id", f"{self.annotations}: an object of {what}")
        except SourceError as error:
            raise BenchmarkError(str(error)) from None

    def _text(self, item: Mapping[str, Any], key: str) -> str:
        text = item.get(key)
        if not isinstance(text, str) or not text.strip():
            raise BenchmarkError(
                f"{self.annotations}, {item.get('id')!r:.40} has the {key} {text!r:.60}: expected a text"
            )
        return text

    def _listed_categories(self) -> list[tuple[Any, str, Any]]:
        """id, name and supercategory in the order of the ids."""
        listed_: dict[int | str, tuple[str, Any]] = {}
        for entry in objects(self.annotations, "categories", "annotations"):
            key = self._id(entry, "categories")
            if not isinstance(entry.get("name"), str | int):
                raise BenchmarkError(
                    f"{self.annotations}: category {key!s:.40} has the name {entry.get('name')!r:.40}: expected a text"
                )
            if key in listed_:
                raise BenchmarkError(
                    f"{self.annotations}: the id {key!r} occurs twice in categories: ids must be unique"
                )
            listed_[key] = str(entry["name"]), entry.get("supercategory")
        keys = Ids(listed_, "categories", str(self.annotations)).keys
        return [(key, *listed_[key]) for key in keys]

    def _categories(self) -> tuple[dict[Any, str], int]:
        """Names by id, and the number of boxes.

        The unused class of an export is left out: a background, or one that others name as their supercategory.
        """
        categories_ = self._listed_categories()
        ids = Ids((key for key, _, _ in categories_), "categories", str(self.annotations))
        boxes = Counter[int]()
        for box in objects(self.annotations, "annotations", "annotations"):
            if self.item.image_rule == "all" or self._ids.find(box.get("image_id")) >= 0:
                boxes[ids.find(box.get("category_id"))] += 1
        if boxes[-1]:
            self.notes.append(f"{boxes[-1]} boxes are of categories that {self.annotations} does not list")
        above = [above for _, name, above in categories_ if above != name]
        names = {}
        for index, (key, name, _) in enumerate(categories_):
            background = name.strip("_ ").lower() in ("background", "bg")
            if not boxes[index] and (background or name in above) and len(categories_) > 1:
                self.notes.append(
                    f"category {key}, {name!r}, is not asked: it has no box and is a heading or the background"
                )
            else:
                names[key] = name
        return names, boxes.total()

    def _parts(self, texts: Texts, names: Mapping[Any, str]) -> Parts:
        """Prompts for texts in the order of asking."""
        unasked = self._unasked(texts, names)
        return self.prompts.grouped({key: texts[key] for key in self._ordered(list(texts)) if key not in unasked})

    def _ordered(self, keys: Sequence[Any]) -> list[Any]:
        match self.order:
            case None:
                return list(keys)
            case int(seed):
                return [keys[i] for i in np.random.default_rng(seed).permutation(len(keys))]
            case chosen:
                return [keys[i] for i in chosen]

    def _unasked(self, texts: Texts, names: Mapping[Any, str]) -> set[Any]:
        """Keys of texts that cannot be asked; noted."""
        empty, long = self.prompts.unasked(texts)
        for what, found in (
            ("no word or character that the vocabulary reads", empty),
            (f"more than {self.prompts.budget} tokens", long),
        ):
            if found:
                shown = listed([names[key] for key in found])
                self.notes.append(f"{len(found)} of {len(texts)} are not asked and count as not found, {what}: {shown}")
        return {*empty, *long}

    def _fitting(self, caption: str, key: Any) -> Prompt | None:
        """The prompt of an expression, all of it one phrase; None, noted, if it is beyond the budget or has no token."""
        length, budget = self.prompts.length(caption) + 2, self.prompts.budget
        if 2 < length <= budget:
            return Prompt(caption, (((0, len(caption.rstrip())),),))
        self.notes.append(f"expression {key} is not asked and counts as not found: {length} tokens, at most {budget}")
        return None

    def _mdetr_captions(self, sentences: Mapping[tuple[str, int], flickr.Sentence]) -> dict[tuple[str, int], Any]:
        """File, size, caption and spans of each sentence, from MDETR's JSON."""
        path, found = self.item.path("captions", self.data), {}
        for entry, fields in self._entries("captions"):
            image, index = fields.get("original_img_id"), as_integer(fields.get("sentence_id"))
            if image is None or index is None or not isinstance(fields.get("tokens_positive_eval"), list):
                raise BenchmarkError(
                    f"{path}, image {entry.id!r:.40}: expected original_img_id, sentence_id and tokens_positive_eval"
                )
            number = as_integer(image)
            key = (str(image if number is None else number), index)
            caption = self._text(fields, "caption")
            spans = [
                self._spans(phrase, caption, f"{path}, image {entry.id!r:.40}")
                for phrase in fields["tokens_positive_eval"]
            ]
            if key in sentences and len(spans) != len(sentences[key].phrases):
                raise BenchmarkError(
                    f"{path}, sentence {index} of image {key[0]} has {len(spans)} phrases, {self.annotations} has "
                    f"{len(sentences[key].phrases)} with a box: the files are of different versions"
                )
            if key in sentences:
                found[key] = (entry.file, (entry.height, entry.width), caption, spans)
        if missing := [key for key in sentences if key not in found]:
            raise BenchmarkError(
                f"{path} lacks {len(missing)} of the {len(sentences)} sentences of {self.annotations}, first sentence "
                f"{missing[0][1]} of image {missing[0][0]}: expected the file of the same split"
            )
        return found

    def _spans(self, phrase: Any, caption: str, where: str) -> tuple[tuple[int, int], ...]:
        """The (begin, end) characters of a phrase of tokens_positive_eval."""
        pairs = [tuple(each) if isinstance(each, list) else each for each in phrase] if isinstance(phrase, list) else []
        for each in pairs or [phrase]:
            whole = isinstance(each, tuple) and len(each) == 2 and all(type(value) is int for value in each)
            if not whole or not 0 <= each[0] < each[1] <= len(caption):
                raise BenchmarkError(
                    f"{where} has the span {each!r:.40} in tokens_positive_eval: expected [begin, end] within its caption of "
                    f"{len(caption)} characters"
                )
        return tuple(pairs)

    def _release_captions(self, sentences: Mapping[tuple[str, int], flickr.Sentence]) -> dict[tuple[str, int], Any]:
        """The same, from the sentences of the release: the words without their markup, joined by spaces."""
        found = {}
        for (image, index), sentence in sentences.items():
            file = self._paths.find(f"{image}.jpg")
            found[image, index] = (file, (None, None), sentence.caption, [(each.span,) for each in sentence.phrases])
        return found
