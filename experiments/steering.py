"""How much reward for how much change? Reviews steered towards good ones: PPO, DPO, rejection sampling, best of n.

    python -m experiments.steering --config=configs/steering/small.py --workdir=runs/steering \\
        --config.sft.training.model=MODEL

A model continues English and Chinese reviews from their first words, and is paid by a reward model of people's ratings.
Stages, each of which is done once and continued by the same command: `start` fine-tunes MODEL on reviews; `rewards`
trains the reward model, from the start or from config.reward.training.model; `runs` takes the start on with each
method, beta and seed, and has what it writes on held-out prompts judged by the paid reward and by what pays nobody: a
regression on other people's ratings, VADER's lexicon, the start's own likelihood, diversity; `report` puts all of it on
one frontier of reward and KL divergence, beside the best of n samples of the start.

Runs may go side by side: first the stages start and rewards, then processes with --stages=runs and
--only=best_of_n/0,ppo_0.1/0,dpo_0.1/0 and so on, and --stages=report in the end.

Writes to --workdir: start/ and reward/ (models), RUN/seed_N (a model and judged.jsonl; rejection/seed_N/round_M
likewise), and report.md, report.json, frontier.png. rejection/seed_0 also has what more samples and other temperatures
are worth, before and after (report.md, best_of.png, temperature.png).
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments import dpo, methods, reward_model, reward_report, runner, sft
from experiments.methods import Drawing, Start
from experiments.samples import Asked
from experiments.stages import (
    check_finished,
    check_names,
    check_workdir,
    command_of,
    define_flags,
    is_done,
    write_tables,
)
from llm_jax import models
from llm_jax.alignment import finetune, judging, ratings, referees, rejection_run, reviews, reward
from llm_jax.alignment.conversations import Tally
from llm_jax.alignment.ppo import Data
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.prompts import Prompt, PromptStream
from llm_jax.alignment.rejection import Drawn
from llm_jax.alignment.reviews import Sides
from llm_jax.alignment.reward import RewardModel
from llm_jax.alignment.rewards import Response, Reward
from llm_jax.alignment.sft import ChatData
from llm_jax.alignment.steering_config import BEST_OF_N, SteeringConfig
from llm_jax.config import TokenizerConfig
from llm_jax.errors import require
from llm_jax.evaluation import frontier
from llm_jax.evaluation.best_of import Estimate
from llm_jax.evaluation.frontier import Columns, Point
from llm_jax.evaluation.rewards import Correlation, spearman
from llm_jax.evaluation.tables import Table
from llm_jax.files import write_json
from llm_jax.interop.pretrained import Pretrained
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.tokenizer import Tokenizer
from llm_jax.tokenization.train import train_on_texts
from llm_jax.training import checkpoint, metrics

STAGES = ("start", "rewards", "runs", "report")
RANDOM, START, REWARD, PAIRS, RESULT, JUDGED = "random", "start", "reward", "pairs", "result.json", "judged.jsonl"
PLAIN = "none"  # the template: a prompt is the beginning of a text
PAID, REGRESSION, LEXICON = "reward", "regression", "lexicon"
SHOWN = {
    PAID: "reward (paid)",
    REGRESSION: "regression on other ratings",
    LEXICON: "lexicon (English)",
    judging.LOGPROB: "log-likelihood by the start",
    judging.DISTINCT: "distinct-2",
    judging.SELF_BLEU: "Self-BLEU",
}
TITLES = {"ppo": "PPO", "dpo": "DPO on pairs", "rejection": "rejection sampling"}
AS_IT_WAS = "the start"
WANTED_N, WANTED_TIMES = 16, 2.0  # as good as the best of so many, at no more than so many times its distance
# Between two calls with one --workdir: what is new is added.
CHANGEABLE = ("seeds", "ppo_betas", "dpo_betas", "best_of")
_STAGES, _ONLY = define_flags(STAGES, "ppo_0.1/0")


def run(config: SteeringConfig, workdir: Path, stages: Sequence[str] = STAGES, only: Sequence[str] = ()) -> None:
    """Do the stages; `only` are the runs to be done now, as "ppo_0.1/0", () = all."""
    known = [f"{name}/{seed}" for seed in config.seeds for name in config.runs]
    check_names(stages, STAGES, only, known)
    check_workdir(config, workdir, CHANGEABLE)
    study = Study(config, workdir)
    if "start" in stages:
        make_start(study)
    if "rewards" in stages:
        make_rewards(study)
    if "runs" in stages:
        for stage, folder in (("start", START), ("rewards", REWARD)):
            made = (workdir / folder / RESULT).is_file()
            require(made, f"{workdir / folder} is not finished: do the stage `{stage}` first")
        for each in only or known:
            name, _, seed = each.partition("/")
            do_run(study, name, int(seed))
    if "report" in stages:
        report(study)


class Study:
    """The config and the folder of a study, and what is read or made but once."""

    def __init__(self, config: SteeringConfig, workdir: Path):
        """Nothing is read yet."""
        self.config, self.workdir = config, workdir
        self.mesh = finetune.build_mesh(config.sft.training)

    @functools.cached_property
    def texts(self) -> Sides:
        """The rated texts, downloaded if need be."""
        loaded = (text for language in self.config.languages for text in ratings.load(language)[0])
        return reviews.sides(loaded, self.config)

    @functools.cached_property
    def paid(self) -> RewardModel:
        """The reward model."""
        return reward.load(self.workdir / REWARD, self.mesh)

    @functools.cached_property
    def unpaid(self) -> dict[str, Reward]:
        """What judges and pays nobody."""
        return {REGRESSION: referees.fit(self.texts.referee), LEXICON: referees.lexicon()}

    def judged_prompts(self, tokenizer: Tokenizer) -> list[Prompt]:
        """What all are judged on."""
        longest, most = self.config.judging.max_prompt_tokens, self.config.judged
        return reviews.prompts_of(self.texts.judged, tokenizer, longest)[:most]

    def load(self, folder: Path) -> Pretrained:
        """A model of the study, as it is trained and judged."""
        return finetune.load(dataclasses.replace(self.config.sft.training, model=str(folder)), self.mesh)


def make_start(study: Study) -> None:
    """Fine-tune the model on what continues the first words of reviews."""
    config, folder, texts = study.config, study.workdir / START, study.texts
    if is_done(folder / RESULT):
        return
    training = config.sft.training
    if not training.model:
        training = dataclasses.replace(training, model=str(folder.with_name(RANDOM)))
        make_model(config, [text.text for text in texts.learned], Path(training.model))
    model, tally, most = finetune.load(training, study.mesh), Tally(), config.ppo.rollout.sampling.max_new_tokens
    learned, judged = (reviews.samples_of(side, model.tokenizer, most, tally) for side in (texts.learned, texts.judged))
    asked = [
        Asked(prompt.record, prompt.messages[-1].content, list(prompt.tokens))
        for prompt in study.judged_prompts(model.tokenizer)[: config.sft.samples]
    ]
    finished = sft.learn(
        dataclasses.replace(config.sft, training=training),
        model,
        ChatData(learned, judged, tally, []),
        asked,
        dpo.how_it_says(model.tokenizer, None),
        folder,
        study.mesh,
    )
    check_finished(finished, folder)
    write_json(folder / RESULT, metrics.read(folder, "heldout")[-1])


def make_model(config: SteeringConfig, texts: Sequence[str], folder: Path) -> None:
    """A model with random weights and a vocabulary of the texts, unless it is there."""
    if (folder / checkpoint.FOLDER).is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = train_on_texts(texts, TokenizerConfig(vocab_size=config.model.vocab_size))
    (folder / "tokenizer.model").write_bytes(vocabulary)
    key = jax.random.key(config.sft.training.seed)
    checkpoint.save_model(folder, config.model, models.init(config.model, key))


def make_rewards(study: Study) -> None:
    """Train the reward model, and correlate what it and the others say with people's ratings of held-out texts."""
    config, folder = study.config, study.workdir / REWARD
    if is_done(folder / RESULT):
        return
    training = config.reward.training
    settings = dataclasses.replace(
        config.reward,
        training=dataclasses.replace(training, model=training.model or str(study.workdir / START)),
        ratings=config.languages,
        template=PLAIN,
        preferences=dataclasses.replace(
            config.reward.preferences, categories=config.domains, holdout_fraction=config.held_out
        ),
    )
    reward_model.run(settings, folder)
    check_finished((folder / reward.SETTINGS).is_file(), folder)
    found = {PAID: reward_report.correlate(study.paid, study.texts.judged), **correlate(study)}
    write_json(folder / RESULT, {name: {d: each._asdict() for d, each in by.items()} for name, by in found.items()})


def correlate(study: Study) -> dict[str, dict[str, Correlation]]:
    """Of the unpaid ones, with people's mean ratings of held-out texts, by domain; the lexicon has no Chinese word."""
    found: dict[str, dict[str, Correlation]] = {}
    for name, referee in study.unpaid.items():
        for domain in study.config.domains:
            texts = [text for text in study.texts.judged if text.domain == domain]
            if texts and (name != LEXICON or texts[0].language == "en"):
                scores_N = referee([()] * len(texts), [Response(text.text) for text in texts])
                means_N = np.array([text.mean for text in texts])
                found.setdefault(name, {})[domain] = spearman(scores_N, means_N)
    return found


def data_of(study: Study, model: Pretrained, at_once: int, seed: int) -> Data:
    """The first words of reviews as prompts, paid by the reward model."""
    longest = study.config.ppo.rollout.max_prompt_tokens
    heldout = study.judged_prompts(model.tokenizer)
    judged = {prompt.messages for prompt in heldout}  # texts of two sides may begin alike
    found = reviews.prompts_of(study.texts.referee, model.tokenizer, longest)
    train = [prompt for prompt in found if prompt.messages not in judged]
    tokens = [[np.array(prompt.tokens, np.int32) for prompt in side] for side in (train, heldout)]
    return Data(
        PromptStream(train, at_once, seed),
        heldout,
        study.paid,
        model.tokenizer,
        fingerprint=finetune.fingerprint(tokens),
    )


def do_run(study: Study, name: str, seed: int) -> None:
    """One method with one beta and one seed, from the start to its judgement: once."""
    folder, (method, beta) = study.workdir / name / f"seed_{seed}", study.config.runs[name]
    places = judged_places(study.config, folder, method)
    if all((place / JUDGED).is_file() for place in places.values()):
        print(f"{folder}: done earlier")
        return
    print(f"{name}, seed {seed}")
    check_finished(take_on(study, method, beta, folder, seed), folder)
    for place in places.values():
        judge(study, place if method != BEST_OF_N else study.workdir / START, place / JUDGED, seed)


def take_on(study: Study, method: str, beta: float, folder: Path, seed: int) -> bool:
    """The start taken on with a method; whether it came to its end."""
    config, mesh = study.config, study.mesh
    begun = Start(study.workdir / START, PLAIN, functools.partial(data_of, study))
    if method == "ppo":
        kl = dataclasses.replace(config.ppo.kl, coefficient=beta)
        return methods.run_ppo(dataclasses.replace(config.ppo, kl=kl), begun, folder, seed, mesh)
    if method == "rejection":
        rounds = config.rejection
        if seed != config.seeds[0]:  # one run's curves are enough
            rounds = dataclasses.replace(rounds, curves=dataclasses.replace(rounds.curves, prompts=0))
        return methods.run_rejection(rounds, begun, folder, seed, mesh)
    if method == "dpo":
        preferred = dataclasses.replace(config.dpo, loss=dataclasses.replace(config.dpo.loss, beta=beta))
        path = study.workdir / PAIRS / f"seed_{seed}.jsonl"  # the same for every beta
        drawing = Drawing(config.rejection.rollout, config.dpo_batches, pairs_of)
        pairs = methods.draw_pairs(preferred.training, begun, drawing, path, seed, mesh)
        return methods.run_dpo(preferred, begun, pairs, folder, seed, mesh)
    folder.mkdir(parents=True, exist_ok=True)
    return True


def pairs_of(drawn: Drawn) -> list[Pair]:
    """Of each prompt the best response over the worst, of those that came to their end."""
    found = []
    for prompt, responses in zip(drawn.prompts, drawn.responses):
        ended = [each for each in responses if each.ended and each.text.strip()]
        if ended:
            best, worst = (choose(ended, key=lambda each: each.reward) for choose in (max, min))
            if best.text.strip() != worst.text.strip():
                found.append(Pair(prompt.messages, best.text, worst.text))
    return found


def judged_places(config: SteeringConfig, folder: Path, method: str) -> dict[str, Path]:
    """The folders of what a run has to be judged, by what it is called: of rejection sampling every round."""
    if method == "rejection":
        rounds = range(1, config.rejection.rounds + 1)
        return {f"round {number}": rejection_run.folder_of(folder, number) for number in rounds}
    return {"": folder}


def judge(study: Study, folder: Path, path: Path, seed: int) -> None:
    """Have the samples of a model's folder judged, unless that is done; of the start there are more."""
    if path.is_file():
        return
    config, start = study.config, study.workdir / START
    settings = config.judging.sampled(seed=seed)
    if folder == start:
        settings = settings.sampled(num_samples=config.best_of_samples)
    model, reference = study.load(folder), study.load(start)
    every = {PAID: study.paid, **study.unpaid}
    prompts = study.judged_prompts(model.tokenizer)
    judging.write(path, judging.judge(model, reference, prompts, every, settings, None, study.mesh))


def report(study: Study) -> None:
    """Print and write the tables and the figure of all runs that are done."""
    config, workdir = study.config, study.workdir
    prompts = study.judged_prompts(tokenizers.load(workdir / START))
    starts = columns_of(study, prompts, BEST_OF_N, "")
    require(bool(starts), f"{workdir} has no samples of the start: do the run {BEST_OF_N}/{config.seeds[0]} first")
    points = points_of(study, prompts, starts)
    command = command_of("steering")
    made = [
        frontier.table("Reward by distance from the start", points, SHOWN, remarks_of(config, points, len(prompts))),
        correlations_table(json.loads((workdir / REWARD / RESULT).read_text())),
        samples_table(study, prompts),
    ]
    write_json(workdir / "report.json", {"command": command, "points": [each._asdict() for each in points]})
    frontier.draw(points[1:], SHOWN, workdir / "frontier.png")
    write_tables(workdir, "Steering reviews", command, made)
    print(f"{workdir / 'report.md'}: these tables; frontier.png: the figure")


def points_of(study: Study, prompts: Sequence[Prompt], starts: Sequence[Columns]) -> list[Point]:
    """The start, the best of n of its samples, and all runs."""
    every = {
        name: np.concatenate([run[name] for run in starts], axis=1) for name in starts[0] if starts[0][name].ndim > 1
    }
    points = [frontier.point(AS_IT_WAS, "", starts), *frontier.best_of_n(every, PAID, study.config.best_of)]
    for name, (method, beta) in study.config.runs.items():
        for place in judged_places(study.config, study.workdir, method) if method != BEST_OF_N else ():
            runs = columns_of(study, prompts, name, place)
            if runs:
                points.append(frontier.point(TITLES[method], place or f"beta {beta:g}", runs))
    return points


def columns_of(study: Study, prompts: Sequence[Prompt], name: str, place: str) -> list[Columns]:
    """What was judged of each seed; the lexicon judges English prompts alone."""
    english_P = np.array([referees.language_of(prompt.messages[-1].content) == "en" for prompt in prompts])
    config = study.config
    found: list[Columns] = []
    for seed in config.seeds:
        path = judged_places(config, study.workdir / name / f"seed_{seed}", config.runs[name][0])[place] / JUDGED
        if path.is_file():
            columns = judging.columns(judging.read(path), config.judging.sampling.num_samples)
            found.append({**columns, LEXICON: np.where(english_P[:, None], columns[LEXICON], np.nan)})
    return found


def remarks_of(config: SteeringConfig, points: Sequence[Point], prompts: int) -> list[str]:
    """What the points say: how far PPO comes, and where what is not paid falls."""
    over = (
        f"{len(config.seeds)} seeds; of the best of n, over prompts" if len(config.seeds) > 1 else "prompts, one seed"
    )
    found = [
        f"{prompts:,} held-out prompts; mean ± standard error over {over}. KL divergence of the best of n: its bound, "
        "log n - (n - 1) / n. Log-likelihood: of a token, in nats."
    ]
    ppo = [each for each in points if each.method == TITLES["ppo"]]
    wanted = [each for each in points if each.setting == f"n = {WANTED_N}"]
    allowed = WANTED_TIMES * frontier.best_of_n_kl(WANTED_N)
    reached = frontier.best_within(ppo, PAID, allowed)
    if wanted and reached:
        found.append(
            f"PPO, at no more than {allowed:.2f} nats: reward {said(reached.scores[PAID])} with {reached.setting} at "
            f"{said(reached.kl)} nats; the best of {WANTED_N}: {said(wanted[0].scores[PAID])}."
        )
    for name in (REGRESSION, LEXICON, judging.LOGPROB, judging.DISTINCT):
        turned = frontier.turn([points[0], *ppo], PAID, name)
        if turned:
            peak, behind = turned
            found.append(
                f"Over-optimisation by PPO: {SHOWN[name]} is highest at {said(peak.kl)} nats "
                f"({peak.setting or peak.method}), {said(peak.scores[name])}, and {said(behind.scores[name])} at "
                f"{said(behind.kl)} nats ({behind.setting}), where the reward is {said(behind.scores[PAID])} instead "
                f"of {said(peak.scores[PAID])}."
            )
    return found


def said(found: Estimate) -> str:
    """A mean and its standard error."""
    return f"{found.mean:.2f} ± {found.error:.2f}"


def correlations_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Each referee's Spearman correlation with people's ratings."""
    rows = tuple(
        (SHOWN[name], domain, f"{each['rho']:.3f}", f"{each['low']:.3f} to {each['high']:.3f}", f"{each['texts']:,}")
        for name, by_domain in found.items()
        for domain, each in by_domain.items()
    )
    headings = ("referee", "domain", "Spearman", "95 % interval", "texts")
    title = "Referees and people's mean ratings (shop reviews: labels) of held-out texts"
    return Table(title, headings, rows, frozenset(headings[2:]))


def samples_table(study: Study, prompts: Sequence[Prompt]) -> Table:
    """The first response of each model to the first prompt of each language."""
    languages = [referees.language_of(prompt.messages[-1].content) for prompt in prompts]
    rows = []
    for number in sorted({languages.index(language) for language in languages}):
        for name, (method, _) in study.config.runs.items():
            *_, place = judged_places(
                study.config, study.workdir / name / f"seed_{study.config.seeds[0]}", method
            ).values()
            if (place / JUDGED).is_file():
                verdict = next(each for each in judging.read(place / JUDGED) if each.prompt == number)
                rows.append((prompts[number].messages[-1].content, name, verdict.text, f"{verdict.scores[PAID]:.2f}"))
    headings = ("first words", "model", "the rest", SHOWN[PAID])
    return Table("What they write", headings, tuple(rows), frozenset(headings[3:]))


def main(config: SteeringConfig, workdir: Path) -> None:
    """Run what the flags name."""
    run(config, workdir, _STAGES.value, _ONLY.value)


if __name__ == "__main__":
    runner.main(main, SteeringConfig, "configs/steering/small.py", save_config=False)
