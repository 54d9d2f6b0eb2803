"""The device mesh, sharding rules of parameters, and the collectives of a step: one program for 1 CPU, 8 fake devices or a pod.

The mesh has three axes. `data` and `fsdp` both split the batch; `fsdp` also splits the large parameters, with their
moments and averages; `tensor` splits the inner widths of BERT's layers and of Swin's feed-forward layers
(`glip_jax.models.tensor_parallel`). `RULES` alone gives the sharding of a parameter, by its path.

Collectives are explicit, not left to the compiler: `per_shard` runs a function on the local examples of each device,
`gather_parameters` all-gathers its parameters, `reduce_gradients` reduce-scatters its gradients. Sharding propagation of
the compiler gave hundreds of transfers of activations (benchmarks/RESULTS.md). Collectives over `tensor` are in the layers.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glip_jax import UserError
from glip_jax.config import Config, MeshConfig
from glip_jax.structures.batch import BATCH_AXES

__all__ = [
    "AXES",
    "RULES",
    "MeshError",
    "abstract",
    "batch_axes",
    "batch_sharding",
    "check_fits",
    "gather_parameters",
    "parameter_specs",
    "make_mesh",
    "parameter_spec",
    "per_shard",
    "place_batch",
    "reduce_gradients",
    "replicated",
    "shardings",
    "unused_rules",
]

AXES = ("data", "fsdp", "tensor")

Tree = TypeVar("Tree")

_LAST = ("fsdp",)
_FIRST = ("fsdp", None)
_COLUMNS = ("fsdp", "tensor")
_ROWS = ("tensor", "fsdp")
_WIDE = r"(backbone/stage\d/(pairs/\w+|last)/mlp_in|(text/layers|head/tower/text)/(query|key|value|intermediate))/bias"

RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Vectors and scalars: biases (Swin's position tables too), norms, residual scales. Too small to be worth an all-gather.
    (rf"(?!{_WIDE}$).*/(\w*bias\w*|scale|scales|log_scale|\w+_gamma|frozen_scale|frozen_shift)", ()),
    # Biases of widths that are split over tensor are split as their columns.
    (_WIDE, ("tensor",)),
    # Swin: feed-forward in, then out; attention (query, key and value of all heads in one matrix); merges; the patch
    # convolution.
    (r"backbone/stage\d/(pairs/\w+|last)/mlp_in/kernel", _COLUMNS),
    (r"backbone/stage\d/(pairs/\w+|last)/mlp_out/kernel", _ROWS),
    (r"backbone/stage\d/(pairs/\w+|last)/(qkv|projection)/kernel", _LAST),
    (r"backbone/merge\d/reduction/kernel", _LAST),
    (r"backbone/patch_embedding/kernel", _LAST),
    # EfficientNet-Lite0: 3.4 M parameters, of widths that few meshes divide.
    (r"backbone/(stem/kernel|stage\d/block\d/(depthwise|(expand|project)/kernel))", ()),
    (r"pyramid/(lateral|output|extra)\d/kernel", _LAST),
    # Text encoder, and the BERT layers of the head. No mesh divides the size of the vocabulary; the width is split.
    (r"text/embeddings/(word|position|type)", _LAST),
    (r"(text/layers|head/tower/text)/(query|key|value|intermediate)/kernel", _COLUMNS),
    (r"(text/layers|head/tower/text)/(attention_output|output)/kernel", _ROWS),
    # Head: fusion (its products over the locations of the image have the width of the head, not heads), dynamic convolutions, outputs.
    (r"head/tower/fusion/(visual|text)_(query|key|value|output)_kernel", _LAST),
    (r"head/tower/convolution/(fine|same|coarse)_kernel", _LAST),
    (r"head/tower/convolution/relu/expand/kernel", _LAST),
    (r"head/tower/convolution/(offset|relu/squeeze)/kernel", _FIRST),
    (r"head/tower/convolution/attention/kernel", ()),
    (r"head/projection/kernel", _FIRST),
    (r"head/(box|centerness|presence|positions|directions|description)/kernel", ()),
    # Low-rank deltas are small; in BERT's layers their wide sides are split over tensor as those of the kernels. Tuned prompts.
    (r"(text/layers|head/tower/text)/(query|key|value)_lora_b", ("tensor",)),
    (r"(text/layers|head/tower/text)/attention_output_lora_a", ("tensor", None)),
    (
        r"(text/layers|head/tower/text)/((query|key|value)_lora_a|attention_output_lora_b)|head/tower/fusion/\w+_lora_[ab]",
        (),
    ),
    (r"prompts/(tokens|embeddings|deltas)", ()),
)
"""(pattern that matches the whole path of a parameter, mesh axes of its trailing dimensions).

Exactly one pattern matches each path. Axes are aligned to the last dimensions, so the leading layer axis of scanned
blocks and the taps of convolutions are never split; () replicates.
"""


class MeshError(UserError, ValueError):
    """A mesh that does not fit the devices, the batch or a parameter."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), ordered by process, so that a process has adjacent rows of a batch.

    Devices of several slices (TPUs connected by the network of the data center) are ordered by slice first: `data` is the
    axis between slices, fsdp and tensor stay inside one. Raises MeshError with both numbers if the axes' product is not
    the number of devices, or a slice does not hold whole rows of `data`.
    """
    devices = jax.devices() if devices is None else devices
    ordered = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
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
    slices = len({_slice(device) for device in ordered})
    if sizes["data"] % slices:
        raise MeshError(
            f"mesh is {sizes}: the devices are of {slices} slices, of which each must hold whole rows of data: expected "
            f"mesh.data to be a multiple of {slices}, so that fsdp x tensor stay inside a slice"
        )
    local = sum(device.process_index == ordered[0].process_index for device in ordered)
    if local % sizes["tensor"]:
        raise MeshError(f"mesh.tensor is {sizes['tensor']}: it must divide the {local} devices of a process")
    return Mesh(np.array(ordered).reshape(tuple(sizes.values())), AXES)


def _slice(device: Any) -> int:
    """Index of the slice of a device; 0 on platforms without slices."""
    return getattr(device, "slice_index", None) or 0


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of the parameter at `path`.

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


def unused_rules(paths: Iterable[str]) -> list[str]:
    """The patterns of `RULES` that no parameter path matches."""
    listed = list(paths)
    return [pattern for pattern, _ in RULES if not any(re.fullmatch(pattern, path) for path in listed)]


def parameter_specs(tree: Tree, mesh: Mesh) -> Tree:
    """The same pytree with a PartitionSpec for each leaf (array or jax.ShapeDtypeStruct).

    The dictionary keys above a leaf are its parameter path, so moments and averages are sharded as their parameters; keys that
    an optimizer adds above a path are ignored. A leaf that is no entry of a dictionary (a counter) is replicated. So is a leaf
    whose shape differs from its parameter's (row and column statistics of Adafactor); parameters must come first in `tree`.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not keys or not isinstance(path[-1], jax.tree_util.DictKey):
            return PartitionSpec()
        names = ["/".join(keys[i:]) for i in range(len(keys))]
        name = next((name for name in names if name in shapes), names[0])
        same = shapes.setdefault(name, tuple(leaf.shape)) == tuple(leaf.shape)
        return parameter_spec(name, tuple(leaf.shape), mesh) if same else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """`parameter_specs` on `mesh`, as a NamedSharding for each leaf."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), parameter_specs(tree, mesh))


def abstract(tree: Tree, mesh: Mesh) -> Tree:
    """The same pytree of jax.ShapeDtypeStruct with shardings, into which a checkpoint is restored."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_fits(config: Config, mesh: Mesh) -> None:
    """Raises MeshError unless micro-batches split evenly over data x fsdp, and attention heads over tensor."""
    rows, accumulate = mesh.shape["data"] * mesh.shape["fsdp"], config.optimizer.accumulate
    if config.train.batch_size % (accumulate * rows):
        raise MeshError(
            f"train.batch_size {config.train.batch_size} does not split into optimizer.accumulate {accumulate} "
            f"micro-batches over {rows} rows of the mesh (data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}): "
            f"expected a multiple of {accumulate * rows}"
        )
    if config.model.text.heads % mesh.shape["tensor"]:
        raise MeshError(
            f"model.text.heads {config.model.text.heads} is no multiple of mesh.tensor {mesh.shape['tensor']}, over "
            f"which heads are split: choose a smaller mesh.tensor"
        )


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that split the batch on `mesh`, in order: those of data and fsdp that have more than one device."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def per_shard(function: Callable[..., Any], mesh: Mesh, inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` on the local shard of its arguments, as jax.shard_map over all axes; on one device `function` itself.

    `inputs` and `outputs`: pytrees of PartitionSpec. The function calls its collectives itself (jax.lax.psum); the compiler
    adds none.
    """
    if mesh.size == 1:
        return function
    # Without the check of varying axes, gradients stay local to each device until `reduce_gradients`.
    return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def gather_parameters(params: Tree, specs: Any, mesh: Mesh) -> Tree:
    """Inside `per_shard`: the parameters, all-gathered along fsdp (one collective for each that is split over it)."""
    if mesh.shape["fsdp"] == 1:
        return params

    def one(spec: PartitionSpec, leaf: Any) -> Any:
        return jax.lax.all_gather(leaf, "fsdp", axis=spec.index("fsdp"), tiled=True) if "fsdp" in spec else leaf

    return jax.tree.map(one, specs, params, is_leaf=_is_spec)


def reduce_gradients(gradients: Tree, specs: Any, mesh: Mesh) -> Tree:
    """Inside `per_shard`: local gradients summed over data and fsdp.

    Gradients of parameters that are split over fsdp are reduce-scattered. Devices along tensor compute the same gradients
    of parameters that are not split over it, bit for bit if the backend adds in a fixed order (GPUs:
    --xla_gpu_deterministic_ops=true).
    """
    if not batch_axes(mesh):
        return gradients

    def one(spec: PartitionSpec, leaf: Any) -> Any:
        axes = batch_axes(mesh)
        if "fsdp" in spec and mesh.shape["fsdp"] > 1:
            leaf = jax.lax.psum_scatter(leaf, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True)
            axes = tuple(axis for axis in axes if axis != "fsdp")
        return jax.lax.psum(leaf, axes) if axes else leaf

    return jax.tree.map(one, specs, gradients, is_leaf=_is_spec)


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def place_batch(batch: Tree, mesh: Mesh) -> Tree:
    """The rows of a batch of this process (a pytree of numpy arrays) as global arrays split over data and fsdp."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), batch)
