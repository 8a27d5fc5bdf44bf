"""Write collectives.json: what the train step moves between 8 simulated devices, for every way to gather weights.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.golden.make_collectives

Run it again after a change that is meant to move something else, and read the difference. Everything is float32, since
XLA's CPU compiler widens what is not; it also sums gradients whole where accelerators divide them.
"""

import collections
import dataclasses
import itertools
import json
from pathlib import Path

from llm_jax.config import DataConfig, LayerGroup, MeshConfig, ModelConfig, TrainConfig
from llm_jax.parallel import compiled
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import ahead_of_time

PATH = Path(__file__).parent / "collectives.json"
MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=4, ffn_size=48, max_length=16
)
PLANS = {  # mesh, and how the layers are gathered; each with two microbatches
    "layer 1x8x1": ((1, 8, 1), ("layer",) * 3),
    "layer 2x2x2": ((2, 2, 2), ("layer",) * 3),
    "step 2x4x1": ((2, 4, 1), ("step",) * 3),
    "group 2x4x1": ((2, 4, 1), ("group",) * 3),
    "group 2x2x2": ((2, 2, 2), ("group",) * 3),
    "mixed 2x4x1": ((2, 4, 1), ("step", "group", "layer")),
}


def collectives(name: str) -> dict[str, list[float]]:
    """Of a plan's compiled step: kind and mesh axes -> [how many, bytes of all together]."""
    sizes, gathers = PLANS[name]
    groups = tuple(LayerGroup(len(list(run)), gather, "full") for gather, run in itertools.groupby(gathers))
    model = dataclasses.replace(MODEL, groups=groups, gather_tables=gathers[0])
    data = DataConfig(sequence_length=16, batch_size=16)
    config = TrainConfig(model=model, mesh=MeshConfig(*sizes), microbatches=2, data=data)
    answer = ahead_of_time.compile_on(config, mesh_lib.build(config.mesh))
    step = compiled.read(answer.text, answer.sizes, answer.hosts, visible_keys=8.5)
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for entry in step.collectives:
        total = found[f"{entry.kind} over {', '.join(entry.axes)}"]
        total[0] += entry.count
        total[1] += entry.count * entry.size
    return dict(sorted(found.items()))


if __name__ == "__main__":
    text = ",\n".join(f"  {json.dumps(name)}: {json.dumps(collectives(name))}" for name in PLANS)
    PATH.write_text(f"{{\n{text}\n}}\n")
