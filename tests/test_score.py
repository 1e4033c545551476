"""sample.py --score: log-likelihoods are transformers', accuracies lm-evaluation-harness's."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_stage
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample
from model import LLaMaTransformer, ModelConfig
from plainllama import score
from plainllama.huggingface import load_model, save_model, side_files
from plainllama.settings import run
from plainllama.tokenizer import load_tokenizer, save_tokenizer, train_bpe

WORDS = ["the", "a", "cat", "dog", "sees", "bites", "man", "über", "naïve", "日本", "of", ",", "7"]
CONTEXT = 24
LENGTHS = {"acc": lambda c: 1, "acc_norm": len, "acc_bytes": lambda c: len(c.encode())}


def text(draw: random.Random, least: int, most: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A random model over a small byte-level BPE, which tells texts apart."""
    draw = random.Random(0)
    corpus = " ".join(text(draw, 5, 9) for _ in range(300))
    folder = tmp_path_factory.mktemp("checkpoint")
    save_tokenizer(train_bpe([corpus.encode()], 320), folder / "tokenizer.json")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    config = ModelConfig(vocab_size=320, n_layers=2, n_embd=32, n_heads=4, max_seq_len=CONTEXT)
    torch.manual_seed(0)
    model = LLaMaTransformer(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    save_model(model, folder / "model", files=side_files(config, tokenizer))
    return folder / "model"


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """Questions of any length, also longer than the model's context, and without a context."""
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    records = []
    for number in range(60):
        choices = [text(draw, 1, 4) for _ in range(draw.randint(2, 4))]
        context = text(draw, 1, 20) + draw.choice(["", "", ":", " "]) if number else ""
        answer = draw.randrange(len(choices))
        records.append({"context": context, "choices": choices, "answer": answer})
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def scored(capsys, checkpoint: Path, questions: Path, *more: str) -> list[str]:
    run_stage(sample.main, f"--ckpt={checkpoint}", f"--score={questions}", "--device=cpu", *more)
    return capsys.readouterr().out.splitlines()


def test_log_likelihoods_are_those_of_transformers(checkpoint, questions, capsys):
    *lines, last = [json.loads(x) for x in scored(capsys, checkpoint, questions, "--json")]
    assert last.pop("questions") == len(lines) == 60
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
    for line, question in zip(
        lines, questions.read_text(encoding="utf-8").splitlines(), strict=True
    ):
        question = json.loads(question)
        context, expected = question["context"].rstrip(), []
        begin = tokenizer(context)["input_ids"] if context else [tokenizer.eos_token_id]
        for choice in question["choices"]:
            spaced = question["context"] + " " + choice
            ids = tokenizer(spaced)["input_ids"]
            ids = ids if context else [*begin, *ids]
            seen = torch.tensor(ids[-CONTEXT - 1 :])
            with torch.no_grad():
                log_p = theirs(seen[None, :-1]).logits[0].log_softmax(-1)
            of_tokens = log_p.gather(1, seen[1:, None])[:, 0]
            expected.append(of_tokens[len(of_tokens) - (len(ids) - len(begin)) :].sum().item())
        assert line["log_likelihoods"] == pytest.approx(expected, abs=1e-4)
        for name, size in LENGTHS.items():
            each = [x / size(c) for x, c in zip(expected, question["choices"], strict=True)]
            right[name] += each.index(max(each)) == question["answer"]
    assert last == {name: count / 60 for name, count in right.items()}
    assert len(set(right.values())) > 1  # or the three would not be told apart


def test_lm_eval_says_the_same(checkpoint, questions, capsys, tmp_path):
    pytest.importorskip("lm_eval")
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm", "acc_bytes")],
    }
    (tmp_path / "local.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "lm_eval", "--model=hf", "--tasks=local", "--device=cpu"]
    command += [f"--model_args=pretrained={checkpoint},dtype=float32", "--include_path=."]
    command += ["--output_path=results", "--batch_size=8"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    env = os.environ | offline
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").rglob("results*.json")
    theirs = json.loads(file.read_text(encoding="utf-8"))["results"]["local"]
    ours = json.loads(scored(capsys, checkpoint, questions, "--json")[-1])
    for name in ("acc", "acc_norm", "acc_bytes"):
        assert ours[name] == pytest.approx(theirs[f"{name},none"], abs=1e-9)


def test_batches_do_not_change_what_is_found(checkpoint, questions, monkeypatch):
    model, tokenizer = load_model(checkpoint).eval(), load_tokenizer(checkpoint / "tokenizer.json")
    asked = score.read_questions(questions)
    at_once = score.answer_questions(model, tokenizer, asked, [319])
    monkeypatch.setattr(score, "LOGITS", 1)
    one_by_one = score.answer_questions(model, tokenizer, asked, [319])
    for a, b in zip(at_once, one_by_one, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_what_is_printed(checkpoint, tmp_path, capsys):
    path = tmp_path / "two.jsonl"
    line = {"context": "the cat", "choices": ["sees", "bites a dog"], "answer": 0}
    path.write_text(json.dumps(line) + "\n\n" + json.dumps(line | {"answer": 1}) + "\n")
    (said,) = scored(capsys, checkpoint, path)
    assert said.startswith("2 questions: acc 0.5000 ± 0.5000, acc_norm 0.5000 ± 0.5000, acc_bytes")


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}\n', "line 1: not a JSON object"),
        ('{"context": "a", "choices": ["b"], "answer": 0}\n', "line 1: not a JSON object"),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}\n', "line 1: not a JSON object"),
        ('\n{"context": "a", "choices": "bc", "answer": true}\n', "line 2: not a JSON object"),
        ("[]\n", "line 1: not a JSON object"),
        ("[" * 9999, "line 1: not a JSON object"),
        ("\n", "holds no questions"),
        (b"\xff", "is not UTF-8 text"),
        (
            json.dumps({"context": "a", "choices": ["z" * 99, "b"], "answer": 0}),
            "tokens, more than the context",
        ),
        (None, "No such file"),
    ],
)
def test_bad_files_are_refused_in_a_line(checkpoint, tmp_path, capsys, content, words):
    path = tmp_path / "questions.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stop:
        run(lambda: scored(capsys, checkpoint, path))
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error
