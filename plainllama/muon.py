"""Muon: momentum made orthogonal, for hidden matrices (arXiv:2502.16982, 2510.05491)."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from plainllama.shard import in_shares, local, part

ROW_DECAY = 0.95  # of the mean squares of rows


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update has all singular values near 1, and decoupled weight decay.

    The matrices of one shape are updated together, as one tensor (N, rows, columns), where
    torch.optim.Muon takes one after the other. Each row of an update is divided by the root mean
    square of that row so far (NorMuon), which begins as it is where all rows are alike: as Muon.
    An update's root mean square is 0.2 lr, as AdamW's is, so that both take the same rate.
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
            lr, momentum = group["lr"], group["momentum"]
            for matrix in matrices:
                if not self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                    self.state[matrix]["row_square"] = part(even_rows(matrix), matrix)
            # All but newton_schulz is done on the rows that this process keeps.
            gradients = [local(matrix.grad) for matrix in matrices]
            buffers = [local(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
            nesterov = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))
            updates = in_shares(newton_schulz, nesterov, matrices[0])  # (N, rows, columns)
            updates = updates.contiguous()  # rows add up in one order, however they are shared out
            squares = [local(self.state[matrix]["row_square"]) for matrix in matrices]
            newest = updates.square().mean(dim=2, keepdim=True)  # (N, rows, 1)
            torch._foreach_lerp_(squares, list(newest.unbind()), 1 - ROW_DECAY)
            updates = updates / (torch.stack(squares).sqrt() + 1e-8)
            kept = [local(matrix) for matrix in matrices]
            torch._foreach_mul_(kept, 1 - lr * group["weight_decay"])
            torch._foreach_add_(kept, list(updates.unbind()), alpha=-0.2 * lr)


def even_rows(matrix: Tensor) -> Tensor:
    """Return the mean square, (rows, 1), of each row of an orthogonal update with equal rows."""
    return torch.full((len(matrix), 1), 1 / max(matrix.shape), device=matrix.device)


def newton_schulz(matrices: Tensor) -> Tensor:
    """Return (N, rows, columns) with all singular values near 1, and the same singular vectors.

    Five steps of x <- a x + b (x xᵀ) x + c (x xᵀ)² x, with the coefficients of Jordan et al. 2024,
    which carry every singular value from (0, 1] to about 0.7 to 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(torch.bfloat16 if x.is_cuda else x.dtype)
    for _ in range(5):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, square, x, beta=a)
    return (x.mT if tall else x).type_as(matrices)
