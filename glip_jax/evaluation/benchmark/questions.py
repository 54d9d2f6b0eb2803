"""What a set asks of its images: prompts, and the meaning of their phrases. Reads the official annotation files.

`read_questions` gives the prompts of each image, the detector returns one `Detections` per prompt, and `answer_rows` turns these
into rows of the file of predictions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from glip_jax.config import Config
from glip_jax.evaluation.benchmark.sets import Ask, BenchmarkSet
from glip_jax.structures.batch import Detections, Prompt
from glip_jax.structures.prompts import Tokenizer

__all__ = [
    "AskedImage",
    "Question",
    "Questions",
    "answer_arrays",
    "answer_rows",
    "ask_config",
    "join_rows",
    "read_questions",
]


class Question(NamedTuple):
    """A prompt for an image."""

    id: Any
    """What the answer belongs to: the id of the image, of the expression, or (image id, sentence id) of Flickr30k."""
    prompt: Prompt | None
    """None: nothing can be asked, because no phrase has a token within the budget. The answer is empty."""
    keys: tuple[Any, ...]
    """Per phrase of the prompt: category id, index of the phrase of the caption, or description id."""
    phrases: int = 0
    """Flickr30k: phrases of the caption, those that cannot be asked included."""


class AskedImage(NamedTuple):
    """An image and its questions, without pixels."""

    id: Any
    """Unique within `Questions.images`."""
    file: str
    """Path below `Questions.folder`."""
    height: int | None
    """As annotated; None: not listed."""
    width: int | None
    questions: tuple[Question, ...]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts that are asked, in order."""
        return [question.prompt for question in self.questions if question.prompt is not None]


@dataclass(frozen=True)
class Questions:
    """The questions of a set in one way of asking it."""

    item: BenchmarkSet
    ask: Ask
    annotations: epath.Path
    folder: epath.Path
    """Folder of the images."""
    images: Sequence[AskedImage]
    counts: Mapping[str, int]
    """images, prompts, phrases, and by layout categories, boxes, expressions, captions, descriptions."""
    names: Mapping[Any, str] = field(default_factory=dict)
    """By key: the name, for reports."""
    notes: tuple[str, ...] = ()
    """Lines for the user: names or phrases that cannot be asked, counts that are not as expected."""


def ask_config(config: Config, ask: Ask) -> Config:
    """`config` with the input size, boxes kept, threshold, token scores and names per prompt of `ask`."""
    raise NotImplementedError


def read_questions(
    item: BenchmarkSet,
    data: str,
    ask: Ask,
    tokenizer: Tokenizer,
    config: Config,
    order: Sequence[int] | int | None = None,
) -> Questions:
    """Reads the annotation files of a set below `data`.

    `order`: seed of a shuffled order of the categories; None: by id.
    """
    raise NotImplementedError


def answer_rows(item: BenchmarkSet, image: AskedImage, found: Sequence[Detections]) -> list[dict[str, Any]]:
    """Rows of the file of predictions for one image; `found`: one Detections per prompt of `image.prompts`.

    coco: {"image_id", "category_id", "bbox" xywh, "score"}; flickr: {"image_id", "sentence_id", "boxes" per phrase}; expressions:
    {"id", "boxes" xyxy, "scores"}; omnilabel: {"image_id", "bbox" xywh, "description_ids", "scores"}.
    """
    raise NotImplementedError


def answer_arrays(image: AskedImage, found: Sequence[Detections]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same boxes as arrays: keys [N] (object array), boxes Float32[N 4] xyxy, scores Float32[N]; in descending score."""
    raise NotImplementedError


def join_rows(item: BenchmarkSet, rows: Iterable[Mapping[str, Any]]) -> Any:
    """The content of the file of predictions: the rows as a list; for expressions {id as text: {"boxes", "scores"}}."""
    raise NotImplementedError
