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
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaForCausalLM

import sample
from model import LLaMaTransformer, ModelConfig
from plainllama.generate import filter_logits, generate, make_sampler
from plainllama.huggingface import save_model
from plainllama.inference import quantize_int8
from plainllama.settings import run_main
from plainllama.tokenizer import byte_level_tokenizer, find_tokenizer
from sample import SampleConfig, TextStream

ROOT = Path(__file__).parents[1]
END_OF_TEXT = 256
CONTEXT = 32
BYTES = find_tokenizer("byte")


@pytest.fixture(scope="session")
def model() -> LLaMaTransformer:
    """A random model over bytes, with weights large enough to say different things."""
    torch.manual_seed(0)
    shape = {"n_layers": 2, "n_embd": 32, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": CONTEXT}
    model = LLaMaTransformer(ModelConfig(vocab_size=257, tie_embeddings=False, **shape)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
        model.final_linear.weight[128:] = 0  # greedy text is ASCII
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


# ---- choosing a token

FILTERS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"repetition_penalty": 1.8, "top_p": 0.7},
]


def settings_of(filters: dict, **others) -> SampleConfig:
    return SampleConfig(**{"temperature": 1.0} | filters | others)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty`")  # meant for embeddings
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_equal_those_of_transformers_in_their_order(filters, model, tmp_path) -> None:
    save_model(model, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)._get_logits_processor(
        GenerationConfig(do_sample=True, **{"top_k": 0} | filters)
    )
    torch.manual_seed(0)
    for scale in (0.3, 2.0, 9.0):
        logits = scale * torch.randn(64, 300)
        text = torch.randint(0, 300, (64, 40))
        seen = torch.zeros(64, 300, dtype=torch.bool).scatter(1, text, True)
        ours = filter_logits(
            logits, settings_of(filters), seen if "repetition_penalty" in filters else None
        )
        torch.testing.assert_close(ours, theirs(text, logits.clone()))


@pytest.mark.parametrize("filters", [{}, *FILTERS], ids=str)
def test_frequencies_of_100k_samples_match_the_filtered_softmax(filters) -> None:
    torch.manual_seed(1)
    logits = 2 * torch.randn(1, 60)
    config = settings_of(filters, seed=5, num_samples=1000, repetition_penalty=1.0)
    pick = make_sampler(config, [[0]])
    tokens = torch.cat([pick(logits.expand(1000, -1)) for _ in range(100)])
    counts = tokens.bincount(minlength=60).double()
    expected = 100_000 * filter_logits(logits, config).softmax(-1)[0].double()
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    freedom = max(1, int(allowed.sum()) - 1)
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5  # five deviations, for a fixed seed


def test_temperature_zero_and_near_zero_choose_the_likeliest_token() -> None:
    logits = torch.randn(8, 50)
    for temperature in (0.0, 1e-40):  # the second makes fp32 logits infinite
        pick = make_sampler(SampleConfig(temperature=temperature, num_samples=8), [[0]])
        assert torch.equal(pick(logits), logits.argmax(-1))


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_smallest_and_the_largest_random_number_choose_tokens_that_are_allowed(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = SimpleNamespace(random=lambda dtype: number)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: same)
    logits = torch.randn(2000, 50)
    logits[:, [0, -1]] = -50.0
    tokens = make_sampler(settings_of({"top_k": 40}), [[0]] * 2000)(logits)
    kept = logits.topk(40).indices
    assert (kept == tokens[:, None]).any(-1).all()


def test_a_sample_does_not_depend_on_how_many_are_made_beside_it() -> None:
    logits = torch.randn(20, 1, 50)
    alone = make_sampler(SampleConfig(seed=9, num_samples=1), [[0]])
    among = make_sampler(SampleConfig(seed=9, num_samples=7), [[0]])
    first = [int(alone(row)) for row in logits]
    batch = torch.stack([among(row.expand(7, -1)) for row in logits])
    assert batch[:, 0].tolist() == first
    assert len({tuple(column.tolist()) for column in batch.T}) == 7


# ---- from tokens to text


def stream_of(pieces: list[bytes], **settings) -> TextStream:
    """Return a stream in which token i stands for pieces[i]."""
    tokenizer = find_tokenizer("byte")
    tokenizer.token_bytes = lambda id: dict(enumerate(pieces)).get(id, b"")
    checkpoint = SimpleNamespace(tokenizer=tokenizer, end_of_text=(-1,))
    return TextStream(checkpoint, SampleConfig(max_new_tokens=-1, **settings))


def cut(text: str, borders: list[int]) -> list[bytes]:
    raw = text.encode()
    ends = sorted({b % (len(raw) + 1) for b in borders} | {0, len(raw)})
    return [raw[start:end] for start, end in zip(ends, ends[1:], strict=False)]


@settings(deadline=None, max_examples=300)
@given(
    st.text("ab€🙂", max_size=20),
    st.lists(st.integers(0, 80), max_size=20),
    st.lists(st.text("ab€🙂", min_size=1, max_size=4), max_size=3),
)
def test_what_is_printed_ends_before_the_first_stop_string_wherever_tokens_end(
    text: str, borders: list[int], stop: list[str]
) -> None:
    ends = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stop))]
    expected = text
    if ends:
        whole = text[: ends[0]]
        expected = whole[: -max(len(s) for s in stop if whole.endswith(s))]
    pieces = cut(text, borders)
    stream = stream_of(pieces, stop=tuple(stop))
    for token in range(len(pieces)):
        stream.add(token)
        assert expected.startswith(stream.ready)
    assert bool(stream.ended) == bool(ends)
    if not ends:
        stream.end("max_new_tokens")
    assert stream.ready == expected


def test_a_character_is_printed_when_its_last_byte_has_come_and_half_a_one_never() -> None:
    pieces = ["é".encode()[:1], "é".encode()[1:] + "€".encode()[:2], "€".encode()[2:] + b"\xe2"]
    stream, printed = stream_of(pieces), []
    for token in range(3):
        stream.add(token)
        printed.append(stream.ready)
    stream.end("max_new_tokens")
    assert [*printed, stream.ready] == ["", "é", "é€", "é€"]


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    stream = stream_of([b"a\xff", b"b"])
    stream.add(0)
    stream.add(1)
    assert stream.ready == "a\ufffdb"


def test_end_of_text_and_tokens_without_text_print_nothing() -> None:
    stream = stream_of([b"a"])
    for token in (0, 77, -1, 0):
        stream.add(token)
    assert (stream.ready, stream.ended, stream.n_tokens) == ("a", "end of text", 3)


# ---- the whole script


@pytest.mark.parametrize("prompt", ["a", "To be", "x" * (CONTEXT - 1), "x" * CONTEXT, "y" * 320])
def test_greedy_text_equals_plain_forward_passes_also_beyond_the_context(
    prompt: str, folder: Path, model: LLaMaTransformer, script: Script
) -> None:
    expected = greedy(model, list(prompt.encode()), 50)
    if END_OF_TEXT in expected:
        expected = expected[: expected.index(END_OF_TEXT)]
    code, out, err = script("--prompt", prompt, "--temperature=0", "--max_new_tokens=50")
    assert (code, out) == (0, prompt + bytes(expected).decode(errors="replace") + "\n")
    read = len(prompt) + min(49, len(expected))  # the last token is written and never read
    assert err.count("context of 32 tokens") == (read > CONTEXT)


@pytest.mark.parametrize(("length", "count"), [(CONTEXT, 1), (CONTEXT - 1, 2), (1, CONTEXT)])
def test_a_text_that_just_fits_the_context_is_not_said_to_outgrow_it(
    length: int, count: int, folder: Path, script: Script
) -> None:
    arguments = (f"--prompt={'x' * length}", "--seed=2", "--ckpt=out/run")
    fits = script(*arguments, f"--max_new_tokens={count}")[2]
    outgrown = script(*arguments, f"--max_new_tokens={count + 1}")[2]
    assert (fits.count("context of 32"), outgrown.count("context of 32")) == (0, 1)


def test_the_default_length_is_not_said_to_outgrow_the_context(folder, script) -> None:
    assert "context of 32" not in script("--prompt=a", "--seed=2", "--temperature=3")[2]


def test_as_many_samples_as_no_memory_holds_are_refused(folder: Path, script: Script) -> None:
    flags = ("--prompt=a", f"--num_samples={2**20}", "--max_new_tokens=31")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sysconf", lambda name: 2**13)  # 64 MB
        code, _, err = script(*flags)
    assert code == 2 and "num_samples=1048576 needs" in err.splitlines()[-1]


@pytest.mark.parametrize("prompt", ["a\r\nb", "a\rb\n", "\ufeffa"])
def test_a_piped_prompt_keeps_its_line_ends_and_loses_its_mark(prompt: str, folder: Path) -> None:
    command = [sys.executable, str(ROOT / "sample.py"), "--prompt=-", "--max_new_tokens=0"]
    done = subprocess.run(command, input=prompt.encode(), capture_output=True, cwd=folder)
    text = prompt.removeprefix("\ufeff").removesuffix("\n")
    assert done.stdout == text.encode() + b"\n"


def test_greedy_text_equals_that_of_transformers(folder: Path, script: Script) -> None:
    theirs = LlamaForCausalLM.from_pretrained("out/run/step_000010")
    ids = theirs.generate(torch.tensor([[84, 111]]), max_new_tokens=20, do_sample=False)[0, 2:]
    _, out, _ = script("--prompt=To", "--temperature=0", "--max_new_tokens=20")
    assert out == "To" + BYTES.decode([i for i in ids.tolist() if i != END_OF_TEXT]) + "\n"


def test_an_empty_prompt_begins_a_document(
    folder: Path, model: LLaMaTransformer, script: Script
) -> None:
    expected = bytes(t for t in greedy(model, [END_OF_TEXT], 5) if t < 256).decode()
    assert script("--temperature=0", "--max_new_tokens=5")[:2] == (0, expected + "\n")
    assert script("--max_new_tokens=0", "--prompt=abc")[:2] == (0, "abc\n")


def test_the_same_seed_gives_the_same_text_and_no_seed_a_new_one(
    folder: Path, script: Script
) -> None:
    texts = [script("--prompt=a", "--seed=4", "--max_new_tokens=30")[1] for _ in range(2)]
    others = {script("--prompt=a", "--max_new_tokens=30")[1] for _ in range(3)}
    assert texts[0] == texts[1]
    assert len(others) == 3
    _, many, err = script("--prompt=a", "--seed=4", "--max_new_tokens=30", "--num_samples=3")
    samples = many.split("\n---\n")
    assert len(samples) == 3 and samples[0] + "\n" == texts[0]
    assert "seed 4" in err


def test_end_of_text_stops_the_text_whichever_id_the_checkpoint_gives_it(
    folder: Path, model: LLaMaTransformer, script: Script
) -> None:
    tokens = greedy(model, list(b"To"), 20)
    n = next(n for n in range(1, 20) if tokens[n] not in tokens[:n])
    path = folder / "out/run/step_000010/generation_config.json"
    for ids in (tokens[n], [END_OF_TEXT, tokens[n]]):
        path.write_text(json.dumps({"eos_token_id": ids}), encoding="utf-8")
        code, out, err = script("--prompt=To", "--temperature=0")
        assert (code, out) == (0, "To" + bytes(tokens[:n]).decode() + "\n")
        assert f"{n + 1} tokens in" in err and "stopped by end of text" in err


def test_a_stop_string_ends_the_text_and_the_reason_is_told(
    folder: Path, model: LLaMaTransformer, script: Script
) -> None:
    text = bytes(greedy(model, list(b"To"), 8)).decode()
    stop = text[5:7]
    arguments = ("--prompt=To", "--temperature=0", "--max_new_tokens=8")
    assert script(*arguments, f"--stop={stop}", "--stop=@@")[1] == f"To{text[: text.find(stop)]}\n"
    assert f"stopped by stop string {stop!r}" in script(*arguments, f"--stop={stop}")[2]
    assert "stopped by max_new_tokens" in script(*arguments)[2]


def test_bfloat16_weights_leave_the_rotary_tables_in_float32(folder: Path, script: Script) -> None:
    assert script("--dtype=bfloat16", "--max_new_tokens=3")[0] == 0
    checkpoint = sample.load_checkpoint(
        Path("out/run/step_000010"), torch.device("cpu"), torch.bfloat16
    )
    assert checkpoint.model.final_linear.weight.dtype == torch.bfloat16
    assert checkpoint.model.cos.dtype == torch.float32


def test_the_newest_complete_checkpoint_is_the_default(
    folder: Path, model: LLaMaTransformer, script: Script
) -> None:
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


def test_max_new_tokens_of_minus_one_goes_on_to_the_end_of_text(
    folder: Path, model: LLaMaTransformer, script: Script
) -> None:
    tokens = greedy(model, list(b"To"), 100)
    last = max(tokens.index(token) for token in set(tokens))
    path = folder / "out/run/step_000010/generation_config.json"
    path.write_text(json.dumps({"eos_token_id": tokens[last]}), encoding="utf-8")
    _, out, err = script("--prompt=To", "--temperature=0", "--max_new_tokens=-1")
    assert out == "To" + bytes(tokens[:last]).decode() + "\n"
    assert "stopped by end of text" in err


def test_repetition_penalty_gives_the_text_of_transformers(folder: Path, script: Script) -> None:
    theirs = LlamaForCausalLM.from_pretrained("out/run/step_000010")
    start = torch.tensor([list(b"To be")])
    ids = theirs.generate(start, max_new_tokens=20, do_sample=False, repetition_penalty=1.5)
    penalty = "--repetition_penalty=1.5"
    _, out, _ = script("--prompt=To be", penalty, "--temperature=0", "--max_new_tokens=20")
    assert out == BYTES.decode([i for i in ids[0].tolist() if i != END_OF_TEXT]) + "\n"
    assert out != script("--prompt=To be", "--temperature=0", "--max_new_tokens=20")[1]


def test_int8_logits_are_within_five_percent(model: LLaMaTransformer) -> None:
    quantised = copy.deepcopy(model)
    quantize_int8(quantised)
    tokens = torch.randint(0, 257, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, close = model(tokens)[0], quantised(tokens)[0]
    assert 0 < (close - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("option", ["--compile=yes", "--num_samples=3"])
def test_every_way_to_be_faster_gives_the_same_greedy_text(
    option: str, folder: Path, script: Script
) -> None:
    greedy = ("--prompt=To be", "--temperature=0", f"--max_new_tokens={CONTEXT + 5}")
    expected, (_, actual, errors) = script(*greedy)[1], script(*greedy, option)
    assert actual in (expected, "---\n".join([expected] * 3))
    assert "warning" not in errors


def test_without_a_working_compiler_the_text_is_the_same_and_one_line_says_so(
    folder: Path, script: Script
) -> None:
    greedy = ("--prompt=To be", "--temperature=0")
    expected = script(*greedy)[1]
    torch._dynamo.reset()
    broken = {"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}
    with torch._inductor.config.patch(broken):
        code, actual, errors = script(*greedy, "--compile=yes")
    assert (code, actual) == (0, expected)
    assert errors.count("warning: decoding without torch.compile, which failed: ") == 1


def test_special_tokens_of_a_prompt_are_text_unless_asked_for_and_follow_what_begins_a_text(
    model: LLaMaTransformer,
) -> None:
    tokenizer = find_tokenizer("byte")
    checkpoint = sample.Checkpoint(model, tokenizer, [END_OF_TEXT])
    prompt = "a<|endoftext|>"
    as_text = sample.encode_prompt(prompt, checkpoint, SampleConfig())
    assert as_text == list(prompt.encode())
    as_token = sample.encode_prompt(prompt, checkpoint, SampleConfig(special_tokens=True))
    assert as_token == [ord("a"), END_OF_TEXT]
    tokenizer.begin_of_text = (7,)
    assert sample.encode_prompt("a", checkpoint, SampleConfig()) == [7, ord("a")]
    assert sample.encode_prompt("", checkpoint, SampleConfig()) == [7]


# ---- where prompts come from, and other forms of output


@pytest.mark.parametrize("lengths", [[1, 5, 3], [CONTEXT, 1, CONTEXT - 1, CONTEXT + 1, 90], [7, 7]])
def test_prompts_of_different_lengths_in_one_batch_are_continued_as_if_alone(
    lengths: list[int], model: LLaMaTransformer
) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 257, (n,), generator=generator).tolist() for n in lengths]
    config = SampleConfig(seed=3, temperature=0.9, top_p=0.9)
    together = list(generate(model, prompts, 2 * CONTEXT, make_sampler(config, prompts)))
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 2 * CONTEXT, make_sampler(config, [prompt]))
        assert [int(tokens[row]) for tokens in together] == [int(token) for token in alone]


def test_prompt_file_holds_a_prompt_a_line_each_printed_as_if_alone(
    folder: Path, script: Script
) -> None:
    prompts = ["To be", "", "é\tx", "y" * 50]
    options = ("--seed=1", "--max_new_tokens=40", "--num_samples=2")
    alone = [script(f"--prompt={prompt}", *options)[1] for prompt in prompts]
    Path("p.txt").write_bytes("\r\n".join(prompts).encode())
    lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
    Path("p.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name in ("p.txt", "p.jsonl"):
        code, out, _ = script(f"--prompt_file={name}", *options)
        assert (code, out) == (0, "---\n".join(alone))


def test_json_gives_one_object_a_sample(folder: Path, script: Script) -> None:
    options = ("--prompt=é", "--seed=1", "--max_new_tokens=9", "--num_samples=2")
    samples = [json.loads(line) for line in script("--json", *options)[1].splitlines()]
    text = script(*options)[1]
    assert text == "\n---\n".join(s["prompt"] + s["text"] for s in samples) + "\n"
    assert [s["n_tokens"] for s in samples] == [9, 9]
    assert [s["ended"] for s in samples] == ["max_new_tokens"] * 2
    assert {s["seed"] for s in samples} == {1}


def test_probs_show_the_softmax_at_each_position_and_the_perplexity(
    folder: Path, model: LLaMaTransformer, script: Script
) -> None:
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


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "temperature=-1.0 must be at least 0"),
        (["--temperature=nan"], "--temperature takes a number, not 'nan'"),
        (["--top_k=-1"], "top_k=-1 must be at least 0"),
        (["--top_p=0"], "top_p=0.0 must be above 0 and at most 1"),
        (["--top_p=1.5"], "top_p=1.5 must be above 0 and at most 1"),
        (["--min_p=1.1"], "min_p=1.1 must be at least 0 and at most 1"),
        (["--num_samples=0"], "num_samples=0 must be at least 1"),
        (["--max_new_tokens=-2"], "max_new_tokens=-2 must be at least -1"),
        (["--repetition_penalty=0"], "repetition_penalty=0.0 must be at least"),
        (["--prompt_file=nowhere.txt"], "nowhere.txt"),
        (["--stop="], "stop='' would stop before the first token"),
        (["--prompt=a\udcff"], "'\\udcff' is not a character"),
        (["--device=cuda:99"], "device=cuda:99 cannot be used"),
        (["--dtype=float17"], "float17"),
        (["--tempertature=1"], "did you mean --temperature?"),
        (["--ckpt=nowhere"], "ckpt=nowhere is neither"),
        (["--ckpt=out/run/step_000010/config.json"], "is neither"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_in_one_line(
    arguments: list[str], message: str, folder: Path, script: Script
) -> None:
    code, out, err = script(*arguments)
    assert (code, out) == (2, "")
    assert message in err and err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


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
    ],
)
def test_a_bad_prompt_file_is_refused_in_one_line(
    name: str, content: bytes, message: str, folder: Path, script: Script
) -> None:
    Path(name).write_bytes(content)
    code, out, err = script(f"--prompt_file={name}")
    assert (code, out) == (2, "")
    assert message in err and err.splitlines()[-1].startswith("error: ")


def damage(directory: Path, how: str) -> None:
    weights = directory / "model.safetensors"
    if how == "no tokenizer":
        (directory / "tokenizer.json").unlink()
    elif how == "pickle":
        weights.rename(directory / "pytorch_model.bin")
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how == "cut config":
        (directory / "config.json").write_text("{", encoding="utf-8")
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
        ("pickle", "pytorch_model.bin is a pickle"),
        ("cut weights", "model.safetensors is damaged"),
        ("cut config", "config.json is damaged"),
        ("letters only", "'T' is not in the vocabulary"),
        ("larger tokenizer", "token 1255 does not fit the model's 257 tokens"),
    ],
)
def test_a_bad_checkpoint_is_refused_in_one_line(
    how: str, message: str, folder: Path, script: Script
) -> None:
    damage(folder / "out/run/step_000010", how)
    code, out, err = script("--prompt=To")
    assert (code, out) == (2, "")
    assert message in err and err.splitlines()[-1].startswith("error: ")


def test_a_folder_without_checkpoints_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Script
) -> None:
    monkeypatch.chdir(tmp_path)
    message = "error: no checkpoint under out/; train one: python train.py config/tiny.py\n"
    assert script() == (2, "", message)
    (tmp_path / "out/run").mkdir(parents=True)
    (tmp_path / "out/run/ckpt.pt").write_bytes(b"pickle")
    assert script() == (2, "", message)
    assert "pickles" in script("--ckpt=out/run")[2]


# ---- as a program


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": "", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "sample.py"), "--device=cpu", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def test_stdout_is_the_text_alone_in_utf8_whatever_the_locale(folder: Path) -> None:
    process = start(folder, "--prompt=-", "--temperature=0", "--max_new_tokens=4")
    out, err = process.communicate("né\n".encode(), timeout=60)
    assert process.returncode == 0
    assert out.decode("utf-8").startswith("né") and out.decode("utf-8")[2] != "\n"
    assert b"tokens/s" in err and b"tokens/s" not in out


def test_a_reader_that_closes_the_pipe_ends_the_program_in_silence(folder: Path) -> None:
    process = start(folder, "--prompt=abc", "--max_new_tokens=-1", "--stop=@@@@@@@@")
    assert process.stdout.read(3) == b"abc"
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 141
    assert len(err.splitlines()) == 1 and "Traceback" not in err


def test_a_session_answers_obeys_commands_and_survives_ctrl_c(folder: Path) -> None:
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
        type_line("/max 5")
        expect("> ")
        type_line("To é")
        expect("\x1b[1mTo é\x1b[0m")  # bold
        expect("5 tokens in")
        expect("> ")
        type_line("/again")
        expect("\x1b[1mTo é\x1b[0m")
        first = expect("\r\n")
        expect("> ")
        type_line("/more")
        assert expect("\x1b[0m").endswith("\x1b[1mTo é" + first)
        expect("> ")
        type_line("//slash \\")
        expect("  ")
        type_line("and more")
        expect("\x1b[1m/slash \r\nand more\x1b[0m")
        expect("> ")
        type_line("\x1b[200~pasted\ntext\x1b[201~")
        expect("\x1b[1mpasted\r\ntext\x1b[0m")
        expect("> ")
        type_line("/probs To")
        expect("log-likelihood")
        expect("> ")
        type_line("/temp -1")
        expect("error: temperature=-1.0 must be at least 0")
        type_line("/temperture 1")
        expect("did you mean /temperature?")
        type_line("/stop @@")
        type_line("/help")
        expect("/max_new_tokens 5")
        expect("/stop ('@@',)")
        type_line("/stop")
        type_line("/max -1")
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
