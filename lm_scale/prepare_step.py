# SPDX-License-Identifier: Apache-2.0
"""`lm-scale prepare` as a step of a datatrove pipeline, for its executors to run."""

import dataclasses
import os
from typing import Any

from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from lm_scale.config import RunConfig, load_config
from lm_scale.data.ranks import Rank
from lm_scale.errors import InputError
from lm_scale.run_text import prepare_share


class Prepare(PipelineStep):
    """Tokenizer and token stores of a config file's run, a share of them in each task.

        SlurmPipelineExecutor([Prepare("configs/x.py")], tasks=100, ...).run()

    Task i of n does what `lm-scale prepare CONFIG --rank i --world n` does, so that any
    number of tasks makes the same bytes, and a task that is run again goes on from its
    finished parts. The corpus is the config's: no documents are taken from the steps
    before it, and none are given to those after it.

    A task tokenizes in as many processes as the executor gives it CPUs, unless the
    config says how many (`data.workers`); the local executor's have one.
    """

    name, type = "lm_scale prepare", "TOKENIZER"

    def __init__(self, config: str, *overrides: str):
        """config: a Python file; overrides: as on the command line, "--seed", "1".

        Read here, where the pipeline is made, and not again by the tasks.
        Raises InputError if the file is missing, fails, or is no config that can be.
        """
        super().__init__()
        self.config = load_config(config, list(overrides), prog="Prepare")
        self.config.check()

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Does a task's share.

        Raises what `prepare_data` and `prepare` raise, and InputError if there is a
        step before this one.
        """
        if data is not None:
            raise InputError(
                f"{self!r} reads the corpus of its config, not the documents of the "
                "steps before it: have them write files, and name those in "
                "`data.corpus`."
            )
        with self.track_time("task"):
            prepare_share(_with_workers(self.config), Console(), Rank(rank, world_size))


def _with_workers(config: RunConfig) -> RunConfig:
    if config.data.workers is not None:
        return config
    cpus = int(os.environ.get("DATATROVE_CPUS_PER_TASK", -1))  # -1: nobody has counted
    data = dataclasses.replace(config.data, workers=max(1, cpus))
    return dataclasses.replace(config, data=data)
