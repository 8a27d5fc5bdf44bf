"""Write numpy.npz: logits and greedy continuations of what transformers lacks, by plain formulas in float64.

    python -m tests.golden.make_numpy

The model is tests/models/oracle.py; only the configuration's dataclass comes from the library. Weights are drawn here
from a seed, by the tests too, so the file holds results alone. For each case and prompt it has the prompt followed by
its greedy continuation, and the logits at each of these tokens, with the rotary base that the prompt's length fixes.

V vocabulary, D model, N heads, K kv heads, H head dim, F feed-forward, L layers, T length.
"""

from pathlib import Path

import numpy as np

from llm_jax.config import ModelConfig
from tests.models import oracle

FILE = Path(__file__).with_name("numpy.npz")
NEW_TOKENS = 6
TRAINED_LENGTH = 8
PROMPT_LENGTHS = (3, 8, 16, 21)  # within, at, at twice and beyond twice the trained length
MARGIN = 1e-3  # between the best and the second best logit, so that float32 chooses the same token

BASE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "ffn_size": 40,
    "max_length": TRAINED_LENGTH,
    "norm_eps": 1e-6,
}
WINDOWS = (3, 7)
CASES = {
    "alibi_6_heads": {"position": "alibi"},
    "alibi_5_heads": {"position": "alibi", "num_heads": 5, "num_kv_heads": 1},
    "norm_head": {"norm_head": True},
    "dynamic_ntk": {"dynamic_ntk": True},
    "log_n": {"log_n": True},
    "windows": {"window_sizes": WINDOWS},
    "qwen": {"dynamic_ntk": True, "log_n": True, "window_sizes": WINDOWS, "qkv_bias": True},
    "baichuan2": {"position": "alibi", "norm_head": True, "num_kv_heads": 6},
}


def config(name: str) -> ModelConfig:
    """The configuration of a case."""
    return ModelConfig(**{**BASE, **CASES[name]})


def parameters(config: ModelConfig, seed: int) -> dict:
    """Random float32 weights in the library's layout, norms and biases away from 1 and 0."""
    random = np.random.default_rng(seed)
    L, D, F, V = config.num_layers, config.hidden_size, config.ffn_size, config.vocab_size
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim

    def normal(*shape: int, mean: float = 0.0) -> np.ndarray:
        return (mean + random.normal(scale=0.3, size=shape)).astype(np.float32)

    attention = {
        name: {"kernel": normal(L, D, heads, H), **({"bias": normal(L, heads, H)} if config.qkv_bias else {})}
        for name, heads in (("query", N), ("key", K), ("value", K))
    }
    return {
        "embedding": {"embedding": normal(V, D)},
        "layers": {
            "attention_norm": {"scale": normal(L, D, mean=1.0)},
            "attention": {**attention, "output": {"kernel": normal(L, N, H, D)}},
            "ffn_norm": {"scale": normal(L, D, mean=1.0)},
            "ffn": {
                "gate": {"kernel": normal(L, D, F)},
                "up": {"kernel": normal(L, D, F)},
                "down": {"kernel": normal(L, F, D)},
            },
        },
        "final_norm": {"scale": normal(D, mean=1.0)},
        "head": {"kernel": normal(V, D)},
    }


def prompts(seed: int) -> list[list[int]]:
    """One prompt of every length."""
    random = np.random.default_rng(1000 + seed)
    return [random.integers(0, BASE["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]


def continue_greedily(params: dict, config: ModelConfig, prompt: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The prompt with its continuation, int32 [T], and the logits at these tokens, float32 [T, V]."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        last_V = oracle.logits(params, config, tokens, context_length=len(prompt))[-1]
        second, best = np.sort(last_V)[-2:]
        assert best - second > MARGIN, "two tokens are nearly as likely: choose another seed"
        tokens.append(int(np.argmax(last_V)))
    logits_TV = oracle.logits(params, config, tokens, context_length=len(prompt))
    return np.array(tokens, np.int32), logits_TV.astype(np.float32)


def float64(tree: dict) -> dict:
    """The same weights for the oracle."""
    return {k: float64(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}


def main() -> None:
    """Run every case, write the file."""
    results = {}
    for seed, name in enumerate(CASES):
        model, params = config(name), float64(parameters(config(name), seed))
        for row, prompt in enumerate(prompts(seed)):
            tokens_T, logits_TV = continue_greedily(params, model, prompt)
            results[f"{name}/{row}/tokens"] = tokens_T
            results[f"{name}/{row}/logits"] = logits_TV
        print(name, "done")
    np.savez_compressed(FILE, **results)


if __name__ == "__main__":
    main()
