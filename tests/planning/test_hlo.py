"""Collectives of compiled programs, and of texts as the TPU compiler writes them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from glip_jax.config import MeshConfig
from glip_jax.distributed.mesh import make_mesh
from glip_jax.planning.hlo import CollectiveError, collectives

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def compiled():
    """A program with one collective of every kind over known axes, the all-reduce in a loop of six iterations."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    @partial(jax.shard_map, mesh=mesh, in_specs=P(("data", "fsdp")), out_specs=P(("data", "fsdp")), check_vma=False)
    def program(x):
        x, _ = jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, "data")), None), x, length=6)
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        part = jax.lax.psum_scatter(jnp.cos(whole), "tensor", tiled=True)
        part = jax.lax.all_to_all(jnp.tan(part), ("data", "tensor"), 1, 1, tiled=True)
        return jax.lax.ppermute(jnp.exp(part), "data", [(0, 1), (1, 0)])

    return jax.jit(program).lower(jax.ShapeDtypeStruct((32, 16), jnp.float32)).compile()


def test_kind_bytes_axes_and_times_of_a_compiled_program(compiled):
    found = {each.kind: each for each in collectives(compiled)}
    rows = {
        kind: (c.axes(MESH), c.operand_bytes, c.result_bytes, c.times, c.devices, c.dtypes) for kind, c in found.items()
    }
    local = 32 // 4 * 16 * 4
    assert rows == {
        "all-reduce": (("data",), local, local, 6, 2, ("f32",)),
        "all-gather": (("fsdp",), local, 2 * local, 1, 2, ("f32",)),
        "reduce-scatter": (("tensor",), 2 * local, local, 1, 2, ("f32",)),
        "all-to-all": (("data", "tensor"), local, local, 1, 4, ("f32",)),
        "collective-permute": (("data",), local, local, 1, 2, ("f32",)),
    }
    assert all(c.times_known for c in found.values())
    assert "psum" in found["all-reduce"].op_name
    assert re.fullmatch(r".*test_hlo.py:\d+", found["all-reduce"].source)
    sent = {kind: each.sent_bytes for kind, each in found.items()}
    assert sent == {
        "all-reduce": local, "all-gather": local, "reduce-scatter": local, "all-to-all": local * 3 / 4,
        "collective-permute": local,
    }  # fmt: skip


def _text(entry, *computations, devices=8):
    """The text of a program with these instructions, in the format of the compilers."""
    whole = [f"HloModule jit_step, is_scheduled=true, num_partitions={devices}", ""]
    for name, *lines in computations:
        whole += [f"%{name} (p: f32[8]) -> f32[8] {{", *(f"  {line}" for line in lines), "}", ""]
    return "\n".join([*whole, "ENTRY %main (p: f32[8]) -> f32[8] {", *(f"  {line}" for line in entry), "}"])


_GROUPS = {
    "{{0,1},{2,3},{4,5},{6,7}}": ("tensor",),
    "{{0,4},{2,6},{1,5},{3,7}}": ("data",),
    "{}": ("data", "fsdp", "tensor"),
    "[4,2]<=[8]": ("tensor",),
    "[4,2]<=[2,2,2]T(0,2,1)": ("fsdp",),
    "[2,4]<=[2,4]T(1,0)": None,
    "[2,4]<=[4,2]T(1,0)": ("data", "fsdp"),
    "[1,8]<=[8]": ("data", "fsdp", "tensor"),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_1'}": ("tensor",),
    "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": ("data", "fsdp"),
    "mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}": ("fsdp",),
    "mesh['a'=2,'b'=4] {'b':(1)2}": ("fsdp",),
    "mesh['a'=2,'b'=4] {'a','b':(2)2}": ("data", "tensor"),
}


@pytest.mark.parametrize("groups", [name for name, axes in _GROUPS.items() if axes])
def test_every_format_of_replica_groups(groups):
    line = f"ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    (found,) = collectives(_text(["%p = f32[8]{0} parameter(0)", line]))
    assert found.axes(MESH) == _GROUPS[groups]
    assert sorted(device for group in found.groups for device in group) == list(range(8))


def test_the_order_of_groups_is_preserved():
    line = "ROOT %r = f32[8]{0} all-gather(%p), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}"
    (found,) = collectives(_text(["%p = f32[8]{0} parameter(0)", line]))
    assert found.groups == ((0, 2, 4, 6), (1, 3, 5, 7)) and found.result_bytes == 4 * found.operand_bytes == 128


def test_an_async_pair_counts_once_and_tuples_are_summed():
    found = collectives(
        _text(
            [
                "%p = f32[8]{0:T(128)} parameter(0)",
                "%b = bf16[4,2]{1,0:T(8,128)(2,1)S(1)} convert(%p)",
                "%s = (f32[8]{0}, /*index=1*/bf16[4,2]{1,0:T(8,128)(2,1)}) all-reduce-start(%p, /*index=1*/%b), "
                'replica_groups=[1,8]<=[8], to_apply=%add, metadata={op_name="jit(step)/all-gather(x)"}',
                "%d = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce-done(%s)",
                "%g = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8], dimensions={0}",
                "%h = f32[16]{0} all-gather-done(%g)",
                "%c = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,4},{4,0}}",
                "ROOT %e = f32[8]{0} collective-permute-done(%c)",
            ]
        )
    )
    assert [(c.kind, c.operand_bytes, c.result_bytes, c.axes(MESH)) for c in found] == [
        ("all-reduce", 32 + 16, 48, ("data", "fsdp", "tensor")),
        ("all-gather", 32, 64, ("tensor",)),
        ("collective-permute", 32, 32, ("data",)),
    ]
    assert found[0].dtypes == ("bf16", "f32") and found[0].sent_bytes == 2 * 7 / 8 * 48


def test_a_trip_count_is_derived_from_constants():
    """On TPUs the condition compares an element of the loop's tuple with a constant."""
    body = ("body", "%q = (s32[], f32[8]{0}) parameter(0)", "%x = f32[8]{0} get-tuple-element(%q), index=1",
            "%r = f32[8]{0} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add")  # fmt: skip
    condition = ("condition", "%n = s32[]{:T(128)} constant(6)", "%q = (s32[], f32[8]{0}) parameter(0)",
                 "%i = s32[] get-tuple-element(%q), index=0", "ROOT %l = pred[] compare(%i, %n), direction=LT")  # fmt: skip
    entry = ["%p = f32[8]{0} parameter(0)", "%z = s32[] constant(2)", "%y = s32[] copy(%z)",
             "%t = (s32[], f32[8]{0}) tuple(%y, %p)",
             "%w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body"]  # fmt: skip
    (found,) = collectives(_text(entry, body, condition))
    assert (found.times, found.times_known) == (4, True)
    (found,) = collectives(_text([*entry[:1], "%z = s32[] parameter(1)", *entry[2:]], body, condition))
    assert (found.times, found.times_known) == (1, False)
    twice = [*entry, "%v = (s32[], f32[8]{0}) while(%w), condition=%condition, body=%body, "
             'backend_config={"known_trip_count":{"n":"10"}}']  # fmt: skip
    assert collectives(_text(twice, body, condition))[0].times == 4 + 10


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter():
    fused = ("all-reduce-scatter", "%i = f32[8]{0} parameter(0)", "%a = s32[] constant(0)",
             "%r = f32[8]{0} all-reduce(%i), replica_groups=[4,2]<=[8], to_apply=%add",
             "ROOT %s = f32[4]{0} dynamic-slice(%r, %a), dynamic_slice_sizes={4}")  # fmt: skip
    entry = ["%p = f32[8]{0} parameter(0)",
             'ROOT %f = f32[4]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(step)/dot"}']  # fmt: skip
    (found,) = collectives(_text(entry, fused))
    assert (found.kind, found.operand_bytes, found.result_bytes) == ("reduce-scatter", 32, 16)
    assert found.op_name == "jit(step)/dot", "taken from the fusion, as the reduction has none"
    used = (*fused[:-1], "%s = f32[4]{0} dynamic-slice(%r, %a)", "ROOT %u = f32[8]{0} add(%r, %r)")
    assert collectives(_text(entry, used))[0].kind == "all-reduce"


def test_a_collective_distributed_over_fusions_counts_once():
    gather = (
        "%g = f32[16]{0} all-gather(%i), channel_id=11, replica_groups=[4,2]<=[8], dimensions={0}, "
        'backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}'
    )
    start = ("start", "%i = f32[8]{0} parameter(0)", gather,
             'ROOT %c = (f32[8], f32[16]) custom-call(%g), custom_call_target="AsyncCollectiveStart"')  # fmt: skip
    step = ("step", "%i = f32[8]{0} parameter(0)", gather)
    done = ("done", "%i = f32[8]{0} parameter(0)", gather,
            'ROOT %c = f32[16] custom-call(%g), custom_call_target="AsyncCollectiveDone"')  # fmt: skip
    entry = ["%p = f32[8]{0} parameter(0)", *(f"%{n} = f32[8]{{0}} fusion(%p), kind=kCustom, calls=%{n}"
             for n in ("start", "step", "done"))]  # fmt: skip
    (found,) = collectives(_text(entry, start, step, done))
    assert found.kind == "all-gather" and found.times == 1


def test_only_host_transfers_between_slices_count():
    def send(kind, name):
        way = f'_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"' if kind else "_other=1"
        return (f"%{name} = (f32[8]{{0}}, u32[], token[]) send(%p, %t), channel_id=3, is_host_transfer=true, "
                f"frontend_attributes={{{way}}}")  # fmt: skip

    back = "%b = (f32[8]{0}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true, frontend_attributes={" + (
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    entry = ["%p = f32[8]{0} parameter(0)", "%t = token[] after-all()", send("ALL_REDUCE", "r"), send("ALL_GATHER", "g"),
             send("", "h"), back]  # fmt: skip
    reduce, gather = collectives(_text(entry))
    assert (reduce.kind, gather.kind) == ("all-reduce", "all-gather") and reduce.across_slices and not reduce.groups
    assert (reduce.sent_across(2), reduce.sent_across(4)) == (32, 48) and gather.sent_across(4) == 96


def test_unknown_formats_are_refused():
    line = "ROOT %r = f32[8]{0} all-reduce(%p), replica_groups=magic(8), to_apply=%add"
    with pytest.raises(CollectiveError, match=r"replica_groups=magic\(8\).*an unknown format"):
        collectives(_text(["%p = f32[8]{0} parameter(0)", line]))
    with pytest.raises(CollectiveError, match="no ENTRY computation"):
        collectives("HloModule jit_step")
    line = "ROOT %r = f32[8]{0} all-reduce(%p), replica_groups=[1,16]<=[16], to_apply=%add"
    (found,) = collectives(_text(["%p = f32[8]{0} parameter(0)", line], devices=16))
    with pytest.raises(CollectiveError, match="among 16 devices, the mesh is"):
        found.axes(MESH)
