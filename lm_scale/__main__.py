# SPDX-License-Identifier: Apache-2.0
"""The command line: `lm-scale COMMAND ...`, the same as `python -m lm_scale`.

Exit status: 0 done; 75 training was stopped by a signal (saved, if there were new
steps) or hung: run the same command to go on; 2 wrong usage or input; 3 a plan does not
fit; 1 failed; 130 another command, or one that did not train yet, was interrupted by
Ctrl-C.
Of several processes all have the same, but for one that is killed or crashes.
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
import traceback
from pathlib import Path
from typing import Any

import tyro

from lm_scale import __version__
from lm_scale.cluster import FLAGS_HELP
from lm_scale.errors import Diverging, InputError

USAGE = f"""\
lm-scale {__version__}: pre-train language models from text

usage: lm-scale COMMAND ...

  mlm --output_dir ... [--flag ...]     train by the flags of run_mlm_flax.py
  clm --output_dir ... [--flag ...]     train by the flags of run_clm_flax.py
  train CONFIG [--field value ...]      train, or go on with, the run of a config file
  tokenizer --out FOLDER --corpus.source TEXT ...   train a tokenizer
  tokenizer CONFIG [--field value ...]  make the run's tokenizer
  rules [NAME|FILE ...]                 the rules that cut weights and activations;
                                        choose by train CONFIG --rules NAME|FILE
  config NAME --out FOLDER [key=value ...]          write a model's config.json
  prepare CONFIG [--field value ...]    make the run's tokenizer and token stores
  prepare --verify CONFIG|STORE         read stores against their checksums
  prepare --inspect CONFIG|STORE        what token stores hold: counts, lengths, samples
  plan CONFIG [--slice v3-8 ...]        its memory and speed on TPUs, without any
  data show CONFIG|RUN_DIR --step N     the batch that a step trains on, as text
  eval RUN_DIR                          loss on the held-out split
  generate RUN_DIR [--prompt ...]       continue a text, or fill in its masks
  export RUN_DIR [--out FOLDER]         write a Hugging Face model
  checkpoint list|verify|show DIR       what a run's checkpoints hold, if it is whole
  launch tpu|slurm|gke|local ...        on TPU VMs, a Slurm or Kubernetes cluster, or as
                                        several processes here

`lm-scale COMMAND --help` tells more; `lm-scale train CONFIG --help` lists every field.
Try: lm-scale train configs/quickstart.py

{FLAGS_HELP}"""


OUT_OF_MEMORY = """\
the devices' memory is too small for this run. Make its steps smaller (fewer sequences
for each device, more accumulation), recompute more (gradient checkpointing, remat),
compute in bfloat16, or shard the weights (fsdp in the mesh)."""


ENGINES = ("tpu", "slurm", "gke", "local")
LAUNCH_HELP = """\
  tpu    makes a Cloud TPU VM, trains on it, deletes it: launch/tpu.py
  slurm  submits a job to a Slurm cluster: launch/slurm.py
  gke    starts a JobSet on Google Kubernetes Engine: launch/gke.py
  local  several processes on this machine: launch/local.py

`lm-scale launch ENGINE --help` tells more, launch/README.md shows each.
"""


def hear_interrupts() -> None:
    """Lets Ctrl-C through that comes while a library's callback runs.

    Python only reports an exception there; the signal would be lost.
    """

    def hook(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            # From a thread and a moment later: at once, it would end this hook only.
            again = (os.getpid(), signal.SIGINT)
            threading.Timer(0.05, os.kill, again).start()
        # After an error of the storage tensorstore calls back, from its own threads,
        # into a loop that orbax has left: of no use to anybody.
        elif str(unraisable.exc_value) != "Event loop is closed":
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
        return run(command, rest, script)
    except BaseException as error:
        status, text = explain(error)
        end_others(error, name, status, text)
        if text is None:
            raise
        print(f"{name}: {text}", file=sys.stderr)
        return status


def run(command: str, argv: list[str], script: str | None) -> int:
    """One command, on all the processes that it was started on."""
    if command in ALONE:
        return COMMANDS[command](argv)
    from lm_scale.compile_cache import keep_compiled
    from lm_scale.connect import connect
    from lm_scale.distributed import finish

    argv = connect(command, argv)
    keep_compiled()
    if command in ("mlm", "clm"):
        from lm_scale.scripts.main import main

        status = main(command, argv, script=script)
    else:
        status = COMMANDS[command](argv)
    finish()
    return status


def explain(error: BaseException) -> tuple[int, str | None]:
    """Exit status and message; None: unforeseen, a traceback says more."""
    if isinstance(error, InputError):
        return 2, str(error)
    # A full disk, a missing permission, a loss that will not fall: it is named.
    if isinstance(error, (OSError, Diverging)):
        return 1, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted."
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return 1, f"{OUT_OF_MEMORY}\n{error}"  # jax's errors are of this kind
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else 1), None
    return 1, None


def end_others(error: BaseException, name: str, status: int, text: str | None) -> None:
    """Does not return if this is one process of several: all of them end."""
    distributed: Any = sys.modules.get("lm_scale.distributed")  # None: not even begun
    if not hasattr(distributed, "count") or distributed.count() == 1:
        return
    if isinstance(error, SystemExit):
        text = f"ended with status {status}; what it said is above."
    elif text is None:
        traceback.print_exception(error)
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if isinstance(error, RuntimeError):  # such as jax's
            text += "\nIf a connection was lost, look first at how its peer has ended."
    distributed.fail(f"{name}: {text}", status)


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

    if devices and "JAX_NUM_CPU_DEVICES" not in os.environ:  # which jax has read
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

    from lm_scale.run_text import prepare_tokenizer

    made = prepare_tokenizer(config, Console())
    print(f"{len(made)} tokens, in {Path(config.store_dir) / 'tokenizer'}")
    return 0


PREPARE_HELP = """\
Makes the tokenizer and the token stores of a config file's run. It may be killed: the
same command again goes on from the parts that are finished. With data.stream it makes
the tokenizer and the store of the held-out text, and no other; all of what follows then
is about that store.

  --rank I --world N   does every N-th unit of the corpus, from the I-th on (0 to N-1).
                       Who makes the last one completes the store; rank 0 makes the
                       tokenizer. Tasks of a Slurm array, pods of an indexed Kubernetes
                       Job (with --world) and processes of jax.distributed know their
                       rank; --world 1: do it all. datatrove's executors run the same:
                       lm_scale.prepare_step.Prepare.
  --inspect            shows what the stores of the config, or those in a folder, hold
  --verify             reads the stores of the config, or the store at a path, against
                       their checksums; exit status 1 if something is damaged"""


def prepare(argv: list[str]) -> int:
    for flag in ("--inspect", "--verify"):
        if flag in argv:
            return look(flag, [word for word in argv if word != flag])
    flags, argv = prepare_flags(argv)
    config = config_from("prepare", PREPARE_HELP, argv)
    if config is None:
        return 0
    from rich.console import Console

    from lm_scale import distributed
    from lm_scale.data.ranks import find_rank
    from lm_scale.run_json import settings
    from lm_scale.run_text import prepare_share

    distributed.agree(settings(config))
    rank = find_rank(
        flags.get("rank"), flags.get("world"), os.environ,
        process=distributed.index(), processes=distributed.count(),
    )  # fmt: skip
    if rank.told_by and distributed.index() == 0:
        print(f"rank {rank.index} of {rank.world}, told by {rank.told_by}")
    prepare_share(config, Console(), rank)
    return 0


def prepare_flags(argv: list[str]) -> tuple[dict[str, int], list[str]]:
    """--rank and --world, and the arguments without them."""
    flags: dict[str, int] = {}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in ("--rank", "--world"):
            given = value if equals else next(arguments, "")
            if not given.isdecimal():
                raise InputError(f"{name} {given!r}: expected a number from 0 on.")
            flags[name.removeprefix("--")] = int(given)
        else:
            rest.append(argument)
    return flags, rest


def look(flag: str, argv: list[str]) -> int:
    """`prepare --inspect` and `prepare --verify`, which make nothing."""
    from rich.console import Console

    from lm_scale.look import inspect_command, verify_command

    command = inspect_command if flag == "--inspect" else verify_command
    return command(argv, Console())


def data(argv: list[str]) -> int:
    import jax
    from rich.console import Console

    from lm_scale.look import show_command

    jax.config.update("jax_platforms", "cpu")  # a trainer may have the accelerators
    return show_command(argv, Console())


def plan(argv: list[str]) -> int:
    import jax
    from rich.console import Console

    from lm_scale.planning.command import plan_command

    jax.config.update("jax_platforms", "cpu")  # it compiles for others than are here
    return plan_command(argv, Console())


def launch(argv: list[str]) -> int:
    """Runs launch/ENGINE.py of the checkout, which is what a launch sends."""
    folder = Path(__file__).resolve().parents[1] / "launch"
    about = "usage: lm-scale launch " + "|".join(ENGINES) + " ...\n\n" + LAUNCH_HELP
    if argv and argv[0] in ("-h", "--help"):
        print(about, end="")
        return 0
    if not argv or argv[0] not in ENGINES:
        raise InputError(f"expected an engine, got {' '.join(argv[:1])!r}.\n\n{about}")
    script = folder / f"{argv[0]}.py"
    if not script.is_file():
        raise InputError(
            f"there is no {script}: a launch sends the code of a checkout. Clone "
            f"lm_scale's repository and install it with `pip install -e .`."
        )
    # A program of its own, in this one's place: signals and the terminal are its.
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(script), *argv[1:]])


# --- Commands with options of their own ----------------------------------------------


def arguments(kind: type, argv: list[str]):
    """`RUN_DIR [--options]` as a dataclass; a mistake exits with status 2 (tyro)."""
    return tyro.cli(kind, args=argv, prog=f"lm-scale {kind.__name__.lower()}")


def arguments_of_all(kind: type, argv: list[str]):
    """The same, for a command of several processes, who must all have the same."""
    from lm_scale.distributed import agree

    options = arguments(kind, argv)
    agree({f"--{name}": value for name, value in vars(options).items()})
    return options


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

    options = arguments_of_all(Eval, argv)
    from lm_scale.runs import held_out_loss, open_run

    results = held_out_loss(open_run(options.run_dir))
    for name, value in results.items():
        print(f"eval_{name}: {value:.6g}")
    return 0


def generate_(argv: list[str]) -> int:
    from lm_scale.commands import Generate

    options = arguments_of_all(Generate, argv)
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

    options = arguments_of_all(Export, argv)
    from lm_scale import hf
    from lm_scale.runs import open_run

    out = options.run_dir if options.out is None else options.out
    if not out or Path(out).is_file():
        raise InputError(f"--out {out!r} is no folder to write to.")
    run = open_run(options.run_dir)
    hf.export(run.config.model, run.params, run.tokenizer, out)
    print(out)
    return 0


def checkpoint(argv: list[str]) -> int:
    from lm_scale.commands import Checkpoint

    options = arguments(Checkpoint, argv)
    import jax
    from rich.console import Console

    from lm_scale import checkpoint_command

    jax.config.update("jax_platforms", "cpu")  # a trainer may have the accelerators
    console = Console()
    if options.what == "list":
        return checkpoint_command.list_(options.where, console)
    command = getattr(checkpoint_command, options.what)
    return command(options.where, options.step, console)


def rules(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(
            "usage: lm-scale rules [NAME|FILE ...]\n\nPrints, for each logical axis, "
            "the mesh axes over which the rules cut it.\nNo name: all presets. FILE: a "
            "Python file that sets `rules = Rules(...)`.\nChoose them for a run with "
            "--rules NAME, or --rules FILE, after its CONFIG."
        )
        return 0
    from rich.console import Console

    from lm_scale.config import load_rules
    from lm_scale.report import rules_table
    from lm_scale.sharding import PRESETS

    chosen = {name: load_rules(name) for name in argv} or PRESETS
    Console().print(rules_table(chosen))
    return 0


# Those that are always a single process.
ALONE = ("tokenizer", "config", "rules", "data", "checkpoint", "launch", "plan")
COMMANDS = {
    "rules": rules,
    "train": train,
    "tokenizer": tokenizer,
    "config": config_,
    "prepare": prepare,
    "data": data,
    "plan": plan,
    "eval": eval_,
    "generate": generate_,
    "export": export,
    "checkpoint": checkpoint,
    "launch": launch,
}

if __name__ == "__main__":
    sys.exit(main())
