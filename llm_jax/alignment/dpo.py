"""Direct preference optimisation: a policy learns preferences from pairs alone, beside the model that it began as.

Both responses of a pair stand in one row, each with its prompt as a segment, with other pairs beside them: a row's
segments are chosen, rejected, chosen, ... The reference's log-probabilities never change, so they are computed once,
before the first step, and kept beside the run.

Legend: B rows, T tokens of a row, P pairs of a row, N pairs, S strengths; the last axis, 2, is (chosen, rejected).
"""

import functools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track

from llm_jax.alignment import finetune, pair_rows, sft
from llm_jax.alignment.config import ChatDataConfig, DpoLossConfig, PairDataConfig
from llm_jax.alignment.conversations import BadRecordError, Conversation, Tally
from llm_jax.alignment.pair_rows import PackedPairs
from llm_jax.alignment.preferences import MOST_STEPS, Pair
from llm_jax.alignment.sft import Sample
from llm_jax.config import ModelConfig
from llm_jax.data.packing import SharedRows
from llm_jax.errors import UserError, require
from llm_jax.files import replacing
from llm_jax.losses.preference import dpo_loss
from llm_jax.losses.weighted import LossOutput
from llm_jax.parallel import distributed, shares
from llm_jax.tokenization.chat import ChatTemplate, Message, encode_inside
from llm_jax.tokenization.tokenizer import Tokenizer
from llm_jax.training.language_model import logprobs_function
from llm_jax.training.loop import place
from llm_jax.training.step import LossFunction

REFERENCES = "references.npz"


class EncodedPair(NamedTuple):
    """A pair as tokens; the weights of a response's tokens are 1, those of its prompt 0."""

    chosen: Sample
    rejected: Sample
    strength: np.ndarray  # int32, no axes
    references: np.ndarray  # float32 [2]: the reference's log-probabilities; NaN until they are known

    @property
    def length(self) -> int:
        """Tokens of both responses, each with its prompt."""
        return len(self.chosen.tokens) + len(self.rejected.tokens)


Encoded = Mapping[str, Sequence[EncodedPair]]  # by source


class DpoBatch(NamedTuple):
    """Rows of pairs: the fields of `data.batch.Batch`, and those of the pairs. A place without a pair has weight 0."""

    tokens: np.ndarray  # int32 [B,T]
    targets: np.ndarray  # int32 [B,T]
    loss_weights: np.ndarray  # float32 [B,T]: 1 where the target is a response's
    segment_ids: np.ndarray  # int32 [B,T]: pair p's chosen response is 2p + 1, its rejected one 2p + 2; 0 = padding
    positions: np.ndarray  # int32 [B,T]
    weights: np.ndarray  # float32 [B,P]
    strengths: np.ndarray  # int32 [B,P], from 1
    references: np.ndarray  # float32 [B,P,2]


def prompt_ids(prompt: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """What a response comes after. Without a template, or without a prompt, it is bos (where there is one) and text."""
    if template and prompt:
        return template.encode(prompt)
    text = "".join(message.content for message in prompt)
    return [
        *([tokenizer.bos_id] if tokenizer.bos_id >= 0 else []),
        *(tokenizer.encode(text) if text else []),
    ]


def encode_response(
    prompt: Sequence[Message],
    response: str,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    sequence_length: int,
) -> Sample:
    """A prompt and a response as tokens, those of the response with weight 1: its end token, too, where there is one.

    Raises `BadRecordError` where it has no token to learn, is longer than a row, or the template refuses the messages.
    """
    if template and prompt:
        settings = ChatDataConfig(supervise="last", too_long="drop", sequence_length=sequence_length)
        return sft.tokenize(Conversation((*prompt, Message("assistant", response))), template, settings)
    before = prompt_ids(prompt, tokenizer, template)
    words = (
        encode_inside(tokenizer, response) if any(message.content for message in prompt) else tokenizer.encode(response)
    )
    said = [*words, *([tokenizer.eos_id] if tokenizer.eos_id >= 0 else [])]
    tokens = np.array([*before, *said], np.int32)
    weights = np.array([0.0] * len(before) + [1.0] * len(said), np.float32)
    weights[:1] = 0.0  # nothing comes before a text's first token
    if not weights.any():
        raise BadRecordError(sft.UNSUPERVISED)
    return Sample(tokens, tokens, weights)


def encode_pair(pair: Pair, tokenizer: Tokenizer, template: ChatTemplate | None, sequence_length: int) -> EncodedPair:
    """A pair as tokens, without its references.

    Raises `BadRecordError` where both responses are the same to the model, or do not fit into a row together.
    """
    chosen, rejected = (
        encode_response(pair.prompt, text, tokenizer, template, sequence_length)
        for text in (pair.chosen, pair.rejected)
    )
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise BadRecordError("responses of the same tokens", repr(pair.chosen[:30]))
    encoded = EncodedPair(chosen, rejected, np.array(pair.strength, np.int32), np.full(2, np.nan, np.float32))
    if encoded.length > sequence_length:
        detail = f"{len(chosen.tokens)} + {len(rejected.tokens)} tokens"
        raise BadRecordError(f"too long for {sequence_length} tokens", detail)
    return encoded


def encode_pairs(
    pairs: Iterable[Pair], tokenizer: Tokenizer, template: ChatTemplate | None, sequence_length: int
) -> tuple[dict[str, list[EncodedPair]], Tally]:
    """The pairs of each source as tokens, and a count of those that are left out; see `pair_rows.encode_all`."""
    return pair_rows.encode_all(pairs, lambda pair: encode_pair(pair, tokenizer, template, sequence_length))


def row(pairs: Sequence[EncodedPair], length: int, places: int) -> DpoBatch:
    """One row of pairs, then padding: a `DpoBatch` without its first axis."""
    tokens = sft.row([response for pair in pairs for response in (pair.chosen, pair.rejected)], length)
    weights, strengths = np.zeros(places, np.float32), np.zeros(places, np.int32)
    references = np.zeros((places, 2), np.float32)
    for index, pair in enumerate(pairs):
        weights[index], strengths[index], references[index] = 1.0, pair.strength, pair.references
    return DpoBatch(*tokens, weights, strengths, references)


def packed(pairs: Encoded, config: PairDataConfig) -> PackedPairs[EncodedPair, DpoBatch]:
    """The batches of a run; see `pair_rows.PackedPairs`."""
    return PackedPairs(pairs, config, row)


def heldout_batches(
    pairs: Sequence[EncodedPair], config: PairDataConfig, process_index: int = 0, process_count: int = 1
) -> Iterator[DpoBatch]:
    """This process's rows of batches with every pair once; see `pair_rows.heldout_batches`."""
    return pair_rows.heldout_batches(pairs, config, row, process_index, process_count)


def response_logprobs(params: Any, model: ModelConfig, batch: Any, chunk_size: int) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each response after its prompt, and its number of tokens, both float32 [B,P,2]."""
    logprobs_BT = logprobs_function(model, chunk_size=chunk_size)(params, batch).logprobs_BT
    return _of_responses(logprobs_BT, batch), _of_responses(batch.loss_weights, batch)


def _of_responses(values_BT: jax.Array, batch: Any) -> jax.Array:
    """The sum of each response's values, [B,P,2]; added up as they are, for a matrix product would round them."""
    B, P = batch.weights.shape
    is_of_BTR = batch.segment_ids[..., None] == jnp.arange(1, 2 * P + 1)
    return jnp.sum(jnp.where(is_of_BTR, values_BT[..., None], 0.0), axis=1).reshape(B, P, 2)


def loss_function(model: ModelConfig, config: DpoLossConfig, chunk_size: int) -> LossFunction:
    """`loss_fn(params, batch, key)` of a `DpoBatch`; see `losses.preference.dpo_loss`. The key is not used."""

    def loss_fn(params: Any, batch: Any, key: jax.Array) -> LossOutput:
        return _loss(response_logprobs(params, model, batch, chunk_size), batch, batch.weights, config)

    return loss_fn


def _loss(
    responses: tuple[jax.Array, jax.Array], batch: Any, weights_BP: jax.Array, config: DpoLossConfig
) -> LossOutput:
    logprobs_BP2, lengths_BP2 = responses
    return dpo_loss(
        logprobs_BP2,
        batch.references,
        lengths_BP2,
        weights_BP,
        kind=config.kind,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )


def heldout_losses(
    params: Any,
    model: ModelConfig,
    heldout: Encoded,
    data: PairDataConfig,
    loss: DpoLossConfig,
    chunk_size: int,
    mesh: Mesh,
) -> dict[str, float]:
    """Loss and metrics over all held-out pairs, and loss and accuracy by source and strength; {} without pairs."""
    score = _compiled_losses(model, loss, chunk_size)
    sums: dict[str, LossOutput] = {}

    def add(name: str, output: LossOutput) -> None:
        exact = jax.tree.map(np.float64, output)
        sums[name] = jax.tree.map(np.add, sums[name], exact) if name in sums else exact

    with jax.set_mesh(mesh):
        for source, pairs in heldout.items():
            for batch in heldout_batches(pairs, data, jax.process_index(), jax.process_count()):
                whole, by_strength_S = jax.device_get(shares.settled(score(params, place(batch, mesh))))
                add("", whole)
                add(f"/{source}", whole)
                for index in range(MOST_STEPS):
                    add(f"/strength_{index + 1}", jax.tree.map(lambda x_S, i=index: x_S[i], by_strength_S))
    found = {name: output for name, output in sums.items() if output.weight}
    values = {f"loss{name}": float(output.total / output.weight) for name, output in found.items()}
    for name, output in found.items():
        kept = output.metrics if not name else {"accuracy": output.metrics["accuracy"]}
        values |= {f"{metric}{name}": float(value.total / value.weight) for metric, value in kept.items()}
    return values


@functools.lru_cache
def _compiled_losses(
    model: ModelConfig, config: DpoLossConfig, chunk_size: int
) -> Callable[[Any, Any], tuple[LossOutput, LossOutput]]:
    """Of all pairs of a batch, and [S] of those of each strength; compiled once for all evaluations."""

    @jax.jit
    def losses(params: Any, batch: Any) -> tuple[LossOutput, LossOutput]:
        responses = response_logprobs(params, model, batch, chunk_size)

        def of_strength(strength: jax.Array) -> LossOutput:
            return _loss(responses, batch, batch.weights * (batch.strengths == strength), config)

        strengths_S = jnp.arange(1, MOST_STEPS + 1)
        return _loss(responses, batch, batch.weights, config), jax.vmap(of_strength)(strengths_S)

    return losses


def reference_logprobs(
    params: Any, model: ModelConfig, pairs: Sequence[EncodedPair], data: PairDataConfig, chunk_size: int, mesh: Mesh
) -> np.ndarray:
    """The log-probabilities that a model gives to both responses of each pair, float32 [N,2], with a progress bar."""
    whole = NamedSharding(mesh, PartitionSpec())
    score = jax.jit(lambda params, batch: response_logprobs(params, model, batch, chunk_size)[0], out_shardings=whole)
    rows = SharedRows([p.length for p in pairs], "references", data.sequence_length, seed=0, padded=not data.packed)
    own = shares.own_rows(np.arange(data.batch_size), mesh)
    references_N2 = np.full((len(pairs), 2), np.nan, np.float32)
    starts = range(0, rows.windows, data.batch_size)
    console = Console(stderr=True, quiet=not distributed.is_first())
    console.print(f"log-probabilities of {len(pairs):,} pairs by the reference", highlight=False)
    shown = track(starts, "reference", console=console)
    with jax.set_mesh(mesh):
        for start in shown:
            items = [rows[i] if i < rows.windows else [] for i in range(start, start + data.batch_size)]
            made = [row([pairs[i] for i in item], data.sequence_length, rows.most) for item in (items[i] for i in own)]
            found_BP2 = np.asarray(score(params, place(pair_rows.stack(made), mesh)))
            for found_P2, item in zip(found_BP2, items):
                references_N2[item] = found_P2[: len(item)]
    return references_N2


def with_references(
    workdir: Path,
    params: Any,
    model: ModelConfig,
    pairs: Sequence[Encoded],
    data: PairDataConfig,
    chunk_size: int,
    mesh: Mesh,
) -> list[dict[str, list[EncodedPair]]]:
    """Sets of pairs with the log-probabilities of the reference, which `workdir` keeps for a run that is continued.

    Raises `UserError` where it keeps those of another model or of other pairs.
    """
    every = [pair for one_set in pairs for several in one_set.values() for pair in several]
    identity = finetune.fingerprint([weight_sums(params), model.compute_dtype, every])
    references_N2 = _read_references(workdir / REFERENCES, identity)
    if references_N2 is None:
        references_N2 = reference_logprobs(params, model, every, data, chunk_size, mesh)
        if distributed.is_first():
            _write_references(workdir / REFERENCES, identity, references_N2)
        distributed.wait_for_all("dpo_references")
    known = iter(references_N2)
    return [
        {source: [pair._replace(references=next(known)) for pair in several] for source, several in one_set.items()}
        for one_set in pairs
    ]


@jax.jit
def weight_sums(params: Any) -> Any:
    """What tells parameters from others: of each array, the sums of its bits as numbers and of their squares.

    Both are of integers modulo 2^32, so they do not depend on the mesh, and no array leaves its device.
    """

    def sums(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        kind = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        bits = (jax.lax.bitcast_convert_type(x, kind) if is_float else x).astype(jnp.uint32)
        return jnp.sum(bits), jnp.sum(bits * bits)

    return jax.tree.map(sums, params)


def _read_references(path: Path, identity: str) -> np.ndarray | None:
    """What `_write_references` kept; None where there is nothing."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            found, references_N2 = str(kept["identity"]), np.asarray(kept["references"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and it is computed again") from None
    require(
        found == identity,
        f"{path} holds the log-probabilities of another reference model, or of other pairs: choose a new --workdir",
    )
    return references_N2


def _write_references(path: Path, identity: str, references_N2: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, identity=np.array(identity), references=references_N2)
