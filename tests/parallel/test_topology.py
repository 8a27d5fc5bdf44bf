"""Processes numbered along the network, and what is said of a file that does not state it."""

import itertools
import os
import random
import socket
import subprocess
import sys

import pytest

from llm_jax.errors import UserError
from llm_jax.parallel import topology

FILE = """# host switch pod
n1 s1 p1
n2 s1 p1
n3 s2 p1   # a new one

n4 s2 p1
n5 s3 p2
n6 s3 p2
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "network"
    path.write_text(FILE)
    return path


def test_neighbours_in_the_network_become_neighbours_in_number(path):
    """Of every order of hosts with two processes each: each switch and pod is one run of numbers, and 0 stays 0."""
    places = topology.read(path)
    for seed in range(200):
        hosts = [host for host in places for _ in range(2)]
        random.Random(seed).shuffle(hosts)
        numbers = topology.number(hosts, places, path)
        assert sorted(numbers) == list(range(12)) and numbers[0] == 0
        order = [hosts[numbers.index(i)] for i in range(12)]
        for level in (lambda host: host, lambda host: places[host].switch, lambda host: places[host].pod):
            runs = [name for name, _ in itertools.groupby(order, level)]
            assert len(runs) == len(set(runs))


def test_the_launchers_order_stays_where_the_network_allows(path):
    places = topology.read(path)
    assert topology.number(["n2", "n1", "n3", "n6"], places, path) == [0, 1, 2, 3]
    # n3 shares nothing with n2 and n5 but the pod of n2; the two processes of a host keep their order.
    assert topology.number(["n2", "n5", "n3", "n2", "n5"], places, path) == [0, 3, 2, 1, 4]


def test_a_job_is_numbered_so(path):
    """Three real processes, on hosts of which the first and the last share a switch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    program = (
        "from llm_jax.parallel import distributed\n"
        "distributed.initialize(200)\n"
        "import jax\n"
        "print(distributed.name_of(jax.process_index()).split(' (')[0])"
    )

    def start(process, host):
        variables = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": str(process)}
        variables |= {"JAX_PLATFORMS": "cpu", "LLM_JAX_HOST": host, "LLM_JAX_TOPOLOGY": str(path)}
        return subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True
        )

    processes = [start(process, host) for process, host in enumerate(("n1", "n5", "n2"))]
    try:
        lines = [process.communicate(timeout=250)[0].splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert lines == ["process 0 on n1", "process 2 on n5", "process 1 on n2"]


def test_hosts_that_the_file_does_not_have_are_named(path):
    with pytest.raises(UserError, match=r"network has no line `host switch pod` for n7, n9: add it"):
        topology.number(["n1", "n9", "n7", "n9"], topology.read(path), path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n1 s1 p1\nn2 s1\n", "line 2: 'n2 s1' is not `host switch pod`"),
        ("n1 s1 p1\n\nn1 s2 p1\n", "line 3: host 'n1' has a line already"),
    ],
)
def test_a_line_that_says_something_else_is_named(tmp_path, text, message):
    (tmp_path / "network").write_text(text)
    with pytest.raises(UserError, match=message):
        topology.read(tmp_path / "network")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"topology file .*absent cannot be read: No such file"):
        topology.read(tmp_path / "absent")
