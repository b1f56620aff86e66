# SPDX-License-Identifier: Apache-2.0
"""datatrove's executors make the store that `lm-scale prepare` makes."""

import subprocess
import sys
from pathlib import Path

import pytest
from stores import content

from lm_scale.errors import InputError

pytest.importorskip("datatrove", reason="the extra `datatrove` is not installed")
from lm_scale.prepare_step import Prepare  # noqa: E402

CONFIG = """
from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import GPT2Config

config = RunConfig(
    run_dir="run",
    model=GPT2Config(vocab=300, embed=8, layers=1, heads=2, mlp=8, positions=16),
    seq_len=8, batch=2, steps=3,
    data=DataConfig(
        corpus=CorpusConfig("text/*.txt", validation_fraction=0.2),
        tokenizer=TokenizerConfig(vocab_size=280),
        store="STORE",
    ),
)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Four files, each a unit of its own, and a config."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for number in range(4):
        lines = (f"The line {n} of file {number}.\n" for n in range(50 + number))
        Path(f"text/{number}.txt").write_text("".join(lines))
    Path("c.py").write_text(CONFIG.replace("STORE", str(tmp_path / "tokens")))
    return tmp_path


# In a process of its own: executors fork, which what has threads does not survive.
RUN = """
import dill
from datatrove.executor import LocalPipelineExecutor
from rich.console import Console
from lm_scale.data import units
from lm_scale.data.ranks import Rank
from lm_scale.prepare_step import Prepare
from lm_scale.run_text import prepare_share

units.UNIT_BYTES = 1  # each file is a unit
step = dill.loads(dill.dumps(Prepare("c.py")))  # as it is sent to other processes
tasks = LocalPipelineExecutor([step], tasks=3, workers=1, logging_dir="logs")
tasks.run()
tasks.run()  # all are done: nothing happens
prepare_share(Prepare("c.py", "--data.store", "alone").config, Console(), Rank())
"""


def test_tasks_make_the_store_that_prepare_makes(folder):
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    assert content(folder / "tokens") == content(folder / "alone")
    for task in (0, 1):  # 4 units: each of the tasks has had something to do
        said = f"rank {task} of 3 is done, "
        assert said in done.stdout.decode()


def test_what_cannot_be_is_said_where_the_pipeline_is_made(folder):
    with pytest.raises(InputError, match="no config file 'd.py'"):
        Prepare("d.py")
    with pytest.raises(InputError, match="batch"):
        Prepare("c.py", "--batch", "0")
    with pytest.raises(InputError, match="lm_scale prepare reads the corpus of its"):
        Prepare("c.py").run(iter(()))
