# SPDX-License-Identifier: Apache-2.0
"""The command line as a person meets it: results, help, mistakes, Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_corpus

from lm_scale.__main__ import main
from lm_scale.sharding import LOGICAL_AXES, PRESETS

CONFIG = """
from pathlib import Path
from tiny import {kind}
config = {kind}(Path({folder!r}), {changes})
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Writes a config file of a tiny run in `tmp_path`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def write(kind: str = "causal_run", changes: str = "") -> str:
        path = tmp_path / "config.py"
        text = CONFIG.format(kind=kind, folder=str(tmp_path), changes=changes)
        path.write_text(text)
        return str(path)

    return write


def test_the_rules_as_a_table(capsys):
    assert main(["rules"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[2:] == list(PRESETS)
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert set(cells) == set(LOGICAL_AXES)
    assert cells["embed"] == ["-", "-", "fsdp", "fsdp", "fsdp", "fsdp"]
    assert main(["rules", "dp", "nothing"]) == 2
    assert "rules 'nothing': expected one of" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["causal_run", "masked_run"])
def test_every_command_of_a_run(kind, config_file, tmp_path, capsys):
    config, run = config_file(kind), str(tmp_path / "run")
    assert main(["tokenizer", config]) == 0
    assert "300 tokens" in capsys.readouterr().out
    assert main(["prepare", config]) == 0
    assert "train:" in capsys.readouterr().out
    assert main(["train", config, "--steps", "12", "--mesh.fsdp", "2"]) == 0
    shown = capsys.readouterr().out
    assert "8 × cpu" in shown and "data=4 fsdp=2" in shown
    assert "attention  xla (cpu)" in shown
    assert "held-out loss" in shown and "unigram loss" in shown
    loss = float(shown.split("held-out loss │ ")[1].split()[0])
    assert main(["eval", run]) == 0
    evaluated = capsys.readouterr().out
    again = float(evaluated.split("eval_loss: ")[1].split()[0])
    assert again == pytest.approx(loss, abs=2e-4)  # four decimals were shown
    prompt = "the cat" if kind == "causal_run" else "the <mask> sat"
    options = ["--max-new-tokens", "5", "--temperature", "0"]
    assert main(["generate", run, "--prompt", prompt, *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the") and "<mask>" not in text
    out = tmp_path / "exported"
    assert main(["export", run, "--out", str(out)]) == 0
    assert (out / "model.safetensors").exists()


MISTAKES = {
    "no config": (["train"], "expected a config file"),
    "missing config": (["train", "nowhere.py"], "no config file 'nowhere.py'"),
    "missing corpus": (
        ["train", "CONFIG", "--data.corpus.source", "./nowhere.txt"],
        "nowhere.txt",
    ),
    "batch": (["train", "CONFIG", "--batch", "12"], "Use a multiple of 16"),
    "sequence": (["train", "CONFIG", "--seq-len", "32"], "model.positions = 24"),
    "mesh": (["train", "CONFIG", "--mesh.data", "3"], "does not fit 8 device(s)"),
    "axis": (
        ["train", "CONFIG", "--mesh.tensor", "8"],
        "cannot be cut into 8 parts",
    ),
    "no run": (["eval", "nowhere"], "nowhere holds no run"),
    "no checkpoint": (["generate", "RUN"], "has no checkpoints yet"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_clear_message(name, config_file, tmp_path, capsys):
    arguments, message = MISTAKES[name]
    names = {"CONFIG": config_file(), "RUN": str(tmp_path / "run")}
    if "RUN" in arguments:
        assert main(["tokenizer", names["CONFIG"]]) == 0
        from lm_scale.config import load_config
        from lm_scale.run_json import write_config

        write_config(load_config(names["CONFIG"], [], prog="test"))
    status = main([names.get(argument, argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 2
    assert message in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "run" / "checkpoints").exists()  # before any training


def test_an_empty_corpus(config_file, tmp_path, capsys):
    config = config_file()
    write_corpus(tmp_path).write_text("")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    assert main(["train", config, "--data.corpus.source", str(empty)]) == 2
    assert "empty.txt" in capsys.readouterr().err


def test_a_misspelt_override_names_what_was_meant(config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", config_file(), "--model.layer", "3"])
    assert stop.value.code == 2
    assert "--model.layers" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "prepare"])
def test_help_without_a_config(command, capsys):
    assert main([command, "--help"]) == 0
    assert "CONFIG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "word"),
    [("eval", "RUN_DIR"), ("generate", "RUN_DIR"), ("export", "RUN_DIR"),
     ("tokenizer", "--corpus.source"), ("tokenizer", "CONFIG"), ("config", "NAME"),
     ("mlm", "--max_seq_length"), ("clm", "--block_size")],
)  # fmt: skip
def test_help_of_commands_with_options(command, word, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert word in capsys.readouterr().out


def test_tokenizer_and_config_make_a_models_folder(tmp_path, capsys):
    """The walk-through's two first steps, which `mlm` and `clm` take from there."""
    corpus, out = write_corpus(tmp_path), str(tmp_path / "model")
    sizes = ["vocab_size=300", "hidden_size=24", "num_hidden_layers=2"]
    assert main(["config", "roberta-base", *sizes, "--out", out]) == 0
    assert "parameters" in capsys.readouterr().out
    flags = ["--out", out, "--vocab-size", "300", "--corpus.source", str(corpus)]
    assert main(["tokenizer", *flags]) == 0
    assert "eos/sep </s> 2" in capsys.readouterr().out
    assert main(["tokenizer", *flags]) == 2
    assert "already holds a tokenizer" in capsys.readouterr().err
    assert main(["tokenizer", *flags, "--overwrite"]) == 0
    assert main(["config", "gpt2", "--out", out]) == 2
    assert main(["config", "gpt2", "n_layers=2", "--out", str(tmp_path / "b")]) == 2
    assert "n_layer" in capsys.readouterr().err


def test_top_level_help_and_unknown_command(capsys):
    assert main(["--help"]) == 0
    assert "lm-scale train configs/quickstart.py" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "'trian'" in capsys.readouterr().err


def test_a_signal_saves_and_exits_75(config_file, tmp_path):
    config = config_file(changes="steps=100_000, save_every=None, eval_every=None")
    command = [sys.executable, "-m", "lm_scale", "train", config]
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "step 3/" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 75, rest
    assert "saved" in rest and "Traceback" not in rest
    (step,) = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert int(step) >= 3


def test_an_interrupt_in_a_callback_is_heard_again():
    """Ctrl-C while a library's callback runs: Python reports it and goes on."""
    code = (
        "import signal, threading, weakref, lm_scale.__main__ as m\n"
        # A shell's background job (`... &`) starts with SIGINT ignored, and stays so.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "m.hear_interrupts()\n"
        "class Thing: pass\n"
        "def interrupt(_): raise KeyboardInterrupt\n"
        "thing = Thing()\n"
        "ref = weakref.ref(thing, interrupt)\n"
        "try:\n"
        "    del thing\n"
        "    threading.Event().wait(60)\n"
        "    print('lost')\n"
        "except KeyboardInterrupt:\n"
        "    print('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "heard\n" and "Exception ignored" not in done.stderr


def test_too_little_memory_is_one_clear_message(config_file, monkeypatch, capsys):
    def full(config):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr("lm_scale.trainer.train", full)
    assert main(["train", config_file()]) == 1
    shown = capsys.readouterr().err
    assert "memory is too small" in shown and "allocating 7 bytes" in shown


# --- Launches -------------------------------------------------------------------------


def test_a_launch_is_the_script_of_its_engine():
    def launch(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "lm_scale", "launch", *arguments],
            capture_output=True, text=True,
        )  # fmt: skip

    said = launch("local", "-n", "2", "--", "sh", "-c", "echo $LM_SCALE_PROCESS_ID")
    assert said.returncode == 0
    assert sorted(said.stdout.splitlines()) == ["[0] 0", "[1] 1"]
    for engine in ("tpu", "slurm", "gke"):
        help_ = launch(engine, "--help")
        assert help_.returncode == 0 and f"launch/{engine}.py train" in help_.stdout
    assert launch("tpu", "train").returncode == 2


def test_an_engine_that_is_none(capsys):
    assert main(["launch", "cloud"]) == 2
    assert "expected an engine, got 'cloud'" in capsys.readouterr().err
    assert main(["launch", "--help"]) == 0
    assert "launch/README.md shows each" in capsys.readouterr().out
