"""Noun phrases of captions: articles, numbers, plurals and adjectives."""

from glip_jax.data.scenes.pictures import COLORS

__all__ = ["conflict", "noun_phrase", "plural", "recolored", "says_color", "without_color"]

_COUNTS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Plural and uncountable names: "some jeans", "some corn". By the last word of the head.
_UNCOUNTED = frozenset((
    "bacon", "bags", "beads", "beans", "blueberries", "bread", "briefs", "broccoli", "bubbles", "butter", "chains", "cherries",
    "chopsticks", "coral", "corn", "curry", "dango", "dna", "dolls", "eyeglasses", "fire", "footprints", "fries", "garlic",
    "gloves", "goggles", "grapes", "headphones", "jeans", "lettuce", "masks", "meat", "music", "pancakes", "paper",
    "peanuts", "pins", "popcorn", "prints", "ramen", "rice", "scissors", "shoes", "shorts", "socks", "spaghetti", "stew",
    "sunglasses", "sushi", "swords",
))  # fmt: skip
_IRREGULAR = {
    "mouse": "mice", "deer": "deer", "fish": "fish", "sheep": "sheep", "tooth": "teeth", "ox": "oxen", "bison": "bison",
    "die": "dice", "squid": "squid", "shrimp": "shrimp", "leaf": "leaves", "scarf": "scarves", "blowfish": "blowfish",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "buffalo": "buffaloes", "wolf": "wolves", "knife": "knives",
    "foot": "feet", "volcano": "volcanoes", "tornado": "tornadoes", "mosquito": "mosquitoes", "sheaf": "sheaves", "octopus": "octopuses", "cactus": "cacti",
}  # fmt: skip
_WHOLE = {"bow and arrow": "bows and arrows", "fleur-de-lis": "fleurs-de-lis"}
_OTHER_COLOR = {
    "red": "yellow", "orange": "blue", "yellow": "purple", "green": "red", "blue": "orange", "purple": "yellow", "pink": "green",
    "brown": "blue", "black": "yellow", "white": "red", "gray": "yellow",
}  # fmt: skip
"""A color that cannot be taken for the given one, whatever the light of a scene."""
_BEFORE_REST = (" of ", " with ", " on ", " behind ", " in ")


def _head(name: str) -> tuple[str, str]:
    """Splits a name after the noun that is inflected: ("glass", " of milk")."""
    cuts = [name.index(word) for word in _BEFORE_REST if word in name]
    return (name[: min(cuts)], name[min(cuts) :]) if cuts else (name, "")


def plural(name: str) -> str:
    """The plural of a name, by the last word of its head: red apple -> red apples, glass of milk -> glasses of milk."""
    if name in _WHOLE:
        return _WHOLE[name]
    head, rest = _head(name)
    *before, last = head.split(" ")
    if _is_uncounted(name):
        inflected = last
    elif last in _IRREGULAR:
        inflected = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh", "z")):
        inflected = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        inflected = last[:-1] + "ies"
    elif last.endswith("man"):
        inflected = last[:-2] + "en"
    else:
        inflected = last + "s"
    return " ".join([*before, inflected]) + rest


def noun_phrase(name: str, count: int, size: str = "", color: str = "", definite: bool = False) -> str:
    """Noun phrase for `count` objects: "a big snail", "two red apples", "the two red apples", "some jeans"."""
    adjectives = f"{size} {color}".strip()
    if _is_uncounted(name):
        return " ".join(filter(None, ("the" if definite else "some", adjectives, name)))
    if count == 1:
        words = f"{adjectives} {name}".strip()
        return f"the {words}" if definite else f"{_article(words)} {words}"
    number = _COUNTS[count] if count < len(_COUNTS) else str(count)
    return " ".join(filter(None, ("the" if definite else "", number, adjectives, plural(name))))


def says_color(name: str) -> bool:
    """Whether a name contains a color, so that no other may be put before it."""
    return any(color in name for color in (*COLORS, "gold", "silver", "bronze", "rainbow"))


def recolored(name: str, color: str) -> str:
    """The name of the same thing in another color: "red apple" -> "yellow apple"; with `color` "blue" "bucket" -> "orange bucket".

    `color`: of the pictures of the name, "" if they have no one color. "" where neither says a color.
    """
    words = name.split(" ")
    said = [word for word in words if word in _OTHER_COLOR]
    if len(said) == 1:
        return " ".join(_OTHER_COLOR.get(word, word) for word in words)
    return f"{_OTHER_COLOR[color]} {name}" if color and not says_color(name) else ""


def without_color(name: str) -> str:
    """The name without words of color: "yellow apple" -> "apple"."""
    return " ".join(word for word in name.split(" ") if word not in _OTHER_COLOR)


def conflict(first: str, second: str) -> bool:
    """Whether one name begins or ends with the words of the other, so that the shorter one is ambiguous."""
    short, long = sorted((first.split(" "), second.split(" ")), key=len)
    return long[: len(short)] == short or long[-len(short) :] == short


def _is_uncounted(name: str) -> bool:
    head, _ = _head(name)
    return head == "shaved ice" or head.split(" ")[-1] in _UNCOUNTED


def _article(words: str) -> str:
    # By pronunciation: "a unicorn", "an x-ray".
    if words.startswith(("uni", "eu", "one", "uk")):
        return "a"
    return "an" if words[0] in "aeiou" or words.startswith(("x-ray", "hour")) else "a"
