"""Documents about the same, in clusters; and within clusters the near-copies of one another, of which one stays.

A document's vector is of its hashed n-grams, a locality-sensitive sketch, and of an encoder where one is named, both
in one vector and so in one table of clusters (Baichuan-2, section 2.1: clusters by LSH-like features and dense
embeddings). Clusters are k-means' of a sample; each document belongs to the nearest. Within a cluster a document goes
that is nearly in the direction of a better one that stays (SemDeDup: Abbas et al., 2023).
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import daft
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, col
from threadpoolctl import threadpool_limits

from llm_jax.config import CorpusConfig, MeshConfig, non_negative, positive
from llm_jax.data import embeddings
from llm_jax.data.sources import cache_folder
from llm_jax.data.stages import BECAUSE, ID, Result, groups, kmeans, marks, sample
from llm_jax.errors import require
from llm_jax.parallel import mesh as mesh_lib

REASON = "semantic duplicate"
CLUSTER, VECTOR, LENGTH = "cluster", "vector", "length"
BLOCK = 1024  # documents of a cluster compared with the better ones at once
PAIR = DataType.struct({ID: DataType.string(), BECAUSE: DataType.string(), "similarity": DataType.float32()})


@dataclasses.dataclass(frozen=True)
class SemanticConfig:
    """Clusters of documents, and what is a near-copy."""

    enabled: bool = True
    encoder: str = ""  # a BERT's folder, or "minilm" (English, 84 MB): its vectors join those of n-grams; "" = none
    clusters: int = 0  # 0 = half the square root of the number of documents
    iterations: int = 10  # of k-means
    sample_bytes: int = 300_000  # of each source and language, from which n-grams' rarity and clusters are learnt
    similarity: float = 0.9  # cosine from which a document is a near-copy of a better one
    score: str = "quality"  # the column of which the better one has more; where there is none, the longer is better
    cache: str = ""  # folder of downloads; "" = ~/.cache/llm_jax
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "sample_bytes")
        non_negative(self, "clusters", "iterations", "seed")
        require(0 < self.similarity <= 1, f"SemanticConfig.similarity={self.similarity} must be in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Semantic:
    """Adds `cluster`, and drops all but the best of near-copies; `because` names what stays."""

    config: SemanticConfig = SemanticConfig()
    name: str = "semantic"

    def files(self) -> list[Path]:
        """Those of the encoder, where it is the user's own."""
        return embeddings.encoder_files(self.config.encoder) if self.config.encoder else []

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """Learn clusters, give each document its own, and compare the documents of each."""
        config = self.config
        count = config.clusters or int(np.sqrt(documents.count_rows()) / 2) + 1
        table = sample.excerpts(documents, config.sample_bytes)
        file = scratch / "learnt.npz"
        _learn(config, table["text"].combine_chunks(), count, file)
        with threadpool_limits(1):  # Daft has a thread for each core: BLAS's own would wait for each other
            return self._compared(documents, file, scratch)

    def _compared(self, documents: daft.DataFrame, file: Path, scratch: Path) -> Result:
        config = self.config
        assign = _Assign(config, file, file.stat().st_mtime_ns)
        score = [config.score] if config.score in documents.column_names else []
        sized = documents.with_column(LENGTH, col("text").length_bytes())
        fields = {CLUSTER: DataType.int32(), VECTOR: DataType.fixed_size_list(DataType.float16(), assign.width())}
        found = marks.mark(
            sized.select(ID, "source", LENGTH, *score, "text"), assign, fields, scratch, "source", LENGTH, *score
        )
        compare = _compare(config.similarity)
        members = [col(ID), col(VECTOR), col(LENGTH), *(col(name) for name in score)]
        copies = found.groupby(CLUSTER).map_groups(compare(*members).alias("pair")).select(col("pair").unnest())
        copies = copies.where(col(ID).not_null()).collect()
        joined = marks.join(documents, found, CLUSTER)
        return Result(groups.drop(joined, copies, REASON), _facts(found, copies, config.similarity))


def _learn(config: SemanticConfig, texts: pa.Array, clusters: int, file: Path) -> None:
    """Write how rare n-grams are, the topics, and the clusters' centroids."""
    texts = texts if len(texts) else pa.array([""])
    rarity = embeddings.rarity(texts)
    sketches = embeddings.sketches(texts, rarity)
    topics = embeddings.learn_topics(sketches)
    vectors = embeddings.joined(embeddings.topic_vectors(sketches, topics), _encoded(config, texts))
    centroids = kmeans.fit(vectors, clusters, config.iterations, config.seed, mesh_lib.build(MeshConfig()))
    np.savez(file, rarity=rarity, **topics._asdict(), centroids=centroids)


def _encoded(config: SemanticConfig, texts: pa.Array) -> embeddings.Floats | None:
    """The encoder's vectors, if there is one."""
    if not config.encoder:
        return None
    encoder = embeddings.load_encoder(config.encoder, cache_folder(CorpusConfig(cache=config.cache)))
    return embeddings.encode(encoder, texts.to_pylist())


class _Learnt(NamedTuple):
    rarity: embeddings.Floats
    topics: embeddings.Topics
    centroids: embeddings.Floats


@functools.lru_cache(maxsize=2)
def _load(file: Path, stamp: int) -> _Learnt:
    """What `_learn` wrote; `stamp` tells it from what lay there before."""
    del stamp
    with np.load(file) as arrays:
        return _Learnt(
            arrays["rarity"], embeddings.Topics(arrays["mean_S"], arrays["components_SE"]), arrays["centroids"]
        )


@dataclasses.dataclass(frozen=True)
class _Assign:
    """Gives documents vectors and clusters by what is in a file; on a cluster it travels as settings and a path."""

    config: SemanticConfig
    file: Path
    stamp: int

    def width(self) -> int:
        """Of VECTOR."""
        learnt = _load(self.file, self.stamp)
        return embeddings.FOLDED + learnt.centroids.shape[1] - learnt.topics.components_SE.shape[1]

    def __call__(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """CLUSTER and VECTOR of a few documents."""
        learnt = _load(self.file, self.stamp)
        texts = batch["text"]
        sketches = embeddings.sketches(texts, learnt.rarity)
        encoded = _encoded(self.config, texts)
        topics = embeddings.joined(embeddings.topic_vectors(sketches, learnt.topics), encoded)
        vectors = embeddings.joined(embeddings.folded(sketches), encoded).astype(np.float16)
        return {
            CLUSTER: pa.array(kmeans.assign(topics, learnt.centroids)),
            VECTOR: pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1]),
        }


def _compare(similarity: float) -> Any:
    """A function of a cluster's ids, vectors, lengths and scores that gives its near-copies as rows of PAIR."""

    @daft.func.batch(return_dtype=PAIR, use_process=False)
    def compare(ids: daft.Series, vectors: daft.Series, lengths: daft.Series, *score: daft.Series) -> pa.Array:
        names = ids.to_arrow()
        columns = {str(i): series.to_arrow() for i, series in enumerate((*score, lengths))}
        keys = [(name, "descending") for name in columns] + [(ID, "ascending")]
        order = pc.sort_indices(pa.table({**columns, ID: names}), keys).to_numpy()
        flat = vectors.to_arrow().flatten().to_numpy(zero_copy_only=False)
        vectors_NE = flat.reshape(len(names), -1)[order]
        copy, original, cosine = near_copies(vectors_NE, similarity)
        found = [names.take(pa.array(order[which])) for which in (copy, original)]
        return pa.StructArray.from_arrays([*found, pa.array(cosine, pa.float32())], [ID, BECAUSE, "similarity"])

    return compare


def near_copies(
    vectors_NE: npt.NDArray, similarity: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], embeddings.Floats]:
    """Of vectors of length 1, best first: those like a better one that stays, the one each is most like, the cosine."""
    copies, originals, cosines = [], [], []
    kept = np.ones(len(vectors_NE), np.bool_)
    vectors_NE = vectors_NE.astype(np.float32)
    for start in range(0, len(vectors_NE), BLOCK):
        stop = min(start + BLOCK, len(vectors_NE))
        cosine = vectors_NE[start:stop] @ vectors_NE[:stop].T
        alike = np.tril(cosine >= similarity, start - 1)
        for row in np.flatnonzero(alike.any(axis=1)):
            better = np.flatnonzero(alike[row] & kept[:stop])
            if len(better):
                best = better[np.argmax(cosine[row, better])]
                kept[start + row] = False
                copies.append(start + row)
                originals.append(int(best))
                cosines.append(cosine[row, best])
    return np.array(copies, np.int64), np.array(originals, np.int64), np.array(cosines, np.float32)


def _facts(found: daft.DataFrame, copies: daft.DataFrame, similarity: float) -> dict[str, Any]:
    """The clusters' sizes and main sources, and how many near-copies there are of each source and similarity."""
    edges = np.linspace(similarity, 1.0, 6)
    often = np.histogram(np.clip(copies.to_pydict()["similarity"], similarity, 1.0), edges)[0]
    counted = groups.group_by(found.select(CLUSTER, "source"), (CLUSTER, "source")).to_pylist()
    clusters: dict[int, dict[str, int]] = {}
    for row in counted:
        clusters.setdefault(row[CLUSTER], {})[row["source"]] = row[groups.COUNT]
    sizes = {cluster: sum(sources.values()) for cluster, sources in clusters.items()}
    largest = sorted(sizes, key=lambda cluster: (-sizes[cluster], cluster))[: groups.EXAMPLES]
    return {
        "clusters": len(sizes),
        "documents of the median cluster": float(np.median(list(sizes.values()))) if sizes else 0.0,
        "largest clusters": [{"documents": sizes[cluster], "sources": clusters[cluster]} for cluster in largest],
        "duplicates": copies.count_rows(),
        "duplicates by source": groups.by_source(copies),
        "duplicates by similarity": {f"{edge:.2f}": int(count) for edge, count in zip(edges, often)},
    }
