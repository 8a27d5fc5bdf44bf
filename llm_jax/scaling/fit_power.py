"""L(C) = a*C^b + L_inf (Henighan et al. 2020; Baichuan-2, section 2.5): fitted, with intervals, or refused.

Shapes: N points, S draws, P parameters.
"""

import dataclasses
import functools
import warnings
from collections.abc import Hashable, Sequence

import numpy as np
from scipy import optimize

from llm_jax.errors import require
from llm_jax.scaling import fit_huber, fit_noise, fit_profile
from llm_jax.scaling.config import MIN_DRAWS
from llm_jax.scaling.fit_checks import STUCK, check_confidence, check_points, percentiles
from llm_jax.scaling.fit_noise import Array, Noise
from llm_jax.scaling.fit_profile import Profile
from llm_jax.scaling.fit_terms import power_terms

METHODS = ("least_squares", "huber")
OUTLYING = 3.0  # standard deviations
MEDIAN_TO_DEVIATION = 1.4826  # of Gaussian noise: its standard deviation over the median of its size


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A fitted L(C) = a*C^b + L_inf and the data that it was fitted to.

    `intervals` maps "a", "b" and "l_inf" to (low, high). Fields are floats, strings and tuples of these, so that
    `dataclasses.asdict` gives JSON.
    """

    a: float
    b: float
    l_inf: float
    intervals: dict[str, tuple[float, float]]
    noise: float  # standard deviation of a new run about the law, relative to its loss
    r_squared: float  # share of the variance of the losses that the law explains
    residuals: tuple[float, ...]  # loss less the law's, nats
    method: str
    confidence: float
    draws: int
    seed: int
    huber_delta: float
    compute: tuple[float, ...]
    loss: tuple[float, ...]
    groups: tuple[int, ...]

    @property
    def floor_seen(self) -> bool:
        """Whether the interval of L_inf stays above 0; else the data allow losses that never level off, too."""
        return self.intervals["l_inf"][0] > 0

    def predict(self, compute: float) -> float:
        """The law's loss at a compute."""
        return float(_law(_checked(compute), self.a, self.b, self.l_inf))

    def predict_interval(self, compute: float) -> tuple[float, float]:
        """Where the loss of one new run with this compute should lie: the law's uncertainty and the run's noise."""
        return self._interval(_checked(compute), new_run=True)

    def law_interval(self, compute: float) -> tuple[float, float]:
        """Where the law itself should lie at this compute: the mean over many new runs."""
        return self._interval(_checked(compute), new_run=False)

    def _interval(self, compute: float, new_run: bool) -> tuple[float, float]:
        x = np.log(compute) - self._centre
        if self.method == "least_squares":
            weight_B2 = np.stack([np.exp(self._profile.b_B * x), np.ones_like(self._profile.b_B)], axis=-1)
            return _holding(self._profile.interval(weight_B2, new_run), self.predict(compute))
        theta_SP, noise_S = self._draws
        log_S = fit_huber.log_loss(power_terms(np.array([x])), theta_SP)[:, 0]
        return percentiles(np.exp(log_S + (noise_S if new_run else 0)), self.confidence)

    @property
    def _centre(self) -> float:
        return float(np.log(self.compute).mean())

    @functools.cached_property
    def _profile(self) -> Profile:
        group_N = np.array(self.groups)
        return fit_profile.profile(np.log(self.compute) - self._centre, np.array(self.loss), group_N, self.confidence)

    @functools.cached_property
    def _draws(self) -> tuple[Array, Array]:
        """Parameters (log amplitude at the centre, b, log L_inf) refitted to draws of noise, and new runs' noise."""
        x_N = np.log(self.compute) - self._centre
        start_P = np.array([np.log(self.a) + self.b * self._centre, self.b, np.log(self.l_inf)])
        fitted_N = np.log(self.loss) - np.log(np.array(self.loss) - self.residuals)
        noise = fit_noise.estimate(fitted_N, np.array(self.groups), fit_profile.PARAMETERS)
        return _bootstrap(x_N, start_P, noise, self.draws, self.seed, self.huber_delta)


def fit_power_law(
    compute: Sequence[float],
    loss: Sequence[float],
    *,
    method: str = "least_squares",
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    huber_delta: float = 1e-3,
) -> PowerLaw:
    """Fit L(C) = a*C^b + L_inf with b < 0, a > 0 and L_inf > 0.

    By either method a law is refused if its best L_inf is 0, or if the exact profile (of "huber": once outliers are
    moved to three standard deviations) allows an exponent without bound. A law whose exponent is bounded stands even
    if the data allow an L_inf of 0 as well: then its interval starts at 0, and `floor_seen` is False.

    Args:
        compute: training FLOPs, or any other measure of the work; its unit changes only `a`.
        loss: the losses reached, nats.
        method: "least_squares": `scipy.optimize.curve_fit`, as Baichuan-2 fits it, with errors relative to the loss
            and seeds of a group correlated; intervals are exact profiles. "huber": the Huber loss on log residuals
            (Hoffmann et al. 2022, section 3.3), for data with outliers; intervals are percentiles of a bootstrap
            that draws the noise of groups and of runs and fits again.
        confidence: of the intervals.
        draws: of the bootstrap.
        seed: of the bootstrap.
        groups: a label for each point; points of one group share an error, such as the seeds of one size or the
            points of one curve. None: points of equal compute are a group.
        huber_delta: where the Huber loss turns linear.

    Raises:
        UserError: the data cannot tell what the law is; the message says why.
    """
    require(method in METHODS, f"the fit's method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    check_confidence(confidence)
    require(draws >= MIN_DRAWS, f"the fit's draws={draws} are too few for an interval: draw {MIN_DRAWS} or more")
    require(huber_delta > 0, f"the fit's huber_delta={huber_delta} must be positive")
    compute_N, loss_N, group_N = check_points(compute, loss, groups)
    order = np.lexsort((loss_N, compute_N))  # so that a bootstrap does not depend on the order of the trials
    compute_N, loss_N = compute_N[order], loss_N[order]
    group_N = fit_noise.group_indices(group_N[order].tolist())
    require(
        np.unique(group_N).size > fit_profile.PARAMETERS,
        f"{np.unique(group_N).size} groups of runs cannot tell three parameters from noise: train more sizes",
    )
    fit = _least_squares if method == "least_squares" else _huber
    a, b, l_inf = fit(compute_N, loss_N, group_N, confidence, huber_delta)
    residual_N = loss_N - _law(compute_N, a, b, l_inf)
    noise = fit_noise.estimate(residual_N / (loss_N - residual_N), group_N, fit_profile.PARAMETERS)
    law = PowerLaw(
        a=a,
        b=b,
        l_inf=l_inf,
        intervals={},
        noise=float(np.sqrt(noise.total)),
        r_squared=1 - float(np.sum(residual_N**2) / np.sum((loss_N - loss_N.mean()) ** 2)),
        residuals=tuple(residual_N.tolist()),
        method=method,
        confidence=confidence,
        draws=draws,
        seed=seed,
        huber_delta=huber_delta,
        compute=tuple(compute_N.tolist()),
        loss=tuple(loss_N.tolist()),
        groups=tuple(group_N.tolist()),
    )
    law.intervals.update(_profile_intervals(law) if method == "least_squares" else _drawn_intervals(law))
    return law


def _checked(compute: float) -> float:
    require(bool(np.isfinite(compute) and compute > 0), f"compute={compute} to predict for must be positive and finite")
    return float(compute)


def _law(compute: Array | float, a: float, b: float, l_inf: float) -> Array:
    result: Array = a * np.asarray(compute, dtype=np.float64) ** b + l_inf
    return result


def _least_squares(
    compute_N: Array, loss_N: Array, group_N: np.ndarray, confidence: float, huber_delta: float
) -> tuple[float, float, float]:
    """The best law by `curve_fit`, started at the best of all exponents, hence at the global minimum."""
    centre = float(np.log(compute_N).mean())
    x_N = np.log(compute_N) - centre
    found = fit_profile.profile(x_N, loss_N, group_N, confidence)
    amplitude, l_inf = found.linear_B2[found.best]
    _identified(amplitude, l_inf, float(loss_N.min()))
    _bounded(found)
    start = (amplitude, found.b_B[found.best], l_inf)
    same_NN = group_N[:, None] == group_N[None, :]
    covariance_NN = np.outer(found.scale_N, found.scale_N) * (found.noise.ratio * same_NN + np.eye(x_N.size))
    with warnings.catch_warnings():  # of a covariance that it cannot tell: the profile's interval is used
        warnings.simplefilter("ignore", optimize.OptimizeWarning)
        best, _ = optimize.curve_fit(_centred, x_N, loss_N, p0=start, sigma=covariance_NN)
    amplitude, b, l_inf = (float(value) for value in best)
    return amplitude * float(np.exp(-b * centre)), b, l_inf


def _centred(x_N: Array, amplitude: float, b: float, l_inf: float) -> Array:
    result: Array = amplitude * np.exp(b * x_N) + l_inf
    return result


def _huber(
    compute_N: Array, loss_N: Array, group_N: np.ndarray, confidence: float, huber_delta: float
) -> tuple[float, float, float]:
    """The best law from a grid of exponents and of shares of L_inf in the smallest loss."""
    centre = float(np.log(compute_N).mean())
    x_N = np.log(compute_N) - centre
    exponent, share = np.meshgrid(-np.geomspace(0.2, 7, 8) / np.ptp(x_N), np.linspace(0.1, 0.95, 8))
    floor = share * loss_N.min()
    start_SP = np.stack([np.log(loss_N.mean() - floor), exponent, np.log(floor)], axis=-1).reshape(-1, 3)
    terms = power_terms(x_N)
    theta_SP, value_S = fit_huber.minimise(terms, np.log(loss_N)[None], start_SP, huber_delta)
    log_amplitude, b, log_l_inf = (float(value) for value in theta_SP[value_S.argmin()])
    _identified(np.exp(log_amplitude), np.exp(log_l_inf), float(loss_N.min()))
    log_fitted_N = fit_huber.log_loss(terms, theta_SP[value_S.argmin()][None])[0]
    usual_N = np.exp(log_fitted_N + _within_noise(np.log(loss_N) - log_fitted_N))
    _bounded(fit_profile.profile(x_N, usual_N, group_N, confidence))
    return float(np.exp(log_amplitude - b * centre)), b, float(np.exp(log_l_inf))


def _within_noise(residual_N: Array) -> Array:
    """Residuals of a robust fit, outliers moved to three standard deviations of the others.

    Such a fit passes through about as many points as it has parameters; these say nothing about the noise.
    """
    others = np.sort(np.abs(residual_N))[fit_profile.PARAMETERS :]
    most = OUTLYING * MEDIAN_TO_DEVIATION * float(np.median(others))
    result: Array = np.clip(residual_N, -most, most)
    return result


def _identified(amplitude: float, l_inf: float, smallest: float) -> None:
    require(
        l_inf > STUCK * smallest,
        "the best L_inf is at its bound, 0: these losses do not level off yet; train larger models, or fit a law "
        "without L_inf",
    )
    require(amplitude > 0, "losses do not fall with compute: there is no law to fit; look for runs that diverged")


def _bounded(found: Profile) -> None:
    require(
        not found.flat_allowed,
        "L_inf has no lower bound: these losses are as well a straight line in log compute; span more compute, or "
        "train more seeds",
    )
    require(
        not found.steep_allowed,
        "the exponent b has no bound: only the smallest compute lies above L_inf; train smaller models too",
    )


def _profile_intervals(law: PowerLaw) -> dict[str, tuple[float, float]]:
    found = law._profile
    one_B, zero_B = np.ones_like(found.b_B), np.zeros_like(found.b_B)
    low, high = found.interval(np.stack([zero_B, one_B], axis=-1))
    return {
        "a": _holding(found.interval(np.stack([np.exp(-found.b_B * law._centre), zero_B], axis=-1)), law.a),
        "b": _holding(found.exponents(), law.b),
        "l_inf": _holding((max(low, 0.0), high), law.l_inf),
    }


def _holding(interval: tuple[float, float], estimate: float) -> tuple[float, float]:
    """A profile's interval with the estimate in it: without noise both are one number, but for rounding."""
    return min(interval[0], estimate), max(interval[1], estimate)


def _bootstrap(
    x_N: Array, start_P: Array, noise: Noise, draws: int, seed: int, huber_delta: float
) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    terms = power_terms(x_N)
    noise_SN = noise.draw(generator, draws, others=1)
    target_SN = fit_huber.log_loss(terms, start_P[None]) + noise_SN[:, :-1]
    theta_SP, _ = fit_huber.minimise(terms, target_SN, np.repeat(start_P[None], draws, axis=0), huber_delta)
    return theta_SP, noise_SN[:, -1]


def _drawn_intervals(law: PowerLaw) -> dict[str, tuple[float, float]]:
    theta_SP, _ = law._draws
    log_amplitude_S, b_S, log_l_inf_S = theta_SP.T
    steepest, flattest = percentiles(b_S, law.confidence)
    span = float(np.log(law.compute[-1] / law.compute[0]))
    require(
        steepest * span > -fit_profile.STEEPEST and flattest * span < -fit_profile.FLATTEST,
        f"the exponent b has no bound: draws of the noise put it between {steepest:.3g} and {flattest:.3g}; leave out "
        "trials that went wrong, or train more seeds",
    )
    low, high = percentiles(np.exp(log_l_inf_S), law.confidence)
    with np.errstate(over="ignore"):  # of a steep draw's a, at a compute of 1
        a_S = np.exp(log_amplitude_S - b_S * law._centre)
    return {
        "a": percentiles(a_S, law.confidence),
        "b": (steepest, flattest),
        "l_inf": (low if low > STUCK * min(law.loss) else 0.0, high),
    }
