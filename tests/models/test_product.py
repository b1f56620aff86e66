# SPDX-License-Identifier: Apache-2.0
"""Products in 8 bits: what rounding may cost, and nothing else; where they may be."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import NamedSharding, PartitionSpec
from parity import one_device

from lm_scale.errors import InputError
from lm_scale.models.compute import Compute
from lm_scale.models.layout import summed
from lm_scale.models.product import check_quantize, product
from lm_scale.models.scan import remat_policy
from lm_scale.sharding import MeshShape, make_mesh

KINDS = ("int8", "float8")
# From a value to its neighbour, by the largest of its row (int8) or by itself.
HALF_UNIT = {"int8": 0.5 / 127, "float8": 2.0**-4}
SHAPES = {"B": 4, "T": 6, "D": 16, "H": 4, "N": 6, "F": 40}
# The pattern; how the weight is cut, and how the product comes out.
CASES = {
    "BTD,DHN->BTHN": (("B", None, None), (None, "tensor", None), None),
    "BTD,DF->BTF": (("B", None, None), (None, "tensor"), None),
    "BTHN,HND->BTD": (("B", None, "tensor", None), ("tensor", None, None), "sums"),
    "BTF,FD->BTD": (("B", None, "tensor"), ("tensor", None), "sums"),
}
MESHES = {"1": MeshShape(data=1), "8": MeshShape(data=2, fsdp=2, tensor=2)}


def run(pattern, mesh_name, arrays, quantize, cotangent=None, dtype="float32"):
    """The product on a mesh, and its gradients by the cotangent."""
    x_cut, weight_cut, out = CASES[pattern]
    shape = MESHES[mesh_name]
    count = shape.data * shape.fsdp * shape.tensor
    mesh = make_mesh(shape, jax.devices()[:count])
    tokens = ("data", "fsdp")
    x_spec = PartitionSpec(*(tokens if cut == "B" else cut for cut in x_cut))
    weight_spec = PartitionSpec(*weight_cut)
    whole = PartitionSpec(tokens, None, None)
    into = whole.update(unreduced={"tensor"}) if out else None
    compute = Compute(dtype=dtype, quantize=quantize)

    def forward(x, weight):
        weight = jax.reshard(weight, weight_spec.update(reduced=set(tokens)))
        made = product(pattern, x.astype(dtype), weight.astype(dtype), compute, into)
        return summed(made, whole) if out else made

    @jax.jit
    def both(x, weight, cotangent):
        made, pull = jax.vjp(forward, x, weight)
        cotangent = jax.reshard(cotangent, jax.typeof(made).sharding.spec)
        return made, *pull(cotangent.astype(made.dtype))

    with jax.set_mesh(mesh):
        x, weight = (
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip(arrays, (x_spec, weight_spec), strict=True)
        )
        shape = jax.eval_shape(forward, x, weight).shape
        cotangent = jnp.ones(shape) if cotangent is None else cotangent
        return [np.asarray(a, np.float64) for a in both(x, weight, cotangent)]


def some(pattern, seed=0):
    """Random factors, and a cotangent; rows of different sizes."""
    rng = np.random.default_rng(seed)
    factors, out = pattern.split("->")
    made = []
    for names in (*factors.split(","), out):
        shape = [SHAPES[name] for name in names]
        sizes = np.exp(rng.normal(size=(*shape[:2], *[1] * (len(shape) - 2))))
        made.append((rng.normal(size=shape) * sizes).astype(np.float32))
    return made


def allowed(pattern, first, second, kind):
    """How far a product of rounded factors may be off."""
    factors, out = pattern.split("->")
    units = []
    for array, names in zip((first, second), factors.split(","), strict=True):
        row = tuple(axis for axis, name in enumerate(names) if name not in out)
        size = np.abs(array)
        largest = np.broadcast_to(size.max(row, keepdims=True), size.shape)
        # (A float8 too small for its exponents is one of int8's kind, and smaller.)
        units.append(HALF_UNIT[kind] * largest)
    (a, b), (da, db) = (np.abs(first), np.abs(second)), units
    error = np.einsum(pattern, a, db) + np.einsum(pattern, da, b)
    return error + np.einsum(pattern, da, db)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("pattern", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_off_by_no_more_than_rounding(kind, pattern, mesh):
    x, weight, cotangent = some(pattern)
    made, dx, dweight = run(pattern, mesh, (x, weight), kind, cotangent)
    plain = run(pattern, mesh, (x, weight), None, cotangent)
    slack = 1e-5 * np.abs(plain[0]).max()
    error = np.abs(made - plain[0])
    assert (error <= allowed(pattern, x, weight, kind) + slack).all()
    assert error.max() > slack  # it was rounded
    factors, out = pattern.split("->")
    left, right = factors.split(",")
    back = f"{out},{right}->{left}"
    # (Gradients are rounded to float8's wider type, with a bit less.)
    bound = allowed(back, cotangent, weight, kind) * (1 if kind == "int8" else 2)
    error, slack = np.abs(dx - plain[1]), 1e-5 * np.abs(plain[1]).max()
    assert (error <= bound + slack).all()
    assert error.max() > slack
    np.testing.assert_array_equal(dweight, plain[2])


@pytest.mark.parametrize("pattern", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_on_a_mesh(kind, pattern):
    *arrays, cotangent = some(pattern, 1)
    one, eight = (run(pattern, mesh, arrays, kind, cotangent) for mesh in MESHES)
    for found, expected in zip(eight, one, strict=True):
        atol = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("pattern", CASES)
def test_int8_holds_whole_numbers(pattern):
    """Whole numbers in rows whose largest is 127, and so their unit 1."""
    rng = np.random.default_rng(2)
    factors, out = pattern.split("->")
    arrays = []
    for names in factors.split(","):
        array = rng.integers(-127, 128, [SHAPES[name] for name in names])
        array = array.astype(np.float32)
        array[tuple(slice(None) if name in out else 0 for name in names)] = -127
        arrays.append(array)
    made, *_ = run(pattern, "8", arrays, "int8")
    expected = np.einsum(pattern, *arrays)
    # (The unit is a quotient, which f32 rounds.)
    atol = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(made, expected, rtol=0, atol=atol)


def test_a_row_of_zeros_and_one_of_tiny_values():
    x, weight, _ = some("BTD,DF->BTF")
    x[0, 0], x[0, 1] = 0, 1e-30
    made, dx, _ = run("BTD,DF->BTF", "1", (x, weight), "int8")
    assert np.isfinite(made).all() and np.isfinite(dx).all()
    np.testing.assert_array_equal(made[0, 0], 0)
    assert np.abs(made[0, 1]).max() < 1e-27


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_value_is_seen(kind):
    """The guard must find what it would find without rounding."""
    x, weight, _ = some("BTD,DF->BTF")
    x[1, 2, 3] = np.nan
    made, *_ = run("BTD,DF->BTF", "1", (x, weight), kind)
    assert np.isnan(made[1, 2]).all()
    assert np.isfinite(made[0]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_in_the_compute_type(kind, capsys):
    """And not the sums of which it is made, which are larger."""
    compute = Compute(quantize=kind, remat="dots")
    x, weight, _ = (jnp.asarray(array, jnp.bfloat16) for array in some("BTD,DF->BTF"))

    def layer(x, weight):
        return jnp.tanh(product("BTD,DF->BTF", x, weight, compute)).sum()

    with jax.set_mesh(one_device()):
        layer = jax.checkpoint(layer, policy=remat_policy(compute))
        print_saved_residuals(layer, x, weight)
    out = capsys.readouterr().out
    made = "[4,6,40]"
    assert (out.count("bf16" + made), out.count(made)) == (1, 1), out


def device(kind, platform="tpu", capability=None):
    return SimpleNamespace(
        device_kind=kind, platform=platform, compute_capability=capability
    )


@pytest.mark.parametrize(
    ("quantize", "here", "fast"),
    [
        ("int8", device("TPU v2"), False),
        ("int8", device("TPU v3"), False),
        ("int8", device("TPU v4"), False),
        ("int8", device("TPU v5 lite"), True),
        ("int8", device("TPU v6 lite"), True),
        ("float8", device("TPU v6 lite"), False),
        ("float8", device("TPU7x"), True),
        ("int8", device("Tesla V100-SXM2-16GB", "gpu", "7.0"), False),
        ("int8", device("NVIDIA A100-SXM4-40GB", "gpu", "8.0"), True),
        ("float8", device("NVIDIA A100-SXM4-40GB", "gpu", "8.0"), False),
        ("float8", device("NVIDIA H100 80GB HBM3", "gpu", "9.0"), True),
        ("float8", device("NVIDIA B200", "gpu", "10.0"), True),
        ("int8", device("AMD Instinct MI300X", "gpu", "gfx942"), False),
    ],
)
def test_refused_where_it_gains_nothing(quantize, here, fast):
    check_quantize(Compute(), here)
    if fast:
        check_quantize(Compute(quantize=quantize), here)
        return
    text = f"'{quantize}' gains nothing on {here.device_kind}"
    with pytest.raises(InputError, match=text):
        check_quantize(Compute(quantize=quantize), here)
