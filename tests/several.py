"""Runs in processes of their own, one or several that speak to each other, without torchrun.

What they import takes seconds: a server imports it once, and forks them.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from contextlib import ExitStack
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

ROOT = Path(__file__).parent.parent
SCRIPT = """
import json, os, sys
import torch, train
for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = ["train.py", *arguments]
    train.run_main(train.main)
"""
SMALL = ["--n_layers=2", "--n_embd=32", "--n_heads=2", "--max_seq_len=16", "--batch_size=4"]
SMALL += ["--tokens_per_step=64", "--max_steps=12", "--warmup_steps=2", "--lr=1e-2"]
SMALL += ["--eval_interval=0", "--eval_tokens=320", "--checkpoint_interval=4"]
SMALL += ["--log_interval=1", "--device=cpu", "--no-compile"]
TINY = [*SMALL, "--batch_size=2", "--max_steps=6", "--checkpoint_interval=0"]
CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if CAN_FORK else "spawn")
IMPORTED = ["train", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"]
CONTEXT.set_forkserver_preload(IMPORTED)


class Worker:
    """A process that executes a script, with one argument; what it prints goes to files."""

    def __init__(self, script: str, argument: str, environment: dict[str, str]) -> None:
        self.printed = TemporaryDirectory()
        given = script, argument, environment, self.printed.name
        self.process = CONTEXT.Process(target=work, args=given, daemon=True)
        self.process.start()
        self.kill = self.process.kill

    def poll(self) -> int | None:
        """Return its exit code if it has ended."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def output(self) -> list[str]:
        """Return what it has printed to stdout and to stderr."""
        paths = [Path(self.printed.name, name) for name in ("stdout", "stderr")]
        return [path.read_text(encoding="utf-8") if path.exists() else "" for path in paths]


def work(script: str, argument: str, environment: dict[str, str], printed: str) -> None:
    """Do what a Worker is for, in its process."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(printed, name), os.O_WRONLY | os.O_CREAT), number)
    os.environ |= environment
    torch.set_num_threads(1)
    sys.argv = ["-c", argument]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start(
    n: int,
    *runs: list[str],
    per_node: int = 0,
    script: str = SCRIPT,
    first: int = 0,
    **environment: str,
) -> list[Worker]:
    """Start n processes, or the `first` of n, which do one run after the other."""
    ports = free_ports(len(runs))
    shared = {"OMP_NUM_THREADS": "1"} | environment
    if n > 1:
        shared |= {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(per_node or n)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    arguments = json.dumps(list(zip(ports, runs, strict=True)))
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
        if CAN_FORK:
            forkserver.ensure_running()  # once
        return [
            Worker(script, arguments, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(first or n)
        ]


def wait_for(worker: Worker, words: str) -> None:
    """Return when a process has printed `words`."""
    while words not in worker.output()[0]:
        assert worker.poll() is None, worker.output()
        time.sleep(0.01)


def finish(workers: list[Worker], timeout: int = 300) -> list[tuple[int | None, str, str]]:
    """Wait for processes; return each one's exit code and what it printed.

    One that has not ended after `timeout` seconds is killed, and has None for its code.
    """
    end = time.monotonic() + timeout
    for worker in workers:
        worker.process.join(max(0, end - time.monotonic()))
    codes = [worker.poll() for worker in workers]
    for worker in workers:
        worker.kill()
    return [(code, *worker.output()) for code, worker in zip(codes, workers, strict=True)]


def launch(n: int, *runs: list[str], **options) -> str:
    """Do runs on n processes, one after the other; return what the first printed."""
    results = finish(start(n, *runs, **options))
    assert [code for code, _, _ in results] == [0] * n, "\n".join(err for *_, err in results)
    return results[0][1]
