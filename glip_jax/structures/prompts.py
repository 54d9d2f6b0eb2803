"""Prompts: captions whose phrases have character spans, their tokens, and the map from spans to tokens.

All text in glip_jax is arithmetic on phrases: a caption is built once together with the spans of its phrases, tokens
are found from spans, and a phrase is known by its index ever after. Nothing is rebuilt from tokens.
"""

import functools
import os
import re
import tempfile
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Bool, Int32

from glip_jax import UserError
from glip_jax.structures.batch import Prompt, TokenizedPrompt

__all__ = [
    "JoinedNames", "Losses", "PromptError", "Tokenizer", "chunk", "clean_name", "load_tokenizer", "positive_map",
    "prompt_from_categories", "tokenize",
]  # fmt: skip

Spans = Sequence[tuple[int, int]]

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class PromptError(UserError, ValueError):
    """A prompt that cannot be built, or does not fit into its token budget."""


@runtime_checkable
class Tokenizer(Protocol):
    """What we need of a `tokenizers` tokenizer: ids and character offsets, [CLS] and [SEP] included."""

    def encode(self, sequence: str) -> Any:
        """Returns an object with `ids` (list of int), `offsets` (list of (begin, end) characters) and `tokens` (texts)."""
        ...

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """Returns the number of tokens in the vocabulary."""
        ...


class Losses(NamedTuple):
    """What truncation to the token budget took from a prompt."""

    cut: int
    """Phrases that lost at least one token to the cut."""
    without_token: int
    """Phrases that have no token even without a cut (only white space or control characters)."""


@functools.lru_cache(65536)  # an example cleans every name of its prompt, several times
def clean_name(name: str) -> str:
    """A category name as it stands in a caption (the original's rule, glip-reference 4.1).

    Removes everything from the first "(" to the last ")", turns "_" into a space and, in one pass, each double space
    into a single one. Neither strips nor lower-cases: `bow_(decorative_ribbons)` becomes `"bow "`.
    """
    name = re.sub(r"\(.*\)", "", name)
    return name.replace("_", " ").replace("  ", " ")


def prompt_from_categories(names: Sequence[str], separator: str = ". ") -> Prompt:
    """The caption "name. name. name" of the cleaned `names`, in their order; phrase i is names[i].

    Raises PromptError for a name of which cleaning leaves nothing but white space.
    """
    pieces, spans, begin = [], [], 0
    for index, name in enumerate(names):
        piece = clean_name(name)
        if not piece.strip():
            raise PromptError(
                f"category {index} is named {name!r}, of which nothing is left after cleaning (parentheses are removed, "
                "underscores become spaces): give it a name with letters"
            )
        pieces.append(piece)
        spans.append(((begin, begin + len(piece)),))
        begin += len(piece) + len(separator)
    return Prompt(separator.join(pieces), tuple(spans))


def load_tokenizer(vocabulary_path: str | os.PathLike[str], lowercase: bool = True) -> Tokenizer:
    """The BERT WordPiece tokenizer of a `vocab.txt` (one token a line; local or gs://), through the library `tokenizers`.

    Raises PromptError if the file is missing or lacks one of BERT's special tokens.
    """
    from tokenizers.implementations import BertWordPieceTokenizer

    path = epath.Path(vocabulary_path)
    if not path.exists() or path.is_dir():
        raise PromptError(f"vocabulary {str(path)!r} is not a file: set model.text.vocabulary to a BERT vocab.txt")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"vocabulary {str(path)!r} is not UTF-8 text ({error}): expected a BERT vocab.txt") from None
    tokens = set(text.splitlines())
    missing = [token for token in _SPECIAL if token not in tokens]
    if missing:
        raise PromptError(
            f"vocabulary {str(path)!r} lacks {', '.join(missing)}: expected a BERT vocab.txt, one token a line"
        )
    if "://" not in str(path):
        return BertWordPieceTokenizer(str(path), lowercase=lowercase)
    # The library reads local files alone.
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", suffix=".txt") as local:
        local.write(text)
        local.flush()
        return BertWordPieceTokenizer(local.name, lowercase=lowercase)


def positive_map(offsets: Int32[np.ndarray, "T 2"], spans: Sequence[Spans]) -> Bool[np.ndarray, "P T"]:
    """Which tokens each phrase (or box) covers, as the original finds them (glip-reference 3.3).

    `offsets` are the tokens' (begin, end) characters, (0, 0) for special tokens and padding; `spans` holds for every
    row its (begin, end) character spans, end exclusive. A span runs from the token of its first character to the
    token of its last. Where that character belongs to no token (white space), the next two characters inward are
    tried; if none of them does, or it was cut off, the span has no token.
    """
    result = np.zeros((len(spans), len(offsets)), bool)
    token_of = _token_of(offsets)
    for row, row_spans in enumerate(spans):
        for begin, end in row_spans:
            # Beyond the last token there is none, and before the first character neither.
            first = next((token for token in token_of[begin : begin + 3] if token >= 0), -1)
            last = next((token for token in token_of[max(end - 3, 0) : end][::-1] if token >= 0), -1)
            if first >= 0 and last >= 0:
                result[row, first : last + 1] = True
    return result


def _token_of(offsets: Int32[np.ndarray, "T 2"]) -> list[int]:
    """Per character up to the end of the last token, the first token that it belongs to; -1 for none."""
    result = [-1] * int(offsets.max(initial=0))
    for token, (begin, end) in reversed(list(enumerate(offsets.tolist()))):
        result[begin:end] = [token] * (end - begin)
    return result


@overload
def tokenize(
    prompt: Prompt, tokenizer: Tokenizer, max_tokens: int, truncate: Literal[False] = False
) -> TokenizedPrompt: ...


@overload
def tokenize(
    prompt: Prompt, tokenizer: Tokenizer, max_tokens: int, truncate: Literal[True]
) -> tuple[TokenizedPrompt, Losses]: ...


def tokenize(
    prompt: Prompt, tokenizer: Tokenizer, max_tokens: int, truncate: bool = False
) -> TokenizedPrompt | tuple[TokenizedPrompt, Losses]:
    """Token ids, mask and phrase map of `prompt`, padded with 0 to `max_tokens` ([CLS] and [SEP] count).

    Without `truncate` every phrase keeps its tokens: PromptError names the token count, the budget and the first
    phrase beyond it, or a phrase that has no token. With `truncate` (grounding captions at training time) the text is
    cut to the budget as the original does, [SEP] kept as the last token, and what was lost is returned as well.
    Spans that leave the caption are refused either way.
    """
    if max_tokens < 2:
        raise PromptError(f"max_tokens is {max_tokens}: [CLS] and [SEP] alone take 2")
    _check_spans(prompt)
    encoding = tokenizer.encode(prompt.caption)
    ids = np.asarray(encoding.ids, np.int32)
    offsets = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
    whole = positive_map(offsets, prompt.spans)
    empty = ~whole.any(1)
    count = len(ids)
    if not truncate:
        if count > max_tokens:
            raise PromptError(_over_budget(prompt, whole, count, max_tokens))
        if empty.any():
            index = int(np.argmax(empty))
            raise PromptError(f"phrase {index} ({_words(prompt, index)!r}) has no token: give it letters")
    elif count > max_tokens:
        ids = np.concatenate([ids[: max_tokens - 1], ids[-1:]])
        offsets = np.concatenate([offsets[: max_tokens - 1], offsets[-1:]])
    kept = min(count, max_tokens)
    tokens = np.zeros(max_tokens, np.int32)
    tokens[:kept] = ids
    mask = np.arange(max_tokens) < kept
    phrase_map = np.zeros((len(prompt.spans), max_tokens), bool)
    phrase_map[:, :kept] = positive_map(offsets, prompt.spans) if kept < count else whole
    tokenized = TokenizedPrompt(tokens, mask, phrase_map)
    if not truncate:
        return tokenized
    lost = phrase_map.sum(1) < whole.sum(1)
    return tokenized, Losses(int(lost.sum()), int(empty.sum()))


class _Piece(NamedTuple):
    """The tokens of one name, wherever in a caption it stands."""

    ids: tuple[int, ...]
    """Of the name and the separator behind it."""
    length: int
    """Tokens of the name alone."""
    begin: int
    end: int
    """Tokens that stand for the name, `begin` to `end` - 1 of its own; equal where there is none."""


class JoinedNames:
    """Category names whose tokens are found once, so that a caption of names is joined from them: the same prompt and arrays
    as `prompt_from_categories` and `tokenize` give, in a fifth of the time.

    BERT's tokenizer splits at white space before anything else, so behind a separator that ends with some, the tokens of a
    name do not depend on its neighbours. That is checked for every name: it must read alike three times in one caption.
    """

    def __init__(self, names: Sequence[str], tokenizer: Tokenizer, separator: str = ". ") -> None:
        self._names, self._tokenizer, self._separator = names, tokenizer, separator
        self._apart = separator[-1:].isspace()
        self._first, self._last = tokenizer.encode("").ids
        self._pieces: dict[int, _Piece | None] = {}

    def tokenize(self, order: Sequence[int], max_tokens: int) -> tuple[Prompt, TokenizedPrompt, Losses]:
        """The caption of the names `order`, its arrays padded to `max_tokens`, and what the budget cut off (`tokenize`).

        Raises PromptError for a name of which cleaning leaves nothing.
        """
        prompt = prompt_from_categories([self._names[index] for index in order], self._separator)
        pieces = [self._piece(index) for index in order]
        known = [piece for piece in pieces if piece is not None]
        ids, begins, ends = [self._first], [], []
        for piece in known:
            begins.append(len(ids) + piece.begin)
            ends.append(len(ids) + piece.end)
            ids += piece.ids
        if known:
            del ids[len(ids) - len(known[-1].ids) + known[-1].length :]
        ids.append(self._last)
        if len(known) < len(pieces) or len(ids) > max_tokens:
            return prompt, *tokenize(prompt, self._tokenizer, max_tokens, truncate=True)
        tokens, place = np.zeros(max_tokens, np.int32), np.arange(max_tokens)
        tokens[: len(ids)] = ids
        phrase_map = (place >= np.array(begins, int)[:, None]) & (place < np.array(ends, int)[:, None])
        empty = sum(begin == end for begin, end in zip(begins, ends))
        return prompt, TokenizedPrompt(tokens, place < len(ids), phrase_map), Losses(0, empty)

    def _piece(self, index: int) -> _Piece | None:
        """The tokens of name `index`; None where they depend on what stands beside it."""
        if index not in self._pieces:
            self._pieces[index] = self._read(self._names[index]) if self._apart else None
        return self._pieces[index]

    def _read(self, name: str) -> _Piece | None:
        thrice = prompt_from_categories([name] * 3, self._separator)
        encoding = self._tokenizer.encode(thrice.caption)
        alone = self._tokenizer.encode(clean_name(name)).ids[1:-1]
        ids = encoding.ids[1:-1]
        size = (len(ids) - len(alone)) // 2
        rows = positive_map(np.asarray(encoding.offsets, np.int32).reshape(-1, 2), thrice.spans)[:, 1:-1]
        own = np.flatnonzero(rows[0]).tolist()
        begin, end = (own[0], own[-1] + 1) if own else (0, 0)
        expected = np.zeros_like(rows)
        for number, row in enumerate(expected):
            row[number * size + begin : number * size + end] = True
        if ids != [*ids[:size], *ids[:size], *alone] or (rows != expected).any():
            return None
        return _Piece(tuple(ids[:size]), len(alone), begin, end)


def chunk(
    names: Sequence[str], tokenizer: Tokenizer, max_tokens: int, separator: str = ". ", limit: int = 0
) -> list[list[int]]:
    """Splits category names into prompts that fit: lists of consecutive indices, each as long as the budget admits.

    A list's `prompt_from_categories` has at most `max_tokens` tokens ([CLS] and [SEP] included) and, if `limit` > 0,
    at most `limit` names. Depends on nothing but its arguments. Raises PromptError for a name that alone exceeds the
    budget.
    """

    def count(indices: list[int]) -> int:
        return len(tokenizer.encode(prompt_from_categories([names[i] for i in indices], separator).caption).ids)

    chunks: list[list[int]] = []
    for index, name in enumerate(names):
        full = not chunks or (limit > 0 and len(chunks[-1]) >= limit)
        if not full and count([*chunks[-1], index]) <= max_tokens:
            chunks[-1].append(index)
            continue
        alone = count([index])
        if alone > max_tokens:
            raise PromptError(
                f"category {index} ({name!r}) alone takes {alone} tokens with [CLS] and [SEP], the budget is "
                f"{max_tokens}: shorten the name or raise model.text.max_tokens"
            )
        chunks.append([index])
    return chunks


def _check_spans(prompt: Prompt) -> None:
    """Refuses spans that leave the caption."""
    length = len(prompt.caption)
    for index, spans in enumerate(prompt.spans):
        for begin, end in spans:
            if not 0 <= begin < end <= length:
                raise PromptError(
                    f"phrase {index} has the span ({begin}, {end}) in a caption of {length} characters: expected "
                    "0 <= begin < end <= length, end exclusive"
                )


def _over_budget(prompt: Prompt, whole: np.ndarray, count: int, max_tokens: int) -> str:
    """The message for a prompt of `count` tokens; names the first phrase that does not fit."""
    beyond = whole[:, max_tokens - 1 :].any(1)
    where = ""
    if beyond.any():
        index = int(np.argmax(beyond))
        where = f"; the first phrase beyond it is {index} ({_words(prompt, index)!r})"
    return (
        f"the prompt has {count} tokens with [CLS] and [SEP], the budget is {max_tokens}{where}: "
        "split it with prompts.chunk or raise model.text.max_tokens"
    )


def _words(prompt: Prompt, index: int) -> str:
    """The characters of a phrase, its spans joined by ' ... '."""
    return " ... ".join(prompt.caption[begin:end] for begin, end in prompt.spans[index])
