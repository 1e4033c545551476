"""Generation: a prompt is read into a cache, tokens are chosen one by one and become text."""

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, LLaMaTransformer
from plainllama.machine import check_memory
from plainllama.settings import UserError
from plainllama.tokenizer import Tokenizer

NONE = -1  # in place of an id
GREEDY = 1e-5  # temperatures below choose the likeliest token, for dividing by them overflows


class CompiledDecoder(NamedTuple):
    """What decodes single tokens by compiled code, with a static cache of so many columns."""

    next_logits: Callable[[Tensor, Tensor, KVCache], Tensor]  # (B, 1), (1) to (B, 1, V)
    columns: int  # a longer text has a cache of max_seq_len columns, and waits for the compiler


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    # sampling
    max_new_tokens: int = 256  # tokens to generate at most; -1: until end of text
    temperature: float = 0.8  # divides the logits: below 1 likelier tokens gain; 0: greedy
    top_k: int = 0  # choose among the k likeliest tokens; 0: all
    top_p: float = 1.0  # choose among the likeliest tokens that together reach probability p
    min_p: float = 0.0  # choose among tokens at least min_p times as likely as the likeliest
    repetition_penalty: float = 1.0  # above 1, tokens that the text already holds lose
    num_samples: int = 1  # samples of each prompt, in one batch
    seed: int = -1  # decides every random choice; -1: a new one each time, named on stderr

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (-1, math.inf),
            "temperature": (0, math.inf),
            "top_k": (0, math.inf),
            "top_p": (1e-6, 1),
            "min_p": (0, 1),
            "repetition_penalty": (0.01, math.inf),
            "num_samples": (1, math.inf),
            "seed": (-1, math.inf),
        }
        for key, (least, most) in limits.items():
            if not least <= getattr(self, key) <= most:
                upper = f" and at most {most}" if most < math.inf else ""
                raise UserError(f"{key}={getattr(self, key)} must be at least {least}{upper}")


def filter_logits(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Return logits (B, V) with the tokens that must not be chosen at -inf.

    The filters run in the order of transformers, each on what the one before has left: repetition
    penalty on the tokens of the mask `seen`, (B, V) (arXiv:1909.05858), temperature, top-k, top-p
    (arXiv:1904.09751), min-p (arXiv:2407.01082). The likeliest token always stays.
    """
    if seen is not None:
        penalty = sampling.repetition_penalty
        lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
        logits = torch.where(seen, lowered, logits)
    if sampling.temperature >= GREEDY:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.size(-1):
        weakest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, -math.inf)
    if sampling.top_p < 1:
        descending, order = logits.sort(descending=True)
        probabilities = descending.softmax(-1)
        surplus = probabilities.cumsum(-1) - probabilities >= sampling.top_p  # p is reached before
        logits = logits.masked_fill(surplus.scatter(1, order, surplus), -math.inf)
    if sampling.min_p > 0:
        weakest = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < weakest, -math.inf)
    return logits


def make_sampler(
    sampling: Sampling, prompts: Sequence[Sequence[int]]
) -> Callable[[Tensor], Tensor]:
    """Return the function from logits (B, V) to ids (B,), NONE for a row that is not finite.

    Each prompt has num_samples rows.

    Each of a prompt's samples has random numbers of its own, which depend on the seed and on which
    sample it is, so that neither more samples nor other prompts change what is chosen for it.
    """
    generators = [
        np.random.default_rng((sampling.seed, i) if sampling.seed >= 0 else None)
        for i in range(sampling.num_samples)
    ]
    seen: Tensor | None = None  # the mask (B, V) of the tokens in the text

    def pick(logits: Tensor) -> Tensor:
        nonlocal seen
        if sampling.repetition_penalty != 1 and seen is None:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row in range(len(logits)):
                seen[row, prompts[row // sampling.num_samples]] = True
        finite = logits.isfinite().all(-1)
        logits = filter_logits(logits.float(), sampling, seen)
        if sampling.temperature < GREEDY:
            tokens = logits.argmax(-1)
        else:
            cumulative = logits.softmax(-1).cumsum(-1)  # (B, V)
            drawn = [[g.random(dtype=np.float32)] for g in generators]
            drawn = torch.tensor(drawn, device=logits.device).repeat(len(prompts), 1)
            # The first token at which the sum passes the number; never one of probability 0.
            tokens = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)[:, 0]
        tokens = tokens.where(finite, 0)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        return tokens.where(finite, NONE)

    return pick


def generate(
    model: LLaMaTransformer,
    prompts: Tensor | list[list[int]],
    max_new_tokens: int,
    pick: Callable[[Tensor], Tensor],
    num_samples: int = 1,
    decoder: CompiledDecoder | None = None,
) -> Iterator[Tensor]:
    """Yield the next ids, (B,), of B = num_samples times as many rows as there are prompts.

    `pick` chooses them from logits (B, V); a prompt's samples are adjacent, and it is read once for
    all of them. A prompt longer than max_seq_len loses its beginning. When a row's context is full,
    its newer half is read again as a new beginning and generation goes on from there. Shorter rows
    are padded at the left and read as if alone.
    """
    steps = generation_steps(model, prompts, max_new_tokens, pick, num_samples, decoder)
    return one_ahead(steps) if model.cos.device.type == "cuda" else steps


def one_ahead(steps: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield a GPU's tokens, on the CPU, each once the next step was begun: the GPU never waits."""
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for tokens in steps:
        copied = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        copied.copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        if waiting:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = copied, done
    if waiting:
        waiting[1].synchronize()
        yield waiting[0]


@torch.inference_mode()
def generation_steps(
    model: LLaMaTransformer,
    prompts: Tensor | list[list[int]],
    max_new_tokens: int,
    pick: Callable[[Tensor], Tensor],
    num_samples: int,
    decoder: CompiledDecoder | None,
) -> Iterator[Tensor]:
    """Yield what `generate` does, on the model's device."""
    S, device = model.config.max_seq_len, model.cos.device
    rows = [torch.as_tensor(prompt, device=device)[-S:] for prompt in prompts]
    T = max(map(len, rows))
    history = torch.stack([F.pad(row, (T - len(row), 0)) for row in rows])  # (B, T)
    padding = torch.tensor([T - len(row) for row in rows], device=device)  # (B)
    size = min(S, T + max_new_tokens)
    if decoder:
        size = decoder.columns if size <= decoder.columns else S
    like = model.embeddings.weight
    cache = KVCache(model.config, len(rows), like, size, static=decoder is not None)
    needed = num_samples * sum(x.nbytes for layer in cache.layers for x in layer)
    check_memory(needed, f"num_samples={num_samples}", device)
    logits = prefill(model, history, padding, cache)  # (B, 1, V)
    if num_samples > 1:
        cache.repeat(num_samples)
        logits, history, padding = (
            x.repeat_interleave(num_samples, dim=0) for x in (logits, history, padding)
        )
    if decoder:
        keep_in_place(cache)
    tokens = history[:, -1]  # the newest of each row, (B)
    for n in range(max_new_tokens):
        if n > 0 and cache.length < S:
            logits = decode(model, tokens[:, None], cache, decoder)
        elif n > 0:
            padding = padding.where(padding > 0, S + 1 - max(1, S // 2))
            history = history[:, padding.min() :]
            padding = padding - padding.min()
            logits = prefill(model, history, padding, cache)
        tokens = pick(logits[:, -1])  # (B,)
        yield tokens
        tokens = tokens.clamp(min=0)
        history = torch.cat((history, tokens[:, None]), dim=1)


class KeptCache:
    """A cache that stays from prompt to prompt: of each, only what is new is read.

    What is kept is the longest common beginning of the ids, whatever a template has changed since.
    """

    def __init__(self, model: LLaMaTransformer, decoder: CompiledDecoder | None = None) -> None:
        self.model, self.decoder = model, decoder
        self.ids: list[int] = []  # those whose keys and values it has
        self.cache: KVCache | None = None

    @torch.inference_mode()
    def generate(
        self, prompt: list[int], max_new_tokens: int, pick: Callable[[Tensor], Tensor]
    ) -> Iterator[int]:
        """Yield the ids that follow a prompt; ValueError where they would not fit the context."""
        self.make_room(len(prompt) + max_new_tokens)
        device = self.model.cos.device
        # The last id is read in any case, for what follows it.
        length = min(len(os.path.commonprefix([self.ids, prompt])), len(prompt) - 1)
        self.cache.length, self.ids = length, prompt[:length]
        tokens = torch.tensor([prompt[length:]], device=device)
        logits = self.model.forward(tokens, cache=self.cache)[0]
        self.ids = list(prompt)
        for _ in range(max_new_tokens):
            token = pick(logits[:, -1])  # (1)
            yield int(token)
            logits = decode(self.model, token[:, None], self.cache, self.decoder)
            self.ids.append(int(token))

    def make_room(self, needed: int) -> None:
        """Make a cache of so many columns, unless there is one."""
        S = self.model.config.max_seq_len
        if self.cache is None or needed > self.cache.size:
            size = self.decoder.columns if self.decoder else min(S, max(1024, 2 * needed))
            like = self.model.embeddings.weight
            self.cache = KVCache(self.model.config, 1, like, size, static=self.decoder is not None)
            self.ids = []
            if self.decoder:
                keep_in_place(self.cache)


def prefill(model: LLaMaTransformer, history: Tensor, padding: Tensor, cache: KVCache) -> Tensor:
    """Read whole rows into an empty cache; return the logits of what follows, (B, 1, V)."""
    cache.restart(padding if padding.any() else None)
    return model.forward(history, cache=cache)[0]  # not model(): that may be compiled for training


def decode(
    model: LLaMaTransformer, tokens: Tensor, cache: KVCache, decoder: CompiledDecoder | None
) -> Tensor:
    """Read one more token of each row, (B, 1); return the logits of what follows, (B, 1, V)."""
    if decoder is None:
        return model.forward(tokens, cache=cache)[0]
    positions = torch.arange(cache.length, cache.length + 1, device=tokens.device)
    logits = decoder.next_logits(tokens, positions, cache)
    cache.length += 1
    return logits


def keep_in_place(cache: KVCache) -> None:
    """Tell the compiler that a cache's memory does not move: CUDA graphs then need not copy it."""
    for layer in cache.layers:
        for stored in layer:
            torch._dynamo.mark_static_address(stored, guard=False)


class TextStream:
    """Turns the tokens of one sample into text that can be printed at once.

    Held back are the bytes of a character that is not complete yet, and characters that may become
    a stop string. `ended` says why the sample is over; it is empty as long as it is not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_of_text: Sequence[int],
        limit: int,
        stop: Sequence[str],
        limit_name: str = "max_new_tokens",
    ) -> None:
        """Make a stream that ends after `limit` tokens, -1: none, or before a `stop` string."""
        self.characters = tokenizer.stream()
        self.end_of_text, self.limit = end_of_text, limit
        self.stop = sorted(stop, key=len, reverse=True)
        self.ready, self.held = "", ""
        self.n_tokens = 0
        self.limit_name = limit_name
        self.ended = limit_name if limit == 0 else ""

    def add(self, token: int) -> None:
        """Take the next token; after the end of the sample it is ignored."""
        if self.ended:
            return
        if token == NONE:
            raise not_finite()
        self.n_tokens += 1
        if token in self.end_of_text:
            self.end("end of text")
            return
        for character in self.characters(token):
            self.held += character
            for stop in self.stop:
                if self.held.endswith(stop):
                    self.held = self.held.removesuffix(stop)
                    self.end(f"stop string {stop!r}")
                    return
            while self.held and not any(stop.startswith(self.held) for stop in self.stop):
                self.ready += self.held[0]
                self.held = self.held[1:]
        if self.n_tokens == self.limit:
            self.end(self.limit_name)

    def end(self, reason: str) -> None:
        """Release what is held back and note why the sample is over."""
        self.ready, self.held, self.ended = self.ready + self.held, "", reason

    def take(self) -> str:
        """Return the text that became ready since the last call."""
        text, self.ready = self.ready, ""
        return text


def not_finite() -> UserError:
    """Return the refusal of a model whose logits are no numbers, though its weights are."""
    return UserError("the model's logits are not finite: try --dtype=float32, or train it anew")


def sample_text(
    model: LLaMaTransformer, tokenizer: Tokenizer, seed: int, question: Sequence[int] = ()
) -> str:
    """Return up to 100 tokens that the model generates at temperature 0.8.

    They are a new document, or follow a question up to a special token, which ends the answer.
    """
    prompt = [list(question) or list(tokenizer.begin_of_text) or [tokenizer.end_of_text]]
    ends = tokenizer.special if question else [tokenizer.end_of_text]
    stream = TextStream(tokenizer, ends, 100, [])
    tokens = generate(model, prompt, 100, make_sampler(Sampling(seed=seed), prompt))
    while not stream.ended:
        stream.add(int(next(tokens)))
    return tokenizer.decode(question) + stream.take()


def continue_text(
    model: LLaMaTransformer,
    tokenizer: Tokenizer,
    text: str = "",
    stop: Sequence[str] = (),
    **settings: Any,
) -> str | list[str]:
    """Return what follows a text, or a list where num_samples is above 1; "" begins a document.

    The settings are those of Sampling. A sample ends at the end of text or before a `stop` string.
    """
    sampling = Sampling(**settings)
    prompt = [*tokenizer.begin_of_text, *tokenizer.encode(text)] or tokenizer.ends[:1]
    limit, count = sampling.max_new_tokens, sampling.num_samples
    streams = [TextStream(tokenizer, tokenizer.ends, limit, stop) for _ in range(count)]
    pick = make_sampler(sampling, [prompt])
    steps = generate(model, [prompt], limit if limit >= 0 else sys.maxsize, pick, count)
    while not all(stream.ended for stream in streams):
        for stream, token in zip(streams, next(steps).tolist(), strict=True):
            stream.add(token)
    texts = [stream.take() for stream in streams]
    return texts[0] if count == 1 else texts
