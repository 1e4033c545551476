"""The processes of a run: joining them, and agreeing on what was read, refused and found.

torchrun starts them. What can differ between them, or between their machines, is asked here, so
that all go on with the same, or all end with one line from the first.
"""

import hashlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from plainllama.settings import UserError, read_arguments

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
PATIENCE = timedelta(minutes=30)  # for a process that others wait for: longer than saving takes


def joined() -> bool:
    """Tell whether this process is one of several that can speak to each other."""
    return dist.is_available() and dist.is_initialized()


def of_several() -> bool:
    """Tell whether this process was started together with others, or by torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 or "TORCHELASTIC_RUN_ID" in os.environ


def join() -> None:
    """Join the other processes if there are any, and take a device of one's own."""
    if not of_several() or joined():
        return
    device = torch.accelerator.current_accelerator(check_available=True)
    kind = device.type if device else "cpu"
    backend = {"cuda": "nccl", "xpu": "xccl"}.get(kind)
    with_it = backend and getattr(dist, f"is_{backend}_available")()
    try:
        dist.init_process_group(
            f"cpu:gloo,{kind}:{backend}" if with_it else "gloo", timeout=PATIENCE
        )
    except (dist.DistError, RuntimeError) as error:
        rank, size, host = (os.environ.get(k) for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"rank {rank} of {size} did not meet the others at {host}: {reason}"
        ) from None


def first_alone(look: Callable[[], T]) -> T:
    """Return in all processes what `look` returns in the first, which alone calls it.

    What it refuses ends all of them.
    """
    if not joined():
        return look()
    answer: list[Any] = [None, "it ended"]
    try:
        if dist.get_rank() == 0:
            answer = [look(), None]
    except (UserError, OSError) as error:
        answer = [None, str(error)]
    finally:  # also when it ended otherwise, or the others would wait
        dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[1] is not None:
        end_all(answer[1])
    return answer[0]


def agreed(call: Callable[[], T]) -> T:
    """Return what `call` returns here, if it is refused in no process; else all end."""
    if not joined():
        return call()
    result, refusal = None, None
    try:
        result = call()
    except (UserError, OSError) as error:
        refusal = str(error)
    refusals: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal)
    found = [(rank, text) for rank, text in enumerate(refusals) if text is not None]
    if found:
        rank, text = found[0]
        end_all(text if rank == 0 else f"{text} (rank {rank})")
    return result


@contextmanager
def lost_in_one_line() -> Iterator[None]:
    """Make a UserError of what the others see when a process ends or does not come in time."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not joined() or not re.search(r"timed out|connection (closed|reset)|peer", text, re.I):
            raise
        raise UserError(
            f"lost the other processes ({text[-100:]}): the one to look at is the rank that does "
            "not say this, or said something before; --resume goes on from the last checkpoint"
        ) from None


def end_all(reason: str) -> None:
    """End this process, with exit code 2; the first says why. All processes call this."""
    if dist.get_rank() == 0:
        raise UserError(reason)
    sys.exit(2)


@contextmanager
def ended_at_once() -> Iterator[None]:
    """End a process of several as its content ends, with its exit code but without Python's end.

    gloo's threads outlive their group where DDP or a mesh holds it, and one that lets go of a
    tensor while Python ends would abort the process, up to Python 3.13 (pytorch/pytorch#190489).
    """
    code: Any = 0
    try:
        yield
    except SystemExit as end:
        code = end.code or 0
    if of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def check_equal(what: dict[str, Any]) -> None:
    """End all processes, with one line, unless each of `what` is the same in all of them."""
    if not joined():
        return
    mine = socket.gethostname(), {key: str(value) for key, value in what.items()}
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    first_host, first = theirs[0]
    for rank, (host, values) in enumerate(theirs):
        for key in first | values:
            shown, other = (found.get(key, "none")[:60] for found in (first, values))
            if first.get(key) != values.get(key):
                end_all(
                    f"rank {rank} on {host} has another {key} than rank 0 on {first_host} "
                    f"({other}, not {shown}): all processes of a run must have the same"
                )


def check_start(cls: type) -> None:
    """End all processes unless all were started with the same settings of `cls`, and code."""
    if joined():
        files, flags = agreed(lambda: read_arguments(cls))
        code = {"code": hash_of_code(), "version of torch": torch.__version__}
        check_equal(files | flags | code)


def hash_of_code() -> str:
    """Return the hex digest of the files that a training run is made of."""
    paths = [ROOT / "train.py", ROOT / "model.py", *sorted((ROOT / "plainllama").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
