"""Generation: a prompt is read into a cache, tokens are chosen one by one and become text."""

import itertools
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, LLaMaTransformer
from plainllama.machine import check_memory
from plainllama.terminal import UserError
from plainllama.tokenizer import Tokenizer

NONE = -1  # in place of an id
NOT_FINITE = "the model's logits are not finite: try --dtype=float32, or train it anew"
GREEDY = 1e-5  # temperatures below choose the likeliest token, for dividing by them overflows


@dataclass
class KeptCache:
    """What stays from one prompt to the next: a cache, and the ids that it has read, (1, T)."""

    cache: KVCache | None = None
    ids: Tensor | None = None


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
        lower = {"max_new_tokens": -1, "seed": -1, "num_samples": 1}
        lower |= {"top_p": 1e-6, "repetition_penalty": 0.01}
        for key in (field.name for field in fields(Sampling)):
            value, least = getattr(self, key), lower.get(key, 0)
            most = 1 if key in ("top_p", "min_p") else math.inf
            if not least <= value <= most:
                upper = f" and at most {most}" if most < math.inf else ""
                raise UserError(f"{key}={value} must be at least {least}{upper}")

    def seeded(self) -> Self:
        """Return these settings, with a new seed where it is -1."""
        return self if self.seed >= 0 else replace(self, seed=secrets.randbelow(2**32))


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

    Each prompt has num_samples rows, each with random numbers of its own, which depend on the seed
    and on which sample it is: neither more samples nor other prompts change what is chosen for it.
    """
    seed, count = sampling.seed, sampling.num_samples
    seeds = [(seed, sample) if seed >= 0 else None for sample in range(count)]
    generators = [np.random.default_rng(seed) for seed in seeds]
    seen: Tensor | None = None  # the mask (B, V) of the tokens in the text

    def pick(logits: Tensor) -> Tensor:
        nonlocal seen
        if sampling.repetition_penalty != 1 and seen is None:
            seen = torch.zeros_like(logits, dtype=torch.bool)
            for row in range(len(logits)):
                seen[row, prompts[row // count]] = True
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


@torch.inference_mode()
def generate(
    model: LLaMaTransformer,
    prompts: Tensor | list[list[int]],
    max_new_tokens: int,
    pick: Callable[[Tensor], Tensor],
    num_samples: int = 1,
    decoder: CompiledDecoder | None = None,
    kept: KeptCache | None = None,
) -> Iterator[Tensor]:
    """Yield the next ids, (B,), of B = num_samples times as many rows as there are prompts.

    They are on the model's device: see one_ahead.

    `pick` chooses them from logits (B, V); a prompt's samples are adjacent, and it is read once for
    all of them. A prompt longer than max_seq_len loses its beginning. When a row's context is full,
    its newer half is read again as a new beginning and generation goes on from there. Shorter rows
    are padded at the left and read as if alone. With `kept`, a single prompt whose text fits the
    context, only what follows the longest beginning that the cache has already read is read.
    """
    S, device = model.config.max_seq_len, model.cos.device
    rows = [torch.as_tensor(prompt, device=device)[-S:] for prompt in prompts]
    T = max(map(len, rows))
    history = torch.stack([F.pad(row, (T - len(row), 0)) for row in rows])  # (B, T)
    padding = torch.tensor([T - len(row) for row in rows], device=device)  # (B)
    size = min(S, T + max_new_tokens)
    if decoder:
        size = decoder.columns if size <= decoder.columns else S
    cache, known = kept.cache if kept else None, 0
    if cache and cache.size >= size:
        beginning = os.path.commonprefix([kept.ids[0].tolist(), rows[0].tolist()])
        known = min(len(beginning), cache.length, T - 1)  # the last id is read for what follows it
    else:
        size = min(S, max(1024, 2 * size)) if kept else size  # for what comes next
        cache = KVCache(model.config, len(rows), model.embeddings.weight, size, bool(decoder))
    needed = num_samples * sum(x.nbytes for layer in cache.layers for x in layer)
    check_memory(needed, f"num_samples={num_samples}", device)
    if kept:
        kept.cache, kept.ids = cache, history
    logits = prefill(model, history, padding, cache, known)  # (B, 1, V)
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
            dropped = S + 1 - max(1, S // 2)  # tokens that rows without padding lose
            padding = padding.where(padding > 0, dropped)
            history = history[:, padding.min() :]
            padding = padding - padding.min()
            logits = prefill(model, history, padding, cache)
        tokens = pick(logits[:, -1])  # (B,)
        yield tokens
        tokens = tokens.clamp(min=0)
        history = torch.cat((history, tokens[:, None]), dim=1)
        if kept:
            kept.ids = history


def one_ahead(steps: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield a GPU's tokens, on the CPU, each once the next step was begun: the GPU never waits.

    Those of other devices come as they are.
    """
    if device.type != "cuda":
        yield from steps
        return
    stream = torch.cuda.current_stream()
    # A copy that does not block goes to pinned memory; the event tells when it is there.
    copies = ((ids.to("cpu", non_blocking=True), stream.record_event()) for ids in steps)
    for (tokens, copied), _ in itertools.pairwise(itertools.chain(copies, [None])):
        copied.synchronize()
        yield tokens


def prefill(
    model: LLaMaTransformer, history: Tensor, padding: Tensor, cache: KVCache, known: int = 0
) -> Tensor:
    """Read rows, of which a cache has `known` columns; return the logits of what follows."""
    cache.restart(padding if padding.any() else None, known)
    # Not model(): that may be compiled for training.
    return model.forward(history[:, known:], cache=cache)[0]  # (B, 1, V)


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
    for stored in itertools.chain(*cache.layers):
        torch._dynamo.mark_static_address(stored, guard=False)


class TextStream:
    """Turns the tokens of one sample into text that can be printed at once.

    `ready` is the text so far. Held back are the bytes of a character that is not complete yet, and
    characters that may become a stop string. `ended` says why the sample is over; it is empty as
    long as it is not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        end_of_text: Sequence[int],
        limit: int,
        stop: Sequence[str] = (),
        limit_name: str = "max_new_tokens",
    ) -> None:
        """Make a stream that ends after `limit` tokens, -1: none, or before a `stop` string."""
        self.characters = tokenizer.stream()
        self.end_of_text, self.limit = end_of_text, limit
        self.stop = sorted(filter(None, stop), key=len, reverse=True)
        self.ready, self.held, self.taken = "", "", 0
        self.n_tokens = 0
        self.limit_name = limit_name
        self.ended = limit_name if limit == 0 else ""

    def add(self, token: int) -> None:
        """Take the next token; after the end of the sample it is ignored."""
        if self.ended:
            return
        if token == NONE:
            raise UserError(NOT_FINITE)
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
        text, self.taken = self.ready[self.taken :], len(self.ready)
        return text


def write_texts(
    model: LLaMaTransformer,
    prompts: list[list[int]],
    streams: list[TextStream],
    sampling: Sampling,
    decoder: CompiledDecoder | None = None,
    kept: KeptCache | None = None,
) -> Iterator[None]:
    """Give each stream, num_samples of a prompt, its next token: once a step, till all have ended.

    All streams have the same limit.
    """
    limit = streams[0].limit if streams[0].limit >= 0 else sys.maxsize
    pick = make_sampler(sampling, prompts)
    steps = generate(model, prompts, limit, pick, sampling.num_samples, decoder, kept)
    steps = one_ahead(steps, model.cos.device)
    while not all(stream.ended for stream in streams):
        for stream, token in zip(streams, next(steps).tolist(), strict=True):
            stream.add(token)
        yield


def continue_text(
    model: LLaMaTransformer,
    tokenizer: Tokenizer,
    text: str | list[int] = "",
    stop: Sequence[str] = (),
    **settings: Any,
) -> str | list[str]:
    """Return what follows a text, or a list where num_samples is above 1; "" begins a document.

    The settings are those of Sampling. A sample ends at the end of text or before a `stop` string;
    after a text that is given as ids, which may be a question, at any special token.
    """
    sampling = Sampling(**settings)
    prompt, ends = text, tokenizer.special
    if isinstance(text, str):
        prompt = [*tokenizer.begin_of_text, *tokenizer.encode(text)] or tokenizer.ends[:1]
        ends = tokenizer.ends
    limit, count = sampling.max_new_tokens, sampling.num_samples
    streams = [TextStream(tokenizer, ends, limit, stop) for _ in range(count)]
    list(write_texts(model, [prompt], streams, sampling))
    texts = [stream.ready for stream in streams]
    return texts[0] if count == 1 else texts
