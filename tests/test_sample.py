"""sample.py: what is chosen, what is printed, when it stops, and what it refuses."""

import copy
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import BYTES, ROOT, random_model

import plainllama
import sample
from model import LLaMaTransformer, ModelConfig
from plainllama.huggingface import save_model
from plainllama.inference import quantize_int8
from plainllama.terminal import run_main
from plainllama.tokenizer import byte_level_tokenizer, find_tokenizer
from sample import SampleConfig

END_OF_TEXT = 256
CONTEXT = 32


@pytest.fixture(scope="session")
def model() -> LLaMaTransformer:
    """A random model over bytes, whose greedy text is ASCII."""
    model = random_model(n_kv_heads=2, tie_embeddings=False)
    with torch.no_grad():
        model.final_linear.weight[128:] = 0
    return model


@pytest.fixture
def folder(model: LLaMaTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, made the working directory, with the model's checkpoint under out/."""
    save(model, tmp_path / "out/run/step_000010")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(model: LLaMaTransformer, directory: Path, end_of_text: int | None = END_OF_TEXT) -> Path:
    save_model(model, directory, end_of_text)
    BYTES.save(directory / "tokenizer.json")
    return directory


def written_at(checkpoint: Path, seconds: float) -> None:
    """Let a checkpoint say when it was written."""
    (checkpoint / "train_state").mkdir()
    (checkpoint / "train_state/state.json").write_text(json.dumps({"saved_at": seconds}))


Script = Callable[..., tuple[int, str, str]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run the script's main in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sample.py", "--device=cpu", *arguments])
        try:
            run_main(sample.main)
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def greedy(model: LLaMaTransformer, ids: list[int], count: int) -> list[int]:
    """Choose the likeliest token `count` times by plain forward passes over the whole context."""
    context, new = list(ids[-CONTEXT:]), []
    for _ in range(count):
        with torch.no_grad():
            logits, _ = model(torch.tensor([context]))
        new.append(int(logits[0, -1].argmax()))
        context = (context if len(context) < CONTEXT else context[-CONTEXT // 2 + 1 :]) + new[-1:]
    return new


# ---- the whole script


@pytest.mark.parametrize("prompt", ["a", "To be", "x" * (CONTEXT - 1), "x" * CONTEXT, "y" * 320])
def test_greedy_text_equals_plain_forward_passes_also_beyond_the_context(
    prompt, folder, model, script
):
    expected = greedy(model, list(prompt.encode()), 50)
    if END_OF_TEXT in expected:
        expected = expected[: expected.index(END_OF_TEXT)]
    code, out, err = script("--prompt", prompt, "--temperature=0", "--max_new_tokens=50")
    assert (code, out) == (0, prompt + bytes(expected).decode(errors="replace") + "\n")
    read = len(prompt) + min(49, len(expected))  # the last token is written and never read
    assert err.count("context of 32 tokens") == (read > CONTEXT)


def test_as_many_samples_as_no_memory_holds_are_refused(folder, script):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sysconf", lambda name: 2**13)  # 64 MB
        code, _, err = script("--prompt=a", "--num_samples=9000", "--max_new_tokens=31")
    assert code == 2 and "num_samples=9000 needs" in err.splitlines()[-1]


def test_an_empty_prompt_begins_a_document(folder, model, script):
    expected = bytes(t for t in greedy(model, [END_OF_TEXT], 5) if t < 256).decode()
    assert script("--temperature=0", "--max_new_tokens=5")[:2] == (0, expected + "\n")
    assert script("--max_new_tokens=0", "--prompt=abc")[:2] == (0, "abc\n")


def test_the_same_seed_gives_the_same_text_and_no_seed_a_new_one(folder, script):
    texts = [script("--prompt=a", "--seed=4", "--max_new_tokens=30")[1] for _ in range(2)]
    others = {script("--prompt=a", "--max_new_tokens=30")[1] for _ in range(3)}
    assert texts[0] == texts[1]
    assert len(others) == 3
    _, many, err = script("--prompt=a", "--seed=4", "--max_new_tokens=30", "--num_samples=3")
    samples = many.split("\n---\n")
    assert len(samples) == 3 and samples[0] + "\n" == texts[0]
    assert "seed 4" in err


def test_end_of_text_stops_the_text_whichever_id_the_checkpoint_gives_it(folder, model, script):
    tokens = greedy(model, list(b"To"), 20)
    n = next(n for n in range(1, 20) if tokens[n] not in tokens[:n])
    path = folder / "out/run/step_000010/generation_config.json"
    for ids in (tokens[n], [END_OF_TEXT, tokens[n]]):
        path.write_text(json.dumps({"eos_token_id": ids}), encoding="utf-8")
        code, out, err = script("--prompt=To", "--temperature=0")
        assert (code, out) == (0, "To" + bytes(tokens[:n]).decode() + "\n")
        assert f"{n + 1} tokens in" in err and "stopped by end of text" in err


def test_a_stop_string_ends_the_text_and_the_reason_is_told(folder, model, script):
    text = bytes(greedy(model, list(b"To"), 8)).decode()
    stop = text[5:7]
    arguments = ("--prompt=To", "--temperature=0", "--max_new_tokens=8")
    assert script(*arguments, f"--stop={stop}", "--stop=@@")[1] == f"To{text[: text.find(stop)]}\n"
    assert f"stopped by stop string {stop!r}" in script(*arguments, f"--stop={stop}")[2]
    assert "stopped by max_new_tokens" in script(*arguments)[2]


def test_bfloat16_weights_leave_the_rotary_tables_in_float32(folder, script):
    assert script("--dtype=bfloat16", "--max_new_tokens=3")[0] == 0
    model, _ = plainllama.load("out/run/step_000010", "cpu", "bfloat16")
    assert model.final_linear.weight.dtype == torch.bfloat16
    assert model.cos.dtype == torch.float32


def test_the_newest_complete_checkpoint_is_the_default(folder, model, script):
    newest = save(model, folder / "out/other/step_000002")
    save(model, folder / "out/run/.tmp-step_000020")
    for seconds, step in enumerate(["run/step_000010", "other/step_000002"]):
        written_at(folder / "out" / step, seconds)
        os.utime(folder / "out" / step, (-seconds, -seconds))  # which says nothing
    chosen = {
        (): "out/other/step_000002",
        ("--ckpt=out/run",): "out/run/step_000010",
        (f"--ckpt={newest}",): str(newest),
    }
    for arguments, directory in chosen.items():
        assert script("--max_new_tokens=0", *arguments)[2].startswith(f"{directory}:")


def test_max_new_tokens_of_minus_one_goes_on_to_the_end_of_text(folder, model, script):
    tokens = greedy(model, list(b"To"), 100)
    last = max(tokens.index(token) for token in set(tokens))
    path = folder / "out/run/step_000010/generation_config.json"
    path.write_text(json.dumps({"eos_token_id": tokens[last]}), encoding="utf-8")
    _, out, err = script("--prompt=To", "--temperature=0", "--max_new_tokens=-1")
    assert out == "To" + bytes(tokens[:last]).decode() + "\n"
    assert "stopped by end of text" in err


def test_int8_logits_are_within_five_percent(model):
    quantised = copy.deepcopy(model)
    quantize_int8(quantised)
    tokens = torch.randint(0, 257, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, close = model(tokens)[0], quantised(tokens)[0]
    assert 0 < (close - exact).norm() < 0.05 * exact.norm()


def test_compiled_code_gives_the_same_greedy_text(folder, script):
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=257, n_layers=1, n_embd=16, n_heads=2, max_seq_len=CONTEXT)
    save(LLaMaTransformer(shape), folder / "out/small/step_000001")
    greedy = ("--ckpt=out/small", "--temperature=0", f"--max_new_tokens={CONTEXT + 5}")
    expected, (_, actual, errors) = script(*greedy)[1], script(*greedy, "--compile=yes")
    assert actual == expected and "warning" not in errors


def test_special_tokens_of_a_prompt_are_text_unless_asked_for_and_follow_what_begins_a_text(model):
    tokenizer = find_tokenizer("byte")
    checkpoint = sample.Checkpoint(model, tokenizer)
    prompt = "a<|endoftext|>"
    as_text = sample.encode_prompt(prompt, checkpoint, SampleConfig())
    assert as_text == list(prompt.encode())
    as_token = sample.encode_prompt(prompt, checkpoint, SampleConfig(special_tokens=True))
    assert as_token == [ord("a"), END_OF_TEXT]
    tokenizer.begin_of_text = (7,)
    assert sample.encode_prompt("a", checkpoint, SampleConfig()) == [7, ord("a")]
    assert sample.encode_prompt("", checkpoint, SampleConfig()) == [7]


# ---- where prompts come from, and other forms of output


def test_prompt_file_holds_a_prompt_a_line_each_printed_as_if_alone(folder, script):
    prompts = ["To be", "", "é\tx", "y" * 50]
    options = ("--seed=1", "--max_new_tokens=40", "--num_samples=2")
    alone = [script(f"--prompt={prompt}", *options)[1] for prompt in prompts]
    Path("p.txt").write_bytes("\r\n".join(prompts).encode())
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    Path("p.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("p.txt", "p.jsonl"):
        code, out, _ = script(f"--prompt_file={name}", *options)
        assert (code, out) == (0, "---\n".join(alone))


def test_json_gives_one_object_a_sample(folder, script):
    options = ("--prompt=é", "--seed=1", "--max_new_tokens=9", "--num_samples=2")
    samples = [json.loads(line) for line in script("--json", *options)[1].splitlines()]
    text = script(*options)[1]
    assert text == "\n---\n".join(s["prompt"] + s["text"] for s in samples) + "\n"
    assert [s["n_tokens"] for s in samples] == [9, 9]
    assert [s["ended"] for s in samples] == ["max_new_tokens"] * 2
    assert {s["seed"] for s in samples} == {1}


def test_probs_show_the_softmax_at_each_position_and_the_perplexity(folder, model, script):
    code, out, _ = script("--prompt=abc", "--probs")
    with torch.no_grad():
        logits, loss = model(torch.tensor([list(b"abc")]), torch.tensor([[98, 99, -100]]))
    assert code == 0
    lines = out.splitlines()
    for position, row in enumerate(logits[0].softmax(-1)):
        token = int(row.argmax())
        shown = f"pos {position}: {json.dumps(BYTES.decode([token]))} {row[token]:.2f}, "
        assert lines[position].startswith(shown) and lines[position].count(", ") >= 2
    assert lines[3] == (
        f"log-likelihood {-2 * loss:.2f} over 2 tokens, perplexity {loss.exp():.2f}"
    )
    code, out, _ = script("--probs", f"--prompt={'x' * 3 * CONTEXT}")
    assert (code, len(out.splitlines())) == (0, CONTEXT + 1)
    assert script("--probs")[0] == 0


def test_probs_beyond_the_context_are_those_of_the_last_tokens_and_say_so(folder, script):
    text = "The quick brown fox jumps over the lazy dog again"
    last = script("--probs", f"--prompt={text[-CONTEXT:]}")[1].splitlines()
    code, out, err = script("--probs", f"--prompt={text}")
    first = len(text) - CONTEXT
    moved = [f"pos {first + n}: {line.partition(': ')[2]}" for n, line in enumerate(last[:-1])]
    assert (code, out.splitlines()) == (0, [*moved, last[-1]])
    assert f"longer than the context of 32 tokens: the first {first} are left out" in err


def test_what_begins_every_text_does_not_stand_there_twice(model):
    tokenizer = find_tokenizer("byte")
    tokenizer.begin_of_text = (END_OF_TEXT,)
    checkpoint = sample.Checkpoint(model, tokenizer)
    for settings in (SampleConfig(special_tokens=True), SampleConfig()):
        ids = sample.encode_prompt("<|endoftext|>a", checkpoint, settings)
        as_text = list(b"<|endoftext|>a")
        assert ids == [END_OF_TEXT, *([ord("a")] if settings.special_tokens else as_text)]


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature=0"],
        ["--num_samples=3", "--top_p=0.9"],
        ["--repetition_penalty=1.1"],
        ["--probs"],
    ],
    ids=str,
)
def test_finite_weights_with_logits_that_are_not_are_refused(options, folder, model, script):
    large = copy.deepcopy(model)
    with torch.no_grad():
        large.norm.weight.fill_(1e38)
        large.final_linear.weight.mul_(1e6)
    save(large, folder / "out/run/step_000011")
    code, out, err = script("--prompt=ab", *options)
    assert code == 2 and err.splitlines()[-1].startswith("error: the model's logits are not finite")


# ---- refusals


def refused(script: Script, *arguments: str) -> str:
    """Return the line with which the script refuses, before it has written anything."""
    code, out, err = script(*arguments)
    line = err.splitlines()[-1]
    assert (code, out) == (2, "") and line.startswith("error: ") and "Traceback" not in err
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "temperature=-1.0 must be at least 0"),
        (["--temperature=nan"], "--temperature takes a number, not 'nan'"),
        (["--top_p=0"], "top_p=0.0 must be at least 1e-06 and at most 1"),
        (["--min_p=1.1"], "min_p=1.1 must be at least 0 and at most 1"),
        (["--num_samples=0"], "num_samples=0 must be at least 1"),
        (["--prompt_file=nowhere.txt"], "--prompt_file=nowhere.txt cannot be found"),
        (["--prompt_file=out"], "--prompt_file=out is a directory, and a file is needed"),
        (["--prompt=a\udcff"], "--prompt takes UTF-8 text, not 'a\\udcff'"),
        (["--device=cuda:99"], "device=cuda:99 cannot be used"),
        (["--dtype=float17"], "float17"),
        (["--tempertature=1"], "did you mean --temperature?"),
        (["--ckpt=nowhere"], "no checkpoint in nowhere; runs here: out/run"),
        (["--ckpt=."], "ckpt=. is no directory with a config.json, and holds no step_NNNNNN"),
        (["--ckpt=out/run/step_000010/config.json"], "--ckpt=out/run/step_000010"),
        (["out/run"], "no config file 'out/run'; did you mean --ckpt=out/run?"),
        (["-prompt=a"], "no config file '-prompt=a'; did you mean --prompt=a?"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_in_one_line(arguments, message, folder, script):
    assert message in refused(script, *arguments)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.txt",
            b"ok\n\xff",
            "p.txt is not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 3",
        ),
        ("p.jsonl", b'{"prompt": "a"}\n{', "p.jsonl, line 2: not a JSON object with the key"),
        ("p.jsonl", b'{"text": "a"}', "p.jsonl, line 1: not a JSON object with the key"),
        ("p.jsonl", b"null", "p.jsonl, line 1: not a JSON object with the key"),
        ("p.jsonl", b'{"prompt": []}', "p.jsonl, line 1: not a JSON object with the key"),
    ],
)
def test_a_bad_prompt_file_is_refused_in_one_line(name, content, message, folder, script):
    Path(name).write_bytes(content)
    assert message in refused(script, f"--prompt_file={name}")


def damage(directory: Path, how: str) -> None:
    weights = directory / "model.safetensors"
    if how == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    elif how == "pickle":
        weights.rename(directory / "pytorch_model.bin")
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "letters only":
        letters = byte_level_tokenizer({bytes([b]): b for b in range(97, 123)}, END_OF_TEXT)
        letters.save(directory / "tokenizer.json")
    elif how == "larger tokenizer":
        larger = byte_level_tokenizer({bytes([b]): b + 1000 for b in range(256)}, END_OF_TEXT)
        larger.save(directory / "tokenizer.json")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no tokenizer", "tokenizer"),
        ("pickle", "pickles (.bin, .pt) are never read"),
        ("cut weights", "model.safetensors is damaged"),
        ("letters only", "'T' is not in the vocabulary"),
        ("larger tokenizer", "token 1255 does not fit the model's 257 tokens"),
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_line(how, message, folder, script):
    damage(folder / "out/run/step_000010", how)
    assert message in refused(script, "--prompt=To")


def test_a_folder_without_checkpoints_is_refused_with_the_way_out(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    train = f"python {ROOT / 'train.py'} {ROOT / 'config/tiny.py'}"  # as it is called from here
    message = f"error: no checkpoint in out; train one: {train}\n"
    assert script() == (2, "", message)
    (tmp_path / "out/run").mkdir(parents=True)
    (tmp_path / "out/run/ckpt.pt").write_bytes(b"pickle")
    assert script() == (2, "", message)
    assert "pickles" in script("--ckpt=out/run")[2]


# ---- as a program


def test_stdout_is_the_text_alone_in_utf8_and_a_piped_prompt_keeps_its_line_ends(folder):
    environment = os.environ | {"PYTHONPATH": "", "LC_ALL": "C"}
    flags = ["--device=cpu", "--prompt=-", "--temperature=0", "--max_new_tokens=4"]
    command = [sys.executable, str(ROOT / "sample.py"), *flags]
    prompt = "\ufeffné\r\nb\rc\n".encode()  # with the mark of some editors
    done = subprocess.run(command, input=prompt, capture_output=True, cwd=folder, env=environment)
    assert done.returncode == 0
    text = done.stdout.decode("utf-8")
    assert text.startswith("né\r\nb\rc") and text[7] != "\n"
    assert b"tokens/s" in done.stderr and b"tokens/s" not in done.stdout


def test_a_session_answers_obeys_commands_and_survives_ctrl_c(folder):
    pty = pytest.importorskip("pty")
    terminal, end = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm"}
    environment["HOME"] = str(folder)
    command = [sys.executable, str(ROOT / "sample.py"), "--device=cpu", "--temperature=0"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    seen = b""

    def expect(text: str) -> str:
        nonlocal seen
        end = time.monotonic() + 60
        while text.encode() not in seen:
            ready = select.select([terminal], [], [], 60)[0] and time.monotonic() < end
            assert ready, f"no {text!r} after {seen[-500:]!r}"
            seen += os.read(terminal, 4096)
        before, _, seen = seen.partition(text.encode())
        return before.decode()

    def type_line(line: str) -> None:
        os.write(terminal, line.encode() + b"\n")

    try:
        expect("> ")
        type_line("/max_new_tokens 5")
        expect("> ")
        type_line("To é")
        expect("\x1b[1mTo é\x1b[0m")  # bold
        expect("5 tokens in")
        expect("> ")
        type_line("/again")
        expect("\x1b[1mTo é\x1b[0m")
        expect("> ")
        type_line("//slash")
        expect("\x1b[1m/slash\x1b[0m")
        expect("> ")
        type_line("\x1b[200~pasted\ntext\x1b[201~")
        expect("\x1b[1mpasted\r\ntext\x1b[0m")
        expect("> ")
        type_line("/temperature -1")
        expect("error: temperature=-1.0 must be at least 0")
        type_line("/temperture 1")
        expect("did you mean /temperature?")
        type_line("/stop @@")
        type_line("/help")
        expect("/max_new_tokens 5")
        expect("/stop ('@@',)")
        type_line("/stop")
        type_line("/max_new_tokens -1")
        type_line("Endless")
        expect("\x1b[1mEndless\x1b[0m")
        process.send_signal(signal.SIGINT)
        expect("stopped by Ctrl-C")
        expect("> ")
        type_line("/quit")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(terminal)
