"""This library's train step, through the functions that pre-training uses."""

import sys

import jax
import numpy as np

from benchmarks.peers import shapes
from benchmarks.peers.serve import serve
from llm_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from llm_jax.data.batch import Batch
from llm_jax.host_memory import keep_freed_memory
from llm_jax.optim import adamw, schedules
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.training import language_model, loop, state
from llm_jax.training import step as step_lib

OPTIMIZER = OptimizerConfig(
    learning_rate=shapes.LEARNING_RATE,
    schedule="constant",
    warmup_steps=0,
    b1=shapes.BETAS[0],
    b2=shapes.BETAS[1],
    eps=shapes.EPS,
    weight_decay=shapes.WEIGHT_DECAY,
    clip_norm=shapes.CLIP_NORM,
)


def model_config(shape: shapes.Shape) -> ModelConfig:
    """The model of a shape in float32."""
    return ModelConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        ffn_size=shape.ffn,
        max_length=shape.length,
    )


def make_batch(shape: shapes.Shape) -> Batch:
    """Random tokens; every sequence is one document."""
    ids = np.random.default_rng(0).integers(0, shape.vocabulary, (shape.batch, shape.length + 1), np.int32)
    ones = np.ones((shape.batch, shape.length), np.int32)
    positions = ones * np.arange(shape.length, dtype=np.int32)
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)


def main(name: str) -> None:
    """Serve train steps of the shape called `name`, set up as experiments.runner sets up an experiment."""
    keep_freed_memory()
    shape = shapes.ALL[name]
    mesh = mesh_lib.build(MeshConfig(), jax.devices()[:1])
    optimizer = adamw.build(OPTIMIZER, adamw.decay_mask)
    schedule = schedules.learning_rate(OPTIMIZER, 1000)
    loss_fn = language_model.loss_function(model_config(shape), LossConfig())
    update = step_lib.build(loss_fn, optimizer, schedule, seed=0)
    current = state.init_state(model_config(shape), optimizer, mesh, jax.random.key(0))
    batch = loop.place(make_batch(shape), mesh)

    def step() -> float:
        nonlocal current
        with jax.set_mesh(mesh):
            current, metrics = update(current, batch)
        jax.block_until_ready(current)
        return float(metrics["loss"])

    serve(step, library=f"jax {jax.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
