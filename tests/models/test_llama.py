# SPDX-License-Identifier: Apache-2.0
"""Llama and its relatives: configs, what is refused, rotary positions, window.

The numbers are compared with transformers' in test_parity_live.py.
"""

import cmath
import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx

from lm_scale import hf
from lm_scale.errors import InputError
from lm_scale.models import build_model
from lm_scale.models.compute import Compute
from lm_scale.models.llama import LlamaConfig
from lm_scale.models.rotary import FrequencyScaling, rotary_tables, rotate
from lm_scale.shapes import parameter_count

TINY = LlamaConfig(
    vocab=11, positions=32, layers=2, embed=6, heads=3, kv_heads=1, head_dim=4, mlp=10
)


# --- Published configs ----------------------------------------------------------------

# As they lie on the hub, without the ids of special tokens.
LLAMA3_FREQUENCIES = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
HUB = {
    "Llama-2-7B": {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
        "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_FREQUENCIES,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"], "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
        "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
        "max_position_embeddings": 40960, "max_window_layers": 28,
        "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "SmolLM2-135M": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 576,
        "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "max_position_embeddings": 8192, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
}  # fmt: skip
OURS = {
    "Llama-2-7B": LlamaConfig(
        positions=4096, layers=32, embed=4096, heads=32, kv_heads=32, head_dim=128,
        mlp=11008,
    ),
    "Llama-3.1-8B": LlamaConfig(
        vocab=128256, positions=131072, layers=32, embed=4096, heads=32, kv_heads=8,
        head_dim=128, mlp=14336, rope_theta=5e5,
        rope_scaling=FrequencyScaling("llama3", 8.0, 1.0, 4.0, 8192),
    ),
    "Mistral-7B-v0.1": LlamaConfig(
        kind="mistral", positions=32768, layers=32, embed=4096, heads=32, kv_heads=8,
        head_dim=128, mlp=14336, window=4096,
    ),
    "Qwen2.5-0.5B": LlamaConfig(
        kind="qwen2", vocab=151936, positions=32768, layers=24, embed=896, heads=14,
        kv_heads=2, head_dim=64, mlp=4864, qkv_bias=True, tied=True, rope_theta=1e6,
        norm_epsilon=1e-6,
    ),
    "Qwen3-0.6B": LlamaConfig(
        kind="qwen3", vocab=151936, positions=40960, layers=28, embed=1024, heads=16,
        kv_heads=8, head_dim=128, mlp=3072, qk_norm=True, tied=True, rope_theta=1e6,
        norm_epsilon=1e-6,
    ),
    "SmolLM2-135M": LlamaConfig(
        vocab=49152, positions=8192, layers=30, embed=576, heads=9, kv_heads=3,
        mlp=1536, tied=True, rope_theta=1e5, init_std=1 / 24,
    ),
}  # fmt: skip
PARAMETERS = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "SmolLM2-135M": 134_515_008,
}


def read(folder, content) -> LlamaConfig:
    (folder / "config.json").write_text(json.dumps(content))
    config = hf.read_config(folder)
    assert isinstance(config, LlamaConfig)
    return config


@pytest.mark.parametrize("name", HUB)
def test_published_configs_come_and_go(name, tmp_path):
    from transformers import AutoConfig

    config = read(tmp_path, HUB[name])
    assert config == OURS[name]
    assert parameter_count(config) == PARAMETERS[name]
    content = {key: x for key, x in HUB[name].items() if key != "model_type"}
    theirs = AutoConfig.for_model(config.kind, **content).to_dict()
    for key, value in config.to_hf().items():
        assert theirs.get(key, value) == value, key
    assert {"vocab_size", "rope_parameters", "architectures"} < config.to_hf().keys()
    again = AutoConfig.for_model(**config.to_hf())
    assert LlamaConfig.from_hf(again.to_dict()) == config


def test_the_defaults_have_the_size_that_is_written_there():
    millions = round(parameter_count(LlamaConfig()) / 1e6)
    assert f"have {millions} M parameters" in (LlamaConfig.__doc__ or "")


LLAMA = TINY.to_hf()
MISTRAL = replace(TINY, kind="mistral")
QWEN2 = replace(TINY, kind="qwen2", qkv_bias=True)


@pytest.mark.parametrize(
    ("config", "unread"),
    [
        (TINY, {"sliding_window": 3}),
        (QWEN2, {"attention_bias": False}),
        (QWEN2, {"mlp_bias": True}),
        (MISTRAL, {"attention_bias": True}),
    ],
    ids=["llama", "qwen2", "qwen2 mlp", "mistral"],
)
def test_what_transformers_does_not_read_we_do_not_either(tmp_path, config, unread):
    """Its Llama has no window whatever the file says, its Qwen 2 always has biases."""
    assert read(tmp_path, config.to_hf() | unread) == config


def test_as_many_kv_heads_as_heads_if_none_are_named(tmp_path):
    config = replace(TINY, kv_heads=TINY.heads)
    content = {k: x for k, x in config.to_hf().items() if k != "num_key_value_heads"}
    assert read(tmp_path, content) == config
    assert read(tmp_path, content | {"num_key_value_heads": None}) == config


# --- What is refused ------------------------------------------------------------------


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (rope("yarn", factor=2.0), "'yarn' are not supported"),
        (rope("dynamic", factor=2.0), "'dynamic' are not supported"),
        ({"num_key_value_heads": 2}, r"heads = 3 .*kv_heads = 2"),
        (rope("linear", factor=0.5), "factor >= 1.* 0.5"),
    ],
    ids=str,
)
def test_a_config_that_we_do_not_compute(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        read(tmp_path, LLAMA | change)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_layers_of_different_kinds(tmp_path, kind):
    """Qwen's window may begin at a later layer."""
    config = replace(
        TINY, kind=kind, qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", window=3
    )
    content = config.to_hf()
    assert read(tmp_path, content) == config
    with pytest.raises(InputError, match="mixes full_attention, sliding_attention"):
        read(tmp_path, content | {"max_window_layers": 1})


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_heads": 2},
        {"kv_heads": 0},
        {"head_dim": 3},
        {"head_dim": 0},
        {"window": 0},
        {"attention_dropout": 1.0},
    ],
    ids=str,
)
def test_a_shape_that_is_none(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"model.{name} = {value}"):
        replace(TINY, **wrong)


@pytest.mark.parametrize(("kind", "fits"), [("llama", False), ("mistral", True)])
def test_a_width_that_the_heads_do_not_divide(tmp_path, kind, fits):
    """As transformers has it; the width of a head is given apart."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(**replace(TINY, kind=kind).to_hf())
    theirs.hidden_size = 7
    if fits:
        theirs.validate()
        assert read(tmp_path, theirs.to_dict()) == replace(TINY, kind=kind, embed=7)
    else:
        with pytest.raises(StrictDataclassError, match="not a multiple"):
            theirs.validate()
        with pytest.raises(InputError, match=r"embed = 7 must .*heads = 3"):
            replace(TINY, kind=kind, embed=7)


@pytest.mark.parametrize(
    "wrong", [{"factor": 0.9}, {"low": 0.0}, {"low": 4.0}, {"original": 0}], ids=str
)
def test_frequencies_that_make_no_sense(wrong):
    with pytest.raises(InputError, match="rope_scaling.*low < high"):
        FrequencyScaling(**wrong)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("llama", {"window": 3}, "window = 3.* llama has none"),
        ("llama", {"qk_norm": True}, "qk_norm = True.* llama has none"),
        ("llama", {"qkv_bias": True}, "qkv_bias and model.out_bias differ"),
        ("mistral", {"qkv_bias": True}, "qkv_bias = True.* mistral has none"),
        ("mistral", {"mlp_bias": True}, "mlp_bias = True.* mistral has none"),
        ("qwen2", {}, "qkv_bias = False.* qwen2 has it always"),
        ("qwen2", {"qkv_bias": True, "out_bias": True}, "out_bias.* qwen2 has none"),
        ("qwen3", {}, "qk_norm = False.* qwen3 has it always"),
        ("qwen3", {"qk_norm": True, "out_bias": True}, "out_bias differ.* qwen3 has"),
        ("qwen3", {"qk_norm": True, "mlp_bias": True}, "mlp_bias.* qwen3 has none"),
    ],
)
def test_an_option_that_the_kind_has_not(kind, options, says):
    with pytest.raises(InputError, match=says):
        replace(TINY, kind=kind, **options)


# --- Rotary positions -----------------------------------------------------------------


def angles(scaling, *, head_dim=16, theta=1e4, positions=40):
    """Of each position and pair, from the tables."""
    cos, sin = rotary_tables(jnp.arange(positions), head_dim, theta, scaling)
    assert cos.shape == sin.shape == (positions, 1, head_dim // 2)
    return np.asarray(cos)[:, 0], np.asarray(sin)[:, 0]


def assert_turns(found, frequencies):
    expected = np.arange(40)[:, None] * np.array(frequencies)
    np.testing.assert_allclose(found[0], np.cos(expected), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], np.sin(expected), rtol=0, atol=1e-5)


PLAIN = [10_000 ** (-pair / 8) for pair in range(8)]  # 8 pairs in a head of 16


def test_frequencies_fall_from_1_to_nearly_1_over_theta():
    assert_turns(angles(None), PLAIN)


def test_linear_scaling_divides_positions():
    scaling = FrequencyScaling("linear", factor=2.5)
    assert_turns(angles(scaling), [frequency / 2.5 for frequency in PLAIN])


def test_llama3_scaling_slows_what_turns_rarely():
    """Written as in Llama 3.1's model.py, by wave length."""
    factor, low, high, original = 4.0, 1.0, 4.0, 64
    slowed, cases = [], []
    for frequency in PLAIN:
        length = 2 * math.pi / frequency
        if length < original / high:
            cases.append("as it was")
            slowed.append(frequency)
        elif length > original / low:
            cases.append("slowed")
            slowed.append(frequency / factor)
        else:
            cases.append("between")
            share = (original / length - low) / (high - low)
            slowed.append((1 - share) * frequency / factor + share * frequency)
    assert cases == ["as it was"] + ["between"] * 2 + ["slowed"] * 5
    assert_turns(
        angles(FrequencyScaling("llama3", factor, low, high, original)), slowed
    )


def test_pairs_are_turned_as_complex_numbers():
    """Feature i and i + N/2 are the two parts of one."""
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 6)).astype(np.float32)
    tables = rotary_tables(jnp.arange(5), 6, 100.0, None)
    turned = np.asarray(rotate(jnp.asarray(x), tables))
    for t in range(5):
        for i in range(3):
            turn = cmath.exp(1j * t * 100.0 ** (-i / 3))
            expected = (x[:, t, :, i] + 1j * x[:, t, :, i + 3]) * turn
            found = turned[:, t, :, i] + 1j * turned[:, t, :, i + 3]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def hidden(config, *rows):
    """Hidden states of several inputs (tokens, positions), from one program."""
    model = build_model(config, Compute(dtype="float32"))
    graphdef = nnx.split(model)[0]

    @jax.jit
    def run(params, tokens, positions):
        return nnx.merge(graphdef, params)(tokens, positions=positions)

    with jax.set_mesh(mesh := parity.one_device()):
        params = parity.placed(model, parity.random_tensors(config), mesh)
        placed = (parity.place_rows(row, mesh) for row in rows)
        return [np.asarray(run(params, *row)) for row in placed]


def test_only_distances_count():
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9), np.int32)
    positions = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    states, shifted, stretched = hidden(
        TINY, (tokens, positions), (tokens, positions + 5), (tokens, positions * 2)
    )
    np.testing.assert_allclose(shifted, states, rtol=1e-4, atol=1e-4)
    assert np.abs(stretched - states).max() > 0.1


# --- Window ---------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "reach"), [(3, 4), (1, 0), (None, 10)])
def test_a_token_is_not_noticed_outside_of_its_windows(window, reach):
    """Each of the two layers sees `window - 1` tokens back."""
    tokens = np.random.default_rng(0).integers(0, 10, (1, 11), np.int32)
    positions = np.arange(11, dtype=np.int32)[None]
    other = tokens.copy()
    other[0, 0] = 10
    a, b = hidden(
        replace(MISTRAL, window=window), (tokens, positions), (other, positions)
    )
    differ = np.flatnonzero((a != b).any(axis=(0, 2)))
    np.testing.assert_array_equal(differ, np.arange(reach + 1))


# --- FLOPs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "keys"), [(None, 1 + 2 + 3 + 4 + 5), (2, 1 + 2 + 2 + 2 + 2), (9, 15)]
)
def test_train_flops_by_hand(window, keys):
    """Multiply-adds of one sequence of 5 tokens, forward; times 2, times 3."""
    q, k, v, out = 6 * 12, 6 * 4, 6 * 4, 12 * 6
    gate, up, down = 6 * 10, 6 * 10, 10 * 6
    weights = 2 * (q + k + v + out + gate + up + down) + 6 * 11
    attention = 2 * keys * (3 * 4 + 3 * 4)  # scores, and the mean of the values
    expected = 3 * 2 * (5 * weights + attention)
    found = replace(MISTRAL, window=window).train_flops_per_token(5) * 5
    assert found == pytest.approx(expected, rel=1e-12)
