# SPDX-License-Identifier: Apache-2.0
"""Who a process is among several, and how they find that they differ: no process."""

import urllib.error

import numpy as np
import pytest

from lm_scale import cluster, connect, distributed
from lm_scale.__main__ import main
from lm_scale.cluster import Place, detect, find_place, parse_address, take_flags
from lm_scale.connect import code_facts
from lm_scale.distributed import disagreements
from lm_scale.errors import InputError

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_NTASKS": "2",
}  # fmt: skip


# --- Flags and variables --------------------------------------------------------------


def test_flags_are_taken_out_of_the_arguments():
    given, rest = take_flags(
        ["c.py", "--process_id", "1", "--steps", "3", "--coordinator=a:1",
         "--num-processes", "2"]
    )  # fmt: skip
    assert given == {"process_id": "1", "coordinator": "a:1", "num_processes": "2"}
    assert rest == ["c.py", "--steps", "3"]
    with pytest.raises(InputError, match="--process_id is the last argument"):
        take_flags(["c.py", "--process_id"])


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("10.0.0.1:8476", "10.0.0.1", 8476), ("worker-0.pod:1", "worker-0.pod", 1),
     ("[fe80::1%eth0]:65535", "[fe80::1%eth0]", 65535)],
)  # fmt: skip
def test_addresses(text, host, port):
    assert parse_address(text) == (host, port)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:0", "host:65536", "::1:80", "a b:80",
             "http://host:80", "host:-1"],
)  # fmt: skip
def test_what_is_no_address(text):
    with pytest.raises(InputError, match="expected HOST:PORT"):
        parse_address(text)


def test_flags_go_before_variables_and_variables_before_a_cluster():
    env = {
        **SLURM, "LM_SCALE_COORDINATOR": "a:1", "LM_SCALE_PROCESS_ID": "0",
        "LM_SCALE_NUM_PROCESSES": "3", "LM_SCALE_PEER_TIMEOUT": "20",
    }  # fmt: skip
    assert find_place({}, env, tpu=False) == Place("a:1", 0, 3, peer_timeout=20)
    place = find_place({"process_id": "2"}, env, tpu=False)
    assert place is not None and place.process_id == 2
    place = find_place({}, SLURM, tpu=False)
    assert place is not None and place.coordinator is None
    assert find_place({}, {}, tpu=False) is None


def test_one_process_is_none_of_several():
    given = {"coordinator": "a:1", "process_id": "0", "num_processes": "1"}
    assert find_place(given, {}, tpu=False) is None


MISTAKES = {
    "one of three": ({"process_id": "1"}, "coordinator and num_processes are missing"),
    "two of three": (
        {"process_id": "1", "num_processes": "2"}, "coordinator is missing",
    ),
    "id too high": (
        {"coordinator": "a:1", "process_id": "2", "num_processes": "2"},
        "expected 0 to 1",
    ),
    "no number": (
        {"coordinator": "a:1", "process_id": "one", "num_processes": "2"},
        "process_id = 'one'",
    ),
    "negative": (
        {"coordinator": "a:1", "process_id": "-1", "num_processes": "2"},
        "a number from 0 on",
    ),
    "no time": ({"start_timeout": "0"}, "start_timeout = '0'"),
    "empty": (
        {"coordinator": "", "process_id": "0", "num_processes": "2"},
        "expected HOST:PORT",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_combination_that_cannot_be(name):
    given, message = MISTAKES[name]
    with pytest.raises(InputError, match=message):
        find_place(given, {}, tpu=False)


@pytest.mark.parametrize("command", ["train", "mlm", "eval"])
def test_the_command_line_refuses_it_before_anything_else(command, capsys):
    assert main([command, "nowhere", "--process_id", "1"]) == 2
    assert "num_processes are missing" in capsys.readouterr().err


def test_the_port_of_process_0_must_be_free(capsys):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = ["--process_id", "0", "--num_processes", "2"]
        assert main(["train", "c.py", "--coordinator", address, *flags]) == 2
    assert "cannot listen at port" in capsys.readouterr().err


# --- Clusters -------------------------------------------------------------------------


def answers(monkeypatch, **metadata: str) -> None:
    monkeypatch.setattr(cluster, "tpu_metadata", lambda name: metadata.get(name, ""))


@pytest.mark.parametrize(
    ("env", "tpu", "found"),
    [
        ({}, False, None),
        (SLURM, False, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),
        (SLURM | {"SLURM_NTASKS": ""}, False, None),
        # In an allocation, but not started by srun: a notebook, a login shell.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, False, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, "GKE"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True, "GKE"),
        # libtpu leaves such things in the environment where there is no TPU.
        ({"TPU_WORKER_HOSTNAMES": "WARNING: could not, please"}, False, None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
        ({}, True, "TPU VM"),
    ],
)  # fmt: skip
def test_which_cluster_has_started_several(env, tpu, found, monkeypatch):
    answers(monkeypatch, **{"worker-network-endpoints": "u:1:10.0.0.1,u:2:10.0.0.2"})
    assert detect(env, tpu=tpu) == found


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({}, None),
        ({"worker-network-endpoints": "unused:1:10.0.0.1"}, None),
        ({"tpu-env": "ZONE: 'a'\nMEGASCALE_NUM_SLICES: '2'\n"}, "TPU VM"),
        ({"tpu-env": "MEGASCALE_NUM_SLICES: '1'\n"}, None),
    ],
)
def test_what_the_metadata_of_a_tpu_vm_say(metadata, found, monkeypatch):
    answers(monkeypatch, **metadata)
    assert detect({}, tpu=True) == found


def test_without_a_tpu_no_metadata_server_is_asked(monkeypatch):
    def asked(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("urllib.request.urlopen", asked)
    assert detect({}, tpu=False) is None


def test_a_silent_metadata_server_means_a_single_process(monkeypatch):
    def silent(request, timeout):
        assert timeout <= 5
        raise urllib.error.URLError("timed out")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    assert detect({}, tpu=True) is None


def test_slurm_s_only_task_of_a_node_has_all_its_gpus():
    env = {**SLURM, "SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    place = find_place({}, env, tpu=False)
    assert place is not None and place.local_devices == (0, 1, 2, 3)
    env["SLURM_STEP_TASKS_PER_NODE"] = "4(x2)"
    place = find_place({}, env, tpu=False)
    assert place is not None and place.local_devices is None


# --- Agreeing -------------------------------------------------------------------------


def test_who_differs_in_what():
    same = {"device kind": "TPU v3", "batch": 64}
    told = [same, same, {**same, "device kind": "TPU v4"}, same]
    assert disagreements(told) == [
        "process 2: device kind 'TPU v4', process 0: 'TPU v3'"
    ]
    told += [{**same, "batch": 32}, {**same, "batch": 32}, {"batch": 16}]
    assert disagreements(told) == [
        "process 2: device kind 'TPU v4', process 0: 'TPU v3'",
        "process 6: device kind None, process 0: 'TPU v3'",
        "processes 4-5: batch 32, process 0: 64",
        "process 6: batch 16, process 0: 64",
    ]
    assert disagreements([same] * 3) == []
    assert disagreements([{}, *[same] * 2]) == [
        "processes 1-2: device kind 'TPU v3', process 0: None",
        "processes 1-2: batch 64, process 0: None",
    ]


def test_the_code_is_known_by_its_source(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(connect, "__file__", str(tmp_path / "connect.py"))
    before = code_facts()
    assert code_facts() == before
    (tmp_path / "a.py").write_text("x = 2\n")
    assert code_facts() != before


# --- A single process -----------------------------------------------------------------


def test_alone_nothing_waits(tmp_path):
    distributed.agree({"anything": object()})
    assert distributed.from_first(np.pi) == np.pi
    distributed.on_first(lambda: (tmp_path / "done").touch())
    distributed.check_shared(tmp_path / "there is none")
    assert distributed.see(tmp_path / "done").exists()
    distributed.finish()


def test_a_path_that_does_not_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "VISIBLE", 0)
    with pytest.raises(InputError, match="must be shared"):
        distributed.see(tmp_path / "nowhere")
