"""Constraints know who obeys, rules that make replies obey, and what is kept apart for judging."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.ghost_attention import smollm2
from llm_jax.alignment import constraints
from llm_jax.alignment.constraints import (
    CAPITALS,
    CONSTRAINTS,
    ITEMS,
    PIRATE,
    QUESTION,
    Instruction,
    at_most,
    beginning,
    ending,
    language,
)
from llm_jax.errors import UserError

MENDABLE = [constraint for constraint in CONSTRAINTS.values() if constraint.mend]
PAIRS = [pair for pair in itertools.combinations(MENDABLE, 2) if pair[0].kind != pair[1].kind]


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (CAPITALS, ["YES, 2!"], ["Yes", "22", ""]),
        (beginning("Well"), ["Well, no", " well"], ["Unwell", "Wellington is far", ""]),
        (ending("over"), ["Done. Over.", "over"], ["over there", "What they discover.", ""]),
        (at_most(4), ["one two three 4", "one"], ["one two three 4 5", "", "  "]),
        (PIRATE, ["Arr, ye see", "so arrr!"], ["arrive", "Barr", ""]),
        (QUESTION, ["Why?", "为什么？"], ["Why? Because.", ""]),
        (ITEMS, ["1. bees\n2. wax", " 1) bees"], ["1.5 bees", "2. bees", "bees 1. wax", ""]),
        (language("french"), ["Je suis dans la maison avec vous.", "Le chat est noir"], ["The cat is here", "Paris!"]),
        (language("spanish"), ["El gato está en la casa con una amiga"], ["O gato está em casa com uma amiga", "el"]),
        (language("german"), ["Ich bin nicht in der Stadt"], ["I am in the city", "Ja"]),
        (language("portuguese"), ["O gato está em casa com uma amiga"], ["El gato está en la casa con una amiga"]),
        (language("italian"), ["Il gatto è nella casa con un amico"], ["Le chat est dans la maison", ""]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_constraints_know_who_obeys(constraint, good, bad):
    assert all(map(constraint.obeys, good)) and not any(map(constraint.obeys, bad))


@settings(max_examples=20)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "+".join(constraint.name for constraint in pair))
@given(reply=st.text("ab .!?\n", min_size=1, max_size=60).filter(lambda text: any(map(str.isalpha, text))))
def test_mended_replies_obey(pair, reply):
    """Two at once, whatever was said; what obeys already stays as it is."""
    for order in (pair, pair[::-1]):
        instruction = Instruction(order, "")
        mended = instruction.mended(reply)
        assert instruction.obeys(mended)
        assert instruction.mended(mended) == mended


@pytest.mark.parametrize("reply", ["", " \n", "..."])
def test_what_says_nothing_is_not_made_to_obey(reply):
    for constraint in MENDABLE:
        assert Instruction((constraint,), "").mended(reply) == reply


def test_nobody_can_mend_a_language():
    with pytest.raises(UserError, match="'french'"):
        Instruction((CONSTRAINTS["french"],), "").mended("The cat")


@pytest.mark.parametrize("replies", smollm2.CONSTRAINTS)
def test_what_is_drawn_to_train_on_is_never_what_is_kept_for_judging(replies):
    known = [CONSTRAINTS[name] for name in smollm2.CONSTRAINTS[replies][0]]
    generator = np.random.default_rng(0)
    drawn = [constraints.draw(known, 2, generator) for _ in range(2000)]
    together = {frozenset(each.name for each in one.constraints) for one in drawn if len(one.constraints) == 2}
    kept = {frozenset(each.name for each in pair) for pair in constraints.held_out_pairs(known)}
    possible = {frozenset((a.name, b.name)) for a, b in itertools.combinations(known, 2) if a.kind != b.kind}
    assert kept and together == possible - kept
    reworded = {constraints.reword(one.constraints).text for one in drawn}
    assert not reworded & {one.text for one in drawn}


def test_instructions_are_drawn_from_all_constraints_and_half_are_short():
    generator = np.random.default_rng(0)
    known = list(CONSTRAINTS.values())
    drawn = [constraints.draw(known, 2, generator) for _ in range(2000)]
    counts = np.bincount([len(instruction.constraints) for instruction in drawn])
    assert counts[0] == 0 and abs(counts[1] / 2000 - 0.5) < 0.05 and len(counts) == 3
    short = [instruction.text == "; ".join(c.short for c in instruction.constraints) for instruction in drawn]
    assert abs(np.mean(short) - 0.5) < 0.05
    assert {constraint.name for instruction in drawn for constraint in instruction.constraints} == set(CONSTRAINTS)
    assert all(len({c.kind for c in one.constraints}) == len(one.constraints) for one in drawn)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: constraints.draw([], 1, np.random.default_rng(0)), "at least one constraint"),
        (lambda: at_most(3), "at_most\\(3\\)"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
