"""A training run's report: its numbers as data, and the same numbers as one self-contained HTML page."""

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

METHODS = ("model", "unigram", "gzip -9", "zstd -19", "xz -9e")
# LLaMA-2 7B and what it was pre-trained on: a scale to hold a small run against.
LLAMA2_PARAMETERS = 6_738_415_616
LLAMA2_TOKENS = 2e12


@dataclasses.dataclass(frozen=True)
class Run:
    """What was trained, on what, for how long."""

    parameters: int
    embedding_parameters: int  # of the input table and the output head
    architecture: str
    vocab_size: int
    steps: int
    batch: str
    tokens: int  # seen in training
    corpus_tokens: int  # in the training split
    corpus_bytes: int
    peak_learning_rate: float
    seed: int
    train_seconds: float  # in train steps alone
    tokens_per_second: float  # the median over the run
    mfu: float  # the median; 0 where the device's peak is unknown
    peak_flops: float  # that the share is of; 0 where unknown
    device: str
    versions: str

    @property
    def epochs(self) -> float:
        """How often the run went through the training split."""
        return self.tokens / self.corpus_tokens


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command that led to the report, and its wall-clock seconds."""

    name: str
    command: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Heldout:
    """The held-out documents of a source, and the bits that every method spends on all of them."""

    language: str
    documents: int
    text_bytes: int
    tokens: int  # predicted: the text's and the end of each document
    bits: Mapping[str, float]

    def bits_per_byte(self) -> dict[str, float]:
        """The figure of every method, in the order of `METHODS`."""
        return {method: self.bits[method] / self.text_bytes for method in METHODS if method in self.bits}


@dataclasses.dataclass(frozen=True)
class Sample:
    """A continuation and how it was drawn."""

    prompt: str
    completion: str
    settings: str


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything the page shows."""

    title: str
    run: Run
    stages: tuple[Stage, ...]
    heldout: Mapping[str, Heldout]
    samples: tuple[Sample, ...]


def total(heldout: Mapping[str, Heldout]) -> Heldout:
    """All sources as one: bytes, tokens and bits added up."""
    rows = list(heldout.values())
    bits = {method: sum(row.bits[method] for row in rows) for method in METHODS if all(method in r.bits for r in rows)}
    return Heldout(
        "all", sum(r.documents for r in rows), sum(r.text_bytes for r in rows), sum(r.tokens for r in rows), bits
    )


def verdict(heldout: Mapping[str, Heldout], rival: str) -> str:
    """Where the model beats `rival` and, by name, where it does not yet."""
    figures = {name: row.bits_per_byte() for name, row in heldout.items()}
    behind = [name for name, figure in figures.items() if figure["model"] >= figure[rival]]
    overall = total(heldout).bits_per_byte()
    text = (
        f"Against {rival}: better on {len(figures) - len(behind)} of {len(figures)} sources; "
        f"{overall['model']:.3f} against {overall[rival]:.3f} bits per byte over all of them"
    )
    return f"{text}. It does not yet beat {rival} on {', '.join(behind)}." if behind else f"{text}."


def as_json(report: Report) -> dict[str, object]:
    """The report as plain data, with the derived figures beside the counts they come from."""
    values = dataclasses.asdict(report)
    rows = {**report.heldout, "all": total(report.heldout)}
    values["run"]["epochs"] = report.run.epochs
    values["heldout"] = {
        name: {**dataclasses.asdict(row), "bits_per_byte": row.bits_per_byte()} for name, row in rows.items()
    }
    return values


def facts(run: Run) -> dict[str, str]:
    """The run as labelled lines of text."""
    peak = f"{run.peak_flops / 1e9:,.0f} GFLOP/s" if run.peak_flops else "unknown"
    utilisation = f", {run.mfu:.0%} of the peak" if run.peak_flops else ""
    return {
        "Model": run.architecture,
        "Parameters": f"{run.parameters:,}, of which {run.embedding_parameters:,} in the embedding and the output head",
        "Tokens seen": f"{run.tokens:,} = {run.steps:,} steps of {run.batch}",
        "Corpus": f"{run.corpus_tokens:,} tokens, {run.corpus_bytes / 1e6:.1f} MB; {run.epochs:.2f} epochs were seen",
        "Peak learning rate": f"{run.peak_learning_rate:g}",
        "Training time": f"{run.train_seconds:,.0f} s in train steps",
        "Speed": f"{run.tokens_per_second:,.0f} tokens/s{utilisation}",
        "Hardware": f"{run.device}; matrix products run at {peak} in float32"
        if run.device.startswith("cpu")
        else f"{run.device}; peak {peak}",
        "Seed": str(run.seed),
        "Versions": run.versions,
    }


def expectation(run: Run) -> str:
    """What quality to expect of a model of this size after so few tokens."""
    return (
        f"This model has {run.parameters / 1e6:.1f} million parameters and saw {run.tokens / 1e6:.1f} million tokens; "
        f"LLaMA-2 7B has about {_two_digits(LLAMA2_PARAMETERS / run.parameters)} times the parameters and saw about "
        f"{_two_digits(LLAMA2_TOKENS / run.tokens)} times the tokens. What a run of minutes learns is the surface of "
        "its corpus: which script and which kind of text it is in, the spelling of common words, set phrases, the "
        "layout of code, and some grammar over a few words. It does not know facts, does not follow a thought past a "
        "sentence, and its code does not run. The samples below are as drawn, not selected. The bits per byte above "
        "measure it better than samples can, and are what to compare when the model, the data or the time changes."
    )


def _two_digits(ratio: float) -> str:
    return f"{float(f'{ratio:.2g}'):,.0f}"


METHOD_NOTES = (
    "Every method is measured on the same held-out documents, whole, per source. Bits per byte is the information "
    "it needs for them over their bytes of UTF-8: lower is better, and no tokenizer comes into it.",
    "The model pays for every token and for the end of each document; it sees at most one window of context, and "
    "less at the start of a window. Its held-out documents were neither trained on nor shown to the tokenizer, but it "
    "did learn from other documents of the same sources.",
    "The compressors get the documents of a source joined into one file, without separators. They start from nothing "
    "on each source, so they are handicapped on small ones; they show what can be had without any training.",
    "The unigram model gives every token a fixed probability: its count in the training split, plus one. It knows "
    "the tokenizer and the mixture of the corpus, but no context: what the model gains over it is what it learned.",
)

STYLE = """
body { font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", sans-serif; color: #1d1d1f;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; }
th, td { padding: 0.25rem 0.6rem; text-align: left; border-bottom: 1px solid #e5e5e5; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:not(:first-child):not(.number) { overflow-wrap: anywhere; min-width: 8rem; }
tr.total td { border-top: 2px solid #999; }
pre { background: #f6f6f7; padding: 0.7rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 0.85rem/1.5 ui-monospace, "Noto Sans Mono", "Noto Sans Mono CJK SC", monospace; margin: 0.4rem 0 1rem; }
pre b { color: #0072b2; }
img { max-width: 100%; display: block; margin: 1rem 0; }
.note { color: #555; font-size: 0.88rem; }
summary { cursor: pointer; padding: 0.2rem 0; }
@media (max-width: 45rem) { table { display: block; overflow-x: auto; } }
"""


def render(report: Report, figures: Mapping[str, Path]) -> str:
    """The page: figures (caption -> PNG) are embedded, all text is escaped."""
    sections = (
        f"<h1>{escape(report.title)}</h1>",
        f"<p>{escape(_summary(report))}</p>",
        "<h2>Held-out bits per byte</h2>",
        "".join(f"<p>{escape(verdict(report.heldout, rival))}</p>" for rival in METHODS[1:]),
        _heldout_table(report.heldout),
        "".join(f'<p class="note">{escape(note)}</p>' for note in METHOD_NOTES),
        "<h2>Figures</h2>",
        "".join(image(caption, path) for caption, path in figures.items()),
        "<h2>What to expect</h2>",
        f"<p>{escape(expectation(report.run))}</p>",
        "<h2>Samples</h2>",
        _samples(report.samples) or "<p>None were drawn.</p>",
        "<h2>The run</h2>",
        _facts_table(report.run),
        "<h2>Commands</h2>",
        "".join(_stage(stage) for stage in report.stages) or "<p>Not recorded.</p>",
    )
    return page(report.title, sections)


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page in the house style, of sections that are HTML."""
    body = "\n".join(sections)
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head = f"{meta}<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _summary(report: Report) -> str:
    run, figures = report.run, total(report.heldout).bits_per_byte()
    return (
        f"A decoder of {run.parameters / 1e6:.1f} million parameters saw {run.tokens / 1e6:.1f} million tokens in "
        f"{run.train_seconds / 60:.1f} minutes of training and reaches {figures['model']:.3f} bits per byte on "
        f"held-out text of {len(report.heldout)} sources."
    )


def escape(text: str) -> str:
    """Text as HTML that shows it as it is."""
    return html.escape(text)


def _cell(text: str, best: bool = False) -> str:
    return f'<td class="number">{f"<b>{text}</b>" if best else text}</td>'


def _row(name: str, row: Heldout, methods: Sequence[str], css: str = "") -> str:
    figures = row.bits_per_byte()
    best = min(figures.values())
    cells = "".join(_cell(f"{figures[method]:.3f}", figures[method] == best) for method in methods)
    return (
        f'<tr class="{css}"><td>{escape(name)}</td><td>{escape(row.language)}</td>'
        f"{_cell(f'{row.documents:,}')}{_cell(f'{row.text_bytes / 1e3:,.1f}')}{cells}</tr>"
    )


def _heldout_table(heldout: Mapping[str, Heldout]) -> str:
    methods = list(total(heldout).bits)
    headings = "".join(f'<th class="number">{escape(text)}</th>' for text in ("documents", "kB", *methods))
    rows = "".join(_row(name, row, methods) for name, row in heldout.items())
    last = _row("all sources", total(heldout), methods, "total")
    return f"<table><tr><th>source</th><th>language</th>{headings}</tr>{rows}{last}</table>"


def _facts_table(run: Run) -> str:
    rows = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts(run).items())
    return f"<table>{''.join(rows)}</table>"


def image(caption: str, path: Path) -> str:
    """A PNG file inside of a page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'


def _samples(samples: Sequence[Sample]) -> str:
    """The samples in order, each run of equal settings under one line that gives them."""
    parts, settings = [], ""
    for sample in samples:
        if sample.settings != settings:
            parts.append(f'<p class="note">{escape(sample.settings)}</p>')
        settings = sample.settings
        parts.append(f"<pre><b>{escape(sample.prompt)}</b>{escape(sample.completion)}</pre>")
    return "".join(parts)


def _stage(stage: Stage) -> str:
    return f'<p class="note">{escape(stage.name)}: {stage.seconds:,.0f} s</p><pre>{escape(stage.command)}</pre>'
