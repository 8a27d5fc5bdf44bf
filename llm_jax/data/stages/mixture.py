"""Which documents are drawn how often: weights of sources and qualities, and the plan that follows for a token budget.

The stage says from which pool a document is drawn: its source, or one of the source's quality tiers. Nothing is copied
or thrown away to change a pool's share; the dataset's weights do that, when a run draws its sequences.

Sources: Baichuan-2 section 2.1 (documents are scored, and the scores drive the sampling); LLaMA-2 section 2.1 (the most
factual sources are drawn more often); Muennighoff et al., 2023 (up to four epochs are nearly as good as new text).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import daft
from daft import DataType, col, lit
from daft import functions as F

from llm_jax.config import non_negative, positive
from llm_jax.data.stages import DROPPED, ID, Result, require_sources
from llm_jax.errors import require

POOL = "pool"  # the column with the name that a document's source has in the dataset
TIERS = {1: ("",), 2: ("low", "high"), 3: ("low", "middle", "high")}


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """How often a document is drawn, compared with one of factor 1."""

    enabled: bool = True
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # source -> factor; 1 for the others
    curated: tuple[str, ...] = ()  # sources that are factual, or of good values: their factor is multiplied by
    curated_boost: float = 2.0
    score: str = ""  # a column of scores by which sources are divided into tiers; "" = no tiers
    tier_edges: tuple[float, ...] = ()  # one or two scores, ascending: where low ends, and where high begins
    tier_weights: tuple[float, ...] = ()  # the tiers' factors, the lowest first
    token_budget: int = 0  # what a run will train on, for the plan; 0 = as many tokens as there are
    max_epochs: float = 4.0  # no pool is drawn more often within the budget

    def __post_init__(self) -> None:
        non_negative(self, "token_budget")
        positive(self, "max_epochs", "curated_boost")
        factors = [*self.weights.values(), *self.tier_weights]
        require(all(factor >= 0 for factor in factors), "MixtureConfig: weights must not be negative")
        require(
            list(self.tier_edges) == sorted(self.tier_edges) and len(self.tier_edges) + 1 in TIERS,
            f"MixtureConfig.tier_edges={self.tier_edges} must be one or two ascending scores",
        )
        require(bool(self.score) == bool(self.tier_edges), "MixtureConfig.score and tier_edges go together")
        require(
            len(self.tier_weights) == (len(self.tier_edges) + 1 if self.score else 0),
            f"MixtureConfig.tier_weights={self.tier_weights} needs one factor more than tier_edges, or none",
        )


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Names each document's pool, and drops what has weight 0."""

    config: MixtureConfig = dataclasses.field(default_factory=MixtureConfig)
    name: str = "mixture"

    def check_sources(self, known: set[str]) -> None:
        """`UserError` for a weight of a source that there is not."""
        require_sources((*self.config.weights, *self.config.curated), known, "MixtureConfig")

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """Add POOL. `UserError` for a score that there is not."""
        documents = documents.with_column("tier", self._tier(documents))
        counted = documents.groupby("source", "tier").agg(col(ID).count()).to_pylist()
        factors = {(row["source"], row["tier"]): self.factor(row["source"], row["tier"]) for row in counted}
        names = {key: pool_name(*key) for key in factors}
        require(len(set(names.values())) == len(names), "a source is named as another one's tier: rename it")
        pools = {names[key]: factor for key, factor in factors.items() if factor > 0}
        pool = F.when(col("tier") == "", col("source")).otherwise(col("source") + lit("_") + col("tier"))
        zero = ~col(POOL).is_in(sorted(pools))
        reason = F.when(zero, lit("weight 0")).otherwise(lit(None))
        documents = documents.with_column(POOL, pool).with_column(DROPPED, reason).exclude("tier")
        return Result(documents, {"factors": dict(sorted(pools.items()))})

    def _tier(self, documents: daft.DataFrame) -> daft.Expression:
        """The name of a document's tier; "" for one without a score."""
        if not self.config.score:
            return lit("")
        require(
            self.config.score in documents.column_names,
            f"MixtureConfig.score: no column {self.config.score!r} among {', '.join(documents.column_names)}",
        )
        score = col(self.config.score).cast(DataType.float64())
        names = TIERS[len(self.config.tier_edges) + 1]
        tier = F.when(score.is_null() | F.is_nan(score), lit(""))
        for name, edge in zip(names, self.config.tier_edges):
            tier = tier.when(score < lit(edge), lit(name))
        return tier.otherwise(lit(names[-1]))

    def factor(self, source: str, tier: str) -> float:
        """How often a document is drawn compared with one of factor 1."""
        config = self.config
        names = TIERS[len(config.tier_edges) + 1]
        of_tier = config.tier_weights[names.index(tier)] if tier else 1.0
        boost = config.curated_boost if source in config.curated else 1.0
        return config.weights.get(source, 1.0) * boost * of_tier


def pool_name(source: str, tier: str) -> str:
    """The name of a source's tier in the dataset."""
    return f"{source}_{tier}" if tier else source


class Row(NamedTuple):
    """A pool in the plan."""

    pool: str
    tokens: int  # there are
    factor: float
    share: float  # of what is drawn
    drawn: float  # tokens within the budget
    epochs: float


def plan(tokens: Mapping[str, int], factors: Mapping[str, float], budget: int, max_epochs: float) -> list[Row]:
    """How often each pool is drawn within a budget of tokens (0 = as many as there are).

    Pools are drawn in proportion to their tokens times their factors. One that would be drawn more than `max_epochs`
    times is drawn that often, and the others share what is left in proportion; if all are, less than the budget is
    drawn. A pool without a factor has 1.
    """
    weight = {pool: count * factors.get(pool, 1.0) for pool, count in tokens.items() if count > 0}
    left = float(budget or sum(tokens.values()))
    most = {pool: tokens[pool] * max_epochs for pool in weight}
    drawn: dict[str, float] = {}
    open_pools = set(weight)
    while open_pools:
        total = sum(weight[pool] for pool in open_pools)
        full = {pool for pool in open_pools if left * weight[pool] / total >= most[pool]}
        if not full:
            drawn |= {pool: left * weight[pool] / total for pool in open_pools}
            break
        drawn |= {pool: most[pool] for pool in full}
        left -= sum(most[pool] for pool in full)
        open_pools -= full
    total = sum(drawn.values())
    return [
        Row(pool, tokens[pool], factors.get(pool, 1.0), drawn[pool] / total, drawn[pool], drawn[pool] / tokens[pool])
        for pool in sorted(drawn)
    ]
