"""Scores of documents, and the garbage and offence among their sentences.

Models made of a sample of the corpus itself say of every document how likely it is (`perplexity`, per byte, under a
byte n-gram model or a trained transformer), how much it is like the reference sources (`quality`, a probability) and
how much of it offends (`offensive`, a share of its bytes). Sentences that are garbage or offend are cut out; documents
that are mostly that are dropped. Code is scored and left alone.

Sources: Baichuan-2, section 2.1 (sentence-wise quality filter, scores that drive the sampling, rules and models for
safety); Qwen, section 2.1 (a language model, a quality scorer and an offensive-content scorer).
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import daft
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from daft import DataType, Window, col, lit
from daft import functions as F
from scipy import special

from llm_jax.config import CorpusConfig, non_negative, positive
from llm_jax.data.ngrams import blocks, is_indented
from llm_jax.data.sources import cache_folder
from llm_jax.data.stages import (
    BECAUSE,
    CODE,
    DROPPED,
    ID,
    Result,
    byte_ngrams,
    classifiers,
    letters,
    marks,
    offensive,
    require_sources,
    sample,
)
from llm_jax.data.stages import quality_models as models
from llm_jax.data.stages.groups import EXCERPT
from llm_jax.data.stages.perplexity import Scorer, SentenceBits
from llm_jax.errors import require

# The probability that a sentence offends, by how many different listed Chinese words it has: no labels tell.
LISTED = np.array([0.0, 0.5, 0.99])
GARBAGE, OFFENSIVE, LOW = "garbage", "offensive", "low quality"
EXAMPLE = "example"  # the first sentence that was cut out of a text that stays
EXAMPLES = 10  # of each source that a report shows
FIELDS = {
    "perplexity": DataType.float32(),
    "quality": DataType.float32(),
    "offensive": DataType.float32(),
    DROPPED: DataType.string(),
    BECAUSE: DataType.string(),
    marks.REPLACED: DataType.string(),
    "garbage_bytes": DataType.int64(),
    "offensive_bytes": DataType.int64(),
    EXAMPLE: DataType.string(),
}


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """What is learnt from, and what is cut and dropped."""

    enabled: bool = True
    reference: tuple[str, ...] = (  # sources that others are compared with, each among those in its language
        "wikipedia", "news", "state_of_the_union", "statutes", "peoples_daily", "three_kingdoms", "standard_library",
    )  # fmt: skip
    sample_bytes: int = 400_000  # of the text of each source and language that models are made of
    model: str = ""  # a trained model that says how likely sentences are, such as a run's folder; "" = n-grams
    garbage: float = 0.7  # a sentence is cut from here; 0 = as likely as the language's others, 1 = as random ones
    least_bytes: int = 24  # shorter sentences are never garbage
    most_garbage: float = 0.5  # share of its bytes with which a document is dropped
    offence: float = 0.95  # probability with which a sentence is cut
    most_offensive: float = 0.5  # expected share of its bytes with which a document is dropped
    offensive_share: float = 0.01  # of sentences, as far as is known before reading them
    least_quality: float = 0.0  # documents with less are dropped; 0 = none
    lists: bool = True  # fetch labelled texts and word lists (23 MB); without them nothing is known to offend
    cache: str = ""  # folder of the downloads of labelled texts and word lists; "" = ~/.cache/llm_jax
    seed: int = 0

    def __post_init__(self) -> None:
        positive(self, "sample_bytes", "garbage", "least_bytes")
        non_negative(self, "least_quality", "seed")
        for field in ("most_garbage", "offence", "most_offensive", "offensive_share"):
            value = getattr(self, field)
            require(0 < value <= 1, f"QualityConfig.{field}={value} must be in (0, 1]")
        require(self.offensive_share < 1, "QualityConfig.offensive_share=1 leaves nothing to judge")


@dataclasses.dataclass(frozen=True)
class Quality:
    """Adds `perplexity`, `quality` and `offensive`, cuts sentences, and drops what is mostly garbage or offends."""

    config: QualityConfig
    scorer: Scorer  # loads `config.model`
    name: str = "quality"

    def files(self) -> list[Path]:
        """What the model at a path is known by."""
        return self.scorer.files(self.config.model) if self.config.model else []

    def check_sources(self, known: set[str]) -> None:
        """`UserError` for a reference that there is not; those of the default corpus may be missing."""
        require_sources(set(self.config.reference) - set(QualityConfig.reference), known, "QualityConfig.reference")

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """Sample, learn, and judge every document by what was learnt."""
        config = self.config
        material = offensive.Material({}, [], [])
        if config.lists:
            material = offensive.load(cache_folder(CorpusConfig(cache=config.cache)))
        known = _no_evidence(documents, config.reference, material.words)
        words = {word: category for word, category in material.words.items() if word not in known}
        learnt, facts = models.train(
            sample.excerpts(documents, config.sample_bytes),
            material,
            words,
            reference=config.reference,
            offensive_share=config.offensive_share,
            least_bytes=config.least_bytes,
            scorer=self.scorer,
            model=config.model,
            seed=config.seed,
        )
        folder = scratch / "models"
        folder.mkdir()
        learnt.save(folder)
        judge = _Judge(config, self.scorer, folder, (folder / "arrays.npz").stat().st_mtime_ns)
        judged = marks.mark(documents, judge, FIELDS, scratch, "source")
        joined = (name for name in FIELDS if name not in (EXAMPLE, "garbage_bytes", "offensive_bytes"))
        return Result(marks.join(documents, judged, *joined), facts | _facts(judged))


def _no_evidence(documents: daft.DataFrame, reference: tuple[str, ...], words: Iterable[str]) -> set[str]:
    """The listed words that say nothing here: names, and Chinese ones that are in the reference documents.

    What laws and newspapers write is no evidence by itself, whatever lists say of it; and Chinese words turn up across
    the borders of others.
    """
    listed = offensive.lexicon(words)
    single = tuple(word for word in listed.english if " " not in word)
    proper = _uses(documents.where(col("source").is_in(list(reference))), listed.chinese)
    english = _uses(documents.where(col("language").is_in([models.ENGLISH])), single)
    return {listed.chinese[use // 2] for use in proper} | offensive.names(single, english)


def _uses(documents: daft.DataFrame, words: tuple[str, ...]) -> dict[int, int]:
    """How often the documents use which of the words: see `offensive.uses`."""
    if not words:
        return {}

    @daft.func.batch(return_dtype=DataType.list(DataType.int64()), batch_size=marks.ROWS, use_process=False)
    def used(texts: daft.Series) -> pa.Array:
        parts = [offensive.uses(words, block) for block in blocks(texts.to_arrow())]
        return pa.concat_arrays([pa.array([], pa.list_(pa.int64())), *parts])

    found = documents.select(used(col("text")).alias("use")).explode("use").where(col("use").not_null())
    counted = found.groupby("use").agg(col("use").count().alias("times")).to_pydict()
    return dict(zip(counted["use"], counted["times"], strict=True))


@dataclasses.dataclass(frozen=True)
class _Judge:
    """Judges documents by saved models; on a cluster it travels to them as settings and a path."""

    config: QualityConfig
    scorer: Scorer
    folder: Path
    stamp: int  # a process may still have the models that an earlier run had there

    def __call__(self, batch: pa.RecordBatch) -> dict[str, pa.Array]:
        """`FIELDS` of a few documents."""
        config, learnt = self.config, models.load(self.folder, self.stamp)
        languages = batch["language"].fill_null("").dictionary_encode()
        names, language_N = languages.dictionary.to_pylist(), languages.indices.to_numpy()
        code = np.asarray(pc.equal(batch["format"], CODE)) | np.array([name == CODE for name in names])[language_N]
        found = byte_ngrams.buffer(batch["text"])
        parts = byte_ngrams.sentences(found)
        sizes_S = parts.stops - parts.starts
        sizes_N = np.maximum(found.stops - found.starts, 1)
        scales_N2 = np.array([learnt.scales.get(name, learnt.scales[""]) for name in names])[language_N]

        def per_text(values_S: npt.NDArray) -> npt.NDArray[np.float64]:
            return np.bincount(parts.texts, values_S, len(sizes_N)).astype(np.float64, copy=False)

        bits = models.sentence_bits(learnt.tables, self.scorer, config.model)
        bits_S = bits(found, parts)
        groups = [models.group_of(name) for name in names]
        quality, margin_S = _linear(found, parts, groups, language_N, learnt)
        offence_S = _offence(found, parts, groups, language_N, margin_S, learnt)
        garbage_S = _place(bits_S / sizes_S, scales_N2[parts.texts])
        judged_S = ~code[parts.texts]
        is_garbage_S = judged_S & (garbage_S > config.garbage) & (sizes_S >= config.least_bytes)
        is_garbage_S &= ~is_indented(found.data, parts.starts)
        language_S = language_N[parts.texts]
        is_garbage_S = self._of_words(found, (parts.starts, parts.stops), is_garbage_S, language_S, names, bits)
        offends_S = judged_S & (offence_S > config.offence)
        garbage_N, bits_N = per_text(is_garbage_S * sizes_S), per_text(bits_S) / sizes_N
        share_N = per_text(offence_S * sizes_S) / sizes_N
        whole_N = _place(bits_N, scales_N2)
        is_garbage_N = ~code & (whole_N > config.garbage) & (sizes_N >= config.least_bytes)
        is_garbage_N = self._of_words(found, (found.starts, found.stops), is_garbage_N, language_N, names, bits)
        is_garbage_N |= ~code & (garbage_N > config.most_garbage * sizes_N)
        reasons, because = _reasons(config, code, is_garbage_N, garbage_N / sizes_N, bits_N, share_N, quality)
        return {
            "perplexity": pa.array(np.exp2(np.minimum(bits_N, 100)), pa.float32()),
            "quality": pa.array(quality, pa.float32()),
            "offensive": pa.array(share_N, pa.float32()),
            DROPPED: pa.array(reasons, pa.string()),
            BECAUSE: pa.array(because, pa.string()),
            marks.REPLACED: _cut(found, parts, is_garbage_S | offends_S, reasons),
            "garbage_bytes": pa.array(garbage_N.astype(np.int64)),
            "offensive_bytes": pa.array(per_text(offends_S * sizes_S).astype(np.int64)),
            EXAMPLE: _examples(found, parts, is_garbage_S, offends_S),
        }

    def _of_words(
        self,
        found: byte_ngrams.Buffer,
        spans: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
        suspected: npt.NDArray[np.bool_],
        languages: npt.NDArray[np.int32],
        names: list[str],
        bits: SentenceBits,
    ) -> npt.NDArray[np.bool_]:
        """Which of the suspected spans of a buffer are long enough and garbage by their words alone, too.

        `languages` are places in `names`. Few are suspected, so this is a loop.
        """
        config, learnt = self.config, models.load(self.folder, self.stamp)
        places = np.flatnonzero(suspected)
        words = [learnt.letters.words(found.data[spans[0][i] : spans[1][i]].tobytes().decode()) for i in places]
        alone = byte_ngrams.buffer(pa.array([one.words for one in words], pa.large_string()))
        scales = [learnt.scales.get(models.alphabet_of(names[i]), learnt.scales[""]) for i in languages[places]]
        sizes = np.maximum(alone.stops - alone.starts, 1)
        unlikely = learnt.letters.places(
            words, _place(bits(alone, byte_ngrams.whole(alone)) / sizes, np.array(scales).reshape(-1, 2))
        )
        chosen = np.zeros(len(suspected), np.bool_)
        chosen[places] = (unlikely > config.garbage) & np.array([letters.is_text(one) for one in words], np.bool_)
        return chosen


def _place(bits: npt.NDArray, scales_2: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where bits per byte lie between what is usual in a language (0) and random letters (1)."""
    return (bits - scales_2[:, 0]) / np.maximum(scales_2[:, 1] - scales_2[:, 0], 0.1)


def _linear(
    found: byte_ngrams.Buffer,
    parts: byte_ngrams.Sentences,
    groups: list[str],
    language_N: npt.NDArray[np.int32],
    learnt: models.Models,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Each text's quality and each sentence's margin of the offensive-content classifier."""
    quality_S, offence_S = byte_ngrams.weights(found, parts, models.seeds(groups)[language_N], learnt.tables.linear_R2)
    sizes_N = found.stops - found.starts
    margins_N = np.bincount(parts.texts, quality_S, len(sizes_N)) * classifiers.scale(sizes_N)
    slopes_N2 = np.array([learnt.quality.get(group, learnt.quality[""]) for group in groups])[language_N]
    margin_S = offence_S * classifiers.scale(parts.stops - parts.starts)
    return special.expit(margins_N * slopes_N2[:, 0] + slopes_N2[:, 1]), margin_S


def _offence(
    found: byte_ngrams.Buffer,
    parts: byte_ngrams.Sentences,
    groups: list[str],
    language_N: npt.NDArray[np.int32],
    margin_S: npt.NDArray[np.float32],
    learnt: models.Models,
) -> npt.NDArray[np.float64]:
    """The probability of each sentence to offend: English by the classifier and its list, others by the Chinese one."""
    offence_S = np.zeros(len(margin_S))
    group_S = np.array(groups, object)[language_N][parts.texts]
    english_S = group_S == models.ENGLISH
    margin, hit, intercept = learnt.offensive
    hits_S = offensive.hits(learnt.lexicon.english, found, parts)
    offence_S[english_S] = special.expit(margin * margin_S + hit * hits_S + intercept)[english_S]
    others_S = ~english_S & (group_S != CODE)
    listed_S = offensive.counts(learnt.lexicon.chinese, found, parts)
    offence_S[others_S] = LISTED[np.minimum(listed_S, len(LISTED) - 1)][others_S]
    return offence_S


def _reasons(
    config: QualityConfig,
    code: npt.NDArray[np.bool_],
    is_garbage: npt.NDArray[np.bool_],
    garbage: npt.NDArray[np.float64],
    bits: npt.NDArray[np.float64],
    offence: npt.NDArray[np.float64],
    quality: npt.NDArray[np.float64],
) -> tuple[list[str | None], list[str | None]]:
    """Why each document is dropped, and by which numbers."""
    reasons: list[str | None] = [None] * len(code)
    because: list[str | None] = [None] * len(code)
    for chosen, reason, told in (
        (~code & (quality < config.least_quality), LOW, lambda i: f"quality {quality[i]:.3f}"),
        (is_garbage, GARBAGE, lambda i: f"{garbage[i]:.0%} of its bytes, {bits[i]:.1f} bits per byte"),
        (~code & (offence > config.most_offensive), OFFENSIVE, lambda i: f"{offence[i]:.0%} of it"),
    ):
        for i in np.flatnonzero(chosen):
            reasons[i], because[i] = reason, told(i)
    return reasons, because


def _cut(
    found: byte_ngrams.Buffer, parts: byte_ngrams.Sentences, cut_S: npt.NDArray[np.bool_], reasons: list[str | None]
) -> pa.Array:
    """The texts of which something is cut, without that; null for others and for what is dropped as a whole."""
    changed_N = np.bincount(parts.texts, cut_S, len(reasons)) > 0
    changed_N &= np.array([reason is None for reason in reasons], np.bool_)
    if not changed_N.any():
        return pa.nulls(len(reasons), pa.large_string())
    texts = byte_ngrams.without(found, parts, cut_S)
    return pc.if_else(pa.array(changed_N), texts, pa.scalar(None, pa.large_string()))


def _examples(
    found: byte_ngrams.Buffer,
    parts: byte_ngrams.Sentences,
    is_garbage_S: npt.NDArray[np.bool_],
    offends_S: npt.NDArray[np.bool_],
) -> pa.Array:
    """The first sentence that was cut from each text, after what it was cut for."""
    examples: list[str | None] = [None] * len(found.starts)
    cut = np.flatnonzero(is_garbage_S | offends_S)
    for text, place in zip(*np.unique(parts.texts[cut], return_index=True), strict=True):
        sentence = cut[place]
        content = found.data[parts.starts[sentence] : parts.stops[sentence]].tobytes().decode()
        reason = GARBAGE if is_garbage_S[sentence] else OFFENSIVE
        examples[text] = f"{reason}: {content.strip()[:EXCERPT]}"
    return pa.array(examples, pa.string())


def _facts(judged: daft.DataFrame) -> dict[str, Any]:
    """How much was cut from the documents that stay, by source, and some of it."""
    kept = judged.where(col(DROPPED).is_null() & (col("garbage_bytes") + col("offensive_bytes") > lit(0)))
    sums = [col(name).sum() for name in ("garbage_bytes", "offensive_bytes")]
    rows = kept.groupby("source").agg(*sums).sort("source").to_pylist()
    place = F.row_number().over(Window().partition_by("source").order_by(F.hash(col(ID))))
    drawn = kept.with_column("place", place).where(col("place") <= lit(EXAMPLES)).select(ID, EXAMPLE).sort(ID)
    return {
        "cut from kept documents": {row.pop("source"): row for row in rows},
        "examples of what was cut": drawn.to_pylist(),
    }
