"""The query of `predict`: names, phrases or a sentence become prompts whose phrases are numbered."""

import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from etils import epath

from glip_jax import UserError
from glip_jax.config import Config
from glip_jax.io import assets
from glip_jax.labeling.phrases.finders import LexiconPhraseFinder, PhraseFinder
from glip_jax.structures import prompts
from glip_jax.structures.batch import Prompt

__all__ = ["Phrase", "Query", "QueryError", "read_query"]

_UNKNOWN = "[UNK]"


class QueryError(UserError, ValueError):
    """A text or a list of names that is no query."""


class Phrase(NamedTuple):
    """One phrase to detect. Its index in `Query.phrases` is its number in all detections."""

    text: str
    """Its characters in the prompt, verbatim."""
    prompt: int
    """Index into `Query.prompts`."""
    span: tuple[int, int]
    """Its (begin, end) characters there, end exclusive."""


class Query(NamedTuple):
    """Prompts and their phrases."""

    kind: Literal["names", "phrases", "caption"]
    names: tuple[str, ...]
    """As given; empty unless `kind` is names."""
    prompts: tuple[Prompt, ...]
    """One, or as many as the names need."""
    phrases: tuple[Phrase, ...]
    finder: str
    """Name and version of the phrase finder of a caption; else empty."""
    notes: tuple[str, ...]
    """Lines for the user: parts of a sentence that are not queried, phrases that the vocabulary knows only in part."""


def read_query(text: str, names: str, names_file: str, config: Config, finder: PhraseFinder | None = None) -> Query:
    """The query of one of the three: `text` (phrases with " . " between, or a caption for `finder`), `names` with
    commas between, or a file of names, one a line.

    Raises QueryError: not exactly one is given, nothing to find in it, names that are equal or empty, characters or
    words that the model cannot read, more tokens than it reads; PromptError for a name beyond the budget.
    """
    from glip_jax.inference import category_prompts  # jax: not for --help

    given = [option for option, value in
             (("--text", text), ("--names", names), ("--names-file", names_file)) if value.strip()]  # fmt: skip
    if len(given) != 1:
        found = " and ".join(given) if given else "none of them"
        raise QueryError(f"no query or several: expected one of --text, --names, --names-file, found {found}")
    tokenizer = prompts.load_tokenizer(assets.resolve(config.model.text.vocabulary))
    if not text.strip():
        listed = _names_of_file(names_file) if names_file else [name.strip() for name in names.split(",")]
        _check_list(given[0], "name", listed, [prompts.clean_name(name) for name in listed])
        chunks = category_prompts(listed, tokenizer, config)
        order = {own: (number, row) for number, (_, chunk) in enumerate(chunks) for row, own in enumerate(chunk)}
        queried = tuple(prompt for prompt, _ in chunks)
        positions = [order[index] for index in range(len(listed))]
        phrases = tuple(_phrase(queried[number], number, row) for number, row in positions)
        return Query("names", tuple(listed), queried, phrases, "", _unread(queried, phrases, tokenizer, config))
    _check_characters("--text", text, allowed="\t\n\r")
    spans, kind, found_by, left_out = prompts.phrase_spans(text), "phrases", "", ()
    if spans:
        phrase_texts = [text[begin:end] for begin, end in spans]
        _check_list("--text", "phrase", phrase_texts, phrase_texts)
    else:
        finder = finder or LexiconPhraseFinder()
        found = finder.find(text)
        spans, kind, found_by = list(found.spans), "caption", f"{finder.name} {finder.version}"
        if found.dropped:
            counts = ", ".join(f"{reason} {count}" for reason, count in found.dropped.items())
            left_out = (f"note: left out of the sentence's phrases: {counts}",)
        if not spans:
            raise QueryError(
                f"--text={_short(text)}: no noun phrase found in it that names a thing; separate what you look for with ' . ' "
                '("a dog . a red cup") or give --names'
            )
    prompt = Prompt(text, tuple((span,) for span in spans))
    phrases = tuple(_phrase(prompt, 0, row) for row in range(len(spans)))
    notes = (*left_out, *_unread((prompt,), phrases, tokenizer, config))
    return Query(kind, (), (prompt,), phrases, found_by, notes)


def _phrase(prompt: Prompt, number: int, row: int) -> Phrase:
    ((begin, end),) = prompt.spans[row]
    return Phrase(prompt.caption[begin:end], number, (begin, end))


def _names_of_file(file: str) -> list[str]:
    path = epath.Path(file)
    try:
        # Editors of some systems begin a file with a mark that is no letter of the first name.
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise QueryError(f"--names-file={file} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise QueryError(f"--names-file={file} cannot be read ({error}): expected a file with a name a line") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise QueryError(f"--names-file={file} has no names: expected one a line")
    return names


def _check_list(option: str, what: str, listed: Sequence[str], cleaned: Sequence[str]) -> None:
    """Refuses entries that are empty, unreadable, or the same to the model as an earlier one."""
    first: dict[str, int] = {}
    for index, (entry, text) in enumerate(zip(listed, cleaned)):
        _check_characters(f"{option}: {what} {index + 1}", entry)
        if not text.strip():
            left = f" ({entry!r}: parentheses are removed)" if entry else ""
            raise QueryError(
                f"{option}: {what} {index + 1} of {len(listed)} is empty{left}; give it a text or remove it"
            )
        key = " ".join(text.casefold().split())
        if key in first:
            other = listed[first[key]]
            raise QueryError(
                f"{option}: {what} {index + 1} ({entry!r}) is the same to the model as {what} {first[key] + 1} "
                f"({other!r}): remove one"
            )
        first[key] = index


def _check_characters(where: str, text: str, allowed: str = "") -> None:
    for character in text:
        broken = unicodedata.category(character) in ("Cc", "Cs") or character == "\ufffd"
        if broken and character not in allowed:
            raise QueryError(
                f"{where} ({_short(text)}) has the character U+{ord(character):04X}: a control character or a broken "
                "encoding, expected readable UTF-8 text"
            )


def _unread(
    queried: Sequence[Prompt], phrases: Sequence[Phrase], tokenizer: prompts.Tokenizer, config: Config
) -> tuple[str, ...]:
    """Lines on phrases of which the vocabulary lacks a part; a phrase of which it lacks all is refused."""
    budget, partly = config.model.text.max_tokens, []
    for number, prompt in enumerate(queried):
        encoding = tokenizer.encode(prompt.caption)
        own = [phrase for phrase in phrases if phrase.prompt == number]
        where = prompts.positive_map(np.asarray(encoding.offsets, np.int32).reshape(-1, 2), [[p.span] for p in own])
        for phrase, row in zip(own, where):
            pieces = [encoding.tokens[i] for i in np.flatnonzero(row)]
            if pieces and set(pieces) == {_UNKNOWN}:
                raise QueryError(
                    f"{phrase.text!r} has no word or character that the model's vocabulary knows: say it otherwise"
                )
            if _UNKNOWN in pieces:
                partly.append(phrase.text)
        if len(encoding.ids) > budget:
            cut = next((p.text for p, row in zip(own, where) if row[budget - 1 :].any()), own[-1].text)
            raise QueryError(
                f"--text takes {len(encoding.ids)} tokens, the model reads {budget} with [CLS] and [SEP]; the first phrase "
                f"beyond is {_short(cut)}: shorten it, or give --names, which are queried in several prompts"
            )
        prompts.tokenize(prompt, tokenizer, budget)
    return tuple(f"note: the model's vocabulary does not know all of {text!r}" for text in partly)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
