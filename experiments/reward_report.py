"""What a trained reward model is worth: scores of held-out pairs and texts, as tables, figures and files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from llm_jax.alignment.ratings import RatedText
from llm_jax.alignment.reward import RewardModel
from llm_jax.alignment.reward_batch import EncodedPair
from llm_jax.alignment.rewards import SAFETY_THRESHOLD
from llm_jax.evaluation import reward_figures, tables
from llm_jax.evaluation import rewards as judging
from llm_jax.evaluation.rewards import Accuracies, Correlation, Detection, PairScores, Proportion
from llm_jax.evaluation.tables import Table
from llm_jax.files import write_json, write_lines

EVALUATION, REPORT, SCORES = "evaluation.json", "report.md", "scores.jsonl"
LEAST_TEXTS = 20  # of a domain, for a correlation
SAFETY_THRESHOLDS = (SAFETY_THRESHOLD, 0.5)


class Origin(NamedTuple):
    """Where a reward model comes from."""

    model: str  # that it began as
    parameters: int
    training_pairs: int


class Judgement(NamedTuple):
    """The scores of a reward model on what it was not trained on."""

    pairs: Mapping[str, PairScores]  # by source
    unsafe: Sequence[Detection]  # at each threshold, where responses are labelled
    people: Mapping[str, Correlation]  # with the mean human rating, by domain of the texts


def judge(model: RewardModel, heldout: Mapping[str, Sequence[EncodedPair]], rated: Sequence[RatedText]) -> Judgement:
    """Score held-out pairs by source, and rated texts by domain."""
    pairs = {source: score_pairs(model, found) for source, found in heldout.items()}
    everything = [pair for found in heldout.values() for pair in found]
    return Judgement(pairs, detect_unsafe(pairs, everything), correlate(model, rated))


def score_pairs(model: RewardModel, pairs: Sequence[EncodedPair]) -> PairScores:
    """The rewards of both responses of every pair."""
    sides = [[pair.chosen for pair in pairs], [pair.rejected for pair in pairs]]
    chosen, rejected = (model.score(side) for side in sides)
    lengths = [np.array([len(response) for response in side]) for side in sides]
    return PairScores(chosen, rejected, np.array([int(pair.strength) for pair in pairs]), *lengths)


def joined(scores: Sequence[PairScores]) -> PairScores:
    """The scores of several sources as those of one."""
    fields = ("chosen_N", "rejected_N", "strengths_N", "chosen_lengths_N", "rejected_lengths_N")
    return PairScores(*(np.concatenate([getattr(each, field) for each in scores]) for field in fields))


def detect_unsafe(scores: Mapping[str, PairScores], pairs: Sequence[EncodedPair]) -> list[Detection]:
    """How well the reward finds the responses labelled unsafe, at each threshold; [] where no response has a label."""
    labelled = np.array([pair.safety_weights for pair in pairs]) > 0
    if not labelled.any():
        return []
    every = joined(list(scores.values()))
    rewards = np.stack([every.chosen_N, every.rejected_N], axis=1)
    unsafe = np.array([pair.safety_labels for pair in pairs]) > 0
    return [judging.unsafe_detection(rewards[labelled], unsafe[labelled], at) for at in SAFETY_THRESHOLDS]


def correlate(model: RewardModel, rated: Sequence[RatedText]) -> dict[str, Correlation]:
    """Spearman's correlation of rewards with people's mean ratings, by domain; domains with few texts are left out."""
    room = model.sequence_length or model.config.max_length
    domains: dict[str, list[tuple[np.ndarray, float]]] = {}
    for text in rated:
        encoded = model.encoder((), text.text)
        if len(encoded) <= room:
            domains.setdefault(text.domain, []).append((encoded, text.mean))
    found = {}
    for domain, texts in domains.items():
        means = np.array([mean for _, mean in texts])
        if len(texts) >= LEAST_TEXTS and np.ptp(means) > 0:
            found[domain] = judging.spearman(model.score([encoded for encoded, _ in texts]), means)
    return found


def write(workdir: Path, judgement: Judgement, origin: Origin) -> None:
    """Print the tables, and write evaluation.json, report.md, scores.jsonl and three figures."""
    every = joined(list(judgement.pairs.values()))
    rows = {**judgement.pairs, **({"all": every} if len(judgement.pairs) > 1 else {})}
    accuracies = {name: [Accuracies.of(scores)] for name, scores in rows.items()}
    names = {int(strength): f"strength {strength}" for strength in np.unique(every.strengths_N)}
    shown = list(_tables(judgement, rows, accuracies))
    console = Console()
    for table in shown:
        console.print(tables.as_rich(table))
    (workdir / REPORT).write_text("\n".join(map(tables.as_markdown, shown)), encoding="utf-8")
    _write_scores(workdir / SCORES, judgement.pairs)
    reward_figures.accuracy_by_strength(accuracies, names, workdir / "accuracy.png")
    curves = {name: judging.calibration(scores.gaps_N) for name, scores in rows.items()}
    reward_figures.calibration(curves, workdir / "calibration.png")
    sides = judging.histogram({"chosen": every.chosen_N, "rejected": every.rejected_N})
    reward_figures.score_histogram(sides, workdir / "scores.png")
    write_json(workdir / EVALUATION, {**origin._asdict(), **_summary(judgement, rows)})  # last: the rest is there


def _tables(judgement: Judgement, rows: Mapping[str, PairScores], accuracies: Any) -> Any:
    yield judging.baichuan2_table(accuracies)
    yield judging.length_bias_table({name: judging.length_bias(scores) for name, scores in rows.items()})
    if judgement.unsafe:
        yield judging.detection_table({"this model": judgement.unsafe})
    if judgement.people:
        cells = [
            (domain, f"{found.rho:.3f}", f"{found.low:.3f} to {found.high:.3f}", f"{found.texts:,}")
            for domain, found in judgement.people.items()
        ]
        headings = ("domain", "Spearman", "95 % interval", "texts")
        yield Table(
            "Rewards and people's mean ratings of held-out texts", headings, tuple(cells), frozenset(headings[1:])
        )


def _summary(judgement: Judgement, rows: Mapping[str, PairScores]) -> dict[str, Any]:
    """The numbers of the tables."""

    def share(found: Proportion) -> dict[str, Any]:
        return {"accuracy": found.share, "interval": found.interval(), "pairs": found.total}

    def numbers(scores: PairScores) -> dict[str, Any]:
        found = Accuracies.of(scores)
        bias = judging.length_bias(scores)
        return {
            **share(found.overall),
            "by_strength": {strength: share(each) for strength, each in found.by_strength.items()},
            "length_bias": {name: share(each) for name, each in bias._asdict().items() if each.total},
            "calibration_error": judging.calibration_error(judging.calibration(scores.gaps_N)),
        }

    return {
        "pairs": {name: numbers(scores) for name, scores in rows.items()},
        "unsafe": {
            f"{found.threshold:g}": {"recall": found.recall.share, "precision": found.precision.share}
            for found in judgement.unsafe
        },
        "spearman": {domain: found._asdict() for domain, found in judgement.people.items()},
    }


def _write_scores(path: Path, pairs: Mapping[str, PairScores]) -> None:
    write_lines(
        path,
        (
            {"source": source, "chosen": float(chosen), "rejected": float(rejected), "strength": int(strength)}
            for source, scores in pairs.items()
            for chosen, rejected, strength in zip(scores.chosen_N, scores.rejected_N, scores.strengths_N)
        ),
    )
