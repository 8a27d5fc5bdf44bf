"""Block sizes of this project's fused kernels: the candidates of a search, and how they are written down.

Each module has `Blocks`, a named tuple with the sizes of every kernel in it (`forward`, `key_gradients`,
`query_gradients`), themselves named tuples such as (queries, keys, warps, stages).
"""

import importlib
import itertools
from typing import Any

from llm_jax.errors import require

# What is tried for each size of each module. Tiles that need more registers or memory than there are rank last, or
# fail with a reason.
CHOICES: dict[str, dict[str, tuple[int, ...]]] = {
    "pallas_gpu": {"queries": (32, 64, 128), "keys": (32, 64, 128), "warps": (4, 8), "stages": (1, 2, 3)},
    "mosaic_gpu": {"queries": (64, 128), "keys": (64, 128), "stages": (2, 3, 4)},
    "pallas_tpu": {"queries": (256, 512, 1024), "keys": (256, 512, 1024)},
}
PASSES_OF = {"forward": "forward", "key_gradients": "backward", "query_gradients": "backward"}


def default_blocks(module: str, head_dim: int) -> Any:
    """The blocks that a call in bfloat16 would take. Raises `UserError` for a head dim that the module has none for."""
    kernels = importlib.import_module(f"llm_jax.kernels.{module}")
    known = ", ".join(map(str, kernels.HEAD_DIMS))
    require(head_dim in kernels.HEAD_DIMS, f"the head dims of {module} are {known}, not {head_dim}")
    return kernels.BLOCKS[(head_dim, 2)] if (head_dim, 2) in kernels.BLOCKS else kernels.BLOCKS[head_dim]


def candidates(module: str, blocks: Any, field: str) -> list[Any]:
    """`blocks` with every choice for one of its kernels in turn, the present one first."""
    present = getattr(blocks, field)
    choices = CHOICES[module]
    tried = [present._replace(**dict(zip(choices, sizes))) for sizes in itertools.product(*choices.values())]
    return [blocks] + [blocks._replace(**{field: tile}) for tile in tried if tile != present]


def from_lists(module: str, sizes: list[list[int]]) -> Any:
    """`Blocks` of what JSON made of it."""
    like = default_blocks(module, 128)
    return type(like)(*(type(old)(*new) for old, new in zip(like, sizes)))


def as_lists(blocks: Any) -> list[list[int]]:
    """For JSON."""
    return [list(tile) for tile in blocks]


def entry(blocks: Any) -> str:
    """As it is written in the module's table."""
    tiles = (f"{type(tile).__name__}({', '.join(map(str, tile))})" for tile in blocks)
    return f"{type(blocks).__name__}({', '.join(tiles)})"
