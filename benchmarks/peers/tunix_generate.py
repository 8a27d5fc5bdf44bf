"""Tunix's sampler over its Llama3."""

import importlib.metadata
import sys

import jax
import numpy as np
from flax import nnx
from tunix.generate import sampler as sampler_lib
from tunix.models.llama3 import model as llama

from benchmarks.peers.serve import serve
from benchmarks.peers.shapes import GENERATIONS, Generation


class Ids:
    """A tokenizer whose texts are ids with spaces between them."""

    def __init__(self, unused_id: int) -> None:
        self._unused_id = unused_id

    def encode(self, text: str, **_: object) -> list[int]:
        """The ids."""
        return [int(word) for word in text.split()]

    def decode(self, ids: object, **_: object) -> str:
        """Nothing: reading the text is not measured."""
        return ""

    def bos_id(self) -> int | None:
        """An id that no prompt holds."""
        return 1

    def pad_id(self) -> int:
        """An id that no prompt holds."""
        return 0

    def eos_id(self) -> int:
        """What the model never draws."""
        return self._unused_id


def model_config(shape: Generation) -> llama.ModelConfig:
    """The model of a shape."""
    return llama.ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocabulary,
        embed_dim=shape.hidden,
        hidden_dim=shape.ffn,
        num_heads=shape.heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=shape.tied,
    )


def make_sampler(shape: Generation) -> sampler_lib.Sampler:
    """A sampler of a model in float32."""
    length = shape.prompt + shape.new_tokens + 8
    cache = sampler_lib.CacheConfig(length, shape.layers, shape.kv_heads, shape.head_dim)
    return sampler_lib.Sampler(llama.Llama3(model_config(shape), rngs=nnx.Rngs(0)), Ids(-1), cache)


def main(name: str) -> None:
    """Serve generations of the shape called `name`."""
    shape = GENERATIONS[name]
    with jax.sharding.Mesh([[jax.devices()[0]]], ("fsdp", "tp")):
        sampler = make_sampler(shape)
        ids = np.random.default_rng(0).integers(3, shape.vocabulary, (shape.batch, shape.prompt))
        prompts = [" ".join(map(str, row[1:])) for row in ids.tolist()]  # a bos is put before them

        def step() -> float:
            output = sampler(prompts, shape.new_tokens, max_prompt_length=shape.prompt, eos_tokens=[-1])
            return float(sum(len(tokens) for tokens in output.tokens))

        serve(step, library=f"google-tunix {importlib.metadata.version('google-tunix')}, jax {jax.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
