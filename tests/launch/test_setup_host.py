# SPDX-License-Identifier: Apache-2.0
"""launch/setup_host.sh with fakes for Python, pip and uv: nothing is downloaded."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = """awk bash basename cat chmod cksum cp cut date dirname flock getconf ls mkdir
mv readlink rm sed sleep tee""".split()

pytestmark = pytest.mark.skipif(
    shutil.which("flock") is None, reason="flock is needed: Linux"
)

# Stands for a Python. `pip install` writes down what it was asked, says what
# FAKE/pip.says holds and fails that many times; uv's --target gets a fake uv.
PYTHON = """\
#!{bash}
version='{version}' fake='{fake}'
install() {{
  echo "pip $*" >>"$fake/calls"
  if [ -s "$fake/pip.fails" ]; then
    cat "$fake/pip.says"
    sed -i 1d "$fake/pip.fails" 2>/dev/null || exit 1
    exit 1
  fi
  while [ -e "$fake/pip.hangs" ]; do : >"$fake/pip.hung"; sleep 0.05; done
}}
case "$*" in
  "-c import sys"*) echo "$version $0" ;;
  "-c import ensurepip"*) exit {no_ensurepip} ;;
  "-c import importlib.util"*) echo "{lacks}" ;;
  "-m venv "*)
    [ {no_ensurepip} = 0 ] || exit 1
    mkdir -p "$3/bin"; : >"$3/pyvenv.cfg"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") exit {no_pip} ;;
  "-m pip install "*" --target "*)
    install "${{@:3}}"; mkdir -p "${{@: -2:1}}/bin"
    cp "$fake/uv" "${{@: -2:1}}/bin/uv" ;;
  "-m pip install "*" uv") install "${{@:3}}"; cp "$fake/uv" "${{0%/*}}/uv" ;;
  "-m pip install "*) install "${{@: -1}}" ;;
esac
"""

UV = """\
#!{bash}
fake='{fake}'
case "$*" in
  --version) echo uv 9 ;;
  "python install 3.12")
    echo "uv $*" >>"$fake/calls"
    if [ -e "$fake/uv.says" ]; then cat "$fake/uv.says"; exit 2; fi ;;
  "python find --system 3.12") echo "$fake/managed/python3.12" ;;
esac
"""

DF = """\
#!{bash}
echo Filesystem blocks used free use mounted
echo /dev/x 1 1 "$(cat '{fake}/free')" 1% /disk
"""


class Host:
    """A machine with an unpacked copy of the repository, in a folder with a space."""

    def __init__(self, folder):
        self.fake, self.tree = folder / "fake", folder / "a tree"
        self.bin = folder / "bin"
        for made in (self.fake / "managed", self.bin, folder / "home"):
            made.mkdir(parents=True)
        for name in ("launch/setup_host.sh", "launch/venv.sh", "setup.py"):
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.tree / name)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.write(self.fake / "uv", UV)
        self.write(self.bin / "df", DF)
        self.python("python3.12", "3.12.9", folder=self.fake / "managed")
        (self.fake / "free").write_text("99000000")
        self.env = {
            "PATH": str(self.bin), "HOME": str(folder / "home"),
            "LM_SCALE_PAUSES": "0 0",
        }  # fmt: skip

    def write(self, path, text, **values):
        text = text.format(bash=shutil.which("bash"), fake=self.fake, **values)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, name, version, folder=None, no_ensurepip=0, no_pip=0, lacks=""):
        return self.write(
            (folder or self.bin) / name, PYTHON, version=version, no_pip=no_pip,
            no_ensurepip=no_ensurepip, lacks=lacks,
        )  # fmt: skip

    def pip_fails(self, times, says):
        (self.fake / "pip.fails").write_text("x\n" * times)
        (self.fake / "pip.says").write_text(says + "\n")

    def start(self, *extras, **env):
        return subprocess.Popen(
            [str(shutil.which("bash")), self.tree / "launch/setup_host.sh", *extras],
            env={**self.env, **env}, cwd="/", text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, *extras, **env):
        with self.start(*extras, **env) as process:
            out, err = process.communicate(timeout=60)
        assert err == "", err
        return process.returncode, out.splitlines()

    def calls(self):
        file = self.fake / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def host_env(self):
        lines = (self.tree / "host.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if line[0] != "#")


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_only_3_10_is_there(host):
    host.python("python3", "3.10.13")
    status, lines = host.run()
    assert status == 0, lines
    python = f"{host.tree}/.venv/bin/python"
    assert lines[-1].startswith(f"lm_scale: ready: {python}, ")
    assert "3.12.9" in Path(python).read_text()
    folder = f"{host.tree}/.cache/uv"
    quiet = "--quiet --no-input --disable-pip-version-check"
    assert host.calls() == [
        f"pip install {quiet} --target {folder} uv",
        "uv python install 3.12",
        f"pip {host.tree}[tpu,gcs]",
    ]
    assert host.host_env()["LM_SCALE_PYTHON"] == python
    assert (host.tree / "setup.log").read_text().splitlines() == lines


def test_the_second_time_is_quick_and_does_nothing(host):
    host.python("python3", "3.10.13")
    host.run()
    before = host.calls()
    began = time.monotonic()
    status, lines = host.run()
    assert time.monotonic() - began < 1
    assert status == 0 and "ready" in lines[-1] and len(lines) == 2
    # A job's next setup runs with what host.env said: also nothing.
    assert host.run(**host.host_env())[0] == 0
    assert host.calls() == before
    # And it is not taken for an image's own: what has changed is installed.
    with (host.tree / "setup.py").open("a") as file:
        file.write("# changed\n")
    assert host.run(**host.host_env())[0] == 0
    assert len(host.calls()) == len(before) + 1
    assert host.run("wandb")[0] == 0
    assert host.calls()[-1].endswith("[tpu,gcs,wandb]")


def test_takes_the_python_that_is_new_enough(host):
    host.python("python3", "3.10.13")
    host.python("python3.11", "3.11.2")
    assert host.run("gcs")[0] == 0
    assert host.calls() == [f"pip {host.tree}[gcs]"]


def test_a_python_that_makes_no_environment_is_not_enough(host):
    host.python("python3", "3.12.3", no_ensurepip=1)  # as Ubuntu 24.04 has it
    status, lines = host.run()
    assert status == 0, lines
    assert "3.12.9" in (host.tree / ".venv/bin/python").read_text()


def test_an_environment_whose_python_has_gone(host):
    host.python("python3", "3.10.13")
    host.run()
    (host.tree / ".venv/bin/python").unlink()
    status, lines = host.run()
    assert status == 0, lines
    assert host.calls().count("uv python install 3.12") == 2


def test_no_pip(host):
    host.python("python3", "3.10.13", no_pip=1)
    status, lines = host.run()
    assert status == 0, lines
    assert (host.tree / ".cache/uv-venv/bin/uv").exists()
    assert "uv python install 3.12" in host.calls()


def test_neither_pip_nor_venv(host):
    host.python("python3", "3.10.13", no_pip=1, no_ensurepip=1)
    status, lines = host.run()
    assert status == 1
    assert any("apt install python3-pip" in line for line in lines)


def test_no_python_at_all(host):
    status, lines = host.run()
    assert status == 1
    assert any("apt install python3 python3-pip" in line for line in lines)


OFFLINE = "Failed to establish a new connection: Network is unreachable"


def test_a_network_that_fails_for_a_while(host):
    host.python("python3", "3.12.1")
    host.pip_fails(2, OFFLINE)
    status, lines = host.run()
    assert status == 0 and "ready" in lines[-1]
    assert sum("once more" in line for line in lines) == 2
    assert len(host.calls()) == 3


def test_no_network(host):
    host.python("python3", "3.12.1")
    host.pip_fails(9, OFFLINE)
    status, lines = host.run()
    assert status == 1 and len(host.calls()) == 3
    assert "could not be downloaded" in lines[-1] and "Cloud NAT" in lines[-1]
    assert not (host.tree / "host.env").exists()
    (host.fake / "pip.fails").unlink()
    assert host.run()[0] == 0


def test_no_network_for_uv(host):
    host.python("python3", "3.10.13")
    (host.fake / "uv.says").write_text("error: dns error: failed to lookup address\n")
    status, lines = host.run()
    assert status == 1 and "could not be downloaded" in lines[-1]
    assert host.calls().count("uv python install 3.12") == 3


@pytest.mark.parametrize("says, message", [
    ("OSError: [Errno 28] No space left on device", "a disk is full: 99000000 free in"),
    ("PermissionError: [Errno 13] Permission denied: 'x'", "who owns"),
    ("ERROR: ResolutionImpossible", "see the message above"),
])  # fmt: skip
def test_what_no_patience_helps(host, says, message):
    host.python("python3", "3.12.1")
    host.pip_fails(9, says)
    status, lines = host.run()
    assert status == 1 and len(host.calls()) == 1
    assert message in lines[-1] and any(says in line for line in lines)


def test_too_little_room(host):
    host.python("python3", "3.12.1")
    (host.fake / "free").write_text("2000000")
    status, lines = host.run()
    assert status == 1 and host.calls() == []
    assert "2000000 free in /disk; make room" in lines[-1]
    (host.fake / "free").write_text("99000000")
    assert host.run()[0] == 0
    (host.fake / "free").write_text("2000000")  # what is there, is there
    assert host.run()[0] == 0


def wait_for_pip(host):
    end = time.monotonic() + 20
    while not (host.fake / "pip.hung").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_at_once(host):
    host.python("python3", "3.10.13")
    (host.fake / "pip.hangs").touch()
    with host.start() as first:
        wait_for_pip(host)
        with host.start() as second:
            assert second.stdout is not None
            lines = [second.stdout.readline() for _ in range(2)]
            assert "another setup is at work here: waiting" in lines[1]
            (host.fake / "pip.hangs").unlink()
            assert "ready" in second.communicate(timeout=60)[0]
        assert "ready" in first.communicate(timeout=60)[0]
    assert len(host.calls()) == 3


def test_killed_in_the_middle(host):
    host.python("python3", "3.12.1")
    (host.fake / "pip.hangs").touch()
    with host.start() as process:
        wait_for_pip(host)
        os.killpg(process.pid, signal.SIGKILL)
    (host.fake / "pip.hangs").unlink()
    assert not (host.tree / "host.env").exists()
    status, lines = host.run()
    assert status == 0
    assert any("was not finished: making it again" in line for line in lines)


def test_killed_at_any_moment(host):
    host.python("python3", "3.10.13")
    for delay in (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
        with host.start() as process:
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)
    status, lines = host.run()
    assert status == 0 and "ready" in lines[-1], lines
    assert host.host_env()["LM_SCALE_PYTHON"] == f"{host.tree}/.venv/bin/python"


def test_killed_alone_what_it_has_started_goes_on(host):
    host.python("python3", "3.12.1")
    (host.fake / "pip.hangs").touch()
    first = host.start()
    wait_for_pip(host)
    os.kill(first.pid, signal.SIGKILL)
    with host.start() as second:
        assert second.stdout is not None
        lines = [second.stdout.readline() for _ in range(2)]
        assert "another setup is at work here: waiting" in lines[1]
        (host.fake / "pip.hangs").unlink()
        assert "ready" in second.communicate(timeout=60)[0]
    first.communicate(timeout=60)
    assert len(host.calls()) == 1


def test_a_python_that_has_all(host):
    """As on an image of one's own: this one, for real."""
    status, lines = host.run(LM_SCALE_PYTHON=sys.executable)
    assert status == 0, lines
    assert host.calls() == [] and not (host.tree / ".venv").exists()
    assert host.host_env()["LM_SCALE_PYTHON"] == sys.executable


@pytest.mark.parametrize("version, lacks, message", [
    ("3.10.13", "", "is Python 3.10.13, but lm_scale needs 3.11"),
    ("3.12.1", "flax optax", "lacks flax optax"),
    ("", "", "does not run"),
])  # fmt: skip
def test_a_named_python_must_do(host, version, lacks, message):
    path = host.python("own", version, lacks=lacks)
    if not version:
        path.write_text("#!/bin/sh\nexit 127\n")
    status, lines = host.run(LM_SCALE_PYTHON=str(path))
    assert status == 1
    assert f"LM_SCALE_PYTHON={path}" in lines[-1] and message in lines[-1]


def test_host_env(host):
    host.python("python3", "3.12.1")
    log = host.fake / "elsewhere.log"
    status, lines = host.run(LM_SCALE_LOG=str(log))
    assert status == 0 and log.read_text().splitlines() == lines
    found = host.host_env()
    assert found["TPU_LOG_DIR"] == "disabled"
    assert found["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] == "60"
    has_tpu = Path("/dev/accel0").exists() or any(Path("/dev").glob("vfio/[0-9]*"))
    assert ("JAX_PLATFORMS" in found) == has_tpu


def test_help(host):
    status, lines = host.run("--help")
    assert status == 0 and lines[2].strip().startswith("launch/setup_host.sh [EXTRA")
    assert not (host.tree / "setup.log").exists()
