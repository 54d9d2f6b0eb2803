"""The table of names covers every parameter once, reads both ways, and refuses what does not fit."""

import json
from pathlib import Path

import flax.traverse_util
import numpy as np
import pytest

from glip_jax.config import BackboneConfig, FusionConfig, HeadConfig, ModelConfig, PyramidConfig, TextConfig
from glip_jax.weights.names import IGNORED, WeightError, entries, export_state, import_state, parameter_shapes

pytestmark = pytest.mark.compiles

SMALL = ModelConfig(
    backbone=BackboneConfig(width=8, depths=(1, 2, 3, 1), heads=(1, 1, 2, 2), window=3),
    pyramid=PyramidConfig(channels=16),
    text=TextConfig(vocabulary_size=20, width=12, layers=2, heads=2, hidden=24, positions=16, max_tokens=8),
    fusion=FusionConfig(width=16, heads=2),
    head=HeadConfig(blocks=2, groups=4),
)


def _state(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in parameter_shapes(config).items()}
    return export_state(flax.traverse_util.unflatten_dict(params, sep="/"), config)


def test_every_parameter_has_exactly_its_names() -> None:
    """Import fills everything or raises; there and back is the identity."""
    state = _state(SMALL)
    back = export_state(import_state(state, SMALL), SMALL)
    assert set(back) == set(state) == {entry.name for entry in entries(SMALL)}
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize("model", ["t", *(pytest.param(model, marks=pytest.mark.slow) for model in ("a", "l"))])
def test_names_and_shapes_are_those_of_the_released_models(model: str) -> None:
    """tests/fixtures/keys_glip_*.json: names and shapes of the original's state dicts."""
    listed = json.loads((Path(__file__).parents[1] / "fixtures" / f"keys_glip_{model}.json").read_text())
    wanted = {
        name: tuple(key["shape"]) for name, key in listed["keys"].items() if not any(part in name for part in IGNORED)
    }
    config = ModelConfig()
    if model == "a":
        config = ModelConfig(fusion=FusionConfig(enabled=False))
    if model == "l":
        config = ModelConfig(
            backbone=BackboneConfig(width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12),
            head=HeadConfig(blocks=8),
        )
    shapes = parameter_shapes(config)
    found = {}
    for entry in entries(config):
        shape = shapes[entry.path].shape[0 if entry.index is None else 1 :]
        match entry.layout:
            case "linear":
                shape = shape[::-1]
            case "conv":
                shape = (shape[3], shape[2], shape[0], shape[1])
            case "pointwise":
                shape = (*shape[::-1], 1, 1)
            case "scalar":
                shape = (1,)
        found[entry.name] = shape
    assert found == wanted


def test_refusals_name_the_tensor() -> None:
    state = _state(SMALL)
    missing = {k: v for k, v in state.items() if k != "rpn.head.log_scale"}
    with pytest.raises(WeightError, match="rpn.head.log_scale"):
        import_state(missing, SMALL)
    with pytest.raises(WeightError, match="something.else"):
        import_state(state | {"something.else": np.zeros(2)}, SMALL)
    with pytest.raises(WeightError, match=r"head/box/kernel is \(3, 4\) in the file, \(16, 4\) in"):
        import_state(state | {"rpn.head.bbox_pred.weight": np.zeros((4, 3, 1, 1))}, SMALL)
    with pytest.raises(WeightError, match="bbox_pred.weight of the state dict has shape .4, 3., expected 4 axes"):
        import_state(state | {"rpn.head.bbox_pred.weight": np.zeros((4, 3))}, SMALL)
    with pytest.raises(WeightError, match="log_scale of the state dict holds NaN"):
        import_state(state | {"rpn.head.log_scale": np.full(1, np.nan)}, SMALL)
    other = "language_backbone.body.model.encoder.layer.1.output.dense.bias"
    with pytest.raises(WeightError, match=f"{other} of the state dict has shape .3,., unlike that of other"):
        import_state(state | {other: np.zeros(3)}, SMALL)
    with pytest.raises(WeightError, match="prompts tuned for one data set"):
        import_state(state | {"rpn.tunable_linear.weight": np.zeros((1000, 12))}, SMALL)
    import_state(state | {"rpn.head.cls_logits.weight": np.zeros((80, 16, 1, 1))}, SMALL)
