"""Write text with a trained model: one prompt in, text out as it is made.

Reads a Hugging Face directory of the class LlamaForCausalLM with a byte-level tokenizer.json; each
out/RUN/step_NNNNNN that train.py writes is one. stdout is the text alone, prompt included; which
checkpoint it is, the seed, why the text ends and the speed go to stderr.

    python sample.py --prompt "To be, or not"
    python sample.py --ckpt=out/tiny --prompt "ROMEO:" --temperature=0 --stop=$'\n\n'
"""

import codecs
import math
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tiktoken
import torch
from torch import Tensor

from config import load, run
from model import LLaMaTransformer, read_json
from prepare import encode, load_tokenizer

GREEDY = 1e-5  # temperatures below choose the likeliest token, as dividing by them would overflow


@dataclass(frozen=True)
class SampleConfig:
    """Write text with a trained model: python sample.py --prompt "..." [--key=value ...]."""

    ckpt: str = ""
    """A Hugging Face directory, or a run (its newest step); default: the newest run in out/."""
    prompt: str = ""
    """The text to continue; empty: the start of a document."""
    max_new_tokens: int = 256
    """Tokens to write at most; -1: until end of text."""
    temperature: float = 0.8
    """Divides the logits: below 1 likelier tokens gain, above 1 unlikely ones; 0: greedy."""
    top_k: int = 0
    """Choose among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that together reach probability p."""
    min_p: float = 0.0
    """Choose among tokens at least min_p times as likely as the likeliest."""
    stop: tuple[str, ...] = ()
    """Text at which to stop, not printed; may be given several times."""
    num_samples: int = 1
    """Samples to write, in one batch."""
    seed: int = -1
    """Decides every random choice; -1: a new one each time, named on stderr."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, xpu, ...; auto takes the accelerator that is there."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of the weights; auto is bfloat16 where the hardware is fast at it."""

    def __post_init__(self) -> None:
        least = {"max_new_tokens": -1, "temperature": 0, "top_k": 0, "num_samples": 1, "seed": -1}
        for key, limit in least.items():
            if not getattr(self, key) >= limit:  # so written, it catches nan too
                raise ValueError(f"{key}={getattr(self, key)} must be at least {limit}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be between 0 and 1")
        if "" in self.stop:
            raise ValueError("stop='' would stop before the first token")


def find_checkpoint(ckpt: str) -> Path:
    """Return the Hugging Face directory that `ckpt` is, or the newest step in it or in its runs."""
    root = Path(ckpt or "out")
    if (root / "config.json").is_file():
        return root
    steps = [
        path.parent for depth in ("", "*/") for path in root.glob(f"{depth}step_*/config.json")
    ]
    if steps:
        return max(steps, key=lambda step: (step.stat().st_mtime_ns, step.name))
    if not ckpt:
        raise ValueError("no checkpoint under out/; train one: python train.py config/tiny.py")
    if not root.exists():
        raise ValueError(f"ckpt={ckpt}: no such directory")
    raise ValueError(
        f"ckpt={ckpt} is no checkpoint: neither a directory with a config.json "
        "nor one with step_NNNNNN in it (pickles, .pt or .bin, are never read)"
    )


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve `auto`; ValueError for a device that this machine cannot use."""
    accelerator = torch.accelerator.current_accelerator() if device == "auto" else None
    try:
        chosen = torch.device(accelerator or device.replace("auto", "cpu"))
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device} cannot be used: {reason}; try cpu") from None
    fast_bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if chosen.type == "cuda"
        else chosen.type == "cpu" and torch.cpu._is_amx_tile_supported()
    )
    auto = torch.bfloat16 if fast_bf16 else torch.float32
    return chosen, auto if dtype == "auto" else getattr(torch, dtype)


@dataclass(frozen=True)
class Checkpoint:
    """What is needed to write text."""

    directory: Path
    model: LLaMaTransformer
    tokenizer: tiktoken.Encoding
    end_of_text: tuple[int, ...]
    """The ids that end a text; the first also starts one."""

    @property
    def device(self) -> torch.device:
        return self.model.embeddings.weight.device


def load_checkpoint(directory: Path, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Read a Hugging Face directory; a ValueError, on one line, says what is wrong with it."""
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    model = LLaMaTransformer.from_pretrained(directory).to(device).eval()
    for parameter in model.parameters():  # and not the rotary tables, which need fp32
        parameter.data = parameter.data.to(dtype)
    return Checkpoint(directory, model, tokenizer, find_end_of_text(directory, tokenizer))


def find_end_of_text(directory: Path, tokenizer: tiktoken.Encoding) -> tuple[int, ...]:
    """Return the checkpoint's eos_token_id, which may be several, else the tokenizer's own."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return (tokenizer.eot_token,)


def encode_prompt(prompt: str, checkpoint: Checkpoint) -> list[int]:
    """Return the prompt's tokens; of an empty prompt, the end of text, which begins a document."""
    ids = encode(checkpoint.tokenizer, prompt) if prompt else list(checkpoint.end_of_text[:1])
    vocab_size = checkpoint.model.config.vocab_size
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the prompt holds token {max(ids)}, the model's vocabulary ends at {vocab_size - 1}: "
            f"tokenizer.json and config.json of {checkpoint.directory} do not belong together"
        )
    return ids


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Return logits (B, V) / temperature, with tokens that must not be chosen at -inf.

    The filters run in the order of transformers, each on what the one before has left: top-k, top-p
    (arXiv:1904.09751), min-p (arXiv:2407.01082). The likeliest token always stays.
    """
    logits = logits / temperature
    if 0 < top_k < logits.size(-1):
        weakest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -math.inf)
    if top_p < 1:
        descending, order = logits.sort(descending=True)
        probabilities = descending.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -math.inf)
    if min_p > 0:
        weakest = logits.amax(-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < weakest, -math.inf)
    return logits


def uniforms(seed: int, rows: int) -> Iterator[Tensor]:
    """Yield numbers in [0, 1), (B,); those of row i depend on (seed, i) alone, not on the batch."""
    generators = [np.random.default_rng((seed, row)) for row in range(rows)]
    while True:
        block = [generator.random(256, dtype=np.float32) for generator in generators]
        yield from torch.from_numpy(np.stack(block, axis=1))


def make_sampler(config: SampleConfig) -> Callable[[Tensor], Tensor]:
    """Return the function that chooses ids (B,) from logits (B, V)."""
    numbers = uniforms(config.seed, config.num_samples)

    def pick(logits: Tensor) -> Tensor:
        if config.temperature < GREEDY:
            return logits.argmax(-1)
        filters = (config.temperature, config.top_k, config.top_p, config.min_p)
        kept = filter_logits(logits.float(), *filters)
        cumulative = kept.softmax(-1).cumsum(-1)  # (B, V)
        # The first token at which the sum passes the number; never one of probability 0.
        threshold = next(numbers).to(logits.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold, right=True)[:, 0]

    return pick


class TextStream:
    """Turns the tokens of one sample into text that can be printed at once.

    Held back are the bytes of a character that is not complete yet, and whatever may become a stop
    string. `ended` says why the sample is over; it is empty as long as it is not.
    """

    def __init__(self, checkpoint: Checkpoint, prompt: str, config: SampleConfig) -> None:
        self.checkpoint, self.config = checkpoint, config
        self.characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ready = prompt
        self.held = ""
        self.n_tokens = 0
        self.ended = "max_new_tokens" if config.max_new_tokens == 0 else ""

    def add(self, token: int) -> None:
        """Take the next token; after the end of the sample it is ignored."""
        if self.ended:
            return
        self.n_tokens += 1
        if token in self.checkpoint.end_of_text:
            return self.end("end of text")
        with suppress(KeyError):  # a foreign model's other special tokens have no text
            piece = self.checkpoint.tokenizer.decode_single_token_bytes(token)
            self.held += self.characters.decode(piece)
        found = [
            (start + len(stop), start, stop)
            for stop in self.config.stop
            if (start := self.held.find(stop)) >= 0
        ]
        if found:  # the first to be complete, wherever the borders between tokens lie
            _, start, stop = min(found)
            self.held = self.held[:start]
            return self.end(f"stop string {stop!r}")
        if self.n_tokens == self.config.max_new_tokens:
            return self.end("max_new_tokens")
        begun = [s[:n] for s in self.config.stop for n in range(1, len(s))]
        kept = max((len(b) for b in begun if self.held.endswith(b)), default=0)
        cut = len(self.held) - kept
        self.ready, self.held = self.ready + self.held[:cut], self.held[cut:]

    def end(self, reason: str) -> None:
        """Release what is held back and note why the sample is over."""
        self.ready, self.held, self.ended = self.ready + self.held, "", reason

    def take(self) -> str:
        """Return the text that became ready since the last call."""
        text, self.ready = self.ready, ""
        return text


def write_samples(checkpoint: Checkpoint, config: SampleConfig) -> None:
    """Print num_samples continuations, the first one while it is made, and a report on stderr."""
    ids = encode_prompt(config.prompt, checkpoint)
    context = checkpoint.model.config.max_seq_len
    if len(ids) > context:
        note(f"the prompt has {len(ids)} tokens, the context {context}: only the last are read")
    streams = [TextStream(checkpoint, config.prompt, config) for _ in range(config.num_samples)]
    prompts = torch.tensor([ids] * len(streams), device=checkpoint.device)  # (B, T)
    pick = make_sampler(config)
    tokens = checkpoint.model.generate(prompts, sys.maxsize, pick)
    start = time.perf_counter()
    shown = 0  # the sample that is being printed; those after it wait
    while shown < len(streams):
        print(streams[shown].take(), end="", flush=True)
        if streams[shown].ended:
            shown += 1
            print("\n---" if shown < len(streams) else "")
        else:
            for stream, token in zip(streams, next(tokens).tolist(), strict=True):
                stream.add(token)
    seconds = time.perf_counter() - start
    n_tokens = sum(stream.n_tokens for stream in streams)
    speed = f"{n_tokens:,} tokens in {seconds:.2f} s, {n_tokens / seconds:,.0f} tokens/s"
    reasons = Counter(stream.ended for stream in streams).items()
    note(f"{speed}; stopped by " + ", ".join(f"{reason} ({n})" for reason, n in reasons))
    longest = len(ids) + max(stream.n_tokens for stream in streams)
    if len(ids) <= context < longest:
        note(f"the text outgrew the context of {context} tokens: its older half was forgotten")


def note(text: str) -> None:
    """Tell the user something that is no part of the text."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    config = load(SampleConfig)
    if config.seed < 0:
        config = replace(config, seed=secrets.randbelow(2**32))
    sys.stdout.reconfigure(encoding="utf-8")
    device, dtype = choose_device(config.device, config.dtype)
    checkpoint = load_checkpoint(find_checkpoint(config.ckpt), device, dtype)
    size = f"{checkpoint.model.n_params():,} parameters"
    note(f"{checkpoint.directory}: {size}, {str(dtype)[6:]} on {device}; seed {config.seed}")
    write_samples(checkpoint, config)


if __name__ == "__main__":
    run(main)
