"""Our deduplication of a Parquet file of documents: exact, by lines, or exact and fuzzy one after the other.

python -m benchmarks.peers.ours_deduplication exact_fuzzy FILE
"""

import sys
import tempfile
from pathlib import Path

import daft
from daft import col

from benchmarks.peers.serve import serve
from llm_jax.data import runners
from llm_jax.data.prepare import PrepareConfig
from llm_jax.data.stages import BECAUSE, DROPPED, Stage
from llm_jax.data.stages.exact import Exact
from llm_jax.data.stages.fuzzy import Fuzzy, FuzzyConfig
from llm_jax.data.stages.lines import Lines

# 14 bands of 8 rows, as datatrove has them.
STAGES: dict[str, tuple[Stage, ...]] = {
    "exact": (Exact(),),
    "lines": (Lines(),),
    "exact_fuzzy": (Exact(), Fuzzy(FuzzyConfig(permutations=112, threshold=0.8, recall=0.92))),
}


def deduplicate(stages: tuple[Stage, ...], corpus: Path) -> float:
    """Read the file, write what is kept after every stage, and return how many documents went."""
    gone = 0
    with tempfile.TemporaryDirectory() as folder:
        documents = daft.read_parquet(str(corpus))
        for stage in stages:
            scratch = Path(folder) / stage.name
            scratch.mkdir()
            marked = stage.apply(documents, scratch).documents
            kept = marked.where(col(DROPPED).is_null()).exclude(DROPPED, BECAUSE)
            kept.write_parquet(f"{folder}/{stage.name}_kept")
            before, documents = documents, daft.read_parquet(f"{folder}/{stage.name}_kept/*.parquet")
            gone += before.count_rows() - documents.count_rows()
    return float(gone)


if __name__ == "__main__":
    runners.start(PrepareConfig())
    chosen = STAGES[sys.argv[1]]
    serve(lambda: deduplicate(chosen, Path(sys.argv[2])))
