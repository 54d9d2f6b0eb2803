"""GLIP in the pipeline "zero-shot-object-detection" of transformers.

    pipe = pipeline("zero-shot-object-detection", model=folder, trust_remote_code=True)
    pipe(image, candidate_labels=["cat", "remote control"])

All labels are asked together, in as many prompts as they need, so the boxes and scores are those of the Auto classes.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ZeroShotObjectDetectionPipeline
from transformers.image_utils import load_image

__all__ = ["GlipPipeline"]

logger = logging.getLogger(__name__)


class GlipPipeline(ZeroShotObjectDetectionPipeline):
    """Takes and returns what `ZeroShotObjectDetectionPipeline` does.

    Labels in a list are asked as they are typed; of a string, what stands between commas, as there. Boxes are whole pixels.
    """

    _load_processor = True

    def __init__(self, **kwargs: Any) -> None:
        """Takes the arguments of every pipeline; `processor` is needed."""
        super().__init__(**kwargs)
        # transformers puts classes there, with which the model could not be saved.
        for task in getattr(self.model.config, "custom_pipelines", {}).values():
            task["pt"] = [getattr(each, "__name__", each) for each in task["pt"]]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves the model with everything that this pipeline needs."""
        super().save_pretrained(save_directory, **kwargs)
        processor: Any = self.processor
        processor.save_pretrained(save_directory)

    def get_iterator(self, inputs: Any, num_workers: int, batch_size: int, *parameters: Any) -> Any:
        """One image after the other: images of different sizes are not put into one batch here, but by the processor."""
        if batch_size > 1:
            logger.warning(f"batch_size={batch_size}: this pipeline runs one image at a time")
        return super().get_iterator(inputs, num_workers, 1, *parameters)

    def preprocess(self, inputs: Any, timeout: float | None = None) -> Iterator[dict[str, Any]]:
        """Inputs of the model for each prompt. Raises ValueError for labels that the processor refuses."""
        image, labels = inputs["image"], inputs["candidate_labels"]
        if isinstance(image, str) and Path(image).is_file():
            image = Image.open(image)  # load_image would cut gray of 16 bits off at 255
        if not isinstance(image, Image.Image):
            image = load_image(image, timeout=timeout)
        if isinstance(labels, str):
            labels = [label.strip() for label in labels.split(",")]
        processor: Any = self.processor
        image = processor.image_processor.to_rgb(image)
        pixels = processor.image_processor(image, return_tensors="pt").to(self.dtype)
        parts = processor.split_names(labels)
        for number, part in enumerate(parts, 1):
            names = [labels[index] for index in part]
            yield {
                "is_last": number == len(parts), "target_size": torch.tensor([[image.height, image.width]]),
                "names": names, **processor(text=[names]), **pixels,
            }  # fmt: skip

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        kept = {key: model_inputs.pop(key) for key in ("is_last", "target_size", "names")}
        return {**kept, "outputs": self.model(**model_inputs)}

    def postprocess(
        self, model_outputs: list[dict[str, Any]], threshold: float = 0.1, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """Detections of an image, best first: score, label (as it was given), box (xmin, ymin, xmax, ymax)."""
        processor: Any = self.processor
        names, found = list[str](), list[dict[str, Any]]()
        for part in model_outputs:
            # Names compete over all prompts, by their scores of before.
            (each,) = processor.post_process_grounded_object_detection(
                part["outputs"], threshold=0.0, target_sizes=part["target_size"], name_decay=0.0
            )
            found.append(each | {"labels": each["labels"] + len(names)})
            names += part["names"]
        boxes, scores, labels = (torch.cat([each[field] for each in found]) for field in ("boxes", "scores", "labels"))
        boxes, scores, labels = processor.compete(boxes, scores, labels)
        results = [
            {"score": score, "label": names[label], "box": self._get_bounding_box(box)}
            for box, score, label in zip(boxes, scores.tolist(), labels.tolist())
            if score > threshold
        ]
        return results[:top_k] if top_k else results
