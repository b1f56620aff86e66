# SPDX-License-Identifier: Apache-2.0
"""The mesh, the rules and the weights' declarations, on eight simulated devices."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec

from lm_scale.errors import InputError
from lm_scale.sharding import (
    MESH_AXES,
    Constant,
    MeshShape,
    Normal,
    Rules,
    abstract_mesh,
    abstract_params,
    check_divides,
    declarations,
    flatten,
    init_params,
    make_mesh,
    map_declarations,
    ones,
    param,
    sharding_table,
    shards,
    stack,
    unflatten,
    zeros,
)

RULES = Rules()
SHAPES = {
    "one": MeshShape(data=1),
    "data": MeshShape(data=8),
    "fsdp": MeshShape(data=1, fsdp=8),
    "2x2x2": MeshShape(data=2, fsdp=2, tensor=2),
}


def mesh_of(name):
    return make_mesh(SHAPES[name], jax.devices()[:1] if name == "one" else None)


class Block(nnx.Module):
    def __init__(self):
        self.up = param((16, 10), ("embed", "mlp"), Normal(0.5))
        self.bias = param((10,), ("mlp",), zeros, decay=False)


class Tiny(nnx.Module):
    """Each kind of weight: sharded twice, once, not at all, and stacked."""

    def __init__(self, *, extra: bool = False):
        if extra:  # declared first and named first: it must not disturb the others
            self.another = param((3, 16), (None, "embed"), Normal(1.0))
            self.takens = param((38, 16), ("vocab", "embed"), Normal(0.02))
        self.tokens = param((38, 16), ("vocab", "embed"), Normal(0.02))
        self.blocks = stack(Block(), 3)
        self.scale = param((16,), (None,), ones, decay=False)


def initialised(model, mesh, seed=7):
    with jax.set_mesh(mesh):
        make = jax.jit(lambda: init_params(model, RULES, jax.random.key(seed)))
        return flatten(make())


# --- The mesh -------------------------------------------------------------------------


def test_every_mesh_has_all_axes_and_they_are_explicit():
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}
    sizes = {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert dict(mesh.shape) == sizes
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


@pytest.mark.parametrize(
    ("shape", "axis", "size"),
    [
        (MeshShape(), "data", 8),  # the default takes all devices
        (MeshShape(fsdp=4), "data", 2),
        (MeshShape(data=2, fsdp=-1), "fsdp", 4),
        (MeshShape(data=8, tensor=-1), "tensor", 1),
    ],
)
def test_minus_one_is_what_is_left(shape, axis, size):
    assert make_mesh(shape).shape[axis] == size


def test_a_mesh_over_some_devices():
    mesh = make_mesh(MeshShape(), jax.devices()[:3])
    assert mesh.shape["data"] == 3


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (MeshShape(data=4), "data=4.* 8 device"),  # jax would take the first four
        (MeshShape(data=1), "all axes 1.* 8 device"),
        (MeshShape(data=16), "data=16.* 8 device"),
        (MeshShape(fsdp=3), "fsdp=3.* 8 device"),
        (MeshShape(data=-1, fsdp=16), "fsdp=16.* 8 device"),
        (MeshShape(data=-1, fsdp=-1), "only one axis may be -1"),
        (MeshShape(data=8, tensor=0), "tensor=0: expected a number above 0"),
        (MeshShape(data=-2, fsdp=-4), "data=-2: expected a number above 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, said):
    with pytest.raises(InputError, match=said):
        make_mesh(shape)
    with pytest.raises(InputError, match=said):
        abstract_mesh(shape, 8)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a device as making a mesh looks at."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0


def chips(**kind):
    """Two nodes, or slices, of four."""
    return [Chip(i, i // 4, i // 4, coords=(i % 4, 0, 0), **kind) for i in range(8)]


def test_slices_are_spanned_by_data_alone():
    tpus = chips(platform="tpu", device_kind="TPU of tomorrow")
    mesh = make_mesh(MeshShape(data=4, tensor=2), tpus)
    assert mesh.axis_types == (AxisType.Explicit,) * len(MESH_AXES)
    slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    # Two of the four replicas are of one slice, and each replica is in one.
    assert slices.reshape(4, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    for shape in (MeshShape(data=1, fsdp=8), MeshShape(data=1, fsdp=4, tensor=2)):
        with pytest.raises(InputError, match="2 slices.*mesh.data = 1 must be a mult"):
            make_mesh(shape, tpus)


def test_nodes_of_gpus_may_be_spanned_by_all():
    mesh = make_mesh(MeshShape(data=1, fsdp=8), chips())
    assert [chip.id for chip in mesh.devices.flat] == list(range(8))


@pytest.mark.filterwarnings("ignore::UserWarning")  # libtpu's, of variables of a TPU VM
def test_two_slices_of_real_topology(monkeypatch):
    pytest.importorskip("libtpu", reason="libtpu, which knows TPUs, is missing")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    slices = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:2x2", num_slices=2
    )
    mesh = make_mesh(MeshShape(data=2, fsdp=4), slices.devices)
    for number in range(2):
        assert {chip.slice_index for chip in mesh.devices[number].flat} == {number}


@pytest.mark.parametrize("name", ["data", "fsdp", "2x2x2"])
def test_an_abstract_mesh_is_the_type_of_a_mesh(name):
    mesh, abstract = mesh_of(name), abstract_mesh(SHAPES[name], 8)
    assert abstract.axis_names == mesh.axis_names
    assert abstract.axis_sizes == mesh.axis_sizes
    assert abstract.axis_types == mesh.axis_types
    table = sharding_table(Tiny(), RULES, mesh)
    assert sharding_table(Tiny(), RULES, abstract) == table


def test_an_abstract_mesh_needs_no_devices():
    mesh = abstract_mesh(MeshShape(data=2, fsdp=-1, tensor=4), 256)
    assert mesh.shape["fsdp"] == 32
    with pytest.raises(InputError, match="`mlp` dimension of 10 cannot be cut into 4"):
        check_divides(Tiny(), RULES, mesh)


# --- The rules ------------------------------------------------------------------------


def test_spec_maps_logical_axes_to_mesh_axes():
    assert RULES.spec("vocab", "embed") == PartitionSpec("tensor", "fsdp")
    assert RULES.spec("batch", "seq") == PartitionSpec(("data", "fsdp"), "context")
    assert RULES.spec("embed", None, "head_dim") == PartitionSpec("fsdp", None, None)
    assert RULES.spec() == PartitionSpec()


def test_shards_counts_the_parts_of_a_dimension():
    mesh = mesh_of("2x2x2")
    parts = {axis: shards(RULES, mesh, axis) for axis in ("batch", "mlp", "layers")}
    assert parts == {"batch": 4, "mlp": 2, "layers": 1}


@pytest.mark.parametrize("axis", ["embedd", "data"])
def test_an_unknown_logical_axis_is_refused(axis):
    with pytest.raises(InputError, match=f"Unknown logical axis '{axis}'.* act_embed"):
        RULES.spec("vocab", axis)


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(InputError, match="both `vocab` and `mlp` .* axis `tensor`"):
        RULES.spec("vocab", "mlp")
    with pytest.raises(InputError, match="both `embed` and `embed`"):
        RULES.spec("embed", "embed")


def test_a_rule_with_an_unknown_mesh_axis_is_refused():
    with pytest.raises(InputError, match="Rule `mlp` .* 'tensro'.* data, fsdp"):
        Rules(mlp=("tensro",))


def test_equal_rules_are_equal_and_hash_alike():
    """They are part of the static config: a jit cache must tell two tables apart."""
    assert Rules() == Rules() and hash(Rules()) == hash(Rules())
    assert Rules(embed=()) != Rules()


# --- Declarations ---------------------------------------------------------------------


def test_axes_must_name_each_dimension():
    with pytest.raises(InputError, match=r"shape \(4, 8\) has the axes \('embed',\)"):
        param((4, 8), ("embed",), zeros)
    with pytest.raises(InputError, match="has the axes"):
        param((4,), ("embed", None), zeros)


def test_declarations_have_dotted_paths_and_keep_what_was_said():
    found = declarations(Tiny())
    assert list(found) == ["blocks.bias", "blocks.up", "scale", "tokens"]
    assert found["tokens"].get_metadata("axes") == ("vocab", "embed")
    assert found["tokens"].get_metadata("decay") is True
    assert found["scale"].get_metadata("init") == Constant(1.0)


def test_stack_adds_a_leading_layers_axis():
    up = declarations(Tiny())["blocks.up"]
    bias = declarations(Tiny())["blocks.bias"]
    assert up.get_value().shape == (3, 16, 10)
    assert up.get_metadata("axes") == ("layers", "embed", "mlp")
    assert up.get_metadata("init") == Normal(0.5)
    assert bias.get_metadata("axes") == ("layers", "mlp")
    assert bias.get_metadata("decay") is False  # kept, though it has two dimensions now


def test_flatten_and_unflatten_are_opposites():
    shapes = map_declarations(Tiny(), lambda path, weight: weight.get_value().shape)
    flat = flatten(shapes)
    assert flat["blocks.up"] == shapes["blocks"]["up"] == (3, 16, 10)
    assert unflatten(flat) == shapes


def test_check_divides_names_weight_dimension_and_mesh_axes():
    check_divides(Tiny(), RULES, mesh_of("2x2x2"))
    mesh = make_mesh(MeshShape(data=2, tensor=4))  # 10 is no multiple of 4
    with pytest.raises(InputError) as error:
        check_divides(Tiny(), RULES, mesh)
    for said in ("`blocks.bias` (3, 10)", "`mlp` dimension of 10", "4 parts", "tensor"):
        assert said in str(error.value)
    both = dataclasses.replace(RULES, vocab=(), embed=("fsdp", "tensor"))
    mesh = make_mesh(MeshShape(data=1, fsdp=4, tensor=2))
    check_divides(Tiny(), dataclasses.replace(both, mlp=()), mesh)  # 16 / 8
    with pytest.raises(InputError, match="`embed` and `mlp`"):
        check_divides(Tiny(), both, mesh)


# --- Arrays ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def params_on():
    """Mesh name -> the parameters of Tiny that were initialised on it."""
    return {name: initialised(Tiny(), mesh_of(name)) for name in SHAPES}


# The random bits are the same; XLA computes a normal of them with other instructions
# where a shard's size leaves a remainder (jax 0.12: the last bit of 1 number in 30
# differs, jax 0.10: none).
LAST_BITS = {"rtol": 3e-7, "atol": 1e-9}


def test_first_weights_are_the_same_on_every_mesh(params_on):
    for name in SHAPES:
        for path, value in params_on[name].items():
            expected = np.asarray(params_on["one"][path])
            np.testing.assert_allclose(value, expected, **LAST_BITS, err_msg=path)


def test_first_weights_have_their_initializers_spread(params_on):
    params = {path: np.asarray(x) for path, x in params_on["one"].items()}
    assert params["tokens"].std() == pytest.approx(0.02, rel=0.1)  # 608 draws: 3.5 sd
    assert params["blocks.up"].std() == pytest.approx(0.5, rel=0.13)  # 480 draws
    layers = params["blocks.up"]
    assert not np.array_equal(layers[0], layers[1])  # each layer has its own draw
    assert (params["blocks.bias"] == 0).all() and (params["scale"] == 1).all()


def test_a_weight_does_not_change_when_another_is_added(params_on):
    more = initialised(Tiny(extra=True), mesh_of("2x2x2"))
    assert set(more) - set(params_on["one"]) == {"another", "takens"}
    assert not np.array_equal(more["takens"], more["tokens"])  # each its own draw
    for path, value in params_on["one"].items():
        np.testing.assert_allclose(more[path], value, **LAST_BITS)


def test_another_seed_gives_other_weights(params_on):
    other = initialised(Tiny(), mesh_of("2x2x2"), seed=8)
    assert not np.array_equal(other["tokens"], params_on["2x2x2"]["tokens"])
    assert not np.array_equal(other["blocks.up"], params_on["2x2x2"]["blocks.up"])


@pytest.mark.parametrize("name", SHAPES)
def test_abstract_params_are_the_types_of_the_arrays(params_on, name):
    target = flatten(abstract_params(Tiny(), RULES, mesh_of(name)))
    assert set(target) == set(params_on[name])
    for path, array in params_on[name].items():
        assert target[path].shape == array.shape
        assert target[path].dtype == array.dtype == np.float32
        assert target[path].sharding == array.sharding, path
        axes = declarations(Tiny())[path].get_metadata("axes")
        assert jax.typeof(array).sharding.spec == RULES.spec(*axes)


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_tells_the_bytes_that_a_device_really_holds(params_on, name):
    rows = sharding_table(Tiny(), RULES, mesh_of(name))
    assert [row.path for row in rows] == list(declarations(Tiny()))
    for row in rows:
        array = params_on[name][row.path]
        assert row.shape == array.shape
        assert row.mesh_axes == RULES.spec(*row.axes)
        held = {shard.data.nbytes for shard in array.addressable_shards}
        assert held == {row.bytes_per_device}, row.path


def test_the_table_on_a_mesh_of_fsdp_and_tensor():
    rows = sharding_table(Tiny(), RULES, mesh_of("2x2x2"))
    sizes = {row.path: row.bytes_per_device for row in rows}
    assert sizes["tokens"] == 38 * 16 * 4 // 4
    assert sizes["blocks.bias"] == 3 * 10 * 4 // 2
    assert sizes["scale"] == 16 * 4
