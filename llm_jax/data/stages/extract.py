"""The main text of HTML pages, as Markdown; documents of other formats stay as they are."""

import dataclasses
from pathlib import Path

import daft
from daft import DataType, col, lit

from llm_jax.data import pages
from llm_jax.data.pages import ExtractConfig
from llm_jax.data.stages import BECAUSE, DROPPED, HTML, ID, TEXT, Result


@dataclasses.dataclass(frozen=True)
class Extract:
    """Turns pages into texts; a page that is dropped keeps its HTML."""

    config: ExtractConfig = dataclasses.field(default_factory=ExtractConfig)
    name: str = "extract"

    def apply(self, documents: daft.DataFrame, scratch: Path) -> Result:
        """Raises `UserError` where trafilatura is missing and there are pages."""
        is_page = col("format").is_in([HTML])
        nothing = lit(None).cast(DataType.string())
        others = documents.where(~is_page).with_columns({DROPPED: nothing, BECAUSE: nothing})
        html = documents.where(is_page)
        count = len(html.select(ID).to_arrow())
        if not count:
            return Result(others, {"pages": 0})
        pages.check()
        fields = dict.fromkeys(("format", "text", DROPPED, BECAUSE), DataType.string())
        found = daft.func.batch(return_dtype=DataType.struct(fields))(self.extract)(col("text"))
        extracted = html.with_column("found", found).with_columns({name: col("found").get(name) for name in fields})
        return Result(others.concat(extracted.select(*others.column_names)), {"pages": count})

    def extract(self, html: daft.Series) -> list[dict[str, str | None]]:
        """The fields that `apply` changes of some pages."""
        sources = html.to_pylist()
        found = []
        for source, page in zip(sources, pages.extracted(sources, self.config), strict=True):
            format, text = (HTML, source) if page.reason else (TEXT, page.text)
            found.append({"format": format, "text": text, DROPPED: page.reason, BECAUSE: page.because})
        return found
