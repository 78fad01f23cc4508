"""hardconcrete.py against Monte Carlo, autograd, and Eq. 3-7 written out for single numbers."""
import math

import pytest
import torch
from torch.autograd import gradcheck

from hardconcrete import (
    EPS, GATES, harden, lagrangian, prob_zero,
    sample_u, sample_z, whole_share)

LOG_ALPHA = torch.linspace(-4, 4.6, 7).double()


def draw(*shape):
    return sample_u(shape, torch.Generator().manual_seed(0))


@pytest.fixture(params=GATES)
def gate(request):
    return request.param


def test_closed_form_of_zero_equals_monte_carlo(gate):
    n = 200_000
    p = prob_zero(LOG_ALPHA, gate)
    u = draw(n, len(LOG_ALPHA)).double()
    z = sample_z(LOG_ALPHA, u, gate)
    drawn = (z == 0).double().mean(0)
    sigma = (p * (1 - p) / n).sqrt()
    assert ((drawn - p).abs() < 4 * sigma).all()


def test_the_two_gates_by_hand():
    """The paper's at log_alpha = 0; and that of CoFi's code, sigmoid(-1.5986 - log_alpha)."""
    p = prob_zero(torch.zeros(1), "paper")
    assert p.item() == pytest.approx(0.0267, abs=5e-5)
    p = prob_zero(LOG_ALPHA, "louizos")
    cofi = torch.sigmoid(-1.5986 - LOG_ALPHA)
    torch.testing.assert_close(p, cofi, rtol=0, atol=1e-5)


@pytest.mark.parametrize("u", [0.003, 0.4, 0.98])
def test_equations_4_to_6_written_out(u, gate):
    noise = math.log(u / (1 - u))
    inner = 2 / 3 * noise + LOG_ALPHA
    if gate == "louizos":
        inner = 3 / 2 * (noise + LOG_ALPHA)
    s = 1 / (1 + (-inner).exp())
    wanted = (1.2 * s - 0.1).clamp(0, 1)
    u = torch.tensor(u)
    z = sample_z(LOG_ALPHA, u, gate)
    torch.testing.assert_close(z, wanted, rtol=0, atol=1e-6)


def test_gradients(gate):
    u = torch.linspace(0.05, 0.95, 7).double()
    log_alpha = LOG_ALPHA.clone().requires_grad_()
    assert gradcheck(lambda x: sample_z(x, u, gate), log_alpha)
    assert gradcheck(lambda x: prob_zero(x, gate), log_alpha)


def test_u_is_uniform_inside_epsilon_and_repeats_with_its_seed(monkeypatch):
    u = draw(50_000, 2)
    assert u.mean().item() == pytest.approx(0.5, abs=0.004)       # 4 sigma
    assert torch.equal(u, draw(50_000, 2))
    ends = torch.tensor([0.0, 1.0])
    monkeypatch.setattr(torch, "rand", lambda _, generator: ends)
    assert draw(2).tolist() == pytest.approx([EPS, 1 - EPS], abs=1e-7)


def test_lagrangian_by_hand_and_its_ascent():
    values = torch.tensor([0.5, 2, 4], requires_grad=True)
    t, lambda_1, lambda_2 = values
    L_s = lagrangian(t, 0.25, lambda_1, lambda_2)
    L_s.backward()
    assert L_s == 0.75
    assert values.grad.tolist() == [4, 0.25, 0.0625]              # lambdas rise while t is off


@pytest.mark.parametrize("s_target, n, skipped", [
    (0.361, 72, 26),                                              # of the paper's tables
    (0.125, 36, 5),                                               # 4.5 goes up
    (0.5, 62, 31),                                                # a float32 1 / 62 is too small
    (0, 60, 0)])
def test_hardening_skips_a_number_of_gates_exactly(s_target, n, skipped):
    share = whole_share(s_target, n)
    assert share == skipped / n
    log_alpha = torch.linspace(1, -1, n)
    cost = torch.full((n,), 1 / n)
    z = harden(log_alpha, cost, share)
    kept = n - skipped
    assert z[:kept].all()
    assert not z[kept:].any()


def test_of_equal_log_alpha_the_lower_index_is_skipped():
    log_alpha = torch.tensor([5, -10, 5, 5, 30, -20])
    cost = torch.full((6,), 1 / 6)
    z = harden(log_alpha, cost, 0.5)
    assert z.tolist() == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_a_share_of_costs_is_met_by_the_shortest_prefix(seed):
    generator = torch.Generator().manual_seed(seed)
    log_alpha, cost = torch.rand(2, 13, generator=generator)
    cost /= cost.sum()
    z = harden(log_alpha, cost, 0.4)
    n = (~z).sum()
    gone = log_alpha.argsort()[:n]
    assert not z[gone].any()
    assert cost[gone].sum() >= 0.4 > cost[gone[:-1]].sum()
