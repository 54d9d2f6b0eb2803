"""Training on features of frozen encoders: every example is encoded once, and a step runs only what is trained.

On two cores a frozen EfficientNet takes longer than the head that is trained behind it. So the maps of the backbone are computed
once for every example, and kept in files that are mapped into memory; the states of a frozen text encoder once for every caption.
Order and weights of the examples are those of a `Mixture`. An image has a few variants, mirrored ones among them, each with its
own crop, colors and caption, where the `Mixture` makes new ones in each epoch.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float
from tqdm import tqdm

from glip_jax.config import Config
from glip_jax.data.captions import rng_of
from glip_jax.data.examples import Examples
from glip_jax.data.mixture import Mixture
from glip_jax.io.checkpoint_reader import fingerprint
from glip_jax.models.bert import text_mask
from glip_jax.models.glip import GLIP, normalize
from glip_jax.structures.batch import Batch, Predictions
from glip_jax.training import optimizer as optim
from glip_jax.training.step import Objective, glip_objective

__all__ = ["EncodedImages", "EncodedMixture", "bytes_needed", "encodes_images", "encodes_text", "objective_of_encoded"]

_VARIANTS = (4, 8)
"""Fewest and most variants of an image whose crop, colors or caption are random; an even number."""
_ENCODED = 2048
"""Examples that the variants of a small set add up to: encoding them takes about a minute on two cores."""
_KEPT_CAPTIONS = 128
"""Captions whose states are kept; where there are more, the step encodes them."""
_DRAWN = 0x6D697272
"""Sets the generator that draws variants apart from that which makes them."""


class EncodedImages(NamedTuple):
    """Takes the place of `Batch.image`."""

    maps: tuple[Float[Any, "B h w C"], ...]
    """Maps of the backbone, float16."""
    text: Float[Any, "B T D"] | None
    """States of the captions; None: the step encodes them."""


def encodes_images(config: Config, paths: Sequence[str]) -> bool:
    """Whether the images can be encoded once: no parameter of the backbone is trained, and each image has one canvas. `paths`: those of
    all parameters.
    """
    return len(config.data.short_sides) == 1 and all(
        optim.frozen(path, config.model) for path in paths if path.startswith("backbone/")
    )


def encodes_text(config: Config, paths: Sequence[str]) -> bool:
    """Whether captions can be encoded once: the text encoder is frozen, and runs without dropout."""
    return config.model.text.frozen and all(
        optim.frozen(path, config.model) for path in paths if path.startswith("text/")
    )


def objective_of_encoded(config: Config, canvas: tuple[int, int]) -> Objective:
    """`glip_objective` of batches whose `image` is an EncodedImages, on `canvas` (height, width) in pixels."""

    def forward(model: GLIP, batch: Batch) -> Predictions:
        images: EncodedImages = batch.image
        levels = model.pyramid(tuple(x.astype(jnp.float32) for x in images.maps), batch.extent)
        states = model.text(batch.tokens, batch.token_mask) if images.text is None else images.text
        text = model.tuned_text(states, batch.tokens, batch.token_mask)
        return model.ground(levels, batch.extent, text, text_mask(batch.tokens, batch.token_mask, config.model.text))

    return glip_objective(config, forward=forward, canvas=canvas)


def variants(config: Config, records: int) -> int:
    """Number of variants of each of `records` images."""
    data = config.data
    if not data.crop.probability and not data.jitter.probability and data.captions.mode == "all_names":
        return 2 if data.flip else 1
    fewest, most = _VARIANTS
    return max(fewest, min(most, _ENCODED // records // 2 * 2))


def bytes_needed(mixture: Mixture, params: Any) -> int:
    """Bytes of the maps of all variants of all records of a mixture with one canvas."""
    (canvas,) = mixture.canvases
    image, extent = jax.ShapeDtypeStruct((1, *canvas, 3), jnp.float32), jax.ShapeDtypeStruct((1, 2), jnp.int32)
    model = GLIP(mixture.config.model)
    maps: Any = jax.eval_shape(
        lambda params, x, e: model.apply({"params": params}, x, e, method=lambda m, x, e: m.backbone(x, e)), params, image, extent
    )  # fmt: skip
    records = sum(mixture.records)
    return 2 * sum(level.size for level in maps) * records * variants(mixture.config, records)


class EncodedMixture:
    """The batches of a `Mixture` with encoded images, for a given number of steps."""

    def __init__(
        self, mixture: Mixture, params: Any, folder: epath.PathLike, start: int = 0, host: int = 0, hosts: int = 1
    ) -> None:
        """Encodes the examples, unless they lie in `folder`: all of them, whatever the seed, or where captions are sampled those that this
        host reads in the steps after `start`.

        `params`: of the network, on the devices. Features take 2 bytes a value: 0.3 MB an image of 288 x 384 pixels with EfficientNet-Lite0.
        """
        self._mixture, self._config = mixture, mixture.config
        (self.canvas,) = mixture.canvases
        self._host, self._hosts = host, hosts
        self._variants = variants(self._config, sum(mixture.records))
        self._keys = self._needed(start)
        self._rows = {key: row for row, key in enumerate(self._keys)}
        self._folder = epath.Path(folder) / f"{self._digest(params)}"
        if not (self._folder / "examples.npz").exists():
            self._encode(params)
        with np.load(self._folder / "examples.npz") as saved:
            fields = {name: saved[name] for name in Batch._fields if name not in ("image", "described")}
            self._captions, self._texts = saved["captions"], saved.get("texts")
        maps = tuple(np.load(self._folder / f"maps{level}.npy", mmap_mode="r") for level in range(3))
        self._examples, self._maps = Batch(image=np.zeros(len(self._keys)), **fields), maps

    def batches(self, start: int, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        """The batches after step `start`, as `Mixture.batches`."""
        if (host, hosts) != (self._host, self._hosts):
            raise ValueError(f"host {host} of {hosts}: the examples of host {self._host} of {self._hosts} were encoded")
        for step in range(start, self._config.train.steps):
            rows = np.array([self._rows[key] for key in self.keys_of(step)])
            text = None if self._texts is None else self._texts[self._captions[rows]]
            images = EncodedImages(tuple(np.asarray(level[rows]) for level in self._maps), text)
            yield jax.tree.map(lambda array: array[rows], self._examples)._replace(image=images)  # noqa: B023

    def _needed(self, start: int) -> list[tuple[int, int, int]]:
        """The examples that are encoded."""
        if self._config.data.captions.mode == "all_names" and self._hosts == 1:
            return [
                (source, record, variant)
                for source, count in enumerate(self._mixture.records)
                for record in range(count)
                for variant in range(self._variants)
            ]
        return sorted({key for step in range(start, self._config.train.steps) for key in self.keys_of(step)})

    def keys_of(self, step: int) -> list[tuple[int, int, int]]:
        """(source, record, variant) of the examples of a step on this host. Odd variants are mirrored, where images are."""
        config, per_host = self._config, self._config.train.batch_size // self._hosts
        begin, keys = self._host * per_host, []
        for position, (source, record) in enumerate(self._mixture.slots(step)[begin : begin + per_host], begin):
            rng = rng_of(config.train.seed ^ _DRAWN, step * config.train.batch_size + position)
            mirrored, variant = rng.random() < config.data.flip, int(rng.integers(self._variants))
            keys.append((source, record, variant // 2 * 2 + int(mirrored) if config.data.flip else variant))
        return keys

    def example(self, examples: Examples, key: tuple[int, int, int]) -> Batch:
        """The batch of one example, with its pixels. Where all names are asked the seed of the run changes nothing."""
        config, (source, record, variant) = self._config, key
        seed = 0 if config.data.captions.mode == "all_names" else config.train.seed
        number = (sum(self._mixture.records[:source]) + record) * _VARIANTS[1] + variant
        return examples.batch([(source, record)], config.data.short_sides[0], self.canvas, [rng_of(seed, number)])

    def _digest(self, params: Any) -> str:
        """Hash of all that the encoded examples depend on."""
        config, digest = self._config, hashlib.sha256()
        frozen = {key: params[key] for key in ("backbone", "text") if key in params}
        manifests = [dataclasses.asdict(shards.manifest) for shards in self._mixture.shards]
        model = config.model
        settings = [dataclasses.asdict(part) for part in (model.input, model.backbone, model.text, config.data)]
        seed = None if config.data.captions.mode == "all_names" else config.train.seed
        for part in (self._keys, manifests, settings, seed):
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(fingerprint(frozen).encode())
        return digest.hexdigest()[:16]

    def _encode(self, params: Any) -> None:
        """Writes the files of `folder`; that of the examples last, so that what a kill leaves is encoded again."""
        config, size = self._config, self._config.train.batch_size
        self._folder.mkdir(parents=True, exist_ok=True)
        model = GLIP(config.model)

        def maps_of(params: Any, image: Any, size: Any, extent: Any) -> tuple[Any, ...]:
            pixels = normalize(image, size, config.model.input)
            maps: Any = model.apply({"params": params}, pixels, extent, method=lambda m, x, e: m.backbone(x, e))
            return tuple(level.astype(jnp.float16) for level in maps)

        encode = jax.jit(maps_of)

        def text_of(params: Any, tokens: Any, mask: Any) -> Any:
            # Of the encoder alone: tuned prompts come after it.
            return model.apply({"params": params}, tokens, mask, method=lambda m, t, k: m.text(t, k))

        text = jax.jit(text_of)
        always = {mirrored: dataclasses.replace(config, data=dataclasses.replace(config.data, flip=float(mirrored)))
                  for mirrored in (False, True)}  # fmt: skip
        examples = {key: Examples(each, self._mixture.shards, self._mixture.captioners) for key, each in always.items()}
        files: list[Any] = []
        fields: list[Batch] = []

        def batch(begin: int) -> Batch:
            # The last group is filled up, so that one program encodes all.
            keys = [self._keys[min(row, len(self._keys) - 1)] for row in range(begin, begin + size)]
            made = [self.example(examples[bool(config.data.flip) and key[2] % 2 == 1], key) for key in keys]
            return jax.tree.map(lambda *parts: np.concatenate(parts), *made)

        starts = range(0, len(self._keys), size)
        with ThreadPoolExecutor(1) as reader, tqdm(total=len(self._keys), desc="encoding images", disable=None) as bar:
            ahead = reader.submit(batch, 0)
            for begin in starts:
                made = ahead.result()
                ahead = reader.submit(batch, begin + size) if begin + size < len(self._keys) else ahead
                used = min(size, len(self._keys) - begin)
                for level, values in enumerate(jax.device_get(encode(params, made.image, made.size, made.extent))):
                    if len(files) == level:
                        shape = (len(self._keys), *values.shape[1:])
                        path = self._folder / f"maps{level}.npy"
                        files.append(np.lib.format.open_memmap(path, "w+", np.float16, shape))
                    files[level][begin : begin + used] = values[:used]
                fields.append(jax.tree.map(lambda array: array[:used], made._replace(image=made.size)))  # noqa: B023
                bar.update(used)
        for file in files:
            file.flush()
        whole = Batch(*(np.concatenate(column) for column in zip(*fields)))
        captions, numbers = np.unique(whole.tokens, axis=0, return_inverse=True)
        saved = {name: value for name, value in whole._asdict().items() if name not in ("image", "described")}
        saved["captions"] = numbers.reshape(-1).astype(np.int32)
        if encodes_text(config, list(optim.flat(params))) and len(captions) <= _KEPT_CAPTIONS:
            masks = np.stack([whole.token_mask[np.argmax(numbers.reshape(-1) == n)] for n in range(len(captions))])
            saved["texts"] = np.concatenate(
                [np.asarray(text(params, c[None], m[None])) for c, m in zip(captions, masks)]
            )
        np.savez(self._folder / "unfinished.npz", **saved)
        (self._folder / "unfinished.npz").rename(self._folder / "examples.npz")
