"""What is asked: names in prompts that fit the token budget, the phrases of a text, and what cannot be asked."""

import re
import unicodedata
from collections.abc import Callable, Sequence

from glip_jax.config import Config
from glip_jax.io.assets import resolve
from glip_jax.structures import prompts
from glip_jax.structures.batch import Prompt
from glip_jax.structures.descriptions import read_descriptions

__all__ = [
    "category_prompts",
    "check_characters",
    "check_query",
    "chunk",
    "phrase_spans",
    "phrases_of",
    "sentence_spans",
]

_SEPARATOR = re.compile(r"(?<!\S)\.(?!\S)")


def category_prompts(
    names: Sequence[str], tokenizer: prompts.Tokenizer, config: Config
) -> list[tuple[Prompt, tuple[int, ...]]]:
    """Prompts for `names`: each with the indices in `names` of its phrases.

    A prompt holds as many consecutive names, with their descriptions where `data.captions.descriptions.use` is `prompt`, as
    `config.evaluation.chunk` and the token budget allow. `config.detection.rivals` that are no names follow, with the index -1.
    Raises PromptError for a name that is empty after cleaning or exceeds the budget alone, for an empty list and for a bad file of
    descriptions, AssetError where that is missing.
    """
    if not names:
        raise prompts.PromptError("there are no names to detect: expected at least one")
    separator, budget = config.data.captions.separator, config.model.text.max_tokens
    settings = config.data.captions.descriptions
    found = read_descriptions(str(resolve(settings.file))) if settings.use == "prompt" else None
    if config.detection.rivals:
        check_query(config.detection.rivals, tokenizer, "detection.rivals")
    read = {tuple(tokenizer.encode(prompts.clean_name(name)).ids) for name in names}
    rivals = [
        name for name in config.detection.rivals if tuple(tokenizer.encode(prompts.clean_name(name)).ids) not in read
    ]
    asked = [*names, *rivals]
    texts = ["" if found is None else found.in_prompt(name) for name in asked]
    chunks = chunk(asked, tokenizer, budget, separator, config.evaluation.chunk, texts)
    return [
        (prompts.prompt_from_categories([asked[i] for i in part], separator, [texts[i] for i in part]),
         tuple(i if i < len(names) else -1 for i in part))
        for part in chunks
    ]  # fmt: skip


def check_query(
    entries: Sequence[str], tokenizer: prompts.Tokenizer, where: str, clean: Callable[[str], str] = prompts.clean_name,
    what: str = "name",
) -> list[str]:  # fmt: skip
    """Checks names or phrases that a user asks for, and returns notes on what is not asked as it was typed.

    `clean`: their text in the prompt; `what`: "name" or "phrase". Raises PromptError, which begins with `where`, for an empty
    list, an entry that is empty or no text, characters that the model does not read, words of which the vocabulary knows
    nothing, and entries that are the same to the model.
    """
    if not entries:
        raise prompts.PromptError(f"{where}: there are no {what}s to detect: expected at least one")
    for number, entry in enumerate(entries, 1):
        which = f"{where}: {what} {number} of {len(entries)}"
        if not isinstance(entry, str):
            raise prompts.PromptError(f"{which} is {entry!r:.60}, {type(entry).__name__}: expected text")
        check_characters(which, entry)
        if not clean(entry).strip():
            left = f" ({entry!r}: parentheses are removed)" if entry.strip() else ""
            raise prompts.PromptError(f"{which} is empty{left}: give it a text or remove it")
    notes = prompts.check_names(entries, tokenizer, where, "remove it or say it otherwise", clean=clean, what=what)
    changed = [entry for entry in entries if "(" in entry and "(" not in clean(entry)]
    if changed:
        shown = prompts.listed([f"{entry} -> {clean(entry).strip()}" for entry in changed])
        notes.append(f"{where}: asked without what stands in parentheses, as in training: {shown}")
    return notes


def check_characters(where: str, text: str, allowed: str = "") -> None:
    """Raises PromptError for a character that tokenization drops: a control character or a broken encoding."""
    for character in text:
        broken = unicodedata.category(character) in ("Cc", "Cs") or character == "\ufffd"
        if broken and character not in allowed:
            raise prompts.PromptError(
                f"{where} ({prompts.listed([text])}) has the character U+{ord(character):04X}: a control character or a broken "
                "encoding, expected readable UTF-8 text"
            )


def chunk(
    names: Sequence[str], tokenizer: prompts.Tokenizer, max_tokens: int, separator: str = ". ", limit: int = 0,
    descriptions: Sequence[str] = (),
) -> list[list[int]]:  # fmt: skip
    """Splits category names into prompts: lists of consecutive indices, each as long as the token budget allows.

    The `prompt_from_categories` of a list has at most `max_tokens` tokens ([CLS] and [SEP] included) and, if `limit` > 0, at
    most `limit` names. Deterministic. Raises PromptError for a name that exceeds the budget alone.
    """

    def count(indices: list[int]) -> int:
        texts = [descriptions[i] for i in indices] if descriptions else ()
        prompt = prompts.prompt_from_categories([names[i] for i in indices], separator, texts)
        return len(tokenizer.encode(prompt.caption).ids)

    chunks: list[list[int]] = []
    for index, name in enumerate(names):
        full = not chunks or (limit > 0 and len(chunks[-1]) >= limit)
        if not full and count([*chunks[-1], index]) <= max_tokens:
            chunks[-1].append(index)
            continue
        alone = count([index])
        if alone > max_tokens:
            described = bool(descriptions and descriptions[index])
            raise prompts.PromptError(
                f"category {index} ({name!r}) {'with its description' if described else 'alone'} takes {alone} tokens with [CLS] and [SEP], "
                f"the budget is {max_tokens}: shorten {'the description' if described else 'the name'} or raise model.text.max_tokens"
            )
        chunks.append([index])
    return chunks


def phrase_spans(text: str) -> list[tuple[int, int]]:
    """Spans of the phrases of "a dog . a red cup" without the spaces around; a dot at the end is allowed.

    Empty if no separator stands between words: then the text is a caption. An empty span is a phrase that is missing.
    """
    edges = [0, *(edge for match in _SEPARATOR.finditer(text) for edge in match.span()), len(text)]
    spans = []
    for begin, end in zip(edges[::2], edges[1::2]):
        piece = text[begin:end]
        lead = len(piece) - len(piece.lstrip())
        spans.append((begin + lead, begin + lead + len(piece.strip())))
    if spans[-1][0] == spans[-1][1]:
        spans.pop()
    return spans if len(spans) > 1 else []


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Spans of what stands between full stops: " . " if there is one (`phrase_spans`), else "a cat. a dog."; without any, all."""
    stops = [match.span() for match in re.finditer(r"\.(?!\S)", text)]
    edges = [0, *(edge for stop in stops for edge in stop), len(text)]
    pieces = [(begin, end) for begin, end in zip(edges[::2], edges[1::2]) if text[begin:end].strip()]
    stripped = [(end - len(text[begin:end].lstrip()), begin + len(text[begin:end].rstrip())) for begin, end in pieces]
    return phrase_spans(text) or stripped


def phrases_of(text: str) -> Prompt:
    """The prompt of a text whose phrases stand between full stops. Raises PromptError for one without a phrase."""
    spans = sentence_spans(text)
    if not spans:
        raise prompts.PromptError(f"the text {text!r} names nothing: expected phrases with full stops between them")
    return Prompt(text, tuple((span,) for span in spans))
