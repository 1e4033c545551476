"""visualize.py and the engine of its page: JavaScript, run by Node, against PyTorch."""

import base64
import copy
import itertools
import json
import math
import re
import resource
import shutil
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from helpers import ROOT, SHAPES, greedy, limited, random_model, random_tokens, run_stage
from hypothesis import example, given, settings
from hypothesis import strategies as st
from vocabularies import SPLITS, byte_level, save, sentencepiece

import visualize
from model import LLaMaTransformer
from plainllama import page as packing
from plainllama.families import find_family, resolved
from plainllama.generation import Sampling, filter_logits, generate
from plainllama.huggingface import save_model
from plainllama.page import make_trace
from plainllama.terminal import UserError

LATENT = "latent queries, untied"
NAMES = ["grouped-query", "explicit head_dim", "other constants", "stretched RoPE", "Qwen2"]
NAMES += ["Qwen3", "latent attention", LATENT, "GPT-2", "GPT-2 untied"]
every_model = pytest.mark.parametrize("name", NAMES)


class Node:
    """A process that runs the engine and answers one question a line."""

    def __init__(self) -> None:
        command = ["node", str(ROOT / "tests" / "page_engine.js")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        self.process = subprocess.Popen(command, **pipes)
        self.models: dict[str, LLaMaTransformer] = {}

    def ask(self, question: str, **values):
        self.process.stdin.write(json.dumps({"question": question} | values) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline(), object_hook=unpacked)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer.get("answer")

    def load(self, name: str, format: str = "fp16") -> LLaMaTransformer:
        """Give a model of SHAPES to JavaScript; return it with the weights that JavaScript has."""
        if name not in self.models:
            model = random_model(**SHAPES[name])
            arrays = packing.rounded_weights(model, format)
            table, blob = packing.pack(arrays)
            description = describe(model) | {"tensors": table}
            self.ask("model", key=name, description=description, blob=blob)
            with torch.no_grad():
                for part, weight in packing.unpadded_weights(model).items():
                    exact = torch.from_numpy(arrays[part].astype(np.float32))
                    if f"{part}.scale" in arrays:
                        exact *= torch.from_numpy(arrays[f"{part}.scale"])[:, None]
                    weight.copy_(exact)
            self.models[name] = model
        return self.models[name]


def unpacked(value: dict):
    """Return typed arrays as numpy's, anything else as it is."""
    if value.keys() != {"dtype", "data"}:
        return value
    return np.frombuffer(base64.b64decode(value["data"]), value["dtype"])


def describe(model: LLaMaTransformer) -> dict:
    c = model.config
    config = vars(resolved(c)) | {"rope_dim": c.rope_width}
    return {"config": config, "family": find_family(c)[0], "format": "fp16"}


def flat(value, name: str = "") -> dict:
    """Return a trace's arrays by the names that make_trace gives them."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, each in items for k, v in flat(each, f"{name}.{key}").items()}
    return {name[1:]: value}


def encoded(array) -> str:
    return base64.b64encode(np.asarray(array, np.float32).tobytes()).decode()


@pytest.fixture(scope="module")
def node():
    if not shutil.which("node"):
        pytest.skip("there is no Node.js to run the page's engine")
    node = Node()
    yield node
    node.process.communicate()  # ends where its input does


def errors(node: Node, key: str, model: LLaMaTransformer, ids: list[int]) -> dict[str, float]:
    """Return how far JavaScript's arrays are from Python's, relative to the largest number."""
    theirs, ours = flat(node.ask("trace", key=key, ids=ids)), make_trace(model, ids)
    found = {}
    for name, array in ours.items():
        got = theirs[name].reshape(array.shape)
        if array.dtype == np.float32:
            found[name] = float(np.abs(got - array).max() / max(1.0, np.abs(array).max()))
    assert ours["ids"].tolist() == ids == theirs["ids"].tolist()
    streams = [ours["embed"], *(ours[f"blocks.{i}.out"] for i in range(model.config.n_layers))]
    for depth, stream in enumerate(streams):  # where two tokens are as likely, either may be first
        with torch.inference_mode():
            logits = model.final_linear(model.norm(torch.from_numpy(stream)))
            logits = logits[:, : model.config.vocab_size]
        p = logits.softmax(-1).gather(1, torch.tensor(theirs[f"lens.{depth}.ids"]).view(-1, 5))
        found[f"lens.{depth}.ids"] = float(np.abs(p.numpy() - ours[f"lens.{depth}.p"]).max())
        rank = torch.tensor(theirs[f"lens.{depth}.rank"])
        follows = logits[:-1].gather(1, torch.tensor(ids[1:])[:, None])
        margin = TOLERANCE * max(1.0, float(logits.abs().max()))
        assert ((logits[:-1] > follows + margin).sum(-1) <= rank[:-1]).all()
        assert ((logits[:-1] > follows - margin).sum(-1) >= rank[:-1]).all()
        assert rank[-1] == -1 == ours[f"lens.{depth}.rank"][-1]
    return found


# A sum of n 32-bit products is off by about sqrt(n) 2^-24 of the sum of their sizes; some 20 such
# sums follow each other in two layers, of at most 128 terms: sqrt(20 * 128) * 2^-24 = 3e-6. With a
# factor of 5 for the largest of some thousand numbers:
TOLERANCE = 2e-5


@every_model
def test_each_number_of_a_trace_is_that_of_pytorch(node, name):
    model = node.load(name)
    S, V = model.config.max_seq_len, model.config.vocab_size
    for length in (1, 2, S):
        ids = random_tokens(1, length, V)[0].tolist()
        found = errors(node, name, model, ids)
        assert max(found.values()) < TOLERANCE, max(found, key=found.get)
        logits = node.ask("trace", key=name, ids=ids)["logits"].reshape(-1, V)
        expected = model(torch.tensor([ids]))[0][0].detach().numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_rows_of_8_bits_give_what_pytorch_computes_from_the_same(node):
    model, ids = node.load(name := "untied grouped-query", "int8"), random_tokens(1, 20)[0].tolist()
    assert max(errors(node, name, model, ids).values()) < TOLERANCE


def change(layer, part, scale, head=None):
    return {"layer": layer, "part": part, "head": head, "scale": scale}


@torch.no_grad()
def scaled(model: LLaMaTransformer, changes: list[dict]) -> LLaMaTransformer:
    """The model whose weights do what interventions do."""
    model = copy.deepcopy(model)
    for layer, part, head, scale in (each.values() for each in changes):
        block, outputs = model.decoder_blocks[layer], []
        wo = block.attention.wo
        if part == "head":
            width = wo.in_features // model.config.n_heads
            wo.weight[:, head * width : (head + 1) * width] *= scale
        if part in ("attention", "block"):
            outputs += wo.parameters()
        if part in ("ffwd", "block"):
            outputs += block.ffwd.down.parameters()
        for weight in outputs:
            weight *= scale
    return model


@pytest.mark.parametrize("name", ["grouped-query", LATENT, "GPT-2"])
@pytest.mark.parametrize(
    "changes",
    [
        [change(1, "head", 0, head=2)],
        [change(0, "attention", 0.5)],
        [change(1, "ffwd", 0)],
        [change(0, "block", 0), change(1, "head", -2, head=0), change(1, "attention", 0.25)],
    ],
    ids=["head", "attention", "ffwd", "several"],
)
def test_an_intervention_is_that_part_of_the_model_scaled(node, name, changes):
    model = node.load(name)
    ids = random_tokens(1, 16)[0].tolist()
    untouched, expected = (make_trace(m, ids)["logits"] for m in (model, scaled(model, changes)))
    assert np.abs(expected - untouched).max() > 0.1
    got = node.ask("trace", key=name, ids=ids, interventions=changes)["logits"]
    np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["grouped-query", LATENT, "GPT-2"])
def test_what_is_reused_of_the_text_before_is_what_a_fresh_start_gives(node, name):
    node.load(name)
    ids = random_tokens(1, 32)[0].tolist()
    changed = [*ids[:9], 7, *ids[10:30]]
    texts = [ids[:20], ids[:21], ids[:32], ids[:5], changed, changed, changed[:29], ids, [ids[0]]]
    reused = [flat(node.ask("trace", key=name, ids=text)) for text in texts]
    node.ask("write", key=name, ids=ids[:7], request={"count": 5, "settings": {"temperature": 0}})
    reused.append(flat(node.ask("trace", key=name, ids=ids[:10])))
    for text, trace in zip([*texts, ids[:10]], reused, strict=True):
        fresh = flat(node.ask("trace", key=name, ids=text, fresh=True))
        assert fresh.keys() == trace.keys()
        for part, array in fresh.items():
            assert np.array_equal(array, trace[part]), (len(text), part)


@every_model
def test_100_tokens_of_greedy_text_are_pytorchs_also_past_the_context(node, name):
    model = node.load(name)
    prompt = random_tokens(1, 5)[0].tolist()
    expected = [int(token) for token in generate(model, [prompt], 100, greedy)]
    request = {"count": 100, "settings": {"temperature": 0}}
    steps = node.ask("write", key=name, ids=prompt, request=request)
    assert [step["token"] for step in steps] == expected
    assert [step["ended"] for step in steps] == [None] * 99 + ["count"]


def test_what_is_written_depends_on_the_seed_alone_and_ends_at_end_of_text(node):
    model = node.load("GPT-2")

    def write(seed, **more):
        request = {"count": 30, "seed": seed, "settings": {"temperature": 1.5, "top_k": 9}} | more
        return node.ask("write", key="GPT-2", ids=[1, 2, 3], request=request)

    first = write(1)
    assert write(1) == first
    tokens = [step["token"] for step in first]
    assert [step["token"] for step in write(2)] != tokens
    logits = model(torch.tensor([[1, 2, 3]]))[0][:, -1].detach()
    p = filter_logits(logits, Sampling(temperature=1.5, top_k=9)).softmax(-1)[0]
    offered = {each["id"]: each["p"] for each in first[0]["alternatives"]}
    assert list(offered) == p.topk(9).indices.tolist()
    np.testing.assert_allclose(list(offered.values()), p.topk(9).values, atol=1e-5)
    far = write(1, settings={"temperature": 5})
    assert any(step["token"] not in [a["id"] for a in step["alternatives"]] for step in far)
    p = filter_logits(logits, Sampling(temperature=5)).softmax(-1)[0]
    assert far[0]["p"] == pytest.approx(float(p[far[0]["token"]]), rel=1e-4)
    end = tokens.index(tokens[10])
    ended = write(1, endOfText=[tokens[10]])
    assert ended[:end] == first[:end]
    last = ended[-1]
    assert (last["token"], last["ended"], len(ended)) == (tokens[10], "end of text", end + 1)


# Choosing


def test_random_numbers_are_even_and_decided_by_the_seed(node):
    first, again, other = (node.ask("random", seed=seed, count=8000) for seed in (7, 7, 2**53 - 1))
    assert np.array_equal(first, again) and not np.isin(first, other).any()
    for numbers in (first, other):
        counts, _ = np.histogram(numbers, 8, (0, 1))
        assert counts.sum() == 8000 and np.abs(counts - 1000).max() < 150  # five deviations


def test_a_token_is_drawn_as_often_as_its_probability_says(node):
    p = np.array([0, 0.5, 0.125, 0, 0.25, 0.125, 0], np.float32)
    numbers = [i / 800 for i in range(800)]
    drawn = node.ask("draw", p=encoded(p), numbers=numbers)
    assert (np.bincount(drawn, minlength=7) / 800).tolist() == p.tolist()
    assert node.ask("draw", p=encoded(p), numbers=[1 - 2**-32]) == [5]


ROWS = {
    "random": torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3,
    "flat": torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 0.05,
    "with equals": (torch.randn(200, generator=torch.Generator().manual_seed(2)) * 2).round(),
    "two": torch.tensor([0.5, -0.5]),
}


@pytest.mark.parametrize("row", ROWS)
def test_filters_leave_what_those_of_sample_py_do(node, row):
    logits = ROWS[row]
    grid = itertools.product((0.01, 0.5, 1.0, 1.7), (0, 1, 5, 50), (1.0, 0.95, 0.5, 0.1), (0, 0.3))
    keys = ("temperature", "top_k", "top_p", "min_p")
    grid = [dict(zip(keys, values, strict=True)) for values in grid]
    answers = node.ask("filter", logits=encoded(logits), settings=grid)
    for chosen, got in zip(grid, answers, strict=True):
        p = filter_logits(logits[None], Sampling(**chosen)).softmax(-1)[0].numpy()
        if row == "with equals":  # which of them stay is up to the order in which torch sorts
            got, p = np.sort(got), np.sort(p)
        # A softmax of 32-bit floats: each exponential and their sum are off by a few 2^-24.
        np.testing.assert_allclose(got, p, rtol=1e-5, atol=1e-7, err_msg=str(chosen))
        # So small that it is 0 in 32 bits for one and not for the other: far below any choice.
        assert (got > 1e-37).tolist() == (p > 1e-37).tolist(), chosen
    (got,) = node.ask("filter", logits=encoded(logits), settings=[{"temperature": 0}])
    assert got.tolist() == [float(i == int(logits.argmax())) for i in range(len(logits))]


def test_head_measures_are_what_their_names_say(node):
    ids, T, H = [5, 6, 7, 5, 6, 6, 8], 7, 3
    torch.manual_seed(0)
    attention = torch.randn(H, T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
    attention = attention.softmax(-1)
    got = node.ask("measures", attention=encoded(attention), T=T, ids=ids)
    for head, measures in zip(attention, got, strict=True):
        logs = head.clamp(min=1e-30).log()
        expected = {
            "entropy": -(head * logs).sum(-1)[1:].mean(),
            "previous": head.diagonal(-1).mean(),
            "first": head[1:, 0].mean(),
            # 5 came before at 0, 6 at 1, 6 at 1 and 4: what followed is at 1, 2, 2 and 5.
            "induction": (head[3, 1] + head[4, 2] + head[5, 2] + head[5, 5]) / 3,
        }
        for name, value in expected.items():
            assert measures[name] == pytest.approx(float(value), abs=1e-6), name
    alone = node.ask("measures", attention=encoded([1.0]), T=1, ids=[5])
    assert alone == [dict.fromkeys(("entropy", "previous", "first", "induction"))]


# Tokens

# Where ways to split text differ, what is written like a special token, what a byte stands for.
SPLIT = ["'s", "'S", "'ſ", "'LL", "'Re", "'d", " '", "  ", " \n", "\r\n\n", "\t\t", "123456", "½"]
SPLIT += ["\x85", "\ufeff", "\u1680", "\u2028", "\u200b", "\u3000", "\x00", "\x1b", "\x7f", "Ⅷ"]
SPLIT += ["<|endoftext|>", "<s>", "</s>", "<unk>", "<0x41>", "<tool>", "\u2581", "éa", "e\u0301"]
SPLIT += ["\u1112\u1161\u11ab", "ǅ", "ʰ", "\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f"]
SPLIT += ["中文。", "\U0001d518", "\U00013000", "한국어", "かな", "ไทย", "नमस्ते", "שלום", "مرحبا"]
SPLIT += ["\u0661\u0662", "𞤀", " the", "the king"]
TEXTS = st.lists(st.one_of(st.sampled_from(SPLIT), st.text(max_size=8)), max_size=12).map("".join)
WORDS = (b"th", b"the", b" the", b"in", b"ki", b"king", b" king", b"  ", b" \n", b"12", b"'s")
WORDS += (b"\xe2\x85",)


TOKENIZERS = {name: byte_level(WORDS, split) for name, split in SPLITS.items()}
TOKENIZERS["sentencepiece"] = sentencepiece((ROOT / "LICENSE").read_text(encoding="utf-8"))
TOKENIZERS["more"] = byte_level(WORDS) | {"normalizer": {"type": "NFC"}}
END = TOKENIZERS["more"]["added_tokens"][0]
TOOL = {"id": END["id"] + 1, "content": "<tool>", "special": False}  # is found in text
TOKENIZERS["more"]["added_tokens"].append(END | TOOL)


def tell(node: Node, name: str, content: dict) -> None:
    """Give a tokenizer to JavaScript, as a page does."""
    blob = packing.pack_bytes(json.dumps(content).encode())
    node.ask("tokenizer", key=name, blob=blob, end_of_text=[256])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_text_are_those_of_tokenizers(node, name):
    tell(node, name, TOKENIZERS[name])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(TOKENIZERS[name]))
    theirs.encode_special_tokens = True  # what is written like a special token stays text

    @settings(deadline=None, max_examples=60)
    @given(text=TEXTS)
    @example(text="".join(SPLIT))
    @example(text=" ".join(SPLIT))
    def check(text):
        # A letter may be newer than the tables of one of the three.
        text = "".join(c for c in text if unicodedata.category(c) != "Cn")
        got = node.ask("encode", key=name, text=text)
        assert got["ids"] == theirs.encode(text, add_special_tokens=False).ids
        assert got["decoded"] == theirs.decode(got["ids"], skip_special_tokens=False)

    check()


def test_a_word_of_thousands_of_letters_and_half_a_surrogate_pair_are_encoded(node):
    tell(node, "gpt2", byte_level(WORDS))
    text = "thein" * 600
    assert node.ask("encode", key="gpt2", text=text)["ids"] == [257, 259] * 600
    assert node.ask("encode", key="gpt2", text="a\ud800b")["decoded"] == "a\ufffdb"


def test_pieces_can_be_seen_whatever_their_bytes_are(node):
    tokens = ["é".encode(), b"\xa9a", b" \n", "\u2028".encode(), b"</script>", "👍".encode()]
    tell(node, "seen", byte_level(tokens))
    pieces = node.ask("pieces", key="seen", ids=[65, 0, 10, 9, 195, *range(256, 264)])
    expected = ["A", "\\u{0}", "\\n", "\\t", "\\xC3", "é", "\\xA9a", " \\n", "\\u{2028}"]
    assert pieces == [*expected, "</script>", "👍", "<|endoftext|>", "<id 263>"]
    tell(node, "pieces", content := TOKENIZERS["sentencepiece"])
    ids = [1, 3, 3 + 0x41, 3 + 0xC3, content["model"]["vocab"]["\u2581the"]]
    expected = ["<s>", "\\u{0}", "A", "\\xC3", " the"]
    assert node.ask("pieces", key="pieces", ids=ids) == expected


# The page


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory) -> Path:
    """A run with three snapshots, a checkpoint and metrics; its tokens are bytes and some more."""
    tokens = [b"</", b"</s", b"<!", b"<!--", b"\xe2\x80", "\u2028".encode()]
    run = tmp_path_factory.mktemp("out") / "run"
    for name in ("snapshots/step_000000", "snapshots/step_000002", "snapshots/step_000004"):
        save_run_model(run / name, byte_level(tokens))
    save_run_model(run / "step_000004", byte_level(tokens))
    records = [{"step": 1, "loss": 5.5}, {"step": 2, "loss": math.nan}, {"step": 4, "val_loss": 5}]
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "lo']), encoding="utf-8")
    return run


def save_run_model(directory: Path, tokenizer: dict, **changes) -> None:
    model = random_model(**{"vocab_size": 263} | changes)
    save_model(model, directory, tokenizer["added_tokens"][0]["id"])
    save(tokenizer, directory)


def make(*options: str) -> None:
    run_stage(visualize.main, *options)


def parts(page: Path) -> dict[str, str]:
    """Return the scripts of a page by id."""
    html = page.read_text(encoding="utf-8")
    found = re.findall(r"<script([^>]*) id='([^']+)'>(.*?)</script>", html, re.DOTALL)
    assert len(found) == html.count("<script"), "a script ends early, or has no id"
    return {id: text for _, id, text in found}


def refused(*options: str) -> str:
    """Return why visualize.py refuses."""
    with pytest.raises(UserError) as error:
        make(*options)
    return str(error.value)


def test_a_page_holds_the_run_and_is_one_safe_file(node, run_directory, capsys):
    prompts = ["</script><script>", "<!-- <script> \u2028 \0", "&amp; 'quoted' \"too\""]
    make(f"--ckpt={run_directory}", *(f"--prompt={prompt}" for prompt in prompts))
    out = capsys.readouterr().out
    page = run_directory / "page.html"
    megabytes = page.stat().st_size / 1e6
    assert f"wrote {page}: {megabytes:.1f} MB, models: 3 in fp16, in " in out
    assert [path.name for path in run_directory.glob("*page*")] == ["page.html"]
    scripts = parts(page)
    assert list(scripts)[-1] == "main.js"
    for path in (ROOT / "page").rglob("*.js"):
        holder = "engine.js" if path.name in visualize.ENGINE else path.name
        assert path.read_text(encoding="utf-8") in scripts[holder]
    data = json.loads(scripts["page-data"])
    assert not set("<>&\u2028") & set(scripts["page-data"]) and scripts["page-data"].isascii()
    assert data["prompts"] == prompts
    steps = [(model["step"], model["snapshot"]) for model in data["models"]]
    assert steps == [(0, True), (2, True), (4, False)]
    assert [list(record.values()) for record in data["metrics"]] == [[1, 5.5], [2, None], [4, 5]]
    assert data["notes"] == []
    code = "".join(text for id, text in scripts.items() if id.endswith(".js"))
    assert not re.search(r"Math\.random|\bfetch\(|XMLHttpRequest|\beval\(|\bimport\b[ (]", code)


def test_no_name_at_the_top_of_a_view_is_that_of_another():
    views = [path.read_text(encoding="utf-8") for path in (ROOT / "page" / "views").glob("*.js")]
    names = re.findall(r"^(?:async )?(?:function|const|let) (\w+)", "\n".join(views), re.MULTILINE)
    assert len(names) > 100 and sorted(names) == sorted(set(names))


def test_the_most_exact_form_that_fits_max_mb_is_taken(tmp_path, capsys):
    for step in (0, 2, 4, 6):
        save_run_model(tmp_path / f"snapshots/step_{step:06}", byte_level(), vocab_size=20_000)
    save_run_model(tmp_path / "step_000008", byte_level(), vocab_size=20_000)  # 1 million weights
    page = tmp_path / "page.html"
    for megabytes, formats, steps in (
        (20, "4 in int8 and 1 in fp16", [0, 2, 4, 6, 8]),
        (7, "5 in int8", [0, 2, 4, 6, 8]),
        (5, "3 in int8", [0, 4, 8]),
        (2, "1 in int8", [8]),
        (1, "5 in trace", [0, 2, 4, 6, 8]),
    ):
        make(f"--ckpt={tmp_path}", f"--max_mb={megabytes}", "--prompt=a")
        assert page.stat().st_size < megabytes * 1e6
        said, data = capsys.readouterr(), json.loads(parts(page)["page-data"])
        assert f"models: {formats}," in said.out
        assert [model["step"] for model in data["models"]] == steps
        left_out = f"--max_mb leaves room for {len(steps)} of 5 models and snapshots"
        assert (left_out in said.err) == (len(steps) < 5)
    options = (
        f"--ckpt={tmp_path}/snapshots/step_000000",
        "--prompt=the quick brown fox jumps over",
    )
    message = refused(*options, "--max_mb=1")
    assert "max_mb=1 is too small for any page of" in message
    make(*options, message.split()[-1])


def test_a_model_too_large_for_a_page_is_shown_by_traces(node, tmp_path, capsys):
    save_run_model(tmp_path, byte_level(), vocab_size=60_000)
    make(f"--ckpt={tmp_path}", "--max_mb=2", "--prompt=To be", "--prompt=or")
    told = capsys.readouterr().err
    assert "too large to run in a page of --max_mb=2: shown are given texts alone" in told
    option = re.search(r"--max_mb=(?!2)\d+", told)[0]  # the figure that is told does
    make(f"--ckpt={tmp_path}", option, "--prompt=To be", f"--out={tmp_path}/runs.html")
    assert "models: 1 in int8" in capsys.readouterr().out
    assert int(option.split("=")[1]) <= 1.1 * (tmp_path / "runs.html").stat().st_size / 1e6 + 1
    scripts = parts(tmp_path / "page.html")
    data, model = json.loads(scripts["page-data"]), random_model(vocab_size=60_000)
    for text, packed in zip(["To be", "or"], data["traces"]["0"], strict=True):
        blob, tensors = scripts[f"blob-{packed['blob']}"].strip(), packed["tensors"]
        description = data["models"][0]
        got = node.ask("packedTrace", description=description, tensors=tensors, blob=blob)
        for name, array in make_trace(model, list(text.encode())).items():
            # Half of the distance between two 16-bit floats, of the array's largest number.
            atol = 2**-11 * max(1e-3, np.abs(array).max())
            values = flat(got)[name]
            np.testing.assert_allclose(values, array.reshape(-1), atol=2 * atol, err_msg=name)


def test_a_page_of_a_snapshot_is_that_of_the_run_until_then(run_directory, tmp_path):
    page = tmp_path / "page.html"
    make(f"--ckpt={run_directory / 'snapshots' / 'step_000002'}", f"--out={page}")
    data = json.loads(parts(page)["page-data"])
    assert [model["step"] for model in data["models"]] == [0, 2]
    assert len(data["metrics"]) == 3


def test_a_damaged_snapshot_is_left_out_and_one_of_another_shape_refused(tmp_path, capsys):
    for step in (0, 2, 4, 6):
        save_run_model(tmp_path / f"snapshots/step_{step:06}", byte_level())
    save_run_model(tmp_path / "step_000008", byte_level())
    snapshots = tmp_path / "snapshots"
    weights = snapshots / "step_000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (snapshots / "step_000004" / "config.json").unlink()
    make(f"--ckpt={tmp_path}")
    notes = capsys.readouterr().err
    for step in ("step_000002", "step_000004"):
        assert f"note: {snapshots / step} is left out: " in notes
    data = json.loads(parts(tmp_path / "page.html")["page-data"])
    assert [model["step"] for model in data["models"]] == [0, 6, 8]
    assert sum("is left out" in note for note in data["notes"]) == 2
    save_run_model(snapshots / "step_000006", byte_level(), n_layers=1)
    message = refused(f"--ckpt={tmp_path}")
    assert "step_000006 is no snapshot of" in message and "n_layers 1, not 2" in message
    save_run_model(snapshots / "step_000006", byte_level(), n_heads=2)  # of as many weights
    assert "n_heads 2, not 4" in refused(f"--ckpt={tmp_path}")


def test_mistakes_are_told(run_directory, tmp_path):
    ckpt = f"--ckpt={run_directory}"
    assert "prompt='' is empty" in refused(ckpt, "--prompt=")
    message = refused(ckpt, f"--prompt={'x' * 40}")
    assert "is 40 tokens, more than the context of 32: shorten it" in message
    save_run_model(tmp_path / "other", byte_level())
    assert "has another tokenizer than" in refused(ckpt, f"--compare={tmp_path / 'other'}")
    config = tmp_path / "other" / "config.json"
    claimed = json.loads(config.read_text(encoding="utf-8")) | {"num_hidden_layers": 100_000}
    config.write_text(json.dumps(claimed), encoding="utf-8")
    assert "100000 layers, but" in refused(f"--ckpt={tmp_path / 'other'}")


def test_a_full_disk_leaves_the_old_page_as_it_was(run_directory, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("old", encoding="utf-8")
    full = limited(resource.RLIMIT_FSIZE, 50_000)
    with full, pytest.raises(OSError, match="File too large"):
        make(f"--ckpt={run_directory}", f"--out={page}")
    assert page.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
