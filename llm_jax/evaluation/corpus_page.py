"""The page of a corpus run: what every stage kept, dropped and why, in numbers, figures and samples.

It is made of nothing but the files that a run leaves in its folder: the stages' report.json and audit.jsonl and, where
the run got so far, its own report.json. So it can be made of a run that was stopped, and anew at any time.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llm_jax.errors import require
from llm_jax.evaluation import corpus_figures as figures
from llm_jax.evaluation import corpus_tables as tables
from llm_jax.evaluation import report
from llm_jax.evaluation.corpus_tables import Reports
from llm_jax.evaluation.tables import Table, as_html
from llm_jax.files import read_json, read_lines, replacing

TITLE = "What became of the corpus"
STAGES, REPORT, AUDIT = "stages", "report.json", "audit.jsonl"  # as the factory names them
PAGE, FIGURES = "report.html", "figures"
FOUND: tuple[Callable[[Reports], Table | None], ...] = (  # tables of what single stages found, in their order
    tables.faults, tables.told_languages, tables.exact_groups, tables.rules, tables.classifiers, tables.likelihood,
    tables.cut_sentences, tables.cut_examples, tables.common_parts, tables.fuzzy_clusters, tables.topics,
    tables.personal, tables.personal_examples, tables.contamination, tables.contamination_examples,
)  # fmt: skip
NOTES = (
    "Bytes are of the documents' text in UTF-8. What a stage takes out of documents that stay is lost in bytes alone.",
    "MB/s is what a stage got over its seconds of wall-clock time. Peak memory is the process's, with what earlier "
    "stages left in it.",
)


class Run(NamedTuple):
    """What a run left in its folder."""

    stages: Mapping[str, Mapping[str, Any]]  # name -> report, in order
    audits: Mapping[str, list[dict[str, Any]]]  # name -> some of the documents that it dropped
    rest: Mapping[str, Any]  # the run's report: its settings, the dataset, the mixture; {} while it is not done


def read(folder: Path) -> Run:
    """Read what a run of `experiments.prepare_data` left. `UserError` where no stage is done or a report is damaged."""
    paths = sorted((folder / STAGES).glob(f"[0-9][0-9]_*/{REPORT}"))
    paths = [path for path in paths if not path.parent.name.endswith(".partial")]
    require(bool(paths), f"no stage is done in {folder / STAGES}: is it a workdir of experiments.prepare_data?")
    stages, audits = {}, {}
    for path in paths:
        stage = read_json(path)
        stages[stage["name"]] = stage
        audit = path.with_name(AUDIT)
        audits[stage["name"]] = list(read_lines(audit)) if audit.is_file() else []
    whole = folder / REPORT
    rest = read_json(whole) if whole.is_file() else {}
    done = rest.get("stages") == list(stages.values())  # else it is of an earlier run in this folder
    return Run(stages, audits, rest if done else {})


def write(run: Run, folder: Path) -> Path:
    """Draw the figures and write the page; returns its path."""
    drawn = draw(run, folder / FIGURES)
    with replacing(folder / PAGE) as partial:
        partial.write_text(render(run, drawn), encoding="utf-8")
    return folder / PAGE


def draw(run: Run, folder: Path) -> dict[str, Path]:
    """Draw what there is to draw; returns caption -> file."""
    stages, every = run.stages, list(run.stages.values())
    drawn: dict[str, Path] = {}

    def to(name: str, caption: str) -> Path:
        return drawn.setdefault(caption, folder / f"corpus_{name}.png")

    figures.flow(every, to("flow", "Bytes and documents through the stages"))
    figures.composition(_languages(run), _sources(stages), to("composition", "Languages and sources"))
    histograms = {
        score if name in score else f"{name}: {score}": counts
        for name, stage in stages.items()
        for score, counts in stage.get("scores", {}).items()
    }
    if histograms:
        figures.scores(histograms, to("scores", "Scores"))
    sizes = {name: stages[name]["facts"]["clusters by size"] for name in ("exact", "fuzzy") if name in stages}
    sizes = {name: found for name, found in sizes.items() if found}
    if sizes:
        figures.cluster_sizes(sizes, to("clusters", "Sizes of clusters of duplicates"))
    if "fuzzy" in stages:
        figures.s_curve(stages["fuzzy"]["facts"], to("s_curve", "What MinHash finds"))
    figures.costs(every, to("costs", "Seconds and memory"))
    return drawn


def _languages(run: Run) -> dict[str, Mapping[str, float]]:
    """The bytes of each language that were read and that are kept, and the tokens that are drawn."""
    before, after = map(tables.by_language, tables.ends(run.stages))
    rows: dict[str, Mapping[str, float]] = {"read": before, "kept": after}
    drawn: dict[str, float] = {}
    for row in run.rest.get("mixture", []):
        language = run.rest["dataset"]["sources"][row["pool"]]["language"]
        drawn[language] = drawn.get(language, 0.0) + row["drawn"]
    return rows | ({"drawn": drawn} if drawn else {})


def _sources(stages: Reports) -> dict[str, tuple[str, float, float]]:
    """Each source's language, and its bytes when they were read or added, and in the end; the largest first."""
    last = tables.ends(stages)[1]["by_source"]
    found: dict[str, tuple[str, float, float]] = {}
    for stage in stages.values():
        for name, row in stage["by_source"].items():
            end = last.get(name, {"language": "", "bytes_kept": 0})
            found.setdefault(name, (end["language"] or row["language"], row["bytes_in"], end["bytes_kept"]))
    return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))


def render(run: Run, drawn: Mapping[str, Path]) -> str:
    """The page: figures (caption -> PNG) are embedded, all text is escaped."""
    overview = [tables.sources(run.stages), tables.languages(run.stages)]
    sections = [
        f"<h1>{report.escape(TITLE)}</h1>",
        f"<p>{report.escape(summary(run))}</p>",
        *(report.image(caption, path) for caption, path in drawn.items()),
        *map(as_html, outcome(run)),
        *(f'<p class="note">{report.escape(note)}</p>' for note in NOTES),
        *(as_html(table) for table in (*overview, *(find(run.stages) for find in FOUND)) if table),
        "<h2>Some of what was dropped</h2>",
        "".join(_audit(name, run.stages[name], rows) for name, rows in run.audits.items() if rows) or "<p>Nothing.</p>",
        "<h2>All facts</h2>",
        *(_folded(name, _json(stage)) for name, stage in run.stages.items()),
        *([_folded("settings", _json(run.rest["config"]))] if run.rest else []),
    ]
    return report.page(TITLE, sections)


def outcome(run: Run) -> list[Table]:
    """What a terminal shows too: the stages, why documents were dropped, the dataset and how it is drawn."""
    found = [tables.stages(run.stages), tables.reasons(run.stages)]
    if run.rest:
        budget = run.rest["config"]["mixture"]["token_budget"]
        found += [tables.dataset(run.rest["dataset"]), tables.mixture(run.rest["mixture"], budget)]
    return [table for table in found if table]


def summary(run: Run) -> str:
    """What went in, what came out, and how fast."""
    first, last = tables.ends(run.stages)
    seconds = sum(stage["seconds"] for stage in run.stages.values())
    read, kept = first["bytes"]["in"], last["bytes"]["kept"]
    text = (
        f"{first['documents']['in']:,} documents, {read / 1e6:,.1f} MB, were read; {last['documents']['kept']:,} "
        f"documents, {kept / 1e6:,.1f} MB ({kept / max(read, 1):.1%}), are left after {len(run.stages)} stages, which "
        f"took {seconds:,.1f} s: {read / 1e6 / max(seconds, 1e-3):.2g} MB/s, with at most "
        f"{max(stage['peak_mb'] for stage in run.stages.values()):,} MB of memory."
    )
    if not run.rest:
        return f"{text} The run is not done: what follows is of the stages that are."
    splits = (source[split] for source in run.rest["dataset"]["sources"].values() for split in ("train", "heldout"))
    tokens = sum(split["tokens"] for split in splits)
    return f"{text} Tokenised in {run.rest['seconds']['tokenise']:,.1f} s they are {tokens:,} tokens."


def _audit(name: str, stage: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """The dropped documents of a stage that are shown, folded, reason by reason."""
    parts = []
    for reason, counts in stage["dropped"].items():
        samples = "".join(
            f'<p class="note">{report.escape(_origin(row))}</p><pre>{report.escape(row["text"])}</pre>'
            for row in rows
            if row["reason"] == reason
        )
        parts.append(_folded(f"{name}: {reason} ({counts['documents']:,} documents)", samples))
    return "".join(parts)


def _origin(row: Mapping[str, Any]) -> str:
    return f"{row['id']}: {row['because']}" if row["because"] else row["id"]


def _folded(title: str, content: str) -> str:
    """HTML under a line that opens it."""
    return f"<details><summary>{report.escape(title)}</summary>{content}</details>"


def _json(values: Any) -> str:
    return f"<pre>{report.escape(json.dumps(values, indent=1, ensure_ascii=False))}</pre>"
