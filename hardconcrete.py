"""Hard-concrete gates: random z in [0, 1] with exact zeros and ones, trained by gradients.

Source: Eq. 3-7 of IG-Pruning, arXiv:2511.02213, constants from its Table 5; the distribution is
        Louizos et al. 2018, arXiv:1712.01312; the Lagrangian is Wang et al. 2020, arXiv:1910.04732.
Left out: optimiser and schedule (igp.py).
Dims:   B blocks; "..." leading axes (a batch, or none). Here t is the current sparsity of Eq. 7,
        the share of blocks skipped, not a number of tokens. z = 1 keeps a block, 0 skips it.
Run:    python hardconcrete.py    (only this demonstration imports other files)
"""
import math
import sys

import torch
from torch import Tensor

INV_BETA = 2 / 3                   # 1 / beta of Eq. 4, Table 5
STRETCH_L, STRETCH_R = -0.1, 1.1   # l and r of Eq. 5, Table 5
EPS = 1e-6                         # epsilon of Table 5: u stays inside [EPS, 1 - EPS]
ROUNDING = 1e-6                    # of a sum of float32 weights, relative to the sum of all

# s = sigmoid(a logit(u) + b log_alpha), as (a, b).
# Silent: which of the two Table 5's 1/beta = 2/3 means. "paper" is Eq. 4 as printed; "louizos" is
# the cited code, which divides noise *and* log_alpha by a temperature of 2/3.
GATES = {"paper": (INV_BETA, 1.0), "louizos": (1 / INV_BETA, 1 / INV_BETA)}


def sample_u(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Eq. 3: u ~ Uniform(EPS, 1 - EPS), float32, of `shape`, from a CPU generator."""
    return torch.rand(shape, generator=generator) * (1 - 2 * EPS) + EPS


def sample_z(log_alpha: Tensor, u: Tensor, gate: str) -> Tensor:
    """Eq. 4-6: z = clip(s (r - l) + l, 0, 1), s = sigmoid(1/beta log(u / (1 - u)) + log alpha).

    log_alpha (..., B), u (..., B) in (0, 1), broadcast; gate "paper" or "louizos". z (..., B).
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

    t and s_target are shares of blocks, 0-1. log_alpha descends on it, the lambdas ascend.
    Example: t = 0.5, s_target = 0.25, lambda_1 = 2, lambda_2 = 4 -> 0.5 + 0.25 = 0.75.
    """
    return lambda_1 * (t - s_target) + lambda_2 * (t - s_target) ** 2


def blocks_to_skip(s_target: float, B: int) -> int:
    """floor(s_target B + 1/2): the whole number of blocks nearest to the target share.

    Silent: the rounding. This one gives the counts of the paper's tables.
    """
    return math.floor(s_target * B + 0.5)


def harden(log_alpha: Tensor, to_skip: float, weight: Tensor | None = None) -> Tensor:
    """The binary z of Stage 2: the smallest log_alpha become 0 until to_skip is met, all others 1.

    log_alpha (B,); z boolean (B,). Of equal log_alpha the lower index is skipped first.
    to_skip is a number of blocks or, with weight (B,) float32 > 0, a sum of theirs, met up to
    ROUNDING: then blocks that it is met without are kept after all, the largest log_alpha first.
    Silent: the paper does not say how z is binarised. This meets a number of blocks exactly.
    Raises ValueError unless 0 <= to_skip <= B (or the sum), and every log_alpha is a number.
    """
    weight = torch.ones(log_alpha.numel()) if weight is None else weight
    total, most = 0.0, weight.sum().item()
    if not 0 <= to_skip <= most:
        raise ValueError(f"to_skip={to_skip} is outside [0, {most:g}]")
    if log_alpha.isnan().any():
        raise ValueError("log_alpha holds NaN: this mask is not trained")
    order, skipped = torch.argsort(log_alpha.cpu(), stable=True).tolist(), []
    while total < to_skip - ROUNDING * most:
        skipped.append(order[len(skipped)])
        total += weight[skipped[-1]].item()
    for i in reversed(skipped):
        if total - weight[i].item() >= to_skip - ROUNDING * most:
            skipped.remove(i)
            total -= weight[i].item()
    z = torch.ones(len(order), dtype=torch.bool)
    z[skipped] = False
    return z


def block_outputs(texts: list[str]) -> Tensor:
    """What each block of the embedded SmolLM2 adds to the residual stream: (B, tokens * d).

    Without each text's first token: in the middle layers its state is about 190 times as large as
    the median of the others (measured on one text).
    """
    import hub
    import model as llm
    folder, outputs = hub.model_folder(hub.EMBEDDED), []
    model, tokenizer = llm.load(folder, "cpu", torch.float32), hub.load_tokenizer(folder)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            block.register_forward_hook(lambda _m, _x, y: outputs.append(y[0, 1:].flatten()))
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer.encode(text).ids[:64]]))
    return torch.cat([torch.stack(outputs[i:i + model.B])
                      for i in range(0, len(outputs), model.B)], dim=1)


def print_gates(generator: torch.Generator) -> None:
    """P(z = 0) in closed form beside 100,000 draws, P(z = 1) and the mean of z, for both gates."""
    print("gate     log_alpha  P(z = 0)  of 100,000 draws  P(z = 1)  mean of z")
    for gate in GATES:
        for value in (-4.0, -2.0, 0.0, 2.0, 4.0):
            z = sample_z(torch.tensor(value), sample_u((100_000,), generator), gate)
            print(f"{gate:8} {value:9} {prob_zero(torch.tensor(value), gate):9.4f} "
                  f"{(z == 0).float().mean():17.4f} {(z == 1).float().mean():9.4f} "
                  f"{z.mean():10.4f}")


def main() -> None:
    """The gate by formula and by draws; then 60 gates on what the blocks of a real model add.

    The loss is not Eq. 8's but a stand-in that takes no forward: the share of the residual stream,
    |sum_i (1 - z_i) y_i|^2 / |sum_i y_i|^2, that is missing if no later block reacts.
    """
    import evaluate
    import hub
    generator, s_target = torch.Generator().manual_seed(0), 0.25
    print_gates(generator)
    y = block_outputs([x["text"] for x in hub.calibration_texts("wikipedia", None)[:16]])
    G, B = y @ y.T / y.sum(0).square().sum(), len(y)              # (B, B)

    def missing(z: Tensor) -> Tensor:
        """The stand-in loss of z (B,)."""
        return (1 - z) @ G @ (1 - z)

    log_alpha, lambdas = torch.ones(B, requires_grad=True), torch.zeros(2, requires_grad=True)
    adam = torch.optim.Adam([{"params": [log_alpha], "lr": 0.05},
                             {"params": [lambdas], "lr": 0.05, "maximize": True}])
    print(f"\n{B} gates, target {s_target}\nstep  missing      t  closed  lambda_1  lambda_2")
    for step in range(1001):
        z = sample_z(log_alpha, sample_u((B,), generator), "paper")
        t = 1 - z.mean()
        adam.zero_grad()
        (missing(z) + lagrangian(t, s_target, *lambdas)).backward()
        adam.step()
        if step % 200 == 0:
            print(f"{step:4} {missing(z):8.4f} {t:6.3f} {(z == 0).sum():7} "
                  f"{lambdas[0]:9.3f} {lambdas[1]:9.3f}")
    n_skip = blocks_to_skip(s_target, B)
    gates, smallest = harden(log_alpha.detach(), n_skip), harden(G.diagonal(), n_skip)
    random = [harden(torch.rand(B, generator=generator), n_skip) for _ in range(1000)]
    print(f"\nhardened: {evaluate.picture(gates)}\nmissing without the {n_skip} blocks of these "
          f"gates {missing(gates.float()):.4f}, of the smallest outputs "
          f"{missing(smallest.float()):.4f}, of the best of 1,000 random masks "
          f"{min(missing(z.float()) for z in random):.4f}")


if __name__ == "__main__":
    import hub
    sys.exit(hub.guarded("hardconcrete.py", main))
