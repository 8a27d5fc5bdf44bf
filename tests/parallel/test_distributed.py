"""Two real processes: waiting, a damaged checkpoint, a failure that ends both, and rows of a batch that take turns."""

import json

from llm_jax.config import ModelConfig, save
from tests.processes import run_together


def test_two_processes(tmp_path):
    save(ModelConfig(), tmp_path / "config.json")
    arguments = ["-m", "tests.parallel.joined", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run"]
    (tmp_path / "run").mkdir()
    errors = run_together(arguments, status=1)
    told = [[json.loads(line) for line in error.splitlines() if line.startswith("{")] for error in errors]
    for process, lines in enumerate(told):
        assert [line["process"] for line in lines] == [process] * 3
        assert lines[0]["said"] == ["I am 0", "I am 1"]
        assert (lines[2]["step"], lines[2]["damaged"]) == (1, ["2"])
    assert told[0][1]["waited"].startswith("the processes did not all come to 'nobody': waited 1 s for process 1 on ")
    ends = [[line for line in error.splitlines() if line.startswith("error: ")] for error in errors]
    assert len(ends[0]) == 1 and ends[0][0].startswith("error: process 1 on ")
    assert ends[0][0].endswith("failed: something is wrong here")
    assert ends[1] == ["error: something is wrong here"]


ROWS = """
import jax, numpy as np
from llm_jax.config import MeshConfig
from llm_jax.parallel import distributed, mesh as mesh_lib, shares
from llm_jax.training.loop import place
distributed.initialize(60)
mesh_lib._along_hosts = lambda device: (device.id % 1024 // 2, device.process_index, device.id)
mesh = mesh_lib.build(MeshConfig(replica=2, tensor=2))
assert not mesh_lib.follows_processes(mesh)
owners = [group[0].process_index for group in mesh.devices.reshape(-1, 2)]
assert owners == [0, 1, 0, 1], owners
whole = {"tokens": np.arange(24).reshape(8, 3), "ends": np.arange(8)}
own = shares.own_rows(whole, mesh)
assert own["ends"].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]][jax.process_index()]
placed = place(own, mesh)
jax.tree.map(np.testing.assert_array_equal, shares.all_rows(placed), whole)
assert shares.all_rows(np.array([[7, jax.process_index()]])).tolist() == [[7, 0], [7, 1]]
local = mesh_lib.of_this_process(mesh)
assert dict(local.shape) == {"replica": 1, "data": 2, "tensor": 2}
assert sorted(device.id for device in local.devices.flat) == [device.id for device in jax.local_devices()]
"""


TALK = """
import os, sys, traceback
import jax, pytest
from llm_jax.alignment import rollout
from llm_jax.errors import UserError
from llm_jax.parallel import distributed, shares
from llm_jax.training import checkpoint
from llm_jax.training.loop import AGREE_EVERY, StopSignal
from tests.alignment.test_rollout import differing
sys.excepthook = lambda *error: (traceback.print_exception(*error), os._exit(1))  # without a wait for the other
distributed.initialize(60)
index = jax.process_index()
assert [each["from"] for each in shares.gather({"long": "x" * 10**6, "from": index})] == [0, 1]
for count in range(3):
    assert shares.gather(index + count) == [count, count + 1]
distributed.wait_for_all("said")
kept = {key.rpartition("/")[0] for key, _ in distributed._client().key_value_dir_get("llm_jax/shares/")}
assert min(kept) == "llm_jax/shares/3", kept  # the other one may have gone on
stop = StopSignal()
answers = []
for call in range(3 * AGREE_EVERY):
    stop.requested = stop.requested or (index == 1 and call == 2)
    answers.append(stop.agreed())
assert [call for call, answer in enumerate(answers) if answer] == [AGREE_EVERY, 2 * AGREE_EVERY], answers
def read():
    if index == 1:
        raise OSError(5, "Input/output error")
with pytest.raises(UserError, match="process 1 .*Input/output error.*start again") as found:
    checkpoint._together("folder", read)
assert not isinstance(found.value, checkpoint.DamagedError)
rollouts, logprobs_BT = differing(0.5 if index else 0.0)
with pytest.raises(UserError, match="process 1 on .*0.5 apart"):
    rollout.check_logprobs(rollouts, logprobs_BT, tolerance=0.1)
assert rollout.check_logprobs(rollouts, logprobs_BT) == pytest.approx(0.5)
"""


def test_what_one_process_finds_all_processes_do():
    """Stopping, an error of reading that is no damage, and responses that another model has drawn."""
    run_together(["-c", TALK])


def test_rows_of_processes_whose_devices_take_turns():
    run_together(["-c", ROWS])
