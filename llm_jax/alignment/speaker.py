"""A model that talks: it replies to many dialogues at once."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from llm_jax.config import SamplingConfig
from llm_jax.data.documents import text_hash
from llm_jax.interop.pretrained import Pretrained
from llm_jax.sampling.generate import generate
from llm_jax.tokenization.chat import ChatTemplate, Message

STREAMS = 1 << 32
SENTENCE = re.compile(
    r""".*[^\W\d_](?:[.!?]+["')\]»”]*(?=\s|$) | [。！？]+[”」』]*)  # a letter, a sentence's end, what closes it
    | .*(?=\n)""",
    re.DOTALL | re.VERBOSE,
)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A loaded model and how it is sampled; what a dialogue is replied depends on no other dialogue."""

    model: Pretrained
    template: ChatTemplate
    sampling: SamplingConfig
    mesh: Mesh
    batch_size: int  # dialogues at once; a batch that is not full is filled up, so that one program serves all
    advance: Callable[[int], object] = lambda replied: None  # is told how many dialogues got a reply

    def reply(self, dialogues: Sequence[Sequence[Message]]) -> list[str]:
        """The reply to each dialogue, without a last sentence that the limit of tokens cut off."""
        replies: list[str] = []
        for start in range(0, len(dialogues), self.batch_size):
            chosen = dialogues[start : start + self.batch_size]
            replies += self._reply(chosen)
            self.advance(len(chosen))
        return replies

    def _reply(self, dialogues: Sequence[Sequence[Message]]) -> list[str]:
        prompts = [self.template.encode(dialogue) for dialogue in dialogues]
        streams = [text_hash("\n".join(m.content for m in dialogue)) % STREAMS for dialogue in dialogues]
        missing = self.batch_size - len(prompts)
        with jax.set_mesh(self.mesh):
            found = generate(
                self.model.params,
                self.model.config,
                prompts + prompts[:1] * missing,
                self.sampling,
                stop_ids=self.template.stop_ids,
                streams=streams + streams[:1] * missing,
            )
        said = [(self.template.reply_text(each.tokens).strip(), each.finished) for each in found[: len(dialogues)]]
        return [text if finished == "stop" else whole_sentences(text) for text, finished in said]


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence or line; all of it where no sentence ends."""
    found = SENTENCE.match(text)
    return found[0].strip() if found and found[0].strip() else text
