"""baselines.py: every rival against an independent statement of itself."""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import hook_gates, make_reference

import baselines
import evaluate
import model as llm

L, k = 5, 2
TEXTS = [list(range(i, i + 11)) for i in (3, 17, 40, 61, 80)]
JOINED = sum(TEXTS, [])  # 55 tokens, all different


@pytest.fixture
def model(checkpoint):
    return llm.load(checkpoint("llama", num_hidden_layers=L)[0], "cpu", torch.float32)


def bare(L, longest=8192):
    """What a search reads of a model that computes nothing."""
    config = SimpleNamespace(num_hidden_layers=L, max_position_embeddings=longest)
    return SimpleNamespace(config=config)


def search(model, texts=TEXTS, k=k, tied=False, cap=None):
    return baselines.Search(model, iter(texts), k, tied, cap, np.random.default_rng(0))


def change(monkeypatch, **constants):
    for name, value in constants.items():
        monkeypatch.setattr(baselines, name, value)


def mask(*layers, L=L):
    return torch.tensor([i // 2 not in layers for i in range(2 * L)])


@torch.no_grad()
def logits_of(z, texts):
    """transformers' logits (n, v) with gates hooked in, at all positions but each text's last."""
    reference = make_reference("llama", num_hidden_layers=L)
    hook_gates(reference, z)
    return torch.cat([reference(torch.tensor([x])).logits[0, :-1] for x in texts])


def mean_loss(z, texts):
    targets = torch.tensor([y for x in texts for y in x[1:]])
    return F.cross_entropy(logits_of(z, texts), targets).item()


def test_windows_are_cuts_of_the_joined_texts():
    assert baselines.windows(search(bare(L)), 2, 20) == [JOINED[:20], JOINED[20:40]]
    assert baselines.windows(search(bare(L)), 5, 99) == TEXTS     # 11 tokens each are there
    with pytest.raises(llm.UserError, match="55 tokens; 30 windows need 60"):
        baselines.windows(search(bare(L)), 30, 9)


def test_windows_read_what_they_need_and_fit_the_model():
    texts = itertools.chain(TEXTS, [None])                        # a sixth cannot be read
    assert [len(x) for x in baselines.windows(search(bare(L, 12), texts), 2, 27)] == [12, 12]


def test_sleb_is_brute_force_greedy(model, monkeypatch):
    change(monkeypatch, SLEB=(3, 10))   # 3, then 2 goes; on its own 1 costs less than 2
    texts, gone = baselines.windows(search(model), 3, 10), []
    for _ in range(k):
        losses = {j: mean_loss(mask(*gone, j), texts) for j in (1, 2, 3) if j not in gone}
        gone.append(min(losses, key=losses.get))
    z, tokens = baselines.sleb(search(model))
    assert torch.equal(z, mask(*gone)) and tokens == (3 + 2) * 3 * 10
    assert baselines.sleb(search(model, cap=60))[1] == (3 + 2) * 3 * 4


def test_sleb_spares_both_ends_and_the_first_of_equal_layers_goes(monkeypatch):
    cost = torch.tensor([0.0, 2, 2, 2, 0])
    monkeypatch.setattr(evaluate, "loss", lambda _m, z, _t: (~z[0::2]).float() @ cost)
    assert torch.equal(baselines.sleb(search(bare(L)))[0], mask(1, 2))
    assert baselines.lowest("abcd", [math.nan, 1, 0, 0], 3) == ["c", "d", "b"]


def test_the_published_costs(monkeypatch):
    """SLEB on Llama-3-8B, k = 4, 12: 114, 294 evaluations; EvoPress, k = 8: 21 M tokens."""
    monkeypatch.setattr(evaluate, "loss", lambda *_: 0.0)
    for k, evaluations in ((4, 114), (12, 294)):
        assert baselines.sleb(search(bare(32), [[0] * 8192], k))[1] == evaluations * 8192
    assert baselines.STAGE_TOKENS == (2048, 2048, 32768)
    # 8 * 24 / 1.5 = 128 generations
    assert 128 * (baselines.OFFSPRING * 2048 + 3 * 32768) == pytest.approx(21e6, rel=0.01)


def test_ppl_scores_are_brute_force(model):
    wanted = [math.exp(mean_loss(mask(j), TEXTS)) for j in range(L)]
    assert baselines.ppl_scores(model, TEXTS) == (pytest.approx(wanted, rel=1e-4), L)


def test_taylor_scores_are_autograd_written_out(model):
    reference, tokens = make_reference("llama", num_hidden_layers=L), torch.tensor(TEXTS)
    logits = reference(tokens).logits[:, :-1]
    F.cross_entropy(logits.mT, tokens[:, 1:]).backward()
    wanted = [sum((p * p.grad).abs().sum().item() for p in layer.parameters())
              for layer in reference.model.layers]
    assert baselines.taylor_scores(model, TEXTS) == (pytest.approx(wanted, rel=1e-3), 3)
    for p in model.parameters():
        assert p.grad is None and not p.requires_grad and not p._post_accumulate_grad_hooks


def test_magnitude_scores_are_sums_of_absolute_weights(model):
    state = model.state_dict()
    wanted = [sum(x.abs().sum().item() for name, x in state.items() if f"layers.{j}." in name)
              for j in range(L)]
    assert baselines.magnitude_scores(model, TEXTS) == (pytest.approx(wanted, rel=1e-5), 0)


@pytest.mark.parametrize("k, gone", [(1, [5]), (3, [5, 6, 7])])
def test_shortened_drops_the_lowest_at_once_but_never_the_six(k, gone, monkeypatch):
    change(monkeypatch, SHORTENED=(5, 11))
    scores = [0.0, 1, 2, 3, 9, 6, 8, 6, 0, 0]              # layers 0-3, 8 and 9 would go first
    z, tokens = baselines.shortened(lambda *_: (scores, 7), search(bare(10), k=k))
    assert torch.equal(z, mask(*gone, L=10)) and tokens == 7 * 55


def test_rivals_have_their_scores_and_limits():
    searches, never_dropped = zip(*baselines.RIVALS.values(), strict=True)
    assert never_dropped == (2, 6, 6, 6, 1)
    scores = [partial.args[0].__name__ for partial in searches[1:4]]
    assert scores == ["ppl_scores", "taylor_scores", "magnitude_scores"]


def test_divergence_is_kl_from_the_dense_model(model, monkeypatch):
    monkeypatch.setattr(evaluate, "HEAD_ROWS", 4)
    texts, zs = [TEXTS[0], TEXTS[1][:6]], [mask(1), mask(0, 2), mask()]
    dense, *pruned = [logits_of(z, texts).double().log_softmax(-1) for z in [mask(), *zs]]
    wanted = [F.kl_div(q, dense, reduction="batchmean", log_target=True).item() for q in pruned]
    got = baselines.divergences(model, zs, texts)
    assert got == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_mutation_keeps_counts_and_switches_one_to_three(tied):
    rng, z = np.random.default_rng(0), torch.ones(400, 2, dtype=torch.bool)
    z[:200] = False                                               # so many that none is undone
    switches = []
    for _ in range(1500):
        kid = baselines.mutate(z.flatten(), tied, rng).view(-1, 2)
        assert (~kid).sum(0).tolist() == [200, 200]
        switches.append((kid != z).sum().item() // 2 // (1 + tied))
    assert np.bincount(switches) / 1500 == pytest.approx([0, 5 / 9, 3 / 9, 1 / 9], abs=0.05)


@pytest.mark.parametrize("tied, kids", [(False, 32), (True, 6)])
def test_evolution_finds_the_best_of_a_toy(tied, kids, monkeypatch):
    """The loss is the number of gates that differ from a target's."""
    change(monkeypatch, STARTS=2, OFFSPRING=kids)
    target, calls = torch.ones(6, 2, dtype=torch.bool), []
    target[[0, 3], 0] = target[[0, 3] if tied else [1, 3], 1] = False

    def select(zs, stage):
        calls.append((stage, len(zs)))
        if stage == 0:
            assert [torch.equal(z[0::2], z[1::2]) for z in zs] == [tied, tied]
        else:
            assert len({tuple(z.tolist()) for z in zs}) == len(zs)
        losses = [(z != target.flatten()).sum() for z in zs]
        return baselines.lowest(zs, losses, baselines.SURVIVORS[stage])

    z = baselines.evolve(select, search(bare(6), tied=tied), 12)
    assert torch.equal(z.view(6, 2), target)
    assert calls == [(0, 2)] + [(1, kids), (2, 3)] * 12


@pytest.mark.parametrize("cap, wanted", [
    (None, [(7, 20)] + [(33, 20), (4, 50)] * 4),                  # 2 * 3 / 1.5 generations
    # s = 474 / 3580: 4 s^(1/4) is 2.4 generations; s^(3/4) of 12, 20, 50 tokens is 2.6, 4.4, 10.97
    (474, [(7, 3)] + [(33, 3), (4, 9)] * 2)])                     # in windows of 3
def test_evopress_counts_its_tokens_and_keeps_to_the_cap(cap, wanted, model, monkeypatch):
    change(monkeypatch, EVOPRESS=(5, 12), STARTS=6, STAGE_TOKENS=(20, 20, 50))
    runs, divergences = [], baselines.divergences

    def record(model, zs, texts):
        values = divergences(model, zs, texts)
        runs.append((len(zs) + 1, sum(map(len, texts))))          # and the dense model
        assert all(x[1] == JOINED[JOINED.index(x[0]) + 1] for x in texts)
        record.best = zs[values.argmin()]
        return values

    monkeypatch.setattr(baselines, "divergences", record)
    z, tokens = baselines.evopress(search(model, cap=cap))
    assert torch.equal(z, record.best) and runs == wanted
    assert tokens == sum(n * size for n, size in runs)
