# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders without torch: names, configs and what a person gets wrong."""

import json
import os
import re
import shutil
from dataclasses import replace
from fnmatch import fnmatch

import ml_dtypes
import numpy as np
import parity
import pytest
from safetensors.numpy import save_file

from lm_scale import hf, hf_shards
from lm_scale.data.tokenizer import TokenizerConfig, train_tokenizer
from lm_scale.errors import InputError
from lm_scale.models import build_model, family_of
from lm_scale.models.compute import Compute
from lm_scale.models.gpt2 import GPT2Config
from lm_scale.models.llama import LlamaConfig
from lm_scale.models.roberta import RobertaConfig
from lm_scale.models.rotary import FrequencyScaling
from lm_scale.sharding import declarations, flatten

GPT2 = GPT2Config(
    vocab=37, positions=9, layers=2, embed=12, heads=3, mlp=20, embed_dropout=0.2,
    attention_dropout=0.3, residual_dropout=0.4, norm_epsilon=1e-6, init_std=0.05,
)  # fmt: skip
ROBERTA = RobertaConfig(
    vocab=31, positions=11, layers=3, embed=10, heads=2, mlp=18, token_types=2,
    pad_id=3, dropout=0.2, attention_dropout=0.3, norm_epsilon=1e-6, init_std=0.05,
)  # fmt: skip
LLAMA = LlamaConfig(
    vocab=31, positions=11, layers=2, embed=12, heads=6, kv_heads=2, head_dim=4,
    mlp=18, qkv_bias=True, out_bias=True, mlp_bias=True, attention_dropout=0.3,
    rope_theta=500.0, rope_scaling=FrequencyScaling(factor=4.0, original=16),
    norm_epsilon=1e-6, init_std=0.05,
)  # fmt: skip
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "roberta": ROBERTA}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def model_of(config):
    return build_model(config, Compute())


def read_params(folder, config):
    return hf.read_params(folder, model_of(config), parity.one_device())


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def write_config(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "config.json").write_text(text)
    return folder


def write_model(folder, config, tensors):
    write_config(folder, config.to_hf())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# --- Weights --------------------------------------------------------------------------


@each
def test_weights_come_back_as_they_were(config):
    rng = np.random.default_rng(0)
    flat = {
        path: rng.standard_normal(weight.get_value().shape, np.float32)
        for path, weight in declarations(model_of(config)).items()
    }
    tensors = hf.to_hf(config, hf.unflatten(flat))
    assert sum(x.size for x in tensors.values()) == sum(x.size for x in flat.values())
    assert_bit_equal(flatten(hf.from_hf(model_of(config), tensors)), flat)
    again = hf.to_hf(config, hf.from_hf(model_of(config), tensors))
    assert_bit_equal(again, tensors)


@each
def test_every_weight_has_a_name_and_every_name_a_weight(config):
    weights = declarations(model_of(config)).keys()
    if config == LLAMA:  # none of its relatives has them all
        qwen3 = replace(config, kind="qwen3", mlp_bias=False, qk_norm=True)
        weights |= declarations(model_of(qwen3)).keys()
    assert family_of(config).hf_names.keys() == weights


@each
@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_files_are_read_as_float32_and_extra_tensors_ignored(tmp_path, config, dtype):
    tensors = parity.random_tensors(config)  # multiples of 1/64
    stored = {name: x.astype(dtype) for name, x in tensors.items()}
    tensors = {name: x.astype(np.float32) for name, x in stored.items()}
    stored["something.else"] = np.zeros(3, np.int64)
    write_model(tmp_path, config, stored)
    params = read_params(tmp_path, config)
    assert_bit_equal(hf.to_hf(config, params), tensors)


def test_the_names_of_gpt2_on_the_hub(tmp_path):
    """`openai-community/gpt2` was saved without its head: no `transformer.`."""
    tensors = parity.random_tensors(GPT2)
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    write_model(tmp_path, GPT2, bare)
    params = read_params(tmp_path, GPT2)
    assert_bit_equal(hf.to_hf(GPT2, params), tensors)


@each
def test_a_missing_tensor_is_named(config):
    tensors = dict(parity.random_tensors(config))
    name = next(name for name in tensors if ".1." in name and name.endswith("bias"))
    del tensors[name]
    with pytest.raises(InputError, match=name):
        hf.from_hf(model_of(config), tensors)


@pytest.mark.parametrize(
    ("config", "name", "shapes"),  # as they are in the file
    [
        (GPT2, "transformer.h.1.mlp.c_fc.weight", ((11, 20), (12, 20))),
        (GPT2, "transformer.h.1.attn.c_attn.bias", ((35,), (36,))),
        (
            ROBERTA,
            "roberta.encoder.layer.2.intermediate.dense.weight",
            ((17, 10), (18, 10)),
        ),
        (
            ROBERTA,
            "roberta.encoder.layer.2.attention.self.key.bias",
            ((9,), (10,)),
        ),
        (LLAMA, "model.layers.1.self_attn.v_proj.weight", ((7, 12), (8, 12))),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_both_shapes(config, name, shapes):
    tensors = dict(parity.random_tensors(config))
    tensors[name] = tensors[name][:-1]
    there, expected = (re.escape(str(shape)) for shape in shapes)
    with pytest.raises(InputError, match=f"{re.escape(name)}.*{there}.*{expected}"):
        hf.from_hf(model_of(config), tensors)


def test_fewer_rows_of_positions_than_the_config_says():
    tensors = parity.random_tensors(replace(GPT2, positions=8))
    with pytest.raises(InputError, match=r"transformer\.wpe\.weight.*\(8, 12\)"):
        hf.from_hf(model_of(GPT2), tensors)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(InputError, match="model.safetensors"):
        read_params(write_config(tmp_path, GPT2.to_hf()), GPT2)


def test_a_damaged_file(tmp_path):
    write_model(tmp_path, GPT2, parity.random_tensors(GPT2))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="model.safetensors"):
        read_params(tmp_path, GPT2)


def sharded(folder, tensors):
    """Two files and their index, as transformers writes them."""
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_checkpoint_in_several_files(tmp_path):
    tensors = parity.random_tensors(ROBERTA)
    sharded(tmp_path, tensors)
    params = read_params(tmp_path, ROBERTA)
    assert_bit_equal(hf.to_hf(ROBERTA, params), tensors)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match="b.safetensors"):
        read_params(tmp_path, ROBERTA)


def test_one_whole_file_goes_before_an_index(tmp_path):
    """As in transformers: a folder may hold an older checkpoint's index."""
    sharded(tmp_path, {})
    write_model(tmp_path, GPT2, tensors := parity.random_tensors(GPT2))
    params = read_params(tmp_path, GPT2)
    assert_bit_equal(hf.to_hf(GPT2, params), tensors)


INDICES = ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}']


@pytest.mark.parametrize("index", [*INDICES, '{"weight_map": {"a": "../b"}}'])
def test_a_damaged_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="model.safetensors.index.json"):
        read_params(tmp_path, GPT2)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"]
)
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match="never loaded.*save_pretrained"):
        read_params(tmp_path, GPT2)


# --- Export ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    settings = TokenizerConfig(vocab_size=257, kind="gpt2")
    return train_tokenizer(["no pair twice"], settings)


def export(folder, tokenizer, config=GPT2):
    config = replace(config, vocab=300)
    tensors = parity.random_tensors(config)
    params = parity.placed(model_of(config), tensors, parity.one_device())
    hf.export(config, params, tokenizer, folder)


def test_the_files_of_an_export(tmp_path, tokenizer):
    export(folder := tmp_path / "new" / "folder", tokenizer)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize(("positions", "bound"), [(9, 9), (1024, None)])
def test_only_a_short_model_bounds_the_length_of_generation(
    tmp_path, tokenizer, positions, bound
):
    export(tmp_path, tokenizer, replace(GPT2, positions=positions))
    content = json.loads((tmp_path / "generation_config.json").read_text())
    assert content.get("max_length") == bound
    assert content["eos_token_id"] == tokenizer.eos_token_id


def test_an_export_that_fails_leaves_the_files_before_it(
    tmp_path, tokenizer, monkeypatch
):
    export(tmp_path, tokenizer)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half of")
        raise OSError("no space left")

    monkeypatch.setattr(hf_shards, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export(tmp_path, tokenizer, replace(GPT2, layers=1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_export_that_was_killed_is_cleared_by_the_next(
    tmp_path, tokenizer, monkeypatch
):
    """At the moment when files get their names: all or nothing, the weights last."""
    named = []

    def killed(source, target):
        assert source.read_bytes()  # whole, in the same folder and so the same disk
        assert tmp_path in source.parents
        named.append(target.name)
        if target.name == "model.safetensors":
            raise KeyboardInterrupt
        shutil.move(source, target)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path, tokenizer)
    assert named[-1] == "model.safetensors" and "config.json" in named
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.undo()
    export(tmp_path, tokenizer)
    assert {path.name for path in tmp_path.iterdir()} == set(named)


# --- The hub --------------------------------------------------------------------------


HUB_FILES = {
    "safetensors": [
        "config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
        "merges.txt", "model.safetensors",
    ],
    "shards": [
        "config.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ],
    "flax": ["config.json", "tokenizer.json", "flax_model.msgpack"],
    "flax shards": [
        "config.json", "flax_model.msgpack.index.json",
        "flax_model-00001-of-00001.msgpack",
    ],
}  # fmt: skip
UNWANTED = [
    "pytorch_model.bin", "training_args.bin", "modeling.py", "tokenization.py",
    "model.fp16.safetensors", "onnx/config.json", "tf_model.h5",
]  # fmt: skip


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository, `someone/model`, whose files a test sets.

    `hub.files` is what lies there, `hub.error` what reaching for it raises.
    """

    class Hub:
        files: list[str] = []
        error: Exception | None = None
        cache_dirs: list[str | None] = []

    def snapshot_download(repo_id, *, allow_patterns, cache_dir):
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo_id)
        if Hub.error:
            raise Hub.error
        Hub.cache_dirs = [*Hub.cache_dirs, cache_dir]
        folder = tmp_path / "snapshot"
        for name in Hub.files:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                weight_map = {"weight_map": {"a": Hub.files[-1]}}
                (folder / name).write_text(json.dumps(weight_map))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return Hub


def files_below(folder):
    return {str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()}


@pytest.mark.parametrize("kind", HUB_FILES)
def test_what_is_fetched_from_the_hub(hub, kind):
    hub.files = UNWANTED + HUB_FILES[kind]
    folder = hf.fetch("someone/model", cache_dir="kept")
    assert files_below(folder) == set(HUB_FILES[kind])
    assert set(hub.cache_dirs) == {"kept"}


def test_flax_weights_are_fetched_only_if_there_is_nothing_else(hub):
    hub.files = HUB_FILES["flax"] + HUB_FILES["safetensors"]
    folder = hf.fetch("someone/model")
    assert "flax_model.msgpack" not in files_below(folder)


def test_a_config_is_fetched_without_weights(hub):
    hub.files = ["pytorch_model.bin", *HUB_FILES["safetensors"]]
    folder = hf.fetch("someone/model", weights=False)
    assert files_below(folder) == set(HUB_FILES["safetensors"]) - {"model.safetensors"}


def test_a_repository_with_pickles_alone(hub):
    hub.files = ["config.json", "pytorch_model.bin"]
    with pytest.raises(InputError, match="someone/model.*never loaded.*save_pretr"):
        hf.fetch("someone/model")


def test_a_local_folder_is_taken_as_it_is(hub, tmp_path, monkeypatch):
    hub.error = AssertionError("the hub was asked")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    for name in (str(tmp_path / "model"), "model", "./model", "~/model"):
        assert hf.fetch(name).samefile(tmp_path / "model")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", ""])
def test_a_path_that_is_no_folder_never_goes_to_the_hub(hub, name):
    hub.error = AssertionError("the hub was asked")
    with pytest.raises(InputError, match=f"'{name}' is not a folder"):
        hf.fetch(name)


@pytest.mark.parametrize("name", ["a/b/c", "two words", "someone/model.git"])
def test_a_name_that_no_repository_has(hub, name):
    with pytest.raises(InputError, match="neither a folder nor a possible name"):
        hf.fetch(name)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RepositoryNotFoundError", "no repository 'someone/model'.*hf auth login"),
        ("GatedRepoError", "no repository 'someone/model'.*hf auth login"),
        ("LocalEntryNotFoundError", "cannot be fetched.*network.*no route to host"),
        ("OfflineModeIsEnabled", "cannot be fetched.*network.*no route to host"),
    ],
)
def test_the_hub_says_no(hub, kind, message):
    from huggingface_hub import errors

    class Raised(getattr(errors, kind)):
        def __init__(self):  # not asking for the response that it came with
            Exception.__init__(self, "no route\nto host")

    hub.error = Raised()
    with pytest.raises(InputError, match=message) as caught:
        hf.fetch("someone/model")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_real_hub_library_says_so(tmp_path):
    """HF_HUB_OFFLINE is set for every test."""
    with pytest.raises(InputError, match="'someone/model'.*cannot be fetched"):
        hf.fetch("someone/model", cache_dir=str(tmp_path))


# --- Configs --------------------------------------------------------------------------


@each
def test_a_config_passes_through_transformers(tmp_path, config):
    from transformers import AutoConfig

    settings = AutoConfig.for_model(**config.to_hf())
    assert type(config).from_hf(settings.to_dict()) == config
    settings.save_pretrained(tmp_path)
    assert hf.read_config(tmp_path) == config
    for value in config.to_hf().items():  # nothing that transformers does not know
        assert value in settings.to_dict().items()


def test_what_a_config_leaves_out_is_transformers_default(tmp_path):
    write_config(tmp_path, {"model_type": "gpt2", "n_embd": 24})
    assert hf.read_config(tmp_path) == GPT2Config(embed=24, mlp=96)
    write_config(tmp_path, {"model_type": "roberta", "hidden_size": 24})
    assert hf.read_config(tmp_path) == RobertaConfig(
        embed=24, positions=510, token_types=2, norm_epsilon=1e-12
    )


def test_the_config_of_roberta_base(tmp_path):
    """As it lies on the hub."""
    content = {
        "architectures": ["RobertaForMaskedLM"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": 768,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514,
        "model_type": "roberta",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "type_vocab_size": 1,
        "vocab_size": 50265,
    }
    assert hf.read_config(write_config(tmp_path, content)) == RobertaConfig()


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (GPT2, "activation_function", "relu"),
        (GPT2, "scale_attn_by_inverse_layer_idx", True),
        (GPT2, "scale_attn_weights", False),
        (GPT2, "tie_word_embeddings", False),
        (ROBERTA, "hidden_act", "gelu_new"),
        (ROBERTA, "position_embedding_type", "relative_key"),
        (ROBERTA, "is_decoder", True),
        (ROBERTA, "tie_word_embeddings", False),
    ],
)
def test_what_we_do_not_compute_is_refused(tmp_path, config, name, value):
    write_config(tmp_path, config.to_hf() | {name: value})
    with pytest.raises(InputError, match=f"{name} = {value!r}"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("model_type", ["bloom", None])
def test_another_family_is_refused(tmp_path, model_type):
    write_config(tmp_path, {"model_type": model_type, "vocab_size": 7})
    with pytest.raises(InputError, match=f"{model_type!r}.*gpt2, llama, .*roberta"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{'single': 1}", "[]", '"gpt2"', "\udcff"])
def test_an_unreadable_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="config.json"):
        hf.read_config(tmp_path)


def test_no_config_is_named(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        hf.read_config(tmp_path / "nowhere")
