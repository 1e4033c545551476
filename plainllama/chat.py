"""Conversations: records become messages, messages become ids, and a mask says which are learned.

    conversation_of(record)                a record's messages
    find_template(directory, tokenizer)    the chat template of a Hugging Face directory
    Template.encode(conversations)         ids and mask of each conversation
    Template.prompt(messages)              the ids after which the model answers
    Template.pieces()                      what a page needs to write the same ids

A chat template is a Jinja program that writes a conversation as one string. To tell its own text
from that of messages, each content is replaced by a private word, and what the template writes
around these words is its own. Its text alone is read with special tokens: what a message writes
like one stays text, so that nobody can end a turn, or begin one, by writing its mark.
"""

import functools
import itertools
import json
import os
import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from plainllama.encoding import Encoder, tokenizers_encoder
from plainllama.settings import read_json
from plainllama.terminal import UserError
from plainllama.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
CONVERSATION_KEYS = ("messages", "conversations", "instruction", "input", "output", "system")
OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's names
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Messages = list[dict[str, str]]  # each with the keys role and content
Learn = Literal["assistant", "all"]
Ids = tuple[np.ndarray, np.ndarray]  # ids, and which of them are learned


# Records


def is_conversation(keys: set[str]) -> bool:
    """Tell whether a record with these keys is a conversation."""
    return bool({"messages", "conversations"} & keys) or {"instruction", "output"} <= keys


def conversation_of(record: Any) -> Messages:
    """Return the messages of a record; ValueError says what is wrong with it.

    It has the key `messages` (role, content), ShareGPT's `conversations` (from, value), or Alpaca's
    `instruction`, `input` and `output`.
    """
    if not isinstance(record, dict) or not is_conversation(record.keys()):
        keys = list(record)[:9] if isinstance(record, dict) else repr(record)[:60]
        raise ValueError(f"no messages, conversations or instruction and output in {keys}")
    turns = record.get("messages", record.get("conversations"))
    if turns is None and "instruction" in record:
        parts = filter(None, (record["instruction"], record.get("input")))
        asked = {"role": "user", "content": "\n\n".join(map(str, parts))}
        turns = [asked, {"role": "assistant", "content": record.get("output")}]
        if record.get("system"):
            turns.insert(0, {"role": "system", "content": record["system"]})
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"its messages are {repr(turns)[:60]}")
    return [message_of(turn, number) for number, turn in enumerate(turns, 1)]


def message_of(turn: Any, number: int) -> dict[str, str]:
    """Return a turn of a record as a message; ValueError if it is not of a role that is read."""
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} is {repr(turn)[:60]}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(f"message {number} calls tools, which is not read")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = OTHER_ROLES.get(str(role), role)
    if role not in ROLES:
        raise ValueError(f"message {number} is of the role {role!r}, not one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number} is no text but {repr(content)[:60]}")
    return {"role": role, "content": content}


def conversation_text(record: Any) -> str:
    """Return a record's messages as JSON on one line, always written the same way."""
    return json.dumps(conversation_of(record), ensure_ascii=False)


# Templates


class Encoded(NamedTuple):
    """A conversation as ids, each learned or not; without any, `reason` says why there are none."""

    ids: np.ndarray  # (T,), uint32
    learned: np.ndarray  # (T,), bool
    reason: str = ""
    edges: bool = False  # white space at the edge of a content, where transformers' ids may differ


class Template:
    """A chat template, and the tokenizer that reads what it writes.

    source      the Jinja program
    words       bos_token and the like, which it may write
    date        what it takes for now if it asks for it; `is_dated` says whether it has
    end         the id that ends an answer
    opening     the ids with which a later turn of the user begins; none if contents may hold them
    said_after  the word after which an answer is what is said; empty: all of it is
    """

    def __init__(self, source: str, tokenizer: Tokenizer, words: dict[str, str]) -> None:
        """Compile the program and see how it writes turns; UserError where that cannot be told."""
        self.source, self.tokenizer, self.words = source, tokenizer, words
        self.date, self.is_dated = datetime.now(), False
        self.program = self.compile()
        # To contents, each added token that the template may write is special, and so not there.
        added = [token | {} for token in tokenizer.settings["added_tokens"]]
        for token in added:
            is_written = token["content"] in source and not token["content"].isspace()
            token["special"] = token["special"] or is_written
        settings = tokenizer.settings | {"added_tokens": added}
        self.plain = Tokenizer(json.dumps(settings).encode(), tokenizer.end_name)
        self.around = functools.lru_cache(4096)(self.find_around)
        self.frames = functools.lru_cache(4096)(self.find_frames)
        self.look_at_turns()

    def compile(self) -> Any:
        """Return the program, to be run in Jinja's sandbox as transformers runs it."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals |= {"raise_exception": refuse, "strftime_now": self.write_date}
        # These tags tell transformers what is learned; here they have no meaning.
        source = re.sub(r"({%-?\s*)generation(?=\s*-?%})", r"\1if true", self.source)
        source = re.sub(r"({%-?\s*)endgeneration(?=\s*-?%})", r"\1endif", source)
        try:
            return environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the chat template is damaged: {error}") from error

    @property
    def settings(self) -> dict[str, str]:
        """What tokenizer_config.json says of it."""
        return {**self.words, "chat_template": self.source}

    def write_date(self, form: str) -> str:
        """Return the date in the form that the template asks for, the same at every call."""
        self.is_dated = True
        return self.date.strftime(form)

    def look_at_turns(self) -> None:
        """Find `end`, `said_after` and `opening` in conversations of one and two exchanges."""
        added = self.tokenizer.added.keys()
        # The ids before a question, between it and its answer, after that; and which are learned.
        _, (before, thought), (after, learned) = self.frames(ROLES[1:], False)
        self.end = int(after[learned][-1])
        words = [id for id in before[thought].tolist() if id in added]
        self.said_after = self.tokenizer.added[words[-1]].content if words else ""
        _, _, (between, _), *_ = self.frames(2 * ROLES[1:], False)  # an answer, another question
        between = between.tolist()
        opening = between[len(os.path.commonprefix([between, after.tolist()])) :]
        self.opening = opening if added & set(opening) else []
        # The word that ends an answer is the eos_token, unless the template means another by that.
        told, written = self.words, self.render(PROBE)
        self.words = told | {"eos_token": self.tokenizer.added[self.end].content}
        if self.render(PROBE) != written:
            self.words = told
        # SentencePiece's space before a text, or a template's before a content, joins the content.
        (encoded,) = self.encode([PROBE], tokenizers_encoder(self.plain))
        if self.tokenizer.encode(written, special_tokens=True) != encoded.ids.tolist():
            raise UserError("the chat template's text and a message's share tokens")

    def render(self, messages: Messages, asks: bool = False) -> str:
        """Return a conversation as one string; with `asks`, up to where the model answers."""
        try:
            return self.program.render(
                messages=messages, add_generation_prompt=asks, tools=None, **self.words
            )
        except Exception as error:  # whatever the program of others does
            raise UserError(f"the chat template fails: {error}") from error

    def find_around(self, roles: tuple[str, ...], asks: bool) -> list[str]:
        """Return what the template writes before, between and after contents of these roles."""
        words = [f"\ue000{number}\ue001" for number in range(len(roles))]
        pairs = zip(roles, words, strict=True)
        text = self.render([{"role": role, "content": word} for role, word in pairs], asks)
        around = re.split("|".join(words), text) if words else [text]
        if re.findall("\ue000[0-9]+\ue001", text) != words:
            raise UserError("the chat template does not write each content once, in order")
        return around

    def find_frames(self, roles: tuple[str, ...], asks: bool) -> list[Ids]:
        """Return the ids of what is around contents of these roles, and which are learned.

        They are what follows the generation prompt before an answer, and all up to the first added
        token after it.
        """
        frames = []
        for number, text in enumerate(self.around(roles, asks)):
            ids = self.tokenizer.encode(text, special_tokens=True)
            learned = np.zeros(len(ids), bool)
            if "assistant" in roles[:number][-1:]:
                ends = [place for place, id in enumerate(ids) if id in self.tokenizer.added]
                if not ends:
                    raise UserError("the chat template has no added token that ends an answer")
                learned[: ends[0] + 1] = True
            if "assistant" in roles[number : number + 1]:
                asked = self.around(roles[:number], True)[-1]
                thought = self.tokenizer.encode(text.removeprefix(asked), special_tokens=True)
                if not text.startswith(asked) or ids[len(ids) - len(thought) :] != thought:
                    raise UserError("the chat template's answers do not follow its question")
                learned[len(ids) - len(thought) :] = True
            frames.append((np.array(ids, np.uint32), learned))
        return frames

    def shown(self, messages: Messages, asks: bool = False) -> list[str]:
        """Return contents as the template writes them: some lose white space at their edges.

        What it writes is compared with the frames and these contents, joined.
        """
        text, place, shown = self.render(messages, asks), 0, []
        contents = ["", *(message["content"] for message in messages)]
        for content, after in zip(contents, self.around(roles_of(messages), asks), strict=True):
            forms = content, content.strip(), content.lstrip("\n"), content.strip("\n")
            form = next((form for form in forms if text.startswith(form + after, place)), None)
            if form is None:
                break
            place += len(form + after)
            shown.append(form)
        if place != len(text) or len(shown) != len(contents):
            raise UserError("the chat template changes a content")
        return shown[1:]

    def encode(
        self, conversations: list[Messages], encoder: Encoder, learn: Learn = "assistant"
    ) -> list[Encoded]:
        """Return the ids of conversations; `encoder` reads their contents, as `plain` does.

        Learned are the answers, each to its end, or everything but the first id.
        """
        parts = [self.parts(messages) for messages in conversations]
        rows = iter(encoder([text.encode() for _, texts, _ in parts for text in texts]))
        found = []
        for messages, (frames, texts, reason) in zip(conversations, parts, strict=True):
            spans = [(NO_IDS, NO_IDS.astype(bool)), *frames[:1]]
            for message, after in zip(messages, frames[1:], strict=not reason):
                ids = next(rows)
                spans += [(ids, np.full(len(ids), message["role"] == "assistant")), after]
            ids, learned = (np.concatenate(span) for span in zip(*spans, strict=True))
            if learn == "all":
                learned = np.arange(len(ids)) > 0
            edges = any(text != text.strip() for text in texts)
            found.append(Encoded(ids, learned, reason, edges))
        return found

    def parts(self, messages: Messages) -> tuple[list[Ids], list[str], str]:
        """Return the frames and the contents of a conversation, or why there are none."""
        try:
            return self.frames(roles_of(messages), False), self.shown(messages), ""
        except UserError as error:
            return [], [], str(error)

    def prompt(self, messages: Messages) -> list[int]:
        """Return the ids of a conversation, up to where the model answers."""
        contents = self.shown(messages, True)
        before, *frames = (ids.tolist() for ids, _ in self.frames(roles_of(messages), True))
        for content, after in zip(contents, frames, strict=True):
            before += self.plain.encode(content) + after
        return before

    def fit(self, messages: Messages, room: int, context: int) -> tuple[list[int], int]:
        """Return the ids of a prompt, and how many exchanges it left out to have at most `room`.

        They are the first, after the system's message. UserError if the last alone has more than
        the context.
        """
        left_out = 0
        while len(ids := self.prompt(messages)) > room:
            asked = [number for number, one in enumerate(messages) if one["role"] == "user"]
            if len(asked) < 2:
                break
            system = [one for one in messages[:1] if one["role"] == "system"]
            messages = system + messages[asked[1] :]
            left_out += 1
        if len(ids) >= context:
            raise UserError(f"the message takes {len(ids):,} tokens of a context of {context:,}")
        return ids, left_out

    def pieces(self) -> dict[str, Any]:
        """Return what a page needs to write prompts as `prompt` does, as JSON.

        frames      by who speaks before and after, "user answer" for example: the ids between
                    them; a prompt goes from "begin" to "answer"
        strips      the roles whose contents lose white space at their edges
        as_text     the added tokens that are text where a message writes them
        said_after  as above

        UserError where the two roles do not decide what is between them. If they do not after a
        system's message alone, there are no pieces for one.
        """
        found = self.add_pieces({}, ())
        with suppress(UserError):
            found = self.add_pieces(found, ("system",))
        strips = [role for role in ROLES if found.pop(role, EDGED) != EDGED]
        as_text = sorted(self.plain.special - self.tokenizer.special)
        pieces = {"frames": found, "strips": strips, "as_text": as_text}
        return pieces | {"said_after": self.said_after}

    def add_pieces(self, found: dict[str, Any], first: tuple[str, ...]) -> dict[str, Any]:
        """Return `frames`, and EDGED as each role has it, also of prompts that begin so."""
        found = found.copy()
        for turns in range(1, 4):
            roles = (*first, *(turns * ROLES[1:])[:-1])
            names = map(" ".join, itertools.pairwise(("begin", *roles, "answer")))
            ids = [frame.tolist() for frame, _ in self.frames(roles, True)]
            shown = self.shown([{"role": role, "content": EDGED} for role in roles], True)
            if not {*shown} <= {EDGED, EDGED.strip()}:
                raise UserError("the chat template strips some white space of contents")
            for key, piece in zip((*names, *roles), (*ids, *shown), strict=True):
                if found.setdefault(key, piece) != piece:
                    raise UserError("the chat template does not write all turns alike")
        return found


NO_IDS = np.empty(0, np.uint32)
PROBE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "You"}]
EDGED = "\n x \n"


def roles_of(messages: Messages) -> tuple[str, ...]:
    """Return who speaks, message by message."""
    return tuple(message["role"] for message in messages)


def refuse(reason: str) -> None:
    """Let a template refuse a conversation."""
    raise ValueError(reason)


def find_template(directory: Path, tokenizer: Tokenizer) -> Template | None:
    """Return the chat template of a Hugging Face directory; None if it has none."""
    path, beside = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    settings = read_json(beside) if beside.is_file() else {}
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {str(one.get("name")): one.get("template") for one in source}.get("default")
    if path.is_file():
        source = path.read_text(encoding="utf-8", errors="replace")
    if source is None:
        return None
    if not isinstance(source, str):
        raise UserError(f"{beside} is damaged: its chat_template is {repr(source)[:60]}")
    begin_word = tokenizer.token_bytes(tokenizer.begin_id).decode()
    words = {"bos_token": begin_word, "eos_token": tokenizer.end_name} | settings
    words = {key: value for key, value in words.items() if key.endswith("_token")}
    words = {k: v.get("content") if isinstance(v, dict) else v for k, v in words.items()}
    return Template(source, tokenizer, {k: v for k, v in words.items() if isinstance(v, str)})
