"""The compiled parts of the Detector: image encoder, text encoder, and the head with post-processing."""

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from glip_jax.config import DetectionConfig, ModelConfig
from glip_jax.distributed.mesh import per_shard
from glip_jax.inference.postprocess import detect
from glip_jax.models.glip import GLIP, normalize
from glip_jax.structures.batch import Detections

__all__ = ["ROWS", "STEPS", "WHOLE", "Programs", "programs"]

ROWS = PartitionSpec("images")
"""Arrays of a batch: the rows of the first device, then those of the second."""
STEPS = PartitionSpec(None, "images")
"""The same behind a leading axis of steps."""
WHOLE = PartitionSpec()
"""Arrays that every device has whole."""


class Programs:
    """The jitted parts of the network. Detectors of the same settings share them, so that none traces what another has.

    `mesh` has the one axis "images", which splits the images and their requests. Each device runs the program of one device.
    """

    def __init__(self, model: ModelConfig, detection: DetectionConfig) -> None:
        self.model, self.detection, self.network = model, detection, GLIP(model)
        self.traced: Counter[str] = Counter()
        self.encode_image = jax.jit(self._encode_image, static_argnames="mesh")
        self.encode_text = jax.jit(self._encode_text)
        self.ground = jax.jit(self._ground, static_argnames=("canvas", "mesh"))

    # These run when jax traces them: once per shape. So `traced` counts programs.

    def _encode_image(self, params: Any, image: Array, size: Array, extent: Array, mesh: Mesh) -> Any:
        """Levels of the pyramid; without fusion, after the blocks of the head, which then read no text."""
        self.traced["image"] += 1

        def local(params: Any, image: Array, size: Array, extent: Array) -> Any:
            pixels = normalize(image, size, self.model.input)
            levels = self.network.apply({"params": params}, pixels, extent, method="encode_image")
            if self.model.fusion.enabled:
                return levels
            return self.network.apply({"params": params}, levels, extent, method="refine")

        return per_shard(local, mesh, (WHOLE, ROWS, ROWS, ROWS), ROWS)(params, image, size, extent)

    def _encode_text(self, params: Any, tokens: Array, mask: Array) -> Any:
        self.traced["text"] += 1
        return self.network.apply({"params": params}, tokens, mask, method="encode_text")

    def _ground(
        self, params: Any, images: tuple[Any, Array, Array], texts: tuple[Array, Array, Array], rows: Array, prompts: Array,
        steps: Array, canvas: tuple[int, int], mesh: Mesh,
    ) -> Detections:  # fmt: skip
        """Detections [S B D ...] of requests, each an image and a prompt. One loop runs them all, so that memory does not
        depend on the number of prompts.

        Args:
            images: levels [B h w C] of `encode_image`, sizes and extents [B 2].
            texts: states [K T C], masks (`bert.TextMask`) [K T] and phrase maps [K P T] of the K different prompts of each device.
            rows: Int32[S B]: the image of each request, as its row among those of the same device.
            prompts: Int32[S B]: its prompt, as an index of the `texts` of the same device.
            steps: Int32[devices]: number of steps in use. The rest have phrase -1.
        """
        self.traced["ground"] += 1

        def local(params: Any, images: Any, texts: Any, rows: Array, prompts: Array, steps: Array) -> Detections:
            def step(index: Array, found: Detections) -> Detections:
                levels, size, extent = jax.tree.map(lambda array: array[rows[index]], images)
                states, mask, phrase_map = (array[prompts[index]] for array in texts)
                predictions: Any = self.network.apply(
                    {"params": params}, levels, extent, states, mask, not self.model.fusion.enabled, method="ground"
                )
                part = detect(predictions, phrase_map, size, extent, canvas, self.model, self.detection)
                return jax.tree.map(lambda whole, own: whole.at[index].set(own), found, part)

            zeros = jnp.zeros((*rows.shape, self.detection.max_detections), jnp.float32)
            nothing = Detections(jnp.stack([zeros] * 4, -1), zeros, jnp.full(zeros.shape, -1, jnp.int32), zeros, zeros)
            return jax.lax.fori_loop(0, steps[0], step, nothing)

        split = per_shard(local, mesh, (WHOLE, ROWS, ROWS, STEPS, STEPS, ROWS), STEPS)
        return split(params, images, texts, rows, prompts, steps)


programs = functools.lru_cache(maxsize=8)(Programs)
"""The programs of these settings, the same object where they are asked for again."""
