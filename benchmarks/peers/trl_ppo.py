"""TRL's PPOTrainer, in its own loop, on prompts that are tokens already."""

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import datasets
import torch
import transformers
from trl.experimental import ppo
from trl.experimental.ppo import ppo_trainer

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
from benchmarks.peers.trl_turns import Turns, serve_turns, settings, tokenizer


class Reward(torch.nn.Module):
    """In the form of a reward model: the share of the response's tokens in the lower half of the vocabulary."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        """It has no parameters."""
        super().__init__()
        self.score = torch.nn.Identity()

    def backbone(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        """The share, in every place of the row."""
        lower = (input_ids[:, SHAPE.prompt :] < SHAPE.vocabulary // 2).float()
        return SimpleNamespace(hidden_states=[lower.mean(1)[:, None, None].expand(*input_ids.shape, 1)])


class Iterations(Turns):
    """The trainer's iterations; the "loss" of each is the entropy of its draws."""

    def __init__(self, trainer: ppo.PPOTrainer) -> None:
        """Watch when an iteration's parts begin, and count the tokens that its updates learn from."""
        super().__init__(trainer, int)
        self.spent = dict.fromkeys(PARTS, 0.0)
        self._rolled = self._update = 0.0
        self._generate, ppo_trainer.batch_generation = ppo_trainer.batch_generation, self._batch_generation
        trainer.model.register_forward_pre_hook(self._before_update, with_kwargs=True)

    def _batch_generation(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = self._generate(*arguments)
        self._rolled, self._update = time.perf_counter(), 0.0
        self.spent["rollout"] += self._rolled - start
        return found

    def _before_update(self, model: Any, arguments: Any, inputs: Any) -> None:
        if not self._update:
            self._update = time.perf_counter()
            self.spent["score"] += self._update - self._rolled
        mask = inputs["attention_mask"]
        self.learned += int(mask.sum()) - len(mask) * SHAPE.prompt

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Note the entropy."""
        self._loss = logs["policy/entropy_avg"]

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        """End the iteration; the trainer does not stop by itself when it is told to."""
        self.spent["update"] += time.perf_counter() - self._update
        if super().on_step_end(args, state, control, **others).should_training_stop:
            sys.exit()
        return control


def main(folder: str) -> None:
    """Serve iterations of the model in a folder."""

    def load(kind: Any, **others: Any) -> Any:
        return kind.from_pretrained(folder, dtype="float32", **others)

    value_model = load(transformers.AutoModelForSequenceClassification, num_labels=1)
    value_model.score.weight.data.zero_()
    trainer = ppo.PPOTrainer(
        args=ppo.PPOConfig(
            **settings(per_device_train_batch_size=SHAPE.batch, learning_rate=LEARNING_RATE, weight_decay=0.0),
            num_mini_batches=SHAPE.batch // MINIBATCH,
            num_ppo_epochs=EPOCHS,
            num_sample_generations=0,
            response_length=SHAPE.new_tokens,
            temperature=1.0,
            kl_coef=KL,
            gamma=GAMMA,
            lam=LAM,
            cliprange=CLIP,
            cliprange_value=VALUE_CLIP,
        ),
        processing_class=tokenizer(SHAPE.vocabulary),  # padding is no token that a model could draw
        model=load(transformers.AutoModelForCausalLM),
        ref_model=load(transformers.AutoModelForCausalLM),
        reward_model=Reward(),
        value_model=value_model,
        train_dataset=datasets.Dataset.from_list([{"input_ids": ids} for ids in prompt_tokens()]),
    )
    trainer.remove_callback(transformers.PrinterCallback)  # which would write among the answers
    turns = Iterations(trainer)
    serve_turns(trainer, turns, lambda: dict(turns.spent))


if __name__ == "__main__":
    main(*sys.argv[1:])
