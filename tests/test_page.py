"""The page that visualize.py makes, in a real browser: headless Chromium, driven by playwright.

Skipped where there is none: Debian has it as chromium-headless-shell; PLAINLLAMA_BROWSER names one
that lies elsewhere.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GPT2, SHAPES, greedy, random_model, run_stage, shape
from vocabularies import byte_level, save, sentencepiece

import visualize
from model import LLaMaTransformer
from plainllama.families import resolved
from plainllama.generation import generate
from plainllama.huggingface import load_model, save_model
from plainllama.machine import n_params
from plainllama.page import make_trace
from plainllama.tokenizer import load_tokenizer

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
FLAGS += "--disable-sync --no-first-run"
TEXT = "the king is dead, the king is"
HARMFUL = "</script><!--"  # a token of this name; shown as markup, it would end the page
ODD = "a </script><script>window.harmed = 1</script> <!-- \u2028 \0 \u202e é 国王 👑🦙 <b>&amp;"
MERGES = (b"th", b"the", b" the", b"in", b"ki", b"king", b" king", b"is", b" is", b"de", b"</")
FAMILIES = ("grouped-query", "Qwen2", "Qwen3", "latent queries, untied", "GPT-2", "stretched RoPE")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("PLAINLLAMA_BROWSER")
    path = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not path:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} and no PLAINLLAMA_BROWSER")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=FLAGS.split())
        yield chromium
        chromium.close()


def save_step(directory: Path, model: LLaMaTransformer, tokenizer: dict | None = None) -> None:
    """Write a checkpoint; its tokenizer has merges, and a special token like markup."""
    content = tokenizer or byte_level((*MERGES, b"\xe2\x80", b"\xe2\x80\xa8"))
    end = content["added_tokens"][-1]
    if not tokenizer:
        content["added_tokens"].append(end | {"content": HARMFUL, "id": end["id"] + 1})
    save_model(model, directory, end_of_text=end["id"])
    save(content, directory)


def step_model(step: int, **changes) -> LLaMaTransformer:
    """A random model that differs from step to step, its weights those of 16-bit floats."""
    model = random_model(vocab_size=280, max_seq_len=96, **changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight * (1 + step / 20)).half())
    return model


def make_page(folder: Path, *options: str) -> Path:
    run_stage(visualize.main, f"--ckpt={folder}", f"--out={folder}/page.html", *options)
    return folder / "page.html"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three snapshots and metrics, and another model beside it."""
    folder = tmp_path_factory.mktemp("run")
    for step in (0, 2, 5):
        save_step(folder / "snapshots" / f"step_{step:06}", step_model(step))
    save_step(folder / "step_000009", step_model(9))
    save_step(folder / "other", step_model(3, n_layers=3, n_embd=24, **GPT2))
    records = [{"step": n, "loss": 6 - n / 3} for n in range(1, 10)] + [{"step": 9, "val_loss": 3}]
    lines = "\n".join(map(json.dumps, records))
    (folder / "metrics.jsonl").write_text(lines + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def page_file(run_folder: Path, browser) -> Path:
    return make_page(run_folder, f"--prompt={TEXT}", f"--compare={run_folder}/other")


def open_page(browser, path: Path, **options):
    """Open a page and wait until all is drawn; its `.problems` are what the console said."""
    options = {"viewport": {"width": 1280, "height": 800}} | options
    page = browser.new_context(**options).new_page()
    page.problems, page.requests = [], []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(path.as_uri())
    return settle(page)


def settle(page):
    """Wait until the page shows what it was last asked for; return it."""
    page.wait_for_timeout(30)
    return until(page, "window.app && app.settled()")


def until(page, condition: str):
    """Wait until a condition of JavaScript holds in the page; return the page."""
    deadline = time.monotonic() + 30
    while not page.evaluate(f"Boolean({condition})"):
        assert time.monotonic() < deadline, f"not yet: {condition}; {page.problems}"
        page.wait_for_timeout(10)
    return page


def next_stop(page) -> None:
    """Press the tour's button, which moves with the card: a mouse may miss it on a slow machine."""
    until(page, "!document.querySelector('.tour .primary').disabled")
    page.evaluate("document.querySelector('.tour .primary').click()")


@pytest.fixture
def page(browser, page_file: Path) -> Iterator:
    opened = open_page(browser, page_file)
    yield opened
    assert opened.problems == []
    opened.context.close()


def type_text(page, text: str) -> None:
    page.locator("#prompt").fill(text)
    settle(page)


def logits_of(page, holder: str = "app.trace") -> torch.Tensor:
    values, T = page.evaluate(f"[Array.from({holder}.logits), {holder}.shape.T]")
    return torch.tensor(values).view(T, -1)


@torch.inference_mode()
def expected(model: LLaMaTransformer, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0][0]


def ids_of(folder: Path, text: str) -> list[int]:
    return load_tokenizer(folder / "step_000009" / "tokenizer.json").encode(text)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) < 2e-3


def test_one_request_under_a_strict_policy_no_error_and_usable(browser, page_file) -> None:
    page = open_page(browser, page_file)
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'") and "http" not in policy
    page.evaluate("app.change({layer: 1, position: 1})")
    settle(page)
    fetched = [url for url in page.requests if not url.startswith("blob:null/")]  # the worker
    assert (fetched, page.problems) == ([page_file.as_uri()], [])
    page.context.close()
    text = page_file.read_text(encoding="utf-8")
    assert "Math.random" not in text and "innerHTML" not in text and "http-equiv" in text


def test_typing_shows_pytorchs_probabilities_of_each_token(page, run_folder: Path) -> None:
    for text in (TEXT, TEXT + " the", "k", ODD, ""):
        type_text(page, text)
        ids = ids_of(run_folder, text) or page.evaluate("app.data.tokenizer.end_of_text")
        logits = expected(step_model(9), ids)
        assert page.evaluate("app.ids") == ids
        assert close(logits_of(page), logits)
        p = logits.softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
        shown = page.locator("#strip .token small").all_text_contents()
        assert shown == ["first", *page.evaluate("p => p.map(percent)", p)]
        chosen = page.evaluate("app.piece(app.trace.lens.at(-1).ids.at(-5))")
        likeliest = page.locator("#next .bars.wide .name").first.text_content()
        assert likeliest == chosen.replace(" ", "·")
    type_text(page, "a b" * 60)
    assert page.evaluate("app.trace.shape.T") == 96
    assert "the first 84 are not read" in page.locator("#status").text_content()


def test_a_token_that_is_clicked_goes_behind_all_of_a_text(page) -> None:
    bars = page.locator("#next button.barrow")
    type_text(page, "a b" * 60)  # 180 tokens, of which the context holds 96
    assert page.locator("#text .facts dd").nth(1).text_content() == "1.00"  # byte per token
    before = page.evaluate("app.all")
    bars.first.click()
    settle(page)
    after = page.evaluate("app.all")
    assert after[:-1] == before and len(after) == 181
    type_text(page, "")
    bars.first.click()
    settle(page)
    assert len(page.evaluate("app.all")) == 1 and page.evaluate("app.state.text")


def test_a_slider_that_was_moved_back_counts_as_moved(page) -> None:
    assert page.evaluate("app.settings()") == {"temperature": 0.8}
    for temperature in ("0.5", "1"):
        page.locator("#next .slider input").first.fill(temperature)
    assert page.evaluate("app.settings().temperature") == 1
    until(page, "location.hash.includes('settings')")
    page.reload()
    until(page, "window.app && app.settled()")
    assert page.evaluate("app.settings().temperature") == 1


EDITED = """async (texts) => {
  const flat = (value, path = '') => ArrayBuffer.isView(value)
    ? [[path, Array.from(value)]]
    : value && typeof value === 'object'
      ? Object.entries(value).flatMap(([key, each]) => flat(each, `${path}.${key}`)) : [];
  const [wrong, sent, before] = [[], [], []];
  const ask = app.client.ask;
  app.client.ask = (message, onPart) => {
    if (message.type === 'trace') sent.push(message.ids.length - message.start);
    return ask(message, onPart);
  };
  for (const text of texts) {
    before.push([app.trace, JSON.stringify(flat(app.trace))]);
    app.setText(text);
    do await new Promise((resume) => setTimeout(resume, 20)); while (!app.settled());
    const whole = flat(await app.read(app.state.model, app.ids, []));
    const shown = new Map(flat(app.trace));
    for (const [path, values] of whole)
      if (values.some((x, i) => Math.abs(x - shown.get(path)[i]) > 1e-5)) wrong.push([text, path]);
    sent.pop();
  }
  for (const [trace, values] of before)
    if (JSON.stringify(flat(trace)) !== values) wrong.push('an earlier trace');
  return [wrong, sent];
}"""


def test_a_key_costs_the_rows_that_are_new_and_earlier_traces_stay(page) -> None:
    texts = ["the king", "the king i", "the king", "the king d", "a king d", "a king d!"]
    page.evaluate("text => app.setText(text)", texts[0])
    settle(page)
    wrong, sent = page.evaluate(EDITED, texts[1:])
    assert wrong == [] and len(sent) == 5
    assert sent[0] <= 2 and sent[1] == 0 and sent[2] <= 2 and sent[4] == 1 and sent[3] > 3


def test_odd_tokens_are_shown_as_text_and_do_nothing(page, run_folder: Path) -> None:
    scripts = page.locator("script").count()
    type_text(page, ODD)
    assert page.evaluate("window.harmed") is None
    assert page.locator("script").count() == scripts
    pieces = page.locator("#strip .piece").all_text_contents()
    assert {"</", "\\u{2028}", "\\u{0}", "\\xF0"} <= set(pieces)
    special = 256 + len(MERGES) + 3
    page.evaluate("id => document.querySelector('#foot').append(showPiece(app.piece(id)))", special)
    assert HARMFUL in page.locator("#foot").text_content()
    assert page.locator("b").filter(has_text="&amp;").count() == 0


def test_a_model_with_a_tokenizer_of_sentencepiece_reads_and_writes(browser, tmp_path) -> None:
    content = sentencepiece("the king is dead, my lord. " * 9, 300)
    model = random_model(vocab_size=len(content["model"]["vocab"]), max_seq_len=96)
    save_step(tmp_path / "step_000009", model, content)
    page = open_page(browser, make_page(tmp_path, "--prompt=the king"))
    for text in ("the king is dead", "  国王 👑 </s>"):
        type_text(page, text)
        ids = [1, *ids_of(tmp_path, text)]
        assert page.evaluate("app.ids") == ids
        assert page.evaluate("app.tokenizer.decode(app.ids)") == text
        assert float((logits_of(page) - expected(model, ids)).abs().max()) < 0.1
    assert page.problems == []
    page.context.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_is_the_sum_that_explains_it(browser, tmp_path: Path, family: str) -> None:
    save_step(tmp_path / "step_000009", step_model(9, **SHAPES[family]))
    page = open_page(browser, make_page(tmp_path, f"--prompt={TEXT}"))
    changes = [{"layer": 1, "part": "head", "head": 1, "scale": 0.5}]
    changes += [{"layer": 0, "part": "block", "head": None, "scale": 1.5}]
    for interventions in ([], changes):
        page.evaluate("x => app.change({interventions: x})", interventions)
        settle(page)
        wrong, checked = page.evaluate(
            """async () => {
              const [wrong, steps] = [[], pipelineSteps(app.config(), app.trace.shape)];
              let checked = 0;
              for (let layer = 0; layer < app.trace.shape.L; layer++) {
                app.change({layer, head: 1, position: 7});
                for (const {key, values} of steps.flatMap((step) => step.vectors ?? [])) {
                  const numbers = values(app.trace, layer, 7, 1);
                  for (const i of [0, 5, numbers.length - 1]) {
                    const at = numbers.ids ? numbers.ids[i] : i;
                    const told = await explainCell(app, key, at, numbers[i]);
                    checked++;
                    if (!told.score && !(Math.abs(told.total - numbers[i]) < 2e-3))
                      wrong.push([key, layer, i, told.total, numbers[i]]);
                  }
                }
              }
              return [wrong, checked];
            }"""
        )
        assert wrong == [] and checked > 60
    total = "totalOf(pipelineSteps(app.config(), app.trace.shape), 'params', app.trace.shape.L)"
    assert page.evaluate(total) == n_params(step_model(9, **SHAPES[family]))
    page.locator('[data-step="4.6"] canvas').click(position={"x": 9, "y": 9})
    page.wait_for_timeout(200)
    assert "✓" in page.locator('[data-step="4.6"] .sum').text_content()
    assert page.problems == []
    page.context.close()


def test_a_head_switched_off_is_pytorchs_model_without_its_output(page, run_folder: Path) -> None:
    before = page.locator("#strip .token small").all_text_contents()
    page.locator(".board button", has_text="head 1").nth(1).click()  # of layer 1
    settle(page)
    model = step_model(9)
    D = model.config.head_width
    with torch.no_grad():
        model.decoder_blocks[1].attention.wo.weight[:, D : 2 * D] = 0
    ids = ids_of(run_folder, TEXT)
    assert close(logits_of(page), expected(model, ids))
    assert close(logits_of(page, "app.beside"), expected(step_model(9), ids))
    assert page.locator("#strip .token small").all_text_contents() != before
    assert "untouched" in page.locator("#status").text_content()
    page.locator("#controls button").click()
    settle(page)
    assert page.locator("#strip .token small").all_text_contents() == before


SWEEP = """async () => {
  const told = [];
  const steps = pipelineSteps(app.config(), app.trace.shape);
  const strips = () => document.querySelectorAll('[data-step] .strips canvas');
  const keys = steps.flatMap((step) => step.vectors ?? []);
  const wait = async () => {
    do await new Promise((resume) => setTimeout(resume, 20)); while (!app.settled());
  };
  const part = { layer: 0, part: 'ffwd', head: null, scale: 0 };
  const patches = [
    { interventions: [part] }, { interventions: [] }, { beside: 4 }, { interventions: [part] },
    { beside: null, interventions: [] }, { model: 0 }, { beside: 1, model: 3 }, { beside: null },
  ];
  for (const index of [4, 13, 16, 18]) {
    const canvas = strips()[index];
    for (const key of ['ArrowRight', 'ArrowRight', 'Enter'])
      canvas.dispatchEvent(new KeyboardEvent('keydown', { key }));
    await wait();
    for (const patch of patches) {
      app.change(patch);
      await wait();
      const { layer, position, head } = app.state;
      const number = keys[index].values(app.trace, layer, position, head);
      const panel = canvas.closest('.step').querySelector('.sum');
      told.push([panel.hidden, panel.querySelector('.total').textContent, num(number[1], 4)]);
    }
    for (const view of app.views) view.root.scrollIntoView();
  }
  return told;
}"""


def test_an_open_panel_follows_interventions_and_a_second_model_in_every_view(page) -> None:
    page.evaluate("app.change({layer: 1, position: 9})")
    settle(page)
    told = page.evaluate(SWEEP)
    assert len(told) == 32 and len({number for _, _, number in told}) > 8
    for hidden, total, number in told:
        assert not hidden and f"the strip has {number} ✓" in total, (total, number)


def test_a_view_that_fails_is_named_and_the_others_go_on(browser, page_file: Path) -> None:
    page = open_page(browser, page_file)
    page.evaluate("""() => {
        const lens = app.views.find((view) => view.root.closest('#lens'));
        window.mended = lens.update;
        lens.update = () => { throw new Error('a fault of the lens'); };
    }""")
    type_text(page, TEXT + " dead")
    status = page.locator("#status")
    until(page, "() => document.querySelector('#status').textContent")
    assert "Logit lens cannot be shown: a fault of the lens." in status.text_content()
    shown = page.locator("#strip .piece").all_text_contents()
    assert shown == page.evaluate("app.trace.pieces.map(showPiece)") and shown[-1] == "d"
    page.evaluate("""() => {
        app.views.find((view) => view.root.closest('#lens')).update = window.mended;
    }""")
    type_text(page, TEXT)
    until(page, "() => !document.querySelector('#status').textContent")
    assert all("a fault of the lens" in problem for problem in page.problems)
    page.context.close()


def test_the_scrubber_shows_each_snapshot_as_pytorch_computes_it(page, run_folder: Path) -> None:
    ids, seen = ids_of(run_folder, TEXT), set()
    for number, step in enumerate((0, 2, 5, 9)):
        page.locator(".scrub input").fill(str(number))
        settle(page)
        assert close(logits_of(page), expected(step_model(step), ids))
        assert page.locator(".steplabel").text_content() == f"step {step}"
        seen.add(page.evaluate("document.querySelector('.map canvas').toDataURL()"))
        seen.add(page.locator("#next .bars.wide").inner_text())
    assert len(seen) == 8
    page.evaluate("document.querySelector('#training').scrollIntoView()")
    page.wait_for_timeout(1500)
    samples = page.locator(".film .sample").all_text_contents()
    assert len(samples) == 4 and all(samples)
    assert "nats" in page.locator(".film .guess").first.text_content()


HEADS = """([T, weight]) => {
  const attention = new Float32Array(3 * T * T);
  for (let t = 0; t < T; t++)
    for (let s = 0; s <= t; s++) {
      attention[(0 * T + t) * T + s] = (1 - weight) / (t + 1) + weight * (s === Math.max(0, t - 1));
      attention[(1 * T + t) * T + s] = 1 / (t + 1);
      attention[(2 * T + t) * T + s] = (1 - weight) / (t + 1) + weight * (s === 0);
    }
  const ids = Int32Array.from({ length: T }, (_, t) => t % 7);
  const trace = { shape: { T, H: 3 }, ids, blocks: [{ attention }] };
  return [measureHeads(trace)[0].map(roleOf), strongest(trace), bestHead(trace, T - 1)];
}"""


def test_roles_are_measured_against_looking_everywhere_alike(page) -> None:
    roles, found, best = page.evaluate(HEADS, [30, 0.3])
    assert roles == ["previous token", "even", "first token"]
    alike = sum(1 / (t + 1) for t in range(1, 30)) / 29
    repeats = [(t // 7) / (t + 1) for t in range(7, 30)]
    previous, induction = found["previous"], found["induction"]
    assert (previous["head"], previous["learned"], induction["learned"]) == (0, True, False)
    assert previous["value"] == pytest.approx(0.7 * alike + 0.3, abs=1e-6)
    assert previous["chance"] == pytest.approx(alike)
    assert induction["chance"] == pytest.approx(sum(repeats) / len(repeats))
    assert best == {"layer": 0, "head": 0, "key": 28}
    roles, found, best = page.evaluate(HEADS, [30, 0.1])
    assert not any(one["learned"] for one in found.values()) and best == {}
    roles, _, _ = page.evaluate(HEADS, [6, 0.9])
    assert set(roles) == {"text too short"}
    leaders = page.locator(".leaders li").all_text_contents()
    assert len(leaders) == 3 and all("by chance" in line for line in leaders)
    learned = page.evaluate("Object.values(strongest(app.trace)).map((one) => one.learned)")
    assert ["not learned yet" not in line for line in leaders] == learned


def test_the_footer_says_how_what_is_shown_is_rounded(page) -> None:
    foot = page.locator("footer")
    assert "16-bit float" in foot.inner_text() and "whole numbers" not in foot.inner_text()
    page.evaluate("app.data.models[0].rounding = 'Rounded to whole numbers.'")
    page.evaluate("app.change({beside: 0})")
    settle(page)
    assert "step 0: Rounded to whole numbers." in foot.inner_text()
    assert "step 9: Each weight is rounded to the nearest 16-bit float" in foot.inner_text()


def test_the_compared_model_stands_beside_the_first(page, run_folder: Path) -> None:
    rows = page.locator("#compare tr").all_inner_texts()
    config = resolved(shape(vocab_size=280, max_seq_len=96))
    for key in ("n_layers", "n_embd", "n_heads", "hidden_dim"):
        assert f"{key}\t{getattr(config, key)}" in rows
    page.locator("#compare .choice", has_text="other").press("Enter")
    settle(page)
    other = load_model(run_folder / "other")
    assert close(logits_of(page, "app.beside"), expected(other, ids_of(run_folder, TEXT)))
    table = page.locator("#compare table").inner_text()
    for model in (other, step_model(9)):
        assert f"{n_params(model):,}" in table
    assert page.locator("#compare tr.differs").count() >= 3


def chips_of(page) -> tuple[list[str], list[str]]:
    """Return the names and the per cents of the chips that are shown."""
    shown = page.locator("#opening .chip:not([hidden])")
    names, percents = (shown.locator(part).all_text_contents() for part in (".name", "small"))
    return names, percents


def expected_chips(page, logits: torch.Tensor) -> tuple[list[str], list[str]]:
    p, ids = logits.softmax(-1).topk(5)
    names = page.evaluate("ids => ids.map((id) => showPiece(app.piece(id)))", ids.tolist())
    return names, page.evaluate("p => p.map(percent)", p.tolist())


def test_chips_are_pytorchs_likeliest_tokens_as_wide_as_they_are_likely(page, run_folder) -> None:
    for text in (TEXT, "k", "the 国"):
        type_text(page, text)
        logits = expected(step_model(9), ids_of(run_folder, text))
        assert chips_of(page) == expected_chips(page, logits[-1])
        until(page, "document.getAnimations().every((x) => !x.transitionProperty)")
        widths = [chip.bounding_box()["width"] for chip in page.locator(".chip").all()]
        p = logits[-1].softmax(-1).topk(5).values
        # The row is 920 pixels with five gaps of 4 in it, and none is narrower than 68.
        ample = [i for i in range(5) if 900 * p[i] > 90]
        for i in ample[1:]:
            assert widths[i] / widths[0] == pytest.approx(float(p[i] / p[0]), rel=0.02)
        assert min(widths) > 50
        nats = -logits.log_softmax(-1)[range(len(logits) - 1), ids_of(run_folder, text)[1:]]
        tints = "[...document.querySelectorAll('.tint')].map((x) => Number(x.style.getPropertyValue"
        shown = page.evaluate(tints + "('--surprise')))")
        if "国" not in text:  # whose first bytes have no letter to be behind
            assert shown == pytest.approx([0, *(nats / 8).clamp(max=1).tolist()], abs=1e-3)


def test_a_chip_that_is_taken_joins_the_text_and_tab_takes_the_likeliest(page, run_folder) -> None:
    ids = ids_of(run_folder, TEXT)
    likely = expected(step_model(9), ids)[-1].topk(5).indices.tolist()
    page.locator(".chip").nth(2).click()
    settle(page)
    assert page.evaluate("app.ids") == (ids := [*ids, likely[2]])
    assert page.locator("#prompt").input_value() == page.evaluate("app.tokenizer.decode(app.ids)")
    page.locator("#prompt").click()
    page.keyboard.press("Control+End")
    for _ in range(3):
        page.keyboard.press("Tab")
        settle(page)
        ids.append(int(expected(step_model(9), ids)[-1].argmax()))
    assert page.evaluate("app.ids") == ids
    page.keyboard.press("Control+z")
    settle(page)
    assert page.evaluate("app.ids") == ids[:-1]
    page.keyboard.press("Shift+Tab")  # a text box is no trap for the keyboard
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "chip"
    assert page.evaluate("app.ids") == ids[:-1]


def test_a_word_that_is_clicked_shows_what_it_might_have_been(page, run_folder: Path) -> None:
    ids = ids_of(run_folder, TEXT)
    logits = expected(step_model(9), ids)
    at = 4
    box = page.locator(".tints .tint").nth(at).bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + box["height"] / 2)
    settle(page)
    assert page.evaluate("app.state.position") == at
    assert chips_of(page) == expected_chips(page, logits[at - 1])
    (p,) = page.evaluate("p => p.map(percent)", [float(logits[at - 1].softmax(-1)[ids[at]])])
    assert f"({p}, rank " in page.locator(".expects").text_content()
    other = next(int(i) for i in logits[at - 1].topk(5).indices if i != ids[at])
    page.locator(".chip:not(.hit)").first.click()
    settle(page)
    changed = [*ids[:at], other, *ids[at + 1 :]]
    assert page.evaluate("app.ids") == changed
    assert close(logits_of(page), expected(step_model(9), changed))
    page.locator("#opening button", has_text="Undo").click()
    settle(page)
    assert page.evaluate("app.state.text") == TEXT


def test_what_it_writes_in_place_is_pytorchs_greedy_text(page, run_folder: Path) -> None:
    page.evaluate("app.change({settings: {...app.state.settings, temperature: 0}})")
    write = page.locator("#opening button.primary")
    write.click()
    until(page, "document.querySelector('.tints').childElementCount > 21")
    before = page.evaluate("app.ids.length")
    until(page, "app.state.ids")
    settle(page)
    ids = ids_of(run_folder, TEXT)
    tokens = [int(token) for token in generate(step_model(9), [ids], 60, greedy)]
    end = page.evaluate("app.data.tokenizer.end_of_text")[0]
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    assert len(tokens) > 8
    assert before == len(ids) and page.evaluate("app.all") == [*ids, *tokens]
    assert close(logits_of(page), expected(step_model(9), page.evaluate("app.ids")))
    page.locator("#opening button", has_text="Undo").click()
    write.click()
    page.locator("#prompt").press_sequentially("!")  # what is typed stops it, and stays
    settle(page)
    assert write.text_content() == "Let it write"
    assert page.locator("#prompt").input_value().endswith("!")
    assert page.evaluate("app.state.text") == page.locator("#prompt").input_value()


def test_neighbours_are_the_nearest_embeddings_now_and_before_training(page, run_folder) -> None:
    type_text(page, "so the")
    page.locator("#text").scroll_into_view_if_needed()
    until(page, "document.querySelector('.neighbours h3').textContent.includes('·the')")
    until(page, "document.querySelectorAll('.near').length === 16")
    shown = page.locator(".near").all_inner_texts()
    token = ids_of(run_folder, "so the")[-1]
    for step, rows in ((9, shown[:8]), (0, shown[8:])):
        embeddings = step_model(step).embeddings.weight.detach()[:280]
        cosines = torch.cosine_similarity(embeddings[token], embeddings)
        cosines[token] = -1
        nearest, ids = cosines.topk(8)
        names = page.evaluate("ids => ids.map((id) => showPiece(app.piece(id)))", ids.tolist())
        assert [row.split("\n")[0] for row in rows] == names
        assert [float(row.split("\n")[-1]) for row in rows] == pytest.approx(nearest, abs=0.01)
    tokenizer = json.loads((run_folder / "step_000009" / "tokenizer.json").read_text())
    merges = [" + ".join(pair).replace("Ġ", "·") for pair in tokenizer["model"]["merges"]]
    made = page.locator(".merges .name").all_text_contents()
    assert set(made) <= set(merges) and "".join(made[-1].split(" + ")) == "·the"
    ranks = [merges.index(each) for each in made]
    numbers = page.locator(".merges small").all_text_contents()
    assert numbers == [f"merge {rank + 1}" for rank in ranks] and ranks == sorted(ranks)


def test_following_a_token_tells_what_each_layer_does_to_it(browser, page_file, run_folder) -> None:
    page = open_page(browser, page_file, reduced_motion="reduce")
    trace = make_trace(step_model(9), ids := ids_of(run_folder, TEXT))
    L, H, last = 2, 4, len(ids) - 1
    streams = [trace["embed"], *(trace[f"blocks.{i}.out"] for i in range(L))]
    lengths = [float(np.linalg.norm(stream[last])) for stream in streams]
    said = [trace[f"lens.{depth}.ids"][last, 0] for depth in range(L + 1)]
    names = page.evaluate("ids => ids.map((id) => showPiece(app.piece(id)))", list(map(int, said)))
    assert page.locator(".station .name").all_text_contents() == names
    bars = page.evaluate("[...document.querySelectorAll('.norm i')].map((x) => x.style.width)")
    wide = [float(bar.rstrip("%")) / 100 for bar in bars]
    assert wide == pytest.approx([length / max(lengths) for length in lengths], abs=1e-3)
    follow = page.locator(".follow button")
    for stop in range(L + 2):  # without motion, a press goes one stop on
        follow.click()
        told = page.locator(".told").text_content()
        assert page.locator(".station.ahead").count() == max(0, L - stop)
        if 1 <= stop <= L:
            outputs = trace[f"blocks.{stop - 1}.heads"][last].reshape(H, -1)
            head = int(np.linalg.norm(outputs, axis=1).argmax())
            weight = float(trace[f"blocks.{stop - 1}.attention"][head, last].max())
            (shown,) = page.evaluate("p => p.map(percent)", [weight])
            assert f"Block {stop - 1}: head {head}," in told and f"takes {shown} from" in told
            (length,) = page.evaluate("x => x.map((y) => num(y))", [lengths[stop]])
            assert f"is {length} long now" in told
    assert page.problems == []
    page.context.close()
    moving = open_page(browser, page_file)
    moving.locator(".follow button").click()
    until(moving, "document.querySelectorAll('.station.ahead').length === 1")
    moving.evaluate("document.querySelector('.station').click()")
    moving.wait_for_timeout(1500)
    assert moving.locator(".station.ahead").count() == 2  # what is clicked stays
    assert moving.problems == []
    moving.context.close()


def test_a_matrix_shows_the_weights_of_the_model_in_order_or_sorted(page) -> None:
    model = dict(step_model(9).named_parameters())
    page.locator("#weights").scroll_into_view_if_needed()
    cell = page.locator(".matrixcell")
    names = [option.get_attribute("value") for option in page.locator("#weights option").all()]
    assert names == [name for name, weight in model.items() if weight.dim() == 2]
    number = re.compile(r"(\w+)\[(\d+), (\d+)\] = (\S+?); row \d+.* is (\S+) long, .* (\S+)")
    for sort, name in enumerate(names[:6]):
        weight = model[name].detach()[:280]
        page.locator("#weights select").select_option(name)
        until(
            page,
            f"document.querySelector('.matrixcell').textContent.startsWith('{name.split('.')[-2]}')",
        )
        if sort == 2:
            for button in page.locator("#weights .choice").all():
                button.click()
        rows, columns = weight.norm(dim=1), weight.norm(dim=0)
        order = [
            x.argsort(descending=True, stable=True) if sort >= 2 else torch.arange(len(x))
            for x in (rows, columns)
        ]
        canvas = page.locator(".matrix")
        box = canvas.bounding_box()
        for y, x in ((0.1, 0.9), (0.77, 0.31)):
            canvas.click(position={"x": x * box["width"], "y": y * box["height"]})
            told = cell.text_content().replace("−", "-")
            found = number.fullmatch(told)
            assert found, told
            r, c = int(found[2]), int(found[3])
            # A pointer stands on whole pixels, and a row may be as small as one and a half.
            assert abs(order[0].tolist().index(r) - y * len(rows)) < 2, told
            assert abs(order[1].tolist().index(c) - x * len(columns)) < 2, told
            for shown, value in zip(
                found.group(4, 5, 6), (weight[r, c], rows[r], columns[c]), strict=True
            ):
                assert float(shown) == pytest.approx(float(value), rel=6e-3)
    for button in page.locator("#weights .choice").all():
        button.click()
    page.locator("[aria-label='Show the whole matrix']").click()
    page.locator(".matrix").click(position={"x": 1, "y": 1})
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "+", "+"):
        page.keyboard.press(key)
    assert "[1, 2]" in cell.text_content()
    assert "Shown: " in page.locator("#weights .note").text_content()


def test_arrow_keys_and_brackets_move_position_layer_and_head(page) -> None:
    last = page.evaluate("app.state.position")
    page.evaluate("app.change({layer: 0, head: 0})")
    page.locator(".token[aria-selected=true]").focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowDown", "]"):
        page.keyboard.press(key)
    settle(page)
    state = page.evaluate("[app.state.position, app.state.layer, app.state.head]")
    assert state == [last - 2, 1, 1]
    assert page.evaluate("document.activeElement.getAttribute('aria-selected')") == "true"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    label = page.locator(".head[aria-pressed=true]").get_attribute("aria-label")
    assert label.startswith("Layer 1, head 1, ")


def test_the_keyboard_reaches_the_lens_and_scrolls_where_no_widget_has_it(page) -> None:
    page.locator(".lens .cell[tabindex='0']").focus()
    before = page.evaluate("app.state.position")
    for key in ("ArrowUp", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
    settle(page)
    focused = page.evaluate("document.activeElement.title")
    assert focused == f"embedding, position {before - 1}"
    assert "From the embedding alone" in page.locator(".lensdetail h3").text_content()
    page.evaluate(
        "() => { document.activeElement.blur(); scrollTo({top: 0, behavior: 'instant'}) }"
    )
    layer = page.evaluate("app.state.layer")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    until(page, "scrollY > 1000")
    assert page.evaluate("app.state.layer") == layer
    head = page.evaluate("app.state.head")
    page.keyboard.press("]" if head == 0 else "[")
    assert page.evaluate("app.state.head") == head  # letters are keys inside a widget alone


INK = """() => {
  const light = ([r, g, b]) => [r, g, b].reduce((sum, x, i) => sum + [0.2126, 0.7152, 0.0722][i]
    * (x <= 10 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4), 0);
  const ratios = [paint.sequential, paint.surprisal, paint.diverging].flatMap((ramp) =>
    ramp.map((colour, i) => {
      const pair = [light(colour), inkOn(ramp, i / 255) === '#ffffff' ? 1 : 0];
      return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    }));
  return Math.min(...ratios);
}"""


def test_what_is_read_has_contrast_a_name_and_its_place_in_the_outline(page) -> None:
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        settle(page)
        assert page.evaluate(INK) >= 4.5, scheme
    unnamed = "[...document.querySelectorAll('canvas[role=img], svg[role=img]')]"
    unnamed += ".filter((node) => !node.getAttribute('aria-label')).map((node) => node.className)"
    assert page.evaluate(unnamed) == []
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => h.tagName)")
    assert all(int(b[1]) <= int(a[1]) + 1 for a, b in zip(levels, levels[1:], strict=False))
    path = os.environ.get("PLAINLLAMA_AXE")  # npm's axe-core/axe.min.js, where one has it
    for section in page.locator("section").all() if path else ():
        section.scroll_into_view_if_needed()
        settle(page)
    if path:
        page.evaluate(Path(path).read_text(encoding="utf-8"))
        found = page.evaluate("async () => (await axe.run()).violations")
        assert [x["id"] for x in found if x["impact"] in ("serious", "critical")] == []


def test_a_page_is_printed_within_its_width(page) -> None:
    page.set_viewport_size({"width": 700, "height": 1000})
    page.emulate_media(media="print")
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.locator(".rail").is_hidden()
    wide = "[...document.querySelectorAll('main canvas')].filter((node) => "
    wide += "node.getBoundingClientRect().right > 700 && !node.closest('.flowbox')).length"
    assert page.evaluate(wide) == 0


def test_names_keep_to_themselves_and_a_blank_at_the_end_gets_a_hint(browser, tmp_path) -> None:
    folder = tmp_path / "a\u202eb שלום <i>"
    save_step(folder / "step_000009", step_model(9))
    page = open_page(browser, make_page(folder, "--prompt=the king"))
    name = page.locator("#about h1").text_content()
    assert "\u202e" not in name and name.startswith("\u2068a\\u{202e}b שלום <i>\u2069")
    type_text(page, "the king ")
    assert "ends with a blank" in page.locator("#status").text_content()
    type_text(page, "the king")
    assert page.locator("#status").text_content() == ""
    page.context.close()


COVERED = """() => {
  const [card, target] = ['.tour', '.toured'].map((name) =>
    document.querySelector(name).getBoundingClientRect());
  const across = Math.min(card.right, target.right) - Math.max(card.left, target.left);
  const down = Math.min(card.bottom, target.bottom) - Math.max(card.top, target.top);
  const inside = card.left >= 0 && card.right <= innerWidth && card.bottom <= innerHeight;
  const seen = Math.min(innerHeight, target.bottom) - Math.max(0, target.top);
  return [inside, Math.max(0, across) * Math.max(0, down) / target.width, seen];
}"""


ZOOMED, PHONE = (pytest.param(s, marks=pytest.mark.slow) for s in ((640, 400), (390, 844)))


@pytest.mark.parametrize("size", ((1280, 800), ZOOMED, PHONE))
def test_the_tour_acts_beside_its_target_and_puts_everything_back(
    browser, page_file: Path, size: tuple[int, int]
) -> None:
    viewport = {"width": size[0], "height": size[1]}
    page = open_page(browser, page_file, viewport=viewport, reduced_motion="reduce")
    before = page.evaluate("app.state")
    start = page.locator("#about button.primary")
    start.click()
    told = {}
    for _ in range(page.evaluate("STOPS.length")):
        settle(page)
        title = page.locator(".tour h3").text_content()
        until(page, "!document.querySelector('.tour .primary').disabled")
        inside, covered, seen = page.evaluate(COVERED)
        assert inside and seen - covered >= min(50, seen), title
        assert covered == 0 or size != (1280, 800), title
        state = page.evaluate("[app.state.interventions, app.state.settings.temperature]")
        told[title] = page.locator(".tour p").text_content()
        assert len(told[title]) > 80 and page.locator(".toured").count() == 1, title
        if title == "Taken apart":
            assert state[0] == [{"layer": 0, "part": "block", "head": None, "scale": 0}]
            rise = page.evaluate("[app.beside, app.trace].map((x) => num(app.scores(x).mean))")
            assert f"{rise[0]} nats per token to {rise[1]} nats" in told[title]
        if title == "Scores become a choice":
            assert state[1] == 0.5
        if title == "Each position thinks alone":
            assert "✓" in page.locator('[data-step="4.9"] .sum').text_content()
        next_stop(page)
    until(page, "document.querySelector('.tour').hidden")
    settle(page)
    assert len(told) >= 10
    assert page.evaluate("app.state") == before
    assert page.evaluate("document.activeElement.textContent") == start.text_content()
    assert page.problems == []
    page.context.close()


def test_the_tour_ends_with_a_task_that_is_done_when_the_model_says_the_word(page) -> None:
    page.locator("#about button").first.click()
    for _ in range(page.evaluate("STOPS.length - 1")):
        next_stop(page)
    until(page, "document.querySelector('.tour h3').textContent === 'Now you'")
    settle(page)
    assert "A task: write so that" in page.locator(".tour p").text_content()
    page.evaluate("app.wish = likeliest(app.trace, app.trace.shape.L, 0)[0].id")
    page.evaluate("app.setIds(app.ids.slice(0, 1))")
    settle(page)
    assert "You did it" in page.locator(".tour p").text_content()
    page.keyboard.press("Escape")


def test_nothing_is_wider_than_the_screen_in_light_or_dark(page) -> None:
    page.evaluate("app.change({beside: 0})")
    type_text(page, ODD + " and a word without any end " + "k" * 60)
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        for width, height in ((390, 844), (820, 1180), (1280, 800), (1440, 900)):
            page.set_viewport_size({"width": width, "height": height})
            settle(page)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, width
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.findall(r"\d+", paper)[0]) < 60) == (scheme == "dark")


@pytest.mark.parametrize("layers", (2, 20))
def test_the_next_token_of_the_glance_is_in_sight_with_any_number_of_layers(
    browser, tmp_path: Path, layers: int
) -> None:
    save_step(tmp_path / "step_000009", step_model(9, n_layers=layers))
    page = open_page(browser, make_page(tmp_path, f"--prompt={TEXT}"))
    for width in (1280, 1920, 390):
        page.set_viewport_size({"width": width, "height": 800})
        settle(page)
        box = page.locator(".flownext").bounding_box()
        assert box["x"] > 0 and box["x"] + box["width"] <= width, (layers, width)
        assert page.locator(".flow .stream").count() == layers + 1
    assert page.problems == []
    page.context.close()


def test_the_address_is_the_state_and_a_reload_keeps_it(page, page_file: Path) -> None:
    part = {"layer": 1, "part": "head", "head": 0, "scale": 0}
    page.evaluate("app.setIds([104, 263, 263, 104])")  # which no text becomes
    settle(page)
    settings = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0}
    patch = {"layer": 1, "head": 1, "position": 2, "key": 1, "settings": settings}
    page.evaluate("patch => app.change(patch)", patch | {"interventions": [part]})
    settle(page)
    until(page, "location.hash.includes('interventions')")
    state, logits = page.evaluate("app.state"), logits_of(page)
    page.reload()
    until(page, "window.app && app.settled()")
    assert page.evaluate("app.state") == state
    assert torch.equal(logits_of(page), logits)
    second = open_page(page.context.browser, page_file)
    second.goto(page.url)
    until(second, "app.ids.length === 4 && app.settled()")
    kept = set(state) - {"text"}
    assert {key: second.evaluate("app.state")[key] for key in kept} == {k: state[k] for k in kept}
    second.evaluate("document.querySelector('#nav a[href=\"#lens\"]').click()")
    until(second, "location.hash.startsWith('#s=') && location.hash.includes('lens')")
    second.reload()
    until(second, "window.app && app.settled()")
    until(second, "Math.abs(document.querySelector('#lens').getBoundingClientRect().top) < 300")
    assert second.problems == []
    second.context.close()


HOSTILE = [
    "not json",
    "[]",
    "null",
    "{",
    '{"__proto__": {"x": 1}}',
    '{"constructor": 1}',
    '{"trace": 1}',
    '{"text": 5}',
    '{"text": "' + "x" * 100_001 + '"}',
    '{"ids": [280]}',
    '{"ids": []}',
    '{"ids": ["1"]}',
    '{"model": 4}',
    '{"model": -1}',
    '{"beside": 5}',
    '{"layer": 2}',
    '{"head": 1.5}',
    '{"position": -1}',
    '{"position": 1e9}',
    '{"settings": {"temperature": 1}}',
    '{"settings": {"temperature": 1, "top_k": 0, "top_p": 0, "min_p": 0}}',
    '{"settings": null}',
    '{"interventions": [{"layer": 9, "part": "ffwd", "head": null, "scale": 0}]}',
    '{"interventions": [{"layer": 0, "part": "toString", "head": null, "scale": 0}]}',
    '{"interventions": [{"layer": 0, "part": "head", "head": 0, "scale": 1e99}]}',
    '{"view": "nowhere"}',
    '{"view": "x,*"}',
]


def test_a_hostile_address_is_refused_as_a_whole(page) -> None:
    refused = page.evaluate(
        "all => all.map((s) => readAddress(app.data, `#s=${encodeURIComponent(s)}`) === null)",
        HOSTILE,
    )
    assert [text for text, one in zip(HOSTILE, refused, strict=True) if not one] == []
    assert page.evaluate("readAddress(app.data, '#s=%E0%A4%A')") is None
    address = page.url.split("#")[0] + "#s=%7B%22layer%22:99%7D"
    for before in ("the page as it is open", "about:blank"):
        if before == "about:blank":
            page.goto(before)
        page.goto(address)
        until(page, "window.app && app.settled()")
        until(page, "document.querySelector('#status').textContent.includes('names no state')")
        assert page.locator("#prompt").input_value() == TEXT


PICTURE = """async () => {
  const select = document.querySelector('#weights select');
  select.selectedIndex = 2;
  const { serializeToString } = XMLSerializer.prototype;
  let drawn = '';
  XMLSerializer.prototype.serializeToString = function (node) {
    return (drawn = serializeToString.call(this, node));
  };
  await pictureOf(select.closest('section'), '');
  return [select.value, drawn];
}"""


def test_a_section_is_saved_as_a_picture_with_the_models_name(page, tmp_path: Path) -> None:
    from PIL import Image

    chosen, drawn = page.evaluate(PICTURE)
    assert f'<option value="{chosen}" selected="">' in drawn
    assert re.match(r"run\d, step 9: llama", page.evaluate("captionOf(app)"))
    without_step = "captionOf({ ...app, modelName: () => runOf(app.data.title) })"
    assert re.match(r"run\d: llama", page.evaluate(without_step))

    for name in ("opening", "attention"):
        section = page.locator(f"#{name}")
        section.scroll_into_view_if_needed()
        settle(page)
        with page.expect_download() as download:
            section.get_by_role("button", name="Save picture").click()
        assert download.value.suggested_filename.endswith(f"-{name}.png")
        download.value.save_as(tmp_path / f"{name}.png")
        picture = Image.open(tmp_path / f"{name}.png").convert("RGB")
        box = section.bounding_box()
        assert abs(picture.width - 2 * (box["width"] + 48)) <= 4
        assert len(set(picture.resize((200, 200)).getdata())) > 50  # there is something on it
        caption = picture.crop((0, picture.height - 80, 600, picture.height))
        assert len(set(caption.getdata())) > 5


def test_what_is_missing_is_said(browser, tmp_path: Path, capsys) -> None:
    save_step(tmp_path / "step_000009", step_model(9))
    page = open_page(browser, make_page(tmp_path))
    told = capsys.readouterr().err
    assert f"note: no reports in {tmp_path / 'metrics.jsonl'}: no loss curve is shown" in told
    assert "before this checkpoint: training is not replayed" in told
    text = page.locator("main").inner_text()
    assert "no snapshots of the run" in text and "No metrics.jsonl" in text
    assert "No second model" in text
    assert page.problems == []
    page.context.close()


def test_a_model_too_large_for_the_page_shows_traces_and_says_so(browser, tmp_path: Path) -> None:
    model = random_model(vocab_size=280, max_seq_len=96, n_embd=512, hidden_dim=4096)
    save_step(tmp_path / "step_000009", model)
    second = "king the king"
    options = (f"--prompt={TEXT}", f"--prompt={second}", "--max_mb=3")
    page = open_page(browser, make_page(tmp_path, *options))
    assert page.evaluate("app.data.models[0].format") == "trace"
    assert "cannot be edited" in page.locator("#status").text_content()
    assert not page.locator("#prompt").is_editable()
    page.locator(".example", has_text=second).click()
    settle(page)
    assert page.evaluate("app.ids") == ids_of(tmp_path, second)
    names, percents = chips_of(page)
    shown = expected_chips(page, expected(model, ids_of(tmp_path, second))[-1])
    assert (names, percents) == shown and page.locator(".chip").first.is_disabled()
    assert page.locator("#opening button", has_text="Let it write").is_hidden()
    assert "has read this" in page.locator("#whose").text_content()
    assert "Click one" not in page.locator("#next .legend").text_content()
    assert page.locator("#next button.barrow").count() == 0
    assert page.locator(".station").count() == 3  # what is traced can be followed
    assert "are not in the page" in page.locator("#weights").text_content()
    page.locator("#text").scroll_into_view_if_needed()
    until(page, "document.querySelector('.neighbours').textContent.includes('cannot be found')")
    page.locator('[data-step="4.6"] canvas').click(position={"x": 9, "y": 9})
    page.wait_for_timeout(200)
    assert "are not in the page" in page.locator('[data-step="4.6"] .sum').text_content()
    told = page.locator("footer").inner_text()
    assert "computed in this file" not in told and "--max_mb=" in told
    page.locator("#about button").first.click()
    for _ in range(page.evaluate("STOPS.length")):
        until(page, "!document.querySelector('.tour .primary').disabled")
        told += page.locator(".tour p").text_content()
        next_stop(page)
    until(page, "document.querySelector('.tour').hidden")
    for untrue in (
        "Type",
        "Press Write",
        "are in this page",
        "is played",
        "switched off",
        "opened",
    ):
        assert untrue not in told, untrue
    assert page.problems == []
    page.context.close()
