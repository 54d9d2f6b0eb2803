"""Letters of shape annotations, and the named tuples that packages exchange.

Letters of every shape annotation:

    B images   H W pixels of the canvas   h w cells of a pyramid level   L levels   A anchors over all levels
    N box slots per image   T tokens   P phrases   C channels   D detections

The *canvas* is the static H x W array; an image's *size* is its resized, unpadded height and width; its *extent*
(size rounded up, at most the canvas) is the part of the canvas that the network treats as the image. Anchors are ordered by
level from fine to coarse, row-major in the grid of ceil(H / stride) x ceil(W / stride) cells that the canvas has per level.
"""

from typing import Any, NamedTuple

from glip_jax.structures.canvas import PATCH

__all__ = ["BATCH_AXES", "DROPS", "Batch", "Detections", "Predictions", "Prompt", "Targets", "TokenizedPrompt"]

BATCH_AXES = ("data", "fsdp")
"""Mesh axes that shard the examples of a batch."""

DROPS = (
    "boxes_over_limit", "boxes_out_of_view", "boxes_below_threshold", "phrases_over_budget", "spans_without_token",
    "corrupt_records",
)  # fmt: skip
"""What preprocessing can drop from an example: the columns of `Batch.dropped`, and metrics `dropped/NAME`."""


class Batch(NamedTuple):
    """Training examples. Fields are numpy arrays on the host and jax arrays in the step, with the leading axis B."""

    image: Any
    """UInt8[B H W 3], RGB, zeros beyond `size`; or, for a network that begins with patches, UInt8[B H/4 W/4 48] (`canvas.patches_of`) with
    the channels in the order of the network."""
    size: Any
    """Int32[B 2]: height, width of the resized image."""
    extent: Any
    """Int32[B 2]: height, width of the part of the canvas that the network treats as the image."""
    tokens: Any
    """Int32[B T]: token ids, padded with 0."""
    token_mask: Any
    """Bool[B T]: True for tokens, [CLS] and [SEP] included, False for padding."""
    boxes: Any
    """Float32[B N 4]: xyxy, pixels of the resized image."""
    box_mask: Any
    """Bool[B N]: slots in use."""
    box_weight: Any
    """Float32[B N]: loss weight of the anchors assigned to the box: 1, or the score of a teacher; 0 in empty slots."""
    positive_map: Any
    """Bool[B N T]: tokens of the phrases of each box."""
    token_loss_mask: Any
    """Bool[B T]: False at tokens of unlabelled phrases, at which unmatched anchors give no token loss."""
    valid: Any
    """Bool[B]: False for a corrupt example, which takes part in no loss."""
    source: Any
    """Int32[B]: index of the source in the sorted names of `config.data.sources`."""
    record: Any
    """Int32[B]: index of the record inside its source."""
    dropped: Any
    """Int32[B len(DROPS)]: what was dropped from the example."""
    described: Any = ()
    """Int32[B T]: at tokens of a described name its row in the table of description vectors, else 0; () where no setting needs it."""

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of the images, pixels."""
        height, width, channels = self.image.shape[-3:]
        side = 1 if channels == 3 else PATCH
        return height * side, width * side


class Prompt(NamedTuple):
    """A caption and the character spans of its phrases. Detections refer to a phrase by its index."""

    caption: str
    spans: tuple[tuple[tuple[int, int], ...], ...]
    """Per phrase: its (begin, end) character spans, end exclusive."""


class TokenizedPrompt(NamedTuple):
    """A prompt as arrays."""

    tokens: Any
    """Int32[T]."""
    mask: Any
    """Bool[T]: True for tokens, False for padding."""
    phrase_map: Any
    """Bool[P T]: tokens of each phrase."""


class Predictions(NamedTuple):
    """Outputs of the network for every anchor; float32."""

    logits: Any
    """Float32[B A T]: alignment logits of location and token."""
    deltas: Any
    """Float32[B A 4]: encoded boxes (dx, dy, dw, dh)."""
    centerness: Any
    """Float32[B A]: logits."""
    presence: Any = ()
    """Float32[B T]: logits that the image shows what the token's phrase names; () without `head.presence`."""


class Targets(NamedTuple):
    """Training targets of every anchor, assigned by ATSS."""

    positive: Any
    """Bool[B A]: anchors that are assigned to a box."""
    box_index: Any
    """Int32[B A]: slot of the box; 0 where not positive."""
    boxes: Any
    """Float32[B A 4]: the box, decoded from its encoding; zeros where not positive."""
    centerness: Any
    """Float32[B A]: in [0, 1]; zero where not positive."""


class Detections(NamedTuple):
    """Detections of one image (without axis B) or of a batch, in order of descending score; unused rows have phrase -1 and score 0."""

    boxes: Any
    """Float32[(B) D 4]: xyxy, pixels."""
    scores: Any
    """Float32[(B) D]: in [0, 1]."""
    phrases: Any
    """Int32[(B) D]: index into the phrases of the prompt."""
    alignment: Any = None
    """Float32[(B) D]: mean (or highest) probability of the tokens of the phrase; score = sqrt(alignment * centerness). None: not stored."""
    centerness: Any = None
    """Float32[(B) D]: in [0, 1]. None: not stored."""
