"""Category lists of detection sets: what is a name, what is background, and ids that do not fit what the boxes use."""

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

from glip_jax.data.importers.entry import Report, SourceError
from glip_jax.structures.prompts import clean_name

__all__ = ["Categories", "categories", "check_names"]

_BACKGROUND = {"background", "bg"}

_SHARE = 0.5
"""Share of boxes with unlisted categories from which on the list itself must be wrong."""

_ENOUGH = 10
"""Boxes from which a share says something."""


class Categories:
    """Names in order of id, and which id stands for which."""

    def __init__(self, named: Mapping[Any, str], background: frozenset[Hashable]) -> None:
        self.names = tuple(named.values())
        self.index = {identity: i for i, identity in enumerate(named)}
        self.named = dict(named)
        self.background = background

    def names_of(self, ids: Any) -> tuple[str, ...]:
        """Names of a list of ids; those that are no names are passed over."""
        found = (self.named.get(i) for i in (ids if isinstance(ids, list) else ()) if isinstance(i, int | str))
        return tuple(name for name in found if name is not None)


def categories(
    listed: Mapping[Any, Mapping[str, Any]],
    used: Counter[Any],
    file: str,
    report: Report,
    rename: Mapping[str, str] | None = None,
) -> Categories:
    """Looks through the category list.

    `listed`: by id, with `name`; `used`: boxes by category id. Left out, and noted: background classes, and the heading
    of all others that some tools write as category 0 (it has no boxes, and the others name it as `supercategory`).
    SourceError: no category, a name that cannot be prompted, one name for two ids, ids that the boxes count from another
    start, boxes of which most have no listed category.
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
    """SourceError for ids of boxes that belong to another list, or to this one counted from another start."""
    strange, boxes = sum(n for i, n in used.items() if i not in listed), sum(used.values())
    numbers = {i for i in used if isinstance(i, int)}
    if not strange or len(numbers) < len(used):
        return
    counted = [i for i in listed if isinstance(i, int)]
    for shift, words in ((-1, "one lower"), (1, "one higher")):
        if len(numbers) > 1 and numbers <= {i + shift for i in counted}:
            raise SourceError(
                f"{file}: the boxes use the category ids {min(numbers)} to {max(numbers)}, each {words} than a listed one "
                f"({min(counted)} to {max(counted)}): names would be shifted by one; make both count from the same start"
            )
    if boxes >= _ENOUGH and strange > _SHARE * boxes:
        example = next(i for i in used if i not in listed)
        raise SourceError(
            f"{file}: {strange} of {boxes} boxes have a category that is not listed (first: {example!r}); "
            "expected the category list that these boxes were made with"
        )


def check_names(named: Mapping[Any, str], file: str) -> None:
    """SourceError for names that cannot stand in a prompt, one name for two categories, or none at all."""
    if not named:
        raise SourceError(f"{file}: 'categories' has no category besides background")
    seen: dict[str, Any] = {}
    for identity, name in named.items():
        if not any(character.isalnum() for character in clean_name(name)):
            raise SourceError(
                f"{file}: category {identity} is named {name!r}, of which cleaning leaves no letter or digit: "
                "give it a text with --names"
            )
        if name in seen:
            raise SourceError(
                f"{file}: categories {seen[name]} and {identity} are both named {name!r}: tell them apart with --names"
            )
        seen[name] = identity
