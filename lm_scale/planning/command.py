# SPDX-License-Identifier: Apache-2.0
"""`lm-scale plan`: its options, what it prints, its exit status."""

import argparse
import dataclasses
import json

from rich.console import Console

from lm_scale.config import RunConfig, load_config
from lm_scale.console import say
from lm_scale.errors import InputError
from lm_scale.planning.candidates import REMATS
from lm_scale.planning.compare import compare, measured, print_comparison
from lm_scale.planning.kept import cache_folder
from lm_scale.planning.plan import make_plan, to_json
from lm_scale.planning.report import print_plan
from lm_scale.planning.search import BUDGET
from lm_scale.planning.search_command import search_command
from lm_scale.run_json import read_run
from lm_scale.sharding import PRESETS, parse_mesh_shape

DOES_NOT_FIT = 3
HELP = f"""\
usage: lm-scale plan CONFIG [--slice NAME] [--json] [--price X] [--field value ...]
       lm-scale plan --compare RUN_DIR [--slice NAME] [--json]
       lm-scale plan CONFIG --search [--slice NAME] [--budget N] [--jobs N]
                     [--among WHAT=A,B] [--out FILE] [--plot FILE] [--json]

Compiles the train step of a config file for TPUs, of which there need be none, and
says whether it fits, how long a step and the run take, and what it spends the time on.
For GPUs it says what a step holds, and the least that it takes: compiled if they are
here, else reckoned.

  --slice NAME  v3-8, v4-128, v5e-256, v5p-512, v6e-64 ..., h100-8, a100-80gb-8 ...;
                else the config's `slice`
  --mesh AXES   data=-1,fsdp=4, say; or --mesh.fsdp 4
  --json        the same as JSON
  --price X     of a chip-hour, in any currency: adds what the run costs
  --compare RUN_DIR   the plan of a run's own config, beside what the run measured
  --fresh       compile even what has been compiled before; nothing is kept

With --search it tries meshes, rules, remat policies and accumulation, with the config's
batch, and ranks those that fit by their estimated tokens/s. Each is compiled, which
takes minutes for large models; Ctrl-C, and the same command again goes on.

  --budget N    compile so many, the most promising ones by a rough estimate of their
                time, the config's own choice first ({BUDGET})
  --jobs N      so many at a time (as many as there are CPUs); a large model's takes
                some GB of memory
  --among WHAT=A,B   only these, once for each of: rules ({", ".join(PRESETS)}),
                remat ({", ".join(REMATS)}), accumulate (numbers)
  --out FILE    write the best as overrides: lm-scale train CONFIG $(cat FILE)
  --plot FILE   .png or .html: memory against time of a step; needs matplotlib

Other options are those of `lm-scale train CONFIG --help`. Exit status: 0 it (or
something) fits, 3 it does not fit or cannot be compiled, 2 wrong usage or input.
"""
OF_A_SEARCH = ("budget", "jobs", "among", "out", "plot")
OF_A_PLAN = ("mesh", "price", "compare")


def plan_command(argv: list[str], console: Console) -> int:
    """`argv`: what follows `plan`; returns the exit status. Raises InputError."""
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP, end="")
        if not argv:
            raise InputError("expected a config file, e.g. configs/llama_1b.py.")
        return 0
    options, words = parse(argv)
    config = config_of(options, words)
    if options.search:
        fits = search_command(config, words, options, console)
    else:
        fits = plan_one(config, options, console)
    return 0 if fits else DOES_NOT_FIT


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, None where not given, and the words that are left.

    Raises InputError for an option that has a wrong value, or no place here.
    """
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False
    )
    for name in ("slice", "mesh", "compare", "out", "plot"):
        parser.add_argument(f"--{name}", metavar="VALUE")
    for name in ("json", "fresh", "search"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--price", type=float)
    parser.add_argument("--budget", type=count)
    parser.add_argument("--jobs", type=count)
    parser.add_argument("--among", action="append")
    try:
        options, words = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None
    for name in OF_A_PLAN if options.search else OF_A_SEARCH:
        if getattr(options, name) is not None:
            where = "beside" if options.search else "without"
            raise InputError(f"--{name} has no place {where} --search. Leave it out.")
    return options, words


def count(text: str) -> int:
    """A number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0.")
    return int(text)


def config_of(options: argparse.Namespace, words: list[str]) -> RunConfig:
    """The config of a file with its overrides, or of the run to compare with."""
    if options.compare is None:
        if not words or words[0].startswith("-"):
            given = words[0] if words else "none"
            raise InputError(f"expected a config file first, got {given}.")
        mesh = [] if options.mesh is None else mesh_overrides(options.mesh)
        config = load_config(words[0], words[1:] + mesh, prog="lm-scale plan")
        config.check()
        return config
    if words:
        raise InputError(
            f"--compare {options.compare}: the config is the run's own, so "
            f"{words[0]!r} has no place here. Leave it out."
        )
    return read_run(options.compare)


def mesh_overrides(text: str) -> list[str]:
    """`data=2,fsdp=4` as overrides of single fields."""
    sizes = dataclasses.asdict(parse_mesh_shape(text))
    return [
        word for axis, size in sizes.items() for word in (f"--mesh.{axis}", str(size))
    ]


def plan_one(config: RunConfig, options: argparse.Namespace, console: Console) -> bool:
    """Prints the plan of a config; True: it fits."""
    told = measured(options.compare) if options.compare else None
    quiet = Console(quiet=True) if options.json else console
    plan = make_plan(
        config, options.slice, price=options.price,
        cache=None if options.fresh else cache_folder(),
        tell=lambda text: say(quiet, text),
    )  # fmt: skip
    rows = compare(plan, told) if told else []
    if options.json:
        compared = {row.name: dataclasses.asdict(row) for row in rows}
        print(json.dumps(to_json(plan) | ({"compared": compared} if rows else {})))
    else:
        print_plan(plan, console)
        if rows:
            print_comparison(rows, console)
    return plan.fits
