"""The paths of a Label Studio ML backend: `/setup`, `/predict`, `/validate`, `/versions`; `/health` is the server's own.

Label Studio sends tasks (`{"id": 1, "data": {"image": ADDRESS}}`) and the labeling interface of the project, in XML. Asked are the labels of its
rectangles, or, where an annotator typed a text into a TextArea, that text; it is kept for the project. Boxes are in percent of the image.
https://labelstud.io/guide/ml_create
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NamedTuple
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from fastapi import Body, FastAPI, HTTPException, Request

from glip_jax import UserError
from glip_jax.cli.query import Query
from glip_jax.cli.serving.images import data_of_address, data_of_file, within
from glip_jax.cli.serving.service import Answer, Service
from glip_jax.io.image_files import ImageFileError

__all__ = ["Interface", "InterfaceError", "add_paths", "read_interface"]

_PROJECTS = 256
"""Projects whose text is kept."""
_INTERFACE = 1_000_000
"""Characters of a labeling interface."""
_NAME = 200
"""Characters of the name of a tag, which every region repeats, and of a project."""
_CONTROLS = {"RectangleLabels": "rectanglelabels", "Rectangle": "labels"}
"""Tags that draw boxes, and the type of a region that has its labels, in a field of the same name. A `Rectangle` has those of a `Labels` beside it."""


class InterfaceError(UserError, ValueError):
    """A labeling interface, or tasks, that boxes cannot be written for."""


class Interface(NamedTuple):
    """What a labeling interface says of boxes."""

    from_name: str
    to_name: str
    kind: str
    """Type of a region that has a label, and the field that it is in: `rectanglelabels` or `labels`."""
    rectangle: str
    """Name of the `Rectangle` tag, which a region of its own stands for; "" for a `RectangleLabels`."""
    image: str
    """Field of a task that has the image's address."""
    labels: tuple[str, ...]
    threshold: float | None
    """`model_score_threshold` of the tag that draws the boxes."""


def read_interface(xml: str) -> Interface:
    """The first rectangles of a labeling interface. Raises InterfaceError for one without, that is no XML, or too long."""
    if len(xml) > _INTERFACE:
        raise InterfaceError(f"label_config has {len(xml)} characters: expected at most {_INTERFACE}")
    try:
        tree = fromstring(xml, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, TypeError) as error:
        raise InterfaceError(
            f"label_config is no XML that can be read ({type(error).__name__}): expected Label Studio's labeling interface"
        ) from None
    images = {tag.get("name"): tag.get("value", "") for tag in tree.iter("Image")}
    controls = [tag for kind in _CONTROLS for tag in tree.iter(kind)]
    if not controls or not images:
        raise InterfaceError(
            "label_config has no <RectangleLabels> with an <Image>: expected an interface that draws boxes on images"
        )
    control = controls[0]
    named = (
        control
        if control.tag == "RectangleLabels"
        else next((tag for tag in tree.iter("Labels") if tag.get("toName") == control.get("toName")), control)
    )
    labels = tuple(dict.fromkeys(value for tag in named.iter("Label") if (value := (tag.get("value") or "").strip())))
    to_name = control.get("toName") or ""
    if to_name not in images or not images[to_name].startswith("$"):
        raise InterfaceError(f"label_config: toName={to_name!r} names no <Image> with a value such as $image")
    from_name = named.get("name") or ""
    rectangle = "" if control is named else control.get("name") or ""
    if max(map(len, (from_name, to_name, rectangle))) > _NAME:
        raise InterfaceError(f"label_config: a tag has a name of more than {_NAME} characters: shorten it")
    return Interface(
        from_name, to_name, _CONTROLS[control.tag], rectangle, images[to_name][1:], labels, _threshold(control)
    )


def _threshold(control: Element) -> float | None:
    given = control.get("model_score_threshold")
    try:
        value = None if given is None else float(given)
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value < 1:
        raise InterfaceError(f"label_config: model_score_threshold={given!r}: expected 0 <= threshold < 1")
    return value


def add_paths(
    app: FastAPI, service: Service, files: str, answered: Callable[[Request, float, Awaitable[Any]], Awaitable[Any]]
) -> None:
    """Adds the paths. `files`: folder below which images of tasks may lie, "" for none; `answered`: waits for work as `/detect` does."""
    version = f"{service.model.name} {service.model.sha256[:12]}"
    texts: OrderedDict[str, str] = OrderedDict()
    lock = threading.Lock()

    def asked(xml: str, project: str, typed: str) -> tuple[Interface, Query, list[str]]:
        """The interface, what is asked, and the label of each phrase. A text is kept for its project when it can be asked."""
        interface = read_interface(xml)
        with lock:
            text = typed or texts.get(project, "")
        query = service.query(text=text) if text else service.query(_labels(interface))
        labels = _labels_of(query, interface)
        if typed:
            with lock:
                texts[project] = typed
                while len(texts) > _PROJECTS:
                    texts.popitem(last=False)
        return interface, query, labels

    @app.post("/setup", summary="Label Studio: a project connects")
    async def setup(interface: Annotated[str, Body(alias="schema", embed=True)] = "") -> dict[str, Any]:
        if interface:
            await asyncio.to_thread(read_interface, interface)
        return {"model_version": version}

    @app.post("/validate", summary="Label Studio: whether boxes can be written for an interface")
    async def validate(config: Annotated[str, Body(embed=True)]) -> dict[str, Any]:
        await asyncio.to_thread(read_interface, config)
        return {"status": "ok"}

    @app.get("/versions", summary="Label Studio: the model's version")
    async def versions() -> dict[str, Any]:
        return {"versions": [version]}

    @app.post("/predict", summary="Label Studio: boxes for tasks")
    async def predict(
        request: Request,
        tasks: Annotated[list[dict[str, Any]], Body()],
        label_config: Annotated[str, Body()],
        project: Annotated[str | int | float | None, Body()] = "",
        params: Annotated[dict[str, Any] | None, Body()] = None,
    ) -> dict[str, Any]:
        begin = time.monotonic()
        if not 0 < len(tasks) <= service.limits.images:
            raise HTTPException(
                413,
                f"{len(tasks)} tasks: expected 1 to {service.limits.images}; send several requests, or start the server with --max-images",
            )
        # "ID.TIME_OF_CREATION"
        own = str(project).partition(".")[0][:_NAME]
        interface, query, names = await asyncio.to_thread(
            asked, label_config, own, _typed((params or {}).get("context"))
        )
        least = service.model.threshold if interface.threshold is None else interface.threshold
        images = [
            (
                f"task {task.get('id', number)!r:.40}: {interface.image:.40}",
                _reader(task, interface, files, service.limits.bytes_),
            )
            for number, task in enumerate(tasks, 1)
        ]
        found = await answered(request, service.limits.seconds, service.detect(images, query, least))
        results = [
            {
                "result": regions,
                "score": max((region["score"] for region in regions), default=0.0),
                "model_version": version,
            }
            for regions in (_regions(answer, interface, names) for answer in found)
        ]
        return {
            "results": results,
            "model_version": version,
            **service.model.about,
            "seconds": round(time.monotonic() - begin, 4),
        }


def _labels(interface: Interface) -> Sequence[str]:
    if not interface.labels:
        raise InterfaceError("label_config has no <Label> to ask for, and no text was typed: add labels")
    return interface.labels


def _typed(context: Any) -> str:
    """The text of the last TextArea in what an annotator just did; "" for none."""
    results = context.get("result") if isinstance(context, dict) else None
    for region in reversed(results if isinstance(results, list) else []):
        value = region.get("value") if isinstance(region, dict) else None
        texts = value.get("text") if isinstance(value, dict) else None
        if isinstance(texts, str):
            return texts.strip()
        if isinstance(texts, list) and texts and isinstance(texts[-1], str):
            return texts[-1].strip()
    return ""


def _labels_of(query: Query, interface: Interface) -> list[str]:
    """The label of each phrase: the one that it names, else the only one. Raises InterfaceError where there are several."""
    if query.names:
        return list(query.names)
    known = {label.casefold(): label for label in interface.labels}
    labels = []
    for phrase in query.phrases:
        words = phrase.text.casefold().strip()
        bare = words.partition(" ")[2] if words.partition(" ")[0] in ("a", "an", "the") else words
        label = known.get(words) or known.get(bare)
        if label is None and len(known) != 1:
            raise InterfaceError(
                f"the text's phrase {phrase.text!r:.80} is none of the {len(known)} labels: name labels, or have one label for all that is typed"
            )
        labels.append(label or interface.labels[0])
    return labels


def _reader(task: dict[str, Any], interface: Interface, files: str, most: int) -> Callable[[], bytes]:
    """Reads the image of a task: what the request carries, or a file of at most `most` bytes below `files`."""

    def read() -> bytes:
        data = task.get("data")
        address = data.get(interface.image) if isinstance(data, dict) else None
        if not isinstance(address, str) or not address:
            raise ImageFileError("is not there: expected an address in the task's data")
        carried = data_of_address(address)
        return data_of_file(within(files, address), most) if carried is None else carried

    return read


def _regions(answer: Answer, interface: Interface, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The regions of an image, as Label Studio writes them: a box of a `Rectangle` with `Labels` is two regions of one identifier."""
    regions = []
    for number, found in enumerate(answer.detections):
        x1, y1, x2, y2 = found["box"]
        sides = {"x": 100 * x1 / answer.width, "y": 100 * y1 / answer.height, "width": 100 * (x2 - x1) / answer.width,
                 "height": 100 * (y2 - y1) / answer.height, "rotation": 0}  # fmt: skip
        box = {"id": f"glip{number}", "to_name": interface.to_name, "original_width": answer.width, "original_height": answer.height,
               "image_rotation": 0, "score": found["score"]}  # fmt: skip
        if interface.rectangle:
            regions.append({**box, "from_name": interface.rectangle, "type": "rectangle", "value": sides})
        label = {interface.kind: [labels[found["phrase"]]]}
        regions.append({**box, "from_name": interface.from_name, "type": interface.kind, "value": sides | label})
    return regions
