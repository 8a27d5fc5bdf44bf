"""Write chat.json: conversations as transformers renders and encodes them, with the small tokenizers they are for.

    python tests/golden/make_chat.py

Needs transformers, which the tests do not: run it again only to add a case. Written with transformers 5.23.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "system user assistant",
    "You are a helpful assistant. You answer in one word.",
    "What is the capital of France? The capital of France is Paris. [INST] <<SYS>> [/INST] <</SYS>>",
    "Paris is the capital of France,\n\nand Berlin that of Germany.",
]

TEMPLATES = {
    # As SmolLM2's: a system message of its own where there is none.
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou answer.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # As LLaMA-2's: stripped contents, the system's words in the first body, an error where turns do not alternate.
    "llama2": """
{%- if messages[0].role == 'system' %}
    {%- set words = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set words = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('turns must alternate') }}
    {%- endif %}
    {%- set content = (words if loop.first else '') + turn.content %}
    {%- if turn.role == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}""",
    # What newer templates use: blocks on lines of their own, loop controls, macros, JSON, a namespace, marked replies.
    "modern": """{% set state = namespace(count=0) %}
{% macro line(message) %}
{{ message.role }}: {{ message.content | tojson }}
{% endmacro %}
{% for message in messages %}
    {% if message.content == 'skip me' %}
        {% continue %}
    {% endif %}
    {% set state.count = state.count + 1 %}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ message.content[:40] }}<|im_end|>
        {% endgeneration %}
    {% else %}
{{ line(message) }}
    {% endif %}
{% endfor %}
{{ state.count }} of {{ messages | length }}{{ eos_token }}
""",
}

CONVERSATIONS = [
    [("user", "What is the capital of France?")],
    [("system", "You answer in one word."), ("user", "  What is the capital of Germany?\n")],
    [("user", "\n\nfirst\n"), ("assistant", " Paris. "), ("user", "é 一二三 \U0001f600 < | > <")],
    [("system", "  "), ("user", "skip me"), ("assistant", "\tBerlin\n\nthat  of"), ("user", "{{ 7 * 7 }} {% if %}")],
    [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")],
]


def byte_level() -> Tokenizer:
    """As GPT-2's and SmolLM2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(name, special=True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As LLaMA-2's: a space before every text, spaces written as U+2581, bytes for unknown characters."""
    trained = Tokenizer(models.BPE())
    # Words by their leading space, as merging over whole lines would be slow to train.
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=100, show_progress=False)
    trained.train_from_iterator(TEXT, trainer)
    content = json.loads(trained.to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    merges = [tuple(merge) for merge in content["model"]["merges"]]
    vocabulary = {name: i for i, name in enumerate([*names, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    return tokenizer


KINDS = {
    "byte_level": (byte_level, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}),
    "byte_fallback": (byte_fallback, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}


def main() -> None:
    tokenizers, cases = {}, []
    for kind, (build, specials) in KINDS.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=build(), **specials)
        ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in specials.items()}
        definition = tokenizer.backend_tokenizer.to_str()
        tokenizers[kind] = {"definition": definition, "bos": ids["bos_token"], "eos": ids["eos_token"]}
        for template, source in TEMPLATES.items():
            for conversation in CONVERSATIONS:
                messages = [{"role": role, "content": content} for role, content in conversation]
                prompt = messages[-1]["role"] == "user"
                text = tokenizer.apply_chat_template(
                    messages, chat_template=source, tokenize=False, add_generation_prompt=prompt
                )
                encoded = tokenizer.encode(text, add_special_tokens=False)
                cases.append({"tokenizer": kind, "template": template, "messages": conversation, "ids": encoded})
    content = {"tokenizers": tokenizers, "templates": TEMPLATES, "cases": cases}
    Path(__file__).with_name("chat.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
