# SPDX-License-Identifier: Apache-2.0
"""Where arrays live: the mesh, the rules, and the one way to declare a weight.

The only file that spells a mesh axis. Everything else speaks *logical* axes:

    letter  size of          weights' axis   activations' axis
    B       batch            -               batch
    T, S    query, key pos.  -               seq
    D       model width      embed           act_embed
    H, K    heads, kv heads  heads kv_heads  act_heads act_kv_heads
    J       query heads of a kv head, H/K
    N       head width       head_dim        -
    F       mlp width        mlp             act_mlp
    V       vocabulary       vocab           act_vocab
    E       experts          experts         -
    C       q, k and v       -               -
    G       model width, of what a square matrix makes
    L       layers           layers          -

Array types (`Float[Array, "B T D"]`), einsum letters and `Rules` use these words and no
others. A weight and an activation name the model dimension differently on purpose: FSDP
shards `embed` of the stored weights and gathers it for the computation, so `act_embed`
stays whole. Two more axes are other layouts of the same dimension: `state_embed` is
`embed` in the optimizer's state, and `residual_seq` is `seq` between the sublayers.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.mesh_utils import (
    create_device_mesh,
    create_hybrid_device_mesh,
)
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lm_scale.errors import InputError

Axes = tuple[str | None, ...]  # one logical axis, or None, for each dimension
Params = dict[str, Any]  # nested dict of arrays, as `nnx.merge` takes them


@dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; one axis may be -1: all that are left."""

    data: int = -1  # replicas of the weights, each with rows of the batch of its own
    fsdp: int = 1  # rows of the batch too, and the weights sharded
    expert: int = 1  # experts of mixture-of-experts layers
    context: int = 1  # parts of a sequence
    tensor: int = 1  # heads, mlp and vocabulary inside a layer


FULLY_SHARDED = MeshShape(data=1, fsdp=-1)
MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshShape))
_ONE = MeshShape(data=1)
_EXPLICIT = (AxisType.Explicit,) * len(MESH_AXES)


@dataclass(frozen=True)
class Rules:
    """Maps logical axes (the fields) to mesh axes; `()` means not sharded.

    Every mesh axis exists in every mesh, often with size 1, so that one table serves
    from 1 device to a pod: only the mesh changes.
    """

    layers: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ("expert",)
    # `embed` of the optimizer's state; over more axes than `embed`, this is ZeRO-1
    # (Rajbhandari et al. 2020, section 5.1): each device updates a part of its weights.
    state_embed: tuple[str, ...] = ("fsdp",)
    batch: tuple[str, ...] = ("data", "fsdp")
    seq: tuple[str, ...] = ("context",)
    # `seq` of the residual stream and its norms; over `tensor` as well, this is the
    # sequence parallelism of Korthikanti et al. 2022 (section 4.2.2).
    residual_seq: tuple[str, ...] = ("context",)
    act_embed: tuple[str, ...] = ()
    act_heads: tuple[str, ...] = ("tensor",)
    act_kv_heads: tuple[str, ...] = ("tensor",)
    act_mlp: tuple[str, ...] = ("tensor",)
    act_vocab: tuple[str, ...] = ("tensor",)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            if not isinstance(axes, tuple):
                raise InputError(
                    f"Rule `{field.name}` = {axes!r}: expected a tuple of mesh axes, "
                    f"such as ('fsdp',) or ()."
                )
            for axis in axes:
                if axis not in MESH_AXES:
                    raise InputError(
                        f"Rule `{field.name}` names the mesh axis {axis!r}, which does "
                        f"not exist. The mesh axes are {', '.join(MESH_AXES)}."
                    )

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The partition of an array whose dimensions have these logical axes.

        Raises InputError for an unknown axis, or if two dimensions would be sharded
        over the same mesh axis.
        """
        used: dict[str, str] = {}
        parts = []
        for axis in axes:
            if axis is None:
                parts.append(None)
                continue
            if axis not in LOGICAL_AXES:
                known = ", ".join(LOGICAL_AXES)
                raise InputError(f"Unknown logical axis {axis!r}. There are: {known}.")
            mesh_axes = getattr(self, axis)
            for mesh_axis in mesh_axes:
                if mesh_axis in used:
                    raise InputError(
                        f"The rules put both `{used[mesh_axis]}` and `{axis}` of one "
                        f"array on the mesh axis `{mesh_axis}`. Change one of the two."
                    )
                used[mesh_axis] = axis
            parts.append(mesh_axes or None)
        return PartitionSpec(*parts)


LOGICAL_AXES = tuple(field.name for field in dataclasses.fields(Rules))

_WHOLE = Rules(
    vocab=(), embed=(), heads=(), kv_heads=(), mlp=(), state_embed=(),
    seq=(), residual_seq=(), act_heads=(), act_kv_heads=(), act_mlp=(), act_vocab=(),
)  # fmt: skip
_TENSOR = Rules(seq=(), residual_seq=())
PRESETS = {
    # Each device has all weights; it sees rows of the batch of its own.
    "dp": _WHOLE,
    # The same, but each keeps and updates a part of the optimizer's state only.
    "zero1": dataclasses.replace(_WHOLE, state_embed=("data", "fsdp")),
    # Each keeps a part of weights and state; a layer is gathered when it is computed.
    "fsdp": dataclasses.replace(_WHOLE, embed=("fsdp",), state_embed=("fsdp",)),
    # Heads, mlp and vocabulary are cut besides.
    "fsdp_tp": _TENSOR,
    # Between the sublayers, those devices share out the sequence.
    "fsdp_tp_sp": dataclasses.replace(_TENSOR, residual_seq=("tensor",)),
    # Sequences are cut, for long ones; with all of `fsdp_tp`. The default.
    "context": Rules(),
}


def parse_mesh_shape(text: str) -> MeshShape:
    """The mesh shape of `axis=size,axis=size`; InputError if it is not of that form.

    Axes that are not named have size 1, but for the first, which takes the devices that
    are left unless another one does (-1).
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        try:
            if axis not in MESH_AXES or axis in sizes:
                raise ValueError(axis)
            sizes[axis] = int(size)
        except ValueError:
            raise InputError(
                f"mesh {text!r}: {part.strip()!r} is not axis=size, with each axis "
                f"once, out of {', '.join(MESH_AXES)}."
            ) from None
    if -1 in sizes.values():
        sizes.setdefault(MESH_AXES[0], 1)
    return MeshShape(**sizes)


def resolve_mesh_shape(shape: MeshShape, devices: int) -> MeshShape:
    """Replaces -1 by what is left of `devices`; InputError if the product is not it."""
    sizes = dataclasses.asdict(shape)
    free = [axis for axis, size in sizes.items() if size == -1]
    bad = [f"{axis}={size}" for axis, size in sizes.items() if size < 1 and size != -1]
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1)
    if bad:
        raise InputError(f"Mesh axis {bad[0]}: expected a number above 0, or -1.")
    if len(free) > 1:
        raise InputError(f"Mesh ({asked}): only one axis may be -1 (the rest).")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = devices // fixed
    if math.prod(sizes.values()) != devices:
        raise InputError(
            f"Mesh ({asked or 'all axes 1'}) does not fit {devices} device(s): the "
            f"sizes must multiply to {devices}. Change `mesh`, or leave one axis at -1."
        )
    return MeshShape(**sizes)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), with Explicit axes.

    Slices of TPUs, which only the slower network of the data centre joins, are spanned
    by `data` alone. Raises InputError if the shape does not multiply to the number of
    devices, or if `data` cannot be shared out among the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = resolve_mesh_shape(shape, len(devices))
    sizes = dataclasses.astuple(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        arranged = _neighbours(devices, sizes)
        return Mesh(arranged, MESH_AXES, axis_types=_EXPLICIT)
    if devices[0].platform != "tpu":  # nodes of GPUs: in their order, `data` outermost
        return Mesh(np.reshape(devices, sizes), MESH_AXES, axis_types=_EXPLICIT)
    if shape.data % slices:
        raise InputError(
            f"The devices are {slices} slices, between which the network is slow: only "
            f"`data` may span them, so mesh.data = {shape.data} must be a multiple of "
            f"{slices}."
        )
    between = dataclasses.replace(_ONE, data=slices)
    within = dataclasses.replace(shape, data=shape.data // slices)
    arranged = create_hybrid_device_mesh(
        dataclasses.astuple(within), dataclasses.astuple(between), devices,
        allow_split_physical_axes=True,
    )  # fmt: skip
    return Mesh(arranged, MESH_AXES, axis_types=_EXPLICIT)


def _neighbours(devices: Sequence[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """The devices of a slice in this shape, along its links as well as it goes."""
    if devices[0].device_kind == "TPU v4" and devices[0].num_cores == 1:
        # Single cores of v4, which libtpu has where there is no chip, and jax lays on
        # no mesh: in their order.
        return np.reshape(devices, sizes)
    try:
        return jax.make_mesh(sizes, MESH_AXES, _EXPLICIT, devices=devices).devices
    except NotImplementedError:  # no whole axes of a torus make up one of the mesh
        return create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def abstract_mesh(shape: MeshShape, devices: int) -> AbstractMesh:
    """The same mesh over as many devices, of which there need be none.

    A program can be traced for it, which checks every sharding, but not compiled.
    Raises InputError if the shape does not multiply to that number.
    """
    sizes = dataclasses.astuple(resolve_mesh_shape(shape, devices))
    return AbstractMesh(sizes, MESH_AXES, axis_types=_EXPLICIT)


def shards(rules: Rules, mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Into how many parts a dimension with this logical axis is cut."""
    return math.prod(mesh.shape[mesh_axis] for mesh_axis in getattr(rules, axis))


# --- Weights --------------------------------------------------------------------------


@dataclass(frozen=True)
class Normal:
    """Initializer: normal with mean 0. A dataclass, so that equal models are equal."""

    stddev: float

    def __call__(self, key, shape, dtype, sharding):
        return self.stddev * jax.random.normal(key, shape, dtype, out_sharding=sharding)


@dataclass(frozen=True)
class Constant:
    """Initializer: one value everywhere."""

    value: float

    def __call__(self, key, shape, dtype, sharding):
        return jnp.full(shape, self.value, dtype, out_sharding=sharding)


zeros, ones = Constant(0.0), Constant(1.0)


def param(
    shape: Sequence[int], axes: Axes, init: Callable, *, decay: bool = True
) -> nnx.Param:
    """Declares a weight: its shape, its logical axes and how it starts, in one place.

    The value is only a `jax.ShapeDtypeStruct`: `init_params` (or a checkpoint, or a
    Hugging Face folder) makes the array, straight into its shards. Weights are f32;
    modules cast them to the compute type. `decay=False` keeps it out of weight decay
    (biases, norm scales). One-dimensional weights should have the axes `(None,)` unless
    the activation that they meet is sharded alike.

    Raises InputError if `axes` does not name each dimension.
    """
    if len(axes) != len(shape):
        raise InputError(f"A weight of shape {tuple(shape)} has the axes {axes}.")
    value = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
    return nnx.Param(value, axes=tuple(axes), init=init, decay=decay)


def stack(block: nnx.Module, layers: int) -> nnx.Module:
    """The declaration of `layers` equal blocks as one, with a leading `layers` axis."""

    def stacked(weight: nnx.Param) -> nnx.Param:
        meta, value = weight.get_metadata(), weight.get_value()
        axes = ("layers", *meta["axes"])
        shape = (layers, *value.shape)
        return param(shape, axes, meta["init"], decay=meta["decay"])

    graphdef, weights = nnx.split(block)
    is_weight = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(stacked, weights, is_leaf=is_weight))


def declarations(model: nnx.Module) -> dict[str, nnx.Param]:
    """Every weight of a declared model by its dotted path, e.g. `blocks.mlp.up`."""
    flat = nnx.to_flat_state(nnx.split(model)[1])
    return {".".join(map(str, path)): weight for path, weight in flat}


def map_declarations(model: nnx.Module, fn: Callable[[str, nnx.Param], Any]) -> Params:
    """`fn(path, declaration)` for each weight, in the structure of the parameters."""
    flat = {path: fn(path, weight) for path, weight in declarations(model).items()}
    return unflatten(flat)


def flatten(params: Params) -> dict[str, Any]:
    """Nested dict of parameters -> dict by dotted path."""
    flat = nnx.traversals.flatten_mapping(params, sep=".")
    return dict(flat)


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The opposite of `flatten`."""
    return nnx.traversals.unflatten_mapping(flat, sep=".")


def state_axes(axes: Axes) -> Axes:
    """The logical axes of a weight in the optimizer's state, where it is updated."""
    return tuple("state_embed" if axis == "embed" else axis for axis in axes)


def check_divides(model: nnx.Module, rules: Rules, mesh: Mesh | AbstractMesh) -> None:
    """InputError naming each weight's dimension that its mesh axes do not divide."""
    for path, weight in declarations(model).items():
        shape, axes = weight.get_value().shape, weight.get_metadata("axes")
        for names in (axes, state_axes(axes)):
            rules.spec(*names)  # unknown or colliding axes
        for size, axis in zip(shape * 2, axes + state_axes(axes), strict=True):
            parts = shards(rules, mesh, axis) if axis else 1
            if size % parts:
                raise InputError(
                    f"Weight `{path}` {shape}: its `{axis}` dimension of {size} cannot "
                    f"be cut into {parts} parts, as the mesh "
                    f"({'×'.join(getattr(rules, axis))}) asks. Change `mesh`, the rule "
                    f"`{axis}`, or the size."
                )


def abstract_params(model: nnx.Module, rules: Rules, mesh: Mesh) -> Params:
    """The parameters as ShapeDtypeStructs with their shardings: a restore target."""

    def abstract(path: str, weight: nnx.Param) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, rules.spec(*weight.get_metadata("axes")))
        value = weight.get_value()
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return map_declarations(model, abstract)


def init_params(model: nnx.Module, rules: Rules, key: jax.Array) -> Params:
    """Fresh parameters, each device making only its own shards.

    A weight's values depend on its path and `key` alone: the same on every mesh but for
    the last bit (JAX's threefry is partitionable; the compiler's rounding may differ),
    and unchanged when another weight is added. To be traced under `jax.set_mesh`.
    """

    def make(path: str, weight: nnx.Param) -> jax.Array:
        value, meta = weight.get_value(), weight.get_metadata()
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        sharding = rules.spec(*meta["axes"])
        return meta["init"](own_key, value.shape, value.dtype, sharding)

    return map_declarations(model, make)


@dataclass(frozen=True)
class WeightRow:
    """One line of the sharding table."""

    path: str
    shape: tuple[int, ...]
    axes: Axes
    mesh_axes: PartitionSpec
    bytes_per_device: int


def sharding_table(
    model: nnx.Module, rules: Rules, mesh: Mesh | AbstractMesh
) -> list[WeightRow]:
    """Each weight with its shape, its logical and mesh axes and its bytes a device."""
    rows = []
    for path, weight in declarations(model).items():
        value, axes = weight.get_value(), weight.get_metadata("axes")
        spec = rules.spec(*axes)
        shard = NamedSharding(mesh, spec).shard_shape(value.shape)
        size = math.prod(shard) * value.dtype.itemsize
        rows.append(WeightRow(path, value.shape, axes, spec, size))
    return rows
