# SPDX-License-Identifier: Apache-2.0
"""The command line: `lm-scale COMMAND ...`, the same as `python -m lm_scale`.

Exit status: 0 done; 75 stopped by a signal, saved, run the same command to go on;
2 wrong usage or input; 1 failed; 130 interrupted where there was nothing to save.
"""

import os

# jax 0.10 deadlocks with more simulated CPU devices than threads; it reads the number
# of threads from here, once, so it has to stand before jax is first imported.
os.environ["NPROC"] = str(max(16, int(os.environ.get("NPROC", os.cpu_count() or 1))))
# transformers says at each import that there is no torch: it needs none here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import signal
import sys
import threading
from pathlib import Path
from typing import Any

import tyro

from lm_scale import __version__
from lm_scale.errors import InputError

USAGE = f"""\
lm-scale {__version__}: pre-train language models from text

usage: lm-scale COMMAND ...

  mlm --output_dir ... [--flag ...]     train by the flags of run_mlm_flax.py
  clm --output_dir ... [--flag ...]     train by the flags of run_clm_flax.py
  train CONFIG [--field value ...]      train, or go on with, the run of a config file
  tokenizer --out FOLDER --corpus.source TEXT ...   train a tokenizer
  tokenizer CONFIG [--field value ...]  make the run's tokenizer
  config NAME --out FOLDER [key=value ...]          write a model's config.json
  prepare CONFIG [--field value ...]    make the run's tokenizer and token stores
  eval RUN_DIR                          loss on the held-out split
  generate RUN_DIR [--prompt ...]       continue a text, or fill in its masks
  export RUN_DIR [--out FOLDER]         write a Hugging Face model

`lm-scale COMMAND --help` tells more; `lm-scale train CONFIG --help` lists every field.
Try: lm-scale train configs/quickstart.py
"""


OUT_OF_MEMORY = """\
the devices' memory is too small for this run. Make its steps smaller (fewer sequences
for each device, more accumulation), recompute more (gradient checkpointing, remat),
compute in bfloat16, or shard the weights (fsdp in the mesh)."""


def hear_interrupts() -> None:
    """Lets Ctrl-C through that comes while a library's callback runs.

    Python only reports an exception there; the signal would be lost.
    """

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            # From a thread and a moment later: at once, it would end this hook only.
            again = (os.getpid(), signal.SIGINT)
            threading.Timer(0.05, os.kill, again).start()
        else:
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def main(argv: list[str] | None = None, *, script: str | None = None) -> int:
    """Runs one command; returns the exit status.

    script: path of the script in `launch/` that stands for the command.
    """
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in ("mlm", "clm", *COMMANDS):
        print(f"lm-scale: unknown command {command!r}.\n\n{USAGE}", file=sys.stderr)
        return 2
    name = f"lm-scale {command}" if script is None else Path(script).name
    hear_interrupts()
    try:
        if command in ("mlm", "clm"):
            from lm_scale.scripts.main import main

            return main(command, rest, script=script)
        return COMMANDS[command](rest)
    except InputError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a missing permission: the name is in it
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: interrupted.", file=sys.stderr)
        return 130
    except RuntimeError as error:  # jax's errors are of this kind
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{name}: {OUT_OF_MEMORY}\n{error}", file=sys.stderr)
        return 1


# --- Commands that take a config file -------------------------------------------------


def config_from(command: str, about: str, argv: list[str]):
    """The RunConfig of `CONFIG [overrides]`, or None after printing help."""
    if not argv or argv[0] in ("-h", "--help"):
        usage = f"usage: lm-scale {command} CONFIG [--field value ...]"
        print(f"{usage}\n\n{about}\n\nCONFIG is a Python file, such as "
              f"configs/quickstart.py;\n`lm-scale {command} CONFIG --help` lists the "
              f"fields and their values in it.")  # fmt: skip
        if not argv:
            raise InputError("expected a config file, e.g. configs/quickstart.py.")
        return None
    if argv[0].startswith("-"):
        raise InputError(f"expected a config file first, got {argv[0]!r}.")
    from lm_scale.config import load_config

    config = load_config(argv[0], argv[1:], prog=f"lm-scale {command}")
    config.check()
    return config


def simulate(devices: int) -> None:
    """Makes the CPU, where it is all there is, look like several devices."""
    import jax

    if devices:
        jax.config.update("jax_num_cpu_devices", devices)


def train(argv: list[str]) -> int:
    about = "Trains the run of a config file. The same command again goes on with it."
    config = config_from("train", about, argv)
    if config is None:
        return 0
    simulate(config.simulated_devices)
    from lm_scale.trainer import train

    return 75 if train(config).interrupted else 0


def tokenizer(argv: list[str]) -> int:
    about = "Trains (or fetches) the tokenizer of a config file's run."
    if argv and argv[0] == "--help":
        print("usage: lm-scale tokenizer CONFIG [--field value ...]: the run's; or:\n")
    if argv and argv[0].startswith("--"):
        return tokenizer_of_corpus(argv)
    config = config_from("tokenizer", about, argv)
    if config is None:
        return 0
    from rich.console import Console

    from lm_scale.runs import prepare_tokenizer

    made = prepare_tokenizer(config, Console())
    print(f"{len(made)} tokens, in {Path(config.store_dir) / 'tokenizer'}")
    return 0


def prepare(argv: list[str]) -> int:
    about = "Makes the tokenizer and the token stores of a config file's run."
    config = config_from("prepare", about, argv)
    if config is None:
        return 0
    from rich.console import Console

    from lm_scale.runs import prepare_data

    prepare_data(config, Console())
    return 0


# --- Commands with options of their own ----------------------------------------------


def arguments(kind: type, argv: list[str]):
    """`RUN_DIR [--options]` as a dataclass; a mistake exits with status 2 (tyro)."""
    return tyro.cli(kind, args=argv, prog=f"lm-scale {kind.__name__.lower()}")


def tokenizer_of_corpus(argv: list[str]) -> int:
    from lm_scale.commands import Tokenizer

    options = arguments(Tokenizer, argv)
    from lm_scale.data.recipe import make_tokenizer
    from lm_scale.data.tokenizer import TokenizerConfig

    make_tokenizer(
        options.out, options.corpus,
        TokenizerConfig(
            vocab_size=options.vocab_size, min_frequency=options.min_frequency,
            kind=options.kind,
        ),
        max_length=options.max_length, overwrite=options.overwrite,
    )  # fmt: skip
    return 0


def config_(argv: list[str]) -> int:
    from lm_scale.commands import Config

    options = arguments(Config, argv)
    from lm_scale.shapes import write_config

    print(
        write_config(
            options.name, options.overrides, options.out, overwrite=options.overwrite
        )
    )
    return 0


def eval_(argv: list[str]) -> int:
    from lm_scale.commands import Eval

    options = arguments(Eval, argv)
    import jax

    from lm_scale.evaluate import evaluate
    from lm_scale.runs import open_eval, open_run
    from lm_scale.step import make_eval_step

    run = open_run(options.run_dir)
    with jax.set_mesh(run.mesh):
        held_out = open_eval(run.config, run.tokenizer, run.mesh)
        step = make_eval_step(run.model)
        rules = run.config.compute.rules
        results = evaluate(step, run.params, held_out, run.mesh, rules)
    for name, value in results.items():
        print(f"eval_{name}: {value:.6g}")
    return 0


def generate_(argv: list[str]) -> int:
    from lm_scale.commands import Generate

    options = arguments(Generate, argv)
    import jax

    from lm_scale.generate import Sampling, complete
    from lm_scale.runs import open_run

    sampling = Sampling(
        options.max_new_tokens, options.temperature, options.top_k, options.top_p,
        options.seed,
    )  # fmt: skip
    run = open_run(options.run_dir)
    with jax.set_mesh(run.mesh):
        texts = complete(
            run.model, run.params, run.tokenizer, options.prompt, sampling,
            options.samples,
        )  # fmt: skip
    for text in texts:
        print(text)
    return 0


def export(argv: list[str]) -> int:
    from lm_scale.commands import Export

    options = arguments(Export, argv)
    from lm_scale import hf
    from lm_scale.runs import open_run

    out = options.run_dir if options.out is None else options.out
    if not out or Path(out).is_file():
        raise InputError(f"--out {out!r} is no folder to write to.")
    run = open_run(options.run_dir)
    hf.export(run.config.model, run.params, run.tokenizer, out)
    print(out)
    return 0


COMMANDS = {
    "train": train,
    "tokenizer": tokenizer,
    "config": config_,
    "prepare": prepare,
    "eval": eval_,
    "generate": generate_,
    "export": export,
}

if __name__ == "__main__":
    sys.exit(main())
