"""Rendering a Jinja template out of somebody else's file, in a process of its own with little time and memory.

The process starts at the first rendering, serves all that follow, and ends with this one; a template that exceeds its
limits costs the process its life, and the next rendering starts another.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.errors import UserError
from llm_jax.tokenization import template_worker

# -P: the worker's folder is no place to import from. A session of its own: Ctrl-C is not meant for it.
COMMAND = (sys.executable, "-P", str(Path(template_worker.__file__)))


class TemplateProcess:
    """The process, and who may talk to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def render(self, template: str, variables: Mapping[str, Any], now: float | None = None) -> str:
        """The template's text for these variables (of JSON's types), at a time in seconds since 1970 (None = now).

        Raises `UserError` for a template that is broken, refuses the variables, or exceeds its time or memory.
        """
        now = time.time() if now is None else now
        request = json.dumps({"template": template, "variables": dict(variables), "now": now})
        with self._lock:
            answer = self._ask(request)
        if "error" in answer:
            raise UserError(f"the chat template cannot be used here: {' '.join(answer['error'].split())}")
        return answer["text"]

    def _ask(self, request: str) -> dict[str, str]:
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # an answer may still come, and would be taken for the next request's
            self.stop()
            raise
        if line:
            return json.loads(line)
        self.stop()
        return {"error": f"it needs more than {template_worker.CPU_SECONDS} s, or more memory than a template may have"}

    def _running(self) -> subprocess.Popen[str]:
        """The process; another one where it has ended or belongs to the process that this one was forked from."""
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                start_new_session=True,
            )  # fmt: skip
            self._owner = os.getpid()
        return self._process

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


_shared = TemplateProcess()
render = _shared.render
