# SPDX-License-Identifier: Apache-2.0
"""The old commands from end to end: the README's two, on a local dataset."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import write_corpus
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, RobertaConfig

from lm_scale import hf
from lm_scale.__main__ import main
from lm_scale.models import build_model
from lm_scale.run_json import read_run
from lm_scale.sharding import MeshShape, flatten, make_mesh

ROOT = Path(__file__).parents[2]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SHAPES = {
    "mlm": RobertaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=130, type_vocab_size=1,
        layer_norm_eps=1e-5,
    ),
    "clm": GPT2Config(
        vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_inner=24, n_positions=512,
        bos_token_id=0, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The walk-through's folder: `oscar`, a dataset, and a model folder for each."""
    monkeypatch.chdir(tmp_path)
    text = write_corpus(tmp_path / "oscar" / "unshuffled_deduplicated_no", 190)
    lines = text.read_text().splitlines()
    # The first lines, which are held out, are long: the batches are many tokens.
    lines = [" ".join(lines[10 * i : 10 * i + 10]) for i in range(10)] + lines
    text.write_text("\n".join(lines))

    def batch_iterator(batch_size=1000):
        for i in range(0, len(lines), batch_size):
            yield lines[i : i + batch_size]

    for kind, name in (("mlm", "norwegian-roberta-base"), ("clm", "norwegian-gpt2")):
        SHAPES[kind].save_pretrained(tmp_path / name)
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            batch_iterator(), vocab_size=300, min_frequency=2, special_tokens=SPECIAL
        )
        tokenizer.save(f"{tmp_path}/{name}/tokenizer.json")
    return tmp_path


# The flags of the two published commands, as they stand in the old README.
MLM = """--output_dir=./runs --model_type=roberta --config_name=./norwegian-roberta-base
    --tokenizer_name=./norwegian-roberta-base --dataset_name=oscar
    --dataset_config_name=unshuffled_deduplicated_no --max_seq_length=128
    --weight_decay=0.01 --per_device_train_batch_size=128
    --per_device_eval_batch_size=128 --learning_rate=3e-4 --warmup_steps=1000
    --overwrite_output_dir --pad_to_max_length --num_train_epochs=18 --adam_beta1=0.9
    --adam_beta2=0.98""".split()
CLM = """--output_dir=./runs --model_type=gpt2 --config_name=./norwegian-gpt2
    --tokenizer_name=./norwegian-gpt2 --dataset_name=oscar
    --dataset_config_name=unshuffled_deduplicated_no --do_train --do_eval
    --block_size=512 --per_device_train_batch_size=64 --per_device_eval_batch_size=64
    --learning_rate=5e-3 --warmup_steps=1000 --overwrite_output_dir
    --num_train_epochs=20""".split()
FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
         "eval_results.json", "metrics.jsonl", "run.json"}  # fmt: skip


def script(kind: str, flags: list[str]) -> subprocess.CompletedProcess[str]:
    """The README's `ln -s …` and `./run_…_flax.py …`, on one device."""
    link = Path(f"run_{kind}_flax.py")
    if not link.exists():
        link.symlink_to(ROOT / "launch" / link.name)
    assert os.access(link, os.X_OK)
    return subprocess.run(
        [sys.executable, str(link), *flags], capture_output=True, text=True,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip


def test_the_published_commands_one_after_the_other(home):
    """Both in ./runs, as the README has them: the second moves the first aside."""
    runs = home / "runs"
    for kind, command, model_type in (("mlm", MLM, "roberta"), ("clm", CLM, "gpt2")):
        done = script(kind, command)
        assert done.returncode == 0, done.stderr
        assert "eos/sep </s> 2" in done.stdout
        assert "never reaches its peak" in done.stdout
        assert {path.name for path in runs.iterdir()} >= FILES
        assert list(runs.glob("events.out.tfevents.*"))
        assert (
            json.loads((runs / "config.json").read_text())["model_type"] == model_type
        )
        results = json.loads((runs / "eval_results.json").read_text())
        assert {"eval_loss", "eval_accuracy", "eval_perplexity"} <= set(results)
    former = json.loads((runs / "previous-1/config.json").read_text())
    assert former["model_type"] == "roberta"
    assert (runs / "previous-1/model.safetensors").exists()
    assert read_run(runs).batch == 64 and read_run(runs / "previous-1").batch == 128


def test_the_args_file_beside_a_link_and_a_mistake(home):
    Path("run_clm_flax.args").write_text("--adam_beta1 7")
    done = script("clm", SHORT)
    assert done.returncode == 2 and done.stderr.startswith("run_clm_flax.py: optimizer")
    assert "--adam_beta1" in done.stderr and "Traceback" not in done.stderr


SHORT = ["--output_dir=out", "--train_file=oscar/unshuffled_deduplicated_no/corpus.txt",
         "--max_steps=4", "--per_device_train_batch_size=1", "--save_steps=2",
         "--config_name=norwegian-gpt2", "--tokenizer_name=norwegian-gpt2",
         "--block_size=32", "--learning_rate=1e-2"]  # fmt: skip


def weights(folder: Path) -> dict[str, jax.Array]:
    config = read_run(folder)
    model = build_model(config.model, config.compute)
    return flatten(hf.read_params(folder, model, make_mesh(MeshShape())))


def test_the_same_command_again_goes_on(home, capsys):
    assert main(["clm", *SHORT, "--do_train", "--eval_steps=2"]) == 0
    first = weights(home / "out")
    assert not (home / "out/eval_results.json").exists()  # --do_train alone
    assert evaluated(home / "out") == [2, 4]
    assert main(["clm", *SHORT, "--do_train", "--eval_steps=2"]) == 0
    assert "Going on from step 4" in capsys.readouterr().out
    # From another run's checkpoint, in a folder of its own: the same end.
    other = [*SHORT, "--output_dir=fork", "--do_train",
             "--resume_from_checkpoint=out/checkpoints/2"]  # fmt: skip
    assert main(["clm", *other]) == 0
    assert "Going on from step 2" in capsys.readouterr().out
    second = weights(home / "fork")
    for path, value in first.items():
        np.testing.assert_array_equal(second[path], value, err_msg=path)


def test_do_eval_alone_evaluates(home, capsys):
    assert main(["clm", *SHORT, "--do_eval"]) == 2
    assert "no weights to evaluate" in capsys.readouterr().err
    assert main(["clm", *SHORT]) == 0  # neither: both
    trained = json.loads((home / "out/eval_results.json").read_text())
    (home / "out/eval_results.json").unlink()
    assert main(["clm", *SHORT, "--do_eval"]) == 0
    results = json.loads((home / "out/eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(trained["eval_loss"], rel=1e-6)
    # Given weights, another folder, and only a file to evaluate on.
    flags = ["--do_eval", "--output_dir=other", "--model_name_or_path=out",
             "--validation_file=oscar/unshuffled_deduplicated_no/corpus.txt",
             "--block_size=32"]  # fmt: skip
    assert main(["clm", *flags]) == 0
    results = json.loads((home / "other/eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(trained["eval_loss"], rel=0.2)
    assert not (home / "other/checkpoints").exists()


def test_overwrite_cache_tokenizes_anew(home, capsys):
    assert main(["clm", *SHORT, "--do_train"]) == 0
    manifest = home / "out/data/train/manifest.json"
    first = manifest.stat().st_mtime_ns
    assert main(["clm", *SHORT, "--do_train"]) == 0
    assert manifest.stat().st_mtime_ns == first
    # Checkpoints were trained on these tokens: they stay, whatever else is wrong.
    assert main(["clm", *SHORT, "--do_train", "--overwrite_cache"]) == 2
    assert "start anew by --overwrite_output_dir" in capsys.readouterr().err
    assert manifest.stat().st_mtime_ns == first
    (home / "out/checkpoints").rename(home / "moved")
    # Of which the run knows that there were some.
    assert main(["clm", *SHORT, "--do_train", "--overwrite_cache"]) == 2
    assert "--overwrite_output_dir starts anew" in capsys.readouterr().err
    (home / "out/saved.json").unlink()
    assert main(["clm", *SHORT, "--do_train", "--overwrite_cache"]) == 0
    assert manifest.stat().st_mtime_ns > first


def test_going_on_from_the_weights_in_output_dir(home):
    """As users of the old scripts did to continue: everything in one folder."""
    assert main(["clm", *SHORT, "--do_train"]) == 0
    flags = [flag for flag in SHORT if "config" not in flag and "tokenizer" not in flag]
    flags += ["--model_name_or_path=out", "--overwrite_output_dir", "--do_eval",
              "--do_train", "--learning_rate=1e-9"]  # fmt: skip
    first = weights(home / "out")
    assert main(["clm", *flags]) == 0
    second = weights(home / "out")
    for path, value in first.items():
        np.testing.assert_allclose(second[path], value, atol=1e-6, err_msg=path)
    assert (home / "out/previous-1/checkpoints/4").exists()


def test_an_older_checkpoint_of_the_same_run_is_refused(home, capsys):
    assert main(["clm", *SHORT, "--do_train"]) == 0
    older = "--resume_from_checkpoint=out/checkpoints/2"
    assert main(["clm", *SHORT, "--do_train", older]) == 2
    shown = capsys.readouterr().err
    assert "has gone on to step 4" in shown and "`run_dir` is --output_dir" in shown
    assert main(["clm", *SHORT, "--do_train", older.replace("2", "4")]) == 0


def test_an_evaluation_asked_for_at_the_last_step(home):
    assert main(["clm", *SHORT, "--do_train", "--eval_steps=2"]) == 0
    assert evaluated(home / "out") == [2, 4]
    # Evaluated first, for comparison, then trained: the last evaluation is logged too.
    flags = [*SHORT, "--output_dir=other", "--model_name_or_path=out"]
    assert main(["clm", *flags, "--do_eval"]) == 0
    assert main(["clm", *flags, "--do_train", "--do_eval"]) == 0
    assert evaluated(home / "other") == [4]


def evaluated(folder: Path) -> list[int]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "eval"]


def test_line_by_line_streaming_and_sample_limits(home):
    flags = [flag for flag in MLM if "pad_to" not in flag and "overwrite" not in flag]
    flags += ["--line_by_line", "--streaming", "--max_train_samples=40",
              "--max_eval_samples=5", "--per_device_train_batch_size=2",
              "--max_steps=3", "--logging_first_step"]  # fmt: skip
    assert main(["mlm", *flags]) == 0
    manifest = json.loads((home / "runs/data/train/manifest.json").read_text())
    assert manifest["documents"] == 40
    held_out = json.loads((home / "runs/data/validation/manifest.json").read_text())
    assert held_out["documents"] == 5


def test_tokens_reach_the_hub_and_no_file(home, monkeypatch, capsys):
    seen = {}

    class Uploads:
        busy = False

        def __init__(self, folder, repo_id, *, token, console_print):
            seen.update(folder=folder, repo_id=repo_id, token=token, made=[])

        def start(self, message):
            assert (seen["folder"] / "model.safetensors").exists()
            seen["made"].append(message)

        def create(self):
            seen["made"].append("create")

        def finish(self, message):
            seen["made"].append(message)

    monkeypatch.setattr("lm_scale.trainer.HubUploads", Uploads)
    monkeypatch.setenv("HF_TOKEN", "old")
    flags = ["--push_to_hub", "--hub_token=hf_write", "--token=hf_read", "--do_train"]
    assert main(["clm", *SHORT, *flags]) == 0
    assert os.environ["HF_TOKEN"] == "hf_read"
    assert (seen["repo_id"], seen["token"]) == ("out", "hf_write")
    assert seen["made"] == ["create", "Step 2", "Step 4", "Step 4, the end"]
    for path in (home / "out").rglob("*"):
        if path.is_file():
            assert b"hf_write" not in path.read_bytes(), path
            assert b"hf_read" not in path.read_bytes(), path
    shown = capsys.readouterr()
    assert "hf_" not in shown.out + shown.err


def test_mistakes_are_told_before_anything_is_written(home, capsys):
    for argv, message in (
        (["--no_such_flag"], "unknown flag '--no_such_flag'"),
        (["--block_size=0"], "`seq_len` is --block_size"),
        (["--resume_from_checkpoint=nowhere"], "--resume_from_checkpoint"),
        (["--train_file=missing.txt"], "missing.txt"),
        (["--dataset_name=oscar", "--train_file=x"], "give one of them"),
    ):
        assert main(["clm", *SHORT, *argv]) == 2
        assert message in capsys.readouterr().err
    assert not (home / "out/run.json").exists()


def test_oscar_is_refused_where_there_is_no_such_folder(home, monkeypatch, capsys):
    (home / "oscar").rename(home / "moved")
    assert main(["mlm", *MLM]) == 2
    assert "fineweb-2" in capsys.readouterr().err


def test_resuming_with_other_flags_is_refused(home, capsys):
    assert main(["clm", *SHORT, "--do_train"]) == 0
    assert main(["clm", *SHORT, "--do_train", "--seed=1"]) == 2
    assert "seed: 42 there, 1 here" in capsys.readouterr().err
    config = read_run(home / "out")
    assert dataclasses.replace(config, seed=42) == config
