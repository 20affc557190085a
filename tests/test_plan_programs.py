"""Compiled programs, read from their text, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.plan import hlo, program
from tests import programs


def measured(function, *shapes) -> tuple[program.Figures, hlo.Program]:
    """Of a function of float32 arrays, compiled for this CPU."""
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = hlo.parse(jax.jit(function).lower(*given).compile().as_text())
    return program.measure(text), text


def test_a_loop_counts_with_all_its_trips():
    """Seven times a loop of five products [32, 64] x [64, 64]: one in XLA's own count."""

    def step(x, w):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0], None

        return jax.lax.scan(outer, x, length=7)[0]

    figures, _ = measured(step, (32, 64), (64, 64))
    assert figures.flops == 7 * 5 * 2 * 32 * 64 * 64


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_counts_what_is_no_padding(padding, stride):
    """Against a count place by place in numpy."""
    height, size, c_in, c_out = 9, 3, 4, 6

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    figures, _ = measured(convolve, (2, height, height, c_in), (size, size, c_in, c_out))
    ones = jax.jit(convolve)(np.ones((1, height, height, 1), "f"), np.ones((size, size, 1, 1), "f"))
    assert figures.flops == 2 * 2 * c_in * c_out * float(np.sum(ones))


# As a TPU compiler writes it: a product as a convolution, a gather in two fusions, a kernel's notes
# over several lines, a loop of 48 in steps of two, of which it says no more, and arrays and slices
# fetched into the vector memory, S(1), ahead of their use.
TPU = """HloModule jit_step, is_scheduled=true

%fused.1 (p.0: bf16[64,32], p.1: bf16[32,16], p.2: bf16[8,16]) -> bf16[64,16] {
  %p.0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[32,16]{1,0:T(8,128)(2,1)} parameter(1)
  %p.2 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(2)
  %all-gather.1 = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %convolution.1 = bf16[64,16]{1,0:T(8,128)(2,1)} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%fused.2 (p.3: bf16[8,16]) -> bf16[32,16] {
  %p.3 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.3), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="3"}
}

%body (arg: (s32[], bf16[64,32], bf16[32,16], bf16[8,16])) -> (s32[], bf16[64,32], bf16[32,16], bf16[8,16]) {
  %arg = (s32[]{:T(128)}, bf16[64,32]{1,0}, bf16[32,16]{1,0}, /*index=3*/bf16[8,16]{1,0}) parameter(0)
  %x = bf16[64,32]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[32,16]{1,0} get-tuple-element(%arg), index=2
  %s = bf16[8,16]{1,0} get-tuple-element(%arg), index=3
  %fusion.2 = bf16[32,16]{1,0:S(1)} fusion(%s), kind=kCustom, calls=%fused.2, backend_config={"estimated_cycles":"10"}
  %fusion.1 = bf16[64,16]{1,0} fusion(%x, %fusion.2, /*index=2*/%s), kind=kOutput, calls=%fused.1, backend_config={"estimated_cycles":"100"}
  %splash.1 = (bf16[2,4,1024,64]{3,2,1,0}, f32[8]{0}) custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{block_q_dkv: 512}"
}}, metadata={op_name="jit(step)/notes"}
  %i = s32[] get-tuple-element(%arg), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %tuple = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}, bf16[8,16]{1,0}) tuple(%next, %x, %w, %s)
}

%condition (arg.1: (s32[], bf16[64,32], bf16[32,16], bf16[8,16])) -> pred[] {
  %arg.1 = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %last = s32[]{:T(128)} constant(48)
  ROOT %compare = pred[] compare(%i.1, %last), direction=LT
}

%async_computation (p.4: bf16[64,32]) -> bf16[8,32] {
  %p.4 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %slice.1 = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} slice(%p.4), slice={[0:8], [0:32]}
}

ENTRY %main (a: bf16[64,32], b: bf16[32,16], c: bf16[8,16]) -> bf16[64,32] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %c = bf16[8,16]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}, bf16[8,16]{1,0}) tuple(%zero, %a, %b, %c)
  %while = (s32[], bf16[64,32]{1,0}, bf16[32,16]{1,0}, bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %all-reduce = f32[100]{0} all-reduce(%zero), channel_id=1, replica_groups=[2,8]<=[16], to_apply=%condition
  %all-to-all = f32[100]{0} all-to-all(%zero), channel_id=1, replica_groups=mesh['a'=16,'b'=1,'c'=4], device_ids=([4,16]T(1,0)) {'a'}, dimensions={0}
  %copy-start = (bf16[32,16]{1,0:T(8,128)(2,1)S(1)}, bf16[32,16]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%b)
  %copy-done = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %slice-start = ((bf16[64,32]{1,0:T(8,128)(2,1)}), bf16[8,32]{1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) async-start(%a), calls=%async_computation
  %slice-done = bf16[8,32]{1,0:T(8,128)(2,1)S(1)} async-done(%slice-start)
  ROOT %out = bf16[64,32]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_what_a_tpu_program_does():
    """24 trips: a product of 64 x 32 x 16, and one gather of [8, 16] bfloat16 from 3 others."""
    text = hlo.parse(TPU)
    figures = program.measure(text)
    assert text.runs["body"] == 24 and text.runs["fused.2"] == 24
    assert figures.flops == 24 * 2 * 64 * 32 * 16
    assert figures.cycles == 24 * 110
    assert figures.collectives["all-gather"] == program.Collective(24, 24 * 3 * 8 * 16 * 2)
    # A sum over 8 chips: each takes in 7/8 of it twice.
    assert figures.collectives["all-reduce"] == program.Collective(1, 2 * 7 / 8 * 4)
    # Of 4 bytes each of 16 chips keeps its part, of those in the other order of the mesh.
    assert figures.collectives["all-to-all"] == program.Collective(1, 15 / 16 * 4)
    assert programs.largest_gather(text) == 4 * 8 * 16


def test_what_is_fetched_ahead_is_read_once():
    """As the one array [32, 16], as the part [8, 32] of another; neither is written to HBM."""
    text = hlo.parse(TPU)
    used = {
        each.name: runs * program.memory_bytes(each, text.computations[name], text)
        for name, each, runs in text.instructions()
        if name in ("main", "async_computation")
    }
    assert used["copy-start"] == 32 * 16 * 2 and used["copy-done"] == 0
    assert used["slice.1"] == 8 * 32 * 2 and used["slice-start"] == used["slice-done"] == 0


def test_groups_that_are_not_understood_are_no_guess():
    text = hlo.parse(TPU.replace("replica_groups=[2,8]<=[16]", "replica_groups=somehow"))
    with pytest.raises(ValueError, match="groups of all-reduce cannot be told"):
        program.measure(text)


def test_dense_masks_and_whole_logits_are_seen():
    """In programs that have them, and in none that computes in blocks or chunks."""

    def dense(q):
        return jnp.sum(jax.nn.softmax(q @ q.T) @ q)

    def blocks(q):
        parts = q.reshape(8, 16, 32)
        return jnp.sum(jax.lax.map(lambda part: jax.nn.softmax(part @ q.T) @ q, parts))

    assert programs.dense_masks(measured(dense, (128, 32))[1], 128)
    assert not programs.dense_masks(measured(blocks, (128, 32))[1], 128)

    def logits(x, head):
        return jnp.sum(jax.nn.logsumexp(x @ head, axis=-1))

    def chunks(x, head):
        return jnp.sum(jax.lax.map(lambda part: logits(part, head), x.reshape(8, 16, 8)))

    assert programs.full_logits(measured(logits, (128, 8), (8, 512))[1], 128, 512)
    assert not programs.full_logits(measured(chunks, (128, 8), (8, 512))[1], 128, 512)
