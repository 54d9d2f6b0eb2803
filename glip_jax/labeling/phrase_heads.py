"""The noun that says what a phrase names, for comparing phrases with the class names of a detector."""

import functools
import re

__all__ = ["head", "head_word", "singular"]

_WORD = re.compile(r"[^\W_][\w\u0300-\u036f]*(?:[-'’.&](?:[^\W_][\w\u0300-\u036f]*))*")
# What ends the words that may hold a head: "a cup of tea", "a slice of pizza".
_OF = "of"

# TextBlob's singularize takes an "s" from any word; these are its faults among what pictures show, and plurals that have
# no singular. A word that its word list knows as a singular noun ("bus", "dress", "grass", "lens") is left as it is.
_SINGULARS = {
    "axes": "axe", "bikinis": "bikini", "binoculars": "binoculars", "brownies": "brownie",
   "buses": "bus", "cacti": "cactus", "cactuses": "cactus", "christmas": "christmas",
    "canoes": "canoe", "clothes": "clothes", "cookies": "cookie", "crossroads": "crossroads", "curves": "curve", "data": "data", "dice": "dice",
    "eyeglasses": "eyeglasses", "fries": "fries", "gases": "gas", "glasses": "glasses", "goggles": "goggles",
    "headphones": "headphones", "hippopotamuses": "hippopotamus", "hoodies": "hoodie", "kiwis": "kiwi", "knickers": "knickers", "rhinoceroses": "rhinoceros", "selfies": "selfie", "skiis": "ski", "smoothies": "smoothie", "taxis": "taxi", "zucchinis": "zucchini", "hoes": "hoe", "hooves": "hoof",
    "jeans": "jeans", "leggings": "leggings", "media": "media", "news": "news",
    "olives": "olive", "overalls": "overalls", "pajamas": "pajamas", "pants": "pants", "passersby": "passerby",
    "pies": "pie", "pliers": "pliers", "police": "police", "pyjamas": "pyjamas",
    "scarves": "scarf", "scissors": "scissors", "shelves": "shelf", "shorts": "shorts", "skis": "ski",
    "stairs": "stairs", "sunglasses": "sunglasses", "thieves": "thief", "ties": "tie",
    "tights": "tights", "toes": "toe", "tongs": "tongs", "trousers": "trousers", "tweezers": "tweezers",

}  # fmt: skip


def head(caption: str, span: tuple[int, int]) -> tuple[int, int]:
    """Span of the head noun of a phrase: its last word before any "of" ("cup" of "a cup of tea").

    A number at the end is no head ("bus" of "bus 42") unless there is nothing else; a span without any word is its own
    head.
    """
    words = list(_WORD.finditer(caption, *span))
    for number, word in enumerate(words):
        if number and word.group().casefold() == _OF:
            words = words[:number]
            break
    named = [word for word in words if not word.group().replace(".", "").isdigit()] or words
    return named[-1].span() if named else span


def head_word(caption: str, span: tuple[int, int]) -> str:
    """The head noun of a phrase in small letters and in the singular: "man" of "Two men", "bus" of "the buses".

    One word: whether "two wine glasses" are a "wine glass" is for the caller to see in the words before it.
    """
    begin, end = head(caption, span)
    return singular(caption[begin:end].casefold())


@functools.lru_cache(1 << 16)
def singular(noun: str) -> str:
    """A noun in small letters in the singular; one that is a singular, or has none ("scissors"), as it is."""
    # As long to import as jax.
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
