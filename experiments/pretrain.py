"""Pre-train a decoder on a tokenised dataset: resumable at any step, on any mesh.

    python -m experiments.pretrain --config=configs/pretrain/small.py --workdir=runs/small \\
        --config.data.dataset=runs/data/dataset

Writes to --workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/ and the dataset's tokenizer. Run the
same command again to continue after a stop. A --workdir into which experiments.convert has imported a model begins with
that model.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from experiments import runner
from llm_jax import config as config_lib
from llm_jax import models
from llm_jax.config import TrainConfig
from llm_jax.data import loader
from llm_jax.errors import require
from llm_jax.evaluation import perplexity
from llm_jax.optim import adamw, schedules
from llm_jax.parallel import distributed
from llm_jax.parallel import mesh as mesh_lib
from llm_jax.scaling.flops import training_flops_per_token
from llm_jax.tokenization import tokenizer as tokenizers
from llm_jax.training import language_model, metrics, state, step
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.loop import Loop, Throughput

DATASET = "dataset.json"
# What may change when a run is continued; everything else decides its numbers.
CHANGEABLE = ("steps", "microbatches", "log_every", "eval_every", "eval_batches", "profile_start", "profile_steps")
CHANGEABLE_GROUPS = ("mesh", "checkpoint")
EXECUTION_FIELDS = ("attention", "remat", "scan_layers")


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """The settings, flattened to dotted names, that a continued run must share with its beginning."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in CHANGEABLE + CHANGEABLE_GROUPS}
    values["model"] = {k: v for k, v in values["model"].items() if k not in EXECUTION_FIELDS}
    values["data"] = {k: v for k, v in values["data"].items() if k not in ("prefetch", "dataset")}
    if config.model.dropout_rate:
        values["microbatches"] = config.microbatches  # each draws its own mask
    if not config.optimizer.decay_steps and config.optimizer.schedule != "constant":
        values["steps"] = config.steps  # the schedule ends with the run
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def check_workdir(config: TrainConfig, workdir: Path) -> None:
    """Raise `UserError` if `workdir` holds a run whose numbers `config` would not continue."""
    path = workdir / "config.json"
    if not path.exists():
        return
    old, new = _decisive(config_lib.load(TrainConfig, path)), _decisive(config)
    differences = [f"{k} {old.get(k)} -> {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
    require(
        not differences,
        f"{workdir} holds a run of another config ({', '.join(differences[:4])}); choose a new --workdir, or "
        "continue with the old settings",
    )


def check_dataset(config: TrainConfig, info: loader.DatasetInfo, workdir: Path) -> None:
    """Raise `UserError` if the dataset has more token ids than the model, or is not the one the run began with."""
    require(
        info.vocab_size <= config.model.vocab_size,
        f"dataset {config.data.dataset} has a vocabulary of {info.vocab_size}, config.model.vocab_size is "
        f"{config.model.vocab_size}: set it to {info.vocab_size} or more",
    )
    path = workdir / DATASET
    require(
        not path.exists() or json.loads(path.read_text()) == identity(info),
        f"{workdir} holds a run on another dataset than {config.data.dataset}: choose a new --workdir, or continue "
        "with the old dataset",
    )


def identity(info: loader.DatasetInfo) -> dict[str, str]:
    """What tells a dataset from another one."""
    return {"fingerprint": info.fingerprint, "tokenizer_sha256": info.tokenizer_sha256}


def record_start(config: TrainConfig, info: loader.DatasetInfo, workdir: Path) -> None:
    """Write the config, the dataset's identity and the tokenizer into `workdir`: once, by the first process."""
    if distributed.is_first():
        config_lib.save(config, workdir / "config.json")
        (workdir / DATASET).write_text(json.dumps(identity(info)) + "\n")
        tokenizers.copy(info.tokenizer, workdir)
    distributed.wait_for_all("record_start")


def heldout_evaluation(config: TrainConfig, info: loader.DatasetInfo, mesh: Mesh) -> Callable[[Any], Mapping]:
    """A function from parameters to held-out loss and bits per byte of every source, over `eval_batches` batches.

    Sources without held-out documents are left out.
    """
    score = perplexity.scorer(config.model, config.loss, mesh)
    share = jax.process_index(), jax.process_count()

    def evaluate(params: Any) -> dict[str, float]:
        values = {}
        nats = tokens = 0.0
        for source, sizes in info.sources.items():
            batches = loader.heldout_batches(
                config.data, source, max_batches=config.eval_batches, process_index=share[0], process_count=share[1]
            )
            result = score(params, batches)
            if result.tokens:
                # All but the first token of a document are predicted; a part of them stands for as much of the text.
                predicted = sizes.heldout.tokens - sizes.heldout.documents
                values[f"loss/{source}"] = result.loss
                values[f"bits_per_byte/{source}"] = result.bits_per_byte(
                    sizes.heldout.text_bytes * result.tokens / predicted
                )
            nats, tokens = nats + result.nats, tokens + result.tokens
        return {"loss": perplexity.Heldout(nats, tokens).loss, **values} if tokens else {}

    return evaluate


def describe(config: TrainConfig, info: loader.DatasetInfo, mesh: Mesh) -> str:
    """What is about to run, in one line."""
    tokens = config.steps * config.data.batch_size * config.data.sequence_length
    return (
        f"{models.count_parameters(config.model):,} parameters, {config.steps:,} steps, {tokens:,} tokens "
        f"({tokens / info.tokens:.2f} epochs of {info.tokens:,}), mesh {dict(mesh.shape)}"
    )


def run(config: TrainConfig, workdir: Path) -> None:
    """Train until `config.steps`, continuing from the newest checkpoint in `workdir`."""
    require(config.data.dataset != "", "set --config.data.dataset to the folder that prepare_data wrote")
    distributed.initialize()
    mesh = mesh_lib.build(config.mesh)
    step.check_batch(config.data.batch_size, config.microbatches, mesh)
    info = loader.describe(config.data)
    check_dataset(config, info, workdir)
    check_workdir(config, workdir)
    schedule = schedules.learning_rate(config.optimizer, config.steps)
    optimizer = adamw.build(config.optimizer, adamw.decay_mask)
    abstract = state.abstract_state(config.model, optimizer, mesh)
    record_start(config, info, workdir)
    if distributed.is_first():
        print(describe(config, info, mesh))
    train(config, workdir, mesh, info, optimizer, schedule, abstract)


def train(
    config: TrainConfig,
    workdir: Path,
    mesh: Mesh,
    info: loader.DatasetInfo,
    optimizer: Any,
    schedule: Any,
    abstract: state.TrainState,
) -> None:
    """Restore or initialise the state, and run the loop."""
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    loss_fn = language_model.loss_function(config.model, config.loss)
    step_function = step.build(loss_fn, optimizer, schedule, seed=config.seed, microbatches=config.microbatches)
    flops = training_flops_per_token(config.model, config.data.sequence_length)
    with Checkpointer(workdir, config.checkpoint, config.model, tokens_per_step) as checkpointer:
        latest = checkpointer.latest_step()
        start = latest or 0
        if latest is None:
            current = state.init_state(config.model, optimizer, mesh, jax.random.key(config.seed))
        elif checkpointer.is_model_alone(latest):
            print(f"beginning with the model of the checkpoint in {workdir}")
            current = state.state_of(checkpointer.restore_params(abstract, latest), optimizer, abstract)
        else:
            print(f"continuing from step {start}")
            current = checkpointer.restore(abstract, start)
        batches = loader.train_batches(
            config.data, start_step=start, process_index=jax.process_index(), process_count=jax.process_count()
        )
        with metrics.Recorder(workdir, start, config.steps) as recorder:
            Loop(
                config=config,
                mesh=mesh,
                step_function=step_function,
                evaluate=heldout_evaluation(config, info, mesh),
                checkpointer=checkpointer,
                recorder=recorder,
                throughput=Throughput(tokens_per_step, flops, metrics.peak_flops()),
                workdir=workdir,
            ).run(current, batches, start)


if __name__ == "__main__":
    runner.main(run, TrainConfig, "configs/pretrain/small.py", save_config=False)
