"""Published data sets: what is known of their sizes, and how an import compares with it.

Each file of `gcs/manifests` is one set: its annotation files, how many records, boxes and names they list, who says so,
and which other numbers are known and why. An import is compared with what it listed before anything was dropped.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etils import epath

from glip_jax.data.importers.entry import SourceError
from glip_jax.io.assets import bundled

__all__ = ["MANIFESTS", "Comparison", "Published", "compare", "find", "load"]

MANIFESTS = bundled("gcs/manifests")

_COUNTS = ("records", "boxes", "names")


@dataclass(frozen=True)
class Published:
    """A published set, one split."""

    name: str
    title: str
    files: tuple[str, ...]
    """Names of annotation files that are recognised as this set."""
    counts: dict[str, int]
    """What the files list, by records, boxes, names; only what is known."""
    units: dict[str, str]
    """What one of each is, where that needs words, e.g. records: captions."""
    source: str
    """Who says so."""
    licence: str
    within: dict[str, int] = field(default_factory=dict)
    """How far a count may be off because it is published rounded."""
    variants: tuple[dict[str, Any], ...] = ()
    """Other known numbers: some of the counts, and `why`."""
    address: str = ""
    """Where the owner publishes it."""


@dataclass(frozen=True)
class Comparison:
    """One count beside the published one."""

    what: str
    found: int
    expected: int
    within: int
    """By how much the published number may be off: it is rounded."""
    explanation: str
    """Empty where they are equal."""

    def line(self) -> str:
        """For the report."""
        if not self.explanation:
            about = f" (rounded: {self.expected:,})" if self.within else ""
            return f"{self.found:,} {self.what}, as published{about}"
        return f"{self.found:,} {self.what}, published are {self.expected:,}: {self.explanation}"


def load(folder: Path | None = None) -> dict[str, Published]:
    """All sets by name; SourceError for a file that does not fit. `folder`: default MANIFESTS."""
    sets, folder = {}, folder or MANIFESTS
    for path in sorted(folder.glob("*.json")):
        try:
            fields = json.loads(path.read_text())
            fields.update(files=tuple(fields["files"]), variants=tuple(fields.get("variants", ())))
            sets[path.stem] = Published(name=path.stem, **fields)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SourceError(f"{path} is no manifest of a published set ({error})") from None
        unknown = set(sets[path.stem].counts) - set(_COUNTS)
        if unknown:
            raise SourceError(f"{path}: counts has {unknown.pop()!r}, expected some of {', '.join(_COUNTS)}")
    return sets


def find(annotations: epath.PathLike, name: str = "") -> Published | None:
    """The set of that name, or, without a name, the one that the annotation file's own name says; None if none does.

    SourceError for a name that there is not.
    """
    sets = load()
    if name and name not in sets:
        raise SourceError(f"there is no published set {name!r} in {MANIFESTS}; there are: {', '.join(sets)}")
    if name:
        return sets[name]
    file = epath.Path(annotations).name
    return next((published for published in sets.values() if file in published.files), None)


def compare(published: Published, found: Mapping[str, int]) -> list[Comparison]:
    """Each known count beside the one found; differences that are a known variant are explained."""
    comparisons = []
    for what, expected in published.counts.items():
        if what not in found:
            continue
        explanation, within = "", published.within.get(what, 0)
        if abs(found[what] - expected) > within:
            known = [v["why"] for v in published.variants if v.get(what) == found[what]]
            explanation = known[0] if known else "no variant with this number is known; is the file whole?"
        unit = f"{what} ({published.units[what]})" if what in published.units else what
        comparisons.append(Comparison(unit, found[what], expected, within, explanation))
    return comparisons
