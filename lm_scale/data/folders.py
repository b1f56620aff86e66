# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder hold text, and which of them are for training."""

import re
from pathlib import Path

from lm_scale.errors import InputError

# Extension -> the reader of `datasets` for it.
READERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
KNOWN = ", ".join(READERS)


def files_below(folder: Path) -> list[Path]:
    """The files below a folder that hold rows, sorted; hidden ones are left out."""
    from datasets.data_files import FILES_TO_IGNORE

    below = (file.relative_to(folder) for file in sorted(folder.rglob("*")))
    return [
        folder / file
        for file in below
        if file.suffix.lower() in READERS
        and file.name not in FILES_TO_IGNORE  # what datasets and models note down
        and not any(name.startswith(".") for name in file.parts)
        and not any(name.startswith("__") for name in file.parent.parts)
        and (folder / file).is_file()
    ]


def files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by the split that their names tell, as `datasets` does it.

    The first rule that any file follows counts; files that do not follow it are left
    out: data/SPLIT-00000-of-00001.EXT; a keyword of a split (train, validation, valid,
    dev, test, ...) in the name of a folder; in the name of a file. Else all is "train".
    https://huggingface.co/docs/datasets/repository_structure
    """
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    files = {file.relative_to(folder).as_posix(): file for file in files_below(folder)}
    if not files:
        raise InputError(f"the folder {folder} holds no file of type {KNOWN}.")
    shards: dict[str, list[Path]] = {}
    for name, file in files.items():
        if match := re.fullmatch(r"data/([^/]*)-\d{5}-of-\d{5}[^/]*\.[^/]*", name):
            shards.setdefault(match[1], []).append(file)
    if shards:
        return shards
    end = f"[{NON_WORDS_CHARS}]"  # at both ends of a keyword, or the name ends there
    for rest in (f"({end}[^/]*)?/.*", f"{end}[^/]*"):  # of a folder, of a file
        splits: dict[str, list[Path]] = {}
        for split, words in SPLIT_KEYWORDS.items():
            form = f"(.*/)?([^/]*{end})?({'|'.join(words)}){rest}"
            found = [file for name, file in files.items() if re.fullmatch(form, name)]
            if found:
                splits[str(split)] = found
        if splits:
            _check_apart(splits)
            return splits
    return {"train": list(files.values())}


def _check_apart(splits: dict[str, list[Path]]) -> None:
    """`datasets` would train on train_dev.txt and evaluate on it as well."""
    seen: dict[Path, str] = {}
    for split, files in splits.items():
        for file in files:
            if file in seen:
                raise InputError(
                    f"by its name {file} belongs to {seen[file]} and to {split}; "
                    "rename it so that it belongs to one of them."
                )
            seen[file] = split
