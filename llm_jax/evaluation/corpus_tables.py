"""The tables of a corpus run: what the stages' reports say, as text for a terminal and a page.

Each function takes the reports of the stages by name, in their order, and gives None where its stage did not run or
found nothing.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_jax.evaluation.tables import Table

Reports = Mapping[str, Mapping[str, Any]]
EVERY_SOURCE = "all"
SHOWN = 5  # of the sources of a cluster


def size(amount: float) -> str:
    """Bytes as people say them: 9.5 kB, 112.1 MB."""
    for unit, name, digits in ((1e12, "TB", 2), (1e9, "GB", 2), (1e6, "MB", 1), (1e3, "kB", 1)):
        if amount >= unit:
            return f"{amount / unit:,.{digits}f} {name}"
    return f"{amount:,.0f} bytes"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f}"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _table(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]], words: int, *notes: str) -> Table | None:
    """A table whose first columns, so many as `words` says, are aligned to the left; None without rows."""
    found = tuple(map(tuple, rows))
    return Table(title, tuple(headings), found, frozenset(headings[words:]), notes) if found else None


def ends(reports: Reports) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The reports of the first stage and of the last."""
    every = list(reports.values())
    return every[0], every[-1]


def stages(reports: Reports) -> Table:
    """What each stage kept and what it cost; MB/s is what it got over its seconds."""
    headings = ("stage", "documents in", "kept", "MB in", "MB kept", "kept of MB", "s", "MB/s", "peak MB")
    rows = []
    for name, report in reports.items():
        documents, text, seconds = report["documents"], report["bytes"], report["seconds"]
        before = text["in"] + text["added"]
        sizes = (_megabytes(text["in"]), _megabytes(text["kept"]), _share(text["kept"], before))
        speed = f"{text['in'] / 1e6 / max(seconds, 1e-3):,.1f}"
        costs = (f"{seconds:,.1f}", speed, f"{report['peak_mb']:,}")
        rows.append((name, f"{documents['in']:,}", f"{documents['kept']:,}", *sizes, *costs))
    return Table("Stages", headings, tuple(rows), frozenset(headings[1:]))


def reasons(reports: Reports) -> Table | None:
    """Why documents were dropped."""
    rows = [
        (name, reason, f"{counts['documents']:,}", size(counts["bytes"]))
        for name, report in reports.items()
        for reason, counts in sorted(report["dropped"].items(), key=lambda item: -item[1]["documents"])
    ]
    return _table("Why documents were dropped", ("stage", "reason", "documents", "text"), rows, 2)


def sources(reports: Reports) -> Table:
    """What every source lost to each of the stages that dropped documents."""
    first, last = ends(reports)
    dropping = {name: report["by_source"] for name, report in reports.items() if report["dropped"]}
    every = {name: row for report in reports.values() for name, row in report["by_source"].items()}
    rows = []
    for source in sorted(every):
        row = first["by_source"].get(source) or every[source]
        end = last["by_source"].get(source, {"language": "", "documents_kept": 0, "bytes_kept": 0})
        lost = (of_stage.get(source, {"documents_in": 0, "documents_kept": 0}) for of_stage in dropping.values())
        losses = [number["documents_in"] - number["documents_kept"] for number in lost]
        sizes = (_megabytes(row["bytes_in"]), _megabytes(end["bytes_kept"]))
        shown = (f"{loss:,}" if loss else "" for loss in losses)
        language = end["language"] or row["language"]
        rows.append((source, language, f"{row['documents_in']:,}", *shown, f"{end['documents_kept']:,}", *sizes))
    headings = ("source", "language", "documents", *dropping, "kept", "MB read", "MB kept")
    return Table("Documents that each source lost", headings, tuple(rows), frozenset(headings[2:]))


def by_language(report: Mapping[str, Any]) -> dict[str, float]:
    """The bytes of each language that a stage kept, most first."""
    sums: Counter[str] = Counter()
    for row in report["composition"]:
        sums[row["language"]] += row["bytes"]
    return dict(sums.most_common())


def languages(reports: Reports) -> Table | None:
    """How much of each language was read, as its sources declare it, and how much is kept, as it was told."""
    before, after = map(by_language, ends(reports))
    totals = sum(before.values()), sum(after.values())
    rows = [
        (
            name,
            *(_megabytes(side.get(name, 0)) for side in (before, after)),
            *(_share(side.get(name, 0), total) for side, total in zip((before, after), totals)),
        )
        for name in {**before, **after}
    ]
    headings = ("language", "MB read", "MB kept", "of all read", "of all kept")
    return _table("Languages", headings, rows, 1)


def faults(reports: Reports) -> Table | None:
    """What was wrong with the files, and the sources that could not be had."""
    facts = reports["read"]["facts"] if "read" in reports else {}
    rows = [
        (what, kind, f"{times:,}")
        for what, field in (("repaired", "repaired"), ("left out", "left_out"))
        for kind, times in facts.get(field, {}).items()
    ]
    rows += [("source left out", f"{name}: {why}", "") for name, why in facts.get("sources_left_out", {}).items()]
    return _table("What was wrong with the files", ("", "what", "times"), rows, 2)


def told_languages(reports: Reports) -> Table | None:
    """Documents in another language than their source declares, as it seemed and as it was decided."""
    counted = reports["language"]["facts"]["declared_told_language"] if "language" in reports else []
    rows = [
        (row["declared"], row["told"], row["language"], f"{row['count']:,}")
        for row in sorted(counted, key=lambda row: -row["count"])
        if row["declared"] != row["language"]
    ]
    headings = ("declared", "told", "from then on", "documents")
    return _table("Documents in another language than declared", headings, rows, 3)


def rules(reports: Reports) -> Table | None:
    """How many documents broke each rule, and of which sources most are; one may break several."""
    broken = reports["heuristics"]["facts"]["broken_rules"] if "heuristics" in reports else {}
    rows = [
        (rule, f"{sum(by_source.values()):,}", _most(by_source))
        for rule, by_source in sorted(broken.items(), key=lambda item: -sum(item[1].values()))
    ]
    headings = ("rule", "documents", "sources")
    found = Table("Rules that documents broke", headings, tuple(rows), frozenset({"documents"}))
    return found if rows else None


def _most(counts: Mapping[str, int]) -> str:
    """The names with the highest counts."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{name} {count:,}" for name, count in ordered[:SHOWN])
    return text + (f" and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else "")


def classifiers(reports: Reports) -> Table | None:
    """How well the classifiers of the quality stage judge labelled texts that they have not seen."""
    facts = reports["quality"]["facts"] if "quality" in reports else {}
    shares = ("precision", "recall", "area_under_curve")
    rows = [
        (kind, name, f"{row['texts']:,}", *(f"{row[share]:.3f}" for share in shares))
        for kind in ("quality", "offensive")
        for name, row in facts.get(kind, {}).items()
        if isinstance(row, Mapping)  # beside judgements there are counts
    ]
    headings = ("score", "judged by", "texts", "precision", "recall", "area under curve")
    note = "Quality: reference texts against other sources and spoiled ones. Offensive: English texts rated by people."
    return _table("Classifiers on held-out labelled texts", headings, rows, 2, note)


def likelihood(reports: Reports) -> Table | None:
    """Bits per byte by which garbage is told, and the bytes of it that were cut."""
    facts = reports["quality"]["facts"] if "quality" in reports else {}
    rows = [
        (name, f"{row['reference']:.2f}", f"{row['garbage']:.2f}")
        for name, row in facts.get("bits per byte", {}).items()
    ]
    headings = ("language", "sentences", "random letters")
    return _table("Bits per byte under the language model", headings, rows, 1)


def cut_sentences(reports: Reports) -> Table | None:
    """Bytes of sentences that were cut from documents that stay."""
    cut = reports["quality"]["facts"]["cut from kept documents"] if "quality" in reports else {}
    rows = [(source, f"{row['garbage_bytes']:,}", f"{row['offensive_bytes']:,}") for source, row in cut.items()]
    headings = ("source", "bytes of garbage", "bytes that offend")
    return _table("Sentences cut from documents that stay", headings, rows, 1)


def cut_examples(reports: Reports) -> Table | None:
    """Some of the sentences that were cut from documents that stay."""
    found = reports["quality"]["facts"].get("examples of what was cut", []) if "quality" in reports else []
    rows = [(row["id"], row["example"]) for row in found]
    return _table("Some of the sentences that were cut", ("document", "sentence"), rows, 2)


def exact_groups(reports: Reports) -> Table | None:
    """The texts that most documents have."""
    found = reports["exact"]["facts"]["largest groups"] if "exact" in reports else []
    rows = [(f"{row['documents']:,}", row["kept"], row["text"]) for row in found]
    return _table("Largest groups of exact duplicates", ("times", "kept", "text"), rows, 3)


def fuzzy_clusters(reports: Reports) -> Table | None:
    """The largest clusters of near-duplicates, with how two of their documents begin."""
    found = reports["fuzzy"]["facts"]["largest clusters"] if "fuzzy" in reports else []
    rows = [
        (f"{row['documents']:,}", f"{row['kept']}: {row['text']}", f"{row['dropped']}: {row['its text']}")
        for row in found
    ]
    return _table("Largest clusters of near-duplicates", ("documents", "kept", "one of the others"), rows, 3)


def common_parts(reports: Reports) -> Table | None:
    """The sentences, lines and paragraphs that most documents had."""
    found = reports["lines"]["facts"]["most common"] if "lines" in reports else []
    rows = [(f"{row['documents']:,}", row["text"]) for row in found]
    return _table("Boilerplate that most documents had", ("documents", "text"), rows, 2)


def topics(reports: Reports) -> Table | None:
    """The largest clusters of documents about the same, by what they are from."""
    found = reports["semantic"]["facts"]["largest clusters"] if "semantic" in reports else []
    rows = [(f"{row['documents']:,}", _most(row["sources"])) for row in found]
    return _table("Largest clusters of documents about the same", ("documents", "sources"), rows, 2)


def personal(reports: Reports) -> Table | None:
    """What was replaced by a placeholder, by source, and in the last row of all."""
    by_source = reports["personal"]["facts"]["by_source"] if "personal" in reports else {}
    kinds = sorted({kind for row in by_source.values() for kind in row if kind != "documents"})
    total = {kind: sum(row.get(kind, 0) for row in by_source.values()) for kind in ("documents", *kinds)}
    rows = [
        (name, *(f"{row[kind]:,}" if row.get(kind) else "" for kind in ("documents", *kinds)))
        for name, row in [*by_source.items(), (EVERY_SOURCE, total)]
        if by_source
    ]
    headings = ("source", "documents", *(kind.replace("_", " ") for kind in kinds))
    return _table("Personal information that was replaced", headings, rows, 1)


def personal_examples(reports: Reports) -> Table | None:
    """Where placeholders stand now."""
    examples = reports["personal"]["facts"]["examples"] if "personal" in reports else {}
    rows = [(kind.replace("_", " "), text) for kind, texts in examples.items() for text in texts]
    return _table("Placeholders in their places", ("kind", "text"), rows, 2)


def contamination(reports: Reports) -> Table | None:
    """How many items of each evaluation set were found in the corpus."""
    sets = reports["contamination"]["facts"]["sets"] if "contamination" in reports else {}
    fields = ("items", "looked_for", "touched", "mostly_found")
    rows = [(name, *(f"{row[field]:,}" for field in fields)) for name, row in sets.items()]
    headings = ("evaluation set", *(field.replace("_", " ") for field in fields))
    return _table("Evaluation items in the corpus", headings, rows, 1)


def contamination_examples(reports: Reports) -> Table | None:
    """What was found of evaluation items, and where."""
    sets = reports["contamination"]["facts"]["sets"] if "contamination" in reports else {}
    rows = [tuple(example.split(": ", 1)) for row in sets.values() for example in row["examples"]]
    return _table("Evaluation items found", ("document", "what it has"), rows, 2)


def dataset(summary: Mapping[str, Any]) -> Table | None:
    """The sizes of the tokenised dataset: of each source, of each language, of all."""
    named = sorted(summary.get("sources", {}).items(), key=lambda item: item[1]["language"])
    groups = [(name, source["language"], [source]) for name, source in summary.get("sources", {}).items()]
    for language, of_language in itertools.groupby(named, key=lambda item: item[1]["language"]):
        groups.append((EVERY_SOURCE, language, [source for _, source in of_language]))
    groups.append((EVERY_SOURCE, EVERY_SOURCE, [source for _, source in named]))
    rows = [(name, language, *_sizes(members)) for name, language, members in groups if members]
    headings = ("source", "language", "documents", "MB", "tokens", "bytes/token", "held out")
    return _table("Dataset", headings, rows, 2)


def _sizes(sources: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Of both splits together, and how many documents of them are held out."""
    documents, text, tokens = (
        sum(source[split][field] for source in sources for split in ("train", "heldout"))
        for field in ("documents", "text_bytes", "tokens")
    )
    held_out = sum(source["heldout"]["documents"] for source in sources)
    return f"{documents:,}", _megabytes(text), f"{tokens:,}", f"{text / max(tokens, 1):.2f}", f"{held_out:,}"


def mixture(rows: Sequence[Mapping[str, Any]], budget: int) -> Table | None:
    """How often each source or tier is drawn within a budget of tokens (0 = as many as there are)."""
    drawn = sum(row["drawn"] for row in rows)
    cells = [
        (row["pool"], f"{row['tokens']:,}", f"{row['factor']:g}", f"{row['share']:.2%}", f"{row['epochs']:.2f}")
        for row in rows
    ]
    notes = []
    if drawn < budget * (1 - 1e-9):
        notes.append(f"Less than the {budget:,} asked for: everything is drawn as often as it may be.")
    headings = ("source", "tokens", "factor", "share", "epochs")
    return _table(f"Mixture for {drawn:,.0f} tokens", headings, cells, 1, *notes)
