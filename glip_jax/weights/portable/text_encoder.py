"""BERT (arXiv 1810.04805), whose layers are also those of the text inside the head."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .phrase_mask import places, readable

__all__ = ["Bert", "BertLayer", "clamped"]

_BOUND = 50000.0
"""Limit to which attention logits and activations of the head are clipped."""


def clamped(x: Tensor) -> Tensor:
    """What the head clips, as microsoft/GLIP does."""
    return x.clamp(-_BOUND, _BOUND)


def _dense_and_norm(inputs: int, outputs: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs), "LayerNorm": nn.LayerNorm(outputs, eps=1e-12)})


class BertLayer(nn.Module):
    """Post-norm attention and feed-forward; `clip` adds the bounds that the layers inside the head have."""

    def __init__(self, width: int, heads: int, hidden: int, clip: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.clip = clamped if clip else nn.Identity()
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": _dense_and_norm(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _dense_and_norm(hidden, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x`: [B T C]; `mask`: [B T], see `readable`."""
        projections: Any = self.attention["self"]
        q, k, v = (
            projections[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
        )
        logits = self.clip(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
        logits = logits.masked_fill(~readable(mask)[:, None], torch.finfo(logits.dtype).min)
        attended: Any = self.attention["output"]
        x = attended["LayerNorm"](attended["dense"]((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)) + x)
        hidden = self.clip(F.gelu(self.clip(self.intermediate["dense"](x))))
        return self.clip(self.output["LayerNorm"](self.clip(self.output["dense"](hidden)) + x))


class Bert(nn.Module):
    """The text encoder without pooler."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, hidden: int, positions: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(vocabulary, width),
            "position_embeddings": nn.Embedding(positions, width),
            "token_type_embeddings": nn.Embedding(2, width),
            "LayerNorm": nn.LayerNorm(width, eps=1e-12),
        })  # fmt: skip
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(width, heads, hidden) for _ in range(layers))})

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask [B T], see `readable`, to states [B T D]."""
        parts = self.embeddings
        x = parts["word_embeddings"](tokens) + parts["position_embeddings"](places(mask))
        x = parts["LayerNorm"](x + parts["token_type_embeddings"](torch.zeros_like(tokens)))
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            x = layer(x, mask)
        return x
