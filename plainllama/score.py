"""How likely a model finds given texts: each of its tokens, or the choices of a question.

Multiple choice as lm-evaluation-harness (lm_eval) does it: a question is a context and choices, the
model's answer is the choice that it finds likeliest after the context and one space. Read is a
.jsonl file with a question a line:

    {"context": "The capital of France is", "choices": ["Rome.", "Paris."], "answer": 1}
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from model import LLaMaTransformer
from plainllama.settings import UserError, fits
from plainllama.tokenizer import Tokenizer, encode

LOGITS = 2**26  # of a batch, at most, if it has more than one row


@dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which of these does."""

    context: str
    choices: list[str]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a .jsonl file; UserError names the line that holds none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        context = choices = answer = None
        with suppress(ValueError, TypeError, LookupError, RecursionError):
            record = json.loads(line)
            context, choices, answer = record["context"], record["choices"], record["answer"]
        sound = isinstance(context, str) and isinstance(choices, list) and len(choices) > 1
        sound = sound and all(isinstance(choice, str) and choice for choice in choices)
        if not (sound and fits(answer, int) and 0 <= answer < len(choices)):
            wanted = 'a JSON object with "context", "choices" (texts) and "answer" (from 0 on)'
            raise UserError(f"{path}, line {number}: not {wanted}")
        questions.append(Question(context, choices, answer))
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, begin: list[int]
) -> tuple[list[int], list[int]]:
    """Return the tokens of a context, and those that follow when the continuation does.

    Spaces at the context's end belong to what follows, as in text that was read in training. An
    empty context becomes `begin`.
    """
    if not context:
        return begin, encode(tokenizer, continuation)
    kept = context.rstrip()
    before = [*tokenizer.begin_of_text, *encode(tokenizer, kept)] or begin
    whole = [*tokenizer.begin_of_text, *encode(tokenizer, context + continuation)]
    return before, whole[len(before) if kept or tokenizer.begin_of_text else 0 :]


@torch.inference_mode()
def log_likelihoods(
    model: LLaMaTransformer, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[float]:
    """Return ln p(continuation | context) of each pair of token lists.

    Of what is longer than the model's context, the beginning is not seen. ValueError if a
    continuation alone is.
    """
    S, V, device = model.config.max_seq_len, model.config.vocab_size, model.cos.device
    if (longest := max(len(continuation) for _, continuation in pairs)) > S:
        raise UserError(f"a choice has {longest:,} tokens, more than the context of {S:,}")
    rows = [(context + continuation)[-S - 1 :] for context, continuation in pairs]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # like lengths beside each other
    found = [0.0] * len(rows)
    while order:
        T = len(rows[order[0]]) - 1
        count = max(1, LOGITS // (T * V))
        batch, order = order[:count], order[count:]
        tokens = torch.zeros(len(batch), T + 1, dtype=torch.long)  # padding comes after, unseen
        for row, i in enumerate(batch):
            tokens[row, : len(rows[i])] = torch.tensor(rows[i])
        tokens = tokens.to(device)
        log_p = model(tokens[:, :-1])[0].float().log_softmax(-1)  # (B, T, V)
        of_tokens = log_p.gather(2, tokens[:, 1:, None])[..., 0]  # (B, T)
        for row, i in enumerate(batch):
            end = len(rows[i]) - 1
            found[i] = of_tokens[row, end - len(pairs[i][1]) : end].double().sum().item()
    return found


def answer_questions(
    model: LLaMaTransformer, tokenizer: Tokenizer, questions: Sequence[Question], begin: list[int]
) -> list[list[float]]:
    """Return the log-likelihood of each choice of each question, in nats."""
    pairs = [
        encode_pair(tokenizer, question.context, " " + choice, begin)
        for question in questions
        for choice in question.choices
    ]
    nats = iter(log_likelihoods(model, pairs))
    return [[next(nats) for _ in question.choices] for question in questions]


def accuracies(questions: Sequence[Question], nats: list[list[float]]) -> dict[str, float]:
    """Return the part of questions that are answered right, by lm_eval's names.

    acc takes the likeliest choice, acc_norm the one of the greatest log-likelihood per character,
    acc_bytes per byte.
    """
    lengths = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
    right = dict.fromkeys(lengths, 0)
    for question, values in zip(questions, nats, strict=True):
        for name, length in lengths.items():
            each = [v / length(c) for v, c in zip(values, question.choices, strict=True)]
            right[name] += each.index(max(each)) == question.answer
    return {name: count / len(questions) for name, count in right.items()}


def score(
    model: LLaMaTransformer, tokenizer: Tokenizer, begin: list[int], path: str, as_json: bool
) -> None:
    """Print how many of a file's questions are answered right; as JSON, each choice's nats too."""
    questions = read_questions(Path(path))
    nats = answer_questions(model, tokenizer, questions, begin)
    figures = accuracies(questions, nats)
    if as_json:
        for question, values in zip(questions, nats, strict=True):
            print(json.dumps({"answer": question.answer, "log_likelihoods": values}))
        print(json.dumps({"questions": len(questions)} | figures))
        return
    deviation = [math.sqrt(p * (1 - p) / max(1, len(questions) - 1)) for p in figures.values()]
    named = zip(figures.items(), deviation, strict=True)
    shown = [f"{name} {value:.4f} ± {error:.4f}" for (name, value), error in named]
    print(f"{len(questions):,} questions: {', '.join(shown)}")


def show_probabilities(model: LLaMaTransformer, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Print the three likeliest next tokens at each position, and how likely the text is."""
    tokens = torch.tensor(ids, device=model.cos.device)[-model.config.max_seq_len :]
    with torch.inference_mode():
        log_probabilities = model(tokens[None])[0][0].float().log_softmax(-1)  # (T, V)
    for position, row in enumerate(log_probabilities):
        values, likeliest = row.exp().topk(min(3, len(row)))
        texts = [tokenizer.token_bytes(id).decode(errors="replace") for id in likeliest.tolist()]
        pairs = zip(texts, values.tolist(), strict=True)
        shown = [f"{json.dumps(text, ensure_ascii=False)} {p:.2f}" for text, p in pairs]
        print(f"pos {position}: {', '.join(shown)}")
    nats = -log_probabilities[:-1].gather(1, tokens[1:, None]).sum().item()
    perplexity = math.exp(min(nats / max(1, len(tokens) - 1), 700))
    print(f"log-likelihood {-nats:.2f} over {len(tokens) - 1} tokens, perplexity {perplexity:.2f}")
