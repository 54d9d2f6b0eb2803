"""The alphabet of shapes and the tuples that travel between the parts.

Letters of every shape annotation:

    B images   H W pixels of the canvas   h w cells of a pyramid level   L levels   A anchors over all levels
    N box slots per image   T tokens   P phrases   C channels   D detections

The *canvas* is the static H x W array; an image's *size* is its resized, unpadded height and width; its *extent*
(size rounded up, at most the canvas) is what the network behaves as if the image had. Anchors run level by level from
fine to coarse, row-major inside the canvas' level grid of ceil(H / stride) x ceil(W / stride) cells.
"""

from typing import Any, NamedTuple

__all__ = ["BATCH_AXES", "DROPS", "Batch", "Detections", "Predictions", "Prompt", "Targets", "TokenizedPrompt"]

BATCH_AXES = ("data", "fsdp")
"""Axes of the mesh that split the examples of a batch."""

DROPS = (
    "boxes_over_limit", "boxes_out_of_view", "boxes_below_threshold", "phrases_over_budget", "spans_without_token",
    "corrupt_records",
)  # fmt: skip
"""What can be lost on the way into a batch: the columns of `Batch.dropped`."""


class Batch(NamedTuple):
    """Training examples. numpy on the host, jax arrays in the step; every field has the leading axis B."""

    image: Any
    """UInt8[B H W 3], RGB, zeros beyond `size`."""
    size: Any
    """Int32[B 2]: height, width of the resized image."""
    extent: Any
    """Int32[B 2]: height, width the network behaves as if the image had."""
    tokens: Any
    """Int32[B T]: token ids, padded with 0."""
    token_mask: Any
    """Bool[B T]: real tokens, [CLS] and [SEP] included."""
    boxes: Any
    """Float32[B N 4]: xyxy, pixels of the resized image."""
    box_mask: Any
    """Bool[B N]: slots in use."""
    box_weight: Any
    """Float32[B N]: weight in the losses of the anchors that the box gets; 1, or a teacher's score; 0 in empty slots."""
    positive_map: Any
    """Bool[B N T]: tokens of each box's phrases."""
    token_loss_mask: Any
    """Bool[B T]: False at tokens of what is unknown, where anchors without a box give no token loss."""
    valid: Any
    """Bool[B]: False masks a corrupt example out of every loss."""
    source: Any
    """Int32[B]: index of the source in the sorted names of `config.data.sources`."""
    record: Any
    """Int32[B]: index of the record inside its source."""
    dropped: Any
    """Int32[B len(DROPS)]: what was cut from the example."""


class Prompt(NamedTuple):
    """A caption and the character spans of its phrases; the index of a phrase is its name in Detections."""

    caption: str
    spans: tuple[tuple[tuple[int, int], ...], ...]
    """Per phrase its (begin, end) character spans, end exclusive."""


class TokenizedPrompt(NamedTuple):
    """A prompt as arrays."""

    tokens: Any
    """Int32[T]."""
    mask: Any
    """Bool[T]."""
    phrase_map: Any
    """Bool[P T]: tokens of each phrase."""


class Predictions(NamedTuple):
    """What the network says of every anchor; float32."""

    logits: Any
    """Float32[B A T]: alignment of location and token."""
    deltas: Any
    """Float32[B A 4]: encoded boxes (dx, dy, dw, dh)."""
    centerness: Any
    """Float32[B A]: logits."""


class Targets(NamedTuple):
    """What ATSS wants of every anchor."""

    positive: Any
    """Bool[B A]."""
    box_index: Any
    """Int32[B A]: slot of the box; 0 where not positive."""
    boxes: Any
    """Float32[B A 4]: the box (decoded from its encoding); zeros where not positive."""
    centerness: Any
    """Float32[B A]: in [0, 1]; zero where not positive."""


class Detections(NamedTuple):
    """Boxes of one image (no B) or of a batch, best first; unused rows have phrase -1 and score 0."""

    boxes: Any
    """Float32[(B) D 4]: xyxy, pixels."""
    scores: Any
    """Float32[(B) D]: in [0, 1]."""
    phrases: Any
    """Int32[(B) D]: index into the prompt's phrases."""
    alignment: Any = None
    """Float32[(B) D]: mean probability of the phrase's tokens; score = sqrt(alignment * centerness). None: not kept."""
    centerness: Any = None
    """Float32[(B) D]: in [0, 1]. None: not kept."""
