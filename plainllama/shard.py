"""Models that no one device holds: each process keeps its rows of every tensor (fully_shard).

PyTorch's FSDP2 gathers a block's weights when the block runs, and adds the gradients up in the
processes that keep them. A tensor that is kept so is a DTensor; everything that reads or writes
whole ones, to start a run or to save it, goes through `whole`, `local` and `fill`, which take plain
tensors as they are. So a checkpoint is the same whatever wrote it.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import LLaMaTransformer, ModelConfig
from plainllama.processes import joined
from plainllama.settings import UserError

Shard = Literal["none", "all", "node"]

# torch.distributed.fsdp and .tensor are imported where they are used: that takes a second, and not
# every build of torch has them.


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
    if shard == "all" or of_node == world_size:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    if world_size % of_node:
        raise UserError(
            f"shard=node needs as many processes on every node, but {world_size} processes are "
            f"not a multiple of the {of_node} of this one: shard=all takes any number"
        )
    sizes = world_size // of_node, of_node
    return init_device_mesh(device_type, sizes, mesh_dim_names=("replicate", "shard"))


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


def new_model(
    config: ModelConfig, device: torch.device, share_out: Callable[[LLaMaTransformer], None]
) -> LLaMaTransformer:
    """Return a model that `share_out` divides, with weights drawn as a whole one's are.

    All processes draw all numbers, one tensor after the other, and keep their own.
    """
    with torch.device("meta"):
        model = LLaMaTransformer(config)
    share_out(model)
    materialize(model, device)
    for module in model.modules():  # the numbers that the layers' constructors draw, to no avail
        if isinstance(module, nn.Embedding):
            nn.Embedding(module.num_embeddings, module.embedding_dim)
        elif isinstance(module, nn.Linear):
            nn.Linear(module.in_features, module.out_features, module.bias is not None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.empty(parameter.shape)
            model.init_weight(name, drawn)
            fill(parameter, drawn)
    return model


def materialize(model: LLaMaTransformer, device: torch.device | str) -> None:
    """Give a model that is on the meta device memory, and all but the parameters their values."""
    if any(map(is_sharded, model.parameters())):
        model.to_empty(device=device)
    else:  # so as not to import sympy, which to_empty() needs: a second at the start
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                made = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                setattr(module, name, nn.Parameter(made))
    if model.config.tie_embeddings:
        model.final_linear.weight = model.embeddings.weight
    model.init_rope()


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor; all processes must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return the rows that this process keeps, as a view."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Return which row of the whole tensor this process's first one is; they are cut as by chunk"""
    if not is_sharded(tensor):
        return 0
    mesh, axis = tensor.device_mesh, tensor.device_mesh.ndim - 1
    return min(len(tensor), mesh.get_local_rank(axis) * math.ceil(len(tensor) / mesh.size(axis)))


def fill(parameter: Tensor, rows: Tensor) -> bool:
    """Set a parameter's first rows, and to zero what is left; each process sets those it keeps.

    `rows` may be mapped from a file, of which the others' are then not read. Returns whether all
    the numbers that were read are finite.
    """
    mine, first = local(parameter.detach()), first_row(parameter)
    read = rows[first : first + len(mine)]
    mine[: len(read)] = read
    mine[len(read) :] = 0
    return bool(mine.isfinite().all())


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor with its rows shared out as those of `like` are.

    What another process keeps is not read.
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor

    first = first_row(like)
    rows = tensor[first : first + len(local(like))].to(like.device, copy=True)
    layout = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    return DTensor.from_local(rows, like.device_mesh, like.placements, **layout)


def in_shares(function: Callable[[Tensor], Tensor], rows: Tensor, like: Tensor) -> Tensor:
    """Return this process's rows of function(matrices), whose rows here are `rows`, (N, r, columns)

    `like` is one of the N matrices. Each process is sent its share of them whole, and sends the
    results' rows back: two collectives, and each matrix is computed once.
    """
    if not is_sharded(like):
        return function(rows)
    mesh = like.device_mesh
    group, size = mesh.get_group(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    me, (N, r, columns), height = dist.get_rank(group), rows.shape, len(like)
    chunk = math.ceil(height / size)
    heights = [max(0, min(chunk, height - n * chunk)) for n in range(size)]  # rows in each process
    shares = [N // size + (n < N % size) for n in range(size)]  # matrices of each process
    # Sent to n: the rows here of n's matrices. Received from n: n's rows of the matrices here.
    here = [share * r * columns for share in shares]
    there = [shares[me] * h * columns for h in heights]
    received = rows.new_empty(sum(there))
    dist.all_to_all_single(received, rows.flatten(), there, here, group=group)
    parts = [
        x.view(shares[me], h, columns) for x, h in zip(received.split(there), heights, strict=True)
    ]
    matrices = torch.cat(parts, dim=1)
    results = function(matrices) if shares[me] else matrices
    sent = torch.cat([x.flatten() for x in results.split(heights, dim=1)])
    returned = torch.empty_like(rows).flatten()
    dist.all_to_all_single(returned, sent, here, there, group=group)
    return returned.view_as(rows)


def all_reduce_in(model: nn.Module, last: bool) -> None:
    """Say whether the next backward pass is a step's last: only then do copies add up gradients.

    Within a copy every micro-step's gradients are added up at once, because to keep them whole
    until the last would take a whole model's memory.
    """
    if hasattr(model, "set_requires_all_reduce"):
        model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """Give up the weights that a forward pass without a backward pass has left gathered."""
    if hasattr(model, "reshard"):
        model.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep whole the weights that are in no block, so that model.forward itself can be called."""
    if hasattr(model, "unshard"):
        model.unshard()
    yield
    reshard(model)
