"""Attention sinks: tokens without a meaning behind those of every prompt, so that attention can choose nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Sinks"]


class Sinks:
    """`number` sinks: random numbers of `seed` in the range of text states, or the mean state of the text with these `tokens`."""

    def __init__(self, number: int, seed: int = 0, tokens: Sequence[int] = ()) -> None:
        self.number, self.seed, self.tokens = number, seed, list(tokens)

    def states(self, network: Any) -> Tensor:
        """States [N D] for a `GlipNetwork`; the scale and shift of its text encoder's last norm give the range of random numbers."""
        norm = network.language_backbone["body"]["model"].encoder["layer"][-1].output["LayerNorm"]
        if self.tokens:
            tokens = torch.tensor([self.tokens], device=norm.weight.device)
            return network.encode_text(tokens, torch.ones_like(tokens))[0, 1:-1].mean(0).expand(self.number, -1)
        shape = (self.number, norm.weight.shape[0])
        numbers = np.random.default_rng(self.seed).standard_normal(shape, np.float32)
        return torch.from_numpy(numbers).to(norm.weight) * norm.weight + norm.bias

    def behind(self, text: Tensor, mask: Tensor, network: Any) -> tuple[Tensor, Tensor]:
        """Text states [B T D] and mask [B T] with the sinks behind them."""
        sinks = self.states(network).to(text.dtype)[None].expand(text.shape[0], -1, -1)
        # In a mask by segments they are one of their own.
        new = torch.ones_like(mask[:, :1]) if mask.dtype == torch.bool else mask.amax(1, keepdim=True) + 1
        return torch.cat([text, sinks], 1), torch.cat([mask, new.expand(-1, self.number)], 1)
