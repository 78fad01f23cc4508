"""hardconcrete.py against Monte Carlo, autograd, and Eq. 3-7 written out for single numbers."""
import math

import pytest
import torch
from torch.autograd import gradcheck

from hardconcrete import (
    EPS, GATES, harden, lagrangian, prob_zero,
    sample_u, sample_z, whole_share)

LOG_ALPHA = torch.tensor([-4.0, -2.0, -0.7, 0.0, 0.9, 2.5, 4.6], dtype=torch.float64)


def draw(*shape):
    return sample_u(shape, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gate", GATES)
def test_closed_form_of_zero_equals_monte_carlo(gate):
    n, p = 200_000, prob_zero(LOG_ALPHA, gate)
    u = draw(n, len(LOG_ALPHA)).double()
    z = sample_z(LOG_ALPHA, u, gate)
    drawn = (z == 0).double().mean(0)
    sigma = (p * (1 - p) / n).sqrt()
    assert ((drawn - p).abs() < 4 * sigma).all()


def test_the_two_gates_by_hand():
    """The paper's at log_alpha = 0; and that of CoFi's code, sigmoid(-1.5986 - log_alpha)."""
    p = prob_zero(torch.zeros(1), "paper")
    assert p.item() == pytest.approx(0.0267, abs=5e-5)
    cofi = torch.sigmoid(-1.5986 - LOG_ALPHA)
    torch.testing.assert_close(prob_zero(LOG_ALPHA, "louizos"), cofi, rtol=0, atol=1e-5)


@pytest.mark.parametrize("u", [0.003, 0.4, 0.98])
@pytest.mark.parametrize("log_alpha", [-1.3, 0.8])
def test_equations_4_to_6_written_out(u, log_alpha):
    noise = math.log(u / (1 - u))
    inner = {"paper": 2 / 3 * noise + log_alpha, "louizos": 3 / 2 * (noise + log_alpha)}
    given = torch.tensor([log_alpha, u], dtype=torch.float64)
    for gate in GATES:
        s = 1 / (1 + math.exp(-inner[gate]))
        s_bar = 1.2 * s - 0.1
        z = sample_z(*given, gate)
        assert z.item() == pytest.approx(min(1, max(0, s_bar)), abs=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_gradients(gate):
    u = torch.linspace(0.05, 0.95, 7).double()
    log_alpha = LOG_ALPHA.clone().requires_grad_()
    assert gradcheck(lambda x: sample_z(x, u, gate), log_alpha)
    assert gradcheck(lambda x: prob_zero(x, gate), log_alpha)


def test_u_is_uniform_inside_epsilon_and_repeats_with_its_seed(monkeypatch):
    u = draw(50_000, 2)
    assert abs(u.mean() - 0.5) < 4 * (1 / 12 / u.numel()) ** 0.5
    assert u.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert torch.equal(u, draw(50_000, 2))
    ends = torch.tensor([0.0, 1.0])
    monkeypatch.setattr(torch, "rand", lambda _, generator: ends)
    torch.testing.assert_close(draw(2), ends.clamp(EPS, 1 - EPS), rtol=0, atol=1e-8)


def test_lagrangian_by_hand_and_its_ascent():
    values = torch.tensor([0.5, 2, 4], requires_grad=True)        # t, lambda_1, lambda_2
    t, lambda_1, lambda_2 = values
    L_s = lagrangian(t, 0.25, lambda_1, lambda_2)
    L_s.backward()
    assert L_s == 0.75
    assert values.grad.tolist() == [4, 0.25, 0.0625]              # lambdas rise while t is off


@pytest.mark.parametrize("s_target, n, skipped", [
    (0.375, 64, 24),                                              # of the paper's tables
    (0.361, 72, 26),
    (0.125, 36, 5),                                               # 4.5 goes up
    (0.5, 62, 31),                                                # a float32 1 / 62 is too small
    (0, 60, 0),
    (1, 60, 60)])
def test_hardening_skips_a_number_of_gates_exactly(s_target, n, skipped):
    share = whole_share(s_target, n)
    assert share == skipped / n
    z = harden(torch.linspace(1, -1, n), torch.full((n,), 1 / n), share)
    assert z[:n - skipped].all()
    assert not z[n - skipped:].any()


def test_of_equal_log_alpha_the_lower_index_is_skipped():
    log_alpha = torch.tensor([0.5, -1.0, 0.5, 0.5, 3.0, -2.0])
    z = harden(log_alpha, torch.full((6,), 1 / 6), 0.5)
    assert z.tolist() == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_a_share_of_costs_is_met_by_the_shortest_prefix(seed):
    generator = torch.Generator().manual_seed(seed)
    log_alpha, cost = torch.rand(2, 13, generator=generator)
    cost /= cost.sum()
    z = harden(log_alpha, cost, 0.4)
    order = log_alpha.argsort()
    gone = order[:(~z).sum()]
    assert not z[gone].any()
    assert cost[gone].sum() >= 0.4 > cost[gone[:-1]].sum()
