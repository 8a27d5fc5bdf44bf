"""Documents that say nearly the same: the best of each cluster stays.

MinHash signatures of each document's n-grams are cut into bands; documents with a band in common are candidates; the
Jaccard similarity of their n-grams decides; what is similar, directly or over others, is a cluster (Broder, 1997; Lee
et al., 2022, appendix A). Outside Daft are only the pairs and what is in a cluster, as numbers.
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
from daft import DataType, col, lit
from daft.functions import hash as hash_of
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from llm_jax.config import positive
from llm_jax.data.stages import BECAUSE, ID, Result, groups, marks, minhash
from llm_jax.errors import require

REASON = "near duplicate"
KEY, LENGTH = "key", "length"  # a 64-bit hash of a document's id, of which pairs are made; the bytes of its text
NEIGHBOURS = 8  # pairs made of a document in a band: a band that a million documents share makes no 10^12
BANDS_AT_ONCE = 4  # in a group-by: all would take the memory of all, and one by one takes a cluster too many plans
BIN_BYTES = 1 << 24  # of candidates' texts compared in one call
SIMILARITIES = tuple(step / 20 for step in range(8, 21))  # of the S-curve in the report
NUMBER = DataType.uint64()
PAIR = DataType.struct({"left": NUMBER, "right": NUMBER})
Keys = npt.NDArray[np.uint64]


class Pairs(NamedTuple):
    """Pairs of documents by their KEYs, each once, with left < right."""

    left: Keys
    right: Keys


@dataclasses.dataclass(frozen=True)
class FuzzyConfig:
    """MinHash deduplication."""

    enabled: bool = True
    threshold: float = 0.8  # Jaccard similarity of two documents' n-grams from which they are near-duplicates
    recall: float = 0.95  # share of the pairs just at the threshold that are found; of more similar ones more are
    permutations: int = 112
    words: int = 5  # of an n-gram
    characters: int = 5  # of one, in scripts without spaces
    score: str = "quality"  # the column of which a cluster's best has most; where there is none, its longest is best

    def __post_init__(self) -> None:
        positive(self, "permutations", "words", "characters")
        for field in ("threshold", "recall"):
            value = getattr(self, field)
            require(0 < value < 1, f"FuzzyConfig.{field}={value} must be in (0, 1)")
        minhash.solve(self.threshold, self.permutations, self.recall)


@dataclasses.dataclass(frozen=True)
class Fuzzy:
    """Drops all but the best of each cluster of near-duplicates; `because` names that one."""

    config: FuzzyConfig = FuzzyConfig()
    name: str = "fuzzy"

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """Find candidates by their bands, compare them, and keep the best of each cluster."""
        bands, rows = self.bands_and_rows()
        score = [self.config.score] if self.config.score in documents.column_names else []
        keyed = documents.with_columns({KEY: hash_of(col(ID)), LENGTH: col("text").length_bytes()})
        keyed = keyed.select(ID, KEY, LENGTH, *score, "text")
        names = [f"bands_{first}" for first in range(0, bands, BANDS_AT_ONCE)]
        fields = dict.fromkeys(names, DataType.list(NUMBER))
        marked = marks.mark(keyed, self.banded, fields, scratch, KEY, LENGTH, *score)
        found = candidates(marked, names)
        similar = self.similar(keyed, marked, found)
        clusters = _clusters(marked.select(ID, KEY, LENGTH, *score), similar, score)
        dropped = daft.from_arrow(clusters.filter(pc.not_equal(clusters[ID], clusters[BECAUSE])).select([ID, BECAUSE]))
        facts = {
            "threshold": self.config.threshold,
            "bands": bands,
            "rows": rows,
            "found by similarity": {f"{s:.2f}": round(minhash.found_share(s, bands, rows), 4) for s in SIMILARITIES},
            "candidate pairs": len(found.left),
            "similar pairs": len(similar.left),
            "duplicates": dropped.count_rows(),
            "duplicates by source": groups.by_source(dropped),
            **_facts(documents, clusters),
        }
        return Result(groups.drop(documents, dropped, REASON), facts)

    def bands_and_rows(self) -> tuple[int, int]:
        """How signatures are cut."""
        return minhash.solve(self.config.threshold, self.config.permutations, self.config.recall)

    def banded(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """The hashes of some bands of each text, of none where it has no units."""
        bands, rows = self.bands_and_rows()
        sets = minhash.shingles(batch["text"], self.config.words, self.config.characters)
        some = np.diff(sets.offsets_D) > 0
        nonempty = minhash.Sets(sets.hashes_G, np.append(sets.offsets_D[:-1][some], sets.offsets_D[-1]))
        keys = minhash.band_keys(minhash.signatures(nonempty, self.config.permutations), bands, rows)
        lists = {}
        for first in range(0, bands, BANDS_AT_ONCE):
            part = keys[:, first : first + BANDS_AT_ONCE]
            offsets = np.append(0, np.cumsum(some * part.shape[1]))
            lists[f"bands_{first}"] = pa.LargeListArray.from_arrays(offsets, pa.array(part.ravel()))
        return lists

    def similar(self, keyed: daft.DataFrame, marked: daft.DataFrame, pairs: Pairs) -> Pairs:
        """Those of the pairs whose n-grams' Jaccard similarity reaches the threshold.

        Texts that are linked by pairs come together in one call, which reads each of them once.
        """
        if not len(pairs.left):
            return pairs
        config = self.config

        @daft.func.batch(return_dtype=PAIR, use_process=False)
        def compare(keys: daft.Series, texts: daft.Series, others: daft.Series) -> pa.Array:
            found = _positions(keys.to_arrow().to_numpy(), others.to_arrow())
            sets = minhash.sets_of(texts.to_arrow(), config.words, config.characters)
            alike = minhash.jaccard(sets, *found) >= config.threshold
            return _pair_array(*(keys.to_arrow().to_numpy()[side[alike]] for side in found))

        linked = keyed.select(KEY, "text").join(_linked(marked, pairs), on=KEY)
        compared = linked.groupby("bin").map_groups(compare(col(KEY), col("text"), col("others")).alias("pair"))
        return _unique([compared.select(col("pair").unnest()).to_arrow()])


def candidates(marked: daft.DataFrame, names: Sequence[str]) -> Pairs:
    """All pairs of documents that have the same hash of a band; of many in a band, those near each other by KEY."""
    found = Pairs(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    for name in names:
        rows = marked.select(KEY, name).explode(name).where(col(name).not_null())
        sharing = groups.group_by(rows, (name,), col(KEY).list_agg().alias("members"))
        several = sharing.where(col(groups.COUNT) > lit(1))
        pairs = several.select(_pairs_within(col("members")).alias("pair")).explode("pair")
        found = _unique([pa.table(found._asdict()), pairs.select(col("pair").unnest()).to_arrow()])
    return found


@daft.func.batch(return_dtype=DataType.list(PAIR), use_process=False)
def _pairs_within(members: daft.Series) -> pa.Array:
    """Of each list of keys, the pairs of those at most NEIGHBOURS apart in their order."""
    lists = members.to_arrow()
    keys = pc.list_flatten(lists).to_numpy()
    owners = pc.list_parent_indices(lists).to_numpy()
    keys = keys[np.lexsort((keys, owners))]
    firsts = []
    for apart in range(1, NEIGHBOURS + 1):
        within = np.flatnonzero(owners[apart:] == owners[:-apart])
        firsts.append(np.stack([owners[within], within, within + apart]))
    owner, left, right = np.concatenate(firsts, axis=1)
    order = np.argsort(owner, kind="stable")
    offsets = np.searchsorted(owner[order], np.arange(len(lists) + 1))
    return pa.LargeListArray.from_arrays(offsets, _pair_array(keys[left[order]], keys[right[order]]))


def _pair_array(left: Keys, right: Keys) -> pa.StructArray:
    return pa.StructArray.from_arrays([pa.array(left, pa.uint64()), pa.array(right, pa.uint64())], ["left", "right"])


def _unique(tables: list[pa.Table]) -> Pairs:
    rows = pa.concat_tables([table.select(["left", "right"]) for table in tables])
    rows = rows.group_by(["left", "right"]).aggregate([]).drop_null()
    return Pairs(rows["left"].to_numpy(), rows["right"].to_numpy())


def _components(pairs: Pairs) -> tuple[Keys, npt.NDArray[np.int32]]:
    """The keys in any pair, in order, and the component of the graph of pairs in which each is."""
    keys, places = np.unique(np.concatenate(pairs), return_inverse=True)
    left, right = np.split(places, 2)
    graph = coo_array((np.ones(len(left), np.bool_), (left, right)), shape=(len(keys), len(keys)))
    return keys, connected_components(graph, directed=False)[1]


def _linked(marked: daft.DataFrame, pairs: Pairs) -> daft.DataFrame:
    """Of each document in a pair: its KEY, the greater ones that it is paired with, a bin for all it is linked to."""
    keys, labels = _components(pairs)
    total = marked.select(KEY, LENGTH).join(daft.from_pydict({KEY: keys}), on=KEY).sum(LENGTH).to_pydict()[LENGTH][0]
    order = np.lexsort(pairs[::-1])
    offsets = np.searchsorted(pairs.left[order], np.append(keys, 0))
    offsets[-1] = len(order)
    others = pa.LargeListArray.from_arrays(offsets, pa.array(pairs.right[order]))
    return daft.from_arrow(pa.table({KEY: keys, "bin": labels % (total // BIN_BYTES + 1), "others": others}))


def _positions(keys: Keys, others: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the two of each pair are among the documents of a call."""
    order = np.argsort(keys)
    left = np.repeat(np.arange(len(keys)), pc.list_value_length(others).to_numpy())
    return left, order[np.searchsorted(keys, pc.list_flatten(others).to_numpy(), sorter=order)]


def _clusters(marked: daft.DataFrame, similar: Pairs, score: list[str]) -> pa.Table:
    """The documents of every cluster, best first: ID, cluster, and BECAUSE, the id of its best."""
    keys, labels = _components(similar)
    table = marked.join(daft.from_arrow(pa.table({KEY: keys, "cluster": labels})), on=KEY).to_arrow()
    best_first = [("cluster", "ascending"), *((name, "descending") for name in (*score, LENGTH)), (ID, "ascending")]
    table = table.sort_by(best_first).combine_chunks()
    clusters = table["cluster"].to_numpy()
    best = np.searchsorted(clusters, clusters)
    return table.select([ID, "cluster"]).append_column(BECAUSE, table[ID].take(pa.array(best)))


def _facts(documents: daft.DataFrame, clusters: pa.Table) -> dict[str, Any]:
    """How many clusters of which sizes, and the largest with how two of their documents begin."""
    firsts, sizes = np.unique(clusters["cluster"].to_numpy(), return_index=True, return_counts=True)[1:]
    largest = np.argsort(-sizes, kind="stable")[: groups.EXAMPLES]
    kept, other = (clusters[ID].take(pa.array(firsts[largest] + place)).to_pylist() for place in (0, 1))
    texts = groups.excerpts(documents, kept + other)
    several, often = np.unique(sizes, return_counts=True)
    return {
        "clusters": len(sizes),
        "clusters by size": {str(size): int(number) for size, number in zip(several, often)},
        "largest clusters": [
            {"documents": int(size), "kept": a, "text": texts[a], "dropped": b, "its text": texts[b]}
            for size, a, b in zip(sizes[largest], kept, other)
        ],
    }
