"""Times detection of LVIS's 1,203 names, 40 a prompt: images/s of the Detector, of the original's way, and of a peer.

GLIP-T's widths, random weights, one image of 480 x 640, float32, 300 boxes a prompt; seconds are for all names of an image,
post-processing included, texts of the Detector not, which are encoded once a run. Each side is a process of its own, alternating in one run; `ratio` is relative to the Detector.

    original    the whole network once for each prompt of 256 tokens, as the original does (glip-reference 5.1)
    mm_whole    MMGroundingDino of `transformers` on torch (benchmarks environment), eager, as its users ask many names: a call of
                the model for each prompt, without padding
    mm          the same with the image features of the first call, as the chunks of its authors' code; `transformers` has no
                option for it
    detector    glip_jax.inference.Detector: image features and texts once, prompts padded to the longest

Modes: `fusion` is GLIP-T; `no_fusion` is GLIP-T (A), for which the text is free. See `benchmarks/alternating.py`.

    python -m benchmarks.lvis --threads 2 --rounds 1 [--names=lvis_v1_val.json] [--prompts=31] [--threshold=0.05]

--names: a COCO or LVIS JSON whose categories are asked; default: made names of one to three words, as long in tokens as LVIS's.
--prompts: of so many only, for a quick look (the ratio hardly changes from some 8 on). --threshold: of the candidates; with random
weights 0.05 leaves none, 0 as many as there can be.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.alternating import Runs, Settings, main
from glip_jax.config import Config
from glip_jax.structures.batch import Prompt

HEIGHT, WIDTH, NAMES, CHUNK, BOXES = 480, 640, 1203, 40, 300


class _Task(NamedTuple):
    """What every side computes."""

    names: list[str]
    prompts: list[Prompt]
    tokens: list[list[int]]
    """Token ids of each prompt."""
    threshold: float
    longest: int
    """Index of the longest prompt."""


def _config(fused: bool, threshold: float) -> Config:
    from benchmarks.sample import tiny
    from configs.bccd import MINILM

    config = tiny()
    model = dataclasses.replace(
        config.model,
        fusion=dataclasses.replace(config.model.fusion, enabled=fused),
        # The vocabulary of BERT, from a package.
        text=dataclasses.replace(config.model.text, vocabulary=f"{MINILM}/vocab.txt"),
    )
    detection = dataclasses.replace(config.detection, threshold=threshold, max_detections=BOXES)
    evaluation = dataclasses.replace(config.evaluation, short_side=HEIGHT, long_side=WIDTH, chunk=CHUNK, batch_size=1)
    return dataclasses.replace(config, model=model, detection=detection, evaluation=evaluation)


def _made_names(vocabulary: Path) -> list[str]:
    """Names of words of the vocabulary, whose prompts are as long as those of LVIS: 40 names take 85 to 124 tokens, 114 on average."""
    rng = np.random.default_rng(0)
    words = [
        word for word in vocabulary.read_text().splitlines() if word.isascii() and word.isalpha() and len(word) > 3
    ]
    counts = rng.choice([1, 2, 3], NAMES, p=[0.35, 0.5, 0.15])
    return [" ".join(rng.choice(words, count)) for count in counts]


def _task(arguments: Sequence[str]) -> _Task:
    from glip_jax.inference import category_prompts
    from glip_jax.io import assets
    from glip_jax.structures.prompts import load_tokenizer

    parser = argparse.ArgumentParser(prog="python -m benchmarks.lvis", allow_abbrev=False)
    parser.add_argument("--names", default="")
    parser.add_argument("--prompts", type=int, default=0)
    parser.add_argument("--threshold", type=float, default=0.05)
    given = parser.parse_args(arguments)
    config = _config(True, given.threshold)
    vocabulary = assets.resolve(config.model.text.vocabulary)
    if given.names:
        categories = json.loads(Path(given.names).read_text())["categories"]
        names = [category["name"] for category in sorted(categories, key=lambda category: category["id"])]
    else:
        names = _made_names(Path(vocabulary))
    tokenizer = load_tokenizer(vocabulary)
    chunks = category_prompts(names, tokenizer, config)
    chunks = chunks[: given.prompts or len(chunks)]
    tokens = [tokenizer.encode(prompt.caption).ids for prompt, _ in chunks]
    names = [names[i] for _, indices in chunks for i in indices]
    longest = int(np.argmax([len(ids) for ids in tokens]))
    return _Task(names, [prompt for prompt, _ in chunks], tokens, given.threshold, longest)


def _image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def _parameters(config: Config) -> Any:
    import jax

    from benchmarks.sample import abstract_params

    init, _ = abstract_params(config)
    return jax.block_until_ready(jax.jit(init)(jax.random.key(0)))


def _modes(make: Callable[[bool], tuple[Callable[[], None], Callable[[], None]]], fused: Sequence[bool]) -> Runs:
    """Runs of the modes; `make` returns a short run and the whole one, at the first use of a mode."""
    made: dict[bool, tuple[Callable[[], None], Callable[[], None]]] = {}

    def run(kind: bool, which: int) -> None:
        if kind not in made:
            made.clear()
            made[kind] = make(kind)
        made[kind][which]()

    names = {True: "fusion", False: "no_fusion"}
    runs: Runs = {}
    for kind in fused:
        runs[f"warm {names[kind]}"] = lambda kind=kind: run(kind, 0)
        runs[names[kind]] = lambda kind=kind: run(kind, 1)
    return runs


def detector_runs(settings: Settings) -> Runs:
    """The Detector, one image a call."""
    from glip_jax.inference import Detector

    task, image = _task(settings.arguments), _image()

    def make(fused: bool) -> tuple[Callable[[], None], Callable[[], None]]:
        config = _config(fused, task.threshold)
        detector = Detector(config, _parameters(config), batch_size=1)

        def short() -> None:
            longest = task.prompts[task.longest]
            detector.caption([image], [longest])
            for prompt in task.prompts:
                detector.text(prompt, len(detector.text(longest)[0].tokens))

        def whole() -> None:
            detector.categories([image], task.names)

        return short, whole

    return _modes(make, (True, False))


def original_runs(settings: Settings) -> Runs:
    """The whole network and its post-processing for each prompt."""
    import jax

    from glip_jax.inference.postprocess import detect
    from glip_jax.io import assets
    from glip_jax.models.glip import GLIP, normalize
    from glip_jax.structures.prompts import load_tokenizer, tokenize

    task, image = _task(settings.arguments), _image()[None]
    extent = np.array([[HEIGHT, WIDTH]], np.int32)

    def make(fused: bool) -> tuple[Callable[[], None], Callable[[], None]]:
        config = _config(fused, task.threshold)
        model, params = GLIP(config.model), _parameters(config)
        tokenizer = load_tokenizer(assets.resolve(config.model.text.vocabulary))
        asked = [tokenize(prompt, tokenizer, config.model.text.max_tokens) for prompt in task.prompts]

        @jax.jit
        def found(params: Any, tokens: Any, mask: Any, phrase_map: Any) -> Any:
            pixels = normalize(image, extent, config.model.input)  # pyright: ignore[reportArgumentType]
            predictions: Any = model.apply({"params": params}, pixels, extent, tokens, mask)
            return detect(predictions, phrase_map, extent, extent, (HEIGHT, WIDTH), config.model, config.detection)  # pyright: ignore[reportArgumentType]

        def run(part: Sequence[Any]) -> None:
            for tokens, mask, phrase_map in part:
                padded = np.pad(phrase_map, ((0, CHUNK - len(phrase_map)), (0, 0)))
                jax.tree.map(np.asarray, found(params, tokens[None], mask[None], padded[None]))

        return lambda: run(asked[:1]), lambda: run(asked)

    return _modes(make, (True, False))


def peer_runs(settings: Settings, features_once: bool = True) -> Runs:
    """MMGroundingDino for each prompt; with `features_once` but its backbone."""
    import torch

    from benchmarks.compare_mm_grounding_dino import mm_grounding_dino

    task, device = _task(settings.arguments), "cuda" if settings.device == "gpu" else "cpu"
    model = mm_grounding_dino(settings.threads).to(device).eval()

    class Once(torch.nn.Module):
        """The backbone with its position embeddings, run once an image."""

        def __init__(self, backbone: Any) -> None:
            super().__init__()
            self.backbone, self.features = backbone, None

        @property
        def position_embedding(self) -> Any:
            return self.backbone.position_embedding

        def forward(self, pixels: Any, mask: Any) -> Any:
            if self.features is None:
                self.features = self.backbone(pixels, mask)
            vision, positions = self.features
            return list(vision), list(positions)

    once = Once(model.model.backbone)
    if features_once:
        model.model.backbone = once
    pixels = torch.randn(1, 3, HEIGHT, WIDTH, device=device)
    mask = torch.ones(1, HEIGHT, WIDTH, dtype=torch.long, device=device)

    def run(part: Sequence[list[int]]) -> None:
        once.features = None
        with torch.inference_mode():
            for ids in part:
                tokens = torch.tensor([ids], device=device)
                found = model(pixel_values=pixels, pixel_mask=mask, input_ids=tokens)
                found.logits.sigmoid().amax(-1).topk(BOXES)[0].cpu()

    return {"warm fusion": lambda: run(task.tokens[:1]), "fusion": lambda: run(task.tokens)}


def _bound(arguments: Sequence[str]) -> None:
    """Prints what the products alone allow: FLOPs of the original's way over those of the Detector."""
    from glip_jax.training.monitoring.flops import flops_per_image

    task = _task(arguments)
    lengths = [len(ids) for ids in task.tokens]
    length = -(-max(lengths) // 16) * 16
    count = len(task.prompts)
    print(
        f"{len(task.names)} names in {count} prompts of {min(lengths)} to {max(lengths)} tokens, "
        f"{np.mean(lengths):.0f} on average; the Detector pads to {length}"
    )
    for mode, fused in (("fusion", True), ("no_fusion", False)):
        model = _config(fused, task.threshold).model
        whole, parts = (
            flops_per_image(model, HEIGHT, WIDTH).forward,
            flops_per_image(model, HEIGHT, WIDTH, length).parts,
        )
        once = parts["backbone"] + parts["pyramid"] + (0 if fused else parts["dynamic"])
        each = parts["outputs"] + (parts["fusion"] + parts["head_text"] + parts["dynamic"] if fused else 0)
        print(
            f"{mode}: {count} x {whole / 1e9:.0f} GFLOPs against {once / 1e9:.0f} + {count} x {each / 1e9:.1f}: "
            f"at most {count * whole / (once + count * each):.2f} times as fast"
        )


if __name__ == "__main__":
    whole = functools.partial(peer_runs, features_once=False)
    sides = {"original": original_runs, "mm_whole": whole, "mm": peer_runs, "detector": detector_runs}
    main("benchmarks.lvis", __doc__ or "", sides, ("fusion", "no_fusion"), _bound)
