# SPDX-License-Identifier: Apache-2.0
"""A plain training loop in Flax and optax, as one wrote it before meshes: `pmap`.

The models of the old scripts in short: attention as `flax.linen` has it, layer after
layer, dropout by `jax.random`, the head at all places, a loss of one-hot labels,
weights replicated, gradients averaged by `pmean`.
"""

import flax.jax_utils
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.step import work
from benchmarks.step.turns import Run
from lm_scale.models import RobertaConfig


class Block(nn.Module):
    """Norms before the sublayers (GPT-2), or behind them (RoBERTa)."""

    model: work.ModelConfig

    @nn.compact
    def __call__(self, x, mask):
        first = isinstance(self.model, RobertaConfig)  # the sublayer comes first
        norm1, norm2 = nn.LayerNorm(epsilon=1e-5), nn.LayerNorm(epsilon=1e-5)
        rate = self.model.attention_dropout
        attend = nn.MultiHeadDotProductAttention(
            self.model.heads, dropout_rate=rate, deterministic=False,
            broadcast_dropout=False,
        )  # fmt: skip
        up, down = nn.Dense(self.model.mlp), nn.Dense(self.model.embed)
        drop = nn.Dropout(rate, deterministic=False)

        def mlp(x):
            return drop(down(nn.gelu(up(x), approximate=not first)))

        if first:
            x = norm1(x + drop(attend(x, mask=mask)))
            return norm2(x + mlp(x))
        x = x + drop(attend(norm1(x), mask=mask))
        return x + mlp(norm2(x))


class LanguageModel(nn.Module):
    """Logits of all places; the output is tied to the token embedding."""

    model: work.ModelConfig

    @nn.compact
    def __call__(self, tokens):
        encoder = isinstance(self.model, RobertaConfig)
        width = self.model.embed
        embed = nn.Embed(
            self.model.vocab, width, embedding_init=nn.initializers.normal(0.02)
        )
        places = nn.Embed(
            self.model.positions, width, embedding_init=nn.initializers.normal(0.02)
        )
        x = embed(tokens) + places(jnp.arange(tokens.shape[1]))
        if encoder:
            x = nn.LayerNorm(epsilon=1e-5)(x)
        x = nn.Dropout(self.model.attention_dropout, deterministic=False)(x)
        mask = None if encoder else nn.make_causal_mask(tokens)
        for _ in range(self.model.layers):
            x = Block(self.model)(x, mask)
        if not encoder:
            return embed.attend(nn.LayerNorm(epsilon=1e-5)(x))
        x = nn.LayerNorm(epsilon=1e-5)(nn.gelu(nn.Dense(width)(x), approximate=False))
        bias = self.param("head_bias", nn.initializers.zeros, (self.model.vocab,))
        return embed.attend(x) + bias


def make(asked: work.Work, devices: int) -> Run:
    """With `pmap` over so many devices."""
    jax.config.update("jax_num_cpu_devices", devices)
    model = LanguageModel(asked.model)
    optimizer = optax.adamw(
        work.LEARNING_RATE, *work.BETAS, weight_decay=work.WEIGHT_DECAY
    )
    given = asked.batch()
    tokens, labels = (
        given[name].reshape(devices, -1, asked.seq_len) for name in ("tokens", "labels")
    )

    def loss_of(params, tokens, labels, key):
        logits = model.apply({"params": params}, tokens, rngs={"dropout": key})
        there = labels >= 0
        onehot = jax.nn.one_hot(labels, logits.shape[-1])
        losses = optax.softmax_cross_entropy(logits, onehot)
        # Of devices with as many labels each, as here, the mean of means is the mean.
        return jnp.sum(losses * there) / jnp.sum(there)

    def train_step(params, state, key, tokens, labels):
        key, now = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_of)(params, tokens, labels, now)
        grads = jax.lax.pmean(grads, "batch")
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, key, jax.lax.pmean(loss, "batch")

    step = jax.pmap(train_step, axis_name="batch", donate_argnums=(0, 1, 2))
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.jit(model.init)(rngs, tokens[0])["params"]
    params, state = flax.jax_utils.replicate((params, optimizer.init(params)))
    keys = jax.random.split(jax.random.key(2), devices)
    tokens, labels = jax.device_put((tokens, labels))

    def run(steps: int) -> float:
        nonlocal params, state, keys
        for _ in range(steps):
            params, state, keys, loss = step(params, state, keys, tokens, labels)
        return float(loss[0])

    return run
