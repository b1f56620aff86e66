# SPDX-License-Identifier: Apache-2.0
"""`lm-scale plan CONFIG --search`: its options, what it prints, its exit status."""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from lm_scale.config import RunConfig, load_config
from lm_scale.console import say
from lm_scale.errors import InputError
from lm_scale.planning.accelerators import find_slice
from lm_scale.planning.candidates import OWN, REMATS, Space
from lm_scale.planning.kept import cache_folder
from lm_scale.planning.libtpu import check_compiler
from lm_scale.planning.search import BUDGET, Search, cpus, search
from lm_scale.planning.search_report import (
    Progressing,
    check_picture,
    print_search,
    write_picture,
)
from lm_scale.run_json import to_dict
from lm_scale.sharding import PRESETS

NOTHING_FITS = 3
HELP = f"""\
usage: lm-scale plan CONFIG --search [--slice NAME] [--budget N] [--jobs N]
                     [--among WHAT=A,B] [--out FILE] [--plot FILE] [--json]
                     [--field value ...]

Tries meshes, rules, remat policies and accumulation, with the config's batch, and
ranks those that fit by their estimated tokens/s. Each is compiled, which takes minutes
for large models; Ctrl-C, and the same command again goes on.

  --slice NAME  v3-8, v4-128, v5e-256, v5p-512, v6e-64 ...; else the config's `slice`
  --budget N    compile so many, the most promising ones by a rough estimate of their
                time, the config's own choice first ({BUDGET})
  --jobs N      so many at a time (as many as there are CPUs); a large model's takes
                some GB of memory
  --among WHAT=A,B   only these, once for each of: rules ({", ".join(PRESETS)}),
                remat ({", ".join(REMATS)}), accumulate (numbers)
  --out FILE    write the best as overrides: lm-scale train CONFIG $(cat FILE)
  --plot FILE   .png or .html: memory against time of a step; needs matplotlib
  --json        the same as JSON
  --fresh       compile even what has been compiled before; nothing is kept

Other options are those of `lm-scale train CONFIG --help`. Exit status: 0 something
fits, 3 nothing does, 2 wrong usage or input.
"""


@dataclass
class Options:
    """What is asked for, besides the config's fields."""

    slice: str | None = None
    space: Space = Space()
    budget: int = BUDGET
    jobs: int | None = None
    out: str | None = None
    plot: str | None = None
    json: bool = False
    fresh: bool = False


def parse(argv: list[str]) -> tuple[Options, list[str]]:
    """The options of a search, and the words that are left; InputError if wrong."""
    options, left = Options(), []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--")
        if flag in ("--json", "--fresh"):
            setattr(options, name, True)
        elif flag in ("--slice", "--out", "--plot", "--budget", "--jobs", "--among"):
            value = value if equals else next(words, "")
            if not value:
                raise InputError(f"{flag} needs a value.")
            if flag == "--among":
                options.space = narrow(options.space, value)
            else:
                numbers = flag in ("--budget", "--jobs")
                setattr(options, name, count(flag, value) if numbers else value)
        elif flag in ("--mesh", "--price", "--compare"):
            raise InputError(f"{flag} has no place beside --search. Leave it out.")
        elif flag != "--search":
            left.append(word)
    return options, left


def count(flag: str, text: str) -> int:
    """A number above 0; InputError if it is none."""
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"{flag} {text!r}: expected a number above 0.")
    return int(text)


def narrow(space: Space, text: str) -> Space:
    """The space with only `rules=fsdp,dp`, or the like; InputError if wrong."""
    name, _, listed = text.partition("=")
    values = tuple(listed.split(","))
    if name == "accumulate":
        return replace(space, accumulate=tuple(count("--among", x) for x in values))
    known = {"rules": (OWN, *PRESETS), "remat": REMATS}
    if name not in known:
        raise InputError(
            f"--among {text!r}: expected rules=..., remat=... or accumulate=..."
        )
    for value in values:
        if value not in known[name]:
            raise InputError(
                f"--among {text!r}: {value!r} is none of {', '.join(known[name])}."
            )
    return replace(space, **{name: values})


def search_command(argv: list[str], console: Console) -> int:
    """`plan CONFIG --search ...`: prints what was found; returns the exit status."""
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    options, words = parse(argv)
    config = config_of(words, options)
    check_compiler()
    name = options.slice or config.slice
    if name is None:
        raise InputError(
            "the config names no slice. Say what to search for: --slice v3-8, or "
            "`slice` in the config."
        )
    jobs = options.jobs or cpus()
    quiet = Console(quiet=True) if options.json else console
    say(quiet, f"Searching for {name}: up to {options.budget} compilations, {jobs} at "
               f"a time.")  # fmt: skip
    with Progressing(quiet) as progress:
        found = search(
            config, find_slice(name), options.space, budget=options.budget, jobs=jobs,
            cache=None if options.fresh else cache_folder(), tell=progress.tell,
        )  # fmt: skip
    tell(found, words, options, console)
    return 0 if found.best else NOTHING_FITS


def config_of(words: list[str], options: Options) -> RunConfig:
    """The config of a file with its overrides; what is to be written can be."""
    if not words or words[0].startswith("-"):
        given = words[0] if words else "none"
        raise InputError(f"expected a config file first, got {given}.")
    if options.plot:
        check_picture(options.plot)
    for path in filter(None, (options.out, options.plot)):
        if not Path(path).parent.is_dir():
            raise InputError(f"{path}: there is no folder {Path(path).parent}.")
    spaced = [word for word in words[1:] if word != shlex.quote(word)]
    if options.out and spaced:
        raise InputError(
            f"--out {options.out}: {spaced[0]!r} would not come back from $(cat FILE). "
            f"Put it into the config file."
        )
    config = load_config(words[0], words[1:], prog="lm-scale plan")
    config.check()
    return config


def tell(found: Search, words: list[str], options: Options, console: Console) -> None:
    """Prints and writes what was asked for."""
    if options.json:
        value = to_dict(found) | {"left": found.left}
        print(json.dumps(value))
    else:
        print_search(found, console)
    if found.best is None:
        return
    every = shlex.join([*words[1:], *found.overrides])
    if options.out:
        Path(options.out).write_text(every + "\n", "utf-8")
    if options.plot:
        write_picture(found, options.plot)
    if not options.json:
        command = f"lm-scale train {shlex.quote(words[0])} {every}"
        say(console, f"The fastest that fits:\n  {command}")
