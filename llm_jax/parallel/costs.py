"""What a step of pre-training costs on a cluster, from its configuration alone and in no time: memory, traffic, bounds.

The formulas follow the program: which weights are gathered when (`LayerGroup.gather`), what the backward pass finds
kept and what it computes again (`LayerGroup.remat`), what the tensor axis exchanges. Traffic and FLOPs are exact for
the products and arrays they name, and leave out what is small: norms, scalars, positions. Memory is what is kept, which
is exact, and the largest working set, whose factors (`Working`) were fitted to what XLA's compilers allocate.

Legend: D model, N heads, K kv heads, H head dim, F feed-forward, V vocabulary, T length; b tokens of a microbatch on a
device and those it shares its activations with.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp

from llm_jax.config import LayerGroup, ModelConfig
from llm_jax.errors import require
from llm_jax.parallel import links
from llm_jax.parallel.hardware import Target
from llm_jax.parallel.links import Bounds, Collective
from llm_jax.parallel.zero import LANES
from llm_jax.scaling import flops

DATA = ("replica", "data")
MASTER = 4  # bytes of a master parameter, each of its two moments and its gradient
# Matrix products over pairs of queries and keys that the attention kernels do, forwards and backwards. The model's own
# are 2 and 4: the kernels for the gradients compute the scores, and the gradient of the weights, once each.
ATTENTION_PRODUCTS = 2, 7
HOST_LINK = 25e9  # bytes/s of a device to the memory of its host: PCIe 4.0 with 16 lanes


class Working(NamedTuple):
    """How many arrays are in memory at once in the fullest moments of a step: see `working_bytes`.

    With collectives under compute (`parallel.overlap`), weights are there earlier and gradients longer.
    """

    wide: float = 7.5  # [b, D] in a layer's backward pass
    wide_again: float = 1.0  # and where its attention is computed once more
    feed_forward: float = 3.0  # [b, F]
    heads: float = 1.0  # [b, N H]
    gathered_ahead: float = 1.0  # [b, D]: of another layer, along the tensor axis
    weights: Mapping[str, float] = MappingProxyType({"layer": 1.5, "group": 1.0, "step": 0.0})  # of layers
    gradients: Mapping[str, float] = MappingProxyType({"layer": 1.0, "group": 1.0, "step": 3.5})  # float32, of layers
    logits: float = 3.0  # float32, of a chunk
    loss_wide: float = 3.0  # [b, D] in the loss
    head_weights: float = 1.0  # [V, D] in the loss
    loss_gradients: float = 1.0  # float32 [V, D] in the loss
    head_gradients: float = 2.0  # float32 [V, D]: as it was added up, and transposed


# A TPU sums a layer's gradients one after the other. Of the head it has the weights as they were gathered and as they
# are used, and the gradient as it was added up and as rows of tiles (`zero.scattered_sum`).
TPU_WORKING = Working(
    weights=MappingProxyType({"layer": 1.0, "group": 1.0, "step": 0.0}),
    gradients=MappingProxyType({"layer": 0.5, "group": 0.5, "step": 1.0}),
    head_weights=2.0,
    loss_gradients=2.0,
)


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step trains on."""

    rows: int  # sequences of the global batch
    length: int  # tokens of each
    microbatches: int = 1
    chunk_size: int = 256  # tokens of each sequence whose logits exist at once

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.length


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a device holds, computes and exchanges in a step."""

    memory: Mapping[str, float]  # bytes by what they are for, in the fullest moment
    collectives: tuple[Collective, ...]
    flops: float
    bounds: Bounds
    budget: float  # bytes that a plan may fill

    @property
    def bytes(self) -> float:
        """All memory together."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the memory is within the budget."""
        return self.bytes <= self.budget


def estimate(model: ModelConfig, sizes: Mapping[str, int], target: Target, work: Workload) -> Estimate:
    """The costs of a step of `model` on a mesh.

    Args:
      model: with its way of execution: `groups`, `remat`, `gather_tables`.
      sizes: of the mesh's axes `replica`, `data` and `tensor`, which multiply to the target's devices.
      target: what it runs on.
      work: the batch.

    Raises `UserError` where the batch does not divide over the mesh.
    """
    shares = sizes["replica"] * sizes["data"]
    require(
        work.rows % (shares * work.microbatches) == 0,
        f"a batch of {work.rows} sequences does not divide into {work.microbatches} microbatches over {shares} "
        f"data-parallel devices; choose a multiple of {shares * work.microbatches}",
    )
    plan = _Plan(model, dict(sizes), target, work)
    collectives = tuple(collective for collective in plan.collectives() if collective.members > 1)
    spent = plan.flops()
    useful = flops.training_flops_per_token(model, work.length) * work.tokens / target.devices
    bounds = links.bounds(collectives, spent, useful, target)
    return Estimate(
        memory={name: size for name, size in plan.memory().items() if size},
        collectives=collectives,
        flops=spent,
        bounds=dataclasses.replace(bounds, collectives=bounds.collectives + plan.offload_seconds()),
        budget=target.hardware.usable * target.hardware.memory,
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One way to run a step; sizes of arrays are of one device."""

    model: ModelConfig
    sizes: Mapping[str, int]
    target: Target
    work: Workload

    @property
    def tensor(self) -> int:
        return self.sizes["tensor"]

    @property
    def is_torus(self) -> bool:
        return self.target.hardware.torus_axes > 0

    @property
    def working(self) -> Working:
        return TPU_WORKING if self.is_torus else Working()

    @property
    def shares(self) -> int:
        """Over how many devices the batch is divided."""
        return self.sizes["replica"] * self.sizes["data"]

    @property
    def tokens(self) -> int:
        """b: of a microbatch, of the devices along `tensor` together."""
        return self.work.tokens // (self.shares * self.work.microbatches)

    @property
    def compute(self) -> int:
        """Bytes of a number that is computed with."""
        return jnp.dtype(self.model.compute_dtype).itemsize

    @property
    def layer_weights(self) -> float:
        """Parameters of a layer that a device computes with."""
        non_embedding = flops.count(self.model).non_embedding - self.model.hidden_size
        return non_embedding / self.model.num_layers / self.tensor

    @property
    def table(self) -> float:
        """Parameters of the embedding, or of the head, that a device computes with."""
        return self.model.vocab_size * self.model.hidden_size / self.tensor

    def memory(self) -> dict[str, float]:
        """Bytes by what they are for."""
        parameters = flops.count(self.model).total / self.target.devices
        kept = self.waiting_bytes(offload=False)
        moments = self.working_bytes(kept)
        fullest = max(moments, key=lambda name: moments[name])
        return {
            "parameters": MASTER * parameters,
            "moments of the optimiser": 2 * MASTER * parameters,
            "gradients": MASTER * parameters * (2 if self.work.microbatches > 1 else 1),
            "batch": 5 * 4 * self.work.tokens / self.shares,
            "weights gathered for the step": self.early_bytes(),
            "activations kept for the backward pass": kept,
            f"working memory of {fullest}": moments[fullest],
        }

    def early_bytes(self) -> float:
        """Of the weights that are whole, or whole within a group of hosts, during all of a step."""
        parts = [(group.gather, group.layers * self.layer_weights) for group in self.model.layer_groups()]
        tables = 1 if self.model.norm_head or self.model.tie_embeddings else 2  # a NormHead's is gathered where used
        parts.append((self.model.gather_tables, tables * self.table))
        divided = {"layer": 0.0, "step": 1.0, "group": 1.0 / self.sizes["data"]}
        return sum(self.compute * weights * divided[gather] for gather, weights in parts)

    def waiting_bytes(self, *, offload: bool) -> float:
        """Of all activations that wait for the backward pass in the host's memory, or in the device's."""
        groups = self.model.layer_groups()
        return sum(group.layers * self.kept_bytes(group) for group in groups if group.offload is offload)

    def offload_seconds(self) -> float:
        """Of activations on their way to the host's memory and back, which nothing is taken to hide."""
        return 2 * self.work.microbatches * self.waiting_bytes(offload=True) / HOST_LINK

    def kept_bytes(self, group: LayerGroup) -> float:
        """Of one layer's activations that wait for the backward pass.

        The residual stream is divided over `tensor` along the sequence, heads and feed-forward are over it by nature;
        what a norm gives to them is whole on each.
        """
        model, t, c = self.model, self.tensor, self.compute
        D, F = model.hidden_size, model.ffn_size / t
        queries, keys = model.num_heads * model.head_dim / t, model.num_kv_heads * model.head_dim / t
        statistics = 4 * model.num_heads / t  # the log-sum-exp of the attention's scores
        each = {
            "full": c * D / t,
            "save_attention": c * (D / t + queries) + statistics,
            "dots": c * (2 * D / t + 2 * queries + 2 * keys + 2 * F) + statistics,
            # Norms keep their input and its normalised form in float32, and their output.
            "none": 4 * MASTER * D / t + c * (2 * D / t + 2 * D + 2 * queries + 2 * keys + 3 * F) + statistics,
        }
        return self.tokens * each[group.remat]

    def working_bytes(self, kept: float) -> dict[str, float]:
        """Beside `kept` activations, in the moments that may be the fullest: the head's gradient outlives those."""
        model, t, c, working = self.model, self.tensor, self.compute, self.working
        gathers = [group.gather for group in model.layer_groups()]
        weights = max(MASTER * working.gradients[when] + c * working.weights[when] for when in gathers)
        again = any(group.remat == "full" for group in model.layer_groups())
        widths = (working.wide + working.wide_again * again + working.gathered_ahead * (t > 1)) * model.hidden_size
        widths += (working.feed_forward * model.ffn_size + working.heads * model.num_heads * model.head_dim) / t
        rows = self.tokens / self.work.length * min(self.work.chunk_size, self.work.length)
        chunks = working.logits * 4 * rows * model.vocab_size / t
        chunks += working.loss_wide * c * self.tokens * model.hidden_size
        head = MASTER * self.table  # the head's gradient, which waits to be summed
        layer = weights * self.layer_weights + c * self.tokens * widths + head
        moments = {
            "a layer's backward pass": layer,
            "the loss": working.loss_gradients * head + working.head_weights * c * self.table + chunks,
            "the head's gradient": working.head_gradients * head + c * self.table + chunks - kept,
        }
        if self.is_torus:
            moments["the weights' new layout"] = c * self.largest_stack() + head
            embedded = self.embedding_gradient()
            moments["the embedding's gradient"] = layer + embedded * (embedded > kept)
        return moments

    def embedding_gradient(self) -> float:
        """Bytes of all tokens' gradients for a device's features of the embedding, in rows of whole lanes on a TPU.

        They take the place of the activations, which are gone by then, if they fit there.
        """
        features = self.model.hidden_size / self.shares
        return MASTER * self.tokens * self.shares * max(LANES, features)

    def largest_stack(self) -> float:
        """Parameters of the largest matrix of all layers whose weights are gathered before the first of them.

        libtpu gathers with the divided axis outermost, and then copies one stack after the other into the layout of
        the loop over layers. Room for activations and for the head's gradient is taken before that.
        """
        model = self.model
        matrix = model.hidden_size * max(model.ffn_size, model.num_heads * model.head_dim) / self.tensor
        return max(group.layers * matrix * (group.gather == "step") for group in model.layer_groups())

    def flops(self) -> float:
        """Of all matrix products, those that are computed twice too."""
        forward = flops.forward_flops(self.model, self.work.length)
        attention = forward.scores / 2
        first, back = ATTENTION_PRODUCTS
        total = 3 * (forward.projections + forward.feed_forward + forward.head) + (first + back) * attention
        again = {
            # XLA leaves out what only the layer's output needs: the last of the three matrices of the feed-forward.
            "save_attention": forward.projections + forward.feed_forward * 2 / 3,
            "full": forward.projections + forward.feed_forward * 2 / 3 + first * attention,
            "dots": 0.0,
            "none": 0.0,
        }
        layers = self.model.num_layers
        total += sum(group.layers / layers * again[group.remat] for group in self.model.layer_groups())
        return total * self.work.tokens / self.target.devices

    def collectives(self) -> Iterator[Collective]:
        """All of a step."""
        for group in self.model.layer_groups():
            yield from self.layer_collectives(group)
            yield from self.tensor_collectives(group)
        yield from self.table_collectives()

    def layer_collectives(self, group: LayerGroup) -> Iterator[Collective]:
        """Of a group's weights and their gradients."""
        times, uses = group.layers * self.work.microbatches, 2.0
        if group.remat in ("full", "save_attention"):  # all but the last matrix of the layer are used once more
            uses += 1 - self.model.ffn_size * self.model.hidden_size / self.tensor / self.layer_weights
        yield from self.gathers(group.gather, self.layer_weights, group.layers, times * uses, "layers' weights")
        yield self.over(DATA, "reduce-scatter", MASTER * self.layer_weights, times, "layers' gradients")

    def table_collectives(self) -> Iterator[Collective]:
        """Of the embedding and the head."""
        model, count = self.model, self.work.microbatches
        yield from self.gathers(model.gather_tables, self.table, 1, count, "embedding")
        if not (model.tie_embeddings and model.gather_tables == "step"):
            yield from self.gathers("layer" if model.norm_head else model.gather_tables, self.table, 1, count, "head")
        yield self.over(DATA, "reduce-scatter", MASTER * self.table, count, "head's gradient")
        # The gradients of the embedded tokens go to the devices that have their features of the table.
        stream = self.compute * self.tokens * model.hidden_size
        yield self.over(DATA, "all-to-all", stream, count, "embedding's gradient")
        yield self.over(("tensor",), "all-gather", stream, count, "embedding's gradient")
        yield self.over(("tensor",), "all-gather", self.compute * self.table * self.tensor, count, "embedding")
        yield self.over(("tensor",), "all-gather", stream, count, "hidden states of the loss")
        wide = MASTER * self.tokens * model.hidden_size
        yield self.over(("tensor",), "all-reduce", wide, count, "gradients of the loss's hidden states")

    def gathers(self, when: str, weights: float, once: float, uses: float, what: str) -> Iterator[Collective]:
        """How weights become whole: before the step, where they are used, or half and half (`LayerGroup.gather`)."""
        whole = self.compute * weights
        if when == "group":
            yield self.over(("replica",), "all-gather", whole / self.sizes["data"], once, what)
            yield self.over(("data",), "all-gather", whole, uses, what)
        else:
            yield self.over(DATA, "all-gather", whole, once if when == "step" else uses, what)

    def tensor_collectives(self, group: LayerGroup) -> Iterator[Collective]:
        """Of activations, around each tensor-parallel region: gathered before it, summed and divided after it."""
        stream = self.compute * self.tokens * self.model.hidden_size
        times = group.layers * self.work.microbatches
        normed = 0 if group.remat == "none" else 2  # what the two norms give is computed again, and gathered
        again = group.remat in ("full", "save_attention")
        yield self.over(("tensor",), "all-gather", stream, times * (4 + normed), "activations")
        yield self.over(("tensor",), "reduce-scatter", stream, times * (4 + again), "activations")

    def over(self, axes: tuple[str, ...], kind: str, size: float, count: float, what: str) -> Collective:
        """A collective of all devices along some axes."""
        members = 1
        for axis in axes:
            members *= self.sizes[axis]
        here = links.in_host(self.sizes, axes, self.target.hardware.host_devices)
        return Collective(kind, tuple(axis for axis in axes if self.sizes[axis] > 1), size, members, here, count, what)
