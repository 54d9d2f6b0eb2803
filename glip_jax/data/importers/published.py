"""Published sizes of data sets, and their comparison with an import.

Each file of `gcs/manifests` describes one data set: its annotation files, the numbers of records, boxes and names that they
list, the source of these numbers, and other known numbers with their reasons. The numbers that an import lists before any
drop are compared with them.
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
    """One split of a published data set."""

    name: str
    title: str
    files: tuple[str, ...]
    """Names of annotation files by which the set is recognized."""
    counts: dict[str, int]
    """Known numbers of records, boxes and names in the files."""
    units: dict[str, str]
    """Units of these numbers where they are not obvious, e.g. records: captions."""
    source: str
    """Source of the numbers."""
    licence: str
    within: dict[str, int] = field(default_factory=dict)
    """Tolerance of numbers that are published rounded."""
    variants: tuple[dict[str, Any], ...] = ()
    """Other known numbers: some of the counts, and the reason `why`."""
    address: str = ""
    """URL at which the data set is published."""


@dataclass(frozen=True)
class Comparison:
    """A count and the published one."""

    what: str
    found: int
    expected: int
    within: int
    """Tolerance of the published number, which may be rounded."""
    explanation: str
    """Why the numbers differ; empty if they agree."""

    def line(self) -> str:
        """The comparison as a line of the report."""
        if not self.explanation:
            about = f" (rounded: {self.expected:,})" if self.within else ""
            return f"{self.found:,} {self.what}, as published{about}"
        return f"{self.found:,} {self.what}, published are {self.expected:,}: {self.explanation}"


def load(folder: Path | None = None) -> dict[str, Published]:
    """All published data sets by name; SourceError for an invalid file. `folder`: default MANIFESTS."""
    sets, folder = {}, folder or MANIFESTS
    for path in sorted(folder.glob("*.json")):
        try:
            fields = json.loads(path.read_text())
            fields.update(files=tuple(fields["files"]), variants=tuple(fields.get("variants", ())))
            sets[path.stem] = Published(name=path.stem, **fields)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SourceError(f"{path} is not a manifest of a published set ({error})") from None
        unknown = set(sets[path.stem].counts) - set(_COUNTS)
        if unknown:
            raise SourceError(f"{path}: counts has {unknown.pop()!r}, expected some of {', '.join(_COUNTS)}")
    return sets


def find(annotations: epath.PathLike, name: str = "") -> Published | None:
    """The set named `name`, or, without a name, the set that has a file named like `annotations`; None if there is none.

    Raises SourceError for an unknown name.
    """
    sets = load()
    if name and name not in sets:
        raise SourceError(f"there is no published set {name!r} in {MANIFESTS}; there are: {', '.join(sets)}")
    if name:
        return sets[name]
    file = epath.Path(annotations).name
    return next((published for published in sets.values() if file in published.files), None)


def compare(published: Published, found: Mapping[str, int]) -> list[Comparison]:
    """Compares the counts of an import with the published ones; explains differences that are a known variant."""
    comparisons = []
    for what, expected in published.counts.items():
        if what not in found:
            continue
        explanation, within = "", published.within.get(what, 0)
        if abs(found[what] - expected) > within:
            known = [v["why"] for v in published.variants if v.get(what) == found[what]]
            explanation = known[0] if known else "no variant with this number is known; is the file complete?"
        unit = f"{what} ({published.units[what]})" if what in published.units else what
        comparisons.append(Comparison(unit, found[what], expected, within, explanation))
    return comparisons
