"""A TRL trainer's own training loop, taken a step at a time."""

import os
import queue
import tempfile
import threading
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
import torch
import transformers
import trl

from benchmarks.peers import shapes
from benchmarks.peers.serve import serve


def settings(**others: Any) -> dict[str, Any]:
    """Arguments of a trainer's config: everything in float32, nothing computed twice, nothing written or logged."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "learning_rate": shapes.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "adam_beta1": shapes.BETAS[0],
        "adam_beta2": shapes.BETAS[1],
        "adam_epsilon": shapes.EPS,
        "weight_decay": shapes.WEIGHT_DECAY,
        "max_grad_norm": shapes.CLIP_NORM,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "num_train_epochs": 1000,
    } | others


def tokenizer(pad: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that only says which id is padding: the texts are ids already."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": pad}, unk_token="[PAD]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[PAD]")


class Turns(transformers.TrainerCallback):
    """Waits after every step until the next one is asked for."""

    def __init__(self, trainer: transformers.Trainer, count: Callable[[Any], int]) -> None:
        """Watch the trainer's losses, and count what its inputs have to learn."""
        self.learned, self._loss = 0, 0.0
        self._count, self._compute = count, trainer.training_step
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[float] = queue.SimpleQueue()
        trainer.training_step = self._training_step
        trainer.add_callback(self)

    def _training_step(self, model: Any, inputs: Any, *others: Any) -> torch.Tensor:
        self.learned += self._count(inputs)
        loss = self._compute(model, inputs, *others)
        self._loss += loss.item()
        return loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the first request."""
        self._asked.get()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Hand the loss over and wait; reading the next rows is part of the next step."""
        self._done.put(self._loss)
        self._loss = 0.0
        control.should_training_stop = not self._asked.get()
        return control

    def step(self) -> float:
        """Let the trainer take a step, from another thread, and return its loss."""
        self._asked.put(True)
        return self._done.get()

    def stop(self) -> None:
        """Let the trainer end."""
        self._asked.put(False)


def serve_trainer(trainer: transformers.Trainer, count: Callable[[Any], int]) -> None:
    """Serve the steps of a trainer, which trains in this thread."""
    trainer._get_train_sampler = torch.utils.data.SequentialSampler  # its option for that has two names
    serve_turns(trainer, Turns(trainer, count))


def serve_turns(
    trainer: transformers.Trainer, turns: Turns, parts: Callable[[], Mapping[str, float]] | None = None
) -> None:
    """Serve the turns of a trainer, which trains in this thread, with the seconds that `serve` has of their parts."""
    library = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"

    def answer() -> None:
        serve(turns.step, lambda: turns.learned, parts, library=library)
        turns.stop()

    threading.Thread(target=answer, daemon=True).start()
    trainer.train()
