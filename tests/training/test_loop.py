"""The loop's promises: a named stop on a non-finite loss, a clean stop on a signal, honest rates."""

import json
import signal

import jax
import jax.numpy as jnp
import pytest

from llm_jax.config import TrainConfig
from llm_jax.errors import UserError
from llm_jax.training import metrics
from llm_jax.training.loop import Profiler, StopSignal, Throughput, check_finite


@pytest.mark.parametrize("bad", [{"loss": jnp.nan}, {"gradient_norm": jnp.inf}, {"parameter_norm": jnp.inf}], ids=str)
def test_non_finite_names_step_and_batch(bad):
    values = {"loss": 1.0, "gradient_norm": 1.0, "parameter_norm": 1.0}
    check_finite(4, {name: jnp.asarray(value) for name, value in values.items()})
    with pytest.raises(UserError, match="at step 4, global batch 3"):
        check_finite(4, {name: jnp.asarray(value) for name, value in (values | bad).items()})


def test_signal_becomes_a_flag_and_the_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_interrupt_interrupts():
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_a_run_stops_who_started_it_and_its_next_run(number):
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as outer:
        with StopSignal() as inner:
            signal.raise_signal(number)
        assert inner.requested and outer.requested
        with StopSignal() as following:
            assert following.requested
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with StopSignal() as later:
        assert not later.requested


def test_throughput_counts_only_since_the_last_reading():
    throughput = Throughput(tokens_per_step=100, flops_per_token=50.0, peak_flops=10_000.0)
    throughput.steps, throughput.seconds = 4, 2.0
    assert throughput.read() == {"tokens_per_second": 200.0, "mfu": 1.0}
    throughput.steps, throughput.seconds = 1, 1.0
    assert throughput.read()["tokens_per_second"] == 100.0
    assert "mfu" not in Throughput(1, 1.0, None).read()


def test_records_after_the_resumed_step_and_cut_lines_are_dropped(tmp_path):
    lines = [json.dumps({"kind": "train", "step": step, "loss": step * 1.0}) for step in (1, 2, 3)]
    lines[1:1] = ["{}", "5", "[]", '{"kind": "train", "step": "x"}']  # edited by hand
    (tmp_path / metrics.FILE).write_text("\n".join(lines) + '\n{"kind": "tr')
    with metrics.Recorder(tmp_path, start_step=2, total_steps=5) as recorder:
        recorder.write("train", 3, {"loss": 9.0})
        recorder.write("heldout", 3, {"loss": 8.0})
    assert [(r["step"], r["loss"]) for r in metrics.read(tmp_path, "train")] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert [r["loss"] for r in metrics.read(tmp_path, "heldout")] == [8.0]
    assert list((tmp_path / "tensorboard").iterdir())


def test_gemm_rate_is_measured():
    assert metrics.gemm_flops(size=256, repeats=3) > 1e8


@pytest.mark.parametrize("first, last", [(0, 6), (3, 6), (5, 6), (2, 3)], ids=str)
def test_profile_starts_and_stops_wherever_a_run_begins_or_ends(tmp_path, monkeypatch, first, last):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    with Profiler(TrainConfig(profile_start=2, profile_steps=2), tmp_path) as profiler:
        for step in range(first, last):
            profiler.at(step)
    assert events == ([] if first >= 4 else ["start", "stop"])


def test_a_trace_is_written(tmp_path):
    with Profiler(TrainConfig(profile_start=0, profile_steps=1), tmp_path) as profiler:
        profiler.at(0)
        jnp.ones(3).block_until_ready()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
