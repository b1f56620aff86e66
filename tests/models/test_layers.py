# SPDX-License-Identifier: Apache-2.0
"""Norms and activations whose backward pass is written by hand, against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec
from parity import one_device

from lm_scale.models.compute import Compute
from lm_scale.models.dropout import dropout
from lm_scale.models.layers import centred, gelu, layer_norm, rms_norm
from lm_scale.models.layout import shared
from lm_scale.models.scan import remat_policy
from lm_scale.sharding import MeshShape, Rules, make_mesh

WIDTH, EPSILON = 48, 1e-5
SHAPE = (4, 5, WIDTH)


@pytest.fixture(autouse=True)
def mesh_of_one():
    with jax.set_mesh(one_device()):
        yield


def normals(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs() -> tuple[np.ndarray, ...]:
    """An activation with features that stand out, scale, bias, and a gradient."""
    x = normals(*SHAPE) * 3
    x[..., 7] += 40
    return (
        x,
        1 + normals(WIDTH, seed=1),
        normals(WIDTH, seed=2),
        normals(*SHAPE, seed=3),
    )


def with_gradients(function, *given, gradient):
    value, pull = jax.vjp(function, *map(jnp.asarray, given))
    return value, *pull(jnp.asarray(gradient, value.dtype))


@pytest.mark.parametrize("offset", [0, 30, 1000])
def test_layer_norm_and_its_gradients_are_those_of_torch(offset):
    """A mean of many deviations costs digits of the variance, never all of them."""
    torch = pytest.importorskip("torch")
    x, scale, bias, gradient = inputs()
    x += offset
    theirs = [torch.tensor(one, dtype=torch.float64) for one in (x, scale, bias)]
    for one in theirs:
        one.requires_grad_()
    value = torch.nn.functional.layer_norm(theirs[0], (WIDTH,), *theirs[1:], EPSILON)
    value.backward(torch.tensor(gradient, dtype=torch.float64))
    expected = [value, *(one.grad for one in theirs)]
    ours = with_gradients(
        lambda *a: layer_norm(*a, EPSILON), x, scale, bias, gradient=gradient
    )
    deviation = x.std(-1).mean()
    tolerance = 2e-6 * (1 + (x.mean() / deviation) ** 2)
    for one, other in zip(ours, expected, strict=True):
        other = other.detach().numpy()
        error = np.abs(np.asarray(one) - other).max() / np.abs(other).max()
        assert error < tolerance


def test_rms_norm_and_its_gradients_are_those_of_torch():
    torch = pytest.importorskip("torch")
    x, scale, _, gradient = inputs()
    theirs = [torch.tensor(one, dtype=torch.float64) for one in (x, scale)]
    for one in theirs:
        one.requires_grad_()
    value = torch.nn.functional.rms_norm(theirs[0], (WIDTH,), theirs[1], EPSILON)
    value.backward(torch.tensor(gradient, dtype=torch.float64))
    expected = [value, *(one.grad for one in theirs)]
    ours = with_gradients(lambda *a: rms_norm(*a, EPSILON), x, scale, gradient=gradient)
    for one, other in zip(ours, expected, strict=True):
        other = other.detach().numpy()
        error = np.abs(np.asarray(one) - other).max() / np.abs(other).max()
        assert error < 2e-6


def test_rows_that_are_even_get_the_bias_and_no_gradient_that_is_not_finite():
    x = np.full(SHAPE, 1234.567, np.float32)
    _, scale, bias, gradient = inputs()
    value, *gradients = with_gradients(
        lambda *a: layer_norm(*a, EPSILON), x, scale, bias, gradient=gradient
    )
    # What is left of the mean's last digit, over the root of epsilon.
    np.testing.assert_allclose(value, np.broadcast_to(bias, SHAPE), atol=0.1)
    assert all(np.isfinite(one).all() for one in gradients)


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_and_its_slope_are_those_of_torch(approximate):
    torch = pytest.importorskip("torch")
    x, _, _, gradient = inputs()
    x[0, 0, :7] = (0, -0.0, 1e-30, -1e-30, 12, -12, -40)
    theirs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    how = "tanh" if approximate else "none"
    value = torch.nn.functional.gelu(theirs, approximate=how)
    value.backward(torch.tensor(gradient, dtype=torch.float64))
    ours = with_gradients(lambda a: gelu(a, approximate), x, gradient=gradient)
    np.testing.assert_allclose(ours[0], value.detach(), rtol=2e-6, atol=2e-6)
    # Where tanh is nearly 1, one less its square has few digits, in jax as in torch.
    np.testing.assert_allclose(ours[1], theirs.grad, rtol=2e-5, atol=2e-5)


def test_gelu_in_bf16_is_that_of_torch_to_a_digit_of_bf16():
    torch = pytest.importorskip("torch")
    every = jnp.arange(2**16, dtype=jnp.uint16).view(jnp.bfloat16)  # that there is
    x = every[jnp.isfinite(every)]
    theirs = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    value = torch.nn.functional.gelu(theirs)
    value.sum().backward()
    ours = with_gradients(lambda a: gelu(a, False), x, gradient=np.ones(x.shape))
    tiny = {"rtol": 2**-8, "atol": 3e-5}  # half of the last digit, and the fit's error
    np.testing.assert_allclose(ours[0].astype("f"), value.detach(), **tiny)
    tiny["atol"] = 1.2e-4
    np.testing.assert_allclose(ours[1].astype("f"), theirs.grad, **tiny)


@pytest.mark.parametrize(
    ("platform", "precision", "function"),
    [
        ("cpu", None, "erf"),
        ("tpu", None, "tanh"),
        ("tpu", "bfloat16", "tanh"),
        ("tpu", "float32", "erf"),
    ],
)
def test_gelu_in_f32_is_as_good_as_what_products_take(platform, precision, function):
    device = AbstractDevice("of some kind", None, platform)
    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), jax.default_matmul_precision(precision):
        x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        made = str(jax.make_jaxpr(lambda x: gelu(x, False))(x))
    assert [name for name in ("erf", "tanh") if f"= {name} " in made] == [function]


@pytest.mark.parametrize("shape", [(9, WIDTH), (9,)])
def test_centred_rows_have_the_mean_0_and_the_gradient_that_they_had(shape):
    weight, gradient = 5 + normals(*shape), normals(*shape, seed=1)
    value, slope = with_gradients(centred, weight, gradient=gradient)
    np.testing.assert_allclose(value, weight - weight.mean(0), atol=1e-5)
    np.testing.assert_array_equal(slope, gradient)


def test_dropout_drops_the_gradient_where_it_dropped_the_value():
    x, *_, gradient = inputs()
    value, slope = with_gradients(
        lambda a: dropout(a, 0.3, jax.random.key(1)), x, gradient=gradient
    )
    np.testing.assert_allclose(np.asarray(value) / x * gradient, slope, rtol=1e-5)
    assert 0.2 < np.mean(np.asarray(value) == 0) < 0.4


@pytest.mark.parametrize("shape", [MeshShape(), MeshShape(data=2, context=4)])
def test_a_norm_of_rows_on_several_devices(shape):
    """Gradients of scale and bias are partial sums there."""
    x, scale, bias, gradient = inputs()
    plain = with_gradients(
        lambda *a: layer_norm(*a, EPSILON), x, scale, bias, gradient=gradient
    )
    rules = Rules()
    rows = np.concatenate([x, x]), np.concatenate([gradient, gradient])
    spec = rules.spec("batch", None, None)

    @jax.jit
    def run(x, gradient, scale, bias):
        x, gradient = (jax.reshard(a, spec) for a in (x, gradient))
        weights = [shared(a, rules) for a in (scale, bias)]
        value, pull = jax.vjp(lambda *a: layer_norm(*a, EPSILON), x, *weights)
        found = [value, *pull(gradient)]
        return [jax.reshard(a, PartitionSpec()) for a in found]

    with jax.set_mesh(make_mesh(shape)):
        found = run(*rows, scale, bias)
    value, dx, d_scale, d_bias = jax.device_get(found)
    half = x.shape[0]
    for one, other in [
        (value[half:], plain[0]), (dx[:half], plain[1]),
        (d_scale / 2, plain[2]), (d_bias / 2, plain[3]),
    ]:  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def saved(remat: str, capsys) -> str:
    """What the backward pass of a norm, dropout and GELU finds kept."""
    x, scale, bias, _ = map(jnp.asarray, inputs())

    def layer(x, weight):
        x = gelu(layer_norm(x, scale, bias, EPSILON) @ weight, False)
        return dropout(x @ weight.T, 0.5, jax.random.key(0)).sum()

    layer = jax.checkpoint(layer, policy=remat_policy(Compute(remat=remat)))
    print_saved_residuals(layer, x, jnp.asarray(normals(WIDTH, 2 * WIDTH)))
    return capsys.readouterr().out


def test_what_is_kept(capsys):
    """No mask of dropout; with `dots` the normalised input and the product."""
    out = saved("dots", capsys)
    wide, narrow = f"f32[4,5,{2 * WIDTH}]", f"f32[4,5,{WIDTH}]"
    assert (out.count(wide), out.count("from the argument x")) == (1, 0)
    assert out.count(narrow) == 1 and "bool" not in out and "u32[4" not in out
    out = saved("none", capsys)
    assert out.count(wide) == 2 and "bool" not in out and "u32[4" not in out
