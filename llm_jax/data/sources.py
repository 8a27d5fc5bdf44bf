"""The corpus: documents out of package registries or out of the user's own files, deduplicated and split."""

from collections.abc import Iterator

from llm_jax.config import CorpusConfig
from llm_jax.data.documents import Document


def iter_documents(config: CorpusConfig) -> Iterator[Document]:
    """Every document of the corpus once, held-out documents included, source after source."""
    raise NotImplementedError


def sample_documents(config: CorpusConfig, sample_bytes: int, seed: int) -> Iterator[Document]:
    """About `sample_bytes` of UTF-8 text drawn over all sources, without held-out documents; 0 = all of them."""
    raise NotImplementedError
