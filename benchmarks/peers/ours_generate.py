"""This library's `generate`: float32 weights, or rounded ones (int8, int4), or float32 ones with an int8 cache."""

import sys

import jax
import numpy as np

from benchmarks.peers.serve import serve
from benchmarks.peers.shapes import GENERATIONS, Generation
from llm_jax import models
from llm_jax.config import ModelConfig, SamplingConfig
from llm_jax.host_memory import keep_freed_memory
from llm_jax.sampling.generate import generate


def model_config(shape: Generation) -> ModelConfig:
    """The model of a shape."""
    return ModelConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        ffn_size=shape.ffn,
        max_length=shape.prompt + shape.new_tokens,
        tie_embeddings=shape.tied,
    )


def main(name: str, kind: str) -> None:
    """Serve generations of the shape called `name`, set up as experiments.runner sets up an experiment."""
    keep_freed_memory()
    shape = GENERATIONS[name]
    config = model_config(shape)
    params = models.init(config, jax.random.key(0))
    if kind in ("int8", "int4"):
        config, params = models.quantize(params, config, kind)
    config, params = models.for_decoding(params, config)
    cache_dtype = "int8" if kind == "int8_cache" else ""
    sampling = SamplingConfig(max_new_tokens=shape.new_tokens, temperature=0.0, cache_dtype=cache_dtype)
    prompts = np.random.default_rng(0).integers(3, shape.vocabulary, (shape.batch, shape.prompt)).tolist()

    def step() -> float:
        return float(sum(len(row.tokens) for row in generate(params, config, prompts, sampling)))

    serve(step, library=f"jax {jax.__version__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
