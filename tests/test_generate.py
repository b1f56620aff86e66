# SPDX-License-Identifier: Apache-2.0
"""Generation: the cache changes nothing, sampling draws from the right tokens."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from flax import nnx
from parity import one_device

from lm_scale.errors import InputError
from lm_scale.generate import Sampling, fill_masks, generate, sample, unbatched
from lm_scale.models import build_model
from lm_scale.models.compute import Compute
from lm_scale.models.gpt2 import GPT2Config
from lm_scale.models.llama import LlamaConfig
from lm_scale.models.roberta import RobertaConfig
from lm_scale.sharding import PRESETS, MeshShape, make_mesh

SHAPE = {"vocab": 46, "positions": 17, "layers": 2, "embed": 12, "heads": 4, "mlp": 22}
CONFIGS = {
    "gpt2": GPT2Config(**SHAPE),
    # Each key serves two queries, and is seen from four positions.
    "llama": LlamaConfig(kind="mistral", **SHAPE, kv_heads=2, head_dim=6, window=4),
}
MODELS = {
    name: build_model(config, Compute(dtype="float32"))
    for name, config in CONFIGS.items()
}
MODEL = MODELS["gpt2"]
PROMPT = np.random.default_rng(0).integers(0, SHAPE["vocab"], (3, 5), np.int32)
GREEDY = Sampling(max_new_tokens=12, temperature=0)  # fills all 17 positions


def placed(model, mesh):
    return parity.placed(model, parity.random_tensors(model.config), mesh)


@partial(jax.jit, static_argnames="graphdef")
def _all_logits(params, tokens, graphdef):
    model = nnx.merge(graphdef, params)
    return model.head(model(tokens))


def all_logits(model, params, tokens):
    """The logits after each token, without a cache: [B T V]."""
    return _all_logits(params, tokens, nnx.split(unbatched(model))[0])


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture(scope="module")
def greedy(model):
    with jax.set_mesh(mesh := one_device()):
        return generate(model, placed(model, mesh), PROMPT, GREEDY)


def test_greedy_is_the_likeliest_token_after_the_whole_prefix(model, greedy):
    """Token by token; what follows the prefix in the buffer is not seen (causal)."""
    with jax.set_mesh(mesh := one_device()):
        params = placed(model, mesh)
        text = np.zeros((3, 17), np.int32)
        text[:, :5] = PROMPT
        for end in range(5, 17):
            logits = np.asarray(all_logits(model, params, text))[:, end - 1]
            text[:, end] = np.argmax(logits, -1)
    assert greedy.dtype == np.int32
    np.testing.assert_array_equal(greedy, text)
    assert len(np.unique(greedy[:, 5:])) > 5  # it does not say one thing only


def test_decoding_in_pieces_gives_the_logits_of_the_whole(model):
    tokens = np.random.default_rng(1).integers(0, SHAPE["vocab"], (3, 17), np.int32)
    graphdef = nnx.split(unbatched(model))[0]

    @jax.jit
    def in_pieces(params, tokens):
        model = nnx.merge(graphdef, params)
        cache, after = model.empty_cache(3, 14), []
        for piece in jnp.split(tokens[:, :9], [5, 6], axis=1):
            logits, cache = model.decode(piece, cache)
            after.append(logits)
        return jnp.stack(after, 1), cache.length

    with jax.set_mesh(mesh := one_device()):
        params = placed(model, mesh)
        logits, length = in_pieces(params, tokens)
        expected = all_logits(model, params, tokens)[:, np.array([4, 5, 8])]
    assert length == 9
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_eight_devices_write_what_one_writes(temperature, model, greedy):
    sampling = replace(GREEDY, temperature=temperature, top_k=9, top_p=0.9)
    expected = greedy
    if temperature:
        with jax.set_mesh(mesh := one_device()):
            expected = generate(model, placed(model, mesh), PROMPT, sampling)
        assert not np.array_equal(expected, greedy)
    with jax.set_mesh(mesh := make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        written = generate(model, placed(model, mesh), PROMPT, sampling)
    np.testing.assert_array_equal(written, expected)


def test_rules_that_cut_the_sequence_in_training_write_the_same(model, greedy):
    """A prompt of 5 tokens and a next one: neither can be cut in two."""
    compute = replace(model.compute, rules=PRESETS["fsdp_tp_sp"])
    model = build_model(model.config, compute)
    with jax.set_mesh(mesh := make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        written = generate(model, placed(model, mesh), PROMPT, GREEDY)
    np.testing.assert_array_equal(written, greedy)


def test_after_the_end_there_is_nothing_else(model, greedy):
    """The end of one row is not that of another."""
    new = greedy[:, 5:]
    in_some_rows = [x for x in new[:, :-1].flat if not (new == x).any(axis=1).all()]
    eos_id = int(in_some_rows[0])
    with jax.set_mesh(mesh := one_device()):
        text = generate(model, placed(model, mesh), PROMPT, GREEDY, eos_id=eos_id)
    for row, free in zip(text, greedy, strict=True):
        ends = np.flatnonzero(free[5:] == eos_id)
        end = 5 + ends[0] if ends.size else 17
        np.testing.assert_array_equal(row[:end], free[:end])
        np.testing.assert_array_equal(row[end:], eos_id)


def test_an_end_in_the_prompt_ends_nothing():
    """GPT-2's texts also begin with <|endoftext|>."""
    prompt, eos_id = PROMPT[:1, :3], int(PROMPT[0, 2])
    with jax.set_mesh(mesh := one_device()):
        params = placed(MODEL, mesh)
        text = generate(
            MODEL, params, prompt, Sampling(max_new_tokens=2, temperature=0),
            eos_id=eos_id,
        )  # fmt: skip
        buffer = np.pad(prompt, ((0, 2), (0, 14)))  # the shape compiled before
        expected = np.argmax(all_logits(MODEL, params, buffer)[0, 2], -1)
    assert text[0, 3] == expected != eos_id


def test_the_seed_decides():
    with jax.set_mesh(mesh := one_device()):
        params = placed(MODEL, mesh)
        one = Sampling(max_new_tokens=12, temperature=1.5, seed=1)
        first = generate(MODEL, params, PROMPT, one)
        np.testing.assert_array_equal(generate(MODEL, params, PROMPT, one), first)
        other = generate(MODEL, params, PROMPT, replace(one, seed=2))
    assert not np.array_equal(other, first)
    np.testing.assert_array_equal(other[:, :5], PROMPT)


@pytest.mark.parametrize(
    ("shape", "new", "says"),
    [((1, 0), 3, "empty"), ((2, 5), 13, "5 tokens.*13.*17 positions")],
)
def test_a_prompt_that_cannot_be_continued(shape, new, says):
    with pytest.raises(InputError, match=says):
        generate(MODEL, {}, np.zeros(shape, np.int32), Sampling(max_new_tokens=new))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
    ids=str,
)
def test_sampling_that_makes_no_sense(wrong):
    with pytest.raises(InputError, match="sampling"):
        Sampling(**wrong)


# --- One draw -------------------------------------------------------------------------

DRAWS = 4000
PROBS = np.array([0.05, 0.4, 0.1, 0.3, 0.15])  # likeliest first: 1, 3, 4, 2, 0
jit_sample = partial(jax.jit, static_argnames="sampling")(sample)


def draw(probs, seed=0, **sampling) -> np.ndarray:
    """Independent draws, one a row."""
    logits = np.tile(np.log(probs).astype(np.float32), (DRAWS, 1))
    settings = Sampling(**({"temperature": 1.0, "top_p": 1.0} | sampling))
    with jax.set_mesh(one_device()):
        drawn = jit_sample(logits, settings, jax.random.key(seed))
    assert drawn.dtype == jnp.int32
    return np.asarray(drawn)


def shares(drawn) -> np.ndarray:
    return np.bincount(drawn, minlength=5) / DRAWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_the_power_of_the_probabilities(temperature):
    expected = PROBS ** (1 / temperature)
    expected /= expected.sum()
    drawn = shares(draw(PROBS, temperature=temperature))
    np.testing.assert_allclose(drawn, expected, atol=0.04)  # 5 standard deviations


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}], ids=str
)
def test_one_token_to_choose_from(sampling):
    np.testing.assert_array_equal(draw(PROBS, **sampling), 1)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 4}, [1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),  # more than there are
        ({"top_p": 0.35}, [1]),
        ({"top_p": 0.45}, [1, 3]),
        ({"top_p": 0.75}, [1, 3, 4]),
        ({"top_p": 0.99}, [0, 1, 2, 3, 4]),
        # The share is of what top_k left: 0.4 / 0.7, then of the tempered ones.
        ({"top_k": 2, "top_p": 0.55}, [1]),
        ({"top_k": 3, "top_p": 0.6}, [1, 3]),
        ({"temperature": 0.25, "top_p": 0.7}, [1]),
    ],
    ids=str,
)
def test_draws_come_from_the_fewest_likeliest_tokens(sampling, kept):
    drawn = shares(draw(PROBS, **sampling))
    np.testing.assert_array_equal(np.flatnonzero(drawn), kept)
    expected = PROBS[kept] ** (1 / sampling.get("temperature", 1.0))
    np.testing.assert_allclose(drawn[kept], expected / expected.sum(), atol=0.04)


@pytest.mark.parametrize(
    ("sampling", "kept"), [({"top_k": 3}, 3), ({"top_p": 0.05}, 50)], ids=str
)
def test_among_equals_no_more_are_kept_than_asked_for(sampling, kept):
    """As the logits of a head that has learnt nothing yet."""
    vocab = 999
    drawn = draw(np.full(vocab, 1 / vocab), **sampling)
    assert len(np.unique(drawn)) == kept


def test_rows_have_their_own_limits():
    """A sure row and an even one, side by side."""
    probs = np.array([[0.001, 0.997, 0.001, 0.001], [0.25, 0.25, 0.25, 0.25]])
    logits = np.tile(np.log(probs).astype(np.float32), (DRAWS // 2, 1))
    with jax.set_mesh(one_device()):
        drawn = jit_sample(
            logits, Sampling(temperature=1.0, top_p=0.9), jax.random.key(0)
        )
    np.testing.assert_array_equal(drawn[0::2], 1)
    np.testing.assert_array_equal(np.unique(drawn[1::2]), [0, 1, 2, 3])


# --- Masks ----------------------------------------------------------------------------


def test_masks_are_filled_and_nothing_else():
    mask_id, pad_id = 4, 1
    config = RobertaConfig(
        vocab=46, positions=13, layers=2, embed=12, heads=2, mlp=22, pad_id=pad_id
    )
    model = build_model(config, Compute(dtype="float32"))
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, config.vocab, (3, 9), np.int32)
    tokens[0, [0, 4, 8]] = tokens[1, [3, 4]] = mask_id
    tokens[1, 6:] = pad_id

    @jax.jit
    def likeliest(params, tokens):
        whole = nnx.merge(nnx.split(unbatched(model))[0], params)
        return jnp.argmax(whole.head(whole(tokens)), -1)

    with jax.set_mesh(mesh := one_device()):
        params = placed(model, mesh)
        filled = fill_masks(model, params, tokens, mask_id)
        expected = np.asarray(likeliest(params, tokens))
    masks = tokens == mask_id
    assert filled.dtype == np.int32
    np.testing.assert_array_equal(filled[~masks], tokens[~masks])
    np.testing.assert_array_equal(filled[masks], expected[masks])
    assert not np.array_equal(filled, tokens)
    with jax.set_mesh(mesh := make_mesh(MeshShape(data=2, fsdp=2, tensor=2))):
        again = fill_masks(model, placed(model, mesh), tokens, mask_id)
    np.testing.assert_array_equal(again, filled)
