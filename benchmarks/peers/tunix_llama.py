"""Tunix's Llama3 trained in full by its PeftTrainer's jitted train step, with an Optax AdamW."""

import importlib.metadata
import sys
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.sft import peft_trainer

from benchmarks.peers import shapes
from benchmarks.peers.serve import serve


def make_trainer(shape: shapes.Shape) -> peft_trainer.PeftTrainer:
    """A trainer of a model in float32 whose every parameter learns."""
    config = llama.ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocabulary,
        embed_dim=shape.hidden,
        hidden_dim=shape.ffn,
        num_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        num_kv_heads=shape.heads,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    rate, decay, (b1, b2) = shapes.LEARNING_RATE, shapes.WEIGHT_DECAY, shapes.BETAS
    adamw = optax.adamw(rate, b1=b1, b2=b2, eps=shapes.EPS, weight_decay=decay)
    optimizer = optax.chain(optax.clip_by_global_norm(shapes.CLIP_NORM), adamw)
    logs = peft_trainer.MetricsLoggerOptions(log_dir=tempfile.mkdtemp())
    training = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, metrics_logging_options=logs)
    return peft_trainer.PeftTrainer(llama.Llama3(config, rngs=nnx.Rngs(0)), optimizer, training)


def main(name: str) -> None:
    """Serve train steps of the shape called `name`."""
    shape = shapes.SHAPES[name]
    mesh = jax.sharding.Mesh([[jax.devices()[0]]], ("fsdp", "tp"))
    with mesh:
        trainer = make_trainer(shape)
        update, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)
        tokens_BT = jax.random.randint(jax.random.key(0), (shape.batch, shape.length), 0, shape.vocabulary)
        causal = jnp.tril(jnp.ones((shape.length, shape.length), bool))
        inputs = {
            "input_tokens": tokens_BT,
            "input_mask": jnp.ones(tokens_BT.shape, bool),
            "positions": jnp.broadcast_to(jnp.arange(shape.length), tokens_BT.shape),
            "attention_mask": jnp.broadcast_to(causal, (shape.batch, *causal.shape)),
        }

        def step() -> float:
            loss, _, norm = update(inputs)
            jax.block_until_ready(norm)
            return float(loss)

        serve(step, library=f"google-tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
