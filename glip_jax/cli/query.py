"""The query of `predict` and `serve`: names, phrases or a sentence become prompts whose phrases are numbered."""

import csv
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

__all__ = ["Phrase", "Query", "QueryError", "names_between_commas", "query_of_names", "query_of_text", "read_query"]


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
    """Lines for the user: what is not queried as it was typed, phrases that the vocabulary knows only in part, and the phrases."""


def read_query(text: str, names: str, names_file: str, config: Config, finder: PhraseFinder | None = None) -> Query:
    """The query of one of the three: `text` (phrases with " . " between, or a caption for `finder`), `names` with
    commas between, or a file of names, one a line.

    Raises QueryError: not exactly one is given, nothing to find in it, names that are equal or empty, characters or
    words that the model cannot read, more tokens than it reads; PromptError for a name beyond the budget.
    """
    given = [option for option, value in
             (("--text", text), ("--names", names), ("--names-file", names_file)) if value.strip()]  # fmt: skip
    if len(given) != 1:
        found = " and ".join(given) if given else "none of them"
        raise QueryError(f"no query or several: expected one of --text, --names, --names-file, found {found}")
    if text.strip():
        return query_of_text(text, config, "--text", "--names", finder)
    entries = _names_of_file(names_file) if names_file else names_between_commas(names, "--names", "--names-file")
    return query_of_names(entries, config, given[0])


def query_of_names(
    entries: Sequence[str], config: Config, where: str, tokenizer: prompts.Tokenizer | None = None
) -> Query:
    """The query of a list of names; `where` is what messages call the list. Raises QueryError as `read_query`."""
    from glip_jax.inference import category_prompts, check_query  # jax: not for --help

    tokenizer = tokenizer or prompts.load_tokenizer(assets.resolve(config.model.text.vocabulary))
    try:
        notes = check_query(entries, tokenizer, where)
        return _of_names(entries, category_prompts(entries, tokenizer, config), notes)
    except prompts.PromptError as error:
        raise QueryError(str(error)) from None


def query_of_text(
    text: str, config: Config, where: str, lists: str, finder: PhraseFinder | None = None,
    tokenizer: prompts.Tokenizer | None = None,
) -> Query:  # fmt: skip
    """The query of phrases with " . " between, or of a sentence. `where` and `lists` are what messages call the text and a list of names.

    Raises QueryError as `read_query`.
    """
    from glip_jax.inference import check_characters, check_query, phrase_spans  # jax: not for --help

    tokenizer = tokenizer or prompts.load_tokenizer(assets.resolve(config.model.text.vocabulary))
    try:
        check_characters(where, text, allowed="\t\n\r")
        spans, kind, found_by, notes = phrase_spans(text), "phrases", "", []
        if spans:
            notes = check_query([text[begin:end] for begin, end in spans], tokenizer, where, str, "phrase")
        else:
            finder = finder or LexiconPhraseFinder()
            found = finder.find(text)
            spans, kind, found_by = list(found.spans), "caption", f"{finder.name} {finder.version}"
            if found.dropped:
                parts = [f"{text[begin:end]!r} ({reason})" for (begin, end), reason in found.left_out]
                counts = ", ".join(parts or [f"{reason} {count}" for reason, count in found.dropped.items()])
                notes.append(f"left out of the sentence's phrases: {counts}")
            if not spans:
                raise QueryError(
                    f"{where}={prompts.listed([text])}: no noun phrase found in it that names a thing; separate what you look for "
                    f"with ' . ' (\"a dog . a red cup\") or give {lists}"
                )
            phrase_texts = [text[begin:end] for begin, end in spans]
            # A sentence may name a thing twice.
            distinct = list(dict.fromkeys(prompts.words(phrase) for phrase in phrase_texts))
            first = {prompts.words(phrase): phrase for phrase in reversed(phrase_texts)}
            notes += check_query([first[key] for key in distinct], tokenizer, where, str, "phrase")
        prompt = Prompt(text, tuple((span,) for span in spans))
        _check_budget(prompt, tokenizer, config.model.text.max_tokens, where, lists)
    except prompts.PromptError as error:
        raise QueryError(str(error)) from None
    phrases = tuple(_phrase(prompt, 0, row) for row in range(len(spans)))
    return Query(kind, (), (prompt,), phrases, found_by, (*map("note: {}".format, notes), _asked(phrases, 1)))


def _of_names(
    names: Sequence[str], chunks: Sequence[tuple[Prompt, tuple[int, ...]]], notes: Sequence[str]
) -> Query:  # fmt: skip
    """The query of names that are asked in several prompts; its phrases are numbered as the names."""
    order = {own: (number, row) for number, (_, chunk) in enumerate(chunks) for row, own in enumerate(chunk)}
    queried = tuple(prompt for prompt, _ in chunks)
    phrases = tuple(_phrase(queried[number], number, row) for number, row in map(order.__getitem__, range(len(names))))
    lines = (*map("note: {}".format, notes), _asked(phrases, len(queried)))
    return Query("names", tuple(names), queried, phrases, "", lines)


def _asked(phrases: Sequence[Phrase], prompts_: int) -> str:
    what = f"{len(phrases)} phrase{'s' if len(phrases) > 1 else ''}"
    where = f"in {prompts_} prompts, because one does not hold all" if prompts_ > 1 else "in one prompt"
    return f"asked: {what} {where}: {prompts.listed([phrase.text.strip() for phrase in phrases], 10)}"


def names_between_commas(names: str, where: str, file: str = "") -> list[str]:
    """The names of a list with commas; one with a comma in it stands in double quotes.

    `where` is what messages call the list, `file` the flag that takes a file instead. Raises QueryError for a control character and for a comma in parentheses.
    """
    from glip_jax.inference import check_characters  # jax: not for --help

    otherwise = f", or give {file}" if file else ""
    try:
        check_characters(where, names)
        (entries,) = csv.reader([names], skipinitialspace=True, strict=True)
    except prompts.PromptError as error:
        raise QueryError(str(error)) from None
    except csv.Error as error:
        raise QueryError(
            f"{where}={prompts.listed([names])}: {error}; double quotes stand around a whole name: "
            f"'\"salt, pepper\",cup'{otherwise.replace(',', ';')}"
        ) from None
    for entry in entries:
        if entry.count("(") != entry.count(")") and names.count("(") == names.count(")"):
            raise QueryError(
                f"{where}: a comma in parentheses splits a name, {entry.strip()!r} is a part of it: put double quotes around "
                f"the name{otherwise}"
            )
    return [entry.strip() for entry in entries]


def _phrase(prompt: Prompt, number: int, row: int) -> Phrase:
    ((begin, end),) = prompt.spans[row]
    return Phrase(prompt.caption[begin:end], number, (begin, end))


def _names_of_file(file: str) -> list[str]:
    path = epath.Path(file)
    try:
        # Editors of some systems begin a file with a mark that is no letter of the first name.
        # Other line ends that Unicode has may stand within a name.
        lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise QueryError(f"--names-file={file} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise QueryError(f"--names-file={file} cannot be read ({error}): expected a file with a name a line") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise QueryError(f"--names-file={file} has no names: expected one a line")
    return names


def _check_budget(prompt: Prompt, tokenizer: prompts.Tokenizer, budget: int, where: str, lists: str) -> None:
    """QueryError for more tokens than the model reads; it names the first phrase beyond."""
    encoding = tokenizer.encode(prompt.caption)
    if len(encoding.ids) > budget:
        held = prompts.positive_map(np.asarray(encoding.offsets, np.int32).reshape(-1, 2), prompt.spans)
        texts = [prompt.caption[begin:end] for ((begin, end),) in prompt.spans]
        cut = next((text for text, row in zip(texts, held) if row[budget - 1 :].any()), texts[-1])
        raise QueryError(
            f"{where} takes {len(encoding.ids)} tokens, the model reads {budget} with [CLS] and [SEP]; the first phrase "
            f"beyond is {prompts.listed([cut])}: shorten it, or give {lists}, which are queried in several prompts"
        )
    prompts.tokenize(prompt, tokenizer, budget)
