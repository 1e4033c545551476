"""Training on conversations: what a step is, what it survives, what comes out and chats."""

import functools
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import greedy, random_model, random_tokens, run_stage
from several import SMALL, launch
from test_chat import source, template, tokenizer
from test_chat_data import lines, talk
from test_huggingface import their_model
from training import CPU, distance, final_weights, refusal, run_train, same, small_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabularies import byte_level

import export
import prepare
import sample
import train
from plainllama.checkpoint import checkpoints
from plainllama.data import load_dataset, read_batch
from plainllama.generation import generate
from plainllama.metrics import read_metrics
from plainllama.session import Session
from plainllama.settings import load
from sample import SampleConfig

CHATS = [*SMALL, "--max_seq_len=96", "--batch_size=4", "--tokens_per_step=384", "--max_steps=6"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Forty conversations of one to three exchanges, as bytes."""
    folder = tmp_path_factory.mktemp("chats")
    talks = [talk(number, 1 + number % 3) for number in range(40)]
    (folder / "a.jsonl").write_text(lines(*({"messages": turns} for turns in talks)))
    run_stage(prepare.main, folder / "a.jsonl", f"--out={folder / 'bytes'}", "--tokenizer=byte")
    return folder / "bytes"


def gradients(config: train.TrainConfig, data, machines) -> dict[str, torch.Tensor]:
    """The gradients of step 2, summed over processes that have these machines."""
    model = random_model(vocab_size=259, max_seq_len=96).train()
    places, n_targets = train.step_places(2, data, config)
    for machine in machines:
        for batch in train.step_batches(places, data, config, machine):
            (model(*batch, reduction="sum")[1] / n_targets).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_micro_steps_and_processes_make_one_batch_of_unequal_masks(data_dir):
    data = load_dataset(data_dir)
    config = load(train.TrainConfig, [*CHATS, "--batch_size=4"])
    learned = data.rows("train", 96).learned
    assert len(set(learned.tolist())) > 1  # the masks are unequal
    whole = gradients(config, data, [CPU])
    two = [replace(CPU, rank=rank, world_size=2) for rank in range(2)]
    for other in (
        gradients(replace(config, batch_size=1), data, [CPU]),
        gradients(replace(config, batch_size=1), data, two),
        gradients(replace(config, batch_size=2), data, two),
    ):
        for name, expected in whole.items():
            scale = expected.abs().max().item()
            torch.testing.assert_close(other[name], expected, atol=1e-6 * scale, rtol=0)


def test_what_is_not_learned_has_no_gradient_and_a_batch_of_it_no_nan():
    model, tokens = random_model(tie_embeddings=False).train(), random_tokens()
    targets = tokens.clone()
    targets[:, 20:] = -100
    tokens[:, 21:] = 250  # seen by no target
    model(tokens, targets, reduction="sum")[1].backward()
    assert model.embeddings.weight.grad[250].eq(0).all()
    model.zero_grad()
    loss = model(tokens, torch.full_like(tokens, -100), reduction="sum")[1]
    loss.backward()
    assert loss == 0 and all(p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("how", [[], ["--chunked_loss"], ["--activation_checkpointing"]])
def test_a_run_that_was_stopped_and_resumed_is_the_same_to_the_bit(data_dir, tmp_path, how):
    more = [*CHATS[len(SMALL) :], "--checkpoint_interval=3", "--keep_last=9", *how]
    run_train(data_dir, tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "step_000006")
    run_train(data_dir, tmp_path / "half", *more, "--resume")
    assert same(final_weights(tmp_path / "half"), final_weights(tmp_path / "whole"))


def test_two_processes_learn_what_one_does(data_dir, tmp_path):
    more = [*CHATS[len(SMALL) :], "--max_steps=2", "--batch_size=2"]
    run_train(data_dir, tmp_path / "one", *more)
    launch(2, small_run(data_dir, tmp_path / "two", *more))
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5
    found = [read_metrics(tmp_path / name)[-1]["answer_loss"] for name in ("one", "two")]
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_epochs_rows_and_what_is_learned_are_said(data_dir, tmp_path, capsys):
    more = [key for key in CHATS[len(SMALL) :] if "max_steps" not in key]
    run_train(data_dir, tmp_path / "out", *more, "--epochs=1.5")
    rows = load_dataset(data_dir).rows("train", 96)
    steps = math.ceil(1.5 * len(rows) / 4)
    shown = capsys.readouterr().out
    assert f"run      {steps} steps = 1." in shown and f"rows     {len(rows)} of whole" in shown
    assert re.search(r"\d\d\.\d% filled, 2\d\.\d% of the tokens learned", shown)
    assert f" {rows.n_cut} longer than 96 tokens are cut, 0 of their exchanges left out" in shown
    assert f"step {steps}/{steps}  answer loss" in shown
    (record,) = [r for r in read_metrics(tmp_path / "out") if "answer_loss" in r]
    assert "val_loss" not in record and record["step"] == steps
    run_train(data_dir, tmp_path / "out", *more, "--resume", "--epochs=2")
    assert f"run      {math.ceil(len(rows) / 2)} steps = 2 epochs" in capsys.readouterr().out
    run_stage(train.main, f"--out_dir={tmp_path / 'out'}", "--eval_only")
    assert re.search(r"step_\d+  answer loss \d", capsys.readouterr().out)


def test_answers_are_evaluated_over_each_row_of_validation_once(data_dir, tmp_path):
    config = load(train.TrainConfig, [*CHATS, "--eval_tokens=1", "--batch_size=3"])
    data, model = load_dataset(data_dir), random_model(vocab_size=259, max_seq_len=96)
    found = train.evaluate(model, data, config, CPU)
    rows = data.rows("val", 96)
    nats, count, n_bytes = 0.0, 0, 0
    for number in range(len(rows)):
        tokens, targets, positions = read_batch(data, "val", np.array([number]), 96, CPU.device)
        logits = model(tokens, None, positions)[0].double().log_softmax(-1)
        learned = targets >= 0
        nats -= logits[learned].gather(1, targets[learned][:, None]).sum().item()
        count += learned.sum().item()
        n_bytes += sum(targets[learned] < 256)
    assert found["answer_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["answer_bpb"] == pytest.approx(nats / math.log(2) / n_bytes.item(), rel=1e-5)


PAIRS = [
    ("one", "a"), ("two", "Bb"), ("three", "ccc."), ("four", "d!"), ("five", "e e"),
    ("six", "\u00e9"), ("seven", "7"), ("eight", "gate"), ("nine", "line"), ("ten", "pen"),
    ("red", "rose"), ("blue", "sea"), ("green", "leaf"), ("black", "night"), ("white", "snow"),
    ("dog", "woof"), ("cat", "meow"), ("cow", "moo"), ("sun", "hot"), ("moon", "cold"),
    ("rain", "wet"),
]  # fmt: skip


def learned(folder: Path, pairs: list[tuple[str, str]], *flags: str) -> list[tuple[str, str]]:
    """Train a run on conversations of a question and its answer; return those that it learned."""
    turns = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs
    ]
    (folder / "a.jsonl").write_text(lines(*({"messages": t} for t in turns)))
    kept = f"--out={folder / 'data'}", "--tokenizer=byte", "--val_fraction=0.01"
    run_stage(prepare.main, folder / "a.jsonl", *kept)
    data = load_dataset(folder / "data")
    text = data.tokenizer.decode(data.read("train").tolist())
    more = ["--n_embd=64", "--max_seq_len=64", "--batch_size=8", "--tokens_per_step=512"]
    more += ["--log_interval=200", "--checkpoint_interval=0", *flags]
    run_train(folder / "data", folder / "run", *more)
    return [(q, a) for q, a in pairs if f"user\n{q}<" in text]


@pytest.fixture(scope="session")
def by_heart(tmp_path_factory) -> tuple[Path, list[tuple[str, str]]]:
    """A run that learned twenty pairs by heart, and these."""
    folder = tmp_path_factory.mktemp("heart")
    known = learned(folder, PAIRS, "--max_steps=110", "--lr=1e-2", "--optimizer=muon")
    assert len(known) == 20
    return checkpoints(folder / "run")[-1], known


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, by_heart) -> tuple[Path, list[tuple[str, str]]]:
    """The same run tuned by LoRA to give the answers of other questions, and these pairs."""
    folder = tmp_path_factory.mktemp("tuned")
    answers = [answer for _, answer in PAIRS]
    pairs = [(q, a) for (q, _), a in zip(PAIRS[:9], answers[9:], strict=False)]
    flags = f"--init_from={by_heart[0]}", "--lora_rank=8", "--lr=1e-2", "--max_steps=80"
    known = learned(folder, pairs, *flags)
    assert len(known) == 8
    return checkpoints(folder / "run")[-1], known


@pytest.fixture(params=["by_heart", "tuned"])
def chat_model(request) -> tuple[Path, list[tuple[str, str]]]:
    return request.getfixturevalue(request.param)


def test_pairs_are_learned_by_heart_and_each_answer_stops_by_itself(chat_model, tmp_path, capsys):
    directory, known = chat_model
    (tmp_path / "ask.jsonl").write_text(lines(*({"prompt": q} for q, _ in known)))
    flags = "--chat", f"--prompt_file={tmp_path / 'ask.jsonl'}", "--json", "--temperature=0"
    run_stage(sample.main, f"--ckpt={directory}", *flags)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["messages"][-1]["content"] for one in answers] == [a for _, a in known]
    assert {one["ended"] for one in answers} == {"end of text"}


def test_transformers_answers_alike_from_the_saved_directory(chat_model):
    directory, known = chat_model
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    tokens = AutoTokenizer.from_pretrained(directory)
    assert theirs.generation_config.eos_token_id == [258, 256]
    assert tokens.eos_token == "<|im_end|>" and tokens.chat_template
    for question, answer in known:
        ids = tokens.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        made = theirs.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.size(1) :].tolist()
        assert made[-1] == 258 and tokens.decode(made[:-1]) == answer


LLAMA_CPP_CHAT = """
async function answer(question) {
    const template = model.fileInfo.metadata.tokenizer.chat_template;
    const chatWrapper = new JinjaTemplateChatWrapper({template});
    const session = new LlamaChatSession({contextSequence: sequence, chatWrapper});
    session.setChatHistory([]);  // without a system's message
    const options = {temperature: 0, maxTokens: 20, trimWhitespaceSuffix: false};
    const {responseText, stopReason} = await session.promptWithMeta(question, options);
    session.dispose({disposeSequence: false});
    return [responseText, stopReason];
}
"""


@pytest.mark.download
def test_llama_cpp_answers_alike_from_the_gguf(chat_model, tmp_path, llama_cpp):
    directory, known = chat_model
    run_stage(export.main, f"--ckpt={directory}", f"--out={tmp_path / 'a.gguf'}")
    found = llama_cpp(LLAMA_CPP_CHAT, tmp_path / "a.gguf", [question for question, _ in known])
    assert found == [[answer, "eogToken"] for _, answer in known]


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3"])
def test_a_chat_says_what_a_fresh_reading_of_the_whole_conversation_says(name, capsys):
    model = random_model(vocab_size=tokenizer().vocab_size, max_seq_len=256)
    settings = SampleConfig(temperature=0, max_new_tokens=9, seed=1)
    checkpoint = sample.Checkpoint(model, tokenizer(), template(name))
    chat = Session(settings, functools.partial(sample.answer, checkpoint), is_chat=True)
    read = []
    model.embeddings.register_forward_hook(lambda *call: read.append(call[1][0].size(1)))
    known = []
    for question in ("Hello", "Why is that?", "x"):
        prompt = template(name).prompt([*chat.messages, {"role": "user", "content": question}])
        shared = len(os.path.commonprefix([prompt, known]))
        read.clear()
        chat.obey(question)
        known = chat.kept.ids[0].tolist()
        assert known[: len(prompt)] == prompt
        assert read[0] == len(prompt) - shared and (shared > 8) == (len(chat.turns) > 2)
        answer = known[len(prompt) :]
        fresh = [int(id) for id in generate(model, [prompt], len(answer), greedy)]
        assert answer == fresh
    assert len(chat.messages) == 6


def test_gpt2_gets_two_words_whose_rows_are_the_mean_of_the_others(hf, tmp_path):
    base, ends = tmp_path / "gpt2", {"bos_token_id": 256, "eos_token_id": 256}
    their_model(hf, "gpt2", vocab_size=257, n_positions=96, **ends).save_pretrained(base)
    (base / "tokenizer.json").write_text(json.dumps(byte_level()))
    (tmp_path / "a.jsonl").write_text(lines(*({"messages": talk(n)} for n in range(40))))
    flags = f"--out={tmp_path / 'data'}", f"--tokenizer={base}"
    run_stage(prepare.main, tmp_path / "a.jsonl", *flags)
    run = [*CHATS[3:], "--max_steps=1", "--lr=0", f"--init_from={base}"]
    places = [f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'run'}"]
    run_stage(train.main, *run, *places)
    saved = checkpoints(tmp_path / "run")[-1]
    theirs = AutoModelForCausalLM.from_pretrained(saved)
    rows = theirs.get_input_embeddings().weight
    assert rows.shape == (259, 48)
    for row in rows[257:]:
        torch.testing.assert_close(row, rows[:257].mean(0), atol=1e-6, rtol=0)
    assert len(AutoTokenizer.from_pretrained(saved)) == 259
    shutil.rmtree(saved)  # as if a kill had come before it: the words are added once more
    run_stage(train.main, places[1], "--resume")
    assert checkpoints(tmp_path / "run") == [saved]


def test_what_does_not_fit_a_chat_is_refused_in_one_line(data_dir, tmp_path, capsys):
    more = CHATS[len(SMALL) :]
    line = refusal(
        capsys, data_dir, tmp_path / "a", *more, "--max_seq_len=24", "--tokens_per_step=96"
    )
    assert "max_seq_len=24 is too short for any exchange" in line
    run_train(data_dir, tmp_path / "run", *more, "--max_steps=1")
    saved = checkpoints(tmp_path / "run")[-1]
    capsys.readouterr()
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    (other / "chat_template.jinja").write_text(source("smollm2"))
    line = refusal(capsys, data_dir, tmp_path / "b", *more, f"--init_from={other}")
    assert "has another chat template than" in line
