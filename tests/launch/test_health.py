# SPDX-License-Identifier: Apache-2.0
"""launch/health.py: jax for real on this machine's CPU, TPUs by fake /dev and PCI."""

import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from launch import health  # noqa: E402
from launch.slices import GENERATIONS  # noqa: E402

V3 = ("--expect-kind", "TPU v3", "--expect-devices", "8")
IDS = {"v2": "0x0027", "v3": "0x0027", "v4": "0x005e", "v5p": "0x0062",
       "v5e": "0x0063", "v6e": "0x006f"}  # fmt: skip


def script(*arguments, **env):
    """Its exit status, lines and report, in a process of its own."""
    done = subprocess.run(
        [sys.executable, ROOT / "launch/health.py", "--min-disk-gib", "0", *arguments],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return done.returncode, lines[:-1], json.loads(lines[-1])


@pytest.fixture
def vm(tmp_path, monkeypatch):
    """A TPU VM with four v3 chips, as far as health.py looks."""
    dev, pci = tmp_path / "dev", tmp_path / "pci"
    dev.mkdir()
    (dev / "vfio").mkdir()
    for number in range(4):
        (dev / f"accel{number}").touch()
        add_chip(pci, number)
    monkeypatch.setattr(health, "DEV", dev)
    monkeypatch.setattr(health, "PCI", pci)
    monkeypatch.setattr(health, "LOCK", tmp_path / "libtpu_lockfile")
    monkeypatch.setattr(health, "metadata", lambda name: ("", ""))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    have(monkeypatch, jax="0.10.2", jaxlib="0.10.2", libtpu="0.0.42.1")
    return tmp_path


def add_chip(pci, number, device="0x0027", vendor="0x1ae0"):
    folder = pci / f"0000:00:0{number}.0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")


def have(monkeypatch, **versions):
    def installed(package):
        return versions.get(package.replace("-", "_"))

    monkeypatch.setattr(health, "installed", installed)
    wanted = 'libtpu==0.0.42.*; extra == "tpu"'
    monkeypatch.setattr("importlib.metadata.requires", lambda name: [wanted])


def answers(monkeypatch, output="", status=0, **found):
    """What jax's process would say."""
    facts = {"platform": "tpu", "kind": "TPU v3", "number": 8, "wrong": [], **found}
    seen = {}

    def run_probe(env, patience):
        seen.update(env)
        if status == 0:
            return f"log\n{health.FOUND}{json.dumps(facts)}\nlibtpu's last word\n", 0
        return output, status

    monkeypatch.setattr(health, "run_probe", run_probe)
    return seen


def run(capsys, *arguments):
    """Exit status, and the lines by the check's name."""
    status = health.main(["--min-disk-gib", "0", *(arguments or V3)])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1])["ok"] == (status == 0)
    return status, {line[6:].partition(":")[0]: line for line in lines[:-1]}


# --- This machine ---------------------------------------------------------------------


def test_cpu_devices_for_real():
    status, lines, report = script("--expect-devices", "3", "--expect-kind", "cpu")
    assert status == 0, lines
    assert report["ok"] is True and report["failed"] == []
    assert lines[-1].startswith("ok    devices: 3 x cpu, each multiplies rightly")


def test_fewer_devices_than_expected():
    expected = ("--expect-devices", "8", "--expect-kind", "cpu")
    status, lines, report = script(*expected, JAX_NUM_CPU_DEVICES="2")
    assert status == 1 and report["ok"] is False
    assert lines[-1].startswith("FAIL  devices: 2 x cpu, expected 8 x cpu. JAX_NUM")
    assert report["failed"][0]["name"] == "devices"


@pytest.mark.skipif(bool(health.pci_chips()), reason="there is a TPU")
def test_no_tpu_for_real():
    status, lines, report = script(*V3)
    assert status == 1
    (line,) = (line for line in lines if "  TPU: " in line)
    assert "no VM with a TPU" in line and "tpu-ubuntu2204-base" in line


@pytest.mark.skipif(
    bool(health.pci_chips()) or importlib.util.find_spec("libtpu") is None,
    reason="libtpu is needed, and no TPU",
)
def test_what_libtpu_says_without_a_tpu_is_known(vm, capsys):
    status, lines = run(capsys, *V3)
    assert status == 1
    assert "libtpu finds no TPU that it knows" in lines["devices"]


def test_a_hang_is_ended_and_told(vm, capsys, monkeypatch, tmp_path):
    jax = tmp_path / "slow" / "jax.py"
    jax.parent.mkdir()
    jax.write_text(
        "import time\nprint('waiting for godot', flush=True)\ntime.sleep(99)"
    )
    monkeypatch.setenv("PYTHONPATH", str(jax.parent))
    began = time.monotonic()
    status, lines = run(capsys, *V3, "--patience", "1")
    assert status == 1 and time.monotonic() - began < 20
    assert "did not answer in 1 s (waiting for godot)" in lines["devices"]
    assert "The TPU hangs" in lines["devices"]


def test_disk_clock_and_files(monkeypatch, tmp_path, capsys):
    assert not health.disk("disk", tmp_path, 1e9).ok
    assert "1e+09 that are needed" in health.disk("disk", tmp_path, 1e9).line()
    monkeypatch.setattr(health, "metadata", lambda name: ("", ""))
    now = time.time()
    assert health.clock(None).ok and health.clock(now).ok
    assert health.clock(now - 1200).ok  # since then all was copied and set up
    late, early = health.clock(now + 300), health.clock(now - 9e4)
    assert not late.ok and "300 s behind the launcher" in late.found
    assert not early.ok and "ahead of the launcher" in early.found
    limits = {"a": (1024, 1 << 20), "b": (256, 1024), "c": (256, -1)}
    for name, ok in (("a", True), ("b", False), ("c", True)):
        monkeypatch.setattr("resource.getrlimit", lambda _, name=name: limits[name])
        assert health.files().ok is ok


@pytest.mark.parametrize("off, ok", [(0, True), (-500, False), (500, False)])
def test_clock_against_the_metadata_server(monkeypatch, off, ok):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response_only(200)
            self.send_header("Date", formatdate(time.time() + off, usegmt=True))
            self.end_headers()
            self.wfile.write(b"a:b:10.0.0.1,c:d:10.0.0.2")

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        address = "{}:{}".format(*server.server_address)
        monkeypatch.setenv("GCE_METADATA_IP", address)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert health.clock(None).ok is ok
        assert "metadata server" in health.clock(None).found
        both = health.clock(time.time() + 9000)  # that is what the deadline is set by
        assert not both.ok and "behind the launcher" in both.found
        monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
        assert health.several_hosts()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- A TPU VM -------------------------------------------------------------------------


def test_all_well(vm, capsys, monkeypatch):
    env = answers(monkeypatch)
    status, lines = run(capsys)
    assert status == 0
    assert "8 x TPU v3, each multiplies rightly" in lines["devices"]
    assert env["JAX_PLATFORMS"] == "tpu"
    assert "TPU_PROCESS_BOUNDS" not in env


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda x: x.name)
@pytest.mark.parametrize("chips, bounds", health.BOUNDS.items())
def test_a_host_of_several_is_asked_alone(
    vm, capsys, monkeypatch, generation, chips, bounds
):
    for number in range(8):
        add_chip(health.PCI, number, IDS[generation.name])
        if number >= chips:
            add_chip(health.PCI, number, vendor="0x8086")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    devices = chips * generation.devices
    env = answers(monkeypatch, kind=generation.kind, number=devices)
    expected = ("--expect-kind", generation.kind, "--expect-devices", str(devices))
    assert run(capsys, *expected)[0] == 0
    assert env["TPU_PROCESS_BOUNDS"] == "1,1,1"
    assert env["TPU_CHIPS_PER_PROCESS_BOUNDS"] == bounds
    x, y, z = map(int, bounds.split(","))
    assert x * y * z == chips == len(env["TPU_VISIBLE_CHIPS"].split(","))


@pytest.mark.parametrize("found, message", [
    ({"number": 4}, "4 x TPU v3, expected 8 x TPU v3"),
    ({"kind": "TPU v2"}, "8 x TPU v2, expected 8 x TPU v3"),
    ({"wrong": [5]}, "of which [5] multiply wrongly"),
    ({"platform": "cpu", "kind": "cpu"}, "jax fell back to cpu"),
])  # fmt: skip
def test_other_devices_than_expected(vm, capsys, monkeypatch, found, message):
    answers(monkeypatch, **found)
    status, lines = run(capsys)
    assert status == 1 and message in lines["devices"]


def test_kinds_that_have_two_names(vm, capsys, monkeypatch):
    for number in range(4):
        add_chip(health.PCI, number, IDS["v5p"])
    answers(monkeypatch, kind="TPU v5p", number=4)
    for kind in ("TPU v5", "TPU v5p"):
        assert run(capsys, "--expect-kind", kind, "--expect-devices", "4")[0] == 0


def test_jax_platforms_that_would_not_use_it(vm, capsys, monkeypatch):
    answers(monkeypatch)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    status, lines = run(capsys)
    assert status == 1 and "JAX_PLATFORMS=cpu is set" in lines["devices"]
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert run(capsys)[0] == 0


def test_the_wrong_image(vm, capsys):
    for node in health.DEV.glob("accel*"):
        node.unlink()
    status, lines = run(capsys)
    assert status == 1 and "the wrong runtime" in lines["TPU"]
    assert "tpu-ubuntu2204-base" in lines["TPU"] and "not tried" in lines["devices"]


def test_another_generation(vm, capsys):
    v6e = ("--expect-kind", "TPU v6 lite", "--expect-devices", "4")
    status, lines = run(capsys, *v6e)
    assert status == 1 and "This is a v2 or v3, expected v6e" in lines["TPU"]


def test_chips_that_are_not_known_are_left_to_jax(vm, capsys, monkeypatch):
    for number in range(4):
        add_chip(health.PCI, number, "0x0999")
    answers(monkeypatch)
    assert run(capsys)[0] == 0


@pytest.mark.parametrize("versions, message", [
    ({"jax": None}, "jax is not installed"),
    ({"libtpu": None}, "libtpu is not installed"),
    ({"libtpu": "0.0.41"}, "was made for libtpu 0.0.42.*"),
    ({"libtpu_nightly": "0.1"}, "pip uninstall libtpu-nightly"),
])  # fmt: skip
def test_versions_that_do_not_fit(vm, capsys, monkeypatch, versions, message):
    fit = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.42.1"}
    have(monkeypatch, **{**fit, **versions})
    answers(monkeypatch)
    status, lines = run(capsys)
    assert status == 1 and message in lines["versions"]


def test_another_libtpu_by_path(vm, capsys, monkeypatch):
    answers(monkeypatch)
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/lib/libtpu.so")
    status, lines = run(capsys)
    assert status == 1 and "TPU_LIBRARY_PATH=/lib/libtpu.so" in lines["versions"]


def test_the_libtpu_that_this_jax_wants_is_found():
    assert health.wanted_libtpu() is not None


HOLD = "import sys; file = open(sys.argv[1]); print('ready', flush=True); input()"


def holding(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline()
    return process


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux")
@pytest.mark.parametrize("node", ["accel2", "vfio/7"])
def test_another_process_holds_it(vm, capsys, monkeypatch, node):
    answers(monkeypatch)
    (health.DEV / node).touch()
    with holding(health.DEV / node) as process:
        status, lines = run(capsys)
        process.kill()
    assert status == 1
    line = lines["TPU's user"]
    assert f"pid {process.pid} (" in line and f"`kill {process.pid}`" in line
    assert "import sys" in line and f"holds {health.DEV / node}" in line
    assert run(capsys)[1]["TPU's user"] == "ok    TPU's user: none"


def test_a_stale_lock_is_removed(vm, capsys, monkeypatch):
    answers(monkeypatch)
    health.LOCK.touch()
    status, lines = run(capsys)
    assert status == 0 and not health.LOCK.exists()
    assert f"removed {health.LOCK}" in lines["lock"]


def test_a_lock_that_is_held_or_another_s_stays(vm, capsys, monkeypatch):
    answers(monkeypatch)
    health.LOCK.touch()
    with holding(health.LOCK) as process:
        status, lines = run(capsys)
        process.kill()
    assert status == 1 and health.LOCK.exists()
    assert str(process.pid) in lines["TPU's user"]
    monkeypatch.setattr("os.getuid", lambda: 12345)
    status, lines = run(capsys)
    assert status == 1 and health.LOCK.exists()
    assert "another user's" in lines["lock"] and "sudo rm" in lines["lock"]


@pytest.mark.parametrize("output, remedy", [
    ("Failed to initialize TPU system: Couldn't mmap: Operation not permitted.",
     "jax issue 30834"),
    ("ABORTED: The TPU is already in use by process with pid 4711.", "`kill 4711`"),
    ("already in use by another process probably owned by another user", "sudo rm"),
    ("Internal error when accessing libtpu multi-process lockfile.", "sudo rm"),
    ("Couldn't open iommu group /dev/vfio/0: Device or resource busy", "fuser"),
    ("Couldn't open device: /dev/accel0 (Operation not permitted)", "ls -l /dev/acc"),
    ("Mismatched PJRT plugin PJRT API version (0.47) and", "does not match jax"),
    ("module 'libtpu' has no attribute 'get_library_path'", "pip uninstall libtpu"),
    ("ModuleNotFoundError: No module named 'jaxlib'", "jaxlib is not installed"),
    ("TPU initialization failed: No jellyfish device found.", "tpu-ubuntu2204-base"),
    ("Failed to get TPU metadata (agent-worker-number)", "NO_PROXY"),
    ("TPU initialization failed: FAILED_PRECONDITION", "The TPU does not start"),
    ("Segmentation fault", "Not one of the failures that are known"),
])  # fmt: skip
def test_known_failures(vm, capsys, monkeypatch, output, remedy):
    answers(monkeypatch, f"Traceback\n{output}\n", 1)
    status, lines = run(capsys)
    assert status == 1
    assert "jax failed with status 1" in lines["devices"]
    assert output in lines["devices"] and remedy in lines["devices"]


def test_a_signal(vm, capsys, monkeypatch):
    answers(monkeypatch, "", -11)
    assert "jax failed with signal 11: no output" in run(capsys)[1]["devices"]


def test_mistakes(capsys):
    with pytest.raises(SystemExit) as ended:
        health.main(["--expect-kind", "TPU v1"])
    assert ended.value.code == 2
    assert "'TPU v1': expected one of TPU v2" in capsys.readouterr().err
