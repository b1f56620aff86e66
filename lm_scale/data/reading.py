# SPDX-License-Identifier: Apache-2.0
"""Reading by `datasets`: as a stream, or through its Arrow cache on disk."""

import codecs
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_scale.errors import one_line

# The readers that can replace bytes that are no UTF-8.
_REPLACING = ("text", "json", "csv")


@dataclass(frozen=True)
class Reading:
    """How rows are read; only `text` and `replace` change them."""

    streaming: bool
    cache_dir: str | None  # of downloads and Arrow files; None: Hugging Face's default
    workers: int | None  # processes that read files into Arrow, if not streaming
    text: dict[str, Any]  # options of the reader of .txt files
    replace: bool = False  # bytes that are no UTF-8, by U+FFFD


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
    if reading.replace and names[0] in _REPLACING:
        # Not "utf-8": under that name the reader of json ignores the other option.
        options |= {"encoding": "utf_8", "encoding_errors": "replace"}
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


def first_invalid(files: Sequence[Path]) -> str:
    """Where the first byte is that is no UTF-8, such as ` (line 3 of a.txt, byte 17)`.

    Empty if these files are all UTF-8.
    """
    for file in files:
        place = lines = 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        with file.open("rb") as opened:
            while True:
                block = opened.read(1 << 20)
                kept = len(decoder.getstate()[0])  # begun in the block before
                try:
                    decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    lines += block[: max(0, error.start - kept)].count(b"\n")
                    byte = place - kept + error.start
                    return f" (line {lines + 1} of {file}, byte {byte})"
                if not block:
                    break
                place, lines = place + len(block), lines + block.count(b"\n")
    return ""
