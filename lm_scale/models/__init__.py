# SPDX-License-Identifier: Apache-2.0
"""The model families, one file each, and the table that finds one by its config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_scale.errors import InputError
from lm_scale.models import gpt2, llama, roberta
from lm_scale.models.compute import Compute
from lm_scale.models.gpt2 import GPT2, GPT2Config
from lm_scale.models.layers import HFWeight
from lm_scale.models.llama import Llama, LlamaConfig
from lm_scale.models.roberta import Roberta, RobertaConfig

ModelConfig = GPT2Config | LlamaConfig | RobertaConfig
Model = GPT2 | Llama | Roberta


@dataclass(frozen=True)
class Family:
    """What the rest of the program has to know of a family."""

    hf_types: tuple[str, ...]  # `model_type`s in a Hugging Face config.json
    config: type
    module: type
    hf_names: dict[str, HFWeight]
    causal: bool  # predicts the next token, so it can generate


FAMILIES = (
    Family(("gpt2",), GPT2Config, GPT2, gpt2.HF_NAMES, causal=True),
    Family(llama.HF_TYPES, LlamaConfig, Llama, llama.HF_NAMES, causal=True),
    Family(("roberta",), RobertaConfig, Roberta, roberta.HF_NAMES, causal=False),
)
HF_TYPES = tuple(name for family in FAMILIES for name in family.hf_types)


def family_of(config: ModelConfig) -> Family:
    """The family whose config this is."""
    return next(family for family in FAMILIES if isinstance(config, family.config))


def family_of_type(model_type: str | None, source: object) -> Family:
    """The family of a Hugging Face `model_type`; InputError, naming its source."""
    for family in FAMILIES:
        if model_type in family.hf_types:
            return family
    raise InputError(
        f"{source}: model_type {model_type!r} is not supported. There are: "
        f"{', '.join(HF_TYPES)}."
    )


def refuse_code(config: Mapping[str, Any], source: object) -> None:
    """InputError if a Hugging Face config names a model class of its own.

    Such code is never run, and without it the model could be another one.
    """
    if config.get("auto_map"):
        raise InputError(
            f"{source}: the config names Python code that comes with the model "
            f"(auto_map), which is never run. If it is an ordinary "
            f"{config.get('model_type')}, delete `auto_map` from a copy of config.json."
        )


def build_model(config: ModelConfig, compute: Compute) -> Model:
    """The declared model: shapes and axes, no arrays yet."""
    return family_of(config).module(config, compute)
