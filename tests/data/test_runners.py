"""The same plan on one thread, on two, and on a Ray cluster of this machine: the same documents, whole or none."""

import json
import subprocess
import sys

import pytest

from experiments import runner
from tests.data import made_up

PROGRAM = """
import json, os, signal, sys, threading, time
from pathlib import Path

import daft
from daft import col, lit

from llm_jax.config import from_config_dict
from llm_jax.data import factory, prepare
from llm_jax.data.prepare import PrepareConfig
from llm_jax.data.stages import Result
from llm_jax.evaluation.sentence_bits import TRANSFORMERS
from tests.data import corpora


class Slow(corpora.Shout):
    '''Takes seconds, in which the first process of Ray's that works on it is killed.'''

    def apply(self, documents, scratch):
        began = Path(sys.argv[1], "began")

        @daft.func.batch(return_dtype=daft.DataType.string(), batch_size=8)
        def slow(texts):
            if not began.exists():
                mine = began.with_suffix(f".{os.getpid()}_{threading.get_ident()}")  # others may begin meanwhile
                mine.write_text(str(os.getpid()))
                mine.replace(began)
            time.sleep(0.2)
            return texts

        threading.Thread(target=kill, args=[began], daemon=True).start()
        return Result(documents.with_columns({"text": slow(col("text")), "dropped": lit(None)}), {})


def kill(began):
    while not began.exists():
        time.sleep(0.1)
    if int(began.read_text()) != os.getpid():
        os.kill(int(began.read_text()), signal.SIGKILL)
        began.with_name("killed").touch()


folder, stages = Path(sys.argv[1]), sys.argv[3]
config = from_config_dict(PrepareConfig, json.loads(sys.argv[2]))
chosen = {"short": lambda: [corpora.Short(), corpora.Shout()], "killed": lambda: [corpora.Short(), Slow()],
          "real": lambda: prepare.stages(config, TRANSFORMERS)}[stages]()
rows = corpora.with_faults() if stages == "real" else corpora.documents(400)
corpus = factory.run(config, folder, chosen, corpora.reader(rows, files=4))
held = corpora.held(corpus.documents)
counts = {report["name"]: [report[key] for key in ("documents", "bytes", "dropped", "composition")]
          for report in corpus.reports}
print(json.dumps({"documents": sorted(map(str, held)), "counts": counts}))
"""


def run(folder, stages, **config):
    command = [sys.executable, "-c", PROGRAM, str(folder), json.dumps(config), stages]
    done = subprocess.run(command, cwd=runner.REPOSITORY, capture_output=True, text=True, check=False)
    tracebacks = [path.read_text() for path in folder.glob("stages/*/error.txt")]
    assert done.returncode == 0, "\n".join([*tracebacks, done.stderr])
    return json.loads(done.stdout.splitlines()[-1])


def test_one_thread_and_two_give_the_same(tmp_path):
    one, two = (run(tmp_path / str(workers), "short", workers=workers) for workers in (1, 2))
    assert len(one["documents"]) > 300
    assert one == two


@pytest.mark.slow
def test_all_stages_give_the_same_on_one_worker_and_two_in_one_process_and_on_ray(tmp_path):
    (tmp_path / "plants.jsonl").write_text("".join(json.dumps({"text": item}) + "\n" for item in made_up.items(20)))
    settings = {
        "contamination": {"sets": [], "paths": [str(tmp_path / "plants.jsonl")]},
        "lines": {"documents": 4},
        "quality": {"reference": ["prose"], "sample_bytes": 40_000},
    }
    native = run(tmp_path / "native_1", "real", workers=1, **settings)
    busy = {name for name, (_, size, dropped, _) in native["counts"].items() if dropped or size["in"] != size["kept"]}
    passive = {"read", "language", "mixture"}
    assert busy == set(native["counts"]) - passive and busy >= {"extract", "exact", "quality", "semantic", "personal"}
    assert run(tmp_path / "native_2", "real", workers=2, **settings) == native
    for workers in (1, 2):
        assert run(tmp_path / f"ray_{workers}", "real", runner="ray", workers=workers, **settings) == native


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(tmp_path):
    killed = run(tmp_path / "killed", "killed", runner="ray", workers=2)
    assert (tmp_path / "killed" / "killed").exists()
    assert killed["documents"] == run(tmp_path / "native", "killed")["documents"]


def test_a_cluster_that_is_not_there_is_one_line(tmp_path):
    code = (
        "from llm_jax.data import runners; from llm_jax.data.prepare import PrepareConfig\n"
        "runners.start(PrepareConfig(runner='ray', ray_address='127.0.0.1:1'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=runner.REPOSITORY, capture_output=True, text=True, check=False
    )
    assert "no Ray cluster on 127.0.0.1:1" in done.stderr.splitlines()[-1]
