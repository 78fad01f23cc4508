"""hardconcrete.py against Monte Carlo, autograd, and Eq. 3-7 written out for single numbers."""
import math

import numpy as np
import pytest
import torch
from conftest import ROOT  # noqa: F401  (puts the root on the path)

import hardconcrete as hc
from hardconcrete import (EPS, GATES, blocks_to_skip, harden, lagrangian, prob_zero, sample_u,
                          sample_z)

LOG_ALPHA = torch.tensor([-4.0, -2.0, -0.7, 0.0, 0.9, 2.5, 4.6], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gate", GATES)
def test_closed_form_of_zero_equals_monte_carlo(gate):
    n = 200_000
    z = sample_z(LOG_ALPHA, sample_u((n, len(LOG_ALPHA)), generator()).double(), gate)
    p = prob_zero(LOG_ALPHA, gate)
    four_sigma = 4 * (p * (1 - p) / n).sqrt() + 1e-12
    assert ((z == 0).double().mean(0) - p).abs().le(four_sigma).all()
    assert p[0] > 0.7 and p[-1] < 0.01 and (p.diff() < 0).all()


def test_the_two_readings_by_hand():
    """The figures at log_alpha = 0: 0.027 and 0.168; CoFi's sigmoid(-1.5986 - log_alpha)."""
    assert prob_zero(torch.zeros(1), "paper").item() == pytest.approx(0.027, abs=5e-4)
    assert prob_zero(torch.zeros(1), "louizos").item() == pytest.approx(0.168, abs=5e-4)
    torch.testing.assert_close(prob_zero(LOG_ALPHA, "louizos"), torch.sigmoid(-1.5986 - LOG_ALPHA),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("u", [0.003, 0.4, 0.98])
@pytest.mark.parametrize("log_alpha", [-1.3, 0.8])
def test_equations_4_to_6_written_out(u, log_alpha):
    noise = math.log(u / (1 - u))
    for gate, inner in (("paper", 2 / 3 * noise + log_alpha),
                        ("louizos", (noise + log_alpha) / (2 / 3))):
        s = 1 / (1 + math.exp(-inner))
        z = min(1, max(0, s * (1.1 + 0.1) - 0.1))
        got = sample_z(torch.tensor([log_alpha], dtype=torch.float64),
                       torch.tensor([u], dtype=torch.float64), gate)
        assert got.item() == pytest.approx(z, abs=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_and_range(gate):
    u = torch.linspace(0.05, 0.95, len(LOG_ALPHA), dtype=torch.float64)
    log_alpha = LOG_ALPHA.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: sample_z(a, u, gate), log_alpha)
    assert torch.autograd.gradcheck(lambda a: prob_zero(a, gate), log_alpha)
    z = sample_z(LOG_ALPHA, u, gate)
    assert ((0 <= z) & (z <= 1)).all()
    assert (sample_z(LOG_ALPHA + 0.3, u, gate) >= z).all()  # monotone in log_alpha


def test_u_is_uniform_inside_epsilon_and_repeats_with_its_seed():
    u = sample_u((50_000,), generator(3))
    assert u.min() >= EPS and u.max() <= 1 - EPS
    assert u.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 50_000) ** 0.5)
    assert u.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert torch.equal(u, sample_u((50_000,), generator(3)))
    assert not torch.equal(u, sample_u((50_000,), generator(4)))


def test_lagrangian_by_hand_and_its_ascent():
    lambdas = torch.tensor([2.0, 4.0], requires_grad=True)
    t = torch.tensor(0.5, requires_grad=True)
    L_s = lagrangian(t, 0.25, *lambdas)
    L_s.backward()
    assert L_s.item() == pytest.approx(2 * 0.25 + 4 * 0.0625)
    assert t.grad.item() == pytest.approx(2 + 2 * 4 * 0.25)
    assert lambdas.grad.tolist() == pytest.approx([0.25, 0.0625])  # they rise while t differs


def test_a_toy_loss_reaches_its_target():
    """24 gates with known costs: the Lagrangian must hold t at the target and skip the cheapest."""
    cost = torch.linspace(0.0, 0.5, 24)[torch.randperm(24, generator=generator(5))]
    log_alpha, lambdas = torch.ones(24, requires_grad=True), torch.zeros(2, requires_grad=True)
    groups = [{"params": [log_alpha]}, {"params": [lambdas], "lr": 0.02, "maximize": True}]
    adam = torch.optim.Adam(groups, lr=0.1)
    g, history = generator(6), []
    for _ in range(1000):
        z = sample_z(log_alpha, sample_u((8, 24), g), "paper")
        t = 1 - z.mean()
        adam.zero_grad()
        ((1 - z) @ cost).mean().add(lagrangian(t, 0.25, *lambdas)).backward()
        adam.step()
        history.append(t.item())
    assert np.mean(history[-600:]) == pytest.approx(0.25, abs=0.02)
    skipped = torch.where(~harden(log_alpha.detach(), 6))[0]
    assert set(skipped.tolist()) == set(cost.argsort()[:6].tolist())


def test_hardening_skips_exactly_n_with_ties_by_index():
    log_alpha = torch.tensor([0.5, -1.0, 0.5, 0.5, 3.0, -2.0])
    assert harden(log_alpha, 0).all() and not harden(log_alpha, 6).any()
    assert harden(log_alpha, 3).tolist() == [False, False, True, True, True, False]
    assert harden(torch.zeros(5), 2).tolist() == [False, False, True, True, True]
    for n in (-1, 7):
        with pytest.raises(ValueError, match=f"to_skip={n}"):
            harden(log_alpha, n)
    with pytest.raises(ValueError, match="NaN"):
        harden(torch.tensor([0.0, torch.nan]), 1)


def test_hardening_by_weight_meets_the_sum_and_keeps_what_it_can():
    """By hand: 0 and 1 go first, 1 + 3 >= 3; without 0 it is still met, so 0 stays."""
    log_alpha, weight = torch.arange(4.0), torch.tensor([1.0, 3, 1, 3])
    assert harden(log_alpha, 4, weight).tolist() == [False, False, True, True]
    assert harden(log_alpha, 3, weight).tolist() == [True, False, True, True]
    assert harden(log_alpha, 1, weight).tolist() == [False, True, True, True]
    assert not harden(log_alpha, 8, weight).any()
    surplus = harden(log_alpha[:3], 3.5, torch.tensor([1.0, 1, 3]))  # 5 in all: one may stay
    assert surplus.tolist() == [False, True, False]
    with pytest.raises(ValueError, match="outside .0, 8."):
        harden(log_alpha, 9, weight)


def test_blocks_to_skip_gives_the_papers_counts():
    assert [blocks_to_skip(s, 64) for s in (0.125, 0.25, 0.375)] == [8, 16, 24]
    assert [blocks_to_skip(s, 72) for s in (0.139, 0.25, 0.361)] == [10, 18, 26]
    assert blocks_to_skip(0.25, 2) == 1  # a half rounds up


def test_gates_reach_one_only_if_r_exceeds_one(monkeypatch):
    """The paper asks for r > 0; with 0.9 no draw is ever exactly 1."""
    u = hc.sample_u((10_000,), torch.Generator().manual_seed(0))
    assert (hc.sample_z(torch.tensor(2.0), u, "paper") == 1).any()
    monkeypatch.setattr(hc, "STRETCH_R", 0.9)
    assert not (hc.sample_z(torch.tensor(2.0), u, "paper") == 1).any()
