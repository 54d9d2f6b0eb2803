"""Tags the words of a caption with TextBlob's word list, and corrects tags that contradict their context.

The list has one tag per word, the most frequent one: "sink" is a verb, "parked" a participle, "orange" an adjective. The
correction rules look at the neighboring words, like the Brill rules that TextBlob provides; those were learned from
newspapers and improve captions less than half as much (benchmarks/RESULTS.md).
"""

import functools
import re
from collections.abc import Container

from glip_jax.labeling.phrases.rules import Word

__all__ = ["LexiconTagger", "word_list", "words_of"]

# A letter or digit with its combining accents.
_LETTER = r"[^\W_][\u0300-\u036f]*"
_APOSTROPHE = "['’´`ʼ]"
# A clitic; a word with inner hyphens and dots ("t-shirt", "u.s") but without "n't"; or any other single character. A line
# break is a token, so that no phrase crosses it.
_TOKEN = re.compile(
    rf"(?P<clitic>(?:{_APOSTROPHE}(?:s|d|m|ll|re|ve)|n{_APOSTROPHE}t)\b)"
    rf"|(?P<word>(?:{_LETTER})+?(?=n{_APOSTROPHE}t\b)|(?:{_LETTER})+(?:[-.·‐‑](?:{_LETTER})+)*)"
    r"|(?P<other>\n|\S)",
    re.IGNORECASE,
)
_NO_WORD = "SYM"
_PENN = re.compile(r"[A-Z]+\$?")
_NOUNS = ("NN", "NNS", "NNP", "NNPS")
_NAMES = (*_NOUNS, "JJ", "JJR", "JJS", "CD")
# Verbs in newspapers, nouns in captions.
_THINGS = {"bears": "NNS", "tracks": "NNS", "sinks": "NNS"}
_ROOMS = ("living", "dining", "parking")
_ACTIVITIES = ("skiing", "surfing", "snowboarding", "swimming", "racing", "cooking", "reading", "drinking", "petting")
_AUXILIARIES = ("is", "are", "be", "am", "has", "have", "does", "do")
_LEADS = ("DT", "CD", "JJ", "PRP$")
_ALONE = ("a", "an", "that", "this", "which", "one", "each", "another", "1")
_OPENERS = ("a", "an", "the", "his", "her", "its", "their")
_ENDS = ("IN", "CC", "VBZ", "VBG", "VBN", ",", _NO_WORD, "")


@functools.cache
def word_list() -> Container[str]:
    """TextBlob's English words as spelled in its list: names begin with a capital letter."""
    from textblob.en import parser

    return parser.lexicon


def words_of(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation and clitics."""
    return [match.group().lower() for match in _TOKEN.finditer(caption) if match.lastgroup == "word"]


class LexiconTagger:
    """Words of a caption with their Penn tags; every mark that is no word is SYM, a comma a comma."""

    def __init__(self) -> None:
        """Reads the word list (a fraction of a second)."""
        # Imported here because the import takes as long as that of jax.
        from textblob.en import parser

        self._parser = parser
        # Most captions use the same few thousand words.
        self._tag = functools.lru_cache(1 << 16)(self._lookup_tag)

    def words(self, caption: str) -> list[Word]:
        """The words and punctuation marks of a caption with their tags, in order."""
        texts, spans, tags = [], [], []
        for match in _TOKEN.finditer(caption):
            text = match.group().lower()
            texts.append(text)
            spans.append(match.span())
            tags.append(self._tag(text) if match.lastgroup == "word" else "," if text == "," else _NO_WORD)
        for number, text in enumerate(texts[:-1]):
            # "a cat next to", "a mammoth right of"; "the right of the picture" is a noun phrase.
            side = text in ("left", "right") and texts[number + 1] == "of" and number and tags[number - 1] != "DT"
            if side or (text == "next" and texts[number + 1] == "to"):
                tags[number] = "IN"
        _correct_tags(texts, tags)
        return list(map(Word, texts, spans, tags))

    def _lookup_tag(self, word: str) -> str:
        """The Penn Treebank tag of a lower-case word (as in the original: "Two" at the start of a sentence is no name)."""
        ((_, tag),) = self._parser.find_tags([word])
        # The list has some tags of its own, which the chunker's grammar cannot parse.
        tag = _THINGS.get(word, tag or _NO_WORD)
        return tag if _PENN.fullmatch(tag) else _NO_WORD


def _correct_tags(texts: list[str], tags: list[str]) -> None:
    """Corrects tags that contradict their neighbors, from left to right, in place."""
    for number, (text, tag) in enumerate(zip(texts, tags)):
        before = tags[number - 1] if number else ""
        after, next_after = (tags[number + 1 : number + 3] + ["", ""])[:2]
        if text in _AUXILIARIES:
            continue
        if tag in _NOUNS and before in _NOUNS and texts[number + 1 : number + 2] and texts[number + 1] in _OPENERS:
            # "the bedroom features a bed", "two kids share an orange".
            tags[number] = "VBZ" if tag == "NNS" else "VBP"
            continue
        if tag in ("VB", "VBP"):
            # "a sink", "a white drink": no verb follows a determiner; nor does one without "s" follow a singular noun.
            if before in ("DT", "JJ", "PRP$") or (before == "NN" and after in _ENDS):
                tags[number] = "NN"
        elif text in _ROOMS and after in _NOUNS:
            # "a tile living room floor".
            tags[number] = "NN"
        elif text == "that":
            # "on that chair"; not "a sign that says", "a dog that cats fear".
            if after in _NAMES and before not in _NOUNS:
                tags[number] = "DT"
        elif tag in ("VBN", "VBG", "VBD"):
            # "a parked car", "two smiling girls"; "dried flowers" (past participles only, not "riding waves").
            if after in _NAMES and (before in _LEADS or tag == "VBN"):
                tags[number] = "JJ"
                if tag == "VBN" and before == "NN" and after in _NOUNS:
                    # "a snow covered hill".
                    tags[number - 1] = "JJ"
            elif tag == "VBD" and before == "DT":
                # "a saw".
                tags[number] = "NN"
        elif tag == "VBZ":
            # "eats leaves", "with flies", "the tracks", "two sinks"; not "that reads", "this shows", "one stands".
            leads = before in ("VBG", "VB", "VBZ", "PRP$", "IN", "DT", "CD") and texts[number - 1] not in _ALONE
            if leads or (before == "JJ" and number > 1 and tags[number - 2] in ("DT", "CD") and after in _ENDS):
                tags[number] = "NNS"
        elif tag == "RB":
            # "a very large bridge", "a dimly lit room", "a barefoot child".
            adjective = after in ("JJ", "VBN", "VBD") and next_after in _NAMES
            if before in ("DT", "PRP$") and (adjective or after in _NOUNS):
                tags[number] = "JJ"
        elif tag == "JJ":
            # "an orange in a bowl", "a red top."; not "the white and blue bus".
            leads = before == "DT" or (before == "JJ" and number > 1 and tags[number - 2] == "DT")
            # "an orange sits", but "the green leaves".
            many = after == "VBZ" and texts[number - 1] not in _ALONE and texts[number + 1] not in _AUXILIARIES
            # "a little running shoe": a verb cannot stand between an adjective and its noun.
            describes = after == "VBG" and next_after in _NOUNS
            if leads and after in _ENDS and after not in ("CC", ",") and not many and not describes:
                tags[number] = "NN"
        elif tag == "NN":
            # "a man skiing on snow"; verbs with an object are handled above ("a bench reading a paper").
            if text in _ACTIVITIES and before in _NOUNS:
                tags[number] = "VBG"
        elif text == "can" and before in _NOUNS and after in (*_ENDS, "DT"):
            # "a trash can".
            tags[number] = "NN"
