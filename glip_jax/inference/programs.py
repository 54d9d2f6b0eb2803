"""The compiled parts of the Detector: image encoder, text encoder, and the head with post-processing."""

import functools
from collections import Counter
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from glip_jax.config import DetectionConfig, ModelConfig
from glip_jax.distributed.mesh import per_shard
from glip_jax.models.glip import GLIP, normalize
from glip_jax.models.postprocess import detect
from glip_jax.structures.batch import Detections

__all__ = ["ROWS", "WHOLE", "Programs", "programs"]

ROWS = PartitionSpec("images")
"""Arrays of a batch: the rows of the first device, then those of the second."""
WHOLE = PartitionSpec()
"""Arrays that every device has whole."""


class Programs:
    """The jitted parts of the network. Detectors of the same settings share them, so that none traces what another has.

    `mesh` has the one axis "images". The first dimension of everything but the parameters is split over it.
    """

    def __init__(self, model: ModelConfig, detection: DetectionConfig) -> None:
        self.model, self.detection, self.network = model, detection, GLIP(model)
        self.traced: Counter[str] = Counter()
        self.encode_image = jax.jit(self._encode_image, static_argnames="mesh")
        self.encode_text = jax.jit(self._encode_text)
        self.ground = jax.jit(self._ground, static_argnames=("canvas", "mesh"))

    # These run when jax traces them: once per shape. So `traced` counts programs.

    def _encode_image(self, params: Any, image: Array, size: Array, extent: Array, mesh: Mesh) -> Any:
        self.traced["image"] += 1

        def local(params: Any, image: Array, size: Array, extent: Array) -> Any:
            pixels = normalize(image, size, self.model.input)
            return self.network.apply({"params": params}, pixels, extent, method="encode_image")

        return per_shard(local, mesh, (WHOLE, ROWS, ROWS, ROWS), ROWS)(params, image, size, extent)

    def _encode_text(self, params: Any, tokens: Array, mask: Array) -> Any:
        self.traced["text"] += 1
        return self.network.apply({"params": params}, tokens[None], mask[None], method="encode_text")[0]

    def _ground(
        self, params: Any, levels: Any, rows: Array, size: Array, extent: Array, text: Array, mask: Array,
        phrase_map: Array, canvas: tuple[int, int], mesh: Mesh,
    ) -> Detections:  # fmt: skip
        """`rows`: per request the row of its image among those of the same device."""
        self.traced["ground"] += 1

        def local(
            params: Any, levels: Any, rows: Array, size: Array, extent: Array, text: Array, mask: Array, phrase_map: Array
        ) -> Detections:  # fmt: skip
            levels, size, extent = jax.tree.map(lambda array: array[rows], (levels, size, extent))
            predictions = self.network.apply({"params": params}, levels, extent, text, mask, method="ground")
            return detect(predictions, phrase_map, size, extent, canvas, self.model, self.detection)  # type: ignore[arg-type]

        split = per_shard(local, mesh, (WHOLE, *[ROWS] * 7), ROWS)
        return split(params, levels, rows, size, extent, text, mask, phrase_map)


programs = functools.lru_cache(maxsize=8)(Programs)
"""The programs of these settings, the same object where they are asked for again."""
