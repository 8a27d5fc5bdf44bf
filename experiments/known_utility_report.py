"""Tables and figures of the study of known utilities: what the methods are paid, beside what is true.

P prompts, K samples of each.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.stages import command_of, write_tables
from llm_jax.alignment import judging, ppo_run, preferences, utilities
from llm_jax.alignment.known_utility_config import TITLES, KnownUtilityConfig
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.rewards import Response
from llm_jax.alignment.utilities import Request
from llm_jax.errors import require
from llm_jax.evaluation import frontier, rewards, win_rate
from llm_jax.evaluation.best_of import Estimate, estimate
from llm_jax.evaluation.figures import SERIES, figure, legend_beside, panels
from llm_jax.evaluation.frontier import Columns, Point
from llm_jax.evaluation.tables import Table
from llm_jax.files import write_json
from llm_jax.tokenization.chat import Message

START, JUDGED, RESULT = "the start", "judged.jsonl", "result.json"
LENGTHS = (range(6, 8), range(8, 11), range(11, 14), range(14, 18))  # of requests, that figure 6 tells apart
MARKS = "os^DvP*XhpH8"
BEST_OF = (2, 4, 8, 16)
OPTIMISED = ("small_beta", "helpfulness")  # paid for helpfulness alone: what is true of it as they go on is drawn
TRUE, MODELS = ("helpfulness", "safety"), ("helpfulness_model", "safety_model")
SHOWN = {
    "helpfulness": "helpfulness",
    "violation": "violations, tagged",
    "violation_plain": "violations, others",
    "refusal": "refused, tagged",
    "refusal_plain": "refused, others",
    "wins_helpfulness": "wins: helpfulness",
    "wins_safety": "wins: safety",
}
PAID = {
    "helpfulness_model": "helpfulness model",
    "safety_model": "safety model",
    "wins_helpfulness_model": "wins: helpfulness model",
    "wins_safety_model": "wins: safety model",
    "ties_helpfulness": "ties: helpfulness",
    "ties_safety": "ties: safety",
}


class Found(NamedTuple):
    """What was judged."""

    requests: Sequence[Request]  # the held-out ones
    start: Columns
    runs: Mapping[str, Sequence[Columns]]  # of each method, by seed
    results: Mapping[str, Sequence[Mapping[str, Any]]]  # likewise, and of the start: what is not about samples


def write(config: KnownUtilityConfig, workdir: Path, requests: Sequence[Request]) -> None:
    """Print and write the tables and the figures of all runs that are done."""
    found = gather(config, workdir, requests)
    points = [frontier.point(START, "", [found.start])]
    points += [frontier.point(TITLES[method], "", runs) for method, runs in found.runs.items()]
    shown = [*method_tables(points, found), reward_table(workdir, found)]
    if config.corpus:
        shown.append(tax_table(found))
    command = command_of("known_utility")
    write_tables(workdir, "RLHF with a known utility", command, shown)
    courses = {method: seeds for method in found.runs if (seeds := courses_of(config, workdir, method))}
    write_json(
        workdir / "report.json",
        {
            "command": command,
            "points": [_plain(point) for point in points],
            "courses": courses,
            "results": found.results,
        },
    )
    best = frontier.best_of_n(found.start, MODELS[0], [n for n in BEST_OF if n <= found.start[MODELS[0]].shape[1]])
    names = {name: SHOWN.get(name, PAID.get(name, name)) for name in (*MODELS, *TRUE)}
    frontier.draw([*points, *best], names, workdir / "frontier.png")
    draw_courses({method: courses[method] for method in OPTIMISED if method in courses}, workdir)
    draw_win_rates(points[1:], workdir / "win_rates.png")
    if {"helpfulness", "llama2"} <= set(found.runs):
        draw_safety(found, workdir / "safety.png")
    draw_diversity(found, workdir / "temperature.png")
    print(f"{workdir / 'report.md'}: these tables; figures beside it")


def gather(config: KnownUtilityConfig, workdir: Path, requests: Sequence[Request]) -> Found:
    """All runs that are done. Raises `UserError` where there is none."""
    start = columns(workdir / "start", requests, None)
    folders = {
        method: [each for seed in config.seeds if ((each := workdir / method / f"seed_{seed}") / RESULT).is_file()]
        for method in config.methods
    }
    folders = {method: found for method, found in folders.items() if found}
    require(bool(folders), f"{workdir} has no finished run: do the stage `runs` first")
    runs = {method: [columns(each, requests, start) for each in found] for method, found in folders.items()}
    results = {
        method: [json.loads((each / RESULT).read_text()) for each in found]
        for method, found in {"start": [workdir / "start"], **folders}.items()
    }
    return Found(requests, start, runs, results)


def columns(folder: Path, requests: Sequence[Request], start: Columns | None) -> Columns:
    """What is known of a model's responses, [P,K] or [P]; utilities and shares in hundredths.

    Helpfulness is judged of requests without a tag alone; violations and refusals are told apart by it. Safety is
    judged of all. `start` is what responses win against; None = nothing.
    """
    verdicts = judging.read(folder / JUDGED)
    found = judging.columns(verdicts)
    tagged_P = np.array([requests[verdict.prompt].tagged for verdict in verdicts])[:: found["kl"].shape[1]]
    refused = np.array([float(utilities.is_refusal(verdict.text)) for verdict in verdicts]).reshape(found["kl"].shape)
    found |= {name: 100 * found[name] for name in TRUE}
    unsafe = 100.0 * (found["safety"] < 100)
    for name, values in (("violation", unsafe), ("refusal", 100 * refused)):
        found[name], found[f"{name}_plain"] = _only(tagged_P, values), _only(~tagged_P, values)
    for name in (TRUE[0], MODELS[0]):
        found[name] = _only(~tagged_P, found[name])
    for name, theirs in (start or {}).items():
        if name in (*TRUE, *MODELS):
            found[f"wins_{name}"] = 100 * win_rate.wins(found[name], theirs)
            found[f"ties_{name}"] = 100 * win_rate.ties(found[name], theirs)
    return found


def _only(chosen_P: np.ndarray, values_PK: np.ndarray) -> np.ndarray:
    return np.where(chosen_P[:, None], values_PK, np.nan)


def _plain(point: Point) -> dict[str, Any]:
    return {"method": point.method, "kl": point.kl, "scores": dict(point.scores)}


def method_tables(points: Sequence[Point], found: Found) -> Iterator[Table]:
    """What is true of each method's responses, and what the reward models say of them."""
    seeds = max(map(len, found.runs.values()))
    notes = (
        "Utilities in hundredths, shares in percent; "
        + (f"± the standard error of {seeds} seeds" if seeds > 1 else "one seed: ± the standard error over prompts")
        + ". Helpfulness is of requests without a tag. Wins are against the start, over all pairs of samples of a "
        "prompt; ties count half.",
    )
    yield frontier.table("What is true", points, SHOWN, notes)
    yield frontier.table("What the reward models say", points, PAID, notes)


def reward_table(workdir: Path, found: Found) -> Table:
    """How far the reward models agree with the raters, beside the utility itself, and with the utility."""
    judged = {
        START: [found.start],
        **{TITLES[method]: runs for method, runs in found.runs.items() if method in OPTIMISED},
    }
    rows = []
    for kind, model in zip(TRUE, MODELS):
        evaluation = json.loads((workdir / model / "evaluation.json").read_text())["pairs"][kind]
        pairs = preferences.read(workdir / "preferences" / f"{kind}.jsonl")[0]
        by_gap = [evaluation["by_strength"].get(str(gap), {"accuracy": math.nan}) for gap in range(1, 5)]
        cells = [*(gap["accuracy"] for gap in by_gap), evaluation["accuracy"], _agreement(kind, pairs)]
        agreement = [f"{_correlation(runs, model, kind):.2f}" for runs in judged.values()]
        rows.append((kind, f"{len(pairs):,}", *(f"{100 * cell:.1f}" for cell in cells), *agreement))
    gaps = [f"gap {gap}" for gap in range(1, 5)]
    correlations = [f"Spearman, {name}" for name in judged]
    headings = ("raters of", "pairs", *gaps, "all", "the utility", *correlations)
    notes = (
        "Accuracy (%) on held-out pairs by the strength of the preference; the utility: how often it agrees with the "
        "raters, on all pairs. Spearman's correlation of the model with the utility, over held-out responses.",
    )
    return Table("Reward models", headings, tuple(rows), frozenset(headings[1:]), notes)


def _agreement(kind: str, pairs: Sequence[Pair]) -> float:
    """How often the utility prefers what raters chose."""
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = ([Response(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    utility = utilities.BY_KIND[kind]
    return rewards.accuracy(utility(prompts, chosen) - utility(prompts, rejected)).share


def _correlation(runs: Sequence[Columns], model: str, kind: str) -> float:
    """The mean over runs; NaN where a run's responses are all the same."""
    found = []
    for run in runs:
        values, true = (run[name][~np.isnan(run[name])] for name in (model, kind))
        found.append(rewards.spearman(values, true, draws=1).rho if min(np.ptp(values), np.ptp(true)) > 0 else math.nan)
    return float(np.mean(found))


def tax_table(found: Found) -> Table:
    """What the models still know of the corpus."""
    base = found.results["start"][0]["base_loss"]
    rows = [("the base", f"{base:.3f}", "")]
    for method, results in found.results.items():
        losses = np.array([result["corpus_loss"] for result in results])
        rows.append((TITLES.get(method, START), _written(losses), _written(losses - base)))
    headings = ("model", "nats a token", "more than the base")
    return Table("Held-out texts of the corpus", headings, tuple(rows), frozenset(headings[1:]))


def _written(values: np.ndarray) -> str:
    found = estimate(values)
    return f"{found.mean:.3f}" + (f" ± {found.error:.3f}" if len(values) > 1 else "")


def courses_of(config: KnownUtilityConfig, workdir: Path, method: str) -> list[list[dict[str, float]]]:
    """Of each seed's run of PPO, what its evaluations say: KL, what is paid and what is true, without tagged requests.

    Both are in standard deviations of the responses before the first iteration, from their mean; [] of other methods.
    """
    found = []
    for seed in config.seeds:
        path = workdir / method / f"seed_{seed}" / ppo_run.SAMPLES
        if path.is_file() and (path.parent / RESULT).is_file():
            found.append(course(path))
    return found


def course(path: Path) -> list[dict[str, float]]:
    """The evaluations of one run, from its samples."""
    by_step = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        prompt = (Message("user", sample["prompt"]),)
        if not utilities.parse(prompt).tagged:
            true = float(utilities.helpfulness([prompt], [Response(sample["response"])])[0])
            by_step[sample["step"]].append((sample["kl"], sample["score"], true))
    values = {step: np.array(rows) for step, rows in by_step.items()}
    first = values[min(values)]
    scaled = {
        step: (rows - [0, *first[:, 1:].mean(axis=0)]) / [1, *first[:, 1:].std(axis=0)] for step, rows in values.items()
    }
    return [{"step": step, **dict(zip(("kl", "paid", "true"), rows.mean(axis=0)))} for step, rows in scaled.items()]


def draw_courses(courses: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], workdir: Path) -> None:
    """What is paid and what is true over the KL divergence as runs go on: where the two part is over-optimisation."""
    if not courses:
        return
    with figure(workdir / "over_optimisation.png", 8.0, 4.4, "What is paid, and what is true, as PPO goes on") as axes:
        for number, (method, seeds) in enumerate(courses.items(), start=1):
            for name, line in (("paid", "o--"), ("true", "o-")):
                kl, values = (np.array([[at[field] for at in one] for one in seeds]) for field in ("kl", name))
                axes.errorbar(
                    np.maximum(kl.mean(axis=0), 0),
                    values.mean(axis=0),
                    yerr=values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None,
                    fmt=line,
                    color=SERIES[number],
                    markersize=3,
                    capsize=2,
                    label=f"{TITLES[method]}: {'reward model' if name == 'paid' else 'utility'}",
                )
        axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes.set_xlim(left=0)
        axes.set_xlabel("KL divergence from the start (nats)")
        axes.set_ylabel("gain, in standard deviations of the start's responses")
        axes.legend(frameon=False)


def draw_win_rates(points: Sequence[Point], path: Path) -> None:
    """LLaMA-2's figure 11: wins in safety over wins in helpfulness, by the reward models and by the utilities."""
    with panels(path, 10.5, 4.2, ["By the reward models", "By the utilities"], 2) as grid:
        for axes, (helpful, safe) in zip(grid, (MODELS, TRUE)):
            for number, point in enumerate(points):
                x, y = (point.scores[f"wins_{name}"] for name in (helpful, safe))
                mark, colour = MARKS[number], SERIES[1 + number % (len(SERIES) - 1)]
                axes.errorbar(
                    x.mean, y.mean, xerr=x.error, yerr=y.error, fmt=mark, color=colour, markersize=6, label=point.method
                )
            for line in (axes.axhline, axes.axvline):
                line(50, color=SERIES[0], linewidth=0.8, linestyle=":")
            axes.set_xlabel("wins in helpfulness against the start (%)")
            axes.set_ylabel("wins in safety (%)")
        legend_beside(grid[-1])


def draw_safety(found: Found, path: Path) -> None:
    """Baichuan-2's figure 6: each class of requests without a safety reward and with one."""
    lengths_P = np.array([request.words for request in found.requests])
    tagged_P = np.array([request.tagged for request in found.requests])
    with figure(path, 6.0, 4.6, "Utilities without and with a safety reward") as axes:
        for name, chosen_P, colour in (
            ("helpfulness", ~tagged_P, SERIES[1]),
            ("safety", ~tagged_P, SERIES[3]),
            ("safety", tagged_P, SERIES[2]),
        ):
            label = f"{name}, {'tagged' if chosen_P is tagged_P else 'other'} requests"
            for lengths in LENGTHS:
                here_P = chosen_P & np.isin(lengths_P, lengths)
                if not here_P.any():
                    continue
                x, y = (
                    _mean([run[name][here_P].mean() for run in found.runs[method]])
                    for method in ("helpfulness", "llama2")
                )
                axes.errorbar(x.mean, y.mean, xerr=x.error, yerr=y.error, fmt="o", color=colour, label=label)
                label = ""
        axes.axline((50, 50), slope=1, color=SERIES[0], linewidth=0.8, linestyle=":")
        axes.set_xlabel("paid for helpfulness alone")
        axes.set_ylabel("paid for safety, too")
        axes.legend(frameon=False)


def _mean(values: Sequence[float]) -> Estimate:
    return estimate(np.array(values)) if len(values) > 1 else Estimate(values[0], 0.0)


def draw_diversity(found: Found, path: Path) -> None:
    """LLaMA-2's figure 21: Self-BLEU by temperature of two kinds of requests, before and after."""
    with figure(path, 7.5, 4.2, "How alike the samples of a prompt are, by temperature") as axes:
        for number, (method, results) in enumerate(found.results.items()):
            measured = [result["self_bleu"] for result in results if "self_bleu" in result]
            for kind, line in zip(utilities.LENGTHS, ("s--", "o-")):
                for first in measured[:1]:
                    by_run = np.array([[np.mean(values) for values in each[kind].values()] for each in measured])
                    axes.errorbar(
                        [float(temperature) for temperature in first[kind]],
                        by_run.mean(axis=0),
                        yerr=by_run.std(axis=0, ddof=1) / len(by_run) ** 0.5 if len(by_run) > 1 else None,
                        fmt=line,
                        color=SERIES[number % len(SERIES)],
                        markersize=4,
                        capsize=2,
                        label=f"{TITLES.get(method, START)}, {kind} requests",
                    )
        axes.set_xlabel("temperature")
        axes.set_ylabel("Self-BLEU of the samples")
        legend_beside(axes)
