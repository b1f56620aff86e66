# SPDX-License-Identifier: Apache-2.0
"""Llama and its relatives: Llama 2 and 3, Mistral, Qwen 2 and 3 (dense), SmolLM.

A causal decoder (Touvron et al. 2023, arXiv:2302.13971): RMS norm before each sublayer,
rotary positions, grouped-query attention, SwiGLU. The relatives differ in what is
optional here: biases (Qwen 2), norms of queries and keys (Qwen 3), a sliding window
(Mistral 7B v0.1), a tied output, scaled rotary frequencies (Llama 3.1 and later).
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from lm_scale.errors import InputError
from lm_scale.models.attention import Cache, Mask, attention
from lm_scale.models.compute import Compute
from lm_scale.models.layers import (
    RMSNorm,
    centred,
    check_heads,
    check_shape,
    embed,
    hf_linear,
    hf_matrix,
    hf_vector,
    project,
    project_back,
    project_heads,
)
from lm_scale.models.layout import (
    from_residual,
    gather,
    spread,
    sum_over,
    to_residual,
)
from lm_scale.models.product import product
from lm_scale.models.rotary import FrequencyScaling, rotary_tables, rotate
from lm_scale.models.scan import layer_keys, scan_blocks
from lm_scale.sharding import Normal, param, stack, zeros

Kind = Literal["llama", "mistral", "qwen2", "qwen3"]
HF_TYPES = get_args(Kind)


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama; the defaults have 125 M parameters."""

    kind: Kind = "llama"  # `model_type` of the Hugging Face config
    vocab: int = 32_000  # rows of the token embedding
    positions: int = 2048  # longest sequence
    layers: int = 12
    embed: int = 768  # model width
    heads: int = 12  # of queries
    kv_heads: int = 4  # of keys and values; each serves heads / kv_heads of the queries
    head_dim: int = 64
    mlp: int = 2048  # width of the gated layer
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's queries and keys
    window: int | None = None  # a query sees so many keys, its own included; None: all
    tied: bool = False  # the output matrix is the token embedding
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: FrequencyScaling | None = None
    attention_dropout: float = 0.0  # of the attention weights
    norm_epsilon: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self):
        check_shape(self)
        self._check_kind()
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise InputError(
                f"model.heads = {self.heads} must be a multiple of "
                f"model.kv_heads = {self.kv_heads}."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise InputError(
                f"model.head_dim = {self.head_dim}: expected an even number, as the "
                f"rotary embedding turns pairs."
            )
        if self.window is not None and self.window < 1:
            raise InputError(f"model.window = {self.window}: expected 1 or more.")

    def train_flops_per_token(self, seq_len: int, head_share: float = 1.0) -> float:
        """Model FLOPs of forward and backward pass for one token of a sequence.

        3 × forward; forward = 2 × the weights of all matrices, output included, +
        attention's two products over the keys that a query sees on average.
        head_share: of the positions that have an output.
        """
        width = self.heads * self.head_dim
        block = self.embed * (2 * width + 2 * self.kv_heads * self.head_dim)
        block += 3 * self.embed * self.mlp
        seen = min(self.window or seq_len, seq_len)
        keys = seen - seen * (seen - 1) / (2 * seq_len)  # mean of min(i + 1, seen)
        matrices = self.layers * block + head_share * self.embed * self.vocab
        return 3 * 2 * (matrices + self.layers * 2 * width * keys)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "LlamaConfig":
        """From the content of a `config.json`; InputError for what we do not have."""
        kind = hf["model_type"]
        if hf["hidden_act"] != "silu":
            raise InputError(
                f"{kind} config: hidden_act = {hf['hidden_act']!r} is not supported "
                f"(supported: 'silu')."
            )
        rope = dict(hf["rope_parameters"])
        # Keys that transformers' model of this kind does not read mean nothing.
        attention_bias = kind in ("llama", "qwen3") and hf["attention_bias"]
        return cls(
            kind=kind,
            vocab=hf["vocab_size"],
            positions=hf["max_position_embeddings"],
            layers=hf["num_hidden_layers"],
            embed=hf["hidden_size"],
            heads=hf["num_attention_heads"],
            kv_heads=hf["num_key_value_heads"] or hf["num_attention_heads"],
            head_dim=hf.get("head_dim")
            or hf["hidden_size"] // hf["num_attention_heads"],
            mlp=hf["intermediate_size"],
            qkv_bias=attention_bias or kind == "qwen2",
            out_bias=attention_bias,
            mlp_bias=kind == "llama" and hf["mlp_bias"],
            qk_norm=kind == "qwen3",
            window=_window(hf),
            tied=hf["tie_word_embeddings"],
            rope_theta=rope.pop("rope_theta"),
            rope_scaling=FrequencyScaling.from_hf(rope),
            attention_dropout=hf["attention_dropout"],
            norm_epsilon=hf["rms_norm_eps"],
            init_std=hf["initializer_range"],
        )

    def to_hf(self) -> dict[str, Any]:
        """The arguments of `transformers`' config of this kind."""
        rope = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = self.rope_scaling.to_hf()
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
        settings = {
            "model_type": self.kind,
            "architectures": [names.get(self.kind, "Qwen3") + "ForCausalLM"],
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "num_hidden_layers": self.layers,
            "hidden_size": self.embed,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_epsilon,
            "initializer_range": self.init_std,
            "attention_dropout": self.attention_dropout,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {"rope_theta": self.rope_theta, **rope},
        }
        if self.kind in ("llama", "qwen3"):
            settings["attention_bias"] = self.qkv_bias
        if self.kind == "llama":
            settings["mlp_bias"] = self.mlp_bias
        if self.kind == "mistral":
            settings["sliding_window"] = self.window
        if self.kind in ("qwen2", "qwen3"):
            settings["use_sliding_window"] = self.window is not None
            settings["sliding_window"] = self.window
            settings["max_window_layers"] = 0 if self.window else self.layers
        return settings

    def _check_kind(self) -> None:
        """InputError for what `transformers` could not load once it is trained."""
        if self.kind not in HF_TYPES:
            raise InputError(
                f"model.kind = {self.kind!r}: expected one of {', '.join(HF_TYPES)}."
            )
        always = {"qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
        never = {
            "llama": ("qk_norm", "window"),
            "mistral": ("qk_norm", "qkv_bias", "out_bias", "mlp_bias"),
            "qwen2": ("qk_norm", "out_bias", "mlp_bias"),
            "qwen3": ("mlp_bias",),
        }
        if self.kind == "llama":
            check_heads(self)  # transformers does, though a head has its own width
        for name in never[self.kind]:
            if getattr(self, name):
                raise InputError(
                    f"model.{name} = {getattr(self, name)}: Hugging Face's "
                    f"{self.kind} has none. Choose another model.kind."
                )
        for name, value in always.get(self.kind, {}).items():
            if getattr(self, name) != value:
                raise InputError(
                    f"model.{name} = {getattr(self, name)}: Hugging Face's "
                    f"{self.kind} has it always. Set it, or choose another model.kind."
                )
        if self.kind in ("llama", "qwen3") and self.out_bias != self.qkv_bias:
            raise InputError(
                "model.qkv_bias and model.out_bias differ: Hugging Face's "
                f"{self.kind} has one switch for both. Set them alike."
            )


def _window(hf: dict[str, Any]) -> int | None:
    """The sliding window of all layers; InputError if layers differ."""
    if hf["model_type"] == "llama":
        return None
    kinds = set(hf.get("layer_types") or ())
    if len(kinds) > 1:
        raise InputError(
            f"{hf['model_type']} config: layer_types mixes {', '.join(sorted(kinds))}; "
            f"only one kind of attention in all layers is supported."
        )
    if kinds == {"full_attention"} or not hf.get("use_sliding_window", True):
        return None
    return hf.get("sliding_window")


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, compute: Compute):
        self.config, self.compute = config, compute
        D, H, K, N, F = (
            config.embed, config.heads, config.kv_heads, config.head_dim, config.mlp,
        )  # fmt: skip
        normal = Normal(config.init_std)
        self.norm1 = RMSNorm(D, config.norm_epsilon)
        self.q = param((D, H, N), ("embed", "heads", "head_dim"), normal)
        self.kv = param((D, 2, K, N), ("embed", None, "kv_heads", "head_dim"), normal)
        if config.qkv_bias:
            self.q_bias = param((H, N), ("heads", "head_dim"), zeros, decay=False)
            self.kv_bias = param(
                (2, K, N), (None, "kv_heads", "head_dim"), zeros, decay=False
            )
        if config.qk_norm:
            self.q_norm = RMSNorm(N, config.norm_epsilon)
            self.k_norm = RMSNorm(N, config.norm_epsilon)
        self.out = param((H, N, D), ("heads", "head_dim", "embed"), normal)
        if config.out_bias:
            self.out_bias = param((D,), (None,), zeros, decay=False)
        self.norm2 = RMSNorm(D, config.norm_epsilon)
        self.up = param((D, 2, F), ("embed", None, "mlp"), normal)  # gate, and up
        self.down = param((F, D), ("mlp", "embed"), normal)
        if config.mlp_bias:
            self.up_bias = param((2, F), (None, "mlp"), zeros, decay=False)
            self.down_bias = param((D,), (None,), zeros, decay=False)

    def __call__(self, x, *, tables, mask, key=None, cache=None):
        """x: [B T D]; cache: this layer's (k, v), both [B S K N], and their length."""
        attended, cache = self.attend(self.norm1(x), tables, mask, key, cache)
        x = x + attended
        return x + self.feed_forward(self.norm2(x)), cache

    def attend(self, x, tables, mask, key, cache):
        dtype, rules = x.dtype, self.compute.rules
        x = from_residual(x, rules, "act_heads", "act_kv_heads")
        with jax.named_scope("attention"):
            q = project_heads(x, self.q[...], self.compute)
            k, v = project(x, self.kv[...], self.compute)
            if self.config.qkv_bias:
                q = q + spread(self.q_bias[...], q)
                k = k + spread(self.kv_bias[...][0], k)
                v = v + spread(self.kv_bias[...][1], v)
            if self.config.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, tables), rotate(k, tables)
            if cache is not None:
                k_past, v_past, length = cache
                k = jax.lax.dynamic_update_slice_in_dim(k_past, k, length, axis=1)
                v = jax.lax.dynamic_update_slice_in_dim(v_past, v, length, axis=1)
                cache = (k, v)
            mixed = attention(
                q, k, v, mask=mask, rules=rules, key=key, kernel=self.compute.attention,
                dropout_rate=self.config.attention_dropout,
            )  # fmt: skip
            out = project_back(mixed, self.out[...], self.compute)
            out = to_residual(out, rules)
            if self.config.out_bias:
                out = out + spread(self.out_bias[...].astype(dtype), out)
            return out, cache

    def feed_forward(self, x):
        dtype, rules = x.dtype, self.compute.rules
        x = from_residual(x, rules, "act_mlp")
        with jax.named_scope("mlp"):
            bias = self.up_bias[...] if self.config.mlp_bias else None
            gate, up = project(x, self.up[...], self.compute, bias)
            down = product(
                "BTF,FD->BTD", jax.nn.silu(gate) * up, self.down[...], self.compute,
                sum_over("act_mlp", rules),
            )  # fmt: skip
            down = to_residual(down, rules)
            if self.config.mlp_bias:
                down = down + spread(self.down_bias[...].astype(dtype), down)
            return down


class Llama(nnx.Module):
    """Declared by its constructor; give it weights with `nnx.merge` to call it."""

    def __init__(self, config: LlamaConfig, compute: Compute):
        self.config, self.compute = config, compute
        D, normal = config.embed, Normal(config.init_std)
        self.tokens = param((config.vocab, D), ("vocab", "embed"), normal)
        self.blocks = stack(Block(config, compute), config.layers)
        self.final_norm = RMSNorm(D, config.norm_epsilon)
        if not config.tied:
            self.output = param((config.vocab, D), ("vocab", "embed"), normal)

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
        length, rules = tokens.shape[1], self.compute.rules
        mask = Mask(
            causal=True, window=self.config.window, segments=segments,
            positions=positions,
        )  # fmt: skip
        if positions is None:
            positions = jax.reshard(jnp.arange(length), rules.spec("seq"))
        assert positions is not None
        x = embed(self.tokens, tokens, self.compute)
        tables = self.rotary_tables(positions)

        def apply(block, x, key):
            return block(x, tables=tables, mask=mask, key=key)[0], None

        keys = layer_keys(key, self.config.layers)
        x, _ = scan_blocks(self.blocks, apply, x, keys, self.compute)
        return from_residual(self.final_norm(x), self.compute.rules, "act_vocab")

    def rotary_tables(self, positions: Int[Array, "*B T"]):
        config = self.config
        return rotary_tables(
            positions, config.head_dim, config.rope_theta, config.rope_scaling
        )

    def head(
        self, hidden: Float[Array, "B T D"], *, centre: bool = False
    ) -> Float[Array, "B T V"]:
        """Next-token logits, f32. centre: those of a token have the mean 0."""
        output = self.tokens if self.config.tied else self.output
        with jax.named_scope("head"):
            table = centred(output[...]) if centre else output[...]
            return jnp.einsum(
                "BTD,VD->BTV", hidden, gather(table, self.compute),
                preferred_element_type=jnp.float32,
                out_sharding=self.compute.rules.spec("batch", "seq", "act_vocab"),
            )  # fmt: skip

    def empty_cache(self, batch: int, length: int) -> Cache:
        """A cache for `batch` rows of at most `length` tokens."""
        config, rules = self.config, self.compute.rules
        zeros = jnp.zeros(
            (config.layers, batch, length, config.kv_heads, config.head_dim),
            self.compute.dtype,
            out_sharding=rules.spec("layers", "batch", None, "act_kv_heads", None),
        )
        return Cache(zeros, zeros, jnp.zeros((), jnp.int32))

    def decode(
        self, tokens: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Logits after the last of `tokens`, which follow those in `cache`."""
        length = tokens.shape[1]
        places = cache.length + jnp.arange(length)
        mask = Mask(
            causal=True, window=self.config.window,
            positions=places, key_positions=jnp.arange(cache.k.shape[2]),
        )  # fmt: skip
        tables = self.rotary_tables(places)
        x = embed(self.tokens, tokens, self.compute)

        def apply(block, x, past):
            return block(x, tables=tables, mask=mask, cache=(*past, cache.length))

        x, (k, v) = scan_blocks(self.blocks, apply, x, (cache.k, cache.v), self.compute)
        logits = self.head(self.final_norm(x[:, -1:]))[:, 0]
        return logits, Cache(k, v, cache.length + length)


_LAYER = "model.layers.{layer}."
_QKV = [_LAYER + f"self_attn.{part}_proj" for part in "qkv"]
_UP = [_LAYER + f"mlp.{part}_proj" for part in ("gate", "up")]
HF_NAMES = {
    "tokens": hf_matrix("model.embed_tokens.weight"),
    "blocks.norm1.scale": hf_vector(_LAYER + "input_layernorm.weight"),
    "blocks.q": hf_linear(_QKV[0] + ".weight"),
    "blocks.q_bias": hf_vector(_QKV[0] + ".bias"),
    "blocks.kv": hf_linear(*(name + ".weight" for name in _QKV[1:]), stack_axis=1),
    "blocks.kv_bias": hf_vector(*(name + ".bias" for name in _QKV[1:])),
    "blocks.q_norm.scale": hf_vector(_LAYER + "self_attn.q_norm.weight"),
    "blocks.k_norm.scale": hf_vector(_LAYER + "self_attn.k_norm.weight"),
    "blocks.out": hf_linear(_LAYER + "self_attn.o_proj.weight", inputs=2),
    "blocks.out_bias": hf_vector(_LAYER + "self_attn.o_proj.bias"),
    "blocks.norm2.scale": hf_vector(_LAYER + "post_attention_layernorm.weight"),
    "blocks.up": hf_linear(*(name + ".weight" for name in _UP), stack_axis=1),
    "blocks.up_bias": hf_vector(*(name + ".bias" for name in _UP)),
    "blocks.down": hf_linear(_LAYER + "mlp.down_proj.weight"),
    "blocks.down_bias": hf_vector(_LAYER + "mlp.down_proj.bias"),
    "final_norm.scale": hf_vector("model.norm.weight"),
    "output": hf_matrix("lm_head.weight"),
}
