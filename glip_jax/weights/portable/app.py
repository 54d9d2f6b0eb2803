"""A page to try the model of this folder, with Gradio: a Space of Hugging Face, or `python app.py` on any machine.

Type what to look for, with commas between, and see its boxes. The slider hides boxes without running the model again.
"""

import functools
import logging
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

__all__ = ["above", "detect", "page"]

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
LOWEST = 0.05
"""Boxes with lower scores cannot be shown."""
PIXELS = 50_000_000
"""Larger images are refused."""

Found = tuple[Image.Image, list[dict[str, Any]]]


@functools.cache
def model() -> Any:
    """The pipeline of the folder, loaded once."""
    from transformers import pipeline

    return pipeline("zero-shot-object-detection", model=str(FOLDER), trust_remote_code=True)


def detect(image: Image.Image | None, names: str) -> Found:
    """The upright image, and its detections: score, label, box. Raises ValueError for what cannot be asked."""
    if image is None:
        raise ValueError("no image: drop one, or choose a file")
    if image.width * image.height > PIXELS:
        raise ValueError(f"the image has {image.width} x {image.height} pixels: at most {PIXELS:,} are taken")
    labels = [name.strip() for name in names.split(",") if name.strip()]
    if not labels:
        raise ValueError("nothing to look for: type names with commas between, such as: red apple, dog")
    upright = ImageOps.exif_transpose(image)
    return upright.convert("RGB"), model()(upright, candidate_labels=labels, threshold=LOWEST)


def above(found: Found | None, threshold: float) -> tuple[tuple[Image.Image, list[Any]] | None, str]:
    """What gradio's AnnotatedImage shows of detections, and a line that counts them by name."""
    if found is None:
        return None, ""
    image, detections = found
    kept = [each for each in detections if each["score"] >= threshold]
    counts: dict[str, int] = {}
    for each in kept:
        counts[each["label"]] = counts.get(each["label"], 0) + 1
    boxes = [(tuple(each["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")), each["label"]) for each in kept]
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    return (image, boxes), f"found: {text}" if text else f"nothing found with a score of {threshold:g} or more"


def page() -> Any:
    """The page as a gradio.Blocks, which `launch` serves."""
    import gradio  # pyright: ignore[reportMissingImports]

    def search(image: Image.Image | None, names: str, threshold: float) -> tuple[Any, ...]:
        try:
            found = detect(image, names)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        return found, *above(found, threshold)

    with gradio.Blocks(title="Find what a text names") as blocks:
        found = gradio.State()
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="pil", label="image")
                names = gradio.Textbox(label="look for", placeholder="red apple, dog", max_length=2000)
                threshold = gradio.Slider(LOWEST, 0.95, 0.3, step=0.01, label="lowest score")
                button = gradio.Button("search", variant="primary")
            with gradio.Column():
                shown = gradio.AnnotatedImage(label="found")
                text = gradio.Markdown()
        for event in (button.click, names.submit):
            event(search, [image, names, threshold], [found, shown, text], api_name="detect")
        threshold.change(above, [found, threshold], [shown, text], show_progress="hidden", api_name=False)
    return blocks


if __name__ == "__main__":
    model()
    page().launch()
