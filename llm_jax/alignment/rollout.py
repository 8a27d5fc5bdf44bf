"""Rollouts: the responses that a policy draws to prompts, with what an update has to know of each draw.

The weights are laid out for generation once and freed when all is drawn: gathered over the data axes of the mesh, which
in training hold a part of every matrix each, so that no step of the loop has to (LLaMA-2, section 3.4.1, found
generation about 20 times slower without). Each process draws for its own prompts on its own devices and waits for no
other one.

The rows that are drawn at once may be fewer than there are to draw. Then the next prompts take over those that are
done, and no response depends on it: its random numbers follow from (seed, stream, sample, place in the response).

B rows (responses), T tokens of a row, R rows drawn at once, F rows taken over, P prompt length, N columns.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax import models
from llm_jax.alignment.policy_config import RolloutConfig
from llm_jax.alignment.prompts import Prompt
from llm_jax.alignment.rewards import Response
from llm_jax.config import ModelConfig
from llm_jax.data.batch import Batch
from llm_jax.errors import require
from llm_jax.parallel import distributed, shares
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.parallel.rules import RULES
from llm_jax.parallel.zero import GATHERED
from llm_jax.sampling import steps
from llm_jax.sampling.generate import check_prompts, check_streams
from llm_jax.tokenization.chat import ChatTemplate
from llm_jax.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

REFILLED_SHARE = 4  # of the rows, one in so many is done before others take them over
DATA_AXES = frozenset(axis for name in GATHERED for axis in RULES[name])


class Rollouts(NamedTuple):
    """Prompts with one response each, padded on the right; numpy arrays of this process's rows.

    As in `Batch`, place t is about the target: logprobs_BT[t] = log p(targets[t] | tokens[..t]), of the logits over the
    temperature and of the whole vocabulary. `batch.loss_weights` is 1 where the target is a token of the response, its
    end token included, and everything else is 0 elsewhere.
    """

    batch: Batch
    logprobs_BT: np.ndarray  # float32
    kept_mass_BT: np.ndarray  # float32, the probability of all tokens that top-p left; 1 without it
    ended_B: np.ndarray  # bool, False = cut off before an end token
    lengths_B: np.ndarray  # int32, tokens of the response
    prompt_B: np.ndarray  # int32, the index of each row's prompt; the samples of one lie together

    def response_tokens(self, row: int) -> list[int]:
        """The tokens of a response, its end token included."""
        found: list[int] = self.batch.targets[row][self.batch.loss_weights[row] > 0].tolist()
        return found

    def kept_mass(self) -> tuple[float, float]:
        """(mean, smallest) over the tokens of all responses."""
        kept = self.kept_mass_BT[self.batch.loss_weights > 0]
        return float(kept.mean()), float(kept.min())


def roll(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Prompt],
    settings: RolloutConfig,
    *,
    stop_ids: Sequence[int],
    streams: Sequence[int] | np.ndarray | None = None,
    pad_id: int = 0,
) -> Rollouts:
    """Draw `settings.sampling.num_samples` responses to every prompt.

    Args:
        params: the policy's, as they are trained, or as `generation_layout` gives them for several calls.
        config: the policy.
        prompts: this process's; their tokens are read.
        settings: how to draw, and the length T of the rows.
        stop_ids: a response ends with the first of them; see `prompts.stop_ids`.
        streams: a number for each prompt, different in every iteration and process (`PromptStream.streams`), which
            chooses its random numbers; by default its index.
        pad_id: what padding is filled with; no result depends on it.

    Returns:
        The responses to the first prompt, then to the second, and so on.

    Raises:
        UserError: a prompt is empty or longer than `settings.max_prompt_tokens`, or what `generate` refuses.
    """
    check(prompts, config, settings)
    given = check_streams(range(len(prompts)) if streams is None else streams, len(prompts))
    with contextlib.ExitStack() as stack:
        if models.is_stacked(params):
            config, params = stack.enter_context(generation_layout(params, config))
        mesh = _mesh_of(params)
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        before = steps.programs()
        drawing = _Drawing(params, config, prompts, settings, stop_ids, given, pad_id, _rows_of_data(mesh))
        rollouts = drawing.run()
        if steps.programs() != before:
            logger.info("rollouts: compiled for %s", drawing)
        return rollouts


@contextlib.contextmanager
def generation_layout(params: Any, config: ModelConfig) -> Iterator[tuple[ModelConfig, Any]]:
    """The configuration and parameters with which to draw, freed at the end; those given stay.

    They are whole on every device but for the tensor axis, in the compute dtype where that changes no result, on the
    devices of this process alone, and laid out by `models.for_decoding`.

    Args:
        params: as they are trained; adapters have to be merged.
        config: theirs.
    """
    given = {id(leaf) for leaf in jax.tree.leaves(params)}
    config, gathered = _gathered(params, config)
    ours = given.isdisjoint(id(leaf) for leaf in jax.tree.leaves(gathered))
    mesh = _mesh_of(gathered)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():  # its devices may not be the caller's
        config, laid_out = models.for_decoding(gathered, config, donate=ours)
    del gathered
    try:
        yield config, laid_out
    finally:
        for leaf in jax.tree.leaves(laid_out):
            if id(leaf) not in given:
                leaf.delete()


def _gathered(params: Any, config: ModelConfig) -> tuple[ModelConfig, Any]:
    """The parameters in the dtype and where generation wants them, in the layout of training."""
    dtype, mesh = config.compute_dtype, _mesh_of(params)
    # Where the head or the last norm is computed from what is stored, that is done in the stored precision.
    computed = config.norm_head or config.mup_base_width or config.quantization != "none"
    if config.param_dtype != dtype and not computed:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        config = dataclasses.replace(config, param_dtype=dtype)
    if mesh is not None and mesh.size > 1:
        whole = jax.tree.map(lambda leaf: NamedSharding(mesh, _without_data(leaf.sharding.spec)), params)
        # With its outputs' layout given, this copies what is laid out so already, and nothing given is freed later.
        params = jax.tree.map(_on_this_process, jax.jit(lambda tree: tree, out_shardings=whole)(params))
    return config, params


def _without_data(spec: PartitionSpec) -> PartitionSpec:
    """The layout without the axes over which parameters are gathered to be used."""

    def kept(entry: Any) -> Any:
        names = entry if isinstance(entry, tuple) else (entry,)
        return tuple(name for name in names if name is not None and name not in DATA_AXES) or None

    return PartitionSpec(*map(kept, spec))


def _on_this_process(array: jax.Array) -> jax.Array:
    """The same array on the devices of this process alone, which hold all of it; nothing is copied."""
    if array.is_fully_addressable:
        return array
    assert isinstance(array.sharding, NamedSharding) and isinstance(array.sharding.mesh, Mesh)
    local = NamedSharding(mesh_lib.of_this_process(array.sharding.mesh), array.sharding.spec)
    parts = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, local, parts)


def _mesh_of(params: Any) -> Mesh | None:
    found: Mesh | None = getattr(jax.tree.leaves(params)[0].sharding, "mesh", None)
    return found


def _rows_of_data(mesh: Mesh | None) -> int:
    """Over how many devices the rows are divided."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def check(prompts: Sequence[Prompt], config: ModelConfig, settings: RolloutConfig) -> None:
    """Raise `UserError` where there are no prompts, or one of them cannot be answered."""
    require(len(prompts) > 0, "rollouts: there are no prompts")
    names = [f"prompt {i} ({prompt.record})" if prompt.record else f"prompt {i}" for i, prompt in enumerate(prompts)]
    for prompt, where in zip(prompts, names):
        size, most = len(prompt.tokens), settings.max_prompt_tokens
        require(size > 0, f"{where} has no tokens: nothing comes before its response")
        require(
            size <= most,
            f"{where} has {size:,} tokens, more than RolloutConfig.max_prompt_tokens={most:,}: raise it",
        )
    check_prompts([prompt.tokens for prompt in prompts], config, settings.sampling, names)


class _Drawing:
    """All responses of one call: which rows the device draws, and what of them is written where."""

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        prompts: Sequence[Prompt],
        settings: RolloutConfig,
        stop_ids: Sequence[int],
        streams_Q: np.ndarray,
        pad_id: int,
        data_rows: int,
    ) -> None:
        self._model = (params, config)
        self._prompts = prompts
        self._streams = streams_Q
        self._pad_id = pad_id
        sampling, samples = settings.sampling, settings.sampling.num_samples
        self._most, self._samples, self._stop_ids = sampling.max_new_tokens, samples, frozenset(stop_ids)
        at_once = min(settings.rows // samples or len(prompts), len(prompts))
        self._at_once = _multiple(at_once, data_rows)  # prompts
        self._next = 0  # the first prompt that no row has held
        self._taken_over = min(_multiple(max(1, self._at_once // REFILLED_SHARE), data_rows), self._at_once)  # prompts
        shape, chunks = steps.shape_for(sampling, max(len(prompt.tokens) for prompt in prompts), for_update=True)
        if len(prompts) > self._at_once:  # twice the columns of one response, so that rows are seldom moved back
            shape = shape._replace(new_tokens=steps.bucket(2 * self._most))
        self._shape, self._width = shape, shape.chunk * chunks
        self._draws = steps.Draws.of(sampling, stop_ids)
        self._held_R = np.full(self._at_once * samples, -1)  # which row of the result; -1 = none, or it is written
        self._starts_R = np.zeros(self._at_once * samples, np.int64)  # the column of each one's first token
        self._result = _empty(len(prompts), samples, settings.length, pad_id)

    def __str__(self) -> str:
        return (
            f"{len(self._held_R):,} rows at once, {self._samples} of each prompt, prompts up to {self._width:,}, "
            f"{self._shape.new_tokens:,} columns"
        )

    def run(self) -> Rollouts:
        """Draw everything."""
        rows_R = np.arange(len(self._held_R))
        state = steps.prefill(*self._model, self._shape, self._draws, *self._take(rows_R, self._at_once, 0)[1:])
        nothing_R = np.zeros(len(rows_R), bool)
        while True:
            waiting = self._next < len(self._prompts)
            enough = self._taken_over * self._samples if waiting else len(rows_R)
            limit = jnp.int32(self._shape.new_tokens)
            state = steps.decode(*self._model, self._draws, state, nothing_R, limit, jnp.int32(enough))
            step, free_R = self._write(state)
            if not waiting and (self._held_R < 0).all():
                return self._result
            if waiting and len(free_R) >= enough:
                taken = self._take(free_R[:enough], self._taken_over, step - 1)
                state = steps.refill(*self._model, self._shape, self._draws, state, *taken)
            if step == self._shape.new_tokens:
                state = self._compact(state, step)

    def _take(self, rows_F: np.ndarray, count: int, column: int) -> tuple[np.ndarray, ...]:
        """Give rows to the samples of at most the next `count` prompts: what `steps.refill` wants to know of these."""
        first, stop = self._next, min(self._next + count, len(self._prompts))
        self._next = stop
        used = (stop - first) * self._samples
        self._held_R[rows_F[:used]] = np.arange(first * self._samples, stop * self._samples)
        self._starts_R[rows_F[:used]] = column
        places_F = np.where(np.arange(len(rows_F)) < used, rows_F, len(self._held_R)).astype(np.int32)
        streams = np.pad(self._streams[first:stop], (0, count - (stop - first)))
        tokens = [prompt.tokens for prompt in self._prompts[first:stop]]
        return places_F, streams, *steps.pad_left(tokens, self._pad_id, count, self._width)

    def _write(self, state: steps.State) -> tuple[int, np.ndarray]:
        """Write what is done into the result; how many columns are drawn, and which rows are free."""
        fields = (state.step, state.done_R, state.drawn_R, state.tokens_RN, state.logprobs_RN, state.kept_mass_RN)
        step, done_R, drawn_R, tokens_RN, logprobs_RN, kept_mass_RN = jax.device_get(fields)
        for row in np.flatnonzero(done_R & (self._held_R >= 0)):
            columns = slice(self._starts_R[row], self._starts_R[row] + drawn_R[row])
            noted = (array[row, columns] for array in (tokens_RN, logprobs_RN, kept_mass_RN))
            self._write_row(self._held_R[row], *noted)
        self._held_R[done_R] = -1
        return int(step), np.flatnonzero(done_R)

    def _write_row(self, row: int, tokens: np.ndarray, logprobs: np.ndarray, kept_mass: np.ndarray) -> None:
        result = self._result
        prompt = self._prompts[row // self._samples].tokens
        start, end = len(prompt), len(prompt) + len(tokens)
        result.batch.tokens[row, :start] = prompt
        result.batch.tokens[row, start:end] = tokens
        result.batch.targets[row, : end - 1] = result.batch.tokens[row, 1:end]
        result.batch.segment_ids[row, :end] = 1
        result.batch.positions[row, :end] = np.arange(end)
        drawn = slice(start - 1, end - 1)
        result.batch.loss_weights[row, drawn] = 1
        result.logprobs_BT[row, drawn] = logprobs
        result.kept_mass_BT[row, drawn] = kept_mass
        result.lengths_B[row] = len(tokens)
        result.ended_B[row] = int(tokens[-1]) in self._stop_ids

    def _compact(self, state: steps.State, step: int) -> steps.State:
        held_R = self._held_R >= 0
        shift = int(self._starts_R[held_R].min(initial=step - 1))
        self._starts_R -= shift
        return steps.compact(state, jnp.int32(shift))


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _empty(prompts: int, samples: int, length: int, pad_id: int) -> Rollouts:
    shape = (prompts * samples, length)

    def filled(value: float, dtype: type) -> np.ndarray:
        return np.full(shape, value, dtype)

    return Rollouts(
        Batch(
            tokens=filled(pad_id, np.int32),
            targets=filled(pad_id, np.int32),
            loss_weights=filled(0, np.float32),
            segment_ids=filled(0, np.int32),
            positions=filled(0, np.int32),
        ),
        filled(0, np.float32),
        filled(0, np.float32),
        np.zeros(shape[0], bool),
        np.zeros(shape[0], np.int32),
        np.repeat(np.arange(prompts, dtype=np.int32), samples),
    )


def responses(
    rollouts: Rollouts, prompts: Sequence[Prompt], tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[Response]:
    """What rewards read of each row: its text without end tokens, whether it ended, and its tokens.

    Args:
        rollouts: as from `roll`.
        prompts: those that were given to it.
        tokenizer: of the policy.
        template: as in `prompts.load`; None = plain text.
    """
    found = []
    for row, index in enumerate(rollouts.prompt_B):
        ids = rollouts.response_tokens(row)
        text = (
            template.reply_text(ids) if template is not None else _continuation(prompts[index].tokens, ids, tokenizer)
        )
        found.append(Response(text, bool(rollouts.ended_B[row]), len(ids)))
    return found


def _continuation(prompt: Sequence[int], ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Decoded behind the prompt: alone, a continuation could lose its first space."""
    known = [token for token in ids if token < tokenizer.vocab_size and token != tokenizer.eos_id]
    return tokenizer.decode_bytes([*prompt, *known])[len(tokenizer.decode_bytes([*prompt])) :].decode(errors="replace")


def check_logprobs(rollouts: Rollouts, logprobs_BT: np.ndarray, *, tolerance: float = math.inf) -> float:
    """The largest difference between the logprobs of the draws and those that the trainer computes of the same tokens.

    All processes of a job call it together, each with its own, and get the same.

    Args:
        rollouts: as from `roll`.
        logprobs_BT: of `rollouts.batch`, from the parameters that drew it.
        tolerance: what is allowed.

    Raises:
        UserError: a difference is above `tolerance` or no number: the policy that is updated is not the one that drew.
    """
    drawn_BT = rollouts.batch.loss_weights > 0
    differences_BT = np.where(drawn_BT, np.abs(np.asarray(logprobs_BT, np.float64) - rollouts.logprobs_BT), 0.0)
    row, place = np.unravel_index(np.argmax(differences_BT), differences_BT.shape)  # of a NaN, if there is one
    largest = float(differences_BT[row, place])
    problem = (
        ""
        if largest <= tolerance
        else (
            f"rollouts: at row {row}, place {place} the logprob was {rollouts.logprobs_BT[row, place]:.6g} when it was "
            f"drawn, and the trainer computes {np.asarray(logprobs_BT)[row, place]:.6g}: {largest:.2g} apart, where "
            f"{tolerance:.2g} is allowed: if that is rounding, raise logprob_tolerance"
        )
    )
    found = shares.gather([largest, problem])
    for process, (_, problem) in enumerate(found):
        require(not problem, f"{distributed.name_of(process)}: {problem}" if len(found) > 1 else problem)
    return max(largest for largest, _ in found)
