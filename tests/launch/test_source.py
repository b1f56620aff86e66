# SPDX-License-Identifier: Apache-2.0
"""launch/source.py: the code that is sent is exactly what is there."""

import subprocess
import tarfile

import pytest

from launch import source
from launch.errors import Refused


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "configs").mkdir(parents=True)
    (root / "a.py").write_text("1\n")
    (root / "gone.py").write_text("1\n")
    (root / ".gitignore").write_text("ignored\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def git(root, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def sent(root, found):
    source.pack(found, root.parent / "code.tar.gz", root)
    with tarfile.open(root.parent / "code.tar.gz") as archive:
        return {
            one.name: archive.extractfile(one).read().decode()  # pyright: ignore
            for one in archive
            if one.isfile()
        }


def test_a_clean_commit_is_sent_as_it_is(checkout):
    found = source.snapshot(root=checkout)
    assert found.diff == "" and found.left == ()
    assert set(sent(checkout, found)) == {"a.py", "gone.py", ".gitignore"}
    assert found == source.snapshot(root=checkout)


def test_changes_and_the_config_go_with_it_and_nothing_else(checkout):
    (checkout / "a.py").write_text("2\n")
    (checkout / "gone.py").unlink()
    (checkout / "ignored").write_text("")
    (checkout / ".env").write_text("TOKEN=canary")
    (checkout / "configs" / "new.py").write_text("config\n")
    (checkout / "staged.py").write_text("staged\n")
    git(checkout, "add", "staged.py")
    before = (checkout / ".git" / "index").read_bytes()
    found = source.snapshot(str(checkout / "configs" / "new.py"), checkout)
    files = sent(checkout, found)
    assert files == {
        "a.py": "2\n",
        ".gitignore": "ignored\n",
        "configs/new.py": "config\n",
        "staged.py": "staged\n",
    }
    assert found.left == (".env",)  # told, not sent
    assert "-1\n+2\n" in found.diff and "new.py" in found.diff
    assert (checkout / ".git" / "index").read_bytes() == before
    clean = subprocess.run(["git", "archive", found.commit], cwd=checkout,
                           capture_output=True, check=True)  # fmt: skip
    again = checkout.parent / "again"
    again.mkdir()
    subprocess.run(["tar", "-x"], input=clean.stdout, cwd=again, check=True)
    subprocess.run(["git", "apply"], input=found.diff, text=True, cwd=again, check=True)
    assert (again / "a.py").read_text() == "2\n"  # commit + diff = what was sent
    assert (again / "configs" / "new.py").exists() and not (again / "gone.py").exists()


def test_what_cannot_be_sent_is_refused(checkout, tmp_path):
    with pytest.raises(Refused, match="no such file"):
        source.snapshot(str(checkout / "configs" / "typo.py"), checkout)
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(Refused, match="outside of .*Put it into its configs/ folder"):
        source.snapshot(str(tmp_path / "mine.py"), checkout)
    with pytest.raises(Refused, match="not a git checkout"):
        source.snapshot(root=tmp_path)
