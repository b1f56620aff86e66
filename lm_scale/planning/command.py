# SPDX-License-Identifier: Apache-2.0
"""`lm-scale plan`: its options, what it prints, its exit status."""

import dataclasses
import json
from dataclasses import dataclass

from rich.console import Console

from lm_scale.config import RunConfig, load_config
from lm_scale.console import say
from lm_scale.errors import InputError
from lm_scale.planning.compare import compare, measured, print_comparison
from lm_scale.planning.kept import cache_folder
from lm_scale.planning.libtpu import check_compiler
from lm_scale.planning.plan import make_plan, to_json
from lm_scale.planning.report import print_plan
from lm_scale.planning.search_command import search_command
from lm_scale.run_json import read_run
from lm_scale.sharding import parse_mesh_shape

DOES_NOT_FIT = 3
HELP = """\
usage: lm-scale plan CONFIG [--slice NAME] [--json] [--price X] [--field value ...]
       lm-scale plan --compare RUN_DIR [--slice NAME] [--json]
       lm-scale plan CONFIG --search [--help]

Compiles the train step of a config file for TPUs, of which there need be none, and
says whether it fits, how long a step and the run take, and what it spends the time on.

  --slice NAME  v3-8, v4-128, v5e-256, v5p-512, v6e-64 ...; else the config's `slice`
  --mesh AXES   data=-1,fsdp=4, say; or --mesh.fsdp 4
  --json        the same as JSON
  --price X     of a chip-hour, in any currency: adds what the run costs
  --compare RUN_DIR   the plan of a run's own config, beside what the run measured
  --search      which mesh, rules, remat and accumulation are the fastest that fit
  --fresh       compile even if the same has been compiled before

Other options are those of `lm-scale train CONFIG --help`. Exit status: 0 it fits, 3 it
does not fit or cannot be compiled, 2 wrong usage or input.
"""


@dataclass
class Options:
    """What is asked for, besides the config's fields."""

    slice: str | None = None
    compare: str | None = None
    price: float | None = None
    json: bool = False
    fresh: bool = False


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """The options of a plan, and the overrides that are left; InputError if wrong."""
    options, left = Options(), []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--json", "--fresh"):
            setattr(options, flag.removeprefix("--"), True)
        elif flag in ("--slice", "--price", "--mesh", "--compare"):
            value = value if equals else next(words, "")
            if not value:
                raise InputError(f"{flag} needs a value.")
            if flag == "--mesh":
                left += mesh_overrides(value)
            elif flag == "--price":
                options.price = number(value)
            else:
                setattr(options, flag.removeprefix("--"), value)
        else:
            left.append(word)
    return options, left


def mesh_overrides(text: str) -> list[str]:
    """`data=2,fsdp=4` as overrides of single fields."""
    sizes = dataclasses.asdict(parse_mesh_shape(text))
    return [
        word for axis, size in sizes.items() for word in (f"--mesh.{axis}", str(size))
    ]


def number(text: str) -> float:
    """The price; InputError if it is no number."""
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--price {text!r}: expected a number.") from None


def plan_command(argv: list[str], console: Console) -> int:
    """`plan CONFIG ...`: prints the plan; returns the exit status."""
    if "--search" in argv:
        return search_command(argv, console)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        if not argv:
            raise InputError("expected a config file, e.g. configs/llama_1b.py.")
        return 0
    options, words = parse(argv)
    config = config_of(options, words)
    check_compiler()
    told = measured(options.compare) if options.compare else None
    plan = make_plan(
        config, options.slice, price=options.price,
        cache=None if options.fresh else cache_folder(),
        tell=(lambda text: None) if options.json else lambda text: say(console, text),
    )  # fmt: skip
    rows = compare(plan, told) if told else []
    if options.json:
        compared = {row.name: dataclasses.asdict(row) for row in rows}
        print(json.dumps(to_json(plan) | ({"compared": compared} if rows else {})))
    else:
        print_plan(plan, console)
        if rows:
            print_comparison(rows, console)
    return 0 if plan.fits else DOES_NOT_FIT


def config_of(options: Options, words: list[str]) -> RunConfig:
    """The config of a file with its overrides, or of the run to compare with."""
    if options.compare is None:
        if not words or words[0].startswith("-"):
            given = words[0] if words else "none"
            raise InputError(f"expected a config file first, got {given}.")
        config = load_config(words[0], words[1:], prog="lm-scale plan")
        config.check()
        return config
    if words:
        raise InputError(
            f"--compare {options.compare}: the config is the run's own, so "
            f"{words[0]!r} has no place here. Leave it out."
        )
    return read_run(options.compare)
