"""A sample of a corpus for what a stage has to learn: the same one whatever the order of the documents."""

import daft
import pyarrow as pa
from daft import DataType, col, lit
from daft.functions import hash as hash_of
from daft.functions import when

from llm_jax.data.documents import HASH_RANGE
from llm_jax.data.stages import ID, groups

EXCERPT = 8192  # bytes of a document


def excerpts(documents: daft.DataFrame, sample_bytes: int) -> pa.Table:
    """About `sample_bytes` of every source in every language: ID, source, language and text, sorted by id.

    Each document is drawn by the hash of its id; of a long one the sample has a part from the middle.
    """
    size = col("text").length_bytes().cast(DataType.int64())
    sized = documents.select(
        "source", "language", when(size > lit(EXCERPT), lit(EXCERPT)).otherwise(size).alias("size")
    )
    found = groups.group_by(sized, ("source", "language"), col("size").sum()).to_pylist()
    limits = [min(int(sample_bytes / max(row["size"] or 0, 1) * HASH_RANGE), HASH_RANGE - 1) for row in found]
    columns = {name: pa.array([row[name] for row in found], pa.string()) for name in ("source", "language")}
    limit = daft.from_arrow(pa.table({**columns, "limit": pa.array(limits, pa.uint64())}))
    drawn = documents.select(ID, "source", "language", "text").join(limit, on=["source", "language"])
    drawn = drawn.where(hash_of(col(ID)) <= col("limit")).select(ID, "source", "language", "text")
    table = drawn.to_arrow().sort_by(ID)
    texts = pa.array([_excerpt(text) for text in table["text"].to_pylist()], pa.large_string())
    return table.set_column(table.column_names.index("text"), "text", texts)


def _excerpt(text: str | None) -> str:
    """From the middle of a long text, in whole lines where there are some."""
    data = (text or "").encode()
    if len(data) <= EXCERPT:
        return text or ""
    start = (len(data) - EXCERPT) // 2
    part = data[start : start + EXCERPT]
    line = part.find(b"\n") + 1
    return part[line if line < EXCERPT // 2 else 0 :].decode(errors="ignore")
