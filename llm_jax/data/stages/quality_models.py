"""What the quality stage knows of a corpus: models made of a sample of it, kept as arrays and JSON."""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import string
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy import special

from llm_jax.data.stages import byte_ngrams, classifiers, corruption, letters, offensive, perplexity
from llm_jax.data.stages.classifiers import Examples
from llm_jax.data.stages.heuristics import UNSPACED
from llm_jax.data.stages.letters import IDEOGRAPHS, Letters
from llm_jax.data.stages.offensive import Lexicon

PIECES = 240  # texts of each class that a quality classifier learns from, for each group of languages
PIECE = 1024  # characters of one
HELD_OUT = 5  # one document in so many is not learnt from
ENGLISH = "en"
UNLABELLED = (0.0, 30.0, -20.0)  # without labelled texts a listed word decides: as `Models.offensive`
HARMLESS = 6000  # texts of the corpus that the offensive-content classifier learns as harmless
LETTERS = np.array([*string.ascii_letters, *string.digits, " "])  # what garbage is made of
SUSPICIOUS = 0.6  # share of the bits of random letters from which a sentence is not learnt from
MOST_SUSPICIOUS = 0.1  # share of such sentences that a language may have which the reference sources speak for
LEAST_SENTENCES = 20  # of a language, to know its likelihood; the others' is taken for one with less


class Scale(NamedTuple):
    """Bits per byte of a language's sentences."""

    reference: float  # of sentences that the language model has not seen
    garbage: float  # of random letters and digits, or of random characters


@dataclasses.dataclass(frozen=True)
class Models:
    """All that a document is judged by."""

    tables: byte_ngrams.Tables
    letters: Letters
    scales: dict[str, Scale]  # by language; "" for any other
    quality: dict[str, tuple[float, float]]  # slope and intercept by group of languages; "" for any other
    offensive: tuple[float, float, float]  # of the margin, of a listed word, and the intercept; English
    lexicon: Lexicon

    def save(self, folder: Path) -> None:
        """Write `arrays.npz` and `models.json`."""
        arrays: dict[str, Any] = {name: np.asarray(part) for name, part in self.tables._asdict().items()}
        np.savez(folder / "arrays.npz", **arrays)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        values["letters"] = dataclasses.asdict(self.letters)
        (folder / "models.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


@functools.lru_cache(maxsize=2)
def load(folder: Path, stamp: int) -> Models:
    """What `Models.save` wrote; `stamp` tells it from what lay in the folder before."""
    del stamp
    with np.load(folder / "arrays.npz") as arrays:
        tables = byte_ngrams.Tables(**arrays)
    values = json.loads((folder / "models.json").read_text(encoding="utf-8"))
    values["letters"] = Letters(**values["letters"])
    values["lexicon"] = Lexicon(*map(tuple, values["lexicon"]))
    values["scales"] = {name: Scale(*scale) for name, scale in values["scales"].items()}
    return Models(tables, **values)


def group_of(language: str) -> str:
    """The languages whose texts one classifier judges: those of one primary subtag, and code."""
    return language.partition("-")[0]


def alphabet_of(language: str) -> str:
    """Whose scale a language's words in letters have: its own, or any other's where it is written without spaces."""
    return "" if group_of(language) in UNSPACED else language


def seed_of(group: str) -> int:
    """What tells the n-grams of a group of languages from those of another."""
    return zlib.crc32(group.encode())


def seeds(groups: Iterable[str]) -> npt.NDArray[np.uint32]:
    """`seed_of` each."""
    return np.array([seed_of(group) for group in groups], np.uint32)


def train(
    sample: pa.Table,
    material: offensive.Material,
    words: dict[str, str],
    *,
    reference: tuple[str, ...],
    offensive_share: float,
    least_bytes: int,
    scorer: perplexity.Scorer,
    model: str,
    seed: int,
) -> tuple[Models, dict[str, Any]]:
    """The models, and what the report says of them, of a sample of documents sorted by id.

    `words` are the listed ones that count, `scorer` loads `model`; the other arguments are those of `QualityConfig`.
    """
    of_garbage, of_quality, of_scales = np.random.default_rng(seed).spawn(3)
    held_out = np.arange(len(sample)) % HELD_OUT == 0
    with concurrent.futures.ThreadPoolExecutor() as pool:  # each takes one core
        quality = pool.submit(_quality, sample, reference, held_out, of_quality)
        offence = pool.submit(_offensive, sample, words, material, offensive_share)
        clean = unsuspicious(sample.filter(pa.array(~held_out)), reference, least_bytes, of_garbage)
        known = pool.submit(letters.learn, clean.to_pylist())
        language_OR, empty = perplexity.train(clean)
    quality_R, slopes, quality_facts = quality.result()
    offensive_R, judged, offensive_facts = offence.result()
    tables = byte_ngrams.Tables(language_OR, empty, np.stack([quality_R, offensive_R], axis=1))
    bits = sentence_bits(tables, scorer, model)
    scales = sentence_scales(bits, sample.filter(pa.array(held_out)), least_bytes, of_scales)
    facts = {
        "sampled bytes": int(pc.sum(pc.binary_length(sample["text"])).as_py() or 0),
        "bits per byte": {language or "others": scale._asdict() for language, scale in scales.items()},
        "quality": quality_facts,
        "offensive": {"listed words": len(material.words), "listed words that count": len(words), **offensive_facts},
    }
    return Models(tables, known.result(), scales, slopes, judged, offensive.lexicon(words)), facts


def unsuspicious(
    sample: pa.Table, reference: tuple[str, ...], least_bytes: int, generator: np.random.Generator
) -> pa.Array:
    """The texts without sentences that look like garbage to a language model of the reference documents alone.

    So the garbage of a corpus does not teach what is likely. Languages to which the reference says nothing, as most of
    their sentences look like that, keep all of them.
    """
    proper = sample.filter(pc.is_in(sample["source"], pa.array(reference, pa.string())))
    if not len(proper):
        return sample["text"].combine_chunks()
    language_OR, empty = perplexity.train(proper["text"].combine_chunks())
    bits = perplexity.ngram_bits(byte_ngrams.Tables(language_OR, empty, np.zeros((0, 2), np.float32)))
    found = byte_ngrams.buffer(sample["text"].combine_chunks())
    parts = byte_ngrams.sentences(found)
    sizes_S = parts.stops - parts.starts
    least = SUSPICIOUS * _mean_bits(bits, [_garbage(100, generator) for _ in range(100)])
    suspicious_S = (bits(found, parts) > least * sizes_S) & (sizes_S >= least_bytes)
    languages_S = np.array(sample["language"].to_pylist(), object)[parts.texts]
    for language in set(languages_S):
        its_S = languages_S == language
        if suspicious_S[its_S].mean() > MOST_SUSPICIOUS:
            suspicious_S[its_S] = False
    return byte_ngrams.without(found, parts, suspicious_S)


def _garbage(size: int, generator: np.random.Generator, language: str = "") -> str:
    """So many bytes of random letters, or of random characters in languages that are written in such.

    An ideograph has three bytes, so fewer bits a byte than letters even if any may come.
    """
    if group_of(language) in UNSPACED:
        return "".join(map(chr, generator.integers(*IDEOGRAPHS, size // 3)))
    return "".join(LETTERS[generator.integers(0, len(LETTERS), size)])


def sentence_bits(tables: byte_ngrams.Tables, scorer: perplexity.Scorer, model: str) -> perplexity.SentenceBits:
    """What sentences are scored by: the n-gram model of tables, or what the scorer loads from a path."""
    return _loaded(scorer, model) if model else perplexity.ngram_bits(tables)


@functools.lru_cache(maxsize=1)
def _loaded(scorer: perplexity.Scorer, model: str) -> perplexity.SentenceBits:
    return scorer.load(model)


def _quality(
    sample: pa.Table, reference: tuple[str, ...], held_out: npt.NDArray[np.bool_], generator: np.random.Generator
) -> tuple[classifiers.Floats, dict[str, tuple[float, float]], dict[str, Any]]:
    """The weights, each group's slope and intercept, and its judgement on documents that were held out."""
    groups = np.array([group_of(language) for language in sample["language"].to_pylist()], object)
    sources = np.array(sample["source"].to_pylist(), object)
    texts = sample["text"].to_pylist()
    learnt: list[Examples] = []
    judged: list[Examples] = []
    for group in sorted(set(groups)):
        of_group = groups == group
        good = of_group & np.isin(sources, reference)
        good = good if good.any() else of_group
        for chosen, several in ((~held_out, learnt), (held_out, judged)):
            positive = _pieces(texts, sources, good & chosen)
            raw = _pieces(texts, sources, of_group & ~good & chosen)[: len(positive) // 2]
            spoiled = [
                corruption.corrupt(piece, corruption.KINDS[i % len(corruption.KINDS)], generator)
                for i, piece in enumerate(positive[: len(positive) - len(raw)])
            ]
            pieces = [*positive, *raw, *spoiled]
            labels = np.arange(len(pieces)) < len(positive)
            several.append(Examples(pieces, seeds([group] * len(pieces)), labels))
    weights_R = classifiers.fit(_mixed(learnt, generator))
    slopes, facts = {}, {}
    for group, examples in zip(sorted(set(groups)), judged, strict=True):
        if not examples.labels_N.any() or examples.labels_N.all():
            continue
        margins = classifiers.margins(weights_R, examples).astype(np.float64)
        slope, intercept = classifiers.platt(margins[:, None], examples.labels_N)
        slopes[group] = float(slope), float(intercept)
        facts[group] = classifiers.judgement(special.expit(margins * slope + intercept), examples.labels_N, 0.5)
    slopes[""] = tuple(np.mean(list(slopes.values()), axis=0).tolist()) if slopes else (1.0, 0.0)
    return weights_R, slopes, facts


def _pieces(texts: list[str], sources: npt.NDArray[np.object_], chosen: npt.NDArray[np.bool_]) -> list[str]:
    """Pieces of the chosen documents, at most `PIECES`: as many of each source as there are, one a document in turn."""
    queues = []
    for source in sorted(set(sources[chosen])):
        documents = [texts[i] for i in np.flatnonzero(chosen & (sources == source))]
        cut = [[text[i : i + PIECE] for i in range(0, max(len(text), 1), PIECE)] for text in documents]
        queues.append([piece for turn in itertools.zip_longest(*cut) for piece in turn if piece])
    in_turn = (piece for turn in itertools.zip_longest(*queues) for piece in turn if piece)
    return list(itertools.islice(in_turn, PIECES))


def _mixed(several: list[Examples], generator: np.random.Generator) -> Examples:
    """All examples, in random order."""
    texts = [text for examples in several for text in examples.texts]
    order = generator.permutation(len(texts))
    groups = np.array([group for examples in several for group in examples.groups_N], np.uint32)
    labels = np.array([label for examples in several for label in examples.labels_N], np.bool_)
    return Examples([texts[i] for i in order], groups[order], labels[order])


def is_held_out(text: str) -> bool:
    """Whether the offensive-content classifier does not learn from a labelled text, but is judged by it."""
    return zlib.crc32(text.encode()) % HELD_OUT == 0


def _offensive(
    sample: pa.Table, words: dict[str, str], material: offensive.Material, share: float
) -> tuple[classifiers.Floats, tuple[float, float, float], dict[str, Any]]:
    """The weights, how margins and listed words are judged, and the judgement on held-out labelled texts.

    The labels' share of offensive texts says nothing of a corpus: the probabilities are for `share` of them.
    """
    everything = offensive.lexicon(words).english
    english = sample.filter(pc.equal(sample["language"], ENGLISH))
    pieces = [piece for text in english["text"].to_pylist() for piece in offensive.excerpts(text)]
    pieces = pieces[:: max(len(pieces) // HARMLESS, 1)]
    listed = _hits(everything, pieces)
    harmless = [*material.harmless, *(piece for piece, is_listed in zip(pieces, listed, strict=True) if not is_listed)]
    texts = [*material.offensive, *harmless]
    labels = np.arange(len(texts)) < len(material.offensive)
    if not labels.any() or labels.all():
        return np.zeros(byte_ngrams.ROWS, np.float32), UNLABELLED, {}
    examples = Examples(texts, seeds([ENGLISH] * len(texts)), labels)
    held_out = np.array([is_held_out(text) for text in texts])
    weights_R = classifiers.fit(_mixed([examples.where(~held_out)], np.random.default_rng(0)))
    judged = examples.where(held_out)
    features = np.column_stack([classifiers.margins(weights_R, judged), _hits(everything, judged.texts)])
    slopes = classifiers.platt(features.astype(np.float64), judged.labels_N)
    probabilities = special.expit(features @ slopes[:-1] + slopes[-1])
    facts = {
        "classifier and lists": classifiers.judgement(probabilities, judged.labels_N, 0.5),
        "lists alone": classifiers.judgement(features[:, 1].astype(np.float64), judged.labels_N, 0.5),
    }
    slopes[-1] += special.logit(share) - special.logit(np.mean(judged.labels_N))
    margin, hit, intercept = (float(value) for value in slopes)
    return weights_R, (margin, hit, intercept), facts


def _hits(english: tuple[str, ...], texts: Iterable[str]) -> npt.NDArray[np.bool_]:
    found = byte_ngrams.buffer(pa.array(list(texts), pa.large_string()))
    return offensive.hits(english, found, byte_ngrams.whole(found))


def sentence_scales(
    bits: perplexity.SentenceBits, sample: pa.Table, least_bytes: int, generator: np.random.Generator
) -> dict[str, Scale]:
    """The scale of every language of some documents, and of all together ("")."""
    found = byte_ngrams.buffer(sample["text"].combine_chunks())
    parts = byte_ngrams.sentences(found)
    long = np.flatnonzero(parts.stops - parts.starts >= least_bytes)
    of_sentence = np.asarray(sample["language"].to_pylist(), object)[parts.texts[long]]
    texts = [found.data[parts.starts[i] : parts.stops[i]].tobytes().decode() for i in long]
    pairs = {}
    for language in ["", *sorted(set(of_sentence))]:
        chosen = [text for text, its in zip(texts, of_sentence, strict=True) if language in ("", its)]
        if language and len(chosen) < LEAST_SENTENCES:
            continue
        some = chosen[:: max(len(chosen) // 500, 1)]
        garbage = [_garbage(len(text.encode()), generator, language) for text in some]
        pairs[language] = Scale(_mean_bits(bits, chosen), _mean_bits(bits, garbage))
    return pairs


def _mean_bits(bits: perplexity.SentenceBits, texts: list[str]) -> float:
    """Bits per byte, the mean of sentences."""
    if not texts:
        return 8.0
    found = byte_ngrams.buffer(pa.array(texts, pa.large_string()))
    return float(np.mean(bits(found, byte_ngrams.whole(found)) / np.maximum(found.stops - found.starts, 1)))
