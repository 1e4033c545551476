"""Make one HTML file in which a trained model runs, shows itself and can be played with.

Reads a checkpoint, the snapshots and the metrics.jsonl of its run; writes out/RUN/page.html, which
needs no server and no network: weights travel in it, and the scripts of page/ compute with them.

    python visualize.py                                      the newest run's newest checkpoint
    python visualize.py --ckpt=out/tiny --compare=out/mla --prompt="ROMEO:" --open
    python visualize.py --ckpt=out/chat --view=chat          chat.html, small enough to mail

A model too large for --max_mb is written with less precision, or as traces: what
plainllama/page.py computes for the prompts, as the page computes it for any text.
"""

import plainllama.startup  # noqa: F401 isort: skip (first: see there)

import json
import math
import re
import time
import webbrowser
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from plainllama.architecture import require_family
from plainllama.chat import find_template
from plainllama.checkpoint import find_checkpoint, step_of
from plainllama.families import read_config, resolved
from plainllama.huggingface import load_model, tokenizer_of
from plainllama.machine import by_layers, flops_per_token, n_params, shapes_of
from plainllama.metrics import loss_of, read_metrics
from plainllama.page import (
    ROUNDING,
    make_trace,
    pack,
    pack_bytes,
    rounded_trace,
    rounded_weights,
    unpadded_weights,
)
from plainllama.settings import load, write_aside
from plainllama.terminal import UserError, note, run_main, say
from plainllama.tokenizer import Tokenizer

PAGE = Path(__file__).parent / "page"
LIBRARY = "vendor/tokenizers.min.cjs"  # a CommonJS module; in the page, what a function returns
ENGINE = ("unpack.js", LIBRARY, "tokenizer.js", "numbers.js", "sampling.js")  # in this order
ENGINE += ("conversation.js", "block.js", "pass.js", "trace.js", "model.js")
STYLES = ("style.css", "sections.css", "views.css", "chat.css", "widths.css")
STRICT = '"use strict";\n'  # counts at the beginning of a script alone
QUESTIONS = (  # of a model that learned conversations
    "What do you see? Tell me, what do you see?",
    "Hello! How are you today?",
    "Can you help me?",
)
PROMPTS = (  # of any other; the first repeats itself, so that heads which copy have something to do
    "KING RICHARD:\nWhat, is the king dead? The king is dead, my lord.\n\n"
    "DUKE OF YORK:\nO my lord, the king",
    "KING RICHARD:",
    "The quick brown fox jumps over the lazy dog",
)
Prompt = tuple[str, list[int]]  # a text and its ids
Plan = list[tuple[dict[str, Any], str]]  # the models to write, each with its format
WIDTH = {"fp16": 2, "int8": 1, "trace": 0}  # bytes of a weight, by format
SNAPSHOT_MB = 8  # snapshots that would take more of the page than this are written as int8


@dataclass(frozen=True)
class VisualizeConfig:
    """Make a page of a trained model, in which it runs."""

    ckpt: str = ""  # a Hugging Face directory, or a run (its newest step); default: the newest run
    compare: str = ""  # a second model with the same tokenizer, shown beside the first
    prompt: tuple[str, ...] = ()  # a text that the page begins with; may be given several times
    view: Literal["all", "chat"] = "all"  # chat: to be mailed; no snapshots, in int8, chat first
    out: str = ""  # the file to write; default: page.html, or chat.html, in the run's directory
    max_mb: int = 32  # largest page in MB; what does not fit is written with less precision
    open: bool = False  # show the page in the browser

    def __post_init__(self) -> None:
        if "" in self.prompt:
            raise UserError("prompt='' is empty: give a text, or leave --prompt out")


def main() -> None:
    run(load(VisualizeConfig))


def run(config: VisualizeConfig) -> None:
    """Write the page, and say what it holds."""
    start = time.perf_counter()
    data, page = make_page(config)
    name = "chat.html" if config.view == "chat" else "page.html"
    out = Path(config.out or run_of(Path(data["generated_from"])) / name)
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(out) as aside:
        aside.write_text(page, encoding="utf-8")
    for line in data["notes"]:
        note(f"note: {line}")
    formats = Counter(model["format"] for model in data["models"])
    models = " and ".join(f"{count} in {format}" for format, count in formats.items())
    size, seconds = len(page.encode()) / 1e6, time.perf_counter() - start
    say(f"wrote {out}: {size:.1f} MB, models: {models}, in {seconds:.1f} s")
    if config.open:
        webbrowser.open(out.resolve().as_uri())


def make_page(config: VisualizeConfig) -> tuple[dict[str, Any], str]:
    """Return the page's data and the page that holds it, in the most exact form that fits."""
    notes: list[str] = []
    models = find_models(config, notes)
    directory = next(Path(model["name"]) for model in models if not model["snapshot"])
    tokenizer = tokenizer_of(directory)
    check_tokenizer(tokenizer, Path(models[-1]["name"]))
    begin_of_text, end_of_text = list(tokenizer.begin_of_text), tokenizer.ends
    records = read_metrics(run_of(directory))
    for record in records:
        if "answer_loss" in record:  # the run learned conversations
            record["val_loss"] = loss_of(record)
    if not records:
        notes.append(f"no reports in {run_of(directory)}/metrics.jsonl: no loss curve is shown")
    data = {
        "title": directory.as_posix(),
        "generated_from": directory.as_posix(),
        "tokenizer": {"begin_of_text": begin_of_text, "end_of_text": end_of_text, "blob": 0},
        "metrics": json.loads(json.dumps(records), parse_constant=lambda nan: None),
        "chat": chat_of(directory, tokenizer, config.view, notes),
    }
    texts = QUESTIONS if data["chat"] and data["chat"]["frames"] else PROMPTS
    prompts = choose_prompts(config, texts, tokenizer, models) or [("", end_of_text[:1])]
    limit = config.max_mb * 1e6
    for plan in make_plans(models, config.view):
        # Text of 85 signs takes 5 / 4 of the bytes, and gzip leaves of weights 0.8 at least.
        if sum(WIDTH[format] * model["n_params"] for model, format in plan) <= limit:
            blobs = [pack_bytes(tokenizer.content)]
            filled = data | {"notes": notes.copy()}
            filled |= fill(plan, prompts, blobs, filled["notes"])
            filled["notes"] += notes_on(plan, len(models))
            page = join_page(filled, blobs)
            if len(page.encode()) <= limit:
                if plan[-1][1] == "trace":
                    rest = len(page.encode()) - sum(map(len, blobs[1:]))
                    how = how_to_run(config, plan, rest)
                    if config.view == "chat":
                        raise UserError(how)
                    filled["notes"].append(how)
                    filled["chat"] = None  # which needs weights
                    page = join_page(filled, blobs)
                return filled, page
    raise UserError(
        f"max_mb={config.max_mb} is too small for any page of {directory}: give a shorter "
        f"--prompt, or --max_mb={math.ceil(len(page.encode()) / 1e6)}"
    )


def find_models(config: VisualizeConfig, notes: list[str]) -> list[dict[str, Any]]:
    """Return the models: snapshots first to last, then the checkpoint, then the compared one."""
    checkpoint = find_checkpoint(config.ckpt)
    last, snapshots = step_of(checkpoint), run_of(checkpoint) / "snapshots"
    found = {step_of(path): path for path in snapshots.glob("step_*")}
    steps = sorted(step for step in found if 0 <= step < last)
    if not steps:
        notes.append(f"no {snapshots}/step_* before this checkpoint: training is not replayed")
    if config.view == "chat":
        steps = []
    models, last_model = [], describe_model(checkpoint, "run")
    for path in (found[step] for step in steps):
        try:
            models.append(describe_model(path, "run", snapshot=True))
        except UserError as error:
            notes.append(f"{path} is left out: {error}")
            continue
        if differs := differing_shape(models[-1], last_model):
            raise UserError(f"{path} is no snapshot of {checkpoint}: {differs}. Move it elsewhere")
    models.append(last_model)
    if config.compare:
        models.append(describe_model(find_checkpoint(config.compare), "compare"))
    return models


def differing_shape(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Return in what two models differ that have not the same weights, by name and shape, or ''."""
    config, theirs = one["config"], other["config"]
    same = all(one[key] == other[key] for key in ("n_params", "flops_per_token", "family"))
    if same and all(config[key] == theirs[key] for key in ("n_heads", "n_kv_heads")):
        return ""
    return ", ".join(
        f"{key} {config[key]}, not {theirs[key]}" for key in config if config[key] != theirs[key]
    )


def describe_model(directory: Path, group: str, snapshot: bool = False) -> dict[str, Any]:
    """Return what the page says of a model of a group, run or compare, without its numbers."""
    config, step = read_config(directory), step_of(directory)
    family = require_family(directory, "the page computes families' models, and cannot show it")
    return {
        "name": directory.as_posix(),
        "group": group,
        "step": step if step >= 0 else None,
        "snapshot": snapshot,
        "config": asdict(resolved(config)) | {"rope_dim": config.rope_width},
        "family": family,
        "n_params": by_layers(config, n_params),  # as config.json claims, which is not checked yet
        "flops_per_token": by_layers(config, flops_per_token),
    }


def run_of(checkpoint: Path) -> Path:
    """Return the directory of a checkpoint's run; for any other model, its own."""
    if step_of(checkpoint) < 0:
        return checkpoint
    return checkpoint.parents[1] if checkpoint.parent.name == "snapshots" else checkpoint.parent


def check_tokenizer(tokenizer: Tokenizer, other: Path) -> None:
    """Refuse to compare with a model of other tokens."""
    if tokenizer_of(other).all_bytes != tokenizer.all_bytes:
        raise UserError(
            f"{other} has another tokenizer than the first model, so that their tokens cannot be "
            "compared: choose two models of equally prepared data"
        )


def chat_of(directory: Path, tokenizer: Tokenizer, view: str, notes: list[str]) -> dict | None:
    """Return what page/conversation.js needs to talk to a model; None: the page has no chat."""
    ends = tokenizer.ends
    try:
        if template := find_template(directory, tokenizer):
            pieces = template.pieces()
            if template.is_dated:
                notes.append(f"the chat tells the model that it is {template.date:%d %B %Y}")
            return pieces | {"ends": [template.end, *ends]}
    except UserError as error:
        if view == "chat":
            raise
        notes.append(f"no chat, for {error}")
    # A model without a template goes on with the reader's line.
    return {"frames": None, "as_text": [], "ends": ends} if view == "chat" else None


def choose_prompts(
    config: VisualizeConfig,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    models: list[dict[str, Any]],
) -> list[Prompt]:
    """Return the texts the page begins with and their ids; UserError for one that is too long.

    Without any that were asked for, those of `texts` that fit.
    """
    max_seq_len = min(model["config"]["max_seq_len"] for model in models)
    prompts = []
    for text in config.prompt or texts:
        ids = [*tokenizer.begin_of_text, *tokenizer.encode(text)]
        if len(ids) <= max_seq_len:
            prompts.append((text, ids))
        elif config.prompt:
            raise UserError(
                f"prompt={text[:20]!r}... is {len(ids):,} tokens, more than the context of "
                f"{max_seq_len:,}: shorten it"
            )
    return prompts


def make_plans(models: list[dict[str, Any]], view: str) -> Iterator[Plan]:
    """Yield ways to write the models, those that show more first."""
    snapshots = [model for model in models if model["snapshot"]]
    others = models[len(snapshots) :]
    of_snapshots = sum(model["n_params"] for model in snapshots)
    if view == "all" and WIDTH["fp16"] * of_snapshots <= SNAPSHOT_MB * 1e6:
        yield [(model, "fp16") for model in models]
    if view == "all":
        yield [(model, "int8" if model["snapshot"] else "fp16") for model in models]
    fewer = [snapshots[::every] for every in range(1, 5)] if snapshots else []
    for format in ("int8", "trace"):
        for kept in (*fewer, []):
            yield [(model, format) for model in kept + others]


def notes_on(plan: Plan, count: int) -> list[str]:
    """Return what a plan for `count` models and snapshots leaves out."""
    if len(plan) < count:
        return [f"--max_mb leaves room for {len(plan)} of {count} models and snapshots"]
    return []


def how_to_run(config: VisualizeConfig, plan: Plan, rest: int) -> str:
    """Return the note of a page of traces: with which --max_mb the models without snapshots run,
    where all of the page but weights is `rest` bytes."""
    weights = sum(
        weight.numel() + 4 * len(weight)  # of int8, and the scale of each row
        for model, _ in plan
        if not model["snapshot"]
        for weight in unpadded_weights(shapes_of(read_config(Path(model["name"])))).values()
    )
    shown = "shown are given texts alone; " if config.view == "all" else ""
    return (
        f"too large to run in a page of --max_mb={config.max_mb}: {shown}"
        f"--max_mb={math.ceil((rest + 5 / 4 * weights) / 1e6)} lets it run, in int8"
    )


def fill(plan: Plan, prompts: list[Prompt], blobs: list[str], notes: list[str]) -> dict[str, Any]:
    """Return the page's texts, models and traces; what they hold is added to the blobs.

    A snapshot whose weights cannot be read is left out, with a note.
    """

    def add(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        table, blob = pack(arrays)
        blobs.append(blob)
        return {"tensors": table, "blob": len(blobs) - 1}

    models, traces = [], {}
    for described, format in plan:
        try:
            model, place = load_model(Path(described["name"])), {}
        except UserError as error:
            if not described["snapshot"]:
                raise
            notes.append(f"{described['name']} is left out: {error}")
            continue
        if format == "trace":
            traces[len(models)] = [
                {"ids": ids} | add(rounded_trace(make_trace(model, ids))) for _, ids in prompts
            ]
        else:
            place = add(rounded_weights(model, format))
        models.append(described | {"format": format, "rounding": ROUNDING[format]} | place)
    return {"prompts": [text for text, _ in prompts], "models": models, "traces": traces}


def join_page(data: dict[str, Any], blobs: list[str]) -> str:
    """Return the one file: page/index.html with style, scripts and data in their places.

    The engine runs in the page and, before worker.js, in its worker; worker.js is inert text here.
    Each of its files stands in a block of its own, and gives `engine` what the others may see. Each
    file of page/views/ is a script, and what stands at its top is seen by the others.
    """
    engine = {name: in_block(read(PAGE / name)) for name in ENGINE}
    wrapped = f"(function (module) {{\n{read(PAGE / LIBRARY)}\nreturn module.exports;\n}})"
    engine[LIBRARY] = f"engine.tokenizers = {wrapped}({{}});"
    views = sorted(PAGE.glob("views/*.js"), key=lambda path: (path.name == "main.js", path.name))
    scripts = [script("worker.js", read(PAGE / "worker.js"), "text/plain")]
    scripts.append(script("engine.js", STRICT + "\n".join(engine.values())))
    scripts += [script(path.name, STRICT + read(path)) for path in views]
    holders = [script("page-data", in_script(data), "application/json")]
    for number, blob in enumerate(blobs):
        holders.append(script(f"blob-{number}", blob, "application/octet-stream"))
    parts = {
        "<!--STYLE-->": "\n".join(read(PAGE / name) for name in STYLES),
        "<!--SCRIPTS-->": "\n".join(scripts),
        "<!--DATA-->": "\n".join(holders),
    }
    return re.sub("|".join(parts), lambda match: parts[match[0]], read(PAGE / "index.html"))


def in_block(text: str) -> str:
    """Return a script whose functions and constants are its own."""
    return f"{{\n{text}\n}}"


def script(id: str, text: str, type: str = "text/javascript") -> str:
    """Return a <script> of the page."""
    return f"<script type='{type}' id='{id}'>\n{text}\n</script>"


def in_script(data: Any) -> str:
    """Return JSON that is safe inside <script>: ASCII without <, > and &."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def read(path: Path) -> str:
    """Return the text of a file."""
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
