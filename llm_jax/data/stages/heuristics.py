"""Documents that look like no text worth reading: too short, mostly symbols, repeating themselves, boilerplate.

The rules are those of Gopher (Rae et al., 2021, appendix A1) and C4 (Raffel et al., 2020, section 2.2) where they fit,
as bounds on a few numbers of a document. Scripts without spaces between words, and code, have bounds of their own.
Bounds are loose: a dictionary, a statute, a psalm with a refrain and a manual with tables are texts.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import daft
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, col

from llm_jax.config import non_negative
from llm_jax.data.stages import BECAUSE, CODE, DROPPED, Result, groups, marks, text_features

UNSPACED = ("zh", "yue", "wuu", "ja")  # languages without spaces between words
MINIMUM, MAXIMUM = "min_", "max_"
LONG = 100  # units from which on a share of stop words says something
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class ProseRules:
    """Bounds on texts in natural languages; shares are of characters other than whitespace if nothing else is said.

    Gopher's numbers are given where it has the rule; C4 has lines and sentences where Gopher counts words.
    """

    min_units: float = 8.0  # words or characters of scripts without spaces; Gopher: 50, which drops dialogue
    min_word_length: float = 1.5  # mean; Gopher: 3
    max_word_length: float = 15.0  # mean; Gopher: 10, too few for short German texts
    min_letters: float = 0.2  # Gopher: 80 % of the words have one
    max_digits: float = 0.4  # ours
    max_symbols: float = 0.45  # neither letters, digits nor punctuation; Gopher: 0.1 a word, of # and ...
    max_broken: float = 0.03  # three or more control, private-use, replacement characters: a wrong encoding; ours
    min_stop_words: float = 0.005  # of the units, of texts of 100 or more; Gopher: two in a document
    max_top_ngram: float = 0.16  # the most frequent 4-gram's share of all; Gopher's number
    max_repeated_ngrams: float = 0.5  # 10-grams that were there before; Gopher: 0.1, which drops statutes and psalms
    max_repeated_lines: float = 0.5  # of the bytes; Gopher: 0.2
    max_bullets: float = 0.95  # of the lines; Gopher: 0.9
    max_ellipses: float = 0.5  # of the lines; Gopher: 0.3
    max_boilerplate: float = 1.5  # phrases such as "privacy policy" in 100 units; C4 drops such lines


@dataclasses.dataclass(frozen=True)
class CodeRules:
    """Bounds on program text; ours, after those of Codex (Chen et al., 2021, section 3.1)."""

    min_characters: float = 30.0
    max_line_length: float = 100.0  # mean, in bytes; Codex's number
    max_longest_line: float = 1000.0  # Codex's number
    min_letters: float = 0.25
    max_data: float = 0.8  # of the bytes, in lines of which less than 30 % are letters: tables and blobs
    max_broken: float = 0.03
    max_generated: float = 0.0  # 1 where the beginning says that a program wrote the file


@dataclasses.dataclass(frozen=True)
class HeuristicsConfig:
    """Rules for languages with and without spaces between words, and for code."""

    enabled: bool = True
    spaced: ProseRules = ProseRules()
    unspaced: ProseRules = ProseRules(min_units=8.0, min_word_length=0.0, max_word_length=100.0, max_digits=0.5)
    code: CodeRules = CodeRules()

    def __post_init__(self) -> None:
        for rules in (self.spaced, self.unspaced, self.code):
            non_negative(rules, *(field.name for field in dataclasses.fields(rules)))


@dataclasses.dataclass(frozen=True)
class Heuristics:
    """Drops documents that break a rule; the reason is the first broken one."""

    config: HeuristicsConfig = HeuristicsConfig()
    name: str = "heuristics"

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """The facts hold how many documents broke each rule, and quantiles of every number by language."""
        numbers = dict.fromkeys(_features(), DataType.float32())
        fields = {**numbers, DROPPED: DataType.string(), BECAUSE: DataType.string(), "broke": DataType.string()}
        found = marks.mark(documents, self.judge, fields, scratch, "source", "language")
        return Result(marks.join(documents, found, DROPPED, BECAUSE), _facts(found))

    def judge(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """The fields of `apply` for a few documents."""
        texts, languages = (batch[name] for name in ("text", "language"))
        is_code = np.asarray(pc.equal(batch["format"], CODE))
        base = pc.replace_substring_regex(languages, "-.*", "")
        unspaced = np.asarray(pc.fill_null(pc.is_in(base, pa.array(UNSPACED)), False)) & ~is_code
        found = {name: np.full(len(texts), np.nan) for name in _features()}
        breaks: list[tuple[str, npt.NDArray[np.bool_], list[str]]] = []
        for rules, rows in (
            (self.config.spaced, np.flatnonzero(~unspaced & ~is_code)),
            (self.config.unspaced, np.flatnonzero(unspaced)),
            (self.config.code, np.flatnonzero(is_code)),
        ):
            if not len(rows):
                continue
            chosen = pa.array(rows)
            part = texts if len(rows) == len(texts) else texts.take(chosen)
            code = isinstance(rules, CodeRules)
            values = text_features.of_code(part) if code else text_features.of_prose(part, languages.take(chosen))
            for name, value in values.items():
                found[name][rows] = value
            breaks += _breaks(rules, values, rows, len(texts))
        return {
            **{name: pa.array(value, pa.float32(), from_pandas=True) for name, value in found.items()},
            **_verdicts(breaks, len(texts)),
        }


def _features() -> tuple[str, ...]:
    """The names of all numbers."""
    names = [field.name[4:] for rules in (ProseRules, CodeRules) for field in dataclasses.fields(rules)]
    return tuple(dict.fromkeys(names))


def _breaks(
    rules: ProseRules | CodeRules, values: dict[str, text_features.Floats], rows: npt.NDArray[np.int64], count: int
) -> list[tuple[str, npt.NDArray[np.bool_], list[str]]]:
    """Each rule's reason, which documents break it [count], and the number that decided for each of those."""
    broken = []
    for field in dataclasses.fields(rules):
        bound, name, limit = field.name[:4], field.name[4:], getattr(rules, field.name)
        value = values[name]
        wrong = value < limit if bound == MINIMUM else value > limit
        if name == "stop_words":
            wrong &= values["units"] >= LONG
        mask = np.zeros(count, np.bool_)
        mask[rows[wrong]] = True
        reason = f"{'few' if bound == MINIMUM else 'many'} {name}".replace("_", " ")
        sign = "<" if bound == MINIMUM else ">"
        broken.append((reason, mask, [f"{name.replace('_', ' ')} {v:.4g} {sign} {limit:g}" for v in value[wrong]]))
    return broken


def _verdicts(breaks: Sequence[tuple[str, npt.NDArray[np.bool_], list[str]]], count: int) -> dict[str, pa.Array]:
    """The first broken rule, what decided, and all broken rules, of every document."""
    dropped: list[str | None] = [None] * count
    because: list[str | None] = [None] * count
    broke: list[list[str]] = [[] for _ in range(count)]
    for reason, mask, decided in breaks:  # few documents break a rule
        for row, why in zip(np.flatnonzero(mask), decided):
            broke[row].append(reason)
            if dropped[row] is None:
                dropped[row], because[row] = reason, why
    joined = [", ".join(reasons) or None for reasons in broke]
    return {name: pa.array(v, pa.string()) for name, v in ((DROPPED, dropped), (BECAUSE, because), ("broke", joined))}


def _facts(found: daft.DataFrame) -> dict[str, Any]:
    """How many documents of each source broke which rules, and the quantiles of every number by language."""
    wrong = groups.group_by(found.where(col("broke").not_null()), ("source", "broke"))
    rules: dict[str, dict[str, int]] = {}
    for row in wrong.sort(["source", "broke"]).to_pylist():
        for rule in row["broke"].split(", "):
            of_rule = rules.setdefault(rule, {})
            of_rule[row["source"]] = of_rule.get(row["source"], 0) + row[groups.COUNT]
    names = _features()
    quantiles = [col(name).approx_percentiles(list(QUANTILES)) for name in names]
    rows = groups.group_by(found, ("language",), *quantiles).sort("language").to_pylist()
    by_language = {row["language"]: {name: row[name] for name in names if row[name]} for row in rows}
    return {"broken_rules": rules, "quantiles": list(QUANTILES), "by_language": by_language}
