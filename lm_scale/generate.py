# SPDX-License-Identifier: Apache-2.0
"""Text from a model: sampled continuations (causal LM) and filled masks (masked LM)."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from lm_scale.errors import InputError
from lm_scale.models import Model, ModelConfig, build_model, family_of
from lm_scale.sharding import Params


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 100  # at most: fewer where the position table ends
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int = 0  # draw from so many likeliest tokens only; 0: all
    top_p: float = 0.95  # ... from the fewest that hold this share of probability
    seed: int = 0

    def __post_init__(self):
        if not (self.max_new_tokens >= 1 and self.temperature >= 0 and self.top_k >= 0):
            raise InputError(
                f"sampling: expected max_new_tokens >= 1, temperature >= 0 and "
                f"top_k >= 0, got {self.max_new_tokens}, {self.temperature} and "
                f"{self.top_k}."
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"sampling: expected 0 < top_p <= 1, got {self.top_p}.")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"sampling: expected 0 <= seed < 2**63, got {self.seed}.")


def unbatched(model: Model) -> Model:
    """The same model with nothing cut by rows or tokens: a prompt is one short row."""
    rules = dataclasses.replace(model.compute.rules, batch=(), seq=(), residual_seq=())
    return build_model(model.config, dataclasses.replace(model.compute, rules=rules))


def generate(
    model: Model,
    params: Params,
    prompt: np.ndarray,
    sampling: Sampling,
    *,
    eos_id: int | None = None,
) -> np.ndarray:
    """Continues prompts: int32 [B T] -> int32 [B T + max_new_tokens].

    Keys and values are kept, so each new token costs one position. After `eos_id` a row
    holds nothing but `eos_id`. To be called under `jax.set_mesh`. Raises InputError if
    the prompt is empty or the text would be longer than the position table.
    """
    length = prompt.shape[1] + sampling.max_new_tokens
    if prompt.shape[1] == 0:
        raise InputError("The prompt is empty: give at least one token to continue.")
    if length > model.config.positions:
        raise InputError(
            f"Prompt ({prompt.shape[1]} tokens) and {sampling.max_new_tokens} new ones "
            f"exceed the model's {model.config.positions} positions. Shorten either."
        )
    graphdef = nnx.split(unbatched(model))[0]
    # As numpy, which every process has whole; an array of jax's would be its own.
    key = np.asarray(jax.random.key_data(jax.random.key(sampling.seed)))
    tokens = _generate(params, prompt, key, graphdef, sampling, eos_id)
    return np.concatenate([prompt, np.asarray(tokens)], axis=1)


@partial(jax.jit, static_argnames=("graphdef", "sampling", "eos_id"))
def _generate(params, prompt, key, graphdef, sampling: Sampling, eos_id):
    model = nnx.merge(graphdef, params)
    key = jax.random.wrap_key_data(key)
    batch, length = prompt.shape
    cache = model.empty_cache(batch, length + sampling.max_new_tokens)
    logits, cache = model.decode(prompt, cache)
    keys = jax.random.split(key, sampling.max_new_tokens)
    first = sample(logits, sampling, keys[0])

    def next_token(carry, key):
        token, cache = carry
        logits, cache = model.decode(token[:, None], cache)
        new = sample(logits, sampling, key)
        if eos_id is not None:
            new = jnp.where(token == eos_id, eos_id, new)
        return (new, cache), new

    _, rest = jax.lax.scan(next_token, (first, cache), keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, key: Key[Array, ""]
) -> Int[Array, "B"]:
    """One token a row; top_p as in Holtzman et al. 2020, section 3.1."""
    logits = jax.reshard(logits, jax.P(None, None))  # sorting needs the whole row
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    vocab = logits.shape[-1]
    # Likeliest first; equals by their number, so that no more are kept than asked for.
    ordered, ids = jax.lax.top_k(logits, min(sampling.top_k or vocab, vocab))
    ordered = ordered / sampling.temperature
    if sampling.top_p < 1:
        probs = jax.nn.softmax(ordered)
        kept = jnp.cumsum(probs, -1) - probs < sampling.top_p  # the first always
        ordered = jnp.where(kept, ordered, -jnp.inf)
    choice = jax.random.categorical(key, ordered)
    return jnp.take_along_axis(ids, choice[:, None], axis=1)[:, 0].astype(jnp.int32)


def fill_masks(
    model: Model, params: Params, tokens: np.ndarray, mask_id: int
) -> np.ndarray:
    """Replaces each mask by its likeliest token: int32 [B T] -> int32 [B T].

    To be called under `jax.set_mesh`. Raises InputError if the text is longer than the
    position table.
    """
    if tokens.shape[1] > model.config.positions:
        raise InputError(
            f"The text has {tokens.shape[1]} tokens, more than the model's "
            f"{model.config.positions} positions. Shorten it."
        )
    graphdef = nnx.split(unbatched(model))[0]

    @jax.jit
    def guess(params, tokens):
        model = nnx.merge(graphdef, params)
        return jnp.argmax(model.head(model(tokens)), -1)

    guesses = np.asarray(guess(params, tokens))
    return np.where(tokens == mask_id, guesses, tokens).astype(np.int32)


def check_prompt(config: ModelConfig, tokenizer, prompt: str) -> np.ndarray:
    """The prompt as tokens, int32 [1 T]; InputError if the model cannot use it.

    The end-of-text that some tokenizers add is not part of a prompt to be continued.
    """
    ids = tokenizer.encode(prompt)
    if family_of(config).causal:
        while ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        if not ids:
            raise InputError(
                "The prompt is empty: give at least one token to continue."
            )
        if len(ids) >= config.positions:
            raise InputError(
                f"The prompt has {len(ids)} tokens; the model's {config.positions} "
                f"positions leave no room to continue it. Shorten it."
            )
    elif tokenizer.mask_token_id not in ids:
        raise InputError(
            f"The prompt {prompt!r} has no {tokenizer.mask_token} to fill in."
        )
    return np.array([ids], np.int32)


def complete(
    model: Model,
    params: Params,
    tokenizer,
    prompt: str,
    sampling: Sampling,
    samples: int = 1,
) -> list[str]:
    """The prompt continued, `samples` times (causal LM), or its masks filled in.

    To be called under `jax.set_mesh`. Raises InputError as `check_prompt`, `generate`
    and `fill_masks` do.
    """
    if samples < 1:
        raise InputError(f"samples = {samples}: expected 1 or more.")
    ids = check_prompt(model.config, tokenizer, prompt)
    if family_of(model.config).causal:
        room = model.config.positions - ids.shape[1]
        length = min(sampling.max_new_tokens, room)
        sampling = dataclasses.replace(sampling, max_new_tokens=length)
        ids = np.repeat(ids, samples, axis=0)
        eos = tokenizer.eos_token_id
        rows = generate(model, params, ids, sampling, eos_id=eos)
    else:
        rows = fill_masks(model, params, ids, tokenizer.mask_token_id)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
