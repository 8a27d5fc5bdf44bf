"""What rounding a model's weights costs: bytes, perplexity, divergence from the float model's predictions.

    python -m experiments.quantize --config=configs/quantize/default.py --workdir=runs/quantize
    python -m experiments.quantize --workdir=runs/smollm2_int4 --config.variants="('int4:64',)" --config.save=int4:64

Reads config.model: a run folder, a Hugging Face folder, a .gguf file, or smollm2, which is downloaded. A variant is
bfloat16, int8 or int4, with the most input features that share a scale after a colon (0 = all of them). Writes to
--workdir: table.md and results.json (every document's numbers, with the exact command); and with --config.save=VARIANT
that variant as an Orbax checkpoint with its tokenizer, which makes --workdir a run folder for experiments.generate and
chat. The variants are in memory together.
"""

import dataclasses
import functools
import json
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from experiments import convert, runner
from experiments.long_context import encode, heldout_texts
from llm_jax import models
from llm_jax.config import CorpusConfig, ModelConfig
from llm_jax.errors import UserError, require
from llm_jax.evaluation.divergence import Divergence, divergence
from llm_jax.evaluation.long_context import Estimate, streams
from llm_jax.interop import pretrained, released
from llm_jax.models.quantization import DEFAULT_GROUPS
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.tokenizer import Tokenizer
from llm_jax.training import checkpoint

REFERENCE = "float32"
TABLE_WIDTH = 110


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Which model is rounded in which ways, and on which held-out texts this is measured."""

    model: str = "smollm2"
    variants: tuple[str, ...] = ("bfloat16", "int8", "int8:64", "int4:128", "int4:64", "int4:32")
    documents: int = 24  # at most so many
    tokens: int = 512  # predicted in each, from its beginning
    save: str = ""  # the variant to keep
    corpus: CorpusConfig = dataclasses.field(default_factory=CorpusConfig)

    def __post_init__(self) -> None:
        for name in ("documents", "tokens"):
            require(getattr(self, name) > 0, f"QuantizeConfig.{name}={getattr(self, name)} must be positive")
        for variant in self.variants:
            parse(variant)
        require(
            self.save in ("", *self.variants),
            f"QuantizeConfig.save={self.save!r} is not one of the variants {', '.join(self.variants)}",
        )


class Model(NamedTuple):
    """A model in one of its variants."""

    config: ModelConfig
    params: Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant in the table; estimates are means over documents."""

    bytes: int
    bits_per_weight: float
    perplexity: Estimate
    increase: Estimate  # of perplexity, as a share of the reference's, paired by document
    kl: Estimate
    agreement: Estimate


Report = dict[str, Row]


def run(config: QuantizeConfig, workdir: Path) -> Report:
    """Round the model, measure every variant, write and print the table, and save what is asked for."""
    source = released.locate(config.model)
    reference = Model(*pretrained.load_model(source, dtype=REFERENCE, compute_dtype=REFERENCE))
    variants = {name: make(name, reference) for name in config.variants}
    if config.save:
        save(variants[config.save], source, workdir)
    documents_DN = read(config, tokenizers.load(source))
    found = measure(reference, variants, documents_DN)
    everything = {REFERENCE: reference, **variants}
    report = {name: summarise(everything[name], values) for name, values in found.items()}
    write(report, found, documents_DN, shlex.join(["python", "-m", "experiments.quantize", *sys.argv[1:]]), workdir)
    Console(width=max(Console().width, TABLE_WIDTH)).print(table(report))
    return report


def parse(variant: str) -> tuple[str, int | None]:
    """The kind and the group of a variant, None for the kind's default; `UserError` for one that does not exist."""
    kind, colon, group = variant.partition(":")
    if (kind in DEFAULT_GROUPS and (not colon or group.isdecimal())) or variant == "bfloat16":
        return kind, int(group) if colon else None
    raise UserError(f"QuantizeConfig.variants: {variant!r} is neither bfloat16 nor like int8, int8:128 or int4:64")


def make(variant: str, reference: Model) -> Model:
    """The model with its weights rounded."""
    kind, group = parse(variant)
    if kind != "bfloat16":
        return Model(*models.quantize(reference.params, reference.config, kind, group))
    rounded = jax.tree.map(lambda leaf: leaf.astype(kind), reference.params)
    return Model(dataclasses.replace(reference.config, param_dtype=kind), rounded)


def save(model: Model, source: Path, workdir: Path) -> None:
    """Make `workdir` a run folder of the model, with the source's tokenizer and chat template."""
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for file in convert.companions(source, Path(folder), model.config)[0]:
            shutil.copyfile(file, workdir / file.name)
    checkpoint.save_model(workdir, *model)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any, tokens_T: jax.Array) -> jax.Array:
    logits_TV: jax.Array = models.logits(params, config, tokens_T[None])[0]
    return logits_TV


def read(config: QuantizeConfig, tokenizer: Tokenizer) -> np.ndarray:
    """The beginnings of held-out documents, int32 [D, N+1]."""
    documents = encode(tokenizer, heldout_texts(config.corpus))
    require(
        any(len(document) > config.tokens for document in documents),
        f"none of {len(documents)} held-out documents has {config.tokens + 1} tokens: lower config.tokens or raise "
        "config.corpus.holdout_fraction",
    )
    return streams(documents, config.tokens, config.documents)


def measure(reference: Model, variants: dict[str, Model], documents_DN: np.ndarray) -> dict[str, Divergence]:
    """Every variant against the reference, and the reference against itself, document by document: [D] each."""
    found: dict[str, list[Divergence]] = {}
    for document_N in track(jnp.asarray(documents_DN), "reading", console=Console(stderr=True)):
        expected_TV = _logits(*reference, document_N[:-1])
        for name, model in {REFERENCE: reference, **variants}.items():
            values = divergence(_logits(*model, document_N[:-1]), expected_TV, document_N[1:])
            found.setdefault(name, []).append(jax.device_get(values))
    return {name: Divergence(*(np.asarray(column) for column in zip(*rows))) for name, rows in found.items()}


def summarise(model: Model, values: Divergence) -> Row:
    """Means and standard errors over documents."""
    size = models.weight_bytes(model.params)
    ratio = Estimate.of(np.asarray(values.nats - values.reference_nats)).exponential()
    return Row(
        bytes=size,
        bits_per_weight=8 * size / models.count_parameters(model.config),
        perplexity=Estimate.of(np.asarray(values.nats)).exponential(),
        increase=Estimate(ratio.mean - 1, ratio.error),
        kl=Estimate.of(np.asarray(values.kl)),
        agreement=Estimate.of(np.asarray(values.agreement)),
    )


COLUMNS = ("weights", "MB", "bits a weight", "perplexity", "increase", "KL (nats)", "same likeliest token")


def cells(name: str, row: Row) -> list[str]:
    """One line of the table."""
    size = [name, f"{row.bytes / 1e6:.1f}", f"{row.bits_per_weight:.2f}"]
    perplexity = f"{row.perplexity.mean:.2f} ± {row.perplexity.error:.2f}"
    if name == REFERENCE:
        return [*size, perplexity, "", "", ""]
    return [
        *size,
        perplexity,
        f"{row.increase.mean:+.2%} ± {row.increase.error:.2%}",
        f"{row.kl.mean:.4f} ± {row.kl.error:.4f}",
        f"{row.agreement.mean:.1%} ± {row.agreement.error:.1%}",
    ]


def table(report: Report) -> Table:
    """The report for the terminal."""
    result = Table(title="± standard error over documents")
    for column in COLUMNS:
        result.add_column(column, justify="left" if column == COLUMNS[0] else "right")
    for name, row in report.items():
        result.add_row(*cells(name, row))
    return result


def markdown(report: Report, facts: str) -> str:
    """The report for table.md."""
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *(cells(name, row) for name, row in report.items())]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"# The cost of rounded weights\n\n{facts}\n\n{rows}\n"


def write(report: Report, found: dict[str, Divergence], documents_DN: np.ndarray, command: str, workdir: Path) -> None:
    """Write table.md and results.json."""
    documents, tokens = documents_DN[:, 1:].shape
    facts = (
        f"`{command}`\n\n{documents * tokens:,} predicted tokens, the first {tokens} of each of {documents} held-out "
        "documents; ± is the standard error over documents. KL is of the variant's predictions from the float model's."
    )
    values = {
        "command": command,
        "documents": documents,
        "tokens": documents * tokens,
        "rows": {name: dataclasses.asdict(row) for name, row in report.items()},
        "by_document": {
            name: {field: column.tolist() for field, column in values._asdict().items()}
            for name, values in found.items()
        },
    }
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "table.md").write_text(markdown(report, facts), encoding="utf-8")
    (workdir / "results.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    runner.main(run, QuantizeConfig, "configs/quantize/default.py")
