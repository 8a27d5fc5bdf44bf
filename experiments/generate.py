"""Continue prompts with a trained model.

    python -m experiments.generate --workdir=runs/demo/model --prompt="In the beginning" --prompt="第一条"
    python -m experiments.generate --model=smollm2 --prompt="The three largest cities of France are"

--model is a run folder, a Hugging Face folder, a .gguf file, or smollm2, which is downloaded; by default it is
--workdir, where nothing is written. Without --prompt, the config's prompts are continued; --output also writes the
samples to a JSON file.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from experiments import runner
from llm_jax.config import SamplingConfig
from llm_jax.errors import require
from llm_jax.interop import pretrained
from llm_jax.sampling.generate import OnTokens
from llm_jax.sampling.text import Completion, complete, describe

MODEL = flags.DEFINE_string("model", "", "what to load; by default --workdir", allow_override=True)
PROMPTS = flags.DEFINE_multi_string("prompt", [], "a text to continue; repeat the flag for several")
OUTPUT = flags.DEFINE_string("output", "", "a JSON file to write the samples to")


@dataclasses.dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """How to sample, from which checkpoint, and what to continue where the command line names nothing."""

    step: int = 0  # the checkpoint's; 0 = the newest
    dtype: str = ""  # of the parameters; "" = as stored
    quantize: str = "none"  # int8 or int4: round the weights after loading
    dynamic_ntk: bool = False  # turn on what helps a rotary model past its trained length
    log_n: bool = False
    prompts: tuple[str, ...] = ()
    stop_strings: tuple[str, ...] = ()  # texts before which a continuation ends


def run(config: GenerateConfig, model: str | Path, prompts: tuple[str, ...] = (), output: str = "") -> list[Completion]:
    """Continue the prompts (the config's, if none are given), print and perhaps save the samples."""
    prompts = prompts or config.prompts
    require(bool(prompts), 'nothing to continue: give a --prompt="..."')
    loaded = pretrained.load_to_generate(model, **_overrides(config))
    sampling = SamplingConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SamplingConfig)})
    started = time.monotonic()
    with _progress(len(prompts) * sampling.num_samples * sampling.max_new_tokens) as on_tokens:
        samples = complete(
            loaded.params,
            loaded.config,
            loaded.tokenizer,
            prompts,
            sampling,
            stop_strings=config.stop_strings,
            on_tokens=on_tokens,
        )
    seconds = time.monotonic() - started
    for sample in samples:
        _print(sample)
    tokens = sum(sample.tokens for sample in samples)
    Console(stderr=True).print(f"{tokens:,} tokens in {seconds:.1f} s, compilation included")
    if output:
        _save(samples, sampling, Path(output))
    return samples


def _overrides(config: GenerateConfig) -> dict[str, Any]:
    """What the config states of the checkpoint to load; the rest stays as the checkpoint has it."""
    stated = {name: getattr(config, name) for name in ("step", "dtype", "quantize", "dynamic_ntk", "log_n")}
    return {name: value for name, value in stated.items() if value}


@contextlib.contextmanager
def _progress(total: int) -> Iterator[OnTokens | None]:
    """A bar of the tokens drawn, for who watches."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda row, tokens: progress.advance(task, len(tokens))


def _print(sample: Completion) -> None:
    end = "[stop]" if sample.finished == "stop" else "[...]"
    text = Text.assemble((sample.prompt, "bold"), sample.completion, (f" {end}", "dim"))
    Console(highlight=False).print(text, "", soft_wrap=True)


def _save(samples: list[Completion], sampling: SamplingConfig, path: Path) -> None:
    """Write prompt, completion and settings of every sample, atomically."""
    records = [{"prompt": s.prompt, "completion": s.completion, "settings": describe(sampling)} for s in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(records, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    runner.main(
        lambda config, workdir: run(config, MODEL.value or workdir, tuple(PROMPTS.value), OUTPUT.value),
        GenerateConfig,
        "configs/generate/demo.py",
        workdir="runs/demo/model",
        save_config=False,
    )
