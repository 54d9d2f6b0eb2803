"""Exports a network: a `.pth` of microsoft/GLIP, a Hugging Face folder with its PyTorch model, an ONNX graph.

torch is needed for `.pth` and ONNX only, and imported where it is used. Tensors are written as float32.
`weights/verification.py` compares an export with the network.
"""

import dataclasses
import importlib
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from etils import epath
from jaxtyping import Shaped
from tokenizers.implementations import BertWordPieceTokenizer

from glip_jax import UserError
from glip_jax.config import Config, ModelConfig, flatten
from glip_jax.inference.sinks import RANDOM, sink_tokens
from glip_jax.io.assets import resolve
from glip_jax.models.swin import relative_position_index
from glip_jax.structures.boxes import anchors
from glip_jax.structures.prompts import load_tokenizer
from glip_jax.weights.names import export_state

__all__ = [
    "FORMATS", "ExportError", "Format", "full_state", "needed", "network_settings", "write", "write_glip_pth",
    "write_huggingface", "write_onnx", "write_space",
]  # fmt: skip

Format = Literal["glip-pth", "huggingface", "onnx"]
FORMATS: dict[Format, tuple[str, ...]] = {
    "glip-pth": ("torch",),
    "huggingface": ("torch", "transformers"),
    "onnx": ("torch", "onnx", "onnxruntime"),
}
"""Libraries that each format needs beyond requirements.txt, to be written or verified."""
PORTABLE = Path(__file__).parent / "portable"
NETWORK_PREFIX = "network."
"""Prefix of names in a Hugging Face folder: the network is a submodule of the transformers model."""
_CLASSES = 80
"""Outputs of the frozen class branch of microsoft/GLIP, which nothing reads."""


class ExportError(UserError, ValueError):
    """A network that a format cannot represent, a library that is missing, or an export that differs from the network."""


def needed(form: Format) -> None:
    """Raises ExportError unless the libraries of `form` are installed."""
    missing = [name for name in FORMATS[form] if importlib.util.find_spec(name) is None]  # pyright: ignore[reportAttributeAccessIssue]
    if missing:
        raise ExportError(
            f"--format={form} needs {' and '.join(missing)}, not installed here: pip install -r requirements-export.txt"
        )


def write(form: Format, out: Path, params: Mapping[str, Any], config: Config) -> None:
    """Writes `params` as a file (glip-pth) or a new folder (huggingface, onnx).

    Low-rank deltas must have been merged (`glip_jax.weights.tuned_parameters.merged`). Raises ExportError for a network that the
    format cannot represent, AssetError if the vocabulary does not exist.
    """
    if config.model.head.presence:
        raise ExportError(
            "model.head.presence is true: no exported format holds it, and without it scores would differ; train with presence=False to export"
        )
    if (described := config.data.captions.descriptions.use) != "none":
        raise ExportError(
            f"--format={form}: data.captions.descriptions.use is {described!r}, and exports hold no descriptions: export with "
            "--config.data.captions.descriptions.use=none, and write descriptions into the prompts yourself"
        )
    match form:
        case "glip-pth":
            if config.detection.sinks:
                raise ExportError(
                    f"glip-pth: detection.sinks is {config.detection.sinks}, and microsoft/GLIP has no sinks: use --format=huggingface or "
                    "--format=onnx, or export with --config.detection.sinks=0"
                )
            write_glip_pth(out, params, config.model)
        case "huggingface":
            write_huggingface(out, params, config)
        case "onnx":
            write_onnx(out, params, config)


def network_settings(model: ModelConfig) -> dict[str, Any]:
    """Arguments of `portable.glip_network.GlipNetwork`: the sizes of the network, without settings of training."""
    sizes = dataclasses.asdict(model)
    kept: dict[str, tuple[str, ...]] = {
        "backbone": ("kind", "width", "depths", "heads", "window"),
        "pyramid": ("channels", "strides"),
        "text": ("vocabulary_size", "width", "layers", "heads", "hidden", "positions"),
        "fusion": ("enabled", "width", "heads"),
        "head": ("blocks", "groups", "coarse_offsets", "offset_bound"),
        "anchors": ("sizes",),
    }
    if model.text.mask != "padding":
        kept["text"] += ("mask", "separators")
    if model.head.positions:
        kept["head"] += ("positions",)
    if model.prompts.names:
        kept["prompts"] = ("names", "tokens")
    return {part: {field: sizes[part][field] for field in fields} for part, fields in kept.items()}


def _with_sinks(config: Config) -> dict[str, Any]:
    """`network_settings`, and the sinks if there are any. Raises PromptError for a `sink_start` that the vocabulary does not know."""
    detection = config.detection
    start: dict[str, Any] = {"seed": detection.sink_seed}
    if detection.sinks and detection.sink_start != RANDOM:
        start = {"tokens": sink_tokens(config, load_tokenizer(resolve(config.model.text.vocabulary)))}
    sinks = {"sinks": {"number": detection.sinks, **start}} if detection.sinks else {}
    return network_settings(config.model) | sinks


def _detection_settings(config: Config) -> dict[str, Any]:
    """Arguments of `portable.processing_glip.best_detections`; what the sinks say is of the network, rivals are asked by the caller."""
    given = dataclasses.asdict(config.detection).items()
    return {name: value for name, value in given if not name.startswith("sink_") and name != "rivals"}


def _buffers(model: ModelConfig) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Buffers of the PyTorch network: cell anchors [1 4] and, for Swin, indices of its bias tables."""
    found: dict[str, Any] = {
        f"rpn.anchor_generator.cell_anchors.{level}": anchors((1, 1), (stride,), (size,))
        for level, (stride, size) in enumerate(zip(model.pyramid.strides, model.anchors.sizes))
    }
    if model.backbone.kind == "swin":
        index = relative_position_index(model.backbone.window).astype(np.int64)
        for stage, depth in enumerate(model.backbone.depths):
            for block in range(depth):
                found[f"backbone.body.layers.{stage}.blocks.{block}.attn.relative_position_index"] = index
    return found


def full_state(params: Mapping[str, Any], model: ModelConfig) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Every tensor of the PyTorch network, buffers included, under GLIP names; float32 and int64."""
    state = {
        name: np.asarray(value, np.int64 if np.issubdtype(value.dtype, np.integer) else np.float32)
        for name, value in export_state(params, model).items()
    }
    # torch warns of the read-only arrays of jax.
    return {name: np.require(value, requirements=("C", "W")) for name, value in (state | _buffers(model)).items()}


def write_glip_pth(path: Path, params: Mapping[str, Any], model: ModelConfig) -> None:
    """A `.pth` with exactly the tensors of microsoft/GLIP's files: {"model": {"module.NAME": tensor}}.

    The class branch, which microsoft/GLIP freezes and never reads, has its initial bias and zero weights. Raises
    ExportError for a network that microsoft/GLIP cannot be configured to.
    """
    if model.backbone.kind != "swin":
        raise ExportError(
            f"glip-pth holds networks of microsoft/GLIP, whose backbone is a Swin; this one's is {model.backbone.kind!r}: "
            "use --format=huggingface or --format=onnx"
        )
    if model.prompts.names:
        raise ExportError(
            f"glip-pth: this network has tuned prompts for {model.prompts.names} names, which microsoft/GLIP can hold by token position "
            "only, so that they would be wrong for names in another order: use --format=huggingface or --format=onnx, or export the base"
        )
    wrong = [
        f"{name} is {found}, GLIP's is {wanted}"
        for name, found, wanted in (
            ("model.pyramid.strides", model.pyramid.strides, (8, 16, 32, 64, 128)),
            ("model.head.coarse_offsets", model.head.coarse_offsets, "flat"),
            # microsoft/GLIP has no bound on offsets, and would sample where this network does not.
            ("model.head.offset_bound", model.head.offset_bound, 0),
            ("model.head.positions", model.head.positions, False),
            ("model.input.order", model.input.order, "bgr"),
            ("model.text.mask", model.text.mask, "padding"),
        )
        if found != wanted
    ]
    if wrong:
        raise ExportError(
            f"glip-pth: {'; '.join(wrong)}: microsoft/GLIP would give other boxes; use --format=huggingface"
        )
    import torch

    branch = {
        "rpn.head.cls_logits.weight": np.zeros((_CLASSES, model.pyramid.channels, 1, 1), np.float32),
        "rpn.head.cls_logits.bias": np.full(_CLASSES, -math.log(99), np.float32),
    }
    state = full_state(params, model) | branch
    torch.save({"model": {f"module.{name}": torch.from_numpy(value) for name, value in state.items()}}, path)


def write_huggingface(folder: Path, params: Mapping[str, Any], config: Config) -> None:
    """A folder for `AutoModelForZeroShotObjectDetection` and `AutoProcessor` with trust_remote_code.

    It has the weights, the network and the processor as Python files, and the settings of glip_jax, so that the jobs
    `import`, `predict` and others read it.
    """
    folder.mkdir(parents=True)
    _write_tokenizer(folder, config)
    for file in (
        "glip_network.py",
        "text_encoder.py",
        "cell_places.py",
        "tuned_prompts.py",
        "sinks.py",
        "phrase_mask.py",
        "modeling_glip.py",
        "processing_glip.py",
        "pipeline_glip.py",
    ):
        shutil.copyfile(PORTABLE / file, folder / file)
    state = {f"{NETWORK_PREFIX}{name}": value for name, value in full_state(params, config.model).items()}
    safetensors.numpy.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes the file readable by its owner only.
    (folder / "model.safetensors").chmod((folder / "vocab.txt").stat().st_mode)
    processing, detection = "processing_glip.GlipProcessor", _detection_settings(config)
    _write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "GlipImageProcessor", "processor_class": "GlipProcessor",
        "auto_map": {"AutoImageProcessor": "processing_glip.GlipImageProcessor", "AutoProcessor": processing},
        **_input_settings(config), "detection": detection,
    })  # fmt: skip
    _write_json(folder / "processor_config.json", {
        "processor_class": "GlipProcessor", "auto_map": {"AutoProcessor": processing},
        "separator": config.data.captions.separator, "max_tokens": config.model.text.max_tokens, "detection": detection,
        "names_per_prompt": config.evaluation.chunk,
    })  # fmt: skip
    (folder / "README.md").write_text(_CARD.format(name=config.name))
    # Last: a folder without it is incomplete.
    _write_json(folder / "config.json", {
        "architectures": ["GlipForZeroShotObjectDetection"], "model_type": "glip", "dtype": "float32",
        "auto_map": {"AutoConfig": "modeling_glip.GlipConfig",
                     "AutoModelForZeroShotObjectDetection": "modeling_glip.GlipForZeroShotObjectDetection"},
        "custom_pipelines": {"zero-shot-object-detection": {
            "impl": "pipeline_glip.GlipPipeline", "pt": ["AutoModelForZeroShotObjectDetection"], "type": "multimodal"}},
        "network": _with_sinks(config), "extent": config.model.input.extent,
        "extent_multiple": config.model.input.extent_multiple, "glip_jax": dict(flatten(config)),
    })  # fmt: skip


def write_space(folder: Path, config: Config) -> None:
    """Makes a folder of `write_huggingface` a Space of Hugging Face: app.py, requirements.txt, and the Space's head in README.md."""
    shutil.copyfile(PORTABLE / "app.py", folder / "app.py")
    (folder / "requirements.txt").write_text(_SPACE_REQUIREMENTS)
    card = (folder / "README.md").read_text()
    text = card.split("---\n", 2)[2]
    (folder / "README.md").write_text(_SPACE_HEAD.format(name=json.dumps(config.name)) + text)


def write_onnx(folder: Path, params: Mapping[str, Any], config: Config) -> None:
    """A folder with model.onnx, vocab.txt, settings.json, and run_onnx.py, which runs it with NumPy and onnxruntime.

    The graph takes pixel_values [B 3 H W] (normalized, sides multiples of 32), input_ids and attention_mask [B T], and
    gives boxes [B A 4] (x1, y1, x2, y2 in its pixels), centerness [B A] and logits [B A T], with sinks of those behind the tokens;
    B, H, W and T are free. Every image of a batch has its full size as extent.
    """
    import torch

    from glip_jax.weights.portable.glip_network import GlipNetwork

    network = GlipNetwork(_with_sinks(config))
    state = {name: torch.from_numpy(value) for name, value in full_state(params, config.model).items()}
    network.load_state_dict(state, assign=True)

    class Graph(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits, deltas, centerness = self.network(pixels, tokens, mask)
            return self.network.boxes(deltas, pixels.shape[2], pixels.shape[3]), centerness, logits

    folder.mkdir(parents=True)
    _write_tokenizer(folder, config)
    tokens = torch.arange(1, 8)[None].expand(2, -1) % config.model.text.vocabulary_size
    free = {"pixel_values": {0: "batch", 2: "height", 3: "width"}, "input_ids": {0: "batch", 1: "tokens"},
            "attention_mask": {0: "batch", 1: "tokens"}, "boxes": {0: "batch", 1: "anchors"},
            "centerness": {0: "batch", 1: "anchors"},
            "logits": {0: "batch", 1: "anchors", 2: "tokens_and_sinks" if config.detection.sinks else "tokens"}}  # fmt: skip
    with warnings.catch_warnings(), torch.inference_mode():
        # Warnings that the older exporter is deprecated (the newer one takes 220 s instead of 5 s for a network of two
        # blocks with free sides), and about traced sizes, which do follow the input: the verification runs other sizes.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Graph().eval(), (torch.zeros(2, 3, 192, 256), tokens, torch.ones_like(tokens)), str(folder / "model.onnx"),
            input_names=list(free)[:3], output_names=list(free)[3:], dynamic_axes=free, opset_version=20, dynamo=False,
        )  # fmt: skip
    _write_json(folder / "settings.json", {
        "format": "glip_jax onnx 1", **_input_settings(config), "separator": config.data.captions.separator,
        "max_tokens": config.model.text.max_tokens, "strides": config.model.pyramid.strides,
        "names_per_prompt": config.evaluation.chunk, "detection": _detection_settings(config),
    })  # fmt: skip
    shutil.copyfile(PORTABLE / "run_onnx.py", folder / "run_onnx.py")


def _input_settings(config: Config) -> dict[str, Any]:
    """Preprocessing of images, under the names of `GlipImageProcessor`."""
    pixels = config.model.input
    return {
        "short_side": config.evaluation.short_side, "long_side": config.evaluation.long_side,
        "extent_multiple": pixels.extent_multiple, "order": pixels.order, "mean": pixels.mean, "std": pixels.std,
    }  # fmt: skip


def _write_tokenizer(folder: Path, config: Config) -> None:
    """Writes vocab.txt, tokenizer.json and tokenizer_config.json. Raises AssetError if the vocabulary does not exist."""
    vocabulary = resolve(config.model.text.vocabulary)
    epath.Path(vocabulary).copy(folder / "vocab.txt")
    BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=True).save(str(folder / "tokenizer.json"))
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("UNK", "SEP", "PAD", "CLS", "MASK")}
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": config.model.text.max_tokens,
        **special,
    })  # fmt: skip


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


_SPACE_REQUIREMENTS = """# The Space itself installs gradio, of the version that README.md says; elsewhere: pip install gradio
torch>=2.6
transformers>=5.0,<6
pillow>=11
numpy>=2.0,<3
"""

_SPACE_HEAD = """---
title: {name}
emoji: 🔎
colorFrom: blue
colorTo: green
sdk: gradio
sdk_version: 6.31.0
app_file: app.py
short_description: Finds whatever a text names
---
"""

_CARD = """---
library_name: transformers
pipeline_tag: zero-shot-object-detection
---

# {name}

A GLIP detector (grounded language-image pre-training, arXiv 2112.03857), exported by glip_jax. It detects objects that a text describes:

    from transformers import pipeline

    pipe = pipeline("zero-shot-object-detection", model=".", trust_remote_code=True)  # this folder
    pipe("photo.jpg", candidate_labels=["dog", "red cup"])

The same with the Auto classes, for several images in one batch:

    import torch
    from PIL import Image, ImageOps
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    folder = "."  # this folder
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder, trust_remote_code=True)
    image = ImageOps.exif_transpose(Image.open("photo.jpg"))  # upright, as the processor sees it
    inputs = processor(images=image, text=["dog", "red cup"], return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    sizes = [image.size[::-1]]
    found = processor.post_process_grounded_object_detection(outputs, threshold=0.3, target_sizes=sizes)
    print(found[0]["boxes"], found[0]["scores"], found[0]["text_labels"])

A list of strings is a list of names, each asked as it is typed ("St. Bernard" is one name), for all images; a list of such lists
has one for each image. A string is a caption with a full stop after each phrase ("a dog. a red cup."); where full stops stand
alone, only those count ("a St. Bernard . a red cup"). Names are asked together, in one prompt; `processor.split_names(names)` says
which names go into which call where there are too many for one, and the pipeline does so itself. Text in parentheses is not part of
a name, as in training. Names that the vocabulary does not know, or that are the same to the model, are refused. A sentence whose
noun phrases are to be found is for the job `predict` of glip_jax.

The pipeline returns scores above its `threshold` (default 0.1) and boxes in whole pixels. It finds its code here by the name of
this folder: given a model object instead, transformers asks each label in a text of its own, and the scores differ.

`glip_network.py` is the whole network in torch's own operators, with the names of microsoft/GLIP's checkpoints. An
image's scores do not depend on the images that it is batched with. `config.json` holds the settings it was trained with.
"""
