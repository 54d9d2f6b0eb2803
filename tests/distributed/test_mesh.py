"""Mesh and sharding rules: -1 is the rest, one rule per parameter, every network of the family divides, errors name both numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from glip_jax.config import (
    BackboneConfig,
    Config,
    FusionConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PromptsConfig,
    TextConfig,
    TrainConfig,
)
from glip_jax.distributed.mesh import (
    RULES,
    MeshError,
    check_fits,
    make_mesh,
    parameter_spec,
    place_batch,
    shardings,
    unused_rules,
)
from glip_jax.models.glip import GLIP
from glip_jax.training import optimizer as optim


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), (2, 2, 2)),
        (MeshConfig(data=1, fsdp=8), (1, 8, 1)),
    ],
)
def test_mesh(config, shape):
    assert make_mesh(config).devices.shape == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "its product is 3, but there are 8 devices"),
        (MeshConfig(fsdp=3), "the fixed axes take 3 devices, which does not divide 8"),
        (MeshConfig(data=0), "expected sizes of at least 1"),
        (MeshConfig(data=-1, fsdp=-1), "at most once"),
    ],
)
def test_mesh_that_does_not_fit(config, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(config)


MODELS = {
    "GLIP-T": ModelConfig(),
    "GLIP-A": ModelConfig(fusion=FusionConfig(enabled=False)),
    "GLIP-L": ModelConfig(backbone=BackboneConfig(width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12)),
    "odd depths": ModelConfig(backbone=BackboneConfig(depths=(1, 2, 3, 1))),
    "EfficientNet-Lite0, fine-tuned": ModelConfig(
        backbone=BackboneConfig(kind="efficientnet_lite0"), lora=LoraConfig(8), prompts=PromptsConfig(4, 8)
    ),
}


def _shapes(model):
    def init(key):
        inputs = (jnp.zeros((1, 128, 128, 3)), jnp.full((1, 2), 128), jnp.zeros((1, 8), int), jnp.ones((1, 8), bool))
        return GLIP(model, train=False).init(key, *inputs)["params"]

    return jax.eval_shape(init, jax.random.key(0))


@pytest.fixture(scope="module")
def shapes():
    return {name: _shapes(model) for name, model in MODELS.items()}


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_has_one_rule_and_its_dimensions_divide(shapes, name):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    specs = optim.flat(shardings(shapes[name], mesh))
    flat = optim.flat(shapes[name])
    whole = sum(np.prod(leaf.shape) for leaf in flat.values())
    local = sum(np.prod(specs[path].shard_shape(leaf.shape)) for path, leaf in flat.items())
    assert local < whole / 5, "most of the parameters are split, most of these over both axes"
    for path, leaf in flat.items():
        wide = re.match(r"(text/layers|head/tower/text)/|backbone/.*/mlp_(in|out)/", path) and path.endswith("/kernel")
        wide = wide or re.search(r"/(query|key|value|intermediate|mlp_in)/bias$", path)
        wide = wide or re.search(r"/(query|key|value)_lora_b$|/attention_output_lora_a$", path)
        assert ("tensor" in specs[path].spec) == bool(wide), f"{path}: BERT's and MLPs' widths alone"
        if re.match(r"text/layers|head/tower|backbone/stage\d/pairs", path):
            assert leaf.shape[0] == specs[path].shard_shape(leaf.shape)[0], f"{path}: the layer axis is never split"


@pytest.mark.slow
@pytest.mark.compiles
def test_every_rule_is_used(shapes):
    paths = {path for tree in shapes.values() for path in optim.flat(tree)}
    assert unused_rules(paths) == []
    others = [path for path in paths if not path.startswith("backbone/")]
    assert unused_rules(others) == [pattern for pattern, _ in RULES if pattern.startswith("backbone/")]


@pytest.mark.slow
@pytest.mark.compiles
def test_moments_and_averages_are_sharded_as_their_parameters(shapes):
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    moments = jax.eval_shape(lambda p: optim.make_optimizer({}, 1, OptimizerConfig()).init(p), shapes["GLIP-T"])
    specs = shardings(moments, mesh)
    assert specs.count.spec == P()
    assert specs.nu["head"]["projection"]["kernel"].spec == P("fsdp", None)
    assert specs.mu == shardings(shapes["GLIP-T"], mesh)


def test_errors_name_parameter_and_numbers():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    with pytest.raises(MeshError, match=r"parameter head/new/kernel \(4, 4\): 0 sharding rules match \(none\)"):
        parameter_spec("head/new/kernel", (4, 4), mesh)
    with pytest.raises(MeshError, match=r"dimension 12 is no multiple of mesh.fsdp 8"):
        parameter_spec("pyramid/lateral3/kernel", (1, 1, 8, 12), mesh)
    with pytest.raises(MeshError, match=r"batch_size 24 .* 2 micro-batches over 8 rows .* multiple of 16"):
        check_fits(_run(24, 2), mesh)
    check_fits(_run(32, 2), mesh)


def _run(batch_size, accumulate, heads=12):
    model = ModelConfig(text=TextConfig(heads=heads))
    return Config(
        "run", model, train=TrainConfig(batch_size=batch_size), optimizer=OptimizerConfig(accumulate=accumulate)
    )


def test_tensor_must_divide_the_attention_heads():
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(MeshError, match=r"model.text.heads 12 is no multiple of mesh.tensor 8"):
        check_fits(_run(8, 1), mesh)
    check_fits(_run(8, 1, heads=16), mesh)


def test_batches_are_split_over_data_and_fsdp():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    rows = np.arange(8, dtype=np.int32)
    placed = place_batch({"a": rows, "b": np.ones((8, 3), np.float32)}, mesh)
    assert placed["a"].sharding.spec == P(("data", "fsdp"))
    np.testing.assert_array_equal(placed["a"], rows)
    assert {shard.data.tolist()[0] for shard in placed["a"].addressable_shards} == {0, 2, 4, 6}
