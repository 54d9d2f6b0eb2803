"""Compares the exported PyTorch network with the original: `python -m tests.parity.check_torch DIR`.

The original's weights are loaded by their own names, without passing through JAX; outputs and detections are
compared as `tests.parity.check` compares ours, within 2e-5. So two implementations agree with the original
independently. Exit codes are those of `tests.parity.check`. Training (losses, assignment, steps) is ours alone.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glip_jax.weights.portable.glip_network import BertLayer, DynamicConvolution, GlipNetwork
from glip_jax.weights.portable.processing_glip import best_detections
from tests.parity.check import DEAD, FORWARD, Line, paired, relative, run
from tests.parity.folder import Case

__all__ = ["check_case", "main"]

_TRAINING = ("train.", "step.", "anchor_sizes")


def check_case(case: Case) -> tuple[list[Line], list[str], list[str]]:
    """Lines of one case, an empty list (there are no gradients), and names of stored tensors that were not compared."""
    wanted = {n: v for n, v in case.wanted.items() if n.startswith("eval.") and not any(part in n for part in DEAD)}
    found = _outputs(case) if wanted else {}
    lines = [Line(name, relative(found[name], value), FORWARD) for name, value in wanted.items() if name in found]
    left = [name for name in wanted if name not in found]
    return lines, [], left


def _network(case: Case) -> GlipNetwork:
    """The network with the weights of the original; all are used except those of the unused class branch."""
    network = GlipNetwork(dataclasses.asdict(case.config.model)).eval()
    # Anchors of the `levels` case are not those of the weights' file.
    kept = {
        name: torch.from_numpy(value)
        for name, value in case.state.items()
        if "cls_logits" not in name and "cell_anchors" not in name
    }
    anchors = {n: v for n, v in network.state_dict().items() if "cell_anchors" in n}
    network.load_state_dict(kept | anchors, strict=True)
    return network


@torch.inference_mode()
def _outputs(case: Case) -> dict[str, Any]:
    """Outputs of a forward pass under the names that the original stored them."""
    network, batch = _network(case), case.batch
    found: dict[str, Any] = {}
    tower: Any = network.rpn["head"].get_submodule("dyhead_tower")
    for number, part in enumerate(tower):
        part.register_forward_hook(_recorder(found, number))
    pixels = torch.from_numpy(case.image.transpose(0, 3, 1, 2))
    tokens, mask = torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.token_mask)
    maps = network.backbone["body"](pixels)
    levels = network.backbone["fpn"](maps)
    hidden = network.encode_text(tokens, mask)
    found |= {"eval.lang.hidden": hidden, "eval.lang.embedded": hidden * mask[..., None], "eval.lang.masks": mask}
    found |= {f"eval.backbone.c{i}": c for i, c in enumerate(maps, start=3)}
    found |= {f"eval.fpn.p{i}": p for i, p in enumerate(levels, start=3)}
    logits, deltas, center = network.ground(levels, hidden, mask)
    shapes = [level.shape[-2:] for level in levels]
    counts = [h * w for h, w in shapes]
    for i, parts in enumerate(zip(logits.split(counts, 1), deltas.split(counts, 1), center.split(counts, 1), shapes)):
        aligned, box, own, shape = parts
        found[f"eval.head.dot_product_logits{i}"] = aligned
        found[f"eval.head.bbox_reg{i}"] = box.transpose(1, 2).unflatten(2, shape)
        found[f"eval.head.centerness{i}"] = own[:, None].unflatten(2, shape)
    corners = network.boxes(deltas, *pixels.shape[-2:])
    plain = network.boxes(torch.zeros_like(deltas[:1]), *pixels.shape[-2:])[0]
    found |= {f"eval.anchors{i}": part for i, part in enumerate(plain.split(counts))}
    share = torch.from_numpy(case.class_map).to(logits.dtype)
    for i, size in enumerate(torch.from_numpy(batch.size)):
        boxes, scores, labels = best_detections(logits[i], corners[i], center[i], share[i], size, counts)
        rows = boxes.numpy(), scores.numpy(), labels.numpy() + 1
        order = paired(case, i, *rows)
        for field, values in zip(("boxes", "scores", "labels"), rows):
            found[f"eval.det{i}.{field}"] = values[order]
    return {name: np.asarray(value) for name, value in found.items()}


def _recorder(found: dict[str, Any], number: int) -> Any:
    """A hook that stores the output of a module of the head under the class name of the original."""

    def hook(part: Any, _: Any, output: Any) -> None:
        match part:
            case BertLayer():
                found[f"eval.tower{number}.BertEncoderLayer.lang"] = output
            case DynamicConvolution():
                found.update({f"eval.tower{number}.DyConv.visual{i}": x for i, x in enumerate(output)})
            case _:
                found.update({f"eval.tower{number}.VLFuse.visual{i}": x for i, x in enumerate(output[0])})
                found[f"eval.tower{number}.VLFuse.lang"] = output[1]

    return hook


def main(argv: list[str] | None = None) -> int:
    """Runs the check; returns the exit status."""

    def check_of(_: Path) -> Any:
        return check_case

    return run(argv, "tests.parity.check_torch", __doc__ or "", check_of)


if __name__ == "__main__":
    sys.exit(main())
