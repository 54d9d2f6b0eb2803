"""Every number of the settings: refused with its range, or what computes with it works."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from glip_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    EvaluationSet,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
    validate,
)
from glip_jax.data.mixture import schedule
from glip_jax.distributed.mesh import MeshError, make_mesh
from glip_jax.io.checkpoint_reader import note_on_averages
from glip_jax.structures.canvas import canvas_size, nearest_aspect, target_size
from glip_jax.training import optimizer as optim

ODD = (-1, 0, 1, math.nan, math.inf, -math.inf, 10**30, 1e30, 0.5, 1e-300, -(10**30), "3", None)
CONFIG = Config(
    data=DataConfig(sources={"a.b": SourceConfig("x")}),
    optimizer=OptimizerConfig(arguments={"momentum": 0.9}),
    train=TrainConfig(profile=(2, 3)),
    evaluation=EvaluationConfig(sets={"set": EvaluationSet("a", "b")}),
)


def _numbers(value: Any, hint: Any, name: str = "", set_: Any = None) -> Iterator[tuple[str, Any, Any]]:
    """(name, range, function from a value to the whole settings with it) of every number in `value` and below."""
    set_ = set_ or (lambda new: new)
    if get_origin(hint) is Annotated and get_args(hint)[0] in (int, float):
        yield name, get_args(hint)[1], set_
    elif hint in (int, float):
        yield name, None, set_
    elif dataclasses.is_dataclass(hint):
        for key, inner in get_type_hints(hint, include_extras=True).items():
            inside = functools.partial(lambda key, new: set_(dataclasses.replace(value, **{key: new})), key)
            yield from _numbers(getattr(value, key), inner, f"{name}.{key}".strip("."), inside)
    elif isinstance(value, dict):
        for key, item in value.items():
            inside = functools.partial(lambda key, new: set_({**value, key: new}), key)
            yield from _numbers(item, get_args(hint)[1], f"{name}.{key}", inside)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            inside = functools.partial(lambda i, new: set_((*value[:i], new, *value[i + 1 :])), i)
            yield from _numbers(item, get_args(hint)[0], f"{name}[{i}]" if len(value) > 1 else name, inside)


NUMBERS = {name: (range_, set_) for name, range_, set_ in _numbers(CONFIG, Config)}


def _compute(section: str, config: Config) -> None:
    """What a run computes from its settings before anything is read or compiled."""
    solver, data, steps = config.optimizer, config.data, config.train.steps
    if section in ("optimizer", "train"):
        assert all(step >= 0 for step in optim.milestone_steps(steps, solver))
        assert note_on_averages(steps, solver) is not None
        if solver != CONFIG.optimizer:
            assert 0 <= float(optim.rate_multiplier(steps - 1, steps, solver)) < math.inf
    for side in data.short_sides if section in ("data", "model") else ():
        for aspect in data.aspects:
            canvas = canvas_size(side, float(aspect), data.long_side, config.model.input.extent_multiple)
            assert min(canvas) > 0 and min(target_size(10, 30, side, data.long_side)) > 0
    if section == "data":
        schedule(np.bincount(nearest_aspect(np.array([10]), np.array([30]), [*map(float, data.aspects)])).tolist(), 8)
    if section == "evaluation":
        assert min(target_size(30, 10, config.evaluation.short_side, config.evaluation.long_side)) > 0
    if section == "mesh":
        with contextlib.suppress(MeshError):
            make_mesh(config.mesh)


def _refusal(config: Config) -> str:
    try:
        validate(config)
    except ConfigError as error:
        return str(error)
    return ""


def test_every_number_has_a_range() -> None:
    assert len(NUMBERS) > 100 and not [name for name, (range_, _) in NUMBERS.items() if range_ is None]


@pytest.mark.parametrize("section", dict.fromkeys(name.partition(".")[0] for name in NUMBERS))
def test_odd_numbers_are_refused_with_the_range_or_work(section: str) -> None:
    for name, (range_, with_value) in NUMBERS.items():
        if not name.startswith(f"{section}."):
            continue
        for odd in ODD:
            config = with_value(odd)
            refusal = _refusal(config)
            is_number = isinstance(odd, int | float)
            if is_number and odd not in range_:
                assert f"{name} is {odd}: expected" in refusal and str(range_) in refusal, refusal
            elif not is_number:
                assert name in refusal
            elif refusal:  # a contradiction, which names the setting too
                assert name.partition("[")[0].rpartition(".")[2] in refusal, (name, odd, refusal)
            else:
                _compute(section, config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer.milestones[0]", 20_000, r"milestones\[0\] is 20000: expected 0 to 1 \(fractions of train.steps\)"),
        ("train.log_every", 0, "log_every is 0: expected 1 to 1000000000 steps"),
        ("train.evaluate_every", -2, "evaluate_every is -2: expected -1, or 0 to 1000000000 steps"),
        ("optimizer.rate", math.nan, "optimizer.rate is nan: expected 0 to 1000"),
        ("optimizer.ema_decay", 1.0, "ema_decay is 1.0: expected 0 to less than 1"),
        ("data.crop.min_side", 0, "data.crop.min_side is 0: expected more than 0, at most 1"),
        ("train.steps", 1e5, r"train.steps is 100000.0: expected an integer, 1 to"),
        ("data.sources.a.b.weight", "1", "data.sources.a.b.weight is '1': expected a number, more than 0"),
    ],
)
def test_the_message_names_setting_value_and_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(NUMBERS[name][1](value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"codec": "opencv"}}, "data.codec is 'opencv': expected fast or pillow"),
        ({"model": {"anchors": None}}, r"model.anchors is None: expected AnchorConfig\(...\)"),
        ({"checkpoint": {"best_by": None}}, "checkpoint.best_by is None: expected text"),
        ({"train": {"draw_first_batch": "False"}}, "train.draw_first_batch is 'False': expected bool"),
        ({"data": {"short_sides": 480}}, "data.short_sides is 480: expected tuple"),
        ({"evaluation": {"sets": ["val"]}}, r"evaluation.sets is \['val'\]: expected dict"),
    ],
)
def test_values_of_another_type_are_refused(change: dict[str, dict[str, Any]], message: str) -> None:
    ((section, fields),) = change.items()
    config = dataclasses.replace(CONFIG, **{section: dataclasses.replace(getattr(CONFIG, section), **fields)})
    with pytest.raises(ConfigError, match=message):
        validate(config)
    depths = dataclasses.replace(CONFIG.model, backbone=dataclasses.replace(CONFIG.model.backbone, depths=(2, 2, 6)))
    with pytest.raises(ConfigError, match=r"model.backbone.depths has 3 entries: expected 4"):
        validate(dataclasses.replace(CONFIG, model=depths))
