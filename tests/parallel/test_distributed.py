"""Two real processes: waiting with a time limit, a damaged checkpoint, and a failure that ends both."""

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
