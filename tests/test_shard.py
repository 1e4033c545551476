"""Sharded training: the same run as without, whatever the processes, and the same checkpoints."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import GPT2, LATENT, ROOT
from several import SCRIPT, TINY, finish, free_ports, launch, start
from training import OPTIMIZER, distance, losses, run_train

from plainllama.checkpoint import checkpoints, step_of
from plainllama.data import load_dataset, read_batch
from plainllama.metrics import read_metrics, val_losses

FILES = ("model.safetensors", OPTIMIZER)


@pytest.fixture
def arguments(data_dir, tmp_path):
    """The function that returns a run's arguments, by the name of its directory."""

    def made(name: str, *more: str) -> list[str]:
        return [*TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path / name}", *more]

    return made


def flags(settings: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


# --- the same run ---

SHARDED = "--shard=all"
AGAIN = "--activation_checkpointing"
UNCLIPPED = {"adamw": ["--grad_clip=0"], "muon": ["--grad_clip=0", "--optimizer=muon"]}
NARROW = ["--dtype=bfloat16", "--lr=1e-3"]
FOUR_PARTS = ["--tokens_per_step=128", "--lr=1e-3"]
BY_TWO = {  # runs of two processes, by name
    **{f"{name}, none": more for name, more in UNCLIPPED.items()},
    **{f"{name}, all": [*more, SHARDED] for name, more in UNCLIPPED.items()},
    "none": [],
    "all": [SHARDED],
    "none, recomputed": [AGAIN],
    "all, recomputed": [AGAIN, SHARDED],
    "all, loss in parts": [AGAIN, SHARDED, "--chunked_loss"],
    "bfloat16, none": NARROW,
    "bfloat16, all": [*NARROW, SHARDED],
    "2x2": FOUR_PARTS,
    "2x2, all": [*FOUR_PARTS, SHARDED],
}
# Muon computes in float32, so that nothing but the order of sums differs.
EXACT = "from plainllama import muon\nmuon.multiplies_bf16 = lambda: False\n" + SCRIPT
UNEVEN = {
    "Llama, tied": {"hidden_dim": 67, "n_embd": 40, "optimizer": "muon"},
    "GPT-2": GPT2 | {"hidden_dim": 67, "n_embd": 40},
    "DeepSeek-V3": LATENT | {"tie_embeddings": False, "optimizer": "muon"},
}
FEWER = ["--eval_tokens=16", "--eval_interval=2", "--sample_interval=3", "--snapshots=3"]
FEWER += ["--tokens_per_step=96", "--checkpoint_interval=2"]


def launched(n: int, runs: dict[str, list[str]], data_dir: Path, folder: Path, **options) -> Path:
    """Do runs on n processes that start once; return the folder in which each has its own."""
    places = [f"--out_dir={folder / name}" for name in runs]
    words = [
        [*TINY, f"--data_dir={data_dir}", place, *more]
        for place, more in zip(places, runs.values(), strict=True)
    ]
    (folder / "printed").write_text(launch(n, *words, **options), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def by_two(data_dir, tmp_path_factory) -> Path:
    return launched(2, BY_TWO, data_dir, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def by_three(data_dir, tmp_path_factory) -> Path:
    """Runs of three processes, as above: the uneven ones and that of few evaluations."""
    uneven = ["--tokens_per_step=96", "--lr=1e-3", "--batch_size=2"]
    runs = {name: [*flags(settings), *uneven] for name, settings in UNEVEN.items()}
    runs["fewer"] = FEWER
    runs |= {f"{name}, all": [*more, SHARDED] for name, more in runs.items()}
    return launched(3, runs, data_dir, tmp_path_factory.mktemp("three"), script=EXACT)


@pytest.mark.parametrize("name", UNCLIPPED)
def test_sharded_processes_learn_bit_for_bit_what_whole_ones_do(by_two, name):
    whole, sharded = by_two / f"{name}, none", by_two / f"{name}, all"
    for file in FILES:
        assert distance(whole, sharded, file) == 0
    assert losses(whole) == losses(sharded)


def test_a_clipped_gradient_and_recomputed_blocks_change_nothing_but_rounding(by_two):
    assert distance(by_two / "none", by_two / "all") < 1e-6
    assert distance(by_two / "none", by_two / "none, recomputed") == 0
    assert distance(by_two / "all", by_two / "all, recomputed") == 0
    # AdamW divides a gradient that rounding alone decides by its own size, so single weights may
    # go another way; the losses differ by their rounding.
    in_parts = losses(by_two / "all, loss in parts")
    assert losses(by_two / "all") == pytest.approx(in_parts, rel=16 * 2**-23)


def test_micro_steps_processes_and_shards_make_up_the_same_steps(by_two, data_dir, tmp_path):
    run_train(data_dir, tmp_path / "1x4", *TINY, *FOUR_PARTS)
    assert len(losses(tmp_path / "1x4")) == 6
    for name in ("2x2", "2x2, all"):
        assert losses(tmp_path / "1x4") == pytest.approx(losses(by_two / name), abs=1e-5)


def test_bfloat16_shards_follow_bfloat16_autocast(by_two):
    sharded = losses(by_two / "bfloat16, all")
    assert losses(by_two / "bfloat16, none") == pytest.approx(sharded, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNEVEN)
def test_three_processes_share_rows_that_do_not_divide(by_three, name):
    whole, sharded = by_three / name, by_three / f"{name}, all"
    assert distance(whole, sharded) < 1e-5
    assert losses(whole) == pytest.approx(losses(sharded), abs=1e-5)


@pytest.mark.slow
def test_fewer_evaluation_windows_than_processes_and_samples_do_not_hang(by_three):
    printed = (by_three / "printed").read_text(encoding="utf-8")
    assert printed.count("--- sample after step 3") == 2
    found = [val_losses(by_three / name) for name in ("fewer", "fewer, all")]
    assert found[0].keys() == {2, 4, 6} and found[0] == pytest.approx(found[1], abs=1e-5)
    assert distance(by_three / "fewer", by_three / "fewer, all") < 1e-5
    assert len(list((by_three / "fewer, all/snapshots").iterdir())) == 3


@pytest.mark.slow
def test_two_nodes_of_two_processes_learn_what_four_processes_do(arguments, tmp_path):
    more = ["--optimizer=muon", "--tokens_per_step=256", "--lr=1e-3", "--max_steps=4"]
    launch(
        4,
        arguments("none", *more),
        arguments("all", *more, "--shard=all"),
        arguments("node", *more, "--shard=node"),
        script=EXACT,
        per_node=2,
    )
    assert distance(tmp_path / "none", tmp_path / "all") < 1e-5
    assert distance(tmp_path / "all", tmp_path / "node") < 1e-5
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "node"), abs=1e-5)


ORTHOGONAL = """
import torch, torch.distributed as dist
from plainllama.distributed import join, make_mesh
from plainllama.muon import newton_schulz, orthogonal
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
join()
mesh = make_mesh("node", "cpu")
copies = [Replicate()] * (mesh.ndim - 1)
for count in (1, 2, 3, 5, 8):
    for shape in ((7, 4), (4, 7), (2, 5), (9, 9), (67, 40)):
        matrices = torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
        like = distribute_tensor(matrices[0], mesh, [*copies, Shard(0)])
        of_rows = [*copies, Shard(1)]
        mine = distribute_tensor(matrices, mesh, of_rows).to_local()
        expected = distribute_tensor(newton_schulz(matrices), mesh, of_rows).to_local()
        found = orthogonal(mine, like)
        assert torch.equal(found, expected), (mesh, count, shape)
print(mesh.ndim)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("n", "per_node", "axes"), [(3, 3, "1"), (4, 2, "2")])
def test_sharded_matrices_are_made_orthogonal_bit_for_bit_as_whole_ones(n, per_node, axes):
    assert launch(n, [], script=ORTHOGONAL, per_node=per_node) == f"{axes}\n"


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--activation_checkpointing", "--chunked_loss"], []])
def test_compiled_blocks_follow_eager_ones(arguments, tmp_path, more):
    more = [*more, "--shard=all", "--max_steps=3", "--dtype=float32", "--n_layers=1"]
    launch(2, arguments("eager", *more), arguments("compiled", *more, "--compile"))
    assert losses(tmp_path / "eager") == pytest.approx(losses(tmp_path / "compiled"), abs=1e-5)


def test_tokens_and_targets_of_a_single_window_share_no_memory(data_dir):
    where = load_dataset(data_dir), "val", np.zeros(1, dtype=np.int64), 16, torch.device("cpu")
    tokens, targets = read_batch(*where)
    before = tokens.clone()
    targets[:] = -100
    assert torch.equal(tokens, before)


# --- checkpoints ---

SAVE_AGAIN = """
import json, os, sys
from dataclasses import replace
import torch, train
from plainllama.start import choose_start
from plainllama.distributed import join
from plainllama.machine import set_up_machine
from plainllama.run import Run
from plainllama.settings import read_arguments
from plainllama.terminal import StopSignal
for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    join()
    given = read_arguments(train.TrainConfig, [*arguments, "--resume", "--max_steps=4"])
    config, start = choose_start(train.TrainConfig, *given)
    machine = set_up_machine(config)
    config, data = train.fit_to_data(config, start, machine)
    model = train.build_model(config, start, machine)
    optimizers = train.make_optimizers(model, config)
    config = replace(config, out_dir=f"{config.out_dir}-{machine.world_size}-{config.shard}")
    run = Run(config, start, data, machine, StopSignal())
    step = run.begin(model, optimizers)
    run.save(step, model, optimizers)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""


def test_any_number_of_processes_reads_what_any_other_wrote_bit_for_bit(arguments, tmp_path):
    more = ["--optimizer=muon", "--hidden_dim=67", "--max_steps=3"]  # with AdamW for the embedding
    launch(2, arguments("run", "--shard=all", *more, "--tokens_per_step=192"))
    resume = [f"--out_dir={tmp_path / 'run'}", "--batch_size=1"]
    for n, shards in ((1, ["none"]), (2, ["none", "all"]), (3, ["all"]), (4, ["node"])):
        again = [[*resume, f"--shard={shard}"] for shard in shards]
        launch(n, *again, script=SAVE_AGAIN, per_node=2 if n == 4 else n)
        for shard in shards:
            for file in FILES:
                assert distance(tmp_path / "run", tmp_path / f"run-{n}-{shard}", file) == 0


def test_a_run_goes_on_with_other_processes_and_other_sharding(arguments, tmp_path):
    half, whole = ["--max_steps=6", "--checkpoint_interval=3"], ["--lr=1e-3"]
    launch(2, arguments("none", *half, *whole), arguments("all", *half, *whole, "--shard=all"))
    for run in ("none", "all"):
        shutil.rmtree(tmp_path / run / "step_000006")
        shutil.copytree(tmp_path / run, tmp_path / f"{run} by one")
    to = {"none": "all", "all": "none"}
    launch(2, *[[f"--out_dir={tmp_path / run}", "--resume", f"--shard={to[run]}"] for run in to])
    alone = ["--resume", "--shard=none", "--batch_size=4"]
    launch(1, *[[f"--out_dir={tmp_path / f'{run} by one'}", *alone] for run in to])
    for run in ("all", "none by one", "all by one"):
        assert distance(tmp_path / "none", tmp_path / run) < 1e-5


FULL_FOR_SNAPSHOTS = """
import errno, os
from plainllama import tensors
save_file = tensors.save_file
def refuse(given, path, **options):
    if "snapshots" in path.parts:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save_file(given, path, **options)
tensors.save_file = refuse
"""


def test_a_snapshot_that_the_first_process_cannot_write_holds_up_no_other(arguments, tmp_path):
    more = ["--shard=all", "--max_steps=4"]
    launch(2, arguments("whole", *more))
    script = FULL_FOR_SNAPSHOTS + SCRIPT
    results = finish(start(2, arguments("full", *more, "--snapshots=3"), script=script))
    assert [code for code, _, _ in results] == [0, 0]
    assert results[0][2].count("warning: ") == 3 and results[1][2].count("warning: ") == 0
    assert not list(tmp_path.glob("full/snapshots/*"))
    for file in FILES:
        assert distance(tmp_path / "whole", tmp_path / "full", file) == 0


@pytest.mark.parametrize(
    ("n", "shard"), [(1, "none"), pytest.param(2, "all", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_runs_killed_at_random_and_resumed_end_bit_identical(arguments, tmp_path, n, shard, kills):
    steps = 15 * kills
    more = [f"--shard={shard}", f"--max_steps={steps}", "--optimizer=muon", "--batch_size=1"]
    more += ["--checkpoint_interval=3", "--eval_interval=7", "--eval_tokens=64"]
    launch(n, arguments("whole", *more))
    draw, killed = random.Random(0), 0
    for _ in range(3 * kills):
        restarted = {"TORCHELASTIC_MAX_RESTARTS": "9"}  # so that --resume also begins the run
        workers = start(n, arguments("killed", *more, "--resume"), **restarted)
        enough = draw.choice([1, 2, 3]) + len(losses(tmp_path / "killed"))
        while len(losses(tmp_path / "killed")) < enough and workers[0].poll() is None:
            time.sleep(0.005)
        time.sleep(draw.random() / 20)
        if killed < kills and workers[0].poll() is None:
            killed += 1
            for worker in workers:
                worker.kill()
        if [code for code, _, _ in finish(workers)] == [0] * n:
            break
    assert killed == kills
    for file in FILES:
        assert distance(tmp_path / "whole", tmp_path / "killed", file) == 0
    assert [r["step"] for r in read_metrics(tmp_path / "killed") if "loss" in r] == [
        *range(1, steps + 1)
    ]
    assert val_losses(tmp_path / "whole") == val_losses(tmp_path / "killed")


# --- what ends a run ---

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
MANY = ["--shard=all", "--max_steps=400", "--checkpoint_interval=20"]


def wait_for_steps(run: Path, count: int) -> None:
    """Return when the run has logged so many steps."""
    end = time.time() + 60
    while len(losses(run)) < count and time.time() < end:
        time.sleep(0.02)
    assert len(losses(run)) >= count


def test_a_stop_signal_to_one_process_stops_all_after_the_same_step(arguments, tmp_path):
    workers = start(2, arguments("run", *MANY))
    wait_for_steps(tmp_path / "run", 5)
    workers[1].send_signal(signal.SIGTERM)
    results = finish(workers)
    assert [code for code, _, _ in results] == [0, 0]
    assert "stopped after step" in results[0][1]
    assert len(losses(tmp_path / "run")) == step_of(checkpoints(tmp_path / "run")[-1])


def test_a_process_that_is_killed_ends_the_others_with_one_line(arguments, tmp_path):
    workers = start(2, arguments("run", *MANY))
    wait_for_steps(tmp_path / "run", 2)
    workers[1].kill()
    (code, _, errors), _ = finish(workers)
    assert code == 2 and errors.startswith("error: lost the other processes")
    assert errors.count("\n") == 1 and "--resume goes on from the last checkpoint" in errors


def worker_of(parent: int) -> int:
    """The id of a child process, the last that was started."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return int(children.read_text().split()[-1])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 10])
def test_torchrun_restarts_a_run_whose_worker_was_killed_and_it_ends_the_same(
    arguments, tmp_path, kills
):
    more = ["--shard=all", f"--max_steps={25 * kills + 15}", "--checkpoint_interval=10"]
    launch(2, arguments("whole", *more))
    restarting = [*TORCHRUN, f"--max-restarts={kills}", str(ROOT / "train.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(
        [*restarting, *arguments("killed", *more), "--resume"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        for number in range(1, kills + 1):
            wait_for_steps(tmp_path / "killed", 25 * number)
            os.kill(worker_of(launcher.pid), signal.SIGKILL)
        _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    for file in FILES:
        assert distance(tmp_path / "whole", tmp_path / "killed", file) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_stop_signal_to_torchrun_saves_the_run_and_leaves_no_process(arguments, tmp_path):
    with subprocess.Popen(
        [*TORCHRUN, str(ROOT / "train.py"), *arguments("run", *MANY)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        wait_for_steps(tmp_path / "run", 5)
        worker = worker_of(launcher.pid)
        launcher.terminate()
        said, _ = launcher.communicate(timeout=60)
    assert "stopped after step" in said and "torchrun --nproc_per_node=2" in said
    assert not Path(f"/proc/{worker}").exists()
    assert len(losses(tmp_path / "run")) == step_of(checkpoints(tmp_path / "run")[-1])


def refusals(results: list[tuple[int, str, str]]) -> str:
    """The one line that all processes printed together; all have ended with exit code 2."""
    assert [code for code, _, _ in results] == [2] * len(results)
    said = [line for *_, errors in results for line in errors.splitlines()]
    assert len(said) == 1, said
    return said[0]


def test_a_process_that_does_not_come_is_said_in_one_line(arguments):
    impatient = f"""
from datetime import timedelta
from plainllama import distributed
distributed.PATIENCE = timedelta(seconds=2)
{SCRIPT}"""
    said = refusals(finish(start(2, arguments("x"), script=impatient, first=1)))
    assert "rank 0 of 2 did not meet the others" in said and "Timed out" in said


@pytest.mark.slow
def test_a_message_that_comes_while_a_process_ends_does_not_abort_it():
    script = """
import atexit
atexit.register(sum, range(300_000_000))  # keeps the GIL, then Python's end begins
import time
import torch
import torch.distributed as dist
from plainllama.distributed import ended_at_once, join

with ended_at_once():
    join()
    holds_the_group = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    time.sleep(1.5 * dist.get_rank())
    tensor = torch.zeros(1)
    dist.broadcast(tensor, src=1, async_op=True)
"""
    port, both = free_ports(1)[0], []
    for rank in range(2):
        place = {"RANK": f"{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        place |= {"MASTER_PORT": f"{port}", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        both.append(subprocess.Popen([sys.executable, "-c", script], env=os.environ | place))
    assert [process.wait(60) for process in both] == [0, 0]


def test_a_port_that_is_in_use_is_said_in_one_line(arguments):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        script = SCRIPT.replace("str(port)", f"'{port}'")
        said = refusals(finish(start(2, arguments("x"), script=script, first=1)))
    assert "rank 0 of 2 did not meet the others" in said and "address already in use" in said


def test_sharding_without_other_processes_is_refused(arguments):
    assert "torchrun --nproc_per_node" in refusals(finish(start(1, arguments("x", "--shard=all"))))


@pytest.mark.parametrize(
    "more, part",
    [
        (["--shard=node"], "error: shard=node needs as many processes on every node"),
        (["--tokens_per_step=65"], "error: tokens_per_step=65 is no multiple of 96"),
        (["--data_dir=nowhere"], "error: no prepared data in nowhere"),
    ],
)
def test_what_all_processes_refuse_is_said_once(arguments, more, part):
    settings = [*arguments("x", "--tokens_per_step=96"), *more]
    assert part in refusals(finish(start(3, settings, per_node=2)))


def test_a_loss_that_is_not_finite_ends_all_processes_at_the_same_step(arguments, tmp_path):
    more = ["--shard=all", "--lr=1e30", "--grad_clip=0"]
    results = finish(start(2, arguments("x", *more)))
    assert [code for code, _, _ in results] == [2, 2]
    steps = {error.partition("not finite at ")[2].partition(":")[0] for *_, error in results}
    assert len(steps) == 1 and min(steps).startswith("step ")


def test_nodes_with_other_settings_or_data_are_refused(arguments, tmp_path):
    settings = "import os\nlr = 2e-3 if os.environ['RANK'] == '1' else 1e-3\n"
    (tmp_path / "settings.py").write_text(settings, encoding="utf-8")
    changed = [word for word in arguments("x") if not word.startswith("--lr=")]
    said = refusals(finish(start(2, [str(tmp_path / "settings.py"), *changed])))
    assert said.startswith("error: rank 1 on ") and "has another lr than rank 0" in said
    assert "(0.002, not 0.001)" in said
    patched = SCRIPT.replace(
        "for port",
        "import dataclasses\nfit = train.fit_to_data\n"
        "def fit_to_data(*given):\n"
        "    config, data = fit(*given)\n"
        "    return config, dataclasses.replace(data, sha256={'train.bin': os.environ['RANK']})\n"
        "train.fit_to_data = fit_to_data\nfor port",
    )
    said = refusals(finish(start(2, arguments("x"), script=patched)))
    assert "has another data than rank 0" in said


# --- memory ---

# The C library would keep what it is given back, in pieces that fit nothing else: -3 is
# M_MMAP_THRESHOLD, which MALLOC_MMAP_THRESHOLD_ sets for a process that is started.
MEASURED = f"""
import ctypes
ctypes.CDLL(None).mallopt(-3, 65536)
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
import torch, torch.distributed.fsdp, train
from plainllama import tensors
tensors.LARGEST_FILE = 20_000_000  # one file at a time is in memory whole
before = peak()
{SCRIPT}
print("peak", peak() - before, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.slow
def test_two_processes_need_little_more_than_half_the_memory_each(arguments):
    shape = {"n_layers": 24, "n_embd": 576, "n_heads": 9}
    more = [*flags(shape), "--max_steps=2", "--batch_size=1", "--tokens_per_step=32"]
    peaks = []
    for n, shard in ((1, "none"), (2, "all")):
        run = arguments(shard, *more, "--eval_tokens=16", f"--shard={shard}")
        results = finish(start(n, run, script=MEASURED), 300)
        assert [code for code, _, _ in results] == [0] * n, results[0][2]
        peaks.append(max(int(out.rpartition("peak ")[2]) for _, out, _ in results))
    print(f"peak of one {peaks[0] / 1e6:.2f} GB, of each of two {peaks[1] / 1e6:.2f} GB")
    assert peaks[1] <= 0.62 * peaks[0]
