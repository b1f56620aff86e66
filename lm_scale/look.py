# SPDX-License-Identifier: Apache-2.0
"""Looking at data: `lm-scale prepare --inspect` and `--verify`, `lm-scale data show`.

None needs the run's devices, or its model.
"""

import argparse
import os
from pathlib import Path

from rich.console import Console

from lm_scale.checkpoint_folder import CheckpointFolder, has_checkpoints
from lm_scale.config import RunConfig, load_config
from lm_scale.console import say
from lm_scale.data.inspect_store import inspect
from lm_scale.data.shown import tokenizer_of
from lm_scale.data.store import TokenStore, read_manifest
from lm_scale.data.tokenizer import load_tokenizer
from lm_scale.data.verify import stores_at, verify
from lm_scale.data.windows import Windows, batch_number
from lm_scale.errors import InputError
from lm_scale.run_json import noted, read_run
from lm_scale.run_text import open_train
from lm_scale.runs import some_mesh
from lm_scale.show_batch import show

INSPECT = """\
usage: lm-scale prepare --inspect CONFIG [--field value ...]
       lm-scale prepare --inspect RUN_DIR|STORE [--seq-len TOKENS]

Shows what the token stores of a run hold, or those in a folder: documents, tokens, a
histogram of lengths, samples.
"""
VERIFY = """\
usage: lm-scale prepare --verify CONFIG [--field value ...]
       lm-scale prepare --verify RUN_DIR|STORE

Reads the token stores of a run, or those in a folder, against their checksums. Exit
status 1 if something is damaged.
"""
SHOW = """\
usage: lm-scale data show CONFIG|RUN_DIR --step N [--rows A:B] [--field value ...]

Prints the batch that a step of the run trains on, as text: for each row its epoch and
example, and the documents that it holds. Steps are counted from 1, as the logs count
them; rows, examples and documents from 0.

  --step N     the step
  --rows A:B   rows A to before B of the batch only, as in Python (default: all)
"""


# --- prepare --inspect ----------------------------------------------------------------


def inspect_command(argv: list[str], console: Console) -> int:
    """`argv`: what follows `prepare`, without `--inspect`. Raises InputError."""
    if _helped(argv, INSPECT, console):
        return 0
    config, rest = _named(argv, "prepare --inspect")
    parser = argparse.ArgumentParser(
        "lm-scale prepare --inspect", usage=INSPECT, allow_abbrev=False
    )
    parser.add_argument("--seq-len", type=int, default=config and config.seq_len)
    seq_len = parser.parse_args(rest).seq_len
    for path in _stores(config, argv[0]):
        store = TokenStore.open(path)
        inspect(store, tokenizer_of(store), seq_len, console)
    return 0


def verify_command(argv: list[str], console: Console) -> int:
    """`argv`: what follows `prepare`, without `--verify`; 1 if a store is damaged."""
    if _helped(argv, VERIFY, console):
        return 0
    config, rest = _named(argv, "prepare --verify")
    if rest:
        raise InputError(f"--verify takes nothing behind a folder, got {rest[0]!r}.")
    whole = [verify(path, console) for path in _stores(config, argv[0])]
    return 0 if all(whole) else 1


def _helped(argv: list[str], usage: str, console: Console) -> bool:
    """If help was asked for, which is then shown."""
    if argv and not {"-h", "--help"} & set(argv):
        return False
    say(console, usage.rstrip())
    if not argv:
        raise InputError("expected a config file, a run or a token store.")
    return True


def _named(argv: list[str], command: str) -> tuple[RunConfig | None, list[str]]:
    """The config of a file or of a run, None of a store; what is left of the words."""
    where, rest = argv[0], argv[1:]
    if Path(where).is_file():
        return _config(where, rest, command), []
    if (Path(where) / "run.json").is_file():
        return read_run(where), rest
    return None, rest


def _stores(config: RunConfig | None, where: str) -> list[str]:
    """The stores of a run, one of each source at least; or those at a path or url."""
    if config is None:
        return stores_at(where)
    folders = [os.path.join(config.store_dir, name) for name in config.corpora]
    return [store for folder in folders for store in stores_at(folder)]


# --- data show ------------------------------------------------------------------------


def show_command(argv: list[str], console: Console) -> int:
    """`argv`: what follows `data`. Raises InputError."""
    if not argv or {"-h", "--help"} & {argv[0], *argv[1:2]}:
        say(console, SHOW.rstrip())
        if not argv:
            raise InputError("expected `show`.")
        return 0
    if argv[0] != "show":
        raise InputError(f"expected `show`, got {argv[0]!r}.\n\n{SHOW}")
    if len(argv) < 2 or argv[1].startswith("-"):
        raise InputError(f"expected a config file or the folder of a run.\n\n{SHOW}")
    parser = argparse.ArgumentParser(
        "lm-scale data show", usage=SHOW, allow_abbrev=False, add_help=False
    )
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--rows", default=":")
    options, overrides = parser.parse_known_args(argv[2:])
    config = _config(argv[1], overrides, "data show")
    rows = rows_of(options.rows, config.batch)
    show_step(config, options.step, rows, console)
    return 0


def rows_of(text: str, batch: int) -> range:
    """The rows of a batch that `A:B` means, as in Python; `A` is one row."""
    try:
        ends = [int(end) if end else None for end in text.split(":")]
        if len(ends) == 1 and ends[0] is not None and 0 <= ends[0] < batch:
            return range(ends[0], ends[0] + 1)
        found = range(batch)[slice(*ends)] if len(ends) == 2 else range(0)
    except ValueError:
        found = range(0)
    if not found:
        raise InputError(
            f"--rows {text}: expected A:B, rows A to before B of the batch's {batch}, "
            f"such as 0:{min(4, batch)}."
        )
    return found


def show_step(config: RunConfig, step: int, rows: range, console: Console) -> None:
    """Prints these rows of the batch that a step, counted from 1, trains on.

    Raises InputError if the run has no such step, no token store yet, or a stream.
    """
    if config.data.stream:
        raise InputError(
            "data.stream = True: the batches of a stream are made in order while "
            "training, and cannot be shown by their step; `lm-scale prepare --inspect` "
            "shows the held-out text."
        )
    folder = Path(config.store_dir)
    for train in (folder / name / "train" for name in config.corpora):
        if read_manifest(train) is None:
            raise InputError(
                f"{train} holds no complete token store: run `lm-scale prepare` with "
                "the same config first."
            )
    tokenizer = load_tokenizer(folder / "tokenizer")
    batches = open_train(config, tokenizer, some_mesh(config))
    last = config.total_steps(batches.examples)
    if not 1 <= step <= last:
        raise InputError(f"--step {step}: expected 1 to {last}, the steps of the run.")
    left_out = windows_of(config)
    number = batch_number(step - 1, left_out)
    if left_out:
        windows = ", ".join(f"{first} to {stop - 1}" for first, stop in left_out)
        say(console, f"The run leaves out the batches {windows} (counted from 0).")
    say(console, f"step {step} of {last} trains on batch {number} (counted from 0): "
        f"{config.batch} rows")  # fmt: skip
    show(batches, tokenizer, number, rows, console)


def windows_of(config: RunConfig) -> Windows:
    """The batches that the run leaves out by now, after rollbacks."""
    windows = noted(config.run_dir).get("left_out")
    if windows is None and has_checkpoints(config.checkpoints):
        found = CheckpointFolder(config.checkpoints).manifests()
        windows = found[max(found)].left_out if found else None
    return tuple((first, stop) for first, stop in windows or ())


def _config(where: str, overrides: list[str], command: str) -> RunConfig:
    """The config of a file, with overrides, or that of the run in a folder."""
    if not Path(where).is_dir():
        config = load_config(where, overrides, prog=f"lm-scale {command}")
    elif overrides:
        raise InputError(
            f"{where} is the folder of a run, whose config is what it is, but "
            f"{overrides[0]} was given. Leave it out, or name a config file."
        )
    else:
        config = read_run(where)
    config.check()
    return config
