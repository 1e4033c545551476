"""What befalls a stage while packages are imported: Ctrl-C, SIGTERM, and one that is missing.

Each stage imports this module before all others, which take seconds.
"""

import os
import re
import signal
import sys
from types import TracebackType

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def show(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """Show what nobody caught: with its traceback, if it is a fault of the project's."""
    line, code = "stopped by Ctrl-C", 130
    ours = re.search("'plainllama|cannot import name", str(error))
    if issubclass(kind, ImportError) and not ours:
        way_out = "source .venv/bin/activate, or pip install -r requirements.txt"
        line, code = f"error: {error} ({sys.executable}): {way_out}", 2
    elif issubclass(kind, MemoryError):
        line, code = "error: out of memory while packages were imported", 2
    elif not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print(line, file=sys.stderr, flush=True)
    os._exit(code)


started = os.path.abspath(getattr(sys.modules["__main__"], "__file__", ""))
if os.path.dirname(started) == ROOT:  # a stage, not a notebook or a test
    sys.excepthook = show
    if os.getpid() == 1:  # as in run_main, which then takes care of what was written
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
