"""The benchmark of fine-tuning: the rows that the other library takes, the ratios, and what it refuses."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import fine_tuning
from benchmarks.peers import fine_tuning_data, serve
from llm_jax.alignment import sft
from llm_jax.alignment.config import RewardDataConfig
from llm_jax.alignment.reward_batch import EncodedPair, PackedPairs
from llm_jax.alignment.sft import Sample
from llm_jax.data.batch import Batch


def test_rows_of_conversations_have_labels_where_their_tokens_stand():
    def sample(tokens, labels):
        weights = [float(label >= 0) for label in labels]
        return Sample(np.array(tokens), np.array(labels).clip(0), np.array(weights, np.float32))

    rows = [
        [sample([5, 6, 7], [-1, -1, 7]), sample([8, 9], [-1, 3])],
        [sample([4, 4, 4, 4, 4, 2], [-1, 4, 4, -1, -1, 2])],
    ]
    batch = Batch(*map(np.stack, zip(*(sft.row(row, 6) for row in rows))))
    expected = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, 3], "seq_lengths": [3, 2]},
        {"input_ids": [4, 4, 4, 4, 4, 2], "labels": [-100, 4, 4, -100, -100, 2], "seq_lengths": [6]},
    ]
    assert list(fine_tuning_data.sft_rows(batch)) == expected


def test_rows_of_pairs_are_the_pairs():
    lengths = [(1, 2), (4, 3), (2, 2), (3, 1), (2, 5)]
    none = np.zeros(2, np.float32)
    pairs = [
        EncodedPair(np.arange(chosen) + 10 * i, np.arange(rejected) + 10 * i + 5, np.array(1), none, none)
        for i, (chosen, rejected) in enumerate(lengths, start=1)
    ]
    packed = PackedPairs({"some": pairs}, RewardDataConfig(sequence_length=8, batch_size=1))
    rows = [row for step in range(packed.rows_per_epoch) for row in fine_tuning_data.pair_rows(packed.batch(step))]
    expected = [{"chosen_ids": pair.chosen.tolist(), "rejected_ids": pair.rejected.tolist()} for pair in pairs]
    assert sorted(rows, key=str) == sorted(expected, key=str)


def test_groups_are_of_similar_length_and_any_few_of_them_of_all_lengths():
    lengths = np.random.default_rng(0).permutation(640) + 1
    rows = [{"ids": [0] * length} for length in lengths]
    grouped = fine_tuning_data.grouped(rows, 10)
    found = np.array([len(row["ids"]) for row in grouped]).reshape(64, 10)
    assert sorted(found.ravel()) == sorted(lengths)
    assert np.all(found.max(axis=1) - found.min(axis=1) == 9)
    for start in range(0, 64, 8):
        assert found[start : start + 8].mean() == pytest.approx(320.5, rel=0.15)


def peer(name, rates, loss=1.0, done=7.0):
    about = {"first_loss": loss, "first_done": done}
    return SimpleNamespace(name=name, problem="", about=about, rounds=[{"rate": rate} for rate in rates])


def test_the_speed_is_over_the_fastest_of_each_round():
    ours, others = peer("ours", [10, 12, 30]), [peer("a", [5, 3, 1]), peer("b", [1, 6, 2])]
    assert fine_tuning.ratios(ours, others) == {"median": 2.0, "least": 2.0, "most": 15.0}
    others[1].problem = "did not start"
    assert fine_tuning.ratios(ours, others) == {"median": 4.0, "least": 2.0, "most": 30.0}
    assert fine_tuning.ratios(ours, others[1:]) is None


def test_implementations_that_do_other_work_end_the_benchmark():
    peers = {"ours": peer("ours", []), "trl_padded": peer("trl_padded", [], loss=1.00001)}
    fine_tuning.check_same("reward", peers)
    for other in (peer("trl_padded", [], loss=1.001), peer("trl_padded", [], done=8.0)):
        with pytest.raises(SystemExit, match="ours and trl_padded do not do the same work"):
            fine_tuning.check_same("reward", peers | {"trl_padded": other})


def test_without_the_other_library_one_line_says_what_to_install(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'trl'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(SystemExit) as raised:
        fine_tuning.main([f"--trl_python={python}"])
    line = str(raised.value)
    assert "\n" not in line and "has no TRL" in line and "pip install -e '.[bench]'" in line


def test_a_served_rate_is_of_what_was_done_in_the_turn(monkeypatch, capsys):
    clock, done = iter(range(0, 100, 5)), iter([3, 10, 50])  # after the first step, before the turn, after it
    monkeypatch.setattr(serve.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(serve.sys, "stdin", io.StringIO("2\n"))
    serve.serve(lambda: 1.5, lambda: next(done), library="a library")
    about, turn = map(json.loads, capsys.readouterr().out.splitlines())
    assert about == {"first_loss": 1.5, "first_done": 3, "library": "a library"}
    assert turn["rate"] == (50 - 10) / 10 and turn["seconds"] == 5


def test_rounds_in_which_others_were_busy_are_left_out():
    ours, other = peer("ours", [1, 2, 3]), peer("other", [4, 5, 6])
    for found, shares in ((ours, (0.01, 0.2, 0.0)), (other, (0.02, 0.0, 0.05))):
        for turn, share in zip(found.rounds, shares):
            turn["busy_elsewhere"] = share
    fine_tuning.keep_quiet([ours, other], 0.05)
    assert [turn["rate"] for turn in ours.rounds] == [1, 3] and [turn["rate"] for turn in other.rounds] == [4, 6]
    with pytest.raises(SystemExit, match="more than 0% of the machine in every round"):
        fine_tuning.keep_quiet([ours, other], 0.0)
