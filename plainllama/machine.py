"""Where a stage computes: devices, number formats, processes, compiling, memory, stop signals."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model import Context, KVCache, LLaMaTransformer, ModelConfig
from plainllama import cpu
from plainllama.processes import join
from plainllama.settings import UserError
from plainllama.shard import Shard, make_mesh, shard_model

NARROW = 128  # layers up to this wide gain less by bfloat16 than casts cost that are not compiled
SHORT = 512  # contexts up to this long leave attention's scores, (B, H, T, T), small
LOSS_CHUNKS = 8  # parts of a micro-step's tokens, of one of which --chunked_loss keeps logits
Dtype = Literal["auto", "float32", "bfloat16"]
PEAK_FLOPS = {  # dense bf16 a second, from the makers' data sheets
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def say(text: str) -> None:
    """Print a line on stdout, above the progress bar, in the first process only.

    When stdout is gone or full, a run that listens to signals is asked to save and to end.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.raise_signal(signal.SIGTERM)


def say_on_stderr(text: str) -> None:
    """Tell the user something that is no part of the output, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def find_device(name: str) -> torch.device:
    """Return the device called `name`; UserError if it cannot be used.

    `auto` is the accelerator if there is one, else the CPU.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(accelerator or "cpu") if name == "auto" else torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:60]
        meant = "did you mean --device=cuda?" if name == "gpu" else "--device=cpu can"
        raise UserError(f"device={name} cannot be used ({reason}); {meant}") from None
    return device


def choose_dtype(
    asked: Dtype, device: torch.device, width: int, compiled: bool = False
) -> torch.dtype:
    """Return the format of matrix products: what was asked, or bfloat16 where it is fast."""
    if asked != "auto":
        return getattr(torch, asked)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gains = width > NARROW or (compiled and cpu.onednn_is_faster())
        fast = device.type == "cpu" and gains and cpu.multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


def device_memory(device: torch.device | str) -> tuple[int, int] | None:
    """Return the bytes of memory that a device has, and how many are free; None: not known."""
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    total = free = page * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # where there is such a file, it is better informed
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {key: rest.split()[0] for key, _, rest in (s.partition(":") for s in lines)}
        free = 1024 * int(kilobytes["MemAvailable"])
    return total, free


def check_memory(n_bytes: int, what: str, device: torch.device | str) -> None:
    """Raise a UserError if a device could never hold `n_bytes`."""
    has = device_memory(device)
    if has and n_bytes > has[0]:
        sizes = f"{n_bytes / 1e9:,.1f} GB, but {device} has {has[0] / 1e9:,.1f} GB"
        raise UserError(f"{what} needs {sizes} of memory; choose less")


@dataclass(frozen=True)
class Machine:
    """Where this process computes, and which of the run's processes it is."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    mesh: Any = None  # of the processes that share the model's tensors out; None: all have all
    onednn: bool = False  # multiplies in place of MKL

    def autocast(self) -> torch.autocast:
        """Return the context in which matrix products take place in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)

    def attention(self) -> AbstractContextManager[None]:
        """Return the context in which attention takes the kernels that are fastest to train."""
        if self.onednn:  # which is slow at the small products of which other kernels are made
            return sdpa_kernel(SDPBackend.MATH)
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

    def share_out(self, model: LLaMaTransformer) -> None:
        """Share a model's tensors out between the processes, if that was asked for."""
        if self.mesh is not None:
            shard_model(model, self.mesh, self.dtype)

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum each gradient over all processes, in place; of a shared model, that is done."""
        if self.world_size > 1 and self.mesh is None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            pending = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
            for work in pending:
                work.wait()

    def peak_flops(self) -> float:
        """Return the peak of all processes' devices together; 0 where it is not known."""
        if self.device.type != "cuda" or self.dtype != torch.bfloat16:
            return 0.0
        name = f"{torch.cuda.get_device_name(self.device)} ".replace("-", " ")
        return self.world_size * next(
            (p for gpu, p in PEAK_FLOPS.items() if f"{gpu} " in name), 0.0
        )


def set_up_machine(
    device: str,
    dtype: Dtype,
    width: int,
    compiled: bool,
    shard: Shard = "none",
    max_seq_len: int = 0,
) -> Machine:
    """Choose device and dtype, and join the other processes if torchrun started this one."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = find_device(device)
    if world_size > 1 and place.type in ("cuda", "xpu") and place.index is None:
        place = torch.device(place.type, int(os.environ["LOCAL_RANK"]))  # each its own
        torch.accelerator.set_device_index(place.index)
    if place.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if place.type == "cpu" and compiled:
        # Otherwise the compiled gradient of an embedding is summed in an order that varies.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # which would take time
    small = place.type == "cpu" and width <= NARROW
    if small:
        cpu.keep_freed_memory()
    onednn = cpu.multiply_by_onednn(allowed=small and max_seq_len <= SHORT)
    join()
    mesh = make_mesh(shard, place.type)
    matrix_dtype = choose_dtype(dtype, place, width, compiled)
    return Machine(place, matrix_dtype, rank, world_size, mesh, onednn)


def spare_memory(model: LLaMaTransformer, config: Any) -> None:
    """Make the backward pass compute again what config says is not to be kept for it."""
    if config.activation_checkpointing:
        recompute_blocks(model)
    if config.chunked_loss:
        chunk_loss(model)


def recompute_blocks(model: LLaMaTransformer) -> None:
    """Make blocks keep only their inputs in training; the backward pass computes the rest again."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for block in model.decoder_blocks:
        wrap_forward(block, lambda forward: partial(again, forward))


def chunk_loss(model: LLaMaTransformer) -> None:
    """Make the loss keep no logits: the backward pass computes them again, a part at a time.

    Where there are targets the model then returns None in the place of logits.
    """
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    plain = model.forward

    def nats(h: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.unembed(h).float(), targets, reduction="sum")  # (n, V)

    def forward(
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "mean",
    ) -> tuple[Tensor | None, Tensor | None]:
        if targets is None:
            return plain(tokens, cache=cache)
        positions = torch.arange(tokens.size(1), device=tokens.device)
        h = model.read(tokens, positions, cache).flatten(0, 1)  # (B T, C)
        parts = zip(h.chunk(LOSS_CHUNKS), targets.flatten().chunk(LOSS_CHUNKS), strict=True)
        total = sum(again(nats, *part) for part in parts)
        return None, total if reduction == "sum" else total / (targets >= 0).sum()

    model.forward = forward


def wrap_forward(block: nn.Module, wrapped: Callable[[Callable], Callable]) -> None:
    """Put `wrapped(block.forward)` in its place, but where there is a cache: in generation."""
    plain = block.forward
    in_training = wrapped(plain)

    def forward(x: Tensor, context: Context) -> Tensor:
        return (in_training if context.cache is None else plain)(x, context)

    block.forward = forward


def compile_for_training(
    model: LLaMaTransformer, loss: Callable[[], Tensor], machine: Machine, by_block: bool = False
) -> None:
    """Compile the model in place; after one warning leave it as it is where compiling fails.

    `loss` calls the model as training does; its backward pass is where a missing compiler shows.
    What happens between blocks, when weights are gathered or something is computed again, is not
    compiled: `by_block` compiles each by itself, once for all.
    """
    options = cpu.vector_options()
    if machine.onednn:  # or patterns turn the attention that it is fast at into another
        options |= {"pattern_matcher": False}
    before = [block.forward for block in model.decoder_blocks]
    if by_block:
        for block in model.decoder_blocks:
            wrap_forward(block, partial(torch.compile, options=options))
    else:
        model.compile(options=options)
    try:
        loss().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        model.compile(disable=True)
        for block, forward in zip(model.decoder_blocks, before, strict=True):
            block.forward = forward
        reason = " ".join(str(error).split())[:160]
        say_on_stderr(f"warning: training without torch.compile, which failed: {reason}")
    finally:
        model.zero_grad(set_to_none=True)


class StopSignal:
    """Notes the first SIGINT, SIGTERM or SIGHUP and says so; a second Ctrl-C ends the process.

    Used as a context, inside which `listen` begins: until then a signal ends the process as ever,
    and until there is a step to save it does so with a line.
    """

    def __init__(self) -> None:
        self.came = self.stepping = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *error: object) -> None:
        if self.before:
            signal.set_wakeup_fd(-1)
            self.writer.close()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def listen(self, last_checkpoint: Callable[[], str]) -> None:
        """Begin to listen, in a thread: Python's own handlers wait until compiled code is done."""
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self.before[number] = signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, args=(last_checkpoint,), daemon=True).start()

    def watch(self, last_checkpoint: Callable[[], str]) -> None:
        """Act on each signal until the context ends."""
        # torchrun passes on what the terminal has sent to all processes already.
        launched = "LOCAL_WORLD_SIZE" in os.environ
        with self.reader:
            while received := self.reader.recv(1):
                if not self.stepping:
                    tell("stopped before the first step, with nothing to save")
                    os._exit(128 + received[0])
                if not self.came:
                    self.came = True
                    second = "torchrun itself ends with a traceback and exit code 1"
                    if not launched:
                        second = f"Ctrl-C again quits now, last checkpoint: {last_checkpoint()}"
                    tell(f"stopping after this step, then saving; {second}")
                elif received[0] == signal.SIGINT and not launched:
                    tell(f"quit without saving; last checkpoint: {last_checkpoint()}")
                    os._exit(130)


def tell(text: str) -> None:
    """Write a line to stderr at once, whatever else is being printed, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{text}\n".encode())


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that a model of this shape has, without making it."""
    if config.n_embd * max(config.n_heads * config.head_width, config.hidden_width) > 2**58:
        return 2**58  # more than torch can count
    one, two = (n_params(shapes_of(replace(config, n_layers=n))) for n in (1, 2))
    return one + (two - one) * (config.n_layers - 1)


class WithoutNumbers(TorchFunctionMode):
    """Inside, torch.nn.init draws nothing: for the meta device it would import its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def shapes_of(config: ModelConfig) -> LLaMaTransformer:
    """Return a model on the meta device: all of its shapes, no memory, no numbers."""
    with torch.device("meta"), WithoutNumbers():
        return LLaMaTransformer(config)


def n_params(model: LLaMaTransformer) -> int:
    """Return the number of parameters as saved: padding left out, tied matrices once."""
    padding = model.embeddings.num_embeddings - model.config.vocab_size
    matrices = 1 if model.config.tie_embeddings else 2
    total = sum(p.numel() for p in model.parameters())
    return total - matrices * padding * model.config.n_embd


def flops_per_token(model: LLaMaTransformer) -> int:
    """Return the FLOPs of one token's forward and backward pass (arXiv:2204.02311, appendix B).

    6 for each weight that multiplies it, the input embedding not counted, and 12 L H D T for
    attention over a full window.
    """
    c = model.config
    blocks = sum(p.numel() for p in model.decoder_blocks.parameters() if p.dim() == 2)
    head_widths = c.head_width + (c.v_head_dim if c.use_mla else c.head_width)
    attention = 6 * c.n_layers * c.n_heads * head_widths * c.max_seq_len
    return 6 * (blocks + c.vocab_size * c.n_embd) + attention
