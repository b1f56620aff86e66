# SPDX-License-Identifier: Apache-2.0
"""Bad data, malicious files and secrets: refused by name, never run, never written.

What of these is tested where the reader is (tests/data, test_hf.py, test_hub.py,
test_weight_files.py) is not repeated here.
"""

import dataclasses
import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from stores import read_documents, write_store
from test_whole_runs import CHANGES, CONFIG, TESTS, tiny_run
from tiny import WORDS, masked_run, write_corpus

from lm_scale import assemble, hf, shapes
from lm_scale.__main__ import main
from lm_scale.data import store as token_store
from lm_scale.data import token_cache
from lm_scale.data.corpus import CorpusConfig, documents
from lm_scale.data.store import TokenStore, read_manifest
from lm_scale.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from lm_scale.errors import InputError
from lm_scale.models import GPT2Config
from lm_scale.run_json import read_run
from lm_scale.run_text import prepare_data
from lm_scale.scripts.flags import parse
from lm_scale.scripts.main import hide
from lm_scale.trainer import train
from lm_scale.weight_files import open_tensors

QUIET = Console(quiet=True)
TINY = {"chunk_tokens": 8, "shard_tokens": 64}
PART = "parts/00000-00000"  # the only one of a small store
FACTS = {"tokenizer_hash": "abc", "separator": None, "source": {"part": "train"}}


# --- Bad data: the token store --------------------------------------------------------


def write(path, documents, vocab_size=300) -> None:
    write_store(path, documents, vocab_size=vocab_size, **TINY, **FACTS)


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def exchange(shard: Path) -> None:
    """By a whole one, in which a token is too high."""
    write(shard.parents[2] / "other", [np.arange(200) + 400], vocab_size=1000)
    (shard.parents[2] / "other" / PART / "tokens/c/1").replace(shard)


DAMAGES = {
    "cut": (cut, "Digest mismatch"),
    "empty": (lambda shard: shard.write_bytes(b""), "size (of )?0"),
    "gone": (Path.unlink, "is missing"),
    "exchanged": (exchange, "token (527|499) in a vocabulary of 300"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_an_error(tmp_path, damage):
    write(tmp_path / "s", [np.arange(100), np.arange(100)])
    harm, said = DAMAGES[damage]
    harm(tmp_path / "s" / PART / "tokens/c/1")
    store = TokenStore.open(tmp_path / "s")
    np.testing.assert_array_equal(store.read(0, 64), np.arange(64))
    for read in (
        lambda: store.read(0, 128),
        lambda: read_documents(store, np.array([0])),
    ):
        with pytest.raises(InputError, match=f"{tmp_path}/s is damaged: .*{said}"):
            read()


def test_offsets_that_are_gone_or_lie_are_an_error(tmp_path):
    for name, content in (("gone", None), ("lie", [[1] * 9, [2] * 70])):
        write(tmp_path / name, [[1] * 5, [2] * 6])
        shard = tmp_path / name / PART / "offsets/c/0"
        shard.unlink()
        if content is not None:
            write(tmp_path / "other", content)
            (tmp_path / "other" / PART / "offsets/c/0").rename(shard)
        with pytest.raises(InputError, match="is damaged"):
            read_documents(TokenStore.open(tmp_path / name), np.array([0, 1]))


def test_zeros_are_tokens_not_a_missing_shard(tmp_path):
    write(tmp_path / "s", [[0] * 150])
    assert TokenStore.open(tmp_path / "s").read(0, 150).tolist() == [0] * 150


def test_a_shard_that_vanishes_in_a_run(tmp_path, monkeypatch, capfd):
    """One message, and the run goes on once the shard is back."""
    for module, name in ((token_store, "CACHE_BYTES"), (token_cache, "BYTES")):
        monkeypatch.setattr(module, name, 0)  # as of a store above 256 MB
    part = tmp_path / "run/data/train/parts/00000-00000"
    shard, make_step = part / "tokens/c/0", assemble.make_train_step

    def make_train_step(*given, **named):
        step = make_step(*given, **named)

        def train_step(state, batch):
            if int(state.step) == 5:
                shard.rename(tmp_path / "away")
            return step(state, batch)

        return train_step

    path = tmp_path / "config.py"
    changes = CHANGES | {"steps": 30}
    path.write_text(CONFIG.format(folder=str(tmp_path), changes=changes))
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "make_train_step", make_train_step)
        assert main(["train", str(path)]) == 2
    shown = capfd.readouterr().err
    assert "data/train is damaged" in shown and "is missing" in shown
    assert "Traceback" not in shown
    (tmp_path / "away").rename(shard)
    assert main(["train", str(path)]) == 0
    assert "Going on from step" in capfd.readouterr().out


def rewritten(path: Path, change) -> None:
    """The store at a path, its documents changed and nothing else."""
    store, old = TokenStore.open(path), path.with_name("old")
    found, manifest = (
        read_documents(store, np.arange(store.num_documents)),
        store.manifest,
    )
    path.rename(old)
    write_store(
        path, change(found), vocab_size=manifest.vocab_size,
        tokenizer_hash=manifest.tokenizer_hash, separator=manifest.separator,
        source=manifest.source,
    )  # fmt: skip


def test_other_tokens_of_the_same_number_are_refused(tmp_path):
    config = tiny_run(tmp_path, stop_at=2)
    train(config, QUIET)
    path = Path(config.store_dir) / "train"
    rewritten(path, lambda found: found[::-1])
    with pytest.raises(InputError, match=r"tokens\.sha256: .* there, .* here"):
        train(config, QUIET)


def test_documents_without_a_token_are_examples_without_a_label(tmp_path):
    """Nine of ten: some batches have next to nothing to predict, or nothing."""
    data = dataclasses.replace(
        masked_run(tmp_path).data, examples="documents", separator=False
    )
    config = tiny_run(tmp_path, masked_run, batch=8, data=data)
    prepare_data(config, QUIET, ["train"])
    rewritten(
        Path(config.store_dir) / "train",
        lambda found: [x for one in found[:40] for x in (one, *[one[:0]] * 9)],
    )
    assert train(config, QUIET).finished
    text = (Path(config.run_dir) / "metrics.jsonl").read_text()
    losses = [json.loads(line)["loss"] for line in text.splitlines()]
    assert len(losses) == config.steps and all(x is not None for x in losses)


# --- Malicious files ------------------------------------------------------------------


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path):
    """A path that nothing may make."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Bomb(path)))
    path.rmdir()  # so much for the bomb
    yield path
    assert not path.exists()


def saved(save, *given, **named) -> bytes:
    file = io.BytesIO()
    save(file, *given, **named)
    return file.getvalue()


def tarred(canary: Path) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("fine.txt", "../canary", "../../canary", str(canary)):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file.getvalue()


def zipped(canary: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("fine.txt", "../canary", "../../canary", str(canary)):
            archive.writestr(name, "text")
    return file.getvalue()


def torch_saved(canary: Path) -> bytes:
    torch = pytest.importorskip("torch")
    return saved(lambda file, x: torch.save(x, file), Bomb(canary))


PICKLES = {
    ".pkl": lambda path: pickle.dumps(Bomb(path)),
    ".pt": torch_saved,
    ".npy": lambda path: saved(np.save, np.array([Bomb(path)], object)),
    ".npz": lambda path: saved(np.savez, a=np.array([Bomb(path)], object)),
}
ARCHIVES = {
    ".tar": tarred,
    ".zip": zipped,
    ".tar.gz": lambda path: gzip.compress(tarred(path)),
}


def refused(path: Path, streaming: bool) -> str:
    config = CorpusConfig(source=str(path), streaming=streaming)
    with pytest.raises(InputError, match="cannot read ") as caught:
        list(documents(config, "train", cache_dir=str(path.parent / "cache")))
    return str(caught.value)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", PICKLES | ARCHIVES)
def test_no_pickle_or_archive_is_text_whatever_its_name(
    tmp_path, canary, kind, streaming
):
    content = (PICKLES | ARCHIVES)[kind](canary)
    for name in (kind, ".txt", ".jsonl", ".csv", ".parquet"):
        path = tmp_path / "text" / f"a{name}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        said = refused(path, streaming)
        assert str(path) in said
        if kind in ARCHIVES and name != kind:
            assert "unpack it first" in said
    # Nor did an archive put anything elsewhere.
    assert not list(tmp_path.rglob("fine.txt"))


@pytest.mark.parametrize("streaming", [True, False])
def test_no_code_beside_the_text_is_run(tmp_path, canary, streaming):
    """A tag in the README's header, and the script that old datasets were."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("text\n")
    (folder / "text.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    readme = folder / "README.md"
    readme.write_text(f"---\nx: !!python/object/apply:os.mkdir ['{canary}']\n---\n")
    assert "constructor for the tag" in refused(folder, streaming)
    readme.write_text("---\nconfigs: [{config_name: a, data_files: a.txt}]\n---\n")
    assert "scripts are no longer supported" in refused(folder, streaming)
    readme.unlink()
    config = CorpusConfig(source=str(folder), streaming=streaming)
    cache = str(tmp_path / "cache")
    assert list(documents(config, "train", cache_dir=cache)) == ["text\n"]


def test_tags_in_json_are_no_code(tmp_path, canary):
    tags = (
        f"!!python/object/apply:os.mkdir ['{canary}']",
        json.dumps({"py/reduce": [{"py/function": "os.mkdir"}, [str(canary)]]}),
        json.dumps({"model": {"type": "os.mkdir", "path": str(canary)}}),
        pickle.dumps(Bomb(canary)).decode("latin-1"),
    )
    readers = {
        "run.json": lambda path: read_run(path.parent),
        "config.json": lambda path: hf.read_config(path.parent),
        "manifest.json": lambda path: read_manifest(path.parent),
        "flags.json": lambda path: parse("clm", [str(path)], "clm", None),
        "tokenizer.json": lambda path: load_tokenizer(path),
        "model.safetensors.index.json": lambda path: open_tensors(path.parent),
    }
    for text in tags:
        for name, read in readers.items():
            path = tmp_path / name
            path.write_text(text)
            with pytest.raises(InputError):
                read(path)
            path.unlink()


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "an offset behind the end": {"a": TENSOR | {"data_offsets": [0, 1 << 40]}},
    "an offset before the start": {"a": TENSOR | {"data_offsets": [-8, 0]}},
    "an end before its start": {"a": TENSOR | {"data_offsets": [8, 0]}},
    "a shape of other size": {"a": TENSOR | {"shape": [1 << 40]}},
    "a shape that overflows": {"a": TENSOR | {"shape": [1 << 62, 4]}},
    "an overlap": {"a": TENSOR, "b": TENSOR},
    "a hole": {"a": TENSOR | {"data_offsets": [8, 16]}},
    "objects": {"a": TENSOR | {"dtype": "O"}},
    "a list": [],
}


def write_header(folder: Path, header, size: int | None = None) -> None:
    text = json.dumps(header).encode()
    size = len(text) if size is None else size
    content = struct.pack("<Q", size) + text + bytes(8)
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.parametrize("lie", [*HEADERS, 1 << 40, (1 << 64) - 1])
def test_safetensors_that_lie_are_refused(tmp_path, lie):
    if isinstance(lie, str):
        write_header(tmp_path, HEADERS[lie])
    else:
        write_header(tmp_path, {"a": TENSOR}, size=lie)
    with pytest.raises(InputError, match=r"Cannot read .*/model\.safetensors"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_quantized_weights_are_refused_when_read(tmp_path, dtype):
    write_header(tmp_path, {"a": TENSOR | {"dtype": dtype, "shape": [8]}})
    tensor = open_tensors(tmp_path)["a"]  # nobody may want it
    with pytest.raises(InputError, match=f"'a' in .* is of type {dtype}; expected"):
        tensor[:]


@pytest.fixture
def folder(tmp_path):
    """A model's folder without weights."""
    path = tmp_path / "model"
    settings = TokenizerConfig(vocab_size=257)
    train_tokenizer([WORDS], settings).save_pretrained(path)
    model = GPT2Config(vocab=257, positions=24, layers=2, embed=32, heads=4, mlp=48)
    (path / "config.json").write_text(json.dumps(model.to_hf()))
    return path


def test_code_that_comes_with_a_model_is_neither_run_nor_ignored(folder, canary):
    (folder / "code.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    for model_type, said in (("gpt2", "never run"), ("its own", "not supported")):
        path = folder / "config.json"
        content = json.loads(path.read_text())
        content |= {"auto_map": names, "model_type": model_type}
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=said):
            hf.read_config(folder)
        with pytest.raises(InputError, match="never run|custom code"):
            shapes.model_config(shapes.hf_config(str(folder)))


def test_code_that_comes_with_a_tokenizer_is_not_run(folder, canary):
    (folder / "code.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}
    }
    for name in (content["tokenizer_class"], "T"):  # there is such a class, or not
        path.write_text(json.dumps(content | {"tokenizer_class": name}))
        with pytest.raises(InputError, match="never run|custom code"):
            load_tokenizer(folder)


# --- Secrets --------------------------------------------------------------------------

SECRETS = {"HF_TOKEN": "hf_canaryCanary01", "WANDB_API_KEY": "canary23" * 5}
GIVEN = {"--token": "hf_canaryGiven45", "--hub_token": "hf_canaryGiven67"}


def child(words: list[str], folder: Path) -> tuple[int, str, set[str]]:
    """A command with secrets: its status, what it printed, and its process titles."""
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    environment = {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "8"}
    titles, out = set(), folder / "shown.txt"
    with out.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, stdout=file, stderr=file,
            env={**os.environ, **environment, **SECRETS},
        )  # fmt: skip
        proc = Path("/proc") / str(process.pid)
        while process.poll() is None:
            for name in ("cmdline", "comm"):
                try:
                    titles.add((proc / name).read_text())
                except OSError:
                    pass  # it has ended, or this is no Linux
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                pass
    return process.returncode, out.read_text(), titles


FINISHES = pytest.param("finishes", marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("how", [FINISHES, "raises", "flags"])
def test_secrets_are_nowhere(how, tmp_path, folder):
    """In no file of the run, no line that is shown, and no traceback."""
    config = tmp_path / "config.py"
    changes = CHANGES | {"hub": "x/y", "report_to": ("tensorboard",)}
    config.write_text(CONFIG.format(folder=str(tmp_path), changes=changes))
    injected = [str(TESTS / "faults/injected.py"), "raise@step:6"]
    words = {
        "finishes": ["-m", "lm_scale", "train", str(config)],
        "raises": [*injected, "train", str(config)],
        "flags": [
            "-m", "lm_scale", "clm", "--output_dir=run", "--do_train", "--do_eval",
            "--config_name=model", "--tokenizer_name=model", "--push_to_hub",
            "--train_file=corpus.txt", "--block_size=16", "--max_steps=3",
            "--per_device_train_batch_size=1", "--cache_dir=cache",
            *[f"{name}={token}" for name, token in GIVEN.items()],
        ],
    }  # fmt: skip
    write_corpus(tmp_path)
    status, shown, titles = child(words[how], tmp_path)
    assert status == (1 if how == "raises" else 0), shown
    assert ("Traceback" in shown) == (how == "raises")
    assert "hub" in shown  # an upload was tried
    secrets = list(SECRETS.values())
    for title in titles:  # of one's own flags the list of processes tells
        assert not any(secret in title for secret in secrets)
    secrets += GIVEN.values()
    assert not any(secret in shown for secret in secrets)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"run.json", "manifest.json", "metrics.jsonl"} <= names
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in secrets), path


def test_tokens_given_as_flags_leave_argv(monkeypatch):
    words = [f"--token={GIVEN['--token']}", "--hub_token", GIVEN["--hub_token"]]
    argv = ["lm-scale", "clm", "--output_dir=o", *words]
    monkeypatch.setattr(sys, "argv", argv.copy())
    hide(parse("clm", argv[2:], "clm", None))
    assert sys.argv[3:] == ["--token=<token>", "--hub_token", "<token>"]
