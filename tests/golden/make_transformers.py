"""Write transformers.npz and torch.bin: what Hugging Face's transformers and torch make of small random models.

    python tests/golden/make_transformers.py

Needs torch and transformers, which the tests do not: they take `CASES`, `PROMPTS` and `values` from here and make the
same weights again. Run it again only to add a case. Written with torch 2.13 and transformers 5.23.
"""

import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA = {**SMALL, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN2 = {**SMALL, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# The keys of config.json, as released checkpoints have them.
CASES = {
    "llama": LLAMA,
    "llama_gqa_tied": {**LLAMA, "num_key_value_heads": 2, "tie_word_embeddings": True, "rope_theta": 500000.0},
    "llama_head_dim": {**LLAMA, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12},
    "llama3": {**LLAMA, "num_key_value_heads": 1, "rope_scaling": LLAMA3, "rope_theta": 5000.0},
    "llama_linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "qwen2": {**QWEN2, "rope_theta": 1000000.0},
    "qwen2_tied_windows": {
        **QWEN2,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
}
LONG = 40  # tokens, over the trained length of 16
PROMPTS = [[7, 3, 11, 29, 5], [2], [44, 9, 63, 1, 17, 20, 33, 8, 50, 6, 12]]
NEW_TOKENS = 16  # past the trained length too


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random weights of a tensor, which depend on its name and shape only; float32."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if "norm" in name:
        return 1 + noise / 4
    return noise / 2 if name.endswith("bias") or "embed" in name else noise / np.sqrt(np.float32(shape[-1]))


def long_ids() -> np.ndarray:
    """Two sequences longer than the trained length."""
    return np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, LONG))


def padded() -> tuple[np.ndarray, np.ndarray]:
    """The prompts with padding on the left, and 1 where it is not."""
    width = max(map(len, PROMPTS))
    ids = np.array([[0] * (width - len(p)) + p for p in PROMPTS])
    return ids, np.array([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])


def main() -> None:
    """Run every case."""
    import torch
    import transformers

    torch.set_grad_enabled(False)
    golden = {}
    for case, settings in CASES.items():
        config = transformers.AutoConfig.for_model(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(values(name, tuple(parameter.shape))))
        golden[f"{case}/long"] = model(torch.from_numpy(long_ids())).logits.numpy()
        ids, mask = map(torch.from_numpy, padded())
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        golden[f"{case}/padded"] = model(ids, attention_mask=mask, position_ids=positions).logits.numpy()
        continued = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, eos_token_id=None
        )
        golden[f"{case}/greedy"] = continued[:, ids.shape[1] :].numpy()
    np.savez_compressed(FOLDER / "transformers.npz", **golden)
    _save_torch(torch)


def _save_torch(torch) -> None:
    """Tensors of every supported dtype that share a storage, are transposed, or are parameters."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with attributes
    state["weight"] = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state["bias"] = torch.tensor([0.5, -2.0])
    state["base"] = base
    state["shared rows"] = base[1:3]
    state["transposed"] = base.T
    state["every other"] = base[:, ::2]
    state["scalar"] = torch.tensor(3.0)
    state["empty"] = torch.zeros(0, 4)
    state["half"] = base.half()
    state["bfloat16"] = (base / 3).bfloat16()
    state["parameter"] = torch.nn.Parameter(base + 1)
    torch.save(state, FOLDER / "torch.bin")


if __name__ == "__main__":
    main()
