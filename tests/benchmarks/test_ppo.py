"""The benchmark of PPO: the iteration that both sides do, the ratios and shares, and what it refuses."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import ppo
from benchmarks.peers import ours_ppo, ppo_setting, serve
from llm_jax.alignment.rewards import Response
from llm_jax.models import decoder


def peer(name, seconds=(), entropy=4.0, done=ppo_setting.LEARNED, **parts):
    rounds = [
        {"seconds": value, "processor_seconds": 2 * value, "busy_elsewhere": 0.0}
        | {f"seconds_{part}": share * value for part, share in parts.items()}
        for value in seconds
    ]
    about = {"first_loss": entropy, "first_done": done}

    def median(key):
        return float(np.median([turn[key] for turn in rounds]))

    return SimpleNamespace(name=name, problem="", about=about, rounds=rounds, median=median)


def test_the_model_is_of_the_size_that_is_said():
    assert round(decoder.count_parameters(ours_ppo.architecture()) / 1e6, 1) == 1.9


def test_an_iteration_learns_from_every_token_in_every_epoch_and_no_response_ends():
    run = ours_ppo.build()
    state, values = run.iterate(run.first())
    updates = ppo_setting.EPOCHS * ppo_setting.SHAPE.batch // ppo_setting.MINIBATCH
    assert int(state.policy.step) == int(state.critic.step) == updates
    assert values["tokens"] == ppo_setting.SHAPE.new_tokens and values["end_rate"] == 0
    assert updates * ppo_setting.MINIBATCH * values["tokens"] == ppo_setting.LEARNED
    assert values["kl"] == 0 and 0 < values["score"] < 1


def test_the_reward_is_the_share_of_tokens_in_the_lower_half():
    middle = ppo_setting.SHAPE.vocabulary // 2
    texts = [ours_ppo.Characters().decode(ids) for ids in ([0, middle - 1, middle, 2 * middle - 1], [middle], [3])]
    found = ours_ppo.reward([()] * 3, [Response(text) for text in texts])
    assert found.tolist() == [0.5, 0.0, 1.0] and found.dtype == np.float32


def test_ratios_are_within_rounds():
    ours, other = peer("ours", [1.0, 2.0, 4.0]), peer("trl", [4.0, 6.0, 8.0])
    expected = {"median": 3.0, "least": 2.0, "most": 4.0}
    assert ppo.times_faster(ours, other, "seconds") == expected
    other.problem = "did not start"
    assert ppo.times_faster(ours, other, "seconds") is None and ppo.times_faster(ours, None, "seconds") is None


def test_a_line_has_the_shares_of_the_parts():
    ours = peer("ours", [1.0, 3.0], rollout=0.2, score=0.1, update=0.5)
    line = ppo.report(ours, {"ours": ours, "tunix": peer("tunix", [2.0, 9.0])})
    assert [line[f"share_{part}"] for part in ours_ppo.PARTS] == [0.25, 0.125, 0.625]
    assert line["learned_tokens"] == ppo_setting.LEARNED and line["median_ms"] == 2000
    assert line["speed_over_trl"] is None
    assert line["speed_over_tunix"] == {"median": 2.5, "least": 2.0, "most": 3.0}


def test_implementations_that_do_other_work_end_the_benchmark():
    gemm, ours = peer("gemm", entropy=1.0, done=None), peer("ours")
    ppo.check_same({"gemm": gemm, "ours": ours, "trl": peer("trl", entropy=4.01)})
    with pytest.raises(SystemExit, match="ours and trl do not draw alike"):
        ppo.check_same({"gemm": gemm, "ours": ours, "trl": peer("trl", entropy=4.1)})
    with pytest.raises(SystemExit, match=f"trl learned from 100 tokens, not {ppo_setting.LEARNED}"):
        ppo.check_same({"gemm": gemm, "ours": ours, "trl": peer("trl", done=100)})


def test_parts_are_served_as_means_of_the_turn(monkeypatch, capsys):
    spent = iter([{"rollout": 3.0}, {"rollout": 10.0}])
    monkeypatch.setattr(serve.sys, "stdin", io.StringIO("2\n"))
    serve.serve(lambda: 1.5, None, lambda: next(spent))
    turn = json.loads(capsys.readouterr().out.splitlines()[1])
    assert turn["seconds_rollout"] == (10 - 3) / 2
