"""FLOPs by formula against the traced program, XLA's count and the published networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bccd, glip_large, glip_tiny
from glip_jax.config import BackboneConfig, FusionConfig, HeadConfig, ModelConfig, PyramidConfig, TextConfig
from glip_jax.models.glip import GLIP
from glip_jax.training.monitoring.flops import flops_per_image

pytestmark = pytest.mark.compiles

SMALL = ModelConfig(
    backbone=BackboneConfig(width=64, depths=(1, 1, 2, 1), heads=(2, 2, 4, 4), window=7),
    pyramid=PyramidConfig(channels=128),
    text=TextConfig(vocabulary_size=512, width=128, layers=2, heads=2, hidden=512, positions=64, max_tokens=64),
    fusion=FusionConfig(width=256, heads=2),
    head=HeadConfig(blocks=2),
)
ONCE = dataclasses.replace(
    SMALL,
    backbone=dataclasses.replace(SMALL.backbone, depths=(1, 1, 1, 1)),
    text=dataclasses.replace(SMALL.text, layers=1),
    fusion=dataclasses.replace(SMALL.fusion, heads=1),
    head=dataclasses.replace(SMALL.head, blocks=1),
)
"""Every loop has one iteration, because XLA counts the body of a loop once."""


def forward(model, height, width):
    """(the network as a function, its abstract arguments) for one image."""
    tokens = model.text.max_tokens
    kinds = [((1, height, width, 3), jnp.float32), ((1, 2), jnp.int32), ((1, tokens), jnp.int32), ((1, tokens), bool)]
    inputs = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    network = GLIP(model)
    params = jax.eval_shape(lambda *args: network.init(jax.random.key(0), *args), *inputs)
    return network.apply, (params, *inputs)


def products(jaxpr):
    """FLOPs of all products and convolutions of a jaxpr: loops times their length, the most expensive of branches."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        out = np.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2.0 * out * np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
        elif name == "conv_general_dilated":
            kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            total += 2.0 * out * np.prod(kernel) / kernel[spec[0]]
        inner = [sub for value in params.values() for sub in _jaxprs(value)]
        if name == "cond":
            total += max(map(products, inner))
        elif inner:
            total += params.get("length", 1) * sum(map(products, inner))
    return total


def _jaxprs(value):
    if isinstance(value, (tuple, list)):
        return [sub for item in value for sub in _jaxprs(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "height", "width"),
    [
        (SMALL, 160, 224),
        pytest.param(bccd.get_config().model, 128, 160, marks=pytest.mark.slow),
    ],
    ids=["swin", "efficientnet"],
)
def test_as_traced(model, height, width):
    """The formula leaves out resizes and means only, which are small products."""
    network, arguments = forward(model, height, width)
    traced = products(jax.make_jaxpr(network)(*arguments).jaxpr)
    assert flops_per_image(model, height, width).forward == pytest.approx(traced, rel=0.03)
    assert flops_per_image(model, height, width).forward < traced


@pytest.mark.slow
def test_as_xla_counts():
    """Within 10 %, because XLA counts norms and activations as well, and widths are small."""
    network, arguments = forward(ONCE, 128, 192)
    counted = jax.jit(network).lower(*arguments).cost_analysis()
    assert counted is not None
    assert flops_per_image(ONCE, 128, 192).forward == pytest.approx(counted["flops"], rel=0.1)


def test_published_networks():
    """GLIP-T and L at 800 x 1344: multiply-adds, with folded fusion (430 and 573 G in the plain form: 221 and 295)."""
    tiny = flops_per_image(glip_tiny.get_config().model, 800, 1344)
    large = flops_per_image(glip_large.get_config().model, 800, 1344)
    expected = {"backbone": 99, "pyramid": 15, "text": 23, "head_text": 11.5, "dynamic": 127, "outputs": 1.55}
    assert {part: tiny.parts[part] / 2e9 for part in expected} == pytest.approx(expected, rel=0.03)
    assert tiny.forward == sum(tiny.parts.values())
    assert large.parts["backbone"] / 2e9 == pytest.approx(813, rel=0.01)
    assert large.parts["dynamic"] / tiny.parts["dynamic"] == pytest.approx(8 / 6)


def test_without_fusion_the_head_has_no_text_layers():
    flops = flops_per_image(dataclasses.replace(SMALL, fusion=FusionConfig(enabled=False)), 160, 224)
    assert flops.parts["fusion"] == flops.parts["head_text"] == 0


def test_training_is_three_times_forward_where_all_is_trained():
    model = glip_tiny.get_config().model
    flops = flops_per_image(model, 800, 1344)
    assert flops.training == pytest.approx(3 * flops.forward, rel=1e-3) and flops.training < 3 * flops.forward


def test_frozen_parts_have_no_backward_pass():
    model = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, frozen=True))
    saved = flops_per_image(SMALL, 160, 224).training - flops_per_image(model, 160, 224).training
    assert saved == pytest.approx(2 * flops_per_image(SMALL, 160, 224).parts["text"])
    # Patch embedding and all four stages: only the forward pass of the backbone.
    frozen = dataclasses.replace(SMALL, backbone=dataclasses.replace(SMALL.backbone, frozen_stages=4))
    flops = flops_per_image(frozen, 160, 224)
    assert flops.training == pytest.approx(3 * flops.forward - 2 * flops.parts["backbone"])


def test_fewer_tokens_cost_less():
    model = glip_tiny.get_config().model
    short, long = flops_per_image(model, 800, 1344, 64), flops_per_image(model, 800, 1344)
    assert short.parts["fusion"] / long.parts["fusion"] == pytest.approx(0.25)
    assert short.parts["dynamic"] == long.parts["dynamic"]
