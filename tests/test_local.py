# SPDX-License-Identifier: Apache-2.0
"""launch/local.py with commands that need nothing: output, exit status, no orphans."""

import os
import signal
import subprocess
import sys
from pathlib import Path

LOCAL = Path(__file__).parent.parent / "launch" / "local.py"


def run(*command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(LOCAL), *options, "--", *command],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_each_line_has_its_process_and_each_process_its_place():
    show = 'echo "$LM_SCALE_PROCESS_ID of $LM_SCALE_NUM_PROCESSES at $1 '
    show += '$JAX_NUM_CPU_DEVICES"; echo "$LM_SCALE_COORDINATOR" >&2'
    done = run("sh", "-c", show, "sh", "work", options=("-n", "3", "--devices", "4"))
    assert done.returncode == 0
    lines = [f"[{i}] {i} of 3 at work 4" for i in range(3)]
    assert sorted(done.stdout.splitlines()) == lines
    (address,) = {line.split()[1] for line in done.stderr.splitlines()}
    assert address.startswith("127.0.0.1:")


def test_the_status_of_the_one_that_failed_and_no_orphan(tmp_path):
    script = f"""
    if [ "$LM_SCALE_PROCESS_ID" = 1 ]; then
      while [ ! -s {tmp_path}/pids ]; do :; done; exit 7
    fi
    trap '' TERM
    sleep 1000 & echo $$ $! > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pids; wait
    """
    done = run("sh", "-c", script, options=("--grace", "0.2"))
    assert done.returncode == 7
    assert "process 1 ended with 7" in done.stderr
    assert not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_killed_process_has_a_shell_s_status():
    done = run("sh", "-c", "kill -9 $$")
    assert done.returncode == 128 + signal.SIGKILL
    assert "killed by signal 9" in done.stderr


def test_signals_are_forwarded(tmp_path):
    script = (
        "trap 'echo heard; exit 75' INT TERM; echo ready; while :; do sleep 0.1; done"
    )
    command = [sys.executable, str(LOCAL), "-n", "2", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert {process.stdout.readline() for _ in range(2)} == {
            "[0] ready\n", "[1] ready\n"
        }  # fmt: skip
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 75
    assert sorted(rest.splitlines()) == ["[0] heard", "[1] heard"]


def test_children_do_not_outlive_a_killed_launcher(tmp_path):
    script = "echo $$; exec sleep 1000"
    command = [sys.executable, str(LOCAL), "-n", "2", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
        process.kill()
    if sys.platform == "linux":
        for pid in pids:
            waited = os.pidfd_open(pid) if alive(pid) else None
            if waited is not None:  # ready to read when the process has ended
                import select

                assert select.select([waited], [], [], 20)[0]
                os.close(waited)


def test_mistakes():
    assert run("./no-such-command").returncode == 1
    assert "cannot start ./no-such-command" in run("./no-such-command").stderr
    assert run("true", options=("-n", "0")).returncode == 2
    assert run("true", options=("--devices", "0")).returncode == 2


def test_this_checkout_serves_where_nothing_is_installed(monkeypatch):
    monkeypatch.syspath_prepend(str(LOCAL.parent))
    import local

    monkeypatch.setattr("shutil.which", lambda name: None)
    assert local.resolve(["lm-scale", "train"])[1:] == ["-m", "lm_scale", "train"]
    assert local.resolve(["echo", "lm-scale"]) == ["echo", "lm-scale"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = local.environment(0, 1, 1, None)["PYTHONPATH"]
    assert path.split(os.pathsep)[0] == str(LOCAL.parent.parent)
