"""Which language a document is written in.

A text is looked at through a few windows spread over it; one whose windows disagree is looked at line by line, and gets
the share of each language. What a window holds is decided by its script where most of it is in one that few languages
use: kana is Japanese, Hangul Korean, Han Chinese. Any other window is given to py3langid's classifier. Cantonese is
told from Mandarin by the characters of the whole text that only one of them writes: the classifier knows Cantonese, but
takes nearly half of an idiom dictionary for Wu.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import daft
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, col

from llm_jax.config import positive
from llm_jax.data.loops import compiled
from llm_jax.data.ngrams import Integers, utf8_buffer
from llm_jax.data.stages import BECAUSE, CODE, DROPPED, Result, groups, language_model, marks
from llm_jax.errors import require

UNKNOWN = "und"
NO_LANGUAGE = "zxx"  # what the classifier calls numbers, tables and program text
# Characters that written Cantonese uses all the time and Mandarin hardly ever, and the other way round.
CANTONESE = "嘅咗喺唔嚟哋冇啲咁佢嘢噉嗰嗌攞畀瞓攰喎啱嘥揾搵掟諗嬲噃喐"
MANDARIN = "的了是们們这這那没沒吗嗎呢么麼她他和"
LATIN, HAN, KANA, HANGUL, YUE, ZH, OTHER = range(7)
HUNDREDTHS = pa.array([f"{number / 100:.2f}" for number in range(101)])


@dataclasses.dataclass(frozen=True)
class LanguageConfig:
    """How texts are looked at, and which languages stay."""

    enabled: bool = True
    wanted: tuple[str, ...] = ()  # documents in other languages are dropped; () = every language is wanted
    windows: int = 4  # of a text, evenly spread
    window_bytes: int = 256
    letters: int = 20  # a window with fewer says nothing; a Chinese character counts as four
    confidence: float = 0.5  # a language less certain than this is not told
    override: float = 0.9  # nor is one that contradicts its source and is less certain than this
    minor: float = 0.05  # a language with less than this share of a document is not listed

    def __post_init__(self) -> None:
        positive(self, "windows", "window_bytes", "letters")
        require(
            0 <= self.confidence <= self.override <= 1,
            f"LanguageConfig: 0 <= confidence={self.confidence} <= override={self.override} <= 1 must hold",
        )


class Seen(NamedTuple):
    """What each of some samples of text is written in."""

    language: npt.NDArray[np.int64]  # [samples] index in the languages of `language_names`
    confidence: npt.NDArray[np.float32]  # [samples]; 0 = too short, or no language
    scripts: Integers  # [samples, 7] how many letters of each


@dataclasses.dataclass(frozen=True)
class Language:
    """Adds `language_score`, and `languages` ("zh 0.71 en 0.29", of documents in several); sets `language`."""

    config: LanguageConfig = LanguageConfig()
    name: str = "language"

    def __post_init__(self) -> None:
        """Raises `UserError` for wanted languages that nothing can tell: before any stage is run."""
        unknown = sorted(set(self.config.wanted) - set(language_names())) if self.config.wanted else []
        require(not unknown, f"LanguageConfig.wanted: nothing tells {', '.join(unknown)} from other languages")

    def prepare(self) -> "Language":
        """Load the model."""
        language_model.load()
        return self

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """The facts hold what sources declare, what was told, and what became of it."""
        fields = {
            "language": DataType.string(),
            "told": DataType.string(),
            "language_score": DataType.float32(),
            "languages": DataType.string(),
            BECAUSE: DataType.string(),
            DROPPED: DataType.string(),
        }
        language_model.load()  # before several threads do
        renamed = documents.with_column_renamed("language", "declared")
        found = marks.mark(renamed, self.judge, fields, scratch, "source", "declared")
        return Result(marks.join(documents, found, *(name for name in fields if name != "told")), facts(found))

    def judge(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """The fields of `apply` for a few documents."""
        declared = batch["declared"].fill_null(UNKNOWN)
        code = np.asarray(pc.equal(batch["format"], CODE))
        texts = pc.if_else(pa.array(code), "", batch["text"]) if code.any() else batch["text"]
        shares, confidence = identify(texts, self.config)
        names = language_names()
        told = pa.array(np.where(confidence > 0, np.asarray(names)[shares.argmax(axis=1)], UNKNOWN))
        agrees = np.asarray(pc.equal(pc.replace_substring_regex(declared, "-.*", ""), told))
        unknown = np.asarray(pc.equal(declared, UNKNOWN))
        needed = np.where(unknown, self.config.confidence, self.config.override)
        certain = (confidence >= needed) & (unknown | (shares.max(axis=1) > 0.5)) & (confidence > 0)
        language = pc.if_else(pa.array(certain & ~agrees & ~code), told, declared)
        dropped = self._unwanted(language) & ~code
        reasons = pc.if_else(pa.array(dropped), pa.scalar("language"), pa.scalar(None, pa.string()))
        because = pc.binary_join_element_wise(told, _hundredths(confidence), " ")
        listed = _lists(shares, names, self.config.minor)
        return {
            "language": language, "told": told, "language_score": pa.array(confidence), "languages": listed,
            BECAUSE: because, DROPPED: reasons,
        }  # fmt: skip

    def _unwanted(self, language: pa.Array) -> npt.NDArray[np.bool_]:
        """Which are in a language that is known and not wanted."""
        if not self.config.wanted:
            return np.zeros(len(language), np.bool_)
        base = pc.replace_substring_regex(language, "-.*", "")
        wanted = pc.is_in(base, pa.array([*self.config.wanted, UNKNOWN]))
        return ~np.asarray(wanted)


def language_names() -> tuple[str, ...]:
    """The languages that can be told."""
    return language_model.load().languages


def identify(texts: pa.Array, config: LanguageConfig) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The share of every language in every text [N, languages], and how certain the languages are [N].

    A text of which nothing is known has all shares 0.
    """
    data, edges = utf8_buffer(texts)
    lengths = np.diff(edges)
    count = np.minimum(config.windows, -(-lengths // config.window_bytes))
    parents = np.repeat(np.arange(len(texts)), count)
    number = np.arange(len(parents)) - np.repeat(np.cumsum(count) - count, count)
    starts = edges[parents] + number * lengths[parents] // count[parents]
    weights = lengths[parents] / count[parents]
    seen = _look(data, starts, edges[parents + 1], config)
    shares, confidence = _shares(seen, parents, weights, len(texts))
    mixed = np.flatnonzero((shares > 0).sum(axis=1) > 1)
    if len(mixed):
        shares[mixed], confidence[mixed] = _by_line(texts.take(pa.array(mixed)), config)
    han, cantonese, mandarin = (np.bincount(parents, seen.scripts[:, i], len(texts)) for i in (HAN, YUE, ZH))
    _tell_cantonese(shares, (cantonese > 1) & (cantonese * 2 > mandarin) & (cantonese * 30 > han))
    return shares, confidence


def _tell_cantonese(shares: npt.NDArray[np.float32], told: npt.NDArray[np.bool_]) -> None:
    """Call the Chinese of these texts Cantonese."""
    zh, yue = (language_names().index(name) for name in ("zh", "yue"))
    shares[told, yue] += shares[told, zh]
    shares[told, zh] = 0


def _by_line(texts: pa.Array, config: LanguageConfig) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """`identify` from the beginning of every line."""
    lines = pc.split_pattern(texts, "\n")
    parents = np.asarray(pc.list_parent_indices(lines))
    data, edges = utf8_buffer(pc.list_flatten(lines))
    seen = _look(data, edges[:-1], edges[1:], config)
    return _shares(seen, parents, np.diff(edges).astype(np.float64), len(texts))


def _shares(
    seen: Seen, parents: Integers, weights: npt.NDArray[np.float64], count: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    width = len(language_names())
    weights = weights * (seen.confidence > 0)
    cells = parents * width + seen.language
    shares = np.bincount(cells, weights, count * width).reshape(count, width)
    total = np.maximum(shares.sum(axis=1), 1e-9)
    confidence = np.bincount(parents, weights * seen.confidence, count) / total
    return (shares / total[:, None]).astype(np.float32), confidence.astype(np.float32)


def _look(data: npt.NDArray[np.uint8], starts: Integers, limits: Integers, config: LanguageConfig) -> Seen:
    """What the samples that begin at `starts`, or at the next character, are written in; `limits` are texts' ends."""
    sample, lengths = _samples(data, starts, limits, config.window_bytes)
    counts = _scripts(sample, _SCRIPTS)
    han = counts[:, [HAN, YUE, ZH]].sum(axis=1)
    alone = han + counts[:, KANA] + counts[:, HANGUL]
    share = 3 * alone / np.maximum(3 * alone + counts[:, LATIN], 1)
    names = language_names()
    choice = np.select(
        [counts[:, HANGUL] * 2 > alone, counts[:, KANA] * 10 > alone],
        [names.index("ko"), names.index("ja")],
        names.index("zh"),
    )
    certainty = share.astype(np.float32)
    by_model = np.flatnonzero(share <= 0.5)
    chances = language_model.probabilities(sample[by_model], lengths[by_model])
    choice[by_model], certainty[by_model] = chances.argmax(axis=1), chances.max(axis=1)
    enough = (counts[:, LATIN] + 4 * alone >= config.letters) & (choice != names.index(NO_LANGUAGE))
    return Seen(choice, np.where(enough & (certainty >= config.confidence), certainty, 0), counts)


@compiled
def _samples(
    data: npt.NDArray[np.uint8], starts: Integers, limits: Integers, width: int
) -> tuple[npt.NDArray[np.uint8], Integers]:
    """The first `width` bytes from the first character at or after each start on, and their number.

    A row of samples [samples, width + 2] also has the bytes that end the last character; what is beyond a limit is 0.
    """
    samples, lengths = np.zeros((len(starts), width + 2), np.uint8), np.empty(len(starts), np.int64)
    for i in range(len(starts)):
        start, limit = starts[i], limits[i]
        while start < limit and data[start] & 0xC0 == 0x80:
            start += 1
        lengths[i] = min(width, limit - start)
        for place in range(min(width + 2, limit - start)):
            samples[i, place] = data[start + place]
    return samples, lengths


@compiled
def _scripts(samples: npt.NDArray[np.uint8], scripts: npt.NDArray[np.uint8]) -> Integers:
    """How many letters of each script begin in each sample [samples, 7]; LATIN are bytes that are in no other."""
    counts = np.zeros((len(samples), OTHER + 1), np.int64)
    for data, counted in zip(samples, counts):
        for place in range(len(data) - 2):
            byte = data[place]
            if 0x61 <= (byte | 0x20) <= 0x7A or 0xC3 <= byte < 0xE3:
                counted[LATIN] += 1
            elif 0xE3 <= byte < 0xEE:
                second, third = data[place + 1] & 63, data[place + 2] & 63
                counted[scripts[(byte & 15) << 12 | second << 6 | third]] += 1
    return counts


def _script_table() -> npt.NDArray[np.uint8]:
    """The script of every code point of the basic plane."""
    table = np.full(0x10000, OTHER, np.uint8)
    table[0x3400:0xA000] = HAN
    table[0x3040:0x3100] = KANA
    table[0xAC00:0xD7B0] = HANGUL
    table[[ord(character) for character in CANTONESE]] = YUE
    table[[ord(character) for character in MANDARIN]] = ZH
    return table


_SCRIPTS = _script_table()


def _hundredths(confidence: npt.NDArray[np.float32]) -> pa.Array:
    """Numbers from 0 to 1 as text, as `:.2f` writes them."""
    return HUNDREDTHS.take(pa.array(np.rint(confidence.astype(np.float64) * 100).astype(np.int64)))


def _lists(shares: npt.NDArray[np.float32], names: Sequence[str], minor: float) -> pa.Array:
    """The languages of every document that has several, with their shares, the main one first."""
    rows: list[str | None] = [None] * len(shares)
    listed = shares >= minor
    for i in np.flatnonzero(listed.sum(axis=1) > 1):  # few documents are mixed
        order = sorted(np.flatnonzero(listed[i]).tolist(), key=lambda k: (-shares[i, k], names[k]))
        rows[i] = " ".join(f"{names[k]} {shares[i, k]:.2f}" for k in order)
    return pa.array(rows, pa.string())


def facts(found: daft.DataFrame) -> dict[str, Any]:
    """What sources declare, what was told and what became of it, with counts; and how many documents are mixed."""
    keys = ("declared", "told", "language")
    rows = groups.group_by(found, keys).sort(list(keys)).to_pylist()
    mixed = found.where(col("languages").not_null())
    return {"declared_told_language": rows, "mixed_by_source": groups.by_source(mixed)}
