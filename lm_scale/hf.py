# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders, in both directions: config.json, tokenizer, model.safetensors.

transformers reads and writes configs and tokenizers; the mathematics is our own, and
the weights pass through safetensors by the families' name tables.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from lm_scale.data.tokenizer import TOKENIZER_FILES
from lm_scale.errors import InputError, one_line
from lm_scale.models import Model, ModelConfig, family_of, family_of_type
from lm_scale.models.layers import HFWeight
from lm_scale.sharding import Params, declarations, flatten, unflatten
from lm_scale.weight_files import FLAX, NO_PICKLES, SAFETENSORS, files_of, read_tensors

Tensors = Mapping[str, np.ndarray]

# What is fetched from a hub repository, by glob: no code, and no pickles (*.bin).
_SETTINGS = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_SAFETENSORS_FILES = (
    SAFETENSORS,
    f"{SAFETENSORS}.index.json",
    "model-*-of-*.safetensors",
)
_FLAX_FILES = (
    FLAX,
    f"{FLAX}.index.json",
    "flax_model-*-of-*.msgpack",
)


def export(config: ModelConfig, params: Params, tokenizer, folder: Path | str) -> None:
    """Writes a folder that `transformers.AutoModelFor...` and `AutoTokenizer` load.

    Weights are float32. Gathers the model on each host; process 0 writes. A file gets
    its name when it is whole, and the weights get theirs last.
    """
    gathered = multihost_utils.process_allgather(params, tiled=True)
    if jax.process_index() != 0:
        return
    folder = Path(folder)
    draft = folder / ".export"
    shutil.rmtree(draft, ignore_errors=True)  # of an export that was killed
    draft.mkdir(parents=True)
    try:
        _write_settings(config, tokenizer, draft)
        save_file(
            to_hf(config, gathered), draft / SAFETENSORS, metadata={"format": "pt"}
        )
        # safetensors lets nobody but the owner read; this is a file as the others.
        shutil.copymode(draft / "config.json", draft / SAFETENSORS)
        files = (path for path in draft.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == SAFETENSORS):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # or a power cut may leave the new name empty
            target = folder / path.relative_to(draft)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_settings(config: ModelConfig, tokenizer, folder: Path) -> None:
    """config.json, generation_config.json of a causal model, and the tokenizer."""
    from transformers import AutoConfig, GenerationConfig

    ids = {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if getattr(tokenizer, name) is not None
    }
    settings = {**ids, **config.to_hf(), "dtype": "float32"}
    AutoConfig.for_model(**settings).save_pretrained(folder)
    if family_of(config).causal:
        # A text-generation pipeline adds 256 tokens if nothing bounds it, which would
        # run over a short position table; a longer one needs no bound, and transformers
        # would remark on it whenever `max_new_tokens` is given as well.
        bound = {"max_length": config.positions} if config.positions < 512 else {}
        GenerationConfig(**ids, **bound).save_pretrained(folder)
    tokenizer.model_max_length = config.positions
    tokenizer.save_pretrained(folder)


def fetch(name: str, *, weights: bool = True, cache_dir: str | None = None) -> Path:
    """The folder of a model: a local one as it is, or a hub repository's, downloaded.

    Fetches config, tokenizer and, unless `weights` is False, safetensors, or else Flax
    weights. A repository that was fetched before needs no network. cache_dir: where
    downloads are kept; None: Hugging Face's own cache.

    Raises InputError: no such folder or repository, no network, or no such weights.
    """
    local = Path(name).expanduser()
    if name and local.is_dir():
        return local
    if local.exists() or name.startswith((".", "/", "~")):
        raise InputError(
            f"{name!r} is not a folder: give a folder with a config.json, or the name "
            "of a Hugging Face hub repository."
        )
    folder = _download(name, _SETTINGS + _SAFETENSORS_FILES * weights, cache_dir)
    if weights and not files_of(folder, SAFETENSORS):
        folder = _download(name, _SETTINGS + _FLAX_FILES, cache_dir)
        if not files_of(folder, FLAX):
            raise InputError(
                f"The hub repository {name} has neither {SAFETENSORS} nor {FLAX}; "
                f"{NO_PICKLES}."
            )
    return folder


def _download(name: str, patterns: tuple[str, ...], cache_dir: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        found = snapshot_download(
            name, allow_patterns=list(patterns), cache_dir=cache_dir
        )
    except HFValidationError as error:
        raise InputError(
            f"{name!r} is neither a folder nor a possible name of a Hugging Face hub "
            "repository: expected OWNER/MODEL."
        ) from error
    except RepositoryNotFoundError as error:  # gated ones as well
        raise InputError(
            f"The Hugging Face hub has no repository {name!r} that you may read: check "
            "the name, or log in (`hf auth login`) if it is private or gated."
        ) from error
    except Exception as error:  # of the network, the disk and three HTTP libraries
        raise InputError(
            f"{name!r} is no local folder and cannot be fetched from the Hugging Face "
            f"hub: give a folder, or connect to the network ({one_line(error):.200})."
        ) from error
    return Path(found)


def read_config(folder: Path | str) -> ModelConfig:
    """The model config of a Hugging Face folder; InputError if we lack the family."""
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, found {content!r:.40}")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a readable Hugging Face config: {error}"
        ) from error
    family = family_of_type(content.get("model_type"), path)
    return family.config.from_hf(_with_defaults(content))


def _with_defaults(content: dict) -> dict:
    """A config.json may leave out what equals transformers' default."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    arguments = {name: x for name, x in content.items() if name != "model_type"}
    try:
        return AutoConfig.for_model(content["model_type"], **arguments).to_dict()
    except StrictDataclassError as error:
        raise InputError(
            f"The config.json is not valid: {one_line(error):.300}"
        ) from error


def read_params(folder: Path | str, model: Model) -> Params:
    """The parameters (float32 numpy) of a folder with safetensors or Flax weights.

    Raises InputError as `read_tensors` does, and naming a tensor that is missing or has
    another shape.
    """
    return from_hf(model, read_tensors(Path(folder)))


def to_hf(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Our parameters -> Hugging Face's tensors by name."""
    tensors = {}
    names = family_of(config).hf_names
    for path, value in flatten(params).items():
        value, entry = np.asarray(value, np.float32), names[path]
        blocks = value if path.startswith("blocks.") else value[None]
        for layer, block in enumerate(blocks):
            tensors |= _block_to_hf(entry, block, layer)
    return tensors


def _block_to_hf(entry: HFWeight, block: np.ndarray, layer: int) -> Tensors:
    several = len(entry.names) > 1
    parts = np.moveaxis(block, entry.stack_axis, 0) if several else block[None]
    tensors = {}
    for name, part in zip(entry.names, parts, strict=True):
        part = part.reshape(entry.matrix_shape(part.shape))
        part = part.T if entry.transpose else part
        tensors[name.format(layer=layer)] = np.ascontiguousarray(part)
    return tensors


def from_hf(model: Model, tensors: Tensors) -> Params:
    """Hugging Face's tensors -> our parameters, float32 numpy.

    Raises InputError naming a tensor that is missing or has another shape.
    """
    names = family_of(model.config).hf_names
    params = {}
    for path, weight in declarations(model).items():
        shape, entry = weight.get_value().shape, names[path]
        if path.startswith("blocks."):
            blocks = [
                _block_from_hf(entry, tensors, shape[1:], layer)
                for layer in range(shape[0])
            ]
            params[path] = np.stack(blocks)
        else:
            params[path] = _block_from_hf(entry, tensors, shape, 0)
    return unflatten(params)


def _block_from_hf(
    entry: HFWeight, tensors: Tensors, shape: tuple[int, ...], layer: int
) -> np.ndarray:
    axis, several = entry.stack_axis, len(entry.names) > 1
    part_shape = shape[:axis] + shape[axis + 1 :] if several else shape
    parts = []
    for name in entry.names:
        name = name.format(layer=layer)
        # Saved without its head, as `openai-community/gpt2`: no `transformer.`.
        tensor = tensors.get(name, tensors.get(name.partition(".")[2]))
        if tensor is None:
            raise InputError(
                f"The Hugging Face checkpoint has no tensor {name!r}. Does the config "
                "belong to these weights, and were they saved with the model's head?"
            )
        tensor = np.asarray(tensor, np.float32)
        expected = entry.matrix_shape(part_shape)
        expected = expected[::-1] if entry.transpose else expected
        if tensor.shape != expected:
            raise InputError(
                f"Tensor {name!r} has shape {tensor.shape}, the model expects "
                f"{expected}. Does the config belong to these weights?"
            )
        tensor = tensor.T if entry.transpose else tensor
        parts.append(tensor.reshape(part_shape))
    return np.stack(parts, axis) if several else parts[0]
