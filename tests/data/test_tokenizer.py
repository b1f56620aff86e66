# SPDX-License-Identifier: Apache-2.0
"""Byte-level BPE: ids, roles, round trips through files and through odd text."""

import json

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from lm_scale.data.tokenizer import (
    TokenizerConfig,
    describe_roles,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from lm_scale.errors import InputError

TEXTS = [
    f"The {noun} of number {i} is {noun}ing slowly, isn't it?\n"
    for i in range(60)
    for noun in ("train", "model", "token")
]
ODD = [
    "",
    " ",
    "  two  spaces , and a 'quote' ?",
    "tabs\tand\r\nlines\n\n",
    "naïve ﬁ Ω ½ \u0301combining \u202eright-to-left\u202c",
    "👩‍👩‍👧 🏳️‍🌈 \U0010ffff \u0000 \ufeff",
    "日本語とไทย និង ខ្មែរ",
]


@pytest.fixture(scope="module", params=["gpt2", "roberta"])
def tokenizer(request):
    config = TokenizerConfig(vocab_size=320, kind=request.param)
    return train_tokenizer(TEXTS, config, max_length=128)


@pytest.fixture(scope="module")
def roberta():
    config = TokenizerConfig(vocab_size=320, kind="roberta")
    return train_tokenizer(TEXTS, config, max_length=128)


def test_size_and_maximal_length_are_those_asked_for(tokenizer):
    assert len(tokenizer) == 320
    assert sorted(tokenizer.get_vocab().values()) == list(range(320))
    assert tokenizer.model_max_length == 128


def test_roberta_ids_and_template(roberta):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert roberta.convert_tokens_to_ids(special) == [0, 1, 2, 3, 4]
    assert (roberta.bos_token_id, roberta.cls_token_id) == (0, 0)
    assert (roberta.eos_token_id, roberta.sep_token_id) == (2, 2)
    assert (roberta.pad_token_id, roberta.unk_token_id) == (1, 3)
    a, b = (roberta.encode(text, add_special_tokens=False) for text in ("a b", "c"))
    assert roberta("a b")["input_ids"] == [0, *a, 2]
    assert roberta("a b", "c")["input_ids"] == [0, *a, 2, 2, *b, 2]
    # The mask stands for a word and the space before it.
    assert roberta("a <mask>")["input_ids"] == [0, *roberta.encode("a")[1:-1], 4, 2]


def test_gpt2_ids_and_no_template():
    config = TokenizerConfig(vocab_size=300)
    gpt2 = train_tokenizer(TEXTS, config)
    assert gpt2.eos_token_id == gpt2.bos_token_id == gpt2.unk_token_id == 0
    assert gpt2.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert 0 not in gpt2("a text")["input_ids"]


def recipe(vocab_size, min_frequency=2):
    """The README's snippet: texts in lists of 1000, five special tokens."""
    tokenizer = ByteLevelBPETokenizer()
    texts = TEXTS + ODD * 2
    tokenizer.train_from_iterator(
        (texts[i : i + 1000] for i in range(0, len(texts), 1000)),
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    return tokenizer


@pytest.mark.parametrize("vocab_size", [265, 320, 350])
def test_vocabulary_and_merges_are_those_of_the_reference_recipe(vocab_size):
    config = TokenizerConfig(vocab_size=vocab_size, min_frequency=2, kind="roberta")
    ours = train_tokenizer(TEXTS + ODD * 2, config)
    reference = recipe(vocab_size)
    expected = json.loads(reference.to_str())["model"]
    model = json.loads(ours.backend_tokenizer.to_str())["model"]
    assert model["vocab"] == expected["vocab"]
    assert len(expected["vocab"]) == vocab_size
    assert model["merges"] == expected["merges"]
    assert len(expected["merges"]) == vocab_size - 261
    for text in TEXTS[:5] + ODD:
        ids = reference.encode(text).ids
        assert ours(text, add_special_tokens=False)["input_ids"] == ids
        assert ours(text)["input_ids"] == [0, *ids, 2]


@pytest.mark.filterwarnings("ignore:the corpus fills")
def test_rare_pairs_are_left_alone_as_in_the_reference_recipe():
    sizes = []
    for min_frequency in (2, 3):
        config = TokenizerConfig(None, 5000, min_frequency, "roberta")
        ours = train_tokenizer(TEXTS + ODD * 2, config)
        assert ours.get_vocab() == recipe(5000, min_frequency).get_vocab()
        sizes.append(len(ours))
    assert sizes[0] > sizes[1]


def test_the_file_of_the_reference_recipe_is_taken_and_its_roles_are_said(tmp_path):
    recipe(320).save(str(tmp_path / "tokenizer.json"))
    RobertaConfig().save_pretrained(tmp_path)
    assert describe_roles(load_tokenizer(tmp_path)) == (
        "tokenizer: 320 tokens; bos/cls <s> 0, pad <pad> 1, eos/sep </s> 2, "
        "unk <unk> 3, mask <mask> 4; adds no special tokens around a text"
    )


def test_roles_of_ours_are_said(tokenizer):
    said = describe_roles(tokenizer)
    if tokenizer.mask_token is None:
        assert said == (
            "tokenizer: 320 tokens; bos/eos/unk <|endoftext|> 0; "
            "adds no special tokens around a text"
        )
    else:
        assert said.endswith("mask <mask> 4; adds <s> ... </s> around a text")


def test_a_tokenizer_without_roles_says_so():
    assert "tokens; no token has a role; adds no" in describe_roles(
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE({"a": 0}, [])))
    )


@pytest.mark.parametrize("text", ODD + TEXTS[:3])
def test_every_text_comes_back_whole(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_saved_folder_loads_anywhere_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for load in (AutoTokenizer.from_pretrained, load_tokenizer):
        loaded = load(tmp_path)
        assert loaded.special_tokens_map == tokenizer.special_tokens_map
        assert loaded.model_max_length == 128
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
        for text in [*TEXTS[:3], *ODD, "a <mask> b"]:
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("model", [GPT2Config, RobertaConfig])
def test_a_model_config_beside_it_changes_nothing(tokenizer, tmp_path, model):
    tokenizer.save_pretrained(tmp_path)
    model().save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)
    (tmp_path / "tokenizer_config.json").unlink()
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tokenizer)


def test_plain_json_gets_its_roles_by_name(tokenizer, tmp_path):
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).special_tokens_map == tokenizer.special_tokens_map


def test_hash_survives_saving_when_the_json_marks_no_token_special(roberta, tmp_path):
    content = json.loads(roberta.backend_tokenizer.to_str())
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = load_tokenizer(tmp_path)
    assert loaded("</s>", add_special_tokens=False)["input_ids"] == [2]
    loaded.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert tokenizer_hash(again) == tokenizer_hash(loaded)


def test_hash_tells_tokenizers_apart_but_not_calls(roberta):
    before = tokenizer_hash(roberta)
    roberta(["a b c", "d"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(roberta) == before
    other = TokenizerConfig(vocab_size=321, kind="roberta")
    assert tokenizer_hash(train_tokenizer(TEXTS, other)) != before


def test_a_small_corpus_fills_less_and_says_so():
    with pytest.warns(UserWarning, match=r"fills 25\d of the 5000 tokens"):
        tokenizer = train_tokenizer(["a b", "a c"], TokenizerConfig(vocab_size=5000))
    assert 257 <= len(tokenizer) < 260


def test_no_text_is_refused():
    with pytest.raises(InputError, match="no text to train a tokenizer on"):
        train_tokenizer(iter(()), TokenizerConfig())


@pytest.mark.parametrize(("kind", "least"), [("gpt2", 257), ("roberta", 261)])
def test_a_vocabulary_too_small_for_the_bytes_is_refused(kind, least):
    with pytest.raises(InputError, match=f"vocab_size is {least - 1}.*{least}"):
        TokenizerConfig(vocab_size=least - 1, kind=kind)
    assert TokenizerConfig(vocab_size=least, kind=kind).vocab_size == least


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="'bert'; expected one of gpt2, roberta"):
        TokenizerConfig(kind="bert")


def test_missing_and_broken_tokenizers_are_refused(tmp_path):
    with pytest.raises(InputError, match="there is no such file or folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match="there is no such file or folder"):
        load_tokenizer("none.json")
    # Of a config.json alone transformers makes a tokenizer that knows no text.
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(InputError, match="no tokenizer in .*: the folder has none of"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot load a tokenizer from"):
        load_tokenizer(tmp_path)
