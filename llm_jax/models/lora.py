"""LoRA: a low-rank adapter beside each of a frozen model's matrices (Hu et al., 2021), and QLoRA.

A matrix W [I, O] acts as W + alpha / rank * down @ up (section 4.1; the paper's A and B, transposed), where only
down [I, R] and up [R, O] are trained. The model is an ordinary one whose kernels are wrapped: every function of
`models` takes what `attach` returns. Where the base is quantised (`models.quantize`), this is QLoRA (Dettmers et al.,
2023): its matrices keep their few bits in both passes. Embeddings, norms and biases stay as they are.

Adapters are float32 whatever the model is, as they are what an optimiser updates, and are laid out over a mesh as the
kernels beside them: the rank is never divided. The head is stored as [V, D], so its "down" [V, R] is on the side of the
vocabulary.

qwix's LoRA is not used. It replaces `jax.lax.dot_general` and `jnp.einsum` while a Flax module runs and recognises a
weight by the identity of the array that comes in. Here a weight comes into a product cast, gathered over the mesh, and
inside a rule of differentiation (`models/linear.py`): qwix would either miss it or replace the rules that keep the
gathered copies and the base's gradients away. The tests use it as their oracle.

I input features, O output features (each may be several dimensions), R rank, L layers, V vocabulary, D model.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from llm_jax.config import LoraConfig, ModelConfig
from llm_jax.errors import require
from llm_jax.models import decoder
from llm_jax.models.linear import Adapted, adapter_axes
from llm_jax.models.quantized import is_quantized
from llm_jax.parallel.rules import LogicalAxes

Adapters = dict[str, Any]  # nested as the parameters are, with an `Adapter` in the place of each kernel chosen


@flax.struct.dataclass
class Adapter:
    """The two trained factors of a kernel's change, float32: down [*I, R] and up [R, *O], stacked as the kernels are.

    Or whatever else there is one of for each factor: shapes, logical axes, shardings.
    """

    down: Any
    up: Any


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """A kernel that gets an adapter."""

    path: tuple[str, ...]
    shape: tuple[int, ...]  # of one layer
    axes: LogicalAxes  # likewise
    stack: tuple[int, ...]  # (L,), or () for what there is one of

    @property
    def inputs(self) -> int:
        """How many of the leading dimensions are input features: all but "embed" in what writes the residual stream."""
        return 1 if self.axes[0] == "embed" else len(self.axes) - 1


def init(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Adapters:
    """Fresh adapters, float32, that change nothing: down is normal(0, 1 / sqrt(I)), up is zero (section 4.1).

    The paper leaves the deviation open; with this one, x @ down is as large as x is.

    Raises:
      UserError: the rank is 0 or above a matrix's smaller side, or the model has no matrix of a target's name.
    """
    matrices = _matrices(config, lora)
    keys = jax.random.split(key, len(matrices))

    def adapter(matrix: _Matrix, index: int) -> Adapter:
        inputs, outputs = matrix.shape[: matrix.inputs], matrix.shape[matrix.inputs :]
        down = jax.random.normal(keys[index], (*matrix.stack, *inputs, lora.rank), jnp.float32)
        return Adapter(
            down / math.sqrt(math.prod(inputs)), jnp.zeros((*matrix.stack, lora.rank, *outputs), jnp.float32)
        )

    return _nest(matrices, adapter)


def abstract(config: ModelConfig, lora: LoraConfig) -> Adapters:
    """The adapters' shapes and dtypes (`jax.ShapeDtypeStruct`), allocating nothing. Raises as `init`."""
    return jax.eval_shape(lambda: init(config, lora, jax.random.key(0)))


def logical_axes(config: ModelConfig, lora: LoraConfig) -> Adapters:
    """The logical axes of every factor, in the structure of the adapters. Raises as `init`."""

    def axes(matrix: _Matrix, index: int) -> Adapter:
        del index
        stack = ("layers",) * len(matrix.stack)
        return Adapter(*((*stack, *own) for own in adapter_axes(matrix.axes, matrix.inputs)))

    return _nest(_matrices(config, lora), axes)


def count(config: ModelConfig, lora: LoraConfig) -> int:
    """How many parameters are trained, allocating nothing. Raises as `init`."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config, lora)))


def attach(params: Any, adapters: Adapters, lora: LoraConfig) -> Any:
    """The parameters to compute with: kernels that have an adapter become `Adapted`; nothing is copied or computed.

    Args:
      params: those of the model that stays as it is, float or quantised, with layers on a leading axis.
      adapters: as from `init`. A plain array among them, such as a reward model's head, takes the place of the
        parameter of its name, and so is trained whole.
      lora: the config that the adapters are of.

    Returns:
      What every function of `models` takes with the config of `params`. It is for computing, not for saving, and is
      not laid out for decoding: `merge` first. Differentiate with respect to the adapters: kernels with an adapter, and
      quantised ones, give no gradient.

    Raises:
      UserError: parameters laid out for decoding.
    """
    require(decoder.is_stacked(params), "attach adapters to the parameters before they are laid out for decoding")

    def adapted(kernel: Any, adapter: Adapter) -> Adapted:
        return Adapted(kernel, adapter.down, adapter.up, lora.alpha / lora.rank)

    return _combine(params, adapters, adapted)


def merge(params: Any, adapters: Adapters, lora: LoraConfig) -> Any:
    """The parameters of a plain model that computes the same: kernel + scale * down @ up, in the kernels' dtype.

    It is computed in float32, one layer at a time, where the kernels are. `params` and `adapters` as for `attach`.

    Raises:
      UserError: the model is quantised. Few bits cannot hold what an adapter adds: make it float again with
        `models.dequantize` (what the adapters were trained on), or load the original (a little different) instead.
    """
    message = "adapters are not merged into quantised weights: models.dequantize them first, or take the original's"
    require(not any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))), message)

    def merged(kernel: jax.Array, adapter: Adapter) -> jax.Array:
        return _merged(kernel, adapter, lora.alpha / lora.rank)

    return _combine(params, adapters, merged)


@jax.jit
def _merged(kernel: jax.Array, adapter: Adapter, scale: float) -> jax.Array:
    def one(arrays: tuple[jax.Array, Adapter]) -> jax.Array:
        kernel_IO, factors = arrays
        change_IO = jnp.tensordot(factors.down, factors.up, 1, precision=jax.lax.Precision.HIGHEST)
        return (kernel_IO.astype(jnp.float32) + scale * change_IO).astype(kernel.dtype)

    stacked = adapter.down.ndim + adapter.up.ndim - 2 > kernel.ndim  # both factors have the axis of the layers
    return jax.lax.map(one, (kernel, adapter)) if stacked else one((kernel, adapter))


def _matrices(config: ModelConfig, lora: LoraConfig) -> list[_Matrix]:
    """The kernels that get an adapter, in the order of the parameters."""
    require(lora.rank > 0, "LoraConfig.rank=0 means no adapters: set a rank, such as 8, to train some")
    require(not config.decoding_layout, "adapters are for a model that is not laid out for decoding")
    config = dataclasses.replace(config, quantization="none")
    structure: Any
    flat, structure = jax.tree_util.tree_flatten_with_path(decoder.abstract(config))
    found = []
    for (keys, kernel), axes in zip(flat, structure.flatten_up_to(decoder.logical_axes(config))):
        path, stack = tuple(key.key for key in keys), int(axes[:1] == ("layers",))
        if path[-1] == "kernel" and set(path) & set(lora.targets):
            found.append(_Matrix(path, kernel.shape[stack:], axes[stack:], kernel.shape[:stack]))
    _check(found, lora)
    return found


def _check(matrices: list[_Matrix], lora: LoraConfig) -> None:
    for target in lora.targets:
        require(
            any(target in matrix.path for matrix in matrices),
            f"LoraConfig.targets: this model has no {target!r} of its own (tied embeddings, or a reward model)",
        )
    for matrix in matrices:
        sides = math.prod(matrix.shape[: matrix.inputs]), math.prod(matrix.shape[matrix.inputs :])
        require(
            lora.rank <= min(sides),
            f"LoraConfig.rank={lora.rank} is above the smaller side of {'/'.join(matrix.path)}, "
            f"{sides[0]} x {sides[1]}: choose at most {min(sides)}",
        )


def _nest(matrices: list[_Matrix], make: Callable[[_Matrix, int], Adapter]) -> Adapters:
    """An adapter for each matrix, nested as the parameters are."""
    adapters: Adapters = {}
    for index, matrix in enumerate(matrices):
        node = adapters
        for name in matrix.path[:-1]:
            node = node.setdefault(name, {})
        node[matrix.path[-1]] = make(matrix, index)
    return adapters


def _combine(params: Any, adapters: Any, join: Callable[[Any, Adapter], Any]) -> Any:
    """The parameters with `join(kernel, adapter)` for each kernel that has an adapter; plain arrays replace theirs."""
    if isinstance(adapters, Adapter):
        return join(params, adapters)
    if not isinstance(adapters, dict):
        return adapters
    return {**params, **{name: _combine(params[name], inner, join) for name, inner in adapters.items()}}
