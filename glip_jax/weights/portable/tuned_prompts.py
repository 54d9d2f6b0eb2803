"""Tuned prompts in plain PyTorch: a table of text states by name, which takes the place of BERT's output.

A name is found in the token ids where it stands between [CLS], separators and [SEP], so names may be asked in any order and number,
beside names that were not tuned. Where several are found the longest counts, of these the first.
"""

import torch
from torch import Tensor, nn

__all__ = ["TunedPrompts"]

NONE = -1
"""Token id of an unused cell of the table."""


class TunedPrompts(nn.Module):
    """Rows of the table: one for each name, with its separator, then [CLS], [SEP] and the separator alone."""

    def __init__(self, names: int, tokens: int, width: int) -> None:
        super().__init__()
        shape = (names + 3, tokens)
        self.register_buffer("tokens", torch.full(shape, NONE))
        self.embeddings = nn.Parameter(torch.zeros(*shape, width))
        self.deltas = nn.Parameter(torch.zeros(*shape, width))

    def forward(self, encoded: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """States of BERT [B T D] for tokens and mask [B T], with the tuned states at the tokens of tuned names."""
        row, column, covered = self.find_rows(tokens, mask.bool())
        states = self.embeddings[row, column] + self.deltas[row, column]
        return torch.where(covered[..., None], states.to(encoded.dtype), encoded)

    def find_rows(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of each token in the table, and whether it has one."""
        table: Tensor = self.tokens  # type: ignore[assignment]
        names, cls, sep, separator = table[:-3], table[-3, 0], table[-2, 0], table[-1]
        cells, count = table.shape[1], names.shape[0]
        position = torch.arange(tokens.shape[1], device=tokens.device)
        ids = torch.where(mask, tokens, torch.full_like(tokens, NONE))

        def windows(start: Tensor, width: int) -> Tensor:
            place = start[:, None] + torch.arange(width, device=tokens.device)
            inside = (place >= 0) & (place < tokens.shape[1])
            found = ids[:, torch.minimum(place.clamp(min=0), position[-1])]
            return torch.where(inside, found, torch.full_like(found, NONE))

        gap, length = (separator != NONE).sum(), (names != NONE).sum(1)
        ahead, behind = windows(position, cells), windows(position - gap, cells)
        begins = ((behind == separator) | (separator == NONE)).all(-1) & (position > gap) | (position == 1)
        inside = torch.arange(cells, device=tokens.device) < (length - gap)[:, None]
        equal = ahead[:, :, None] == names
        whole = (equal | (names == NONE)).all(-1)
        following = windows(position, cells + 1)[:, :, (length - gap).clamp(min=0)]
        found = begins[..., None] & (length > gap) & (equal | ~inside).all(-1) & (whole | (following == sep))
        span = torch.where(found, torch.where(whole, length, length - gap), torch.zeros_like(length))
        # Every key is different, so that equal lengths cannot be resolved in another way than by the first.
        order = torch.arange(count, device=tokens.device)
        key = (span * count + (count - 1 - order)).to(torch.int32).argmax(-1, keepdim=True)
        row_here, span_here = key[..., 0], span.gather(-1, key)[..., 0]
        offset = position[:, None] - position
        reaching = torch.where(
            (offset >= 0) & (offset < span_here[:, None]), span_here[:, None], torch.zeros_like(offset)
        )
        last_position = position[-1]
        key = (reaching * (last_position + 1) + (last_position - position)).to(torch.int32).argmax(-1, keepdim=True)
        first, covered = key[..., 0], reaching.gather(-1, key)[..., 0] > 0
        row, column = row_here.gather(1, first), position - first
        last = mask.sum(1, keepdim=True) - 1
        is_cls, is_sep = (position == 0) & (ids == cls), (position == last) & (ids == sep)
        ends = is_cls | is_sep
        complete = (covered | ends | ~mask).all(1, keepdim=True) & covered.any(1, keepdim=True)
        row = torch.where(
            is_cls, torch.full_like(row, count), torch.where(is_sep, torch.full_like(row, count + 1), row)
        )
        covered = (covered & ~ends) | (complete & ends)
        zero = torch.zeros_like(row)
        return torch.where(covered, row, zero), torch.where(covered & ~ends, column, zero), covered
