"""Processes meet, or are told by name what is wrong: threads stand for them, with real connections."""

import json
import socket
import threading
import time

import pytest

from llm_jax.errors import UserError
from llm_jax.parallel import job as jobs
from llm_jax.parallel import meeting
from llm_jax.parallel.meeting import Member


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def meet(count, absent=(), changes=None, clocks=None, seconds=1.0):
    """What every present process gets: members or the error's text. `changes[i]` are fields of process i."""
    port, results = free_port(), {}

    def one(i):
        member = Member(
            **(
                {"index": i, "count": count, "host": f"n{i + 1}", "pid": 100 + i, "versions": {"jax": "1"}}
                | (changes or {}).get(i, {})
            )
        )
        job = jobs.Job("a test", min(i, count - 1) if i else 0, count, f"127.0.0.1:{port}")
        try:
            results[i] = meeting.meet(job, member, seconds, lambda: time.time() + (clocks or {}).get(i, 0.0))
        except UserError as error:
            results[i] = str(error)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count) if i not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_all_learn_of_all():
    results = meet(5, seconds=20)
    assert [(member.index, member.host, member.pid) for member in results[3]] == [
        (i, f"n{i + 1}", 100 + i) for i in range(5)
    ]
    assert all(result == results[0] for result in results.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"absent": (1, 3)}, "processes 1, 3 of 4 did not come within 1 s; those that came: 0 (n1), 2 (n3)"),
        (
            {"changes": {2: {"versions": {"jax": "2"}}}},
            "process 2 on n3 has jax 2, process 0 on n1 has 1: use the same",
        ),
        ({"changes": {2: {"versions": {}}}}, "process 2 on n3 has jax None, process 0 on n1 has 1: use the same"),
        ({"clocks": {3: 100.0}}, "the clock of process 3 on n4 is 100 s ahead of that of process 0 on n1"),
        ({"clocks": {1: -7.0}}, "the clock of process 1 on n2 is 7 s behind that of process 0 on n1"),
        ({"changes": {3: {"index": 1, "host": "n2"}}, "absent": (2,)}, "were both started as process 1"),
        (
            {"changes": {1: {"count": 3}}},
            "process 1 on n2 was started as one of 3 processes, process 0 on n1 as one of 4",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_to_all_who_came(arguments, message):
    start = time.monotonic()
    results = meet(4, **arguments)
    assert time.monotonic() - start < 15
    assert len(results) == 4 - len(arguments.get("absent", ()))
    assert message in results[0]
    told = [result for result in results.values() if result == results[0]]
    assert len(told) >= 2  # a process that the complaint came before finds process 0 gone


def test_a_small_difference_of_clocks_is_none():
    assert len(meet(3, clocks={1: 3.0, 2: -3.0}, seconds=20)[2]) == 3


def test_without_process_0_the_others_give_up():
    start = time.monotonic()
    assert "process 1 on n2 did not reach process 0 at 127.0.0.1:" in meet(2, absent=(0,))[1]
    assert time.monotonic() - start < 10


def test_strangers_at_the_port_are_ignored():
    port, results = free_port(), []
    members = [Member(i, 2, f"n{i}", i, {}) for i in range(2)]

    def one(i):
        results.append(meeting.meet(jobs.Job("a test", i, 2, f"127.0.0.1:{port}"), members[i], 20.0))

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    threads[0].start()
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"", json.dumps({"index": 1}).encode() + b"\n"):
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(garbage)
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert results == [tuple(members)] * 2


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"process 0 on n1 cannot listen at port {port} \(Address already in use\)"
        ):
            meeting.meet(jobs.Job("a test", 0, 2, f"localhost:{port}"), Member(0, 2, "n1", 1, {}), 1.0)


SLURM = {
    "SLURM_JOB_ID": "4100", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
URI = {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911"}
OWN = {jobs.COORDINATOR: "n1:7000", jobs.COUNT: "2", jobs.INDEX: "1"}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2", "TPU_WORKER_ID": "2"}


@pytest.mark.parametrize(
    ("environment", "want"),
    [
        (SLURM, jobs.Job("Slurm", 5, 8, "localhost:61444", 1, 4)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, jobs.Job("Slurm", 5, 8, "localhost:61444", 1, 1)),
        (SLURM | {jobs.COORDINATOR: "n7:99"}, jobs.Job("Slurm", 5, 8, "n7:99", 1, 4)),
        (SLURM | OWN, jobs.Job("JAX's variables", 1, 2, "n1:7000")),
        (MPI | URI, jobs.Job("Open MPI", 3, 4, "10.96.0.1:62880", 1, 2)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0", jobs.COORDINATOR: "n1:99"}, jobs.Job("MPI", 0, 2, "n1:99")),
        (TPU, jobs.Job("the TPU slice", 2, 3, "t0:8476")),
        (TPU | {"MEGASCALE_NUM_SLICES": "2"}, jobs.Job("the TPU slice", 2, 3, "")),
        ({}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0", "TPU_WORKER_ID": "0"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # the sbatch script itself
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
    ],
    ids=str,
)
def test_whoever_started_the_processes_is_understood(environment, want):
    assert jobs.find(environment) == want


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (MPI, "Open MPI does not say where process 0 is: set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        ({jobs.COORDINATOR: "n1:7000"}, "JAX_COORDINATOR_ADDRESS is set, but neither JAX_NUM_PROCESSES"),
        (OWN | {jobs.INDEX: "2"}, "JAX_PROCESS_ID=2 is not one of the 2 processes"),
        ({jobs.COUNT: "2"}, "JAX_NUM_PROCESSES tells of 2 processes, but JAX_PROCESS_ID is not set"),
        (OWN | {jobs.COUNT: "two"}, "JAX_NUM_PROCESSES='two' is not a number"),
    ],
    ids=str,
)
def test_variables_that_contradict_are_refused(environment, message):
    with pytest.raises(UserError, match=message):
        jobs.find(environment)


def test_the_first_of_slurms_hosts():
    lists = ("n1", "n1,n2", "n[1-4,7]", "n[01,3]", "gpu-a[007-015],b2")
    assert [jobs.first_host(hosts) for hosts in lists] == ["n1", "n1", "n1", "n01", "gpu-a007"]


def test_devices_of_a_process():
    assert jobs.Job("Slurm", 5, 8, "", 1, 4).local_devices() == [1]
    assert jobs.Job("Slurm", 5, 8, "", 0, 1).local_devices() is None
