"""The supervisor against everything that can happen to a run; a counter stands for the training, and one real one."""

import dataclasses
import json
import signal
import subprocess
import time
import types
from pathlib import Path

import pytest

from llm_jax.config import CheckpointConfig, save
from llm_jax.errors import UserError
from llm_jax.parallel.elastic import CHANGED, FAULT, FINISHED, REQUEUE, STOPPED, Supervisor
from llm_jax.parallel.elastic_config import ElasticConfig
from llm_jax.parallel.hosts import Hosts
from llm_jax.parallel.member import HUNG, environment
from llm_jax.parallel.supervision import Assignment, Beat
from tests.experiments.test_pretrain import dataset, make_config  # noqa: F401  (a fixture)
from tests.parallel import fault_injection
from tests.parallel.fault_injection import FREEZE, KILL, LOSE, supervised


def counter(folder, steps=100, seconds=0.06, *failure):
    return ["python", "-m", "tests.parallel.fake_training", str(folder), str(steps), str(seconds), *failure]


def is_alive(pid):
    """Whether a process runs; one that has ended may wait for its parent to notice."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_finished_without_faults(tmp_path):
    with supervised(counter(tmp_path, 5), tmp_path, 3) as run:
        printed = run.finish(60)
    status = run.status()
    assert (status["state"], status["step"], status["rounds"], status["faults"]) == ("finished", 5, 1, [])
    assert "start 1 with 3 processes on n1, n2, n3" in printed and "finished at step 5, after 0 faults" in printed
    assert "step 5 of 3 processes" in (run.workdir / "elastic/logs/n1.log").read_text()
    assert "<h1>finished: step 5, 3 processes</h1>" in (run.workdir / "elastic/status.html").read_text()


def test_killed_frozen_and_lost(tmp_path):
    """A killed process starts again where it was; a frozen or lost host is left out until the list is written anew."""
    flags = "--config.frozen_seconds=6.0", "--config.sizes=(4,3,2)"  # a busy machine may not let one run for seconds
    with supervised(counter(tmp_path, 10_000), tmp_path, 4, *flags) as run:
        for count, (kind, index) in enumerate(((KILL, 1), (FREEZE, 2), (LOSE, 0)), 1):
            run.wait_for_steps(3)
            victim = run.pid(index)
            run.harm(kind, index)
            run.wait_for_faults(count)
            run.wait_for(lambda status: status["state"] == "running")
            assert not is_alive(victim)
        run.wait_for_steps(3)
        assert run.status()["hosts"] == ["n2", "n4"]
        run.list_hosts()
        run.wait_for(lambda status: status["hosts"] == ["n1", "n2", "n3", "n4"] and status["state"] == "running")
        run.process.terminate()
        assert "stopped at step" in run.finish(60)
    faults = run.status()["faults"]
    assert [fault["what"] for fault in faults] == ["process killed", "process frozen", "host lost"]
    assert [fault["host"] for fault in faults] == ["n2", "n3", "n1"]
    assert [(fault["processes"], fault["processes_after"]) for fault in faults] == [(4, 4), (4, 3), (3, 2)]
    assert all(0 <= fault["lost_steps"] <= 30 and fault["downtime_seconds"] > 0 for fault in faults)
    assert faults[1]["downtime_seconds"] > 6.0


def test_hosts_that_come_and_go_are_no_faults(tmp_path):
    with supervised(counter(tmp_path, 10_000), tmp_path, 3) as run:
        run.wait_for_steps(2)
        run.list_hosts(1)
        run.wait_for(lambda status: status["hosts"] == ["n1"] and status["state"] == "running")
        run.list_hosts(2)
        run.wait_for(lambda status: status["hosts"] == ["n1", "n2"] and status["state"] == "running")
        run.process.send_signal(signal.SIGUSR1)
        assert "requeue at step" in run.finish(60)
    assert run.status()["faults"] == []


def test_the_same_failure_again_and_again_is_final(tmp_path):
    with supervised(counter(tmp_path, 100, 0.06, "no such data"), tmp_path, 2, "--config.retries=2") as run:
        printed = run.finish(60, status=1)
    assert printed.endswith("error: n1: process failed, 2 times without a new step: error: no such data\n") or (
        printed.endswith("error: n2: process failed, 2 times without a new step: error: no such data\n")
    )
    assert run.status()["state"].startswith("failed: ")
    assert len(run.status()["faults"]) > 2  # the first made steps


def test_a_host_gets_what_concerns_the_accelerator_and_the_job(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "another job's")
    monkeypatch.setenv("SECRET", "the supervisor's own")
    own = Assignment(round=0, process=1, processes=2, most_processes=2, beats="", copies="", rescued="", copy_every=1)
    found = environment("n2", "n1:6000", own)
    assert (found["XLA_FLAGS"], found["JAX_COORDINATOR_ADDRESS"]) == ("--xla_cpu_enable_fast_math=false", "n1:6000")
    assert "SECRET" not in found


class Standing:
    """A member whose process lives and takes no step."""

    def __init__(self, step):
        self.beat = Beat(count=1, step=step)
        self.looks = 0

    def look(self):
        self.looks += 1
        assert self.looks < 50, "the supervisor waits for ever"

    def fault(self, start_seconds, frozen_seconds):
        return ""

    def has_ended_well(self):
        return False


@pytest.mark.parametrize("steps", [(-1, -1), (4, 3)], ids=["restoring", "training"])
def test_without_a_step_the_member_that_is_least_far_is_at_fault(tmp_path, steps):
    """Also where none has restored its state yet."""
    (tmp_path / "hosts").write_text("n1 n2")
    config = ElasticConfig(hosts=str(tmp_path / "hosts"), hung_seconds=0.3)
    hung = [Standing(step) for step in steps]
    outcome, culprit, what = Supervisor(config, ["train"], tmp_path)._watch(hung, ["n1", "n2"])
    assert (outcome, what) == (FAULT, HUNG)
    assert culprit is hung[steps.index(min(steps))]


def test_processes_do_not_outlive_their_supervisor_which_goes_on_later(tmp_path):
    with supervised(counter(tmp_path, 10_000), tmp_path, 2) as run:
        run.wait_for_steps(2)
        pids = [run.pid(index) for index in range(2)]
        run.process.kill()
        deadline = time.monotonic() + 20
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_alive, pids))
        before = run.status()
    with supervised(counter(tmp_path, before["step"] + 20), tmp_path, 2) as run:
        run.finish(60)
    assert (run.status()["run_id"], run.status()["rounds"]) == (before["run_id"], before["rounds"] + 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hosts": "nowhere"}, "the list of hosts nowhere cannot be read: No such file"),
        ({}, "name the hosts: --config.hosts=FILE, --config.processes=N for this machine, or run in sbatch"),
    ],
)
def test_no_hosts(config, message, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(UserError, match=message):
        Hosts(ElasticConfig(**config))


def test_teams_are_of_sizes_that_the_run_divides_over(tmp_path):
    (tmp_path / "hosts").write_text("a b c d e")
    hosts = Hosts(ElasticConfig(hosts=str(tmp_path / "hosts"), sizes=(4, 2)))
    assert hosts.team() == ["a", "b", "c", "d"] and hosts.most() == 4
    hosts.lose("b")
    assert hosts.team() == ["a", "c", "d", "e"]
    hosts.lose("a")
    assert hosts.team() == ["c", "d"]
    hosts.lose("c")
    hosts.lose("d")
    assert hosts.team() == []
    (tmp_path / "hosts").write_text("a b c d e")
    hosts.refresh()
    assert hosts.team() == ["a", "b", "c", "d"]


def test_settings_are_for_the_most_hosts_that_there_were(tmp_path):
    """Also where the list has become shorter, or a supervisor begins with fewer than the one before it."""
    (tmp_path / "hosts").write_text("a b c d")
    config = ElasticConfig(hosts=str(tmp_path / "hosts"))
    supervisor = Supervisor(config, ["true"], tmp_path)
    for member in supervisor._start(["a", "b", "c", "d"]):
        member.let_go()
    supervisor.status.say("four")
    (tmp_path / "hosts").write_text("a b")
    supervisor._hosts.refresh()
    assert supervisor._hosts.team() == ["a", "b"] and supervisor._hosts.most() == 4
    again = Supervisor(config, ["true"], tmp_path)
    assert again._hosts.most() == 2
    for member in again._start(["a", "b"]):
        member.let_go()
    assert again._task("a", 0, ["a", "b"], "").environment["LLM_JAX_ASSIGNMENT"].count('"most_processes": 4') == 1


def test_a_list_that_cannot_be_read_for_a_while_is_kept(tmp_path, monkeypatch, caplog):
    path = tmp_path / "hosts"
    path.write_text("a b")
    hosts = Hosts(ElasticConfig(hosts=str(path)))
    assert f"a process for each line of {path} is started on this machine" in caplog.text
    path.rename(tmp_path / "away")
    for _ in range(3):
        hosts.refresh()
    assert hosts.team() == ["a", "b"]
    assert caplog.text.count("cannot be read: No such file or directory; going on with the hosts known") == 1
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    answers = iter([(0, "n1 alloc\nn2 idle*\n", ""), (1, "", "cannot reach the controller")])
    ask = lambda command, **_: subprocess.CompletedProcess(command, *next(answers))  # noqa: E731
    monkeypatch.setattr(subprocess, "run", ask)
    monkeypatch.setattr("llm_jax.parallel.hosts.SLURM_SECONDS", 0.0)
    slurm = Hosts(ElasticConfig())
    slurm.refresh()
    assert slurm.team() == ["n1", "n2"] and "sinfo does not say how the hosts n[1-2] are: cannot reach" in caplog.text
    monkeypatch.setattr(subprocess, "run", lambda command, **_: (_ for _ in ()).throw(FileNotFoundError("no sinfo")))
    slurm.refresh()
    assert slurm.team() == ["n1", "n2"]


def test_spares_have_time_to_bring_their_copies_and_keep_none(tmp_path, monkeypatch):
    """A slow host is waited for as long as the config says."""
    config = ElasticConfig(processes=2, sizes=(1,), memory=str(tmp_path / "memory"))
    supervisor = Supervisor(config, ["true"], tmp_path)
    team, (spare,) = supervisor._hosts.team(), supervisor._hosts.usable()[1:]
    kept = Path(supervisor._copies(spare), "7.1", "1.npz")
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"a copy")
    monkeypatch.setattr("llm_jax.parallel.elastic.FAREWELL_SECONDS", 0.0)
    supervisor._bring_from_spares(team)
    assert (tmp_path / "elastic/rescued/7.1/1.npz").read_bytes() == b"a copy"
    assert not list((tmp_path / "memory").iterdir())


@pytest.mark.parametrize(("outcome", "orders"), [(FINISHED, 1), (STOPPED, 1), (REQUEUE, 1), (CHANGED, 0), (FAULT, 0)])
def test_copies_go_where_a_checkpoint_has_what_they_have(outcome, orders, tmp_path):
    told = []
    member = types.SimpleNamespace(tell=told.append, let_go=lambda: None, wait=lambda deadline: None)
    Supervisor(ElasticConfig(processes=1), ["true"], tmp_path)._end([member], outcome)
    assert told == ["finish"] * orders


def test_a_real_training_loses_a_host(dataset, tmp_path):  # noqa: F811
    """Two processes, then one: every loss and every row as in an undisturbed run, from the lost host's neighbour."""
    config = make_config(dataset, steps=15, eval_every=0, eval_batches=1, checkpoint=CheckpointConfig(every_steps=1000))
    save(dataclasses.replace(config, microbatches=2), tmp_path / "wanted.json")
    command = fault_injection.training(tmp_path / "wanted.json", tmp_path / "run")
    with supervised(command, tmp_path, 2) as run:
        run.wait_for_steps(4)
        run.harm(LOSE, 1)
        run.finish()
    (fault,) = run.status()["faults"]
    assert (fault["what"], fault["processes_after"], fault["restored_from"]) == ("host lost", 1, "the hosts' copies")
    assert fault["lost_steps"] <= 2
    straight = tmp_path / "straight"
    arguments = fault_injection.training(tmp_path / "wanted.json", straight)[1:]
    fault_injection.run_alone(arguments)
    assert fault_injection.compare(15, run.workdir, straight)["largest_loss_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("faults", "steps"), [(3, 60), (20, 300)])
def test_many_faults_in_one_run(dataset, tmp_path, capsys, faults, steps):  # noqa: F811
    """Four, three, two processes and back to four: every loss and every row are those of an undisturbed run."""
    config = make_config(dataset, steps=steps, eval_every=0, eval_batches=1)
    model = dataclasses.replace(config.model, hidden_size=48, head_dim=12)
    data = dataclasses.replace(config.data, batch_size=24)
    # At ten times this rate 300 steps make 2e-3 of what rounding makes of another number of devices, without a fault.
    slow = dataclasses.replace(config.optimizer, learning_rate=1e-3)
    rare = CheckpointConfig(every_steps=10**6)
    wanted = dataclasses.replace(config, model=model, data=data, optimizer=slow, checkpoint=rare)
    save(wanted, tmp_path / "wanted.json")
    fault_injection.main(tmp_path / "wanted.json", tmp_path / "runs", faults, seed=7)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["faults"] >= faults
    assert summary["largest_loss_difference"] < 1e-5
    assert summary["steps_begun_again"] <= 2 * summary["faults"]
    assert (tmp_path / "runs/overlay.png").stat().st_size > 1000
