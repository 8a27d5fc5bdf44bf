"""Train a reward model on preferences, and judge it: accuracy by gap, calibration, length bias, agreement with people.

    python -m experiments.reward_model --config=configs/reward_model/small.py --workdir=runs/reward \\
        --config.training.model=MODEL --config.preferences.path=PAIRS.jsonl

The model may be a base model, a chat model or another reward model: trained first on broad comparisons and then, with
that run's folder as its model, on better ones, it is Qwen's preference-model pre-training. --config.ratings='("en",)'
makes the pairs of texts that people rated. --workdir becomes a folder of the reward model (`alignment.reward.load`),
with metrics.jsonl, evaluation.json, scores.jsonl of the held-out pairs, and figures. Run the same command again to
continue after a stop.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import reward_report, runner
from experiments.reward_report import Origin
from llm_jax import models
from llm_jax.alignment import finetune, pair_rows, preferences, ratings, reward, reward_batch
from llm_jax.alignment.config import DpoConfig, RewardConfig, RewardLossConfig
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.ratings import RatedText
from llm_jax.alignment.reward import RewardModel
from llm_jax.alignment.reward_batch import EncodedPair, PackedPairs, ResponseEncoder, RewardBatch
from llm_jax.config import ModelConfig
from llm_jax.errors import require
from llm_jax.interop.pretrained import Pretrained
from llm_jax.parallel import distributed
from llm_jax.tokenization import chat
from llm_jax.training.loop import place
from llm_jax.training.step import LossFunction

Encoded = dict[str, list[EncodedPair]]  # by source


class Data(NamedTuple):
    """Pairs on both sides of the split, what to say of them, and the rated texts that they are made of, if any."""

    train: list[Pair]
    heldout: list[Pair]
    remarks: list[str]
    rated: list[RatedText]


def run(config: RewardConfig, workdir: Path) -> None:
    """Train, continuing from the newest checkpoint in `workdir`; at the end, centre the rewards and evaluate them."""
    data = read(config)
    mesh = finetune.build_mesh(config.training)
    language_model = finetune.load(config.training, mesh, writes=False)  # or a reward model, to train it further
    encoder = encoder_of(config, language_model)
    train, tally = reward_batch.encode_pairs(data.train, encoder, config.data.sequence_length)
    heldout: Encoded = {}
    if data.heldout:
        heldout = reward_batch.encode_pairs(data.heldout, encoder, config.data.sequence_length)[0]
    reward_batch.check_strengths(train, config.loss)
    packed = PackedPairs(train, config.data)
    if distributed.is_first():
        print(describe(data, packed, str(tally)))
    model = reward.from_language_model(language_model, mesh, jax.random.key(config.training.seed))
    task = finetune.Task(
        loss=lambda architecture: reward.loss_function(architecture, config.loss),
        batches=lambda start: _train_batches(packed, start),
        evaluate=lambda architecture, params: heldout_losses(config, architecture, params, heldout, mesh),
        steps_per_epoch=packed.steps_per_epoch,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        fingerprint=finetune.fingerprint([train, heldout]),
    )
    if finetune.train(config.training, model, task, workdir, mesh, config):
        trained = centre(config, train, workdir, mesh)
        texts = ratings.split(data.rated, config.preferences.holdout_fraction)[1]
        judged = reward_report.judge(trained, heldout, texts) if heldout else None
        if judged and distributed.is_first():
            origin = Origin(config.training.model, models.count_parameters(trained.config), len(data.train))
            reward_report.write(workdir, judged, origin)


def read(config: RewardConfig | DpoConfig) -> Data:
    """The pairs of a file, or of rated texts. Raises `UserError` where there are none to train on."""
    rated: list[RatedText] = []
    remarks: list[str] = []
    if config.ratings:
        loaded = [ratings.load(language) for language in config.ratings]
        rated = [text for texts, _ in loaded for text in texts]
        remarks += [str(tally) for _, tally in loaded if str(tally)]
        pairs = ratings.make_pairs(rated, config.preferences)
    else:
        require(config.preferences.path != "", "set --config.preferences.path to a file of pairs, or config.ratings")
        pairs, tally = preferences.read(config.preferences.path, config.preferences)
        remarks += [str(tally)] if str(tally) else []
    pairs = preferences.of_categories(pairs, config.preferences.categories)
    train, heldout, dropped = preferences.split(pairs, config.preferences.holdout_fraction)
    require(bool(train), "every pair is held out: lower PreferenceConfig.holdout_fraction")
    train = preferences.draw(train, config.data.limit, config.data.seed)
    if dropped:
        remarks.append(f"{dropped} pairs with a text on either side of the split are left out")
    return Data(train, heldout, remarks, rated)


def encoder_of(config: RewardConfig, model: Pretrained) -> ResponseEncoder:
    """How responses are put before the model."""
    template = None
    if config.template != "none":
        template = chat.choose(config.template, model.tokenizer, model.chat_template)
    return ResponseEncoder(model.tokenizer, template, config.data.pooling)


def describe(data: Data, packed: pair_rows.PackedPairs[Any, Any], tally: str) -> str:
    """What is about to be learned, and what was left out, in some lines."""
    strengths = preferences.counts(data.train)["strength"]
    listed = ", ".join(f"{strengths[name]:,} of strength {name}" for name in sorted(strengths))
    first = f"{len(data.train):,} pairs ({listed}), {packed.pairs_per_row:.1f} in a row; {len(data.heldout):,} held out"
    return "\n".join([first, *data.remarks, *([tally] if tally else [])])


def heldout_losses(
    config: RewardConfig,
    architecture: ModelConfig,
    params: Any,
    heldout: Encoded,
    mesh: Mesh,
) -> dict[str, float]:
    """The held-out loss and accuracy, over all pairs, and the accuracy by source; {} where there are no pairs."""
    score = _compiled_loss(architecture, config.loss)
    share = jax.process_index(), jax.process_count()
    values: dict[str, float] = {}
    sums = np.zeros(3)  # loss, right ones, pairs
    for source, pairs in heldout.items():
        found = np.zeros(3)
        with jax.set_mesh(mesh):
            for batch in reward_batch.heldout_batches(pairs, config.data, *share):
                output = score(params, place(batch, mesh), None)
                found += jax.device_get([output.total, output.metrics["accuracy"].total, output.weight])
        values[f"accuracy/{source}"] = found[1] / found[2]
        sums += found
    return {"loss": sums[0] / sums[2], "accuracy": sums[1] / sums[2], **values} if sums[2] else {}


@functools.lru_cache
def _compiled_loss(architecture: ModelConfig, loss: RewardLossConfig) -> LossFunction:
    """Compiled once for all evaluations."""
    return jax.jit(reward.loss_function(architecture, loss))


def _train_batches(packed: PackedPairs, start_step: int) -> Iterator[RewardBatch]:
    return packed.train_batches(
        start_step=start_step, process_index=jax.process_index(), process_count=jax.process_count()
    )


def centre(config: RewardConfig, train: Encoded, workdir: Path, mesh: Mesh) -> RewardModel:
    """The trained model, its rewards with a mean of 0 over training responses; reward.json keeps by what they move.

    Where it has learned which responses are safe, they stay: then 0 is where it takes either for as likely.
    """
    _keep_settings(config, workdir, 0.0)
    model, offset = reward.load(workdir, mesh), 0.0
    if config.loss.safety_coefficient and any(pair.safety_weights.any() for pairs in train.values() for pair in pairs):
        what = "sigmoid(reward) is the probability that a response is safe"
    else:
        reference = list(itertools.chain.from_iterable(train.values()))[: -(-config.reference_responses // 2)]
        responses = [response for pair in reference for response in (pair.chosen, pair.rejected)]
        offset = float(np.mean(model.score(responses), dtype=np.float64))
        what = f"its rewards have mean 0 on {len(responses):,} training responses"
        _keep_settings(config, workdir, offset)
    if distributed.is_first():
        print(f"{workdir} holds the reward model; {what}")
    return dataclasses.replace(model, offset=offset)


def _keep_settings(config: RewardConfig, workdir: Path, offset: float) -> None:
    if distributed.is_first():
        reward.save_settings(workdir, config.template, config.data.pooling, offset)
    distributed.wait_for_all("reward_settings")


if __name__ == "__main__":
    runner.main(run, RewardConfig, "configs/reward_model/small.py", save_config=False)
