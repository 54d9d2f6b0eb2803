"""Rules that turn the noun chunks of a finder into phrases: which words a phrase keeps, and which chunks name no object.

The rules are the same for every finder. They follow the original GLIP, which keeps a determiner in the phrase ("a man"), has
no possessive pronouns in its grammar, and treats each occurrence of a phrase separately:

- Determiners and quantities directly before the noun are kept: "a man", "some cows", "two small apples", "several dogs".
- Possessives are removed, the owner is a phrase of its own: "his hat" -> "hat", "a man's hat" -> "a man" and "hat".
- Coordinated nouns become separate phrases ("a laptop", "mouse"), coordinated adjectives do not ("a black and white cat").
- Dropped, and counted by reason: pronouns; objects stated to be absent ("no cars", "without a lid"); quantities with
  "of" ("a couple of dogs" -> "dogs"); abstract heads ("a view of a street" -> "a street", "the front", "the middle",
  "a sunny day"); phrases beyond the maximum number.

The word tables are small and English. Words that are in none of them are kept: a phrase without an object costs only one
low score of the teacher.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from glip_jax.labeling.phrases.heads import singular

__all__ = ["MAX_PHRASES", "REASONS", "VERSION", "Phrases", "PhraseRules", "Reason", "Word"]

VERSION = 3
"""Incremented with every change of a rule or a table."""

MAX_PHRASES = 32
"""Default maximum number of phrases per caption."""

Reason = Literal["pronoun", "absent", "quantity", "abstract", "surplus"]
REASONS: tuple[Reason, ...] = ("pronoun", "absent", "quantity", "abstract", "surplus")
"""Why a phrase is dropped; surplus: beyond the maximum number per caption."""


class Word(NamedTuple):
    """A word, clitic or punctuation mark of a caption with its tag."""

    text: str
    """In lower case."""
    span: tuple[int, int]
    tag: str
    """Penn Treebank tag; marks without one there may have any other tag."""


class Phrases(NamedTuple):
    """The phrases of a caption, and the dropped ones."""

    spans: tuple[tuple[int, int], ...]
    """(begin, end) characters of each phrase, end exclusive; ordered, not overlapping."""
    dropped: dict[str, int]
    """Number of dropped phrases by reason (`REASONS`); reasons without any are omitted."""
    surplus: tuple[tuple[int, int], ...] = ()
    """(begin, end) characters of the phrases beyond the maximum number."""
    left_out: tuple[tuple[tuple[int, int], str], ...] = ()
    """(begin, end) characters and reason of every dropped phrase."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_PRONOUNS = _words("""
    one ones someone somebody something anyone anybody anything everyone everybody everything none nobody nothing other
    others another it he she they we i you him her them us me this that these those who whom which what itself himself
    herself themselves yourself myself ourselves each both all some any many several few most more half either neither
    there
""")
# Words before a determiner that do not describe the object.
_BEFORE_DETERMINERS = _words(
    "all both half such quite just only about over even what rather nearly almost of not and or"
)
_DETERMINERS = _words("a an the this that these those some any each every another either")
_NONE = _words("no zero neither")
# Quantities if "of" follows; the counted noun comes after it.
_QUANTITIES = _words("""
    group groups bunch bunches couple couples pair pairs lot lots number numbers variety varieties collection assortment
    array set sets series crowd crowds herd herds flock flocks pack row rows cluster clusters gang batch dozen dozens
    hundreds thousands piece pieces bit bits plenty load loads ton tons amount kind kinds type types sort sorts style
    part parts portion portions selection mix mixture range handful majority rest half host trio duo family body flight
    swarm multitude abundance quantity quantities
""")
# The image itself where a caption begins with them ("a photo of ..."); elsewhere, objects ("a picture on the wall").
_PICTURES = _words("picture pictures photo photos photograph photographs image images scene scenes snapshot shots")
_VIEWS = _words("view views shot closeup closeups close-up close-ups up selfie selfies perspective angle angles look")
_TAKEN = _words("take takes taking took taken snap snaps snapping for")
# "looks at the camera": the camera that took the image.
_FACING = _words("at for facing to toward towards into")
_TIMES = _words("""
    day days night nights morning afternoon evening noon midnight midday dusk dawn daytime nighttime daylight time times
    year years month months week weeks hour hours minute minutes moment season summer winter autumn today tonight weekend
    birthday holiday christmas halloween
""")
_DOINGS = _words("""
    action motion use fun love progress activity activities event life work attempt effort pose poses position purpose
    reason direction directions order unison way ways manner color colors colour colours size sizes shape shapes trick
    tricks stunt stunts jump jumps turn turns ride walk swing game games match race competition tournament practice
    conversation nap break attention preparation air midair mid-air background foreground distance middle midst vicinity
    fashion formation sense sale pursuit mid-jump mid-flight rain storm wind weather poker
""")
# Abstract only without a describing word: "the top" and "the other side", but not "a red top".
_PLACES = _words("""
    front back top tops bottom side sides left right center centre end ends edge edges corner corners inside outside rear
    area place places spot spots part parts interior exterior surroundings display duty position half
""")
_PLACE_WORDS = _words("""
    left right far very other opposite front back upper lower top bottom near same middle outer inner either open
    different both all various many several
""")
# Colors that taggers take for nouns: "a silver and green train" is one phrase.
_COLOURS = _words("orange silver gold magenta turquoise cream tan teal beige pink purple violet grey gray")
_SIDES = _words("left right")
_SINGULAR_DETERMINERS = _words("a an one another every each this that")
# Nouns despite their ending: "a tile living room", "a plastic cutting board".
_PURPOSES = _words(
    "living dining parking waiting cutting sewing washing swimming shopping building landing looking flying"
)
# "in a row", "in line": an arrangement, not an object.
_ARRANGEMENTS = _words("row rows line lines group groups pair pairs circle bunch stack")
# Without a word before them an activity, not an object: "playing baseball", but "a baseball".
_PASTIMES = _words("""
    tennis baseball soccer football basketball volleyball cricket golf hockey polo rugby badminton softball chess
    lunch dinner breakfast skiing surfing snowboarding skateboarding
""")


class PhraseRules:
    """Turns a finder's chunks into phrases; the same for every finder."""

    def __init__(self, max_phrases: int = MAX_PHRASES) -> None:
        """At most `max_phrases` (>= 1) phrases of a caption are kept; later ones count as surplus."""
        if max_phrases < 1:
            raise ValueError(f"at most {max_phrases} phrases of a caption: expected 1 or more")
        self._max_phrases = max_phrases
        self.version = f"rules {VERSION}, at most {max_phrases}"

    def apply(self, words: Sequence[Word], chunks: Iterable[tuple[int, int]]) -> Phrases:
        """Returns the phrases of a caption.

        `words`: the words of the caption; `chunks`: (begin, end) word indices, ordered and not overlapping.
        """
        spans: list[tuple[int, int]] = []
        surplus: list[tuple[int, int]] = []
        left_out: list[tuple[tuple[int, int], str]] = []
        dropped: Counter[str] = Counter()
        for chunk in chunks:
            for begin, end in _parts(words, *chunk):
                reason = _reason(words, begin, end, first=not spans)
                if reason is None and len(spans) == self._max_phrases:
                    reason = "surplus"
                span = words[begin].span[0], words[end - 1].span[1]
                if reason is None:
                    spans.append(span)
                else:
                    dropped[reason] += 1
                    left_out.append((span, reason))
                    surplus += [span] if reason == "surplus" else []
        return Phrases(tuple(spans), dict(dropped), tuple(surplus), tuple(left_out))


def _is_noun(word: Word) -> bool:
    return word.tag.startswith("NN") or word.tag == "FW"


def _is_word(word: Word) -> bool:
    return word.text[0].isalnum()


def _parts(words: Sequence[Word], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Splits a chunk at possessives and between coordinated nouns; punctuation at the ends of a part is removed."""
    start = begin
    for number in range(begin, end):
        word, after_noun = words[number], number > start and _is_noun(words[number - 1])
        if after_noun and words[number - 1].text in _COLOURS and number + 1 < end and words[number + 1].tag == "JJ":
            continue
        if word.tag in ("PRP$", "WP$"):
            # "all his dogs": words before the possessive are removed with it.
            start = number + 1
        elif (
            word.tag == "POS"
            or (after_noun and number + 1 < end and _divides(word))
            or (after_noun and words[start].text in _SINGULAR_DETERMINERS and _is_plural(word))
        ):
            yield from _trimmed(words, start, number)
            start = number + 1
    yield from _trimmed(words, start, end)


def _divides(word: Word) -> bool:
    """Whether a word between two nouns separates phrases: "a laptop and keyboard", "a surfer riding waves"."""
    return word.tag == "CC" or word.text == "," or (word.tag == "VBG" and word.text not in _PURPOSES)


def _joins(noun: Word, word: Word) -> bool:
    """Whether a word is the verb of the noun before it: "riding" in "a surfer riding waves"."""
    return _is_noun(noun) and word.tag == "VBG" and _divides(word)


def _is_plural(word: Word) -> bool:
    """Whether a word tagged as a noun is a plural: after "a seaplane", "lands" is a verb despite its tag."""
    return word.tag == "NNS" and word.text.endswith("s") and singular(word.text) != word.text


def _trimmed(words: Sequence[Word], begin: int, end: int) -> Iterator[tuple[int, int]]:
    # "a cup right of a plate": "right" is not a noun there, whatever its tag.
    while end > begin and (not _is_word(words[end - 1]) or _is_a_side(words, begin, end - 1)):
        end -= 1
    # "how many dogs" -> "dogs".
    if end - begin > 1 and words[begin].text == "how":
        begin += 1
    if end - begin > 1 and words[begin].text in ("many", "much") and begin and words[begin - 1].text == "how":
        begin += 1
    # "all the people" -> "the people".
    lead = begin
    while lead < end and words[lead].text in _BEFORE_DETERMINERS:
        lead += 1
    if begin < lead < end and words[lead].text in _DETERMINERS:
        begin = lead
    while begin < end and (
        not _is_word(words[begin])
        or words[begin].tag in ("CC", "IN")
        or (begin and _joins(words[begin - 1], words[begin]))
    ):
        begin += 1
    if begin < end:
        yield begin, end


def _is_a_side(words: Sequence[Word], begin: int, number: int) -> bool:
    """Whether word `number` of a phrase is a direction, as "right" in "a cup right of a plate"."""
    if words[number].text not in _SIDES or number == begin:
        return False
    of = number + 1 < len(words) and words[number + 1].text == "of"
    return _is_noun(words[number - 1]) or (of and words[number - 1].text not in _DETERMINERS)


def _reason(words: Sequence[Word], begin: int, end: int, first: bool) -> Reason | None:
    """Why the phrase names no object; None if it does. `first`: no phrase of the caption was kept before it."""
    head, before = words[end - 1].text, words[begin - 1].text if begin else ""
    # "a mammoth right of a book": the word before the direction is an object, whatever its tag.
    thing = end - begin > 1 and end < len(words) and _is_a_side(words, begin, end)
    if head in _PRONOUNS or not (thing or any(_is_noun(word) for word in words[begin:end])):
        return "pronoun"
    if words[begin].text in _NONE or before == "without":
        return "absent"
    of = end < len(words) and words[end].text == "of"
    if of and head in _QUANTITIES:
        return "quantity"
    if head in _VIEWS or head in _TIMES or head in _DOINGS:
        return "abstract"
    if head in _PICTURES and _is_the_picture_itself(words, begin, end, first):
        return "abstract"
    if head == "close" and end < len(words) and words[end].text == "up":
        return "abstract"
    if head == "camera" and before in _FACING and end - begin == 2 and words[begin].text == "the":
        return "abstract"
    describing = [word for word in words[begin : end - 1] if word.tag not in ("DT", "CD", "PDT", "PRP$")]
    if head in _PLACES and all(word.text in _PLACE_WORDS for word in describing):
        return "abstract"
    if head in _ARRANGEMENTS and before == "in" and not any(map(_is_noun, describing)):
        return "abstract"
    if head in _PASTIMES and end - begin == 1:
        return "abstract"
    return None


def _is_the_picture_itself(words: Sequence[Word], begin: int, end: int, first: bool) -> bool:
    """Whether the phrase is the image itself: "a photo of a dog", "this image shows", "in the picture"."""
    before = words[begin - 1].text if begin else ""
    of = end < len(words) and words[end].text == "of"
    pointed = words[begin].text in ("this", "these") or (words[begin].text == "the" and before in ("of", "in", "this"))
    return (first and of) or before in _TAKEN or (pointed and end - begin == 2)
