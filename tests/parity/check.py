"""Compares the whole of glip_jax with the original on a folder of fixtures: `python -m tests.parity.check DIR`.

Prints one line per tensor: its largest difference relative to its largest value, and the tolerance: 2e-5 (forward, targets, losses,
detections) or 1e-4 (gradients and the optimizer step; more where Adam amplifies rounding, see `adam_rounding`). Exits with 1 beyond
a tolerance, with 2 for a folder that cannot be read. Runs as the original does: extent = batch maximum, text uncut, matrix products in
full float32.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glip_jax.config import ConfigError, OptimizerConfig
from glip_jax.inference.postprocess import detect
from glip_jax.models.bert import BertLayer
from glip_jax.models.dynamic_head import DynamicConvolution
from glip_jax.models.fusion import Fusion
from glip_jax.models.glip import GLIP
from glip_jax.structures import boxes as box
from glip_jax.structures import prompts
from glip_jax.structures.batch import Batch
from glip_jax.training import optimizer
from glip_jax.training.assignment import assign
from glip_jax.training.losses import denominators, image_weights, loss_sums, total_loss
from glip_jax.weights.names import WeightError, entries, export_state
from tests.parity.folder import Case, FixtureError, read_cases, read_meta

FORWARD, BACKWARD = 2e-5, 1e-4
ZERO = 1e-6
"""Gradients and norms below this fraction of the global norm count as zero."""
DEAD = ("cls_logits", "aggregate")
"""Stored by the original, but not compared."""
Check = Callable[[Case], tuple[list["Line"], list[str], list[str]]]
"""A case to its comparisons, names of zero gradients, and names of stored tensors that were not compared."""


class Line(NamedTuple):
    """One comparison."""

    name: str
    difference: float
    tolerance: float


def relative(found: Any, wanted: np.ndarray) -> float:
    """Maximum difference divided by the maximum of `wanted`; infinite for another shape."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        return float("inf")
    if wanted.size == 0:
        return 0.0
    difference = np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    return float(difference) if np.isfinite(difference) else float("inf")


def _channels_first(x: Any) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def _per_level(flat: Any, canvas: tuple[int, int], strides: tuple[int, ...]) -> list[np.ndarray]:
    """[B A ...] -> per level [B ... h w]."""
    flat, parts, begin = np.asarray(flat), [], 0
    for stride in strides:
        h, w = box.level_shape(canvas, stride)
        part = flat[:, begin : begin + h * w].reshape(flat.shape[0], h, w, -1)
        parts.append(part.transpose(0, 3, 1, 2))
        begin += h * w
    return parts


def _text_and_backbone(case: Case) -> dict[str, Any]:
    model, batch = GLIP(case.config.model), case.batch

    @jax.jit
    def run(params: Any, image: Any, extent: Any, tokens: Any, mask: Any) -> Any:
        variables = {"params": params}
        features = model.apply(variables, image, extent, method=lambda m, *a: m.backbone(*a))
        levels = model.apply(variables, features, extent, method=lambda m, *a: m.pyramid(*a))
        return features, levels, model.apply(variables, tokens, mask, method="encode_text")

    features, levels, hidden = run(case.params, case.image, batch.extent, batch.tokens, batch.token_mask)
    found = {"eval.lang.hidden": hidden, "eval.lang.embedded": np.asarray(hidden) * batch.token_mask[..., None],
             "eval.lang.masks": batch.token_mask}  # fmt: skip
    found |= {f"eval.backbone.c{i}": _channels_first(c) for i, c in enumerate(features, start=3)}
    return found | {f"eval.fpn.p{i}": _channels_first(p) for i, p in enumerate(levels, start=3)}


def _tower(case: Case, before: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of the modules of the head, block by block."""
    config, batch = case.config.model, case.batch
    text: Any = before["eval.lang.hidden"]
    levels: Any = tuple(
        np.asarray(before[f"eval.fpn.p{i}"]).transpose(0, 2, 3, 1)
        for i, _ in enumerate(config.pyramid.strides, start=3)
    )
    shapes = [x.shape[1:3] for x in levels]
    sizes = tuple(-(-batch.extent // stride) for stride in config.pyramid.strides)
    own = np.ones((len(batch.extent), sum(h * w for h, w in shapes)), bool)
    convolve = jax.jit(lambda p, x, s: DynamicConvolution(config.head, jnp.float32).apply({"params": p}, x, s))
    fuse = jax.jit(lambda p, *a: Fusion(config.fusion, False, jnp.float32).apply({"params": p}, *a))
    layer = BertLayer(config.text, False, jnp.float32, clip=True, start="torch")
    attend = jax.jit(lambda p, *a: layer.apply({"params": p}, *a))
    found: dict[str, Any] = {}
    for block in range(config.head.blocks):
        params = jax.tree.map(lambda x, i=block: x[i], case.params["head"]["tower"])
        at = block * (3 if config.fusion.enabled else 1)
        if config.fusion.enabled:
            visual = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in levels], 1)
            visual, text = fuse(params["fusion"], visual, text, own, batch.token_mask)
            ends = np.cumsum([h * w for h, w in shapes])[:-1].tolist()
            levels = tuple(x.reshape(x.shape[0], *hw, -1) for x, hw in zip(jnp.split(visual, ends, 1), shapes))
            found[f"eval.tower{at}.VLFuse.lang"] = text
            found |= {f"eval.tower{at}.VLFuse.visual{i}": _channels_first(x) for i, x in enumerate(levels)}
            text, _ = attend(params["text"], text, batch.token_mask)
            found[f"eval.tower{at + 1}.BertEncoderLayer.lang"] = text
            at += 2
        levels = convolve(params["convolution"], levels, sizes)
        found |= {f"eval.tower{at}.DyConv.visual{i}": _channels_first(x) for i, x in enumerate(levels)}
    return found


def _heads_and_detections(case: Case) -> dict[str, Any]:
    config, batch = case.config.model, case.batch
    canvas = case.image.shape[1:3]
    strides = config.pyramid.strides
    predictions = jax.jit(GLIP(config).apply)(
        {"params": case.params}, case.image, batch.extent, batch.tokens, batch.token_mask
    )
    found: dict[str, Any] = {}
    for level, (bbox, center, stride) in enumerate(
        zip(
            _per_level(predictions.deltas, canvas, strides),
            _per_level(predictions.centerness, canvas, strides),
            strides,
        )
    ):
        found |= {f"eval.head.bbox_reg{level}": bbox, f"eval.head.centerness{level}": center}
        part = slice(
            sum(int(np.prod(box.level_shape(canvas, s))) for s in strides[:level]),
            sum(int(np.prod(box.level_shape(canvas, s))) for s in strides[: level + 1]),
        )
        found[f"eval.head.dot_product_logits{level}"] = np.asarray(predictions.logits)[:, part]
        found[f"eval.anchors{level}"] = box.anchors(canvas, (stride,), config.anchors.sizes[level : level + 1])
    if not any(name.startswith("eval.det") for name in case.wanted):
        return found
    detections = jax.jit(detect, static_argnums=(4, 5, 6))(
        predictions, case.class_map, batch.size, batch.extent, canvas, config, case.config.detection
    )
    for i in range(len(batch.size)):
        real = np.asarray(detections.phrases[i]) >= 0
        rows = np.asarray(detections.boxes[i])[real], np.asarray(detections.scores[i])[real]
        order = paired(case, i, *rows, np.asarray(detections.phrases[i])[real] + 1)
        found[f"eval.det{i}.boxes"], found[f"eval.det{i}.scores"] = rows[0][order], rows[1][order]
        found[f"eval.det{i}.labels"] = np.asarray(detections.phrases[i])[real][order] + 1
    return found


def paired(case: Case, image: int, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Our detections in the order of the original's.

    Scores that differ by less than the tolerance may stand in either order, so each of the original's rows takes the
    nearest unused box of its label among those of its score; where there is none it takes the next row as it comes.
    """
    wanted = [case.wanted.get(f"eval.det{image}.{field}") for field in ("boxes", "scores", "labels")]
    if any(part is None for part in wanted) or len(wanted[1]) != len(scores):  # pyright: ignore[reportArgumentType]
        return np.arange(len(scores))
    free, order = np.ones(len(scores), bool), []
    for box_, score, label in zip(*wanted):  # pyright: ignore[reportArgumentType]
        close = free & (labels == label) & (np.abs(scores - score) <= FORWARD * wanted[1].max())  # pyright: ignore[reportOptionalMemberAccess]
        distance = np.where(close, np.abs(boxes - box_).max(1), np.inf)
        row = int(np.argmin(distance)) if close.any() else int(np.argmax(free))
        free[row] = False
        order.append(row)
    return np.array(order, int)


def _training(case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Assignment and losses under their names, and the gradients under the parameters' names."""
    config, batch, canvas = case.config, case.batch, case.image.shape[1:3]

    def loss_of(params: Any, image: Any, batch: Batch) -> tuple[Any, Any]:
        predictions = GLIP(config.model).apply({"params": params}, image, batch.extent, batch.tokens, batch.token_mask)
        targets = assign(batch.boxes, batch.box_mask, batch.extent, canvas, config.model, config.loss)
        over = denominators(image_weights(targets, batch.box_weight), batch.valid, config.loss.positives_floor)
        sums = loss_sums(predictions, targets, batch, canvas, config)  # pyright: ignore[reportArgumentType]
        loss, parts = total_loss(sums, over, config.loss)
        return loss, (parts, targets)

    gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, (parts, targets)), gradients = gradient(case.params, case.image, batch)
    found = {
        "train.loss.total": loss, "train.loss.loss_reg": parts["box"],
        "train.loss.loss_centerness": parts["centerness"], "train.loss.loss_dot_product_token": parts["token"],
    }  # fmt: skip
    anchors = box.anchors(case.image.shape[1:3], config.model.pyramid.strides, config.model.anchors.sizes)
    last = np.arange(batch.tokens.shape[1]) == batch.tokens.shape[1] - 1
    for i in range(len(batch.size)):
        positive, index = np.asarray(targets.positive[i]), np.asarray(targets.box_index[i])
        found[f"train.atss.labels{i}"] = positive
        deltas = box.encode(batch.boxes[i][index], anchors)
        found[f"train.atss.reg_targets{i}"] = np.where(positive[:, None], deltas, 0)
        rows = np.where(positive[:, None], batch.positive_map[i][index], last[None])
        stored = case.wanted.get(f"train.atss.token_labels{i}", rows)
        found[f"train.atss.token_labels{i}"] = np.pad(rows, ((0, 0), (0, max(0, stored.shape[1] - rows.shape[1]))))
    return found, export_state(gradients, config.model)


def _training_wanted(case: Case) -> dict[str, np.ndarray]:
    """The assignment of the original in comparable terms: positives instead of class labels, targets of positives only."""
    wanted = {}
    for name, value in case.wanted.items():
        if name.startswith("train.atss.labels"):
            wanted[name] = value > 0
        elif name.startswith("train.atss.reg_targets"):
            positive = case.wanted[name.replace("reg_targets", "labels")] > 0
            wanted[name] = np.where(positive[:, None], value, 0)
        elif name.startswith(("train.atss.", "train.loss.")) and name != "train.loss.loss_cls":
            wanted[name] = value
    return wanted


class _Stored(NamedTuple):
    """The original's gradients in a fixture."""

    norms: dict[str, float]
    """Norm per parameter, before clipping."""
    full: dict[str, np.ndarray]
    """Whole tensors, if the fixture holds them."""
    scale: float
    """Factor of the stored tensors: 1, or the clip factor of the original, which clips in place."""

    @property
    def norm(self) -> float:
        """The global norm."""
        return float(np.sqrt(sum(max(norm, 0.0) ** 2 for norm in self.norms.values())))


def _stored(case: Case) -> _Stored:
    norms = dict(zip(case.wanted["train.grad_names"].tolist(), case.wanted["train.grad_norms"].tolist()))
    norms = {name: norm for name, norm in norms.items() if not any(part in name for part in DEAD)}
    full = {n.removeprefix("train.grad."): v for n, v in case.wanted.items() if n.startswith("train.grad.")}
    full = {name: value for name, value in full.items() if name in norms}
    stored = _Stored(norms, full, 1.0)
    # The arrays say whether they were clipped.
    floor = ZERO * stored.norm
    scales = [np.linalg.norm(v.astype(np.float64)) / norms[n] for n, v in full.items() if norms[n] > floor]
    return stored._replace(scale=float(np.median(scales))) if scales else stored


def _gradients(stored: _Stored, found: Mapping[str, np.ndarray]) -> tuple[list[Line], list[str]]:
    """Comparisons of gradients and norms, and the names whose gradient counts as zero on both sides."""
    floor, scale = ZERO * stored.norm, stored.scale
    full = {name: value for name, value in stored.full.items() if name in found}
    lines, zeros = [], []
    if any(stored.norms[name] > floor for name in full):
        clipped = 1.0 / max(1.0, stored.norm)
        lines.append(
            Line("scale of full gradients: 1 or clipped", min(abs(scale - 1), abs(scale - clipped) / clipped), BACKWARD)
        )
    for name, wanted in full.items():
        if stored.norms[name] > floor:
            lines.append(Line(f"train.grad.{name}", relative(found[name] * scale, wanted), BACKWARD))
    for name, norm in stored.norms.items():
        ours = float(np.linalg.norm(found[name].astype(np.float64))) if name in found else float("nan")
        if max(norm, 0.0) <= floor and ours <= floor:
            zeros.append(name)
        else:
            lines.append(Line(f"train.grad_norm.{name}", abs(ours - norm) / max(norm, floor), BACKWARD))
    return lines, zeros


def adam_rounding(gradient: np.ndarray, change: float, epsilon: float) -> float:
    """How much Adam's first step g / (|g| + epsilon) can change if every element of `gradient` changes by `change`.

    Root mean square over the elements, in units of the rate. An element that is large beside `change` adds next to nothing; one
    that is rounding alone can turn its sign; one that is exactly 0 (of a word that no prompt has) stays so.
    """
    gradient = np.abs(gradient.astype(np.float64))

    def step(g: np.ndarray) -> np.ndarray:
        return g / (np.abs(g) + epsilon)

    largest = np.maximum(step(gradient + change) - step(gradient), step(gradient) - step(gradient - change))
    return float(np.sqrt(np.square(np.where(gradient > 0, largest, 0)).mean()))


def _step(case: Case, stored: _Stored, found: Mapping[str, np.ndarray]) -> list[Line]:
    """One step of AdamW: rate and decay groups, and each parameter's change in units of rate x root of its size.

    The step gets the stored gradients where the fixture has the tensor. Elsewhere it gets ours, which differ from the original's by
    rounding, and Adam's first step amplifies the rounding of gradients near zero: there the tolerance is what a change of `ZERO` of
    the tensor's largest gradient can do to the step (`adam_rounding`), or of the global norm where the whole gradient counts as zero.
    """
    settings = OptimizerConfig(warmup_steps=0)
    groups = optimizer.groups(case.params, case.config.model, settings)
    ours = {entry.name: groups[entry.path] for entry in entries(case.config.model)}
    state = {name: jnp.asarray(value) for name, value in export_state(case.params, case.config.model).items()}
    # Jitted: one program, instead of one for each operation of each shape.
    clip = jax.jit(optimizer.clip, static_argnums=1)
    gradients, norm = clip({name: jnp.asarray(found[name]) for name in state}, settings.clip_norm)
    factor = min(1.0, settings.clip_norm / float(norm))
    clipped = abs(stored.scale - factor) < abs(stored.scale - 1)
    gradients |= {
        name: jnp.asarray(value if clipped else value * np.float32(factor))
        for name, value in stored.full.items()
        if name in state
    }
    chain = optimizer.make_optimizer(ours, 1000, settings)

    @jax.jit
    def updated(gradients: Any, state: Any) -> Any:
        updates, _ = chain.update(gradients, chain.init(state), state, step=0)
        return optax.apply_updates(state, updates)

    new: Any = updated(gradients, state)
    lines, wanted, floor = [], case.wanted, ZERO * float(norm)
    for name, rate, decay, delta in zip(
        wanted["step.names"].tolist(), wanted["step.lr"], wanted["step.weight_decay"], wanted["step.delta_norms"]
    ):
        if any(part in name for part in DEAD) or name not in ours:
            continue
        lines.append(Line(f"step.lr.{name}", abs(ours[name].rate - rate) / rate, BACKWARD))
        lines.append(Line(f"step.weight_decay.{name}", abs(ours[name].decay - decay), BACKWARD))
        gradient, tolerance = np.asarray(gradients[name]), BACKWARD
        if name not in stored.full:
            zero = np.linalg.norm(found[name]) <= floor and stored.norms.get(name, 0.0) <= floor
            change = floor * factor if zero else ZERO * float(np.abs(gradient).max())
            tolerance = max(BACKWARD, adam_rounding(gradient, change, settings.epsilon))
        change = np.asarray(new[name], np.float64) - np.asarray(state[name], np.float64)
        difference = abs(np.linalg.norm(change) - delta) / (rate * np.sqrt(change.size))
        lines.append(Line(f"step.delta_norm.{name}", float(difference), tolerance))
    return lines


def _tokens(case: Case, vocabulary: Path) -> list[Line]:
    if not vocabulary.is_file():
        return []
    tokenizer = prompts.load_tokenizer(vocabulary)
    lines = []
    for i, caption in enumerate(case.captions):
        found, _ = prompts.tokenize(prompts.Prompt(caption, ()), tokenizer, case.batch.tokens.shape[1], truncate=True)
        same = np.array_equal(found.tokens, case.batch.tokens[i]) and np.array_equal(
            found.mask, case.batch.token_mask[i]
        )
        lines.append(Line(f"in.input_ids[{i}] from the caption", 0.0 if same else float("inf"), FORWARD))
    return lines


def check_case(case: Case, vocabulary: Path) -> tuple[list[Line], list[str], list[str]]:
    """Lines of one case, names of zero gradients, and names of stored tensors that were not compared."""
    wanted = {n: v for n, v in case.wanted.items() if n.startswith("eval.") and not any(part in n for part in DEAD)}
    found = _text_and_backbone(case) if wanted else {}
    if any(name.startswith("eval.tower") for name in wanted):
        found |= _tower(case, found)
    if any(name.startswith(("eval.head", "eval.det", "eval.anchors")) for name in wanted):
        found |= _heads_and_detections(case)
    lines, zeros = _tokens(case, vocabulary), []
    if any(name.startswith(("train.", "step.")) for name in case.wanted):
        training, gradients = _training(case)
        found, wanted = found | training, wanted | _training_wanted(case)
        if "train.grad_names" in case.wanted:
            stored = _stored(case)
            more, zeros = _gradients(stored, gradients)
            lines += more
            if "step.names" in case.wanted:
                lines += _step(case, stored, gradients)
    lines += [Line(name, relative(found[name], value), FORWARD) for name, value in wanted.items() if name in found]
    known = set(found) | {"train.grad_names", "train.grad_norms", "train.loss.loss_cls", "anchor_sizes"}
    known |= {"step.names", "step.lr", "step.weight_decay", "step.delta_norms"}
    known |= {line.name for line in lines} | {f"train.grad.{name}" for name in zeros}
    left = [name for name in case.wanted if name not in known and not name.startswith("in.")]
    return lines, zeros, left


def report(case: Case, check: Check) -> Iterator[str]:
    """Lines of text. Differences raise nothing; the caller counts 'FAIL'."""
    lines, zeros, left = check(case)
    for line in lines:
        verdict = "ok  " if line.difference <= line.tolerance else "FAIL"
        yield f"{verdict} {case.name:15s} {line.name:90s} {line.difference:.2e} (<= {line.tolerance:.1e})"
    for name in zeros:
        yield f"zero {case.name:15s} gradient of {name}"
    for name in left:
        yield f"left {case.name:15s} {name} (stored, not compared)"


def run(argv: list[str] | None, prog: str, about: str, check_of: Callable[[Path], Check]) -> int:
    """Reads the command line and checks every case of the folder; returns the exit status.

    `check_of` is given the path of the folder's vocabulary.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=about)
    parser.add_argument("folder", type=Path, help="fixture folder: meta.json, weights, npz files")
    parser.add_argument("--quiet", action="store_true", help="print only failures and the summary")
    arguments = parser.parse_args(argv)
    try:
        meta = read_meta(arguments.folder)
        cases, others = read_cases(arguments.folder)
    except (FixtureError, WeightError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 2
    vocabulary = arguments.folder.parent / meta["vocab"]
    failures = compared = 0
    for case in cases:
        for text in report(case, check_of(vocabulary)):
            failures += text.startswith("FAIL")
            compared += text.startswith(("ok", "FAIL"))
            if not arguments.quiet or text.startswith("FAIL"):
                print(text, flush=True)
    for name in others:
        print(f"left {name} (not compared)")
    if not vocabulary.is_file():
        print(f"left {meta['vocab']} (not in the folder above: captions were not tokenised)")
    print(f"{compared} comparisons over {len(cases)} cases, {failures} beyond tolerance")
    return 1 if failures or not compared else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    jax.config.update("jax_default_matmul_precision", "highest")
    return run(argv, "tests.parity.check", __doc__ or "", lambda vocabulary: lambda case: check_case(case, vocabulary))


if __name__ == "__main__":
    sys.exit(main())
