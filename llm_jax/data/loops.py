"""How the corpus factory compiles its loops over bytes: by Numba, for a CPU, kept on disk for the next process.

A compiled loop lets Python's other threads run, so the batches of a stage go side by side. Mind Numba's arithmetic: an
unsigned 64-bit number and a signed one together make a float, so both sides must be `np.uint64`.
"""

from typing import Any

import numba

compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy")
