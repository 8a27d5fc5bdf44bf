"""What a measured process does: say that it is ready, then run steps whenever the parent asks, and report."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping


def serve(
    step: Callable[[], float],
    done: Callable[[], float] | None = None,
    parts: Callable[[], Mapping[str, float]] | None = None,
    **about: object,
) -> None:
    """Answer each line `N` on standard input with the median seconds of N calls of `step`, which returns its loss.

    The first line written, once two steps have warmed up, is `about` with the loss of the first step. Processor time
    is reported too: it tells a slow step from a step that had to share the machine. Where not every step does as much,
    `done` tells how much was done so far; what the first step did and the rate of N calls are reported then. `parts`
    tells the seconds so far of each part of the steps, of which a call's mean is reported as "seconds_PART".
    """
    first_loss = step()
    first = {"first_loss": first_loss, **({"first_done": done()} if done else {})}
    step()
    _answer({**first, **about})
    for line in sys.stdin:
        count = int(line)
        seconds = []
        before, done_before = _processor_seconds(), done() if done else 0.0
        parts_before = parts() if parts else {}
        for _ in range(count):
            start = time.perf_counter()
            loss = step()
            seconds.append(time.perf_counter() - start)
        processor = (_processor_seconds() - before) / count
        rate = {"rate": (done() - done_before) / sum(seconds)} if done else {}
        spent = parts() if parts else {}
        means = {f"seconds_{name}": (spent[name] - parts_before[name]) / count for name in spent}
        _answer({"seconds": statistics.median(seconds), "processor_seconds": processor, "loss": loss, **rate, **means})


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _answer(values: dict[str, object]) -> None:
    print(json.dumps(values), flush=True)
