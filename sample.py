"""Generate text with a trained model: a prompt in, text out while it is made. Or talk to it.

Reads a Hugging Face directory of one of the families of plainllama/families.py with its
tokenizer.json, which every out/RUN/step_NNNNNN of train.py is. stdout is the text alone, prompt
included; the checkpoint, the seed, the speed and why the text ends go to stderr. A model with a
chat template, which was trained on conversations, answers instead; stdout is the answer alone.

    python sample.py                                             a session, or a chat
    python sample.py --chat --prompt "How are you?"              one turn of a chat
    python sample.py --prompt "To be, or not" --num_samples=3
    python sample.py --ckpt=out/tiny --prompt "ROMEO:" --temperature=0 --stop=$'\n\n'
    python sample.py --prompt_file=prompts.txt --json > answers.jsonl
    python sample.py --prompt "The quick brown" --probs
"""

import plainllama.startup  # noqa: F401 isort: skip (first: see there)

import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from json import dumps, loads
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from model import LLaMaTransformer
from plainllama.chat import Messages, Template, conversation_of, find_template, is_conversation
from plainllama.checkpoint import find_checkpoint
from plainllama.generation import (
    NOT_FINITE,
    CompiledDecoder,
    KeptCache,
    Sampling,
    TextStream,
    write_texts,
)
from plainllama.huggingface import load_with_tokenizer
from plainllama.inference import prepare_decoding, quantize_int8
from plainllama.machine import Dtype, find_device, n_params
from plainllama.session import Session, talk
from plainllama.settings import Switch, load
from plainllama.terminal import UserError, note, run_main
from plainllama.tokenizer import Tokenizer

Prompt = str | Messages  # a text to continue, or a conversation to answer
COMPILE_FROM = 4000  # tokens in a row after which compiling has won back its time, on a CPU


@dataclass(frozen=True)
class SampleConfig(Sampling):
    """Generate text with a trained model."""

    # text
    chat: Switch = "auto"  # answer by the chat template; auto: in a session, if there is one
    ckpt: str = ""  # a Hugging Face directory, or a run; default: the run in out/ written last
    prompt: str = ""  # the text to continue; empty: the start of a document; -: what stdin holds
    prompt_file: str = ""  # prompts for one batch: one a line, or .jsonl: prompt, or messages
    stop: tuple[str, ...] = ()  # text at which to stop, not printed; may be given several times
    special_tokens: bool = False  # read <|im_start|> and the like in the prompt as those tokens
    # output
    json: bool = False  # print a JSON object for each sample instead of its text
    probs: bool = False  # print the likeliest next tokens at each position, and the perplexity
    # machine
    device: str = "auto"  # auto (the accelerator, else the CPU), cpu, cuda, cuda:1, mps, xpu, ...
    dtype: Dtype = "auto"  # of the weights; auto: bfloat16 where the hardware is fast at it
    quantize: Literal["none", "int8"] = "none"  # int8: faster where memory is the limit, less exact
    compile: Switch = "auto"  # decode by compiled code; auto: if so many tokens are asked for


class Checkpoint(NamedTuple):
    """What it takes to continue text; with a template, to answer conversations."""

    model: LLaMaTransformer
    tokenizer: Tokenizer
    template: Template | None = None
    decoder: CompiledDecoder | None = None


def main() -> None:
    config = load(SampleConfig)
    if sys.stdout.encoding.lower() != "utf-8" and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # a file or a pipe gets the text as it is
    run(config)


def run(config: SampleConfig) -> None:
    """Print what a checkpoint makes of the prompts, or begin a session."""
    config = config.seeded()
    directory, dtype = find_checkpoint(config.ckpt), config.dtype
    is_int8 = config.quantize == "int8"
    if is_int8 and dtype == "auto" and find_device(config.device).type == "cpu":
        dtype = "float32"  # which is faster around products of 8 bits
    model, tokenizer = load_with_tokenizer(directory, config.device, dtype)
    weight = model.embeddings.weight
    note(f"{directory}: {n_params(model):,} parameters, {str(weight.dtype)[6:]} on {weight.device}")
    if is_int8:
        quantize_int8(model)
    asked = config.prompt or config.prompt_file or config.probs or config.json
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    in_session = not asked and (on_terminal or config.chat == "yes")
    template = choose_template(directory, tokenizer, config.chat, in_session)
    checkpoint = Checkpoint(model, tokenizer, template)
    texts = [""] if in_session else read_prompts(config, bool(template))
    texts = [conversation(text) for text in texts] if template else texts
    prompts = [encode_prompt(text, checkpoint, config) for text in texts]
    if config.probs:
        for ids in prompts:
            show_probabilities(model, tokenizer, ids)
        return
    pays = config.compile == "auto" and config.max_new_tokens >= COMPILE_FROM
    is_known = not in_session and config.max_new_tokens >= 0
    longest = max(map(len, prompts)) + config.max_new_tokens if is_known else 0
    compiled, rows = pays or config.compile == "yes", len(texts) * config.num_samples
    decoder = prepare_decoding(model, rows, compiled, longest)
    checkpoint = checkpoint._replace(decoder=decoder)
    if in_session:
        talk(Session(config, partial(answer, checkpoint), bool(template)))
    else:
        continue_texts(checkpoint, texts, prompts, config)


def choose_template(
    directory: Path, tokenizer: Tokenizer, chat: Switch, in_session: bool
) -> Template | None:
    """Return the chat template by which to answer; None: text is continued."""
    if chat == "no" or (chat == "auto" and not in_session):
        return None
    try:
        template = find_template(directory, tokenizer)
    except UserError as error:
        if chat == "yes":
            raise
        note(f"note: no chat, for {error}")
        return None
    if chat == "yes" and not template:
        raise UserError(f"{directory} has no chat template: leave --chat out")
    return template


def read_prompts(config: SampleConfig, chat: bool) -> list[Prompt]:
    """Return the prompts; UserError for a file or a stdin that holds something else."""
    if config.prompt != "-" and not config.prompt_file:
        return [config.prompt]
    place = config.prompt_file or "stdin"
    data = Path(place).read_bytes() if config.prompt_file else sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text: {error}") from error
    if not config.prompt_file:
        return [text]
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not place.endswith(".jsonl"):
        return lines
    return [read_record(line, chat, f"{place}, line {n}") for n, line in enumerate(lines, 1)]


def read_record(line: str, chat: bool, place: str) -> Prompt:
    """Return the prompt of a line of JSON, or its messages."""
    prompt = None
    with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        record = loads(line)
        if chat and is_conversation(record.keys()):
            prompt = conversation_of(record)
        elif isinstance(record["prompt"], str):
            prompt = record["prompt"]
    if prompt is None:
        keys = "prompt, or messages with --chat"
        raise UserError(f"{place}: not a JSON object with the key {keys}")
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        raise UserError(f"{place}: the last message is not the user's")
    return prompt


def encode_prompt(prompt: Prompt, checkpoint: Checkpoint, config: SampleConfig) -> list[int]:
    """Return the prompt's tokens, after what the model expects before a text.

    An empty prompt becomes the end of text, which begins a document. Of a conversation, the first
    exchanges are left out where a quarter of the context would not stay free for the answer.
    """
    tokenizer = checkpoint.tokenizer
    if checkpoint.template:
        S = checkpoint.model.config.max_seq_len
        ids, left_out = checkpoint.template.fit(conversation(prompt), S - S // 4, S)
        if left_out:
            note(f"the context of {S:,} tokens is full: exchanges left out: {left_out}")
        return ids
    ids = tokenizer.encode(prompt, config.special_tokens)
    begin = [*tokenizer.begin_of_text]
    if ids[: len(begin)] != begin:  # which special_tokens may have read already
        ids = begin + ids
    return ids or tokenizer.ends[:1]


def conversation(prompt: Prompt) -> Messages:
    """Return the conversation that a prompt is, or begins."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def answer(checkpoint: Checkpoint, prompt: Prompt, config: SampleConfig, kept: KeptCache) -> str:
    """Print what follows a text, or the answer to a conversation; return it."""
    ids = encode_prompt(prompt, checkpoint, config)
    if not checkpoint.template:
        return continue_texts(checkpoint, [prompt], [ids], config)[0].ready
    config = replace(config, num_samples=1)
    (stream,) = continue_texts(checkpoint, [prompt], [ids], config, kept)
    word = checkpoint.template.said_after
    has_thoughts = word and word in stream.ready
    return stream.ready.rpartition(word)[2].lstrip() if has_thoughts else stream.ready


def continue_texts(
    checkpoint: Checkpoint,
    texts: list[Prompt],
    prompts: list[list[int]],
    config: SampleConfig,
    kept: KeptCache | None = None,
) -> list[TextStream]:
    """Print num_samples continuations of each text, all made in one batch, and report on them.

    Of a conversation the answer is printed alone. With `kept`, it goes on, and Ctrl-C ends the
    answer where it is.
    """
    texts = [text for text in texts for _ in range(config.num_samples)]
    lengths = [len(prompt) for prompt in prompts for _ in range(config.num_samples)]
    streams = [make_stream(checkpoint, max(lengths), config) for _ in texts]
    start = time.perf_counter()
    steps = write_texts(checkpoint.model, prompts, streams, config, checkpoint.decoder, kept)
    for number, (text, stream) in enumerate(zip(texts, streams, strict=True), 1):
        if isinstance(text, str) and not config.json:
            is_bold = text and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            print(f"\033[1m{text}\033[0m" if is_bold else text, end="", flush=True)
        try:
            for piece in pieces(stream, steps):
                print("" if config.json else piece, end="", flush=True)
        except KeyboardInterrupt:
            if not kept:
                raise
            stream.end("Ctrl-C")
        if config.json:
            print_json(text, stream, config.seed)
        else:
            print("\n---" if number < len(texts) else "")
    seconds, count = time.perf_counter() - start, sum(stream.n_tokens for stream in streams)
    ends = Counter(stream.ended for stream in streams)
    why = ", ".join(f"{end} ({n})" if len(streams) > 1 else end for end, n in ends.items())
    speed = f"{count:,} tokens in {seconds:.2f} s, {count / seconds:,.0f} tokens/s"
    note(f"{speed}, seed {config.seed}; stopped by {why}")
    S = checkpoint.model.config.max_seq_len
    asked = config.max_new_tokens != SampleConfig.max_new_tokens or max(lengths) > S
    pairs = zip(lengths, streams, strict=True)
    read = max(length + stream.n_tokens - 1 for length, stream in pairs)  # all but the last token
    if asked and read > S:
        note(f"longer than the context of {S} tokens: no token saw more than the {S} before it")
    return streams


def make_stream(checkpoint: Checkpoint, length: int, config: SampleConfig) -> TextStream:
    """Return the stream of what follows a prompt of so many tokens.

    A text may outgrow the context, but an answer may not.
    """
    ends, limit, limit_name = checkpoint.tokenizer.ends, config.max_new_tokens, "max_new_tokens"
    if checkpoint.template:
        ends = [checkpoint.template.end, *ends]
        room = checkpoint.model.config.max_seq_len - length
        if not 0 <= limit <= room:
            limit, limit_name = room, "the end of the context"
    return TextStream(checkpoint.tokenizer, ends, limit, config.stop, limit_name)


def pieces(stream: TextStream, steps: Iterator[None]) -> Iterator[str]:
    """Yield a sample's text while it is made."""
    yield stream.take()
    while not stream.ended:
        next(steps)
        yield stream.take()


def print_json(text: Prompt, stream: TextStream, seed: int) -> None:
    """Print a sample as a JSON object on one line."""
    if isinstance(text, str):
        sample = {"prompt": text, "text": stream.ready}
    else:
        sample = {"messages": [*text, {"role": "assistant", "content": stream.ready}]}
    sample |= {"seed": seed, "n_tokens": stream.n_tokens, "ended": stream.ended}
    print(dumps(sample, ensure_ascii=False), flush=True)


def show_probabilities(model: LLaMaTransformer, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Print the three likeliest next tokens at each position, and how likely the text is."""
    S = model.config.max_seq_len
    first = max(0, len(ids) - S)
    if first:
        note(f"longer than the context of {S} tokens: the first {first} are left out")
    tokens = torch.tensor(ids[first:], device=model.cos.device)
    with torch.inference_mode():
        log_probabilities = model(tokens[None])[0][0].float().log_softmax(-1)  # (T, V)
    if not log_probabilities.isfinite().all():
        raise UserError(NOT_FINITE)
    for position, row in enumerate(log_probabilities, first):
        values, likeliest = row.exp().topk(min(3, len(row)))
        texts = [tokenizer.token_bytes(id).decode(errors="replace") for id in likeliest.tolist()]
        pairs = zip(texts, values.tolist(), strict=True)
        shown = [f"{dumps(text, ensure_ascii=False)} {p:.2f}" for text, p in pairs]
        print(f"pos {position}: {', '.join(shown)}")
    nats = -log_probabilities[:-1].gather(1, tokens[1:, None]).sum().item()
    perplexity = math.exp(min(nats / max(1, len(tokens) - 1), 700))
    print(f"log-likelihood {-nats:.2f} over {len(tokens) - 1} tokens, perplexity {perplexity:.2f}")


if __name__ == "__main__":
    run_main(main)
