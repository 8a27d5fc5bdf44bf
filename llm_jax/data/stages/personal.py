"""Personal information: what identifies or reaches a person becomes a placeholder, and what is full of it goes.

E-mail addresses, phone numbers, numbers of identity and bank cards and IP addresses are replaced by `<EMAIL>`,
`<PHONE>`, `<ID_NUMBER>`, `<CARD_NUMBER>` and `<IP_ADDRESS>`. Documents that consist of them, and all documents of a
site dense in them, are dropped: LLaMA-2 left out sites known for much personal information (section 2.1).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, col, lit
from daft.functions import format, when

from llm_jax.config import non_negative, positive
from llm_jax.data.stages import BECAUSE, DROPPED, ID, Result, groups, identifiers, marks

DENSE_DOCUMENT, DENSE_SITE = "personal information", "site of personal information"
COUNTS = tuple(kind.lower() for kind in identifiers.KINDS)
EXAMPLES = 3  # shown of each kind
AROUND = 24  # characters shown before and after one
TOTAL, CHARACTERS, SITE = "personal", "characters", "site"


@dataclasses.dataclass(frozen=True)
class PersonalConfig:
    """When replacing is not enough; densities are identifiers in 1,000 characters."""

    enabled: bool = True
    document_density: float = 10.0  # a document with more is dropped
    document_minimum: int = 5  # if it has at least so many
    site_density: float = 2.0  # a site (the host of the documents' URL) with more is dropped
    site_minimum: int = 20  # if it has at least so many

    def __post_init__(self) -> None:
        non_negative(self, "document_density", "site_density")
        positive(self, "document_minimum", "site_minimum")


@dataclasses.dataclass(frozen=True)
class Personal:
    """Replaces identifiers in `text`, and adds `personal`, how many a document had."""

    config: PersonalConfig = PersonalConfig()
    name: str = "personal"

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """The facts hold counts by kind and source, the dropped sites, and examples without the identifiers."""
        fields = {
            marks.REPLACED: DataType.string(), TOTAL: DataType.int64(), CHARACTERS: DataType.int64(),
            SITE: DataType.string(), "example": DataType.string(), **dict.fromkeys(COUNTS, DataType.int64()),
        }  # fmt: skip
        found = marks.mark(documents, judge, fields, scratch, "source")
        sites = self._dense_sites(found)
        marked = marks.join(documents, found, marks.REPLACED, TOTAL, CHARACTERS, SITE)
        return Result(self._decide(marked, [row[SITE] for row in sites]), _facts(found, sites))

    def _dense_sites(self, found: daft.DataFrame) -> list[dict[str, Any]]:
        sites = groups.group_by(found.where(col(SITE).not_null()), (SITE,), col(TOTAL).sum(), col(CHARACTERS).sum())
        dense = (col(TOTAL) >= lit(self.config.site_minimum)) & _denser(self.config.site_density)
        return sites.where(dense).sort(SITE).to_pylist()

    def _decide(self, documents: daft.DataFrame, sites: list[str]) -> daft.DataFrame:
        dense = (col(TOTAL) >= lit(self.config.document_minimum)) & _denser(self.config.document_density)
        reason = when(dense, lit(DENSE_DOCUMENT)).when(col(SITE).is_in([*sites, ""]), lit(DENSE_SITE))
        because = format("{} in {} characters", col(TOTAL), col(CHARACTERS))
        decided = {DROPPED: reason.otherwise(lit(None)), BECAUSE: because}
        return documents.with_columns(decided).exclude(CHARACTERS, SITE)


def _denser(density: float) -> daft.Expression:
    return col(TOTAL) * 1000 > col(CHARACTERS) * density


def judge(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """What a few documents hold: how many of each kind, and the text without them where there are any."""
    texts = batch["text"]
    counts = np.zeros((len(texts), len(COUNTS)), np.int64)
    replaced: list[str | None] = [None] * len(texts)
    examples: list[str | None] = [None] * len(texts)
    for row, lines, spans in _changed(texts):
        replaced[row] = "\n".join(lines)
        for kind in spans:
            counts[row, identifiers.KINDS.index(kind)] += 1
        example = lines[next(i for i, line in enumerate(lines) if f"<{spans[0]}>" in line)]
        examples[row] = _around(example, f"<{spans[0]}>")
    origins = pc.extract_regex(batch["origin"], r"^[a-z]+://(?P<host>[^/:?#]+)")
    return {
        marks.REPLACED: pa.array(replaced, pa.large_string()),
        TOTAL: pa.array(counts.sum(axis=1)),
        CHARACTERS: pc.fill_null(pc.utf8_length(texts), 0),
        SITE: pc.struct_field(origins, "host"),
        "example": pa.array(examples, pa.string()),
        **{name: pa.array(column) for name, column in zip(COUNTS, counts.T)},
    }


def _changed(texts: pa.Array) -> Iterator[tuple[int, list[str], list[str]]]:
    """Texts with an identifier: the row, its lines with placeholders, and the kinds found.

    Only lines that may hold one are searched: an identifier does not go beyond a line.
    """
    rows = np.flatnonzero(pc.fill_null(pc.match_substring_regex(texts, identifiers.CANDIDATE), False))
    lines = pc.split_pattern(texts.take(pa.array(rows)), "\n")
    flat, parents = pc.list_flatten(lines), np.asarray(pc.list_parent_indices(lines))
    hits = np.flatnonzero(pc.match_substring_regex(flat, identifiers.CANDIDATE))
    found: dict[int, list[tuple[int, str, list[str]]]] = {}
    some = flat.take(pa.array(hits))
    for hit, line, searches in zip(hits, some.to_pylist(), identifiers.triggered(some)):
        text, spans = identifiers.replace(line, searches)
        if spans:
            found.setdefault(int(parents[hit]), []).append((int(hit), text, [span.kind for span in spans]))
    for parent, changes in found.items():
        first = int(np.searchsorted(parents, parent))
        whole = lines[parent].as_py()
        for place, text, _ in changes:
            whole[place - first] = text
        yield int(rows[parent]), whole, [kind for _, _, kinds in changes for kind in kinds]


def _around(line: str, placeholder: str) -> str:
    start = line.index(placeholder)
    return line[max(start - AROUND, 0) : start + len(placeholder) + AROUND]


def _facts(found: daft.DataFrame, sites: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of each kind every source had, in how many documents, with a few examples."""
    touched = found.where(col(TOTAL) > lit(0))
    sums = groups.group_by(touched, ("source",), *(col(name).sum() for name in COUNTS)).sort("source").to_pylist()
    by_source = {
        row["source"]: {"documents": row[groups.COUNT], **{name: row[name] for name in COUNTS if row[name]}}
        for row in sums
    }
    examples = {}
    for name in COUNTS:
        rows = touched.where(col("example").contains(f"<{name.upper()}>")).sort(ID).limit(EXAMPLES)
        examples[name] = rows.to_pydict()["example"]
    return {"by_source": by_source, "dense_sites": sites, "examples": {k: v for k, v in examples.items() if v}}
