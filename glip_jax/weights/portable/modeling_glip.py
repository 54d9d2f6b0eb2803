"""GLIP for `AutoModelForZeroShotObjectDetection`: its configuration, and the network of `glip_network.py` behind it.

    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, trust_remote_code=True)

An image's scores do not depend on the batch that it is in: the network sees each image at its own extent, its size
rounded up to a multiple of `extent_multiple`; images of one extent go through together.
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
    """`network` holds the sizes that `glip_network.GlipNetwork` is built from."""

    model_type = "glip"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        extent: str = "image",
        extent_multiple: int = 32,
        **kwargs: Any,
    ) -> None:
        """`extent`: "image", each for itself; or "batch", all at the size of the largest, as the original does."""
        self.network = network or {}
        self.extent = extent
        self.extent_multiple = extent_multiple
        super().__init__(**kwargs)


@dataclass
class GlipOutput(ModelOutput):
    """What the network says of every anchor; anchors run level by level from fine to coarse, row by row.

    logits [B A T]: alignment with each token. pred_boxes [B A 4]: x1, y1, x2, y2 in pixels of the processed images.
    centerness [B A]: logits. image_sizes [B 2]: height and width of the processed images. level_sizes [L]: anchors of
    each level. phrase_map [B P T]: as given. Anchors beyond an image's extent have the least logits there are.
    """

    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    centerness: Tensor | None = None
    image_sizes: Tensor | None = None
    level_sizes: Tensor | None = None
    phrase_map: Tensor | None = None
    input_ids: Tensor | None = None


class GlipForZeroShotObjectDetection(PreTrainedModel):
    """Finds what the phrases of a text name."""

    config_class = GlipConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["SwinBlock", "BertLayer", "Fusion", "DynamicConvolution"]

    def __init__(self, config: GlipConfig) -> None:
        super().__init__(config)
        self.network = GlipNetwork(config.network)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights come from a checkpoint; what torch's layers start from stays where there is none."""

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
        """What the processor made of images and text: pixels [B 3 H W], their mask [B H W], token ids and mask [B T]."""
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
        groups: dict[tuple[int, int], list[int]] = {}
        for row, (h, w) in enumerate(extents.tolist()):
            groups.setdefault((min(h, height), min(w, width)), []).append(row)
        shapes = [(-(-height // s), -(-width // s)) for s in self.network.strides]
        parts: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * b
        for extent, rows in groups.items():
            levels = self.network.encode_image(pixel_values[rows, :, : extent[0], : extent[1]])
            logits, deltas, center = self.network.ground(levels, text[rows], attention_mask[rows])
            boxes = self.network.boxes(deltas, *extent)
            least = torch.finfo(logits.dtype).min
            spread = [self._spread(x, extent, shapes, fill) for x, fill in
                      ((logits, least), (boxes, 0.0), (center[..., None], least))]  # fmt: skip
            for place, row in enumerate(rows):
                parts[row] = (spread[0][place], spread[1][place], spread[2][place, :, 0])
        logits, boxes, center = (torch.stack(list(field)) for field in zip(*parts))  # type: ignore[arg-type]
        level_sizes = torch.tensor([h * w for h, w in shapes], device=pixel_values.device)
        output = GlipOutput(logits, boxes, center, sizes, level_sizes, phrase_map, input_ids)
        return output.to_tuple() if return_dict is False else output

    def _spread(self, packed: Tensor, extent: tuple[int, int], shapes: list[tuple[int, int]], fill: float) -> Tensor:
        """Anchors of an extent [B a C] at their places among those of the whole canvas [B A C]."""
        own = [(-(-extent[0] // s), -(-extent[1] // s)) for s in self.network.strides]
        if own == shapes:
            return packed
        levels = []
        for part, (h, w), (height, width) in zip(packed.split([h * w for h, w in own], 1), own, shapes):
            canvas = part.new_full((len(part), height, width, part.shape[-1]), fill)
            canvas[:, :h, :w] = part.unflatten(1, (h, w))
            levels.append(canvas.flatten(1, 2))
        return torch.cat(levels, 1)
