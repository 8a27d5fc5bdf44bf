"""Tunix's PPOLearner, in its own loop, on prompts that are tokens already.

It rolls out a minibatch at a time, from the newest policy, and learns from it in all epochs before it goes on. Its
rewards are integers: what is paid here, a fraction, it cuts down to 0, which takes as long as any other.
"""

import importlib.metadata
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as weights
from tunix.rl import algo_core, common, rl_cluster, utils
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout

from benchmarks.peers import shapes, tunix_generate
from benchmarks.peers.ppo_setting import (
    CLIP,
    EPOCHS,
    GAMMA,
    KL,
    LAM,
    LEARNING_RATE,
    MINIBATCH,
    PARTS,
    SHAPE,
    VALUE_CLIP,
    prompt_tokens,
)
from benchmarks.peers.serve import serve

ROLES = [rl_cluster.Role[name] for name in ("ACTOR", "CRITIC", "REFERENCE", "ROLLOUT")]


class Ids(tunix_generate.Ids):
    """Texts are ids, with nothing before them; the model draws neither padding nor an end."""

    def decode(self, ids: Any, **_: object) -> str:
        """The text."""
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        """There is none."""

    def pad_id(self) -> int:
        """The first id after the vocabulary."""
        return SHAPE.vocabulary


TOKENIZER = Ids(-1)


class Llama3(llama.Llama3):
    """Its own does not take an argument that its critics are called with, which its attention mask says already."""

    def __call__(self, *arguments: Any, segment_ids: Any = None, **others: Any) -> Any:
        """The model's."""
        del segment_ids
        return super().__call__(*arguments, **others)


def reward(prompts: Any, completions: list[str], **_: Any) -> list[float]:
    """The share of each response's tokens that are in the lower half of the vocabulary."""
    return [float(np.mean([id < SHAPE.vocabulary // 2 for id in TOKENIZER.encode(each)])) for each in completions]


def make_learner(folder: str) -> ppo_learner.PPOLearner:
    """The learner of the model in a folder."""
    mesh = jax.sharding.Mesh([[jax.devices()[0]]], ("fsdp", "tp"))
    llama.Llama3 = Llama3
    with mesh:
        actor, reference = (
            weights.create_model_from_safe_tensors(folder, tunix_generate.model_config(SHAPE), mesh, dtype=jnp.float32)
            for _ in range(2)
        )
        critic = utils.create_critic_model(actor)
        critic.lm_head.kernel[...] = jnp.zeros((SHAPE.hidden, 1))

    def optimizer() -> optax.GradientTransformation:
        return optax.adamw(LEARNING_RATE, *shapes.BETAS, eps=shapes.EPS, weight_decay=0.0)

    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optimizer(),
        critic_optimizer=optimizer(),
        mini_batch_size=MINIBATCH,
        train_micro_batch_size=MINIBATCH,
        eval_every_n_steps=10**9,
        max_steps=10**9,
        pbar_description=None,
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=SHAPE.new_tokens,
        max_prompt_length=SHAPE.prompt,
        temperature=1.0,
        top_p=1.0,
        kv_cache_size=SHAPE.prompt + SHAPE.new_tokens + 8,
        eos_tokens=[-1],
    )
    cluster = rl_cluster.RLCluster(
        actor=actor,
        critic=critic,
        reference=reference,
        tokenizer=TOKENIZER,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(ROLES, mesh), training_config=training, rollout_config=rollout
        ),
    )
    settings = ppo_learner.PPOConfig(
        num_iterations=EPOCHS,
        gamma=GAMMA,
        gae_lambda=LAM,
        beta=KL,
        epsilon=CLIP,
        clip_range_value=VALUE_CLIP,
        kl_method="kl",
    )
    return ppo_learner.PPOLearner(cluster, settings, reward_fns=reward)


class Iterations:
    """The learner's iterations, each begun when it is asked for, with the entropy of the first draws for their loss."""

    def __init__(self, cluster: rl_cluster.RLCluster) -> None:
        """Watch the parts of the iterations, and count the tokens that their updates learn from."""
        self.learned, self.spent = 0, dict.fromkeys(PARTS, 0.0)
        self._cluster, self._part, self._since = cluster, "", 0.0
        self._entropies: list[float] = []
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._watch("generate", "rollout")
        self._watch("get_ref_per_token_logps", "score", self._note_entropy)
        self._watch("update_actor", "update", self._count)

    def _watch(self, method: str, part: str, see: Callable[..., None] | None = None) -> None:
        """With a call of the cluster's method a part begins."""
        original = getattr(self._cluster, method)

        def watched(*arguments: Any, **others: Any) -> Any:
            self._begin(part)
            if see is not None:
                see(*arguments, **others)
            return original(*arguments, **others)

        setattr(self._cluster, method, watched)

    def _begin(self, part: str) -> None:
        """What is computed so far belongs to the part before."""
        if part == self._part:
            return
        trainers = self._cluster.actor_trainer, self._cluster.critic_trainer
        jax.block_until_ready([nnx.state(trainer.model) for trainer in trainers])
        now = time.perf_counter()
        if self._part:
            self.spent[self._part] += now - self._since
        self._part, self._since = part, now

    def _count(self, examples: Any, *_: Any) -> None:
        self.learned += sum(int(example.completion_mask.sum()) for example in examples)

    def _note_entropy(self, *, prompt_tokens: jax.Array, completion_tokens: jax.Array, **_: Any) -> None:
        """Of the first draws alone, by its own functions: its iterations do without."""
        if not self._entropies:
            _, logits = common.compute_per_token_logps(
                *nnx.split(self._cluster.rollout.model()),
                prompt_tokens,
                completion_tokens,
                pad_id=SHAPE.vocabulary,
                eos_id=-1,
                return_logits=True,
            )
            self._entropies.append(float(algo_core.compute_entropy_from_logits(logits).mean()))

    def batches(self) -> Iterator[dict[str, list[str]]]:
        """The prompts of an iteration, once they are asked for; by the next ones the iteration has ended."""
        prompts = itertools.cycle(TOKENIZER.decode(ids) for ids in prompt_tokens())
        while self._asked.get():
            yield {"prompts": list(itertools.islice(prompts, SHAPE.batch))}
            self._begin("")
            self._done.put(None)

    def step(self) -> float:
        """Let the learner do an iteration, from another thread."""
        self._asked.put(True)
        self._done.get()
        return self._entropies[0]

    def stop(self) -> None:
        """Let the learner end."""
        self._asked.put(False)


def main(folder: str) -> None:
    """Serve iterations of the model in a folder."""
    learner = make_learner(folder)
    turns = Iterations(learner.rl_cluster)
    library = f"google-tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}"

    def answer() -> None:
        serve(turns.step, lambda: turns.learned, lambda: dict(turns.spent), library=library)
        turns.stop()

    threading.Thread(target=answer, daemon=True).start()
    learner.train(turns.batches())


if __name__ == "__main__":
    main(*sys.argv[1:])
