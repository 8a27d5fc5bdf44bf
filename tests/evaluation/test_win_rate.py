"""Win rates against counting by hand."""

import numpy as np
import pytest

from llm_jax.errors import UserError
from llm_jax.evaluation import win_rate


def test_wins_and_ties_are_counted_over_all_pairs():
    ours, theirs = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    # First prompt: 1 against 1, 3, 0: half, no, yes; 2 against them: yes, no, yes. Second: half, half, no, twice.
    assert win_rate.wins(ours, theirs) == pytest.approx([3.5 / 6, 2 / 6])
    assert win_rate.ties(ours, theirs) == pytest.approx([1 / 6, 4 / 6])
    assert win_rate.wins(theirs, ours) == pytest.approx(1 - win_rate.wins(ours, theirs))


def test_a_policy_against_itself_wins_half():
    values = np.random.default_rng(0).normal(size=(7, 5))
    assert win_rate.wins(values, values).mean() == pytest.approx(0.5)


def test_prompts_that_are_not_judged():
    ours = np.array([[np.nan, np.nan], [1.0, 2.0]])
    found = win_rate.wins(ours, np.array([[0.0], [0.0]]))
    assert np.isnan(found[0]) and found[1] == 1
    assert np.isnan(win_rate.ties(ours, ours)).tolist() == [True, False]
    with pytest.raises(UserError, match="must be the same"):
        win_rate.wins(ours, ours[:1])
