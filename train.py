"""Train a LLaMA on prepared data, on one device or on many under torchrun.

Reads data/NAME (written by prepare.py). Writes out/RUN/metrics.jsonl, one JSON object a line, and
out/RUN/step_NNNNNN/, each a Hugging Face model directory with a train_state/ to resume from.

    python train.py config/tiny.py
    torchrun --nproc_per_node=8 train.py config/medium.py --lr=1e-3
    python train.py config/tiny.py --resume

A step is one update of the weights; a micro-step is one forward and backward pass of it. Which
windows step n reads depends on (seed, n) alone: not on the number of processes or micro-steps, on
evaluation, or on how often the run was killed and resumed.
"""

import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import load_model, read_config, read_json, save_model, write_json
from config import as_values, build, read_arguments, run
from model import LLaMaTransformer, ModelConfig, find_device
from prepare import Dataset, load_dataset
from tokenizer import Tokenizer, load_tokenizer

PEAK_FLOPS = {  # dense bf16 a second, from the makers' data sheets; the first match counts
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class TrainConfig(ModelConfig):
    """Train a LLaMA: python train.py [CONFIG_FILE.py ...] [--key=value ...]."""

    data_dir: str = "data/shakespeare"
    """Prepared data: a directory that prepare.py wrote."""
    out_dir: str = "out/run"
    """Where checkpoints and metrics.jsonl go."""
    init_from: str = ""
    """Start from the weights in this Hugging Face directory instead of random ones."""
    resume: bool = False
    """Continue the run in out_dir, with the settings it began with, if it has a checkpoint."""
    eval_only: bool = False
    """Evaluate init_from, or out_dir's newest checkpoint, on the whole validation split."""
    seed: int = 0
    """Decides the initial weights and the windows of every step."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps, xpu, ...; auto takes the accelerator if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of matrix products; auto is bfloat16 where the hardware is fast at it."""
    compile: bool = True
    """Compile the model with torch.compile."""
    max_steps: int = 1000
    """Steps in the whole run."""
    tokens_per_step: int = 8192
    """Tokens in the global batch of a step, over all micro-steps and processes."""
    batch_size: int = 32
    """Sequences per micro-step and process; changes speed and memory, not the run."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all; or Muon for the decoder blocks' matrices and AdamW for the rest."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    momentum: float = 0.95
    """Muon's decay of the mean gradient."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to lr."""
    decay_fraction: float = 1.0
    """Part of the run, at its end, over which the learning rate falls linearly to zero."""
    eval_interval: int = 250
    """Steps between evaluations; 0: only at the end."""
    eval_tokens: int = 262_144
    """Validation tokens in an evaluation, always the same ones; 0: the whole split."""
    log_interval: int = 10
    """Steps between log lines."""
    checkpoint_interval: int = 250
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """How many of the newest checkpoints to keep, besides the one with the best val_loss."""
    sample_interval: int = 0
    """Steps between samples of text; 0: none."""

    def __post_init__(self) -> None:
        self.model_config()
        at_least_1 = ("max_steps", "tokens_per_step", "batch_size", "log_interval", "keep_last")
        for key, value in asdict(self).items():
            if isinstance(value, int | float) and value < (key in at_least_1):
                raise ValueError(f"{key}={value} must be at least {int(key in at_least_1)}")
        for key in ("decay_fraction", "beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)} must be between 0 and 1")

    def model_config(self) -> ModelConfig:
        """Return the model's part of the settings, derived keys filled in."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


def say(text: str) -> None:
    """Print a line on stdout, above the progress bar, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def settle(argv: list[str] | None = None) -> tuple[TrainConfig, Path | None]:
    """Return the settings of the run and the directory whose weights it starts from, if any."""
    files, flags = read_arguments(TrainConfig, argv)
    config = build(TrainConfig, files | flags)
    saved = checkpoints(Path(config.out_dir))
    if saved and (config.resume or (config.eval_only and not config.init_from)):
        began = read_json(saved[-1] / "train_state" / "state.json")["config"]
        began["out_dir"] = config.out_dir  # which may have been renamed since
        config = build(TrainConfig, as_values(began) | flags)
        return shaped_like(saved[-1], config, set(flags)), saved[-1]
    if saved and not config.eval_only:
        raise ValueError(
            f"out_dir={config.out_dir} holds a run ({saved[-1].name}): add --resume to continue "
            "it, or choose another --out_dir"
        )
    config = replace(config, resume=False)  # there is nothing to continue yet
    if config.init_from:
        source = Path(config.init_from)
        return shaped_like(source, config, {*files, *flags}), source
    if config.eval_only:
        raise ValueError(f"out_dir={config.out_dir} has no checkpoint to evaluate")
    return config, None


def shaped_like(directory: Path, config: TrainConfig, given: set[str]) -> TrainConfig:
    """Take the model's shape from a checkpoint; ValueError if a `given` key contradicts it."""
    shape, asked = read_config(directory), config.model_config()
    for key, value in asdict(shape).items():
        if key in given - {"max_seq_len", "multiple_of"} and getattr(asked, key) != value:
            raise ValueError(
                f"{key}={getattr(asked, key)}, but the model in {directory} has {key}={value}: "
                f"leave {key} out"
            )
    length = config.max_seq_len if "max_seq_len" in given else shape.max_seq_len
    return replace(config, **asdict(shape) | {"max_seq_len": length})


@dataclass(frozen=True)
class Machine:
    """Where this process computes, and which of the run's processes it is."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int

    def autocast(self) -> torch.autocast:
        """Return the context in which matrix products take place in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def attention(self) -> AbstractContextManager[None]:
        """Return the context in which attention takes the kernels that are fastest to train."""
        if self.device.type != "cuda" or torch.cuda.get_device_capability(self.device)[0] != 9:
            return nullcontext()
        # cuDNN's come last by default. On Hopper, and there alone, they are 1.7 to 2.3 times as
        # fast as FlashAttention's, which stay the choice for shapes that cuDNN cannot serve
        # (huggingface/transformers, pull request 48163).
        kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        kernels += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        return sdpa_kernel(kernels, set_priority=True)

    def total(self, *values: float) -> list[float]:
        """Return each value summed over all processes."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def peak_flops(self) -> float:
        """Return the peak of all processes' devices together; 0 where it is not known."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return 0.0
        name = torch.cuda.get_device_name(self.device)
        return self.world_size * next((p for gpu, p in PEAK_FLOPS.items() if gpu in name), 0.0)


def set_up_machine(config: TrainConfig) -> Machine:
    """Choose device and dtype, and join the other processes if torchrun started this one."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = config.device
    if world_size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device, fast_bf16 = find_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and config.compile:
        # Otherwise the compiled gradient of an embedding is summed in an order that varies.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which would take time
    if device.type == "cpu" and config.n_embd <= 128:
        fast_bf16 = False  # the casts of narrow layers cost more than faster products give
    auto = "bfloat16" if fast_bf16 else "float32"
    dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    if world_size > 1:
        with_nccl = device.type == "cuda" and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if with_nccl else "gloo")
    return Machine(device, dtype, rank, world_size)


def load_data(config: TrainConfig, source: Path | None) -> tuple[Dataset, Tokenizer]:
    """Open the prepared data and its tokenizer; ValueError if settings or weights do not fit."""
    dataset = load_dataset(Path(config.data_dir))
    tokenizer = load_tokenizer(Path(config.data_dir, "tokenizer.json"))
    if source and (source / "tokenizer.json").exists():
        theirs = load_tokenizer(source / "tokenizer.json")
        if theirs.token_byte_values() != tokenizer.token_byte_values():
            raise ValueError(
                f"{config.data_dir} has another tokenizer than {source}: prepare the data with "
                f"--tokenizer={source}/tokenizer.json"
            )
    unused = config.vocab_size - dataset.vocab_size  # ids, of which pretrained models have some
    if config.vocab_size and (unused < 0 or (unused > 0 and not source)):
        raise ValueError(
            f"vocab_size={config.vocab_size}, but {config.data_dir} has {dataset.vocab_size}: "
            "prepare the data with the model's tokenizer, or leave vocab_size out"
        )
    for split in ("train", "val"):
        if dataset.tokens[split] <= config.max_seq_len:
            raise ValueError(
                f"{dataset.path(split)} has {dataset.tokens[split]:,} tokens, less than a window "
                f"of max_seq_len + 1 = {config.max_seq_len + 1:,}: lower max_seq_len, or prepare "
                "more text"
            )
    return dataset, tokenizer


def count_micro_steps(config: TrainConfig, world_size: int) -> int:
    """Derive the micro-steps of a step; ValueError with the nearest tokens_per_step that fit."""
    tokens = config.batch_size * config.max_seq_len * world_size
    count, remainder = divmod(config.tokens_per_step, tokens)
    if remainder:
        near = " or ".join(f"{n * tokens:,}" for n in (count, count + 1) if n)
        raise ValueError(
            f"tokens_per_step={config.tokens_per_step:,} is no multiple of {tokens:,} = "
            f"{config.batch_size} sequences (batch_size) × {config.max_seq_len:,} × {world_size} "
            f"processes: take {near}, or another batch_size"
        )
    return count


def window_starts(seed: int, step: int, count: int, n_tokens: int, window: int) -> np.ndarray:
    """Return where the `count` windows of a step begin: uniform over all places where one fits.

    Window n of a run lies n golden ratios, modulo 1, after the random place of the first, which
    spreads any number of them evenly: those of an epoch read 89% of the text, independent ones 63%.
    """
    first = np.random.Philox(key=seed).random_raw() / 2**64
    n = np.arange(step * count, (step + 1) * count)
    places = (first + n * (math.sqrt(5) - 1) / 2) % 1.0
    return (places * (n_tokens - window + 1)).astype(np.int64)


def read_windows(
    dataset: Dataset, split: str, starts: np.ndarray, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, int64 (B, T): the windows at `starts`, and one token later."""
    # Opened anew each time, because the pages of a long-lived map count as this process's memory.
    data = np.memmap(dataset.path(split), dtype=dataset.dtype, mode="r")
    windows = torch.from_numpy(np.stack([data[s : s + length + 1] for s in starts]).astype("int64"))
    if device.type == "cuda":
        windows = windows.pin_memory()
    windows = windows.to(device, non_blocking=True)  # (B, T + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of a step, counted from 0: linear warm-up, constant, linear decay to 0."""
    warmup = (step + 1) / max(1, config.warmup_steps)
    decay_steps = config.decay_fraction * config.max_steps
    decay = (config.max_steps - step) / decay_steps if decay_steps else 1.0
    return config.lr * min(1.0, warmup, decay)


class Muon(torch.optim.Optimizer):
    """Mean gradients made orthogonal, for hidden matrices (arXiv:2502.16982).

    The matrices of one shape are updated together, as one tensor (N, rows, columns), where
    torch.optim.Muon takes one after the other. An update's root mean square is 0.2 lr, as AdamW's
    is, so that both take the same learning rate.
    """

    def __init__(self, matrices: list[nn.Parameter], momentum: float, weight_decay: float) -> None:
        by_shape = defaultdict(list)
        for matrix in matrices:
            by_shape[matrix.shape].append(matrix)
        groups = [{"params": matrices} for matrices in by_shape.values()]
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices, lr, momentum = group["params"], group["lr"], group["momentum"]
            gradients = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]  # that of all
            if not state:
                state["mean"] = torch.zeros_like(gradients)
            mean = state["mean"].lerp_(gradients, 1 - momentum)
            updates = orthogonal(gradients.lerp_(mean, momentum))  # Nesterov's momentum
            size = 0.2 * math.sqrt(max(updates.shape[1:]))
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, list(updates.unbind()), alpha=-lr * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Return (N, rows, columns) with all singular values near 1, by five Newton-Schulz steps."""
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(5):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, square, x, beta=3.4445)
    return (x.mT if tall else x).type_as(matrices)


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW (arXiv:1711.05101), and Muon if config asks for it."""
    matrices = {name: p for name, p in model.named_parameters() if p.dim() >= 2}
    hidden = [n for n in matrices if "decoder_blocks" in n and config.optimizer == "muon"]
    for_muon = [matrices.pop(name) for name in hidden]
    groups = [
        {"params": list(matrices.values()), "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, betas=betas, fused=fused)]
    if for_muon:
        optimizers.append(Muon(for_muon, config.momentum, config.weight_decay))
    return optimizers


def compiled(
    model: nn.Module, dataset: Dataset, config: TrainConfig, machine: Machine
) -> nn.Module:
    """Return the compiled model, or after one warning the model itself where compiling fails."""
    starts = np.zeros(config.batch_size, dtype=np.int64)
    x, y = read_windows(dataset, "train", starts, config.max_seq_len, machine.device)
    try:
        # Inductor would start a second Python to see whether the compiler's vector code runs.
        faster = torch.compile(model, options={"cpp.vec_isa_ok": True})
        with machine.autocast():
            loss = faster(x, y)[1]
        loss.backward()  # what has no compiler fails here, not in torch.compile
        return faster
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        print(f"warning: training without torch.compile, which failed: {reason}", file=sys.stderr)
        return model
    finally:
        model.zero_grad(set_to_none=True)


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """Return how many bytes of text each token id stands for, (V,); special tokens have none."""
    lengths = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for piece in tokenizer.token_byte_values():
        lengths[tokenizer.encode_single_token(piece)] = len(piece)
    for word in tokenizer.words:
        lengths[tokenizer.encode_single_token(word)] = len(word.encode())
    return lengths


def evaluation_batches(
    dataset: Dataset, config: TrainConfig, machine: Machine
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's share of the fixed validation windows, as tokens and targets (B, T).

    The windows lie end to end, so that each token is predicted once; where eval_tokens asks for a
    part of them, it is spread evenly. Targets that do not count are -100.
    """
    T, n_tokens = config.max_seq_len, dataset.tokens["val"]
    n_windows = math.ceil((n_tokens - 1) / T)
    wanted = min(n_windows, max(1, config.eval_tokens // T)) if config.eval_tokens else n_windows
    chosen = np.linspace(0, n_windows - 1, wanted).round().astype(np.int64)
    mine = T * chosen[machine.rank :: machine.world_size]
    for first in range(0, len(mine), config.batch_size):
        begins = mine[first : first + config.batch_size]
        begins = np.resize(begins, config.batch_size)  # repeats, so that all batches have one shape
        starts = np.minimum(begins, n_tokens - T - 1)  # the split's last window is moved to fit
        x, y = read_windows(dataset, "val", starts, T, machine.device)
        for row, counted_before in enumerate(begins - starts):
            y[row, :counted_before] = -100
        y[len(mine) - first :] = -100
        yield x, y


def evaluate(
    model: nn.Module, dataset: Dataset, lengths: np.ndarray, config: TrainConfig, machine: Machine
) -> dict[str, float]:
    """Return loss (nats per token), perplexity and bits per byte over the validation windows."""
    nats, n_tokens, n_bytes = 0.0, 0, 0
    for x, y in evaluation_batches(dataset, config, machine):
        # Without gradients the model would be compiled a second time, which takes longer than it
        # saves.
        with machine.autocast(), torch.set_grad_enabled(config.compile):
            loss = model(x, y)[1].item()
        targets = y[y >= 0].cpu().numpy()
        nats += loss * targets.size
        n_tokens += targets.size
        n_bytes += int(lengths[targets].sum())
    nats, n_tokens, n_bytes = machine.total(nats, n_tokens, n_bytes)
    loss = nats / n_tokens
    perplexity = math.exp(min(loss, 700))  # exp overflows beyond
    bpb = nats / math.log(2) / max(1, n_bytes)
    return {"val_loss": loss, "val_perplexity": perplexity, "val_bpb": bpb}


def checkpoints(out_dir: Path) -> list[Path]:
    """Return the run's complete checkpoints, oldest first."""
    found = [path for path in out_dir.glob("step_*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def save_checkpoint(
    model: LLaMaTransformer,
    optimizers: list[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    config: TrainConfig,
    state: dict[str, Any],
) -> None:
    """Write out_dir/step_NNNNNN aside, flush it to disk, then rename it.

    A kill at any moment leaves either no directory of that name or a complete one.
    """
    final = Path(config.out_dir, f"step_{state['step']:06d}")
    if final.exists():
        return
    scratch = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    save_model(model, scratch, tokenizer.eot_token)
    shutil.copyfile(Path(config.data_dir, "tokenizer.json"), scratch / "tokenizer.json")
    end = tokenizer.decode([tokenizer.eot_token])
    # What transformers' AutoTokenizer needs beside tokenizer.json.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    write_json(
        scratch / "tokenizer_config.json", settings | {"clean_up_tokenization_spaces": False}
    )
    train_state = scratch / "train_state"
    train_state.mkdir()
    moments = {
        f"{number}/{index}/{key}": tensor.cpu()
        for number, optimizer in enumerate(optimizers)
        for index, tensors in optimizer.state_dict()["state"].items()
        for key, tensor in tensors.items()
    }
    save_file(moments, train_state / "optimizer.safetensors")
    write_json(train_state / "state.json", state | {"config": asdict(config)})
    for path in scratch.rglob("*.*"):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    scratch.rename(final)


def load_optimizers(optimizers: list[torch.optim.Optimizer], checkpoint: Path) -> None:
    """Read back the moments that `save_checkpoint` wrote."""
    path = checkpoint / "train_state" / "optimizer.safetensors"
    states: list[dict[int, dict[str, Tensor]]] = [defaultdict(dict) for _ in optimizers]
    try:
        for name, tensor in load_file(path).items():
            number, index, key = name.split("/")
            states[int(number)][int(index)][key] = tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": dict(state), "param_groups": groups})


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    """Return what metrics.jsonl records; a last line that a kill cut short is passed over."""
    path, records = out_dir / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def val_losses(out_dir: Path) -> dict[int, float]:
    """Return the validation loss after each step that was evaluated."""
    return {r["step"]: r["val_loss"] for r in read_metrics(out_dir) if "val_loss" in r}


def begin_out_dir(out_dir: Path, step: int) -> None:
    """Make out_dir ready for a run that goes on after `step`: drop what is later or unfinished.

    The evaluation after `step` is dropped too, for it will be done again.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for leftover in out_dir.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    records = [r for r in read_metrics(out_dir) if r["step"] < step + ("loss" in r)]
    kept = [json.dumps(r) + "\n" for r in records]
    scratch = out_dir / "metrics.jsonl.tmp"
    scratch.write_text("".join(kept), encoding="utf-8")
    scratch.replace(out_dir / "metrics.jsonl")


def prune_checkpoints(config: TrainConfig) -> Path:
    """Delete all checkpoints but the newest keep_last and the best; return the best."""
    saved = checkpoints(Path(config.out_dir))
    losses = val_losses(Path(config.out_dir))
    best = min(saved[::-1], key=lambda path: losses.get(int(path.name[5:]), math.inf))
    for path in saved[: -config.keep_last]:
        if path != best:  # renamed first, so that a kill leaves no part of a checkpoint
            shutil.rmtree(path.rename(path.with_name(f".tmp-{path.name}")))
    return best


def sample_text(model: LLaMaTransformer, tokenizer: Tokenizer, seed: int) -> str:
    """Return up to 100 tokens that the model writes at temperature 0.8 as a new document."""
    device = model.cos.device
    generator = torch.Generator(device).manual_seed(seed)

    def pick(logits: Tensor) -> Tensor:
        probabilities = F.softmax(logits[:, : tokenizer.n_vocab].float() / 0.8, dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    ids: list[int] = []
    for token in model.generate(torch.tensor([[tokenizer.eot_token]], device=device), 100, pick):
        if token.item() == tokenizer.eot_token:
            break
        ids.append(int(token))
    return tokenizer.decode(ids)


def catch_stop_signals() -> list[int]:
    """Return a list to which the first SIGINT or SIGTERM is added; a second one kills."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return received


def describe(
    config: TrainConfig, dataset: Dataset, model: LLaMaTransformer, machine: Machine
) -> None:
    """Print what is about to be trained, on what, and how a step is made up."""
    micro_steps = count_micro_steps(config, machine.world_size)
    epochs = config.max_steps * config.tokens_per_step / dataset.tokens["train"]
    dtype, how = str(machine.dtype)[6:], "torch.compile" if config.compile else "eager"
    say(
        f"model    {model.n_params():,} parameters, {config.n_layers} layers, "
        f"{config.n_embd} wide, {model.flops_per_token() / 1e6:,.1f} MFLOPs/token\n"
        f"data     {config.data_dir}: {dataset.tokens['train']:,} training tokens, "
        f"{dataset.tokens['val']:,} validation tokens, vocabulary {dataset.vocab_size:,}\n"
        f"step     {config.tokens_per_step:,} tokens/step = {config.batch_size} sequences × "
        f"{config.max_seq_len:,} × {micro_steps} micro-step{'s' * (micro_steps > 1)} × "
        f"{machine.world_size} process{'es' * (machine.world_size > 1)}\n"
        f"run      {config.max_steps:,} steps = {epochs:.1f} epochs, written to {config.out_dir}\n"
        f"machine  {machine.device}, {dtype}, {how}"
    )


def is_due(step: int, interval: int) -> bool:
    """Tell whether what takes place every `interval` steps (0: never) does so after `step`."""
    return step > 0 and interval > 0 and step % interval == 0


def in_words(metrics: dict[str, float]) -> str:
    """Return the three figures of an evaluation as text."""
    return (
        f"validation loss {metrics['val_loss']:.4f} | perplexity {metrics['val_perplexity']:.2f} | "
        f"{metrics['val_bpb']:.4f} bits per byte"
    )


def log(record: dict[str, Any], config: TrainConfig) -> None:
    """Append a record to metrics.jsonl and print it as one line; in the first process only."""
    if os.environ.get("RANK", "0") != "0":
        return
    with open(Path(config.out_dir, "metrics.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    line = f"step {record['step']:>6}/{config.max_steps}"
    if "val_loss" in record:
        say(f"{line} | {in_words(record)}")
        return
    tokens_left = config.max_steps * config.tokens_per_step - record["tokens"]
    left = tqdm.format_interval(tokens_left / record["tokens_per_second"])
    mfu = f" | mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
    say(
        f"{line} | loss {record['loss']:7.4f} | lr {record['lr']:.2e} | norm "
        f"{record['grad_norm']:5.2f} | {record['tokens_per_second']:9,.0f} tok/s{mfu} | {left} left"
    )


def take_step(
    step: int,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    dataset: Dataset,
    config: TrainConfig,
    machine: Machine,
) -> tuple[Tensor, Tensor]:
    """Update the weights once; return this process's mean loss, and the norm of the gradient."""
    T, n_tokens = config.max_seq_len, dataset.tokens["train"]
    micro_steps = count_micro_steps(config, machine.world_size)
    starts = window_starts(config.seed, step, config.tokens_per_step // T, n_tokens, T + 1)
    starts = starts.reshape(micro_steps, machine.world_size, config.batch_size)
    loss = torch.zeros((), device=machine.device)
    for micro_step in range(micro_steps):
        x, y = read_windows(dataset, "train", starts[micro_step, machine.rank], T, machine.device)
        # Processes average their gradients in the last backward alone. It is forward that decides
        # whether backward will, so it belongs inside no_sync too.
        alone = machine.world_size > 1 and micro_step < micro_steps - 1
        with model.no_sync() if alone else nullcontext():
            with machine.autocast():
                micro_loss = model(x, y)[1] / micro_steps
            micro_loss.backward()
        loss += micro_loss.detach()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss, grad_norm


def train(config: TrainConfig, source: Path | None, machine: Machine) -> None:
    """Take all steps that the run still lacks, or only evaluate it."""
    dataset, tokenizer = load_data(config, source)
    config = replace(config, vocab_size=max(config.vocab_size, dataset.vocab_size))
    count_micro_steps(config, machine.world_size)
    lengths = bytes_per_token(tokenizer)
    torch.manual_seed(config.seed)
    if source:
        model = load_model(source, config.max_seq_len).to(machine.device)
    else:
        model = LLaMaTransformer(config.model_config()).to(machine.device)
    if config.eval_only:
        whole = replace(config, eval_tokens=0, compile=False)
        say(f"{source} | {in_words(evaluate(model, dataset, lengths, whole, machine))}")
        return

    optimizers = make_optimizers(model, config)
    out_dir, first, seconds = Path(config.out_dir), 0, 0.0
    if config.resume and source:
        state = read_json(source / "train_state" / "state.json")
        if state["data"] != dataset.sha256:
            raise ValueError(f"{config.data_dir} is not the data that {source} was trained on")
        if state["config"]["optimizer"] != config.optimizer:
            raise ValueError(f"optimizer={config.optimizer} cannot continue {source}: leave it out")
        first, seconds = state["step"], state["seconds"]
        load_optimizers(optimizers, source)
    if first >= config.max_steps and first in val_losses(out_dir):
        say(f"{source} is the end of the run; --max_steps={2 * config.max_steps} would go on")
        return
    describe(config, dataset, model, machine)
    if machine.rank == 0:
        begin_out_dir(out_dir, first)
    stop_signals = catch_stop_signals()
    network = compiled(model, dataset, config, machine) if config.compile else model
    parallel = DistributedDataParallel(network) if machine.world_size > 1 else network

    peak, saving, stopping = machine.peak_flops(), False, False
    quiet = machine.rank != 0 or not sys.stderr.isatty()
    bar = tqdm(total=config.max_steps, initial=first, unit="step", disable=quiet)
    began, mark, logged = time.perf_counter() - seconds, time.perf_counter(), first
    for step in range(first, config.max_steps + 1):  # as many are done
        pause, final = time.perf_counter(), step >= config.max_steps
        if saving and machine.rank == 0:
            state = {"step": step, "seconds": pause - began, "data": dataset.sha256}
            save_checkpoint(model, optimizers, tokenizer, config, state)
        if stopping:
            break
        if final or is_due(step, config.eval_interval):
            metrics = evaluate(network, dataset, lengths, config, machine)
            log({"step": step, "tokens": step * config.tokens_per_step} | metrics, config)
        if saving and machine.rank == 0:
            prune_checkpoints(config)
        if is_due(step, config.sample_interval) and machine.rank == 0:
            say(f"--- sample after step {step}\n{sample_text(model, tokenizer, config.seed)}\n---")
        if final:
            break
        mark += time.perf_counter() - pause  # tokens_per_second is about training alone

        loss, grad_norm = take_step(step, parallel, optimizers, dataset, config, machine)
        bar.update()
        done = step + 1
        stopping = machine.total(len(stop_signals))[0] > 0
        saving = stopping or done == config.max_steps or is_due(done, config.checkpoint_interval)
        if saving or done == first + 1 or is_due(done, config.log_interval):
            loss, norm = machine.total(loss.item())[0] / machine.world_size, grad_norm.item()
            if not math.isfinite(loss + norm):
                good = [Path("none"), *checkpoints(out_dir)][-1]
                raise ValueError(
                    f"loss {loss}, gradient norm {norm} are not finite at step {done}: lower "
                    f"lr={config.lr}; last good checkpoint: {good}"
                )
            now, lr = time.perf_counter(), learning_rate(step, config)
            speed = (done - logged) * config.tokens_per_step / (now - mark)
            mfu = speed * model.flops_per_token() / peak if peak else None
            record = {"step": done, "tokens": done * config.tokens_per_step, "loss": loss, "lr": lr}
            record |= {"grad_norm": norm, "tokens_per_second": speed, "mfu": mfu}
            log(record | {"seconds": now - began}, config)
            mark, logged = now, done
    bar.close()
    if machine.rank == 0:
        took = tqdm.format_interval(time.perf_counter() - began)
        conclusion = f"stopped after step {step}" if stopping else f"done in {took}"
        say(f"{conclusion}; best checkpoint: {prune_checkpoints(config)}")
        say(
            f"to go on: {resume_command()}" if stopping else 'next: python sample.py --prompt "..."'
        )


def resume_command() -> str:
    """Return the command line of this process, made to continue its run."""
    n_local = os.environ.get("LOCAL_WORLD_SIZE")
    start = ["torchrun", f"--nproc_per_node={n_local}"] if n_local else ["python"]
    return shlex.join([*start, *(w for w in sys.argv if w != "--resume"), "--resume"])


def main() -> None:
    config, source = settle()
    machine = set_up_machine(config)
    try:
        with machine.attention():
            train(config, source, machine)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"out of memory on {machine.device}: lower batch_size={config.batch_size} (the run "
            f"stays the same) or max_seq_len={config.max_seq_len}"
        ) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
