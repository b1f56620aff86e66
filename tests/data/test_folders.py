# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are for training: as `datasets` has it."""

import glob
from pathlib import Path

import datasets.data_files as data_files
import pytest

from lm_scale.data.folders import files_by_split
from lm_scale.errors import InputError


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


TREES = (
    ("a.txt", "b/c.txt", "contest.txt", "trainer.txt", "devil/x.txt", "Train.txt"),
    ("train.txt", "validation.txt", "test.txt", "LICENSE.txt"),
    ("train-0.txt", "x_train_1.txt", "sub/my.valid.txt", "eval 2.txt", "training.txt"),
    ("train/0.txt", "sub/dev-1/1.txt", "x.test/2.txt", "train.txt", "sub/no/3.txt"),
    ("data/train/a/0.txt", "data/my-val/1.txt", "evaluation/2.txt"),
    ("data/train-00000-of-00002.txt", "data/train-00001-of-00002.txt", "dev.txt",
     "data/extra-00000-of-00001-abc.txt", "data/test.txt"),
    ("validation.txt", "a.txt"),
    (".hidden/train.txt", "__MACOSX/train.txt", "a.txt", "__b.txt"),
)  # fmt: skip


@pytest.mark.parametrize("names", TREES)
def test_folders_are_split_as_datasets_does_it(tmp_path, names):
    folder = write(tmp_path / "train[1]", *names)
    base = glob.escape(str(folder))
    theirs = data_files.DataFilesDict.from_patterns(
        data_files.get_data_patterns(base), base_path=base
    )
    ours = files_by_split(folder)
    assert {s: {str(file) for file in files} for s, files in ours.items()} == {
        s: set(files) for s, files in theirs.items()
    }
    assert all(files == sorted(files) for files in ours.values())


def test_a_name_of_two_splits_is_refused(tmp_path):
    write(tmp_path, "train_dev.txt", "train.txt")
    with pytest.raises(InputError, match="train_dev.txt belongs to train and to val"):
        files_by_split(tmp_path)


def test_notes_of_datasets_are_no_text(tmp_path):
    write(tmp_path, "a.txt", "dataset_info.json", "config.json")
    assert files_by_split(tmp_path) == {"train": [tmp_path / "a.txt"]}
