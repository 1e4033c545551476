"""Datasets of conversations: every format of records, what is refused, what is written."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from prepared import write
from pyarrow import parquet
from test_chat import SMOLLM2, source, tokenizer

from plainllama.chat import CHATML
from plainllama.data import load_dataset, verify_dataset
from plainllama.terminal import UserError


def talk(number: int, exchanges: int = 1) -> list[dict[str, str]]:
    turns = []
    for n in range(exchanges):
        turns.append({"role": "user", "content": f"What is {number} and {n}?"})
        turns.append({"role": "assistant", "content": f"It is {number + n}."})
    return turns


TALKS = [talk(number, 1 + number % 3) for number in range(40)]


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def chats(path: str = "chats.jsonl", talks=TALKS) -> str:
    return write(path, lines(*({"messages": talk} for talk in talks)))


def texts(dataset, split: str) -> list[str]:
    """The conversations of a split, each id learned inside brackets."""
    ids, mask = dataset.read(split), dataset.read(split, "mask")
    ends = np.cumsum(dataset.read(split, "lengths"))
    assert (len(ids), len(mask), len(ends)) == (ends[-1], ends[-1], dataset.documents[split])
    found = []
    for row, learned in zip(np.split(ids, ends)[:-1], np.split(mask, ends)[:-1], strict=True):
        pieces = [dataset.tokenizer.token_bytes(id).decode() for id in row]
        marked = [
            f"[{p}]" if is_learned else p for p, is_learned in zip(pieces, learned, strict=True)
        ]
        found.append("".join(marked).replace("][", ""))
    return found


def chatml(talk, learn: bool = True) -> str:
    begin, end = "[]" if learn else ("", "")
    return "".join(
        f"<|im_start|>{m['role']}\n"
        + (f"{begin}{m['content']}<|im_end|>{end}\n" if m["role"] == "assistant" else "")
        + (f"{m['content']}<|im_end|>\n" if m["role"] != "assistant" else "")
        for m in talk
    )


def test_each_conversation_is_written_whole_with_its_answers_learned_to_their_end(run):
    dataset = run(chats(), "--vocab_size=300")
    verify_dataset(dataset)
    assert sorted(texts(dataset, "train") + texts(dataset, "val")) == sorted(map(chatml, TALKS))
    assert dataset.documents == {"train": 36, "val": 4}
    learned = {split: int(dataset.read(split, "mask").sum()) for split in ("train", "val")}
    assert dataset.conversations["learned"] == learned
    assert dataset.template.tokenizer.content == dataset.tokenizer.content


def test_every_layout_and_format_of_records_gives_the_same_conversations(run):
    names = {"user": "human", "assistant": "gpt"}
    one = [talk(number) for number in range(40)]
    sharegpt = [[{"from": names[m["role"]], "value": m["content"]} for m in t] for t in one]
    alpaca = [{"instruction": t[0]["content"], "output": t[1]["content"]} for t in one]
    write("share.jsonl", lines(*({"conversations": turns} for turns in sharegpt)))
    write("array.json", json.dumps([{"messages": t, "id": 1} for t in one]))
    rows = [f'"{a["instruction"]}",,"{a["output"]}"\n' for a in alpaca]
    write("alpaca.csv", "instruction,input,output\n" + "".join(rows))
    parquet.write_table(pyarrow.table({"n": [0] * 40, "messages": one}), "rows.parquet")
    write("alpaca.jsonl", lines(*alpaca))
    piped = write("piped.txt", Path("alpaca.jsonl").read_text())
    found = [run(chats(talks=one), "--overwrite").sha256]
    for name in ("share.jsonl", "array.json", "alpaca.csv", "rows.parquet", "alpaca.jsonl"):
        found.append(run(name, "--overwrite").sha256)
    found.append(run(piped, "--overwrite", "--format=chat").sha256)
    assert all(one == found[0] for one in found)


def test_alpaca_input_and_system_have_their_places(run):
    record = {"instruction": "Add.", "input": "1 and 1", "output": "2", "system": "Be brief."}
    dataset = run(write("a.jsonl", lines(*(record | {"output": str(n)} for n in range(20)))))
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd.\n\n1 and 1<|"
    assert all(text.startswith(expected) for text in texts(dataset, "train"))


def test_the_tokenizer_is_trained_on_what_is_said(run):
    dataset = run(chats(), "--vocab_size=300")
    learned = {dataset.tokenizer.token_bytes(id) for id in range(256, 297)}
    assert b"What" in learned and not any(b"role" in token or b"cont" in token for token in learned)


def test_learn_all_learns_all_but_the_first_id(run):
    mask = run(chats(), "--learn=all").read("train", "mask")
    dataset = load_dataset(Path("out"))
    starts = np.cumsum(dataset.read("train", "lengths"))[:-1]
    assert np.flatnonzero(mask == 0).tolist() == [0, *starts]


def test_the_template_of_the_tokenizers_directory_is_used(run):
    write("model/tokenizer.json", tokenizer().content)
    write("model/tokenizer_config.json", json.dumps({"chat_template": SMOLLM2}))
    dataset = run(chats(), "--tokenizer=model")
    assert dataset.template.source == SMOLLM2
    assert texts(dataset, "train")[0].startswith("<|im_start|>system\nYou are a helpful AI")
    write("model/chat_template.jinja", source("llama3"))  # which comes first
    dataset = run(chats(), "--tokenizer=model/tokenizer.json", "--overwrite")
    assert texts(dataset, "train")[0].startswith(
        "<|endoftext|><|start_header_id|>user<|end_header_id|>\n\n"
    )


def test_a_tokenizer_without_the_words_of_turns_gets_them(run):
    assert run(chats(), "--tokenizer=byte").vocab_size == 259


def test_a_date_is_the_same_in_all_conversations(run):
    write("model/tokenizer.json", tokenizer().content)
    write(
        "model/chat_template.jinja",
        "{{ strftime_now('%d %b %Y %f') }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    found = texts(run(chats(), "--tokenizer=model"), "train")
    assert len({text.partition("<|im_start|>")[0] for text in found}) == 1


def test_odd_conversations_are_counted(run, capsys):
    talks = [*TALKS, [{"role": "user", "content": "?"}], [*talk(77)[:1], *talk(78)[1:]]]
    talks[-1][1]["content"] += " "
    run(chats(talks=talks), "--tokenizer=byte")
    assert json.loads(Path("out/meta.json").read_text())["notes"] == {
        "conversations left out: there is no answer": 1,
        "conversations with white space at the edge of a message": 1,
    }
    assert "there is no answer" in capsys.readouterr().err


def test_preview_underlines_what_is_learned(run, capsys):
    with pytest.raises(UserError):  # it writes nothing
        run(chats(), "--preview")
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n[[It is 0.<|im_end|>]]\n" in shown


REFUSED = {
    "no messages": ([{"messages": talk(1)}, {"message": talk(1)}], "record 2: no messages"),
    "tool": ([{"messages": [{"role": "tool", "content": "x"}]}], "the role 'tool', not one of"),
    "calls": (
        [{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}],
        "message 1 calls tools",
    ),
    "content": ([{"messages": [{"role": "user", "content": ["x"]}]}], "is no text but ['x']"),
    "turn": ([{"messages": ["hello"]}], "message 1 is 'hello'"),
    "empty": ([{"messages": []}], "its messages are []"),
    "no answer": ([{"messages": talk(n)[:1]} for n in range(9)], "there is no answer"),
    "too few": ([{"messages": talk(1)}], "too few for two splits"),
    "long": (
        [{"messages": [{"role": "user", "content": "x" * 5_000_000}]}],
        "longer than 4,194,304",
    ),
}


@pytest.mark.parametrize("records, message", REFUSED.values(), ids=REFUSED)
def test_conversations_that_cannot_be_learned_are_refused_in_one_line(run, records, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        run(write("bad.jsonl", lines(*records)))
    assert "\n" not in str(refused.value)


def test_text_and_conversations_in_one_dataset_are_refused(run):
    write("text.jsonl", lines(*({"text": str(n)} for n in range(9))))
    for names, message in (
        ([chats(), "text.jsonl"], "no messages"),
        (["text.jsonl", chats()], "no key 'text'"),
        ([write("a.txt"), chats()], "a.txt is text, and other files hold conversations"),
    ):
        with pytest.raises(UserError, match=message):
            run(*names)


def test_conversations_are_found_in_a_file_without_a_suffix(run):
    dataset = run(write("unnamed", Path(chats()).read_text()))
    assert dataset.documents == {"train": 36, "val": 4}


BAD_TEMPLATES = {
    "refuses": ("{{ raise_exception('no system') }}", "the chat template fails: no system"),
    "runs code": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template fails"),
    "syntax": ("{% for %}", "the chat template is damaged"),
    "no end": ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no added token that ends"),
    "no question": (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}",
        "do not follow its question",
    ),
    "leaves out": ("{{ messages[0].content }}<|im_end|>", "each content once"),
    "no text": (7, "its chat_template is 7"),
}


@pytest.mark.parametrize("text, message", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(run, text, message):
    write("model/tokenizer.json", tokenizer().content)
    write("model/tokenizer_config.json", json.dumps({"chat_template": text}))
    with pytest.raises(UserError, match=message) as refused:
        run(chats(), "--tokenizer=model")
    assert "\n" not in str(refused.value)


REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)


def test_a_template_that_refuses_most_conversations_is_refused_by_its_own_words(run):
    write("model/tokenizer.json", tokenizer().content)
    write("model/chat_template.jinja", REFUSES_SYSTEM)
    system = [{"role": "system", "content": "Be brief."}]
    asked = [system * (n % 3 > 0) + talk(n) for n in range(30)]
    with pytest.raises(UserError, match="conversations are left out; .*System role not supported"):
        run(chats(talks=asked), "--tokenizer=model", "--val_fraction=0.01")
