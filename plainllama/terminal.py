"""Printing above a progress bar, and how a stage ends: what is no bug becomes one line.

run_main(main)     call a stage's main; UserError, Ctrl-C and a lack of memory become one line
StopSignal         ends a run after its step on Ctrl-C and other signals
say(text)          a line on stdout, above the progress bar
note(text)         a line on stderr
command(*words)    a command that the user can run as it stands
"""

import errno
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
# What a terminal obeys, but tabs and line ends: controls, and what turns the direction of text.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
NO_MEMORY = re.compile(
    "out of memory|allocat.* memory|not enough memory|bad_alloc|ALLOC_FAILED|start new thread", re.I
)
PATH_ERRORS = {  # what is wrong with a path, where the system's words do not say what was meant
    errno.EEXIST: "is a file, and a directory is needed",
    errno.ENOTDIR: "leads through a file, and a directory is needed",
    errno.EISDIR: "is a directory, and a file is needed",
    errno.ENOENT: "cannot be found, or made",
}


class UserError(ValueError):
    """A mistake of the user's: shown as one line, the exit code is 2."""


def run_main(main: Callable[[], None]) -> None:
    """Call a stage's `main`; what is no bug becomes one line on stderr and exit code 2.

    The code is 130 after Ctrl-C, and 141 where a reader of stdout has gone.
    """
    set_up_output()
    if os.getpid() == 1:  # in a container, where a signal that is not asked for does nothing
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed stdout: nothing more to say, as in any filter
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = explain(error)
        if not line:
            raise
        rank = f" (rank {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        print(f"error{rank}: {line}", file=sys.stderr)
        sys.exit(2)


class StopSignal(ExitStack):
    """Notes the first signal of NAMES and says so; a second Ctrl-C ends the process.

    Used as a context, inside which `listen` begins: until then a signal ends the process as ever,
    and until there is a step to save it does so with a line. Its end undoes what the run has taken.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # SLURM sends the last; Windows lacks two

    def __init__(self) -> None:
        super().__init__()
        self.came = self.stepping = False

    def listen(self, saved: Callable[[], object]) -> None:
        """Begin to listen for a run; `saved` returns its last checkpoint, to be named."""
        self.saved = saved
        for name in self.NAMES:
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self.callback(signal.signal, number, signal.signal(number, self.receive))

    def receive(self, number: int, frame: object) -> None:
        """Act on a signal."""
        if not self.stepping:
            tell("stopped before the first step, with nothing to save")
            os._exit(128 + number)
        if self.came:
            return
        self.came = True
        second = "torchrun itself ends with a traceback and exit code 1"
        # torchrun passes on what the terminal has sent to all processes already.
        if "LOCAL_WORLD_SIZE" not in os.environ:
            second = f"Ctrl-C again quits now, last checkpoint: {self.saved()}"
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which needs no turn of Python's
        tell(f"stopping after this step, then saving; {second}")


def tell(text: str) -> None:
    """Write a line to stderr at once, whatever else is being printed, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{text}\n".encode())


def explain(error: Exception) -> str:
    """Return one line on what the user did or the machine lacks; nothing for a bug of ours."""
    text = str(error)
    if is_out_of_memory(error):
        text = f"out of memory ({text[:160]}): ask for less, or close other programs"
    elif isinstance(error, OSError) and error.filename:
        # What is called so for a time only.
        path = re.sub(r"\.tmp-|\.partial(/new)?(?=/|$)", "", str(error.filename))
        flags = {word.partition("=")[2]: word for word in sys.argv[1:]}
        named = (flags[value] for value in flags if value and f"{path}/".startswith(f"{value}/"))
        text = f"{next(named, path)} {PATH_ERRORS.get(error.errno, error.strerror)}"
    elif not isinstance(error, UserError | OSError):
        return ""
    return printable(" ".join(text.split()))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory was lacking: Python's, NumPy's, or that of one of PyTorch's devices."""
    says_so = isinstance(error, RuntimeError | OSError) and NO_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(says_so)


def printable(text: str) -> str:
    """Return a text of which a terminal obeys nothing: names in it may be a stranger's."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def command(*words: object, program: str = "python") -> str:
    """Return a command that works as it stands: a program of this Python's environment, quoted.

    A word that names a file of the project is found from other directories, too.
    """
    folder = Path(sys.executable).parent
    if program == "torchrun" and not (folder / program).exists():
        return command("-m", "torch.distributed.run", *words)
    if not (folder / program).exists():  # it is python3 alone
        program = Path(sys.executable).name
    found = shutil.which(program)
    if not found or not os.path.samefile(Path(found).parent, folder):
        program = os.path.relpath(folder / program)
    names = [str(word) for word in words]
    elsewhere = {name for name in names if os.path.isfile(ROOT / name) and not os.path.exists(name)}
    return shlex.join([program, *(str(ROOT / n) if n in elsewhere else n for n in names)])


def set_up_output() -> None:
    """Make sure that nothing printed can fail: no character, and no stream that is closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def say(text: str) -> None:
    """Print a line on stdout, above the progress bar, in the first process only.

    When stdout is gone or full, a run that listens to signals is asked to save and to end.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.raise_signal(signal.SIGTERM)


def note(text: str) -> None:
    """Tell the user something that is no part of the output, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def warning(what: str) -> Iterator[None]:
    """Make a warning of what a disk refuses inside, where the rest can do without it."""
    try:
        yield
    except OSError as error:
        note(f"warning: {what}: {error.strerror or error}")
