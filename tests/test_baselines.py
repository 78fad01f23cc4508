"""baselines.py: every rival against an independent statement of itself."""
import itertools
import math
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import hook_gates, make_reference
from torch.nn.utils import parameters_to_vector

import baselines
import evaluate
import model as llm

L, k = 5, 2
JOINED = list(range(3, 58))                                       # tokens, all different
TEXTS = [JOINED[i:i + 11] for i in range(0, 55, 11)]


@pytest.fixture
def model(checkpoint):
    folder, _ = checkpoint(num_hidden_layers=L)
    return llm.load(folder, "cpu", torch.float32)


def bare(L, longest=8192):
    """What a search reads of a model that computes nothing."""
    config = SimpleNamespace(
        num_hidden_layers=L,
        max_position_embeddings=longest)
    return SimpleNamespace(config=config)


def search(model, texts=TEXTS, k=k, tied=False, cap=None):
    generator = np.random.default_rng(0)
    return baselines.Search(model, iter(texts), k, tied, cap, generator)


def mask(*layers, L=L):
    kept = [i not in layers for i in range(L)]
    kept = torch.tensor(kept)
    return kept.repeat_interleave(2)


@torch.no_grad()
def logits_of(z, texts):
    """transformers' logits (n, v) with gates hooked in, at all positions but each text's last."""
    reference = make_reference("llama", num_hidden_layers=L)
    hook_gates(reference, z)
    found = []
    for x in texts:
        logits = reference(torch.tensor([x])).logits
        found.append(logits[0, :-1])
    return torch.cat(found)


def mean_loss(z, texts):
    targets = [y for x in texts for y in x[1:]]
    logits = logits_of(z, texts)
    return F.cross_entropy(logits, torch.tensor(targets)).item()


def test_windows_are_cuts_of_the_joined_texts():
    texts = itertools.chain(TEXTS, [None])                        # a sixth cannot be read
    found = baselines.windows(search(bare(L, 12), texts), 2, 27)
    assert found == [JOINED[:12], JOINED[12:24]]
    assert baselines.windows(search(bare(L)), 5, 99) == TEXTS     # 11 tokens each are there
    with pytest.raises(llm.UserError, match="55 tokens; 30 windows need 60"):
        baselines.windows(search(bare(L)), 30, 9)


def test_sleb_is_brute_force_greedy(model, monkeypatch):
    monkeypatch.setattr(baselines, "SLEB", (3, 10))
    texts = [JOINED[i:i + 10] for i in (0, 10, 20)]
    gone = []                            # 3, then 2 goes; on its own 1 costs less than 2
    for _ in range(k):
        candidates = {1, 2, 3} - {*gone}
        losses = {}
        for j in candidates:
            losses[j] = mean_loss(mask(*gone, j), texts)
        gone.append(min(losses, key=losses.get))
    z, tokens = baselines.sleb(search(model))
    assert torch.equal(z, mask(*gone))
    assert tokens == (3 + 2) * 3 * 10
    given = search(model, cap=60)
    _, tokens = baselines.sleb(given)
    assert tokens == (3 + 2) * 3 * 4


def test_sleb_spares_both_ends_and_the_first_of_equal_layers_goes(monkeypatch):
    monkeypatch.setattr(baselines, "loss", lambda _, z, texts: z[[0, -1]].sum())
    z, _ = baselines.sleb(search(bare(L)))
    assert torch.equal(z, mask(1, 2))
    found = baselines.lowest("abcd", [math.nan, 1, 0, 0], 3)
    assert found == ["c", "d", "b"]


def test_evopress_costs_what_was_published():
    """Llama-3-8B, k = 8: 8 * 24 / 1.5 = 128 generations, 21 M tokens."""
    _, kids, last = baselines.STAGE_TOKENS
    generation = baselines.OFFSPRING * kids + 3 * last
    assert 128 * generation == pytest.approx(21e6, rel=0.01)


def test_ppl_scores_are_brute_force(model):
    scores, forwards = baselines.ppl_scores(model, TEXTS)
    assert forwards == L
    for j, score in enumerate(scores):
        loss = mean_loss(mask(j), TEXTS)
        assert math.log(score) == pytest.approx(loss, rel=1e-4)


def test_taylor_scores_are_autograd_written_out(model):
    reference = make_reference("llama", num_hidden_layers=L)
    tokens = torch.tensor(TEXTS)
    logits = reference(tokens).logits[:, :-1]
    F.cross_entropy(logits.mT, tokens[:, 1:]).backward()
    scores, forwards = baselines.taylor_scores(model, TEXTS)
    assert forwards == 3
    for layer, score in zip(reference.model.layers, scores, strict=True):
        weights = parameters_to_vector(layer.parameters())
        gradients = parameters_to_vector(p.grad for p in layer.parameters())
        product = weights * gradients
        wanted = product.abs().sum().item()
        assert score == pytest.approx(wanted, rel=1e-3)
    for p in model.parameters():
        assert p.grad is None and not p.requires_grad
        assert not p._post_accumulate_grad_hooks


def test_magnitude_scores_are_sums_of_absolute_weights(model):
    scores, forwards = baselines.magnitude_scores(model, TEXTS)
    assert forwards == 0
    for layer, score in zip(model.model.layers, scores, strict=True):
        weights = parameters_to_vector(layer.parameters())
        wanted = weights.abs().sum().item()
        assert score == pytest.approx(wanted, rel=1e-5)


def test_shortened_drops_the_lowest_at_once_but_never_the_six(monkeypatch):
    monkeypatch.setattr(baselines, "SHORTENED", (5, 11))
    scores = [0.0, 1, 2, 3, 9, 6, 8, 6, 0, 0]                     # 0-3, 8 and 9 would go first
    given = search(bare(10))
    z, tokens = baselines.shortened(lambda *_: (scores, 7), given)
    assert torch.equal(z, mask(5, 7, L=10))
    assert tokens == 7 * 55


def test_rivals_have_their_scores_and_limits():
    for name in ("ppl", "taylor", "magnitude"):
        partial, never_dropped = baselines.RIVALS[f"shortened-{name}"]
        assert partial.args == (getattr(baselines, f"{name}_scores"),)
        assert never_dropped == 6
    assert baselines.RIVALS["sleb"] == (baselines.sleb, 2)
    assert baselines.RIVALS["evopress"] == (baselines.evopress, 1)


def test_divergence_is_kl_from_the_dense_model(model, monkeypatch):
    monkeypatch.setattr(evaluate, "HEAD_ROWS", 4)
    texts = [TEXTS[0], TEXTS[1][:6]]
    zs = [mask(), mask(1), mask(0, 2)]
    logits = [logits_of(z, texts) for z in zs]
    log_p = torch.stack(logits).log_softmax(-1)                   # (3, positions, v)
    kl = log_p[0].exp() * (log_p[0] - log_p)
    wanted = kl.sum(2).mean(1).tolist()
    found = baselines.divergences(model, zs, texts)
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_mutation_keeps_counts_and_switches_one_to_three(tied):
    rng = np.random.default_rng(0)
    z = mask(*range(200), L=400)                                  # so many that none is undone
    switches = []
    for _ in range(600):
        kid = baselines.mutate(z, tied, rng)
        assert kid[0::2].sum() == kid[1::2].sum() == 200
        changed = (kid != z).sum().item()
        one = 4 if tied else 2
        switches.append(changed // one)
    shares = 9 * np.bincount(switches) / 600
    assert shares == pytest.approx([0, 5, 3, 1], abs=0.7)         # 4 sigma


@pytest.mark.parametrize("tied, kids", [
    (False, 32),
    (True, 6)])
def test_evolution_finds_the_best_of_a_toy(tied, kids, monkeypatch):
    """The loss is the number of gates that differ from a target's."""
    monkeypatch.setattr(baselines, "STARTS", 2)
    monkeypatch.setattr(baselines, "OFFSPRING", kids)
    target = torch.ones(6, 2, dtype=torch.bool)
    other = 0 if tied else 1
    target[[0, 3], 0] = False
    target[[other, 3], 1] = False
    calls = []

    def select(zs, stage):
        calls.append((stage, len(zs)))
        if stage == 0:
            for z in zs:
                assert torch.equal(z[0::2], z[1::2]) == tied
        else:
            assert len(torch.stack(zs).unique(dim=0)) == len(zs)
        losses = [(z != target.flatten()).sum() for z in zs]
        return baselines.lowest(zs, losses, baselines.SURVIVORS[stage])

    z = baselines.evolve(select, search(bare(6), tied=tied), 12)
    assert torch.equal(z.view(6, 2), target)
    generation = [(1, kids), (2, 3)]
    assert calls == [(0, 2)] + generation * 12


# (forwards, tokens) of each batch: of 2 * 3 / 1.5 generations; and where s = 474 / 3580:
# 4 s^(1/4) is 2.4 of them, s^(3/4) of 12, 20, 50 tokens is 2.6, 4.4, 10.97, in windows of 3.
@pytest.mark.parametrize("cap, start, generation, n", [
    (None, (7, 20), [(33, 20), (4, 50)], 4),
    (474, (7, 3), [(33, 3), (4, 9)], 2),
])
def test_evopress_counts_its_tokens_and_keeps_to_the_cap(cap, start, generation, n, model):
    runs = []
    divergences = baselines.divergences

    def record(model, zs, texts):
        values = divergences(model, zs, texts)
        n = sum(map(len, texts))
        runs.append((len(zs) + 1, n))                             # and the dense model
        for first, second, *_ in texts:
            assert second == first + 1
        record.best = zs[values.argmin()]
        return values

    small = {
        "EVOPRESS": (5, 12),
        "STARTS": 6,
        "STAGE_TOKENS": (20, 20, 50),
    }
    with patch.multiple(baselines, **small, divergences=record):
        z, tokens = baselines.evopress(search(model, cap=cap))
    assert torch.equal(z, record.best)
    assert runs == [start] + generation * n
    assert tokens == sum(math.prod(run) for run in runs)
