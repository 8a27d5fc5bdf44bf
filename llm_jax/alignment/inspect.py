"""What a model is trained to write, to be looked at: a sample's tokens in colours, with the weights of their losses."""

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

    Control tokens are shown by their names, bytes that form no character as \\xNN, and other control characters
    escaped; a line break is also shown as ⏎. Where the loss wants another token than the one that is read, it is
    "read→wanted".
    """
    names = {token: name for name, token in tokenizer.special_ids.items()}
    text = Text()
    weight = None
    for i, (token, label) in enumerate(zip(sample.tokens.tolist(), sample.labels.tolist())):
        if sample.weights[i] != weight:
            weight = sample.weights[i]
            text.append(f"‹{weight:g}›", WEIGHT)
        shown = _shown(token, tokenizer, names)
        if not weight:
            text.append(shown, READ[i % 2])
        elif label == token:
            text.append(shown, LEARNED[i % 2])
        else:
            text.append(f"{shown}→{_shown(label, tokenizer, names)}", RELABELLED)
    return text


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


def _shown(token: int, tokenizer: Tokenizer, names: dict[int, str]) -> str:
    """A token's text as it stands in the middle of a line, in which nothing can do things to a terminal."""
    if token in names:
        return names[token]
    before = tokenizer.encode("x")
    content = tokenizer.decode_bytes([*before, token])[len(tokenizer.decode_bytes(before)) :]
    text = content.decode(errors="backslashreplace")
    return "".join(map(_visible, text)) or f"<{token}>"


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    return repr(character)[1:-1] if unicodedata.category(character) in ("Cc", "Cf") else character
