"""A process that renders Jinja templates and can do nothing else: the far end of `template_sandbox`.

It reads one JSON object a line, {"template", "variables", "now"}, and answers each with {"text"} or {"error"}. The
templates come out of other people's files. Jinja's sandbox keeps them from Python's objects; it does not keep them from
looping for days or from filling the memory, so the process itself is limited: a template that exceeds its processor
time ends the process, and whoever waits for the answer sees that. Only the standard library and Jinja are imported.
"""

import datetime
import functools
import json
import math
import resource
import sys
from collections.abc import Callable
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 3  # for one rendering
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 1 << 24


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, with which some templates mark replies: rendered as what it holds."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that Jinja asks for

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def main() -> None:
    """Answer requests until the input ends."""
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    for line in sys.stdin:
        _allow_cpu_seconds(CPU_SECONDS)
        try:
            answer = {"text": _render(**json.loads(line))}
        except SecurityError as error:
            answer = {"error": f"it does what no template may: {error}"}
        except TemplateSyntaxError as error:
            answer = {"error": f"{error.message} (line {error.lineno})"}
        except TemplateError as error:
            answer = {"error": str(error)}
        except MemoryError:
            answer = {"error": "it needs more memory than a template may have"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def _render(template: str, variables: dict[str, Any], now: float) -> str:
    def strftime_now(form: str) -> str:
        return datetime.datetime.fromtimestamp(now).strftime(form)

    text = _compile(template).render(**variables, strftime_now=strftime_now)
    if len(text) > MAX_CHARACTERS:
        raise TemplateError(f"it writes more than {MAX_CHARACTERS:,} characters")
    return text


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> Template:
    """With the settings, filters and functions that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is written in a prompt; Jinja's own filter escapes it for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> Callable[..., None]:
    raise TemplateError(message)


def _limit(what: int, amount: int) -> None:
    hard = resource.getrlimit(what)[1]
    amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(what, (amount, hard))


def _allow_cpu_seconds(seconds: int) -> None:
    """End this process if it uses so many seconds more."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime) + seconds)


if __name__ == "__main__":
    main()
