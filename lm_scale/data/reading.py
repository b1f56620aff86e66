# SPDX-License-Identifier: Apache-2.0
"""Reading by `datasets`: as a stream, or through its Arrow cache on disk."""

import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from lm_scale.errors import one_line


@dataclass(frozen=True)
class Reading:
    """How rows are read; none of it but `text` changes them."""

    streaming: bool
    cache_dir: str | None  # of downloads and Arrow files; None: Hugging Face's default
    workers: int | None  # processes that read files into Arrow, if not streaming
    text: dict[str, Any]  # options of the reader of .txt files


def text_options(reading: Reading) -> dict[str, Any]:
    """What `load` passes on to the reader of .txt files."""
    import datasets

    # Given, for an empty file has no row to tell the column by.
    column = datasets.Features({"text": datasets.Value("string")})
    return {"features": column, **reading.text}


def load(*names: Any, reading: Reading, **options: Any) -> Any:
    """`datasets.load_dataset` without progress bars or download counts.

    Raises what `datasets` and the file systems below it raise; `reason` tells it.
    """
    import datasets  # 2 s: only who reads text pays
    import datasets.config

    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else local files are reported
    options |= {"streaming": reading.streaming, "cache_dir": reading.cache_dir}
    if not reading.streaming and (reading.workers or 1) > 1:
        _fill_cache(names, options | {"num_proc": reading.workers})
    return datasets.load_dataset(*names, **options)


_FILL = """
import pickle, sys, datasets
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
names, options = pickle.load(sys.stdin.buffer)
datasets.load_dataset(*names, **options)
"""


def _fill_cache(names: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Makes the Arrow files in a process of its own, which says nothing.

    The workers of `datasets` are forks, and a fork may hang where JAX runs threads.
    If it fails, so does the caller, who reads on from the cache, and says why.
    """
    subprocess.run(
        [sys.executable, "-P", "-c", _FILL],
        input=pickle.dumps((names, options)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def reason(error: BaseException) -> str:
    """What went wrong, in one line: `datasets` wraps the error that says it."""
    from datasets.exceptions import DatasetGenerationError

    bare = type(error) is DatasetGenerationError and error.__cause__
    if bare:
        return reason(bare)
    advice = " (convert it to UTF-8)" if isinstance(error, UnicodeDecodeError) else ""
    return one_line(error) + advice
