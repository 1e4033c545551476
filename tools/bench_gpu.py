"""Measure all that only a GPU can show, in one call of at most nine minutes.

    python tools/bench.py gpu --json=gpu.json
    python tools/bench.py gpu --rehearse          every row on the CPU, with small models

Each row is a process of its own with a time limit, so that a failure costs one row; it says why.
Rows come in the order of what matters most, and those that the nine minutes have no room for are
named. Tokens are random numbers, for speed does not depend on what they say.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where the stages are

from model import LLaMaTransformer, ModelConfig  # noqa: E402
from plainllama.checkpoint import write_json  # noqa: E402
from plainllama.data import Dataset  # noqa: E402
from plainllama.generate import generate  # noqa: E402
from plainllama.inference import prepare_decoding  # noqa: E402
from plainllama.machine import # noqa: E402     Machine, compile_for_training, set_up_machine
from model import flops_per_token, n_params
from plainllama.settings import UserError, load  # noqa: E402
from train import TrainConfig, first_loss, make_optimizers, step_batches, take_step  # noqa: E402

V = 50_304  # ids: GPT-2's, padded as nanoGPT pads them
SHAPES = {
    "124M": {"n_layers": 12, "n_embd": 768, "n_heads": 12, "max_seq_len": 1024, "batch_size": 32},
    "350M": {"n_layers": 24, "n_embd": 1024, "n_heads": 16, "max_seq_len": 2048, "batch_size": 8},
    "1.1B": {"n_layers": 22, "n_embd": 2048, "n_heads": 16, "max_seq_len": 2048, "batch_size": 4}
    | {"n_kv_heads": 4, "multiple_of": 256},
}
SMALL = {"n_layers": 1, "n_embd": 32, "n_heads": 2, "n_kv_heads": 0, "max_seq_len": 16}
SMALL |= {"batch_size": 2, "multiple_of": 32}
MUON = {"optimizer": "muon"}


@dataclass(frozen=True)
class GpuBench:
    """Measure training and decoding on a GPU."""

    # bench
    device: str = "cuda"  # the device to measure
    against: str = ""  # a clone of nanoGPT to measure beside
    minutes: float = 9.0  # for all rows; what finds no time is not measured
    rehearse: bool = False  # run each row's code on the CPU, with small models
    json: str = ""  # a file for all figures


def rows_of(config: GpuBench, folder: Path) -> dict[str, tuple[int, list]]:
    """Return each row's command and its limit in seconds, the most important rows first."""
    rows: dict[str, tuple[int, list]] = {}

    def add(name: str, limit: int, what: str, **settings: Any) -> None:
        given = {"what": what, "device": config.device, "folder": str(folder), **settings}
        if config.rehearse:
            given |= {"device": "cpu", "rehearse": True}
            limit = 600  # this is not about time
        rows[name] = limit, [sys.executable, __file__, json.dumps(given)]

    add("loss, CPU, eager, fp32", 60, "losses", on="cpu", dtype="float32")
    add("loss, GPU, eager, fp32", 40, "losses", dtype="float32")
    add("loss, GPU, compiled, fp32", 60, "losses", dtype="float32", compiled=True)
    add("loss, GPU, eager, bf16", 40, "losses")
    for kernel in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        add(f"loss, GPU, {kernel}", 40, "losses", kernel=kernel)
    add("124M, compiled, cold", 150, "speed", shape="124M", compiled=True)
    add("124M, decoding 1 text", 90, "decode", shape="124M", batch=1)
    add("124M, decoding 64 texts", 90, "decode", shape="124M", batch=64)
    add("124M, compiled, warm", 80, "speed", shape="124M", compiled=True)
    if config.against:
        add("nanoGPT, 124M, compiled", 120, "peer", against=config.against)
    data, stage = folder / "bytes", [sys.executable, ROOT / "train.py", "--log_interval=1"]
    stage += [f"--data_dir={data}", "--no-compile", "--max_steps=20", "--eval_tokens=64"]
    stage += ["--checkpoint_interval=10", "--batch_size=4", "--tokens_per_step=256"]
    stage += ["--n_layers=2", "--n_embd=64", "--n_heads=4", "--max_seq_len=32"]
    device = "cpu" if config.rehearse else config.device
    one = [*stage, f"--device={device}"]
    add("resume after 10 of 20 steps", 60, "resume", command=[*map(str, one)])
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for n in (1, 2):  # two on one device: NCCL may refuse, and the row then says so
        place = f"--device={'cpu' if config.rehearse else f'{config.device}:0'}"
        shared = [*stage[1:], place, "--shard=all", f"--out_dir={folder / f'shared{n}'}"]
        rows[f"sharded over {n} on one device"] = (
            600 if config.rehearse else 60,
            [*several, f"--nproc_per_node={n}", *shared],
        )
    add("350M, compiled", 150, "speed", shape="350M", compiled=True)
    add("1.1B, compiled by block", 150, "speed", shape="1.1B", compiled=True, by_block=True)
    add("124M, compiled, Muon", 80, "speed", shape="124M", compiled=True, **MUON)
    add("124M, eager", 60, "speed", shape="124M")
    add("1.1B, decoding 1 text", 90, "decode", shape="1.1B", batch=1)
    add("1.1B, decoding 64 texts", 90, "decode", shape="1.1B", batch=64)
    return rows


def bench_gpu(arguments: list[str]) -> None:
    """Run all rows, print each as it comes, and write the figures."""
    config = load(GpuBench, arguments)
    end = time.monotonic() + 60 * config.minutes
    if not config.rehearse:
        name = torch.cuda.get_device_name(config.device) if torch.cuda.is_available() else ""
        if not name:
            raise UserError("there is no CUDA device here; --rehearse runs all rows on the CPU")
        print(f"{name}, torch {torch.__version__}", flush=True)
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ids = np.random.default_rng(0).integers(vocabulary(config.rehearse), size=4_000_000)
        ids.astype(np.uint16).tofile(folder / "train.bin")
        (folder / "text.txt").write_text("the cat sees a dog. " * 2000, encoding="utf-8")
        prepare = [ROOT / "prepare.py", "text.txt", "--tokenizer=byte", "--out=bytes"]
        rows = {"prepare.py": (60, [sys.executable, *prepare])} | rows_of(config, folder)
        # A cache of its own, cold at first, on the host's CPU as well.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
        losses = {row: call for row, call in rows.items() if row.startswith("loss")}
        with ThreadPoolExecutor(1 if config.rehearse else len(losses)) as at_once:  # not timed
            begun = {
                row: at_once.submit(measured, command, limit, folder, environment)
                for row, (limit, command) in losses.items()
            }
        for row, (limit, command) in rows.items():
            left = end - time.monotonic()
            if row in begun:
                results[row] = begun[row].result()
            elif left > 5:
                results[row] = measured(command, min(limit, left), folder, environment)
            else:
                results[row] = {"not measured": "the time was up"}
            shown = {key: short(value) for key, value in results[row].items()}
            print(f"{row:30s} {', '.join(f'{k} {v}' for k, v in shown.items())}", flush=True)
            if config.json:  # at once: what follows may be cut off
                write_json(Path(config.json), {"settings": asdict(config), "rows": results})
    reference = results["loss, CPU, eager, fp32"].get("losses")
    for row, result in results.items():
        if reference and result.get("losses"):
            apart = max(abs(a - b) for a, b in zip(reference, result["losses"], strict=True))
            result["largest distance to the CPU"] = apart
            print(f"{row:30s} losses of 20 steps at most {apart:.2e} from the CPU's")
    if config.json:
        write_json(Path(config.json), {"settings": asdict(config), "rows": results})
    if config.rehearse and (failed := [row for row in results if "failed" in results[row]]):
        raise UserError(f"these rows failed: {', '.join(failed)}")


def measured(command: list, limit: float, folder: Path, environment: dict) -> dict[str, Any]:
    """Run a row; return what its last line says, or why there is none."""
    start = time.monotonic()
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    call = [*map(str, command)]
    # A group of its own, so that the processes that torchrun starts end with it.
    with subprocess.Popen(call, cwd=folder, env=environment, start_new_session=True, **how) as row:
        try:
            said, _ = row.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(row.pid, 9)
            said, _ = row.communicate()
            return {"failed": f"longer than {limit:.0f} s: {' '.join(said.split())[-300:]}"}
    seconds = {"seconds": time.monotonic() - start}
    if row.returncode:
        lines = said.splitlines()
        told = [
            line
            for line in lines
            if line.startswith(("error", "terminate"))
            or ("Error: " in line and "ChildFailedError" not in line)  # torchrun's says no reason
        ]
        return {"failed": " ".join(" ".join(told or lines[-20:]).split())[:2000]} | seconds
    last = said.splitlines()[-1] if said else ""
    return (json.loads(last) if last.startswith("{") else {"said": last[:80]}) | seconds


def short(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]:.4f} … {value[-1]:.4f}"
    return (
        f"{value:,.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:,.0f}"
        if (isinstance(value, float | int))
        else str(value)
    )


def vocabulary(rehearse: bool) -> int:
    """Return how many ids there are."""
    return 512 if rehearse else V


def read_row(row: dict) -> tuple[Dataset, TrainConfig, Machine]:
    """Return the data, the settings and the machine of a row that trains."""
    shape = SHAPES[row.get("shape", "124M")]
    if row["what"] == "losses":
        shape |= {"n_layers": 4, "batch_size": 4, "max_seq_len": 256}
    shape |= SMALL if row.get("rehearse") else {}
    device, dtype = row.get("on", row["device"]), row.get("dtype", "auto")
    options = {"optimizer": row.get("optimizer", "adamw"), "warmup_steps": 5, "device": device}
    n_ids = vocabulary(row.get("rehearse", False))
    config = TrainConfig(vocab_size=n_ids, lr=6e-4, dtype=dtype, max_steps=1000, **shape, **options)
    config = replace(config, tokens_per_step=config.batch_size * config.max_seq_len)
    data = Dataset(Path(row["folder"]), "uint16", n_ids, {"train": 4_000_000}, {}, {}, {})
    (data.data_dir / "val.bin").touch()  # which is opened, too
    return data, config, set_up_machine(device, dtype, config.n_embd, False)


def set_up(row: dict) -> tuple:
    """Return what take_step takes: model, optimizers, data, settings and machine."""
    data, config, machine = read_row(row)
    torch.manual_seed(0)
    model = LLaMaTransformer(config).to(machine.device)
    if row.get("compiled"):
        call = lambda: first_loss(model, data, config, machine)  # noqa: E731
        compile_for_training(model, call, machine, row.get("by_block", False))
    return model, make_optimizers(model, config), data, config, machine


def time_steps(step: Callable[[int], Tensor], row: dict, on_gpu: bool) -> float:
    """Return the seconds that a step takes, after three that warm up."""
    for n in range(1, 4):
        step(n).item()
    steps = 2 if row.get("rehearse") else 15
    return timed(lambda: [step(n) for n in range(4, 4 + steps)], on_gpu) / steps


def measure_losses(row: dict) -> dict[str, Any]:
    """Return the losses of 20 steps."""
    model, *rest = set_up(row)
    kernel = row.get("kernel")
    if row.get("rehearse") and kernel == "CUDNN_ATTENTION":
        kernel = "FLASH_ATTENTION"  # the CPU has no other
    with sdpa_kernel([getattr(SDPBackend, kernel)]) if kernel else nullcontext():
        losses = [take_step(step, model, *rest)[0].item() for step in range(20)]
    return {"losses": losses}


def measure_speed(row: dict) -> dict[str, Any]:
    """Return tokens a second, MFU, peak memory, the start, and the optimizers' part of a step."""
    start = time.perf_counter()
    model, optimizers, data, config, machine = set_up(row)
    on_gpu = machine.device.type == "cuda"
    with machine.attention():
        step = lambda n: take_step(n, model, optimizers, data, config, machine)[0]  # noqa: E731
        step(0).item()
        first = time.perf_counter() - start
        seconds = time_steps(step, row, on_gpu)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update = timed(lambda: [optimizer.step() for optimizer in optimizers], on_gpu)
    speed = config.tokens_per_step / seconds
    result = {"tokens/s": speed, "step ms": 1000 * seconds, "first step s": first}
    result |= {"optimizer % of a step": 100 * update / seconds, "parameters": n_params(model)}
    if machine.peak_flops():
        result["MFU %"] = 100 * speed * flops_per_token(model) / machine.peak_flops()
    if on_gpu:
        result["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def measure_decoding(row: dict) -> dict[str, Any]:
    """Return tokens a second of all texts together, compiled and eager."""
    shape = {key: value for key, value in SHAPES[row["shape"]].items() if key != "batch_size"}
    shape |= {k: v for k, v in SMALL.items() if k != "batch_size"} if row.get("rehearse") else {}
    machine = set_up_machine(row["device"], "auto", 0, False)
    model = LLaMaTransformer(ModelConfig(vocab_size=vocabulary("rehearse" in row), **shape))
    model.eval().to(machine.device, machine.dtype)
    on_gpu, n = machine.device.type == "cuda", min(200, model.config.max_seq_len - 2)
    prompts = [[1]] * (2 if row.get("rehearse") and row["batch"] > 1 else row["batch"])
    result = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        start = time.perf_counter()
        read = prepare_decoding(model, len(prompts), compiled, 1 + n)
        write = lambda read=read: [  # noqa: E731
            tokens.tolist()
            for tokens in generate(model, prompts, n, lambda x: x.argmax(-1), 1, read)
        ]
        write()
        result[f"{name}, start s"] = time.perf_counter() - start
        result[f"{name}, tokens/s"] = len(prompts) * n / timed(write, on_gpu)
    return result


def measure_resume(row: dict) -> dict[str, Any]:
    """Return how far apart the last losses of a whole run and of one that resumes are."""
    losses, out = [], Path(row["folder"], "resumed")
    for more in ([], ["--resume"]):
        subprocess.run([*row["command"], f"--out_dir={out}", *more], check=True)
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if line.get("step") == 20 and "loss" in line])
        shutil.rmtree(out / "step_000020")
    return {"loss": losses[0][-1], "distance": abs(losses[0][-1] - losses[1][-1])}


def measure_peer(row: dict) -> dict[str, Any]:
    """Return the same of nanoGPT's model, trained as its train.py does, at the same shape."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(row["against"], "model.py"))
    peer = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    start = time.perf_counter()
    data, config, machine = read_row(row)
    torch.manual_seed(0)
    shape = {"n_layer": config.n_layers, "n_head": config.n_heads, "n_embd": config.n_embd}
    shape |= {"block_size": config.max_seq_len, "vocab_size": config.vocab_size}
    model = peer.GPT(peer.GPTConfig(**shape, bias=False, dropout=0.0)).to(machine.device)
    adamw = model.configure_optimizers(0.1, config.lr, (0.9, 0.95), machine.device.type)
    compiled, on_gpu = torch.compile(model), machine.device.type == "cuda"

    def step(n: int) -> Tensor:
        for tokens, targets in step_batches(n, data, config, machine):
            with machine.autocast():
                _, loss = compiled(tokens, targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return loss

    step(0).item()
    first = time.perf_counter() - start
    seconds = time_steps(step, row, on_gpu)
    count = sum(parameter.numel() for parameter in model.parameters())
    result = {"tokens/s": config.tokens_per_step / seconds, "step ms": 1000 * seconds}
    return result | {"first step s": first, "parameters": count}


def timed(call: Callable[[], Any], on_gpu: bool) -> float:
    """Return the seconds that a call takes, what it started on the GPU included."""
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    ways = {"losses": measure_losses, "speed": measure_speed, "decode": measure_decoding}
    ways |= {"resume": measure_resume, "peer": measure_peer}
    print(json.dumps(ways[given["what"]](given)))
