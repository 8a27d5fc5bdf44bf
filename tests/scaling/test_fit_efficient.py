"""Which trials are compute-efficient, on a sweep in which that is known."""

import dataclasses

from llm_jax.scaling import fit
from tests.scaling import studies


def test_of_one_budget_the_best_size_is_efficient_however_steps_are_rounded():
    sweep = studies.sweep()
    best = {run.name for run in sweep if run.loss < 1.01 * studies.true_loss(run.compute)}
    assert {run.name for run in fit.efficient(sweep)} == best
    # A worse trial may have cost a whole step less than the better one of its budget.
    rounded = [run if run.name in best else dataclasses.replace(run, compute=run.compute * 0.99) for run in sweep]
    assert {run.name for run in fit.efficient(rounded)} == best


def test_a_worse_trial_of_clearly_less_compute_is_efficient():
    sweep = studies.sweep()
    cheap = dataclasses.replace(sweep[-1], name="cheap", compute=sweep[-1].compute * 0.5)
    assert "cheap" in {run.name for run in fit.efficient([*sweep, cheap])}
