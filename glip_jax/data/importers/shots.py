"""Few-shot subsets of a data set, by the rule of the original GLIP: a shot is an image that holds the category, not a box."""

import random
from typing import Any

from etils import epath

from glip_jax.data.importers import coco_folders
from glip_jax.data.importers.entry import Report, as_numbers
from glip_jax.data.importers.layouts import Dataset, Split, read_split
from glip_jax.data.importers.sources import Source, folders_below

__all__ = ["draw_shots", "prepared_shots"]


def draw_shots(coco: dict[str, Any], shots: int, seed: int = 0) -> dict[str, Any]:
    """The images of a k-shot training set with all their boxes, in COCO's form.

    Images with a valid box (both sides above one pixel) are taken in order of their ids, shuffled by `random.Random(seed)` where
    `seed` is not 0. Each category has a quota of `shots` images; an image is kept if it holds a category whose quota is not
    used up, and takes one from the quota of each of its categories. A category may so get more images than `shots`, or fewer
    where there are none. Source: COCODataset of the original (maskrcnn_benchmark/data/datasets/coco.py; without a seed it is
    CocoGrounding's order). ValueError for fewer than one shot.
    """
    if shots < 1:
        raise ValueError(f"shots is {shots}: expected at least 1")
    held: dict[str, set[str]] = {}
    valid = set()
    for note in coco["annotations"]:
        held.setdefault(str(note["image_id"]), set()).add(str(note["category_id"]))
        box = as_numbers(note["bbox"], 4)
        if box is not None and box[2] > 1 and box[3] > 1:
            valid.add(str(note["image_id"]))
    images = [image for image in coco["images"] if str(image["id"]) in valid]
    images.sort(key=lambda image: (isinstance(image["id"], str), image["id"]))
    if seed:
        random.Random(seed).shuffle(images)
    quota = {str(category["id"]): shots for category in coco["categories"]}
    kept = []
    for image in images:
        own = held[str(image["id"])]
        if any(quota.get(category, 0) > 0 for category in own):
            kept.append(image)
            for category in own:
                quota[category] = quota.get(category, 0) - 1
    chosen = {str(image["id"]) for image in kept}
    notes = [note for note in coco["annotations"] if str(note["image_id"]) in chosen]
    return {**coco, "images": kept, "annotations": notes}


def prepared_shots(dataset: Dataset, shots: int, seed: int, split: str = "train") -> Split | None:
    """The prepared k-shot set of a data set, `fewshot_SPLIT_shot{k}_seed{s}.json` in it; None if it has none.

    ODinW has them beside the images of a split. Its categories are those of `dataset` by their names. Raises LayoutError for a
    file whose images or categories are not those of the data set.
    """
    of_split = dataset.splits[split]
    name = f"fewshot_{split}_shot{shots}_seed{seed}.json"
    root = epath.Path(dataset.folder)
    places = dict.fromkeys(
        [epath.Path(of_split.images), epath.Path(of_split.source).parent, root, *folders_below(root)]
    )
    file = next((place / name for place in places if (place / name).exists()), None)
    if file is None:
        return None
    source = Source(split, file, (epath.Path(of_split.images),), lambda _: coco_folders.read_coco(file))
    return read_split(source, root, Report(), of_split.coco["categories"])
