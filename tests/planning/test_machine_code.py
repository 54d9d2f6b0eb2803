"""Bundles of libtpu's dumps are counted as often as their loops turn, and cycles are summed by part of the network."""

from pathlib import Path

import pytest

from glip_jax.planning.cost import Operation
from glip_jax.planning.machine_code import OTHERS, count_bundles, cycles_by_part, cycles_of, part_of

# As libtpu 0.0.42 writes them: a grid of 22 blocks, in each 8 turns of a loop over heads, whose last bundle is scheduled among those around it.
KERNEL = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %15 = vsyncpa [#allocation3], 0 }
   0x1   :  { %s1_s0 = smov 0 /* copy for cssa */  ;;  %s2_s1 = smov 0 }
   0x2 LB: > { %s8_s2 = sadd.s32 1, %s1_s0 }
   0x3   : > { %v1_v0 = vld [vmem:[%s3_s3] sm:$0xff] }
   0x4   :  {}
   0x5 LB: >> { %6440 = vmatpush.bf16.msra.mxu0 %v1_v0 }
   0x6   : >> { %p51_p7 = scmp.ge.s32.totalorder %s5147_s21, 8 /* loop exit test */ }
   0x7   : > { %v2_v1 = vadd.f32 %v1_v0, %v1_v0 }
   0x8   : >> { %21340 = vst [vmem:[%s4_s4] sm:$0xff] /*vst_source=*/%v2_v1 }
   0x9   : > { %p24_p2 = scmp.ge.s32.totalorder %s27_s14, 24 /* loop exit test */  ;;  %s5_s5 = smov 0 }
   0xa   :  { %26 = sbr.rel (!%p24_p2) target = $region3 }
"""


def test_bundles_of_a_kernel() -> None:
    # Two of the 24 turns only fill and empty the pipeline. A waiting bundle belongs to the loop before it.
    assert count_bundles(KERNEL) == 3 + 22 * (5 + 8 * 3)


@pytest.mark.parametrize(("windows", "turns"), [(23, 23), (24, 24), (7, 24)])
def test_an_operation_says_its_windows(windows: int, turns: int) -> None:
    """Unless another loop is the outermost one."""
    assert count_bundles(KERNEL, windows) == 3 + turns * (5 + 8 * 3)


def test_a_loop_without_a_known_end_counts_once() -> None:
    assert count_bundles(KERNEL.replace("24 /* loop exit test */", "%s9 /* loop exit test */")) == 3 + 5 + 8 * 3


def test_cycles_are_the_longest_of_bundles_products_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "1795-fusion.1-03-final_bundles.txt").write_text(KERNEL)
    (tmp_path / "1795-fusion.1-02-schedule-analysis_final_bundles.txt").write_text(KERNEL * 9)

    def operation(name: str, moved: float, flops: float, times: int, origin: str) -> Operation:
        return Operation(name, "fusion", "f32[1]", 4, moved, 0.0, flops, 0, times, origin, 0)

    operations = [
        operation("fusion.1", 10.0, 10.0, 2, "jit(step)/jvp(GLIP)/head/tower/fusion/dot"),
        operation("fusion.2", 4000.0, 100.0, 3, "jit(step)/transpose(jvp(GLIP))/backbone/stage1/dot"),
        operation("fusion.3", 10.0, 9000.0, 1, "jit(step)/adamw"),
    ]
    # It runs beside the others.
    operations.append(operation("copy-start.1", 4e6, 0.0, 1, "jit(step)/adamw")._replace(opcode="copy-start"))
    found = cycles_by_part(operations, cycles_of(operations, tmp_path, flops_per_cycle=10.0, bytes_per_cycle=4.0))
    assert {part: cycles for part, cycles in found.items() if cycles} == {
        "fusion": 2 * (3 + 22 * 29.0), "backbone": 3 * 1000.0, OTHERS: 900.0,
    }  # fmt: skip


def test_parts_by_name_stack() -> None:
    stack = "jit(step)/transpose(jvp(GLIP))/head/while/body/rematted_computation/tower/"
    assert part_of(f"{stack}text/query/dot_general") == "head's BERT layers"
    assert part_of(f"{stack}convolution/same_norm/rsqrt") == "head's convolutions"
    assert part_of("jit(step)/jvp(GLIP)/text/layers/dot_general") == "text encoder"
