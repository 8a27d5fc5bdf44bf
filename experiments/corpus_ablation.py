"""Does cleaning the corpus matter? The same small model on raw, deduplicated and filtered data, judged on clean text.

    python -m experiments.corpus_ablation --config=configs/corpus_ablation/default.py --workdir=runs/corpus_ablation

Three training sets of one corpus: `raw` is only read and extracted, `deduplicated` has gone through the stages exact,
lines and fuzzy as well, `filtered` through all stages of experiments.prepare_data. The held-out documents are some that
came through all stages; the contamination stage takes them, and whatever shares its n-grams with them, out of all three
sets. Tokenizer, model, number of tokens, learning rate and seeds are the same.

Writes to --workdir: report.md and report.json, tokenizer/, heldout/, ARM/ as prepare_data does, and ARM/seed_N, a run
of experiments.pretrain. What is finished is not done again: a stopped run goes on where it was.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import own_dataset, pretrain, runner
from experiments.stages import check_finished, check_workdir, command_of, is_done, write_tables
from llm_jax.config import CorpusConfig, MeshConfig, TokenizerConfig, TrainConfig, positive
from llm_jax.data import loader
from llm_jax.data.documents import DOCUMENT_ID, HASH_RANGE
from llm_jax.data.packing import PackedSource
from llm_jax.errors import require
from llm_jax.evaluation import best_of, perplexity
from llm_jax.evaluation.tables import Table
from llm_jax.files import read_json, read_lines, replacing, write_json, write_lines
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.training import checkpoint

try:
    from llm_jax.data import factory, parquet, pipeline, planting, prepare, reading
    from llm_jax.data.prepare import ORDER, PrepareConfig
    from llm_jax.data.stages import COLUMNS, ID
    from llm_jax.data.stored import StoredCorpus
    from llm_jax.evaluation.sentence_bits import TRANSFORMERS
except ModuleNotFoundError as missing:
    sys.exit(f"error: preparing data needs the package {missing.name}: pip install 'llm-jax[data]'")

RAW, FILTERED = "raw", "filtered"
ALWAYS = ("extract", "contamination", "mixture")
ARMS = {RAW: ALWAYS, "deduplicated": (*ALWAYS, "exact", "lines", "fuzzy"), FILTERED: ORDER}  # and their stages
HELDOUT, RESULT = "heldout", "result.json"


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """A corpus with its stages, a tokenizer, a model, and what is held out."""

    prepare: PrepareConfig = dataclasses.field(default_factory=PrepareConfig)  # tokenizer and output are made
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)  # but for its corpus
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    seeds: tuple[int, ...] = (0, 1, 2)
    spoiled: float = 0.0  # share of the documents that have a spoiled or repeated copy beside them, in all three sets
    heldout_bytes: int = 30_000  # of text that is read of each source in the end
    excerpt: int = 4000  # characters of a held-out document that are read; all of it is kept out of training
    least_bytes: int = 200  # of a held-out document: nobody finds copies of shorter ones by n-grams

    def __post_init__(self) -> None:
        positive(self, "heldout_bytes", "excerpt", "least_bytes")
        require(0 <= self.spoiled <= 1, f"AblationConfig.spoiled={self.spoiled} must be in [0, 1]")
        require(bool(self.seeds), "AblationConfig.seeds is empty: name one seed at least")


def run(config: AblationConfig, workdir: Path) -> dict[str, Any]:
    """Prepare the three sets, train what is missing, and write the report, which is returned."""
    check_workdir(config, workdir, ())
    corpus = {field.name: getattr(config.prepare, field.name) for field in dataclasses.fields(CorpusConfig)}
    own = dataclasses.replace(config.tokenizer, corpus=CorpusConfig(**corpus))
    tokenizer = own_dataset.make_tokenizer(own, workdir / "tokenizer")
    if not (workdir / HELDOUT).is_dir():
        hold_out(config, workdir)
    removed = {}
    for arm in ARMS:
        removed[arm] = prepared(config, arm, workdir, tokenizer)
        train(config, arm, workdir)
    bits = {arm: [judged(config, workdir, workdir / arm / f"seed_{seed}") for seed in config.seeds] for arm in ARMS}
    command = command_of("corpus_ablation")
    found = {"command": command, "bits per byte": bits, "sets": sizes(config, workdir, removed)}
    write_json(workdir / "report.json", found)
    write_tables(workdir, "What cleaning the corpus is worth", command, tables(found))
    return found


def arm_config(config: AblationConfig, arm: str, heldout: Sequence[Path]) -> PrepareConfig:
    """The stages of an arm; the public evaluation sets are looked for in filtered data alone, `heldout` in all."""
    settings = {
        name: dataclasses.replace(getattr(config.prepare, name), enabled=False)
        for name in ORDER
        if name not in ARMS[arm] and "enabled" in vars(getattr(config.prepare, name, object))
    }
    sets = config.prepare.contamination.sets if arm == FILTERED else ()
    paths = (*config.prepare.contamination.paths, *map(str, heldout)) if arm == FILTERED else tuple(map(str, heldout))
    settings["contamination"] = dataclasses.replace(config.prepare.contamination, sets=sets, paths=paths)
    return dataclasses.replace(config.prepare, **settings)


def hold_out(config: AblationConfig, workdir: Path) -> None:
    """Choose the held-out documents by the hashes of their texts, and write those of each source to a .jsonl file."""
    chosen = arm_config(config, FILTERED, ())
    corpus = factory.run(chosen, workdir / FILTERED, prepare.stages(chosen, TRANSFORMERS), partial(_read, config))
    columns = [ID, "source", DOCUMENT_ID, "text"]
    documents = parquet.read(corpus.documents, columns)
    by_source: dict[str, list[str]] = {}
    for row in documents.sort_by([(DOCUMENT_ID, "ascending"), (ID, "ascending")]).to_pylist():
        unfit = len(row["text"].encode()) < config.least_bytes or planting.SPOILED in row[ID]
        if int(row[DOCUMENT_ID], 16) < config.prepare.holdout_fraction * HASH_RANGE and not unfit:
            by_source.setdefault(row["source"], []).append(row["text"])
    require(bool(by_source), "no document is held out: raise config.prepare.holdout_fraction")
    with replacing(workdir / HELDOUT) as folder:
        folder.mkdir(exist_ok=True)
        for source, texts in by_source.items():
            write_lines(folder / f"{source}.jsonl", ({"text": text} for text in texts))


def _read(config: AblationConfig, corpus: CorpusConfig, folder: Path, compression: str) -> dict[str, Any]:
    """Read the corpus as prepare_data does, and spoil it as far as the config says."""
    facts = reading.read(corpus, folder, compression)
    if config.spoiled:
        documents = parquet.read(parquet.files(folder), COLUMNS)
        spoiled = planting.with_spoiled(documents, config.spoiled, 0)
        parquet.replace(folder, reading.identified(spoiled), compression)
    return facts


def heldout_texts(config: AblationConfig, workdir: Path) -> dict[str, list[str]]:
    """What is read of the held-out documents of each source: the beginnings of about `heldout_bytes` of them."""
    found = {}
    for path in sorted((workdir / HELDOUT).iterdir()):
        texts = [record["text"][: config.excerpt] for record in read_lines(path)]
        ends = np.cumsum([len(text.encode()) for text in texts])
        found[path.stem] = texts[: int(np.searchsorted(ends, config.heldout_bytes)) + 1]
    return found


def prepared(config: AblationConfig, arm: str, workdir: Path, tokenizer: Path) -> dict[str, Any]:
    """Make the dataset of an arm, unless it is there; what was taken out of it because of the held-out documents."""
    chosen = arm_config(config, arm, sorted((workdir / HELDOUT).iterdir()))
    output = str(workdir / arm / "dataset")
    chosen = dataclasses.replace(chosen, tokenizer=str(tokenizer), output=output)
    corpus = factory.run(chosen, workdir / arm, prepare.stages(chosen, TRANSFORMERS), partial(_read, config))
    stored = StoredCorpus(corpus, chosen.mixture, repeats=not chosen.exact.enabled)
    pipeline.prepare(chosen, tokenizers.load(tokenizer), stored)
    (report,) = (report for report in corpus.reports if report["name"] == "contamination")
    return {side: report["bytes"][side] for side in ("in", "kept")}


def run_config(config: AblationConfig, arm: str, seed: int, workdir: Path) -> TrainConfig:
    """The pre-training run of an arm and a seed."""
    data = dataclasses.replace(config.train.data, dataset=str(workdir / arm / "dataset"), seed=seed)
    return dataclasses.replace(config.train, seed=seed, data=data)


def train(config: AblationConfig, arm: str, workdir: Path) -> None:
    """Train all seeds of an arm together, or find that done; `UserError` if that was stopped before."""
    folders = [workdir / arm / f"seed_{seed}" for seed in config.seeds]
    pretrain.run_together([run_config(config, arm, seed, workdir) for seed in config.seeds], folders)
    for folder in folders:
        check_finished((folder / checkpoint.FOLDER / str(config.train.steps)).is_dir(), folder)


class _Tokens:
    """Documents in memory, for `PackedSource`."""

    def __init__(self, rows: Sequence[Sequence[int]]):
        self._rows = [np.array(row, np.int32) for row in rows]
        self.lengths = np.array([len(row) for row in rows])

    def read(self, documents: Sequence[int]) -> list[np.ndarray]:
        return [self._rows[document] for document in documents]


def judged(config: AblationConfig, workdir: Path, folder: Path) -> dict[str, float]:
    """A trained run's bits per byte of each source's held-out text, and of all ("")."""
    if is_done(folder / RESULT):
        return read_json(folder / RESULT)
    mesh = mesh_lib.build(MeshConfig(), jax.local_devices()[:1])
    model, params, _ = checkpoint.load_model(folder, mesh=mesh)
    tokenizer = tokenizers.load(folder)
    score = perplexity.scorer(model, config.train.loss, mesh)
    data = config.train.data
    nats, size = dict[str, float](), dict[str, int]()
    for source, texts in heldout_texts(config, workdir).items():
        rows = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
        packed = PackedSource(_Tokens(rows), source, data.sequence_length, 0, shuffle=False)
        starts = range(0, packed.windows, data.batch_size)
        nats[source] = score(params, (loader.stack(packed, start, data.batch_size) for start in starts)).nats
        size[source] = sum(len(text.encode()) for text in texts)
    found = {source: nats[source] / math.log(2) / size[source] for source in nats}
    found[""] = sum(nats.values()) / math.log(2) / sum(size.values())
    write_json(folder / RESULT, found)
    return found


def sizes(config: AblationConfig, workdir: Path, removed: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Of each training set its text and tokens, how often a run goes through it, and the text that was taken out."""
    found = {}
    for arm in ARMS:
        info = loader.describe(run_config(config, arm, 0, workdir).data)
        tokens = pretrain.tokens_per_step(config.train) * config.train.steps
        cut = removed[arm]["in"] - removed[arm]["kept"]
        found[arm] = {"bytes": info.text_bytes, "tokens": info.tokens, "epochs": tokens / info.tokens, "cut": cut}
    return found


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The comparison, and the same by source."""
    headings = ("training set", "MB", "tokens", "epochs", "MB cut", "bits per byte", "difference from raw")
    bits = found["bits per byte"]
    rows = []
    for arm, size in found["sets"].items():
        values, base = ([seed[""] for seed in bits[name]] for name in (arm, RAW))
        difference = "" if arm == RAW else estimate([value - other for value, other in zip(values, base)], "+.4f")
        facts = (
            f"{size['bytes'] / 1e6:.1f}",
            f"{size['tokens']:,}",
            f"{size['epochs']:.3f}",
            f"{size['cut'] / 1e6:.2f}",
        )
        rows.append((arm, *facts, estimate(values, ".4f"), difference))
    note = "Mean over the seeds with its standard error; a seed's three runs differ in their training set alone."
    comparison = Table("Training sets", headings, tuple(rows), frozenset(headings[1:]), (note,))
    by_source = tuple(
        (source or "all", *(estimate([seed[source] for seed in bits[arm]], ".4f") for arm in bits))
        for source in sorted(bits[RAW][0])
    )
    headings = ("source", *bits)
    return [comparison, Table("Held-out bits per byte", headings, by_source, frozenset(headings[1:]))]


def estimate(values: Sequence[float], form: str) -> str:
    """The mean and, of several values, its standard error."""
    found = best_of.estimate(np.array(values))
    return f"{found.mean:{form}}" + (f" ± {found.error:.4f}" if len(values) > 1 else "")


if __name__ == "__main__":
    runner.main(run, AblationConfig, "configs/corpus_ablation/default.py", save_config=False)
