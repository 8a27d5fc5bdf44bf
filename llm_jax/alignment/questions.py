"""What people might ask in the turns of a long dialogue: made of subjects and forms, or taken from conversations.

The made ones suit any turn, and have no answer that would be right or wrong: they are for trying out how a model
replies, not what it knows.
"""

from collections.abc import Sequence

import numpy as np

from llm_jax.alignment import conversations
from llm_jax.alignment.conversations import Conversation, Tally
from llm_jax.data.documents import HASH_RANGE, text_hash
from llm_jax.errors import require

SUBJECTS = (
    "apples", "bees", "bicycles", "birds", "boats", "books", "bridges", "cakes", "camels", "candles", "carpets",
    "castles", "cats", "chairs", "cherries", "cities", "clocks", "clouds", "coats", "coins", "cows", "deserts", "dogs",
    "dolphins", "doors", "dragons", "drums", "elephants", "farms", "festivals", "fish", "flowers", "forests", "foxes",
    "gardens", "ghosts", "guitars", "hats", "holidays", "horses", "hotels", "islands", "jokes", "kites", "lakes",
    "lamps", "lemons", "letters", "libraries", "lions", "maps", "markets", "mirrors", "mountains", "mushrooms",
    "oceans", "onions", "owls", "paintings", "parks", "pencils", "pianos", "planets", "poems", "potatoes", "rabbits",
    "rivers", "robots", "roses", "sandwiches", "schools", "shadows", "sheep", "ships", "shoes", "snakes", "songs",
    "spiders", "stars", "storms", "stories", "stones", "swans", "tea", "teachers", "theatres", "tigers", "tomatoes",
    "towers", "toys", "trains", "trees", "trumpets", "turtles", "umbrellas", "villages", "volcanoes", "whales",
    "windows", "winters", "wolves",
)  # fmt: skip
FORMS = (
    "Tell me about {}.",
    "What do you think of {}?",
    "Why do people like {}?",
    "Where can I find {}?",
    "What should I know about {}?",
    "How would you explain {} to a child?",
    "Give me an idea for a story about {}.",
    "What is the best thing about {}?",
    "Do you like {}?",
    "What do {} look like?",
    "Is there anything new about {}?",
    "Can you describe {} for me?",
)


def make() -> list[Conversation]:
    """Every form of question about every subject; a conversation holds all that are about one."""
    return [
        Conversation(tuple(conversations.Message("user", form.format(subject)) for form in FORMS), "made", subject)
        for subject in SUBJECTS
    ]


def load(path: str, holdout_fraction: float) -> tuple[list[str], list[str], Tally]:
    """(to train on, held out, what was left out): the user's messages of conversations; without a path, made ones.

    Questions of one conversation, or about one subject, are on one side. Raises `UserError` as `conversations.read`.
    """
    found, tally = conversations.read(path) if path else (make(), Tally())
    # Not by the first message, as conversations are split for training: here any message may become the first.
    sides: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for conversation in found:
        held_out = text_hash(conversation.record, seed=1) < holdout_fraction * HASH_RANGE
        sides[held_out].update((m.content, None) for m in conversation.messages if m.role == "user")
    train, heldout = sides
    return list(train), [question for question in heldout if question not in train], tally


def dialogues(pool: Sequence[str], count: int, turns: int, generator: np.random.Generator) -> list[list[str]]:
    """So many lists of different questions. Raises `UserError` where there are not enough questions for one."""
    require(len(pool) >= turns, f"{len(pool)} questions are too few for dialogues of {turns} different ones: add some")
    return [[pool[i] for i in generator.choice(len(pool), turns, replace=False)] for _ in range(count)]
