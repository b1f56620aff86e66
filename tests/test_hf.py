# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders without torch: names, configs and what a person gets wrong."""

import json
import re
from dataclasses import replace

import numpy as np
import parity
import pytest
from safetensors.numpy import save_file

from lm_scale import hf
from lm_scale.errors import InputError
from lm_scale.models import build_model, family_of
from lm_scale.models.gpt2 import GPT2Config
from lm_scale.models.layers import Compute
from lm_scale.models.roberta import RobertaConfig
from lm_scale.sharding import declarations, flatten

GPT2 = GPT2Config(
    vocab=37, positions=9, layers=2, embed=12, heads=3, mlp=20, embed_dropout=0.2,
    attention_dropout=0.3, residual_dropout=0.4, norm_epsilon=1e-6, init_std=0.05,
)  # fmt: skip
ROBERTA = RobertaConfig(
    vocab=31, positions=11, layers=3, embed=10, heads=2, mlp=18, token_types=2,
    pad_id=3, dropout=0.2, attention_dropout=0.3, norm_epsilon=1e-6, init_std=0.05,
)  # fmt: skip
both = pytest.mark.parametrize("config", [GPT2, ROBERTA], ids=["gpt2", "roberta"])


def model_of(config):
    return build_model(config, Compute())


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


@both
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


@both
def test_every_weight_has_a_name_and_every_name_a_weight(config):
    names = family_of(config).hf_names
    assert names.keys() == declarations(model_of(config)).keys()


@both
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_are_read_as_float32_and_extra_tensors_ignored(tmp_path, config, dtype):
    tensors = parity.random_tensors(config)  # multiples of 1/64: exact in float16
    stored = {name: x.astype(dtype) for name, x in tensors.items()}
    stored["something.else"] = np.zeros(3, np.int64)
    write_model(tmp_path, config, stored)
    params = hf.read_params(tmp_path, model_of(config))
    assert_bit_equal(hf.to_hf(config, params), tensors)


def test_the_names_of_gpt2_on_the_hub(tmp_path):
    """`openai-community/gpt2` was saved without its head: no `transformer.`."""
    tensors = parity.random_tensors(GPT2)
    bare = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    write_model(tmp_path, GPT2, bare)
    params = hf.read_params(tmp_path, model_of(GPT2))
    assert_bit_equal(hf.to_hf(GPT2, params), tensors)


@both
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
        hf.read_params(write_config(tmp_path, GPT2.to_hf()), model_of(GPT2))


def test_a_damaged_file(tmp_path):
    write_model(tmp_path, GPT2, parity.random_tensors(GPT2))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="model.safetensors"):
        hf.read_params(tmp_path, model_of(GPT2))


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
    params = hf.read_params(tmp_path, model_of(ROBERTA))
    assert_bit_equal(hf.to_hf(ROBERTA, params), tensors)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(InputError, match="b.safetensors"):
        hf.read_params(tmp_path, model_of(ROBERTA))


@pytest.mark.parametrize("index", ["{", "{}", "[]"])
def test_a_damaged_index(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="model.safetensors.index.json"):
        hf.read_params(tmp_path, model_of(GPT2))


# --- Configs --------------------------------------------------------------------------


@both
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
    with pytest.raises(InputError, match=f"{model_type!r}.*gpt2, roberta"):
        hf.read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{'single': 1}", "[]", '"gpt2"', "\udcff"])
def test_an_unreadable_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="config.json"):
        hf.read_config(tmp_path)


def test_no_config_is_named(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        hf.read_config(tmp_path / "nowhere")
