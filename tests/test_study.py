"""study.py: its training is igp's, a swap finds the better mask, its page holds what was made."""
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import study
import torch
from scipy import stats

import baselines
import document
import igp
import run
from run import once, parse

TEXTS = json.loads(
    "[[5, 9, 11, 3, 40, 7], [7, 20, 21], [30, 31, 32, 33, 34, 35, 36], [1, 2], [9, 8, 7]]")
COST = torch.full((6,), 1 / 6)


def test_the_default_is_igps_training_and_other_variants_are_not(model):
    recipe = igp.Recipe(
        0.34, COST, "paper",
        0.2, 0.1, 2, 2)
    found, traces = [], []
    for variant in study.RECIPES.values():
        generator = torch.Generator().manual_seed(0)
        log_alpha, trace = study.train_mask(model, TEXTS, recipe, variant, generator)
        found.append(log_alpha)
        traces.append(trace)
    generator = torch.Generator().manual_seed(0)
    wanted, lambdas = igp.train_mask(model, TEXTS, recipe, generator)
    assert torch.equal(found[0], wanted)
    assert len(traces[0]) == 3 and traces[0][-1][2] == lambdas[0].item()
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


def test_routings_by_hand():
    rows = json.loads("""[
{"name": "igp", "loglikelihood": [-2, -9, -1], "tokens": [2, 3, 1], "cluster": [0, 1, 0],
 "z": [[1, 0, 1], [0, 1, 1]]},
{"name": "igp-mask-0", "loglikelihood": [-2, -12, -1], "tokens": [2, 3, 1]},
{"name": "igp-mask-1", "loglikelihood": [-4, -9, -5], "tokens": [2, 3, 1]}]""")
    line = document.routings(rows)
    losses = {"router": 12, "best single mask": 15, "random mask": 16, "oracle": 12}
    for name, x in losses.items():
        assert line[name] == f"{np.exp(x / 6):.2f}"
    assert line["router above best single mask"] == "-0.500 ± 0.500"  # of 0, -3 / 2 and 0
    assert (line["blocks apart"], line["best at home"]) == ("2", "2 of 2")
    rows[0]["cluster"] = [1, 0, 0]
    assert document.routings(rows)["best at home"] == "1 of 2"   # 13 and 14; 2 and 4
    assert line["router above random mask"] == "-0.667 ± 0.192"


def test_differences_are_paired():
    """Against scipy: the mean and standard error of differences, not of two independent means."""
    a, b, n = np.random.default_rng(0).normal(9, 1, (3, 20))
    mean, error = document.gap(a, b, n)
    assert mean == pytest.approx((a - b).mean() / n.mean())
    assert error == pytest.approx(stats.sem(a - b) / n.mean())
    own, other = {"x": a, "y": b[:9]}, {"x": b, "y": n[:9]}
    mean, error = document.points(own, other)
    first, second = stats.sem(a - b), stats.sem(b[:9] - n[:9])
    assert error == pytest.approx(50 * np.hypot(first, second))
    assert mean == pytest.approx(50 * ((a - b).mean() + (b[:9] - n[:9]).mean()))


def test_the_routers_share_of_a_larger_model(tmp_path):
    row = {"flops_ratio": 0.75, "flops_ratio_with_router": 1.0, "tokens": [3, 4]}
    once(tmp_path / "16/igp.json", lambda: [row])
    one = replace(document.LLAMA3_8B, vocab_size=0)
    for factor, wanted in ((1, "25.00%"), (4, "6.25%")):
        larger = replace(one, num_hidden_layers=factor * 32)
        assert document.router_of(tmp_path, one, larger) == wanted


def test_which_pairs_are_worth_two_masks(tmp_path):
    """Of two seeds, own masks are 0 and 0.5 nats a text above 9, others' `above` and twice that."""
    above = {"ab": 1, "ba": 1, "ac": 1, "ca": 0.3, "bc": 0.3, "cb": 0.3}  # "ab": b's mask on a
    zs = {"a": [1, 1, 0, 0], "b": [0, 0, 1, 1], "c": [1, 0, 0, 1]}
    for own in "abc":
        for seed in (0, 1):
            more = {pair: x * (1 + seed) for pair, x in above.items()} | {own + own: seed / 2}
            losses = {kind: {"loss": [9 + more.get(kind + own, 0)] * 4, "tokens": [2] * 4}
                      for kind in "abc"}
            once(tmp_path / f"{own}-8-{seed}.json", lambda own=own, losses=losses: [
                {"z": zs[own], "losses": losses}, {"losses": losses}, []])
    told = document.pairs(tmp_path, 8, "ac", [0, 1])              # nats of 2 tokens a text
    assert "| a, c | 2.0 | -0.625 ± 0.000 | -0.100 ± 0.000 | -0.050 ± 0.019 |" in told
    told = document.worth(tmp_path, 8, "abc", [0, 1])
    assert told == ("a and b (4.0 blocks apart); "
                    "all others: a and c (2.0 blocks apart), b and c (2.0 blocks apart)")


@pytest.mark.embedded                                             # not for its files: it is long
def test_one_command_makes_the_page_and_twice_the_same(home, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__file__", str(home / "torch/__init__.py"))  # whose code is read
    small = {"texts": 40, "samples": 8, "length": 12, "judged": 9, "dtype": "float32"}
    for flag, value in small.items():
        monkeypatch.setitem(run.SETTINGS, flag, (value, *run.SETTINGS[flag][1:]))
    runs = {name: flags.replace(study.RIVALS, "sleb") for name, flags in study.RUNS.items()}
    monkeypatch.setattr(document, "NAMES", ("static", "igp", "sleb"))
    monkeypatch.setattr(document, "RIVALS", ("sleb",))
    said = {path: [60.0, "| a |"] for path in ("timed", "bench", "scoring")}
    for name, value in {
        "RUNS": runs, "SEEDS": (0, 1), "SAMPLES": (4, 8), "MIXED": 20, "DOCS": tmp_path,
        "KINDS": ("code", "FineWeb-Edu"),
        "alone": lambda given: {given.out / f"{x}.json": said[x].copy for x in said},
    }.items():
        monkeypatch.setattr(study, name, value)
    texts = f"{home}/texts.jsonl"
    command = ["study.py", "results", "--calibration", texts, "--alpaca", texts,
               "--tasks-dir", f"{home}/tasks", "--out", f"{tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", command)
    pages = []
    for _ in range(2):
        assert study.main() == 0
        pages.append({path.name: path.read_bytes() for path in sorted(tmp_path.glob("*.*"))})
        monkeypatch.setattr(study, "igp_run", pytest.fail)        # nothing is made again
        monkeypatch.setattr(study, "trained", pytest.fail)
    assert pages[0] == pages[1] and len(pages[0]) == 4
    page = pages[0]["results.md"].decode()
    assert "{" not in page and "nan" not in page
    [row] = once(tmp_path / "out/16/sleb.json")
    assert f"| 16 | sleb | {row['ppl']:.2f} |" in page
