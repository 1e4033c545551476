"""Runs of several processes on this machine, without torchrun's own start-up."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = """
import json, os, sys
import torch, train
for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = ["train.py", *arguments]
    train.run(train.main)
"""
TINY = [
    "--n_layers=2",
    "--n_embd=32",
    "--n_heads=2",
    "--max_seq_len=16",
    "--batch_size=2",
    "--tokens_per_step=64",
    "--max_steps=6",
    "--warmup_steps=2",
    "--lr=1e-2",
    "--eval_interval=0",
    "--eval_tokens=320",
    "--checkpoint_interval=0",
    "--log_interval=1",
    "--device=cpu",
    "--no-compile",
]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def start(
    n: int, *runs: list[str], per_node: int = 0, script: str = SCRIPT, **environment: str
) -> list[subprocess.Popen]:
    """Start n processes, which do one run after the other, each with its arguments."""
    ports = free_ports(len(runs))
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    shared |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(per_node or n)} | environment
    shared["MASTER_PORT"] = str(ports[0])
    arguments = json.dumps(list(zip(ports, runs, strict=True)))
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, arguments],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]


def finish(processes: list[subprocess.Popen], timeout: int = 120) -> list[tuple[int, str, str]]:
    """Wait for processes; return each one's exit code and what it printed."""
    try:
        done = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, done, strict=True)]


def launch(n: int, *runs: list[str], **options) -> str:
    """Do runs on n processes, one after the other; return what the first printed."""
    results = finish(start(n, *runs, **options))
    assert [code for code, _, _ in results] == [0] * n, "\n".join(err for *_, err in results)
    return results[0][1]
