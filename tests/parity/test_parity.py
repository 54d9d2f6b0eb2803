"""The whole of glip_jax against the original's recorded outputs (tests/fixtures/set1)."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.parity import check
from tests.parity.folder import Case, FixtureError, model_config, read_cases, read_meta

FOLDER = Path(__file__).parents[1] / "fixtures" / "set1"


@functools.cache
def _cases() -> dict[str, Case]:
    return {case.name: case for case in read_cases(FOLDER)[0]}


CASES = (
    "full_caption_t",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("out_t", "out_a", "odd_t", "levels_t")),
)


@pytest.mark.compiles
@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(name: str) -> None:
    """`full_caption_t`, whose captions fill the token budget: assignment, losses and the gradient of every parameter."""
    vocabulary = FOLDER.parent / read_meta(FOLDER)["vocab"]
    with jax.default_matmul_precision("highest"):
        found = list(check.report(_cases()[name], lambda case: check.check_case(case, vocabulary)))
    assert not [line for line in found if line.startswith("FAIL")]
    compared = [line.split()[2] for line in found if line.startswith("ok")]
    assert len(compared) >= 50
    if name == "full_caption_t":
        assert sum(name.startswith("train.grad_norm.") for name in compared) > 100
        assert {"train.loss.total", "train.atss.labels0"} <= set(compared)


def test_every_case_is_compared() -> None:
    assert {case if isinstance(case, str) else case.values[0] for case in CASES} == set(_cases())


def test_rounding_of_gradients_near_zero_widens_the_tolerance_of_the_step() -> None:
    gradient = np.array([1e-3, -2e-9, 0.0, 3e-8], np.float32)
    changed = [gradient + 1e-9 * sign * (gradient != 0) for sign in (-1.0, 1.0)]
    steps = [g / (np.abs(g) + 1e-8) for g in (gradient, *changed)]
    expected = np.sqrt(np.square(np.maximum(abs(steps[1] - steps[0]), abs(steps[2] - steps[0]))).mean())
    assert check.adam_rounding(gradient, 1e-9, 1e-8) == pytest.approx(expected, rel=1e-3)
    assert check.adam_rounding(gradient[:1], 1e-9, 1e-8) < 1e-7, "far from zero nothing is amplified"


def test_unknown_options_are_refused_by_name() -> None:
    meta = read_meta(FOLDER)
    with pytest.raises(FixtureError, match="MODEL.RPN.MAGIC"):
        model_config({**meta, "opts": [*meta["opts"], "MODEL.RPN.MAGIC", "1"]})
    with pytest.raises(FixtureError, match="MODEL.DYHEAD.CHANNELS is 64"):
        model_config({**meta, "opts": [*meta["opts"], "MODEL.DYHEAD.CHANNELS", "64"]})


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    for name in ("meta.json", "inputs.npz"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    (tmp_path / "inputs.npz").write_bytes(b"other")
    with pytest.raises(FixtureError, match="sha256"):
        read_meta(tmp_path)
    assert check.main([str(tmp_path)]) == 2
