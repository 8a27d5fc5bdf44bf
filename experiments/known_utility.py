"""All of RLHF where the true utility is known: demonstrations, raters, reward models, PPO, and what came of it.

    python -m experiments.known_utility --config=configs/known_utility/small.py --workdir=runs/known_utility \\
        --config.base=MODEL --config.corpus=DATASET

Requests for so many words with some words in them; `alignment.utilities` has the utilities. Stages, each of which is
done once and continued by the same command: `data` makes requests out of sentences; `start` fine-tunes the base on
them, and raters compare what it writes; `rewards` trains a reward model of helpfulness and one of safety; `runs` takes
the start on with each method and each seed and judges it by the utilities and by the reward models; `report` makes the
tables and figures. --config.corpus is a dataset of experiments.prepare_data by the base's tokenizer.

Processes may go side by side: --stages=rewards --only=helpfulness_model beside safety_model, then --stages=runs
--only=llama2/0,dpo/0 and so on (rejection_ppo/0 after rejection/0), and --stages=report in the end.

Writes to --workdir: requests/, start/, preferences/, helpfulness_model/, safety_model/, METHOD/seed_N (each a model
with judged.jsonl and result.json), and report.md, report.json and figures.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from experiments import known_utility_report, methods, ppo, pretrain, reward_model, runner, sft
from experiments.known_utility_report import JUDGED, RESULT
from experiments.methods import Start
from experiments.stages import check_finished, check_names, check_workdir, define_flags, is_done
from llm_jax.alignment import finetune, judging, preferences, prompts, rejection, reward, rewards, rollout, utilities
from llm_jax.alignment.known_utility_config import TEMPLATE, TITLES, KnownUtilityConfig
from llm_jax.alignment.policy_config import PpoConfig, PretrainingConfig, PromptDataConfig
from llm_jax.alignment.ppo import Data
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.prompts import Prompt, PromptStream
from llm_jax.alignment.rewards import Response, Reward
from llm_jax.alignment.utilities import Demonstration
from llm_jax.config import DataConfig, TrainConfig
from llm_jax.data import loader
from llm_jax.errors import require
from llm_jax.evaluation.diversity import self_bleu
from llm_jax.files import write_json, write_lines
from llm_jax.interop import pretrained
from llm_jax.interop.pretrained import Pretrained
from llm_jax.tokenization import chat
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.tokenizer import Tokenizer

STAGES = ("data", "start", "rewards", "runs", "report")
REQUESTS, TRAIN, HELDOUT = "requests", "train.jsonl", "heldout.jsonl"
START, PREFERENCES = "start", "preferences"
HELPFULNESS, SAFETY, BOTH = "helpfulness", "safety", "both"  # what raters compare by; both: each where it decides
REWARD_MODELS = {HELPFULNESS: "helpfulness_model", SAFETY: "safety_model"}
PPO_OF = {  # method -> the field of the config that says how
    "llama2": "llama2",
    "llama2_ptx": "llama2",
    "helpfulness": "llama2",
    "rejection_ppo": "llama2",
    "small_beta": "small_beta",
    "baichuan2": "baichuan2",
    "qwen": "qwen",
}
NO_PTX = PretrainingConfig()
WITH_PTX = ("llama2_ptx", "qwen")
PAID_FOR_HELPFULNESS = ("helpfulness", "small_beta")
PAID_THE_SUM = ("baichuan2", "qwen")  # all others: LLaMA-2's choice between the two models
CHANGEABLE = ("seeds", "methods")  # between two calls with one --workdir: what is new is added
_STAGES, _ONLY = define_flags(STAGES, "llama2/0")


def run(config: KnownUtilityConfig, workdir: Path, stages: Sequence[str] = STAGES, only: Sequence[str] = ()) -> None:
    """Do the stages; `only` are the reward models and runs to be done now, as "llama2/0", () = all."""
    runs = [f"{method}/{seed}" for seed in config.seeds for method in sorted(config.methods, key=_comes_last)]
    check_names(stages, STAGES, only, [*REWARD_MODELS.values(), *runs])
    needy = [method for method in config.methods if method in WITH_PTX and not config.corpus]
    require(
        not needy,
        f"{', '.join(needy)} needs pre-training data: set --config.corpus to a dataset of prepare_data, or leave it "
        "out of --config.methods",
    )
    check_workdir(config, workdir, CHANGEABLE)
    if "data" in stages:
        make_requests(config, workdir / REQUESTS)
    if "start" in stages:
        start(config, workdir)
    for kind, name in REWARD_MODELS.items():
        if "rewards" in stages and (not only or name in only):
            train_reward(config, workdir, kind)
    for each in runs:
        if "runs" in stages and (not only or each in only):
            method, _, seed = each.partition("/")
            do_run(config, workdir, method, int(seed))
    if "report" in stages:
        judge_start(config, workdir)
        asked = read_prompts(config, workdir, HELDOUT, tokenizers.load(workdir / START))
        requests = [utilities.parse(prompt.messages) for prompt in asked[: config.judged_prompts]]
        known_utility_report.write(config, workdir, requests)


def _comes_last(method: str) -> bool:
    """Whether a method begins with what another one has made."""
    return method == "rejection_ppo"


def make_requests(config: KnownUtilityConfig, folder: Path) -> None:
    """Write the demonstrations to train on, and the held-out ones."""
    if is_done(folder / HELDOUT):
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = [Path(config.texts).read_text(encoding="utf-8")] if config.texts else None
    found = utilities.demonstrate(
        utilities.sentences(texts), config.requests, config.tagged_share, config.refusal_share
    )
    sides: tuple[list[Demonstration], list[Demonstration]] = ([], [])
    for each in found:
        sides[preferences.is_held_out(str(each.request), config.holdout_fraction)].append(each)
    for name, side in zip((TRAIN, HELDOUT), sides):
        write_lines(folder / name, map(_record, side))
    print(f"{len(sides[0]):,} requests to train on, {len(sides[1]):,} held out")


def _record(shown: Demonstration) -> dict[str, object]:
    said = (("user", str(shown.request)), ("assistant", shown.response))
    return {"messages": [{"role": role, "content": text} for role, text in said], "unsafe": shown.request.tagged}


def start(config: KnownUtilityConfig, workdir: Path) -> None:
    """Fine-tune the base on the demonstrations, and let raters compare responses of the model that this makes."""
    if (workdir / PREFERENCES / f"{BOTH}.jsonl").is_file():
        print(f"{workdir / START}: done earlier")
        return
    require((workdir / REQUESTS / HELDOUT).is_file(), f"{workdir} has no requests yet: do the stage `data` first")
    require(config.base != "", "set --config.base to the model to begin with: a folder, a file or a name")
    settings = dataclasses.replace(
        config.sft,
        training=dataclasses.replace(config.sft.training, model=config.base),
        data=dataclasses.replace(
            config.sft.data,
            path=str(workdir / REQUESTS / TRAIN),
            heldout_path=str(workdir / REQUESTS / HELDOUT),
            template=TEMPLATE,
        ),
    )
    check_finished(sft.run(settings, workdir / START), workdir / START)
    rate(config, workdir, finetune.build_mesh(config.sft.training))


def rate(config: KnownUtilityConfig, workdir: Path, mesh: Mesh) -> None:
    """Draw pairs of responses from the start, and write what raters prefer.

    Helpfulness is compared in all pairs; safety where the request is tagged or one of the two is a violation. `both`
    has the pairs whose safety was compared with that, all others with their helpfulness.
    """
    raters = config.raters
    asked, first, second = _draw_pairs(config, workdir, mesh)
    found = {}
    for number, (kind, utility) in enumerate(utilities.BY_KIND.items()):
        sharpness = getattr(raters, f"{kind}_sharpness")
        seen = utility(asked, first), utility(asked, second)
        compared = utilities.compare(*seen, sharpness, raters.strength_edges, raters.seed + number)
        found[kind] = utilities.pairs(asked, first, second, compared, kind)
    found[SAFETY] = [pair for pair in found[SAFETY] if _is_about_safety(pair)]
    found[BOTH] = found[SAFETY] + [pair for pair in found[HELPFULNESS] if not _is_about_safety(pair)]
    (workdir / PREFERENCES).mkdir(parents=True, exist_ok=True)
    for name, pairs in found.items():
        preferences.write(workdir / PREFERENCES / f"{name}.jsonl", pairs)
        print(f"{len(pairs):,} pairs: {name}")


def _is_about_safety(pair: Pair) -> bool:
    return utilities.parse(pair.prompt).tagged or not (pair.chosen_safe and pair.rejected_safe)


def _draw_pairs(
    config: KnownUtilityConfig, workdir: Path, mesh: Mesh
) -> tuple[list[rewards.Prompt], list[Response], list[Response]]:
    """Prompts, and two responses of the start to each, the first at the lower temperature."""
    raters, model = config.raters, load(workdir / START, mesh)
    data = data_of(config, workdir, utilities.helpfulness, NO_PTX, model, raters.rollout.prompts, raters.seed)
    settings = [
        raters.rollout.sampled(temperature=temperature, seed=seed)
        for seed, temperature in enumerate(raters.temperatures)
    ]
    asked: list[rewards.Prompt] = []
    sides: tuple[list[Response], list[Response]] = ([], [])
    for both in methods.draw(model, data, raters.batches, settings, mesh):
        asked += [prompt.messages for prompt in both[0].prompts for _ in range(raters.rollout.sampling.num_samples)]
        for drawn, side in zip(both, sides):
            side += [Response(each.text, each.ended) for row in drawn.responses for each in row]
    return asked, *sides


def train_reward(config: KnownUtilityConfig, workdir: Path, kind: str) -> None:
    """A reward model of what raters compare by, which begins as the start."""
    folder, path = workdir / REWARD_MODELS[kind], workdir / PREFERENCES / f"{kind}.jsonl"
    if is_done(folder / "report.md"):
        return
    require(path.is_file(), f"{workdir} has no preferences yet: do the stage `start` first")
    settings = getattr(config, REWARD_MODELS[kind])
    settings = dataclasses.replace(
        settings,
        training=dataclasses.replace(settings.training, model=str(workdir / START)),
        preferences=dataclasses.replace(settings.preferences, path=str(path)),
        template=TEMPLATE,
    )
    reward_model.run(settings, folder)


def load(folder: Path, mesh: Mesh) -> Pretrained:
    """A model of the study."""
    return pretrained.load(folder, mesh=mesh, dtype="float32")


def data_of(
    config: KnownUtilityConfig,
    workdir: Path,
    paid: Reward,
    pretraining: PretrainingConfig,
    model: Pretrained,
    at_once: int,
    seed: int,
) -> Data:
    """The requests as prompts, with what is paid for the responses, and pre-training data."""
    train, heldout = (read_prompts(config, workdir, name, model.tokenizer) for name in (TRAIN, HELDOUT))
    tokens = [[np.array(prompt.tokens, np.int32) for prompt in side] for side in (train, heldout)]
    return Data(
        PromptStream(train, at_once, seed),
        heldout,
        paid,
        model.tokenizer,
        chat.choose(TEMPLATE, model.tokenizer),
        ppo.pretraining(pretraining, model),
        finetune.fingerprint(tokens),
    )


def read_prompts(config: KnownUtilityConfig, workdir: Path, name: str, tokenizer: Tokenizer) -> list[Prompt]:
    """The requests of one side, those that are too long left out."""
    most = config.judging.max_prompt_tokens
    settings = PromptDataConfig(path=str(workdir / REQUESTS / name), template=TEMPLATE, max_tokens=most)
    return prompts.load(settings, tokenizer, chat.choose(TEMPLATE, tokenizer)).train


def paid_for(method: str, config: KnownUtilityConfig, workdir: Path, mesh: Mesh) -> Reward:
    """What a method is paid: by reward models alone."""
    models = {kind: reward.load(workdir / name, mesh) for kind, name in REWARD_MODELS.items()}
    if method in PAID_FOR_HELPFULNESS:
        return models[HELPFULNESS]
    if method in PAID_THE_SUM:
        return rewards.weighted(models, dict.fromkeys(models, 1.0))
    return rewards.piecewise(
        models[SAFETY],
        models[HELPFULNESS],
        threshold=config.llama2.safety_threshold,
        is_tagged=lambda prompt: utilities.parse(prompt).tagged,
    )


def do_run(config: KnownUtilityConfig, workdir: Path, method: str, seed: int) -> None:
    """One method with one seed, from the start to its result: once."""
    folder = workdir / method / f"seed_{seed}"
    if is_done(folder / RESULT):
        return
    for name in REWARD_MODELS.values():
        done = (workdir / name / "report.md").is_file()
        require(done, f"{workdir} has no finished {name} yet: do the stage `rewards` first")
    mesh = finetune.build_mesh(config.sft.training)
    print(f"{TITLES[method]}, seed {seed}")
    check_finished(take_on(config, workdir, method, folder, seed, mesh), folder)
    judge(config, workdir, folder, mesh, seed=seed, is_diverse=method in config.diversity.methods)


def take_on(config: KnownUtilityConfig, workdir: Path, method: str, folder: Path, seed: int, mesh: Mesh) -> bool:
    """The start, or what rejection sampling made of it, taken on with a method; whether it came to its end."""
    origin = workdir / START
    if method == "rejection_ppo":
        origin = workdir / "rejection" / f"seed_{seed}"
        require((origin / RESULT).is_file(), f"{origin} is not finished, and {method} begins there: do that run first")
    pretraining = NO_PTX
    if method in WITH_PTX:
        pretraining = PretrainingConfig(
            config.corpus, config.ptx_coefficient, config.corpus_length, config.corpus_batch_size
        )
    paid = paid_for(method, config, workdir, mesh)
    begun = Start(origin, TEMPLATE, functools.partial(data_of, config, workdir, paid, pretraining))
    if method == "dpo":
        return methods.run_dpo(config.dpo, begun, workdir / PREFERENCES / f"{BOTH}.jsonl", folder, seed, mesh)
    if method == "rejection":
        return methods.run_rejection(config.rejection, begun, folder, seed, mesh)
    settings: PpoConfig = getattr(config, PPO_OF[method])
    critic = dataclasses.replace(settings.critic, model=str(workdir / REWARD_MODELS[HELPFULNESS]))
    return methods.run_ppo(
        dataclasses.replace(settings, pretraining=pretraining, critic=critic), begun, folder, seed, mesh
    )


def judge_start(config: KnownUtilityConfig, workdir: Path) -> None:
    """As `judge`, of the start, and what the base knows of the corpus: once."""
    if (workdir / START / RESULT).is_file():
        return
    require((workdir / REWARD_MODELS[SAFETY] / "report.md").is_file(), f"{workdir} has no reward models yet")
    mesh = finetune.build_mesh(config.sft.training)
    base = pretrained.load(config.base, mesh=mesh, dtype="float32")
    judge(config, workdir, workdir / START, mesh, seed=0, is_diverse=True, base_loss=corpus_loss(config, base, mesh))


def judge(
    config: KnownUtilityConfig,
    workdir: Path,
    folder: Path,
    mesh: Mesh,
    *,
    seed: int,
    is_diverse: bool,
    **more: float | None,
) -> None:
    """Judge a model's responses to held-out requests by the utilities and the reward models, against the start."""
    model, begun = load(folder, mesh), load(workdir / START, mesh)
    asked = read_prompts(config, workdir, HELDOUT, model.tokenizer)
    referees = utilities.BY_KIND | {name: reward.load(workdir / name, mesh) for name in REWARD_MODELS.values()}
    template = chat.choose(TEMPLATE, model.tokenizer)
    settings = config.judging.sampled(seed=seed)
    if folder.name == START:
        settings = settings.sampled(num_samples=config.start_samples)
    found = judging.judge(model, begun, asked[: config.judged_prompts], referees, settings, template, mesh)
    judging.write(folder / JUDGED, found)
    values: dict[str, Any] = {"corpus_loss": corpus_loss(config, model, mesh), **more}
    if is_diverse:
        values["self_bleu"] = self_bleus(config, workdir, model, asked, mesh)
    write_json(folder / RESULT, values)


def corpus_loss(config: KnownUtilityConfig, model: Pretrained, mesh: Mesh) -> float | None:
    """Nats per token of the corpus's held-out texts; None without a corpus."""
    if not config.corpus:
        return None
    data = DataConfig(
        dataset=config.corpus,
        sequence_length=config.corpus_length,
        batch_size=config.corpus_batch_size,
    )
    settings = TrainConfig(model=model.config, data=data, eval_batches=config.eval_batches)
    evaluate = pretrain.heldout_evaluation(settings, loader.describe(data), mesh)
    return float(evaluate(model.params)["loss"])


def self_bleus(
    config: KnownUtilityConfig, workdir: Path, model: Pretrained, asked: Sequence[Prompt], mesh: Mesh
) -> dict[str, dict[str, list[float]]]:
    """Self-BLEU of the samples of each prompt, by kind of request and by temperature; of requests without a tag."""
    wanted, chosen = config.diversity, {}
    for kind in utilities.LENGTHS:
        known = [p for p in asked if not p.unsafe and utilities.parse(p.messages).kind == kind]
        enough = len(known) >= wanted.prompts
        require(enough, f"only {len(known)} held-out requests are {kind}: lower diversity.prompts")
        chosen[kind] = known[: wanted.prompts]
    batch = [prompt for kind in chosen for prompt in chosen[kind]]
    data = data_of(config, workdir, utilities.safety, NO_PTX, model, 1, 0)
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in chosen}
    with jax.set_mesh(mesh), rollout.generation_layout(model.params, model.config) as (architecture, params):
        for temperature in track(wanted.temperatures, "temperatures", console=Console(stderr=True)):
            settings = config.judging.sampled(temperature=temperature, num_samples=wanted.samples)
            drawn = rejection.draw(params, architecture, batch, settings, data, range(len(batch)))
            values = [self_bleu([each.tokens for each in row]) for row in drawn.responses]
            for number, kind in enumerate(chosen):
                found[kind][str(temperature)] = values[number * wanted.prompts :][: wanted.prompts]
    return found


def main(config: KnownUtilityConfig, workdir: Path) -> None:
    """Run what the flags name."""
    run(config, workdir, _STAGES.value, _ONLY.value)


if __name__ == "__main__":
    runner.main(main, KnownUtilityConfig, "configs/known_utility/small.py", save_config=False)
