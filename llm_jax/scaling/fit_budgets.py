"""Trials in groups: seeds of one trial, trials of one budget of compute, variants of one size and budget."""

import statistics
from collections.abc import Hashable, Sequence

from llm_jax.scaling.trial import TrialResult

SAME_BUDGET = 0.05  # a trial's compute may differ from its budget by so much, for whole steps


def seeds(results: Sequence[TrialResult]) -> list[list[TrialResult]]:
    """Trials that differ in nothing but their seed, together; in the order of their names."""
    together: dict[Hashable, list[TrialResult]] = {}
    for result in sorted(results, key=lambda result: result.name):
        steps = tuple(tokens for tokens, _ in result.curve)
        key = (result.size, result.model, result.sequence_length, result.tokens, result.unique_tokens)
        together.setdefault((key, result.learning_rate, result.varied, steps), []).append(result)
    return list(together.values())


def by_budget(results: Sequence[TrialResult]) -> list[list[TrialResult]]:
    """Trials of the same compute (within 5 %), together; in the order of their compute."""
    groups: list[list[TrialResult]] = []
    for result in sorted(results, key=lambda result: (result.compute, result.name)):
        if groups and result.compute <= groups[-1][0].compute * (1 + SAME_BUDGET):
            groups[-1].append(result)
        else:
            groups.append([result])
    return groups


def mean_loss(members: Sequence[TrialResult]) -> float:
    """Mean loss of a trial's seeds."""
    return statistics.fmean(member.loss for member in members)


def edges(results: Sequence[TrialResult]) -> list[str]:
    """A line for each budget whose best size is the smallest or the largest that it tried, or the only one.

    A better size may then lie outside, so that the budget's point lies above the frontier that a law should follow. A
    size's loss is that of its best variant, seeds averaged.
    """
    lines = []
    for trials in by_budget(results):
        compute = f"{trials[0].compute:.3g} FLOPs"
        best = min(seeds(trials), key=mean_loss)[0]
        tried = [trial.parameters for trial in trials]
        if len(set(tried)) == 1:
            lines.append(f"{compute}: only one size, {best.size}, was tried: another one may be better")
        elif best.parameters in (min(tried), max(tried)):
            end, beyond = ("smallest", "smaller") if best.parameters == min(tried) else ("largest", "larger")
            lines.append(f"{compute}: the best size, {best.size}, is the {end} tried: a {beyond} one may be better")
    return lines
