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

L, k = 4, 2
TEXTS = [list(range(i, i + 11)) for i in (3, 17, 40, 61, 80)]  # 55 tokens when joined


@pytest.fixture
def model(checkpoint):
    return llm.load(checkpoint("llama", num_hidden_layers=L)[0], "cpu", torch.float32)


def search(model, **change):
    return baselines.Search(**{"model": model, "texts": TEXTS, "k": k, "tied": False, "cap": None,
                               "generator": np.random.default_rng(0)} | change)


def mask(*layers):
    return torch.tensor([float(i // 2 not in layers) for i in range(2 * L)])


@torch.no_grad()
def logits_of(z, texts):
    """transformers' logits with gates hooked in, a text at a time."""
    reference = make_reference("llama", num_hidden_layers=L)
    hook_gates(reference, z)
    return [reference(torch.tensor([x])).logits[0] for x in texts]


def mean_loss(z, texts):
    total = sum(F.cross_entropy(y[:-1], torch.tensor(x[1:]), reduction="sum").item()
                for x, y in zip(texts, logits_of(z, texts), strict=True))
    return total / sum(len(x) - 1 for x in texts)


# ------------------------------------------------------------------ texts


def test_windows_are_cuts_of_the_joined_texts(model):
    joined, given = sum(TEXTS, []), search(model)
    assert baselines.windows(given, 2, 20) == [joined[:20], joined[20:40]]
    assert baselines.windows(given, 2, 4) == [joined[:4], joined[4:8]]
    assert baselines.windows(given, 5, 99) == [joined[i * 11:i * 11 + 11] for i in range(5)]
    longer = search(model, texts=TEXTS * 20)                      # the model reads 128 positions
    assert [len(x) for x in baselines.windows(longer, 2, 2048)] == [128, 128]
    with pytest.raises(ValueError, match="55 tokens; 30 windows need 60"):
        baselines.windows(given, 30, 9)


# ------------------------------------------------------------------ SLEB


@pytest.mark.parametrize("k", [1, 2])
def test_sleb_is_brute_force_greedy_that_spares_both_ends(model, monkeypatch, k):
    monkeypatch.setattr(baselines, "SLEB", (2, 20))
    texts, gone, evaluations = baselines.windows(search(model), 2, 20), [], 0
    for _ in range(k):
        alive = [j for j in range(L) if j not in gone]
        losses = {j: mean_loss(mask(*gone, j), texts) for j in alive[1:-1]}
        evaluations += len(losses)
        gone.append(min(losses, key=losses.get))
    z, tokens = baselines.sleb(search(model, k=k))
    assert torch.equal(z, mask(*gone).bool())
    assert evaluations == 2 * k - (k == 2) and tokens == evaluations * 40


def test_sleb_never_drops_the_first_or_the_last_layer(model, monkeypatch):
    """Both ends cost nothing here, and of the equal layers 1 and 2 the first goes."""
    cost = torch.tensor([0.0, 2, 2, 0])
    monkeypatch.setattr(baselines.evaluate, "loss", lambda _m, z, _t: (~z[0::2]).float() @ cost)
    z, _ = baselines.sleb(search(model, k=1))
    assert z.tolist() == mask(1).bool().tolist()
    assert torch.equal(baselines.sleb(search(model, k=2))[0], mask(1, 2).bool())


def test_sleb_and_evopress_keep_within_the_cap(model, monkeypatch):
    monkeypatch.setattr(baselines, "SLEB", (2, 20))
    assert baselines.sleb(search(model, cap=60))[1] == 3 * 2 * 10
    monkeypatch.setattr(baselines, "EVOPRESS", (5, 11))
    monkeypatch.setattr(baselines, "STARTS", 6)
    monkeypatch.setattr(baselines, "START_TOKENS", 20)
    monkeypatch.setattr(baselines, "STAGE_TOKENS", (20, 50))
    spent, divergences = [], baselines.divergences
    monkeypatch.setattr(baselines, "divergences", lambda model, zs, texts: (
        spent.append((len(zs) + 1) * sum(map(len, texts))), divergences(model, zs, texts))[1])
    _, tokens = baselines.evopress(search(model))
    assert tokens == sum(spent)
    # 2 * 2 / 1.5 = 2.7 generations, so 3; each batch also runs the dense model; (4 choose 2) - 1
    # states differ from the parent by one switch in attention or FFN blocks, and more by several
    assert 7 * 20 + 3 * (2 * 20 + 4 * 50) < tokens <= 7 * 20 + 3 * (33 * 20 + 4 * 50)
    _, less = baselines.evopress(search(model, cap=500))
    assert 300 < less < 650                                       # generations are whole ones


def test_the_published_costs(monkeypatch):
    """spec: SLEB on Llama-3-8B, k = 4, 8, 12: 114, 212, 294 evaluations; EvoPress, k = 8: 21 M."""
    calls = []
    monkeypatch.setattr(baselines.evaluate, "loss", lambda *_: calls.append(1) or len(calls))
    config = SimpleNamespace(num_hidden_layers=32, max_position_embeddings=8192)
    for k, evaluations in ((4, 114), (8, 212), (12, 294)):
        given = search(SimpleNamespace(config=config, B=64), texts=[[0] * 8192], k=k)
        calls.clear()
        assert baselines.sleb(given)[1] == evaluations * 8192 and len(calls) == evaluations
    per_generation = baselines.OFFSPRING * 2048 + 3 * 32768
    assert (baselines.STAGE_TOKENS, per_generation) == ((2048, 32768), 163_840)
    assert round(8 * 24 / 1.5) * per_generation == pytest.approx(21e6, rel=0.01)


# ------------------------------------------------------------------ Shortened LLaMA


def test_ppl_scores_are_brute_force(model):
    scores, tokens = baselines.ppl_scores(model, TEXTS)
    wanted = [math.exp(mean_loss(mask(j), TEXTS)) for j in range(L)]
    assert scores == pytest.approx(wanted, rel=1e-4)
    assert tokens == L * 55


def test_taylor_scores_are_autograd_written_out(model):
    reference = make_reference("llama", num_hidden_layers=L)
    tokens = torch.tensor(TEXTS)
    logits = reference(tokens).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    wanted = []
    for layer in reference.model.layers:
        a, m = layer.self_attn, layer.mlp
        nine = [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj,
                layer.input_layernorm, layer.post_attention_layernorm]
        wanted.append(sum((x.weight * x.weight.grad).abs().sum().item() for x in nine))
    scores, tokens = baselines.taylor_scores(model, TEXTS)
    assert scores == pytest.approx(wanted, rel=1e-3) and tokens == 3 * 55
    assert all(p.grad is None and not p.requires_grad and not p._post_accumulate_grad_hooks
               for p in model.parameters())


def test_magnitude_scores_are_sums_of_absolute_weights(model):
    scores, tokens = baselines.magnitude_scores(model, TEXTS)
    state = model.state_dict()
    assert scores == pytest.approx([sum(x.abs().sum().item() for name, x in state.items()
                                        if f"layers.{j}." in name) for j in range(L)], rel=1e-5)
    assert tokens == 0


def test_shortened_drops_the_lowest_at_once_but_never_the_six(checkpoint, monkeypatch):
    monkeypatch.setattr(baselines, "SHORTENED", (5, 11))
    model = llm.load(checkpoint("llama", num_hidden_layers=10)[0], "cpu", torch.float32)
    scores = [0.0, 1, 2, 3, 9, 6, 8, 7, 0, 0]          # layers 0-3, 8 and 9 would go first
    z, tokens = baselines.shortened(search(model, k=3), lambda *_: (scores, 77))
    assert (~z[0::2]).nonzero().flatten().tolist() == [5, 6, 7] and torch.equal(z[0::2], z[1::2])
    assert tokens == 77
    assert {baselines.RIVALS[f"shortened-{x}"][1] for x in ("ppl", "taylor", "magnitude")} == {6}


# ------------------------------------------------------------------ EvoPress


def test_divergence_is_kl_from_the_dense_model(model, monkeypatch):
    monkeypatch.setattr(evaluate, "HEAD_ROWS", 4)
    texts, zs = [TEXTS[0], TEXTS[1][:6]], [mask(1), mask(0, 2), mask()]
    dense, wanted = logits_of(mask(), texts), []
    for z in zs:
        total = 0.0
        for p, q in zip(dense, logits_of(z, texts), strict=True):
            p, q = p[:-1].double().log_softmax(-1), q[:-1].double().log_softmax(-1)
            total += (p.exp() * (p - q)).sum().item()
        wanted.append(total / 15)
    got = baselines.divergences(model, [z.bool() for z in zs], texts)
    assert got == pytest.approx(wanted, abs=1e-5) and got[2] == pytest.approx(0, abs=1e-6)
    assert min(wanted[:2]) > 0.01


@pytest.mark.parametrize("tied", [False, True])
def test_mutation_keeps_counts_and_switches_at_most_three(tied):
    rng, z = np.random.default_rng(0), torch.ones(7, 2, dtype=torch.bool)
    z[[1, 3], 0] = z[[1, 3] if tied else [0, 5], 1] = False
    z, switches = z.flatten(), []
    for _ in range(1000):
        kid = baselines.mutate(z, tied, rng)
        assert (~kid[0::2]).sum() == (~kid[1::2]).sum() == 2
        assert not tied or torch.equal(kid[0::2], kid[1::2])
        switches.append((kid != z).sum().item() // 2 // (1 + tied))
    assert set(switches) <= {0, 1, 2, 3} and np.mean(np.array(switches) <= 1) > 0.5
    z = torch.ones(400, 2, dtype=torch.bool)                      # so many that none is undone
    z[:200] = False
    first = [(baselines.mutate(z.flatten(), tied, rng) != z.flatten()).sum().item()
             // 2 // (1 + tied) for _ in range(1500)]             # P = 5/9, 3/9, 1/9
    assert np.bincount(first)[1:] / 1500 == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_evolution_keeps_its_counts_and_finds_the_optimum_of_a_toy(tied, monkeypatch):
    """A loss with interactions, the same for every batch; all masks are enumerated."""
    monkeypatch.setattr(baselines, "STARTS", 2)
    if tied:                                                      # 15 states, so fewer kids
        monkeypatch.setattr(baselines, "OFFSPRING", 6)
    L, k, rng = 6, 2, np.random.default_rng(1)
    single, pair = rng.random(2 * L), rng.random((2 * L, 2 * L)) * 0.5

    def toy(z):
        gone = 1 - z.numpy().astype(float)
        return gone @ single + gone @ pair @ gone

    pairs, best = list(itertools.combinations(range(L), k)), math.inf
    for a, f in itertools.product(pairs, pairs):
        if a == f or not tied:
            z = torch.ones(L, 2, dtype=torch.bool)
            z[list(a), 0] = z[list(f), 1] = False
            best = min(best, toy(z.flatten()))
    stages, values = [], []

    def fitness(zs, stage):
        stages.append((stage, len(zs)))
        assert len({tuple(z.tolist()) for z in zs}) == len(zs) or stage is None
        return [toy(z) for z in zs]

    states = baselines.evolve(fitness, L, k, tied, np.random.default_rng(0))
    for z in itertools.islice(states, 12):
        assert (~z[0::2]).sum() == (~z[1::2]).sum() == k
        assert not tied or torch.equal(z[0::2], z[1::2])
        values.append(toy(z))
    assert all(after <= before for before, after in itertools.pairwise(values))  # elitism
    assert values[0] > best == pytest.approx(values[-1])
    assert stages[0] == (None, 2) and {n for stage, n in stages if stage == 1} == {3}


def test_evopress_on_a_small_model_finds_the_best_of_all_masks(model, monkeypatch):
    """Every batch is the whole pool here, so that the search is exact."""
    monkeypatch.setattr(baselines, "EVOPRESS", (5, 11))
    monkeypatch.setattr(baselines, "STARTS", 3)
    monkeypatch.setattr(baselines, "START_TOKENS", 55)
    monkeypatch.setattr(baselines, "STAGE_TOKENS", (55, 55))
    z, _ = baselines.evopress(search(model))
    assert (~z[0::2]).sum() == (~z[1::2]).sum() == k
    every, pairs = [], list(itertools.combinations(range(L), k))
    for a, f in itertools.product(pairs, pairs):
        every.append(torch.ones(L, 2, dtype=torch.bool))
        every[-1][list(a), 0] = every[-1][list(f), 1] = False
    values = baselines.divergences(model, [x.flatten() for x in every], TEXTS)
    [own] = baselines.divergences(model, [z], TEXTS)
    assert own == pytest.approx(min(values), abs=1e-6)            # 36 states, all of them reached
