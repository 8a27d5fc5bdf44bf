"""What a model is trained to write, to be looked at: a sample's tokens in colours, with the weights of their losses."""

import codecs
import unicodedata
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from llm_jax.alignment.sft import Sample
from llm_jax.tokenization.tokenizer import Tokenizer

# Neighbouring tokens in two shades, so that one sees where they meet.
LEARNED, READ = ("black on green", "black on bright_green"), ("default", "underline")
RELABELLED, WEIGHT = "black on yellow", "bold magenta"
LEGEND = (
    ("learned", LEARNED[0]),
    ("learned in place of what is read", RELABELLED),
    ("read only", READ[1]),
    ("‹weight of the loss from here on›", WEIGHT),
)


def render(sample: Sample, tokenizer: Tokenizer) -> Text:
    """The tokens of a sample as coloured text; a mark ‹w› stands wherever the weight of the loss changes to w.

    Control tokens are shown by their names, in bold, which words that look like them are not; a character of several
    tokens at its last one; bytes that form none as \\xNN; what would not be seen escaped, and a line break also as ⏎.
    Where the loss wants another token than the one that is read, it is "read→wanted".
    """
    writer = _Writer(tokenizer)
    weight = None
    for i, (token, label) in enumerate(zip(sample.tokens.tolist(), sample.labels.tolist())):
        if sample.weights[i] != weight:
            weight = sample.weights[i]
            writer.mark(f"‹{weight:g}›", WEIGHT)
        style = (LEARNED if weight else READ)[i % 2]
        writer.token(token, RELABELLED if weight and label != token else style)
        if weight and label != token:
            writer.mark("→", RELABELLED)
            writer.token(label, RELABELLED)
    return writer.finish()


def show(samples: Sequence[Sample], tokenizer: Tokenizer, console: Console | None = None) -> None:
    """Print samples one after the other, each under a line with its numbers of tokens; `console=None` is stdout's."""
    console = console or Console(highlight=False)
    console.print(Text("  ").join(Text(name, style) for name, style in LEGEND))
    for number, sample in enumerate(samples, start=1):
        supervised = int((sample.weights > 0).sum())
        title = f"sample {number}: {len(sample.tokens):,} tokens, {supervised:,} with a loss"
        left_out = f", {sample.rounds_left_out:,} rounds left out at the end" if sample.rounds_left_out else ""
        console.rule(Text(title + left_out), align="left")
        console.print(render(sample, tokenizer), soft_wrap=True)


class _Writer:
    """Tokens written one by one."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._names = {token: name for name, token in tokenizer.special_ids.items()}
        self._before = tokenizer.encode("x")  # some tokenizers take a space from a text's first token
        self._start = len(tokenizer.decode_bytes(self._before))
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._text = Text()

    def token(self, token: int, style: str) -> None:
        """A token of the text."""
        content = self._tokenizer.decode_bytes([*self._before, token])[self._start :]
        if token in self._names or not content:
            self.mark(self._names.get(token, f"<{token}>"), f"{style} bold")
        else:
            self._text.append("".join(map(_visible, self._decoder.decode(content))), style)

    def mark(self, text: str, style: str) -> None:
        """Something between two characters."""
        self._text.append(self._decoder.decode(b"", final=True), style)
        self._decoder.reset()
        self._text.append(text, style)

    def finish(self) -> Text:
        """The whole text."""
        self.mark("", "")
        return self._text


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    return repr(character)[1:-1] if unicodedata.category(character) in ("Cc", "Cf") else character
