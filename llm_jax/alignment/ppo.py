"""PPO for language models, and GRPO and RLOO over the same rollouts: one iteration, and the view of held-out prompts.

An iteration rolls out responses to new prompts, scores them, asks policy, reference and critic for their say about
every token, makes advantages of it, and updates policy and critic on minibatches of the responses, several times over.
All of it is a function of the state and the data: nothing is remembered from one iteration to the next but the state.

B responses, T tokens of a row, M rows of a minibatch.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm_jax.alignment import controllers, ppo_experience, ppo_state, ppo_update, rollout
from llm_jax.alignment.policy_config import PpoConfig
from llm_jax.alignment.ppo_experience import Judged, Learnable, Shaping
from llm_jax.alignment.ppo_models import Actors
from llm_jax.alignment.ppo_state import PpoState
from llm_jax.alignment.ppo_update import CriticSettings, PolicyRows, PolicySettings, ValueRows
from llm_jax.alignment.prompts import Prompt, PromptStream, stop_ids
from llm_jax.alignment.rewards import Response, Reward
from llm_jax.alignment.rollout import Rollouts
from llm_jax.data.batch import Batch
from llm_jax.data.packing import permutation
from llm_jax.errors import require
from llm_jax.evaluation.best_of import estimate
from llm_jax.optim import schedules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel import offload, rules, shares
from llm_jax.tokenization.chat import ChatTemplate
from llm_jax.tokenization.tokenizer import Tokenizer
from llm_jax.training import step
from llm_jax.training.loop import DivergedError, place
from llm_jax.training.state import TrainState

Sample = dict[str, Any]  # a line of the table of samples
HELDOUT = 1  # is added to the seed of held-out rollouts, so that they are none of the training's


class Data(NamedTuple):
    """What a run draws from, and how it puts that before the policy."""

    prompts: PromptStream
    heldout: Sequence[Prompt]
    reward: Reward
    tokenizer: Tokenizer
    template: ChatTemplate | None = None  # None = prompts are the beginnings of texts
    pretraining: Callable[[int], Iterator[Batch]] | None = None  # this process's rows from the i-th batch on
    fingerprint: str = ""  # of the prompts
    reward_bytes: tuple[int, ...] = ()  # of each reward model, for the estimate of memory


class Observed(NamedTuple):
    """Responses, and what was found out about them."""

    prompts: Sequence[Prompt]
    rollouts: Rollouts
    responses: Sequence[Response]
    batch: Batch  # of the rollouts, on the mesh
    scores_B: np.ndarray  # float32
    judged: Judged
    measured: Mapping[str, float]  # seconds that rolling out and scoring took, and the sampler's largest difference


class Ppo:
    """What the iterations of a run share: its models and data, and the programs that are compiled for them."""

    def __init__(self, config: PpoConfig, actors: Actors, data: Data, mesh: Mesh):
        """Nothing is computed yet.

        Raises `UserError` for minibatches that microbatches or devices do not divide, and for prompts without room for
        a response.
        """
        self.config, self.actors, self.mesh = config, actors, mesh
        self._data = data
        training, microbatches = config.training, config.training.microbatches
        step.check_batch(config.minibatch_size, microbatches, mesh)
        rollout.check([*data.prompts.prompts, *data.heldout], actors.model, config.rollout)
        self._responses = config.rollout.prompts * config.rollout.sampling.num_samples
        self._updates = config.epochs * (self._responses // config.minibatch_size)  # of an iteration
        self._check_groups(mesh)
        self._shaping = Shaping(config.rewards, config.advantage, config.rollout.sampling.num_samples)
        self._policy_settings = PolicySettings(
            actors.policy.config,
            actors.policy_lora,
            config.loss,
            config.rollout.sampling.temperature,
            training.loss.chunk_size,
            microbatches,
        )
        learned = max(1, training.steps - config.critic.warmup_iterations)
        self._policy_schedule = schedules.learning_rate(training.optimizer, learned * self._updates)
        self._critic_schedule = schedules.learning_rate(config.critic.optimizer, training.steps * self._updates)
        self._seed = step.seed_number(training.seed)
        self._others: Iterator[tuple[int, Batch]] | None = None  # numbered batches of pre-training data

    def _check_groups(self, mesh: Mesh) -> None:
        """Responses to one prompt lie together in the rows of their process, not in those of all."""
        samples, rows = self.config.rollout.sampling.num_samples, self._responses // rules.axis_size(mesh, "batch")
        require(
            self.config.advantage.kind == "gae" or rows % samples == 0 or mesh_lib.follows_processes(mesh),
            f"{rows} responses for each device are no multiple of rollout.sampling.num_samples={samples}, and the "
            "devices of a process are no neighbours in the mesh: take more rollout.prompts or fewer samples",
        )

    def first(self) -> PpoState:
        """The state before the first iteration."""
        policy, critic = self.actors.policy, self.actors.critic
        return ppo_state.first(
            policy.first(),
            None if critic is None else critic.first(),
            controllers.init_kl(self.config.kl),
            controllers.init_moments(),
            self.config.training.seed,
            self.mesh,
        )

    def abstract(self) -> PpoState:
        """The state's shapes, dtypes and layout."""
        policy, critic = self.actors.policy, self.actors.critic
        return ppo_state.abstract(
            policy.abstract,
            None if critic is None else critic.abstract,
            controllers.init_kl(self.config.kl),
            controllers.init_moments(),
            self.mesh,
        )

    def iterate(self, state: PpoState) -> tuple[PpoState, dict[str, float]]:
        """One iteration: the next state, and what is to be recorded of it. `state` is given away.

        Raises:
          UserError: the reward gave what is no reward, or the responses' log-probabilities are not the trainer's.
          DivergedError: not one update was finite.
        """
        iteration, drawn = int(state.iteration), int(state.prompts_drawn)
        prompts, streams = self._data.prompts.batch(drawn), self._data.prompts.streams(drawn)
        with jax.set_mesh(self.mesh):
            seen = self.observe(state, prompts, streams, int(state.seed))
            found, metrics = shares.settled(
                ppo_experience.learnable(
                    self._shaping,
                    state.moments,
                    state.kl.coefficient,
                    *self._on_mesh(seen.scores_B, seen.rollouts.ended_B),
                    seen.batch.loss_weights,
                    seen.judged,
                )
            )
            start = time.perf_counter()
            kl = controllers.update_kl(self.config.kl, state.kl, metrics["kl"])
            state, learned = self._learn(state, seen, found, iteration)
            metrics = jax.device_get({**metrics, **learned})
        state = state._replace(
            iteration=state.iteration + 1, prompts_drawn=state.prompts_drawn + 1, kl=kl, moments=found.moments
        )
        values = {name: float(value) for name, value in metrics.items()}
        self._check(values, iteration)
        measured = {**seen.measured, "seconds_update": time.perf_counter() - start}
        return state, {**values, **describe_rollouts(shares.all_rows(seen.rollouts)), **measured}

    def observe(
        self, state: PpoState, prompts: Sequence[Prompt], streams: Sequence[int] | np.ndarray, seed: int
    ) -> Observed:
        """Responses of the policy to prompts, with their scores and what the three models say about their tokens.

        The random numbers follow from `streams`, one for each prompt, and the seed. Raises as `iterate`.
        """
        policy, settings, data = self.actors.policy, self.config.rollout, self._data
        settings = dataclasses.replace(settings, sampling=dataclasses.replace(settings.sampling, seed=seed))
        start = time.perf_counter()
        rollouts = rollout.roll(
            policy.merge(state.policy.params, *policy.frozen),
            self.actors.model,
            prompts,
            settings,
            stop_ids=stop_ids(data.tokenizer, data.template),
            streams=streams,
        )
        rolled = time.perf_counter()
        responses = rollout.responses(rollouts, prompts, data.tokenizer, data.template)
        scores_B = ppo_experience.score(data.reward, [prompts[i].messages for i in rollouts.prompt_B], responses)
        ppo_experience.check_scale(self.config.rewards, scores_B)
        (batch,) = self._on_mesh(rollouts.batch)
        judged = self._judge(state, batch)
        measured = {"seconds_rollout": rolled - start, "seconds_score": time.perf_counter() - rolled}
        measured["sampler_difference"] = rollout.check_logprobs(
            rollouts,
            shares.own_rows(shares.all_rows(judged.logprobs), self.mesh),
            tolerance=self.config.logprob_tolerance,
        )
        return Observed(prompts, rollouts, responses, batch, scores_B, judged, measured)

    def evaluate(self, state: PpoState) -> tuple[dict[str, float], list[Sample]]:
        """What the policy does with the held-out prompts, and all of it to read: {} and [] where there are none.

        Of every batch each process has its part; what they find is the same on all of them.

        "loss" is the negative of the mean score, as every run's is what falls where it gets better.
        """
        count, size = min(self.config.eval_prompts, len(self._data.heldout)), self.config.rollout.prompts
        prompts, part = self._data.heldout[:count], size // jax.process_count()
        own = []  # a table for each batch
        for first in range(jax.process_index() * part, count + jax.process_index() * part, size):
            # The last batch is filled up with prompts that do not count, so that no other shape is compiled.
            batch = list(itertools.islice(itertools.cycle(prompts), first, first + part))
            with jax.set_mesh(self.mesh):
                seen = self.observe(state, batch, range(first, first + part), int(state.seed) + HELDOUT)
                own.append(samples(seen, self.mesh))
        if not own:
            return {}, []
        batches = zip(*shares.gather(own))
        table = [sample for parts in batches for part in parts for sample in part]
        table = table[: count * self.config.rollout.sampling.num_samples]
        values = {name: float(np.mean([sample[name] for sample in table])) for name in ("score", "kl", "tokens")}
        scores_P = np.reshape([sample["score"] for sample in table], (count, -1)).mean(axis=1)
        values["score_error"] = estimate(scores_P).error  # of prompts: samples of one are not independent
        values["end_rate"] = float(np.mean([sample["ended"] for sample in table]))
        values["loss"] = -values["score"]
        return values, table

    def _judge(self, state: PpoState, batch: Batch) -> Judged:
        policy, critic, reference = self.actors.policy, self.actors.critic, self.actors.reference
        settings = self._policy_settings
        groups = self._responses // self.config.minibatch_size * settings.microbatches
        options = (settings.temperature, settings.chunk_size, groups)
        own = shares.settled(
            ppo_experience.logprobs_of(policy.config, *options)(_computed(policy, state.policy), batch)
        )
        others = shares.settled(
            ppo_experience.logprobs_of(reference.config, *options)(offload.fetch(reference.params), batch)
        )
        values_BT = jnp.zeros_like(own.logprobs_BT)
        if critic is not None and state.critic is not None:
            values_BT = shares.settled(
                ppo_experience.values_of(critic.config, groups)(_computed(critic, state.critic), batch)
            )
        assert own.entropies_BT is not None  # asked for
        return Judged(own.logprobs_BT, own.entropies_BT, others.logprobs_BT, values_BT)

    def _learn(
        self, state: PpoState, seen: Observed, found: Learnable, iteration: int
    ) -> tuple[PpoState, dict[str, jax.Array]]:
        """The minibatch updates of an iteration, and the means of what they report."""
        judged = seen.judged
        policy_rows = PolicyRows(seen.batch, judged.logprobs, judged.reference, found.advantages)
        value_rows = ValueRows(seen.batch, judged.values, found.returns)
        trains_policy = iteration >= self.config.critic.warmup_iterations
        reports: dict[str, list[step.Metrics]] = {"policy": [], "critic": []}
        for indices_M in self._minibatches(iteration):
            if trains_policy:
                state, report = self._update_policy(state, policy_rows, indices_M)
                reports["policy"].append(report)
                limit = self.config.stop_kl
                trains_policy = not limit or float(report["approximate_kl"]) <= limit
            if state.critic is not None:
                state, report = self._update_critic(state, value_rows, indices_M)
                reports["critic"].append(report)
        return state, {
            f"{name}/{key}": value for name, several in reports.items() for key, value in _means(several).items()
        }

    def _minibatches(self, iteration: int) -> Iterator[np.ndarray]:
        """The rows of every update of an iteration: all of them in each epoch, in another order."""
        size = self.config.minibatch_size
        for epoch in range(self.config.epochs):
            order_B = permutation(self._responses, int(self._seed), iteration, epoch).astype(np.int32)
            yield from (order_B[start : start + size] for start in range(0, self._responses, size))

    def _update_policy(self, state: PpoState, rows: PolicyRows, indices_M: np.ndarray) -> tuple[PpoState, step.Metrics]:
        part, coefficient = self.actors.policy, self.config.pretraining.coefficient
        update = ppo_update.policy_update(self._policy_settings, part.optimizer, coefficient)
        others = None
        if self._data.pretraining is not None:
            others = self._on_mesh(self._pretraining_batch(int(state.pretraining_drawn)))[0]
            state = state._replace(pretraining_drawn=state.pretraining_drawn + 1)
        numbers = (self._seed, self._policy_schedule)
        policy, report = shares.settled(update(state.policy, rows, indices_M, others, *numbers, *part.frozen))
        return state._replace(policy=policy), report

    def _update_critic(self, state: PpoState, rows: ValueRows, indices_M: np.ndarray) -> tuple[PpoState, step.Metrics]:
        part = self.actors.critic
        assert part is not None and state.critic is not None
        settings = CriticSettings(
            part.config, self.actors.critic_lora, self.config.loss.value_clip, self.config.training.microbatches
        )
        update = ppo_update.critic_update(settings, part.optimizer)
        critic, report = shares.settled(
            update(state.critic, rows, indices_M, self._seed, self._critic_schedule, *part.frozen)
        )
        return state._replace(critic=critic), report

    def _pretraining_batch(self, number: int) -> Batch:
        """The batch of a number; they are read on from the one before it."""
        assert self._data.pretraining is not None
        if self._others is None:
            self._others = zip(itertools.count(number), self._data.pretraining(number))
        found, batch = next(self._others)
        if found != number:  # the state is not the one that followed
            self._others = None
            return self._pretraining_batch(number)
        return batch

    def _on_mesh(self, *arrays: Any) -> tuple[Any, ...]:
        """This process's rows as rows of global arrays."""
        return tuple(place(each, self.mesh) for each in arrays)

    def _check(self, values: Mapping[str, float], iteration: int) -> None:
        skipped = [name for name in ("policy", "critic") if values.get(f"{name}/skipped") == 1.0]
        if skipped:
            raise DivergedError(
                f"no update of the {' and the '.join(skipped)} was finite in iteration {iteration + 1}: resume from "
                "the last checkpoint with a lower learning rate, or look at the scores of its responses"
            )


def _computed(part: Any, state: TrainState) -> Any:
    """The parameters to compute with."""
    return part.attach(state.params, *part.frozen)


def _means(reports: Sequence[step.Metrics]) -> dict[str, jax.Array]:
    """The mean of every number over the updates that were not skipped; of "skipped", over all of them."""
    if not reports:
        return {}
    columns = {name: jnp.stack([report[name] for report in reports]) for name in reports[0]}
    taken = columns["skipped"] == 0
    count = jnp.maximum(jnp.sum(taken), 1)
    means = {name: jnp.sum(jnp.where(taken, column, 0.0)) / count for name, column in columns.items()}
    first = {"first_ratio": columns["ratio"][0]} if "ratio" in columns else {}  # 1 where nothing is learned yet
    return {**means, **first, "skipped": jnp.mean(columns["skipped"])}


def describe_rollouts(rollouts: Rollouts) -> dict[str, float]:
    """Numbers that tell of responses without a model."""
    said = [rollouts.response_tokens(row) for row in range(len(rollouts.ended_B))]
    kept_mass, least_kept_mass = rollouts.kept_mass()
    return {
        "tokens": float(np.mean(rollouts.lengths_B)),
        "end_rate": float(np.mean(rollouts.ended_B)),
        "distinct_1": ppo_experience.distinct(said, 1),
        "distinct_2": ppo_experience.distinct(said, 2),
        "kept_mass": kept_mass,
        "least_kept_mass": least_kept_mass,
    }


def samples(seen: Observed, mesh: Mesh) -> list[Sample]:
    """A line for every response of this process: what was asked and said, and what came of it."""
    kl_BT = (seen.judged.logprobs - seen.judged.reference) * seen.batch.loss_weights
    kl_B = shares.own_rows(shares.all_rows(kl_BT.sum(axis=1)), mesh)
    asked = [seen.prompts[i] for i in seen.rollouts.prompt_B]
    return [
        {
            "record": prompt.record,
            "prompt": prompt.messages[-1].content,
            "response": response.text,
            "score": float(score),
            "kl": float(kl),
            "tokens": response.tokens,
            "ended": response.ended,
        }
        for prompt, response, score, kl in zip(asked, seen.responses, seen.scores_B, kl_B)
    ]
