#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What a launch runs on each VM: a job, detached, once, with its log and its end.

    worker.py start        starts the job of this folder, if it has not been started
    worker.py status       one line of JSON: where the job is, how it ended
    worker.py log OFFSET   what it has printed since
    worker.py deadline     sets the VM's timer anew
    worker.py pack         archives the run's folder, without checkpoints and tokens

Runs on the images' own Python, 3.8 or later, and needs nothing else. The folder holds
job.json, code.tar.gz, changes.diff and secrets.env (0600, deleted at the end).
gcloud may run each of these commands again: none does its work twice, none ends with
255, which gcloud takes for a broken connection.
"""

import base64
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CODE, LOG = FOLDER / "code", FOLDER / "job.log"
CHUNK = 1 << 18  # bytes of the log at a time


def main(argv):
    verbs = {"start": start, "status": status, "log": log, "deadline": deadline,
             "pack": pack}  # fmt: skip
    if not argv or argv[0] not in verbs:
        print(__doc__)
        return 2
    return verbs[argv[0]](*argv[1:]) or 0


# --- The job --------------------------------------------------------------------------


def start():
    """Detaches a process that does the job; returns once it holds the lock."""
    job = read("job.json")
    lock = os.open(FOLDER / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        hold(lock)
    except BlockingIOError:
        other = read("status.json").get("run", job["run"])
        if other == job["run"]:
            print(f"worker {worker()}: already started")
            return 0
        print(f"worker {worker()}: the run {other} is at work here")
        return 3
    if read("status.json").get("id") == job["id"]:
        forget_secrets()
        print(f"worker {worker()}: has been started before")
        return 0
    note(id=job["id"], run=job["run"], stage="start", since=time.time())
    if LOG.exists():
        LOG.unlink()
    if os.fork() == 0:  # the child keeps the lock as long as it lives
        os.setsid()
        with open(LOG, "ab", 0) as out, open(os.devnull, "rb") as nothing:
            for stream, file in ((0, nothing), (1, out), (2, out)):
                os.dup2(file.fileno(), stream)
        os.set_inheritable(lock, False)
        code = 1
        try:
            code = do(job)
        finally:
            forget_secrets()
            note(ended=time.time(), status=code)
            os._exit(0)
    print(f"worker {worker()}: started")
    return 0


def hold(lock):
    """Takes the lock; BlockingIOError if another job has it, not if `status` looks."""
    for left in (3, 2, 1, 0):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not left:
                raise
            time.sleep(0.1)


def deadline():
    """Sets the timer anew, as job.json now has it."""
    (_, command), *_ = read("job.json")["stages"]
    return subprocess.call([expand(word, os.environ) for word in command], cwd=CODE)


def do(job):
    """The stages of a job, one after the other; the status of the first that fails."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **secrets()}
    env["LM_SCALE_VENV"] = str(FOLDER / "venv")  # it outlives the code
    print(f"--- job {job['id']}, {time.strftime('%F %T %Z')}", flush=True)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # many files are open
    unpack(job["tree"])
    run_folder().mkdir(parents=True, exist_ok=True)
    (run_folder() / "launch.json").write_text(json.dumps(job, indent=1) + "\n")
    shutil.copy(FOLDER / "changes.diff", run_folder())  # commit + diff: what is run
    for stage, command in job["stages"]:
        note(stage=stage, since=time.time())
        print(f"--- {stage}", flush=True)
        env.update(host_env())
        argv = [expand(word, env) for word in command]
        code = run(argv, env)
        if code:
            print(f"--- {stage} ended with status {code}", flush=True)
            return code
    return 0


def run_folder():
    """Where the trainer writes; `--run-dir` says the same."""
    return FOLDER / "runs" / read("job.json")["run"]


def unpack(tree):
    """The code, in a folder that holds just what was sent."""
    done = CODE / ".tree"
    if done.exists() and done.read_text() == tree:
        return
    shutil.rmtree(CODE, ignore_errors=True)
    with tarfile.open(FOLDER / "code.tar.gz") as archive:
        archive.extractall(CODE)  # git's own archive: no path leads outside
    done.write_text(tree)


def host_env():
    """What setup_host.sh has found out: variables, the Python among them."""
    file = CODE / "host.env"
    lines = file.read_text().splitlines() if file.exists() else []
    pairs = [line.partition("=") for line in lines if line and line[0] != "#"]
    return {name: value for name, _, value in pairs}


def secrets():
    """Variables that must be in no command line and no file that stays."""
    file = FOLDER / "secrets.env"
    return json.loads(file.read_text()) if file.exists() else {}


def forget_secrets():
    if (FOLDER / "secrets.env").exists():
        (FOLDER / "secrets.env").unlink()


def expand(word, env):
    """A word of a stage's command, with the places that only this VM knows."""
    places = {"FOLDER": str(FOLDER)}
    places["LM_SCALE_PYTHON"] = env.get("LM_SCALE_PYTHON", "python3")
    for name, value in places.items():
        word = word.replace("{" + name + "}", value)
    return word


def run(argv, env):
    """A command, to its end. A SIGTERM for us is for it: it saves, and ends with 75."""
    process = subprocess.Popen(argv, cwd=CODE, env=env)
    note(pid=process.pid)
    (FOLDER / "pid").write_text(str(process.pid))  # for deadline.sh
    signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    code = process.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 128 - code if code < 0 else code


# --- What is asked about it -----------------------------------------------------------


def status():
    """One line, shorter than a pipe's buffer: workers that write at once do not mix."""
    found = {"worker": worker(), **read("status.json")}
    found["step"] = step()
    found["log"] = LOG.stat().st_size if LOG.exists() else 0
    found["alive"] = locked()
    print("lm_scale-status " + json.dumps(found))


def log(offset):
    start = int(offset)
    if not LOG.exists():
        return
    with open(LOG, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size + start, 0) if start < 0 else min(start, size))
        # As base64: terminals and encodings between here and there change no byte.
        print("lm_scale-log " + base64.b64encode(file.read(CHUNK)).decode())


def pack():
    """run.tar.gz: what the run wrote, without checkpoints and tokens."""
    with tarfile.open(FOLDER / "run.tar.gz.part", "w:gz") as archive:
        for path in sorted(run_folder().iterdir()):
            if path.name not in ("checkpoints", "data"):
                archive.add(path, path.name)
    os.replace(FOLDER / "run.tar.gz.part", FOLDER / "run.tar.gz")


def locked():
    """If the process that does the job lives."""
    with open(FOLDER / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True


def step():
    """The step of the run's newest checkpoint, if it says so."""
    try:
        return json.loads((run_folder() / "saved.json").read_text()).get("step")
    except (OSError, ValueError, KeyError):
        return None


def worker():
    """The number of this VM in its slice."""
    if "LM_SCALE_WORKER" in os.environ:
        return int(os.environ["LM_SCALE_WORKER"])
    known = FOLDER / "number"
    if not known.exists():
        server = os.environ.get("GCE_METADATA_IP", "169.254.169.254")
        request = urllib.request.Request(
            f"http://{server}/computeMetadata/v1/instance/attributes/agent-worker-number",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with urllib.request.urlopen(request, timeout=3) as answer:
                known.write_text(str(int(answer.read())))
        except (OSError, ValueError):
            found = re.search(r"-w-(\d+)$", socket.gethostname())
            return int(found[1]) if found else 0
    return int(known.read_text())


# --- Files ----------------------------------------------------------------------------


def read(name):
    try:
        return json.loads((FOLDER / name).read_text())
    except (OSError, ValueError):
        return {}


def note(**facts):
    """Adds to status.json; facts of an earlier job are forgotten."""
    known = {} if "id" in facts else read("status.json")
    part = FOLDER / "status.json.part"
    part.write_text(json.dumps({**known, **facts}))
    os.replace(part, FOLDER / "status.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
