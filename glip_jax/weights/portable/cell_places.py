"""Where the cells of a map lie in their image, for phrases of relations such as "left of"."""

import math

import torch
from torch import Tensor

__all__ = ["PLACE_FEATURES", "place_features"]

_WAVES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Waves across an image."""
PLACE_FEATURES = 2 + 4 * len(_WAVES)


def place_features(level: Tensor) -> Tensor:
    """Of a map [B C h w]: both coordinates of each cell from -1 to 1, and their sines and cosines, [h w F]."""
    height, width = level.shape[2], level.shape[3]
    rows, columns = (2 * (torch.arange(count, device=level.device) + 0.5) / count - 1 for count in (height, width))
    places = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)], -1)
    turns = (places[..., None] * (math.pi * torch.tensor(_WAVES, device=level.device))).flatten(2)
    return torch.cat([places, turns.sin(), turns.cos()], -1).to(level.dtype)
