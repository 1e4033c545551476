"""Write text with a trained model: a prompt in, text out while it is made.

Reads a Hugging Face directory of the class LlamaForCausalLM with a byte-level tokenizer.json, which
every out/RUN/step_NNNNNN of train.py is. stdout is the text alone, prompt included; the checkpoint,
the seed, the speed and why the text ends go to stderr.

    python sample.py                                             a session, on a terminal
    python sample.py --prompt "To be, or not" --num_samples=3
    python sample.py --ckpt=out/tiny --prompt "ROMEO:" --temperature=0 --stop=$'\n\n'
    python sample.py --prompt_file=prompts.txt --json > answers.jsonl
    python sample.py --prompt "The quick brown" --probs
"""

import codecs
import json
import math
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import load_model, read_json
from config import as_values, build, check_key, load, run
from model import LLaMaTransformer, find_device
from tokenizer import Tokenizer, encode, load_tokenizer

COMPILE_FROM = 4000  # tokens in a row after which compiling has won back its time, on a CPU
GREEDY = 1e-5  # temperatures below choose the likeliest token, for dividing by them overflows
SESSION_KEYS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SESSION_KEYS += ("stop", "num_samples", "seed")


@dataclass(frozen=True)
class SampleConfig:
    """Write text with a trained model: python sample.py --prompt "..." [--key=value ...]."""

    ckpt: str = ""
    """A Hugging Face directory, or a run (its newest step); default: the newest run in out/."""
    prompt: str = ""
    """The text to continue; empty: the start of a document; -: what stdin holds."""
    prompt_file: str = ""
    """Prompts to continue in one batch: one a line, or .jsonl with the key "prompt"."""
    special_tokens: bool = False
    """Read what the prompt writes like a special token, <|im_start|> for example, as that token."""
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
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text already holds become less likely."""
    stop: tuple[str, ...] = ()
    """Text at which to stop, not printed; may be given several times."""
    num_samples: int = 1
    """Samples to write of each prompt, in one batch."""
    seed: int = -1
    """Decides every random choice; -1: a new one each time, named on stderr."""
    json: bool = False
    """Print a JSON object for each sample instead of its text."""
    probs: bool = False
    """Print the likeliest next tokens at each position of the prompt, and its perplexity."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, xpu, ...; auto takes the accelerator that is there."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of the weights; auto is bfloat16 where the hardware is fast at it."""
    quantize: Literal["none", "int8"] = "none"
    """int8: weights of 8 bits, which is faster where memory is the limit, and less exact."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the reading of single tokens; auto: if so many are asked for that it pays."""

    def __post_init__(self) -> None:
        limits = {"max_new_tokens": (-1, math.inf), "temperature": (0, math.inf)}
        limits |= {"top_k": (0, math.inf), "min_p": (0, 1), "repetition_penalty": (0.01, 100)}
        limits |= {"num_samples": (1, math.inf), "seed": (-1, math.inf)}
        for key, (least, most) in limits.items():
            if not least <= getattr(self, key) <= most:
                upper = f" and at most {most}" if most < math.inf else ""
                raise ValueError(f"{key}={getattr(self, key)} must be at least {least}{upper}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if "" in self.stop:
            raise ValueError("stop='' would stop before the first token")
        if self.seed < 0:
            object.__setattr__(self, "seed", secrets.randbelow(2**32))


def find_checkpoint(ckpt: str) -> Path:
    """Return the Hugging Face directory that `ckpt` is, or the newest step in it or in its runs."""
    root = Path(ckpt or "out")
    if (root / "config.json").is_file():
        return root
    steps = [p.parent for pattern in ("", "*/") for p in root.glob(f"{pattern}step_*/config.json")]
    if steps:
        return max(steps, key=lambda step: (step.stat().st_mtime_ns, step.name))
    if not ckpt:
        raise ValueError("no checkpoint under out/; train one: python train.py config/tiny.py")
    raise ValueError(
        f"ckpt={ckpt} is neither a directory with a config.json nor one with such step_NNNNNN "
        "in it (pickles, .pt or .bin, are never read)"
    )


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit whole numbers times a scale for each row.

    A token then reads a quarter of the memory, which is what bounds the speed of one sample.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # a row of padding is all zeros
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.bfloat16())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            rows = x.flatten(0, -2).bfloat16()
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
            y = y.view(*x.shape[:-1], -1).type_as(x)
        else:
            y = F.linear(x, self.weight.type_as(x)) * self.scale.type_as(x)
        return y if self.bias is None else y + self.bias


def quantize_int8(model: LLaMaTransformer) -> None:
    """Put an Int8Linear in the place of every linear layer of which only products are needed."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "wkv":
                setattr(module, name, Int8Linear(child))


def compile_decoding(model: LLaMaTransformer) -> None:
    """Compile the reading of single tokens, on CUDA into CUDA graphs; go without if that fails."""
    mode = "reduce-overhead" if model.cos.device.type == "cuda" else "default"
    compiled = torch.compile(model.read, mode=mode, fullgraph=True, dynamic=False)

    def decode(*inputs: Any) -> Tensor:
        try:
            return compiled(*inputs)
        except Exception as error:  # of the first call, where there is no compiler
            reason = " ".join(str(error).split())[:160]
            note(f"warning: decoding without torch.compile, which failed: {reason}")
            model.decode = model.read
            return model.read(*inputs)

    model.decode = decode


class Checkpoint(NamedTuple):
    """What it takes to continue text; the first of the end-of-text ids also begins one."""

    model: LLaMaTransformer
    tokenizer: Tokenizer
    end_of_text: list[int]


def load_checkpoint(directory: Path, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Read a Hugging Face directory; a ValueError, on one line, says what is wrong with it."""
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    model = load_model(directory).to(device).eval()
    for parameter in model.parameters():  # and not the rotary tables, which need fp32
        parameter.data = parameter.data.to(dtype)
    end_of_text = [tokenizer.eot_token]
    for path in (directory / "config.json", directory / "generation_config.json"):
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        if ids not in (None, []):
            end_of_text = ids if isinstance(ids, list) else [ids]
    last, vocab_size = max(tokenizer.max_token_value, *end_of_text), model.config.vocab_size
    if last >= vocab_size:
        raise ValueError(f"{directory}: token {last} does not fit the model's {vocab_size} tokens")
    return Checkpoint(model, tokenizer, end_of_text)


def read_prompts(config: SampleConfig) -> list[str]:
    """Return the prompts; ValueError for a file or a stdin that holds something else."""
    if config.prompt != "-" and not config.prompt_file:
        return [config.prompt]
    jsonl = config.prompt_file.endswith(".jsonl")
    try:
        with open(config.prompt_file or sys.stdin.fileno(), encoding="utf-8") as file:
            text = file.read().removesuffix("\n")
        lines = text.split("\n") if config.prompt_file else [text]
        return [str(json.loads(line)["prompt"]) for line in lines] if jsonl else lines
    except (ValueError, KeyError, TypeError) as error:
        wanted = 'a JSON object with the key "prompt" on each line' if jsonl else "UTF-8 text"
        raise ValueError(f"{config.prompt_file or 'stdin'} is not {wanted}: {error}") from error


def encode_prompt(prompt: str, checkpoint: Checkpoint, config: SampleConfig) -> list[int]:
    """Return the prompt's tokens, after what the model expects before a text.

    An empty prompt becomes the end of text, which begins a document.
    """
    tokenizer = checkpoint.tokenizer
    ids = encode(tokenizer, prompt, config.special_tokens)
    return [*tokenizer.begin_of_text, *ids] or checkpoint.end_of_text[:1]


def bytes_of(token: int, tokenizer: Tokenizer) -> bytes:
    """Return what a token stands for; nothing for those that only the model knows."""
    try:
        return tokenizer.decode_single_token_bytes(token)
    except KeyError:
        return b""


def show_probabilities(checkpoint: Checkpoint, prompt: str, config: SampleConfig) -> None:
    """Print the three likeliest next tokens at each position, and how likely the prompt is."""
    model, tokenizer, _ = checkpoint
    ids = torch.tensor(encode_prompt(prompt, checkpoint, config), device=model.cos.device)
    ids = ids[-model.config.max_seq_len :]
    with torch.inference_mode():
        log_probabilities = model(ids[None])[0][0].float().log_softmax(-1)  # (T, V)
    for position, row in enumerate(log_probabilities):
        values, tokens = row.exp().topk(min(3, len(row)))
        texts = [bytes_of(token, tokenizer).decode(errors="replace") for token in tokens.tolist()]
        likeliest = zip(texts, values.tolist(), strict=True)
        shown = [f"{json.dumps(text, ensure_ascii=False)} {p:.2f}" for text, p in likeliest]
        print(f"pos {position}: {', '.join(shown)}")
    nats = -log_probabilities[:-1].gather(1, ids[1:, None]).sum().item()
    perplexity = math.exp(nats / max(1, len(ids) - 1))
    print(f"log-likelihood {-nats:.2f} over {len(ids) - 1} tokens, perplexity {perplexity:.2f}")


def filter_logits(logits: Tensor, config: SampleConfig, seen: Tensor | None = None) -> Tensor:
    """Return logits (B, V) with the tokens that must not be chosen at -inf.

    The filters run in the order of transformers, each on what the one before has left: repetition
    penalty on the tokens of the mask `seen`, (B, V) (arXiv:1909.05858), temperature, top-k, top-p
    (arXiv:1904.09751), min-p (arXiv:2407.01082). The likeliest token always stays.
    """
    if seen is not None:
        penalty = config.repetition_penalty
        lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, lowered, logits)
    if config.temperature >= GREEDY:
        logits = logits / config.temperature
    if 0 < config.top_k < logits.size(-1):
        weakest = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -math.inf)
    if config.top_p < 1:
        descending, order = logits.sort(descending=True)
        probabilities = descending.softmax(-1)
        surplus = probabilities.cumsum(-1) - probabilities >= config.top_p  # p is reached before
        logits = logits.masked_fill(surplus.scatter(1, order, surplus), -math.inf)
    if config.min_p > 0:
        weakest = logits.amax(-1, keepdim=True) + math.log(config.min_p)
        logits = logits.masked_fill(logits < weakest, -math.inf)
    return logits


def make_sampler(config: SampleConfig, prompts: list[list[int]]) -> Callable[[Tensor], Tensor]:
    """Return the function from logits (B, V) to ids (B,); each prompt has num_samples rows.

    Each of a prompt's samples has random numbers of its own, which depend on the seed and on which
    sample it is, so that neither more samples nor other prompts change what is chosen for it.
    """
    generators = [np.random.default_rng((config.seed, i)) for i in range(config.num_samples)]
    seen: list[Tensor] = []  # empty, or one mask (B, V) of the tokens in the text

    def pick(logits: Tensor) -> Tensor:
        if config.repetition_penalty != 1 and not seen:
            seen.append(torch.zeros_like(logits, dtype=torch.bool))
            for row in range(len(logits)):
                seen[0][row, prompts[row // config.num_samples]] = True
        logits = filter_logits(logits.float(), config, *seen)
        if config.temperature < GREEDY:
            tokens = logits.argmax(-1)
        else:
            cumulative = logits.softmax(-1).cumsum(-1)  # (B, V)
            drawn = np.array([[g.random(dtype=np.float32)] for g in generators], dtype=np.float32)
            drawn = torch.from_numpy(drawn).to(logits.device).repeat(len(prompts), 1)
            # The first token at which the sum passes the number; never one of probability 0.
            tokens = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)[:, 0]
        for mask in seen:
            mask.scatter_(1, tokens[:, None], True)
        return tokens

    return pick


class TextStream:
    """Turns the tokens of one sample into text that can be printed at once.

    Held back are the bytes of a character that is not complete yet, and characters that may become
    a stop string. `ended` says why the sample is over; it is empty as long as it is not.
    """

    def __init__(self, checkpoint: Checkpoint, config: SampleConfig, ready: str = "") -> None:
        self.checkpoint, self.limit = checkpoint, config.max_new_tokens
        self.stop = sorted(config.stop, key=len, reverse=True)
        self.characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ready, self.held = ready, ""
        self.n_tokens = 0
        self.ended = "max_new_tokens" if self.limit == 0 else ""

    def add(self, token: int) -> None:
        """Take the next token; after the end of the sample it is ignored."""
        if self.ended:
            return
        self.n_tokens += 1
        if token in self.checkpoint.end_of_text:
            return self.end("end of text")
        for character in self.characters.decode(bytes_of(token, self.checkpoint.tokenizer)):
            self.held += character
            for stop in self.stop:
                if self.held.endswith(stop):
                    self.held = self.held.removesuffix(stop)
                    return self.end(f"stop string {stop!r}")
            while self.held and not any(stop.startswith(self.held) for stop in self.stop):
                self.ready, self.held = self.ready + self.held[0], self.held[1:]
        if self.n_tokens == self.limit:
            self.end("max_new_tokens")

    def end(self, reason: str) -> None:
        """Release what is held back and note why the sample is over."""
        self.ready, self.held, self.ended = self.ready + self.held, "", reason

    def take(self) -> str:
        """Return the text that became ready since the last call."""
        text, self.ready = self.ready, ""
        return text


def write_samples(checkpoint: Checkpoint, texts: list[str], config: SampleConfig) -> None:
    """Print num_samples continuations of each text, all made in one batch, then a report.

    They are printed in order: the first while it is made, the next as soon as it is over.
    """
    prompts = [encode_prompt(text, checkpoint, config) for text in texts]
    pick = make_sampler(config, prompts)
    limit = config.max_new_tokens if config.max_new_tokens >= 0 else sys.maxsize
    tokens = checkpoint.model.generate(prompts, limit, pick, config.num_samples)
    texts = [text for text in texts for _ in range(config.num_samples)]
    streams = [TextStream(checkpoint, config, "" if config.json else text) for text in texts]
    start = time.perf_counter()
    shown = 0  # samples that are over and printed
    while shown < len(streams):
        stream = streams[shown]
        if not config.json:
            print(stream.take(), end="", flush=True)
        if not stream.ended:
            for each, token in zip(streams, next(tokens).tolist(), strict=True):
                each.add(token)
            continue
        shown += 1
        if config.json:
            result = {"prompt": texts[shown - 1], "text": stream.take(), "seed": config.seed}
            result |= {"n_tokens": stream.n_tokens, "ended": stream.ended}
            print(json.dumps(result, ensure_ascii=False), flush=True)
        else:
            print("\n---" if shown < len(streams) else "")
    seconds = time.perf_counter() - start
    counts = [stream.n_tokens for stream in streams]
    ends = Counter(stream.ended for stream in streams)
    why = ", ".join(f"{end} ({n})" if len(streams) > 1 else end for end, n in ends.items())
    speed = f"{sum(counts):,} tokens in {seconds:.2f} s, {sum(counts) / seconds:,.0f} tokens/s"
    note(f"{speed}, seed {config.seed}; stopped by {why}")
    S = checkpoint.model.config.max_seq_len
    if max(len(prompts[i // config.num_samples]) + n for i, n in enumerate(counts)) > S + 1:
        note(f"longer than the context of {S} tokens: no token saw more than the {S} before it")


def session(checkpoint: Checkpoint, config: SampleConfig) -> None:
    """Continue what the user types until end of input; a line that starts with / is a command."""
    with suppress(ImportError):  # gives input() arrow keys and history; Windows has its own
        import readline  # noqa: F401
    note("Type a text to be continued. Ctrl-C stops it, /help lists commands, Ctrl-D ends.")
    while True:
        try:
            line = input("> ")
            if line.startswith("/"):
                config = obey(*line[1:].split(" ", 1), config=config)
            else:
                write_samples(checkpoint, [line], config)
                config = replace(config, seed=config.seed + 1)
        except KeyboardInterrupt:
            note("\nstopped by Ctrl-C")
        except ValueError as error:
            note(f"error: {error}")
        except EOFError:
            return


def obey(command: str, value: str = "", *, config: SampleConfig) -> SampleConfig:
    """Return the settings that a session's command leaves; a key may be cut short."""
    if command == "quit":
        raise EOFError
    if command == "help":
        settings = ", ".join(f"/{key} {getattr(config, key)}" for key in SESSION_KEYS)
        note(f"/KEY VALUE changes a setting, /KEY alone takes it back, /quit ends\n{settings}")
        return config
    keys = [key for key in SESSION_KEYS if key.startswith(command)]
    key = keys[0] if len(keys) == 1 else command
    check_key(key, SESSION_KEYS, "session", "/")
    return build(SampleConfig, as_values(config) | {key: [value] if value else []})


def note(text: str) -> None:
    """Tell the user something that is no part of the text."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    config = load(SampleConfig)
    sys.stdout.reconfigure(encoding="utf-8")
    device, fast_bf16 = find_device(config.device)
    auto = "bfloat16" if fast_bf16 else "float32"
    dtype = auto if config.dtype == "auto" else config.dtype
    directory = find_checkpoint(config.ckpt)
    checkpoint = load_checkpoint(directory, device, getattr(torch, dtype))
    model = checkpoint.model
    note(f"{directory}: {model.n_params():,} parameters, {dtype} on {device}")
    if config.quantize == "int8":
        quantize_int8(model)
    if config.compile == "yes" or (
        config.compile == "auto" and config.max_new_tokens >= COMPILE_FROM
    ):
        compile_decoding(model)
    asked = config.prompt or config.prompt_file or config.probs or config.json
    if not asked and sys.stdin.isatty() and sys.stdout.isatty():
        return session(checkpoint, config)
    texts = read_prompts(config)
    if config.probs:
        for text in texts:
            show_probabilities(checkpoint, text, config)
    else:
        write_samples(checkpoint, texts, config)


if __name__ == "__main__":
    run(main)
