"""The processes of a run: joining them, agreeing, and sharing a model out (FSDP2).

torchrun starts them. What can differ between processes or their machines is asked here, so that all
go on with the same answer, or all end with one line from the first.

A model that no one device holds is shared out by rows: PyTorch's fully_shard gathers a block's
weights when the block runs, and adds up its gradients in the processes that keep them. A tensor
that is kept so is a DTensor. Everything that reads or writes whole tensors goes through `to_full`,
`to_local` and `fill`, which take plain tensors as they are: a checkpoint is the same whatever
number of processes wrote it. torch.distributed.fsdp and .tensor are imported where they are used,
because that takes a second, and not every build of torch has them.
"""

import math
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import LLaMaTransformer
from plainllama.terminal import UserError, command

T = TypeVar("T")
Shard = Literal["none", "all", "node"]
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


def gathered(mine: T) -> list[T]:
    """Return what each process has, by rank."""
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return theirs


def agree(call: Callable[[], T]) -> T:
    """Return what `call` returns here, if it is refused in no process; else all end."""
    if not joined():
        return call()
    result, refusal = None, None
    try:
        result = call()
    except (UserError, OSError) as error:
        refusal = str(error)
    for rank, text in enumerate(gathered(refusal)):
        if text is not None:
            end_all(text if rank == 0 else f"{text} (rank {rank})")
    return result


def from_first(look: Callable[[], T]) -> T:
    """Return in all processes what `look` returns in the first, which alone calls it.

    What it refuses ends all of them.
    """
    if not joined():
        return look()
    return gathered(agree(look if dist.get_rank() == 0 else lambda: None))[0]


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

    gloo's threads outlive their group where a mesh holds it, and one that lets go of a
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
    theirs = gathered((socket.gethostname(), {key: str(value) for key, value in what.items()}))
    first_host, first = theirs[0]
    for rank, (host, values) in enumerate(theirs):
        for key in first | values:
            if first.get(key) != values.get(key):
                shown, other = (found.get(key, "none")[:60] for found in (first, values))
                end_all(
                    f"rank {rank} on {host} has another {key} than rank 0 on {first_host} "
                    f"({other}, not {shown}): all processes of a run must have the same"
                )


def make_mesh(shard: Shard, device_type: str) -> Any:
    """Return the mesh of processes that share the model's tensors out; None if all have them whole.

    Its last axis counts the processes that keep one copy between them: all, or a node's. The first
    of two counts the copies. UserError if there are no other processes, or nodes differ in size.
    """
    if shard == "none":
        return None
    if not joined():
        raise UserError(
            f"shard={shard} shares the model out among the processes that torchrun starts: "
            "torchrun --nproc_per_node=8 train.py ..., or leave shard out"
        )
    from torch.distributed.device_mesh import init_device_mesh

    world_size, of_node = dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    sizes, names = (world_size,), ("shard",)
    if shard == "node" and of_node < world_size:
        sizes, names = (world_size // of_node, of_node), ("replicate", "shard")
    if math.prod(sizes) < world_size:
        raise UserError(
            f"shard=node needs as many processes on every node, but {world_size} processes are "
            f"not a multiple of the {of_node} of this one: shard=all takes any number"
        )
    return init_device_mesh(device_type, sizes, mesh_dim_names=names)


def shard_model(model: LLaMaTransformer, mesh: Any, dtype: torch.dtype) -> None:
    """Share out the tensors of a model, in place; on the meta device, that takes no memory at all.

    The blocks' weights travel in `dtype`, in which autocast would multiply them anyway. All else is
    one group, fp32: tied matrices must be in one, and the residual stream begins in it. Gradients
    are added up in fp32, and not averaged, for each is a part of one sum.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Inputs stay as they are, or the tables of RoPE would be rounded too.
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for block in model.decoder_blocks:
        fully_shard(block, mesh=mesh, mp_policy=narrow)
    fully_shard(model, mesh=mesh, mp_policy=exact)
    # The logits are a view, without the padding; nobody changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for module in (*model.decoder_blocks, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def materialize(model: LLaMaTransformer, device: torch.device | str) -> None:
    """Give a model that is on the meta device memory, and all but the parameters their values."""
    if any(map(is_sharded, model.parameters())):
        model.to_empty(device=device)
    else:  # so as not to import sympy, which to_empty() needs: a second at the start
        made: dict[Tensor, nn.Parameter] = {}  # one for all modules that share it
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                new = nn.Parameter(empty, weight.requires_grad)
                setattr(module, name, made.setdefault(weight, new))
    if model.config.tie_embeddings:
        model.final_linear.weight = model.embeddings.weight
    model.init_rope()


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def to_full(tensor: Tensor) -> Tensor:
    """Return a whole tensor; all processes must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def to_local(tensor: Tensor) -> Tensor:
    """Return the rows that this process keeps, as a view."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def row_offset(tensor: Tensor) -> int:
    """Return which row of the whole tensor this process's first one is; they are cut as by chunk"""
    if not is_sharded(tensor):
        return 0
    mesh, axis = tensor.device_mesh, tensor.device_mesh.ndim - 1
    return min(len(tensor), mesh.get_local_rank(axis) * math.ceil(len(tensor) / mesh.size(axis)))


def fill(parameter: Tensor, rows: Tensor) -> None:
    """Set a parameter's first rows, and to zero what is left; each process sets those it keeps.

    `rows` may be mapped from a file, of which the others' are then not read.
    """
    mine, first = to_local(parameter.detach()), row_offset(parameter)
    read = rows[first : first + len(mine)]
    mine[: len(read)] = read
    mine[len(read) :] = 0


def rows_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor with its rows shared out as those of `like` are.

    What another process keeps is not read.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor

    first = row_offset(like)
    rows = tensor[first : first + len(to_local(like))].to(like.device, copy=True)
    return DTensor.from_local(
        rows,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def set_all_reduce(model: nn.Module, enabled: bool) -> None:
    """Say whether copies of a model add up their gradients in the next backward pass.

    They do in a step's last one. Within a copy the gradients of every micro-step are added up at
    once, because keeping them whole until the last would take the memory of a whole model.
    """
    if hasattr(model, "set_requires_all_reduce"):
        model.set_requires_all_reduce(enabled)


def reshard(model: nn.Module) -> None:
    """Give up the weights that a forward pass without a backward pass has left gathered."""
    if hasattr(model, "reshard"):
        model.reshard()


@contextmanager
def generating(model: nn.Module) -> Iterator[None]:
    """Let a model in training generate text: uncompiled, with the weights outside blocks whole."""
    model.eval()
    if hasattr(model, "unshard"):
        model.unshard()
    with torch.compiler.set_stance("force_eager"):
        yield
    reshard(model)
    model.train()


def resume_command(out_dir: Path) -> str:
    """Return the command that continues a run, in as many processes as there are now."""
    program, start = "python", []
    if "LOCAL_WORLD_SIZE" in os.environ:
        local, world = (int(os.environ[f"{kind}WORLD_SIZE"]) for kind in ("LOCAL_", ""))
        program, start = "torchrun", [f"--nproc_per_node={local}"]
        if world > local:  # on each node; the port of this run's end may still be taken
            start += [f"--nnodes={world // local}", "--rdzv-backend=c10d"]
            start += [f"--rdzv-endpoint={os.environ['MASTER_ADDR']}:29400"]
    return command(*start, "train.py", f"--out_dir={out_dir}", "--resume", program=program)
