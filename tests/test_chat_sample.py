"""sample.py as a chat: its commands, one turn, files of conversations, and what it refuses."""

import io
import json
import sys
from pathlib import Path

import pytest
from helpers import random_model, run_stage, told
from test_chat import SMOLLM2

import sample
from plainllama.chat import CHATML, Template, conversation_of
from plainllama.huggingface import save_model, side_files
from plainllama.terminal import run_main
from plainllama.tokenizer import find_tokenizer, with_turns

BYTES = with_turns(find_tokenizer("byte"))


@pytest.fixture
def ckpt(tmp_path, monkeypatch) -> Path:
    """A random model of bytes with a chat template."""
    monkeypatch.chdir(tmp_path)
    model = random_model(vocab_size=259, max_seq_len=160)
    files = side_files(model.config, BYTES, template=Template(CHATML, BYTES, {}))
    save_model(model, tmp_path / "model", files=files)
    return tmp_path / "model"


@pytest.fixture
def say(ckpt, capsys, monkeypatch):
    def call(*flags: str, stdin: str = "") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        shared = f"--ckpt={ckpt}", "--temperature=0", "--max_new_tokens=5"
        run_stage(lambda: run_main(sample.main), *shared, *flags)
        return tuple(capsys.readouterr())

    return call


def test_commands_of_a_chat_change_the_conversation(say):
    lines = "Hello|/again|/system Be brief.|Yo|/save a.jsonl|/undo|/save a.jsonl|/new|/save a.jsonl"
    out, err = say("--chat", stdin="\n".join(lines.split("|")) + "\n")
    first, second, third = (
        conversation_of(json.loads(line)) for line in Path("a.jsonl").read_text().splitlines()
    )
    assert [m["role"] for m in first] == ["system", *2 * ["user", "assistant"]]
    contents = [message["content"] for message in first]
    assert contents[:2] == ["Be brief.", "Hello"] and contents[3] == "Yo"
    assert (second, third) == (first[:3], first[:1])
    assert out.startswith(f"> Hello\n{first[2]['content']}\n> /again\n{first[2]['content']}\n")
    assert err.count("appended to a.jsonl") == 3


def test_mistakes_in_a_chat_are_told_and_it_goes_on(say):
    lines = "/undo|/again|/save|/save a.jsonl|/syst|/help|/top_k 3|/top_k x"
    lines += f"|{'x' * 200}|Hi|/save no/such/place|/quit|never read"
    out, err = say("--chat", stdin=lines.replace("|", "\n"))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    for message, line in zip(
        ["there is no question yet"] * 2
        + [
            "/save takes the name",
            "nothing to save yet",
            "did you mean /system?",
            "top_k takes a whole",
        ]
        + ["the message takes 2", "No such file"],
        errors,
        strict=True,
    ):
        assert message in line
    assert "/system TEXT" in err and "> Hi\n" in out and "never" not in out


def test_a_full_context_loses_whole_exchanges_from_its_front_and_says_so(say):
    _, err = say("--chat", stdin="".join(f"{n} what is that to you\n" for n in range(4)))
    assert "the context of 160 tokens is full: exchanges left out: 1\n" in err


def test_one_turn_prints_the_answer_alone_and_json_the_messages(say):
    answer, _ = say("--chat", "--prompt=Hello")
    whole = json.loads(say("--chat", "--prompt=Hello", "--json")[0])
    assert whole["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": answer.removesuffix("\n")},
    ]
    continued, _ = say("--prompt=Hello")
    assert continued.startswith("Hello") and say("--prompt=Hello", "--no-chat")[0] == continued
    cut, err = say("--chat", "--prompt=Hello", f"--stop={answer[1:3]}")
    assert cut == answer.partition(answer[1:3])[0] + "\n" and "stop string" in err


def test_a_file_of_conversations_is_answered_each_by_itself(say):
    talks = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    ]
    Path("a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    out, _ = say("--chat", "--prompt_file=a.jsonl", "--json")
    answers = [json.loads(line)["messages"] for line in out.splitlines()]
    assert [answer[:-1] for answer in answers] == talks
    assert answers[0] == json.loads(say("--chat", "--prompt=Hello", "--json")[0])["messages"]


def test_an_answer_ends_where_the_context_does(say):
    _, err = say("--chat", "--prompt=" + "x" * 110, "--max_new_tokens=-1", "--repetition_penalty=2")
    assert "stopped by the end of the context" in err or "end of text" in err


def test_what_is_no_chat_is_refused_in_one_line(say, ckpt, capsys):
    Path("a.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "x"}]}))
    ask = lambda *flags: told(capsys, sample.main, f"--ckpt={ckpt}", *flags)[-1]  # noqa: E731
    assert "the last message is not the user's" in ask("--chat", "--prompt_file=a.jsonl")
    assert "messages with --chat" in ask("--prompt_file=a.jsonl")
    assert "of a context of 160" in ask("--chat", "--prompt=" + "x" * 200)
    (ckpt / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert "the chat template fails: no" in ask("--chat", "--prompt=x")
    (ckpt / "chat_template.jinja").unlink()
    settings = json.loads((ckpt / "tokenizer_config.json").read_text())
    (ckpt / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": SMOLLM2}))
    assert say("--chat", "--prompt=x")[0]  # older readers' place
    (ckpt / "tokenizer_config.json").unlink()
    assert "has no chat template: leave --chat out" in ask("--chat", "--prompt=x")
