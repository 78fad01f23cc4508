"""Hard-concrete gates: random z in [0, 1] with exact zeros and ones, trained by gradients.

Source: Eq. 3-7 of IG-Pruning, arXiv:2511.02213, constants from its Table 5; the distribution is
        Louizos et al. 2018, arXiv:1712.01312; the Lagrangian is Wang et al. 2020, arXiv:1910.04732.
Left out: optimiser and schedule (igp.py).
Dims:   B gates, one a block (or one a layer); "..." leading axes (a batch, or none). Here t is the
        current sparsity of Eq. 7, a share, not a number of tokens. z = 1 keeps a block, 0 skips it.
Run:    python hardconcrete.py    (the gate by formula, and by draws)
"""
import math

import torch
from torch import Tensor

INV_BETA = 2 / 3                   # 1 / beta of Eq. 4, Table 5
STRETCH_L, STRETCH_R = -0.1, 1.1   # l and r of Eq. 5, Table 5
# Silent: what Table 5's epsilon is. As in the cited code, u stays inside [EPS, 1 - EPS].
EPS = 1e-6
ROUNDING = 1e-6                    # what a sum of float32 costs may fall short of its value

# s = sigmoid(a logit(u) + b log_alpha), as (a, b).
# Silent: which of the two Table 5's 1/beta = 2/3 means. "paper" is Eq. 4 as printed; "louizos" is
# the cited code, which divides noise *and* log_alpha by a temperature of 2/3.
GATES = {"paper": (INV_BETA, 1.0), "louizos": (1 / INV_BETA, 1 / INV_BETA)}


def sample_u(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Eq. 3: u ~ Uniform(EPS, 1 - EPS), float32 on the CPU, of `shape`.

    torch draws a multiple of 2^-24, uniformly; it is scaled into the interval. For ports without
    torch's stream tests/golden/port has the draws as data.
    """
    return torch.rand(shape, generator=generator) * (1 - 2 * EPS) + EPS


def sample_z(log_alpha: Tensor, u: Tensor, gate: str) -> Tensor:
    """Eq. 4-6: z = clip(s (r - l) + l, 0, 1), s = sigmoid(1/beta log(u / (1 - u)) + log alpha).

    log_alpha (..., B), u (..., B) in (0, 1), broadcast; gate "paper" or "louizos". z (..., B).
    Where s_bar is outside [0, 1], no gradient reaches log_alpha; at exactly 0 or 1 it does.
    """
    a, b = GATES[gate]
    s = torch.sigmoid(a * torch.log(u / (1 - u)) + b * log_alpha)  # Eq. 4
    s_bar = s * (STRETCH_R - STRETCH_L) + STRETCH_L                # Eq. 5
    return s_bar.clamp(0, 1)                                       # Eq. 6


def prob_zero(log_alpha: Tensor, gate: str) -> Tensor:
    """P(z = 0) in closed form, of log_alpha's shape.

    z = 0 where s <= -l / (r - l), so with Eq. 4 where logit(u) <= (log(-l / r) - b log_alpha) / a,
    and P(logit(u) <= x) = sigmoid(x) for a uniform u.
    Example: "louizos" at log_alpha = 0: sigmoid(2/3 log(1/11)) = 0.168.
    """
    a, b = GATES[gate]
    return torch.sigmoid((math.log(-STRETCH_L / STRETCH_R) - b * log_alpha) / a)


def lagrangian(t: Tensor, s_target: float, lambda_1: Tensor, lambda_2: Tensor) -> Tensor:
    """Eq. 7: L_s = lambda_1 (t - s_target) + lambda_2 (t - s_target)^2.

    t and s_target are shares of blocks, or of their FLOPs, 0-1. log_alpha descends on it, the
    lambdas ascend.
    Example: t = 0.5, s_target = 0.25, lambda_1 = 2, lambda_2 = 4 -> 0.5 + 0.25 = 0.75.
    """
    excess = t - s_target
    return lambda_1 * excess + lambda_2 * excess**2


def whole_share(s_target: float, n: int) -> float:
    """floor(s_target n + 1/2) / n: the share of whole blocks (or layers) nearest to the target.

    Silent: the rounding. This one gives the counts of the paper's tables.
    """
    return math.floor(s_target * n + 0.5) / n


def harden(log_alpha: Tensor, cost: Tensor, share: float) -> Tensor:
    """The binary z of Stage 2: the smallest log_alpha become 0 until their costs reach `share`.

    log_alpha (B,); cost (B,) float32 > 0 with sum 1; share 0-1, of `whole_share`, is the least that
    they reach, up to ROUNDING. z boolean (B,). Of equal ones the lower index goes first (stable).
    Silent: the paper does not say how z is binarised. With all costs 1/B this meets a number of
    blocks exactly.
    """
    order = log_alpha.argsort(stable=True)
    reached = cost[order].double().cumsum(0)
    before = reached - cost[order]                                 # by the gates ahead of each
    z = torch.ones_like(order, dtype=torch.bool)
    z[order[before < share - ROUNDING]] = False
    return z


def main() -> None:
    """P(z = 0) in closed form, the same by 100,000 draws, and their mean z, for both gates."""
    u = sample_u((100_000,), torch.Generator().manual_seed(0))
    print("gate     log_alpha  P(z = 0)  by draws  mean of z")
    for gate in GATES:
        for log_alpha in torch.arange(-4.0, 5.0, 2.0):
            z = sample_z(log_alpha, u, gate)
            drawn = (z == 0).float().mean()
            expected = prob_zero(log_alpha, gate)
            print(f"{gate:8} {log_alpha:9} {expected:9.4f} {drawn:9.4f} {z.mean():10.4f}")


if __name__ == "__main__":
    main()
