"""Report on a pre-training run: held-out bits per byte beside compressors and a unigram model, figures, samples.

    python -m experiments.report --workdir=runs/demo --config.run=runs/demo/model

Writes to --workdir: report.html (one self-contained page), report.json (the same numbers) and figures/*.png. Every
held-out document of every source is measured, whole.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from statistics import median

import jax
from rich.console import Console
from rich.table import Table

from experiments import runner
from llm_jax import config as config_lib
from llm_jax import models
from llm_jax.config import ModelConfig, TrainConfig
from llm_jax.data import loader, records
from llm_jax.errors import UserError, require
from llm_jax.evaluation import baselines, figures, perplexity
from llm_jax.evaluation import report as report_lib
from llm_jax.evaluation.report import Heldout, Report, Run, Sample, Stage
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.scaling.flops import training_flops_per_token
from llm_jax.training import checkpoint, metrics

STAGES = "stages.json"  # in the workdir, where a chain of experiments notes its commands and their times
BITS = 1.0 / 0.6931471805599453  # in a nat
EVERY_BATCH = 1 << 62
TABLE_WIDTH = 110


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What is reported on."""

    title: str = "A small language model, from text to samples"
    run: str = "runs/demo/model"  # the workdir of experiments.pretrain
    samples: str = ""  # a samples.json of experiments.generate; "" = none


def run(config: ReportConfig, workdir: Path) -> None:
    """Measure, draw and write the report, and print its table."""
    train_config = config_lib.load(TrainConfig, Path(config.run) / "config.json")
    train = metrics.read(Path(config.run), "train")
    require(bool(train), f"{Path(config.run) / metrics.FILE} has no training records: did the run take a step?")
    heldout = measure(train_config, Path(config.run))
    report = Report(
        title=config.title,
        run=describe_run(train_config, train),
        stages=read_stages(workdir / STAGES),
        heldout=heldout,
        samples=read_samples(Path(config.samples)) if config.samples else (),
    )
    drawn = draw(train, metrics.read(Path(config.run), "heldout"), heldout, workdir / "figures")
    _write(workdir / "report.json", json.dumps(report_lib.as_json(report), indent=2, ensure_ascii=False) + "\n")
    _write(workdir / "report.html", report_lib.render(report, drawn))
    console = Console(width=max(Console().width, TABLE_WIDTH))  # a table piped to a file is not squeezed
    console.print(table(heldout))
    console.print(f"report: {workdir / 'report.html'}", soft_wrap=True)


def measure(config: TrainConfig, run_folder: Path) -> dict[str, Heldout]:
    """The held-out bits of the model and of every baseline, source by source, ordered by language."""
    folder = Path(config.data.dataset)
    summary = records.read_summary(folder)
    mesh = mesh_lib.build(config.mesh)
    model_config, params, step = checkpoint.load_model(run_folder, mesh=mesh)
    score = perplexity.scorer(model_config, config.loss, mesh)
    console = Console(stderr=True)
    console.print(f"scoring the model of step {step:,} and the baselines on held-out text", soft_wrap=True)
    unigram = baselines.unigram_heldout(folder)
    rows = {}
    for name, source in sorted(summary.sources.items(), key=lambda item: (item[1].language, item[0])):
        if not source.heldout.documents:
            console.print(f"{name}: no held-out documents, left out of the report")
            continue
        result = score(params, loader.heldout_batches(config.data, name, max_batches=EVERY_BATCH))
        sizes = baselines.compressed_bytes(records.heldout_texts(folder, name))
        bits = {"model": result.nats * BITS, "unigram": unigram[name] * BITS, **{k: 8.0 * v for k, v in sizes.items()}}
        rows[name] = Heldout(
            source.language, source.heldout.documents, source.heldout.text_bytes, round(result.tokens), bits
        )
    require(bool(rows), f"{folder} holds out no documents: there is nothing to measure on")
    return rows


def describe_run(config: TrainConfig, train: figures.Records) -> Run:
    """The run's facts, from its config, its metrics and the dataset it read."""
    info = loader.describe(config.data)
    model, data = config.model, config.data
    rate = median(record["tokens_per_second"] for record in train)
    utilisation = median(record.get("mfu", 0.0) for record in train)
    flops = training_flops_per_token(model, data.sequence_length)
    return Run(
        parameters=models.count_parameters(model),
        embedding_parameters=model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2),
        architecture=describe_model(model),
        vocab_size=model.vocab_size,
        steps=int(train[-1]["step"]),
        batch=f"{data.batch_size} x {data.sequence_length} tokens",
        tokens=int(train[-1]["tokens"]),
        corpus_tokens=info.tokens,
        corpus_bytes=info.text_bytes,
        peak_learning_rate=config.optimizer.learning_rate,
        seed=config.seed,
        train_seconds=train_seconds(train),
        tokens_per_second=rate,
        mfu=utilisation,
        peak_flops=median(r["tokens_per_second"] * flops / r["mfu"] for r in train) if utilisation else 0.0,
        device=_device(),
        versions=", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax")),
    )


def describe_model(model: ModelConfig) -> str:
    """The architecture in one line."""
    position = {"rope": "rotary positions", "alibi": "ALiBi"}[model.position]
    head = "NormHead" if model.norm_head else "tied head" if model.tie_embeddings else "linear head"
    kv_heads = f" ({model.num_kv_heads} key-value)" if model.num_kv_heads != model.num_heads else ""
    return (
        f"{model.num_layers} layers of width {model.hidden_size}, {model.num_heads} heads{kv_heads} of "
        f"{model.head_dim}, SwiGLU of {model.ffn_size}, {position}, {head}, vocabulary {model.vocab_size:,}"
    )


def train_seconds(train: figures.Records) -> float:
    """Seconds spent in train steps, from the rates over the logged stretches."""
    seconds, before = 0.0, 0.0
    for record in train:
        seconds += (record["tokens"] - before) / record["tokens_per_second"]
        before = record["tokens"]
    return seconds


def draw(
    train: figures.Records, heldout_curve: figures.Records, heldout: Mapping[str, Heldout], folder: Path
) -> dict[str, Path]:
    """Draw all figures; returns caption -> file."""
    rows = {f"{name} ({row.language})": row.bits_per_byte() for name, row in heldout.items()}
    rows["all sources"] = report_lib.total(heldout).bits_per_byte()
    paths = {
        "Held-out bits per byte by source": folder / "bits_per_byte.png",
        "Loss by tokens seen": folder / "loss.png",
        "Learning rate by tokens seen": folder / "learning_rate.png",
        "Tokens per second by tokens seen": folder / "throughput.png",
    }
    bars, loss, rate, speed = paths.values()
    figures.heldout_bars(rows, bars)
    figures.loss_curve(train, heldout_curve, loss)
    figures.learning_rate(train, rate)
    figures.throughput(train, speed)
    return paths


def read_stages(path: Path) -> tuple[Stage, ...]:
    """The commands of the chain that this report ends; none where it was not run by one."""
    if not path.is_file():
        return ()
    return tuple(Stage(name, **values) for name, values in json.loads(path.read_text()).items())


def read_samples(path: Path) -> tuple[Sample, ...]:
    """The samples of a file that `experiments.generate` wrote."""
    require(path.is_file(), f"no samples at {path}: draw some with experiments.generate, or leave config.samples empty")
    try:
        return tuple(Sample(**values) for values in json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} does not hold samples: {error}") from None


def table(heldout: Mapping[str, Heldout]) -> Table:
    """Bits per byte of every source and method, the best in bold."""
    methods = list(report_lib.total(heldout).bits)
    result = Table(title="Held-out bits per byte (lower is better)")
    for heading in ("source", "language", "kB", *methods):
        result.add_column(heading, justify="left" if heading in ("source", "language") else "right")
    for name, row in heldout.items():
        result.add_row(*_cells(name, row, methods))
    result.add_section()
    result.add_row(*_cells("all", report_lib.total(heldout), methods))
    return result


def _cells(name: str, row: Heldout, methods: list[str]) -> list[str]:
    values = row.bits_per_byte()
    best = min(values.values())
    numbers = (f"{values[m]:.3f}" if values[m] != best else f"[bold]{values[m]:.3f}[/bold]" for m in methods)
    return [name, row.language, f"{row.text_bytes / 1e3:,.1f}", *numbers]


def _device() -> str:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return f"cpu with {os.cpu_count()} cores"
    return f"{jax.device_count()} x {device.device_kind}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    runner.main(run, ReportConfig, "configs/demo/report.py", workdir="runs/demo", save_config=False)
