"""Tokens that a token attends to in the text layers: all of the prompt, or those of its own name with [CLS] and [SEP]."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["places", "readable", "segments"]


def segments(tokens: Tensor, mask: Tensor, separators: Sequence[int]) -> Tensor:
    """Int64[B T]: 0 for padding, 1 for [CLS] and [SEP] (the first two `separators`), from 2 on names and what stands between them."""
    first, last, *between = separators
    ends = (tokens == first) | (tokens == last)
    alone = ends
    for token in between:
        alone = alone | (tokens == token)
    after = torch.cat([torch.zeros_like(alone[:, :1]), alone[:, :-1]], 1)
    numbers = (alone | after).long().cumsum(1) + 2
    return torch.where(mask.bool(), torch.where(ends, torch.ones_like(numbers), numbers), torch.zeros_like(numbers))


def readable(mask: Tensor) -> Tensor:
    """Bool[B 1 T] or [B T T]: which tokens each token reads; `mask`: True where a token is real, or the numbers of `segments`."""
    if mask.dtype == torch.bool:
        return mask[:, None]
    return (mask[:, :, None] == mask[:, None]) | (mask[:, None] == 1)


def places(mask: Tensor) -> Tensor:
    """Position of each token, [T] or [B T]; of segments they restart: [CLS] 0, [SEP] 1, and the tokens of a name from 1 on."""
    place = torch.arange(mask.shape[1], device=mask.device)
    if mask.dtype == torch.bool:
        return place
    before = (place[:, None] > place) & (mask[:, :, None] == mask[:, None])
    return before.long().sum(-1) + (mask > 1).long()
