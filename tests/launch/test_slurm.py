# SPDX-License-Identifier: Apache-2.0
"""launch/slurm.py: the script, run with stand-ins for Slurm and on a real cluster."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from slurm_cluster import Cluster, members, missing_programs
from tiny import causal_run

from launch import sbatch, slurm
from launch.errors import Refused
from lm_scale.config import RunConfig
from lm_scale.runs import open_run
from lm_scale.sharding import flatten
from lm_scale.trainer import train

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "launch" / "slurm.py"
CANARY = "canary-5f1c'\"$x `y` z"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder, with a space, in which there is a config; it is the current one."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    (folder / "x.py").write_text("")
    monkeypatch.chdir(folder)
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return folder


def rendered(capsys, *arguments: str) -> str:
    arguments = ("render", "x.py", "--python", "/env/bin/python", *arguments)
    assert slurm.main(list(arguments)) == 0
    return capsys.readouterr().out


def directives(script: str) -> list[str]:
    mark = "#SBATCH "
    return [x.removeprefix(mark) for x in script.splitlines() if x.startswith(mark)]


ALL_OPTIONS = [
    "--name", "a.b-1", "--nodes", "1", "--gpus-per-node", "2", "--tasks-per-node", "2",
    "--cpus-per-task", "3", "--mem", "2G", "--time", "1-00:00:00", "--partition",
    "main", "--account", "lab", "--qos", "high", "--constraint", "fast",
    "--sbatch=--exclusive", "--sbatch=--comment=mine", "--setup", "x=1",
    "--stop-before", "300", "--requeues", "3",
]  # fmt: skip


# --- The script -----------------------------------------------------------------------


def test_all_options_are_in_the_script(folder, capsys):
    script = rendered(capsys, *ALL_OPTIONS, "--", "--steps", "3")
    assert directives(script) == [
        "--job-name=lm_scale.a.b-1",
        f'--output="{folder}/runs/a.b-1/slurm/%j.log"',
        "--open-mode=append",
        f'--chdir="{folder}"',
        "--export=ALL",
        "--nodes=1",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--cpus-per-task=3",
        "--mem=2G",
        "--time=1-00:00:00",
        "--partition=main",
        "--account=lab",
        "--qos=high",
        "--constraint=fast",
        "--signal=TERM@300",
        "--requeue",
        "--exclusive",
        "--comment=mine",
    ]
    assert "JAX_PLATFORMS=${JAX_PLATFORMS:-cuda}" in script
    assert "--kill-on-bad-exit=1 --cpus-per-task=3 --label \\\n" in script
    want = "/env/bin/python -m lm_scale train x.py --run-dir runs/a.b-1 --steps 3\n"
    assert want in script
    assert not (folder / "runs").exists()


def test_without_options_it_asks_for_one_node_s_cpus(folder, capsys):
    script = rendered(capsys)
    names = [line.partition("=")[0] for line in directives(script)]
    assert names == [
        "--job-name", "--output", "--open-mode", "--chdir", "--export", "--nodes",
        "--ntasks-per-node", "--signal", "--requeue",
    ]  # fmt: skip
    assert "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" in script
    assert "/env/bin/python -m lm_scale train x.py\n" in script  # its own run_dir
    assert (
        slurm.main(["train", "x.py", "--python", "/env/bin/python", "--dry-run"]) == 0
    )
    assert capsys.readouterr().out == script


@pytest.mark.parametrize("options", [[], ALL_OPTIONS, ["--setup", "a 'b\" $c"]])
def test_it_is_shell(folder, capsys, options):
    script = rendered(capsys, *options, "--", "--x", CANARY)
    check = ["bash", "-n"]
    done = subprocess.run(check, input=script, capture_output=True, text=True)
    assert ("unexpected EOF" in done.stderr) == ("a 'b\" $c" in options), done.stderr


def test_it_says_which_code(folder, capsys, monkeypatch):
    repository = folder / "code"
    repository.mkdir()

    def git(*command: str) -> str:
        names = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", "-C", str(repository), *names, *command],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    monkeypatch.setattr(sbatch, "ROOT", repository)
    assert sbatch.code_identity() == "unknown" or ROOT in repository.parents
    git("init", "-q")
    (repository / "a").write_text("1\n")
    git("add", "a")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert sbatch.code_identity() == commit
    (repository / "a").write_text("2\n")
    identity = sbatch.code_identity()
    assert re.fullmatch(commit + " and changes [0-9a-f]{12}", identity)
    assert f"# Code: {identity}\n" in rendered(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.py"], "there is no config file no.py"),
        (["x.py", "--name", "a/b"], "the name is 'a/b': expected"),
        (["x.py", "--name", "17"], "the name is '17': expected"),
        (["x.py", "--nodes", "0"], "--nodes: '0': expected a number from 1 on"),
        (["x.py", "--gpus-per-node", "many"], "--gpus-per-node 'many': expected"),
        (["x.py", "--time", "soon"], "--time 'soon': expected"),
        (["x.py", "--time", "2:00"], "--time 2:00 is 120 s, of which the last 120"),
        (["x.py", "--mem", 'a"b'], "mem = 'a\"b': sbatch's directives cannot hold"),
        (["x.py", "--mem", "1G\n#SBATCH --x"], "sbatch's directives cannot hold"),
        (["x.py", "--sbatch", "exclusive"], "--sbatch 'exclusive': expected"),
        (["x.py", "--stop-before", "70000"], "expected a number from 1 to 65535"),
    ],
)
def test_mistakes(folder, capsys, arguments, message):
    try:
        status = slurm.main(["render", *arguments, "--python", "python3"])
    except SystemExit as error:  # argparse's
        status = error.code
    shown = capsys.readouterr()
    assert status == 2 and message in shown.err and not shown.out


def test_without_an_environment_and_without_slurm(folder, capsys, monkeypatch):
    monkeypatch.setattr(sbatch, "ROOT", folder)
    assert slurm.main(["render", "x.py"]) == 2
    assert "name the Python of an environment" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(folder))
    assert slurm.main(["train", "x.py", "--python", "/p"]) == 2
    assert "squeue is not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "fits"),
    [("3", False), ("6", True), ("5:00", False), ("6:00", True), ("0:05:59", False),
     ("0-1", True), ("1-0:00", True), ("0-0:05:59", False), ("0", True),
     ("UNLIMITED", True)],
)  # fmt: skip
def test_a_time_limit_leaves_time_to_train(text, fits):
    """In each of Slurm's forms; 0 is no limit."""
    try:
        sbatch.check_time(text, lead=300)
    except Refused:
        assert not fits
    else:
        assert fits


# --- With stand-ins for Slurm's programs ----------------------------------------------


class Programs:
    """Shell scripts, first on PATH, which note how they were called."""

    def __init__(self, folder: Path, monkeypatch):
        self.folder = folder / "programs"
        self.folder.mkdir()
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")

    def add(self, name: str, script: str) -> str:
        path = self.folder / name
        note = f'printf "%s\\n" "$*" >>{shlex.quote(str(path))}.calls\n'
        path.write_text(f"#!/bin/bash\n{note}{script}\n")
        path.chmod(0o755)
        return str(path)

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def programs(folder, monkeypatch) -> Programs:
    programs = Programs(folder, monkeypatch)
    programs.add("srun", 'until [ "$1" = bash ]; do shift; done; exec "$@"')
    programs.add("sleep", "")
    return programs


RUNNING = "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0"
CANCELLED = RUNNING.replace("RUNNING", "COMPLETING")
OUT_OF_TIME = CANCELLED.replace("Reason=None", "Reason=TimeLimit")


@pytest.mark.parametrize(
    ("status", "state", "restarts", "again", "said"),
    [
        (0, RUNNING, 0, False, "ended with 0"),
        (1, RUNNING, 0, False, "ended with 1"),
        (2, RUNNING, 0, False, "ended with 2"),
        (137, RUNNING, 0, False, "ended with 137"),
        (75, RUNNING, 0, True, "stopped with 75; queued again"),
        (75, OUT_OF_TIME, 0, True, "stopped with 75; queued again"),
        (75, CANCELLED, 0, False, "the job was cancelled"),
        (75, RUNNING.replace("Requeue=1", "Requeue=0"), 0, False, "was told not to"),
        (75, RUNNING.replace("Restarts=0", "Restarts=2"), 2, True, "queued again"),
        (75, RUNNING.replace("Restarts=0", "Restarts=3"), 3, False, "started 4 times"),
        # It has been preempted: Slurm queues it again, whatever its status is.
        (75, CANCELLED.replace("Restarts=0", "Restarts=1"), 0, None, "Slurm has"),
        (137, CANCELLED.replace("Restarts=0", "Restarts=1"), 0, None, "Slurm has"),
    ],
)
def test_what_the_job_does_at_its_end(
    folder, programs, capsys, status, state, restarts, again, said
):
    python = programs.add("python", f"exit {status}")
    programs.add("scontrol", f'[ "$1" = requeue ] || echo "JobId=7 {state} A=b"')
    secrets = folder / "runs" / "x" / "slurm" / "secrets.sh"
    secrets.parent.mkdir(parents=True)
    secrets.touch()
    script = rendered(capsys, "--python", python, "--requeues", "3")
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n"}
    if restarts:
        env["SLURM_RESTART_COUNT"] = str(restarts)
    done = subprocess.run(
        ["bash"], input=script, capture_output=True, text=True, env=env
    )
    assert done.returncode == status and said in done.stdout, done
    assert ("requeue 7" in programs.calls("scontrol")) == bool(again)
    assert secrets.exists() == (again is not False)  # the next start needs them
    assert f"start {restarts + 1}, on n" in done.stdout
    assert "WARNING" not in done.stdout and not done.stderr


def test_odd_values_reach_the_trainer_as_they_are(folder, programs, capsys):
    python = programs.add("python", 'printf "<%s>\\n" "$@"; echo "$from_setup"')
    programs.add("scontrol", f'echo "{RUNNING}"')
    Path("s e t.sh").write_text("export from_setup='set up'\n")
    odd = [CANARY, "", "a\nb", "*", "\\", "%j {x}"]
    script = rendered(capsys, "--python", python, "--setup", "s e t.sh", "--", *odd)
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True)
    want = ["-m", "lm_scale", "train", "x.py", *odd]
    assert "".join(f"<{value}>\n" for value in want) + "set up\n" in done.stdout


def test_a_set_up_that_fails_ends_the_job(folder, programs, capsys):
    script = rendered(capsys, "--setup", "no-such-command 'a b'")
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True)
    assert done.returncode == 1 and "failed: no-such-command 'a b'" in done.stdout
    assert not programs.calls("srun")


def submit(*arguments: str) -> int:
    return slurm.main(["train", "x.py", "--python", "/env/python", *arguments])


def test_a_secret_goes_by_a_file_only(folder, programs, capsys, monkeypatch):
    programs.add("squeue", "")
    programs.add("sbatch", 'env >env; cat "${@: -1}" >script; echo "17;cluster"')
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, CANARY)
    monkeypatch.setenv("SBATCH_PARTITION", "other")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    assert submit("--partition", "main") == 0
    shown = capsys.readouterr()
    assert "job 17, x: submitted" in shown.out
    secrets = folder / "runs" / "x" / "slurm" / "secrets.sh"
    assert secrets.stat().st_mode & 0o777 == 0o600
    told = subprocess.run(
        ["bash", "-c", '. "$0"; printf %s "$WANDB_API_KEY"', str(secrets)],
        capture_output=True, text=True, env={},
    )  # fmt: skip
    assert told.stdout == CANARY
    holds = [p for p in folder.rglob("*") if p.is_file() and "canary" in p.read_text()]
    assert holds == [secrets]
    assert "canary" not in shown.out + shown.err
    env = Path("env").read_text()
    assert "SBATCH_PARTITION" not in env and "SLURM_JOB_ID" not in env
    assert "SBATCH_ACCOUNT=mine" in env  # a default of the user, not overridden
    assert str(secrets) in Path("script").read_text()


def test_a_refusal_leaves_no_secret(folder, programs, capsys, monkeypatch):
    programs.add("squeue", "")
    programs.add("sbatch", 'echo "error: invalid account" >&2; exit 1')
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert submit() == 1
    shown = capsys.readouterr()
    assert "sbatch failed: error: invalid account" in shown.err
    assert "canary" not in shown.out + shown.err
    assert not list(folder.rglob("secrets.sh"))


QUEUE = """\
12|lm_scale.x|RUNNING|1:02|1:00:00|2|{folder}|n[1-2]
13|x|RUNNING|0:01|1:00|1|/elsewhere|n3
14|lm_scale.y|PENDING|0:00|1:00|1|{folder}|(Resources)
"""


def test_the_same_name_is_refused_while_its_job_is_there(folder, programs, capsys):
    programs.add("squeue", f"cat <<'E'\n{QUEUE.format(folder=folder)}E")
    programs.add("sbatch", "echo 17")
    assert submit() == 2
    assert "job 12 of the name x is RUNNING already" in capsys.readouterr().err
    assert not programs.calls("sbatch")
    assert submit("--name", "z") == 0
    programs.add("squeue", "exit 1")  # who is there is not known: nothing is submitted
    assert submit("--name", "z") == 1
    assert len(programs.calls("sbatch")) == 1


def test_list_and_status_show_only_jobs_of_ours(folder, programs, capsys):
    programs.add("squeue", f"cat <<'E'\n{QUEUE.format(folder=folder)}E")
    programs.add("sacct", "exit 1")
    assert slurm.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["12", "x", "RUNNING"], ["14", "y", "PENDING"]
    ]  # fmt: skip
    assert slurm.main(["status", "13"]) == 2
    assert "no job 13 of ours is queued or running" in capsys.readouterr().err
    log = folder / "runs" / "old" / "slurm" / "9.log"
    log.parent.mkdir(parents=True)
    log.write_text("lm_scale: now ended with 1\n")
    for name in ("old", "9"):
        assert slurm.main(["status", name]) == 0
        assert capsys.readouterr().out == "9  old  not queued; now ended with 1\n"
        assert slurm.main(["logs", name]) == 0
        assert capsys.readouterr().out == log.read_text()
    programs.add("sacct", "echo 'TIMEOUT|0:0|01:00:00|then'")
    assert slurm.main(["status", "old"]) == 0
    assert capsys.readouterr().out == "9  old  TIMEOUT  0:0  01:00:00  then\n"


# --- On a cluster of one node ---------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    missing = missing_programs()
    if missing:
        pytest.skip(
            f"no {missing[0]} here: apt-get install --no-install-recommends slurmd "
            f"slurmctld munge slurm-client"
        )
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def on_cluster(cluster, folder, monkeypatch):
    for name, value in cluster.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm, "POLL", 0.1)
    yield cluster
    cluster.cancel_all()


# It saves, when it is told to, and has nothing left to do when it goes on.
TRAINER = """\
echo "begins, key $WANDB_API_KEY, GPUs $SLURM_GPUS_ON_NODE, $JAX_PLATFORMS"
if [ -e saved ]; then echo goes on; exit 0; fi
trap 'touch saved; echo saves; exit 75' TERM
touch begun
while :; do sleep 0.1; done
"""


def trainer(folder: Path) -> str:
    path = folder / "trainer"
    path.write_text(f"#!/bin/bash\n{TRAINER}")
    path.chmod(0o755)
    return str(path)


def submitted(capsys, *arguments: str) -> tuple[str, Path]:
    """The number and the log of a job."""
    assert slurm.main(["train", *arguments]) == 0
    shown = capsys.readouterr().out
    number = re.match(r"job (\d+), ", shown)
    log = re.search(r"log (.*)\n", shown)
    assert number and log
    return number[1], Path(log[1])


def ended(cluster: Cluster, number: str, log: Path) -> dict[str, str]:
    """What Slurm says of a job that will not run again."""
    states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    cluster.until(lambda: cluster.job(number)["JobState"] in states, "its end", 60)
    assert not cluster.job(number)["JobState"] == "NODE_FAIL", log.read_text()
    return cluster.job(number)


def test_sbatch_takes_the_script(on_cluster, folder, capsys):
    for number, options in enumerate([[], ALL_OPTIONS, ["--gpus-per-node", "gpu:1"]]):
        path = folder / f"{number}.sbatch"
        path.write_text(rendered(capsys, *options))
        done = on_cluster.run("sbatch", "--test-only", str(path))
        refused = "gpu:1" in options  # there is no such type of GPU
        assert (done.returncode == 0) != refused, done.stderr


def test_preempted_then_requeued_by_the_script(on_cluster, folder, capsys, monkeypatch):
    """Another user's job is urgent: the run saves, waits, and goes on."""
    monkeypatch.setenv("WANDB_API_KEY", "canary-77")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    python = trainer(folder)
    number, log = submitted(capsys, "x.py", "--python", python, "--gpus-per-node", "4")
    assert slurm.main(["train", "x.py", "--python", python]) == 2
    assert f"job {number} of the name x is " in capsys.readouterr().err
    on_cluster.until((folder / "begun").exists, "its beginning")
    assert not holders(on_cluster.folder, b"canary-77")
    secrets = log.with_name("secrets.sh")
    assert holders(folder, b"canary-77") == {secrets, log}  # TRAINER shows it
    on_cluster.preempt()
    last = ended(on_cluster, number, log)
    shown = log.read_text()
    assert (last["JobState"], last["Restarts"]) == ("COMPLETED", "1"), shown
    assert shown.count("begins, key canary-77, GPUs 4, cuda\n") == 2, shown
    said = ("start 1", "saves", "stopped with 75; queued again", "start 2", "goes on")
    places = [shown.index(text) for text in (*said, "ended with 0")]
    assert places == sorted(places)
    assert not secrets.exists()


def holders(folder: Path, text: bytes) -> set[Path]:
    """The files, sockets apart, that hold a text."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path for path in paths if text in path.read_bytes()}


def test_requeued_by_slurm(on_cluster, folder, capsys):
    """As a preemption without grace does it: the script leaves it to Slurm."""
    number, log = submitted(capsys, "x.py", "--python", trainer(folder))
    on_cluster.until((folder / "begun").exists, "its beginning")
    assert on_cluster.run("scontrol", "requeue", number).returncode == 0
    last = ended(on_cluster, number, log)
    shown = log.read_text()
    assert (last["JobState"], last["Restarts"]) == ("COMPLETED", "1"), shown
    assert "stopped with 75; Slurm has queued the job again" in shown


@pytest.mark.parametrize("how", ["down", "down --grace 0", "scancel"])
def test_an_ended_job_stays_ended(on_cluster, folder, capsys, monkeypatch, how):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    number, log = submitted(capsys, "x.py", "--python", trainer(folder))
    on_cluster.until((folder / "begun").exists, "its beginning")
    if how == "scancel":
        assert on_cluster.run("scancel", number).returncode == 0
    else:
        assert slurm.main([*how.split(), "x"]) == 0
        assert capsys.readouterr().out == f"job {number}, x: ended\n"
    last = ended(on_cluster, number, log)
    assert last["Restarts"] == "0" and last["ExitCode"] == "75:0", log.read_text()
    assert "saves" in log.read_text()
    assert not log.with_name("secrets.sh").exists()
    assert slurm.main(["down", "x"]) == 0
    assert "nothing to end" in capsys.readouterr().out


def test_a_job_that_waits_is_told_of_and_ended(on_cluster, folder, capsys):
    number, log = submitted(
        capsys, "x.py", "--python", trainer(folder), "--sbatch=--begin=now+1hour"
    )
    assert slurm.main(["status", "x"]) == 0
    assert capsys.readouterr().out.startswith(f"{number}  x  PENDING  0:00 of ")
    command = [sys.executable, str(SLURM), "logs", "x", "-f"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True,
        # A shell's background job, which the tests may be in, ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as following:  # fmt: skip
        assert following.stderr is not None
        assert "PENDING" in following.stderr.readline()
        following.send_signal(signal.SIGINT)
        assert "the job goes on" in following.stderr.read()
    assert following.returncode == 130
    assert slurm.main(["down", "--all"]) == 0
    assert capsys.readouterr().out == f"job {number}, x: ended\n"
    assert slurm.main(["list"]) == 0
    assert capsys.readouterr().out == "no job of ours is queued or running\n"


KILLED = """
import os, signal
from slurm_cluster import Cluster, members
with Cluster() as cluster:
    job = "trap '' TERM; srun sleep 1000"
    assert cluster.run("sbatch", "-o", "/dev/null", "--wrap", job).returncode == 0
    cluster.until(lambda: len(members(cluster.folder)) >= 7, "its processes")
    print(cluster.folder, flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_nothing_of_a_cluster_outlives_it(cluster, end):
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(end=end)], text=True, timeout=60,
        stdout=subprocess.PIPE, cwd=Path(__file__).parent,
    )  # fmt: skip
    other = Path(done.stdout.strip())
    assert other.name.startswith("slurm-")
    cluster.until(lambda: not other.exists() and not members(other), "the end of all")


# --- Training -------------------------------------------------------------------------

STEPS = 100  # some seconds, in which it is preempted
CHANGES = {
    "steps": STEPS, "accumulate": 1, "save_every": 1000, "eval_every": None,
    "eval_at_end": False, "sample_prompt": None, "report_to": (),
}  # fmt: skip
CONFIG = """
from pathlib import Path
from tiny import causal_run
config = causal_run(Path({folder!r}), **{changes!r})
"""


def weights(config: RunConfig) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in flatten(open_run(config.run_dir).params).items()}


def losses(config: RunConfig) -> list[tuple[int, float]]:
    path = Path(config.run_dir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunConfig:
    config = causal_run(tmp_path_factory.mktemp("undisturbed"), **CHANGES)
    assert train(config, Console(quiet=True)).finished
    return config


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_a_preempted_run_ends_as_an_undisturbed_one(
    on_cluster, folder, capsys, monkeypatch, undisturbed, tasks
):
    """One process of 8 devices: bit for bit; two of 4: the losses, to rounding."""
    (folder / "x.py").write_text(CONFIG.format(folder=str(folder), changes=CHANGES))
    config = dataclasses.replace(
        causal_run(folder, **CHANGES), run_dir=str(folder / "runs" / "tiny")
    )
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(8 // tasks))
    number, log = submitted(
        capsys, "x.py", "--python", sys.executable, "--name", "tiny",
        "--tasks-per-node", str(tasks),
    )  # fmt: skip
    on_cluster.until(lambda: len(losses(config)) >= 3, "three steps", 240)
    on_cluster.preempt()
    assert slurm.main(["logs", "tiny", "-f"]) == 0
    shown = capsys.readouterr().out
    last = ended(on_cluster, number, log)
    assert (last["JobState"], last["Restarts"]) == ("COMPLETED", "1"), shown
    stopped = re.search(rf"Stopped after step (\d+) of {STEPS}, saved\.", shown)
    assert stopped and 3 <= int(stopped[1]) < STEPS, shown
    assert f"Going on from step {stopped[1]}" in shown
    assert shown == log.read_text()
    got, want = losses(config), losses(undisturbed)
    assert [step for step, _ in got] == list(range(1, STEPS + 1))
    if tasks == 1:
        assert got == want
        trained = weights(config)
        for path, value in weights(undisturbed).items():
            np.testing.assert_array_equal(trained[path], value, err_msg=path)
    # Not the weights: gradients of keys' biases are nothing but rounding.
    for (step, loss), (_, expected) in zip(got, want, strict=True):
        np.testing.assert_allclose(loss, expected, rtol=1e-3, err_msg=f"step {step}")
