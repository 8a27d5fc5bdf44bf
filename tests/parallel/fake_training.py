"""Stands for a training under a supervisor: counts steps to a number, all processes at one pace, without JAX.

    python -m tests.parallel.fake_training FOLDER STEPS SECONDS [FAILURE]

The state is a number in FOLDER/state. With FAILURE it says that, and fails, after three steps.
"""

import signal
import sys
import time
from pathlib import Path

from llm_jax import files
from llm_jax.parallel import supervision

folder, steps, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
stops: list[int] = []
signal.signal(signal.SIGTERM, lambda number, frame: stops.append(number))
own, signs = supervision.assignment(), supervision.signs()
assert own is not None and signs is not None
state = folder / "state"
step = int(state.read_text()) if state.exists() else 0
signs.tell(step=step, restored_step=step, restored_from="the file")
everyone = [Path(own.beats).with_name(f"{i}.json") for i in range(own.processes)]
while step < steps and not stops:
    time.sleep(seconds)
    if min(supervision.read_beat(path).step for path in everyone) < step:
        continue
    step += 1
    if len(sys.argv) > 4 and step == 3:
        sys.exit(f"error: {sys.argv[4]}")
    if own.process == 0:
        files.write_json(state, step)
        print(f"step {step} of {own.processes} processes", flush=True)
    signs.tell(step=step)
