"""Where a stage computes: device, number format, kernels, memory, compiling; what a model takes.

find_device(name), choose_dtype(...)    what sample.py and its like compute with
set_up_machine(config)                  the same for training, among the processes of a run
compile_for_training(model, ...)        torch.compile, or one warning
n_params, flops_per_token(model)        what a model takes, of memory and of time
training_seconds(config, n_tokens)      about how long training takes here
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from model import LLaMaTransformer, ModelConfig
from plainllama.distributed import fill, join, make_mesh, materialize, shard_model
from plainllama.terminal import UserError, note

NARROW = 128  # layers up to this wide gain less by bfloat16 than casts cost that are not compiled
SHORT = 512  # contexts up to this long leave attention's scores, (B, H, T, T), small
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


def find_device(name: str) -> torch.device:
    """Return the device called `name`; UserError if it cannot be used.

    `auto` is the accelerator if there is one, else the CPU.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(accelerator or "cpu") if name == "auto" else torch.device(name)
        torch.zeros(1, device=device).item()  # of which "meta" has none
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
        gains = width > NARROW or (compiled and onednn_is_faster())
        fast = device.type == "cpu" and gains and multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


def device_memory(device: torch.device | str) -> int | None:
    """Return the bytes that this process could have on a device; None where that is not known.

    Of a CPU it is the least that the host and the containers around the process allow.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):  # which Windows lacks
        return None
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *group_limits()])


def group_limits(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> Iterator[int]:
    """Yield the limit of memory of each control group around this process.

    Containers are such groups, of version 1 or 2; `groups` names one of each hierarchy. A container
    may see its own group as `root`, and then the path that it is told is not there.
    """
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        first = "memory" in controllers.split(",")
        name = "memory.limit_in_bytes" if first else "memory.max"
        group = Path(f"{root}/memory" if first else root, path.lstrip("/"))
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # ValueError: the limit is "max", which is none
                yield int((folder / name).read_text())


def check_memory(n_bytes: int, what: str, device: torch.device | str) -> None:
    """Raise a UserError if a device could never hold `n_bytes`."""
    has = device_memory(device)
    if has and n_bytes > has:
        needed, most = (f"{size / 1e9:,.1f} GB" for size in (n_bytes, has))
        raise UserError(f"{what} needs {needed} of memory, but {device} has {most}; choose less")


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
        nvidia = self.device.type == "cuda" and not torch.version.hip  # an MI300's number is 9, too
        if not nvidia or torch.cuda.get_device_capability(self.device)[0] != 9:
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
        flops = next((flops for gpu, flops in PEAK_FLOPS.items() if f"{gpu} " in name), 0.0)
        return self.world_size * flops


def set_up_machine(config: Any) -> Machine:
    """Choose what train.py's config asks for; UserError if it cannot be had.

    Where torchrun started this process it has joined the others already, and has its own device.
    """
    device = find_device(config.device)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and device.type in ("cuda", "xpu") and device.index is None:
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if device.type == "cpu" and config.compile:
        # Otherwise the compiled gradient of an embedding is summed in an order that varies.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # filling would take time
    is_small = config.n_embd <= NARROW and config.max_seq_len <= SHORT
    onednn = multiply_by_onednn(allowed=device.type == "cpu" and is_small)
    join()
    return Machine(
        device=device,
        dtype=choose_dtype(config.dtype, device, config.n_embd, config.compile),
        rank=int(os.environ.get("RANK", 0)),
        world_size=world_size,
        mesh=make_mesh(config.shard, device.type),
        onednn=onednn,
    )


def new_model(config: ModelConfig, machine: Machine) -> LLaMaTransformer:
    """Return a model with new weights, the same for any number of processes that share it out.

    All processes draw all numbers, one tensor after the other, and each keeps its own rows.
    """
    model = shapes_of(config)
    machine.share_out(model)
    materialize(model, machine.device)
    for module in model.modules():  # its constructor would draw numbers, which nobody reads
        if isinstance(module, nn.Embedding):
            nn.Embedding(module.num_embeddings, module.embedding_dim)
        elif isinstance(module, nn.Linear):
            nn.Linear(module.in_features, module.out_features, module.bias is not None)
    draw_weights(model)
    return model


@torch.no_grad()
def draw_weights(model: LLaMaTransformer) -> None:
    """Give all parameters the values that new ones begin with; each process keeps its own rows."""
    for name, parameter in model.named_parameters():
        drawn = torch.empty(parameter.shape)
        model.init_weight(name, drawn)
        fill(parameter, drawn)


def compile_for_training(
    model: LLaMaTransformer, batch_size: int, machine: Machine, in_rows: bool = False
) -> None:
    """Compile the model in place; after one warning leave it as it is where compiling fails.

    One batch of training's shape is computed at once, forward and backward, because a missing
    compiler shows only there. `in_rows`: batches are rows of several documents, each with its own
    positions.
    """
    options = vector_options()
    if machine.onednn:
        options["pattern_matcher"] = False  # patterns replace the attention that oneDNN is fast at
    modules: list[nn.Module] = [model]
    if machine.mesh is not None or model.recompute or model.loss_chunks > 1:
        # What happens between blocks, when weights are gathered or computed again, cannot be
        # compiled. Blocks that are compiled by themselves share one code.
        modules = list(model.decoder_blocks)
    for module in modules:
        module.compile(options=options)
    shape = batch_size, model.config.max_seq_len
    tokens = torch.zeros(shape, dtype=torch.long, device=machine.device)
    try:
        with machine.autocast():
            positions = tokens.clone() if in_rows else None
            loss = model(tokens, tokens.clone(), positions, reduction="sum")[1]
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        library = re.search(r"ImportError: (\S+\.so): ", str(error))
        if library and Path(library[1]).is_file():
            # A kill during compiling leaves an empty library in torch's cache, which torch never
            # replaces: without it the next try compiles again.
            Path(library[1]).unlink()
            return compile_for_training(model, batch_size, machine, in_rows)
        for module in modules:
            module.compile(disable=True)
        reason = " ".join(str(error).split())[:160]
        note(f"warning: training without torch.compile, which failed: {reason}")
    finally:
        model.zero_grad(set_to_none=True)


def is_compiled(model: LLaMaTransformer) -> bool:
    """Tell whether compile_for_training has compiled a model, or its blocks."""
    return any(module._compiled_call_impl for module in (model, *model.decoder_blocks))


def vector_options() -> dict[str, bool]:
    """Return torch.compile's option that spares a second Python, which tries if vector code runs.

    It is for processors that have vector code: elsewhere the compiler would take it to be there.
    """
    return {"cpp.vec_isa_ok": True} if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else {}


def multiplies_bf16() -> bool:
    """Tell whether the CPU has instructions for bf16 products (torch has no public names)."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def onednn_is_faster() -> bool:
    """Tell whether oneDNN multiplies faster than MKL, which leaves AMD's AVX-512 unused."""
    has = torch.cpu.get_capabilities()
    amd = str(has.get("cpu_name")).startswith("AMD")
    return amd and bool(has.get("avx512_f")) and not has.get("amx_tile")


def multiply_by_onednn(allowed: bool) -> bool:
    """Let oneDNN multiply float32 matrices, if allowed, where it is faster; tell whether it does.

    PyTorch asks it only where products may be rounded to bfloat16, which without AMX none is.
    """
    faster = allowed and onednn_is_faster()
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if faster else "none"
    return faster


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters that a model of this shape has, without making it."""
    if config.n_embd * max(config.n_heads * config.head_width, config.hidden_width) > 2**58:
        return 2**58  # more than torch can count
    return by_layers(config, n_params)


def by_layers(config: ModelConfig, count: Callable[[LLaMaTransformer], int]) -> int:
    """Return what `count` gives for a model of this shape, from models of one and of two layers."""
    one, two = (count(shapes_of(replace(config, n_layers=n))) for n in (1, 2))
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

    6 for each weight that multiplies it, 4 for a frozen one, the input embedding not counted, and
    12 L H D T for attention over a full window.
    """
    c = model.config
    matrices = [p for p in model.decoder_blocks.parameters() if p.dim() == 2]
    blocks = sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices)
    head = c.vocab_size * c.n_embd * (6 if model.final_linear.weight.requires_grad else 4)
    head_widths = c.head_width + (c.v_head_dim if c.use_mla else c.head_width)
    attention = 6 * c.n_layers * c.n_heads * head_widths * c.max_seq_len
    return blocks + head + attention


def training_seconds(config: ModelConfig, n_tokens: float) -> float:
    """Return about how long training on so many tokens takes on this machine's first device.

    It is told by the speed of a matrix product, which is measured for half a second. Of that,
    small models reach a fifth on a CPU, and larger ones half on a GPU.
    """
    from torch.utils.benchmark import Timer

    device = find_device("auto")
    size, reached = (1024, 0.2) if device.type == "cpu" else (8192, 0.5)
    matrix = torch.rand(size, size, device=device).to(choose_dtype("auto", device, config.n_embd))
    product = "(a @ a)[0, 0].item()"  # which waits for the device
    timer = Timer(product, globals={"a": matrix}, num_threads=torch.get_num_threads())
    speed = 2 * size**3 / timer.blocked_autorange(min_run_time=0.5).median  # FLOPs a second
    return n_tokens * flops_per_token(shapes_of(config)) / (reached * speed)
