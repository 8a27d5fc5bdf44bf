"""Obedience by turn: counts, the table and what the figures show."""

import numpy as np
import pytest

from llm_jax.evaluation import obedience
from llm_jax.evaluation.attention_map import Attention
from llm_jax.evaluation.rewards import Proportion


def test_shares_are_by_turn():
    found = obedience.shares([[True, False], [True, True], [False, False]])
    assert found == {1: Proportion(2.0, 3), 2: Proportion(1.0, 3)}


def test_the_table_has_turns_in_rows_and_means_over_seeds():
    runs = [{2: Proportion(1, 4), 20: Proportion(0, 4)}, {2: Proportion(3, 4), 20: Proportion(0, 4)}]
    table = obedience.table("T", {"base": runs, "one": runs[:1]}, (2, 20))
    assert table.headings == ("turn", "base", "one")
    assert table.rows[0][:2] == ("2", "50.0 ± 25.0") and table.rows[1][1] == "0.0 ± 0.0"
    assert table.rows[0][2].startswith("25.0 (")


def test_the_instructions_share_is_what_replies_give_to_it():
    """Parts: before, instruction, question, reply, question, reply. The heads' mean, of replies alone."""
    mass = np.zeros((2, 3, 6, 6), np.float32)
    mass[1, :, 3, 1], mass[0, 0, 5, 1], mass[0, :, 4, 1], mass[0, :, 5, 0] = 0.5, 0.3, 0.9, 0.7
    found = obedience.instruction_share(Attention(mass, mass))
    np.testing.assert_allclose(found, [[0.0, 0.1], [0.5, 0.0]], atol=1e-7)


@pytest.mark.parametrize("seeds", [1, 2])
def test_figures_are_drawn(tmp_path, seeds):
    runs = [{1: Proportion(1, 4), 2: Proportion(0, 4)}] * seeds
    obedience.draw({f"model {i}": runs for i in range(8)}, tmp_path / "obedience.png")
    mass = np.full((2, 3, 6, 6), 0.2, np.float32)
    obedience.draw_attention({"before": Attention(mass, mass), "after": Attention(mass, mass)}, tmp_path / "map.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("obedience.png", "map.png"))


def test_parts_are_named_in_order():
    assert obedience.part_names(6) == ["before", "instruction", "question 1", "reply 1", "question 2", "reply 2"]
