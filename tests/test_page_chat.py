"""The chat in the page: its ids and answers are sample.py's, and what a reader can do with it."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
import test_chat
import test_page
import test_visualize
import torch
from helpers import GPT2, greedy, random_model, run_stage
from hypothesis import assume, example, given
from prepared import quick
from test_chat import BOS, CHATML, contents, conversations, hostile, source, tokenizer
from test_page import open_page, settle, until
from test_visualize import parts

import sample
import visualize
from plainllama import page as packing
from plainllama.chat import Template
from plainllama.generation import generate
from plainllama.huggingface import load_model, save_model, side_files
from plainllama.terminal import UserError
from plainllama.tokenizer import find_tokenizer, load_tokenizer, with_turns

browser, node = test_page.browser, test_visualize.node
BYTES = with_turns(find_tokenizer("byte"))
NAMES = (*test_chat.NAMES, "gemma", "cohere", "gptoss")
NO_SYSTEM = CHATML.replace(
    "{{ message.content }}",
    "{% if message.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ message.content }}",
)
NUMBERED = CHATML.replace(
    "{{ message.role }}", "{{ message.role }}{{ loop.index if message.role == 'user' }}"
)
TRIMMED = CHATML.replace("{{ message.content }}", "{{ message.content | trim }}")


def save_chat(directory: Path, template: str = CHATML, **changes) -> Path:
    """A random model of bytes with a chat template, its weights those of 16-bit floats."""
    model = random_model(**{"vocab_size": 259, "max_seq_len": 160} | changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half())
    files = side_files(model.config, BYTES)
    if template:
        files = side_files(model.config, BYTES, template=Template(CHATML, BYTES, {}))
        files["chat_template.jinja"] = template.encode()
    save_model(model, directory, files=files)
    return directory


def make_page(folder: Path, *options: str) -> Path:
    out = folder / "made.html"
    run_stage(visualize.main, f"--ckpt={folder}", f"--out={out}", *options)
    return out


def data_of(page: Path) -> dict:
    return json.loads(parts(page)["page-data"])


# Ids and answers


@pytest.fixture(scope="module", params=NAMES)
def template(request, node) -> Template:
    """A template which JavaScript knows by `template.name`."""
    name = request.param
    words = "<start_of_turn>", "<end_of_turn>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    words += "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|start|>", "<|message|>"
    words += "<|channel|>", "<|end|>", "<|return|>"
    made = type(tokenizer())(tokenizer().content)
    made.backend.add_tokens(list(words))
    made = type(made)(made.backend.to_str().encode())
    found = Template(source(name), made, BOS)
    found.name = f"template {name}"
    blob = packing.pack_bytes(made.content)
    node.ask("chat", key=found.name, tokenizer=blob, pieces=found.pieces() | {"ends": []})
    return found


@quick(max_examples=25)
@given(messages=conversations(contents | hostile))
@example(messages=[{"role": "user", "content": " \x1f\x85\u3000 x \ufeff\n"}])
def test_a_prompt_has_the_ids_of_python(node, template, messages):
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    assume(messages[-1]["role"] == "user" and messages[0]["content"])
    if messages[0]["role"] == "system" and "begin system" not in template.pieces()["frames"]:
        messages = messages[1:]
    try:
        expected = template.prompt(messages)
    except UserError:  # it cuts what stands before </think> out of an answer
        assume(False)
    got = node.ask("fit", key=template.name, messages=messages, context=10**6)
    assert (got["ids"], got["leftOut"]) == (expected, 0)


def test_a_template_that_does_not_write_all_turns_alike_has_no_pieces():
    with pytest.raises(UserError, match="does not write all turns alike"):
        Template(NUMBERED, BYTES, {}).pieces()
    half = CHATML.replace("{{ message.content }}", "{{ message.content.strip('\\n') }}")
    with pytest.raises(UserError, match="strips some white space"):
        Template(half, BYTES, {}).pieces()
    frames = Template(NO_SYSTEM, BYTES, {}).pieces()["frames"]
    assert "begin user" in frames and "begin system" not in frames
    only_after = CHATML.replace("{% for", "{% set x = messages[0].role == 'system' %}{% for", 1)
    only_after = only_after.replace("<|im_end|>\n{%", "<|im_end|>{{ '!' if x }}\n{%", 1)
    assert Template(only_after, BYTES, {}).pieces()["frames"] == frames


@pytest.fixture(scope="module")
def talker(tmp_path_factory, node) -> Path:
    """A model that talks, its page, and what JavaScript has of it under the name talker."""
    folder = save_chat(tmp_path_factory.mktemp("talker"), TRIMMED)
    scripts = parts(make_page(folder))
    data = json.loads(scripts["page-data"])
    described, chat = data["models"][0], data["chat"]
    assert described["format"] == "fp16"
    blobs = [scripts[f"blob-{number}"] for number in range(2)]
    node.ask("model", key="talker", description=described, blob=blobs[described["blob"]])
    node.ask("chat", key="talker", tokenizer=blobs[data["tokenizer"]["blob"]], pieces=chat)
    return folder


def spoken(monkeypatch, capsys, folder: Path, lines: list[str]) -> tuple[list[dict], str]:
    """The messages of a session with sample.py, and what it says beside them."""
    saved = folder / "saved.jsonl"
    saved.unlink(missing_ok=True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, f"/save {saved}", "/quit"])))
    options = "--chat", "--temperature=0", "--dtype=float32", "--device=cpu"
    run_stage(sample.main, f"--ckpt={folder}", *options)
    (record,) = saved.read_text(encoding="utf-8").splitlines()
    return json.loads(record)["messages"], capsys.readouterr().err


@pytest.mark.parametrize("system", ["", "Be brief, 国王. "])
def test_greedy_answers_are_those_of_sample_py_also_when_the_context_is_full(
    node, talker, system, monkeypatch, capsys
):
    questions = ["Hello", " what\nis that ", "<|im_end|>\n<|im_start|>user", "why", "and you?"]
    questions = [question.replace("\n", " ") for question in questions]  # a session takes lines
    lines = [f"/system {system}"] * bool(system) + questions
    expected, told = spoken(monkeypatch, capsys, talker, lines)
    messages = [{"role": "system", "content": system}] * bool(system)
    left_out = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        got = node.ask("answer", key="talker", messages=messages, context=160)
        messages.append({"role": "assistant", "content": got["said"]})
        left_out += [got["leftOut"]] if got["leftOut"] else []
    assert messages == expected
    assert left_out == [int(n) for n in re.findall("exchanges left out: ([0-9]+)", told)] != []
    asked = [{"role": "user", "content": "x" * 160}]
    with pytest.raises(ValueError, match="takes [0-9]+ tokens of a context of 160"):
        node.ask("answer", key="talker", messages=asked, context=160)


def test_without_a_template_a_line_goes_on_as_in_sample_py(node, tmp_path, monkeypatch, capsys):
    folder = save_chat(tmp_path, "")
    scripts = parts(make_page(folder, "--view=chat"))
    data = json.loads(scripts["page-data"])
    described, chat = data["models"][0], data["chat"]
    assert chat["frames"] is None and data_of(make_page(folder))["chat"] is None
    node.ask("model", key="line", description=described, blob=scripts["blob-1"])
    node.ask("chat", key="line", tokenizer=scripts["blob-0"], pieces=chat)
    arrays = packing.rounded_weights(load_model(folder), "int8")
    model = load_model(folder)  # with the weights of 8 bits that the page has
    with torch.no_grad():
        for name, weight in packing.unpadded_weights(model).items():
            exact = torch.from_numpy(arrays[name].astype("float32"))
            if f"{name}.scale" in arrays:
                exact *= torch.from_numpy(arrays[f"{name}.scale"])[:, None]
            weight.copy_(exact)
    save_model(model, folder, files=side_files(model.config, BYTES))
    options = f"--ckpt={folder}", "--temperature=0", "--dtype=float32", "--device=cpu", "--json"
    run_stage(sample.main, *options, "--prompt=To be")
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    asked = [{"role": "user", "content": "not read"}, {"role": "user", "content": "To be"}]
    got = node.ask("answer", key="line", messages=asked, context=160)
    assert (got["said"], len(got["tokens"])) == (expected["text"], expected["n_tokens"])


# The file


def test_view_chat_is_one_small_file_and_one_where_the_template_fails_has_none(tmp_path, capsys):
    run = tmp_path / "run"
    for step in ("snapshots/step_000000", "step_000004"):
        save_chat(run / step)
    run_stage(visualize.main, f"--ckpt={run}", "--view=chat")
    data = data_of(run / "chat.html")
    assert [model["format"] for model in data["models"]] == ["int8"]
    assert set(data["chat"]["ends"]) == {BYTES.vocab_size - 1, BYTES.end_of_text}
    assert len(data_of(make_page(run))["models"]) == 2
    capsys.readouterr()
    (run / "step_000004" / "chat_template.jinja").write_text(NUMBERED)
    assert data_of(make_page(run))["chat"] is None
    assert "note: no chat, for the chat template does not write" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not write all turns alike"):
        make_page(run, "--view=chat")
    dated = CHATML.replace("{% for", "{{ strftime_now('%Y') }}{% for", 1)
    (run / "step_000004" / "chat_template.jinja").write_text(dated)
    make_page(run)
    assert "the chat tells the model that it is" in capsys.readouterr().err


def test_a_model_of_20_million_parameters_can_be_mailed(tmp_path):
    changes = {"vocab_size": 16_000, "n_embd": 384, "hidden_dim": 1024, "n_layers": 8}
    page = make_page(save_chat(tmp_path, **changes), "--view=chat")
    assert data_of(page)["models"][0]["n_params"] > 20e6
    assert page.stat().st_size < 25e6


def test_too_large_a_model_has_no_chat(tmp_path):
    folder = save_chat(tmp_path, vocab_size=60_000)
    assert data_of(make_page(folder, "--max_mb=2", "--prompt=a"))["chat"] is None
    with pytest.raises(UserError, match="--max_mb=2: --max_mb=([0-9]+) lets it run") as refused:
        make_page(folder, "--view=chat", "--max_mb=2", "--prompt=a")
    make_page(folder, "--view=chat", re.findall("--max_mb=[0-9]+", str(refused.value))[-1])


# What a reader does


@pytest.fixture(scope="module")
def chat_page(browser, talker):
    opened = open_page(browser, make_page(talker))
    yield opened
    assert opened.problems == []
    opened.context.close()


@pytest.fixture
def page(chat_page):
    """The page as it is just opened, choosing the likeliest token."""
    chat_page.goto(chat_page.url.split("#")[0])
    chat_page.reload()
    until(chat_page, "window.app && app.settled()")
    chat_page.evaluate("app.change({settings: {...app.state.settings, temperature: 0}})")
    return settle(chat_page)


def ended(page):
    """Wait until the model has answered; return the page."""
    return until(page, "[...document.querySelectorAll('#chat button')][1].hidden")


def say(page, text: str):
    page.locator("#chat textarea").fill(text)
    page.keyboard.press("Enter")
    return ended(page)


def answers(page) -> list[str]:
    """The answers as they are shown, without the sign of their end."""
    shown = "[...document.querySelectorAll('.answer')].map((answer) => [...answer.children]"
    shown += ".filter((word) => !word.matches('.end')).map((word) => word.textContent).join(''))"
    return page.evaluate(shown)


def focused(page) -> str:
    return page.evaluate("document.activeElement.getAttribute('aria-label')")


def answer_of(folder: Path, messages: list[dict]) -> tuple[int, list[int], list[int], str]:
    """How many exchanges a prompt leaves out, its ids, PyTorch's likeliest answer and its text."""
    model, read = load_model(folder), load_tokenizer(folder / "tokenizer.json")
    template = Template(TRIMMED, read, {})
    prompt, left_out = template.fit(messages, 120, 160)
    tokens = []
    for ids in generate(model, [prompt], min(256, 160 - len(prompt)), greedy):
        tokens.append(int(ids))
        if tokens[-1] in (template.end, read.end_of_text):
            break
    stream, ends = read.stream(), (template.end, read.end_of_text)
    text = "".join(stream(token) for token in tokens if token not in ends)
    return left_out, prompt, tokens, text


def test_enter_sends_shift_enter_ends_a_line_and_the_answer_is_pytorchs(page, talker):
    assert focused(page) == "Your message"
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("you")
    page.keyboard.press("Enter")
    ended(page)
    assert page.locator(".asked").all_text_contents() == ["Hello\nyou"]
    first = [{"role": "user", "content": "Hello\nyou"}]
    *_, text = answer_of(talker, first)
    assert answers(page) == [text] != [""]
    assert page.locator("#chat p[role=status]").text_content() == text  # is read aloud as a whole
    assert (focused(page), page.locator("#chat textarea").input_value()) == ("Your message", "")
    page.locator("#chat .system input").fill("Be brief.")
    page.locator("#chat textarea").click()
    say(page, "Why?")
    second = [{"role": "system", "content": "Be brief."}, *first]
    second += [{"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
    *_, text = answer_of(talker, second)
    assert answers(page)[1] == text and page.locator(".cut").count() == 0
    say(page, long := "Say it again" + "!" * 50)
    third = [*second, {"role": "assistant", "content": text}, {"role": "user", "content": long}]
    left_out, prompt, tokens, text = answer_of(talker, third)
    assert answers(page)[2] == text
    after_cut = "document.querySelector('.cut').nextElementSibling.textContent"
    assert page.evaluate(after_cut).startswith(["Hello", "Why?", long][left_out])
    page.get_by_role("button", name="Look inside").click()
    until(page, "app.settled() && app.state.ids")
    assert page.evaluate("app.all") == [*prompt, *tokens]
    assert page.evaluate("app.state.position") == len(prompt) + len(tokens) - 1


def test_escape_stops_again_answers_anew_and_the_focus_stays(page):
    page.locator("#chat textarea").fill("Hello")
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.answer').childElementCount > 1")
    page.keyboard.press("Escape")
    assert focused(page) == "Your message"
    assert "Stopped" in page.locator("#chat .row").text_content()
    (cut,) = answers(page)
    page.wait_for_timeout(100)
    assert answers(page) == [cut]  # nothing more comes
    page.get_by_role("button", name="Again").click()
    ended(page)
    (whole,) = answers(page)
    assert whole.startswith(cut) and len(whole) > len(cut) and focused(page) == "Your message"
    page.evaluate("app.change({settings: {...app.state.settings, temperature: 2}})")
    page.get_by_role("button", name="Again").click()
    ended(page)
    assert answers(page) != [whole] and page.locator(".asked").count() == 1
    told = page.evaluate("[...document.querySelectorAll('#chat .word')].map((x) => x.ariaLabel)")
    assert len(told) > 40 and not any(label.endswith(": 0%") for label in told)
    say(page, "x" * 200)
    assert "a context of 160" in page.locator("#chat .row").text_content()
    assert page.locator("#chat textarea").input_value() == "x" * 200


def test_new_begins_another_conversation_told_the_same(page, talker):
    page.get_by_label("System").fill("Be brief.")
    page.locator("#chat textarea").click()
    say(page, "Hello")
    say(page, "Why?")
    page.get_by_role("button", name="New").click()
    assert page.locator("#chat .turn").count() == 0 and focused(page) == "Your message"
    assert page.locator("#chat .starters").is_visible()
    assert page.get_by_role("button", name="Look inside").is_disabled()
    say(page, "Why?")
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    *_, text = answer_of(talker, first)
    assert answers(page) == [text]


def test_a_word_shows_what_it_might_have_been_and_another_is_taken(page, talker):
    page.evaluate("app.change({settings: {...app.state.settings, temperature: 1, top_k: 9}})")
    say(page, "Hello")
    _, prompt, *_ = answer_of(talker, [{"role": "user", "content": "Hello"}])
    page.keyboard.press("Shift+Tab")  # the row of turns, then
    page.locator(".word").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Look inside").click()
    until(page, "app.settled() && app.state.ids")
    assert page.evaluate("app.state.position") == len(prompt) + 1
    ids = page.evaluate("app.all")
    with torch.inference_mode():
        logits = load_model(talker)(torch.tensor([ids[: len(prompt) + 1]]))[0][0, -1]
    p, likeliest = logits.topk(9).values.softmax(-1), logits.topk(9).indices.tolist()
    names = page.evaluate("ids => ids.map((id) => showPiece(app.piece(id)))", likeliest[:6])
    assert page.locator(".instead .name").all_text_contents() == names
    shown = page.evaluate("p => p.map(percent)", p[:6].tolist())
    assert page.locator(".instead .value").all_text_contents() == shown
    other = next(i for i in range(6) if likeliest[i] != ids[len(prompt) + 1])
    page.locator(".instead .barrow").nth(other).click()
    ended(page)
    assert "taken" in page.locator(".word").nth(1).get_attribute("class")
    page.get_by_role("button", name="Look inside").click()
    until(page, f"app.settled() && app.all[{len(prompt) + 1}] === {likeliest[other]}")
    assert page.evaluate("app.all")[: len(prompt) + 1] == ids[: len(prompt) + 1]


def test_the_chat_is_the_first_view_and_the_address_keeps_it(page, browser, page_without):
    names = page.locator("#nav a").all_text_contents()
    assert names[:2] == ["Chat", "The text"]
    assert page.locator("#nav a[aria-current=true]").text_content() == "Chat"
    page.locator("#nav a", has_text="Logit lens").click()
    until(page, "location.hash.startsWith('#s=') && location.hash.includes('lens')")
    until(page, "document.getElementById('lens').getBoundingClientRect().top < 200")  # it is there
    page.keyboard.press("Control+Home")
    until(page, "location.hash.startsWith('#s=') && !location.hash.includes('lens')")
    page.reload()
    until(page, "window.app && app.settled() && scrollY === 0")
    address = "#s=%7B%22view%22%3A%22chat%22%7D"
    page.goto(page.url.split("#")[0] + address)
    settle(page)
    assert "no state" not in page.locator("#status").text_content()
    without = open_page(browser, page_without)
    assert without.locator("#nav a").first.text_content() == "The text"
    without.goto(page_without.as_uri() + address)
    until(without, "document.querySelector('#status').textContent.includes('names no state')")
    without.context.close()


@pytest.fixture(scope="module")
def page_without(tmp_path_factory) -> Path:
    """A page of traces, whose model has a template."""
    folder = save_chat(tmp_path_factory.mktemp("without"), vocab_size=60_000)
    return make_page(folder, "--max_mb=2", "--prompt=a")


def test_the_system_line_is_hidden_where_the_template_has_none(browser, tmp_path):
    page = open_page(browser, make_page(save_chat(tmp_path, NO_SYSTEM), "--view=chat"))
    assert page.locator("#chat .system").is_hidden()
    assert answers(say(page, "Hello")) != [""]
    assert page.problems == []
    page.context.close()


def test_what_is_said_is_text_whatever_it_looks_like(browser, tmp_path):
    harmful = "</script><img src=x onerror='window.harmed = 1'><!--"
    model = random_model(vocab_size=260, max_seq_len=160, tie_embeddings=False, **GPT2)
    with torch.no_grad():  # it says that and nothing else
        model.norm.weight.zero_()
        model.norm.bias.fill_(1)
        model.final_linear.weight[259].fill_(1)
    files = side_files(model.config, BYTES, template=Template(CHATML, BYTES, {}))
    content = json.loads(BYTES.content)
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 259, "content": harmful})
    files["tokenizer.json"] = json.dumps(content).encode()
    save_model(model, tmp_path, files=files)
    page = open_page(browser, make_page(tmp_path, "--view=chat"))
    say(page, f"<b>{harmful}&amp;")
    assert page.locator(".asked").text_content() == f"<b>{harmful}&amp;"
    assert answers(page)[0].startswith(harmful * 2)
    assert page.evaluate("window.harmed") is None and page.locator("#chat img").count() == 0
    page.locator(".word").first.click()
    assert harmful.replace(" ", "·") in page.locator(".instead").text_content()
    assert page.problems == []
    page.context.close()


def test_one_request_no_eval_and_room_on_every_screen(browser, talker):
    path = make_page(talker)
    page = open_page(browser, path)
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'") and "eval" not in policy
    for number in range(3):
        say(page, f"{number} " + "word " * number + "k" * 20 * number)
    page.locator(".word").nth(2).click()
    axe = os.environ.get("PLAINLLAMA_AXE")
    if axe:
        page.evaluate(Path(axe).read_text(encoding="utf-8"))
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        for width, height in ((390, 844), (640, 400), (1280, 800)):  # 640: at a zoom of 200%
            page.set_viewport_size({"width": width, "height": height})
            page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
            settle(page)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, width
            box = page.locator("#chat textarea").bounding_box()
            assert height == 400 or box["y"] + box["height"] < height, (width, height)
            if axe:
                found = page.evaluate("async () => (await axe.run('#chat')).violations")
                serious = [x["id"] for x in found if x["impact"] in ("serious", "critical")]
                assert serious == [], (scheme, width)
    fetched = [url for url in page.requests if not url.startswith("blob:null/")]  # the worker
    assert (fetched, page.problems) == ([path.as_uri()], [])
    page.context.close()
