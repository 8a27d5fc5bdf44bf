"""What the benchmark of fine-tuning trains on, made once for all of its implementations.

A shape's folder holds a model of random weights as a Hugging Face folder, the head of its reward model, and as JSON
Lines the rows of tokens that another library takes, in its order; plan.json says how many of them make a step.
"""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.peers.shapes import GENERATIONS
from experiments import prepare_instructions
from llm_jax import models
from llm_jax.alignment import conversations, preferences, ratings, reward, reward_batch, sft
from llm_jax.alignment.config import ChatDataConfig, InstructionsConfig, PreferenceConfig, RewardDataConfig
from llm_jax.alignment.preferences import Pair
from llm_jax.alignment.reward_batch import PackedPairs, ResponseEncoder, RewardBatch
from llm_jax.alignment.sft import PackedSamples
from llm_jax.config import MeshConfig, ModelConfig, TokenizerConfig
from llm_jax.data.batch import Batch
from llm_jax.interop import huggingface, pretrained
from llm_jax.interop.pretrained import Pretrained
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.tokenization.train import train_on_texts

MODEL, HEAD, PLAN, INSTRUCTIONS = "model", "reward_head.npy", "plan.json", "instructions"
LENGTH, ROWS = 256, 8  # as in configs/sft/small.py and configs/reward_model/small.py
VOCABULARY = 8192  # of the tokenizer; a model may have more rows
GOLDEN_RATIO = (5**0.5 - 1) / 2
IGNORED = -100  # a label that is not learned, as torch and TRL have it

Row = dict[str, list[int]]


def prepare(workdir: Path, name: str, steps: int) -> Path:
    """Make the folder of the shape called `name`, with rows for so many steps, and return it."""
    folder, instructions = workdir / name, workdir / INSTRUCTIONS
    if not instructions.is_dir():
        with contextlib.redirect_stdout(sys.stderr):
            prepare_instructions.run(InstructionsConfig(), instructions)
    if not (folder / MODEL).is_dir():
        _write_model(folder, name, instructions)
    packed, pairs = sft_batches(folder, 0), reward_batches(folder)
    conversations_of_step = round(sft_batches(folder, 1).rows_per_epoch / packed.rows_per_epoch * ROWS)
    pairs_of_step = int(np.count_nonzero(pairs.batch(0).weights))
    padded = sft_batches(folder, conversations_of_step)
    every_sample = [row for step in range(padded.steps_per_epoch) for row in sft_rows(padded.batch(step))]
    every_pair = [row for step in range(pairs.steps_per_epoch) for row in pair_rows(pairs.batch(step))]
    files = {
        "sft_packed": [row for step in range(steps) for row in sft_rows(packed.batch(step))],
        "sft_padded": every_sample,
        "sft_grouped": grouped(every_sample, conversations_of_step),
        "reward_padded": every_pair,
        "reward_grouped": grouped(every_pair, pairs_of_step),
    }
    used = {id_ for rows in files.values() for row in rows for key in row if key.endswith("ids") for id_ in row[key]}
    for file, rows in files.items():
        (folder / f"{file}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    unused = min(set(range(GENERATIONS[name].vocabulary)) - used)
    plan = {
        "length": LENGTH,
        "rows": ROWS,
        "conversations": conversations_of_step,
        "pairs": pairs_of_step,
        "pad": unused,
    }
    (folder / PLAN).write_text(json.dumps(plan) + "\n")
    return folder


def sft_batches(folder: Path, conversations_of_step: int) -> PackedSamples:
    """The batches of experiments.sft: so many conversations padded, one in a row, or packed ones for 0."""
    packed = not conversations_of_step
    config = ChatDataConfig(
        path=str(folder.parent / INSTRUCTIONS / prepare_instructions.TRAIN),
        template="llama2",
        holdout_fraction=0.0,
        sequence_length=LENGTH,
        batch_size=conversations_of_step or ROWS,
        packed=packed,
    )
    samples = sft.load(config, sft.choose_template(config, tokenizers.load(folder / MODEL))).train
    return PackedSamples(samples, {}, LENGTH, config.batch_size, config.seed, padded=not packed)


def reward_batches(folder: Path) -> PackedPairs:
    """The batches of experiments.reward_model, of English texts that people rated."""
    encoder = ResponseEncoder(tokenizers.load(folder / MODEL))
    pairs, _ = reward_batch.encode_pairs(_rated_pairs(), encoder, LENGTH)
    return PackedPairs(pairs, RewardDataConfig(sequence_length=LENGTH, batch_size=ROWS))


def reward_model(folder: Path) -> Pretrained:
    """The model with a new head for rewards."""
    return reward.from_language_model(pretrained.load(folder / MODEL, mesh=mesh()), mesh(), jax.random.key(0))


def mesh() -> Mesh:
    """The mesh of one device, as everything else here has one."""
    return mesh_lib.build(MeshConfig(), jax.devices()[:1])


def sft_rows(batch: Batch) -> Iterator[Row]:
    """The rows of a batch as TRL takes packed conversations: labels where the tokens are that they want."""
    for tokens, targets, weights, segments in zip(*batch[:4]):
        count = int(np.count_nonzero(segments))
        learned = np.where(weights > 0, targets, IGNORED)
        yield {
            "input_ids": tokens[:count].tolist(),
            "labels": [IGNORED, *learned[: count - 1].tolist()],
            "seq_lengths": np.bincount(segments)[1:].tolist(),
        }


def pair_rows(batch: RewardBatch) -> Iterator[Row]:
    """The pairs of a batch as TRL takes them."""
    for tokens, segments in zip(batch.tokens, batch.segment_ids):
        responses = [tokens[segments == segment].tolist() for segment in range(1, segments.max() + 1)]
        for chosen, rejected in zip(responses[::2], responses[1::2]):
            yield {"chosen_ids": chosen, "rejected_ids": rejected}


def grouped(rows: Sequence[Row], size: int) -> list[Row]:
    """Rows in batches of similar length; any few batches in a row have about the lengths of all (a golden sequence)."""
    ordered = sorted(rows, key=lambda row: max(map(len, row.values())))
    batches = [ordered[start : start + size] for start in range(0, len(ordered) - size + 1, size)]
    places = np.argsort([(index + 0.5) * GOLDEN_RATIO % 1 for index in range(len(batches))])
    return [row for batch in np.argsort(places) for row in batches[batch]]


def _rated_pairs() -> list[Pair]:
    config = PreferenceConfig(pairs_per_text=2)
    return preferences.split(ratings.make_pairs(ratings.load("en")[0], config), config.holdout_fraction).train


def _write_model(folder: Path, name: str, instructions: Path) -> None:
    """Random weights, and a tokenizer of the texts that are trained on."""
    found, _ = conversations.read(instructions / prepare_instructions.TRAIN)
    texts = [message.content for conversation in found for message in conversation.messages]
    texts += [text for pair in _rated_pairs() for text in (pair.chosen, pair.rejected)]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes(train_on_texts(texts, TokenizerConfig(vocab_size=VOCABULARY)))
    shape = GENERATIONS[name]
    config = ModelConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn_size=shape.ffn,
        max_length=LENGTH,
        tie_embeddings=shape.tied,
    )
    huggingface.save(folder / MODEL, config, models.init(config, jax.random.key(0)), family="llama", files=[tokenizer])
    np.save(folder / HEAD, np.asarray(reward_model(folder).params["reward_head"]["kernel"]))
