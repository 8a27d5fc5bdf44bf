"""How the corpus factory compiles its loops over bytes: by Numba, for a CPU, kept on disk for the next process.

A compiled loop lets Python's other threads run, so the batches of a stage go side by side. Mind Numba's arithmetic: an
unsigned 64-bit number and a signed one together make a float, so both sides must be `np.uint64`. Nothing stops a loop
that reads beyond an array, but with NUMBA_BOUNDSCHECK=1 in the environment it raises IndexError: the tests set that.

Numba looks only at a function's own file when it judges what it has on disk, but what a loop calls, and constants, may
come from another one: so what is kept is kept for one state of all of this package's files.
"""

import hashlib
from pathlib import Path
from typing import Any

import numba

HOME = Path("~/.cache/llm_jax/numba")


def digest(folder: Path) -> str:
    """Of all Python files in a folder and those below."""
    contents = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        contents.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return contents.hexdigest()[:16]


def _keep() -> bool:
    """Have Numba keep what it compiles in a folder of the user's; whether it can."""
    checked = "-checked" if numba.config.BOUNDSCHECK else ""  # type: ignore[attr-defined]
    folder = HOME.expanduser() / (digest(Path(__file__).parent) + checked)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]
    return True


compiled: Any = numba.njit(nogil=True, cache=_keep(), error_model="numpy")
