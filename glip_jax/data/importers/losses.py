"""Refuses a file of boxes of which none is kept, or of which most are lost for one reason."""

from collections.abc import Collection

from etils import epath

from glip_jax.data.importers.entry import Report, SourceError

__all__ = ["refuse_losses", "remedy"]

_REMEDIES = {
    "box: crowd": "set --crowds=keep if each is a single object, as masks of CVAT or SAM are, or --crowds=drop if they are crowds",
    "box: category not listed": "expected category_id to be an id of the list 'categories'",
    "box: background class": "if it is a class of objects, give it a text with --names",
    "box: image not listed": "expected image_id to be an id of the list 'images'",
    "box: not four numbers": "expected bbox to be x, y, width, height",
    "box: not finite": "expected bbox to be x, y, width, height",
    "box: no area": "expected bbox to be x, y, width, height in pixels; corners need --boxes=xyxy",
    "box: outside the image": "expected boxes in pixels of these images: are they boxes of other images, or of another size?",
    "box: no span": "expected tokens_positive, the characters of the caption that the box belongs to",
    "box: no span left": "expected tokens_positive, the characters of the caption that the box belongs to",
    "image: file missing": "set --images to the folder in which the listed paths exist",
    "image: size differs": "use the images that were annotated, not smaller or rotated copies",
}

_CHOSEN = {"image: excluded"}
"""Reasons that only an option brings about."""


def refuse_losses(
    report: Report, records: int, boxes: int, file: epath.PathLike, chosen: Collection[str] = (), allow: bool = False
) -> None:
    """Raises SourceError if a file has boxes and none is kept, or if more than half of its boxes or images are lost for one reason.

    `records`, `boxes`: what is kept. `chosen`: reasons that were asked for, which may take most; `allow`: so may every reason.
    """
    lost = {reason: n for reason, n in report.dropped.items() if reason.startswith("box: ")}
    without_image = lost.pop("box: image dropped", 0)
    images = {reason: n for reason, n in report.dropped.items() if reason.startswith("image: ")}
    total = boxes + sum(lost.values()) + without_image
    if not total:
        return
    by_count = sorted({**lost, **(images if without_image else {})}.items(), key=lambda item: -item[1])
    if not boxes:
        reasons = ", ".join(f"{reason} {n} (first: {report.first[reason]:.160})" for reason, n in by_count[:3])
        raise SourceError(f"{file}: none of {total} boxes is kept; dropped: {reasons}{remedy(by_count[0][0])}")
    for what, found, listed in (
        ("boxes", lost, total),
        ("images", images, records + sum(images.values())),
    ):
        for reason, n in found.items():
            if 2 * n > listed and not allow and reason not in chosen and reason not in _CHOSEN:
                raise SourceError(
                    f"{file}: {n} of {listed} {what} are dropped for one reason, {reason} (first: {report.first[reason]:.160})"
                    f"{remedy(reason)}; --allow-drops keeps the rest"
                )


def remedy(reason: str) -> str:
    """What to do about a reason for drops, as the end of a message; "" if nothing is known."""
    return f"; {_REMEDIES[reason]}" if reason in _REMEDIES else ""
