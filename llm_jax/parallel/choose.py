"""How many layers are executed which way: the fastest mixture of two ways that fits the memory.

Memory and time are sums over the layers, and only the memory is limited. So no mixture of three ways is better than the
best of two, and of two the faster way gets as many layers as there is room for. Activations wait in the host's memory
only where nothing fits without, since the links to the host are slow.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from llm_jax.config import LayerGroup, ModelConfig
from llm_jax.parallel import plan
from llm_jax.parallel.costs import Workload
from llm_jax.parallel.hardware import Target
from llm_jax.parallel.plan import Choice


def with_mixtures(found: Sequence[Choice], model: ModelConfig, target: Target, work: Workload) -> list[Choice]:
    """Choices in which all layers are alike, and the mixtures of two of them that are faster than the best that fits.

    Args:
      found: as `plan.choices` gives them.
      model: what is executed.
      target: where.
      work: the batch; the number of microbatches is each choice's own.
    """
    if not any(choice.estimate.fits for choice in found):
        found = [*found, *_offloaded(found, model, target, work)]
    room = [choice for choice in found if choice.estimate.fits]
    goal = min((_seconds(choice) for choice in room), default=0.0)
    faster = [choice for choice in found if not choice.estimate.fits and _seconds(choice) < goal]
    mixed = (
        _mixture(fast, slim, model, target, work)
        for fast in faster
        for slim in room
        if (fast.sizes, fast.microbatches) == (slim.sizes, slim.microbatches)
    )
    return [*found, *(choice for choice in mixed if choice is not None)]


def _seconds(choice: Choice) -> float:
    return choice.estimate.bounds.halfway


def _mixture(fast: Choice, slim: Choice, model: ModelConfig, target: Target, work: Workload) -> Choice | None:
    """As many layers of the faster way as fit, the others of the other way; None where not one fits."""
    fits, too_many = 0, model.num_layers
    best = None
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        groups = _layers(fast, count), _layers(slim, model.num_layers - count)
        choice = _choice(slim, groups, model, target, work)
        if choice.estimate.fits:
            fits, best = count, choice
        else:
            too_many = count
    return best


def _layers(choice: Choice, count: int) -> LayerGroup:
    return dataclasses.replace(choice.groups[0], layers=count)


def _choice(like: Choice, groups: tuple[LayerGroup, ...], model: ModelConfig, target: Target, work: Workload) -> Choice:
    """Another way to execute the layers in the same step."""
    part = dataclasses.replace(work, microbatches=like.microbatches)
    return plan.way(model, like.sizes, target, part, groups, like.tables)


def _offloaded(found: Sequence[Choice], model: ModelConfig, target: Target, work: Workload) -> Iterator[Choice]:
    """The same with all that waits for the backward pass in the host's memory."""
    for choice in found:
        if choice.groups[0].remat != "none":
            group = dataclasses.replace(choice.groups[0], offload=True)
            yield _choice(choice, (group,), model, target, work)
