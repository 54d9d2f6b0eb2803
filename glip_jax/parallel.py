"""One program on 1 CPU, 8 fake devices or a pod: the mesh, the table of rules, placing state and batches.

The mesh has three axes. `data` and `fsdp` both split the batch; `fsdp` also splits the large parameters, with their
moments and averages; `tensor` splits the inner widths of attention and feed-forward layers. How a parameter lies on
the mesh is read from its path in `RULES`, and from nowhere else.
"""

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glip_jax.config import MeshConfig
from glip_jax.structures import BATCH_AXES

__all__ = [
    "AXES",
    "RULES",
    "MeshError",
    "abstract",
    "batch_sharding",
    "check_batch",
    "make_mesh",
    "parameter_spec",
    "place_batch",
    "replicated",
    "shardings",
]

AXES = ("data", "fsdp", "tensor")

Tree = TypeVar("Tree")

_LAST = ("fsdp",)
_FIRST = ("fsdp", None)
_COLUMNS = ("fsdp", "tensor")
_ROWS = ("tensor", "fsdp")

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Vectors and scalars: biases (Swin's position tables too), norms, residual scales. Too small to be worth a gather.
    (r".*/(\w*bias\w*|scale|scales|log_scale|\w+_gamma|frozen_scale|frozen_shift)", ()),
    # Swin: attention and feed-forward in, then out; merges; the patch convolution.
    (r"backbone/stage\d/(pairs/\w+|last)/(qkv|mlp_in)/kernel", _COLUMNS),
    (r"backbone/stage\d/(pairs/\w+|last)/(projection|mlp_out)/kernel", _ROWS),
    (r"backbone/merge\d/reduction/kernel", _LAST),
    (r"backbone/patch_embedding/kernel", _LAST),
    # EfficientNet-Lite0: 3.4 M parameters in widths that few meshes divide.
    (r"backbone/(stem/kernel|stage\d/block\d/(depthwise|(expand|project)/kernel))", ()),
    (r"pyramid/(lateral|output|extra)\d/kernel", _LAST),
    # Text encoder, and the BERT layers inside the head. The vocabulary is divided by no mesh, the width is.
    (r"text/embeddings/(word|position|type)", _LAST),
    (r"(text/layers|head/tower/text)/(query|key|value|intermediate)/kernel", _COLUMNS),
    (r"(text/layers|head/tower/text)/(attention_output|output)/kernel", _ROWS),
    # Head: fusion, dynamic convolutions, outputs.
    (r"head/tower/fusion/(visual|text)_(query|key|value)_kernel", _COLUMNS),
    (r"head/tower/fusion/(visual|text)_output_kernel", _ROWS),
    (r"head/tower/convolution/(fine|same|coarse)_kernel", _LAST),
    (r"head/tower/convolution/relu/expand/kernel", _LAST),
    (r"head/tower/convolution/(offset|relu/squeeze)/kernel", _FIRST),
    (r"head/tower/convolution/attention/kernel", ()),
    (r"head/projection/kernel", _FIRST),
    (r"head/(box|centerness)/kernel", ()),
)
"""(pattern that matches the whole path of a parameter, mesh axes of its trailing dimensions).

Exactly one pattern matches each path. Axes are aligned to the last dimensions, so the leading layer axis of scanned
blocks and the taps of convolutions are never split; () replicates.
"""


class MeshError(ValueError):
    """A mesh that the devices, the batch or a parameter do not fit."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), in order of process so that a process holds adjacent rows of a batch.

    Raises MeshError with both numbers if the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise MeshError(f"mesh is {sizes}: expected sizes of at least 1, and -1 (the rest) at most once")
    if -1 in sizes.values():
        if len(ordered) % known:
            raise MeshError(
                f"mesh is {sizes}: the fixed axes take {known} devices, which does not divide {len(ordered)}"
            )
        sizes = {axis: len(ordered) // known if size == -1 else size for axis, size in sizes.items()}
    elif known != len(ordered):
        raise MeshError(
            f"mesh is {sizes}: its product is {known}, but there are {len(ordered)} devices; use -1 for the rest"
        )
    here = sum(device.process_index == ordered[0].process_index for device in ordered)
    if here % sizes["tensor"]:
        raise MeshError(f"mesh.tensor is {sizes['tensor']}: it must divide the {here} devices of a process")
    return Mesh(np.array(ordered).reshape(tuple(sizes.values())), AXES)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How the parameter at `path` lies on the mesh.

    Raises MeshError if not exactly one rule matches, or if a split dimension is no multiple of its axis.
    """
    matches = [(pattern, axes) for pattern, axes in RULES if re.fullmatch(pattern, path)]
    if len(matches) != 1:
        found = ", ".join(repr(pattern) for pattern, _ in matches) or "none"
        raise MeshError(
            f"parameter {path} {shape}: {len(matches)} sharding rules match ({found}), expected one of RULES"
        )
    axes = matches[0][1]
    if len(axes) > len(shape):
        raise MeshError(f"parameter {path} has shape {shape}, its rule {matches[0][0]!r} names {len(axes)} dimensions")
    spec = (None,) * (len(shape) - len(axes)) + axes
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise MeshError(
                f"parameter {path} {shape}: dimension {size} is no multiple of mesh.{axis} {mesh.shape[axis]}; "
                f"choose a smaller mesh.{axis} or another width"
            )
    return PartitionSpec(*spec)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """The same pytree with a NamedSharding for each leaf (array or jax.ShapeDtypeStruct).

    The dictionary keys on the way to a leaf are its parameter path, so moments and averages lie as their parameters
    do; leaves outside any dictionary (counters) are replicated.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        return NamedSharding(mesh, parameter_spec(name, tuple(leaf.shape), mesh) if name else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def abstract(tree: Tree, mesh: Mesh) -> Tree:
    """The same pytree of jax.ShapeDtypeStruct with shardings: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Examples split over data and fsdp; `leading` axes before the examples' (micro-batches) are not split."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises MeshError unless every micro-batch splits evenly over data x fsdp and over the processes."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (accumulate * rows):
        raise MeshError(
            f"train.batch_size {batch_size} does not split into optimizer.accumulate {accumulate} micro-batches over "
            f"{rows} rows of the mesh (data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}): "
            f"expected a multiple of {accumulate * rows}"
        )


def place_batch(batch: Tree, mesh: Mesh) -> Tree:
    """This process' rows of a batch (a pytree of numpy arrays) as global arrays split over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), batch)
