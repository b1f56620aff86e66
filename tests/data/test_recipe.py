# SPDX-License-Identifier: Apache-2.0
"""From a corpus to a folder that AutoTokenizer loads, and what is refused early."""

import errno
import io
import itertools
import json
import re

import pytest
import tyro
from rich.console import Console
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, BertConfig, GPT2Config, RobertaConfig

from lm_scale.__main__ import main
from lm_scale.commands import Tokenizer
from lm_scale.data import recipe
from lm_scale.data.corpus import CorpusConfig, documents
from lm_scale.data.recipe import make_tokenizer, train_shown
from lm_scale.data.tokenizer import (
    TokenizerConfig,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from lm_scale.errors import InputError

SMALL = {
    kind: TokenizerConfig(vocab_size=300, kind=kind) for kind in ("roberta", "gpt2")
}
PROBES = ["The train", "a <mask> b", "naïve 日本 👩‍👧\n", ""]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text" / "corpus.txt"
    path.parent.mkdir()
    nouns = ("train", "model", "token")
    lines = [f"The {nouns[i % 3]} of number {i} is not slow.\n" for i in range(450)]
    path.write_text("".join(lines))
    return CorpusConfig(source=str(path))


def console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120)


@pytest.mark.parametrize("model", [None, RobertaConfig, GPT2Config, BertConfig])
@pytest.mark.parametrize("kind", ["roberta", "gpt2"])
def test_auto_tokenizer_gives_ours_whatever_config_stands_beside(
    kind, model, corpus, tmp_path
):
    out = tmp_path / "new" / "folder"
    made = make_tokenizer(out, corpus, SMALL[kind], max_length=64, console=console())
    direct = train_tokenizer(documents(corpus, "train"), SMALL[kind])
    assert tokenizer_hash(made) == tokenizer_hash(direct)
    if model is not None:
        model().save_pretrained(out)
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.special_tokens_map == made.special_tokens_map
    assert loaded.all_special_ids == made.all_special_ids
    assert (len(loaded), loaded.model_max_length) == (300, 64)
    assert tokenizer_hash(loaded) == tokenizer_hash(made)
    for text in PROBES:
        ids = made(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded(text, "c").data == made(text, "c").data
        assert loaded.decode(ids) == made.decode(ids)
    if kind == "roberta":
        assert loaded("a")["input_ids"][0] == loaded.bos_token_id == 0
        assert loaded("a")["input_ids"][-1] == loaded.eos_token_id == 2
        assert loaded("a", padding="max_length")["input_ids"].count(1) == 61
    else:
        assert loaded.eos_token_id == loaded.bos_token_id == 0


def test_the_default_recipe_is_that_of_the_readme(corpus, tmp_path, monkeypatch):
    seen = {}

    def spy(texts, config, *, max_length, console):
        seen["config"], seen["max_length"] = config, max_length
        return train_shown(texts, SMALL["roberta"], console=console)

    monkeypatch.setattr(recipe, "train_shown", spy)
    make_tokenizer(tmp_path / "out", corpus, console=console())
    expected = TokenizerConfig(vocab_size=50_265, min_frequency=2, kind="roberta")
    assert seen == {"config": expected, "max_length": 512}


def test_the_commands_default_is_all_of_the_text(tmp_path, monkeypatch):
    """The merges are those of the README's snippet on the whole file."""
    pairs = ["".join(pair) for pair in itertools.product("bcdfghjklm", "aeiouy")]
    lines = [f"{a}{b} {a}{b}\n" for a, b in itertools.pairwise(pairs * 3)]
    (tmp_path / "corpus.txt").write_text("".join(sorted(set(lines))))
    argv = ["--out", "out", "--corpus.source", "corpus.txt"]
    options = tyro.cli(Tokenizer, args=argv)
    assert options.corpus.validation_fraction == 0
    monkeypatch.chdir(tmp_path)
    assert main(["tokenizer", *argv]) == 0
    readme = ByteLevelBPETokenizer()
    readme.train_from_iterator(
        (tmp_path / "corpus.txt").read_text().splitlines(),
        vocab_size=50265,
        min_frequency=2,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    )
    ours, theirs = (
        json.loads(text)["model"]
        for text in ((tmp_path / "out/tokenizer.json").read_text(), readme.to_str())
    )
    assert len(ours["merges"]) > 50
    assert ours["merges"] == theirs["merges"]
    assert ours["vocab"] == theirs["vocab"]


def test_only_the_training_part_is_read(tmp_path):
    (tmp_path / "train.txt").write_text("aba aba aba\n" * 9)
    (tmp_path / "other.txt").write_text("xyx xyx xyx\n" * 9)
    corpus = CorpusConfig(
        source=str(tmp_path / "train.txt"),
        validation_source=str(tmp_path / "other.txt"),
    )
    made = make_tokenizer(tmp_path, corpus, SMALL["gpt2"], console=console())
    assert "aba" in made.get_vocab() and "xyx" not in made.get_vocab()


def test_without_a_terminal_there_are_closing_lines_only(corpus, tmp_path):
    shown = console()
    make_tokenizer(tmp_path, corpus, SMALL["gpt2"], console=shown)
    trained, closing = shown.file.getvalue().splitlines()
    count = sum(1 for _ in documents(corpus, "train"))
    size = sum(len(text) for text in documents(corpus, "train")) / 1e6
    assert trained.startswith(f"trained on {count} documents, {size:.1f} MB, ")
    assert closing.startswith("tokenizer: 300 tokens; bos/eos/unk <|endoftext|> 0;")
    assert closing.endswith(f"in {tmp_path}")


def test_a_small_corpus_is_noted_not_warned_of(corpus):
    shown = console()
    config = TokenizerConfig(vocab_size=5000)
    train_shown(documents(corpus, "train"), config, console=shown)
    assert "Note: the corpus fills" in shown.file.getvalue()


def test_a_terminal_shows_documents_bytes_and_rate():
    shown = console(terminal=True)
    texts = ["ø" * 2500] * 1200  # two bytes each
    with recipe._display(shown) as progress:
        tracked = recipe._tracked(texts, recipe._Read(), progress)
        assert [next(tracked) for _ in range(1000)] == texts[:1000]
        progress.refresh()
        assert list(tracked) == texts[1000:]
    drawn = shown.file.getvalue()
    assert re.search(r"reading: 1,000 documents, 5.0 MB, [\d,]+ documents/s", drawn)
    assert "merging the pairs of 1,200 documents, 6.0 MB" in drawn
    assert drawn.index("reading") < drawn.index("merging")


def test_the_display_is_on_where_there_is_a_terminal():
    shown = console(terminal=True)
    train_shown(["a text"] * 9, TokenizerConfig(vocab_size=258), console=shown)
    drawn = shown.file.getvalue()
    assert drawn.index("merging the pairs of 9 documents") < drawn.index("trained on")


def test_an_existing_tokenizer_is_replaced_only_when_asked(corpus, tmp_path):
    quiet = console()
    for name in ("vocab.json", "merges.txt", "config.json", "notes.txt"):
        (tmp_path / name).write_text("{}")
    for left in ("vocab.json", "merges.txt"):
        with pytest.raises(InputError, match=rf"{tmp_path} already holds .*{left}"):
            make_tokenizer(tmp_path, corpus, SMALL["gpt2"], console=quiet)
    make_tokenizer(tmp_path, corpus, SMALL["gpt2"], console=quiet, overwrite=True)
    with pytest.raises(InputError, match="tokenizer.json, tokenizer_config.json"):
        make_tokenizer(tmp_path, corpus, SMALL["roberta"], console=quiet)
    make_tokenizer(tmp_path, corpus, SMALL["roberta"], console=quiet, overwrite=True)
    assert load_tokenizer(tmp_path).mask_token == "<mask>"
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json", "notes.txt", "text", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert (tmp_path / "config.json").read_text() == "{}"


def test_an_interrupted_replacement_leaves_the_old_tokenizer(corpus, tmp_path):
    make_tokenizer(tmp_path, corpus, SMALL["gpt2"], console=console())
    before = tokenizer_hash(load_tokenizer(tmp_path))
    broken = tmp_path / "text" / "broken.jsonl"
    rows = [json.dumps({"text": f"row {i}"}) for i in range(50)]
    broken.write_text("\n".join([*rows, '{"text": 3}']))
    corpus = CorpusConfig(source=str(broken))
    with pytest.raises(InputError):
        make_tokenizer(
            tmp_path, corpus, SMALL["roberta"], console=console(), overwrite=True
        )
    assert tokenizer_hash(load_tokenizer(tmp_path)) == before


def test_mistakes_are_found_before_the_text_is_read(corpus, tmp_path, monkeypatch):
    def reading(*args, **options):
        pytest.fail("the corpus was opened")

    monkeypatch.setattr(recipe, "documents", reading)
    file = tmp_path / "file"
    file.write_text("")
    for out, message in (
        ("", "'' is no folder to write a tokenizer to"),
        (file, "file' is no folder to write a tokenizer to"),
        (file / "below", "cannot write a tokenizer to .*below: Not a directory"),
    ):
        with pytest.raises(InputError, match=message):
            make_tokenizer(out, corpus, SMALL["gpt2"], console=console())
    with monkeypatch.context() as patch:  # root may write anywhere: pretend

        def full(dir):
            raise OSError(errno.EROFS, "Read-only file system")

        patch.setattr(recipe.tempfile, "TemporaryFile", full)
        with pytest.raises(InputError, match="cannot write .*out: Read-only file"):
            make_tokenizer(tmp_path / "out", corpus, console=console())
    with pytest.raises(InputError, match="max_length is 0"):
        make_tokenizer(tmp_path / "out", corpus, max_length=0, console=console())
    with pytest.raises(InputError, match="path is 'there', but here one is trained"):
        make_tokenizer(
            tmp_path / "out", corpus, TokenizerConfig(path="there"), console=console()
        )
