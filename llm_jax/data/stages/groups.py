"""Groups of documents by what they share, and the documents marked with what was decided of some of them.

Group-bys and joins are Daft's and are of small columns (ids, hashes), so that a cluster does them as one machine does.
"""

import daft
from daft import DataType, col, lit
from daft.functions import when

from llm_jax.data.stages import BECAUSE, DROPPED, ID

COUNT = "count"
EXAMPLES = 5  # groups shown in a report
EXCERPT = 200  # characters of a text shown there


def group_by(rows: daft.DataFrame, keys: tuple[str, ...], *found: daft.Expression) -> daft.DataFrame:
    """Collected groups of rows with equal `keys`: their COUNT, and `found`, aggregations of other columns.

    Raises `RuntimeError` unless the groups hold all rows.
    """
    rows = rows.collect()  # counted as they were grouped: an uncollected count may be computed in another way
    groups = rows.groupby(*keys).agg(lit(1).cast(DataType.uint64()).alias(COUNT).sum(), *found).collect()
    held = groups.sum(COUNT).to_pydict()[COUNT][0] or 0
    total = len(rows)
    if held != total:
        raise RuntimeError(f"a group-by over {', '.join(keys)} lost rows: its groups hold {held} of {total}")
    return groups


def drop(documents: daft.DataFrame, because: daft.DataFrame, reason: str) -> daft.DataFrame:
    """The documents, those with a row (ID, BECAUSE) in `because` marked as dropped for `reason`."""
    marked = documents.join(because.select(ID, BECAUSE), on=ID, how="left")
    return marked.with_column(DROPPED, when(col(BECAUSE).not_null(), lit(reason)).otherwise(lit(None)))


def excerpts(documents: daft.DataFrame, ids: list[str]) -> dict[str, str]:
    """How the texts of a few documents begin."""
    rows = documents.where(col(ID).is_in(ids)).select(ID, col("text").left(EXCERPT)).to_pydict()
    return dict(zip(rows[ID], rows["text"], strict=True))


def by_source(documents: daft.DataFrame) -> dict[str, int]:
    """How many of these documents each source has, from the part of their ids that names it."""
    rows = documents.groupby(col(ID).split("/").get(0).alias("source")).agg(col(ID).count()).sort("source").to_pydict()
    return dict(zip(rows["source"], rows[ID], strict=True))
