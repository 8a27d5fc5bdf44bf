"""Ways to divide weights, gradients and optimiser over a cluster, side by side, by their costs.

ZeRO-1 gathers the weights once a step and keeps them whole; ZeRO-3 gathers each layer where it is used; hybrid does the
first for as many layers as fit and the second for the rest; hierarchical keeps one whole copy in each group of devices.
Each with several sizes of the mesh's tensor axis. Of recomputation, microbatches and groups of devices each has what
serves it best.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from llm_jax.config import REMAT_POLICIES, LayerGroup, ModelConfig, positive
from llm_jax.errors import require
from llm_jax.models import presets
from llm_jax.parallel import hardware, links, plan
from llm_jax.parallel.costs import Workload
from llm_jax.parallel.hardware import Target
from llm_jax.parallel.plan import Choice

GATHERS = {"ZeRO-1": ("step",), "ZeRO-3": ("layer",), "hybrid": ("step", "layer"), "hierarchical": ("group",)}
KINDS = tuple(GATHERS)
PARTS = 8  # of a model's layers, of which a hybrid gathers a whole number once a step


@dataclasses.dataclass(frozen=True)
class PartitioningConfig:
    """What is compared."""

    models: tuple[str, ...] = ("llama2_7b", "baichuan2_13b", "llama2_70b")  # presets
    kind: str = "a800"  # of the devices
    devices: tuple[int, ...] = (64, 256, 1024, 4096)
    tensor: tuple[int, ...] = (1, 8)
    cards: tuple[int, ...] = (8, 1)  # network cards of a host
    batch_tokens: int = 4 * 2**20
    length: int = 4096

    def __post_init__(self) -> None:
        positive(self, "batch_tokens", "length")
        for field in ("models", "devices", "tensor", "cards"):
            require(len(getattr(self, field)) > 0, f"PartitioningConfig.{field} is empty")
        require(
            self.batch_tokens % self.length == 0,
            f"PartitioningConfig.batch_tokens={self.batch_tokens} is no multiple of length={self.length}",
        )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way on one cluster."""

    model: str
    devices: int
    cards: int
    tensor: int
    kind: str
    choice: Choice | None  # None where it does not divide or fit
    reason: str = ""  # why not

    def as_json(self) -> dict[str, Any]:
        """As plain data, with a device's bytes by link."""
        values = {key: value for key, value in vars(self).items() if key != "choice"}
        if self.choice is None:
            return values
        estimate = self.choice.estimate
        moved = [(entry.count, links.received(entry)) for entry in estimate.collectives]
        serial, overlapped = estimate.bounds.utilisation
        return values | {
            "way": self.choice.summary,
            "bytes": estimate.bytes,
            "fast_bytes": sum(count * traffic.fast for count, traffic in moved),
            "slow_bytes": sum(count * traffic.slow for count, traffic in moved),
            "serial": serial,
            "overlapped": overlapped,
        }


def compare(config: PartitioningConfig) -> Iterator[Cell]:
    """Every way on every cluster, for every model."""
    work = Workload(config.batch_tokens // config.length, config.length)
    for name, cards, devices in itertools.product(config.models, config.cards, config.devices):
        model = dataclasses.replace(presets.get(name), compute_dtype="bfloat16")
        target = hardware.target(f"{config.kind}x{devices}", cards)
        for kind, tensor in itertools.product(KINDS, config.tensor):
            found = list(ways(model, target, work, kind, tensor))
            best = plan.best(found, 1)
            least = min((choice.estimate.bytes for choice in found), default=0.0)
            reason = "" if best else f"needs {least / plan.GB:.0f} GB" if found else "does not divide"
            yield Cell(name, devices, cards, tensor, kind, best[0] if best else None, reason)


def ways(model: ModelConfig, target: Target, work: Workload, kind: str, tensor: int) -> Iterator[Choice]:
    """Every way of one kind, with a tensor axis of this size."""
    for sizes in plan.meshes(model, target):
        if sizes["tensor"] == tensor and (sizes["replica"] > 1) == (kind == "hierarchical"):
            for groups in layer_groups(model.num_layers, GATHERS[kind]):
                yield from plan.ways(model, sizes, target, work, groups, groups[0].gather)


def layer_groups(layers: int, gathers: tuple[str, ...]) -> Iterator[tuple[LayerGroup, ...]]:
    """Layers that are alike but for when they are gathered: all at one time, or some at one and the rest at another."""
    for remat in REMAT_POLICIES:
        if len(gathers) == 1:
            yield (LayerGroup(layers, gathers[0], remat),)
            continue
        for part in range(1, PARTS):
            once = layers * part // PARTS
            yield LayerGroup(once, gathers[0], remat), LayerGroup(layers - once, gathers[1], remat)
