"""Write text with a trained model: a prompt in, text out while it is made.

Reads a Hugging Face directory of the families LLaMA, Qwen3, DeepSeek-V3 (dense) or GPT-2 with a
byte-level tokenizer.json, which every out/RUN/step_NNNNNN of train.py is. stdout is the text alone,
prompt included; the checkpoint, the seed, the speed and why the text ends go to stderr.

    python sample.py                                             a session, on a terminal
    python sample.py --prompt "To be, or not" --num_samples=3
    python sample.py --ckpt=out/tiny --prompt "ROMEO:" --temperature=0 --stop=$'\n\n'
    python sample.py --prompt_file=prompts.txt --json > answers.jsonl
    python sample.py --prompt "The quick brown" --probs
"""

import atexit
import math
import os
import secrets
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from json import dumps, loads
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from model import LLaMaTransformer, n_params
from plainllama.checkpoint import find_checkpoint
from plainllama.families import read_config
from plainllama.generate import CompiledRead, Sampling, generate, make_sampler
from plainllama.huggingface import end_of_text_ids, load_model
from plainllama.inference import prepare_decoding, quantize_int8
from plainllama.machine import Dtype, choose_dtype, find_device
from plainllama.settings import UserError, load, nearest, note, run_main
from plainllama.tokenizer import Tokenizer, load_tokenizer

COMPILE_FROM = 4000  # tokens in a row after which compiling has won back its time, on a CPU
SESSION_KEYS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
SESSION_KEYS += ("num_samples", "seed", "stop", "special_tokens")
SESSION_HELP = """\
/KEY VALUE  change a setting; /KEY alone takes it back to its default
/again      write another continuation of the last text
/more       go on from where the last text ended
/probs TEXT show the likeliest next tokens at each position of a text
/quit       end (so does Ctrl-D); Ctrl-C stops a text
A line that ends with \\ goes on in the next one; // begins a text with a slash."""


@dataclass(frozen=True)
class SampleConfig(Sampling):
    """Write text with a trained model."""

    # text
    ckpt: str = ""  # a Hugging Face directory, or a run; default: the run in out/ written last
    prompt: str = ""  # the text to continue; empty: the start of a document; -: what stdin holds
    prompt_file: str = ""  # prompts for one batch: one a line, or .jsonl with the key "prompt"
    stop: tuple[str, ...] = ()  # text at which to stop, not printed; may be given several times
    special_tokens: bool = False  # read <|im_start|> and the like in the prompt as those tokens
    # output
    json: bool = False  # print a JSON object for each sample instead of its text
    probs: bool = False  # print the likeliest next tokens at each position, and the perplexity
    # machine
    device: str = "auto"  # auto (the accelerator, else the CPU), cpu, cuda, cuda:1, mps, xpu, ...
    dtype: Dtype = "auto"  # of the weights; auto: bfloat16 where the hardware is fast at it
    quantize: Literal["none", "int8"] = "none"  # int8: faster where memory is the limit, less exact
    compile: Literal["auto", "yes", "no"] = "auto"  # auto: if so many tokens are asked for

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise UserError("stop='' would stop before the first token")


class Checkpoint(NamedTuple):
    """What it takes to continue text; the first of the end-of-text ids also begins one."""

    model: LLaMaTransformer
    tokenizer: Tokenizer
    end_of_text: list[int]
    compiled_read: CompiledRead | None = None


def load_checkpoint(directory: Path, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Read a Hugging Face directory; UserError, on one line, says what is wrong with it."""
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    model = load_model(directory, device=device, dtype=dtype).eval()
    end_of_text = end_of_text_ids(directory, tokenizer)
    V = model.config.vocab_size
    for token in (tokenizer.vocab_size - 1, *end_of_text):
        if not 0 <= token < V:
            raise UserError(f"{directory}: token {token} does not fit the model's {V} tokens")
    return Checkpoint(model, tokenizer, end_of_text)


def read_prompts(config: SampleConfig) -> list[str]:
    """Return the prompts; UserError for a file or a stdin that holds something else."""
    if config.prompt != "-" and not config.prompt_file:
        return [config.prompt]
    place = config.prompt_file or "stdin"
    try:
        data = Path(place).read_bytes() if config.prompt_file else sys.stdin.buffer.read()
        text = data.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{place} is not UTF-8 text: {error}") from error
    if not config.prompt_file:
        return [text]
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if not config.prompt_file.lower().endswith((".jsonl", ".ndjson")):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt = None
        with suppress(ValueError, TypeError, LookupError, RecursionError):
            prompt = loads(line)["prompt"]
        if not isinstance(prompt, str):
            raise UserError(f'{place}, line {number}: not a JSON object with the key "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{place} holds no prompts")
    return prompts


def encode_prompt(prompt: str, checkpoint: Checkpoint, config: SampleConfig) -> list[int]:
    """Return the prompt's tokens, after what the model expects before a text.

    An empty prompt becomes the end of text, which begins a document.
    """
    tokenizer = checkpoint.tokenizer
    ids = tokenizer.encode(prompt, config.special_tokens)
    return [*tokenizer.begin_of_text, *ids] or checkpoint.end_of_text[:1]


class TextStream:
    """Turns the tokens of one sample into text that can be printed at once.

    Held back are the bytes of a character that is not complete yet, and characters that may become
    a stop string. `ended` says why the sample is over; it is empty as long as it is not.
    """

    def __init__(self, checkpoint: Checkpoint, config: SampleConfig, ready: str = "") -> None:
        self.end_of_text, self.limit = checkpoint.end_of_text, config.max_new_tokens
        self.stop = sorted(config.stop, key=len, reverse=True)
        self.characters = checkpoint.tokenizer.stream()
        self.ready, self.held = ready, ""
        self.n_tokens = 0
        self.ended = "max_new_tokens" if self.limit == 0 else ""

    def add(self, token: int) -> None:
        """Take the next token; after the end of the sample it is ignored."""
        if self.ended:
            return
        self.n_tokens += 1
        if token in self.end_of_text:
            self.end("end of text")
            return
        for character in self.characters.step(token):
            self.held += character
            for stop in self.stop:
                if self.held.endswith(stop):
                    self.held = self.held.removesuffix(stop)
                    self.end(f"stop string {stop!r}")
                    return
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


def emphasized(text: str) -> str:
    """Return a prompt in bold on a terminal, which tells it from its continuation."""
    plain = not text or not sys.stdout.isatty() or os.environ.get("NO_COLOR")
    return text if plain else f"\033[1m{text}\033[0m"


def write_samples(checkpoint: Checkpoint, texts: list[str], config: SampleConfig) -> str:
    """Print num_samples continuations of each text, all made in one batch, then a report.

    They are printed in order: the first while it is made, the next as soon as it is over. Returns
    the last text with its continuation.
    """
    prompts = [encode_prompt(text, checkpoint, config) for text in texts]
    pick = make_sampler(config, prompts)
    limit = config.max_new_tokens if config.max_new_tokens >= 0 else sys.maxsize
    tokens = generate(
        checkpoint.model, prompts, limit, pick, config.num_samples, checkpoint.compiled_read
    )
    texts = [text for text in texts for _ in range(config.num_samples)]
    streams = [
        TextStream(checkpoint, config, "" if config.json else emphasized(text)) for text in texts
    ]
    start = time.perf_counter()
    shown, written = 0, ""  # samples that are over and printed, and the text of the current one
    while shown < len(streams):
        stream = streams[shown]
        if not config.json:
            ready = stream.take()
            written += ready
            print(ready, end="", flush=True)
        if not stream.ended:
            for each, token in zip(streams, next(tokens).tolist(), strict=True):
                each.add(token)
            continue
        shown += 1
        if config.json:
            result = {"prompt": texts[shown - 1], "text": stream.take(), "seed": config.seed}
            result |= {"n_tokens": stream.n_tokens, "ended": stream.ended}
            print(dumps(result, ensure_ascii=False), flush=True)
            continue
        written = "" if shown < len(streams) else written
        print("\n---" if shown < len(streams) else "")
    seconds = time.perf_counter() - start
    counts = [stream.n_tokens for stream in streams]
    ends = Counter(stream.ended for stream in streams)
    why = ", ".join(f"{end} ({n})" if len(streams) > 1 else end for end, n in ends.items())
    speed = f"{sum(counts):,} tokens in {seconds:.2f} s, {sum(counts) / seconds:,.0f} tokens/s"
    note(f"{speed}, seed {config.seed}; stopped by {why}")
    S, longest = checkpoint.model.config.max_seq_len, max(map(len, prompts))
    read = max(len(prompts[i // config.num_samples]) + n - 1 for i, n in enumerate(counts))
    if read > S and (longest > S or config.max_new_tokens != SampleConfig.max_new_tokens):
        note(f"longer than the context of {S} tokens: no token saw more than the {S} before it")
    return texts[-1] + written.removeprefix(emphasized(texts[-1]))


def show_probabilities(model: LLaMaTransformer, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Print the three likeliest next tokens at each position, and how likely the text is."""
    tokens = torch.tensor(ids, device=model.cos.device)[-model.config.max_seq_len :]
    with torch.inference_mode():
        log_probabilities = model(tokens[None])[0][0].float().log_softmax(-1)  # (T, V)
    for position, row in enumerate(log_probabilities):
        values, likeliest = row.exp().topk(min(3, len(row)))
        texts = [tokenizer.token_bytes(id).decode(errors="replace") for id in likeliest.tolist()]
        pairs = zip(texts, values.tolist(), strict=True)
        shown = [f"{dumps(text, ensure_ascii=False)} {p:.2f}" for text, p in pairs]
        print(f"pos {position}: {', '.join(shown)}")
    nats = -log_probabilities[:-1].gather(1, tokens[1:, None]).sum().item()
    perplexity = math.exp(min(nats / max(1, len(tokens) - 1), 700))
    print(f"log-likelihood {-nats:.2f} over {len(tokens) - 1} tokens, perplexity {perplexity:.2f}")


def session(checkpoint: Checkpoint, config: SampleConfig) -> None:
    """Continue what the user types until end of input; a line that starts with / is a command."""
    note("Type a text to be continued. Ctrl-C stops it, /help lists commands, Ctrl-D ends.")
    last = written = ""
    while True:
        try:
            line = read_text()
            command, _, value = line[1:].partition(" ")
            if not line.startswith("/") or line.startswith("//"):
                text = line.removeprefix("/") if line.startswith("//") else line
            elif command in ("again", "more"):
                text = last if command == "again" else written
            elif command == "quit":
                return
            else:
                config = obey(command, value, checkpoint, config)
                continue
            last, written = text, write_samples(checkpoint, [text], config)
            config = replace(config, seed=config.seed + 1)
        except KeyboardInterrupt:
            note("\nstopped by Ctrl-C")
        except UserError as error:
            note(f"error: {error}")
        except EOFError:
            return


def read_text() -> str:
    """Read a text from the terminal: a line, and those after it as long as they end in a \\."""
    line = input("> ")
    while line.endswith("\\"):
        line = line.removesuffix("\\") + "\n" + input("  ")
    return line


def remember_lines() -> None:
    """Give input() arrow keys, pasted texts of many lines, and a history for later sessions."""
    path = Path.home() / ".plainllama_history"
    with suppress(ImportError, OSError):  # Windows has keys of its own; there may be no history yet
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
        if os.access(path.parent, os.W_OK):
            atexit.register(readline.write_history_file, path)
        readline.read_history_file(path)


def obey(command: str, value: str, checkpoint: Checkpoint, config: SampleConfig) -> SampleConfig:
    """Carry out a session's command; return the settings that it leaves. A key may be cut short."""
    if command == "help":
        note(SESSION_HELP)
        keys = [f"/{key} {getattr(config, key)}" for key in SESSION_KEYS]
        note("\n".join(", ".join(keys[i : i + 3]) for i in range(0, len(keys), 3)))
        return config
    if command == "probs":
        show_probabilities(*checkpoint[:2], encode_prompt(value, checkpoint, config))
        return config
    keys = [key for key in SESSION_KEYS if key.startswith(command)]
    key = keys[0] if len(keys) == 1 else command
    if key not in SESSION_KEYS:
        close = nearest(command, SESSION_KEYS, "/")
        raise UserError(f"no command /{command}{close}; /help lists them")
    changed = load(SampleConfig, [f"--{key}={value}"] if value else [])
    return replace(config, **{key: getattr(changed, key)})


def main() -> None:
    config = load(SampleConfig)
    if config.seed < 0:
        config = replace(config, seed=secrets.randbelow(2**32))
    if sys.stdout.encoding.lower() != "utf-8" and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # a file or a pipe gets the text as it is
    device = find_device(config.device)
    directory = find_checkpoint(config.ckpt)
    width = read_config(directory).n_embd if config.quantize == "none" else 0
    dtype = choose_dtype(config.dtype, device, width)  # around int8 products float32 is faster
    checkpoint = load_checkpoint(directory, device, dtype)
    model = checkpoint.model
    note(f"{directory}: {n_params(model):,} parameters, {str(dtype)[6:]} on {device}")
    if config.quantize == "int8":
        quantize_int8(model)
    asked = config.prompt or config.prompt_file or config.probs or config.json
    in_session = not asked and sys.stdin.isatty() and sys.stdout.isatty()
    texts = [""] if in_session else read_prompts(config)
    pays = config.compile == "auto" and config.max_new_tokens >= COMPILE_FROM
    compiled = config.compile == "yes" or pays
    longest = 0  # tokens of a text, where they are known
    if compiled and not in_session and config.max_new_tokens >= 0:
        prompts = [encode_prompt(text, checkpoint, config) for text in texts]
        longest = max(map(len, prompts)) + config.max_new_tokens
    read = prepare_decoding(model, len(texts) * config.num_samples, compiled, longest)
    checkpoint = checkpoint._replace(compiled_read=read)
    if in_session:
        remember_lines()
        session(checkpoint, config)
    elif config.probs:
        for text in texts:
            show_probabilities(*checkpoint[:2], encode_prompt(text, checkpoint, config))
    else:
        write_samples(checkpoint, texts, config)


if __name__ == "__main__":
    run_main(main)
