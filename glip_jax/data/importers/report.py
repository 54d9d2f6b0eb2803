"""The report of a build: `report.json` in the folder, and a table for the terminal."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt64

from glip_jax.data.importers.entry import Report
from glip_jax.data.importers.published import Published, compare
from glip_jax.data.shards import Manifest

__all__ = ["BuildReport", "summary"]


@dataclass(frozen=True)
class BuildReport:
    """Counts of a build; several records may have the same image."""

    name: str
    licence: str
    records: int
    images: int
    """Number of distinct images (by content)."""
    boxes: int
    phrases: int
    """Number of phrases with a box."""
    names: int
    names_without_boxes: int
    listed_records: int
    """Number of records in the annotation file, before any drop."""
    listed_boxes: int
    drops: dict[str, dict[str, Any]]
    """Dropped items by reason: count, first (an example)."""
    notes: dict[str, dict[str, Any]]
    """Remarks on kept items, in the same format."""
    duplicates: dict[str, Any]
    """Records with the image of an earlier record: records (count), first (a pair of record numbers in reading order)."""
    exclude: list[dict[str, Any]]
    """Sources of the hashes of excluded images: file, hashes, sha256; the number of excluded images is in `drops`."""
    inputs: list[dict[str, Any]]
    """Annotation files: file, bytes, sha256."""
    inputs_sha256: str
    """Hash of the hashes of all inputs."""
    published: dict[str, Any] | None
    """The published data set, and the comparison of the counts."""
    settings: dict[str, Any]
    """The options that decide the records: folders as absolute paths, files as their SHA-256."""

    def table(self) -> str:
        """The report as aligned lines for the terminal."""
        rows: list[tuple[str, str, str]] = [
            (
                "kept images",
                f"{self.records}",
                "" if self.records == self.images else f"{self.images} distinct",
            ),
            ("kept boxes", f"{self.boxes}", ""),
        ]
        if self.phrases:
            rows.append(("kept phrases", f"{self.phrases}", ""))
        if self.names:
            without = f"{self.names_without_boxes} without a box" if self.names_without_boxes else ""
            rows.append(("names", f"{self.names}", without))
        rows += [(f"noted {what}", f"{n['count']}", f"first: {n['first']}") for what, n in self.notes.items()]
        rows += [(f"dropped {reason}", f"{n['count']}", f"first: {n['first']}") for reason, n in self.drops.items()]
        if not self.drops:
            rows.append(("dropped", "0", ""))
        if self.duplicates["records"]:
            one, other = self.duplicates["first"]
            rows.append(("duplicate images", f"{self.duplicates['records']}", f"first: records {one} and {other}"))
        if self.exclude:
            met = self.drops.get("image: excluded", {"count": 0})["count"]
            listed = sum(item["hashes"] for item in self.exclude)
            rows.append(("overlap with --exclude", f"{met}", f"of {listed} images in {len(self.exclude)} lists"))
        width = max(len(row[0]) for row in rows)
        lines = [f"{name:<{width}}  {count:>8}  {example}".rstrip() for name, count, example in rows]
        lines.append(f"inputs: {', '.join(item['file'] for item in self.inputs)}  sha256 {self.inputs_sha256[:16]}")
        lines.append(f"licence: {self.licence}")
        if self.published is None:
            lines.append("published numbers: none known for this file")
        else:
            lines.append(f"published numbers: {self.published['title']} ({self.published['source']})")
            lines += [f"  {line}" for line in self.published["comparison"]]
        return "\n".join(lines)


def summary(
    manifest: Manifest,
    report: Report,
    labels: Counter[int],
    hashes: UInt64[np.ndarray, " records"],
    inputs: Sequence[dict[str, Any]],
    exclude: Sequence[dict[str, Any]],
    known: Published | None,
    settings: dict[str, Any],
) -> BuildReport:
    """Creates the report of a build; `labels`: number of boxes by category, `settings`: see `BuildReport`."""
    dropped_boxes = sum(n for reason, n in report.dropped.items() if reason.startswith("box: "))
    dropped_images = sum(n for reason, n in report.dropped.items() if reason.startswith("image: "))
    listed = {
        "records": manifest.records + dropped_images,
        "boxes": manifest.boxes + dropped_boxes,
        "names": len(manifest.names),
    }
    joined = hashlib.sha256("".join(item["sha256"] for item in inputs).encode()).hexdigest()
    comparisons = [] if known is None else compare(known, listed)
    return BuildReport(
        name=manifest.name, licence=manifest.licence, records=manifest.records, images=len(np.unique(hashes)),
        boxes=manifest.boxes, phrases=report.kept["phrases"], names=len(manifest.names),
        names_without_boxes=sum(not labels[i] for i in range(len(manifest.names))),
        listed_records=listed["records"], listed_boxes=listed["boxes"],
        drops=_examples(report, report.dropped), notes=_examples(report, report.noted),
        duplicates=_duplicates(hashes), exclude=list(exclude), inputs=list(inputs), inputs_sha256=joined,
        published=None if known is None else {
            "name": known.name, "title": known.title, "source": known.source, "licence": known.licence,
            "counts": [asdict(comparison) for comparison in comparisons],
            "comparison": [comparison.line() for comparison in comparisons],
        },
        settings=settings,
    )  # fmt: skip


def _examples(report: Report, counts: Counter[str]) -> dict[str, dict[str, Any]]:
    return {what: {"count": n, "first": report.first[what]} for what, n in sorted(counts.items())}


def _duplicates(hashes: UInt64[np.ndarray, " records"]) -> dict[str, Any]:
    """Number of records that repeat an image, and the first such pair."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    earlier = first[inverse]
    again = np.flatnonzero(earlier != np.arange(len(hashes)))
    pair = [int(earlier[again[0]]), int(again[0])] if len(again) else []
    return {"records": len(again), "first": pair}
