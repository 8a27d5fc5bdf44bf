"""A plan for a cluster: what a step costs there, whether it fits, and which other ways to run it are better."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from llm_jax.config import REMAT_POLICIES, LayerGroup, MeshConfig, ModelConfig, TrainConfig
from llm_jax.errors import require
from llm_jax.parallel import costs, links
from llm_jax.parallel.compiled import CompiledStep
from llm_jax.parallel.costs import Estimate, Workload
from llm_jax.parallel.hardware import Target
from llm_jax.parallel.links import Bounds, Collective

MICROBATCHES = (1, 2, 4, 8, 16)
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to run a step, and what it costs."""

    sizes: Mapping[str, int]  # of the mesh's axes
    microbatches: int
    groups: tuple[LayerGroup, ...]
    tables: str  # when embedding and head are gathered
    estimate: Estimate

    def apply(self, config: TrainConfig) -> TrainConfig:
        """The run with this mesh and way of execution."""
        model = dataclasses.replace(config.model, groups=self.groups, gather_tables=self.tables)
        # The data axis takes the devices that there are, which may change during a run (`parallel.elastic`).
        mesh = MeshConfig(replica=self.sizes["replica"], tensor=self.sizes["tensor"])
        return dataclasses.replace(config, model=model, mesh=mesh, microbatches=self.microbatches)

    @property
    def summary(self) -> str:
        """In a line."""
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1) or "one device"
        times = f", {self.microbatches} microbatches" if self.microbatches > 1 else ""
        return f"{mesh}; {describe(self.groups)}{times}"


def describe(groups: Sequence[LayerGroup]) -> str:
    """How layers are executed, in words."""
    return ", ".join(
        f"{group.layers} layers gathered by {group.gather}, remat {group.remat}{', offloaded' * group.offload}"
        for group in groups
    )


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a compiler made of the step."""

    step: CompiledStep
    bounds: Bounds
    bytes: float  # that a device must have free
    arguments: float  # of them, those that are there before the step begins
    lower_seconds: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the page shows."""

    config: TrainConfig
    target: Target
    sizes: Mapping[str, int]
    estimate: Estimate
    alternatives: tuple[Choice, ...]  # the best of those that fit, the best first
    compiled: Reading | None = None
    not_compiled: str = ""  # the reason
    too_large: bool = False  # for the compiler, which refused the step for its memory

    @property
    def bytes(self) -> float:
        """What a device must have free: as the compiler says, if it was asked."""
        return self.compiled.bytes if self.compiled else self.estimate.bytes

    @property
    def bounds(self) -> Bounds:
        """The same of the bounds."""
        return self.compiled.bounds if self.compiled else self.estimate.bounds

    @property
    def fits(self) -> bool:
        """Whether the memory is within the budget, and the compiler has not refused it."""
        return not self.too_large and self.bytes <= self.estimate.budget


def workload(config: TrainConfig) -> Workload:
    """What a step of a run trains on."""
    data = config.data
    return Workload(data.batch_size, data.sequence_length, config.microbatches, config.loss.chunk_size)


def choices(model: ModelConfig, target: Target, work: Workload) -> Iterator[Choice]:
    """Every way to run a step in which all layers are alike, and that divides."""
    for sizes in meshes(model, target):
        # With replicas, the others are what they are on the mesh without.
        gathers = ("group",) if sizes["replica"] > 1 else ("layer", "step")
        for gather, remat in itertools.product(gathers, REMAT_POLICIES):
            yield from ways(model, sizes, target, work, (LayerGroup(model.num_layers, gather, remat),), gather)


def ways(
    model: ModelConfig,
    sizes: Mapping[str, int],
    target: Target,
    work: Workload,
    groups: tuple[LayerGroup, ...],
    tables: str,
) -> Iterator[Choice]:
    """A way to execute the layers, with every number of microbatches that divides the batch."""
    for microbatches in MICROBATCHES:
        if work.rows % (sizes["replica"] * sizes["data"] * microbatches) == 0:
            part = dataclasses.replace(work, microbatches=microbatches)
            yield way(model, sizes, target, part, groups, tables)


def way(
    model: ModelConfig,
    sizes: Mapping[str, int],
    target: Target,
    work: Workload,
    groups: tuple[LayerGroup, ...],
    tables: str,
) -> Choice:
    """A way to execute the layers, with this number of microbatches."""
    executed = dataclasses.replace(model, groups=groups, gather_tables=tables)
    return Choice(sizes, work.microbatches, groups, tables, costs.estimate(executed, sizes, target, work))


def meshes(model: ModelConfig, target: Target) -> Iterator[dict[str, int]]:
    """Meshes over which the model's arrays divide: the tensor axis within a host, groups of one host or several."""
    host = min(target.hardware.host_devices, target.devices)
    for tensor in (size for size in range(1, host + 1) if host % size == 0 and divides(model, size)):
        shares = target.devices // tensor
        if model.hidden_size % shares == 0:
            # A group of devices has at least a host, and two parts of the weights.
            smallest = max(2, host // tensor)
            for data in (size for size in range(smallest, shares) if shares % size == 0):
                yield {"replica": shares // data, "data": data, "tensor": tensor}
            yield {"replica": 1, "data": shares, "tensor": tensor}


def divides(model: ModelConfig, tensor: int) -> bool:
    """Whether the axes that a model divides over the tensor axis are multiples of its size."""
    divided = (model.num_heads, model.num_kv_heads, model.ffn_size, model.vocab_size)
    return all(size % tensor == 0 for size in divided)


def best(found: Sequence[Choice], count: int) -> tuple[Choice, ...]:
    """The best of those that fit: by the seconds with half of the overlap that there may be, then by memory."""

    def order(choice: Choice) -> tuple[float, float]:
        return float(f"{choice.estimate.bounds.halfway:.3g}"), choice.estimate.bytes

    return tuple(sorted((choice for choice in found if choice.estimate.fits), key=order)[:count])


def check_fits(found: Sequence[Choice], target: Target) -> None:
    """Raise `UserError` if there is no way to run the step."""
    require(
        len(found) > 0,
        f"the batch does not divide over any mesh of {target.devices} devices: choose a config.data.batch_size that is "
        "a multiple of the devices, or of a host's part of them",
    )
    least = min(found, key=lambda choice: choice.estimate.bytes)
    require(
        least.estimate.fits,
        f"nothing fits {target.name}: the least that a device needs is {least.estimate.bytes / GB:.1f} GB "
        f"({least.summary}), and {least.estimate.budget / GB:.1f} GB are to be filled; take more devices or a smaller "
        "config.data.batch_size",
    )


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, how fast it may be, and what to change, in sentences."""
    budget, memory = plan.estimate.budget, plan.target.hardware.memory
    serial, overlapped = plan.bounds.utilisation
    whose = "as compiled" if plan.compiled else "estimated"
    fits = "Fits" if plan.fits else "Does not fit"
    refused = ", says the compiler, which refuses the step for its memory" if plan.too_large else ""
    found = [
        f"{fits}{refused}: {plan.bytes / GB:.1f} GB a device, {whose}, of {memory / GB:.0f} "
        f"GB, of which {budget / GB:.0f} GB may be filled.",
        f"At most {serial:.1%} of the peak without overlap of compute and communication, {overlapped:.1%} with all of "
        f"it; it then waits for {plan.bounds.limit}.",
    ]
    better = next((choice for choice in plan.alternatives if _is_better(choice, plan)), None)
    if better is not None:
        serial, overlapped = better.estimate.bounds.utilisation
        found.append(
            f"Change: {better.summary} needs {better.estimate.bytes / GB:.1f} GB and may reach {serial:.1%} and "
            f"{overlapped:.1%} (--choose plans it)."
        )
    elif plan.fits:
        found.append("No other way to run it is better by its estimate.")
    return found


def _is_better(choice: Choice, plan: Plan) -> bool:
    if not plan.fits:
        return choice.estimate.bytes < plan.estimate.bytes
    return choice.estimate.bounds.halfway < 0.99 * plan.estimate.bounds.halfway


def traffic(collectives: Sequence[Collective], target: Target) -> dict[tuple[str, str], tuple[float, float, float]]:
    """For each kind and mesh axes: bytes by links inside hosts, bytes by the network, and seconds alone."""
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    for collective in collectives:
        key = collective.kind, " x ".join(collective.axes)
        fast, slow = links.received(collective)
        if target.hardware.torus_axes:
            fast, slow = fast + slow, 0.0
        taken = max(links.seconds(collective, target))
        new = (collective.count * fast, collective.count * slow, collective.count * taken)
        found[key] = tuple(a + b for a, b in zip(found.get(key, (0.0, 0.0, 0.0)), new))  # type: ignore[assignment]
    return dict(sorted(found.items()))
