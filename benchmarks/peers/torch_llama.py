"""Hugging Face's `LlamaForCausalLM`, eager, with torch's fused AdamW."""

import os
import sys

import torch
import transformers

from benchmarks.peers import shapes
from benchmarks.peers.serve import serve


def main(name: str) -> None:
    """Serve train steps of the shape called `name`."""
    shape = shapes.SHAPES[name]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=shapes.LEARNING_RATE,
        betas=shapes.BETAS,
        eps=shapes.EPS,
        weight_decay=shapes.WEIGHT_DECAY,
        fused=True,
    )
    tokens = torch.randint(0, shape.vocabulary, (shape.batch, shape.length))

    def step() -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), shapes.CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    serve(step, library=f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main(sys.argv[1])
