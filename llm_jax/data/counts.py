"""What a stage of the corpus factory did, counted from the files that it wrote."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import daft
import pyarrow.parquet as pq
from daft import DataType, Window, col, lit
from daft import functions as F

from llm_jax.data.documents import BYTES as BYTES
from llm_jax.data.stages import BECAUSE, DROPPED, ID
from llm_jax.errors import require

EXCERPT = 300  # characters of a dropped document that are shown
BINS = 20  # of a score's histogram
TAIL = 0.005  # of the documents at each end is counted in the outermost bins, however far out


class Identity(NamedTuple):
    """How many documents there are, and both halves of their ids' hashes in sum: which they are, in any order."""

    documents: int
    low: int
    high: int

    def __add__(self, other: "Identity") -> "Identity":  # type: ignore[override]
        """Of both together."""
        return Identity(*(mine + theirs for mine, theirs in zip(self, other)))


class Group(NamedTuple):
    """The documents of a source and a language that a stage keeps (reason "") or drops for a reason."""

    source: str
    language: str
    reason: str
    identity: Identity
    bytes: int


def groups(documents: daft.DataFrame, rows: int | None = None) -> list[Group]:
    """Count documents that have ID, source, language and BYTES, and DROPPED where some may be.

    `rows` is how many there are by another count; a sum of counts that differs is a defect of the group-by.
    """
    digest = F.hash(col(ID))
    halves = {"low": digest % lit(1 << 32), "high": F.shift_right(digest, lit(32))}
    sums = {"bytes": col(BYTES), **halves}
    reason = F.coalesce(col(DROPPED), lit("")) if DROPPED in documents.column_names else lit("")
    counted = (
        documents.with_column("reason", reason)
        .groupby("source", "language", "reason")
        .agg(
            col(ID).count().alias("documents"),
            col(BYTES).count().alias("texts"),
            *(value.cast(DataType.int64()).sum().alias(name) for name, value in sums.items()),
        )
        .to_pylist()
    )
    total = sum(row["documents"] for row in counted)
    require(rows is None or total == rows, f"{rows} documents were written, {total} are counted by source")
    missing = sum(row["documents"] - row["texts"] for row in counted)
    require(missing == 0, f"{missing} documents have no text")
    found = [
        Group(
            row["source"],
            row["language"],
            row["reason"],
            Identity(row["documents"], row["low"], row["high"]),
            row[BYTES],
        )
        for row in counted
    ]
    return sorted(found)


def identity(found: Iterable[Group]) -> Identity:
    """Of all documents of these groups."""
    return sum((group.identity for group in found), Identity(0, 0, 0))


def rows(paths: Iterable[Path]) -> int:
    """How many rows Parquet files hold, by their own account."""
    return sum(pq.read_metadata(path).num_rows for path in paths)


def composition(found: Iterable[Group]) -> list[dict[str, Any]]:
    """The kept documents and bytes of each source and language, for the report; `groups_of` takes it back."""
    return [
        {"source": g.source, "language": g.language, "bytes": g.bytes, **g.identity._asdict()}
        for g in found
        if not g.reason
    ]


def groups_of(composed: Iterable[dict[str, Any]]) -> list[Group]:
    """The kept groups that `composition` was made of."""
    return [
        Group(c["source"], c["language"], "", Identity(*(c[field] for field in Identity._fields)), c["bytes"])
        for c in composed
    ]


def dropped(found: Iterable[Group]) -> dict[str, dict[str, int]]:
    """Documents and bytes that were dropped for each reason."""
    result: dict[str, Counter[str]] = {}
    for group in found:
        if group.reason:
            result.setdefault(group.reason, Counter()).update(documents=group.identity.documents, bytes=group.bytes)
    return {reason: dict(counts) for reason, counts in sorted(result.items())}


def by_source(before: Iterable[Group], after: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Documents and bytes of each source before and after, and the language of most of what is kept."""
    result: dict[str, dict[str, Any]] = {}
    languages: dict[str, Counter[str]] = {}
    empty = dict.fromkeys(("documents_in", "documents_kept", "bytes_in", "bytes_kept"), 0)
    for side, counted in (("in", before), ("kept", (group for group in after if not group.reason))):
        for group in counted:
            row = result.setdefault(group.source, {"language": "", **empty})
            row[f"documents_{side}"] += group.identity.documents
            row[f"bytes_{side}"] += group.bytes
            if side == "kept":
                languages.setdefault(group.source, Counter())[group.language] += group.bytes
    for source, counted_languages in languages.items():
        result[source]["language"] = counted_languages.most_common(1)[0][0]
    return dict(sorted(result.items()))


def audit(documents: daft.DataFrame, count: int, seed: int) -> list[dict[str, str]]:
    """At most `count` dropped documents of each reason, drawn by a hash of their ids and `seed`."""
    place = F.row_number().over(Window().partition_by(DROPPED).order_by(F.hash(col(ID), seed=seed)))
    drawn = documents.with_column("place", place).where(col("place") <= lit(count))
    columns = (ID, "source", col(DROPPED).alias("reason"), BECAUSE, F.left(col("text"), EXCERPT).alias("text"))
    return sorted(drawn.select(*columns).to_pylist(), key=lambda row: (row["reason"], row[ID]))


def histograms(documents: daft.DataFrame, columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each score: the edges of BINS equal bins, and how many documents each has, of the kept and the dropped."""
    result = {}
    for column in columns:
        scored = documents.where(col(column).not_null() & ~F.is_nan(col(column)))
        low, high = _range(scored, column)
        if high > low:
            place = F.clip(F.floor((col(column) - low) / (high - low) * BINS), lit(0), lit(BINS - 1)).cast(
                DataType.int32()
            )
            counted = scored.groupby(place.alias("bin"), col(DROPPED).is_null().alias("kept")).agg(col(ID).count())
            counts = {True: [0] * BINS, False: [0] * BINS}
            for row in counted.to_pylist():
                counts[row["kept"]][row["bin"]] = row[ID]
            edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
            result[column] = {"edges": edges, "kept": counts[True], "dropped": counts[False]}
    return result


def _range(scored: daft.DataFrame, column: str) -> tuple[float, float]:
    """Between which values nearly all of a score lie; (0, 0) where there is none."""
    found = scored.agg(F.approx_percentiles(col(column), [TAIL, 1 - TAIL])).to_pylist()[0][column]
    return (float(found[0]), float(found[1])) if found and found[0] is not None else (0.0, 0.0)
