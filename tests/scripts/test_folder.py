# SPDX-License-Identifier: Apache-2.0
"""The output folder: going on, refusing, and starting anew without losing anything."""

import dataclasses
import os
from pathlib import Path

import pytest
from rich.console import Console
from tiny import causal_run

from lm_scale.errors import InputError
from lm_scale.run_json import write_config
from lm_scale.scripts.flags import TrainingArguments
from lm_scale.scripts.folder import check_results, ready

QUIET = Console(quiet=True)


@pytest.fixture
def config(tmp_path):
    return causal_run(tmp_path)


def flags(**changes) -> TrainingArguments:
    return TrainingArguments(output_dir="", **changes)


ANEW = flags(overwrite_output_dir=True)
MOVED = {"checkpoints/30/params", "metrics.jsonl", "events.out.tfevents.1",
         "eval_results.json", "wandb/run", "wandb_id"}  # fmt: skip
KEPT = {"run.json", "config.json", "tokenizer.json", "model.safetensors"}
TOKENS = {"data/train/manifest.json", "data/tokenizer/recipe.json"}
OTHERS = {"README.md", "notes/a", "wandb-notes.txt", "flax_model.msgpack"}


def finished_run(config) -> Path:
    """The files of a run, and some that are none of ours."""
    folder = Path(config.run_dir)
    for name in MOVED | KEPT | TOKENS | OTHERS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "previous-1").mkdir()
    write_config(config)
    return folder


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_a_new_or_empty_folder_is_left_alone(config):
    ready(config, flags(), QUIET)
    assert not Path(config.run_dir).exists()
    (Path(config.run_dir) / "data").mkdir(parents=True)  # a start that was refused
    ready(config, flags(), QUIET)
    ready(config, ANEW, QUIET)
    assert files(Path(config.run_dir)) == set()


@pytest.mark.parametrize("changes", [{}, {"resume_from_checkpoint": "true"}])
def test_a_run_is_gone_on_with(config, changes):
    folder = finished_run(config)
    before = files(folder)
    ready(config, flags(**changes), QUIET)
    assert files(folder) == before


def test_a_run_that_did_not_get_far_is_ours(config):
    path = Path(config.run_dir) / "data/tokenizer/recipe.json"
    path.parent.mkdir(parents=True)
    path.write_text("")
    ready(config, flags(), QUIET)


def test_starting_anew_moves_the_run_and_keeps_all(config):
    folder = finished_run(config)
    console = Console(record=True, width=400, file=open("/dev/null", "w"))  # noqa: SIM115
    ready(config, ANEW, console)
    assert "previous-2" in console.export_text()
    aside = {name for name in files(folder) if name.startswith("previous-2")}
    assert aside == {f"previous-2/{name}" for name in MOVED | KEPT}
    assert files(folder) - aside == KEPT | TOKENS | OTHERS
    ready(config, ANEW, QUIET)  # nothing left to move
    assert not (folder / "previous-3").exists()


def test_what_the_new_run_writes_over_is_kept(config):
    """As after `export`: new files under the old names, the old ones in previous-1."""
    folder = Path(config.run_dir)
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    (folder / "model.safetensors").write_text("old weights")
    ready(config, ANEW, QUIET)
    assert files(folder) == {
        "config.json", "model.safetensors",
        "previous-1/config.json", "previous-1/model.safetensors",
    }  # fmt: skip
    (folder / "new").write_text("new weights")
    os.replace(folder / "new", folder / "model.safetensors")
    assert (folder / "previous-1/model.safetensors").read_text() == "old weights"


@pytest.mark.parametrize(
    "change", ["longer", "separator", "newer text", "newer tokenizer", None]
)
def test_tokens_that_do_not_fit_are_moved_too(config, tmp_path, change):
    path = tmp_path / "tokenizer"
    path.mkdir()
    (path / "tokenizer.json").write_text("{}")
    tokenizer = dataclasses.replace(config.data.tokenizer, path=str(path))
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    config = dataclasses.replace(config, data=data)
    folder, new = finished_run(config), config
    later = (folder / "data/tokenizer/recipe.json").stat().st_mtime + 9
    if change == "longer":
        new = dataclasses.replace(config, seq_len=24)
    if change == "separator":
        new = dataclasses.replace(
            config, data=dataclasses.replace(data, separator=False)
        )
    if change == "newer text":
        os.utime(config.data.corpus.source, (later, later))
    if change == "newer tokenizer":
        os.utime(path / "tokenizer.json", (later, later))
    new = dataclasses.replace(  # what makes no other tokens
        new, data=dataclasses.replace(new.data, workers=2, cache_dir="x")
    )
    ready(new, ANEW, QUIET)
    assert (folder / "data").exists() == (change is None)
    moved = folder / "previous-2/data/train/manifest.json"
    assert moved.exists() == (change is not None)


def test_a_folder_called_data_that_is_not_ours_stays(config):
    path = Path(config.run_dir) / "data" / "mine.txt"
    path.parent.mkdir(parents=True)
    path.write_text("text")
    ready(config, ANEW, QUIET)
    assert path.exists()


def test_somebody_elses_folder_is_refused(config):
    folder = Path(config.run_dir)
    folder.mkdir()
    (folder / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match="not empty and holds no run"):
        ready(config, flags(), QUIET)
    ready(config, ANEW, QUIET)
    assert "thesis.txt" in files(folder)


def test_checkpoints_of_nobody_knows_whom_are_refused(config):
    folder = Path(config.run_dir)
    (folder / "checkpoints" / "30").mkdir(parents=True)
    (folder / "checkpoints" / "30" / "a").write_text("a")
    for asked in (flags(), ANEW):
        with pytest.raises(InputError, match="not empty|does not say of which run"):
            ready(config, asked, QUIET)


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        (False, {"resume_from_checkpoint": "true"}, "has no checkpoints"),
        (True, {"resume_from_checkpoint": "False"}, "holds a run already"),
        (True, {"resume_from_checkpoint": "true", "overwrite_output_dir": True},
         "give one of them"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(config, run, changes, message):
    before = files(finished_run(config)) if run else set()
    with pytest.raises(InputError, match=message):
        ready(config, flags(**changes), QUIET)
    assert files(Path(config.run_dir)) == before


def test_a_file_is_no_folder(config):
    Path(config.run_dir).write_text("")
    with pytest.raises(InputError, match="is a file"):
        ready(config, ANEW, QUIET)


def test_results_of_others_are_not_written_over(config):
    folder = finished_run(config)
    check_results(config)
    (folder / "run.json").unlink()
    (folder / "data/tokenizer/recipe.json").unlink()
    with pytest.raises(InputError, match="holds eval_results.json"):
        check_results(config)
