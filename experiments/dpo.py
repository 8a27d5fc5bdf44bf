"""Direct preference optimisation: a model learns from pairs of responses which kind of them to give, without a reward.

    python -m experiments.dpo --config=configs/dpo/small.py --workdir=runs/dpo \\
        --config.training.model=MODEL --config.preferences.path=PAIRS.jsonl

The model, as it begins, is the reference: its log-probabilities are computed before the first step and kept in
references.npz. All parameters are trained, or adapters (--config.training.lora.rank=8; with
--config.training.quantize=int8 beside a quantised model, which then is the reference). --config.ratings='("en",)' makes
the pairs of texts that people rated. --workdir becomes a folder of the model, with metrics.jsonl and samples.jsonl
beside it; `best` holds the model of the lowest held-out loss. Run the same command again to continue after a stop.
"""

from pathlib import Path
from typing import Any

import jax

from experiments import reward_model, runner
from experiments.samples import Asked, Says, append_samples
from llm_jax import models
from llm_jax.alignment import dpo, finetune
from llm_jax.alignment.config import DpoConfig, FineTuneConfig
from llm_jax.alignment.pair_rows import PackedPairs
from llm_jax.alignment.preferences import Pair
from llm_jax.config import ModelConfig
from llm_jax.interop.pretrained import Pretrained
from llm_jax.parallel import distributed
from llm_jax.tokenization import chat
from llm_jax.tokenization.chat import ChatTemplate
from llm_jax.tokenization.tokenizer import Tokenizer
from llm_jax.training import metrics


def run(config: DpoConfig, workdir: Path) -> None:
    """Train, continuing from the newest checkpoint in `workdir`."""
    data = reward_model.read(config)
    mesh = finetune.build_mesh(config.training)
    model = finetune.load(config.training, mesh)
    template = None
    if config.template != "none":
        template = chat.choose(config.template, model.tokenizer, model.chat_template)
    chunk_size, length = config.training.loss.chunk_size, config.data.sequence_length
    train, tally = dpo.encode_pairs(data.train, model.tokenizer, template, length)
    heldout = dpo.encode_pairs(data.heldout, model.tokenizer, template, length)[0] if data.heldout else {}
    fingerprint = finetune.fingerprint([train, heldout])
    asked = ask(data.heldout[: config.samples], model.tokenizer, template)
    says = how_it_says(model.tokenizer, template)

    def task_of(packed: PackedPairs[dpo.EncodedPair, dpo.DpoBatch], heldout: dpo.Encoded) -> finetune.Task:
        return finetune.Task(
            loss=lambda architecture: dpo.loss_function(architecture, config.loss, chunk_size),
            batches=lambda start: packed.train_batches(
                start_step=start, process_index=jax.process_index(), process_count=jax.process_count()
            ),
            evaluate=lambda architecture, params: dpo.heldout_losses(
                params, architecture, heldout, config.data, config.loss, chunk_size, mesh
            ),
            steps_per_epoch=packed.steps_per_epoch,
            batch_size=config.data.batch_size,
            sequence_length=length,
            fingerprint=fingerprint,
            show=lambda architecture, params, step: append_samples(
                workdir, step, asked, says, config.sampling, params, architecture, mesh
            ),
        )

    # Whatever may be refused is, before the references, which take long.
    packed = dpo.packed(train, config.data)
    finetune.check(config.training, model, task_of(packed, heldout), workdir, mesh, config)
    if distributed.is_first():
        print(reward_model.describe(data, packed, str(tally)))
    train, heldout = dpo.with_references(
        workdir, *reference(config.training, model), [train, heldout], config.data, chunk_size, mesh
    )
    task = task_of(dpo.packed(train, config.data), heldout)
    if finetune.train(config.training, model, task, workdir, mesh, config) and distributed.is_first():
        print(summary(workdir))


def reference(config: FineTuneConfig, model: Pretrained) -> tuple[Any, ModelConfig]:
    """The parameters and the config of the model before its first step: beside adapters, as it is rounded for them."""
    if config.quantize == "none":
        return model.params, model.config
    architecture, params = models.quantize(model.params, model.config, config.quantize)
    return params, architecture


def ask(pairs: list[Pair], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[Asked]:
    """The prompts of pairs; of plain texts, of which a model without bos would have nothing to begin with, none."""
    found = [
        Asked(
            pair.record,
            pair.prompt[-1].content if pair.prompt else "",
            dpo.prompt_ids(pair.prompt, tokenizer, template),
        )
        for pair in pairs
    ]
    return [each for each in found if each.tokens]


def how_it_says(tokenizer: Tokenizer, template: ChatTemplate | None) -> Says:
    """Replies by a template, or texts up to their end."""
    if template:
        return Says(template.stop_ids, template.reply_text)
    end, size = tokenizer.eos_id, tokenizer.vocab_size
    return Says([end] if end >= 0 else [], lambda ids: tokenizer.decode([i for i in ids if i < size and i != end]))


def summary(workdir: Path) -> str:
    """What the last evaluation found, in a line."""
    last = metrics.read(workdir, "heldout")[-1]
    if "loss" not in last:
        return f"{workdir} holds the model; no pairs are held out"
    drift = f"{last['chosen_drift']:+.4f} where chosen and {last['rejected_drift']:+.4f} where rejected"
    return (
        f"{workdir} holds the model; held-out loss {last['loss']:.4f}, accuracy {last['accuracy']:.1%}, a token's "
        f"log-ratio {drift}"
    )


if __name__ == "__main__":
    runner.main(run, DpoConfig, "configs/dpo/small.py", save_config=False)
