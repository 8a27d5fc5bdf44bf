"""Two responses to every prompt, to be compared by people or by a reward model.

LLaMA-2 (3.2.1) samples them from two different variants of the model, and varies the temperature.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.alignment.conversations import Tally
from llm_jax.data.documents import text_hash
from llm_jax.errors import require
from llm_jax.tokenization.chat import Message

Prompt = tuple[Message, ...]
Sampler = Callable[[Sequence[Prompt], float, int], Sequence[str]]  # (prompts, temperature, seed) -> their responses


class Variant(NamedTuple):
    """A model, and the temperatures it is sampled at."""

    name: str
    sample: Sampler
    temperatures: tuple[float, ...] = (0.7, 1.0)


class Candidates(NamedTuple):
    """Two different responses to a prompt, in no order, and where each comes from: ("model", temperature)."""

    prompt: Prompt
    responses: tuple[str, str]
    origins: tuple[tuple[str, float], tuple[str, float]]


def respond_twice(
    prompts: Iterable[Prompt], variants: Sequence[Variant], seed: int = 0, attempts: int = 3
) -> tuple[list[Candidates], Tally]:
    """Sample two responses to each prompt from two variants, or from one variant at two temperatures.

    Which ones follows from the prompt and `seed` alone; all prompts of a model and temperature are sampled at once.

    Args:
        prompts: each ends with the user's message; repeated ones are asked once.
        variants: the models.
        seed: of the choices, and of the samplers, each call of which has another one.
        attempts: how often a prompt whose responses are equal or empty is asked, before it is left out.

    Returns:
        Candidates in the order of the prompts, and the prompts left out by why.

    Raises:
        UserError: there are no two ways to respond, or a sampler does not give each prompt one response.
    """
    _check(variants, attempts)
    waiting = list(dict.fromkeys(prompts))
    places = {prompt: i for i, prompt in enumerate(waiting)}
    found: list[Candidates] = []
    reasons: dict[Prompt, str] = {}
    for attempt in range(attempts):
        for candidates in _ask(waiting, variants, seed, attempt):
            first, second = (response.strip() for response in candidates.responses)
            reasons[candidates.prompt] = "empty response" if not (first and second) else "equal responses"
            if first and second and first != second:
                found.append(candidates)
                del reasons[candidates.prompt]
        waiting = [prompt for prompt in waiting if prompt in reasons]
    tally = Tally()
    for prompt in waiting:
        tally.add(reasons[prompt], f"prompt {places[prompt] + 1}", repr(prompt[-1].content[:30]))
    return sorted(found, key=lambda candidates: places[candidates.prompt]), tally


def _check(variants: Sequence[Variant], attempts: int) -> None:
    require(attempts > 0, f"attempts={attempts} must be positive")
    names = [variant.name for variant in variants]
    require(len(set(names)) == len(names), f"two variants have the same name: {', '.join(names)}")
    for variant in variants:
        right = bool(variant.temperatures) and min(variant.temperatures) >= 0
        require(right, f"variant {variant.name!r} needs temperatures of 0 or above, got {variant.temperatures}")
    ways = len(variants) > 1 or (len(variants) == 1 and len(set(variants[0].temperatures)) > 1)
    require(ways, "two responses need two variants of the model, or two temperatures of one")


def _ask(prompts: Sequence[Prompt], variants: Sequence[Variant], seed: int, attempt: int) -> list[Candidates]:
    """One round of questions: two responses to every prompt."""
    drawn = [_two_ways(prompt, variants, seed, attempt) for prompt in prompts]
    batches: dict[tuple[int, float], list[tuple[int, int]]] = defaultdict(list)
    for i, ways in enumerate(drawn):
        for place, way in enumerate(ways):
            batches[way].append((i, place))
    responses: dict[tuple[int, int], str] = {}
    for call, ((number, temperature), asked) in enumerate(sorted(batches.items())):
        variant = variants[number]
        call_seed = int(np.random.default_rng([seed, attempt, call]).integers(1 << 31))
        given = variant.sample([prompts[i] for i, _ in asked], temperature, call_seed)
        require(
            len(given) == len(asked), f"variant {variant.name!r} gave {len(given)} responses to {len(asked)} prompts"
        )
        responses.update(zip(asked, given))
    return [
        Candidates(
            prompt,
            (responses[i, 0], responses[i, 1]),
            ((variants[one[0]].name, one[1]), (variants[other[0]].name, other[1])),
        )
        for i, (prompt, (one, other)) in enumerate(zip(prompts, drawn))
    ]


def _two_ways(prompt: Prompt, variants: Sequence[Variant], seed: int, attempt: int) -> list[tuple[int, float]]:
    """Two (variant, temperature), of different variants if there are two."""
    words = "\n".join(f"{message.role}: {message.content}" for message in prompt)
    generator = np.random.default_rng([seed, attempt, text_hash(words)])
    if len(variants) == 1:
        temperatures = sorted(set(variants[0].temperatures))
        return [(0, float(t)) for t in generator.choice(temperatures, 2, replace=False)]
    chosen = generator.choice(len(variants), 2, replace=False)
    return [(int(number), float(generator.choice(variants[number].temperatures))) for number in chosen]
