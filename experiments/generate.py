"""Continue prompts with a trained model.

    python -m experiments.generate --workdir=runs/demo/model --prompt="In the beginning" --prompt="第一条"

Reads the newest checkpoint and tokenizer.model in --workdir, the folder of a pre-training run, and writes nothing
there. Without --prompt, the config's prompts are continued; --output also writes the samples to a JSON file.
"""

import dataclasses
import json
import time
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.text import Text

from experiments import runner
from llm_jax.config import SamplingConfig
from llm_jax.errors import require
from llm_jax.sampling.text import Completion, complete
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.training import checkpoint

PROMPTS = flags.DEFINE_multi_string("prompt", [], "a text to continue; repeat the flag for several")
OUTPUT = flags.DEFINE_string("output", "", "a JSON file to write the samples to")


@dataclasses.dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """How to sample, from which checkpoint, and what to continue where the command line names nothing."""

    step: int = 0  # the checkpoint's; 0 = the newest
    prompts: tuple[str, ...] = ()


def run(config: GenerateConfig, workdir: Path, prompts: tuple[str, ...] = (), output: str = "") -> list[Completion]:
    """Continue the prompts (the config's, if none are given), print and perhaps save the samples."""
    prompts = prompts or config.prompts
    require(bool(prompts), 'nothing to continue: give a --prompt="..."')
    model, params, step = checkpoint.load_model(workdir, config.step or None)
    tokenizer = tokenizers.load(workdir / "tokenizer.model")
    sampling = SamplingConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SamplingConfig)})
    started = time.monotonic()
    samples = complete(params, model, tokenizer, prompts, sampling)
    seconds = time.monotonic() - started
    for sample in samples:
        _print(sample)
    tokens = sum(sample.tokens for sample in samples)
    Console(stderr=True).print(f"step {step:,}: {tokens:,} tokens in {seconds:.1f} s, compilation included")
    if output:
        _save(samples, sampling, Path(output))
    return samples


def settings(sampling: SamplingConfig) -> str:
    """How samples are drawn, in words."""
    if sampling.temperature == 0:
        parts = ["greedy"]
    else:
        parts = [f"temperature {sampling.temperature:g}"]
        parts += [f"top-k {sampling.top_k}"] if sampling.top_k else []
        parts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    parts += [f"repetition penalty {sampling.repetition_penalty:g}"] if sampling.repetition_penalty != 1 else []
    return ", ".join(parts)


def _print(sample: Completion) -> None:
    end = "[end of document]" if sample.finished == "stop" else "[...]"
    text = Text.assemble((sample.prompt, "bold"), sample.completion, (f" {end}", "dim"))
    Console(highlight=False).print(text, "", soft_wrap=True)


def _save(samples: list[Completion], sampling: SamplingConfig, path: Path) -> None:
    """Write prompt, completion and settings of every sample, atomically."""
    records = [{"prompt": s.prompt, "completion": s.completion, "settings": settings(sampling)} for s in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(records, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    runner.main(
        lambda config, workdir: run(config, workdir, tuple(PROMPTS.value), OUTPUT.value),
        GenerateConfig,
        "configs/generate/demo.py",
        workdir="runs/demo/model",
        save_config=False,
    )
