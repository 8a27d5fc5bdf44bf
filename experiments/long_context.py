"""How far past its trained length a model can read: perplexity at 1x to 16x, in the form of Qwen's Table 3.

    python -m experiments.long_context --config=configs/long_context/default.py --workdir=runs/long_context

Trains a tokenizer, a model with rotary positions and one with ALiBi at a short length, then reads the same held-out
documents in windows of every length: with plain RoPE, with Qwen's dynamic NTK, log-n scaling and layer-wise windows on
top of each other, and with ALiBi. What is finished is not trained again; a stopped training continues.
--config.model=PATH measures a trained model instead: a run folder, a Hugging Face folder or a .gguf file.

Writes to --workdir: table.md, results.json (every number, with the exact command), perplexity.png, position.png,
config.json and, when it trains, tokenizer/, data/ and one run folder for each model and seed.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from experiments import own_dataset, pretrain, runner
from llm_jax.config import CorpusConfig, TokenizerConfig, TrainConfig
from llm_jax.data import sources
from llm_jax.data.documents import shuffled
from llm_jax.errors import require
from llm_jax.evaluation import figures, long_context
from llm_jax.evaluation.long_context import Estimate, Nats, Report
from llm_jax.interop import pretrained
from llm_jax.interop.pretrained import Pretrained
from llm_jax.tokenization.tokenizer import Tokenizer
from llm_jax.training import checkpoint

POSITIONS = ("rope", "alibi")
TABLE_WIDTH = 110


@dataclasses.dataclass(frozen=True)
class LongContextConfig:
    """What is trained, and on which held-out texts it is measured."""

    model: str = ""  # a trained model to measure; "" = train
    trained_length: int = 0  # of that model; 0 = its max_length
    multiples: tuple[int, ...] = (1, 2, 4, 8, 16)  # of the trained length: the lengths of the windows
    documents: int = 64  # at most so many
    blocks: int = 1  # of the greatest length, from the beginning of each document
    batch_tokens: int = 4096
    shortest_window: int = 0  # of the first layer's attention; 0 = the trained length
    longest_window: int = 0  # of the last layer's; 0 = four times the trained length
    seeds: tuple[int, ...] = (0,)  # one training of each kind for every seed
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)  # for all; tokenizer and output are made
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)  # but for its corpus
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name in ("documents", "blocks", "batch_tokens"):
            require(getattr(self, name) > 0, f"LongContextConfig.{name}={getattr(self, name)} must be positive")
        for name in ("trained_length", "shortest_window", "longest_window"):
            require(getattr(self, name) >= 0, f"LongContextConfig.{name}={getattr(self, name)} must not be negative")
        require(bool(self.seeds), "LongContextConfig.seeds is empty: name one seed at least")
        require(
            bool(self.multiples) and all(m > 0 and max(self.multiples) % m == 0 for m in self.multiples),
            f"LongContextConfig.multiples={self.multiples}: each must divide the greatest, to read the same tokens",
        )


def run(config: LongContextConfig, workdir: Path) -> Report:
    """Train what is missing, measure everything, write and print the table."""
    folders = [Path(config.model)] if config.model else train_models(config, workdir)
    models = [load(config, folder) for folder in folders]
    nats = measure(config, models, heldout_texts(config.corpus))
    report = long_context.summarise(nats)
    write(report, nats, shlex.join(["python", "-m", "experiments.long_context", *sys.argv[1:]]), workdir)
    Console(width=max(Console().width, TABLE_WIDTH)).print(table(report))
    print(f"{workdir / 'table.md'}: the table, and what each row changes")
    return report


def train_models(config: LongContextConfig, workdir: Path) -> list[Path]:
    """The run folders of all models, trained to the end."""
    dataset = own_dataset.make(config.tokenizer, config.corpus, workdir)
    folders = []
    for seed in config.seeds:
        for position in POSITIONS:
            folder = workdir / f"{position}_seed{seed}"
            train(run_config(config, position, seed, dataset), folder)
            folders.append(folder)
    return folders


def run_config(config: LongContextConfig, position: str, seed: int, dataset: Path) -> TrainConfig:
    """The pre-training run of one model."""
    return dataclasses.replace(
        config.train,
        seed=seed,
        model=dataclasses.replace(config.train.model, position=position),
        data=dataclasses.replace(config.train.data, dataset=str(dataset), seed=seed),
    )


def train(config: TrainConfig, folder: Path) -> None:
    """Train to the last step, or find that done; `UserError` if the training was stopped before."""
    last = folder / checkpoint.FOLDER / str(config.steps)
    if last.is_dir():
        pretrain.check_workdir(config, folder)
        print(f"{folder}: trained earlier")
        return
    print(f"\n{folder}:")
    pretrain.run(config, folder)
    require(last.is_dir(), f"{folder} stopped before its end; run the same command again to continue")


def load(config: LongContextConfig, folder: Path) -> Pretrained:
    """A trained model, whose `max_length` says at what length it was trained."""
    if config.trained_length:
        return pretrained.load(folder, max_length=config.trained_length)
    return pretrained.load(folder)


def heldout_texts(corpus: CorpusConfig) -> list[str]:
    """The texts that `prepare_data` holds out of the same corpus, in an order that mixes its sources."""
    texts = []
    for source in sources.corpus(corpus):
        threshold = source.census(corpus.holdout_fraction).threshold
        texts += [document.text for digest, document in source.documents() if digest < threshold]
    return shuffled(texts)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Documents as training saw them: with a beginning where the tokenizer has one."""
    first = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return [first + ids for ids in tokenizer.encode_batch(texts)]


def measure(config: LongContextConfig, models: Sequence[Pretrained], texts: Sequence[str]) -> Nats:
    """Read the documents with every row of the table, at every length, with every model."""
    found: dict[str, list[dict[int, np.ndarray]]] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for model in models:
            trained = model.config.max_length
            lengths = sorted(trained * multiple for multiple in config.multiples)
            streams_DN = long_context.streams(
                encode(model.tokenizer, texts), lengths[-1] * config.blocks, config.documents
            )
            variants = long_context.variants(model.config, windows(config, model))
            tokens = streams_DN[:, 1:].size * len(lengths) * len(variants)
            task = progress.add_task(f"reading with {model.config.position}", total=tokens)
            for name, variant in variants.items():
                read = partial(long_context.measure, model.params, variant, streams_DN)
                advance = partial(progress.advance, task)
                found.setdefault(name, []).append({n: read(n, config.batch_tokens, advance) for n in lengths})
    return {name: {n: np.stack([row[n] for row in rows]) for n in rows[0]} for name, rows in found.items()}


def windows(config: LongContextConfig, model: Pretrained) -> tuple[int, ...]:
    """The window of each layer's attention, in the row that has them."""
    trained = model.config.max_length
    shortest, longest = config.shortest_window or trained, config.longest_window or 4 * trained
    return long_context.layer_windows(model.config.num_layers, shortest, longest)


def table(report: Report) -> Table:
    """Perplexity by length, for the terminal."""
    lengths = list(next(iter(report.values())))
    result = Table(title="Perplexity (± standard error over documents) by length of the windows")
    result.add_column("")
    for length in lengths:
        result.add_column(f"{length:,}", justify="right")
    for name, row in report.items():
        result.add_row(name, *(_number(row[length].perplexity) for length in lengths))
    return result


def markdown(report: Report, facts: str) -> str:
    """The table, and what every row changes against the one above it."""
    head = ["", *map(str, next(iter(report.values())))]
    perplexity = [[name, *(_number(cell.perplexity) for cell in row.values())] for name, row in report.items()]
    changes = [
        [name, *(_percent(cell.change) for cell in row.values() if cell.change)]
        for name, row in report.items()
        if all(cell.change for cell in row.values())
    ]
    parts = ["# Perplexity by length", facts, _rows(head, perplexity)]
    if changes:
        parts += ["Change against the row above, paired by document:", _rows(head, changes)]
    return "\n\n".join(parts) + "\n"


def _rows(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(estimate: Estimate) -> str:
    return f"{estimate.mean:.2f} ± {estimate.error:.2f}"


def _percent(estimate: Estimate) -> str:
    return f"{estimate.mean:+.1%} ± {estimate.error:.1%}"


def write(report: Report, nats: Nats, command: str, workdir: Path) -> None:
    """Write table.md, results.json and the two figures."""
    lengths = list(next(iter(nats.values())))
    seeds, documents, tokens = next(iter(nats.values()))[lengths[-1]].shape
    facts = (
        f"`{command}`\n\nEvery length reads the same {documents * tokens:,} tokens of {documents} held-out documents"
        f"{f', with {seeds} models of each kind, from different seeds' if seeds > 1 else ''}; ± is the standard error "
        "over documents."
    )
    by_position = long_context.by_position(nats)
    values = {
        "command": command,
        "documents": documents,
        "tokens": documents * tokens,
        "rows": {name: {n: dataclasses.asdict(cell) for n, cell in row.items()} for name, row in report.items()},
        "nats_by_document": {  # of each seed
            name: {length: values.mean(axis=2).tolist() for length, values in row.items()} for name, row in nats.items()
        },
        "nats_by_position": by_position,  # in the longest window
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "table.md").write_text(markdown(report, facts), encoding="utf-8")
    (workdir / "results.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    curves = {
        name: {length: (cell.perplexity.mean, cell.perplexity.error) for length, cell in row.items()}
        for name, row in report.items()
    }
    figures.perplexity_by_length(curves, workdir / "perplexity.png")
    figures.loss_by_position(by_position, lengths[-1], lengths[0], workdir / "position.png")


if __name__ == "__main__":
    runner.main(run, LongContextConfig, "configs/long_context/default.py")
