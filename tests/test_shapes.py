# SPDX-License-Identifier: Apache-2.0
"""Named shapes: the published numbers, overrides, and what a person gets wrong."""

import json

import pytest
from transformers import AutoConfig

from lm_scale.errors import InputError
from lm_scale.models import GPT2Config, RobertaConfig
from lm_scale.shapes import (
    SHAPES,
    hf_config,
    model_config,
    parameter_count,
    write_config,
)

PARAMETERS = {
    "roberta-base": 124_697_433,  # with the masked-LM head
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "bert-base": 109_514_298,  # BertForMaskedLM
}


def bert_parameters(config) -> int:
    """lm_scale has no BERT: from the sizes of `transformers.BertForMaskedLM`."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    rows = V + config.max_position_embeddings + config.type_vocab_size
    block = 4 * (D * D + D) + 2 * D * F + D + F + 4 * D
    head = D * D + D + 2 * D + V
    return rows * D + 2 * D + config.num_hidden_layers * block + head


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_have_the_published_number_of_parameters(name):
    config = hf_config(name)
    if name == "bert-base":
        assert bert_parameters(config) == PARAMETERS[name]
    else:
        assert parameter_count(model_config(config)) == PARAMETERS[name]


def test_ours_of_the_base_shapes_are_the_defaults():
    assert model_config(hf_config("gpt2")) == GPT2Config()
    assert model_config(hf_config("roberta-base")) == RobertaConfig()
    with pytest.raises(InputError, match="'bert' is not supported. There are: gpt2, "):
        model_config(hf_config("bert-base"))


def test_published_ids_and_settings():
    roberta = hf_config("roberta-base")
    ids = roberta.bos_token_id, roberta.pad_token_id, roberta.eos_token_id
    assert ids == (0, 1, 2)
    assert roberta.max_position_embeddings == 514
    assert (roberta.type_vocab_size, roberta.layer_norm_eps) == (1, 1e-5)
    gpt2 = hf_config("gpt2-xl")
    assert (gpt2.bos_token_id, gpt2.eos_token_id) == (50256, 50256)
    assert (gpt2.n_layer, gpt2.n_embd, gpt2.n_head) == (48, 1600, 25)
    bert = hf_config("bert-base")
    assert (bert.vocab_size, bert.pad_token_id) == (30522, 0)
    assert (bert.type_vocab_size, bert.layer_norm_eps) == (2, 1e-12)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("FacebookAI/roberta-base", "roberta-base"),
        ("openai-community/gpt2", "gpt2"),
        ("openai-community/gpt2-large", "gpt2-large"),
        ("google-bert/bert-base-uncased", "bert-base"),
        ("bert-base-uncased", "bert-base"),
    ],
)
def test_hub_names_need_no_network(name, short):
    assert hf_config(name).to_dict() == hf_config(short).to_dict()


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_written_loads_as_it_was(name, tmp_path):
    line = write_config(name, ["vocab_size=50304"], tmp_path / "new" / "folder")
    loaded = AutoConfig.from_pretrained(tmp_path / "new" / "folder")
    expected = hf_config(name, ["vocab_size=50304"])
    assert type(loaded) is type(expected)
    assert loaded.vocab_size == 50304
    assert loaded.architectures == SHAPES[name]["architectures"]
    assert loaded.to_diff_dict() == expected.to_diff_dict()
    if name == "bert-base":
        assert "does not train yet" in line
    else:
        assert line.endswith(" parameters")


def test_overrides_are_json_or_else_strings():
    config = hf_config(
        "gpt2",
        [
            "resid_pdrop=0", "layer_norm_epsilon=1", "n_inner=12", "use_cache=false",
            "activation_function=gelu_pytorch_tanh", "pad_token_id=null",
            "eos_token_id=[1, 2]", "hidden_size=24", 'architectures=["A=B"]',
        ],
    )  # fmt: skip
    assert (config.resid_pdrop, config.layer_norm_epsilon) == (0.0, 1.0)
    assert type(config.resid_pdrop) is type(config.layer_norm_epsilon) is float
    assert (config.n_inner, config.n_embd, config.use_cache) == (12, 24, False)
    assert config.activation_function == "gelu_pytorch_tanh"
    assert config.pad_token_id is None and config.eos_token_id == [1, 2]
    assert config.architectures == ["A=B"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("n_layer", "'n_layer': expected key=value"),
        ("resid_drop=0.0", "has no 'resid_drop'; the nearest are resid_pdrop"),
        ("=3", "a gpt2 config has no ''; it has"),
        ("model_type=bert", "has no 'model_type'"),
        ("n_layer=2.0", "n_layer=2.0: .* type int"),
        ("n_layer=true", "n_layer=true: .* type int"),
        ("n_layer=null", "n_layer=null: .* type int"),
        ("hidden_size=12.5", "hidden_size=12.5: hidden_size is 768 .* type int"),
        ("layer_norm_epsilon=abc", "layer_norm_epsilon=abc: .* type float"),
        ("resid_pdrop=abc", r"resid_pdrop=abc: .* type float \| int"),
        ("resid_pdrop=NaN", "resid_pdrop=NaN: .* type float"),
        ("use_cache=True", "use_cache=True: .* type bool"),
        ("activation_function=3", "activation_function=3: .* type str"),
        ("architectures=GPT2LMHeadModel", "architectures=.* type list"),
    ],
)
def test_wrong_overrides_are_refused(override, message):
    with pytest.raises(InputError, match=message):
        hf_config("gpt2", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("activation_function=relu", "activation_function = 'relu' is not supported"),
        ("n_head=7", "must be a multiple"),
        ("vocab_size=0", "expected a number above 0"),
        ("resid_pdrop=1.0", "expected 0 <="),
    ],
)
def test_what_our_model_cannot_be_is_refused_before_writing(
    override, message, tmp_path
):
    with pytest.raises(InputError, match=message):
        write_config("gpt2", [override], tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_config_is_not_overwritten_unasked(tmp_path):
    write_config("gpt2", [], tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    old = json.dumps({**content, "transformers_version": "4.9.0"})
    (tmp_path / "config.json").write_text(old)
    write_config("gpt2", [], tmp_path)  # the same
    with pytest.raises(InputError, match="another content: n_layer: 12 there, 3 here"):
        write_config("gpt2", ["n_layer=3"], tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).n_layer == 12
    write_config("gpt2", ["n_layer=3"], tmp_path, overwrite=True)
    assert AutoConfig.from_pretrained(tmp_path).n_layer == 3
    for broken in ("{", "[]"):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(InputError, match="no readable config"):
            write_config("gpt2", [], tmp_path)


def test_no_folder_to_write_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("", tmp_path / "file"):
        with pytest.raises(InputError, match="is no folder to write"):
            write_config("gpt2", [], out)


def test_a_folder_is_a_source_with_all_its_keys(tmp_path):
    write_config("gpt2", ["n_layer=3"], tmp_path / "a")
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**content, "n_ctx": 1024}))
    write_config(str(tmp_path / "a"), ["n_head=6", "n_ctx=512"], tmp_path / "b")
    written = (tmp_path / "b" / "config.json").read_text()
    assert str(tmp_path) not in written
    content = json.loads(written)
    assert (content["n_layer"], content["n_head"], content["n_ctx"]) == (3, 6, 512)
    with pytest.raises(InputError, match="n_ctx=abc: .* type int"):
        hf_config(str(tmp_path / "a"), ["n_ctx=abc"])


def test_settings_are_checked_together_when_all_are_set(tmp_path):
    llama = {"model_type": "llama", "hidden_size": 12, "num_attention_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    both = ["hidden_size=8", "num_attention_heads=4", "num_key_value_heads=4"]
    assert hf_config(str(tmp_path), both).hidden_size == 8
    with pytest.raises(InputError, match="with hidden_size=8 is no model: .*multiple"):
        hf_config(str(tmp_path), both[:1])


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_folder_with_a_config_wins_over_the_shape_of_its_name(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    assert hf_config(name).n_layer == 12
    write_config(name, ["n_layer=3"], name)
    assert hf_config(name).n_layer == 3
    (tmp_path / name / "config.json").write_text("{")
    with pytest.raises(InputError, match=f"no model config {name!r}"):
        hf_config(name)


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"model_type": "gpt2", "n_layer": "x"}']
)
def test_a_broken_config_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="no model config .* expected one of") as error:
        hf_config(str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="'gpt3': expected one of roberta-base, gpt2"):
        hf_config("gpt3")  # the tests are offline
    with pytest.raises(InputError, match="there is no such file or folder"):
        hf_config("./gpt3")
