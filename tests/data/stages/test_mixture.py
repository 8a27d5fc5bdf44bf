"""The plan against a search for the same amounts, and the stage against a loop over documents."""

import daft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax.data.stages.mixture import Mixture, MixtureConfig, plan
from llm_jax.errors import UserError

POOLS = st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 10**6), st.floats(0.01, 100)), min_size=1)


def searched(tokens, factors, budget, max_epochs):
    """Amounts min(limit, level * weight) whose sum is the budget: the level found by bisection."""
    weight = {pool: tokens[pool] * factors[pool] for pool in tokens}
    limit = {pool: tokens[pool] * max_epochs for pool in tokens}
    low, high = 0.0, 1e15
    for _ in range(200):
        level = (low + high) / 2
        total = sum(min(limit[pool], level * weight[pool]) for pool in tokens)
        low, high = (level, high) if total < budget else (low, level)
    return {pool: min(limit[pool], high * weight[pool]) for pool in tokens}


@settings(max_examples=200, deadline=None)
@given(POOLS, st.floats(0.01, 10), st.floats(0.5, 8))
def test_the_plan_draws_in_proportion_up_to_the_cap(pools, budget_in_epochs, max_epochs):
    tokens = {pool: count for pool, (count, _) in pools.items()}
    factors = {pool: factor for pool, (_, factor) in pools.items()}
    budget = max(1, int(budget_in_epochs * sum(tokens.values())))
    rows = plan(tokens, factors, budget, max_epochs)
    wanted = searched(tokens, factors, budget, max_epochs)
    assert {row.pool: row.drawn for row in rows} == pytest.approx(wanted, rel=1e-6)
    assert all(row.epochs == pytest.approx(row.drawn / row.tokens) for row in rows)
    assert all(row.epochs <= max_epochs * (1 + 1e-9) for row in rows)
    assert sum(row.share for row in rows) == pytest.approx(1)


def test_without_settings_everything_is_drawn_once():
    rows = plan({"a": 100, "b": 300, "empty": 0}, {}, 0, 4.0)
    assert [(row.pool, row.share, row.epochs) for row in rows] == [("a", 0.25, 1.0), ("b", 0.75, 1.0)]


def test_a_boosted_source_reaches_the_cap_and_gives_the_rest_away():
    rows = {row.pool: row for row in plan({"web": 1000, "facts": 10}, {"facts": 50.0}, 1200, 4.0)}
    assert rows["facts"].epochs == 4 and rows["web"].drawn == pytest.approx(1160)


@pytest.fixture(scope="module")
def documents():
    scores = [0.1, 0.5, 0.9, None, float("nan"), 0.49999]
    return daft.from_pydict(
        {
            "id": [f"{source}/{i}" for source in "ab" for i in range(6)],
            "source": ["a"] * 6 + ["b"] * 6,
            "quality": daft.Series.from_pylist(scores * 2).cast(daft.DataType.float32()),
        }
    )


def pools_of(config, documents):
    result = Mixture(config).apply(documents, None)
    return {row["id"]: (row["pool"], row["dropped"]) for row in result.documents.to_pylist()}, result.facts["factors"]


def test_tiers_divide_by_score(documents):
    config = MixtureConfig(
        score="quality", tier_edges=(0.5, 0.8), tier_weights=(0.0, 1.0, 2.0), curated=("b",), weights={"b": 3.0}
    )
    pools, factors = pools_of(config, documents)
    tiers = ["low", "middle", "high", "", "", "low"]  # no score, no tier
    for source in "ab":
        for i, tier in enumerate(tiers):
            name = f"{source}_{tier}" if tier else source
            assert pools[f"{source}/{i}"] == (name, "weight 0" if tier == "low" else None)
    assert factors == {"a": 1, "a_high": 2, "a_middle": 1, "b": 6, "b_high": 12, "b_middle": 6}


def test_without_tiers_a_pool_is_a_source(documents):
    pools, factors = pools_of(MixtureConfig(weights={"a": 0.0}), documents)
    assert factors == {"b": 1}
    assert all(pools[id] == (id[0], "weight 0" if id[0] == "a" else None) for id in pools)


def test_mistakes_are_named(documents):
    with pytest.raises(UserError, match="no source 'aa'; did you mean 'a'"):
        Mixture(MixtureConfig(weights={"aa": 1.0})).check_sources({"a", "b"})
    with pytest.raises(UserError, match="no source 'c'"):
        Mixture(MixtureConfig(weights={"a": 1.0}, curated=("c",))).check_sources({"a", "b"})
    Mixture(MixtureConfig(weights={"a": 1.0}, curated=("b",))).check_sources({"a", "b"})
    config = MixtureConfig(score="qualify", tier_edges=(0.5,), tier_weights=(1.0, 2.0))
    with pytest.raises(UserError, match="no column 'qualify' among id, source, quality"):
        pools_of(config, documents)
    tiers = {"score": "quality", "tier_edges": (0.5,), "tier_weights": (1.0, 2.0)}
    for change, message in [
        ({"tier_edges": (0.5, 0.4), "tier_weights": (1.0, 1.0, 1.0)}, "ascending"),
        ({"tier_weights": (1.0,)}, "one factor more"),
        ({"score": ""}, "go together"),
        ({"weights": {"a": -1.0}}, "negative"),
        ({"max_epochs": 0.0}, "positive"),
    ]:
        with pytest.raises(UserError, match=message):
            MixtureConfig(**{**tiers, **change})
    clash = daft.from_pydict({"id": ["1", "2"], "source": ["a", "a_low"], "quality": [0.1, None]})
    with pytest.raises(UserError, match="named as another one's tier"):
        pools_of(MixtureConfig(**tiers), clash)
