"""Muon: momentum made orthogonal, for hidden matrices (arXiv:2502.16982, 2510.05491)."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from plainllama.distributed import is_sharded, rows_like, to_local
from plainllama.machine import multiplies_bf16

ROW_DECAY = 0.95  # of the mean squares of rows


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update has all singular values near 1, and decoupled weight decay.

    The matrices of one shape are updated together, as one tensor (N, rows, columns), where
    torch.optim.Muon takes one after the other. Each row of an update is divided by the root mean
    square that this row has had so far (NorMuon), which begins with the value that equal rows have.
    The root mean square of an update is 0.2 lr, as that of AdamW is, so both take the same rate.
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
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if not matrices:
                continue
            for matrix in matrices:
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                    even = torch.full((len(matrix), 1), 1 / max(matrix.shape), device=matrix.device)
                    self.state[matrix]["row_square"] = rows_like(even, matrix)
            # All but newton_schulz is computed on the rows that this process keeps.
            weights = [to_local(matrix) for matrix in matrices]
            gradients = [to_local(matrix.grad) for matrix in matrices]
            buffers = [to_local(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
            squares = [to_local(self.state[matrix]["row_square"]) for matrix in matrices]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            nesterov = torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"]))
            updates = orthogonal(nesterov, matrices[0])  # (N, rows, columns)
            newest = updates.square().mean(dim=2, keepdim=True)  # (N, rows, 1)
            torch._foreach_lerp_(squares, list(newest.unbind()), 1 - ROW_DECAY)
            updates = updates / (torch.stack(squares).sqrt() + 1e-8)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, list(updates.unbind()), alpha=-0.2 * group["lr"])


def orthogonal(rows: Tensor, like: Tensor) -> Tensor:
    """Return newton_schulz of N matrices, (N, rows, columns); each process has its rows of them.

    `like` is one of the matrices. Where they are sharded by rows, each process is sent some of them
    whole and sends the rows of the results back, so that each matrix is computed once.
    """
    if not is_sharded(like):
        return newton_schulz(rows).contiguous()
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = like.device_mesh
    copies = [Replicate()] * (mesh.ndim - 1)
    by_row, by_matrix = [*copies, Shard(1)], [*copies, Shard(0)]
    whole = torch.empty((len(rows), *like.shape), device="meta")
    layout = {"run_check": False, "shape": whole.shape, "stride": whole.stride()}
    stacked = DTensor.from_local(rows, mesh, by_row, **layout)
    mine = stacked.redistribute(mesh, by_matrix).to_local()
    results = newton_schulz(mine).contiguous() if len(mine) else mine
    stacked = DTensor.from_local(results, mesh, by_matrix, **layout)
    return stacked.redistribute(mesh, by_row).to_local().contiguous()


def newton_schulz(matrices: Tensor) -> Tensor:
    """Return (N, rows, columns) with all singular values near 1, and the same singular vectors.

    Five steps of x <- a x + b (x xᵀ) x + c (x xᵀ)² x, with the coefficients of Jordan et al. 2024,
    which carry every singular value from (0, 1] to about 0.7 to 1.2. They are computed in bfloat16
    where the hardware multiplies that fast.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.is_cuda or (x.device.type == "cpu" and multiplies_bf16()):
        x = x.bfloat16()
    for _ in range(5):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, square, x, beta=a)
    return (x.mT if is_tall else x).type_as(matrices)
