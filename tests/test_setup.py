# SPDX-License-Identifier: Apache-2.0
"""launch/venv.sh and the scripts that source it, with fakes for Python: no installs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = "bash cat cksum dirname getconf ls mkdir readlink rm".split()

# Stands for a Python. It answers what venv.sh asks, and instead of installing writes
# down what pip was asked; `python -m venv` copies it into the new environment.
FAKE_PYTHON = """\
#!{bash}
version='{version}'
case "$*" in
  "-c import sys"*) echo "$version $0" ;;
  "-c import ensurepip"*) exit {no_ensurepip} ;;
  "-m venv "*) mkdir -p "$3/bin"; : >"$3/pyvenv.cfg"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install "*)
    [ ! -e "$FAKE_PIP_FAILS" ] || {{ echo "ERROR: no network"; exit 1; }}
    echo "${{@: -1}}" >>"$FAKE_PIP_LOG" ;;
  *) echo "ran: $*" ;;
esac
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the scripts, in a folder whose name has a space."""
    tree = tmp_path / "a tree"
    for name in ["launch/venv.sh", "launch/quickstart", "tests/run", "setup.py"]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    bin = tmp_path / "bin"
    bin.mkdir()
    for tool in [*TOOLS, "cp"]:
        (bin / tool).symlink_to(shutil.which(tool))
    return tree


def add_python(tree, name, version, no_ensurepip=0):
    path = tree.parent / "bin" / name
    bash = shutil.which("bash")
    path.write_text(
        FAKE_PYTHON.format(bash=bash, version=version, no_ensurepip=no_ensurepip)
    )
    path.chmod(0o755)
    return path


def run(tree, script="launch/quickstart", *arguments, cwd=None, **env):
    env = {
        "PATH": str(tree.parent / "bin"),  # nothing of this machine's Pythons
        "FAKE_PIP_LOG": str(tree.parent / "pip.log"),
        "FAKE_PIP_FAILS": str(tree.parent / "pip.fails"),
        **env,
    }
    command = [shutil.which("bash"), str(tree / script), *arguments]
    return subprocess.run(
        command, env=env, cwd=cwd or tree.parent, capture_output=True, text=True
    )


def installed(tree):
    """What pip was asked to install, without the tree's path."""
    log = tree.parent / "pip.log"
    return log.read_text().replace(str(tree), "").splitlines() if log.exists() else []


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["train.steps=1", "--help"]])
def test_help_makes_nothing(tree, arguments):
    add_python(tree, "python3", "3.12.1")
    result = run(tree, "launch/quickstart", *arguments)
    assert result.returncode == 0 and result.stdout.startswith("usage:")
    assert not (tree / ".venv").exists()


def test_no_python(tree):
    result = run(tree)
    assert result.returncode == 1
    assert "3.11 or later" in result.stderr and "none at all" in result.stderr


def test_says_which_pythons_will_not_do(tree):
    add_python(tree, "python3", "3.10.13")
    add_python(tree, "python", "2.7.18")
    shim = add_python(tree, "python3.12", "")
    shim.write_text("#!/bin/sh\nexit 127\n")
    result = run(tree)
    assert result.returncode == 1
    found = "python3 (3.10.13), python3.12 (does not run), python (2.7.18)"
    assert found in result.stderr
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("version", ["3.10.13", "2.7.18", ""])
def test_named_python_must_do(tree, version):
    add_python(tree, "python3", "3.12.1")  # must not be taken instead
    old = add_python(tree, "old", version)
    if not version:
        old.write_text("#!/bin/sh\nexit 127\n")
    result = run(tree, PYTHON=str(old))
    assert result.returncode == 1
    assert f"PYTHON={old}" in result.stderr
    assert (version or "does not run") in result.stderr
    assert not (tree / ".venv").exists()


def test_no_ensurepip(tree):
    add_python(tree, "python3", "3.13.0", no_ensurepip=1)
    result = run(tree)
    assert result.returncode == 1
    assert "apt install python3-venv (or python3.13-venv)" in result.stderr
    assert not (tree / ".venv").exists()


def test_takes_the_first_python_that_runs_and_is_new_enough(tree):
    add_python(tree, "python3", "3.9.18")
    add_python(tree, "python3.14", "").write_text("#!/bin/sh\nexit 127\n")
    add_python(tree, "python3.12", "3.12.1")
    add_python(tree, "python", "3.11.7")
    assert run(tree).returncode == 0
    assert "3.12.1" in (tree / ".venv/bin/python").read_text()


def test_installs_once_and_extras_accumulate(tree):
    add_python(tree, "python3", "3.12.1")
    result = run(tree, "launch/quickstart", "a b")
    assert result.stdout == "ran: -m lm_scale train configs/quickstart.py a b\n"
    assert "installing" in result.stderr
    result = run(tree)
    assert result.stderr == "" and installed(tree) == [""]

    assert run(tree, "tests/run", "-x").stdout == "ran: -m pytest -x\n"
    assert run(tree).stderr == run(tree, "tests/run").stderr == ""
    assert installed(tree) == ["", "[test]"]

    with (tree / "setup.py").open("a") as file:
        file.write("# changed\n")
    run(tree)
    assert installed(tree) == ["", "[test]", "[test]"]


def test_from_anywhere_and_through_a_symlink(tree):
    add_python(tree, "python3", "3.12.1")
    link = tree.parent / "link"
    link.symlink_to(tree / "launch/quickstart")
    assert run(tree.parent, "link", cwd="/", PATH=str(tree.parent / "bin")).stdout
    assert (tree / ".venv/pyvenv.cfg").exists()


def test_failed_install_is_shown_and_mended(tree):
    add_python(tree, "python3", "3.12.1")
    fails = tree.parent / "pip.fails"
    fails.touch()
    result = run(tree)
    assert result.returncode == 1 and result.stdout == ""
    assert "ERROR: no network" in result.stderr
    assert "pip could not install" in result.stderr.splitlines()[-1]
    fails.unlink()
    assert run(tree).returncode == 0
    assert installed(tree) == [""]


def test_failing_to_add_an_extra_leaves_what_was_there(tree):
    add_python(tree, "python3", "3.12.1")
    run(tree)
    (tree.parent / "pip.fails").touch()
    assert run(tree, "tests/run").returncode == 1
    assert run(tree).returncode == 0


def test_unfinished_environment_is_made_again(tree):
    add_python(tree, "python3", "3.12.1")
    run(tree)
    (tree / ".venv/lm_scale.unfinished").touch()  # as a kill during pip leaves it
    left = tree / ".venv/lib/half-written.py"
    left.parent.mkdir()
    left.touch()
    result = run(tree)
    assert "was not finished: making it again" in result.stderr
    assert not left.exists() and installed(tree) == ["", ""]
    assert run(tree).stderr == ""


@pytest.mark.parametrize("why", ["gone", "old", "other"])
def test_environment_with_another_python_is_made_again(tree, why):
    add_python(tree, "python3", "3.12.1")
    run(tree)
    python = tree / ".venv/bin/python"
    wanted = {}
    if why == "gone":
        python.unlink()
        python.symlink_to("/nowhere/python3.12")
    elif why == "old":
        python.write_text(python.read_text().replace("3.12.1", "3.10.13"))
    else:
        wanted = {"PYTHON": str(add_python(tree, "python3.13", "3.13.0"))}
    result = run(tree, **wanted)
    assert result.returncode == 0 and "making it again" in result.stderr
    assert ("3.13.0" if wanted else "3.12.1") in python.read_text()
    assert run(tree, **wanted).stderr == run(tree).stderr == ""


def test_folder_that_is_no_environment_is_left_alone(tree):
    add_python(tree, "python3", "3.12.1")
    folder = tree.parent / "thesis"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/only-copy.tex").touch()
    result = run(tree, LM_SCALE_VENV=str(folder))
    assert result.returncode == 1 and "not a virtual environment" in result.stderr
    assert [p.name for p in folder.rglob("*")] == ["bin", "only-copy.tex"]


def test_environment_of_others_is_used_not_emptied(tree):
    python = add_python(tree, "python3", "3.12.1")
    theirs = tree.parent / "theirs"
    (theirs / "bin").mkdir(parents=True)
    (theirs / "lib").mkdir()
    (theirs / "pyvenv.cfg").touch()
    shutil.copy(python, theirs / "bin/python")
    assert run(tree, LM_SCALE_VENV=str(theirs)).returncode == 0
    assert (theirs / "lib").exists() and installed(tree) == [""]


@pytest.mark.parametrize("given, exported", [(None, 16), ("3", 3)])
def test_threads_for_simulated_devices(tree, given, exported):
    env = {"NPROC": given} if given else {}
    code = '. launch/venv.sh; echo "$NPROC"'
    result = subprocess.run(
        ["bash", "-euc", code],
        cwd=tree,
        env={"PATH": os.environ["PATH"], **env},
        capture_output=True,
        text=True,
    )
    if given:
        assert int(result.stdout) == exported
    else:
        assert int(result.stdout) == max(16, os.cpu_count() or 1)
