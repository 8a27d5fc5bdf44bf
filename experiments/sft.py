"""Supervised fine-tuning: a trained model learns to reply, from conversations and by a chat template.

    python -m experiments.sft --config=configs/sft/small.py --workdir=runs/sft \\
        --config.training.model=MODEL --config.data.path=CONVERSATIONS.jsonl

All parameters are trained, or adapters (--config.training.lora.rank=8; with --config.training.quantize=int8 beside a
quantised model). --workdir becomes a folder of the model, as experiments.chat takes it, with metrics.jsonl and
samples.jsonl beside it; `best` holds the model of the lowest held-out loss. Run the same command again to continue
after a stop.

    python -m experiments.sft --inspect=3 --config.training.model=MODEL --config.data.path=...

shows the first conversations as the model will see them: every token, with the weight of its loss.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from experiments import runner
from experiments.samples import Asked, Says, append_samples
from llm_jax.alignment import finetune, inspect, sft
from llm_jax.alignment.config import SftConfig
from llm_jax.alignment.sft import ChatData, PackedSamples, Sample
from llm_jax.config import DataConfig, ModelConfig
from llm_jax.data import loader
from llm_jax.data.batch import Batch
from llm_jax.errors import require
from llm_jax.evaluation import perplexity
from llm_jax.interop import pretrained, released
from llm_jax.interop.pretrained import Pretrained
from llm_jax.parallel import distributed
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.chat import ChatTemplate
from llm_jax.training import language_model

_INSPECT = flags.DEFINE_integer(
    "inspect", 0, "show so many conversations with the weights of their tokens, and stop", lower_bound=0
)


def run(config: SftConfig, workdir: Path) -> bool:
    """Fine-tune, continuing from the newest checkpoint in `workdir`; whether it came to its end."""
    mesh = finetune.build_mesh(config.training)
    model = finetune.load(config.training, mesh)
    template = sft.choose_template(config.data, model.tokenizer, model.chat_template)
    data = sft.load(config.data, template)
    says = Says(template.stop_ids, template.reply_text)
    return learn(config, model, data, _asked(data, template, config.samples), says, workdir, mesh)


def learn(
    config: SftConfig,
    model: Pretrained,
    data: ChatData,
    asked: Sequence[Asked],
    says: Says,
    workdir: Path,
    mesh: Mesh,
) -> bool:
    """Fine-tune on samples, whatever they are made of, and evaluate on the held-out ones; whether it came to its end.

    Args:
        config: the run's; of its data, how samples fill batches.
        model: as it begins; its parameters are given away.
        data: the samples.
        asked: what the model says something to at every evaluation.
        says: how it says that.
        workdir: the run's folder.
        mesh: where the parameters are.
    """
    batches = PackedSamples(
        data.train,
        config.data.weights,
        config.data.sequence_length,
        config.data.batch_size,
        config.data.seed,
        padded=not config.data.packed,
    )
    if distributed.is_first():
        print(describe(data, batches))

    task = finetune.Task(
        loss=lambda architecture: language_model.loss_function(architecture, config.training.loss),
        batches=lambda start: _train_batches(config, batches, start),
        evaluate=lambda architecture, params: heldout_losses(config, architecture, params, data.heldout, mesh),
        steps_per_epoch=batches.steps_per_epoch,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        fingerprint=finetune.fingerprint([data.train, data.heldout]),
        show=lambda architecture, params, step: append_samples(
            workdir, step, asked, says, config.sampling, params, architecture, mesh
        ),
    )
    return finetune.train(config.training, model, task, workdir, mesh, config)


def describe(data: ChatData, batches: PackedSamples) -> str:
    """What is about to be learned, and what was left out, in some lines."""
    count, tokens = _sizes(data.train)
    supervised = sum(int(np.count_nonzero(sample.weights)) for found in data.train.values() for sample in found)
    lines = [
        f"{count:,} conversations of {tokens:,} tokens, {supervised / max(1, tokens):.0%} of them learned, in "
        f"{batches.rows_per_epoch:,} rows that are {batches.fill:.0%} full; {_sizes(data.heldout)[0]:,} held out"
    ]
    return "\n".join([*lines, *([str(data.tally)] if str(data.tally) else [])])


def _sizes(samples: Mapping[str, Sequence[Sample]]) -> tuple[int, int]:
    """How many samples there are, and their tokens."""
    found = [sample for several in samples.values() for sample in several]
    return len(found), sum(len(sample.tokens) for sample in found)


def _train_batches(config: SftConfig, batches: PackedSamples, start_step: int) -> Iterator[Batch]:
    """This process's rows of the global batches, with pre-training data in the last of them where that is asked for."""
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    own = batches.train_batches(start_step=start_step, prefetch=config.data.prefetch, **share)
    mixed = round(config.pretraining_fraction * config.data.batch_size)
    if not config.pretraining_dataset:
        return own
    require(
        0 < mixed < config.data.batch_size and mixed % jax.process_count() == 0,
        f"SftConfig.pretraining_fraction={config.pretraining_fraction} of {config.data.batch_size} sequences is {mixed}"
        f": it must be some of them, but not all, and divide over {jax.process_count()} processes",
    )
    dataset = DataConfig(
        dataset=config.pretraining_dataset,
        sequence_length=config.data.sequence_length,
        batch_size=mixed,
        seed=config.data.seed,
    )
    others = loader.train_batches(dataset, start_step=start_step, **share)
    return (_replace_last_rows(*pair) for pair in zip(own, others))


def _replace_last_rows(batch: Batch, other: Batch) -> Batch:
    kept = len(batch.tokens) - len(other.tokens)
    return Batch(*(np.concatenate([mine[:kept], theirs]) for mine, theirs in zip(batch, other)))


def heldout_losses(
    config: SftConfig, architecture: ModelConfig, params: Any, heldout: Mapping[str, Sequence[Sample]], mesh: Mesh
) -> dict[str, float]:
    """Nats per learned token of the held-out conversations, over all of them and by source; {} where there are none."""
    score = perplexity.scorer(architecture, config.training.loss, mesh)
    values, nats, tokens = {}, 0.0, 0.0
    for source, samples in heldout.items():
        result = score(
            params,
            sft.heldout_batches(
                samples,
                config.data.sequence_length,
                config.data.batch_size,
                max_batches=config.eval_batches,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            ),
        )
        values[f"loss/{source}"] = result.loss
        nats, tokens = nats + result.nats, tokens + result.tokens
    return {"loss": nats / tokens, **values} if tokens else {}


def _asked(data: ChatData, template: ChatTemplate, count: int) -> list[Asked]:
    """The first held-out conversations, without their last reply."""
    replied = [each for each in data.heldout_conversations if each.messages[-1].role == "assistant"]
    return [
        Asked(each.record, each.messages[-2].content, template.encode(each.messages[:-1])) for each in replied[:count]
    ]


def show(config: SftConfig, count: int) -> None:
    """Print the first conversations as the model will see them."""
    require(config.training.model != "", "set --config.training.model: its tokenizer and chat template are needed")
    path = released.locate(config.training.model)
    tokenizer = tokenizers.load(path)
    data = sft.load(config.data, sft.choose_template(config.data, tokenizer, pretrained.chat_template(path)))
    if str(data.tally):
        print(data.tally)
    samples = [sample for found in data.train.values() for sample in found]
    inspect.show(samples[:count], tokenizer)


def main(config: SftConfig, workdir: Path) -> None:
    """Fine-tune, or only show conversations."""
    if _INSPECT.value:
        show(config, _INSPECT.value)
    else:
        run(config, workdir)


if __name__ == "__main__":
    runner.main(main, SftConfig, "configs/sft/small.py", save_config=False)
