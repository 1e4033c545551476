"""Make one HTML file in which a trained model runs, shows itself and can be played with.

Reads a checkpoint, the snapshots and the metrics.jsonl of its run; writes out/RUN/page.html, which
needs no server and no network: weights travel in it, and the scripts of page/ compute with them.

    python visualize.py                                      the newest run's newest checkpoint
    python visualize.py --ckpt=out/tiny --compare=out/mla --prompt="ROMEO:" --open

A model too large for --max_mb is written with less precision, or as traces: what
plainllama/traces.py computes for the prompts, as the page computes it for any text.
"""

import json
import math
import os
import re
import time
import webbrowser
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model import flops_per_token, n_params, shapes_of
from plainllama.checkpoint import find_checkpoint, step_of
from plainllama.families import family_of, read_config, resolved
from plainllama.huggingface import end_of_text_ids, load_model
from plainllama.metrics import read_metrics
from plainllama.page import ROUNDING, describe_tokenizer, make_trace, pack, rounded, rounded_trace
from plainllama.settings import UserError, load, run_main
from plainllama.tokenizer import Tokenizer, encode, load_tokenizer

PAGE = Path(__file__).parent / "page"
ENGINE = ("numbers.js", "tokenizer.js", "sampling.js", "model.js")  # each needs those before it
PROMPTS = (  # the first repeats itself, so that heads which copy have something to do
    "KING RICHARD:\nWhat, is the king dead? The king is dead, my lord.\n\n"
    "DUKE OF YORK:\nO my lord, the king",
    "KING RICHARD:",
    "The quick brown fox jumps over the lazy dog",
)
Prompt = tuple[str, list[int]]  # a text and its ids
COMPRESSED = 0.8  # the least that packing leaves of weights
SNAPSHOT_MB = 8  # snapshots that would take more of the page than this are written as int8


@dataclass(frozen=True)
class VisualizeConfig:
    """Make a page of a trained model, in which it runs."""

    ckpt: str = ""  # a Hugging Face directory, or a run (its newest step); default: the newest run
    compare: str = ""  # a second model with the same tokenizer, shown beside the first
    prompt: tuple[str, ...] = ()  # a text that the page begins with; may be given several times
    out: str = ""  # the file to write; default: page.html in the run's directory
    max_mb: int = 32  # largest page in MB; what does not fit is written with less precision
    open: bool = False  # show the page in the browser

    def __post_init__(self) -> None:
        if self.max_mb < 1:
            raise UserError(f"max_mb={self.max_mb} must be at least 1")
        if "" in self.prompt:
            raise UserError("prompt='' is empty: give a text, or leave --prompt out")


class Source(NamedTuple):
    """A model that goes into the page."""

    directory: Path
    group: str  # run or compare
    step: int  # of training; -1 where the directory's name does not tell it
    snapshot: bool


class Plan(NamedTuple):
    """In which form models are written, and for how many prompts where it is that of traces."""

    models: str  # of the checkpoint and the compared model: fp16, int8 or trace
    snapshots: str  # of snapshots
    every: int  # which of the snapshots: every n-th, from the first on; 0: none
    prompts: int


def find_sources(config: VisualizeConfig, notes: list[str]) -> list[Source]:
    """Return the models: snapshots first to last, then the checkpoint, then the compared one."""
    main = find_checkpoint(config.ckpt)
    step, snapshots = step_of(main), run_of(main) / "snapshots"
    found = {step_of(path): path for path in snapshots.glob("step_*")}
    steps = sorted(s for s in found if 0 <= s < step)
    if not steps:
        notes.append(f"no {snapshots}/step_* before this checkpoint: training is not replayed")
    sources = [Source(found[s], "run", s, True) for s in steps]
    sources.append(Source(main, "run", step, False))
    if config.compare:
        other = find_checkpoint(config.compare)
        sources.append(Source(other, "compare", step_of(other), False))
    return sources


def run_of(checkpoint: Path) -> Path:
    """Return the directory of a checkpoint's run; for any other model, its own."""
    if step_of(checkpoint) < 0:
        return checkpoint
    return checkpoint.parents[1] if checkpoint.parent.name == "snapshots" else checkpoint.parent


def metrics_of(run: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; a number that is not finite, which JSON lacks: null."""
    records = read_metrics(run)
    if not records:
        notes.append(f"no reports in {run / 'metrics.jsonl'}: no loss curve is shown")
    finite = lambda value: value if not isinstance(value, float) or math.isfinite(value) else None  # noqa: E731
    return [{key: finite(value) for key, value in record.items()} for record in records]


def describe_model(source: Source) -> dict[str, Any]:
    """Return what the page says of a model, without its numbers."""
    config = read_config(source.directory)
    model = shapes_of(config)
    return {
        "name": source.directory.as_posix(),
        "group": source.group,
        "step": source.step if source.step >= 0 else None,
        "snapshot": source.snapshot,
        "config": asdict(resolved(config)) | {"rope_dim": config.rope_width},
        "family": family_of(config),
        "n_params": n_params(model),
        "flops_per_token": flops_per_token(model),
    }


def choose_prompts(
    config: VisualizeConfig, tokenizer: Tokenizer, end_of_text: list[int], max_seq_len: int
) -> list[Prompt]:
    """Return the texts the page begins with and their ids; UserError for one that is too long."""
    texts = config.prompt or PROMPTS
    prompts = [(text, [*tokenizer.begin_of_text, *encode(tokenizer, text)]) for text in texts]
    too_long = [(text, ids) for text, ids in prompts if len(ids) > max_seq_len]
    if too_long and config.prompt:
        text, ids = too_long[0]
        raise UserError(
            f"prompt={text[:20]!r}... is {len(ids):,} tokens, more than the context of "
            f"{max_seq_len:,}: shorten it"
        )
    fitting = [prompt for prompt in prompts if prompt not in too_long]
    return fitting or [("", end_of_text[:1])]


def make_page(config: VisualizeConfig) -> tuple[dict[str, Any], str]:
    """Return the page's data and the page that holds it, in the most exact form that fits."""
    notes: list[str] = []
    sources = find_sources(config, notes)
    main = next(source for source in sources if not source.snapshot)
    tokenizer = load_tokenizer(main.directory / "tokenizer.json")
    end_of_text = end_of_text_ids(main.directory, tokenizer)
    other = sources[-1].directory
    if load_tokenizer(other / "tokenizer.json").vocabulary != tokenizer.vocabulary:
        raise UserError(
            f"{other} has another tokenizer than {main.directory}, so that their tokens cannot be "
            "compared: choose two models of equally prepared data"
        )
    models = [describe_model(source) for source in sources]
    last = max(tokenizer.max_token_value, *end_of_text)
    vocab_size = min(model["config"]["vocab_size"] for model in models)
    if last >= vocab_size:
        raise UserError(f"{main.directory}: token {last} does not fit the {vocab_size} tokens")
    max_seq_len = min(model["config"]["max_seq_len"] for model in models)
    prompts = choose_prompts(config, tokenizer, end_of_text, max_seq_len)
    data = {
        "title": main.directory.as_posix(),
        "generated_from": main.directory.as_posix(),
        "tokenizer": describe_tokenizer(tokenizer, end_of_text),
        "metrics": metrics_of(run_of(main.directory), notes),
        "notes": notes,
    }
    limit = config.max_mb * 1e6
    for plan in make_plans(len(prompts)):
        if expected_bytes(models, prompts, plan) <= limit:
            filled, blobs = fill(data, models, prompts, plan)
            page = join_page(filled, blobs)
            if len(page.encode()) <= limit:
                return filled, page
    smallest = expected_bytes(models, prompts, plan) / 1e6
    raise UserError(
        f"max_mb={config.max_mb} is too small for any page of {main.directory}: give a shorter "
        f"--prompt, or --max_mb={math.ceil(smallest * 1.5)}"
    )


def make_plans(n_prompts: int) -> Iterator[Plan]:
    """Yield ways to write the models, those that show more first."""
    for models, snapshots in (("fp16", "fp16"), ("fp16", "int8"), ("int8", "int8")):
        yield Plan(models, snapshots, 1, n_prompts)
    for format in ("int8", "trace"):
        for every in (1, 2, 3, 4, 0):
            yield Plan(format, format, every, n_prompts)
    for count in range(n_prompts - 1, 0, -1):
        yield Plan("trace", "trace", 0, count)


def chosen(models: list[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """Return the models without the snapshots that the plan leaves out."""
    snapshots = [model for model in models if model["snapshot"]]
    kept = snapshots[:: plan.every] if plan.every else []
    return [model for model in models if not model["snapshot"] or model in kept]


def expected_bytes(models: list[dict], prompts: list[Prompt], plan: Plan) -> float:
    """Return about how large a page is at least; infinity if its snapshots take too much of it."""
    lengths = [len(ids) for _, ids in prompts[: plan.prompts]]
    sizes = {False: 0.0, True: 0.0}  # of snapshots: True
    for model in chosen(models, plan):
        c, format = model["config"], plan.snapshots if model["snapshot"] else plan.models
        heads = c["n_heads"] * c["head_dim"]
        block = 6 * c["n_embd"] + 6 * heads + 3 * c["hidden_dim"]  # numbers a position
        numbers = [
            T * (c["n_layers"] * (block + T * c["n_heads"]) + c["vocab_size"]) for T in lengths
        ]
        size = {"fp16": 2 * model["n_params"], "int8": model["n_params"]}
        sizes[model["snapshot"]] += size.get(format, 2 * sum(numbers)) * 4 / 3 * COMPRESSED
    too_large = plan.snapshots == "fp16" and sizes[True] > SNAPSHOT_MB * 1e6
    return math.inf if too_large else sum(sizes.values())


def fill(
    data: dict[str, Any],
    models: list[dict[str, Any]],
    prompts: list[Prompt],
    plan: Plan,
) -> tuple[dict[str, Any], list[str]]:
    """Return the page's data with its models in the formats of the plan, and their arrays."""
    kept, notes = chosen(models, plan), list(data["notes"])
    if plan.models == "trace":
        notes.append("too large to run in a page of --max_mb: shown are given texts alone")
    room = [("models and snapshots", models, kept), ("prompts", prompts, prompts[: plan.prompts])]
    for what, there, shown in room:
        if len(shown) < len(there):
            notes.append(f"--max_mb leaves room for {len(shown)} of {len(there)} {what}")
    prompts = prompts[: plan.prompts]
    data = data | {"prompts": [text for text, _ in prompts], "notes": notes}
    data |= {"models": [], "traces": {}}
    blobs: list[str] = []

    def add(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        table, blob = pack(arrays)
        blobs.append(blob)
        return {"tensors": table, "blob": len(blobs) - 1}

    for described in kept:
        format = plan.snapshots if described["snapshot"] else plan.models
        model = load_model(Path(described["name"]))
        written = {"format": format, "rounding": ROUNDING[format], "tensors": None, "blob": None}
        if format == "trace":
            data["traces"][len(data["models"])] = [
                {"ids": ids} | add(rounded_trace(make_trace(model, ids))) for _, ids in prompts
            ]
        else:
            written |= add(rounded(model, format))
        data["models"].append(described | written)
    return data, blobs


def in_script(data: Any) -> str:
    """Return JSON that is safe inside <script>: ASCII without <, > and &."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def join_page(data: dict[str, Any], blobs: list[str]) -> str:
    """Return the one file: page/index.html with style, scripts and data in their places.

    The engine runs in the page and, before worker.js, in its worker; worker.js is inert text here.
    """
    views = sorted(PAGE.glob("views/*.js"), key=lambda path: (path.name == "main.js", path.name))
    scripts = ["<script type='text/plain' id='worker.js'>", read(PAGE / "worker.js"), "</script>"]
    scripts += ["<script id='engine.js'>", *(read(PAGE / name) for name in ENGINE), "</script>"]
    for path in views:
        scripts += [f"<script id='{path.name}'>", read(path), "</script>"]
    holders = ["<script type='application/json' id='page-data'>", in_script(data), "</script>"]
    for number, blob in enumerate(blobs):
        holders += [f"<script type='application/octet-stream' id='blob-{number}'>", blob]
        holders += ["</script>"]
    page = read(PAGE / "index.html")
    parts = {
        "<!--STYLE-->": read(PAGE / "style.css"),
        "<!--SCRIPTS-->": "\n".join(scripts),
        "<!--DATA-->": "\n".join(holders),
    }
    return re.sub("|".join(parts), lambda match: parts[match[0]], page)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def write_aside(text: str, path: Path) -> None:
    """Write a file that is there in full or not at all, even if the disk is full."""
    aside = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def main() -> None:
    config = load(VisualizeConfig)
    start = time.perf_counter()
    data, page = make_page(config)
    out = Path(config.out or run_of(Path(data["generated_from"])) / "page.html")
    write_aside(page, out)
    for line in data["notes"]:
        print(f"note: {line}")
    formats = Counter(model["format"] for model in data["models"])
    models = " and ".join(f"{count} in {format}" for format, count in formats.items())
    size, seconds = len(page.encode()) / 1e6, time.perf_counter() - start
    print(f"wrote {out}: {size:.1f} MB, models: {models}, in {seconds:.1f} s")
    if config.open:
        webbrowser.open(out.resolve().as_uri())


if __name__ == "__main__":
    run_main(main)
