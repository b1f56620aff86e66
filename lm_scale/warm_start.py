# SPDX-License-Identifier: Apache-2.0
"""Given weights as a model's first ones, also where that model is another by intent.

The vocabulary and the position table may grow, and layers may be chosen; each has its
option. The source is read at its own shapes and made into the model's on the devices:
no host holds it whole.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lm_scale.errors import InputError
from lm_scale.hf_tensors import is_stacked
from lm_scale.models import Model, ModelConfig, build_model
from lm_scale.sharding import Params, flatten, init_params, map_declarations


@dataclass(frozen=True)
class WarmStart:
    """In what the model of the first weights may differ; else it must be the same."""

    grow_vocab: bool = False  # rows for more tokens, behind those that there are
    grow_positions: bool = False  # longer sequences, with rows of a position table
    # Its layers, counted from 0, that become this model's, in this order; None: all.
    layers: tuple[int, ...] | None = None


def check_source(
    there: ModelConfig, here: ModelConfig, init: WarmStart, source: object
) -> None:
    """InputError naming each field in which the source's model may not be another.

    Dropout and the initializer's size may: they are not in the weights.
    """
    if type(there) is not type(here):
        raise InputError(
            f"{source} holds a {type(there).__name__}, the config a "
            f"{type(here).__name__}."
        )
    wrong = []
    for name, now in vars(here).items():
        was = getattr(there, name)
        if was != now and "dropout" not in name and name != "init_std":
            reason = _refusal(name, was, now, init)
            if reason is not None:
                wrong.append(f"{name}: {was!r} there, {now!r} here{reason}")
    if wrong:
        raise InputError(
            f"The model in {source} is not the config's: {'; '.join(wrong)}."
        )
    if init.layers is not None:
        _check_layers(init.layers, there.layers, here.layers)


def _refusal(name: str, was: Any, now: Any, init: WarmStart) -> str | None:
    """What to say of a field that differs; None: it may."""
    if name in ("vocab", "positions"):
        option = f"grow_{name}"
        if now < was:
            return " (it can only grow)"
        return None if getattr(init, option) else f" (`init.{option}` allows it)"
    if name == "layers":
        return None if init.layers is not None else " (`init.layers` chooses some)"
    return ""


def _check_layers(layers: tuple[int, ...], there: int, here: int) -> None:
    for layer in layers:
        if not 0 <= layer < there:
            raise InputError(
                f"init.layers names layer {layer}: expected 0 to {there - 1}, as the "
                f"first weights have {there} layers."
            )
    if len(layers) != here:
        raise InputError(
            f"init.layers names {len(layers)} layer(s), but model.layers = {here}. "
            f"Change one of them."
        )


def differences(there: ModelConfig, here: ModelConfig, init: WarmStart) -> list[str]:
    """What is made other, for a person: `vocab 300 -> 320`, `layers 0, 2 of 3`."""
    said = [
        f"{name} {getattr(there, name)} -> {getattr(here, name)}"
        for name in ("vocab", "positions")
        if getattr(there, name) != getattr(here, name)
    ]
    if init.layers is not None:
        said.append(f"layers {', '.join(map(str, init.layers))} of {there.layers}")
    return said


def source_model(there: ModelConfig, model: Model, init: WarmStart) -> Model:
    """The model as which the source is read: the given one, at the source's sizes.

    What is to grow or to be chosen from is not cut along that axis, which the mesh need
    not divide.
    """
    config = dataclasses.replace(
        model.config, vocab=there.vocab, positions=there.positions, layers=there.layers
    )
    rules = model.compute.rules
    if there.vocab != model.config.vocab:
        rules = dataclasses.replace(rules, vocab=())
    if init.layers is not None:
        rules = dataclasses.replace(rules, layers=())
    return build_model(config, dataclasses.replace(model.compute, rules=rules))


def adapt(source: Params, model: Model, init: WarmStart, seed: int) -> Params:
    """The model's parameters: fresh ones, with the source's values written in.

    Rows of tokens and positions that the source lacks stay as the initializer made them
    for this seed. source: the parameters of `source_model`. To be traced under
    `jax.set_mesh`; what is not needed of the fresh ones is never computed.
    """
    given = flatten(source)
    fresh = flatten(init_params(model, model.compute.rules, jax.random.key(seed)))

    def make(path: str, _: nnx.Param) -> jax.Array:
        value = given[path]
        if init.layers is not None and is_stacked(path):
            chosen = jnp.array(init.layers)
            spec = jax.typeof(value).sharding.spec
            value = value.at[chosen].get(out_sharding=spec)
        return _written_over(value, fresh[path])

    return map_declarations(model, make)


def _written_over(
    value: Float[Array, "rows *rest"], fresh: Float[Array, "more_rows *rest"]
) -> Float[Array, "more_rows *rest"]:
    """The fresh array with the value in its first rows, sharded as it is."""
    spec, rows = jax.typeof(fresh).sharding.spec, value.shape[0]
    if rows == fresh.shape[0]:
        return jax.reshard(value, spec)
    rest = [(0, 0)] * (value.ndim - 1)
    padded = jax.reshard(jnp.pad(value, [(0, fresh.shape[0] - rows), *rest]), spec)
    row = jax.lax.broadcasted_iota(jnp.int32, fresh.shape, 0, out_sharding=spec)
    return jnp.where(row < rows, padded, fresh)
