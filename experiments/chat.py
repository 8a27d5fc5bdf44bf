"""Talk with a model in the terminal.

    python -m experiments.chat --model=smollm2
    python -m experiments.chat --model=Llama-2-7b-chat-hf --config.template=llama2
    echo "What is the capital of France?" | python -m experiments.chat --model=smollm2 --config.temperature=0

--model is a run folder, a Hugging Face folder, a .gguf file, or smollm2, which is downloaded. Ctrl-C stops a reply;
Ctrl-C or Ctrl-D where a message is expected leaves. Input that is not typed is read as one message a line, and only
the replies are printed. Nothing is written but by /save.
"""

import contextlib
import dataclasses
import importlib
import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags
from rich.console import Console

from experiments import runner
from llm_jax.config import SamplingConfig
from llm_jax.errors import UserError, require
from llm_jax.interop import pretrained
from llm_jax.interop.pretrained import Pretrained
from llm_jax.sampling.generate import generate
from llm_jax.sampling.stream import TextStream
from llm_jax.tokenization import chat
from llm_jax.tokenization.chat import ChatTemplate, Message

# Another experiment that is imported beside this one, as by a test, may have flags of these names.
MODEL = flags.DEFINE_string(
    "model", "smollm2", "a run folder, a Hugging Face folder, a .gguf file, or smollm2", allow_override=True
)
PROMPT = flags.DEFINE_string("prompt", "", "one message: print the reply and end", allow_override=True)

COMMANDS = {
    "/help": "list these commands; begin a message with a space to send it as it is",
    "/reset": "forget the conversation",
    "/system": "/system TEXT gives the model its instructions, /system alone takes them back",
    "/save": "/save FILE adds the conversation to a JSON Lines file, by default WORKDIR/chat.jsonl",
    "/quit": "leave",
}


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """The chat format and how replies are drawn; -1, or 0 where noted, is what the format's own models use."""

    template: str = "auto"  # llama2, baichuan2, chatml, file; auto = the file's own, else chatml if it fits
    system: str = ""  # instructions; "" = the format's own
    dtype: str = ""  # of the parameters; "" = as stored
    quantize: str = "none"  # int8 or int4: round the weights after loading
    max_new_tokens: int = 512  # of a reply; at most half of the context is kept for it
    temperature: float = -1.0  # 0 = greedy
    top_k: int = -1  # 0 = off
    top_p: float = 0.0  # 0 = the format's, 1 = off
    repetition_penalty: float = 0.0  # 0 = the format's, 1 = off
    max_context: int = 0  # 0 = the model's max_length
    cache_dtype: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_k"):
            value = getattr(self, name)
            require(value == -1 or value >= 0, f"{name}={value} must be 0 or more, or -1 for the format's own")


class Reply(NamedTuple):
    """What the model answered."""

    text: str
    finished: str  # "stop", "length", or "interrupted"
    left_out: int  # rounds at the beginning of the conversation that did not fit any more


class Conversation:
    """A model, a chat format, and what was said so far; what no longer fits is kept, but not shown to the model."""

    def __init__(self, model: Pretrained, template: ChatTemplate, sampling: SamplingConfig, system: str = ""):
        """Begin with no messages but the system's, if `system` is not empty."""
        self._model = model
        self._template = template
        self._sampling = sampling
        self.messages: list[Message] = []
        self.set_system(system)

    def set_system(self, text: str) -> None:
        """Replace the system message, or take it away."""
        spoken = [message for message in self.messages if message.role != "system"]
        self.messages = [*([Message("system", text)] if text else []), *spoken]

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = [message for message in self.messages if message.role == "system"]

    def ask(self, text: str, on_text: Callable[[str], None]) -> Reply:
        """The reply to a message; its text is also passed to `on_text` in parts, as it comes.

        A reply that Ctrl-C interrupts is kept as far as it came. Raises `UserError` for a message that is too long or
        that the chat format refuses; the conversation then stays as it was.
        """
        asked = [*self.messages, Message("user", text)]
        context = self._sampling.max_context or self._model.config.max_length
        kept = chat.fit(self._template, asked, context - self._sampling.max_new_tokens)
        words, finished = self._reply(self._template.encode(kept), on_text)
        if words or finished != "interrupted":
            self.messages = [*asked, Message("assistant", words)]
        return Reply(words, finished, (len(asked) - len(kept)) // 2)

    def _reply(self, prompt: list[int], on_text: Callable[[str], None]) -> tuple[str, str]:
        stream = TextStream(self._model.tokenizer, self._template.stop_ids)
        parts = []

        def note(text: str) -> None:
            parts.append(text)
            on_text(text)

        # Other numbers for every reply, so that the same question may get another answer.
        sampling = dataclasses.replace(self._sampling, seed=self._sampling.seed + len(self.messages))
        try:
            (generation,) = generate(
                self._model.params,
                self._model.config,
                [prompt],
                sampling,
                stop_ids=self._template.stop_ids,
                pad_id=max(0, self._model.tokenizer.pad_id),
                on_tokens=lambda row, ids: note(stream.feed(ids)),
            )
            finished = generation.finished
        except KeyboardInterrupt:
            finished = "interrupted"
        note(stream.finish())
        return "".join(parts), finished


def run(config: ChatConfig, workdir: Path, model: str, prompt: str = "") -> Conversation:
    """Load a model and talk with whoever sits at the terminal, or answer a file of messages."""
    loaded = pretrained.load_to_generate(model, dtype=config.dtype or None, quantize=config.quantize)
    conversation = begin(config, loaded)
    if prompt:
        _talk(conversation, workdir, [prompt])
    elif sys.stdin.isatty():
        print("/help lists the commands", file=sys.stderr)
        _talk(conversation, workdir, _typed(), patient=True)
    else:
        _talk(conversation, workdir, (line.removesuffix("\n") for line in sys.stdin))
    return conversation


def begin(config: ChatConfig, model: Pretrained) -> Conversation:
    """A conversation with a loaded model."""
    template = chat.choose(config.template, model.tokenizer, model.chat_template)
    own = template.sampling
    context = config.max_context or model.config.max_length
    sampling = SamplingConfig(
        max_new_tokens=min(config.max_new_tokens, max(1, context // 2)),
        temperature=config.temperature if config.temperature >= 0 else own.temperature,
        top_k=config.top_k if config.top_k >= 0 else own.top_k,
        top_p=config.top_p or own.top_p,
        repetition_penalty=config.repetition_penalty or own.repetition_penalty,
        max_context=config.max_context,
        cache_dtype=config.cache_dtype,
        seed=config.seed,
    )
    return Conversation(model, template, sampling, config.system)


def _talk(conversation: Conversation, workdir: Path, lines: Iterable[str], patient: bool = False) -> None:
    """Answer lines in turn, some of which are commands; a mistake ends it, unless somebody is there to mend it."""
    notes = Console(stderr=True, highlight=False)
    left_out = 0
    for line in lines:
        try:
            if line.startswith("/"):
                name, _, argument = line.partition(" ")
                if name == "/quit":
                    return
                notes.print(
                    _command(conversation, workdir, name, argument.strip()), style="dim", markup=False, soft_wrap=True
                )
            elif line.strip():
                reply = conversation.ask(line, _show)
                print()
                for note in _remarks(reply, left_out):
                    notes.print(note, style="dim", markup=False, soft_wrap=True)
                left_out = reply.left_out
        except UserError as error:
            if not patient:
                raise
            notes.print(f"error: {error}", style="red", markup=False, soft_wrap=True)


def _show(text: str) -> None:
    """Print a part of a reply: not through Rich, which prints it again if Ctrl-C comes in the midst of it."""
    print(visible(text), end="", flush=True)


def _typed() -> Iterator[str]:
    """What is typed, until Ctrl-C or Ctrl-D."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # arrow keys and a history, where the system has it
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    print()


def _command(conversation: Conversation, workdir: Path, name: str, argument: str) -> str:
    """Do what a command says; returns what to say about it."""
    require(name in COMMANDS, f"unknown command {name}: /help lists those there are")
    if name == "/help":
        return "\n".join(f"{command:8} {meaning}" for command, meaning in COMMANDS.items())
    if name == "/reset":
        conversation.reset()
        return "the conversation is forgotten"
    if name == "/system":
        conversation.set_system(argument)
        return "the model has new instructions" if argument else "the model has no instructions of yours"
    path = Path(argument).expanduser() if argument else workdir / "chat.jsonl"
    save(conversation.messages, path)
    return f"saved to {path}"


def save(messages: Sequence[Message], path: Path) -> None:
    """Add a line {"messages": [{"role", "content"}, ...]} to a JSON Lines file, which is replaced as a whole.

    Raises `UserError` where there is nothing to save or the file cannot be written.
    """
    require(any(message.role == "assistant" for message in messages), "there is nothing to save yet")
    record = json.dumps({"messages": [dataclasses.asdict(message) for message in messages]}, ensure_ascii=False)
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(before + record + "\n", encoding="utf-8")
        partial.replace(path)
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot save to {path}: {error}") from None


def _remarks(reply: Reply, left_out: int) -> Iterator[str]:
    """What a person should know about a reply, besides its text."""
    if reply.finished == "length":
        yield "[cut at config.max_new_tokens]"
    if reply.finished == "interrupted":
        yield "[stopped]"
    if reply.left_out > left_out:
        yield f"[the context is full; oldest rounds that the model no longer sees: {reply.left_out}]"


def visible(text: str) -> str:
    """The text without control characters, with which a model could do things to a terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


if __name__ == "__main__":
    runner.main(
        lambda config, workdir: run(config, workdir, MODEL.value, PROMPT.value),
        ChatConfig,
        "configs/chat/default.py",
        save_config=False,
    )
