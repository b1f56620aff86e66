# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and scaled frequencies.

Pairs of features are turned by an angle that grows with the position. The pairs are
(i, i + N/2), as in Hugging Face's weights; the paper's are neighbours.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lm_scale.errors import InputError


@dataclass(frozen=True)
class FrequencyScaling:
    """How the frequencies are slowed down for sequences longer than trained on."""

    # linear: all alike (Chen et al. 2023, arXiv:2306.15595); llama3: the slow ones, as
    # in Llama 3.1's model.py (Dubey et al. 2024, arXiv:2407.21783, section 3.4.2).
    kind: Literal["linear", "llama3"] = "llama3"
    factor: float = 8.0  # slower by
    low: float = 1.0  # turns over `original` positions: fewer are slowed in full
    high: float = 4.0  # more than so many are left alone; between: a mixture
    original: int = 8192  # positions that the model was trained on at first

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low < self.high and self.original > 0):
            raise InputError(
                f"model.rope_scaling: expected factor >= 1, 0 < low < high and "
                f"original > 0, got {self.factor}, {self.low}, {self.high} and "
                f"{self.original}."
            )

    @classmethod
    def from_hf(cls, rope: dict[str, Any]) -> "FrequencyScaling | None":
        """From `rope_parameters` of a config.json; InputError for other kinds."""
        kind = rope.get("rope_type", "default")
        if kind == "default":
            return None
        if kind == "linear":
            return cls("linear", factor=rope["factor"])
        if kind == "llama3":
            return cls(
                "llama3",
                factor=rope["factor"],
                low=rope["low_freq_factor"],
                high=rope["high_freq_factor"],
                original=rope["original_max_position_embeddings"],
            )
        raise InputError(
            f"Rotary frequencies of type {kind!r} are not supported (supported: "
            f"default, linear, llama3)."
        )

    def to_hf(self) -> dict[str, Any]:
        """The opposite of `from_hf`."""
        if self.kind == "linear":
            return {"rope_type": "linear", "factor": self.factor}
        return {
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low,
            "high_freq_factor": self.high,
            "original_max_position_embeddings": self.original,
        }

    def apply(self, frequencies: np.ndarray) -> np.ndarray:
        """Radians a position -> the slower ones."""
        slowed = frequencies / self.factor
        if self.kind == "linear":
            return slowed
        turns = self.original * frequencies / (2 * math.pi)
        share = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return share * frequencies + (1 - share) * slowed


def rotary_tables(
    positions: Int[Array, "*B T"],
    head_dim: int,
    theta: float,
    scaling: FrequencyScaling | None,
) -> tuple[Float[Array, "*B T 1 M"], Float[Array, "*B T 1 M"]]:
    """Cosine and sine of each position's angles, f32; M is half the head's width."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = scaling.apply(frequencies)
    angles = positions[..., None, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H N"],
    tables: tuple[Float[Array, "*B T 1 M"], Float[Array, "*B T 1 M"]],
) -> Float[Array, "B T H N"]:
    """Turns each head's pairs by their position's angles; computed in f32."""
    cos, sin = tables
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
