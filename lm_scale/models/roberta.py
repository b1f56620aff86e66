# SPDX-License-Identifier: Apache-2.0
"""RoBERTa: a bidirectional encoder with a masked-LM head (Liu et al. 2019;
`RobertaForMaskedLM` in transformers).

Post-norm blocks as in BERT, learned positions that begin behind the padding id, exact
GELU, output tied to the token embedding.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from lm_scale.errors import InputError
from lm_scale.models.attention import Mask, attention
from lm_scale.models.compute import Compute
from lm_scale.models.dropout import add_dropped, dropout, split_key
from lm_scale.models.layers import (
    LayerNorm,
    centred,
    check_heads,
    check_shape,
    embed,
    gelu,
    hf_linear,
    hf_matrix,
    hf_vector,
    project,
    project_back,
)
from lm_scale.models.layout import (
    from_residual,
    gather,
    spread,
    sum_over,
    to_residual,
)
from lm_scale.models.product import product
from lm_scale.models.scan import layer_keys, scan_blocks
from lm_scale.sharding import Normal, param, stack, zeros


@dataclass(frozen=True)
class RobertaConfig:
    """The shape of a RoBERTa; the defaults are roberta-base."""

    vocab: int = 50_265  # rows of the token embedding
    positions: int = 512  # longest sequence; the table has pad_id + 1 rows more
    layers: int = 12
    embed: int = 768  # model width
    heads: int = 12  # of embed / heads features each
    mlp: int = 3072  # width between the two MLP matrices
    token_types: int = 1  # rows of the token type embedding; all tokens are of type 0
    pad_id: int = 1  # positions count from pad_id + 1, and padding stands at pad_id
    dropout: float = 0.1  # of the embeddings and of each sublayer's output
    attention_dropout: float = 0.1  # of the attention weights
    norm_epsilon: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        check_shape(self)
        check_heads(self)

    def train_flops_per_token(self, seq_len: int, head_share: float = 1.0) -> float:
        """Model FLOPs of forward and backward pass for one token of a sequence.

        3 × forward; forward = 2 × the weights of all matrices, the head's included, +
        attention's two products over all seq_len keys. head_share: of the positions,
        those at which the head works.
        """
        block = 4 * self.embed**2 + 2 * self.embed * self.mlp
        head = self.embed**2 + self.embed * self.vocab
        attend = 2 * self.embed * seq_len
        return 3 * 2 * (self.layers * (block + attend) + head_share * head)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "RobertaConfig":
        """From the content of a `config.json`; InputError for what we do not have."""
        for name, supported in _HF_SUPPORTED.items():
            if hf.get(name, supported[0]) not in supported:
                raise InputError(
                    f"RoBERTa config: {name} = {hf[name]!r} is not supported "
                    f"(supported: {', '.join(map(repr, supported))})."
                )
        if hf["pad_token_id"] is None:
            raise InputError(
                "RoBERTa config: pad_token_id is null, but positions are counted from "
                "it. Set it to the tokenizer's padding token (1 in roberta-base)."
            )
        return cls(
            vocab=hf["vocab_size"],
            positions=hf["max_position_embeddings"] - hf["pad_token_id"] - 1,
            layers=hf["num_hidden_layers"],
            embed=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            mlp=hf["intermediate_size"],
            token_types=hf["type_vocab_size"],
            pad_id=hf["pad_token_id"],
            dropout=hf["hidden_dropout_prob"],
            attention_dropout=hf["attention_probs_dropout_prob"],
            norm_epsilon=hf["layer_norm_eps"],
            init_std=hf["initializer_range"],
        )

    def to_hf(self) -> dict[str, Any]:
        """The arguments of `transformers.RobertaConfig`."""
        return {
            "model_type": "roberta",
            "architectures": ["RobertaForMaskedLM"],
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions + self.pad_id + 1,
            "num_hidden_layers": self.layers,
            "hidden_size": self.embed,
            "num_attention_heads": self.heads,
            "intermediate_size": self.mlp,
            "type_vocab_size": self.token_types,
            "pad_token_id": self.pad_id,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "layer_norm_eps": self.norm_epsilon,
            "initializer_range": self.init_std,
            "hidden_act": "gelu",
            "tie_word_embeddings": True,
        }


_HF_SUPPORTED = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


class Block(nnx.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: RobertaConfig, compute: Compute):
        self.config, self.compute = config, compute
        D, H, F = config.embed, config.heads, config.mlp
        N = D // H
        normal = Normal(config.init_std)
        self.qkv = param((D, 3, H, N), ("embed", None, "heads", "head_dim"), normal)
        self.qkv_bias = param(
            (3, H, N), (None, "heads", "head_dim"), zeros, decay=False
        )
        self.out = param((H, N, D), ("heads", "head_dim", "embed"), normal)
        self.out_bias = param((D,), (None,), zeros, decay=False)
        self.norm1 = LayerNorm(D, config.norm_epsilon)
        self.up = param((D, F), ("embed", "mlp"), normal)
        self.up_bias = param((F,), ("mlp",), zeros, decay=False)
        self.down = param((F, D), ("mlp", "embed"), normal)
        self.down_bias = param((D,), (None,), zeros, decay=False)
        self.norm2 = LayerNorm(D, config.norm_epsilon)

    def __call__(self, x, *, mask, key=None):
        """x: [B T D]."""
        attention_key, out_key, mlp_key = split_key(key, 3)
        attended = self.attend(x, mask, attention_key)
        rate, dtype = self.config.dropout, x.dtype
        bias = self.out_bias[...].astype(dtype)
        x = self.norm1(add_dropped(x, attended, bias, rate, out_key))
        mlp, bias = self.feed_forward(x), self.down_bias[...].astype(dtype)
        return self.norm2(add_dropped(x, mlp, bias, rate, mlp_key))

    def attend(self, x, mask, key):
        """Without the last bias."""
        rules = self.compute.rules
        x = from_residual(x, rules, "act_heads")
        with jax.named_scope("attention"):
            q, k, v = project(x, self.qkv[...], self.compute)
            mixed = attention(
                q, k, v, mask=mask, rules=rules, key=key, kernel=self.compute.attention,
                dropout_rate=self.config.attention_dropout,
                biases=self.qkv_bias[...],
            )  # fmt: skip
            out = project_back(mixed, self.out[...], self.compute)
            return to_residual(out, rules)

    def feed_forward(self, x):
        """Without the last bias."""
        dtype, rules = x.dtype, self.compute.rules
        x = from_residual(x, rules, "act_mlp")
        with jax.named_scope("mlp"):
            up = product(
                "BTD,DF->BTF", x, self.up[...], self.compute,
                rules.spec("batch", "seq", "act_mlp"),
            )  # fmt: skip
            up = gelu(up + spread(self.up_bias[...].astype(dtype), up), False)
            down = product(
                "BTF,FD->BTD", up, self.down[...], self.compute,
                sum_over("act_mlp", rules),
            )  # fmt: skip
            return to_residual(down, rules)


class Roberta(nnx.Module):
    """Declared by its constructor; give it weights with `nnx.merge` to call it."""

    def __init__(self, config: RobertaConfig, compute: Compute):
        self.config, self.compute = config, compute
        D, normal = config.embed, Normal(config.init_std)
        rows = config.positions + config.pad_id + 1
        self.tokens = param((config.vocab, D), ("vocab", "embed"), normal)
        self.positions = param((rows, D), (None, "embed"), normal)
        self.types = param((config.token_types, D), (None, "embed"), normal)
        self.embed_norm = LayerNorm(D, config.norm_epsilon)
        self.blocks = stack(Block(config, compute), config.layers)
        self.dense = param((D, D), ("embed", None), normal)
        self.dense_bias = param((D,), (None,), zeros, decay=False)
        self.head_norm = LayerNorm(D, config.norm_epsilon)
        self.head_bias = param((config.vocab,), ("vocab",), zeros, decay=False)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segments: Int[Array, "B T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """Final hidden states; `head` makes logits of them.

        `segments` numbers the documents of a row (padding apart): attention stays
        inside each. `positions` are counted from 0; by default, which is transformers'
        rule, only tokens that are not padding count. `key` switches dropout on.
        """
        embed_key, blocks_key = split_key(key, 2)
        x = self.embed_tokens(tokens, positions)
        x = dropout(self.embed_norm(x), self.config.dropout, embed_key)

        def apply(block, x, key):
            return block(x, mask=Mask(segments=segments), key=key), None

        keys = layer_keys(blocks_key, self.config.layers)
        x, _ = scan_blocks(self.blocks, apply, x, keys, self.compute)
        return from_residual(x, self.compute.rules, "act_embed")

    def embed_tokens(self, tokens, positions):
        pad_id = self.config.pad_id
        if positions is None:
            whole_seq = self.compute.rules.spec("batch", None)
            real = (jax.reshard(tokens, whole_seq) != pad_id).astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real - 1
        x = embed(self.tokens, tokens, self.compute)
        token_type = spread(gather(self.types[...], self.compute)[0], x)
        places = positions + (pad_id + 1)  # where the table begins
        return x + token_type + embed(self.positions, places, self.compute)

    def head(
        self, hidden: Float[Array, "B T D"], *, centre: bool = False
    ) -> Float[Array, "B T V"]:
        """Logits of the token that stood at each position, f32.

        centre: those of a token have the mean 0.
        """
        dtype, rules = hidden.dtype, self.compute.rules
        with jax.named_scope("head"):
            x = jnp.einsum(
                "BTD,DG->BTG", hidden, gather(self.dense[...], self.compute),
                out_sharding=rules.spec("batch", "seq", "act_embed"),
            )  # fmt: skip
            x = x + spread(self.dense_bias[...].astype(dtype), x)
            # Made once: by itself XLA makes it anew for each part of the vocabulary.
            x = jax.lax.optimization_barrier(self.head_norm(gelu(x, False)))
            table, bias = self.tokens[...], self.head_bias[...]
            if centre:
                table, bias = centred(table), centred(bias)
            logits = jnp.einsum(
                "BTD,VD->BTV", x, gather(table, self.compute),
                preferred_element_type=jnp.float32,
                out_sharding=rules.spec("batch", "seq", "act_vocab"),
            )  # fmt: skip
            return logits + spread(bias, logits)


_LAYER = "roberta.encoder.layer.{layer}."
_QKV = [_LAYER + f"attention.self.{part}" for part in ("query", "key", "value")]
HF_NAMES = {
    "tokens": hf_matrix("roberta.embeddings.word_embeddings.weight"),
    "positions": hf_matrix("roberta.embeddings.position_embeddings.weight"),
    "types": hf_matrix("roberta.embeddings.token_type_embeddings.weight"),
    "embed_norm.scale": hf_vector("roberta.embeddings.LayerNorm.weight"),
    "embed_norm.bias": hf_vector("roberta.embeddings.LayerNorm.bias"),
    "blocks.qkv": hf_linear(*(name + ".weight" for name in _QKV), stack_axis=1),
    "blocks.qkv_bias": hf_vector(*(name + ".bias" for name in _QKV)),
    "blocks.out": hf_linear(_LAYER + "attention.output.dense.weight", inputs=2),
    "blocks.out_bias": hf_vector(_LAYER + "attention.output.dense.bias"),
    "blocks.norm1.scale": hf_vector(_LAYER + "attention.output.LayerNorm.weight"),
    "blocks.norm1.bias": hf_vector(_LAYER + "attention.output.LayerNorm.bias"),
    "blocks.up": hf_linear(_LAYER + "intermediate.dense.weight"),
    "blocks.up_bias": hf_vector(_LAYER + "intermediate.dense.bias"),
    "blocks.down": hf_linear(_LAYER + "output.dense.weight"),
    "blocks.down_bias": hf_vector(_LAYER + "output.dense.bias"),
    "blocks.norm2.scale": hf_vector(_LAYER + "output.LayerNorm.weight"),
    "blocks.norm2.bias": hf_vector(_LAYER + "output.LayerNorm.bias"),
    "dense": hf_linear("lm_head.dense.weight"),
    "dense_bias": hf_vector("lm_head.dense.bias"),
    "head_norm.scale": hf_vector("lm_head.layer_norm.weight"),
    "head_norm.bias": hf_vector("lm_head.layer_norm.bias"),
    "head_bias": hf_vector("lm_head.bias"),
}
