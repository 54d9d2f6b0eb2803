"""GLIP for `AutoModelForZeroShotObjectDetection`: its configuration, and the network of `glip_network.py` behind it.

    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, trust_remote_code=True)

Scores of an image do not depend on its batch: the network runs each image at its own extent, its size rounded up to a
multiple of `extent_multiple`; images of the same extent run together.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .glip_network import GlipNetwork

__all__ = ["GlipConfig", "GlipForZeroShotObjectDetection", "GlipOutput"]


class GlipConfig(PretrainedConfig):
    """`network`: the sizes of the network, arguments of `glip_network.GlipNetwork`."""

    model_type = "glip"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        extent: str = "image",
        extent_multiple: int = 32,
        **kwargs: Any,
    ) -> None:
        """`extent`: "image", each image at its own; or "batch", all at the size of the largest, as microsoft/GLIP does."""
        self.network = network or {}
        self.extent = extent
        self.extent_multiple = extent_multiple
        super().__init__(**kwargs)


@dataclass
class GlipOutput(ModelOutput):
    """Outputs for every anchor; anchors are ordered by level from fine to coarse, then row by row.

    logits [B A T]: alignment with each token, then with each sink. pred_boxes [B A 4]: x1, y1, x2, y2 in pixels of the processed images.
    centerness [B A]: logits. image_sizes [B 2]: height and width of the processed images. level_sizes [L]: anchors of
    each level. phrase_map [B P T]: as given. Anchors beyond the extent of an image have the lowest finite logit.
    """

    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    centerness: Tensor | None = None
    image_sizes: Tensor | None = None
    level_sizes: Tensor | None = None
    phrase_map: Tensor | None = None
    input_ids: Tensor | None = None


class GlipForZeroShotObjectDetection(PreTrainedModel):
    """Detects what the phrases of a text describe."""

    config_class = GlipConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["SwinBlock", "BertLayer", "Fusion", "DynamicConvolution"]

    def __init__(self, config: GlipConfig) -> None:
        super().__init__(config)
        self.network = GlipNetwork(config.network)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Does nothing: weights come from a checkpoint, and without one the initial values of torch stay."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        phrase_map: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> GlipOutput | tuple[Tensor, ...]:
        """Runs the network on outputs of the processor: pixels [B 3 H W], pixel mask [B H W], token ids and mask [B T]."""
        b, _channels, height, width = pixel_values.shape
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if pixel_mask is None:
            sizes = torch.tensor([[height, width]] * b, device=pixel_values.device)
        else:
            sizes = torch.stack([pixel_mask[:, :, 0].sum(1), pixel_mask[:, 0].sum(1)], 1)
        multiple = self.config.extent_multiple
        extents = -(-sizes // multiple) * multiple if self.config.extent == "image" else sizes.amax(0).expand_as(sizes)
        text = self.network.encode_text(input_ids, attention_mask)
        mask = self.network.text_mask(input_ids, attention_mask)
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (h, w) in enumerate(extents.tolist()):
            groups.setdefault((min(h, height), min(w, width)), []).append(row)
        shapes = [(-(-height // s), -(-width // s)) for s in self.network.strides]
        parts: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * b
        for extent, rows in groups.items():
            levels = self.network.encode_image(pixel_values[rows, :, : extent[0], : extent[1]])
            logits, deltas, center = self.network.ground(levels, text[rows], mask[rows])
            boxes = self.network.boxes(deltas, *extent)
            lowest = torch.finfo(logits.dtype).min
            padded = [self._pad_levels(x, extent, shapes, fill) for x, fill in
                      ((logits, lowest), (boxes, 0.0), (center[..., None], lowest))]  # fmt: skip
            for index, row in enumerate(rows):
                parts[row] = (padded[0][index], padded[1][index], padded[2][index, :, 0])
        logits, boxes, center = (torch.stack(list(field)) for field in zip(*parts))  # type: ignore[arg-type]
        level_sizes = torch.tensor([h * w for h, w in shapes], device=pixel_values.device)
        output = GlipOutput(logits, boxes, center, sizes, level_sizes, phrase_map, input_ids)
        return output.to_tuple() if return_dict is False else output

    def _pad_levels(
        self, packed: Tensor, extent: tuple[int, int], shapes: list[tuple[int, int]], fill: float
    ) -> Tensor:
        """Outputs for the anchors of an extent [B a C], padded to those of the whole canvas [B A C]."""
        sizes = [(-(-extent[0] // s), -(-extent[1] // s)) for s in self.network.strides]
        if sizes == shapes:
            return packed
        levels = []
        for part, (h, w), (height, width) in zip(packed.split([h * w for h, w in sizes], 1), sizes, shapes):
            canvas = part.new_full((len(part), height, width, part.shape[-1]), fill)
            canvas[:, :h, :w] = part.unflatten(1, (h, w))
            levels.append(canvas.flatten(1, 2))
        return torch.cat(levels, 1)
