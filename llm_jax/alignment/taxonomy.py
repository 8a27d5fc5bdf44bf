"""Which prompts to ask people about: classes of prompts in three tiers, and a choice that is balanced over them.

Baichuan-2 classifies prompts into 6 primary, 30 secondary and over 200 tertiary classes, Qwen with some 6,600 tags,
and both choose prompts by diversity and complexity. Neither publishes its classes; those below are our own, few, and
made to be replaced.

Shape suffixes: I prompts, D embedding dimensions.
"""

import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.stats import rankdata

from llm_jax.config import unknown_key
from llm_jax.errors import UserError, require

Tree = Mapping[str, Mapping[str, Sequence[str]]]  # primary -> secondary -> tertiary classes

TREE: Tree = {
    "knowledge": {
        "nature": ("physics", "chemistry", "biology", "earth and space"),
        "society": ("history", "law", "economy", "geography"),
        "culture": ("literature", "arts", "language", "customs"),
        "everyday life": ("health", "food", "travel", "household"),
    },
    "writing": {
        "stories and verse": ("story", "poem", "dialogue", "song"),
        "practical texts": ("letter", "report", "advertisement", "speech"),
        "reviews": ("film", "product", "book", "place"),
    },
    "text work": {
        "shortening": ("summary", "title", "key points"),
        "rewriting": ("translation", "correction", "change of style", "continuation"),
        "reading": ("question on a text", "extraction", "classification"),
    },
    "reasoning": {
        "mathematics": ("arithmetic", "algebra", "geometry", "probability"),
        "logic": ("deduction", "puzzle", "common sense"),
        "planning": ("schedule", "decision", "instructions"),
    },
    "code": {
        "writing code": ("function", "program", "query", "test"),
        "understanding code": ("explanation", "debugging", "review"),
        "tools": ("command line", "configuration", "library use"),
    },
    "conversation": {
        "company": ("small talk", "advice", "encouragement"),
        "role play": ("person", "character", "interview"),
        "about the assistant": ("identity", "abilities", "opinions"),
    },
    "safety": {
        "harm to people": ("violence", "self-harm", "harassment", "hate"),
        "unlawful acts": ("fraud", "drugs", "weapons", "intrusion into computers"),
        "risky advice": ("medical", "legal", "financial"),
        "privacy": ("personal data", "surveillance"),
    },
}
SEPARATOR = "/"
WORD = re.compile(r"[\u3400-\u9fff]|[^\W\d_\u3400-\u9fff]+|\d+")  # of Chinese, the characters


def classes(tree: Tree = TREE) -> tuple[str, ...]:
    """All tertiary classes with the classes above them: "primary/secondary/tertiary"."""
    return tuple(
        SEPARATOR.join((primary, secondary, tertiary))
        for primary, below in tree.items()
        for secondary, last in below.items()
        for tertiary in last
    )


def read_tree(path: str | Path) -> Tree:
    """Another tree out of a JSON file, {primary: {secondary: [tertiary, ...]}}; `UserError` if it is none."""
    path = Path(path)
    require(path.is_file(), f"no taxonomy at {path}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    wanted = f"{path}: a taxonomy is an object of objects of lists of names: {{primary: {{secondary: [tertiary]}}}}"
    require(isinstance(tree, dict) and all(isinstance(below, dict) for below in tree.values()), wanted)
    lists = [last for below in tree.values() for last in below.values()]
    require(all(isinstance(last, list) and all(isinstance(name, str) for name in last) for last in lists), wanted)
    names = [*tree, *(name for below in tree.values() for name in below), *itertools.chain(*lists)]
    wrong = next((name for name in names if SEPARATOR in name or not name.strip()), None)
    require(wrong is None, f"{path}: the class {wrong!r} is empty or holds {SEPARATOR!r}, which parts the tiers")
    repeated = [name for name, count in Counter(classes(tree)).items() if count > 1]
    require(not repeated, f"{path}: the class {''.join(repeated[:1])!r} is there twice")
    require(bool(lists), f"{path} has no classes")
    return tree


def check_category(category: str, tree: Tree = TREE) -> None:
    """Raise `UserError`, naming the nearest one, unless a category is a tertiary class."""
    known = classes(tree)
    if category not in known:
        raise UserError(unknown_key(category, list(known)).replace("config key", "class"))


def tier(category: str, depth: int) -> str:
    """A class's own first tiers: of "code/tools/library use", "code" at depth 1 and "code/tools" at depth 2."""
    require(depth in (1, 2, 3), f"a class has tiers 1, 2 and 3, not {depth}")
    return SEPARATOR.join(category.split(SEPARATOR)[:depth])


def coverage(categories: Iterable[str], depth: int = 1, tree: Tree = TREE) -> dict[str, int]:
    """How many prompts every class of a tier has, those with none among them; `UserError` for an unknown category."""
    found = dict.fromkeys((tier(known, depth) for known in classes(tree)), 0)
    for category in categories:
        check_category(category, tree)
        found[tier(category, depth)] += 1
    return found


def choose(
    texts: Sequence[str],
    count: int,
    categories: Sequence[str] = (),
    embeddings_ID: np.ndarray | None = None,
    difficulties_I: np.ndarray | None = None,
    clusters: int = 16,
    levels: int = 3,
    seed: int = 0,
) -> list[int]:
    """Choose prompts that are balanced over classes, in these over clusters, in these over levels of difficulty.

    Args:
        texts: of the prompts.
        count: of prompts to choose.
        categories: of the prompts, balanced tier by tier; () = all of one class.
        embeddings_ID: to cluster by, a model's for example; None = those of `hashed_ngrams`.
        difficulties_I: anything that is larger for harder prompts; None = those of `difficulty`.
        clusters: of embeddings, over all the prompts, at most.
        levels: of difficulty, with as many prompts in each.
        seed: of the clusters and of what is drawn where there is a choice.

    Returns:
        Places in `texts`, all different, the most balanced first: any beginning of the list is balanced, too.

    Raises:
        UserError: an argument has another length than `texts`, or there are fewer prompts than `count`.
    """
    require(0 < count <= len(texts), f"{count} prompts are wanted of {len(texts)}")
    require(clusters > 0 and levels > 0, f"clusters={clusters} and levels={levels} must be positive")
    embeddings_ID = hashed_ngrams(texts) if embeddings_ID is None else np.asarray(embeddings_ID, np.float32)
    difficulties_I = difficulty(texts) if difficulties_I is None else np.asarray(difficulties_I, float)
    for name, values in (("categories", categories or texts), ("embeddings", embeddings_ID),
                         ("difficulties", difficulties_I)):  # fmt: skip
        require(len(values) == len(texts), f"there are {len(values)} {name} for {len(texts)} prompts")
        numbers = values if isinstance(values, np.ndarray) else np.zeros(0)
        require(bool(np.all(np.isfinite(numbers))), f"the {name} are not all finite")
    cluster_I = k_means(embeddings_ID, clusters, seed)
    level_I = (rankdata(difficulties_I, "ordinal") - 1) * levels // len(texts)
    keys = [
        (*(tier(categories[i], depth) if categories else "" for depth in (1, 2, 3)), cluster_I[i], level_I[i])
        for i in range(len(texts))
    ]
    return balanced_order(keys, seed)[:count]


def balanced_order(keys: Sequence[tuple[Hashable, ...]], seed: int = 0) -> list[int]:
    """Order things so that every beginning is as even as can be over first keys, and in each over the second, ...

    Args:
        keys: of every thing, from the coarsest to the finest, as many for each.
        seed: of the order where the keys leave it open.
    """
    generator = np.random.default_rng(seed)

    def ordered(members: list[int], depth: int) -> list[int]:
        members = generator.permutation(members).tolist()
        if depth == len(keys[members[0]]):
            return members
        groups: dict[Hashable, list[int]] = {}
        for i in members:
            groups.setdefault(keys[i][depth], []).append(i)
        layers = itertools.zip_longest(*(ordered(group, depth + 1) for group in groups.values()))
        return [i for layer in layers for i in layer if i is not None]

    return ordered(list(range(len(keys))), 0) if keys else []


def hashed_ngrams(texts: Sequence[str], dimension: int = 512, sizes: Sequence[int] = (1, 2, 3)) -> np.ndarray:
    """An embedding of each text without a model: its character n-grams, hashed with signs; float32 [I, D] of length 1.

    An n-gram counts by the square root of how often it is there. A text without characters is all zeros.
    """
    found_ID = np.zeros((len(texts), dimension), np.float32)
    for row_D, text in zip(found_ID, texts):
        text = " ".join(text.lower().split())
        grams = Counter(text[i : i + size] for size in sizes for i in range(len(text) - size + 1))
        hashes = np.array([zlib.crc32(gram.encode("utf-8", "surrogatepass")) for gram in grams], np.uint32)
        signs = np.where(hashes >> 31, -1.0, 1.0)
        np.add.at(row_D, hashes % dimension, signs * np.sqrt(np.array(list(grams.values()), float)))
    return found_ID / np.maximum(np.linalg.norm(found_ID, axis=1, keepdims=True), 1e-12)


def k_means(embeddings_ID: np.ndarray, clusters: int, seed: int = 0) -> np.ndarray:
    """The cluster of each embedding, from 0, by k-means with spread starts; int32 [I].

    There are no more clusters than different embeddings.
    """
    different = len(np.unique(embeddings_ID, axis=0))
    generator = np.random.default_rng(seed)
    points_ID = embeddings_ID.astype(np.float64)
    _, cluster_I = kmeans2(points_ID, min(clusters, different), iter=30, minit="++", rng=generator)
    return cluster_I


def difficulty(texts: Sequence[str]) -> np.ndarray:
    """A proxy for how complex each prompt is, from 0 to 1: the mean rank of its length and of its words' rarity.

    Ours; no report gives its own. The rarity of a text is the mean over its words (Chinese: characters) of the
    negative log of the share of texts that have the word. float64 [I].
    """
    words = [WORD.findall(text.lower()) for text in texts]
    having = Counter(word for found in words for word in set(found))
    rarity_I = [-np.mean(np.log([having[word] / len(texts) for word in found])) if found else 0.0 for found in words]
    length_I = [len(text) for text in texts]
    return (rankdata(length_I) + rankdata(rarity_I)) / (2 * len(texts))
