"""What the stages of the corpus factory find of what is known to be there: precision and recall of each.

    python -m experiments.planted_truth --config=configs/planted_truth/default.py --workdir=runs/planted_truth

Plants duplicates, personal information, offensive lines, evaluation items and garbage into a corpus, brings it through
the stages of experiments.prepare_data, and holds what they took against the list of what was planted. What they took of
the rest is judged by other ways to find it, and MinHash by comparing all pairs of a sample. docs/corpus.md explains the
tables.

Writes to --workdir: report.md, report.json, near_duplicates.png, truth.jsonl (what was planted, and where), stages/ as
prepare_data does, and config.json. A stopped run goes on with the stage in which it was.
"""

import dataclasses
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import runner
from experiments.stages import command_of, write_tables
from llm_jax.config import CorpusConfig, positive
from llm_jax.data.documents import text_hash
from llm_jax.errors import require
from llm_jax.evaluation import near_duplicates
from llm_jax.evaluation.figures import SERIES, panels
from llm_jax.evaluation.near_duplicates import Bin
from llm_jax.evaluation.tables import Table
from llm_jax.files import write_json

try:
    from daft import col, lit

    from llm_jax.data import evaluation_sets, factory, parquet, planting, prepare, reading
    from llm_jax.data.planting import NEAR, PASSAGE, SCATTERED, Material, PlantConfig
    from llm_jax.data.prepare import PrepareConfig
    from llm_jax.data.sources import cache_folder
    from llm_jax.data.stages import COLUMNS, ID, minhash, offensive
    from llm_jax.data.stages.fuzzy import Fuzzy, FuzzyConfig
    from llm_jax.data.stages.quality_models import is_held_out
    from llm_jax.evaluation import planted_truth
    from llm_jax.evaluation.planted_truth import Outcome, Row, Step
    from llm_jax.evaluation.sentence_bits import TRANSFORMERS
except ModuleNotFoundError as missing:
    sys.exit(f"error: preparing data needs the package {missing.name}: pip install 'llm-jax[data]'")

TRUTH, REPORT, FIGURE = "truth.jsonl", "report.json", "near_duplicates.png"
EDGES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # of similarity, in the S-curve
REPEATED, EDITIONS = "reviews", "shakespeare_milton"  # sources with known faults: half copies, and two editions
OTHER_SPELLING = 0.1  # Jaccard similarity that editions in old and new spelling reach, and hardly two other works


@dataclasses.dataclass(frozen=True)
class PlantedTruthConfig(PrepareConfig):
    """A corpus, its stages, and what is planted in it."""

    plant: PlantConfig = dataclasses.field(default_factory=PlantConfig)
    sample: int = 5000  # documents of which all pairs are compared

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "sample")
        require(self.keep_stages, "PlantedTruthConfig.keep_stages=False removes what is to be looked at")


def run(config: PlantedTruthConfig, workdir: Path) -> dict[str, Any]:
    """Plant, bring the corpus through its stages, judge, and write the report, which is returned."""
    factory.run(config, workdir, prepare.stages(config, TRANSFORMERS), partial(_read, workdir))
    steps = planted_truth.steps(workdir / factory.STAGES)
    outcomes = planted_truth.follow(planting.read(workdir / TRUTH), steps, config.fuzzy)
    rows, curve = planted_truth.rows(outcomes), s_curve(config, outcomes, steps)
    found = {
        "command": command_of("planted_truth"),
        "kinds": [row._asdict() for row in rows],
        "stages": [row._asdict() for row in planted_truth.stage_rows(outcomes, steps)],
        "checks": [check._asdict() for check in checks(config, steps)],
        "near duplicates": near_rows(outcomes, config),
        **curve,
        "faults": faults(steps),
    }
    write_json(workdir / REPORT, found)
    write_tables(workdir, "Planted truth", found["command"], tables(found, rows))
    draw(found, config, workdir / FIGURE)
    print(f"{workdir / 'report.md'}: these tables; {FIGURE} beside it")
    return found


def _read(workdir: Path, config: CorpusConfig, folder: Path, compression: str) -> dict[str, Any]:
    """Read the corpus as prepare_data does, and plant in it."""
    assert isinstance(config, PlantedTruthConfig)
    facts = reading.read(config, folder, compression)
    documents = parquet.read(parquet.files(folder), COLUMNS)
    planted, plants = planting.plant(documents, config.plant, material(config), config.lines.documents)
    planting.write(plants, workdir / TRUTH)
    parquet.replace(folder, reading.identified(planted), compression)
    return facts | {"planted": len(plants)}


def material(config: PlantedTruthConfig) -> Material:
    """Evaluation items, and labelled texts that the offensive-content classifier has not learnt."""
    labelled = offensive.Material({}, [], [])
    if config.quality.lists:
        labelled = offensive.load(cache_folder(CorpusConfig(cache=config.quality.cache)))
    unseen = ([text for text in some if is_held_out(text)] for some in (labelled.offensive, labelled.harmless))
    return Material(evaluation_items(config), *unseen)


def evaluation_items(config: PlantedTruthConfig) -> dict[str, list[str]]:
    """The items that the contamination stage looks for, by set."""
    chosen = config.contamination
    return evaluation_sets.read(chosen.sets, chosen.paths, cache_folder(CorpusConfig(cache=chosen.cache)))


def checks(config: PlantedTruthConfig, steps: Sequence[Step]) -> list[planted_truth.Check]:
    """What stages took of all documents, judged by other ways to find it."""
    chosen = config.contamination
    sizes = chosen.words, chosen.characters, chosen.shortest
    judged: dict[str, Callable[[Step, Step], planted_truth.Check]] = {
        "exact": planted_truth.check_exact,
        "fuzzy": partial(planted_truth.check_fuzzy, config=config.fuzzy),
        "contamination": partial(planted_truth.check_contamination, items=evaluation_items(config), sizes=sizes),
    }
    return [judged[step.name](before, step) for before, step in itertools.pairwise(steps) if step.name in judged]


def near_rows(outcomes: Sequence[Outcome], config: PlantedTruthConfig) -> list[dict[str, Any]]:
    """Near-duplicates by what was edited: how similar they are, and what theory and the stages find of them."""
    bands, rows = Fuzzy(config.fuzzy).bands_and_rows()
    found = []
    for way in (SCATTERED, PASSAGE):
        for share in config.plant.shares:
            mine = [each for each in outcomes if (each.plant.kind, each.plant.share) == (way, share)]
            alike_P = np.array([each.similarity for each in mine if not math.isnan(each.similarity)])
            expected_P = minhash.found_share(alike_P, bands, rows) * (alike_P >= config.fuzzy.threshold)
            count, by = len(alike_P), [each.stage for each in mine if each.verdict == planted_truth.FOUND]
            row = {"way": way, "share": share, "arrived": count, "similarity": _mean(alike_P)}
            taken = {name: by.count(name) / max(count, 1) for name in NEAR}
            found.append(row | {"expected": _mean(expected_P)} | taken)
    return found


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def s_curve(config: PlantedTruthConfig, outcomes: Sequence[Outcome], steps: Sequence[Step]) -> dict[str, Any]:
    """Pairs with a band in common by their similarity, of a sample of what came to the fuzzy stage: the planted
    near-duplicates with their originals, and other documents.
    """
    names = [step.name for step in steps]
    if NEAR[0] not in names:
        return {"s_curve": [], "sample": {}}
    step = names.index(NEAR[0])
    pairs = [each.plant for each in outcomes if not math.isnan(each.similarity)]
    planted = dict.fromkeys(id for plant in pairs for id in (plant.original, plant.id))
    others = sorted(set(steps[step - 1].sizes()) - set(planted), key=lambda id: text_hash(id, config.plant.seed))
    chosen = [*planted, *others][: config.sample]
    by_id = steps[step - 1].texts(chosen)
    texts = [by_id[id] for id in chosen]
    fuzzy, cut = config.fuzzy, Fuzzy(config.fuzzy).bands_and_rows()
    found = near_duplicates.all_pairs(texts, fuzzy.words, fuzzy.characters)
    banded_P = near_duplicates.banded(texts, fuzzy, *cut, found)
    bins = near_duplicates.s_curve(found, banded_P, *cut, EDGES)
    after = set(steps[step].sizes())
    left_P, right_P = (np.array([id in after for id in chosen])[places] for places in found[:2])
    alike_P = found.similarity_P >= fuzzy.threshold
    sample = {
        "documents": len(texts),
        "pairs": len(found.left_P),
        "similar": int(alike_P.sum()),
        "similar with a band in common": int((alike_P & banded_P).sum()),
        "similar of which the stage leaves one or none": int((alike_P & ~(left_P & right_P)).sum()),
        "least similar with a band in common": float(found.similarity_P[banded_P].min(initial=1)),
    }
    return {"s_curve": [each._asdict() for each in bins], "sample": sample}


def faults(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Known faults of the public corpus: how many documents of the sources that have them are dropped for them."""
    found = []
    for before, step in itertools.pairwise(steps):
        if step.name == "exact":
            found.append(
                {"fault": "exact copies", "source": REPEATED, **planted_truth.of_source(before, step, REPEATED)}
            )
        if step.name == "fuzzy":
            found.append(
                {"fault": "near-duplicates", "source": EDITIONS, **planted_truth.of_source(before, step, EDITIONS)}
            )
            documents = factory.as_given(parquet.files(before.folder / factory.KEPT))
            mine = (col("source") == lit(EDITIONS)) & ~col(ID).contains(planting.PLANTED)
            with tempfile.TemporaryDirectory() as scratch:
                facts = Fuzzy(FuzzyConfig(threshold=OTHER_SPELLING)).apply(documents.where(mine), Path(scratch)).facts
            counts = {"documents": found[-1]["documents"], "dropped": facts["duplicates"]}
            found.append({"fault": f"near-duplicates of threshold {OTHER_SPELLING}", "source": EDITIONS, **counts})
    return [fault for fault in found if fault["documents"]]


def tables(found: Mapping[str, Any], rows: Sequence[Row]) -> list[Table]:
    """All of the report's tables."""
    return [_stage_table(found), _kind_table(rows), _near_table(found), _curve_table(found), _check_table(found)]


def _stage_table(found: Mapping[str, Any]) -> Table:
    headings = ("stage", "found", "wrong", "missed", "precision", "recall")
    rows = (planted_truth.StageRow(**row) for row in found["stages"])
    cells = (
        (row.stage, str(row.found), str(row.wrong), str(row.missed), f"{row.precision:.1%}", f"{row.recall:.1%}")
        for row in rows
    )
    note = "Wrong: controls, and what another stage should take. Near-duplicates are missed by the last stage for them."
    return Table("Stages", headings, tuple(cells), frozenset(headings[1:]), (note,))


def _kind_table(rows: Sequence[Row]) -> Table:
    headings = ("planted", "kind", "language", "number", "arrived", "found", "recall", "by")
    cells = []
    for row in rows:
        if row.kind in (SCATTERED, PASSAGE):
            continue
        wrong, right = row.verdicts.get("wrong", 0), row.verdicts.get("found", 0)
        by = ", ".join(f"{name} {count}" for name, count in sorted(row.stages.items(), key=lambda item: -item[1]))
        result = (f"{wrong} wrongly", "control") if row.control else (str(right), f"{right / max(row.arrived, 1):.1%}")
        cells.append((row.group, row.kind, row.language, str(row.planted), str(row.arrived), *result, by))
    note = "Arrived: not dropped before for another reason. Nothing should be found of a control."
    return Table("Kinds", headings, tuple(cells), frozenset(headings[3:7]), (note,))


def _near_table(found: Mapping[str, Any]) -> Table:
    headings = ("edited", "where", "arrived", "mean similarity", "expected of fuzzy", *NEAR, "together")
    cells = []
    for row in found["near duplicates"]:
        shares = row["similarity"], row["expected"], *(row[name] for name in NEAR), sum(row[name] for name in NEAR)
        texts = (f"{shares[0]:.3f}", *(f"{share:.1%}" for share in shares[1:]))
        cells.append((f"{row['share']:.0%}", row["way"], str(row["arrived"]), *texts))
    numbers = frozenset(headings) - {"where"}
    note = "Expected: the S-curve at each pair's similarity where that reaches the threshold, else 0."
    return Table("Near-duplicates by share edited", headings, tuple(cells), numbers, (note,))


def _curve_table(found: Mapping[str, Any]) -> Table:
    headings = ("similarity", "pairs", "expected", "found", "deviations")
    cells = []
    for each in (Bin(**row) for row in found["s_curve"]):
        away = f"{(each.found - each.expected) / each.deviation:+.1f}" if each.deviation > 1e-9 else ""
        shares = (f"{share:.2%}" for share in (each.expected, each.found))
        cells.append((f"{each.low:.2f} to {each.high:.2f}", f"{each.pairs:,}", *shares, away))
    notes = [f"{name}: {value:,.5g}" for name, value in found["sample"].items()]
    title = "Pairs with a band in common, by similarity, among all pairs of a sample"
    return Table(title, headings, tuple(cells), frozenset(headings[1:]), tuple(notes))


def _check_table(found: Mapping[str, Any]) -> Table:
    headings = ("stage", "documents taken", "right", "precision", "there", "recall")
    cells = []
    for check in (planted_truth.Check(**row) for row in found["checks"]):
        there = (str(check.there), f"{check.right / check.there:.2%}") if check.there else ("", "")
        cells.append((check.stage, f"{check.taken:,}", f"{check.right:,}", f"{check.precision:.2%}", *there))
    notes = (
        f"{fault['fault']}: {fault['dropped']:,} of {fault['documents']:,} documents of {fault['source']}"
        for fault in found["faults"]
    )
    title = "All that stages took, planted or not, judged by another way to find it"
    return Table(title, headings, tuple(cells), frozenset(headings[1:]), tuple(notes))


def draw(found: Mapping[str, Any], config: PlantedTruthConfig, path: Path) -> None:
    """Recall by share edited beside what theory expects, and the S-curve beside all pairs of the sample."""
    bands, rows = Fuzzy(config.fuzzy).bands_and_rows()
    titles = ["Planted near-duplicates that are found", f"Pairs with one of {bands} bands of {rows} in common"]
    with panels(path, 11, 4.2, titles, columns=2) as (left, right):
        for way, colour in ((SCATTERED, SERIES[1]), (PASSAGE, SERIES[2])):
            mine = [row for row in found["near duplicates"] if row["way"] == way]
            shares = [100 * row["share"] for row in mine]
            left.plot(shares, [row["expected"] for row in mine], color=colour, label=f"{way}: expected of fuzzy")
            left.plot(shares, [row["fuzzy"] for row in mine], "o", color=colour, label=f"{way}: fuzzy")
            both = [row["fuzzy"] + row["semantic"] for row in mine]
            left.plot(shares, both, "x--", color=colour, linewidth=0.8, label=f"{way}: fuzzy and semantic")
        left.set_xlabel("share of words or characters edited (%)")
        left.set_ylabel("share found")
        similarity = np.linspace(0, 1, 201)
        theory = minhash.found_share(similarity, bands, rows)
        right.plot(similarity, theory, color=SERIES[1], label="1 - (1 - s^rows)^bands")
        bins = [Bin(**row) for row in found["s_curve"]]
        middles, heights = [(each.low + each.high) / 2 for each in bins], [each.found for each in bins]
        errors = [2 * each.deviation for each in bins]
        right.errorbar(middles, heights, errors, fmt="o", color=SERIES[5], capsize=3, label="pairs of the sample")
        right.axvline(config.fuzzy.threshold, color="#333333", linewidth=0.8, linestyle=":")
        right.set_xlabel("Jaccard similarity; the dotted line is the threshold")
        for axes in (left, right):
            axes.set_ylim(-0.03, 1.03)
            axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    runner.main(run, PlantedTruthConfig, "configs/planted_truth/default.py")
