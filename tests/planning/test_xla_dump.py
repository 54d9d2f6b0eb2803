"""Reading XLA's dumps: small ones written by hand, and those of real compilations."""

import random
import re

import jax
import jax.numpy as jnp
import pytest

from glip_jax.planning.xla_dump import activation_bytes, dump_options, read_activations, read_memory

ASSIGNMENT = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <1 add @0> (size=512,offset=0): s32[]{:T(128)}
allocation 1: size 4096, parameter 213, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 1024, parameter 1, shape |f32[256]| at ShapeIndex {}:
allocation 3: size 512, maybe-live-out:
allocation 4: size 2048, constant:
allocation 5: size 65536, preallocated-temp:
 value: <3 kept @0> (size=512,offset=0): f32[8]{0}
 value: <4 pair{1} @0> (size=1024,offset=1024): f32[8]{0}
 value: <5 same @0> (size=512,offset=1280): f32[8]{0}
 value: <6 early @0> (size=8192,offset=2048): f32[8]{0}
 value: <7 late @0> (size=16384,offset=2048): f32[8]{0}
allocation 6: size 1048576, color 1, preallocated-temp:
 value: <8 kept @1> (size=512,offset=0): f32[8]{0}
"""
# As libtpu 0.0.52 writes it.
PAGED = re.sub(r"(size \d+,|color \d+,) (?=param|maybe|const|prealloc|thread)", r"\1 page 0, ", ASSIGNMENT)
RANGES = """HloLiveRange (max 8):
  InstructionSequence:
    0:constant.1
    1:kept
    2:pair
    3:early
    4:moved
    5:last
    6:late
    7:end
  BufferLiveRange:
    kept{}:1-7
    pair{1}:2-6
    same{}:3-6
    early{}:1-3
    late{}:6-7
  Live ranges at 3 (peak):
    early{}: 8192 bytes (cumulative: 8192 bytes)
"""
TEXT = """HloModule jit_step, is_scheduled=true
ENTRY main {
  %constant.1 = f32[] constant(0), metadata={op_name="jit(step)/transpose(jvp(net))/zero"}
  %kept = f32[8]{0} fusion(%a), metadata={op_name="jit(step)/jvp(net)/first"}
  %pair = (f32[8]{0}, f32[8]{0}) fusion(%kept), metadata={op_name="jit(step)/jvp(net)/second"}
  %early = f32[8]{0} fusion(%kept), metadata={op_name="jit(step)/jvp(net)/third"}
  %moved = f32[8]{0} fusion(%kept), metadata={op_name="jit(step)/transpose(jvp(net))/moved"}
  %last = f32[8]{0} fusion(%early), metadata={op_name="jit(step)/jvp(net)/fourth"}
  %late = f32[8]{0} fusion(%pair), metadata={op_name="jit(step)/transpose(jvp(net))/third"}
  ROOT %end = f32[8]{0} fusion(%late), metadata={op_name="jit(step)/transpose(jvp(net))/first"}
}
"""


def test_buffer_assignments_are_summed():
    assert "page 0, parameter" in PAGED and "color 1, page 0" in PAGED
    for text in (ASSIGNMENT, PAGED):
        assert read_memory(text) == (4096 + 1024, 65536, 512 + 2048)
        assert read_activations(text, RANGES, TEXT) == 512 + 1024


def test_an_assignment_of_another_form_is_no_plan_without_memory():
    with pytest.raises(RuntimeError, match="names no parameters: its form is another; use --compile=tpu-whole"):
        read_memory(ASSIGNMENT.replace("allocation", "buffer"))


def test_activations_are_buffers_live_between_the_passes():
    # kept, pair, and same, which shares half of pair's buffer; not early, which ends before, nor late, which begins after.
    assert read_activations(ASSIGNMENT, RANGES, TEXT) == 512 + 1024


@pytest.mark.parametrize("strange", [(ASSIGNMENT, RANGES, ""), (ASSIGNMENT, "", TEXT), ("", RANGES, TEXT)])
def test_files_of_an_unknown_format_give_none(strange):
    assert read_activations(*strange) is None


def _compiled(folder, layers):
    def loss(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight)
        return (x**2).sum()

    rate = random.random()  # a program from the persistent cache would not be compiled, and no dumps written

    def step(weights, x):
        return jax.tree.map(lambda w, g: w - rate * g, weights, jax.grad(loss)(weights, x))

    weights = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * layers
    lowered = jax.jit(step, donate_argnums=0).lower(weights, jax.ShapeDtypeStruct((4096, 256), jnp.float32))
    lowered.compile(compiler_options=dump_options(folder))
    kept = activation_bytes(folder)
    assert kept is not None
    return kept


def test_each_layer_keeps_its_result(tmp_path):
    result = 4096 * 256 * 4
    few, many = (_compiled(tmp_path / str(layers), layers) for layers in (3, 7))
    assert many - few == 4 * result and 2 * result <= few <= 4 * result


def test_without_gradients_there_are_no_activations(tmp_path):
    jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((256, 256))).compile(compiler_options=dump_options(tmp_path))
    assert activation_bytes(tmp_path) is None
