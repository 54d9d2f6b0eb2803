"""Validates category lists of detection data sets: names, background classes, and ids that do not match the boxes."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from glip_jax.data.importers.entry import Report, SourceError
from glip_jax.data.importers.readers import other_forms
from glip_jax.structures.prompts import clean_name, equal_names, words

__all__ = ["Categories", "categories", "check_ids", "check_names"]

_BACKGROUND = {"background", "bg"}

_SHARE = 0.5
"""Fraction of boxes with unlisted categories above which the category list is refused."""

_ENOUGH = 10
"""Minimum number of boxes for that check."""


class Categories:
    """Category names in order of id, and the index of each id. Several ids may have one name."""

    def __init__(self, named: Mapping[Any, str], listed: Mapping[Any, str], background: frozenset[Hashable]) -> None:
        """`named`: text in the prompt by id, without what is left out; `listed`: name in the file by id."""
        self.names = tuple(dict.fromkeys(named.values()))
        order = {name: i for i, name in enumerate(self.names)}
        self.index = {identity: order[name] for identity, name in named.items()}
        self.background = background
        self._by_listed = {listed[identity]: name for identity, name in reversed(list(named.items()))}
        groups = [[identity for identity in named if self.index[identity] == i] for i in range(len(self.names))]
        self.ids = tuple(group[0] for group in groups)
        """The first id of each name."""
        titles = [{listed[identity] for identity in group} for group in groups]
        self.titles = tuple(t.pop() if len(t) == 1 else name for t, name in zip(titles, self.names, strict=True))
        """The name in the file of each name; the name itself where it joins several."""

    def find(self, identity: Any) -> int | None:
        """The index of the category with this id, or with the same number where no category has this id; None without one."""
        found = self.index.get(identity)
        if found is None and identity not in self.background:
            found = next((self.index[form] for form in other_forms(identity) if form in self.index), None)
        return found

    def is_background(self, identity: Any) -> bool:
        """Whether the id, or the same number, is that of a category that is left out."""
        if identity in self.index or identity in self.background:
            return identity in self.background
        return any(form in self.background for form in other_forms(identity))

    def names_of(self, ids: Any, where: str, report: Report) -> tuple[str, ...]:
        """Names of a list of ids; what is no id of a category is left out and noted."""
        if ids is None:
            return ()
        given = ids if isinstance(ids, list) else [ids]
        found = [self.find(i) if isinstance(i, int | float | str) and not isinstance(i, bool) else None for i in given]
        report.note(
            "name: id of no category in a list of the image, left out", f"{where}, {ids!r:.60}", found.count(None)
        )
        return tuple(self.names[i] for i in found if i is not None)

    def names_listed(self, listed: Any, where: str, report: Report) -> tuple[str, ...]:
        """Names of a list of names as they are in the file; what is no name of a category is left out and noted."""
        if listed is None:
            return ()
        given = listed if isinstance(listed, list) else [listed]
        found = [self._by_listed.get(name) if isinstance(name, str) else None for name in given]
        report.note(
            "name: of no category in a list of the image, left out", f"{where}, {listed!r:.60}", found.count(None)
        )
        return tuple(dict.fromkeys(name for name in found if name is not None))


def categories(
    listed: Mapping[Any, Mapping[str, Any]],
    used: Counter[Any],
    file: str,
    report: Report,
    rename: Mapping[str, str] | None = None,
    merge_names: bool = False,
) -> Categories:
    """Validates a category list.

    `listed`: categories by id, with `name`; `used`: number of boxes by category id; `rename`: prompt text by name, or by id.
    Background classes are omitted and noted, and so are headings: categories without boxes that others name as their
    `supercategory`, at any depth; neither is one that `rename` has. With `merge_names` categories of one name are one.
    Raises SourceError if there is no category, a name has no letter or digit, two ids have the same name (unless `rename` gives
    it to each), the ids of the boxes are shifted by one, or most boxes have an unlisted category.
    """
    named = {identity: str(item["name"]) for identity, item in sorted(listed.items(), key=_by_number_then_text)}
    texts, keys = _renamed(named, rename or {}, file)
    matched = Counter[Any]()
    for identity, count in used.items():
        forms = [identity] if identity in named else [form for form in other_forms(identity) if form in named]
        matched[forms[0] if forms else identity] += count
    background = {i for i, name in named.items() if i not in keys and name.strip("_ ").lower() in _BACKGROUND}
    for identity in sorted(background, key=str):
        report.note("category: background, left out", f"{file}, category {identity}, {named[identity]!r}")
    headings = _headings(listed, named, set(keys) | background | {i for i, count in matched.items() if count})
    for identity in headings if set(named) - background - set(headings) else ():
        report.note("category: heading without boxes, left out", f"{file}, category {identity}, {named[identity]!r}")
        background.add(identity)
    check_ids(set(named), matched, file)
    kept = {i: texts[i] for i in named if i not in background}
    if merge_names:
        kept |= {identity: kept[first] for identity, first in _alike(kept)}
    check_names(kept, file, keys, merge_names)
    for name, count in Counter(kept.values()).items():
        ids = ", ".join(str(i) for i in kept if kept[i] == name)
        report.note("category: of the same name as another, merged", f"{file}, categories {ids}, {name!r}", count - 1)
    return Categories(kept, named, frozenset(background))


def _renamed(named: Mapping[Any, str], rename: Mapping[str, str], file: str) -> tuple[dict[Any, str], dict[Any, str]]:
    """The text of each category, and the key of `rename` that gives it. A key is a name, else an id: 3 or id:3."""
    names = set(named.values())
    texts, keys = dict(named), {}
    unknown = set(rename)
    for identity, name in named.items():
        by_id = [key for key in (f"id:{identity}", str(identity)) if key in rename and key not in names]
        for key in (*by_id, name):
            if key in rename:
                texts[identity], keys[identity] = rename[key], key
                unknown -= {key}
                break
    if unknown:
        known = ", ".join(f"{name!r} (id {identity})" for identity, name in list(named.items())[:8])
        more = ", ..." if len(named) > 8 else ""
        raise SourceError(
            f"{file}: --names has {min(unknown)!r}, which is the name or id of no category: expected some of {known}{more}"
        )
    return texts, keys


def _headings(listed: Mapping[Any, Mapping[str, Any]], named: Mapping[Any, str], kept: set[Any]) -> list[Any]:
    """Ids of the categories, besides `kept`, that another category names as its supercategory."""
    above = {i: item.get("supercategory") for i, item in listed.items()}
    return [i for i in named if i not in kept and any(above[j] == named[i] for j in named if j != i)]


def _by_number_then_text(item: tuple[Any, Any]) -> tuple[bool, Any]:
    return isinstance(item[0], str), item[0]


def check_ids(listed: set[Any], used: Counter[Any], file: str) -> None:
    """Raises SourceError if the boxes use ids of another list, or ids that are shifted by one."""
    unlisted, boxes = sum(n for i, n in used.items() if i not in listed), sum(used.values())
    if not unlisted:
        return
    numbers = {form for i in used for form in (i, *other_forms(i)) if isinstance(form, int)}
    counted = [form for i in listed for form in (i, *other_forms(i)) if isinstance(form, int)]
    for shift, said in ((-1, "one lower"), (1, "one higher")):
        if 1 < len(numbers) == len(used) and numbers <= {i + shift for i in counted}:
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


def check_names(
    named: Mapping[Any, str], file: str, given: Mapping[Any, str] | None = None, merge_names: bool = False
) -> None:
    """Raises SourceError for names without letters or digits, an empty list, or duplicate names.

    Names may be duplicated with `merge_names`, and where different keys of --names gave them: `given`, key by id.
    """
    if not named:
        raise SourceError(f"{file}: 'categories' has no category besides background")
    seen: dict[str, list[Any]] = {}
    for identity, name in named.items():
        if not any(character.isalnum() for character in clean_name(name)):
            raise SourceError(
                f"{file}: category {identity} is named {name!r}, which has no letter or digit after cleaning: "
                "give it a text with --names"
            )
        seen.setdefault(name, []).append(identity)
    for name, ids in seen.items():
        keys = {(given or {}).get(identity) for identity in ids}
        if len(ids) > 1 and not merge_names and (None in keys or len(keys) < len(ids)):
            raise SourceError(
                f"{file}: categories {ids[0]} and {ids[1]} are both named {name!r}: give --merge-names if they are one, or tell "
                f'them apart by id with --names, a JSON file like {{"{ids[0]}": "first name", "{ids[1]}": "second name"}}'
            )
    for identity, first in _alike(named):
        raise SourceError(
            f"{file}: categories {first} ({named[first]!r}) and {identity} ({named[identity]!r}) are the same to the model, which reads "
            "no case, accents or underscores: give them texts that differ with --names, or --merge-names if they are one"
        )


def _alike(named: Mapping[Any, str]) -> Iterator[tuple[Any, Any]]:
    """Yields (id, id of an earlier category) of different names that the model reads alike."""
    ids = list(named)
    for index, other in equal_names([words(clean_name(name)) for name in named.values()]):
        one, two = named[ids[other]], named[ids[index]]
        # LVIS tells names apart in parentheses, which captions leave out: "bow_(weapon)".
        if one != two and "(" not in one + two:
            yield ids[index], ids[other]
