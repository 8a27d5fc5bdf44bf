"""Ghost Attention: dialogues that teach a model to keep to an instruction long after it was given (LLaMA-2, 3.3).

The data are built in three steps. The instruction is attached to every message of the user's while the replies are
sampled; it stays in the first message only; and of the dialogue, only the last reply is learned, so that no earlier
reply, given under an instruction that its own turn no longer shows, teaches anything. Instructions combine a few
constraints at random, and half of them are put shortly.

`VARIANTS` are what a model is fine-tuned on, from the same dialogues: that recipe, none of it, and parts of it.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.alignment.constraints import Constraint, Instruction, draw
from llm_jax.alignment.conversations import Conversation
from llm_jax.data.documents import text_hash
from llm_jax.errors import require
from llm_jax.tokenization.chat import Message

Dialogue = tuple[Message, ...]
Reply = Callable[[Sequence[Dialogue]], Sequence[str]]  # dialogues that end with the user's message -> their replies


def attach(dialogue: Sequence[Message], instruction: str, first_only: bool = False) -> Dialogue:
    """The dialogue with an instruction before the user's messages: before each of them, or before the first alone."""
    attached, asked = [], False
    for message in dialogue:
        if message.role == "user" and instruction and not (first_only and asked):
            message = dataclasses.replace(message, content=f"{instruction}\n{message.content}")
            asked = True
        attached.append(message)
    return tuple(attached)


def converse(
    questions: Sequence[Sequence[str]],
    instructions: Sequence[str],
    reply: Reply,
    *,
    first_only: bool = False,
    change: Callable[[int, str], str] | None = None,
) -> list[Dialogue]:
    """Dialogues over lists of questions, every reply sampled with the instruction in the user's messages.

    They come without the instruction, and all dialogues of a turn are sampled at once.

    Args:
        questions: of each dialogue, the user's messages.
        instructions: of each dialogue; "" = none.
        reply: the model.
        first_only: the instruction stands in the first message alone, not in all.
        change: (a dialogue's number, a reply) -> what the assistant is taken to have said instead.
    """
    require(
        len(questions) == len(instructions),
        f"{len(questions)} dialogues for {len(instructions)} instructions: one each",
    )
    dialogues: list[Dialogue] = [()] * len(questions)
    for turn in range(max(map(len, questions), default=0)):
        going = [i for i, asked in enumerate(questions) if turn < len(asked)]
        open_dialogues = [(*dialogues[i], Message("user", questions[i][turn])) for i in going]
        replies = reply([attach(open_, instructions[i], first_only) for i, open_ in zip(going, open_dialogues)])
        require(len(replies) == len(going), f"{len(replies)} replies to {len(going)} dialogues: one each")
        for i, open_, said in zip(going, open_dialogues, replies):
            dialogues[i] = (*open_, Message("assistant", said if change is None else change(i, said)))
    return dialogues


class Told(NamedTuple):
    """A dialogue whose last reply keeps to an instruction that all of the user's messages gave."""

    instruction: Instruction
    dialogue: Dialogue  # without the instruction

    @property
    def questions(self) -> list[str]:
        """What the user asked."""
        return [message.content for message in self.dialogue if message.role == "user"]


@dataclasses.dataclass
class Yield:
    """How many replies kept to their instruction, and how many dialogues could be used."""

    replies: Counter[str] = dataclasses.field(default_factory=Counter)  # by the names of the constraints
    obeyed: Counter[str] = dataclasses.field(default_factory=Counter)  # the same, of those that obeyed
    sampled: int = 0  # dialogues
    kept: int = 0

    def note(self, instruction: Instruction, obeyed: Sequence[bool], kept: bool) -> None:
        """Count a dialogue and its replies."""
        self.sampled, self.kept = self.sampled + 1, self.kept + kept
        self.replies[instruction.name] += len(obeyed)
        self.obeyed[instruction.name] += sum(obeyed)

    def __add__(self, other: "Yield") -> "Yield":
        sums = self.replies + other.replies, self.obeyed + other.obeyed
        return Yield(*sums, self.sampled + other.sampled, self.kept + other.kept)

    def shares(self) -> dict[str, float]:
        """Of the replies under each instruction, how many kept to it."""
        return {name: self.obeyed[name] / total for name, total in sorted(self.replies.items())}


def build(
    questions: Iterable[Sequence[str]],
    reply: Reply,
    *,
    constraints: Sequence[Constraint],
    most_constraints: int = 2,
    mended: bool = False,
    seed: int = 0,
) -> tuple[list[Told], Yield]:
    """Dialogues to be learned from, each cut after one of its replies that keep to its instruction.

    Which one is drawn at random, so that dialogues come in all lengths; one turn is not enough, as long as there are
    others, and nothing is kept from a reply on that is empty or was said before. A dialogue without such a reply is
    left out: it would teach the contrary. The paper does not say that it checks; a model small enough to try this on
    disobeys and repeats itself too often not to.

    Args:
        questions: of each dialogue, the user's messages.
        reply: samples the latest model.
        constraints: to draw from.
        most_constraints: of one instruction.
        mended: change the replies by rule where they disobey (ours, for models that cannot do what they are told).
        seed: of the instructions and lengths, which follow from it and the questions.
    """
    asked = [list(each) for each in questions]
    generators = [np.random.default_rng(text_hash("\n".join(each), seed)) for each in asked]
    drawn = [draw(constraints, most_constraints, generator) for generator in generators]
    change = (lambda i, said: drawn[i].mended(said)) if mended else None
    dialogues = converse(asked, [instruction.text for instruction in drawn], reply, change=change)
    kept, found = [], Yield()
    for instruction, dialogue, generator in zip(drawn, dialogues, generators):
        obeyed = [instruction.obeys(message.content) for message in dialogue[1::2]]
        places = np.flatnonzero(obeyed)
        places = places[places > 0] if len(obeyed) > 1 else places
        places = places[places < _good_for([message.content for message in dialogue[1::2]])]
        found.note(instruction, obeyed, bool(len(places)))
        if len(places):
            kept.append(Told(instruction, dialogue[: 2 * (int(generator.choice(places)) + 1)]))
    return kept, found


def _good_for(replies: Sequence[str]) -> int:
    """How many replies there are before the first that is empty or was said before."""
    bad = (i for i, (said, again) in enumerate(zip(replies, said_before(replies))) if again or not said.strip())
    return next(bad, len(replies))


def said_before(replies: Sequence[str]) -> list[bool]:
    """Whether each reply of a dialogue is one of the earlier ones, word for word: an instruction is easily kept so."""
    return [said in replies[:i] for i, said in enumerate(replies)]


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is made of a dialogue for fine-tuning, and which of its replies are learned."""

    title: str
    supervise: str  # for `ChatDataConfig.supervise`
    conversation: Callable[[Told], Dialogue] = dataclasses.field(compare=False)
    told: bool = True  # replies sampled with the instruction; else without any


def _in_first(told: Told) -> Dialogue:
    return attach(told.dialogue, told.instruction.text, first_only=True)


def _in_every(told: Told) -> Dialogue:
    return attach(told.dialogue, told.instruction.text)


def _last_round(told: Told) -> Dialogue:
    return attach(told.dialogue[-2:], told.instruction.text)


VARIANTS: Mapping[str, Variant] = {
    "baseline": Variant("without Ghost Attention", "replies", lambda told: told.dialogue, told=False),
    "ghost": Variant("Ghost Attention", "last", _in_first),
    "all_replies": Variant("all replies learned", "replies", _in_first),
    "every_message": Variant("instruction in every message", "last", _in_every),
    "one_turn": Variant("dialogues of one turn", "last", _last_round),
}


def training_data(name: str, kept: Sequence[Told], untold: Sequence[Dialogue]) -> list[Conversation]:
    """The conversations of a variant of VARIANTS; `untold` are the same questions, answered without an instruction."""
    variant = VARIANTS[name]
    used = kept if variant.told else [Told(told.instruction, dialogue) for told, dialogue in zip(kept, untold)]
    return [Conversation(variant.conversation(told), name, f"dialogue {i}") for i, told in enumerate(used, 1)]


def obedience(instructions: Sequence[Instruction], dialogues: Sequence[Dialogue]) -> list[list[bool]]:
    """Of each dialogue, whether each of its replies keeps to its instruction."""
    return [
        [instruction.obeys(message.content) for message in dialogue if message.role == "assistant"]
        for instruction, dialogue in zip(instructions, dialogues)
    ]
