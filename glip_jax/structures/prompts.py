"""Prompts: captions with character spans of their phrases, tokenization, and the map from spans to tokens.

A caption is built together with the spans of its phrases. Tokens are derived from spans, and later code refers to a phrase by
its index. Text is never reconstructed from tokens.
"""

import functools
import os
import re
import tempfile
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, overload, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import Bool, Int32

from glip_jax import UserError
from glip_jax.structures.batch import Prompt, TokenizedPrompt

__all__ = [
    "JoinedNames", "Truncation", "PromptError", "Tokenizer", "check_names", "check_separators", "clean_name", "equal_names", "listed",
    "load_tokenizer", "positive_map", "prompt_from_categories", "segment_ids", "tokenize", "unread_names", "words",
]  # fmt: skip

Spans = Sequence[tuple[int, int]]

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class PromptError(UserError, ValueError):
    """A prompt that cannot be built, or exceeds its token budget."""


@runtime_checkable
class Tokenizer(Protocol):
    """The interface of a `tokenizers` tokenizer that is used here: ids and character offsets, [CLS] and [SEP] included."""

    def encode(self, sequence: str) -> Any:
        """Returns an object with `ids` (list of int), `offsets` (list of (begin, end) characters) and `tokens` (list of str)."""
        ...

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """Returns the number of tokens in the vocabulary."""
        ...


class Truncation(NamedTuple):
    """What truncation to the token budget removed from a prompt."""

    cut: int
    """Number of phrases that lost at least one token."""
    without_token: int
    """Number of phrases without a token even before truncation (white space or control characters only)."""


@functools.lru_cache(65536)  # every example cleans each name of its prompt several times
def clean_name(name: str) -> str:
    """A category name as it appears in a caption (glip-reference 4.1).

    Removes everything from the first "(" to the last ")", replaces "_" by a space and, in one pass, each double space by a
    single one. It does not strip or lower-case: `bow_(decorative_ribbons)` becomes `"bow "`.
    """
    name = re.sub(r"\(.*\)", "", name)
    return name.replace("_", " ").replace("  ", " ")


def prompt_from_categories(names: Sequence[str], separator: str = ". ", descriptions: Sequence[str] = ()) -> Prompt:
    """The caption "name. name. name" of the cleaned `names`; phrase i is names[i].

    `descriptions`: per name the text that follows it, as in "name, text. name. name", "" for none. The phrase stays the name: words that
    several descriptions share are evidence for none of them alone. So are the suffixes in the prompts of the original.

    Raises PromptError for a name that is empty after cleaning.
    """
    pieces, spans, begin = [], [], 0
    for index, name in enumerate(names):
        piece = clean_name(name)
        if not piece.strip():
            raise PromptError(
                f"category {index} is named {name!r}, which is empty after cleaning (text in parentheses is removed, underscores "
                "become spaces): expected a name with letters"
            )
        spans.append(((begin, begin + len(piece)),))
        piece += f", {descriptions[index]}" if descriptions and descriptions[index] else ""
        pieces.append(piece)
        begin += len(piece) + len(separator)
    return Prompt(separator.join(pieces), tuple(spans))


def words(text: str) -> tuple[str, ...]:
    """The words and marks of a text as all vocabularies of BERT read them: without case, accents and spaces."""
    from tokenizers import normalizers, pre_tokenizers  # pyright: ignore[reportAttributeAccessIssue]

    lowered = normalizers.BertNormalizer(lowercase=True).normalize_str(text)
    return tuple(word for word, _ in pre_tokenizers.BertPreTokenizer().pre_tokenize_str(lowered))


def unread_names(names: Sequence[str], tokenizer: Tokenizer, clean: Callable[[str], str] = clean_name) -> list[str]:
    """Those of `names` of which the vocabulary knows nothing: no token, or special ones such as [UNK] only."""
    return [name for name in names if set(tokenizer.encode(clean(name)).tokens) <= set(_SPECIAL)]


def equal_names(keys: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Pairs (index, index of the first name like it); the `keys` of names are their tokens, or `words`."""
    first: dict[Hashable, int] = {}
    return [(index, first[key]) for index, key in enumerate(keys) if first.setdefault(key, index) != index]


def check_names(
    names: Sequence[str], tokenizer: Tokenizer, where: str, remedy: str, equal: Literal["refuse", "refuse_plain", "note"] = "refuse",
    clean: Callable[[str], str] = clean_name, what: str = "name",
) -> list[str]:  # fmt: skip
    """Notes for the user on names that the text encoder reads in part or alike. `clean`: their text in a prompt; `what` they are.

    `equal`: "refuse_plain" allows names that are alike without their parentheses, as in LVIS ("bow_(weapon)"). Raises PromptError,
    from `where` to `remedy`, for names of which the vocabulary knows nothing, and for equal ones.
    """
    if unread := unread_names(names, tokenizer, clean):
        have = "have" if len(unread) > 1 else "has"
        raise PromptError(
            f"{where}: {listed(unread)} {have} no word or character that the model's vocabulary knows: {remedy}"
        )
    encoded = [tokenizer.encode(clean(name)) for name in names]
    pairs = equal_names([tuple(own.ids) for own in encoded])
    plain = [pair for pair in pairs if all("(" not in names[index] for index in pair)]
    for index, other in {"refuse": pairs, "refuse_plain": plain, "note": []}[equal]:
        raise PromptError(
            f"{where}: {what} {index + 1} ({names[index]!r}) is the same to the model as {what} {other + 1} "
            f"({names[other]!r}): {remedy}"
        )
    partly = [name for name, own in zip(names, encoded) if "[UNK]" in own.tokens]
    alike = listed([f"{names[index]} = {names[other]}" for index, other in pairs])
    notes = [f"{where}: the model's vocabulary does not know all of {listed(partly)}"] if partly else []
    return notes + (
        [f"{where}: {what}s that are the same to the model: {alike}; make their texts differ"] * bool(pairs)
    )


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first `most` of names for a message, quoted, and the number of the others."""
    shown = ", ".join(repr(name if len(name) <= 60 else f"{name[:57]}...") for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def load_tokenizer(vocabulary_path: str | os.PathLike[str], lowercase: bool = True) -> Tokenizer:
    """BERT's WordPiece tokenizer (library `tokenizers`) for a `vocab.txt`, one token per line; local or gs://.

    Raises PromptError if the file is missing, is not UTF-8, or lacks a special token of BERT.
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
            f"vocabulary {str(path)!r} lacks {', '.join(missing)}: expected a BERT vocab.txt, one token per line"
        )
    if "://" not in str(path):
        return BertWordPieceTokenizer(str(path), lowercase=lowercase)
    # The library reads local files only.
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", suffix=".txt") as local:
        local.write(text)
        local.flush()
        return BertWordPieceTokenizer(local.name, lowercase=lowercase)


def segment_ids(tokens: Any, mask: Any, separators: Sequence[int]) -> Any:
    """Int32[... T]: the segment of each token, for the mask `phrase` and the loss of presence: 0 for padding, 1 for [CLS] and [SEP], from 2 on names and separators.

    `tokens`, `mask`: Int32, Bool[... T], arrays of numpy or jax. `separators`: `TextConfig.separators`. A name ends at each of these ids, so a
    sentence between two full stops is one segment.
    """
    xp = tokens.__array_namespace__()
    first, last, *between = separators
    ends = (tokens == first) | (tokens == last)
    alone = ends
    for token in between:
        alone = alone | (tokens == token)
    after = xp.concat([xp.zeros_like(alone[..., :1]), alone[..., :-1]], axis=-1)
    number = (alone | after).cumsum(-1) + 2
    return xp.where(mask, xp.where(ends, 1, number), 0).astype(xp.int32)


def check_separators(tokenizer: Tokenizer, separators: Sequence[int], text: str) -> None:
    """Raises PromptError unless `separators` (`TextConfig.separators`) are those of the vocabulary, for names that `text` separates."""
    first, *between, last = tokenizer.encode(text).ids
    if not between:
        raise PromptError(
            f"data.captions.separator is {text!r}, of which the vocabulary has no token: model.text.mask phrase and model.head.presence need one between two names"
        )
    if [first, last] != list(separators[:2]) or not set(between) <= set(separators[2:]):
        raise PromptError(
            f"model.text.separators is {tuple(separators)}, and in this vocabulary [CLS], [SEP] and data.captions.separator {text!r} are "
            f"{(first, last, *between)}: set it so"
        )


def positive_map(offsets: Int32[np.ndarray, "T 2"], spans: Sequence[Spans]) -> Bool[np.ndarray, "P T"]:
    """Tokens that each phrase (or box) covers, as in the original (glip-reference 3.3).

    `offsets`: (begin, end) characters of each token, (0, 0) for special tokens and padding. `spans`: per row its (begin, end)
    character spans, end exclusive. A span covers the tokens from that of its first character to that of its last. If such a
    character belongs to no token (white space), the next two characters inward are tried; if these have none either, or
    were truncated, the span has no token.
    """
    result = np.zeros((len(spans), len(offsets)), bool)
    token_of = _token_of(offsets)
    for row, row_spans in enumerate(spans):
        for begin, end in row_spans:
            # Characters behind the last token have none.
            first = next((token for token in token_of[begin : begin + 3] if token >= 0), -1)
            last = next((token for token in token_of[max(end - 3, 0) : end][::-1] if token >= 0), -1)
            if first >= 0 and last >= 0:
                result[row, first : last + 1] = True
    return result


def _token_of(offsets: Int32[np.ndarray, "T 2"]) -> list[int]:
    """Per character up to the end of the last token: the first token that it belongs to, -1 for none."""
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
) -> tuple[TokenizedPrompt, Truncation]: ...


def tokenize(
    prompt: Prompt, tokenizer: Tokenizer, max_tokens: int, truncate: bool = False
) -> TokenizedPrompt | tuple[TokenizedPrompt, Truncation]:
    """Token ids, mask and phrase map of `prompt`, padded with 0 to `max_tokens` ([CLS] and [SEP] included).

    Without `truncate`, raises PromptError if the prompt exceeds the budget or a phrase has no token. With `truncate` (captions
    in training), the tokens are cut to the budget as in the original, with [SEP] as the last one, and the losses are returned
    as well. Raises PromptError for spans outside of the caption.
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
            raise PromptError(
                f"phrase {index} ({_phrase_text(prompt, index)!r}) has no token: expected a phrase with letters"
            )
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
    return tokenized, Truncation(int(lost.sum()), int(empty.sum()))


class _Piece(NamedTuple):
    """The tokens of one name at any position of a caption."""

    ids: tuple[int, ...]
    """Token ids of the name, its description and the separator after it."""
    length: int
    """Number of tokens without the separator."""
    begin: int
    end: int
    """The span of the name covers its tokens `begin` to `end` - 1; equal if it has none."""


class JoinedNames:
    """Tokenizes each category name once and joins captions from the results: the same prompts and arrays as those of
    `prompt_from_categories` and `tokenize`, in a fifth of the time.

    BERT's tokenizer splits at white space first, so after a separator that ends in white space the tokens of a name do not
    depend on its neighbors. This is verified for every name, on a caption that repeats it three times.
    """

    def __init__(
        self, names: Sequence[str], tokenizer: Tokenizer, separator: str = ". ", descriptions: Sequence[str] = ()
    ) -> None:
        self._names, self._tokenizer, self._separator = names, tokenizer, separator
        self._descriptions = descriptions or [""] * len(names)
        self._independent = separator[-1:].isspace()
        self._first, self._last = tokenizer.encode("").ids
        self._pieces: dict[int, _Piece | None] = {}

    def tokenize(self, order: Sequence[int], max_tokens: int) -> tuple[Prompt, TokenizedPrompt, Truncation]:
        """The caption of the names with indices `order`, its arrays padded to `max_tokens`, and what truncation lost.

        Raises PromptError for a name that is empty after cleaning.
        """
        prompt = self._prompt(order)
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
        tokens, position = np.zeros(max_tokens, np.int32), np.arange(max_tokens)
        tokens[: len(ids)] = ids
        phrase_map = (position >= np.array(begins, int)[:, None]) & (position < np.array(ends, int)[:, None])
        empty = sum(begin == end for begin, end in zip(begins, ends))
        return prompt, TokenizedPrompt(tokens, position < len(ids), phrase_map), Truncation(0, empty)

    def _piece(self, index: int) -> _Piece | None:
        """The tokens of name `index`; None if they depend on its neighbors."""
        if index not in self._pieces:
            self._pieces[index] = self._encode(index) if self._independent else None
        return self._pieces[index]

    def _prompt(self, order: Sequence[int]) -> Prompt:
        names, descriptions = ([own[index] for index in order] for own in (self._names, self._descriptions))
        return prompt_from_categories(names, self._separator, descriptions)

    def _encode(self, index: int) -> _Piece | None:
        thrice = self._prompt([index] * 3)
        encoding = self._tokenizer.encode(thrice.caption)
        alone = self._tokenizer.encode(self._prompt([index]).caption).ids[1:-1]
        ids = encoding.ids[1:-1]
        size = (len(ids) - len(alone)) // 2
        rows = positive_map(np.asarray(encoding.offsets, np.int32).reshape(-1, 2), thrice.spans)[:, 1:-1]
        covered = np.flatnonzero(rows[0]).tolist()
        begin, end = (covered[0], covered[-1] + 1) if covered else (0, 0)
        expected = np.zeros_like(rows)
        for number, row in enumerate(expected):
            row[number * size + begin : number * size + end] = True
        if ids != [*ids[:size], *ids[:size], *alone] or (rows != expected).any():
            return None
        return _Piece(tuple(ids[:size]), len(alone), begin, end)


def _check_spans(prompt: Prompt) -> None:
    """Raises PromptError for spans outside of the caption."""
    length = len(prompt.caption)
    for index, spans in enumerate(prompt.spans):
        for begin, end in spans:
            if not 0 <= begin < end <= length:
                raise PromptError(
                    f"phrase {index} has the span ({begin}, {end}) in a caption of {length} characters: expected "
                    "0 <= begin < end <= length, end exclusive"
                )


def _over_budget(prompt: Prompt, whole: np.ndarray, count: int, max_tokens: int) -> str:
    """The error message for a prompt of `count` tokens; names the first phrase that does not fit."""
    beyond = whole[:, max_tokens - 1 :].any(1)
    where = ""
    if beyond.any():
        index = int(np.argmax(beyond))
        where = f"; the first phrase beyond it is {index} ({_phrase_text(prompt, index)!r})"
    return (
        f"the prompt has {count} tokens with [CLS] and [SEP], the budget is {max_tokens}{where}: "
        "split it with inference.chunk or raise model.text.max_tokens"
    )


def _phrase_text(prompt: Prompt, index: int) -> str:
    """The text of a phrase, its spans joined by ' ... '."""
    return " ... ".join(prompt.caption[begin:end] for begin, end in prompt.spans[index])
