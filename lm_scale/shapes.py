# SPDX-License-Identifier: Apache-2.0
"""Hugging Face configs by name, without the network: `roberta-base`, `gpt2-xl`, ...

The numbers are those of the config.json that each model was published with.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_scale.errors import InputError, differences, flatten, one_line
from lm_scale.models import (
    HF_TYPES,
    Compute,
    ModelConfig,
    build_model,
    family_of_type,
    refuse_code,
)
from lm_scale.sharding import declarations

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
# What differs from the defaults that transformers has for the model_type.
SHAPES: dict[str, dict[str, Any]] = {
    "roberta-base": {
        "model_type": "roberta",
        "architectures": ["RobertaForMaskedLM"],
        "max_position_embeddings": 514,  # 512 and the two before the first position
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    },
    "gpt2": _GPT2,
    "gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "bert-base": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
}
# What else they are called on the hub, now and before its names had owners.
_HUB_NAMES = {
    "FacebookAI/roberta-base": "roberta-base",
    "openai-community/gpt2": "gpt2",
    "openai-community/gpt2-medium": "gpt2-medium",
    "openai-community/gpt2-large": "gpt2-large",
    "openai-community/gpt2-xl": "gpt2-xl",
    "google-bert/bert-base-uncased": "bert-base",
    "bert-base-uncased": "bert-base",
}
_FIXED = ("model_type", "transformers_version", "_name_or_path")  # not to be overridden


def hf_config(
    name: str, overrides: Sequence[str] = (), *, cache_dir: str | None = None
) -> "PreTrainedConfig":
    """The transformers config of a named shape, a folder or a model of the hub.

    A name in SHAPES, or what the hub calls it, needs no network. As in transformers, a
    local folder of that name with a config.json in it wins. Code that comes with a
    model is never run. overrides are `key=value`, the keys as in the config.json; a
    value is JSON (`0.1`, `true`, `null`) or else a string.

    Raises:
      InputError: no such model; an override of an unknown key or with a value of
        another type.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    shape = SHAPES.get(_HUB_NAMES.get(name, name))
    if shape is not None and not Path(name, "config.json").is_file():
        config = AutoConfig.for_model(**shape)
    else:
        config = _from_folder_or_hub(name, cache_dir)
    for override in overrides:
        _override(config, override)
    try:
        config.validate()  # what several settings have to keep together
    except StrictDataclassError as error:
        raise InputError(
            f"{name} with {' '.join(overrides)} is no model: {one_line(error, 200)}"
        ) from error
    return config


def write_config(
    name: str,
    overrides: Sequence[str],
    out: str | Path,
    *,
    overwrite: bool = False,
    cache_dir: str | None = None,
) -> str:
    """Writes `out/config.json` of `hf_config`; returns one line that says what it is.

    A config.json with the same content is kept; transformers' version does not count.

    Raises:
      InputError: as `hf_config`; settings that lm_scale's model of this family has not;
        or, without overwrite, a config.json of another content.
    """
    config = hf_config(name, overrides, cache_dir=cache_dir)
    ours = model_config(config) if config.model_type in HF_TYPES else None
    path = Path(out).expanduser() / "config.json"
    if not str(out) or path.parent.is_file():
        raise InputError(f"{str(out)!r} is no folder to write a config.json to.")
    text = config.to_json_string()
    if not overwrite:
        _check_same(path, json.loads(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if ours is None:
        return f"{path}: {config.model_type}, which lm_scale does not train yet"
    return f"{path}: {config.model_type}, {parameter_count(ours):,} parameters"


def model_config(config: "PreTrainedConfig") -> ModelConfig:
    """lm_scale's own config for this one.

    Raises:
      InputError: no such family, a setting that our model of it has not, or code of
        the model's own.
    """
    source, content = config.name_or_path or "model config", config.to_dict()
    family = family_of_type(config.model_type, source)
    refuse_code(content, source)
    return family.config.from_hf(content)


def parameter_count(config: ModelConfig) -> int:
    """Weights of the model, those shared by input and output counted once."""
    weights = declarations(build_model(config, Compute())).values()
    return sum(math.prod(weight.get_value().shape) for weight in weights)


def _from_folder_or_hub(name: str, cache_dir: str | None) -> "PreTrainedConfig":
    from transformers import AutoConfig

    local = Path(name).expanduser()
    if name.startswith((".", "/", "~")) and not local.exists():
        raise InputError(f"no model config at {name}: there is no such file or folder.")
    source = str(local) if name and local.exists() else name
    try:
        return AutoConfig.from_pretrained(
            source, cache_dir=cache_dir, trust_remote_code=False
        )
    except Exception as error:  # transformers raises all kinds for a broken config
        raise InputError(
            f"no model config {name!r}: expected one of {', '.join(SHAPES)}, a folder "
            "with a config.json or a name on the hub "
            f"({one_line(error, 200)})."
        ) from error


def _override(config: "PreTrainedConfig", override: str) -> None:
    """Sets `key=value`."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PreTrainedConfig

    key, equals, text = override.partition("=")
    if not equals:
        raise InputError(f"override {override!r}: expected key=value.")
    fields = {field.name: field.type for field in dataclasses.fields(config)}
    keys = {*fields, *config.attribute_map, *config.to_dict()} - {*_FIXED}
    if key not in keys:
        near = difflib.get_close_matches(key, sorted(keys), n=3)
        raise InputError(
            f"{override}: a {config.model_type} config has no {key!r}; "
            f"{'the nearest are' if near else 'it has'} "
            f"{', '.join(near or sorted(keys))}."
        )

    name = config.attribute_map.get(key, key)  # hidden_size is n_embd in a gpt2
    current, value = getattr(config, name, None), _parsed(text)
    if isinstance(current, float) and type(value) is int:
        value = float(value)
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    try:
        # transformers checks the fields that the model's own class declares.
        if name not in fields or name in base:
            if None not in (current, value) and type(value) is not type(current):
                raise TypeError
        setattr(config, name, value)
    except (StrictDataclassError, TypeError) as error:
        kind = fields.get(name, type(current))
        kind = kind.__name__ if isinstance(kind, type) else kind
        raise InputError(
            f"{override}: {key} is {current!r} in the config; expected a value of type "
            f"{kind}, as JSON."
        ) from error


def _parsed(text: str) -> Any:
    """`0.1`, `true`, `[1, 2]` as JSON; anything else, NaN included, is a string."""
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text


def _check_same(path: Path, wanted: dict[str, Any]) -> None:
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(there, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is there and is no readable config ({error}); delete it, choose "
            "another folder or overwrite it."
        ) from error
    found = differences(
        *(flatten({**c, "transformers_version": None}) for c in (there, wanted))
    )
    if found:
        raise InputError(
            f"{path} is there with another content: {'; '.join(found)}. Choose another "
            "folder or overwrite it."
        )
