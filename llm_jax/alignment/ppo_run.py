"""A run of PPO: its iterations, logs, held-out evaluations, checkpoints, and a clean stop.

A run's folder is that of a model, as fine-tuning's is: `checkpoints` (with adapters: `adapters/checkpoints` until the
end, when the merged model is written), the tokenizer and its chat template; `best` holds the model of the highest
held-out score, if one was higher than at the start. samples.jsonl has responses to held-out prompts.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from llm_jax.alignment import finetune, ppo_memory, ppo_models, ppo_state
from llm_jax.alignment.policy_config import PpoConfig
from llm_jax.alignment.ppo import Data, Ppo, Sample
from llm_jax.alignment.ppo_state import PpoState
from llm_jax.interop.pretrained import Pretrained
from llm_jax.parallel import distributed, shares
from llm_jax.training import checkpoint, metrics
from llm_jax.training.checkpoint import Checkpointer
from llm_jax.training.loop import DivergedError, StopSignal

SAMPLES = "samples.jsonl"


def train(
    config: PpoConfig,
    model: Pretrained,
    data: Data,
    workdir: Path,
    mesh: Mesh,
    *,
    critic: Pretrained | None = None,
    whole: Any = None,
) -> bool:
    """Train until the last iteration or a signal to stop, continuing from the newest checkpoint; whether it is done.

    Args:
      config: the run's.
      model: the policy as it begins; its parameters are given away.
      data: prompts and rewards.
      workdir: the run's folder.
      mesh: where the models are.
      critic: see `ppo_models.build`.
      whole: the experiment's config, which the folder keeps and with which it may be continued; None = `config`.

    Raises:
      UserError: the folder holds another run, or the prompts have changed; and what an iteration raises.
    """
    whole, training = config if whole is None else whole, config.training
    finetune.check_folder(whole, data.fingerprint, workdir)
    actors = ppo_models.build(config, model, critic, mesh)
    if distributed.is_first():
        print(ppo_memory.estimate(config, actors, data.reward_bytes, mesh))
    run = Ppo(config, actors, data, mesh)
    finetune.write_start(whole, model, data.fingerprint, workdir)
    folder = workdir / actors.policy.folder
    with Checkpointer(folder, training.checkpoint, model.config, tokens_per_step=1) as checkpointer:
        found = checkpointer.newest(lambda step: _restore(run, checkpointer, step) if step else run.first())
        state, start = found or (run.first(), 0)
        with metrics.Recorder(workdir, start, training.steps) as recorder:
            state = _loop(run, state, start, model, checkpointer, recorder, workdir)
    finished = int(state.iteration) == training.steps
    if actors.policy.folder and finished:
        merged = actors.policy.merge(state.policy.params, *actors.policy.frozen)
        checkpoint.replace_model(workdir, model.config, merged, training.steps)
    return finished


def _restore(run: Ppo, checkpointer: Checkpointer, step: int) -> PpoState:
    return ppo_state.from_train_state(checkpointer.restore(ppo_state.as_train_state(run.abstract()), step))


def _loop(
    run: Ppo,
    state: PpoState,
    start: int,
    model: Pretrained,
    checkpointer: Checkpointer,
    recorder: metrics.Recorder,
    workdir: Path,
) -> PpoState:
    """Iterate; the last state is checkpointed and returned."""
    training, step = run.config.training, start
    if distributed.is_first():
        metrics.keep_until(workdir / SAMPLES, start)
    if shares.from_first(lambda: all(record["step"] for record in metrics.read(workdir, "heldout"))):
        _evaluate(run, state, 0, recorder, workdir)
    keep = finetune.keeper(run.actors.policy, model, workdir) if training.keep_best else None
    with StopSignal() as stop:
        while step < training.steps and not stop.agreed(every=1):
            try:
                state, values = run.iterate(state)
            except DivergedError:
                recorder.write(metrics.FAILED, step + 1, {})
                raise
            step += 1
            recorder.advance(step)
            last = step == training.steps
            if last or step % training.log_every == 0:
                recorder.write("train", step, values)
                recorder.status(step, training.steps, *_progress(values, training.steps - step))
            if last or (training.eval_every and step % training.eval_every == 0):
                found = _evaluate(run, state, step, recorder, workdir)
                if keep is not None:
                    keep(state.policy, step, found)
            if step % training.checkpoint.every_steps == 0:
                checkpointer.save(ppo_state.as_train_state(state), step)
        checkpointer.save(ppo_state.as_train_state(state), step)
        checkpointer.wait()
    return state


def _evaluate(run: Ppo, state: PpoState, step: int, recorder: metrics.Recorder, workdir: Path) -> dict[str, float]:
    values, table = run.evaluate(state)
    if values:
        recorder.write("heldout", step, values)
        _write_samples(workdir, step, table[: run.config.samples * run.config.rollout.sampling.num_samples])
    return values


def _write_samples(workdir: Path, step: int, table: Sequence[Sample]) -> None:
    if not distributed.is_first():
        return
    with (workdir / SAMPLES).open("a", encoding="utf-8") as file:
        for sample in table:
            file.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")


def _progress(values: dict[str, float], left: int) -> tuple[str, float]:
    """What the progress line says of an iteration, and the seconds that so many more take."""
    seconds = sum(values[f"seconds_{part}"] for part in ("rollout", "score", "update"))
    text = f"score {values['score']:.3f} KL {values['kl']:.2f} length {values['tokens']:.0f}, {seconds:.1f} s each,"
    return text, left * seconds
