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


def budget_numbers(compute: Sequence[float]) -> list[int]:
    """Number the budgets (the same compute within 5 %) 0, 1, ... by their compute, one number for each point."""
    numbers, number, start = [0] * len(compute), -1, 0.0
    for index in sorted(range(len(compute)), key=lambda index: compute[index]):
        if number < 0 or compute[index] > start * (1 + SAME_BUDGET):
            number, start = number + 1, compute[index]
        numbers[index] = number
    return numbers


def by_budget(results: Sequence[TrialResult]) -> list[list[TrialResult]]:
    """Trials of the same compute (within 5 %), together; in the order of their compute."""
    groups: dict[int, list[TrialResult]] = {}
    ordered = sorted(results, key=lambda result: (result.compute, result.name))
    for number, result in zip(budget_numbers([result.compute for result in ordered]), ordered):
        groups.setdefault(number, []).append(result)
    return list(groups.values())


def best_variants(results: Sequence[TrialResult], *, keep_repeats: bool = False) -> tuple[list[TrialResult], list[str]]:
    """Of trials of one size and budget that differ in more than their seed, those with the least mean loss over seeds.

    Variants differ in their learning rate or in the grid's further keys. Taken for seeds, they would make the noise
    seem larger than it is, and losses worse than a size reaches. With `keep_repeats`, trials that read other numbers of
    unique tokens are no variants: what a repetition is worth can be fitted. Also a line that says how many trials were
    left out, if any were.
    """
    sizes: dict[Hashable, list[TrialResult]] = {}
    for result in results:
        unique = result.unique_tokens if keep_repeats and result.unique_tokens < result.tokens else 0
        key = (result.size, result.parameters, result.non_embedding_parameters, unique)
        sizes.setdefault(key, []).append(result)
    kept = [
        result
        for members in sizes.values()
        for trials in by_budget(members)
        for result in min(_variants(trials), key=mean_loss)
    ]
    lost = len(results) - len(kept)
    line = f"{lost} trials whose size reached a lower mean loss with another variant or learning rate at their compute"
    return kept, [line] if lost else []


def _variants(trials: Sequence[TrialResult]) -> list[list[TrialResult]]:
    variants: dict[Hashable, list[TrialResult]] = {}
    for trial in sorted(trials, key=lambda trial: trial.name):
        repeats = trial.unique_tokens if trial.unique_tokens < trial.tokens else 0
        key = (trial.model, trial.sequence_length, trial.learning_rate, trial.varied, repeats)
        variants.setdefault(key, []).append(trial)
    return list(variants.values())


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
