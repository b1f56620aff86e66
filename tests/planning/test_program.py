# SPDX-License-Identifier: Apache-2.0
"""The reader of compiled programs, against what can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm_scale.compile_cache import uncached
from lm_scale.planning.accelerators import find_slice
from lm_scale.planning.collectives import axes_of, group_of
from lm_scale.planning.libtpu import quiet, topology_devices
from lm_scale.planning.program import Traffic, read
from lm_scale.sharding import MeshShape, make_mesh

MESH = {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("rest", "axes"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", "fsdp"),
        ("replica_groups={{8,0},{1,9}}", "data"),
        ("replica_groups={}", "data×fsdp×tensor"),
        ("replica_groups=[8,2]<=[16]", "tensor"),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", "data"),
        ("replica_groups=[2,8]<=[16]", "fsdp×tensor"),
        ("replica_groups=[4,4]<=[2,4,2]T(2,0,1), use_global", "fsdp"),
        ("replica_groups={{0,3},{1,2}}", "?"),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}, dimensions={1}", "fsdp"),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=4], device_ids=([2,4,2]T(1,0,2)) {'a'}",
         "fsdp"),
        ("replica_groups=mesh['a'=16] {'a':(1)2}", "data"),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", "fsdp"),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3}}", "fsdp"),
    ],
)  # fmt: skip
def test_groups_are_told_by_their_mesh_axes(rest, axes):
    assert axes_of(group_of(rest, 16), MESH) == axes


STACK = """
%taken (p0: f32[8,4,100], p1: s32[]) -> f32[1,4,100] {
  %p0.1 = f32[8,4,100]{2,1,0} parameter(0)
  %p1.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,4,100]{2,1,0} dynamic-slice(%p0.1, %p1.1, %zero, %zero), dynamic_slice_sizes={1,4,100}
}

%outer (p0: s32[], p1: f32[8,4,100]) -> f32[1,4,100] {
  %p0.2 = s32[] parameter(0)
  %p1.2 = f32[8,4,100]{2,1,0} parameter(1)
  %inner = f32[1,4,100]{2,1,0} fusion(%p1.2, %p0.2), kind=kLoop, calls=%taken
  ROOT %minus = f32[1,4,100]{2,1,0} negate(%inner)
}

ENTRY %main (a: f32[8,4,100], i: s32[]) -> f32[1,4,100] {
  %a = f32[8,4,100]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %room = f32[8,4,100]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %out = f32[1,4,100]{2,1,0} fusion(%i, %a), kind=kLoop, calls=%outer
}
"""  # noqa: E501


def test_of_a_stack_the_slice_is_read_that_a_fusion_inside_another_takes():
    slice_and_result = 2 * 4 * 4 * 100
    assert read(STACK, MESH).hbm_bytes == slice_and_result + 4  # and its number
    whole = STACK.replace("negate(%inner)", "add(%inner, %p1.2)")
    assert read(whole, MESH).hbm_bytes == 4 * 8 * 4 * 100 + slice_and_result // 2 + 4


LAYERS, WIDTH = 5, 1024


@pytest.fixture(scope="module")
def gathering():
    """Five layers that each gather their weight of 1024 x 1024 bf16 from 8 devices.

    Then the loss, one number, is summed. Its compiled text.
    """
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is missing")
    shape = MeshShape(data=1, fsdp=8)
    mesh = make_mesh(shape, topology_devices(find_slice("v5e-8")))

    def loss(weights, x):
        def layer(x, weight):
            return jnp.tanh(x @ jax.reshard(weight, PartitionSpec(None, None))), None

        out, _ = jax.lax.scan(layer, x, weights)
        return jnp.sum(out.astype(jnp.float32))

    def array(shape, *spec):
        cut = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=cut)

    weights = array((LAYERS, WIDTH, WIDTH), None, "fsdp", None)
    with jax.set_mesh(mesh), quiet(), uncached():
        lowered = jax.jit(loss).lower(weights, array((64, WIDTH), "fsdp", None))
        return lowered.compile().as_text(), dict(mesh.shape)


def test_collectives_and_bytes_are_counted_as_by_hand(gathering):
    text, mesh = gathering
    found = read(text, mesh)
    size = LAYERS * WIDTH * WIDTH * 2
    gathers, sums = found.of_kind("all-gather"), found.of_kind("all-reduce")
    assert (gathers.axes, sums.axes) == ("fsdp", "fsdp")
    assert (gathers.count, gathers.size, gathers.sent) == (LAYERS, size, size * 7 / 8)
    assert sums == Traffic("all-reduce", "fsdp", 1, 4, 4 * 2 * 7 / 8, 4 * 2 * 7 / 8)
    assert {one.kind for one in found.traffic} == {"all-gather", "all-reduce"}
    (loop,) = [one for one in found.loops if one.name]
    assert (loop.turns, loop.known) == (LAYERS, True)
    assert 0 < loop.cycles < found.cycles
    # Each part of a weight is read from HBM at least once.
    assert found.hbm_bytes >= size / 8


def test_a_loop_whose_turns_cannot_be_told_is_said_to_be_one(gathering):
    text, mesh = gathering
    known = read(text, mesh)
    other = read(text.replace("direction=LT", "direction=NE"), mesh)
    (loop,) = [one for one in other.loops if one.name]
    (right,) = [one for one in known.loops if one.name]
    assert (loop.turns, loop.known) == (1, False)
    assert loop.cycles * LAYERS == right.cycles


def test_of_a_conditional_the_lightest_branch_counts():
    """On one core of a v3: once all of both products, once the lighter one alone."""
    pytest.importorskip("libtpu", reason="libtpu, the compiler for TPUs, is missing")
    mesh = make_mesh(MeshShape(), topology_devices(find_slice("v3-8"))[:1])
    a = jax.ShapeDtypeStruct(
        (WIDTH, WIDTH), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )

    def thrice(a):
        return a @ (a @ (a @ a))

    def either(a):
        return jax.lax.cond(a[0, 0] > 0, thrice, lambda a: a @ a, a)

    def cycles(function):
        with jax.set_mesh(mesh), quiet(), uncached():
            return read(jax.jit(function).lower(a).compile().as_text(), {}).cycles

    one, three = cycles(lambda a: a @ a), cycles(thrice)
    assert one <= cycles(either) <= 1.2 * one < three
