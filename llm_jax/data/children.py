"""Calls of a function in processes of their own, which may take too long, use too much memory or die in its stead.

A child is told the function's module and name, then gets pickled arguments on its standard input and answers on its
standard output. It does not import the program that started it, and it ends with it. Arguments and answers come from
this program's own processes alone.
"""

import contextlib
import importlib
import itertools
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

AHEAD = 8  # calls for each child that are begun before the first one's result is taken


class ChildError(Exception):
    """Why a call has no result: it took too long (`late`), or the child died."""

    def __init__(self, late: bool, message: str) -> None:
        super().__init__(message)
        self.late = late


class Children:
    """Some processes that call one function of a module, each one call at a time; threads may share them."""

    def __init__(self, function: Callable[..., Any], count: int, seconds: float = 0, memory_bytes: int = 0) -> None:
        """`seconds` of processor time limit a call, and `memory_bytes` a child; 0 = no limit."""
        name = (function.__module__, function.__name__)
        self._command = [sys.executable, "-m", __name__, *name, str(seconds), str(memory_bytes)]
        self._count = count
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(None)  # started when needed

    def call(self, *arguments: Any) -> Any:
        """What the function returns. Raises what it raises, or `ChildError`."""
        child = self._idle.get()
        try:
            child = child or self._start()
            succeeded, result = self._ask(child, arguments)
        except BaseException:
            if child:
                _end(child)
            child = None
            raise
        finally:
            self._idle.put(child)
        if not succeeded:
            raise result
        return result

    def _start(self) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def _ask(self, child: subprocess.Popen[bytes], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
        assert child.stdin is not None and child.stdout is not None
        try:
            pickle.dump(arguments, child.stdin)
            child.stdin.flush()
            return pickle.load(child.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            status = child.wait()
            message = "out of processor time" if status == -signal.SIGPROF else f"a process ended with status {status}"
            raise ChildError(status == -signal.SIGPROF, message) from None

    def map(self, calls: Iterable[tuple[Any, ...]]) -> Iterator[Future[Any]]:
        """The finished calls with these arguments, in their order."""
        calls = iter(calls)
        with ThreadPoolExecutor(self._count) as pool:
            waiting = deque(
                pool.submit(self.call, *arguments) for arguments in itertools.islice(calls, self._count * AHEAD)
            )
            try:
                while waiting:
                    done = waiting.popleft()
                    done.exception()  # waits
                    waiting.extend(pool.submit(self.call, *arguments) for arguments in itertools.islice(calls, 1))
                    yield done
            finally:
                pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """End the processes, when they have answered."""
        for _ in range(self._count):
            if child := self._idle.get():
                _end(child)

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    for stream in (child.stdin, child.stdout):
        with contextlib.suppress(BrokenPipeError):
            assert stream is not None
            stream.close()
    child.wait()


def _serve(module: str, name: str, seconds: float, memory_bytes: int) -> None:
    """Answer until the input ends; what the function prints goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, at whose end the input ends
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    function = getattr(importlib.import_module(module), name)
    while True:
        try:
            arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)  # at whose end the process is killed, wherever it is
        try:
            answer = pickle.dumps((True, function(*arguments)))
        except Exception as error:
            answer = pickle.dumps((False, error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.flush()  # the next that this process hears may be its end
        answers.write(answer)
        answers.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
