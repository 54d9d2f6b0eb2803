"""Whether a caption is English, as far as TextBlob's word list can tell: phrases of other languages are guesswork.

Of 25,014 captions of COCO that people wrote, none has fewer than six tenths of its words in the list and four have fewer
than seven; sentences of seven other European languages have four tenths to seven (the list knows many names).
"""

from typing import Final

from glip_jax.labeling.phrases.lexicon import word_list, words_of

__all__ = ["OTHER_SCRIPT", "PERHAPS_FOREIGN", "language_doubt"]

OTHER_SCRIPT: Final = "not in Latin letters"
"""Nothing can be found in it: the text encoder's vocabulary is English."""
PERHAPS_FOREIGN: Final = "perhaps not English, over three tenths of its words are in no English list"
_LEAST_WORDS, _LEAST_UNKNOWN = 3, 2
"""Of a short caption one word in no list ("three party poppers") says nothing."""


def language_doubt(caption: str) -> str:
    """OTHER_SCRIPT if most letters are not Latin, PERHAPS_FOREIGN for many unknown words, else nothing."""
    letters = [character for character in caption if character.isalpha()]
    # Latin letters with their accents end at U+024F, with what Vietnamese needs at U+1EFF.
    latin = sum(character < "\u0250" or "\u1e00" <= character < "\u1f00" for character in letters)
    if 2 * latin < len(letters):
        return OTHER_SCRIPT
    words, known = [word for word in words_of(caption) if word[0].isalpha()], word_list()
    unknown = sum(word not in known and word.capitalize() not in known for word in words)
    few = len(words) < _LEAST_WORDS or unknown < _LEAST_UNKNOWN
    return "" if few or 10 * unknown <= 3 * len(words) else PERHAPS_FOREIGN
