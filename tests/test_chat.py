"""Conversations as ids: those of transformers, its mask, and no word of the template in contents.

The templates are those of TRL, which has most of them twice: as models have them, and with tags by
which transformers finds what an assistant writes.
"""

import functools
import json
import zipfile

import numpy as np
import pytest
from conftest import fetch_wheel
from hypothesis import given
from hypothesis import strategies as st
from prepared import quick
from transformers import PreTrainedTokenizerFast
from vocabularies import GPT4, byte_level

from plainllama.chat import CHATML, Template
from plainllama.encoding import tokenizers_encoder
from plainllama.tokenizer import Tokenizer

# SmolLM2 adds a system message of its own.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same templates with tags by which transformers finds what an assistant writes.
TAGGED = {
    "chatml": (
        "{{ message.content }}<|im_end|>\n",
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}",
    ),
    "smollm2": (
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    ),
    "llama3": (
        "{{ content }}",
        "{% if message.role == 'assistant' %}{% set a, b, said = content.partition('\n\n') %}"
        "{{ a + b }}{% generation %}{{ said }}{% endgeneration %}"
        "{% else %}{{ content }}{% endif %}",
    ),
    "qwen2_5": (
        "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
        "{{- '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
        "{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{- message.content + '<|im_end|>' }}{% endif %}{{- '\\n' }}",
    ),
}
NAMES = ("chatml", "smollm2", "llama3", "qwen2_5", "qwen3")
WORDS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<think>", "</think>")
PLAIN = "ab Z09.,'\u00e9\u65e5\U0001f469\u200d"
ODD = st.sampled_from(["", *WORDS, "<|im_", "user", "\n", " ", "it's", "{{ x }}", "\x00"])
# Contents without white space at their edges, where ids are transformers'.
contents = st.one_of(
    st.text(PLAIN + "\n", max_size=20).map(str.strip),
    st.just("word " * 99 + "end"),
    st.text(st.characters(codec="utf-8"), max_size=8).map(lambda text: f"({text})"),
)
hostile = st.lists(ODD, max_size=6).map("".join)


@functools.cache
def source(name: str) -> str:
    ours = {"chatml": CHATML, "smollm2": SMOLLM2}
    if name in ours:
        return ours[name]
    with zipfile.ZipFile(fetch_wheel("trl==1.16.0")) as wheel:
        return wheel.read(f"trl/chat_templates/{name}.jinja").decode()


@functools.cache
def tokenizer(split: str = GPT4) -> Tokenizer:
    """Words of several letters, and the special tokens of all these templates."""
    special = [*WORDS[:4], "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    added = {"<|endoftext|>": True} | dict.fromkeys(special, True) | dict.fromkeys(WORDS[4:], False)
    tokens = [b"us", b"er", b"user", b"\n\n", b" b"]
    return Tokenizer(json.dumps(byte_level(tokens, split, added)).encode())


BOS = {"bos_token": "<|begin_of_text|>"}


@functools.cache
def template(name: str) -> Template:
    return Template(source(name), tokenizer(), BOS)


@functools.cache
def theirs(name: str) -> PreTrainedTokenizerFast:
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend, **BOS)
    loaded.chat_template = source(name)
    return loaded


@st.composite
def conversations(draw, content=contents):
    """Zero or one system message, up to four exchanges, or a system message alone."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(content)})
    for _ in range(draw(st.integers(0 if messages else 1, 4))):
        for role in ("user", "assistant"):
            messages.append({"role": role, "content": draw(content)})
    return messages


def encode(found: Template, messages):
    return found.encode([messages], tokenizers_encoder(found.plain))[0]


@pytest.mark.parametrize("name", NAMES)
@quick(max_examples=30)
@given(messages=conversations())
def test_ids_are_those_of_apply_chat_template(name, messages):
    encoded = encode(template(name), messages)
    assert not encoded.reason
    whole = theirs(name).apply_chat_template(messages, return_dict=False)
    assert encoded.ids.tolist() == whole
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    expected = theirs(name).apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False
    )
    assert template(name).prompt(asked) == expected


@functools.cache
def tagged(name: str) -> PreTrainedTokenizerFast:
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend, **BOS)
    if name == "qwen3":  # whole turns of the assistant
        begin, end = (f'{{%- elif message.role == "{role}" %}}' for role in ("assistant", "tool"))
        text = source(name).replace(begin, begin + "{% generation %}")
        loaded.chat_template = text.replace(end, "{%- endgeneration %}" + end)
    else:
        loaded.chat_template = source(name).replace(*TAGGED[name])
    return loaded


@pytest.mark.parametrize("name", NAMES)
@quick(max_examples=30)
@given(messages=conversations())
def test_mask_is_that_of_a_tagged_template_up_to_what_follows_the_end_of_a_turn(name, messages):
    ids, learned, *_ = encode(template(name), messages)
    whole = tagged(name).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids.tolist() == whole["input_ids"]
    expected = np.array(whole["assistant_masks"], bool)
    if name == "qwen3":  # a turn is its generation prompt, what is learned, and a line break
        asked = len(tokenizer().encode("<|im_start|>assistant\n", special_tokens=True))
        turns = np.flatnonzero(np.diff(expected, prepend=False, append=False)).reshape(-1, 2)
        expected[:] = False
        for begin, end in turns:
            expected[begin + asked : end - 1] = True
    assert learned.tolist() == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
@quick(max_examples=30)
@given(messages=conversations(hostile))
def test_contents_never_give_a_word_of_the_template(name, messages):
    ids, _, reason, _ = encode(template(name), messages)
    if reason:  # it cuts what stands before </think> out of an answer
        assert name == "qwen3" and "</think>" in json.dumps(messages)
        return
    same = [message | {"content": "x"} for message in messages]
    calm = encode(template(name), same)
    words = [id for id, t in tokenizer().added.items() if t.special or t.content in source(name)]
    added = np.array(words)
    assert ids[np.isin(ids, added)].tolist() == calm.ids[np.isin(calm.ids, added)].tolist()
