"""study.py: its training is igp's, a swap finds the better mask, controls and mixes by hand."""
import argparse
import json

import numpy as np
import study
import torch

import baselines
import igp
from run import parse

TEXTS = json.loads(
    "[[5, 9, 11, 3, 40, 7], [7, 20, 21], [30, 31, 32, 33, 34, 35, 36], [1, 2], [9, 8, 7]]")
COST = torch.full((6,), 1 / 6)


def test_the_default_is_igps_training_and_other_variants_are_not(model):
    recipe = igp.Recipe(
        0.34, COST, "paper",
        0.2, 0.1, 2, 2)
    found = []
    for variant in study.RECIPES.values():
        generator = torch.Generator().manual_seed(0)
        log_alpha, trace = study.train_mask(model, TEXTS, recipe, variant, generator)
        assert len(trace) == 3
        found.append(log_alpha)
    generator = torch.Generator().manual_seed(0)
    wanted, _ = igp.train_mask(model, TEXTS, recipe, generator)
    assert torch.equal(found[0], wanted)
    assert len(torch.stack(found).unique(dim=0)) == 3             # the gate's name is the recipe's
    args = parse(["--sparsity=0.34", "--samples=8"])
    zs = set()
    for variant in study.RECIPES.values():
        for z in study.train(model, TEXTS, args, variant, 0)[:2]:
            assert (~z).sum() == 2
            zs.add(tuple(z.tolist()))
    assert len(zs) > 1


def test_a_swap_from_either_side_finds_the_best_mask(model):
    pairs = torch.combinations(torch.arange(6))                   # (15, 2) blocks that go
    zs = torch.ones(15, 6).scatter(1, pairs, 0).bool()
    losses = [baselines.loss(model, z, TEXTS) for z in zs]
    best = np.argmin(losses)                                      # blocks 1 and 2
    for ranks in ([3, 5, 1, 4, 6, 2], [4, 3, 2, 5, 6, 1]):
        log_alpha = torch.tensor(ranks).float()
        z = study.swap(model, log_alpha, COST, 2 / 6, TEXTS)
        assert torch.equal(z, zs[best])


def test_controls_by_hand(tmp_path, capsys):
    (tmp_path / "results.json").write_text("""{"rows": [
{"name": "igp", "loglikelihood": [-2, -9], "tokens": [2, 3]},
{"name": "igp-mask-0", "loglikelihood": [-2, -12]},
{"name": "igp-mask-1", "loglikelihood": [-4, -9]}]}""")
    study.controls(argparse.Namespace(run=tmp_path), [])
    lines = capsys.readouterr().out.splitlines()[2:]
    losses = (11, 13, 13.5, 11)                                   # nearest, best, random, oracle
    for line, x in zip(lines, losses, strict=True):
        assert f" | {np.exp(x / 5):.2f} | {(x - 13) / 5:+.4f} ±" in line
