"""Documents that say the same: all but one of each group go.

Two documents are the same if their units (words, and the characters of scripts without spaces) are, whatever their
width and composition (NFKC), case, punctuation and whitespace. In code those have a meaning: it is compared byte for
byte, and so are texts without any unit. The kept one is that of the smallest id, so it depends on no order.
"""

import dataclasses
from pathlib import Path
from typing import Any

import daft
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, col, lit
from daft.functions import hash as hash_of

from llm_jax.data import ngrams
from llm_jax.data.stages import BECAUSE, CODE, ID, Result, groups, marks

REASON = "exact duplicate"
HALVES = {"high": DataType.uint64(), "low": DataType.uint64()}  # of a 128-bit hash
SALT = np.uint64(0x6C62272E07BB0142)  # makes other numbers of the same units, for the second half


@dataclasses.dataclass(frozen=True)
class ExactConfig:
    """Exact deduplication; what counts as the same is the stage's, not a setting."""

    enabled: bool = True


@dataclasses.dataclass(frozen=True)
class Exact:
    """Drops all but the first by id of the documents with the same 128-bit hash."""

    config: ExactConfig = ExactConfig()
    name: str = "exact"

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """Mark what another document says too; `because` names that one."""
        as_bytes = {half: hash_of(col("text"), seed=seed) for seed, half in enumerate(HALVES)}
        texts = documents.select(ID, "format", "text").with_columns(as_bytes)
        hashed = marks.mark(texts, hashes, HALVES, scratch)
        found = groups.group_by(hashed, tuple(HALVES), col(ID).min().alias(BECAUSE))
        found = found.where(col(groups.COUNT) > lit(1)).collect()
        same = hashed.join(found, on=list(HALVES)).where(col(ID) != col(BECAUSE))
        same = same.select(ID, BECAUSE).collect()
        return Result(groups.drop(documents, same, REASON), _facts(documents, found, same))


def hashes(batch: pa.RecordBatch) -> dict[str, pa.Array]:
    """The two halves of each text's hash: of its units, or the columns "high" and "low" as they are."""
    found = ngrams.units(pc.utf8_normalize(batch["text"], "NFKC"))
    as_units = (np.diff(found.offsets) > 0) & np.asarray(pc.not_equal(batch["format"], CODE))
    salted = found._replace(hashes=ngrams.mix(found.hashes ^ SALT))
    result = {}
    for half, of_units in zip(HALVES, (found, salted), strict=True):
        result[half] = pa.array(np.where(as_units, ngrams.whole(of_units), batch[half].to_numpy()))
    return result


def _facts(documents: daft.DataFrame, found: daft.DataFrame, same: daft.DataFrame) -> dict[str, Any]:
    largest = found.sort([groups.COUNT, BECAUSE], desc=[True, False]).limit(groups.EXAMPLES).to_pydict()
    ids = largest[BECAUSE]
    texts = groups.excerpts(documents, ids)
    sizes = found.groupby(groups.COUNT).agg(col(BECAUSE).count().alias("groups")).sort(groups.COUNT).to_pydict()
    return {
        "groups": found.count_rows(),
        "clusters by size": dict(zip(map(str, sizes[groups.COUNT]), sizes["groups"])),
        "duplicates": same.count_rows(),
        "largest groups": [
            {"documents": count, "kept": kept, "text": texts[kept]}
            for count, kept in zip(largest[groups.COUNT], ids, strict=True)
        ],
        "duplicates by source": groups.by_source(same),
    }
