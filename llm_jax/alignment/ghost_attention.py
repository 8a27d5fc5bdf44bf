"""Ghost Attention: dialogues that teach a model to keep to an instruction long after it was given (LLaMA-2, 3.3).

The data are built in three steps. The instruction is attached to every message of the user's while the replies are
sampled; it stays in the first message only; and of the dialogue, only the last reply is learned (`SUPERVISE`, for
`ChatDataConfig.supervise`), so that no earlier reply, given under an instruction that its own turn no longer shows,
teaches anything. Instructions combine a few constraints at random, and half of them are put shortly.

The constraints here can be checked by a rule. The paper's (hobbies, languages, public figures) cannot.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from llm_jax.alignment.conversations import Conversation, Tally
from llm_jax.data.documents import text_hash
from llm_jax.errors import require
from llm_jax.tokenization.chat import Message

SUPERVISE = "last"
SHORT = 0.5  # the share of instructions that are put shortly
Dialogue = tuple[Message, ...]
Reply = Callable[[Sequence[Dialogue]], Sequence[str]]  # dialogues that end with the user's message -> their replies


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Something that every reply must do, and whether one does."""

    name: str
    instruction: str  # "Always write in capital letters."
    short: str  # "Letters: capital"
    obeys: Callable[[str], bool] = dataclasses.field(compare=False)


def beginning(word: str) -> Constraint:
    """Every reply begins with a word."""
    wanted = word.casefold()
    return Constraint(
        f"begin_{wanted}",
        f'Always begin your reply with the word "{word}".',
        f"First word: {word}",
        lambda reply: reply.strip().casefold().startswith(wanted),
    )


def ending(word: str) -> Constraint:
    """Every reply ends with a word."""
    wanted = word.casefold()
    return Constraint(
        f"end_{wanted}",
        f'Always end your reply with the word "{word}".',
        f"Last word: {word}",
        lambda reply: reply.strip().casefold().rstrip('.!?"。！？').endswith(wanted),
    )


def at_most(words: int) -> Constraint:
    """No reply has more words."""
    return Constraint(
        f"at_most_{words}_words",
        f"Always reply in at most {words} words.",
        f"Words: at most {words}",
        lambda reply: 0 < len(reply.split()) <= words,
    )


CAPITALS = Constraint(
    "capitals",
    "Always write your reply in capital letters.",
    "Letters: capital",
    lambda reply: any(map(str.isalpha, reply)) and reply == reply.upper(),
)
CONSTRAINTS = (*map(beginning, ("Well", "Indeed")), *map(ending, ("over", "friend")), CAPITALS, at_most(6))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Constraints, and the words that ask for them."""

    constraints: tuple[Constraint, ...]
    text: str

    def obeys(self, reply: str) -> bool:
        """Whether a reply keeps to every constraint."""
        return all(constraint.obeys(reply) for constraint in self.constraints)


def draw(constraints: Sequence[Constraint], most: int, generator: np.random.Generator) -> Instruction:
    """One to `most` constraints at random, put shortly in half of the cases. Raises `UserError` without any."""
    require(bool(constraints) and most > 0, "Ghost Attention needs at least one constraint to draw from")
    count = int(generator.integers(1, min(most, len(constraints)) + 1))
    chosen = tuple(constraints[i] for i in sorted(generator.choice(len(constraints), count, replace=False)))
    if generator.random() < SHORT:
        return Instruction(chosen, "; ".join(constraint.short for constraint in chosen))
    return Instruction(chosen, " ".join(constraint.instruction for constraint in chosen))


def attach(dialogue: Sequence[Message], instruction: str, first_only: bool = False) -> Dialogue:
    """The dialogue with an instruction before the user's messages: before each of them, or before the first alone."""
    attached, asked = [], False
    for message in dialogue:
        if message.role == "user" and not (first_only and asked):
            message = dataclasses.replace(message, content=f"{instruction}\n{message.content}")
            asked = True
        attached.append(message)
    return tuple(attached)


def converse(questions: Sequence[Sequence[str]], instructions: Sequence[str], reply: Reply) -> list[Dialogue]:
    """Dialogues over lists of questions, every reply sampled with the instruction in all messages of the user's.

    They come without the instruction, and all dialogues of a turn are sampled at once.
    """
    require(
        len(questions) == len(instructions),
        f"{len(questions)} dialogues for {len(instructions)} instructions: one each",
    )
    dialogues: list[Dialogue] = [()] * len(questions)
    for turn in range(max(map(len, questions), default=0)):
        going = [i for i, asked in enumerate(questions) if turn < len(asked)]
        open_dialogues = [(*dialogues[i], Message("user", questions[i][turn])) for i in going]
        replies = reply([attach(open_, instructions[i]) for i, open_ in zip(going, open_dialogues)])
        require(len(replies) == len(going), f"{len(replies)} replies to {len(going)} dialogues: one each")
        for i, open_, said in zip(going, open_dialogues, replies):
            dialogues[i] = (*open_, Message("assistant", said))
    return dialogues


def build(
    questions: Iterable[Sequence[str]],
    reply: Reply,
    *,
    constraints: Sequence[Constraint] = CONSTRAINTS,
    most_constraints: int = 2,
    seed: int = 0,
    source: str = "ghost_attention",
) -> tuple[list[Conversation], Tally]:
    """Conversations for fine-tuning: the instruction in the first message, the last reply to be learned.

    A dialogue whose last reply does not keep to its instruction is left out: it would teach the contrary. The paper
    does not say that it checks; a model small enough to try this on disobeys too often not to.

    Args:
        questions: of each dialogue, the user's messages.
        reply: samples the latest model.
        constraints: to draw from.
        most_constraints: of one instruction.
        seed: of the instructions, which follow from it and the questions.
        source: of the conversations.
    """
    asked = [list(each) for each in questions]
    drawn = [draw(constraints, most_constraints, np.random.default_rng(text_hash("\n".join(q), seed))) for q in asked]
    dialogues = converse(asked, [instruction.text for instruction in drawn], reply)
    kept, tally = [], Tally()
    for number, (instruction, dialogue) in enumerate(zip(drawn, dialogues), start=1):
        if dialogue and instruction.obeys(dialogue[-1].content):
            messages = attach(dialogue, instruction.text, first_only=True)
            kept.append(Conversation(messages, source, f"dialogue {number}"))
        else:
            tally.add("last reply disobeys", f"dialogue {number}", repr(dialogue[-1].content[:30]) if dialogue else "")
    return kept, tally


def obedience(instruction: Instruction, questions: Sequence[str], reply: Reply) -> list[bool]:
    """Whether each reply of a dialogue keeps to an instruction that only the first message gives (table 30)."""
    dialogue: Dialogue = ()
    kept = []
    for question in questions:
        dialogue = (*dialogue, Message("user", question))
        (said,) = reply([attach(dialogue, instruction.text, first_only=True)])
        dialogue = (*dialogue, Message("assistant", said))
        kept.append(instruction.obeys(said))
    return kept
