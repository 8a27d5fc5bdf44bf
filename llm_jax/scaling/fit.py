"""Scaling laws fitted to trials: everything that a study or a notebook needs, in one place.

    law = fit.fit_power_law(compute, loss)             # L(C) = a*C^b + L_inf, with intervals
    warnings = fit.edges(results)                      # budgets whose best size may lie outside those tried
    points = fit.frontier(results)                     # the lower envelope of all curves
    parabolas = fit.isoflop(results)                   # the best size of each compute
    law = fit.parametric(results)                      # L(N, D), repeated data included
    table = fit.compare(results, held_out_above=1e18)  # which form predicts larger trials best

All refuse data that cannot identify a law, by a `UserError` whose one line says why.
"""

from llm_jax.scaling.fit_budgets import edges
from llm_jax.scaling.fit_compare import Comparison, Score, compare, efficient
from llm_jax.scaling.fit_curves import Frontier, FrontierPoint, frontier
from llm_jax.scaling.fit_isoflop import Allocation, Budget, IsoFlop, isoflop
from llm_jax.scaling.fit_parametric import Optimum, Parametric, parametric
from llm_jax.scaling.fit_power import PowerLaw, fit_power_law

__all__ = [
    "Allocation",
    "Budget",
    "Comparison",
    "Frontier",
    "FrontierPoint",
    "IsoFlop",
    "Optimum",
    "Parametric",
    "PowerLaw",
    "Score",
    "compare",
    "edges",
    "efficient",
    "fit_power_law",
    "frontier",
    "isoflop",
    "parametric",
]
