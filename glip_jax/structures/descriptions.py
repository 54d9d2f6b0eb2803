"""Descriptions of names: texts by name in a JSON file, from a language model, a dictionary, or Unicode's keywords."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Int32

from glip_jax.structures.batch import Prompt, TokenizedPrompt
from glip_jax.structures.prompts import PromptError, clean_name, listed, words

__all__ = ["DescriptionTable", "Descriptions", "read_descriptions"]


class DescriptionTable(NamedTuple):
    """Vectors of descriptions: a row for each described name, in the order of `Descriptions.names`; row 0 is that of all other names."""

    vectors: Any
    """Float32[R D]: mean over the descriptions of a name of the mean state of their tokens, [CLS] and [SEP] left out; 0 in row 0."""
    share: Any
    """Float32[R]: n / (1 + n) for n descriptions: their weight in the mean with the state of the name itself."""


class Descriptions:
    """Descriptions by name. A name is found whatever its case, underscores and parentheses."""

    def __init__(self, texts: Mapping[str, Sequence[str]], where: str = "descriptions") -> None:
        """`texts`: one or more for each name. Raises PromptError, which begins with `where`, for two names that are the same to the model."""
        self.names = tuple(texts)
        self.texts = tuple(tuple(own) for own in texts.values())
        """Per name."""
        self._rows: dict[tuple[str, ...], int] = {}
        for row, name in enumerate(self.names, 1):
            other = self._rows.setdefault(_read(name), row)
            if other != row:
                raise PromptError(
                    f"{where}: {name!r} and {self.names[other - 1]!r} are the same name to the model: keep one"
                )

    def row(self, name: str) -> int:
        """Number of a name from 1 on; 0 for one without a description."""
        return self._rows.get(_read(name), 0)

    def in_prompt(self, name: str) -> str:
        """The text that follows a name in a prompt: its first one; "" for a name without."""
        row = self.row(name)
        return self.texts[row - 1][0] if row else ""

    def token_rows(self, prompt: Prompt, tokenized: TokenizedPrompt) -> Int32[np.ndarray, " T"]:
        """`Batch.described` of a prompt: at the tokens of each phrase that is a described name its row, else 0."""
        rows = np.zeros(tokenized.mask.shape[-1], np.int32)
        for spans, covered in zip(prompt.spans, tokenized.phrase_map):
            if row := self.row(" ".join(prompt.caption[begin:end] for begin, end in spans)):
                rows[covered] = row
        return rows

    def notes(self, where: str, names: Sequence[str]) -> list[str]:
        """Says which of `names` have no description."""
        bare = [name for name in names if not self.row(name)]
        return [
            f"{where}: {len(bare)} of {len(names)} names have no description and are used bare: {listed(bare)}"
        ] * bool(bare)

    def unknown(self, names: Sequence[str]) -> list[str]:
        """The described names that are not among `names`."""
        known = {self.row(name) for name in names}
        return [name for row, name in enumerate(self.names, 1) if row not in known]


@functools.lru_cache(65536)  # every example asks for the names of its prompt
def _read(name: str) -> tuple[str, ...]:
    """What the model reads of a name."""
    return words(clean_name(name))


@functools.lru_cache(8)
def read_descriptions(path: str) -> Descriptions:
    """Reads a JSON object of a text, or a list of texts, by name; local or gs://. Runs of white space become one space, a last full stop is left out.

    Raises PromptError for a file that is not that.
    """
    form = 'expected {"name": "text", "other name": ["text", "text"]}'
    try:
        content = json.loads(epath.Path(path).read_bytes().decode("utf-8-sig"))
    except (ValueError, OSError) as error:
        raise PromptError(f"descriptions {path} are no JSON in UTF-8 ({error}): {form}") from None
    if not isinstance(content, dict) or not content:
        raise PromptError(
            f"descriptions {path} hold {type(content).__name__} of {len(content) if isinstance(content, list | dict) else 1}: {form}"
        )
    texts = {}
    for name, given in content.items():
        own = [given] if isinstance(given, str) else given
        if (
            not isinstance(own, list)
            or not own
            or not all(isinstance(text, str) and text.strip(" .\t\n") for text in own)
        ):
            raise PromptError(f"descriptions {path}: {name!r} has {json.dumps(given)[:60]}: {form}, no text empty")
        texts[name] = [" ".join(text.split()).rstrip(".") for text in own]
    return Descriptions(texts, f"descriptions {path}")
