"""The Detector: images and prompts in, boxes out. Evaluation, labelling and prediction use it.

    detector = Detector(config, params)                          # or glip_jax.load_detector(WORKDIR or EXPORT)
    (found,) = detector(["shelf.jpg"], ["green book", "snail"])
    found.boxes, found.scores, found.names                       # xyxy in pixels, descending scores, one name per box

Results are batch invariant: each image is processed at its own extent, so its detections do not depend on the canvas or on the
other images of the batch. The Detector therefore groups images to save compilations.

A batch is sharded over the devices of this process: each device runs the same program on `batch_size` images of its own, so the
detections are those of one device. `pipelined` reads the next images meanwhile.
"""

from glip_jax.inference.detector import Detector, ImageDetections, bucket
from glip_jax.inference.pipeline import pipelined
from glip_jax.inference.postprocess import compete
from glip_jax.inference.queries import (
    category_prompts,
    check_characters,
    check_query,
    chunk,
    phrase_spans,
    sentence_spans,
)

__all__ = [
    "Detector", "ImageDetections", "bucket", "category_prompts", "check_characters", "check_query", "chunk", "compete",
    "phrase_spans", "pipelined", "sentence_spans",
]  # fmt: skip
