# SPDX-License-Identifier: Apache-2.0
"""launch/deadline.sh for real, with seconds; gcloud, sudo and systemctl are stubs.

The API and the metadata server are one HTTP server on loopback.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "deadline.sh"
TOKEN = "canary-token-3141"
NODES, QUEUED = "nodes/a-run", "queuedResources/a-run?force=true"

pytestmark = pytest.mark.skipif(
    not all(shutil.which(x) for x in ("bash", "curl", "flock", "setsid")),
    reason="bash, curl and flock are needed",
)

STUB = """\
#!/bin/sh
echo "$(basename "$0") $*" >>{calls}
if [ -e {folder}/"$(basename "$0")".fails ]; then echo PERMISSION_DENIED; exit 1; fi
"""


class Google(BaseHTTPRequestHandler):
    """The metadata server, and an API that answers with `server.code`."""

    def do_GET(self):
        server = self.server
        if not self.path.startswith("/computeMetadata"):
            return self.do_DELETE()
        if self.headers["Metadata-Flavor"] != "Google":
            return self.answer(403, "")
        if self.path.endswith("/token"):
            text = f'{{"access_token":"{TOKEN}","expires_in":3599}}'
            return self.answer(200 if server.token else 404, text)
        if self.path.endswith("/tpu-env"):
            text = "ACCELERATOR_TYPE: 'v3-8'\nCONSUMER_PROJECT_ID: 'theirs'\n"
            return self.answer(200, text)
        self.answer(404, "")

    def do_DELETE(self):
        right = self.headers["Authorization"] == f"Bearer {TOKEN}"
        self.server.requests.append((self.command, self.path))
        self.answer(self.server.code if right else 401, "{}")

    do_POST = do_DELETE

    def answer(self, code, text):
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


class Machine:
    """A VM whose programs are stubs, with a home folder of its own."""

    def __init__(self, folder, server):
        self.folder, self.server = folder, server
        self.calls = folder / "calls"
        self.state = folder / "home" / ".lm_scale" / "deadline"
        (folder / "home").mkdir()
        (folder / "bin").mkdir()
        for name in ("gcloud", "sudo", "systemctl"):
            self.stub(name)
        self.fails("sudo")  # no systemd, but where a test wants it
        address = "{}:{}".format(*server.server_address)
        self.env = {
            "HOME": str(folder / "home"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "GCE_METADATA_IP": address,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://{address}/",
            "LM_SCALE_DEADLINE_RETRY": "0",
            "LM_SCALE_MACHINE": "a test",
            "no_proxy": "127.0.0.1",
        }

    def stub(self, name, more=""):
        path = self.folder / "bin" / name
        path.write_text(STUB.format(calls=self.calls, folder=self.folder) + more)
        path.chmod(0o755)

    def fails(self, name, yes=True):
        flag = self.folder / f"{name}.fails"
        flag.touch() if yes else flag.unlink(missing_ok=True)

    def run(self, *arguments, **env):
        return subprocess.run(
            ["bash", SCRIPT, *map(str, arguments)], env={**self.env, **env},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def set(self, seconds, *options, **env):
        where = ("--name", "a-run", "--zone", "z-1", "--project", "p")
        epoch = int(time.time()) + seconds
        return self.run("set", epoch, *where, *options, **env)

    def called(self):
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def log(self):
        return (self.state / "deadline.log").read_text()

    def watched(self):
        lock = self.state / "lock"
        command = ["flock", "-n", lock, "true"]
        return lock.exists() and subprocess.run(command).returncode != 0


def eventually(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)
    return found


@pytest.fixture
def machine(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Google)
    server.code, server.token, server.requests = 200, True, []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    made = Machine(tmp_path, server)
    yield made
    (made.state / "settings").unlink(missing_ok=True)  # then what watches ends
    eventually(lambda: not made.watched())
    server.shutdown()
    thread.join()
    server.server_close()


DELETE = "gcloud compute tpus tpu-vm delete a-run --async --quiet --zone=z-1"
STOP = DELETE.replace("delete", "stop")


def test_deletes_itself_when_the_time_is_up(machine):
    done = machine.set(2)
    assert done.returncode == 0, done.stderr
    assert "a-run (z-1) deletes itself at" in done.stdout
    assert "a process that no reboot brings back" in done.stdout
    began = time.time()
    calls = eventually(lambda: [x for x in machine.called() if "gcloud" in x])
    assert time.time() - began > 0.5
    assert calls[0] == f"{DELETE} --project=p"
    assert machine.server.requests == [("GET", f"/v2/projects/p/locations/z-1/{NODES}")]
    # It goes on while this VM lives.
    eventually(lambda: sum("delete" in x for x in machine.called()) >= 2)
    assert "round 2" in machine.log()


def test_the_api_where_gcloud_may_not(machine):
    machine.fails("gcloud")
    machine.stub("curl", f'exec {shutil.which("curl")} "$@"\n')
    assert machine.set(0, "--queued").returncode == 0
    eventually(lambda: len(machine.server.requests) > 1)
    place = "/v2/projects/p/locations/z-1/"
    assert machine.server.requests[:2] == [
        ("GET", place + NODES), ("DELETE", place + QUEUED),
    ]  # fmt: skip
    called = [call for call in machine.called() if "gcloud" in call]
    first = "gcloud compute tpus queued-resources delete a-run --force --async --quiet"
    assert called[0] == f"{first} --zone=z-1 --project=p"
    assert called[1] == f"{DELETE} --project=p"
    assert "PERMISSION_DENIED" in machine.log() and "HTTP 200" in machine.log()
    assert any("curl" in call for call in machine.called())
    assert TOKEN not in machine.log() + "".join(machine.called())


def test_stops_and_at_last_shuts_down(machine):
    machine.fails("gcloud")
    machine.server.code = 403
    done = machine.set(0, LM_SCALE_MACHINE="Google Compute Engine")
    assert done.returncode == 0
    assert "HTTP 403" in done.stderr and "roles/tpu.admin" in done.stderr
    eventually(lambda: "sudo -n shutdown -h now" in machine.called())
    kinds = [x for x in machine.called() if x.startswith(("gcloud", "sudo -n shut"))]
    assert kinds == [
        *[f"{DELETE} --project=p"] * 3, f"{STOP} --project=p",
        *[f"{DELETE} --project=p", f"{STOP} --project=p"] * 2,
        "sudo -n shutdown -h now",
    ]  # fmt: skip
    stop = ("POST", f"/v2/projects/p/locations/z-1/{NODES}:stop")
    assert machine.server.requests.count(stop) == 3


def test_no_machine_but_google_s_is_shut_down(machine):
    machine.fails("gcloud")
    machine.fails("sudo", False)
    machine.server.token = False
    done = machine.set(0)
    assert "(no token)" in done.stderr
    eventually(lambda: "not shut down" in machine.log())
    assert not any("sudo" in call for call in machine.called())


def test_set_again_replaces_and_clear_ends_it(machine):
    machine.set(3630)
    assert "in 1 h 0 min" in machine.run("show").stdout
    assert machine.set(7230).returncode == 0
    assert "in 2 h 0 min" in machine.run("show").stdout
    machine.set(1)
    eventually(machine.called)
    done = machine.run("clear")
    assert done.returncode == 0 and "no deadline is set" in done.stdout
    eventually(lambda: not machine.watched())
    shown = machine.run("show")
    assert shown.returncode == 1 and "no deadline" in shown.stdout


def test_started_again_it_goes_on(machine):
    """As systemd does after a reboot, or when the process was killed."""
    machine.set(3)
    holder = subprocess.run(
        ["fuser", machine.state / "lock"], capture_output=True, text=True
    ).stdout.split()
    for pid in holder:
        os.kill(int(pid), signal.SIGKILL)
    eventually(lambda: not machine.watched())
    shown = machine.run("show")
    assert shown.returncode == 1 and "has ended: set it again" in shown.stderr
    assert not machine.called()
    command = ["bash", machine.state / "deadline.sh", "run"]
    with subprocess.Popen(command, env=machine.env) as again:
        eventually(machine.called)
        (machine.state / "settings").unlink()
    assert again.returncode == 0


def test_outlives_what_set_it_and_the_code(machine):
    code = machine.folder / "code"
    code.mkdir()
    copy = shutil.copy(SCRIPT, code)
    epoch = str(int(time.time()) + 3)
    command = ["bash", copy, "set", epoch, "--name", "a-run", "--zone", "z-1"]
    session = subprocess.Popen(
        ["sh", "-c", '"$@"; exec sleep 1000', "-", *command], env=machine.env,
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert session.stdout is not None
    assert "deletes itself" in session.stdout.readline()
    os.killpg(session.pid, signal.SIGKILL)
    assert session.stdout.read() == "" and session.wait()  # nothing holds its output
    shutil.rmtree(code)
    calls = eventually(machine.called)
    # Without --project: the user's, which tpu-env names.
    assert calls == [f"{DELETE} --project=theirs"] or len(calls) > 1


def test_training_gets_one_sigterm_before(machine):
    script = (
        "import signal, time\n"
        "def heard(*_):\n    print('TERM', time.time(), flush=True)\n"
        "signal.signal(signal.SIGTERM, heard)\n"
        "print('ready', flush=True)\nwhile True: time.sleep(1)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as training:
        assert training.stdout is not None and training.stdout.readline()
        pid_file = machine.folder / "pid"
        pid_file.write_text(f"{training.pid}\n")
        end = int(time.time()) + 4
        options = ("--pid-file", pid_file, "--save-seconds", 3)
        machine.run("set", end, "--name", "a-run", "--zone", "z-1", *options)
        assert 0.5 < end - float(training.stdout.readline().split()[1]) <= 3.1
        eventually(machine.called)
        assert time.time() >= end
        training.kill()
        assert training.stdout.read() == ""
    assert machine.log().count("SIGTERM to process") == 1


SYSTEMD = 'if [ "$2" = tee ]; then exec tee {units}/"$(basename "$3")"; fi\n'
RESTART = "case $2 in restart) setsid bash {run} run </dev/null >{out} 2>&1 & esac\n"


def test_systemd_units(machine, tmp_path):
    units = tmp_path / "units"
    units.mkdir()
    machine.fails("sudo", False)
    started = RESTART.format(run=machine.state / "deadline.sh", out="/dev/null")
    again = started.replace("$2", "$3")
    machine.stub("sudo", SYSTEMD.format(units=units) + again)
    done = machine.set(3600, LM_SCALE_MACHINE="Google Compute Engine")
    assert done.returncode == 0, done.stderr + machine.log()
    assert "watched over by systemd" in done.stdout
    service = (units / "lm-scale-deadline.service").read_text()
    assert f'ExecStart=/bin/bash "{machine.state}/deadline.sh" run' in service
    timer = (units / "lm-scale-deadline.timer").read_text()
    assert "Persistent=true" in timer
    enabled = "sudo -n systemctl enable lm-scale-deadline.service "
    assert f"{enabled}lm-scale-deadline.timer" in machine.called()
    if shutil.which("systemd-analyze"):
        command = ["systemd-analyze", "verify", *map(str, sorted(units.iterdir()))]
        checked = subprocess.run(command, capture_output=True, text=True)
        assert "lm-scale-deadline" not in checked.stderr
        assert checked.returncode == 0
        (when,) = (x for x in timer.splitlines() if x.startswith("OnCalendar="))
        command = ["systemd-analyze", "calendar", when.partition("=")[2]]
        assert "Next elapse" in subprocess.check_output(command, text=True)
    machine.run("clear")
    removed = "sudo -n rm -f /etc/systemd/system/lm-scale-deadline.service"
    assert any(call.startswith(removed) for call in machine.called())


def test_no_watch_is_an_error(machine):
    # Where systemd takes the units, and its service does not start.
    machine.fails("sudo", False)
    machine.stub("sudo", '[ "$2" = tee ] && cat >/dev/null\nexit 0\n')
    done = machine.set(3600, LM_SCALE_MACHINE="Google Compute Engine")
    assert done.returncode == 1
    assert "so do not train" in done.stderr


@pytest.mark.parametrize("arguments, message", [
    ((), "expected set, show or clear"),
    (("set", "tomorrow"), "'tomorrow': expected a time in whole seconds"),
    (("set", "1", "--zone", "z"), "--name ''"),
    (("set", "1", "--name", "a;b", "--zone", "z"), "--name 'a;b'"),
    (("set", "1", "--name", "a", "--zone"), "--zone needs a value"),
    (("set", "1", "--nmae", "a"), "--nmae: expected"),
    (("set", "1", "--name", "a", "--zone", "z", "--save-seconds", "x"), "'x'"),
])  # fmt: skip
def test_mistakes(machine, arguments, message):
    done = machine.run(*arguments)
    assert done.returncode == 2 and message in done.stderr
    assert not machine.state.exists()


def test_help(machine):
    done = machine.run("--help")
    assert done.returncode == 0 and "deadline.sh set EPOCH" in done.stdout
