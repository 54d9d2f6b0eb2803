"""Head nouns of phrases, for comparing phrases with the class names of a detector."""

import functools
import re

__all__ = ["head", "head_word", "singular"]

_WORD = re.compile(r"[^\W_][\w\u0300-\u036f]*(?:[-'’.&](?:[^\W_][\w\u0300-\u036f]*))*")
# The head is before it: "a cup of tea", "a slice of pizza".
_OF = "of"

# Corrections of TextBlob's singularize, which strips "s" from any word, for nouns of common objects, and plurals without a
# singular. Words that its word list has as singular nouns ("bus", "dress", "grass", "lens") are not singularized.
_SINGULARS = {
    "abacuses": "abacus", "hibiscuses": "hibiscus", "neckties": "necktie",
    "bikinis": "bikini", "binoculars": "binoculars", "brownies": "brownie", "cactuses": "cactus", "canoes": "canoe",
    "christmas": "christmas", "clothes": "clothes", "crossroads": "crossroads", "curves": "curve", "data": "data",
    "eyeglasses": "eyeglasses", "fries": "fries", "glasses": "glasses", "goggles": "goggles",
    "headphones": "headphones", "hippopotamuses": "hippopotamus", "hoes": "hoe", "hoodies": "hoodie",
    "hooves": "hoof", "kiwis": "kiwi", "knickers": "knickers", "leggings": "leggings", "media": "media",
    "olives": "olive", "overalls": "overalls", "pajamas": "pajamas", "pants": "pants", "passersby": "passerby",
    "pies": "pie", "police": "police", "pyjamas": "pyjamas", "scarves": "scarf", "selfies": "selfie",
    "shelves": "shelf", "shorts": "shorts", "skiis": "ski", "skis": "ski", "smoothies": "smoothie",
    "stairs": "stairs", "taxis": "taxi", "thieves": "thief", "ties": "tie", "tights": "tights", "toes": "toe",
    "tongs": "tongs", "trousers": "trousers", "tweezers": "tweezers", "zucchinis": "zucchini",
}  # fmt: skip


def head(caption: str, span: tuple[int, int]) -> tuple[int, int]:
    """Span of the head noun of a phrase: its last word before any "of" ("cup" in "a cup of tea").

    A trailing number is not the head ("bus" in "bus 42") unless the phrase has no other word. A span without words is
    returned unchanged.
    """
    words = list(_WORD.finditer(caption, *span))
    for number, word in enumerate(words):
        if number and word.group().casefold() == _OF:
            words = words[:number]
            break
    named = [word for word in words if not word.group().replace(".", "").isdigit()] or words
    return named[-1].span() if named else span


def head_word(caption: str, span: tuple[int, int]) -> str:
    """The head noun of a phrase in lower case and singular: "man" for "Two men", "bus" for "the buses".

    A single word: for "two wine glasses" the caller must look at the words before it.
    """
    begin, end = head(caption, span)
    return singular(caption[begin:end].casefold())


@functools.lru_cache(1 << 16)
def singular(noun: str) -> str:
    """The singular of a lower-case noun; singulars, and plurals without a singular ("scissors"), are returned unchanged."""
    # Imported here because the import takes as long as that of jax.
    from textblob.en import inflect, parser

    if noun in _SINGULARS:
        return _SINGULARS[noun]
    *before, last = noun.split("-")
    if before:
        return "-".join([*before, singular(last)])
    if not noun.isascii() or not noun.isalpha() or len(noun) < 3 or noun.endswith(("ss", "us", "is")):
        return noun
    if noun.endswith("s") and parser.lexicon.get(noun, "NNS") == "NN":
        return noun
    return inflect.singularize(noun)
