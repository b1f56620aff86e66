# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders, in both directions: config.json, tokenizer, safetensors.

transformers reads and writes configs and tokenizers; the mathematics is our own, and
the weights pass through safetensors by the families' name tables. No process holds the
whole model: each reads what its devices hold, and writes some of the files.
"""

import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh

from lm_scale import distributed
from lm_scale.data.tokenizer import TOKENIZER_FILES
from lm_scale.errors import InputError, one_line
from lm_scale.hf_shards import deal_out, publish, write_files
from lm_scale.hf_tensors import block_to_hf, check_tensors, is_stacked, read_part
from lm_scale.models import Model, ModelConfig, family_of, family_of_type, refuse_code
from lm_scale.sharding import (
    Params,
    abstract_params,
    declarations,
    flatten,
    unflatten,
)
from lm_scale.weight_files import (
    FLAX,
    NO_PICKLES,
    SAFETENSORS,
    SAFETENSORS_INDEX,
    Tensor,
    files_of,
    open_tensors,
)

Tensors = Mapping[str, np.ndarray]

# What is fetched from a hub repository, by glob: no code, and no pickles (*.bin).
_SETTINGS = ("config.json", "generation_config.json", *TOKENIZER_FILES)
_SAFETENSORS_FILES = (
    SAFETENSORS,
    SAFETENSORS_INDEX,
    "model-*-of-*.safetensors",
)
_FLAX_FILES = (
    FLAX,
    f"{FLAX}.index.json",
    "flax_model-*-of-*.msgpack",
)


def export(config: ModelConfig, params: Params, tokenizer, folder: Path | str) -> None:
    """Writes a folder that `transformers.AutoModelFor...` and `AutoTokenizer` load.

    Weights are float32, in one file, or in several with an index. All processes call
    it; each writes its share of the files if all of them see the folder, else process
    0 writes all into its own. A file gets its name when it is whole, and the weights
    get theirs last.
    """
    folder, leads = Path(folder), jax.process_index() == 0
    draft, files = folder / ".export", deal_out(config, flatten(params))
    mark = draft / uuid4().hex  # process 0's, of this draft: not an old one
    try:
        if leads:
            shutil.rmtree(draft, ignore_errors=True)  # of an export that was killed
            draft.mkdir(parents=True)
            _write_settings(config, tokenizer, draft)
            mark.touch()
        mark = draft / distributed.from_first(mark.name)  # which is there by now
        shared = all(distributed.everyone(mark.exists()))
        write_files(files, draft, jax.process_count() if shared else 1)
        sync_global_devices("lm_scale.export: the draft is whole")
        if leads:
            mark.unlink()
            publish(draft, folder)
    finally:
        if leads:
            shutil.rmtree(draft, ignore_errors=True)
    sync_global_devices("lm_scale.export: the folder is whole")


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
            f"hub: give a folder, or connect to the network ({one_line(error, 200)})."
        ) from error
    return Path(found)


def read_config(folder: Path | str) -> ModelConfig:
    """The model config of a Hugging Face folder.

    Raises InputError if we lack the family, and for a model with code of its own.
    """
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
    refuse_code(content, path)
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
            f"The config.json is not valid: {one_line(error, 300)}"
        ) from error


def read_params(folder: Path | str, model: Model, mesh: Mesh) -> Params:
    """The parameters of a folder with safetensors or Flax weights, on the mesh.

    Of safetensors, a process reads what its devices hold. Raises InputError as
    `open_tensors` does, and, before it reads a value, as `check_tensors`.
    """
    tensors = open_tensors(Path(folder))
    check_tensors(model, tensors)
    names = family_of(model.config).hf_names

    def read(path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        @functools.cache  # jax asks for each device, and replicas hold the same part
        def part(*ranges):
            return read_part(path, names[path], tensors, target.shape, ranges)

        def shard(index) -> np.ndarray:
            sizes = zip(index, target.shape, strict=True)
            return part(*(axis.indices(size)[:2] for axis, size in sizes))

        return jax.make_array_from_callback(target.shape, target.sharding, shard)

    targets = flatten(abstract_params(model, model.compute.rules, mesh))
    return unflatten({path: read(path, target) for path, target in targets.items()})


def to_hf(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """Our parameters -> Hugging Face's tensors by name."""
    tensors = {}
    names = family_of(config).hf_names
    for path, value in flatten(params).items():
        blocks = np.asarray(value) if is_stacked(path) else np.asarray(value)[None]
        for layer, block in enumerate(blocks):
            tensors |= block_to_hf(names[path], block, layer)
    return tensors


def from_hf(model: Model, tensors: Mapping[str, Tensor]) -> Params:
    """Hugging Face's tensors -> our parameters, float32 numpy.

    Raises InputError naming a tensor that is missing or has another shape.
    """
    check_tensors(model, tensors)
    names, params = family_of(model.config).hf_names, {}
    for path, weight in declarations(model).items():
        shape = weight.get_value().shape
        whole = tuple((0, size) for size in shape)
        params[path] = read_part(path, names[path], tensors, shape, whole)
    return unflatten(params)
