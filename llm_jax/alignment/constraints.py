"""Constraints on replies that a rule can check, the words that ask for them, and instructions that combine them.

The paper's (languages, hobbies, public figures) are checked by people or by another model. Of the ones here, languages
are told by their commonest words, which a small model's broken sentences have, too.

What is kept for judging is never trained on: one wording of every constraint, some pairs of constraints, and any
constraints that the caller sets aside.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from llm_jax.data.documents import HASH_RANGE, text_hash
from llm_jax.errors import require

SHORT = 0.5  # the share of instructions that are put shortly (LLaMA-2, section 3.3)
HELD_OUT_PAIRS = 0.3  # the share of the pairs of constraints that are kept for judging
PAIRS_SEED = 4  # which ones: with this number, some of every experiment's in `configs`
LEAST_WORDS = 2  # of a language, to tell it
# The order in which constraints of these kinds are forced on a reply, so that a later one leaves the earlier ones met.
KINDS = ("language", "length", "role", "last", "first", "letters")
ADDED = 3  # words that mending adds at most: a role's, a first and a last one
CLOSING = ".!?\"'。！？ \n"

COMMON_WORDS = {
    "english": "the a an of and is are was to in it you that for i they we with on be this as not have my your can has",
    "french": "le la les l un une des du de d et est sont je j m il elle nous vous ne n pas que qu qui dans pour sur "
    "avec mon ma mes ce c cette s en au aux plus être comme bien",
    "spanish": "el la los las un una de del y es son yo él ella en que no con por para su mi me se lo al muy como está "
    "estoy este esta hoy pero",
    "german": "der die das ein eine und ist sind ich du er sie wir ihr nicht in im zu mit auf für von dem den des es "
    "auch wie als haben werden kann",
    "portuguese": "o a os as um uma de do da dos das e é são eu em no na que não com por para se mais como muito está "
    "você ao isso",
    "italian": "il lo la gli le l un una di del della che e è sono io in non con per si al come più questo ciao ho",
}
_WORDS = {language: frozenset(words.split()) for language, words in COMMON_WORDS.items()}


@dataclasses.dataclass(frozen=True)
class Constraint:
    """Something that every reply must do, and whether one does."""

    name: str
    kind: str  # one of KINDS; an instruction has at most one constraint of a kind
    instruction: str  # "Always write your reply in capital letters."
    short: str  # "Letters: capital"
    reworded: str  # the same in other words, which are kept for judging
    obeys: Callable[[str], bool] = dataclasses.field(compare=False)
    mend: Callable[[str], str] | None = dataclasses.field(default=None, compare=False)  # makes a reply obey


def language(name: str) -> Constraint:
    """Every reply is in a language of COMMON_WORDS: at least two of its common words, and more than of any other."""
    title = name.capitalize()

    def obeys(reply: str) -> bool:
        words = re.findall(r"[^\W\d_]+", reply.casefold())
        counts = {each: sum(word in known for word in words) for each, known in _WORDS.items()}
        wanted = counts.pop(name)
        return wanted >= LEAST_WORDS and wanted > max(counts.values())

    asked = f"Always reply in {title}.", f"Language: {title}", f"Please answer me in {title} from now on."
    return Constraint(name, "language", *asked, obeys)


def beginning(word: str) -> Constraint:
    """Every reply begins with a word."""
    wanted = word.casefold()
    return Constraint(
        f"begin_{wanted}",
        "first",
        f'Always begin your reply with the word "{word}".',
        f"First word: {word}",
        f'The first word of all that you say must be "{word}".',
        lambda reply: re.match(rf"\s*{re.escape(wanted)}\b", reply.casefold()) is not None,
        lambda reply: f"{word}, {reply.strip()}",
    )


def ending(word: str) -> Constraint:
    """Every reply ends with a word."""
    wanted = word.casefold()
    return Constraint(
        f"end_{wanted}",
        "last",
        f'Always end your reply with the word "{word}".',
        f"Last word: {word}",
        f'Say "{word}" at the end of all your answers.',
        lambda reply: re.search(rf"\b{re.escape(wanted)}$", reply.strip().casefold().rstrip(CLOSING)) is not None,
        lambda reply: f"{reply.strip().rstrip(CLOSING)}, {word}.",
    )


def at_most(words: int) -> Constraint:
    """No reply has more words."""
    require(words > ADDED, f"at_most({words}): a reply needs room for {ADDED} words that others ask for, and one more")
    return Constraint(
        f"at_most_{words}_words",
        "length",
        f"Always reply in at most {words} words.",
        f"Words: at most {words}",
        f"Be brief: no answer may be longer than {words} words.",
        lambda reply: 0 < len(reply.split()) <= words,
        lambda reply: " ".join(reply.split()[: words - ADDED]),
    )


PIRATE = Constraint(
    "pirate",
    "role",
    'Act as a pirate and say "Arr" in every reply.',
    "Role: pirate who says Arr",
    'You are a pirate now, and pirates say "Arr" whenever they speak.',
    lambda reply: re.search(r"\barr+\b", reply.casefold()) is not None,
    lambda reply: f"Arr, {reply.strip()}",
)
QUESTION = Constraint(
    "question",
    "last",
    "Always end your reply with a question mark.",
    "Last sign: ?",
    "Whatever I say, answer with a question.",
    lambda reply: reply.strip().endswith(("?", "？")),
    lambda reply: f"{reply.strip().rstrip(CLOSING)}?",
)
ITEMS = Constraint(
    "list",
    "first",
    "Always answer with a numbered list.",
    "Form: numbered list",
    "I want every answer as a list with numbers.",
    lambda reply: re.match(r"\s*1[.)]\s", reply) is not None,
    lambda reply: f"1. {reply.strip()}",
)
CAPITALS = Constraint(
    "capitals",
    "letters",
    "Always write your reply in capital letters.",
    "Letters: capital",
    "Do not use small letters in your answers.",
    lambda reply: any(map(str.isalpha, reply)) and reply == reply.upper(),
    str.upper,
)
CONSTRAINTS = {
    constraint.name: constraint
    for constraint in (
        *map(language, ("french", "spanish", "german", "portuguese", "italian")),
        *map(beginning, ("Well", "Indeed", "Listen")),
        *map(ending, ("over", "friend", "please")),
        *(PIRATE, QUESTION, ITEMS, CAPITALS, at_most(6)),
    )
}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Constraints, and the words that ask for them."""

    constraints: tuple[Constraint, ...]
    text: str

    @property
    def name(self) -> str:
        """The constraints' names: "french + question"."""
        return " + ".join(constraint.name for constraint in self.constraints)

    def obeys(self, reply: str) -> bool:
        """Whether a reply keeps to every constraint."""
        return all(constraint.obeys(reply) for constraint in self.constraints)

    def mended(self, reply: str) -> str:
        """The reply, changed where it does not keep to a constraint; one that says nothing stays, as nothing is learned
        from it. Raises `UserError` where no rule can do that.
        """
        whole = self.obeys(reply) or not any(map(str.isalnum, reply))
        for constraint in sorted(self.constraints, key=lambda each: KINDS.index(each.kind)):
            # What is short enough is shortened, too, where the others still have to add something.
            if not whole and (constraint.kind == "length" or not constraint.obeys(reply)):
                reply = _mend_of(constraint)(reply)
        return reply


def _mend_of(constraint: Constraint) -> Callable[[str], str]:
    require(constraint.mend is not None, f"no rule can make a reply keep to {constraint.name!r}: sample such replies")
    assert constraint.mend is not None
    return constraint.mend


def is_held_out(pair: Sequence[Constraint]) -> bool:
    """Whether two constraints are kept apart in training, so that asking for both is new."""
    names = sorted(constraint.name for constraint in pair)
    return text_hash(" ".join(names), PAIRS_SEED) < HELD_OUT_PAIRS * HASH_RANGE


def draw(constraints: Sequence[Constraint], most: int, generator: np.random.Generator) -> Instruction:
    """Up to `most` constraints at random, put shortly in half of the cases: an instruction to train on.

    No two are of one kind or a pair that is held out. Raises `UserError` without any constraint.
    """
    require(bool(constraints) and most > 0, "Ghost Attention needs at least one constraint to draw from")
    count = int(generator.integers(1, most + 1))
    chosen: list[Constraint] = []
    for i in generator.permutation(len(constraints)):
        if len(chosen) < count and all(_go_together(constraints[i], other) for other in chosen):
            chosen.append(constraints[i])
    return put(sorted(chosen, key=constraints.index), generator)


def _go_together(one: Constraint, other: Constraint) -> bool:
    return one.kind != other.kind and not is_held_out((one, other))


def put(chosen: Sequence[Constraint], generator: np.random.Generator) -> Instruction:
    """An instruction in training's words: short ones in half of the cases."""
    if generator.random() < SHORT:
        return Instruction(tuple(chosen), "; ".join(constraint.short for constraint in chosen))
    return Instruction(tuple(chosen), " ".join(constraint.instruction for constraint in chosen))


def reword(chosen: Sequence[Constraint]) -> Instruction:
    """An instruction in the words that are kept for judging."""
    return Instruction(tuple(chosen), " ".join(constraint.reworded for constraint in chosen))


def held_out_pairs(constraints: Sequence[Constraint]) -> list[tuple[Constraint, Constraint]]:
    """The pairs that no instruction to train on has, though it could."""
    pairs = itertools.combinations(constraints, 2)
    return [pair for pair in pairs if pair[0].kind != pair[1].kind and is_held_out(pair)]
