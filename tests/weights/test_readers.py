"""Swin as three libraries store it, and runs that begin with whole networks or parts of them."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from etils import epath
from flax import traverse_util

from glip_jax.config import BackboneConfig, Config, InitFromConfig, ModelConfig, TextConfig
from glip_jax.io.checkpoint import CheckpointError, Checkpoints, Saved, fingerprint
from glip_jax.io.workdir import write_config
from glip_jax.models.swin import Swin
from glip_jax.weights.export import write_huggingface
from glip_jax.weights.meaning import check_meaning, input_note
from glip_jax.weights.names import WeightError, parameter_shapes
from glip_jax.weights.pretrained import initialize
from glip_jax.weights.readers import open_checkpoint_or_export, read_backbone
from tests.weights.networks import SMALL, mmdetection, parameters, state
from tests.weights.pth_writer import write_state

pytestmark = pytest.mark.compiles

BODY = "backbone.body."


def original(window=3):
    """An ImageNet Swin under the original's names: no output norms, a classifier, buffers."""
    own = dataclasses.replace(SMALL, backbone=dataclasses.replace(SMALL.backbone, window=window))
    tensors = {name.removeprefix(BODY): value for name, value in state(own).items() if name.startswith(BODY)}
    tensors = {name: value for name, value in tensors.items() if not name.startswith(("norm1.", "norm2.", "norm3."))}
    buffers = {"layers.0.blocks.0.attn_mask": np.zeros((4, 9, 9), np.float32)}
    head = {"norm.weight": np.ones(64, np.float32), "head.weight": np.zeros((5, 64), np.float32)}
    return tensors | buffers | head


def timm():
    tensors = {name: value for name, value in original().items() if not name.startswith("head.")}
    for stage in (2, 1, 0):
        tensors = {
            name.replace(f"layers.{stage}.downsample.", f"layers.{stage + 1}.downsample."): value
            for name, value in tensors.items()
        }
    return tensors | {"head.fc.weight": np.zeros((5, 64), np.float32)}


def hugging_face(prefix="swin."):
    names = (
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."), ("patch_embed.norm.", "embeddings.norm."),
        ("layers.", "encoder.layers."), (".norm1.", ".layernorm_before."), (".norm2.", ".layernorm_after."),
        (".attn.proj.", ".attention.output.dense."), (".attn.relative", ".attention.self.relative"), (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."), ("norm.weight", "layernorm.weight"), ("head.", "classifier."),
    )  # fmt: skip
    tensors = {}
    for name, value in original().items():
        if name.endswith("attn_mask"):
            continue
        for old, new in names:
            if old != "norm.weight" or name == old:
                name = name.replace(old, new) if old != "layers." or name.startswith(old) else name
        if ".attn.qkv." in name:
            for part, third in zip(("query", "key", "value"), np.split(value, 3)):
                tensors[prefix + name.replace(".attn.qkv.", f".attention.self.{part}.")] = third
        else:
            tensors[name if name.startswith("classifier.") else prefix + name] = value
    return tensors


@pytest.fixture(scope="module")
def params():
    """Zeros: what stays zero was not filled."""
    zeros = {path: jnp.zeros(shape.shape) for path, shape in parameter_shapes(SMALL).items()}
    return traverse_util.unflatten_dict(zeros, sep="/")


def begin(params, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters by path, and the record, of a run of SMALL with these settings of init_from."""
    started, record = initialize(params, Config(model=SMALL, init_from=InitFromConfig(**settings)))
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(started, sep="/"))
    return flat, record


@pytest.mark.parametrize("layout", ["the original's", "timm's", "transformers'", "transformers' bare model"])
def test_every_layout_of_swin_gives_the_same_backbone(tmp_path, params, layout):
    path = tmp_path / "swin"
    match layout:
        case "the original's":
            torch.save({"model": {name: torch.from_numpy(value) for name, value in original().items()}}, path)
        case "timm's":
            write_state(path, timm())
        case _:
            path.mkdir()
            arrays = {n: np.ascontiguousarray(v) for n, v in hugging_face("" if "bare" in layout else "swin.").items()}
            safetensors.numpy.save_file(arrays, path / "model.safetensors")
            (path / "config.json").write_text(json.dumps({"model_type": "swin", "hidden_act": "gelu"}))
    found, record = begin(params, backbone=str(path))
    for name, value in parameters().items():
        own = name.startswith("backbone/") and not name.startswith("backbone/norm")
        np.testing.assert_array_equal(found[name], value if own else 0, err_msg=name)
    (source,) = record["sources"]
    assert source["layout"] == f"{layout.removesuffix(' bare model')} Swin"
    assert set(source["ignored"]) <= {"norm.*", "head.*", "*.attn_mask", "*.relative_position_index"}
    assert record["parameters"]["new"]["backbone"] == [6, 2 * (16 + 32 + 64)]


@pytest.mark.slow
def test_swin_equals_that_of_transformers(tmp_path):
    torch.manual_seed(0)
    options: dict[str, Any] = {"out_features": ["stage2", "stage3", "stage4"], "drop_path_rate": 0.0}
    settings = transformers.SwinConfig(
        image_size=96, embed_dim=8, depths=[2, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=3, initializer_range=0.2, **options
    )  # fmt: skip
    original = transformers.SwinBackbone(settings).eval()
    tensors = {
        name: value.detach() for name, value in original.state_dict().items() if "hidden_states_norms" not in name
    }
    torch.save(tensors, tmp_path / "swin.bin")  # version 5's names in memory; save_pretrained writes the older ones
    original.swin.save_pretrained(tmp_path / "folder")
    config = BackboneConfig(width=8, depths=(2, 1, 2, 1), heads=(1, 2, 2, 4), window=3)
    read, again = (
        read_backbone(str(tmp_path / name), ModelConfig(backbone=config), "as_stored")
        for name in ("folder", "swin.bin")
    )
    assert all((again.values[path] == value).all() for path, value in read.values.items())
    image = np.random.default_rng(0).normal(size=(2, 96, 160, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = original(torch.from_numpy(image.transpose(0, 3, 1, 2))).feature_maps
    network = Swin(config)
    arguments = jnp.asarray(image), jnp.array([[96, 160]] * 2)
    flat = {path.removeprefix("backbone/"): value for path, value in read.values.items()}
    for number, width in ((1, 16), (2, 32), (3, 64)):  # the initial values of every norm in both
        flat |= {f"norm{number}/scale": np.ones(width, np.float32), f"norm{number}/bias": np.zeros(width, np.float32)}
    found = jax.jit(network.apply)({"params": traverse_util.unflatten_dict(flat, sep="/")}, *arguments)
    for mine, their in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.transpose(0, 3, 1, 2), their.numpy(), atol=2e-5)


def test_channels_may_be_reversed(tmp_path, params):
    write_state(tmp_path / "swin.pth", original())
    found, _ = begin(params, backbone=str(tmp_path / "swin.pth"), backbone_channels="reversed")
    kernel = parameters()["backbone/patch_embedding/kernel"]
    np.testing.assert_array_equal(found["backbone/patch_embedding/kernel"], kernel[:, :, ::-1])


@pytest.mark.slow
def test_another_window_is_refused_unless_its_tables_are_skipped(tmp_path, params):
    write_state(tmp_path / "swin.pth", original(window=4))
    with pytest.raises(
        WeightError, match=r"backbone/stage1/last/bias_table is \(49, 1\) in the file, \(25, 1\) in .*init_from\.skip"
    ):
        begin(params, backbone=str(tmp_path / "swin.pth"))
    found, record = begin(params, backbone=str(tmp_path / "swin.pth"), skip=("backbone/*/bias_table",))
    assert not found["backbone/stage1/last/bias_table"].any() and found["backbone/stage1/last/qkv/kernel"].all()
    assert record["parameters"]["left"]["backbone"][0] == 7


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("layers.2.blocks.1.mlp.fc1.bias"), r"lacks layers\.2\.blocks\.1\.mlp\.fc1\.bias"),
        (lambda t: t.update({"layers.2.blocks.1.gamma": np.ones(8, np.float32)}), r"holds the unknown layers\.2\.blocks\.1\.gamma"),
        (lambda t: t.update({"patch_embed.proj.weight": np.ones((16, 3, 4, 4), np.float32)}),
         r"patch_embedding/kernel is \(4, 4, 3, 16\) in the file, \(4, 4, 3, 8\) in the network"),
        (lambda t: t.update({"layers.0.blocks.0.attn.relative_position_bias_table": np.ones((24, 1), np.float32)}), "has 24 rows"),
        (lambda t: [t.pop(name) for name in [*t] if name.startswith("layers.3")], r"lacks layers\.3\.blocks\.0.*another network"),
    ],
)  # fmt: skip
def test_files_that_are_no_such_swin_are_refused(tmp_path, params, spoil, message):
    tensors = original()
    spoil(tensors)
    write_state(tmp_path / "swin.pth", tensors)
    with pytest.raises(WeightError, match=message):
        begin(params, backbone=str(tmp_path / "swin.pth"))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "glip.pth"
    write_state(path, state())
    return str(path)


def test_a_network_then_an_encoder(tmp_path, params, network, capsys):
    write_state(tmp_path / "swin.pth", {name: value * 2 for name, value in original().items()})
    found, record = begin(params, model=network, backbone=str(tmp_path / "swin.pth"))
    for name, value in parameters().items():
        twice = name.startswith("backbone/") and not name.startswith("backbone/norm")
        np.testing.assert_array_equal(found[name], value * 2 if twice else value, err_msg=name)
    assert [source["setting"] for source in record["sources"]] == ["init_from.model", "init_from.backbone"]
    assert record["parameters"]["new"] == record["parameters"]["left"] == {}
    assert "backbone                  110        107,635" in capsys.readouterr().out


def test_parts_of_another_network(network):
    zeros = {path: jnp.zeros((1, *shape.shape[1:]) if path.startswith("head/tower/") else shape.shape)
             for path, shape in parameter_shapes(SMALL).items()}  # fmt: skip
    params = traverse_util.unflatten_dict(zeros, sep="/")

    with pytest.raises(
        WeightError, match=r"head/tower/convolution/attention/bias is \(2, 1\) in the file, \(1, 1\) in the network"
    ):
        begin(params, model=network)
    rules = {"load": ("backbone/*", "text/*", "head/*"), "skip": ("head/tower/*",)}
    found, record = begin(params, model=network, **rules)
    changed = {path for path, value in found.items() if np.asarray(value).any()}
    assert changed == {p for p in zeros if not p.startswith(("pyramid/", "head/tower/"))}
    assert record["parameters"]["left"].keys() == {
        "pyramid", "head/tower/fusion", "head/tower/text", "head/tower/convolution"
    }  # fmt: skip
    with pytest.raises(
        WeightError, match=r"init_from\.skip has 'head/towr/\*', which matches no parameter.*near: head/"
    ):
        begin(params, model=network, load=("backbone/*",), skip=("head/towr/*",))


def test_missing_and_unknown_parameters_are_refused(network):
    with_more = parameter_shapes(SMALL) | {"head/extra": jax.ShapeDtypeStruct((3,), jnp.float32)}
    del with_more["head/bias0"]
    params = traverse_util.unflatten_dict({path: jnp.zeros(shape.shape) for path, shape in with_more.items()}, sep="/")
    with pytest.raises(WeightError, match="head/extra is in the network only; head/bias0 is in the file only"):
        begin(params, model=network)


def test_a_working_folder_and_mmdetections_file(tmp_path, params, capsys):
    tree = traverse_util.unflatten_dict(parameters(), sep="/")
    with Checkpoints(str(tmp_path / "run"), 1) as checkpoints:
        checkpoints.save(
            7,
            Saved(tree, {"count": jnp.zeros(())}, {"text": jax.tree.map(lambda x: x * 3, tree["text"])}),
            Config(model=SMALL),
        )
    write_state(tmp_path / "mm.pth", mmdetection(state()))
    for origin in ("run", "mm.pth"):
        found, record = begin(params, model=str(tmp_path / origin))
        for name, value in parameters().items():
            averaged = origin == "run" and name.startswith("text/")
            np.testing.assert_array_equal(found[name], value * 3 if averaged else value, err_msg=name)
        if origin == "run":
            digest = fingerprint(found)
            assert record["sources"][0]["step"] == 7 and record["sources"][0]["fingerprint"] == digest
            assert f"{tmp_path / 'run'} step 7 fingerprint {digest}" in capsys.readouterr().out


def test_an_exported_folder_is_opened_as_a_checkpoint(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dog"]))
    model = dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, vocabulary=str(vocabulary)))
    ours, export = parameters(), tmp_path / "export"
    tree: Any = traverse_util.unflatten_dict(ours, sep="/")
    write_huggingface(export, tree, Config(name="small", model=model))
    opened = open_checkpoint_or_export(str(export))
    assert opened.config == Config(name="small", model=model) and opened.step is None
    read: Any = traverse_util.flatten_dict(opened.parameters(), sep="/")
    assert read.keys() == ours.keys() and all(np.array_equal(read[path], ours[path]) for path in ours)
    vocabulary.unlink()
    assert open_checkpoint_or_export(str(export)).config.model.text.vocabulary == str(export / "vocab.txt")
    with pytest.raises(CheckpointError, match="has no steps"):
        open_checkpoint_or_export(str(export), 3)
    (export / "config.json").write_text("{}")
    with pytest.raises(WeightError, match="has no settings of glip_jax"):
        open_checkpoint_or_export(str(export))


def test_a_working_folder_is_opened_in_spite_of_its_config_json(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with Checkpoints(str(tmp_path), keep=1) as checkpoints:
        checkpoints.save(3, Saved({"kernel": jnp.ones(2)}, {}, {}), Config())
    assert open_checkpoint_or_export(str(tmp_path)).step == 3
    assert open_checkpoint_or_export(f"{tmp_path}/checkpoints/3").step == 3
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        open_checkpoint_or_export(str(tmp_path / "elsewhere"))


def _saved_run(tmp_path, model):
    """A working folder with a checkpoint of the network `model`."""
    config = Config(model=model)
    workdir = str(tmp_path / "other")
    write_config(workdir, config)
    with Checkpoints(workdir, 1) as checkpoints:
        checkpoints.save(0, Saved(traverse_util.unflatten_dict(parameters(), sep="/"), {}, {}), config)
        checkpoints.wait()
    return workdir


OTHER = {
    "input": {"order": "rgb", "std": (1.0, 1.0, 1.0)},
    "head": {"coarse_offsets": "resized", "groups": 2},
    "anchors": {"sizes": (48, 80, 128, 256, 512)},
    "text": {"heads": 4},
    "fusion": {"heads": 4},
}


def test_weights_of_another_meaning_are_refused_or_accepted(tmp_path, params, capsys):
    parts = {part: dataclasses.replace(getattr(SMALL, part), **fields) for part, fields in OTHER.items()}
    workdir = _saved_run(tmp_path, dataclasses.replace(SMALL, **parts))
    names = [f"model.{part}.{field}" for part, fields in OTHER.items() for field in fields]
    with pytest.raises(WeightError, match=r"shapes fit, but the weights .*init_from\.accept=model\.") as caught:
        begin(params, model=workdir)
    assert all(name in str(caught.value) for name in names), caught.value
    with pytest.raises(WeightError, match=r"trained in another network \(model.anchors.sizes: .* -> [^;]*\): set"):
        begin(params, model=workdir, accept=tuple(name for name in names if "anchors" not in name))
    found, _ = begin(params, model=workdir, accept=("model.*",))
    assert np.asarray(found["head/box/kernel"]).any() and f"accepted: {names[0]}" in capsys.readouterr().out
    # Parts that do not depend on a setting are read without a word.
    begin(params, model=workdir, load=("pyramid/*",))


def test_a_file_of_glip_is_for_flat_offsets_bgr_and_the_vocabulary_beside_it(tmp_path, params, capsys):
    write_state(tmp_path / "glip.pth", state())
    found, _ = begin(params, model=str(tmp_path / "glip.pth"))
    assert np.asarray(found["head/box/kernel"]).any()
    assert "does not say its model.fusion.heads" in capsys.readouterr().out  # 8 in GLIP's code, 2 here
    for changed in (
        dataclasses.replace(SMALL, head=dataclasses.replace(SMALL.head, coarse_offsets="resized")),
        dataclasses.replace(SMALL, input=dataclasses.replace(SMALL.input, order="rgb", mean=SMALL.input.mean[::-1])),
    ):
        with pytest.raises(WeightError, match=r"coarse_offsets: flat -> resized|input.order: bgr -> rgb"):
            initialize(params, Config(model=changed, init_from=InitFromConfig(model=str(tmp_path / "glip.pth"))))


def test_the_order_of_backbone_filters_and_the_input_are_said():
    init = InitFromConfig(backbone="swin.pth")
    said = input_note(Config(model=SMALL, init_from=init))
    assert "of RGB in such files, are applied to BGR, as in the original" in said
    assert not input_note(Config(model=SMALL, init_from=dataclasses.replace(init, backbone_channels="reversed")))
    grey = dataclasses.replace(SMALL, input=dataclasses.replace(SMALL.input, order="rgb", mean=(0.0, 0.0, 0.0)))
    assert "are not ImageNet's" in input_note(Config(model=grey, init_from=init))


def test_another_vocabulary_is_another_meaning(tmp_path):
    ours, theirs = tmp_path / "ours.txt", tmp_path / "vocab.txt"
    ours.write_text("[PAD]\n[UNK]\ncat\ndog\n")
    theirs.write_text("[PAD]\n[UNK]\ndog\ncat\n")
    config = Config(model=dataclasses.replace(SMALL, text=dataclasses.replace(SMALL.text, vocabulary=str(ours))))
    with pytest.raises(WeightError, match=r"model.text.vocabulary: .*vocab.txt \(4 tokens\).* from number 2 on others"):
        check_meaning(config.model, config, ["text/embeddings/word"], "init_from.text=x", epath.Path(theirs))
    assert check_meaning(config.model, config, ["head/box/kernel"], "init_from.text=x", epath.Path(theirs)) == []
    released = dataclasses.replace(SMALL, text=TextConfig())
    with pytest.raises(WeightError, match="that of bert-base-uncased -> .*ours.txt"):
        check_meaning(released, config, ["text/embeddings/word"], "init_from.model=glip.pth", inferred=True)
