# SPDX-License-Identifier: Apache-2.0
"""GPT-2: a causal decoder (Radford et al. 2019; `GPT2LMHeadModel` in transformers).

Pre-norm blocks, learned positions, tanh-approximated GELU, output tied to the token
embedding. The weights are declared in Hugging Face's order of computation; HF_NAMES at
the end says where each lies in a Hugging Face checkpoint.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from lm_scale.errors import InputError
from lm_scale.models.attention import Cache, Mask, attention
from lm_scale.models.compute import Compute
from lm_scale.models.dropout import add_dropped, dropout, split_key
from lm_scale.models.layers import (
    LayerNorm,
    centred,
    check_heads,
    check_shape,
    embed,
    gelu,
    hf_matrix,
    hf_vector,
    project,
    project_back,
)
from lm_scale.models.layout import (
    from_residual,
    gather,
    shared,
    spread,
    sum_over,
    to_residual,
)
from lm_scale.models.product import product
from lm_scale.models.scan import layer_keys, scan_blocks
from lm_scale.sharding import Normal, param, stack, zeros


@dataclass(frozen=True)
class GPT2Config:
    """The shape of a GPT-2; the defaults are the 124 M parameter model."""

    vocab: int = 50_257  # rows of the token embedding
    positions: int = 1024  # longest sequence
    layers: int = 12
    embed: int = 768  # model width
    heads: int = 12  # of embed / heads features each
    mlp: int = 3072  # width between the two MLP matrices
    embed_dropout: float = 0.1
    attention_dropout: float = 0.1  # of the attention weights
    residual_dropout: float = 0.1  # of each sublayer's output
    norm_epsilon: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        check_shape(self)
        check_heads(self)

    def train_flops_per_token(self, seq_len: int, head_share: float = 1.0) -> float:
        """Model FLOPs of forward and backward pass for one token of a sequence.

        3 × forward (the backward pass costs twice the forward); forward = 2 × the
        weights of all matrices, output included, + attention's two products over the
        (seq_len + 1) / 2 keys that a causal query sees on average. Lookups, norms and
        recomputation count nothing. head_share: of the positions that have an output.
        """
        block = 4 * self.embed**2 + 2 * self.embed * self.mlp
        attend = 2 * self.embed * (seq_len + 1) / 2
        matrices = self.layers * block + head_share * self.embed * self.vocab
        return 3 * 2 * (matrices + self.layers * attend)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "GPT2Config":
        """From the content of a `config.json`; InputError for what we do not have."""
        for name, supported in _HF_SUPPORTED.items():
            if hf.get(name, supported[0]) not in supported:
                raise InputError(
                    f"GPT-2 config: {name} = {hf[name]!r} is not supported "
                    f"(supported: {', '.join(map(repr, supported))})."
                )
        return cls(
            vocab=hf["vocab_size"],
            positions=hf["n_positions"],
            layers=hf["n_layer"],
            embed=hf["n_embd"],
            heads=hf["n_head"],
            mlp=hf.get("n_inner") or 4 * hf["n_embd"],
            embed_dropout=hf["embd_pdrop"],
            attention_dropout=hf["attn_pdrop"],
            residual_dropout=hf["resid_pdrop"],
            norm_epsilon=hf["layer_norm_epsilon"],
            init_std=hf["initializer_range"],
        )

    def to_hf(self) -> dict[str, Any]:
        """The arguments of `transformers.GPT2Config`."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": self.vocab,
            "n_positions": self.positions,
            "n_layer": self.layers,
            "n_embd": self.embed,
            "n_head": self.heads,
            "n_inner": self.mlp,
            "embd_pdrop": self.embed_dropout,
            "attn_pdrop": self.attention_dropout,
            "resid_pdrop": self.residual_dropout,
            "layer_norm_epsilon": self.norm_epsilon,
            "initializer_range": self.init_std,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        }


_HF_SUPPORTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config, compute: Compute):
        self.config, self.compute = config, compute
        D, H, F = config.embed, config.heads, config.mlp
        N = D // H
        normal = Normal(config.init_std)
        # Section 2.3: residual projections start smaller by sqrt(number of them).
        residual = Normal(config.init_std * (2 * config.layers) ** -0.5)
        self.norm1 = LayerNorm(D, config.norm_epsilon)
        self.qkv = param((D, 3, H, N), ("embed", None, "heads", "head_dim"), normal)
        self.qkv_bias = param(
            (3, H, N), (None, "heads", "head_dim"), zeros, decay=False
        )
        self.out = param((H, N, D), ("heads", "head_dim", "embed"), residual)
        self.out_bias = param((D,), (None,), zeros, decay=False)
        self.norm2 = LayerNorm(D, config.norm_epsilon)
        self.up = param((D, F), ("embed", "mlp"), normal)
        self.up_bias = param((F,), ("mlp",), zeros, decay=False)
        self.down = param((F, D), ("mlp", "embed"), residual)
        self.down_bias = param((D,), (None,), zeros, decay=False)

    def __call__(self, x, *, mask, key=None, cache=None):
        """x: [B T D]; cache: this layer's (k, v), both [B S H N], and their length."""
        attention_key, out_key, mlp_key = split_key(key, 3)
        attended, cache = self.attend(self.norm1(x), mask, attention_key, cache)
        rate, dtype = self.config.residual_dropout, x.dtype
        bias = self.out_bias[...].astype(dtype)
        x = add_dropped(x, attended, bias, rate, out_key)
        mlp, bias = self.feed_forward(self.norm2(x)), self.down_bias[...].astype(dtype)
        return add_dropped(x, mlp, bias, rate, mlp_key), cache

    def attend(self, x, mask, key, cache):
        """Without the last bias."""
        rules = self.compute.rules
        x = from_residual(x, rules, "act_heads")
        with jax.named_scope("attention"):
            biases = self.qkv_bias[...]
            early = None if cache is None else biases  # what is kept has them
            q, k, v = project(x, self.qkv[...], self.compute, early)
            if cache is not None:
                k_past, v_past, length = cache
                k = jax.lax.dynamic_update_slice_in_dim(k_past, k, length, axis=1)
                v = jax.lax.dynamic_update_slice_in_dim(v_past, v, length, axis=1)
                cache = (k, v)
            mixed = attention(
                q, k, v, mask=mask, rules=rules, key=key, kernel=self.compute.attention,
                dropout_rate=self.config.attention_dropout,
                biases=biases if cache is None else None,
            )  # fmt: skip
            out = project_back(mixed, self.out[...], self.compute)
            return to_residual(out, rules), cache

    def feed_forward(self, x):
        """Without the last bias."""
        dtype, rules = x.dtype, self.compute.rules
        x = from_residual(x, rules, "act_mlp")
        with jax.named_scope("mlp"):
            up = product(
                "BTD,DF->BTF", x, self.up[...], self.compute,
                rules.spec("batch", "seq", "act_mlp"),
            )  # fmt: skip
            up = gelu(up + spread(self.up_bias[...].astype(dtype), up), True)
            down = product(
                "BTF,FD->BTD", up, self.down[...], self.compute,
                sum_over("act_mlp", rules),
            )  # fmt: skip
            return to_residual(down, rules)


class GPT2(nnx.Module):
    """Declared by its constructor; give it weights with `nnx.merge` to call it."""

    def __init__(self, config: GPT2Config, compute: Compute):
        self.config, self.compute = config, compute
        D, normal = config.embed, Normal(config.init_std)
        self.tokens = param((config.vocab, D), ("vocab", "embed"), normal)
        self.positions = param((config.positions, D), (None, "embed"), normal)
        self.blocks = stack(Block(config, compute), config.layers)
        self.final_norm = LayerNorm(D, config.norm_epsilon)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "T"] | Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; `head` makes logits of them.

        `segments` numbers the documents of a row: attention stays inside each.
        `positions` default to 0, 1, 2 ...; a token sees none that is after its own.
        `key` switches dropout on.
        """
        mask = Mask(causal=True, segments=segments, positions=positions)
        embed_key, blocks_key = split_key(key, 2)
        x = self.embed_tokens(tokens, positions)
        x = dropout(x, self.config.embed_dropout, embed_key)

        def apply(block, x, key):
            return block(x, mask=mask, key=key)[0], None

        keys = layer_keys(blocks_key, self.config.layers)
        x, _ = scan_blocks(self.blocks, apply, x, keys, self.compute)
        return from_residual(self.final_norm(x), self.compute.rules, "act_vocab")

    def embed_tokens(self, tokens, positions):
        x = embed(self.tokens, tokens, self.compute)
        if positions is not None and positions.ndim == 2:
            return x + embed(self.positions, positions, self.compute)
        rows, rules = gather(self.positions[...], self.compute), self.compute.rules
        if positions is None:
            rows = rows[: tokens.shape[1]]
        else:
            whole = jax.reshard(positions, rules.spec(None))
            rows = rows.at[whole].get(out_sharding=jax.typeof(rows).sharding.spec)
        rows = shared(rows, rules, rules.spec("residual_seq", None))
        return x + spread(rows, x)

    def head(
        self, hidden: Float[Array, "B T D"], *, centre: bool = False
    ) -> Float[Array, "B T V"]:
        """Next-token logits, f32. centre: those of a token have the mean 0."""
        with jax.named_scope("head"):
            table = centred(self.tokens[...]) if centre else self.tokens[...]
            return jnp.einsum(
                "BTD,VD->BTV", hidden, gather(table, self.compute),
                preferred_element_type=jnp.float32,
                out_sharding=self.compute.rules.spec("batch", "seq", "act_vocab"),
            )  # fmt: skip

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of at most `length` tokens."""
        config, rules = self.config, self.compute.rules
        heads = (config.heads, config.embed // config.heads)
        zeros = jnp.zeros(
            (config.layers, batch, length, *heads), self.compute.dtype,
            out_sharding=rules.spec("layers", "batch", None, "act_heads", None),
        )  # fmt: skip
        return Cache(zeros, zeros, jnp.zeros((), jnp.int32))

    def decode(
        self, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after the last of `tokens`, which follow those in `cache`."""
        length = tokens.shape[1]
        places = cache.length + jnp.arange(length)
        mask = Mask(
            causal=True, positions=places, key_positions=jnp.arange(cache.k.shape[2])
        )
        x = self.embed_tokens(tokens, jnp.broadcast_to(places, tokens.shape))

        def apply(block, x, past):
            return block(x, mask=mask, cache=(*past, cache.length))

        x, (k, v) = scan_blocks(self.blocks, apply, x, (cache.k, cache.v), self.compute)
        logits = self.head(self.final_norm(x[:, -1:]))[:, 0]
        return logits, Cache(k, v, cache.length + length)


HF_NAMES = {
    "tokens": hf_matrix("transformer.wte.weight"),
    "positions": hf_matrix("transformer.wpe.weight"),
    "blocks.norm1.scale": hf_vector("transformer.h.{layer}.ln_1.weight"),
    "blocks.norm1.bias": hf_vector("transformer.h.{layer}.ln_1.bias"),
    "blocks.qkv": hf_matrix("transformer.h.{layer}.attn.c_attn.weight"),
    "blocks.qkv_bias": hf_vector("transformer.h.{layer}.attn.c_attn.bias"),
    "blocks.out": hf_matrix("transformer.h.{layer}.attn.c_proj.weight", inputs=2),
    "blocks.out_bias": hf_vector("transformer.h.{layer}.attn.c_proj.bias"),
    "blocks.norm2.scale": hf_vector("transformer.h.{layer}.ln_2.weight"),
    "blocks.norm2.bias": hf_vector("transformer.h.{layer}.ln_2.bias"),
    "blocks.up": hf_matrix("transformer.h.{layer}.mlp.c_fc.weight"),
    "blocks.up_bias": hf_vector("transformer.h.{layer}.mlp.c_fc.bias"),
    "blocks.down": hf_matrix("transformer.h.{layer}.mlp.c_proj.weight"),
    "blocks.down_bias": hf_vector("transformer.h.{layer}.mlp.c_proj.bias"),
    "final_norm.scale": hf_vector("transformer.ln_f.weight"),
    "final_norm.bias": hf_vector("transformer.ln_f.bias"),
}
