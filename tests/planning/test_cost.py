"""FLOPs and memory traffic from a program's text: loops, layouts, precision, fusions that access slices."""

import jax
import jax.numpy as jnp
import pytest

from glip_jax.planning import cost

HLO = """HloModule m, is_scheduled=true, num_partitions=1

%slices (p0: f32[6,512,128], p1: s32[]) -> f32[512,128] {
  %p0 = f32[6,512,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %one = f32[1,512,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,512,128}
  ROOT %flat = f32[512,128]{1,0:T(8,128)} bitcast(%one)
}

%writes (p0.1: f32[6,512,128], p1.1: f32[512,128], p2.1: s32[]) -> f32[6,512,128] {
  %p0.1 = f32[6,512,128]{2,1,0:T(8,128)} parameter(0)
  %p1.1 = f32[512,128]{1,0:T(8,128)} parameter(1)
  %p2.1 = s32[]{:T(128)} parameter(2)
  %zero.1 = s32[]{:T(128)} constant(0)
  %row = f32[1,512,128]{2,1,0:T(8,128)} bitcast(%p1.1)
  ROOT %into = f32[6,512,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0.1, %row, %p2.1, %zero.1, %zero.1)
}

%product (p0.2: f32[512,128], p1.2: f32[128,128]) -> f32[512,128] {
  %p0.2 = f32[512,128]{1,0:T(8,128)} parameter(0)
  %p1.2 = f32[128,128]{1,0:T(8,128)} parameter(1)
  ROOT %dot.2 = f32[512,128]{1,0:T(8,128)} convolution(%p0.2, %p1.2), dim_labels=bf_io->bf, operand_precision={highest,highest}
}

%body (t: (s32[], f32[6,512,128], f32[6,512,128], f32[128,128])) -> (s32[], f32[6,512,128], f32[6,512,128], f32[128,128]) {
  %t = (s32[]{:T(128)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%t), index=0
  %xs = f32[6,512,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=1
  %ys = f32[6,512,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=2
  %w = f32[128,128]{1,0:T(8,128)S(1)} get-tuple-element(%t), index=3
  %x = f32[512,128]{1,0:T(8,128)} fusion(%xs, %i), kind=kLoop, calls=%slices, backend_config={"window_config":{"estimated_cycles":"700"}}
  %y = f32[512,128]{1,0:T(8,128)} fusion(%x, %w), kind=kOutput, calls=%product, metadata={op_name="jit(f)/dot"}
  %out = f32[6,512,128]{2,1,0:T(8,128)} fusion(%ys, %y, %i), kind=kLoop, calls=%writes
  %step = s32[]{:T(128)S(6)} constant(1)
  %next = s32[]{:T(128)S(6)} add(%i, %step)
  ROOT %r = (s32[]{:T(128)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)S(1)}) tuple(%next, %xs, %out, %w)
}

%condition (t.1: (s32[], f32[6,512,128], f32[6,512,128], f32[128,128])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)S(6)} get-tuple-element(%t.1), index=0
  %end = s32[]{:T(128)S(6)} constant(6)
  ROOT %less = pred[]{:T(512)S(6)} compare(%i.1, %end), direction=LT
}

ENTRY %main (a: f32[6,512,128], b: f32[6,512,128], c: f32[128,128], d: bf16[100,3]) -> f32[6,512,128] {
  %a = f32[6,512,128]{2,1,0:T(8,128)} parameter(0)
  %b = f32[6,512,128]{2,1,0:T(8,128)} parameter(1)
  %c = f32[128,128]{1,0:T(8,128)} parameter(2)
  %d = bf16[100,3]{1,0:T(8,128)(2,1)} parameter(3)
  %begin = s32[]{:T(128)S(6)} constant(0)
  %near = (f32[128,128]{1,0:T(8,128)S(1)}, f32[128,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%c)
  %here = f32[128,128]{1,0:T(8,128)S(1)} copy-done(%near)
  %narrow = f32[100,3]{1,0:T(8,128)} convert(%d)
  %start = (s32[]{:T(128)S(6)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)S(1)}) tuple(%begin, %a, %b, %here)
  %loop = (s32[]{:T(128)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[6,512,128]{2,1,0:T(8,128)}, f32[128,128]{1,0:T(8,128)S(1)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[6,512,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""
KERNEL = """HloModule m
ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %k = bf16[64,128]{1,0:T(8,128)(2,1)} custom-call(%a), custom_call_target="tpu_custom_call", backend_config=CONFIG
}
"""
ROW = 512 * 128 * 4
"""Bytes of the slice of one iteration."""


def named(reading):
    return {each.name: each for each in reading.operations}


def test_loop_bodies_are_multiplied_by_the_trip_count():
    result = cost.program_cost(HLO)
    assert result.trip_counts_known and result.flops == 6 * 2 * 512 * 128 * 128
    assert result.passes == 6 * result.flops, "float32 products of highest precision take six passes"
    assert result.cycles == 6 * 700


def test_slices_and_updates_count_only_the_bytes_accessed():
    result = named(cost.program_cost(HLO))
    assert result["x"].bytes == 2 * ROW, "a slice is read, not the whole array, and written"
    assert result["out"].bytes == 2 * ROW, "an update is read, and written in place"
    assert result["x"].times == 6


def test_arrays_in_on_chip_memory_are_not_counted():
    result = named(cost.program_cost(HLO))
    assert result["near"].bytes == 128 * 128 * 4, "read from chip memory, written to on-chip memory"
    assert result["y"].bytes == 2 * ROW, "the kernel is in on-chip memory"
    assert result["y"].origin == "jit(f)/dot"


def test_arrays_are_padded_to_tiles():
    narrow = named(cost.program_cost(HLO))["narrow"]
    # 100 x 3 in tiles of 8 x 128: 104 x 128, of bfloat16 read and of float32 written.
    assert narrow.bytes == 104 * 128 * (2 + 4) and narrow.result_bytes == 104 * 128 * 4
    assert narrow.padding == narrow.bytes - 300 * (2 + 4)


def test_missing_estimates_count_no_cycles():
    assert cost.program_cost(HLO.replace('"700"', f'"{2**63 - 1}"')).cycles == 0


def test_totals_are_the_sums_over_operations():
    result = cost.program_cost(HLO)
    assert result.bytes == pytest.approx(sum(each.bytes * each.times for each in result.operations))
    assert result.bytes == pytest.approx(6 * 3 * 2 * ROW + 128 * 128 * 4 + 104 * 128 * 6, rel=1e-3)


@pytest.mark.parametrize("length", [1, 5])
def test_a_loop_compiled_by_xla(length):
    """XLA's cost analysis counts its body once."""

    def run(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=length)[0]

    shapes = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    result = cost.program_cost(jax.jit(run).lower(*shapes).compile().as_text() or "")
    assert result.flops == length * 2 * 32 * 64 * 64


def test_convolutions_agree_with_xlas_cost_analysis():
    """Forward and both gradients of a strided convolution: taps on padding and in gaps are not counted."""

    def run(x, kernel):
        out = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (out * out).sum()

    shapes = jax.ShapeDtypeStruct((2, 9, 12, 8), jnp.float32), jax.ShapeDtypeStruct((3, 3, 8, 16), jnp.float32)
    compiled = jax.jit(jax.grad(run, (0, 1))).lower(*shapes).compile()
    flops, xla = cost.program_cost(compiled.as_text() or "").flops, compiled.cost_analysis()
    assert xla is not None and flops == pytest.approx(xla["flops"], rel=0.05)
    assert flops > 2 * 2 * 5 * 6 * 16 * 9 * 8 * 1.5, "three products of about one size"


def test_pallas_kernels_count_the_flops_that_they_declare():
    declared = cost.program_cost(
        KERNEL.replace("CONFIG", '{"custom_call_config": {"cost_estimate":{"flops":"97844","x":"0"}}}')
    )
    assert (declared.flops, declared.passes, declared.undeclared_kernels) == (97844, 97844, 0)
    undeclared = cost.program_cost(KERNEL.replace("CONFIG", "{}"))
    assert (undeclared.flops, undeclared.undeclared_kernels) == (0, 1)
