# SPDX-License-Identifier: Apache-2.0
"""Changes of layout: sums over devices, and gradients as they are on one device.

Those of whole models are in tests/test_matrix.py; what they send, in
tests/test_collectives.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lm_scale.models.layout import shared, spread, sum_over, summed
from lm_scale.sharding import PRESETS, MeshShape, make_mesh

RULES = PRESETS["fsdp_tp_sp"]
MESH = make_mesh(MeshShape(data=2, fsdp=2, tensor=2), jax.devices())
RESIDUAL = RULES.spec("batch", "residual_seq", None)


def put(x, *axes):
    return jax.device_put(x, NamedSharding(MESH, RULES.spec(*axes)))


def test_the_gradient_of_a_bias_whose_activations_are_gathered_elsewhere():
    """Of x + x·up·down + bias, in a loop, the sum of the product being left to XLA.

    So the gradient of the result is used twice: cut, for the bias, and gathered.
    """
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 8, 4, 16)).astype(np.float32)
    ups, downs = 0.1 * rng.normal(size=(2, 3, 16 * 8)).astype(np.float32)
    ups, downs = ups.reshape(3, 16, 8), downs.reshape(3, 8, 16)
    biases = np.zeros((3, 16), np.float32)

    def total(biases, x, weight):
        def block(x, weights):
            bias, up, down = weights
            whole = jax.reshard(x, RULES.spec("batch", None, None))
            hidden = jnp.einsum("BTD,DF->BTF", whole, up)
            parts = jnp.einsum(
                "BTF,FD->BTD", hidden, down, out_sharding=sum_over("act_mlp", RULES)
            )
            made = jax.reshard(parts, RESIDUAL)
            return x + made + spread(bias, made), None

        cut = put(ups, None, None, "mlp"), put(downs, None, "mlp", None)
        x, _ = jax.lax.scan(block, x, (shared(biases, RULES), *cut))
        return jnp.sum(x * weight)

    def reference(biases):
        y = jnp.asarray(x)
        for bias, up, down in zip(biases, ups, downs, strict=True):
            y = y + y @ up @ down + bias
        return jnp.sum(y * weight)

    rows = "batch", "residual_seq", None
    with jax.set_mesh(MESH):
        arguments = put(biases, None, None), put(x, *rows), put(weight, *rows)
        found = jax.jit(jax.grad(total))(*arguments)
    np.testing.assert_allclose(found, jax.grad(reference)(biases), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "specs",
    [
        [jax.P(None, None)],  # by one sum
        [jax.P(("data", "fsdp"), None)],  # cut as it is summed
        [jax.P("fsdp", None, unreduced={"data"}), jax.P("fsdp", None)],  # in two turns
        # And cut anew on the outside of what is cut, which a reduce-scatter cannot.
        [jax.P("fsdp", None, unreduced={"data"}), jax.P(("data", "fsdp"), None)],
    ],
)
def test_partial_sums_are_summed_once_however_they_are_cut(specs):
    x, y = np.random.default_rng(1).normal(size=(2, 8, 8)).astype(np.float32)

    def product(x, y):
        partial = jax.P(None, None, unreduced={"data", "fsdp"})
        sums = jnp.einsum("bd,bf->df", x, y, out_sharding=partial)
        for spec in specs:
            sums = summed(sums, spec)
        return sums

    rows = NamedSharding(MESH, jax.P(("data", "fsdp")))
    with jax.set_mesh(MESH):
        found = jax.jit(product)(*jax.device_put((x, y), rows))
    np.testing.assert_allclose(found, x.T @ y, rtol=1e-5, atol=1e-5)
