"""The models of the benchmarks, and the counts of their operations and bytes. Depends on nothing."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A LLaMA-style decoder (SwiGLU, RMSNorm, RoPE, multi-head attention, untied head) and its batch."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    batch: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch * self.length

    @property
    def flops(self) -> int:
        """Operations of a step's matmuls, forward and backward, with attention counted as if it were not causal."""
        matrices = self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn) + self.hidden * self.vocabulary
        scores = 2 * self.layers * self.length * self.hidden
        return 6 * self.tokens * (matrices + scores)


SHAPES = {
    "S": Shape(hidden=256, layers=6, heads=4, ffn=768, vocabulary=8192, batch=8, length=256),
    "M": Shape(hidden=512, layers=8, heads=8, ffn=1408, vocabulary=32000, batch=4, length=512),
}
# Sizes of a sweep, from which scaling laws are fitted.
SMALL = {
    f"d{hidden}": Shape(
        hidden=hidden,
        layers=layers,
        heads=hidden // min(hidden, 32),
        ffn=3 * hidden,
        vocabulary=4096,
        batch=4,
        length=128,
    )
    for hidden, layers in ((16, 2), (32, 2), (64, 2), (96, 3), (128, 4), (192, 4))
}
ALL = SHAPES | SMALL
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP_NORM = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclasses.dataclass(frozen=True)
class Generation:
    """A LLaMA-style decoder in float32 and what it generates, greedily."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    tied: bool = False
    head_dim: int = 64
    batch: int = 8
    prompt: int = 64
    new_tokens: int = 128

    @property
    def weight_bytes(self) -> int:
        """What a decoding step has to read: every matrix once, of the embeddings only what serves as the head."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return 4 * (self.layers * (attention + 3 * self.hidden * self.ffn) + self.hidden * self.vocabulary)


GENERATIONS = {
    "S": Generation(hidden=256, layers=6, heads=4, kv_heads=4, ffn=768, vocabulary=8192),
    "M": Generation(hidden=512, layers=8, heads=8, kv_heads=8, ffn=1408, vocabulary=32000),
    "smollm2": Generation(hidden=576, layers=30, heads=9, kv_heads=3, ffn=1536, vocabulary=49152, tied=True),
}
