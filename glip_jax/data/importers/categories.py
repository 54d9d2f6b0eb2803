"""Validates category lists of detection data sets: names, background classes, and ids that do not match the boxes."""

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

from glip_jax.data.importers.entry import Report, SourceError
from glip_jax.structures.prompts import clean_name, equal_names, words

__all__ = ["Categories", "categories", "check_names"]

_BACKGROUND = {"background", "bg"}

_SHARE = 0.5
"""Fraction of boxes with unlisted categories above which the category list is refused."""

_ENOUGH = 10
"""Minimum number of boxes for that check."""


class Categories:
    """Category names in order of id, and the index of each id."""

    def __init__(self, named: Mapping[Any, str], background: frozenset[Hashable]) -> None:
        self.names = tuple(named.values())
        self.index = {identity: i for i, identity in enumerate(named)}
        self.named = dict(named)
        self.background = background

    def names_of(self, ids: Any) -> tuple[str, ...]:
        """Names of a list of ids; unknown ids are skipped."""
        found = (self.named.get(i) for i in (ids if isinstance(ids, list) else ()) if isinstance(i, int | str))
        return tuple(name for name in found if name is not None)


def categories(
    listed: Mapping[Any, Mapping[str, Any]],
    used: Counter[Any],
    file: str,
    report: Report,
    rename: Mapping[str, str] | None = None,
) -> Categories:
    """Validates a category list.

    `listed`: categories by id, with `name`; `used`: number of boxes by category id; `rename`: prompt text by name. Background
    classes are omitted and noted, and so is the parent of all others that some tools write as category 0 (it has no boxes, and
    the others name it as `supercategory`). Raises SourceError if there is no category, a name has no letter or digit, two ids
    have the same name, the ids of the boxes are shifted by one, or most boxes have an unlisted category.
    """
    named = {identity: str(item["name"]) for identity, item in sorted(listed.items(), key=_by_number_then_text)}
    background = frozenset(i for i, name in named.items() if name.strip("_ ").lower() in _BACKGROUND)
    for identity in background:
        report.note("category: background, left out", f"{file}, category {identity}, {named[identity]!r}")
    for identity in set(named) - background:
        rest = [listed[i].get("supercategory") for i in named if i != identity and i not in background]
        if not used[identity] and rest and all(heading == named[identity] for heading in rest):
            report.note(
                "category: heading without boxes, left out", f"{file}, category {identity}, {named[identity]!r}"
            )
            background |= {identity}
    _check_ids(set(named), used, file)
    kept = {i: name for i, name in named.items() if i not in background}
    unknown = sorted(set(rename or {}) - set(kept.values()))
    if unknown:
        raise SourceError(f"{file}: the rename map has {unknown[0]!r}, no category has that name")
    kept = {i: (rename or {}).get(name, name) for i, name in kept.items()}
    check_names(kept, file)
    return Categories(kept, background)


def _by_number_then_text(item: tuple[Any, Any]) -> tuple[bool, Any]:
    return isinstance(item[0], str), item[0]


def _check_ids(listed: set[Any], used: Counter[Any], file: str) -> None:
    """Raises SourceError if the boxes use ids of another list, or ids that are shifted by one."""
    unlisted, boxes = sum(n for i, n in used.items() if i not in listed), sum(used.values())
    numbers = {i for i in used if isinstance(i, int)}
    if not unlisted or len(numbers) < len(used):
        return
    counted = [i for i in listed if isinstance(i, int)]
    for shift, said in ((-1, "one lower"), (1, "one higher")):
        if len(numbers) > 1 and numbers <= {i + shift for i in counted}:
            raise SourceError(
                f"{file}: the boxes use the category ids {min(numbers)} to {max(numbers)}, each {said} than a listed one "
                f"({min(counted)} to {max(counted)}): names would be shifted by one; make both count from the same start"
            )
    if boxes >= _ENOUGH and unlisted > _SHARE * boxes:
        example = next(i for i in used if i not in listed)
        raise SourceError(
            f"{file}: {unlisted} of {boxes} boxes have a category that is not listed (first: {example!r}); "
            "expected the category list that these boxes were made with"
        )


def check_names(named: Mapping[Any, str], file: str) -> None:
    """Raises SourceError for names without letters or digits, duplicate names, or an empty list."""
    if not named:
        raise SourceError(f"{file}: 'categories' has no category besides background")
    seen: dict[str, Any] = {}
    for identity, name in named.items():
        if not any(character.isalnum() for character in clean_name(name)):
            raise SourceError(
                f"{file}: category {identity} is named {name!r}, which has no letter or digit after cleaning: "
                "give it a text with --names"
            )
        if name in seen:
            raise SourceError(
                f"{file}: categories {seen[name]} and {identity} are both named {name!r}: distinguish them with --names"
            )
        seen[name] = identity
    ids = list(named)
    for index, other in equal_names([words(clean_name(name)) for name in named.values()]):
        one, two = named[ids[other]], named[ids[index]]
        # LVIS tells names apart in parentheses, which captions leave out: "bow_(weapon)".
        if one != two and "(" not in one + two:
            raise SourceError(
                f"{file}: categories {ids[other]} ({one!r}) and {ids[index]} ({two!r}) are the same to the model, which reads "
                "no case, accents or underscores: give them texts that differ with --names"
            )
