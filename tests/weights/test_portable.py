"""The exported PyTorch network and its processor equal those of glip_jax: outputs, gradients, pixels, tokens, detections."""

import dataclasses
import io
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from glip_jax.config import BackboneConfig, Config, HeadConfig, InputConfig
from glip_jax.inference import chunk
from glip_jax.inference.postprocess import detect
from glip_jax.io.checkpoint_reader import fingerprint
from glip_jax.io.image_files import upright
from glip_jax.models.glip import GLIP, normalize
from glip_jax.models.tuned_prompts import find_rows
from glip_jax.structures import boxes as box
from glip_jax.structures import prompts
from glip_jax.structures.batch import Predictions
from glip_jax.structures.canvas import resize, target_size
from glip_jax.training.finetuning.modes import tuned_config
from glip_jax.weights import verification
from glip_jax.weights.export import ExportError, full_state, network_settings, write, write_huggingface
from glip_jax.weights.names import export_state, parameter_shapes
from glip_jax.weights.portable.glip_network import GlipNetwork, deformable_convolution
from glip_jax.weights.portable.modeling_glip import GlipConfig, GlipForZeroShotObjectDetection
from glip_jax.weights.portable.processing_glip import (
    GlipImageProcessor,
    GlipProcessor,
    best_detections,
    to_rgb,
)
from glip_jax.weights.portable.tuned_prompts import TunedPrompts
from glip_jax.weights.readers import open_export
from glip_jax.weights.tuned_parameters import starting_parameters
from glip_jax.weights.verification import differences, reader, sample_images
from tests import tiny_run
from tests.io.test_image_files import CASES, RGB, encoded
from tests.parity.check_torch import main as check_torch
from tests.weights.test_tuned_parameters import TABLE, prompts_of_table

pytestmark = pytest.mark.compiles

MODELS = {
    "swin, fusion, flat": dataclasses.replace(
        tiny_run.model(0.0), head=HeadConfig(blocks=2, groups=4, coarse_offsets="flat")
    ),
    "efficientnet, no fusion, resized": dataclasses.replace(
        tiny_run.model(0.0),
        backbone=BackboneConfig(kind="efficientnet_lite0"),
        fusion=dataclasses.replace(tiny_run.model().fusion, enabled=False),
        # Small, so that many offsets of random weights are clamped.
        head=dataclasses.replace(tiny_run.model().head, offset_bound=1),
    ),
}


def random_params(model, seed=0):
    """Weights of the size that layers start from, norms near 1, nothing zero."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in parameter_shapes(model).items():
        # Of stacked dense layers [layers I O] the last two axes count, of convolutions [k k I O] the last four.
        fan_in = int(np.prod(shape.shape[-4:-1] if len(shape.shape) > 3 else shape.shape[-2:-1]))
        noise = rng.normal(size=shape.shape).astype(np.float32)
        kind = path.rpartition("/")[2]
        if kind in ("scale", "scales", "frozen_scale"):
            flat[path] = 1 + 0.1 * noise
        elif "bias" in kind or "gamma" in kind or kind in ("frozen_shift", "log_scale"):
            flat[path] = 0.1 * noise
        else:
            flat[path] = noise / np.sqrt(fan_in)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def network(model, params):
    """The PyTorch network with the same weights."""
    made = GlipNetwork(network_settings(model)).eval()
    made.load_state_dict({k: torch.from_numpy(v) for k, v in full_state(params, model).items()}, strict=True)
    return made


def inputs(model, height=96, width=64, seed=3):
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    tokens = rng.integers(5, model.text.vocabulary_size, (2, 12))
    return pixels, tokens, np.arange(12)[None] < np.array([[12], [7]])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_the_reference(name):
    """With fusion also the gradients of a fixed random projection of all outputs, with respect to every parameter."""
    model = MODELS[name]
    params = random_params(model)
    pixels, tokens, mask = inputs(model)
    extent = np.array([pixels.shape[1:3]] * 2)
    made = network(model, params)
    logits, deltas, center = made(
        torch.from_numpy(pixels.transpose(0, 3, 1, 2)), torch.from_numpy(tokens), torch.from_numpy(mask)
    )
    rng = np.random.default_rng(9)
    projection = [rng.normal(size=x.shape).astype(np.float32) for x in (logits, deltas, center)]
    # Outputs for padding tokens have no meaning in either network.
    projection[0] = projection[0] * mask[:, None, :]

    def reference(params, *arrays):
        with jax.default_matmul_precision("highest"):
            found: Any = GLIP(model).apply({"params": params}, *arrays)
        total = sum(jnp.vdot(x, y) for x, y in zip((found.logits, found.deltas, found.centerness), projection))
        return total, found

    arrays = params, pixels, extent, tokens, mask
    if model.fusion.enabled:
        (_, found), gradients = jax.jit(jax.value_and_grad(reference, has_aux=True))(*arrays)
    else:
        (_, found), gradients = jax.jit(reference)(*arrays), None
    for own, exported, weight in zip(
        (found.logits, found.deltas, found.centerness), (logits, deltas, center), projection
    ):
        seen = weight != 0
        np.testing.assert_allclose(
            np.asarray(own)[seen], exported.detach().numpy()[seen], rtol=0, atol=2e-5 * np.abs(own).max()
        )
    if gradients is None:
        return
    projected: Any = sum((x * torch.from_numpy(y)).sum() for x, y in zip((logits, deltas, center), projection))
    projected.backward()
    exported = {n: p.grad.numpy() for n, p in made.named_parameters() if p.grad is not None}
    wanted = {n: np.asarray(g) for n, g in export_state(gradients, model).items()}
    total = np.sqrt(sum(np.square(g).sum() for g in wanted.values()))
    missing = [n for n, g in wanted.items() if n not in exported and np.linalg.norm(g) > 1e-6 * total]
    assert not missing
    assert len(exported) > 50
    for n, gradient in exported.items():
        largest = max(np.abs(wanted[n]).max(), 1e-5 * total)
        assert np.abs(gradient - wanted[n]).max() <= 2e-4 * largest, n


@pytest.mark.slow
def test_it_equals_the_original_without_passing_through_jax(capsys):
    assert check_torch(["tests/fixtures/set1", "--quiet"]) == 0, capsys.readouterr().out
    assert "136 comparisons over 5 cases, 0 beyond" in capsys.readouterr().out


def test_deformable_convolution_with_no_offsets_is_a_convolution():
    x, weight, bias = torch.randn(2, 4, 7, 5), torch.randn(6, 4, 3, 3), torch.randn(6)
    for stride in (1, 2):
        wanted = torch.nn.functional.conv2d(x, weight, bias, stride, padding=1)
        h, w = wanted.shape[2:]
        offset, mask = torch.zeros(2, 18, h, w), torch.ones(2, 9, h, w)
        torch.testing.assert_close(deformable_convolution(x, weight, bias, offset, mask, stride), wanted)
    # One cell down and two to the right: dy first.
    offset[:, 0::2], offset[:, 1::2] = 1.0, 2.0
    shifted = torch.nn.functional.pad(x, (0, 2, 0, 1))[:, :, 1:, 2:]
    found = deformable_convolution(x, weight, bias, offset, mask, 2)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(found, torch.nn.functional.conv2d(shifted, weight, bias, 2, padding=1)[:, :, 1:-1, 1:-1])


class TestHuggingFaceModel:
    MODEL = MODELS["swin, fusion, flat"]

    def model(self, extent="image"):
        settings = GlipConfig(network_settings(self.MODEL), extent, 32)
        made = GlipForZeroShotObjectDetection(settings).eval()
        made.network.load_state_dict(network(self.MODEL, random_params(self.MODEL)).state_dict())
        return made

    def batch(self):
        """Two images of different extents on one canvas."""
        pixels, tokens, mask = inputs(self.MODEL, 96, 96)
        visible = np.zeros((2, 96, 96), np.int64)
        visible[0, :90, :60], visible[1, :96, :96] = 1, 1
        pixels = pixels * visible[..., None].astype(np.float32)
        arrays = {
            "pixel_values": pixels.transpose(0, 3, 1, 2),
            "pixel_mask": visible,
            "input_ids": tokens,
            "attention_mask": mask,
        }
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}

    @torch.inference_mode()
    def test_no_score_depends_on_the_batch(self):
        made, batch = self.model(), self.batch()
        both = made(**batch)
        alone = made(batch["pixel_values"][:1, :, :96, :64], batch["input_ids"][:1], batch["attention_mask"][:1])
        # Strides 16, 32, 64: 6 x 4 of 6 x 6 cells, 3 x 2 of 3 x 3, 2 x 1 of 2 x 2.
        grids = [
            np.arange(36).reshape(6, 6)[:, :4],
            36 + np.arange(9).reshape(3, 3)[:, :2],
            45 + np.arange(4).reshape(2, 2)[:, :1],
        ]
        rows = np.concatenate([grid.ravel() for grid in grids])
        torch.testing.assert_close(both.logits[0, rows], alone.logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(both.pred_boxes[0, rows], alone.pred_boxes[0], atol=1e-3, rtol=0)
        beyond = np.setdiff1d(np.arange(49), rows)
        assert (both.logits[0, beyond].sigmoid() == 0).all()
        assert both.image_sizes.tolist() == [[90, 60], [96, 96]]
        assert both.level_sizes.tolist() == [36, 9, 4]
        whole = self.model("batch")(**batch)
        assert (whole.logits[0, rows] - both.logits[0, rows]).abs().max() > 1e-3

    def test_gradients_reach_every_parameter(self):
        made, batch = self.model(), self.batch()
        out = made(**batch)
        (out.logits.clamp(min=-10).sum() + out.pred_boxes.sum() + out.centerness.clamp(min=-10).sum()).backward()
        # There is no stride 8 here, so nothing reads the norm of its map.
        unread = ("network.backbone.body.norm1.weight", "network.backbone.body.norm1.bias")
        assert tuple(n for n, p in made.named_parameters() if p.grad is None) == unread


class TestProcessor:
    def processor(self, order="bgr"):
        tokenizer = _Tokenizer()
        pixels = GlipImageProcessor(200, 300, 32, order, (10.0, 20.0, 30.0), (50.0, 51.0, 52.0))
        made = GlipProcessor.__new__(GlipProcessor)
        made.image_processor, made.tokenizer = pixels, tokenizer
        made.separator, made.max_tokens, made.detection, made.names_per_prompt = ". ", 64, {"max_detections": 5}, 0
        return made

    @pytest.mark.parametrize("order", ["bgr", "rgb"])
    def test_pixels_are_ours(self, order):
        image = np.random.default_rng(0).integers(0, 256, (173, 311, 3), dtype=np.uint8)
        found = self.processor(order).image_processor(Image.fromarray(image))
        size = target_size(173, 311, 200, 300)
        settings = InputConfig(order=order, mean=(10.0, 20.0, 30.0), std=(50.0, 51.0, 52.0))
        wanted = normalize(jnp.asarray(resize(image, size))[None], jnp.asarray([size]), settings)
        pixels = found["pixel_values"].numpy().transpose(0, 2, 3, 1)
        assert pixels.shape[1] % 32 == pixels.shape[2] % 32 == 0
        np.testing.assert_allclose(pixels[:, : size[0], : size[1]], wanted, atol=1e-6)
        assert not pixels[:, size[0] :].any()
        assert int(found["pixel_mask"].sum()) == size[0] * size[1]

    def test_every_mode_and_orientation_is_decoded_as_here(self):
        exif = Image.Exif()
        for data in (*(case[0] for case in CASES), *(encoded(RGB, exif=exif) for exif[0x0112] in range(1, 9))):
            with Image.open(io.BytesIO(data)) as image:
                np.testing.assert_array_equal(np.asarray(to_rgb(image)), upright(image))
                np.testing.assert_array_equal(np.asarray(to_rgb(to_rgb(image))), upright(image), "as the pipeline does")

    def test_sizes_of_an_image_that_was_turned_are_refused(self):
        class Outputs:
            logits, pred_boxes, centerness = torch.ones(1, 1, 3), torch.tensor([[[0.0, 0, 99, 49]]]), torch.ones(1, 1)
            image_sizes, level_sizes, phrase_map = torch.tensor([[200, 100]]), torch.tensor([1]), torch.ones(1, 1, 3)
            input_ids = torch.zeros(1, 3)

        def found(sizes):
            return self.processor().post_process_grounded_object_detection(
                Outputs(), target_sizes=sizes, text_labels=[["cat"]]
            )

        assert found([(400, 200)])[0]["boxes"].tolist() == [[0, 0, 198, 98]]
        with pytest.raises(ValueError, match="its EXIF orientation turns it"):
            found([(200, 400)])

    def test_tokens_and_phrases_are_ours(self):
        processor, names = self.processor(), ["cat", "a_dog", "person (standing)"]
        found = processor(text=names)
        tokenizer = prompts.load_tokenizer(tiny_run.VOCABULARY)
        wanted = prompts.tokenize(prompts.prompt_from_categories(names), tokenizer, 64)
        count = int(wanted.mask.sum())
        assert found["input_ids"].tolist() == [wanted.tokens[:count].tolist()]
        np.testing.assert_array_equal(found["phrase_map"][0].numpy(), wanted.phrase_map[:, :count])
        caption = processor(text="cat. a dog.")
        assert [processor.tokenizer.decode(caption["input_ids"][0][row]) for row in caption["phrase_map"][0]] == [
            "cat",
            "a dog",
        ]

    def test_texts_for_images(self):
        processor = self.processor()
        images = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 80))]
        assert processor(images=images, text=["cat", "dog"])["phrase_map"].shape[:2] == (2, 2)
        assert processor(images=images, text=[["cat"], ["dog", "person"]])["phrase_map"].sum((1, 2)).tolist() == [1, 2]
        with pytest.raises(ValueError, match="2 images and 3 texts"):
            processor(images=images, text=[["cat"]] * 3)
        with pytest.raises(ValueError, match="names nothing"):
            processor(text=" . ")
        with pytest.raises(ValueError, match="empty after cleaning"):
            processor(text=["(all of it)"])
        with pytest.raises(ValueError, match=r"tokens, the network was trained with 64"):
            processor(text=["cat dog person"] * 40)

    @pytest.mark.parametrize(
        ("text", "asked"),
        [
            (["St. B", "dog"], [["st. b", "dog"]] * 2),
            (["u. s.", "dog"], [["u. s.", "dog"]] * 2),
            (["cat.", "dog."], [["cat.", "dog."]] * 2),
            ([["St. B"], ["cat, dog", "cup"]], [["st. b"], ["cat, dog", "cup"]]),
            (["cat. a dog.", "cup."], [["cat", "a dog"], ["cup"]]),
            (["a cat. a dog."], [["a cat", "a dog"]] * 2),
            ([["cat"], "a cup. a dog."], [["cat"], ["a cup", "a dog"]]),
            ("St. B . dog", [["st. b", "dog"]] * 2),
            ("a cup. a.dog", [["a cup", "a. dog"]] * 2),
            ("a dog", [["a dog"]] * 2),
        ],
    )
    def test_a_text_is_asked_as_it_is_typed(self, text, asked):
        processor = self.processor()
        found = processor(images=[Image.new("RGB", (64, 64))] * 2, text=text)
        words = [
            [processor.tokenizer.decode(ids[row]).replace(" .", ".").replace(" ,", ",") for row in rows if row.any()]
            for ids, rows in zip(found["input_ids"], found["phrase_map"])
        ]
        assert words == asked

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (["cat", "CAT"], "'CAT' is the same to the model as 'cat'"),
            (["斑马"], "'斑马' has no word or character"),
            ([["cat", 3]], "names that are no text: .3."),
        ],
    )
    def test_a_text_that_cannot_be_asked_is_refused(self, text, message):
        with pytest.raises((ValueError, TypeError), match=message):
            self.processor()(text=text)

    @pytest.mark.parametrize("limit", [0, 3])
    def test_long_lists_are_split_as_predict_does(self, limit):
        processor, tokenizer = self.processor(), prompts.load_tokenizer(tiny_run.VOCABULARY)
        processor.max_tokens, processor.names_per_prompt = 16, limit
        names = ["cat", "dog", "red_car", "St. B", "traffic light", "bottle (of milk)", "cup", "tree", "potted plant"]
        assert processor.split_names(names) == chunk(names, tokenizer, 16, limit=limit)

    @pytest.mark.parametrize("rule", ["mean", "max"])
    def test_detections_are_ours(self, rule):
        model, canvas = tiny_run.model(), (64, 96)
        rng = np.random.default_rng(5)
        anchors = box.anchors(canvas, model.pyramid.strides, model.anchors.sizes)
        count, tokens = len(anchors), 9
        raw = Predictions(
            *(rng.normal(size=shape).astype(np.float32) for shape in ((1, count, tokens), (1, count, 4), (1, count)))
        )
        phrases = np.zeros((1, 3, tokens), bool)
        phrases[0, 0, 1:3] = phrases[0, 1, 4] = phrases[0, 2, 5:8] = True
        size = np.array([[60, 90]], np.int32)
        settings = dataclasses.replace(Config().detection, threshold=0.3, max_detections=20, token_scores=rule)
        reference = jax.jit(detect, static_argnums=(4, 5, 6))
        wanted = reference(raw, phrases, size, np.array([canvas], np.int32), canvas, model, settings)
        corners = torch.from_numpy(np.asarray(box.decode(raw.deltas[0], anchors), np.float32))
        levels = [int(np.prod(box.level_shape(canvas, s))) for s in model.pyramid.strides]
        others = ("sink_", "name_decay", "rivals")
        kept = {name: value for name, value in dataclasses.asdict(settings).items() if not name.startswith(others)}
        boxes, scores, labels = best_detections(
            torch.from_numpy(raw.logits[0]), corners, torch.from_numpy(raw.centerness[0]),
            torch.from_numpy(phrases[0].astype(np.float32)), torch.tensor([60, 90]), levels, **kept,
        )  # fmt: skip
        real = np.asarray(wanted.phrases[0]) >= 0
        assert labels.tolist() == np.asarray(wanted.phrases[0])[real].tolist()
        assert 5 < len(labels) <= 20
        np.testing.assert_allclose(scores.numpy(), np.asarray(wanted.scores[0])[real], atol=1e-6)
        np.testing.assert_allclose(boxes.numpy(), np.asarray(wanted.boxes[0])[real], atol=1e-3)


@pytest.mark.slow
def test_the_pipeline_gives_the_boxes_of_the_auto_classes(tmp_path, monkeypatch):
    """Several images of several sizes, labels in one prompt or several, strings, and after it was saved again."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    config = tiny_run.replace(tiny_run.config(), "evaluation", short_side=64, long_side=96)
    config = tiny_run.replace(config, "detection", threshold=0.0, max_detections=9)
    write_huggingface(tmp_path / "model", tiny_run.parameters(config.model), config)
    processor: Any = transformers.AutoProcessor.from_pretrained(tmp_path / "model", trust_remote_code=True)
    model: Any = transformers.AutoModelForZeroShotObjectDetection.from_pretrained(
        tmp_path / "model", trust_remote_code=True
    )
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (60 + 20 * i, 90, 3), np.uint8)) for i in range(2)]

    def detected(image, names):
        with torch.inference_mode():
            outputs = model(**processor(images=image, text=names))
        (found,) = processor.post_process_grounded_object_detection(
            outputs, threshold=0.1, target_sizes=[image.size[::-1]], text_labels=[names]
        )
        boxes = [dict(zip(("xmin", "ymin", "xmax", "ymax"), map(int, box))) for box in found["boxes"].tolist()]
        fields = zip(found["scores"].tolist(), found["text_labels"], boxes)
        return [{"score": pytest.approx(score, abs=1e-5), "label": label, "box": box} for score, label, box in fields]

    def pipeline(folder) -> Any:
        return transformers.pipeline("zero-shot-object-detection", model=str(folder), trust_remote_code=True)

    pipe, names = pipeline(tmp_path / "model"), ["St. B", "Cat, dog"]
    wanted = [detected(image, names) for image in images]
    assert all(len(found) == 9 for found in wanted)
    assert pipe(images[0], candidate_labels=names) == wanted[0]
    assert pipe(images, candidate_labels=names, top_k=3) == [found[:3] for found in wanted]
    asked = [{"image": images[0], "candidate_labels": names}, {"image": images[1], "candidate_labels": "cat, dog"}]
    assert pipe(asked, batch_size=2) == [wanted[0], detected(images[1], ["cat", "dog"])]
    many = ["cat", "dog", "person", "red car", "traffic light", "bottle", "cup", "tree"]
    parts = [detected(images[0], [many[index] for index in part]) for part in processor.split_names(many)]
    assert len(parts) == 2
    found = pipe(images[0], candidate_labels=many)
    assert found == sorted((each for part in parts for each in part), key=lambda each: -each["score"].expected)
    pipe.save_pretrained(str(tmp_path / "again"))
    assert pipeline(tmp_path / "again")(images[0], candidate_labels=names) == wanted[0]
    # Given objects, transformers has no folder to find the pipeline in, and asks each label alone.
    plain: Any = transformers.pipeline("zero-shot-object-detection", model=model, tokenizer=processor.tokenizer,
                                  image_processor=processor.image_processor)  # fmt: skip
    assert plain(images[0], candidate_labels=["cat"]) == detected(images[0], ["cat"])


class _Tokenizer:
    """The tiny vocabulary behind the call that processors make."""

    def __init__(self):
        self._own = prompts.load_tokenizer(tiny_run.VOCABULARY)

    unk_token_id = 5

    def __call__(self, captions, return_offsets_mapping, **_):
        assert return_offsets_mapping
        encoded = [self._own.encode(caption) for caption in captions]
        return {"input_ids": [e.ids for e in encoded], "offset_mapping": [e.offsets for e in encoded]}

    def decode(self, ids):
        return self._own.decode(list(map(int, ids)))  # pyright: ignore[reportAttributeAccessIssue]


def test_tuned_names_are_found_as_in_the_network():
    tokens, mask, _ = prompts_of_table()
    portable = TunedPrompts(len(TABLE) - 3, TABLE.shape[1], 8)
    portable.tokens = torch.from_numpy(TABLE).long()
    theirs = portable.find_rows(torch.from_numpy(tokens), torch.from_numpy(mask))
    for one, other in zip(jax.jit(find_rows)(TABLE, tokens, mask), theirs):
        assert np.asarray(one).tolist() == other.tolist()


@pytest.fixture(scope="module")
def tuned():
    """(settings, parameters) of a network with tuned prompts for the names of the tiny run."""
    base = tiny_run.config(dropout=0.0)
    config = tuned_config(base, "prompt", tiny_run.NAMES)
    params = starting_parameters(tiny_run.parameters(config.model), random_params(base.model), config, tiny_run.NAMES)
    shape = params["prompts"]["deltas"].shape
    params["prompts"]["deltas"] = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    return config, params


def test_tuned_prompts_have_no_place_in_the_original(tuned, tmp_path):
    with pytest.raises(
        ExportError, match="tuned prompts for 3 names, which microsoft/GLIP can hold by token position only"
    ):
        write(
            "glip-pth", tmp_path / "x.pth", tuned[1], dataclasses.replace(tuned[0], model=_as_original(tuned[0].model))
        )


def _as_original(model):
    head = dataclasses.replace(model.head, coarse_offsets="flat")
    return dataclasses.replace(
        model, head=head, pyramid=dataclasses.replace(model.pyramid, strides=(8, 16, 32, 64, 128))
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["huggingface", "onnx"])
def test_tuned_prompts_are_exported(tuned, tmp_path, form):
    config, params = tuned
    config = tiny_run.replace(config, "evaluation", short_side=64, long_side=96)
    write(form, tmp_path / "model", params, config)
    found = differences(params, config, sample_images(1), reader(form, tmp_path / "model", config))
    found.check(form)
    assert verification._tuned_names(params, config) == ["cat", "dog"], "they are in the prompt that was compared"
    if form == "huggingface":
        opened = open_export(str(tmp_path / "model"))
        assert opened.config.model.prompts == config.model.prompts
        assert fingerprint(opened.parameters()) == fingerprint(params)
