"""Exports hold neither descriptions nor the head of their side loss, and a run with that head starts from weights without it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from glip_jax.config import CaptionConfig, DescriptionsConfig
from glip_jax.weights.export import ExportError, full_state, write
from glip_jax.weights.tuned_parameters import starting_parameters
from tests import tiny_run


def test_the_head_of_the_side_loss_is_no_part_of_an_export_and_may_be_missing_in_a_base() -> None:
    config = tiny_run.config()
    plain = tiny_run.parameters(config.model)
    kernel = np.ones((16, 16), np.float32)
    trained = plain | {"head": plain["head"] | {"description": {"kernel": kernel}}}
    found, wanted = full_state(trained, config.model), full_state(plain, config.model)
    assert found.keys() == wanted.keys()
    assert all((found[name] == wanted[name]).all() for name in wanted)
    begun = starting_parameters(trained, plain, config)
    assert (begun["head"]["description"]["kernel"] == kernel).all()


@pytest.mark.parametrize("use", ["prompt", "mean"])
def test_an_export_with_descriptions_is_refused(tmp_path: Path, use: str) -> None:
    config = tiny_run.config()
    captions = CaptionConfig(descriptions=DescriptionsConfig("x.json", use))  # type: ignore[arg-type]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, captions=captions))
    with pytest.raises(ExportError, match=f"use is '{use}', and exports hold no descriptions"):
        write("huggingface", tmp_path / "out", tiny_run.parameters(config.model), config)
