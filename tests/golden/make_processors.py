"""Write processors.npz: what Hugging Face's logits processors make of random logits, one chain of them at a time.

    python tests/golden/make_processors.py

Needs torch and transformers, which the tests do not: run it again only to add a case. Written with transformers 5.23.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# repetition penalty, temperature, top-k, top-p; the last two rows are the defaults of Baichuan-2 and LLaMA-2 chat
CASES = [
    (1.3, 1.0, 0, 1.0),
    (1.0, 0.7, 0, 1.0),
    (1.0, 1.0, 7, 1.0),
    (1.0, 1.0, 0, 0.8),
    (1.0, 1.0, 0, 0.01),
    (0.8, 1.5, 20, 0.5),
    (1.05, 0.3, 5, 0.85),
    (1.0, 0.6, 0, 0.9),
]


def chain(penalty: float, temperature: float, k: int, p: float) -> LogitsProcessorList:
    """The processors of one case, in the order in which `generate` of transformers puts them."""
    processors = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if k:
        processors.append(TopKLogitsWarper(k))
    if p < 1:
        processors.append(TopPLogitsWarper(p))
    return processors


def main() -> None:
    """Draw the inputs, run every case, write the file."""
    random = np.random.default_rng(0)
    logits_BV = random.normal(scale=3, size=(6, 64)).astype(np.float32)
    logits_BV[0, ::4] = logits_BV[0, 0]  # equal logits, for top-k
    ids_BT = random.integers(0, 64, size=(6, 12))
    outputs = {}
    for i, case in enumerate(CASES):
        scores = chain(*case)(torch.tensor(ids_BT), torch.tensor(logits_BV))
        outputs[f"case_{i}"] = scores.numpy().astype(np.float32)
    path = Path(__file__).with_name("processors.npz")
    np.savez_compressed(path, logits_BV=logits_BV, ids_BT=ids_BT, cases=np.array(CASES), **outputs)


if __name__ == "__main__":
    main()
