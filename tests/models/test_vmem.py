# SPDX-License-Identifier: Apache-2.0
"""Attention in our kernel for TPUs: the plain path's numbers, by interpretation."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lm_scale.models import attention as attention_module
from lm_scale.models import build_model, kernels
from lm_scale.models.attention import Mask, attention
from lm_scale.models.compute import Compute
from lm_scale.models.gpt2 import GPT2Config
from lm_scale.models.llama import LlamaConfig
from lm_scale.models.roberta import RobertaConfig
from lm_scale.sharding import PRESETS, MeshShape, Rules, init_params, make_mesh

WHOLE = Rules(kv_heads=(), act_kv_heads=())  # key-value heads are not cut
NO_HEADS = Rules(act_heads=(), act_kv_heads=())  # ... of activations, all that are


@dataclass(frozen=True)
class Case:
    """A call of attention; K of H heads have keys."""

    length: int
    causal: bool
    head_dim: int = 64
    kv_heads: int = 4
    documents: bool = False
    dropout: float = 0.0
    rows: int = 6
    rules: Rules = Rules()

    def inputs(self, dtype):
        rng = np.random.default_rng(0)
        heads = (4, self.kv_heads, self.kv_heads, 4)
        return [
            jnp.asarray(rng.standard_normal((self.rows, self.length, n, self.head_dim)))
            .astype(dtype) for n in heads
        ]  # fmt: skip

    def biases(self):
        """Of f32 weights; rotary models, which may have fewer keys, have none here."""
        if self.kv_heads < 4:
            return None
        shape = 3, 4, self.head_dim
        return jnp.asarray(np.random.default_rng(2).standard_normal(shape), "float32")

    def mask(self):
        segments = None
        if self.documents:  # of odd lengths, other ones in each row
            ends = np.random.default_rng(1).integers(1, self.length, (self.rows, 2))
            places = np.arange(self.length)
            parts = [(places >= end[:, None]).astype(np.int32) for end in ends.T]
            segments = jnp.asarray(sum(parts))
        return Mask(causal=self.causal, segments=segments)


def with_gradients(kernel, rules, rate, q, k, v, biases, d_mixed, mask, key):
    def mix(q, k, v, biases):
        return attention(
            q, k, v, mask=mask, rules=rules, kernel=kernel, dropout_rate=rate, key=key,
            biases=None if biases is None else biases.astype(q.dtype),
        )  # fmt: skip

    mixed, pull = jax.vjp(mix, q, k, v, biases)
    return mixed, *(x for x in pull(d_mixed) if x is not None)


def both(case, dtype, monkeypatch):
    """By the plain path and by the kernel, rows and heads cut in two."""
    calls = []

    def interpreted(*args, **kwargs):
        calls.append(kwargs)
        return kernels.vmem(*args, **kwargs, interpret=True)

    monkeypatch.setattr(attention_module, "vmem", interpreted)
    rules, key = case.rules, jax.random.key(7)
    mesh = make_mesh(MeshShape(data=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        q, k, v, d_mixed = case.inputs(dtype)
        q, d_mixed = jax.device_put(
            (q, d_mixed), rules.spec("batch", "seq", "act_heads", None)
        )
        k, v = jax.device_put((k, v), rules.spec("batch", "seq", "act_kv_heads", None))
        mask = jax.device_put(case.mask(), rules.spec("batch", "seq"))
        biases = case.biases()
        if biases is not None:
            biases = jax.device_put(biases, rules.spec(None, "act_heads", None))
        given = (q, k, v, biases, d_mixed, mask, key)
        found = [
            jax.jit(partial(with_gradients, kernel, rules, case.dropout))(*given)
            for kernel in ("xla", "vmem")
        ]
    assert len(calls) == 1
    return found


CASES = {
    "one block, dropout": Case(128, False, dropout=0.1),
    "four rows a kernel": Case(128, True, rows=8),
    "blocks, causal, dropout": Case(384, True, dropout=0.3, rows=4),
    "blocks, both ways, documents, dropout": Case(
        256, False, documents=True, dropout=0.2
    ),
    "causal in documents, heads of 128": Case(256, True, head_dim=128, documents=True),
    "fewer keys": Case(128, True, kv_heads=2, rules=WHOLE),
    "parts of the code": Case(512, True, rows=2),
    "heads in one piece": Case(128, True, rules=NO_HEADS),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_plain_path(name, monkeypatch):
    """In f32, whose sums are in another order: 1e-5 of values around 1.

    Dropout takes the same weights of the same rows and heads, wherever these are.
    """
    plain, ours = both(CASES[name], jnp.float32, monkeypatch)
    for x, expected in zip(ours, plain, strict=True):
        assert jax.typeof(x) == jax.typeof(expected)
        least = 1e-5 * max(1.0, np.abs(expected).max())  # biases' are sums of tokens
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=least)


@pytest.mark.parametrize(
    "name", ["one block, dropout", "causal in documents, heads of 128"]
)
def test_in_bf16_it_is_as_near_as_the_plain_path(name, monkeypatch):
    """Of what f32 gives the two are equally far: bf16 rounds by up to 2**-8."""
    exact, _ = both(CASES[name], jnp.float32, monkeypatch)
    plain, ours = both(CASES[name], jnp.bfloat16, monkeypatch)
    for x, other, expected in zip(ours, plain, exact, strict=True):
        assert jax.typeof(x) == jax.typeof(other)
        size = jnp.sqrt(jnp.mean(jnp.square(expected)))
        error, usual = (
            float(jnp.sqrt(jnp.mean(jnp.square(y.astype("float32") - expected))) / size)
            for y in (x, other)
        )
        assert error < 1.2 * usual + 1e-4
        assert error < 0.02


SHAPE = {"vocab": 40, "positions": 128, "layers": 2, "embed": 48, "mlp": 24}
MODELS = {
    "gpt2": GPT2Config(**SHAPE | {"embed": 256}, heads=4, attention_dropout=0.2),
    "roberta": RobertaConfig(**SHAPE | {"embed": 256}, heads=4),
    "llama": LlamaConfig(**SHAPE, heads=8, kv_heads=2, head_dim=64),
}


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        *[(name, {"kv_heads": (), "act_kv_heads": ()}) for name in MODELS],
        ("gpt2", {"act_heads": (), "act_kv_heads": ()}),  # gathered before attention
    ],
)
def test_a_model_is_the_same_with_heads_side_by_side(name, rules, monkeypatch):
    """With the products before and after it, and dropout: hidden states and gradients.

    Rows, weights and heads cut; under remat `dots`. f32: 1e-4 of the largest.
    """
    interpreted = partial(kernels.vmem, interpret=True)
    monkeypatch.setattr(attention_module, "vmem", interpreted)
    rules = dataclasses.replace(PRESETS["fsdp_tp"], **rules)
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    tokens = np.random.default_rng(0).integers(3, 40, (4, 128)).astype(np.int32)
    found = []
    for kernel in ("xla", "vmem"):
        compute = Compute("float32", attention=kernel, rules=rules)
        model = build_model(MODELS[name], compute)
        graphdef, _ = nnx.split(model)

        def total(params, tokens, graphdef=graphdef):
            hidden = nnx.merge(graphdef, params)(tokens, key=jax.random.key(1))
            return jnp.sum(jnp.sin(hidden)), hidden

        with jax.set_mesh(mesh):
            params = init_params(model, rules, jax.random.key(0))
            rows = jax.device_put(tokens, rules.spec("batch", "seq"))
            grad = jax.jit(jax.grad(total, has_aux=True))
            found.append((grad.lower(params, rows).as_text(), grad(params, rows)))
    (plain_text, plain), (text, ours) = found
    assert text != plain_text
    for x, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        assert jax.typeof(x) == jax.typeof(expected)
        least = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(x, expected, rtol=0, atol=max(least, 1e-6))
