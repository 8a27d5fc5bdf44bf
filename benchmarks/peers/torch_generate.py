"""Hugging Face's `generate` of a `LlamaForCausalLM`, with a dynamic or a static cache."""

import os
import sys

import torch
import transformers

from benchmarks.peers.serve import serve
from benchmarks.peers.shapes import GENERATIONS


def main(name: str, cache: str) -> None:
    """Serve generations of the shape called `name`."""
    shape = GENERATIONS[name]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.prompt + shape.new_tokens,
        tie_word_embeddings=shape.tied,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(3, shape.vocabulary, (shape.batch, shape.prompt))
    options = {"max_new_tokens": shape.new_tokens, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    if cache == "static":
        options["cache_implementation"] = "static"

    def step() -> float:
        with torch.inference_mode():
            output = model.generate(tokens, **options)
        assert output.shape[1] == shape.prompt + shape.new_tokens
        return float(output[:, shape.prompt :].numel())

    serve(step, library=f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main(*sys.argv[1:])
