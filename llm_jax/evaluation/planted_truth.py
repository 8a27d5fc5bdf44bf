"""What became of planted things on their way through the stages, and of what stages took besides."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq

from llm_jax.data import counts, parquet
from llm_jax.data.documents import CODE
from llm_jax.data.factory import KEPT, PARTIAL
from llm_jax.data.planted_texts import units
from llm_jax.data.planting import NEAR, PLANTED, Plant
from llm_jax.data.stages import BECAUSE, DROPPED, ID
from llm_jax.data.stages.fuzzy import FuzzyConfig
from llm_jax.evaluation import near_duplicates

FOUND, MISSED, LOST, WRONG, KEPT_RIGHT = "found", "missed", "lost", "wrong", "kept"


class Step(NamedTuple):
    """What a stage left in its folder."""

    name: str
    folder: Path

    def texts(self, ids: Iterable[str] | None = None) -> dict[str, str]:
        """The texts that were kept, by id: all, or those of some."""
        table = _rows(self.folder / KEPT, [ID, "text"], ids)
        return dict(zip(table[ID].to_pylist(), table["text"].to_pylist()))

    def dropped(self, ids: Iterable[str] | None = None) -> dict[str, str]:
        """What decided of each document that was dropped, by id: all, or some."""
        if not (self.folder / DROPPED).is_dir():
            return {}
        table = _rows(self.folder / DROPPED, [ID, BECAUSE], ids)
        return dict(zip(table[ID].to_pylist(), table[BECAUSE].to_pylist()))

    def sizes(self) -> dict[str, int]:
        """The bytes of every text that was kept."""
        table = _rows(self.folder / KEPT, [ID, counts.BYTES], None)
        return dict(zip(table[ID].to_pylist(), table[counts.BYTES].to_pylist()))


def _rows(folder: Path, columns: Sequence[str], ids: Iterable[str] | None) -> Any:
    wanted = None if ids is None else pyarrow.dataset.field(ID).isin(list(ids))
    return pq.read_table([str(path) for path in parquet.files(folder)], columns=list(columns), filters=wanted)


def steps(folder: Path) -> list[Step]:
    """The steps of a run, reading first."""
    found = sorted(path for path in folder.glob("[0-9][0-9]_*") if path.suffix != PARTIAL)
    return [Step(path.name.partition("_")[2], path) for path in found]


class Outcome(NamedTuple):
    """What became of a plant."""

    plant: Plant
    stage: str  # that took it; "" = none
    verdict: str
    similarity: float  # of near-duplicates that came to the fuzzy stage, else NaN


def follow(plants: Sequence[Plant], run: Sequence[Step], config: FuzzyConfig) -> list[Outcome]:
    """What became of each plant: FOUND, MISSED, LOST before its stage for another reason, WRONG, or KEPT_RIGHT."""
    ids = {id for plant in plants for id in (plant.id, plant.original) if id}
    order = {step.name: place for place, step in enumerate(run)}
    left, similar, outcomes = list(plants), dict[int, float](), list[Outcome]()
    before = run[0].texts(ids)
    for step in run[1:]:
        if step.name == NEAR[0]:
            similar = {id(plant): _similarity(plant, before, config) for plant in left if plant.stages == NEAR}
        after, dropped = step.texts(ids), step.dropped(ids)
        gone = [plant for plant in left if not _is_there(plant, after)]
        for plant in gone:
            verdict = _verdict(plant, step.name, order, plant.id in after, dropped)
            outcomes.append(Outcome(plant, step.name, verdict, similar.get(id(plant), np.nan)))
        left = [plant for plant in left if _is_there(plant, after)]
        before = after
    for plant in left:
        outcomes.append(Outcome(plant, "", MISSED if plant.stages else KEPT_RIGHT, similar.get(id(plant), np.nan)))
    return outcomes


def _is_there(plant: Plant, texts: Mapping[str, str]) -> bool:
    if plant.targets:
        return any(target in texts.get(plant.id, "") for target in plant.targets)
    return plant.id in texts and (not plant.original or plant.original in texts)


def _similarity(plant: Plant, texts: Mapping[str, str], config: FuzzyConfig) -> float:
    return near_duplicates.similarity(texts[plant.id], texts[plant.original], config.words, config.characters)


def _verdict(plant: Plant, stage: str, order: Mapping[str, int], stays: bool, dropped: Mapping[str, str]) -> str:
    """Of a plant that a stage has taken; `stays` where its document is still there."""
    if not plant.stages:
        return WRONG if stays else LOST  # a control goes with its document where that has a fault of its own
    if plant.original and not _of_one_group(plant, dropped):
        return LOST
    if stage in plant.stages:
        return FOUND
    if order[stage] > max(order.get(name, 0) for name in plant.stages):
        return MISSED
    return WRONG if plant.original else LOST


def _of_one_group(plant: Plant, dropped: Mapping[str, str]) -> bool:
    """Whether the two were dropped for each other, or both for a third."""
    kept = {dropped.get(plant.id, plant.id), dropped.get(plant.original, plant.original)}
    return len(kept) == 1


class Row(NamedTuple):
    """What became of the plants of a kind."""

    group: str
    kind: str
    language: str
    share: float
    control: bool
    planted: int
    verdicts: dict[str, int]
    stages: dict[str, int]  # by which stage found, or wrongly took, how many

    @property
    def arrived(self) -> int:
        """Those that no other stage took for another reason."""
        return self.planted - self.verdicts.get(LOST, 0)


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """The outcomes by kind."""
    by_kind: dict[tuple[str, str, str, float, bool], list[Outcome]] = {}
    for outcome in outcomes:
        plant = outcome.plant
        key = plant.group, plant.kind, plant.language, plant.share, not plant.stages
        by_kind.setdefault(key, []).append(outcome)
    return [
        Row(
            *key,
            len(several),
            dict(Counter(outcome.verdict for outcome in several)),
            dict(Counter(outcome.stage for outcome in several if outcome.verdict in (FOUND, WRONG))),
        )
        for key, several in sorted(by_kind.items())
    ]


class StageRow(NamedTuple):
    """How a stage did."""

    stage: str
    found: int
    wrong: int
    missed: int

    @property
    def precision(self) -> float:
        """Of what it took of the planted things, the share that it should take."""
        return self.found / max(self.found + self.wrong, 1)

    @property
    def recall(self) -> float:
        """Of what only it, or it and others, should take, the share that was taken."""
        return self.found / max(self.found + self.missed, 1)


def stage_rows(outcomes: Sequence[Outcome], run: Sequence[Step]) -> list[StageRow]:
    """Every stage that took something; what several stages may take counts as missed by the last of them."""
    order = [step.name for step in run]
    taken: dict[str, Counter[str]] = {name: Counter() for name in order}
    for outcome in outcomes:
        if outcome.verdict in (FOUND, WRONG):
            taken[outcome.stage][outcome.verdict] += 1
        elif outcome.verdict == MISSED:
            responsible = [name for name in order if name in outcome.plant.stages]
            taken[(responsible or order)[-1]][MISSED] += 1
    return [StageRow(name, found[FOUND], found[WRONG], found[MISSED]) for name, found in taken.items() if found.total()]


class Check(NamedTuple):
    """Everything that a stage took, planted or not, judged by another way to find it."""

    stage: str
    taken: int
    right: int
    there: int  # to be taken, by that way; 0 = not counted

    @property
    def precision(self) -> float:
        """The share of what was taken that is right."""
        return self.right / max(self.taken, 1)


def check_exact(before: Step, step: Step) -> Check:
    """Exact duplicates, by the units of all texts as Python has them."""
    table = _rows(before.folder / KEPT, [ID, "format", "text"], None)
    keys = {}
    for name, kind, text in zip(*(table[column].to_pylist() for column in (ID, "format", "text"))):
        found = units(text) if kind != CODE else []
        keys[name] = hashlib.blake2b((" ".join(found) if found else f"\0{text}").encode()).digest()
    dropped = step.dropped()
    right = sum(keys[name] == keys[kept] for name, kept in dropped.items())
    return Check(step.name, len(dropped), right, len(keys) - len(set(keys.values())))


def check_fuzzy(before: Step, step: Step, config: FuzzyConfig) -> Check:
    """Near-duplicates, by the n-grams that each shares with the one that stays; right is what is directly similar."""
    dropped = step.dropped()
    texts = before.texts({*dropped, *dropped.values()})
    found = [
        near_duplicates.similarity(texts[name], texts[kept], config.words, config.characters)
        for name, kept in dropped.items()
    ]
    return Check(step.name, len(dropped), sum(value >= config.threshold for value in found), 0)


def check_contamination(
    before: Step, step: Step, items: Mapping[str, Sequence[str]], sizes: tuple[int, int, int]
) -> Check:
    """Documents that were changed or dropped, by whether they hold an n-gram of an item, or a short one whole.

    `sizes` are the n-gram's words and characters, and the least words of a short item.
    """
    words, characters, shortest = sizes
    known: dict[int, set[int]] = {}
    for found in (units(item) for members in items.values() for item in members):
        width = min(characters if near_duplicates.is_unspaced(found) else words, len(found))
        known.setdefault(width, set()).update(_grams(found, width))
    before_bytes, after_bytes = before.sizes(), step.sizes()
    touched = [name for name, size in before_bytes.items() if after_bytes.get(name) != size]
    texts = [units(text) for text in before.texts(touched).values()]
    right = sum(
        any(not grams.isdisjoint(_grams(text, width)) for width, grams in known.items() if width >= shortest)
        for text in texts
    )
    return Check(step.name, len(touched), right, 0)


def _grams(found: Sequence[str], width: int) -> set[int]:
    return {hash(tuple(found[i : i + width])) for i in range(len(found) - width + 1)}


def of_source(before: Step, step: Step, source: str) -> dict[str, int]:
    """How many of a source's own documents a stage got, and how many of them it dropped."""
    found: dict[str, Collection[str]] = {"documents": before.sizes(), "dropped": step.dropped()}
    return {
        side: sum(name.startswith(f"{source}/") and PLANTED not in name for name in names)
        for side, names in found.items()
    }
