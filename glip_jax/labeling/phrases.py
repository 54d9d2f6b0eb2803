"""Noun phrases of a caption, as character spans of the caption as it was given.

`PhraseFinder` is the interface that prediction and labelling take; `LexiconPhraseFinder` is the light way to do it:
TextBlob's lexicon tags every word, and nltk's chunker joins the tags by the original's grammar (glip-reference 5.7)
with numbers added. Neither needs a download: the lexicon lies inside TextBlob's wheel.
"""

import functools
import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

__all__ = [
    "GRAMMAR", "MOST_PHRASES", "Found", "LexiconPhraseFinder", "PhraseFinder", "find_phrases", "head", "head_word",
    "phrase_finder",
]  # fmt: skip

MOST_PHRASES = 32
"""Phrases of one caption that are kept unless another number is asked for."""

GRAMMAR = "NP: {<DT>?<CD|JJ.*>*<NN.*>+}"
"""The original's `<DT>?<JJ.*>*<NN.*>+`, with the numbers of "two small apples" (CD)."""

# A letter or digit with the accents that stand as characters of their own.
_LETTER = r"[^\W_][\u0300-\u036f]*"
_APOSTROPHE = "['’´`ʼ]"
# A clitic; a word with its inner hyphens and dots ("t-shirt", "u.s"), but not with its "n't"; or one character that is
# neither. A line break is a token of its own, so that no phrase runs across it.
_TOKEN = re.compile(
    rf"(?P<clitic>(?:{_APOSTROPHE}(?:s|d|m|ll|re|ve)|n{_APOSTROPHE}t)\b)"
    rf"|(?P<word>(?:{_LETTER})+?(?=n{_APOSTROPHE}t\b)|(?:{_LETTER})+(?:[-.·‐‑](?:{_LETTER})+)*)"
    r"|(?P<other>\n|\S)",
    re.IGNORECASE,
)
_NO_WORD = "SYM"
_PENN = re.compile(r"[A-Z]+\$?")


class Found(NamedTuple):
    """The phrases of a caption, and what was left out."""

    spans: tuple[tuple[int, int], ...]
    """(begin, end) characters of each phrase, end exclusive, in order, none overlapping."""
    dropped: dict[str, int]
    """Phrases left out, by reason; a reason without any is not there."""


@runtime_checkable
class PhraseFinder(Protocol):
    """What finds the noun phrases of a caption. `name` and `version` stand beside whatever is made with it."""

    @property
    def name(self) -> str:
        """Which finder this is."""
        ...

    @property
    def version(self) -> str:
        """Changes whenever the same caption may get other spans."""
        ...

    def find(self, caption: str) -> Found:
        """The phrases of `caption`, and how many were left out for which reason."""
        ...


class LexiconPhraseFinder:
    """Noun phrases by TextBlob's word list and nltk's chunker; thousands of captions a second, English only.

    Words are tagged one by one, without their context: unknown words count as nouns, and a word that is more often a
    verb ("sink") is lost as a noun. Phrases end at punctuation, at a line break and at a possessive ("a man" and "hat"
    in "a man's hat").
    """

    name = "lexicon"

    def __init__(self, most: int = MOST_PHRASES) -> None:
        """Reads the word list (a fraction of a second); `most` phrases of a caption are kept."""
        # Both libraries take as long to import as jax; what needs no phrases should not wait for them.
        from nltk.chunk.regexp import RegexpParser
        from textblob.en import parser

        self._tagger, self._chunker, self._most = parser, RegexpParser(GRAMMAR), most

    @property
    def version(self) -> str:
        """Our own number, and the versions of the libraries that hold the word list and the chunker."""
        libraries = (f"{name} {importlib.metadata.version(name)}" for name in ("textblob", "nltk"))
        return f"1 ({', '.join(libraries)})"

    def find(self, caption: str) -> Found:
        """Phrases of `caption` as it stands: any text, also empty, with double spaces or in another script."""
        spans, leaves = [], []
        for token, (begin, end), is_word in _tokens(caption):
            spans.append((begin, end))
            leaves.append((len(leaves), self._tag(token) if is_word else _NO_WORD))
        if not leaves:
            return Found((), {})
        tree: Any = self._chunker.parse(leaves)
        found = []
        for phrase in tree.subtrees(lambda part: part.label() == "NP"):
            numbers = [number for number, _ in phrase.leaves()]
            found.append((spans[numbers[0]][0], spans[numbers[-1]][1]))
        found.sort()
        cut = len(found) - self._most
        return Found(tuple(found[: self._most]), {"beyond the most": cut} if cut > 0 else {})

    def _tag(self, word: str) -> str:
        """The Penn tag of a word, in small letters as the original asks: at the head of a sentence "Two" is no name."""
        # Without context rules each word is tagged by itself, so nothing is lost by asking for one.
        ((_, tag),) = self._tagger.find_tags([word.lower()])
        # The list has a few tags of its own; the chunker's grammar reads them between < and >.
        return tag if _PENN.fullmatch(tag) else _NO_WORD


def _tokens(caption: str) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """(text, span, whether it is a word) of every token of a caption."""
    for match in _TOKEN.finditer(caption):
        kind = match.lastgroup
        yield match.group(), match.span(), kind == "word"


def phrase_finder(name: Literal["lexicon", "spacy"], most: int = MOST_PHRASES) -> PhraseFinder:
    """The finder of that name; it keeps at most `most` phrases of a caption and counts what it leaves out."""
    match name:
        case "lexicon":
            return LexiconPhraseFinder(most)
        case _:
            raise ValueError(f"phrase finder {name!r}: expected 'lexicon' or 'spacy'")


@functools.cache
def _default() -> LexiconPhraseFinder:
    return LexiconPhraseFinder()


def find_phrases(caption: str) -> list[tuple[int, int]]:
    """Spans of the noun phrases of `caption` by `LexiconPhraseFinder`: (begin, end) characters, end exclusive."""
    return list(_default().find(caption).spans)


def head(caption: str, span: tuple[int, int]) -> tuple[int, int]:
    """Span of the head noun of a phrase: its last word before any "of" ("cup" of "a cup of tea")."""
    words = [own for _, own, is_word in _tokens(caption[slice(*span)]) if is_word]
    texts = [caption[span[0] + begin : span[0] + end].casefold() for begin, end in words]
    if "of" in texts[1:]:
        words = words[: texts.index("of", 1)]
    begin, end = words[-1] if words else (0, span[1] - span[0])
    return span[0] + begin, span[0] + end


def head_word(caption: str, span: tuple[int, int]) -> str:
    """The head noun of a phrase in small letters and in the singular ("man" of "Two men")."""
    from textblob.en import inflect

    begin, end = head(caption, span)
    return inflect.singularize(caption[begin:end].casefold())
