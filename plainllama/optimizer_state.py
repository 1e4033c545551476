"""The state of the optimizers as a checkpoint keeps it: one file of tensors, PARAMETER/KEY."""

import re
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from model import LLaMaTransformer
from plainllama.muon import Muon, even_rows
from plainllama.settings import UserError
from plainllama.shard import local, part
from plainllama.tensor_files import load_tensors


def optimizer_tensors(
    model: LLaMaTransformer, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Return the optimizers' state, each tensor as PARAMETER/KEY."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def load_optimizers(
    model: LLaMaTransformer, optimizers: list[torch.optim.Optimizer], checkpoint: Path
) -> None:
    """Read back the optimizers' state that `Run.save` wrote."""
    path = checkpoint / "train_state" / "optimizer.safetensors"
    names = {parameter: name for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    try:
        tensors = load_tensors(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    for key, tensor in numbered_to_named(tensors, optimizers, names).items():
        name, _, kind = key.rpartition("/")
        states[name][kind] = tensor
    has_rows = any(key.endswith("/row_square") for key in tensors)  # older checkpoints have none
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            state = states.get(names[parameter], {})
            if isinstance(optimizer, Muon):
                rows = even_rows(parameter)
                wanted = {"momentum_buffer": parameter.shape, "row_square": rows.shape}
                state |= {} if has_rows else {"row_square": rows}
            else:
                wanted = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter.shape)
                wanted |= {"step": torch.Size()}
            if {key: tensor.shape for key, tensor in state.items()} != wanted:
                raise UserError(f"{path} is damaged: it lacks the state of {names[parameter]}")
            # Of what is mapped from the file, each process reads what it will keep.
            kept = {k: part(t, parameter) if t.dim() else t for k, t in state.items()}
            if not all(local(tensor).isfinite().all() for tensor in kept.values()):
                raise UserError(f"{path} is damaged: {names[parameter]} has a state that is nan")
            saved["state"][index] = kept
        optimizer.load_state_dict(saved)


def numbered_to_named(
    tensors: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    names: dict[Tensor, str],
) -> dict[str, Tensor]:
    """Rename what older checkpoints hold: OPTIMIZER/NUMBER/KEY, of Muon one stack a shape."""
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(\d+)/(\d+)/(\w+)", key)
        if not match or int(match[1]) >= len(optimizers):
            named[key] = tensor
            continue
        groups = optimizers[int(match[1])].param_groups
        parameters = [p for group in groups for p in group["params"]][int(match[2]) :]
        rows = tensor.unbind() if match[3] == "mean" else [tensor]
        kind = "momentum_buffer" if match[3] == "mean" else match[3]
        for parameter, row in zip(parameters, rows, strict=False):
            named[f"{names[parameter]}/{kind}"] = row
    return named
