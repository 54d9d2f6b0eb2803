"""Estimates by TextBlob's word list whether a caption is English; phrase finders do not work for other languages.

Of 25,014 human-written captions of COCO, none has fewer than 60 % of its words in the list, and four have fewer than 70 %.
Sentences of seven other European languages have 40 % to 70 % (the list contains many names).
"""

from typing import Final

from glip_jax.labeling.phrases.lexicon import word_list, words_of

__all__ = ["OTHER_SCRIPT", "PERHAPS_FOREIGN", "language_doubt"]

OTHER_SCRIPT: Final = "not in Latin letters"
"""Such captions are skipped: the vocabulary of the text encoder is English."""
PERHAPS_FOREIGN: Final = "perhaps not English, over 30 % of its words are not in the English word list"
_MIN_WORDS, _MIN_UNKNOWN = 3, 2
"""A single unknown word of a short caption ("three party poppers") is no evidence."""


def language_doubt(caption: str) -> str:
    """Returns OTHER_SCRIPT if most letters are not Latin, PERHAPS_FOREIGN if many words are unknown, else ""."""
    letters = [character for character in caption if character.isalpha()]
    # Latin letters with accents end at U+024F; Vietnamese ones are U+1E00 to U+1EFF.
    latin = sum(character < "\u0250" or "\u1e00" <= character < "\u1f00" for character in letters)
    if 2 * latin < len(letters):
        return OTHER_SCRIPT
    words, known = [word for word in words_of(caption) if word[0].isalpha()], word_list()
    unknown = sum(word not in known and word.capitalize() not in known for word in words)
    few = len(words) < _MIN_WORDS or unknown < _MIN_UNKNOWN
    return "" if few or 10 * unknown <= 3 * len(words) else PERHAPS_FOREIGN
