"""How likely sentences are under a trained transformer, for the quality stage of the corpus factory."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_jax.data.stages.byte_ngrams import Buffer, Sentences
from llm_jax.data.stages.perplexity import Scorer, SentenceBits
from llm_jax.errors import require
from llm_jax.evaluation.perplexity import token_nats
from llm_jax.interop import pretrained, released
from llm_jax.training import checkpoint

WINDOW = 128  # tokens of a sentence that are read
ROWS_AT_ONCE = 32


def transformer_bits(path: str) -> SentenceBits:
    """The bits of sentences, each on its own, under a model that `llm_jax.interop.pretrained` loads.

    Of a sentence longer than `WINDOW` tokens the first are taken for the whole.
    """
    model = pretrained.load(path)
    tokenizer = model.tokenizer
    first = tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id

    def bits(found: Buffer, parts: Sentences) -> npt.NDArray[np.float32]:
        spans = zip(parts.starts, parts.stops, strict=True)
        ids = tokenizer.encode_batch([found.data[start:stop].tobytes().decode() for start, stop in spans])
        sums = np.zeros(len(ids), np.float32)
        for begin in range(0, len(ids), ROWS_AT_ONCE):
            some = ids[begin : begin + ROWS_AT_ONCE]
            tokens = np.full((ROWS_AT_ONCE, WINDOW + 1), first, np.int32)
            for tokens_T, sentence in zip(tokens, some):
                tokens_T[1 : 1 + len(sentence)] = sentence[:WINDOW]
            nats = np.asarray(token_nats(model.params, model.config, tokens[:, :-1], tokens[:, 1:]))
            for row, sentence in enumerate(some):
                used = min(len(sentence), WINDOW)
                sums[begin + row] = nats[row, :used].sum() / np.log(2) * len(sentence) / max(used, 1)
        return sums

    return bits


def model_files(path: str) -> list[Path]:
    """The files that tell a model at a path from another one.

    Of a run's folder those are its own, but for logs, and of its newest checkpoint the configuration and the arrays'
    fingerprints. Raises `UserError` where there is no model.
    """
    place = released.locate(path)
    require(place.exists(), f"no model at {path} (QualityConfig.model)")
    if place.is_file():
        return [place]
    own = sorted(file for file in place.glob("*") if file.is_file() and file.suffix != ".jsonl")
    if not pretrained.is_run(place):
        return own
    steps = [step for step in (place / checkpoint.FOLDER).glob("*") if step.name.isdecimal()]
    newest = max(steps, key=lambda step: int(step.name), default=place / checkpoint.FOLDER)
    items = [newest / name for name in ("config", "integrity") if (newest / name).is_dir()]
    return own + sorted(file for item in items for file in item.rglob("*") if file.is_file())


TRANSFORMERS = Scorer(transformer_bits, model_files)
