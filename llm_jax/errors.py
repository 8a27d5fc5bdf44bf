"""The one exception for a user's mistake: it prints as a single line, never as a traceback."""


class UserError(ValueError):
    """A mistake in a config, a file or a command line.

    The message is one line that says what is wrong, where, and what to do. Experiment scripts print it and exit
    with status 1; library callers may catch it as a `ValueError`.
    """


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)
