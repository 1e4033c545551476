"""A session of sample.py: a line is a text to continue or a question to answer, or a command."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from json import dumps

from plainllama.chat import Messages
from plainllama.generation import KeptCache, Sampling
from plainllama.settings import load, nearest
from plainllama.terminal import UserError, note

SETTINGS = (*(field.name for field in fields(Sampling)), "stop", "special_tokens")
HELP = """\
/KEY VALUE  change a setting; /KEY alone takes it back to its default
/again      generate another continuation of the last text
/quit       end (so does Ctrl-D); Ctrl-C stops a text
// begins a text with a slash; pasted texts may have many lines."""
CHAT_HELP = """
/system TEXT  say what the model is to be; /system alone takes it back
/undo         take back the last question and its answer; /again answers it anew
/new          begin a new conversation
/save FILE    append the conversation to a .jsonl, which prepare.py reads"""


class Session:
    """What the user types is continued, each text by itself, or answered in one conversation."""

    def __init__(
        self,
        config: Sampling,
        answer: Callable[[str | Messages, Sampling, KeptCache], str],
        is_chat: bool,
    ) -> None:
        """Begin with these settings; `answer` prints what follows a text or messages."""
        self.config, self.answer, self.is_chat = config, answer, is_chat
        self.last, self.system = "", ""
        self.turns: Messages = []
        self.kept = KeptCache()
        self.commands = {"help": self.help, "again": self.again}
        self.settings = [key for key in SETTINGS if key != "num_samples" or not is_chat]
        if is_chat:
            self.commands |= {"system": self.set_system, "undo": self.undo}
            self.commands |= {"new": self.begin, "save": self.save}

    @property
    def messages(self) -> Messages:
        """The conversation so far."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.turns

    def obey(self, line: str) -> None:
        """Carry out a command, which begins with a slash, or say what follows a text."""
        command, _, value = line[1:].partition(" ")
        if not line.startswith("/") or line.startswith("//"):
            self.say(line.removeprefix("/"))
        elif command in self.commands:
            self.commands[command](value)
        elif command in self.settings:
            changed = load(type(self.config), [f"--{command}={value}"] if value else [])
            self.config = replace(self.config, **{command: getattr(changed, command)})
        else:
            close = nearest(command, (*self.settings, *self.commands), "/{}")
            raise UserError(f"no command /{command}{close}; /help lists them")

    def say(self, text: str) -> None:
        """Let a text be continued, or a question be answered in the conversation."""
        self.last, question = text, {"role": "user", "content": text}
        prompt = [*self.messages, question] if self.is_chat else text
        config = self.config.seeded()
        self.config = replace(config, seed=config.seed + 1)  # also where Ctrl-C ends the text
        said = self.answer(prompt, config, self.kept)
        if self.is_chat:
            self.turns += [question, {"role": "assistant", "content": said}]

    def help(self, _: str) -> None:
        """List the commands, and the settings as they are."""
        note(HELP + CHAT_HELP if self.is_chat else HELP)
        note("\n".join(f"/{key} {getattr(self.config, key)}" for key in self.settings))

    def again(self, _: str) -> None:
        """Continue the last text, or answer the last question, once more."""
        turns = self.turns
        if self.is_chat:
            self.undo()
        try:
            self.say(self.last)
        except BaseException:  # then the answer that was there stays
            self.turns = turns
            raise

    def set_system(self, text: str) -> None:
        self.system = text

    def begin(self, _: str) -> None:
        self.turns = []

    def undo(self, _: str = "") -> None:
        """Take back the last question and its answer."""
        if not self.turns:
            raise UserError("there is no question yet")
        *self.turns, question, _ = self.turns
        self.last = question["content"]

    def save(self, path: str) -> None:
        """Append the conversation to a file of JSON lines."""
        if not path:
            raise UserError("/save takes the name of a .jsonl file")
        if not self.messages:
            raise UserError("there is nothing to save yet")
        with open(path, "a", encoding="utf-8") as file:
            file.write(dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        note(f"appended to {path}")


def talk(session: Session) -> None:
    """Obey what the user types until end of input; Ctrl-C stops the model alone."""
    with suppress(ImportError):  # Windows has keys of its own
        import readline  # gives input() arrow keys

        readline.parse_and_bind("set enable-bracketed-paste on")  # a paste of many lines is one
    hello = "Say something" if session.is_chat else "Type a text to be continued"
    note(f"{hello}. Ctrl-C stops the model, /help lists commands, Ctrl-D ends.")
    while True:
        try:
            line = input("> ")
            if not sys.stdin.isatty():
                print(line)
            if line.strip() == "/quit":
                return
            session.obey(line)
        except KeyboardInterrupt:
            note("\nstopped by Ctrl-C")
        except (UserError, OSError) as error:
            note(f"error: {error}")
        except EOFError:
            print()  # the prompt has a line of its own
            return
