"""Pretrained weights read by glip_jax: `python -m tests.parity.real_weights [--captions=FILE] [--photographs=DIR]`.

MiniLM's hidden states of captions (a .tsv.gz whose last column is a caption, or the few below) beside those of
transformers' BertModel, read from the same folder: the largest difference. With --photographs (a folder of `images/` and
`annotations/instances_*.json` in COCO's form) EfficientNet-Lite0 names crops of elephants, pizzas and a few other things
that COCO and ImageNet both know, through the classifier that its file holds and our backbone leaves there. Both packages
are those of requirements-pretrained.txt.
"""

import argparse
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import traverse_util
from PIL import Image

from configs.bccd import EFFICIENTNET, MINILM, small_model
from glip_jax.io.assets import resolve
from glip_jax.models.bert import Bert
from glip_jax.models.efficientnet import EfficientNetLite0
from glip_jax.models.glip import normalize
from glip_jax.structures import prompts
from glip_jax.weights.readers import Weights, read_backbone, read_text
from glip_jax.weights.torch_files import load_arrays

__all__ = ["CAPTIONS", "hidden_states_differ", "main", "name_crops"]

CAPTIONS = (
    "A zebra stands in tall, dry grass.",
    "Two men in hats are carrying a long ladder across the street.",
    "a slice of pepperoni pizza on a paper plate",
    "The cat that sleeps on the laptop's keyboard doesn't care.",
    "An elephant sprays itself with water; three others watch.",
    "person. bicycle. car. motorcycle. airplane. bus. train. truck. boat",
    "Four skateboarders (one airborne) at the edge of an empty pool",
    "a café table with espresso cups, croissants and a crumpled newspaper",
    "Snow-covered mountains behind a red-and-white cable car.",
    "the left-most of 5 green bottles",
    "Someone's umbrella, blown inside out by the wind, lies next to a fire hydrant on a rainy sidewalk in the city.",
    "nothing",
)
"""Written for this file."""

_NAMES = {
    "zebra": {340}, "pizza": {963}, "elephant": {101, 385, 386}, "banana": {954}, "broccoli": {937}, "keyboard": {508, 878},
    "laptop": {620, 681}, "teddy bear": {850}, "toilet": {861}, "traffic light": {920},
}  # fmt: skip
"""ImageNet-1k's classes that a name of COCO may have; elephants: tusker, Indian, African."""
_LEAST = 48
"""Sides of a box from which on its crop is shown to the classifier, in pixels."""
_MARGIN = 0.1
"""Of the box' longer side, added around it; crops are square where the picture is large enough."""
_BATCH = 128


def hidden_states_differ(captions: Sequence[str]) -> tuple[float, float]:
    """Largest difference of the last hidden states over all tokens of `captions`, and their largest value."""
    config = small_model(max_tokens=64)
    ours = Bert(config.text)
    params = _tree(read_text(MINILM, config), "text/")
    theirs = transformers.BertModel.from_pretrained(str(resolve(MINILM)), attn_implementation="eager").eval()
    apply = jax.jit(ours.apply)
    difference = largest = 0.0
    for tokens, mask in _batches(captions, config.text.vocabulary, config.text.max_tokens):
        mine = np.asarray(apply({"params": params}, jnp.asarray(tokens), jnp.asarray(mask)))[mask]
        with torch.no_grad():
            output = theirs(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long())
        their = output.last_hidden_state.numpy()[mask]
        difference = max(difference, float(np.abs(mine - their).max()))
        largest = max(largest, float(np.abs(their).max()))
    return difference, largest


def _batches(captions: Sequence[str], vocabulary: str, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and masks of batches of captions of similar length, padded to a multiple of 8 tokens."""
    tokenizer = prompts.load_tokenizer(resolve(vocabulary))
    encoded = sorted((tokenizer.encode(caption).ids[:longest] for caption in captions), key=len)
    by_length: defaultdict[int, list[list[int]]] = defaultdict(list)
    for ids in encoded:
        by_length[-(-len(ids) // 8) * 8].append(ids)
    for length, rows in by_length.items():
        for begin in range(0, len(rows), _BATCH):
            some = rows[begin : begin + _BATCH]
            tokens = np.zeros((min(_BATCH, len(rows)), length), np.int32)
            mask = np.zeros(tokens.shape, bool)
            for row, ids in enumerate(some):
                tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
            mask[len(some) :, 0] = True  # rows that fill the batch attend to something
            yield tokens, mask


def name_crops(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Crops, how many are right first, how many among the first five, for each of `_NAMES`."""
    model = small_model()
    network = EfficientNetLite0(model.backbone)
    weights = read_backbone(EFFICIENTNET, model, "as_stored")
    file = {name: np.asarray(value, np.float32) for name, value in load_arrays(resolve(EFFICIENTNET)).items()}
    crops = list(_crops(folder))
    size = jnp.array([[224, 224]])
    params = _tree(weights, "backbone/")
    for number, width in ((1, 40), (2, 112), (3, 320)):  # GLIP's own norms, which the classifier does not see
        params[f"norm{number}"] = {"scale": np.ones(width, np.float32), "bias": np.zeros(width, np.float32)}

    @jax.jit
    def scores(pixels: jax.Array) -> jax.Array:
        image = normalize(pixels[None], size, model.input)
        last = lambda module, _: module.name == "stage7"  # noqa: E731
        _, seen = network.apply({"params": params}, image, size, capture_intermediates=last, mutable=["intermediates"])
        (features,) = seen["intermediates"]["stage7"]["__call__"]  # pyright: ignore[reportGeneralTypeIssues]
        return _classified(jnp.asarray(features)[0], file)

    found = {name: [0, 0, 0] for name in _NAMES}
    for name, pixels in crops:
        order = np.argsort(-np.asarray(scores(jnp.asarray(pixels))))
        found[name][0] += 1
        found[name][1] += int(order[0]) in _NAMES[name]
        found[name][2] += bool(_NAMES[name] & set(order[:5].tolist()))
    return {name: (count, first, five) for name, (count, first, five) in found.items()}


def _classified(features: jax.Array, file: dict[str, Any]) -> jax.Array:
    """The file's own head on [h w 320]: 1x1 convolution, batch normalisation, relu6, mean, linear."""
    x = features @ file["_conv_head.weight"][:, :, 0, 0].T
    x = (x - file["_bn1.running_mean"]) / np.sqrt(file["_bn1.running_var"] + 1e-3) * file["_bn1.weight"]
    x = jax.nn.relu6(x + file["_bn1.bias"]).mean((0, 1))
    return x @ file["_fc.weight"].T + file["_fc.bias"]


def _crops(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The box of each object of `_NAMES`, with a margin, as 224 x 224 RGB pixels."""
    for path in sorted((folder / "annotations").glob("instances_*.json")):
        content = json.loads(path.read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        for box in content["annotations"]:
            x, y, width, height = box["bbox"]
            name = names[box["category_id"]]
            if name in _NAMES and min(width, height) >= _LEAST and not box.get("iscrowd"):
                middle, half = (x + width / 2, y + height / 2), max(width, height) * (0.5 + _MARGIN)
                with Image.open(folder / "images" / files[box["image_id"]]) as picture:
                    low = [max(at - half, 0) for at in middle]
                    high = [min(at + half, end) for at, end in zip(middle, picture.size)]
                    crop = picture.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=(*low, *high))
                yield name, np.asarray(crop)


def _tree(weights: Weights, prefix: str) -> dict[str, Any]:
    values = {path.removeprefix(prefix): value for path, value in weights.values.items()}
    return dict(traverse_util.unflatten_dict(values, sep="/"))


def main(argv: Sequence[str]) -> int:
    """Prints what was found; returns 1 where the hidden states differ by more than 1e-4, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.real_weights", description=__doc__)
    parser.add_argument("--captions", type=Path, help="a .tsv.gz whose last column is a caption")
    parser.add_argument("--photographs", type=Path, help="a folder of images/ and annotations/instances_*.json")
    arguments = parser.parse_args(argv)
    captions: Sequence[str] = CAPTIONS
    if arguments.captions is not None:
        with gzip.open(arguments.captions, "rt", encoding="utf-8") as lines:
            captions = [line.rstrip("\n").split("\t")[-1] for line in lines]
    difference, largest = hidden_states_differ(captions)
    print(
        f"MiniLM: hidden states of {len(captions)} captions differ by at most {difference:.2g} from transformers' "
        f"BertModel {transformers.__version__} (largest value {largest:.3g})"
    )
    if arguments.photographs is not None:
        for name, (count, first, five) in name_crops(arguments.photographs).items():
            if count:
                print(f"EfficientNet-Lite0: {name}: {count} crops, right first {first}, among the first five {five}")
    return int(difference > 1e-4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
