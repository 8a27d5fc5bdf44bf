"""Tasks about words and numbers with exact answers: an exact referee of what models learn.

All but one kind are for models that read bytes; "place" asks in a sentence, as models that have read much expect it.

The words are those of the texts in Python's standard library. No word and no sequence is in both training and
held-out tasks.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.alignment.conversations import Conversation
from llm_jax.alignment.rewards import Prompt, Response
from llm_jax.config import one_of
from llm_jax.data import readers
from llm_jax.data.documents import HASH_RANGE, text_hash
from llm_jax.errors import require
from llm_jax.tokenization.chat import Message

WORD = re.compile(r"(?<![\w.'\"])[a-z]{4,8}(?![\w('\"=])")
FIRSTS, STEPS, SHOWN = range(1, 201), range(1, 13), 3  # of sequences; and how many numbers are shown
PLACES = {"first": 0, "second": 1, "third": 2, "last": -1}  # of LISTED words
LISTED = 4
QUESTION = re.compile(r"^What is the (\w+) word here\?")  # how a place is asked for


class Task(NamedTuple):
    """What is asked, and the one right answer."""

    kind: str  # a key of KINDS
    request: str
    answer: str


def read_words(count: int, documents: Iterable[str] | None = None) -> list[str]:
    """The words of four to eight letters that most documents have, the most widespread first.

    Args:
        count: how many.
        documents: where they are read; None = the modules of the standard library of the Python that runs.

    Raises:
        UserError: there are not so many.
    """
    texts = readers.standard_library() if documents is None else documents
    found = Counter(word for text in texts for word in set(WORD.findall(text)))
    require(len(found) >= count, f"the texts have {len(found):,} words of 4 to 8 letters; {count:,} are asked for")
    return sorted(found, key=lambda word: (-found[word], word))[:count]


def make(words: Sequence[str], kinds: Sequence[str], holdout_fraction: float) -> tuple[list[Task], list[Task]]:
    """(to train on, held out): the tasks of every word, and the sequences, always the same ones.

    About `holdout_fraction` of the words, chosen by a hash of each, are in held-out tasks only; of the sequences too.

    Raises `UserError` for an unknown kind, and where a side has no words.
    """
    for kind in kinds:
        one_of("kind", kind, tuple(KINDS))
    given = {"continue": [f"{first} {step}" for first in FIRSTS for step in STEPS]}
    sides: tuple[list[Task], list[Task]] = ([], [])
    for kind in kinds:
        for side, subjects in zip(sides, _split(given.get(kind, words), holdout_fraction)):
            side += [_task(kind, subject, subjects) for subject in subjects]
    return sides


def _split(subjects: Iterable[str], fraction: float) -> tuple[list[str], list[str]]:
    sides: tuple[list[str], list[str]] = ([], [])
    for subject in subjects:
        sides[text_hash(subject) < fraction * HASH_RANGE].append(subject)
    require(all(sides), f"{len(sides[0]) + len(sides[1])} words are too few to hold {fraction:.0%} of them out")
    return sides


def _task(kind: str, subject: str, others: Sequence[str]) -> Task:
    """The task of a word, beside which another one may stand, or of a sequence."""
    asked, said = kind, subject
    if kind == "count":
        other = others[text_hash(subject, seed=1) % len(others)]
        letters = subject + other  # drawn from these, so that those that stand there often are asked for often
        asked, said = f"count {letters[text_hash(subject, seed=2) % len(letters)]}", f"{subject} {other}"
    if kind == "continue":
        first, step = map(int, subject.split())
        said = " ".join(str(first + place * step) for place in range(SHOWN))
    request = f"{asked}: {said}"
    if kind == "place":
        words = [subject, *(others[text_hash(subject, seed) % len(others)] for seed in range(1, LISTED))]
        request = f"What is the {list(PLACES)[text_hash(subject, LISTED) % len(PLACES)]} word here? {' '.join(words)}"
    return Task(kind, request, answer(request))


def _count(said: str, words: str) -> str:
    return str(words.count(said))


def _continue(said: str, numbers: str) -> str:
    shown = [int(number) for number in numbers.split()]
    return str(2 * shown[-1] - shown[-2])


def _place(said: str, words: str) -> str:
    return words.split()[PLACES[said]]


# What follows from what is said beside the kind, and from what it is about; see `read`.
KINDS: dict[str, Callable[[str, str], str]] = {
    "backwards": lambda said, word: word[::-1],
    "count": _count,
    "sort": lambda said, word: "".join(sorted(word)),
    "continue": _continue,
    "place": _place,
}


def read(request: str) -> tuple[str, str, str]:
    """(kind, what is said beside it, what it is about): ("count", "a", "banana pear") of "count a: banana pear".

    Raises `UserError` for a text that `make` never writes.
    """
    before, colon, behind = QUESTION.sub(r"place \1:", request).partition(": ")
    kind, _, said = before.partition(" ")
    require(bool(colon) and kind in KINDS, f"no task about words: {request[:40]!r}")
    return kind, said, behind


def answer(request: str) -> str:
    """The right answer to a request that `make` wrote. Raises `UserError` for any other text."""
    kind, said, behind = read(request)
    return KINDS[kind](said, behind)


def exact_match(prompts: Sequence[Prompt], responses: Sequence[Response]) -> np.ndarray:
    """1 for a response that is the answer to the user's last message and came to its end, else 0; float32 [B]."""
    right = [
        response.ended and response.text == answer(prompt[-1].content)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    return np.array(right, np.float32)


def conversation(task: Task) -> Conversation:
    """A task and its answer."""
    return Conversation((Message("user", task.request), Message("assistant", task.answer)), task.kind)
