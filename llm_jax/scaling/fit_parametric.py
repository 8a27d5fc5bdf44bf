"""L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2 and section 3.3), and repeated data.

Where data is read more than once, D becomes D' = U + U * R_D * (1 - exp(-R / R_D)) with U unique tokens and
R = D / U - 1 repetitions (Muennighoff et al. 2023, section 3.1): a repetition is worth less and less, and R_D says how
fast. Of their law only D' is fitted, not N', by which a model too large for its unique tokens counts as a smaller one.
Hence R_D is not comparable with their 15.4, which belongs to a law with both.

Shapes: N points, S draws or starts, K = 3 terms, P parameters: (log E, log A', alpha, log B', beta[, log R_D]), A' and
B' at the centres of log N and log D.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from llm_jax.errors import require
from llm_jax.scaling import fit_huber, fit_noise
from llm_jax.scaling.config import MIN_DRAWS
from llm_jax.scaling.fit_budgets import best_variants
from llm_jax.scaling.fit_checks import STUCK, check_confidence, check_losses, percentiles
from llm_jax.scaling.fit_isoflop import parameters_of
from llm_jax.scaling.fit_noise import Array
from llm_jax.scaling.fit_terms import MAX_R, MIN_R, parametric_terms, repetitions
from llm_jax.scaling.trial import TrialResult

MIN_DISTINCT = 3  # of N and of D
MOST_CORRELATED = 0.98  # of log N with log D; above, the two terms cannot be told apart
LEAST_FALL = 1e-4  # of a term over the trials, as a share of the loss; below, its exponent means nothing
REPEATED = 2.0  # data read so often, by one trial at least, is treated as repeated; less, as all new


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The size and the tokens that a compute is best spent on, and the loss that they reach."""

    parameters: float
    tokens: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Parametric:
    """A fitted L(N, D) and the data that it was fitted to; `intervals` maps its constants' names to (low, high).

    "parameters_exponent" is that of the compute-optimal N. `cost` = (k, s): training took the trials about
    k N^(1 + s) D FLOPs. `problems` has a line for what was left out, and why.
    """

    e: float
    a: float
    b: float
    alpha: float
    beta: float
    repetitions: float | None  # R_D; None: no data was repeated
    intervals: dict[str, tuple[float, float]]
    noise: float  # standard deviation of a new run about the law, relative to its loss
    residuals: tuple[float, ...]  # of log losses
    convention: str  # which parameters N counts: "all" or "non_embedding"
    confidence: float
    draws: int
    seed: int
    huber_delta: float
    parameters: tuple[float, ...]
    tokens: tuple[float, ...]
    unique_tokens: tuple[float, ...]
    loss: tuple[float, ...]
    cost: tuple[float, float]
    problems: tuple[str, ...] = ()

    def predict(self, parameters: float, tokens: float, unique_tokens: float | None = None) -> float:
        """The law's loss of a size (N by `convention`) and its tokens, of which `unique_tokens` differ (None: all)."""
        return float(np.exp(self._log_losses(self._theta[None], parameters, tokens, unique_tokens)[0]))

    def predict_interval(
        self, parameters: float, tokens: float, unique_tokens: float | None = None
    ) -> tuple[float, float]:
        """Where the loss of one new run should lie: the law's uncertainty and the run's noise."""
        theta_SP, noise_S = self._draws
        log_S = self._log_losses(theta_SP, parameters, tokens, unique_tokens)
        return percentiles(np.exp(log_S + noise_S), self.confidence)

    @property
    def parameters_exponent(self) -> float:
        """The x of the compute-optimal N ~ C^x at the trials' own cost: beta / (alpha + (1 + s) beta)."""
        return self.beta / (self.alpha + (1 + self.cost[1]) * self.beta)

    def optimum(self, compute: float) -> Optimum:
        """The N and D with the least loss for so many FLOPs, of data that is not repeated.

        Training costs k N^(1 + s) D as it cost the trials (`cost`), not 6 N D: small models spend more on embeddings,
        output head and attention's scores for a parameter. Where k = 6 and s = 0 this is equation 4 of Hoffmann et al.
        2022; like that one it follows from d loss / d N = 0 along the budget. Far beyond the trials' sizes, s tends
        to 0, which a power law of N cannot know.
        """
        require(bool(np.isfinite(compute) and compute > 0), f"compute={compute} must be positive and finite")
        k, s = self.cost
        at_one = compute / k  # tokens of a single parameter
        total = self.alpha + (1 + s) * self.beta
        log_ratio = np.log(self.alpha * self.a) - np.log((1 + s) * self.beta * self.b) + self.beta * np.log(at_one)
        parameters = float(np.exp(log_ratio / total))
        tokens = float(at_one / parameters ** (1 + s))
        return Optimum(parameters, tokens, self.predict(parameters, tokens))

    @property
    def _theta(self) -> Array:
        n, d = _centres(self.parameters, self.tokens)
        theta = [np.log(self.e), np.log(self.a) - self.alpha * n, self.alpha, np.log(self.b) - self.beta * d, self.beta]
        return np.array(theta + ([] if self.repetitions is None else [np.log(self.repetitions)]))

    def _log_losses(self, theta_SP: Array, parameters: float, tokens: float, unique_tokens: float | None) -> Array:
        unique = tokens if unique_tokens is None else unique_tokens
        require(
            all(np.isfinite(value) and value > 0 for value in (parameters, tokens, unique)) and unique <= tokens,
            f"cannot predict for N={parameters}, tokens={tokens}, unique_tokens={unique}: give positive, finite "
            "numbers and no more unique tokens than tokens",
        )
        require(
            unique == tokens or self.repetitions is not None,
            f"unique_tokens={unique} of {tokens}: no trial of this fit repeated its data",
        )
        centres = _centres(self.parameters, self.tokens)
        n_1, d_1, unique_1 = (np.array([value], dtype=np.float64) for value in (parameters, tokens, unique))
        terms = parametric_terms(n_1, d_1, unique_1, centres, self.repetitions is not None)
        return fit_huber.log_loss(terms, theta_SP)[:, 0]

    @functools.cached_property
    def _draws(self) -> tuple[Array, Array]:
        """Parameters refitted to draws of noise, and the noise of new runs."""
        n_N, d_N, unique_N = (np.array(values) for values in (self.parameters, self.tokens, self.unique_tokens))
        terms = parametric_terms(n_N, d_N, unique_N, _centres(n_N, d_N), self.repetitions is not None)
        group_N = _groups(n_N, d_N, unique_N)
        noise = fit_noise.estimate(np.array(self.residuals), group_N, self._theta.size)
        noise_SN = noise.draw(np.random.default_rng(self.seed), self.draws, others=1)
        target_SN = fit_huber.log_loss(terms, self._theta[None]) + noise_SN[:, :-1]
        start_SP = np.repeat(self._theta[None], self.draws, axis=0)
        return fit_huber.minimise(terms, target_SN, start_SP, self.huber_delta)[0], noise_SN[:, -1]


def parametric(
    results: Sequence[TrialResult],
    *,
    embeddings: bool = True,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    huber_delta: float = 1e-3,
) -> Parametric:
    """Fit L(N, D) to the trials' ends: the Huber loss on log losses, from many starts.

    Where any trial read its data twice or more (`unique_tokens <= tokens / 2`), the worth of a repetition is fitted,
    too; where all read less, their tokens count as all new. Of a size's variants with the same tokens (learning rates,
    the grid's further keys) the best counts, by its mean over seeds.

    Args:
        results: trials with three sizes and three token counts or more, which do not grow in proportion.
        embeddings: N counts all parameters; False leaves out the input embedding and the output head.
        confidence: of the intervals.
        draws: of the bootstrap, which draws the noise of trials and of their seeds.
        seed: of the bootstrap.
        huber_delta: where the Huber loss turns linear.

    Raises:
        UserError: the trials cannot tell what the constants are; the message says why.
    """
    check_confidence(confidence)
    require(draws >= MIN_DRAWS, f"the fit's draws={draws} are too few for an interval: draw {MIN_DRAWS} or more")
    require(huber_delta > 0, f"the fit's huber_delta={huber_delta} must be positive")
    check_losses(results)
    best, problems = best_variants(results, keep_repeats=True)
    results = sorted(best, key=lambda result: (result.compute, result.loss, result.name))
    n_N = np.array([parameters_of(result, embeddings) for result in results])
    d_N, unique_N, compute_N, loss_N = (
        np.array([float(getattr(result, name)) for result in results])
        for name in ("tokens", "unique_tokens", "compute", "loss")
    )
    repeated = bool(np.any(d_N >= REPEATED * unique_N))
    unique_N = unique_N if repeated else d_N
    _check(n_N, d_N, unique_N, compute_N, 6 if repeated else 5)
    centres = _centres(n_N, d_N)
    terms = parametric_terms(n_N, d_N, unique_N, centres, repeated)
    theta_SP, value_S = fit_huber.minimise(
        terms, np.log(loss_N)[None], _starts(n_N, d_N, loss_N, repeated), huber_delta
    )
    theta_P = theta_SP[value_S.argmin()]
    residual_N = np.log(loss_N) - fit_huber.log_loss(terms, theta_P[None])[0]
    constants = {name: float(value[0]) for name, value in _constants(theta_P[None], centres).items()}
    require(
        bool(np.isfinite(list(constants.values())).all()) and constants["e"] > STUCK * loss_N.min(),
        "the best E is at its bound, 0: these losses do not level off yet; train larger models on more tokens",
    )
    noise = fit_noise.estimate(residual_N, _groups(n_N, d_N, unique_N), theta_P.size)
    law = Parametric(
        e=constants["e"],
        a=constants["a"],
        b=constants["b"],
        alpha=constants["alpha"],
        beta=constants["beta"],
        repetitions=constants.get("repetitions"),
        intervals={},
        noise=float(np.sqrt(noise.total)),
        residuals=tuple(residual_N.tolist()),
        convention="all" if embeddings else "non_embedding",
        confidence=confidence,
        draws=draws,
        seed=seed,
        huber_delta=huber_delta,
        parameters=tuple(n_N.tolist()),
        tokens=tuple(d_N.tolist()),
        unique_tokens=tuple(unique_N.tolist()),
        loss=tuple(loss_N.tolist()),
        cost=_cost(n_N, d_N, compute_N),
        problems=tuple(problems),
    )
    law.intervals.update(_intervals(law, float(loss_N.min())))
    return law


def _centres(parameters: Sequence[float] | Array, tokens: Sequence[float] | Array) -> tuple[float, float]:
    return float(np.log(parameters).mean()), float(np.log(tokens).mean())


def _cost(n_N: Array, d_N: Array, compute_N: Array) -> tuple[float, float]:
    """The k and s of compute = k N^(1 + s) D, by a straight line through the logarithms."""
    s, log_k = np.polyfit(np.log(n_N), np.log(compute_N / (n_N * d_N)), 1)
    require(s > -1, f"a larger model costs no more than a smaller one here (compute / tokens ~ N^{1 + s:.2g})")
    return float(np.exp(log_k)), float(s)


def _groups(n_N: Array, d_N: Array, unique_N: Array) -> np.ndarray:
    """Trials with the same size and tokens, which differ in their seeds."""
    return fit_noise.group_indices(list(zip(n_N.tolist(), d_N.tolist(), unique_N.tolist())))


def _starts(n_N: Array, d_N: Array, loss_N: Array, repeated: bool) -> Array:
    """A grid of exponents, of E's share in the smallest loss, and of A's share in what is above E."""
    axes = [np.array([0.1, 0.3, 0.8])] * 2 + [np.array([0.2, 0.6, 0.9]), np.array([0.2, 0.5, 0.8])]
    axes.append(np.array([1.0, 10.0]) if repeated else np.array([1.0]))
    alpha, beta, share, split, r = (grid.ravel() for grid in np.meshgrid(*axes))
    e = share * loss_N.min()
    above = np.exp(np.log(loss_N).mean()) - e
    start_SP = np.stack([np.log(e), np.log(split * above), alpha, np.log((1 - split) * above), beta], axis=-1)
    return np.concatenate([start_SP, np.log(r)[:, None]], axis=-1) if repeated else start_SP


def _constants(theta_SP: Array, centres: tuple[float, float]) -> dict[str, Array]:
    log_e, log_a, alpha, log_b, beta = theta_SP[:, :5].T
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        constants = {
            "e": np.exp(log_e),
            "a": np.exp(log_a + alpha * centres[0]),
            "b": np.exp(log_b + beta * centres[1]),
            "alpha": alpha,
            "beta": beta,
        }
    if theta_SP.shape[1] == 6:
        constants["repetitions"] = repetitions(theta_SP[:, 5])
    return constants


def _check(n_N: Array, d_N: Array, unique_N: Array, compute_N: Array, parameters: int) -> None:
    for name, values in (("parameters", n_N), ("tokens", d_N), ("unique_tokens", unique_N), ("compute", compute_N)):
        require(
            bool(np.all(np.isfinite(values) & (values > 0))),
            f"the {name} of {np.sum(~(np.isfinite(values) & (values > 0)))} trials are not positive and finite: "
            "leave these out",
        )
    for name, values in (("sizes", n_N), ("token counts", d_N)):
        require(
            np.unique(values).size >= MIN_DISTINCT,
            f"{np.unique(values).size} {name} cannot tell L(N, D): train {MIN_DISTINCT} or more",
        )
    points = int(_groups(n_N, d_N, unique_N).max()) + 1
    require(
        points > parameters,
        f"{points} pairs of size and tokens cannot tell {parameters} constants of L(N, D): train {parameters + 1}",
    )
    correlation = float(np.corrcoef(np.log(n_N), np.log(d_N))[0, 1])
    require(
        abs(correlation) < MOST_CORRELATED,
        f"tokens follow the size too closely (correlation of the logarithms {correlation:.3f}) to tell A / N^alpha "
        "from B / D^beta: train a size on several token counts",
    )


def _intervals(law: Parametric, smallest: float) -> dict[str, tuple[float, float]]:
    drawn = _constants(law._draws[0], _centres(law.parameters, law.tokens))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn["parameters_exponent"] = drawn["beta"] / (drawn["alpha"] + (1 + law.cost[1]) * drawn["beta"])
    intervals = {name: percentiles(value_S, law.confidence) for name, value_S in drawn.items()}
    require(
        intervals["e"][0] > STUCK * smallest,
        "E has no lower bound: too many draws of the noise put it at 0; train larger models on more tokens, or seeds",
    )
    for name, values, term in (("alpha", law.parameters, "a"), ("beta", law.tokens, "b")):
        fall_S = drawn[term] * (min(values) ** -drawn[name] - max(values) ** -drawn[name])
        require(
            percentiles(fall_S, law.confidence)[0] > LEAST_FALL * smallest,
            f"{name} may be 0 or less ({intervals[name][0]:.3g}): losses do not fall clearly with "
            + ("parameters" if name == "alpha" else "tokens"),
        )
    low, high = intervals.get("repetitions", (1.0, 1.0))
    require(
        low > MIN_R and high < MAX_R,
        f"R_D, the worth of repeated data, is not seen in these trials (between {low:.3g} and {high:.3g}): repeat "
        "data more often, or leave out the trials that did",
    )
    return intervals
