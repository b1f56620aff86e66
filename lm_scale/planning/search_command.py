# SPDX-License-Identifier: Apache-2.0
"""`lm-scale plan CONFIG --search`: its options, what it prints and writes."""

import json
import shlex
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lm_scale.config import RunConfig
from lm_scale.console import say
from lm_scale.cpus import cpus
from lm_scale.errors import InputError
from lm_scale.planning.candidates import OWN, REMATS, Space
from lm_scale.planning.kept import cache_folder
from lm_scale.planning.plan import choose_slice
from lm_scale.planning.search import BUDGET, Search, search
from lm_scale.planning.search_report import (
    Progressing,
    check_picture,
    print_search,
    write_picture,
)
from lm_scale.run_json import to_dict
from lm_scale.sharding import PRESETS


def search_command(
    config: RunConfig, words: list[str], options: Namespace, console: Console
) -> bool:
    """Prints and writes what was found; True: something fits.

    words: the config's file and its overrides. Raises InputError.
    """
    check_files(words[1:], options)
    space = narrow(options.among or ())
    chosen = choose_slice(config, options.slice)
    budget, jobs = options.budget or BUDGET, options.jobs or cpus()
    quiet = Console(quiet=True) if options.json else console
    say(quiet, f"Searching for {chosen.name}: up to {budget} compilations, {jobs} at a "
               f"time.")  # fmt: skip
    with Progressing(quiet) as progress:
        found = search(
            config, chosen, space, budget=budget, jobs=jobs,
            cache=None if options.fresh else cache_folder(), tell=progress.tell,
        )  # fmt: skip
    tell(found, words, options, console)
    return found.best is not None


def check_files(overrides: list[str], options: Namespace) -> None:
    """InputError if what is to be written could not be, or would be of no use."""
    if options.plot:
        check_picture(options.plot)
    for path in filter(None, (options.out, options.plot)):
        if not Path(path).parent.is_dir():
            raise InputError(f"{path}: there is no folder {Path(path).parent}.")
    spaced = [word for word in overrides if word != shlex.quote(word)]
    if options.out and spaced:
        raise InputError(
            f"--out {options.out}: {spaced[0]!r} would not come back from $(cat FILE). "
            f"Put it into the config file."
        )


def narrow(among: Sequence[str]) -> Space:
    """The space of only `rules=fsdp,dp`, or the like; InputError if wrong."""
    space = Space()
    known = {"rules": (OWN, *PRESETS), "remat": REMATS}
    for text in among:
        name, _, listed = text.partition("=")
        values = listed.split(",")
        if name == "accumulate":
            numbers = [int(x) for x in values if x.isdecimal() and int(x) > 0]
            if len(numbers) < len(values):
                raise InputError(f"--among {text!r}: expected numbers above 0.")
            space = replace(space, accumulate=tuple(numbers))
            continue
        if name not in known:
            raise InputError(
                f"--among {text!r}: expected rules=..., remat=... or accumulate=..."
            )
        for value in values:
            if value not in known[name]:
                raise InputError(
                    f"--among {text!r}: {value!r} is none of {', '.join(known[name])}."
                )
        space = replace(space, **{name: tuple(values)})
    return space


def tell(found: Search, words: list[str], options: Namespace, console: Console) -> None:
    """Prints and writes what was asked for."""
    if options.json:
        print(json.dumps(to_dict(found) | {"left": found.left}))
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
