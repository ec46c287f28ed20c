"""Adding up an optimised TPU program."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.tpu.collectives import Collective, collectives
from tpu import hlo, topologies

# Programs for another machine go into the cache of compiled programs but cannot be read back.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

PROGRAM = textwrap.dedent(
    """\
    HloModule jit_f, is_scheduled=true

    %fused (p.0: f32[8]) -> f32[8] {
      %p.0 = f32[8]{0} parameter(0)
      ROOT %inner = f32[8]{0} sine(%p.0), backend_config={"window_config":{"estimated_cycles":"1000000"}}
    }

    %cond (arg.1: (s32[], f32[8])) -> pred[] {
      %limit = s32[]{:T(128)} constant(10)
      %arg.1 = (s32[]{:T(128)}, f32[8]{0:T(8,128)}) parameter(0)
      %i = s32[] get-tuple-element(%arg.1), index=0
      ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
    }

    %body (arg.2: (s32[], f32[8])) -> (s32[], f32[8]) {
      %arg.2 = (s32[]{:T(128)}, f32[8]{0:T(8,128)}) parameter(0)
      %j = s32[] get-tuple-element(%arg.2), index=0
      %j.copy = s32[]{:T(128)S(6)} copy(%j)
      %two = s32[] constant(2)
      %next = s32[] add(%j.copy, %two)
      %x = f32[8]{0:T(8,128)} get-tuple-element(%arg.2), index=1
      %y = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
      %z = f32[8]{0} custom-call(%y), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
    "block_q":"512"
    }}, metadata={op_name="splash"}
      %r = f32[8]{0} all-reduce(%z), replica_groups={{0,1}}, to_apply=%fused
      ROOT %out = (s32[], f32[8]{0}) tuple(%next, %r)
    }

    ENTRY %main (a: f32[8]) -> f32[8] {
      %a = f32[8]{0:T(8,128)} parameter(0)
      %start = s32[] constant(4)
      %state = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(8,128)}) tuple(%start, %a)
      %loop = (s32[], f32[8]{0}) while(%state), condition=%cond, body=%body
      %res = f32[8]{0} get-tuple-element(%loop), index=1
      ROOT %last = f32[8]{0} sine(%res), backend_config={"window_config":{"estimated_cycles":"7"}}
    }
    """
)


def test_a_loop_counts_as_often_as_it_runs_and_a_fusion_once():
    # From 4 by 2 while below 10: three trips.
    assert hlo.estimate(PROGRAM) == hlo.Estimate(cycles=307, kernels=3, collectives=3, unknown_loops=0)


@pytest.mark.parametrize(
    ("direction", "limit", "trips"), [("LT", 11, 4), ("LE", 10, 4), ("LT", 4, 0), ("NE", 10, 3), ("LE", 3, 0)]
)
def test_trips_follow_the_direction_of_the_comparison(direction, limit, trips):
    text = PROGRAM.replace("direction=LT", f"direction={direction}").replace("constant(10)", f"constant({limit})")
    assert hlo.estimate(text).cycles == 100 * trips + 7


def test_a_loop_of_unknown_length_is_counted_once_and_named():
    text = PROGRAM.replace("%limit = s32[]{:T(128)} constant(10)", "%limit = s32[] get-tuple-element(%arg.1), index=1")
    assert hlo.estimate(text) == hlo.Estimate(cycles=107, kernels=1, collectives=1, unknown_loops=1)


def test_the_dearest_branch_of_a_conditional_counts():
    program = PROGRAM.replace(
        "ROOT %last = f32[8]{0} sine(%res)",
        "%either = f32[8]{0} conditional(%start, %res, %res), branch_computations={%fused, %cond}\n"
        "  ROOT %last = f32[8]{0} sine(%either)",
    )
    assert hlo.estimate(program).cycles == 307 + 1_000_000


def test_a_compiled_program_costs_in_proportion_to_the_length_of_its_loop():
    devices = topologies.get_topology("v5e:2x2").devices
    sharding = NamedSharding(Mesh(devices, ("x",)), PartitionSpec())

    def cycles(length):
        def f(x):
            return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=length)[0]

        shape = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=sharding)
        estimate = hlo.estimate(jax.jit(f).lower(shape).compile().as_text())
        assert estimate.unknown_loops == 0
        return estimate.cycles

    few, many = cycles(10), cycles(40)
    assert 3.5 < many / few <= 4.0
    # A 1024^3 product keeps the four 128 x 128 matrix units of a v5e busy for 16384 cycles at the least.
    assert few > 10 * 1024**3 / (4 * 128 * 128)


def test_collectives_run_as_often_as_their_loops_and_tell_what_they_make():
    text = PROGRAM.replace(
        "ROOT %last = f32[8]{0} sine(%res)",
        "%start.1 = (f32[8]{0}, bf16[4,8]{1,0}) all-gather-start(%res), dimensions={0}, "
        'metadata={op_name="jit(f)/gather"}\n  ROOT %last = f32[8]{0} sine(%res)',
    )
    assert collectives(text) == [
        Collective("all-reduce", (("f32", (8,)),), runs=3, in_loop=True, source=""),
        Collective("all-gather", (("bf16", (4, 8)),), runs=1, in_loop=False, source="jit(f)/gather"),
    ]
    assert [c.bytes for c in collectives(text)] == [3 * 8 * 4, 4 * 8 * 2]
