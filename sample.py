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
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from json import dumps, loads
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from model import LLaMaTransformer
from plainllama.chat import Messages, Template, conversation_of, find_template, is_conversation
from plainllama.checkpoint import find_checkpoint
from plainllama.families import base_of, read_config
from plainllama.generation import (
    CompiledDecoder,
    KeptCache,
    Sampling,
    TextStream,
    generate,
    make_sampler,
    not_finite,
)
from plainllama.huggingface import end_of_text_ids, load_model
from plainllama.inference import prepare_decoding, quantize_int8
from plainllama.machine import Dtype, choose_dtype, find_device, n_params
from plainllama.settings import Switch, UserError, load, nearest, note, run_main
from plainllama.tokenizer import Tokenizer, load_tokenizer

Prompt = str | Messages  # a text to continue, or a conversation to answer
COMPILE_FROM = 4000  # tokens in a row after which compiling has won back its time, on a CPU
SESSION_KEYS = (*(field.name for field in fields(Sampling)), "stop", "special_tokens")
SESSION_HELP = """\
/KEY VALUE  change a setting; /KEY alone takes it back to its default
/again      generate another continuation of the last text
/quit       end (so does Ctrl-D); Ctrl-C stops a text
// begins a text with a slash; pasted texts may have many lines."""
CHAT_HELP = """\
/system TEXT  say what the model is to be; /system alone takes it back
/undo         take back the last question and its answer; /again: answer it again
/new          begin a new conversation
/save FILE    append the conversation to a .jsonl, which prepare.py reads"""


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

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise UserError("stop='' would stop before the first token")


class Checkpoint(NamedTuple):
    """What it takes to continue text; the first of the end-of-text ids also begins one.

    With a template, what is to be continued are conversations.
    """

    model: LLaMaTransformer
    tokenizer: Tokenizer
    end_of_text: list[int]
    template: Template | None = None
    decoder: CompiledDecoder | None = None


def load_checkpoint(directory: Path, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Read a Hugging Face directory; UserError, on one line, says what is wrong with it."""
    tokenizer = load_tokenizer(base_of(directory) / "tokenizer.json")
    model = load_model(directory, device=device, dtype=dtype)
    end_of_text = end_of_text_ids(directory, tokenizer)
    V = model.config.vocab_size
    for token in (tokenizer.vocab_size - 1, *end_of_text):
        if not 0 <= token < V:
            raise UserError(f"{directory}: token {token} does not fit the model's {V} tokens")
    return Checkpoint(model, tokenizer, end_of_text)


def choose_template(
    directory: Path, tokenizer: Tokenizer, config: SampleConfig, in_session: bool
) -> Template | None:
    """Return the chat template by which to answer; None: text is continued."""
    if config.chat == "no" or (config.chat == "auto" and not in_session):
        return None
    try:
        template = find_template(directory, tokenizer)
    except UserError as error:
        if config.chat == "yes":
            raise
        note(f"note: no chat, for {error}")
        return None
    if config.chat == "yes" and not template:
        raise UserError(f"{directory} has no chat template: leave --chat out")
    return template


def read_prompts(config: SampleConfig) -> list[Prompt]:
    """Return the prompts; UserError for a file or a stdin that holds something else."""
    if config.prompt != "-" and not config.prompt_file:
        return [config.prompt]
    place = config.prompt_file or "stdin"
    if config.prompt_file and not Path(place).is_file():
        raise UserError(f"prompt_file={place} is no file")
    try:
        data = Path(place).read_bytes() if config.prompt_file else sys.stdin.buffer.read()
        text = data.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text: {error}") from error
    if not config.prompt_file:
        return [text]
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not config.prompt_file.endswith(".jsonl"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        prompt = None
        with suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
            record = loads(line)
            if is_conversation(record.keys()) and config.chat == "yes":
                prompt = conversation_of(record)
            elif isinstance(record["prompt"], str):
                prompt = record["prompt"]
        if prompt is None:
            keys = "prompt, or messages with --chat"
            raise UserError(f"{place}, line {number}: not a JSON object with the key {keys}")
        if isinstance(prompt, list) and prompt[-1]["role"] != "user":
            raise UserError(f"{place}, line {number}: the last message is not the user's")
        prompts.append(prompt)
    return prompts


def conversation(prompt: Prompt) -> Messages:
    """Return the conversation that a prompt is, or begins."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


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
    return [*tokenizer.begin_of_text, *ids] or checkpoint.end_of_text[:1]


def continue_texts(
    checkpoint: Checkpoint, texts: list[Prompt], prompts: list[list[int]], config: SampleConfig
) -> None:
    """Print num_samples continuations of each text, all made in one batch, then a report."""
    begin = [*checkpoint.tokenizer.begin_of_text]
    if begin and any(prompt[: 2 * len(begin)] == 2 * begin for prompt in prompts):
        note(f"note: {checkpoint.tokenizer.decode(begin)} stands twice, for it begins every text")
    texts = [text for text in texts for _ in range(config.num_samples)]
    lengths = [len(prompt) for prompt in prompts for _ in range(config.num_samples)]
    streams = [make_stream(checkpoint, max(lengths), config) for _ in texts]
    start = time.perf_counter()
    steps = generate_texts(checkpoint, prompts, streams, config)
    for number, (text, stream) in enumerate(zip(texts, streams, strict=True), 1):
        if config.json:
            print_json(text, stream, steps, config.seed)
        else:
            print_text(text, stream, steps)
            print("\n---" if number < len(texts) else "")
    report(streams, lengths, time.perf_counter() - start, checkpoint, config)


def make_stream(checkpoint: Checkpoint, length: int, config: SampleConfig) -> TextStream:
    """Return the stream of what follows a prompt of so many tokens.

    A text may outgrow the context, but an answer may not.
    """
    limit, room = config.max_new_tokens, checkpoint.model.config.max_seq_len - length
    ends = checkpoint.end_of_text
    if not checkpoint.template:
        return TextStream(checkpoint.tokenizer, ends, limit, config.stop)
    ends = [checkpoint.template.end, *ends]
    if 0 <= limit <= room:
        return TextStream(checkpoint.tokenizer, ends, limit, config.stop)
    return TextStream(checkpoint.tokenizer, ends, room, config.stop, "the end of the context")


def generate_texts(
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    streams: list[TextStream],
    config: SampleConfig,
) -> Iterator[None]:
    """Give each stream its next token, once for every step."""
    limit = config.max_new_tokens if config.max_new_tokens >= 0 else sys.maxsize
    pick = make_sampler(config, prompts)
    for tokens in generate(
        checkpoint.model, prompts, limit, pick, config.num_samples, checkpoint.decoder
    ):
        for stream, token in zip(streams, tokens.tolist(), strict=True):
            stream.add(token)
        yield


def print_text(text: Prompt, stream: TextStream, steps: Iterator[None]) -> None:
    """Print a text, in bold on a terminal, and its continuation while it is made.

    Of a conversation the answer is printed alone.
    """
    text = text if isinstance(text, str) else ""
    is_bold = text and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"\033[1m{text}\033[0m" if is_bold else text, end="")
    print(stream.take(), end="", flush=True)
    while not stream.ended:
        next(steps)
        print(stream.take(), end="", flush=True)


def print_json(text: Prompt, stream: TextStream, steps: Iterator[None], seed: int) -> None:
    """Print a JSON object on one line, once the sample is over."""
    while not stream.ended:
        next(steps)
    if isinstance(text, str):
        sample = {"prompt": text, "text": stream.take(), "seed": seed}
    else:
        answer = {"role": "assistant", "content": stream.take()}
        sample = {"messages": [*text, answer], "seed": seed}
    sample.update(n_tokens=stream.n_tokens, ended=stream.ended)
    print(dumps(sample, ensure_ascii=False), flush=True)


def report(
    streams: list[TextStream],
    lengths: list[int],
    seconds: float,
    checkpoint: Checkpoint,
    config: SampleConfig,
) -> None:
    """Say on stderr how fast samples were made, of prompts of these lengths, and why they ended."""
    count = sum(stream.n_tokens for stream in streams)
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
        raise not_finite()
    for position, row in enumerate(log_probabilities, first):
        values, likeliest = row.exp().topk(min(3, len(row)))
        texts = [tokenizer.token_bytes(id).decode(errors="replace") for id in likeliest.tolist()]
        pairs = zip(texts, values.tolist(), strict=True)
        shown = [f"{dumps(text, ensure_ascii=False)} {p:.2f}" for text, p in pairs]
        print(f"pos {position}: {', '.join(shown)}")
    nats = -log_probabilities[:-1].gather(1, tokens[1:, None]).sum().item()
    perplexity = math.exp(min(nats / max(1, len(tokens) - 1), 700))
    print(f"log-likelihood {-nats:.2f} over {len(tokens) - 1} tokens, perplexity {perplexity:.2f}")


class Chat:
    """A conversation that goes on: its messages, and the cache of what the model has read of it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.messages = checkpoint, []
        self.cache = KeptCache(checkpoint.model, checkpoint.decoder)
        self.commands = {
            "system": self.set_system,
            "new": self.begin,
            "undo": self.undo,
            "save": self.save,
        }

    def ask(self, question: str, config: SampleConfig) -> None:
        """Print the model's answer; Ctrl-C ends it where it is."""
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = encode_prompt(messages, self.checkpoint, config)
        stream = make_stream(self.checkpoint, len(prompt), config)
        start, answer = time.perf_counter(), ""
        tokens = self.cache.generate(prompt, stream.limit, make_sampler(config, [prompt]))
        try:
            while not stream.ended:
                stream.add(next(tokens))
                text = stream.take()
                print(text, end="", flush=True)
                answer += text
        except KeyboardInterrupt:
            stream.end("Ctrl-C")
        print()
        word = self.checkpoint.template.said_after
        said = answer.rpartition(word)[2].lstrip() if word and word in answer else answer
        self.messages = [*messages, {"role": "assistant", "content": said}]
        report([stream], [len(prompt)], time.perf_counter() - start, self.checkpoint, config)

    def set_system(self, text: str) -> None:
        """Put the system's message before the conversation, or take it back."""
        spoken = [message for message in self.messages if message["role"] != "system"]
        self.messages = [{"role": "system", "content": text}] * bool(text) + spoken

    def begin(self, _: str = "") -> None:
        """Begin anew, with the same system's message."""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def undo(self, _: str = "") -> str:
        """Take back the last question and its answer; return the question."""
        if not self.messages or self.messages[-1]["role"] == "system":
            raise UserError("there is no question yet")
        *self.messages, question, _ = self.messages
        return question["content"]

    def save(self, path: str) -> None:
        """Append the conversation to a file of JSON lines."""
        if not path:
            raise UserError("/save takes the name of a .jsonl file")
        with open(path, "a", encoding="utf-8") as file:
            file.write(dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        note(f"appended to {path}")


def session(checkpoint: Checkpoint, config: SampleConfig) -> None:
    """Answer or continue what the user types until end of input; lines with / are commands."""
    with suppress(ImportError):  # Windows has keys of its own
        import readline  # noqa: F401 (gives input() arrow keys and pasted texts of many lines)
    chat = Chat(checkpoint) if checkpoint.template else None
    hello = "Say something" if chat else "Type a text to be continued"
    note(f"{hello}. Ctrl-C stops the model, /help lists commands, Ctrl-D ends.")
    last = ""
    while True:
        try:
            line = input("> ")
            if not sys.stdin.isatty():
                print(line)
            command, _, value = line[1:].partition(" ")
            if not line.startswith("/") or line.startswith("//"):
                text = line.removeprefix("/") if line.startswith("//") else line
            elif command == "again":
                text = chat.undo() if chat else last
            elif command == "quit":
                return
            elif chat and command in chat.commands:
                chat.commands[command](value)
                continue
            else:
                config = obey(command, value, config, chat)
                continue
            last = text
            if chat:
                chat.ask(text, config)
            else:
                prompt = encode_prompt(text, checkpoint, config)
                continue_texts(checkpoint, [text], [prompt], config)
            config = replace(config, seed=config.seed + 1)
        except KeyboardInterrupt:
            note("\nstopped by Ctrl-C")
        except (UserError, OSError) as error:
            note(f"error: {error}")
        except EOFError:
            return


def obey(command: str, value: str, config: SampleConfig, chat: Chat | None) -> SampleConfig:
    """Carry out a session's command; return the settings that it leaves."""
    if command == "help":
        note(f"{SESSION_HELP}\n{CHAT_HELP}" if chat else SESSION_HELP)
        note("\n".join(f"/{key} {getattr(config, key)}" for key in SESSION_KEYS))
        return config
    if command not in SESSION_KEYS:
        close = nearest(command, (*SESSION_KEYS, *(chat.commands if chat else ())), "/{}")
        raise UserError(f"no command /{command}{close}; /help lists them")
    changed = load(SampleConfig, [f"--{command}={value}"] if value else [])
    return replace(config, **{command: getattr(changed, command)})


def run(config: SampleConfig) -> None:
    """Print what a checkpoint makes of the prompts, or begin a session."""
    if config.seed < 0:
        config = replace(config, seed=secrets.randbelow(2**32))
    device, directory = find_device(config.device), find_checkpoint(config.ckpt)
    dtype = choose_dtype(config.dtype, device, read_config(directory).n_embd)
    if config.quantize == "int8" and config.dtype == "auto" and device.type == "cpu":
        dtype = torch.float32  # which is faster around products of 8 bits
    checkpoint = load_checkpoint(directory, device, dtype)
    model = checkpoint.model
    note(f"{directory}: {n_params(model):,} parameters, {str(dtype)[6:]} on {device}")
    if config.quantize == "int8":
        quantize_int8(model)
    asked = config.prompt or config.prompt_file or config.probs or config.json
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    in_session = not asked and (on_terminal or config.chat == "yes")
    template = choose_template(directory, checkpoint.tokenizer, config, in_session)
    checkpoint = checkpoint._replace(template=template)
    texts = [""] if in_session else read_prompts(config)
    texts = [conversation(text) for text in texts] if template else texts
    prompts = [encode_prompt(text, checkpoint, config) for text in texts]
    if config.probs:
        for ids in prompts:
            show_probabilities(model, checkpoint.tokenizer, ids)
        return
    compiled = config.compile == "yes"
    if config.compile == "auto":
        compiled = config.max_new_tokens >= COMPILE_FROM
    is_known = not in_session and config.max_new_tokens >= 0
    longest = max(map(len, prompts)) + config.max_new_tokens if is_known else 0
    decoder = prepare_decoding(model, len(texts) * config.num_samples, compiled, longest)
    checkpoint = checkpoint._replace(decoder=decoder)
    if in_session:
        session(checkpoint, config)
    else:
        continue_texts(checkpoint, texts, prompts, config)


def main() -> None:
    config = load(SampleConfig)
    if sys.stdout.encoding.lower() != "utf-8" and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # a file or a pipe gets the text as it is
    run(config)


if __name__ == "__main__":
    run_main(main)
