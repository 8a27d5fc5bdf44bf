"""Vectors, clusters and near-copies against loops, and planted copies of documents in invented languages."""

import collections
import json
import shutil

import daft
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from safetensors.numpy import save_file

from llm_jax.config import MeshConfig
from llm_jax.data import embeddings
from llm_jax.data.stages import BECAUSE, DROPPED, byte_ngrams, kmeans, semantic
from llm_jax.data.stages.semantic import Semantic, SemanticConfig
from llm_jax.errors import UserError
from llm_jax.parallel import mesh as mesh_lib
from tests.data.stages.invented import Language

TOPICS = 6


@pytest.fixture(scope="module")
def corpus():
    """Documents of six languages, near-copies of some, and their scores; ids of copies -> of what they copy."""
    rows, copies = [], {}
    languages = [Language(seed, chinese=seed % 2 == 1) for seed in range(TOPICS)]

    def add(source, text, quality):
        rows.append((f"{source}/{len(rows):08d}", source, "und", "text", source, text, quality))
        return rows[-1][0]

    for i in range(180):
        add(f"topic{i % TOPICS}", languages[i % TOPICS].paragraph(10), 0.5)
    for i in range(30):
        lines = rows[i][5].split("\n")
        moved = "\n".join([*lines[1:], lines[0]])  # the same lines in another order, and a word more
        copies[add(rows[i][1], moved + " " + languages[i % TOPICS].words[0], 0.4)] = rows[i][0]
    best = add("topic0", rows[60][5] + " x", 0.9)  # a copy that is better than what it copies
    copies[rows[60][0]] = best
    add("topic0", "", 0.5)
    return rows, copies


def frame(rows, folder, files=1):
    names = ("id", "source", "language", "format", "origin", "text", "quality")
    kinds = [pa.string()] * 6 + [pa.float32()]
    for part in range(files):
        columns = {name: pa.array([row[i] for row in rows[part::files]], kinds[i]) for i, name in enumerate(names)}
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")
    return daft.read_parquet(f"{folder}/*.parquet")


CONFIG = SemanticConfig(clusters=TOPICS, sample_bytes=100_000, similarity=0.9)


def run(documents, folder, config=CONFIG):
    folder.mkdir()
    result = Semantic(config).apply(documents, folder)
    return {row["id"]: row for row in result.documents.to_pylist()}, result.facts


@pytest.fixture(scope="module")
def clustered(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("semantic")
    return run(frame(corpus[0], folder / "documents"), folder / "scratch")


def test_planted_copies_go_and_the_best_stays(corpus, clustered):
    rows, copies = corpus
    documents, facts = clustered
    found = {i: row[BECAUSE] for i, row in documents.items() if row[DROPPED]}
    assert len(documents) == len(rows)
    assert len(set(found) & set(copies)) >= 0.95 * len(copies)  # recall
    assert len(set(found) - set(copies)) <= 1  # precision
    assert all(found[i] == copies[i] for i in set(found) & set(copies))
    assert facts["duplicates"] == len(found) == sum(facts["duplicates by source"].values())
    assert sum(facts["duplicates by similarity"].values()) == len(found)


def test_clusters_are_of_one_language(corpus, clustered):
    documents, facts = clustered
    sources = collections.defaultdict(collections.Counter)
    for row in documents.values():
        if row["text"]:
            sources[row["cluster"]][row["source"]] += 1
    pure = sum(counts.most_common(1)[0][1] for counts in sources.values())
    assert pure >= 0.95 * len(documents)
    assert facts["clusters"] == len({row["cluster"] for row in documents.values()})
    assert sum(sum(one["sources"].values()) for one in facts["largest clusters"]) <= len(documents)


def test_order_and_partitions_change_nothing(corpus, clustered, tmp_path):
    documents = frame(corpus[0][::-1], tmp_path / "documents", files=3)
    assert run(documents, tmp_path / "scratch") == clustered


def test_another_run_in_the_same_folder_learns_anew(corpus, tmp_path):
    rows = corpus[0]
    for source in ("topic0", "topic1"):
        folder = tmp_path / source
        documents, _ = run(frame([row for row in rows if row[1] == source], folder), tmp_path / "scratch")
        again, _ = run(frame([row for row in rows if row[1] == source], folder), tmp_path / "elsewhere")
        assert documents == again
        shutil.rmtree(tmp_path / "scratch")
        shutil.rmtree(tmp_path / "elsewhere")


def test_a_corpus_without_documents(corpus, tmp_path):
    nothing = frame(corpus[0][:1], tmp_path / "documents").where(daft.lit(False))
    assert run(nothing, tmp_path / "scratch")[0] == {}


def test_without_scores_the_longer_stays(corpus, tmp_path):
    rows, copies = corpus
    documents, _ = run(frame(rows, tmp_path / "documents").exclude("quality"), tmp_path / "scratch")
    dropped = {i for i, row in documents.items() if row[DROPPED]}
    texts = {row[0]: row[5] for row in rows}
    originals = {i for i, copy in copies.items() if len(texts[i]) < len(texts[copy])} | {
        copy for i, copy in copies.items() if len(texts[i]) > len(texts[copy])
    }
    assert len(dropped & originals) >= 0.9 * len(copies)


def test_a_sketch_has_the_angles_of_tf_idf():
    texts = [Language(seed % 3).paragraph(6) for seed in range(12)] + ["", "ab"]
    rarity = embeddings.rarity(pa.array(texts))
    sketches = embeddings.sketches(pa.array(texts), rarity)
    counts = []
    for text in texts:
        data = byte_ngrams.PAD + text.lower().encode()
        ends = range(len(byte_ngrams.PAD), len(data))
        counts.append(collections.Counter(data[end - byte_ngrams.WIDTH + 1 : end + 1] for end in ends))
    grams = sorted(set().union(*counts))
    with_it = np.array([sum(gram in counted for counted in counts) for gram in grams])
    vectors = np.array([[counted[gram] for gram in grams] for counted in counts]) * np.log(len(texts) / with_it)
    vectors = embeddings.normalised(vectors)
    whole = embeddings.normalised(np.copysign(sketches**2, sketches))
    np.testing.assert_allclose(whole @ whole.T, vectors @ vectors.T, atol=0.15)
    np.testing.assert_allclose(embeddings.folded(whole) @ embeddings.folded(whole).T, vectors @ vectors.T, atol=0.3)
    assert np.isfinite(sketches).all() and not sketches[12].any()


def test_a_run_of_spaces_does_not_outweigh_a_text():
    texts = [Language(seed).paragraph(20) + "\n" + " " * 1500 for seed in (0, 2)]
    rarity = embeddings.rarity(pa.array([Language(4).paragraph()])) + 1
    folded = embeddings.folded(embeddings.sketches(pa.array(texts), rarity))
    assert folded[0] @ folded[1] < 0.8


def test_topics_are_principal_components():
    sketches = embeddings.normalised(np.random.default_rng(0).normal(size=(40, 16)) * np.linspace(3, 0.1, 16))
    topics = embeddings.learn_topics(sketches)
    _, _, wanted = np.linalg.svd(sketches - sketches.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(topics.components_SE.T @ wanted.T), np.eye(16), atol=1e-3)


def loop(vectors, centroids, iterations):
    """Lloyd's steps by their definition."""
    for _ in range(iterations):
        nearest = [max(range(len(centroids)), key=lambda k: float(vector @ centroids[k])) for vector in vectors]
        sums = [
            sum((v for v, own in zip(vectors, nearest) if own == k), np.zeros(vectors.shape[1]))
            for k in range(len(centroids))
        ]
        centroids = embeddings.normalised(np.array(sums))
    return centroids


@pytest.mark.parametrize("devices", [1, 8])
def test_k_means_is_that_of_a_loop_on_any_number_of_devices(devices):
    vectors = embeddings.normalised(np.random.default_rng(3).normal(size=(101, 8)))
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:devices])
    found = kmeans.fit(vectors, 5, 4, 0, mesh)
    np.testing.assert_allclose(found, loop(vectors, kmeans.seeds(vectors, 5, 0), 4), atol=1e-4)
    nearest = (vectors @ found.T).argmax(axis=1)
    np.testing.assert_array_equal(kmeans.assign(vectors, found), nearest)


def test_an_empty_cluster_begins_anew():
    vectors = embeddings.normalised(np.array([[1, 0], [1, 0.01], [1, -0.01], [0, 1.0], [-1, 0.2]]))
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "seeds", lambda *_: vectors[[0, 0, 0]])  # two of three get nothing
        found = kmeans.fit(vectors, 3, 3, 0, mesh)
    assert len(set(kmeans.assign(vectors, found).tolist())) == 3
    assert len(kmeans.fit(vectors, 50, 2, 0, mesh)) == 5  # as many as there are vectors


def test_first_centroids_are_far_from_each_other():
    groups = np.repeat(np.eye(6), 30, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(180, 6))
    vectors = embeddings.normalised(groups)
    for seed in range(5):
        chosen = kmeans.seeds(vectors, 6, seed)
        assert set(chosen.argmax(axis=1)) == set(range(6))


def test_near_copies_are_those_of_a_loop(monkeypatch):
    monkeypatch.setattr(semantic, "BLOCK", 7)
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(12, 16))
    vectors = embeddings.normalised(centres[generator.integers(0, 12, 60)] + 0.12 * generator.normal(size=(60, 16)))
    wanted, kept = [], []
    for i, vector in enumerate(vectors):
        alike = [j for j in kept if vector @ vectors[j] >= 0.95]
        if alike:
            wanted.append((i, max(alike, key=lambda j: float(vector @ vectors[j]))))
        else:
            kept.append(i)
    copies, originals, cosines = semantic.near_copies(vectors, 0.95)
    assert list(zip(copies.tolist(), originals.tolist())) == wanted
    assert 5 < len(wanted) < 55
    np.testing.assert_allclose(cosines, [vectors[i] @ vectors[j] for i, j in wanted], rtol=1e-5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT of two layers in a folder."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", *Language(0).words]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "bert", "num_attention_heads": 2, "num_hidden_layers": 2, "layer_norm_eps": 1e-12,
              "max_position_embeddings": 48}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    shapes = {"embeddings.word_embeddings.weight": (len(words), 8), "embeddings.position_embeddings.weight": (48, 8),
              "embeddings.token_type_embeddings.weight": (2, 8), "embeddings.LayerNorm.weight": (8,),
              "embeddings.LayerNorm.bias": (8,)}  # fmt: skip
    for i in range(2):
        layer = f"encoder.layer.{i}."
        dense = {"attention.self.query": (8, 8), "attention.self.key": (8, 8), "attention.self.value": (8, 8),
                 "attention.output.dense": (8, 8), "intermediate.dense": (12, 8), "output.dense": (8, 12)}  # fmt: skip
        for name, shape in dense.items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{layer}{name}.weight": (8,), f"{layer}{name}.bias": (8,)}
    tensors = {f"bert.{name}": generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder, {name.removeprefix("bert."): array.astype(np.float64) for name, array in tensors.items()}


def numpy_bert(p, ids):
    """The encoder's forward pass for one text, position by position."""
    from scipy.special import erf, softmax

    def norm(x, name):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * p[f"{name}.weight"] + p[
            f"{name}.bias"
        ]

    def dense(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    embedded = p["embeddings.word_embeddings.weight"][ids] + p["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(embedded + p["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(2):
        layer = f"encoder.layer.{i}."
        q, k, v = (dense(x, f"{layer}attention.self.{name}") for name in ("query", "key", "value"))
        heads = [softmax(q[:, h] @ k[:, h].T / 2, axis=-1) @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
        x = norm(x + dense(np.hstack(heads), f"{layer}attention.output.dense"), f"{layer}attention.output.LayerNorm")
        inner = dense(x, f"{layer}intermediate.dense")
        x = norm(
            x + dense(inner * (1 + erf(inner / np.sqrt(2))) / 2, f"{layer}output.dense"), f"{layer}output.LayerNorm"
        )
    return x.mean(axis=0)


def test_the_encoder_is_bert(encoder, tmp_path):
    folder, params = encoder
    loaded = embeddings.load_encoder(str(folder), tmp_path)
    texts = [Language(0).sentence(9), Language(0).sentence(3), "unknown"]
    vectors = embeddings.encode(loaded, texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = [i for i, seen in zip(*(lambda e: (e.ids, e.attention_mask))(loaded.tokenizer.encode(text))) if seen]
        wanted = numpy_bert(params, ids)
        np.testing.assert_allclose(vector, wanted / np.linalg.norm(wanted), atol=5e-6)
    assert embeddings.encode(loaded, []).shape == (0, 8)


def test_an_encoder_s_vectors_join_those_of_n_grams(corpus, encoder, tmp_path):
    rows = [row for row in corpus[0] if row[1] in ("topic0", "topic2")]
    config = SemanticConfig(clusters=2, sample_bytes=50_000, similarity=0.9, encoder=str(encoder[0]))
    documents, facts = run(frame(rows, tmp_path / "documents"), tmp_path / "scratch", config)
    assert len(documents) == len(rows)
    assert facts["clusters"] == 2
    with np.load(tmp_path / "scratch" / "learnt.npz") as learnt:
        assert learnt["centroids"].shape[1] == learnt["components_SE"].shape[1] + 8


def test_bad_settings_and_folders_are_told(tmp_path):
    with pytest.raises(UserError, match="similarity=2 must be"):
        SemanticConfig(similarity=2)
    with pytest.raises(UserError, match="is no encoder: it has no config"):
        embeddings.load_encoder(str(tmp_path), tmp_path)
