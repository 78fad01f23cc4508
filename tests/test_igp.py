"""igp.py: the training step against autograd and torch's FLOP counter, and the whole pipeline."""
import argparse
import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, ROWS, WORDS, edit_json, hook_gates, make_reference, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import baselines
import evaluate
import hub
import igp
import model as llm
import router as routing
from hardconcrete import harden, lagrangian, sample_u, sample_z

B = 6
TEXTS = [[5, 9, 11, 3, 40], [7, 20, 21], list(range(30, 50)), [1, 2, 3, 4]]


def arguments(**change):
    return argparse.Namespace(**{"lr": 0.2, "lr_lambda": 0.1, "gate": "paper", "sparsity": 0.25,
                                 "batch_size": 3, "length": 16, "epochs": 1, "budget": "blocks",
                                 "granularity": "block"} | change)


def fresh(name="t"):
    return igp.new_mask(torch.ones(B), arguments(), name)


@pytest.fixture
def model(checkpoint):
    return llm.load(checkpoint("llama")[0], "cpu", torch.float32)


# ------------------------------------------------------------------ the training step


def test_lm_loss_is_cross_entropy_with_its_gradient(model, monkeypatch):
    monkeypatch.setattr(evaluate, "HEAD_ROWS", 7)
    hidden, targets = torch.randn(30, 48, requires_grad=True), torch.arange(30)
    loss, gradient = igp.lm_loss(model, hidden, targets)
    wanted = F.cross_entropy(model.head(hidden), targets)
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(gradient, hidden.grad)


@pytest.mark.parametrize(("budget", "granularity"), [("blocks", "block"), ("flops", "block"),
                                                      ("blocks", "layer")])
def test_first_step_is_eq_8_by_autograd_on_transformers(model, budget, granularity):
    """One step from log_alpha = log 3; Adam's first step is lr * sign(gradient)."""
    args = arguments(budget=budget, granularity=granularity)
    weight = igp.gate_weights(model.config, args)
    mask, generator = igp.new_mask(weight, args, "test"), torch.Generator().manual_seed(3)
    igp.train_mask(model, mask, [(TEXTS, 1.0)], args, generator)

    n_gates = 3 if granularity == "layer" else B
    log_alpha = torch.full((n_gates,), 3.0).log().requires_grad_()  # 0.75 / 0.25
    lambdas = torch.zeros(2, requires_grad=True)
    u = sample_u((4, n_gates), torch.Generator().manual_seed(3))
    z = sample_z(log_alpha, u, "paper")
    blocks = torch.stack([z, z], 2).flatten(1) if granularity == "layer" else z
    losses, n = 0, 0
    for i, x in enumerate(TEXTS):  # a text at a time: no padding
        reference = make_reference("llama")
        hook_gates(reference, blocks[i])
        logits = reference(torch.tensor([x])).logits[0, :-1]
        losses = losses + F.cross_entropy(logits, torch.tensor(x[1:]), reduction="sum")
        n += len(x) - 1
    t = 1 - z.mean()
    if budget == "flops":  # of the parameters of a block, and of its scores over 16 tokens
        attention, ffn = 2 * 48 * (60 + 2 * 20 + 60) + 4 * 16 * 60, 6 * 48 * 80
        kept = attention * z[:, 0::2].sum(1) + ffn * z[:, 1::2].sum(1)
        t = 1 - (kept / (3 * (attention + ffn))).mean()
    total = losses / n + lagrangian(t, args.sparsity, *lambdas)
    total.backward()
    torch.testing.assert_close(mask["log_alpha"].grad, log_alpha.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(mask["lambdas"].grad, lambdas.grad, rtol=1e-4, atol=1e-6)
    step = mask["log_alpha"].detach() - log_alpha.detach()
    torch.testing.assert_close(step, -args.lr * log_alpha.grad.sign(), rtol=1e-2, atol=1e-3)
    ascent = args.lr_lambda * lambdas.grad.sign()
    torch.testing.assert_close(mask["lambdas"].detach(), ascent, rtol=1e-2, atol=1e-3)


def test_gates_weigh_what_their_blocks_cost(model):
    ones = igp.gate_weights(model.config, arguments())
    assert ones.tolist() == [1.0] * B
    layers = igp.gate_weights(model.config, arguments(granularity="layer", budget="flops"))
    torch.testing.assert_close(layers, torch.ones(3))             # layers cost the same
    w = igp.gate_weights(model.config, arguments(budget="flops"))
    for i in (2, 3):
        z = torch.ones(B, dtype=torch.bool)
        z[i] = False
        saved = llm.flops(model.config, 16) - llm.flops(model.config, 16, z)
        layer = llm.flops(model.config, 16) - llm.flops(
            model.config, 16, torch.tensor([1, 1, 0, 0, 1, 1]).bool())
        assert w[i].item() == pytest.approx(saved / layer)


def test_hard_masks_meet_either_budget_and_waste_none(model):
    """No more FLOPs than the target leaves, and no skipped block that the target does not need."""
    args, rng = arguments(budget="flops", sparsity=0.4), torch.Generator().manual_seed(0)
    w = igp.gate_weights(model.config, args)
    for _ in range(50):
        z = igp.hard_z(torch.randn(B, generator=rng), w, args)
        gone = w[~z].sum()                                        # one layer of three
        assert gone >= 1 - 1e-4 > gone - w[~z].min()
    layers = arguments(granularity="layer", sparsity=0.4)         # floor(0.4 * 3 + 0.5) = 1 of 3
    z = igp.hard_z(torch.tensor([0.3, -1.0, 0.2]), igp.gate_weights(model.config, layers), layers)
    assert z.tolist() == [True, True, False, False, True, True]


def test_a_step_costs_two_forwards_and_no_weight_gradient(model):
    texts = [list(range(2, 42))] * 3
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.head(model(torch.tensor(texts), torch.ones(3, B)))
    with FlopCounterMode(display=False) as step:
        igp.train_mask(model, fresh(), [(texts, 1.0)], arguments(),
                       torch.Generator())
    assert 1.7 < step.get_total_flops() / forward.get_total_flops() <= 2.1
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_no_tensor_of_all_logits_is_ever_built(model, monkeypatch):
    monkeypatch.setattr(evaluate, "HEAD_ROWS", 8)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (97,) and out.shape[0] != 48:
                largest = max(largest, out.numel())
            return out

    with Watch():
        igp.train_mask(model, fresh(), [([list(range(2, 42))] * 3, 1.0)],
                       arguments(), torch.Generator())
    assert 0 < largest <= 8 * 97


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.4, 0.6])
def test_the_first_sparsity_is_about_the_target(sparsity):
    log_alpha = igp.new_mask(torch.ones(B), arguments(sparsity=sparsity), "t")["log_alpha"].detach()
    z = sample_z(log_alpha, sample_u((20_000, B), torch.Generator()), "paper")
    assert 1 - z.mean().item() == pytest.approx(sparsity, abs=0.03)


def test_training_reaches_the_target_and_repeats(model):
    def train():
        mask, generator = fresh(), torch.Generator().manual_seed(5)
        args = arguments(sparsity=0.5)
        batches = igp.draw(TEXTS, 300, args, generator)
        steps = [(x, 1 - i / 100) for i, x in enumerate(batches)]
        igp.train_mask(model, mask, steps, args, generator)
        return mask["log_alpha"].detach()

    log_alpha, again = train(), train()
    assert torch.equal(log_alpha, again)
    z = sample_z(log_alpha, sample_u((2000, B), torch.Generator()), "paper")
    assert 1 - z.mean().item() == pytest.approx(0.5, abs=1 / B)
    assert log_alpha.std() > 0.3 and (~harden(log_alpha, 3)).sum() == 3


def loss_by_transformers(z):
    """The summed cross-entropy of TEXTS with hooks that multiply by z (B,)."""
    reference, total = make_reference("llama"), 0.0
    hook_gates(reference, z.float())
    with torch.no_grad():
        for x in TEXTS:
            logits = reference(torch.tensor([x])).logits[0, :-1]
            total += F.cross_entropy(logits, torch.tensor(x[1:]), reduction="sum").item()
    return total


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize(("budget", "granularity"), [("blocks", "block"), ("flops", "block"),
                                                      ("blocks", "layer")])
def test_swap_against_its_rule_on_transformers(model, monkeypatch, width, budget, granularity):
    """Of the gates around the threshold the one is moved over it that lowers the loss the most."""
    monkeypatch.setattr(igp, "WIDTH", width)
    args, moved = arguments(budget=budget, granularity=granularity, sparsity=0.5), 0
    weight = igp.gate_weights(model.config, args)
    n = len(weight)
    for seed in range(8):
        log_alpha = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        got, tokens = igp.swap(model, log_alpha, TEXTS, lambda x: igp.hard_z(x, weight, args))
        start = igp.hard_z(log_alpha, weight, args)
        gates = start.view(n, -1)[:, 0]
        order = sorted(range(n), key=lambda i: log_alpha[i])
        kept, skipped = ([i for i in order if gates[i] == on] for on in (True, False))
        tried = {tuple(start.tolist()): loss_by_transformers(start)}
        for i in kept[:width] + skipped[-width:]:
            if budget == "flops":
                other = log_alpha.clone()
                other[i] = -99 if gates[i] else 99
                z = igp.hard_z(other, weight, args)
            else:                                                 # an exchange with the nearest
                z = gates.clone()
                z[i] = not z[i]
                z[skipped[-1] if gates[i] else kept[0]] = gates[i]
                z = z.repeat_interleave(B // n)
            assert z.view(n, -1)[i, 0] != gates[i]
            tried[tuple(z.tolist())] = loss_by_transformers(z)
        best = torch.tensor(min(tried, key=tried.get))
        assert torch.equal(igp.hard_z(got, weight, args), best)
        assert tokens == len(tried) * sum(map(len, TEXTS))
        assert torch.equal(got, log_alpha) == torch.equal(best, start)
        moved += not torch.equal(best, start)
    assert moved


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_every_mask_ends_with_a_swap_on_its_own_texts_that_is_counted(command, monkeypatch,
                                                                      granularity):
    """static gets the texts of both clusters' swaps; the shared start gets none."""
    given, trained = [], []
    monkeypatch.setattr(igp, "SWAPPED", 2)
    monkeypatch.setattr(igp, "swap", lambda _model, log_alpha, texts, _hard: (
        given.append((log_alpha.clone(), texts)), (log_alpha.flip(0), 1000))[1])
    train_mask = igp.train_mask
    monkeypatch.setattr(igp, "train_mask", lambda model, mask, steps, *rest: (
        train_mask(model, mask, steps, *rest),
        trained.append((mask["name"], mask["log_alpha"].detach().clone(),
                        sum((x for x, _ in steps), []))))[0])
    run = igp.open_run(igp.parse([*command, "--granularity", granularity]))
    run.out.mkdir()
    mu, labels = np.random.default_rng(0).random((2, 24), np.float32), np.arange(len(run.train)) % 2
    for method, k in (("igp", 2), ("static", 1)):
        router = igp.train_masks(run, method, mu[:k], labels % k)
        masks = [x for x in trained if x[0].startswith(f"{method}, ")]
        assert len(given) == len(masks) == k
        for j, ((log_alpha, texts), (name, end, own)) in enumerate(zip(given, masks, strict=True)):
            assert torch.equal(log_alpha, end) and texts == own[-4 // k:]
            cost = run.results["training"][name]
            assert cost["forward_tokens"] == 2 * cost["tokens"] + 1000
            flipped = end.flip(0).repeat_interleave(B // len(end))
            assert torch.equal(router.log_alpha[j], flipped)
            assert torch.equal(router.z[j], harden(flipped, 2))   # floor(0.3 * 6 + 0.5)
        given.clear()
    cost = run.results["training"]["shared start"]
    assert cost["forward_tokens"] == 2 * cost["tokens"] > 0


def test_the_cost_of_masks_is_training_and_swaps():
    """Two forwards of 5 x 7 texts of 12 tokens in 3 epochs, then nine of 5 x 32."""
    args = igp.parse(["--clusters", "5", "--samples", "7", "--length", "12", "--epochs", "3"])
    assert igp.training_tokens(args) == 5 * 7 * 12 * 3
    assert igp.forward_tokens(args) == 2 * 5 * 7 * 12 * 3 + 5 * 32 * 12 * 9


def test_a_loss_that_is_not_finite_stops_with_mask_and_step(model):
    model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="mask 3: loss nan .* at step 0"):
        igp.train_mask(model, fresh("mask 3"), [(TEXTS, 1.0)], arguments(),
                       torch.Generator())


def test_draw_cuts_shuffles_and_repeats_in_turn():
    texts = [[i] * 30 for i in range(7)]
    batches = igp.draw(texts, 20, arguments(epochs=2), torch.Generator().manual_seed(0))
    assert [len(x) for x in batches] == [3] * 6 + [2]
    flat = [x[0] for batch in batches for x in batch]
    assert flat[:7] == flat[7:14] != list(range(7)) == sorted(flat[:7])
    assert {len(x) for batch in batches for x in batch} == {16}
    few = igp.draw(texts, 6, arguments(epochs=3), torch.Generator().manual_seed(0))
    assert len({x[0] for batch in few for x in batch}) == 2


# ------------------------------------------------------------------ the whole pipeline


@pytest.fixture
def command(checkpoint, encoder, tmp_path, monkeypatch):
    """A command line on a tiny checkpoint folder, texts of two kinds, and the tiny encoder."""
    folder, _ = checkpoint("qwen3", shards=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    rng = np.random.default_rng(0)
    halves = [rng.choice(WORDS[half * 40:half * 40 + 40], size=rng.integers(5, 30))
              for half in (0, 1) * 40]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": " ".join(words)}) for words in halves))
    articles = [{"title": w.upper(), "topic": "A", "description": f"v{i} {WORDS[i - 1]}0",
                 "text": w}
                for i, w in enumerate(WORDS)]
    monkeypatch.setattr(hub, "encoder_folder", lambda: encoder)
    original = hub.calibration_texts
    monkeypatch.setattr(hub, "calibration_texts",
                        lambda name, n: articles if name == "wikipedia" else original(name, n))
    return ["--model", str(folder), "--calibration", str(texts), "--clusters", "2",
            "--samples", "8",
            "--length", "12", "--batch-size", "4", "--sparsity", "0.3", "--dtype", "float32",
            "--out", str(tmp_path / "run"), "--preset", "demo"]


def test_pipeline_end_to_end(command, tmp_path, capsys, monkeypatch):
    drawn, draw = [], igp.draw
    monkeypatch.setattr(igp, "draw", lambda texts, n, *more: (drawn.append(n),
                                                              draw(texts, n, *more))[1])
    assert igp.main([*command, "--tasks", "wiki_what", "--limit", "9"]) == 0
    out, err = capsys.readouterr()
    results = json.loads((tmp_path / "run/results.json").read_text())
    router = routing.load(tmp_path / "run/router.safetensors")
    static = routing.load(tmp_path / "run/static.safetensors")
    assert router.z.shape == (2, B) and static.z.shape == (1, B)
    assert ((~router.z).sum(1) == 2).all() and (~static.z).sum() == 2  # floor(0.3 * 6 + 0.5)
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["dense", "static", "igp"]
    assert rows["dense"]["flops_ratio"] == 1 and rows["igp"]["flops_ratio"] < 1
    assert rows["static"]["flops_ratio_with_router"] == rows["static"]["flops_ratio"]
    assert rows["igp"]["flops_ratio_with_router"] > rows["igp"]["flops_ratio"]
    assert rows["static"]["sparsity"] == pytest.approx(2 / 6)
    assert drawn == [10, 6, 3, 3]  # of 2 * 8 texts 60 % for the start, static, then two clusters
    assert rows["static"]["training_tokens"] > 16 * 4 < rows["igp"]["training_tokens"]
    for i, z in enumerate(router.z):
        assert rows["igp"]["attention_skipped"][i] == (~z[0::2]).sum()
        assert rows["igp"]["ffn_skipped"][i] == (~z[1::2]).sum()
    assert rows["igp"]["tasks"]["wiki_what"]["n"] == 9
    matrix = np.array(results["matrix"])
    assert matrix.shape == (2, 2) and np.isfinite(matrix).all()
    assert set(results) >= {
        "model", "sparsity_target", "budget", "clusters", "calibration", "seed", "preset",
        "arguments",
        "versions", "git", "rows", "matrix", "seconds", "peak_memory_bytes"}
    assert results["training_tokens_per_second"] > 0 and results["peak_memory_bytes"] > 1e7
    for text in ("| dense |", "| igp |", "wiki_what (n=9)", "| cluster (texts) |", "  A ", "  F ",
                 "texts", "Seconds: encoding"):
        assert text in out
    assert all(stage in err for stage in ("encoding:", "masks of static:", "texts of igp:"))


def test_the_estimate_counts_what_is_left(command, tmp_path, monkeypatch):
    """In forward tokens; a clock of ours lets the matmul that it times take a second."""
    command = [*command, "--tasks", "wiki_what", "--limit", "9"]

    def tokens(*more) -> float:
        """The estimate, divided by the time of a token."""
        run = igp.open_run(igp.parse([*command, *more]))
        with monkeypatch.context() as patch:
            clock = iter(range(100))
            patch.setattr(igp.time, "perf_counter", lambda: next(clock))
            minutes = igp.estimate(run)
        config, w = run.model.config, run.model.model.layers[0].mlp.up_proj.weight
        return minutes * 60 * 0.6 * 2 * 1024 * w.numel() / (llm.flops(config, 12) / 12)

    run = igp.open_run(igp.parse(command))
    judged = sum(len(x["tokens"]) for x in run.judge)
    asked = sum(len(q.routed + "".join(q.choices)) for q in run.questions["wiki_what"]) / 4
    once = 2 * 2 * 8 * 12  # two forwards of 8 texts of 12 tokens for 2 clusters
    swaps = 2 * 32 * 12 * 9
    assert tokens() == pytest.approx((0.6 + 0.4 + 0.4) * once + 2 * swaps + 4 * judged + 3 * asked)
    assert tokens("--prompt", "a", "--tasks", "") == pytest.approx(once + swaps)
    assert igp.main(command) == 0
    assert tokens() == 0 == tokens("--prompt", "a", "--tasks", "")
    assert tokens("--method", "igp,sleb") == pytest.approx(once + swaps + judged + asked)
    assert tokens("--limit", "5") == pytest.approx(3 * sum(len(q.routed + "".join(
        q.choices)) for q in run.questions["wiki_what"][:5]) / 4)
    router = str(tmp_path / "run/router.safetensors")
    assert tokens("--router", router, "--out", str(tmp_path / "new"), "--clusters",
                  "7") == pytest.approx(3 * judged + 2 * asked)  # N is the router's


def test_the_judges_are_the_held_out_texts_under_their_own_z(command, tmp_path, capsys,
                                                             monkeypatch):
    """IG-Pruning's perplexity, recomputed a text at a time with transformers and hooks."""
    path = tmp_path / "other/router.safetensors"
    assert igp.main([*command, "--method", "igp", "--out", str(path.parent)]) == 0
    router = routing.load(path)
    router.z[:] = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0]]).bool()  # surely different
    routing.save(router, path)
    with monkeypatch.context() as patch:
        patch.setattr(igp, "train_mask", None)
        assert igp.main([*command, "--router", str(path)]) == 0  # dense and igp, nothing trained
    results, args = json.loads((tmp_path / "run/results.json").read_text()), igp.parse(command)
    matrix = np.array(results["matrix"])
    assert (matrix[:, 0] != matrix[:, 1]).all()
    assert min(mask["judging_texts"] for mask in results["masks"]) > 0
    texts = [x["text"] for x in hub.split(hub.calibration_texts(args.calibration, None))[2]]
    encoder = routing.open_encoder(hub.encoder_folder(), "cpu", torch.float32)
    mu, tokenizer = router.mu.numpy(), hub.load_tokenizer(hub.Path(args.model))
    for name in ("igp", "dense"):
        total, n = 0.0, 0
        for text in texts:
            e = routing.encode(encoder, [text])
            k = ((e - mu) ** 2).sum(1).argmin()
            z = router.z[k].float() if name == "igp" else torch.ones(B)
            reference = make_reference("qwen3")
            hook_gates(reference, z)
            ids = torch.tensor([tokenizer.encode(text).ids])
            with torch.no_grad():
                logits = reference(ids).logits[0, :-1]
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            n += ids.shape[1] - 1
        ours = next(row["ppl"] for row in results["rows"] if row["name"] == name)
        assert ours == pytest.approx(np.exp(total / n), rel=1e-4)


def test_same_seed_same_bits_and_a_cluster_alone_too(command, tmp_path, capsys):
    for out in ("a", "b"):
        assert igp.main([*command, "--method", "igp", "--out", str(tmp_path / out)]) == 0
    first = (tmp_path / "a/router.safetensors").read_bytes()
    assert first == (tmp_path / "b/router.safetensors").read_bytes()
    router = routing.load(tmp_path / "a/router.safetensors")
    router.log_alpha[0] = torch.nan                      # cluster 0 is not trained yet
    routing.save(router, tmp_path / "b/router.safetensors")
    assert igp.main([*command, "--method", "igp", "--out", str(tmp_path / "b")]) == 0
    assert first == (tmp_path / "b/router.safetensors").read_bytes()
    assert igp.main([*command, "--method", "igp", "--out", str(tmp_path / "c"), "--seed", "1"]) == 0
    assert first != (tmp_path / "c/router.safetensors").read_bytes()


def test_the_paper_preset_trains_each_mask_from_scratch(command, tmp_path, capsys):
    assert igp.main([*command, "--preset", "paper", "--method", "igp", "--epochs", "2"]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    tokens = {name: x["tokens"] for name, x in results["training"].items()}
    assert tokens.pop("shared start") == 0 and list(tokens) == ["igp, mask 0", "igp, mask 1"]
    assert results["rows"][0]["training_tokens"] == sum(tokens.values()) > 2 * 8 * 2 * 4


def test_a_finished_run_is_not_run_again(command, capsys, monkeypatch):
    assert igp.main(command) == 0
    before = capsys.readouterr().out
    monkeypatch.setattr(igp, "train_mask", None)
    monkeypatch.setattr(igp, "judge", None)
    monkeypatch.setattr(igp, "ask", None)
    assert igp.main(command) == 0
    assert capsys.readouterr().out.split("Seconds")[0] == before.split("Seconds")[0]


def test_other_methods_and_tasks_join_a_finished_run(command, tmp_path, capsys):
    assert igp.main([*command, "--method", "dense"]) == 0
    more = ["--method", "static,dense", "--tasks", "wiki_what", "--limit", "5"]
    assert igp.main([*command, *more]) == 0
    assert "wiki_what (n=5)" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    assert [(row["name"], row["tasks"]["wiki_what"]["n"]) for row in rows] == [
        ("dense", 5), ("static", 5)]
    assert igp.main([*command, *more[:-1], "9"]) == 0    # other questions are asked anew
    assert "wiki_what (n=9)" in capsys.readouterr().out
    assert igp.main([*command, "--method", "igp"]) == 0  # without the task
    out = capsys.readouterr().out
    assert "| igp | 33.3% | - | - | - |" in out and "wiki_what (n=9)" in out  # igp was not asked
    assert igp.main([*command, "--method", "igp", *more[2:]]) == 0  # 5 questions, the others had 9
    assert "| igp | 33.3% | - | - | - |" in capsys.readouterr().out


@pytest.fixture
def six(command, home):
    """The command with five rows of each of the six tasks."""
    return [*command, "--tasks-dir", str(home / "tasks"), "--samples", "4"]


def test_the_six_tasks_their_table_and_their_samples(six, tmp_path, capsys, monkeypatch):
    encoded, encode = [], routing.encode
    monkeypatch.setattr(routing, "encode", lambda encoder, texts: (
        encoded.append(set(texts)), encode(encoder, texts))[1])
    assert igp.main([*six, "--log-samples", "--limit", "4"]) == 0
    assert {"People think "} in encoded and {ROWS["openbookqa"]["question_stem"]} in encoded
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    router = routing.load(tmp_path / "run/router.safetensors")
    for row in rows:
        assert list(row["tasks"]) == list(evaluate.FIELDS)
        for task, scores in row["tasks"].items():
            path = tmp_path / f"run/samples-{row['name']}-{task}.jsonl"
            lines = [json.loads(line) for line in path.open()]
            assert [x["row"] for x in lines] == [0, 1, 2, 3]
            assert scores["acc"] == np.mean([x["acc"] for x in lines]) and scores["n"] == 4
            for x in lines:
                assert len(x["loglikelihood"]) == len(x["contexts"]) == len(x["continuations"])
                assert x["continuations"][0][0] == " " and (x["acc_norm"] is None) == (
                    task == "winogrande")
                assert (x["cluster"] is None) == (row["name"] == "dense")
                assert x["acc"] == (int(np.argmax(x["loglikelihood"])) == x["gold"])
            if row["name"] == "igp":                             # routed on the context alone
                encoder = routing.open_encoder(hub.encoder_folder(), "cpu", torch.float32)
                text = "People think " if task == "winogrande" else lines[0]["contexts"][0]
                e = torch.tensor(routing.encode(encoder, [text]))
                assert lines[0]["cluster"] == ((e - router.mu) ** 2).sum(1).argmin()
    table = [x for x in out.splitlines() if "winogrande (n=4)" in x or x.count("±") == 6]
    assert len(table) == 4 and "(n=4) | average | % of dense | skipped" in table[0]
    shown = [100 * x["acc" if x["acc_norm"] is None else "acc_norm"]
             for x in rows[1]["tasks"].values()]
    assert f"| {np.mean(shown):.2f} |" in table[2] and "| 100.00% |" in table[1]


def test_a_finished_task_is_not_asked_again_unless_it_changed(six, tmp_path, capsys, monkeypatch):
    asked, ask = [], igp.ask
    monkeypatch.setattr(igp, "ask", lambda run, name, task, router: (
        asked.append(task), ask(run, name, task, router))[1])
    dense = [*six, "--method", "dense", "--tasks"]
    for more, wanted in ((["piqa"], ["piqa"]), (["piqa,arc_easy"], ["arc_easy"]), (["piqa"], []),
                         (["piqa", "--limit", "2"], ["piqa"]),
                         (["piqa", "--limit", "2", "--bos", "off"], ["piqa"]),
                         (["piqa", "--limit", "2", "--bos", "off", "--log-samples"], ["piqa"]),
                         (["piqa", "--limit", "2", "--bos", "off", "--log-samples"], [])):
        asked.clear()
        assert igp.main([*dense, *more]) == 0
        assert asked == wanted, more


def test_bad_rows_and_a_missing_bos_are_refused_before_the_model_is_read(six, home, tmp_path,
                                                                         capsys, monkeypatch):
    monkeypatch.setattr(llm, "load", None)
    folder = tmp_path / "tasks"
    shutil.copytree(home / "tasks", folder)
    bad = [*six, "--tasks-dir", str(folder), "--tasks", "arc_easy"]
    for text, named in (('{"question": "q"}', "line 1: field choices is 'None', expected dict"),
                        ("{", "line 1 holds no JSON object"), ("", "holds no rows"),
                        (json.dumps(ROWS["arc_easy"] | {"answerKey": "Z"}), "answerKey is 'Z'")):
        (folder / "arc_easy.jsonl").write_text(text)
        line = refused(bad, capsys)
        assert "arc_easy.jsonl" in line and named in line
    (folder / "arc_easy.jsonl").unlink()
    assert "has no arc_easy.jsonl" in refused(bad, capsys)
    for bos in (None, 97, -1, "1"):
        edit_json(tmp_path / "qwen3-False-True/config.json", bos_token_id=bos)
        assert "--bos on: bos_token_id" in refused([*six, "--bos", "on"], capsys)


@pytest.mark.parametrize(("change", "named"), [
    (["--model", "lama3-8b"], "nearest: llama3-8b"),
    (["--calibration", "gone.jsonl"], "--calibration gone.jsonl is no file"),
    (["--sparsity", "0.01"], "--sparsity 0.01 skips 0 of 6 blocks"),
    (["--sparsity", "0.99"], "skips 6 of 6 blocks"),
    (["--clusters", "49"], "--clusters 49 is more than the 48 texts"),
    (["--out", "/proc/none"], "/proc/none"), (["--calibration", "."], "is no file"),
])
def test_what_a_user_can_mend_is_one_line_and_status_2(command, capsys, change, named):
    assert igp.main([*command, *change]) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1 and err.startswith("igp.py: error: ")


@pytest.mark.parametrize(("change", "named"), [
    (["--method", "dense,statik"], "--method statik is unknown; nearest: static"),
    (["--method", ""], "--method"), (["--tasks", "wiki_waht"], "nearest: wiki_what"),
    (["--router", "x", "--method", "static"], "--router trains nothing"),
    (["--device", "tpu"], "--device tpu is not here"), (["--device", "cpu:x"], "--device cpu:x"),
    (["--sparsity", "0"], "use --method dense"), (["--sparsity", "1"], "between 0 and 1"),
    (["--sparsity", "nan"], "between 0 and 1"), (["--clusters", "0"], "--clusters 0"),
    (["--lr", "nan"], "--lr nan"), (["--length", "1"], "--length 1"), (["--gate", "x"], "--gate"),
    (["--device", "cuda"], "--device cuda"), (["--lr", "x"], "invalid float value: 'x'; --help"),
    (["--foo"], "unrecognized arguments: --foo; --help lists"),
])
def test_arguments_that_make_no_sense_are_refused_at_once(capsys, change, named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as caught:
        igp.main(change)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and named in err and err.count("\n") == 1


def test_another_runs_folder_and_another_models_tokenizer_are_refused(command, tmp_path, capsys):
    assert igp.main([*command, "--method", "dense"]) == 0
    assert igp.main([*command, "--method", "dense", "--lr", "0.7"]) == 2
    assert "holds a run with lr=0.2, not 0.7; choose another --out" in capsys.readouterr().err
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(20)])
    tokenizer.save(str(tmp_path / "qwen3-False-True/tokenizer.json"))
    assert igp.main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "has ids up to 101, but vocab_size is 97" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()                 # a refusal leaves nothing behind


def refused(argv, capsys):
    """The one line of a refusal."""
    capsys.readouterr()
    assert igp.main(argv) == 2
    err = [x for x in capsys.readouterr().err.splitlines() if "error: " in x]
    assert len(err) == 1
    return err[0]


def test_a_router_of_another_model_or_run_is_refused(command, tmp_path, capsys):
    assert igp.main([*command, "--method", "igp"]) == 0
    path, other = tmp_path / "run/router.safetensors", [*command, "--out", str(tmp_path / "other")]
    router = routing.load(path)
    (tmp_path / "copy").mkdir()
    for change in ({"z": torch.ones(2, 8).bool(), "log_alpha": torch.ones(2, 8)},
                   {"identity": router.identity | {"model": "qwen3-8b"}}):
        routing.save(dataclasses.replace(router, **change), tmp_path / "copy/r.safetensors")
        line = refused([*other, "--router", str(tmp_path / "copy/r.safetensors")], capsys)
        assert "was made for" in line and "give the --model" in line
    wide = dataclasses.replace(router, mu=torch.ones(2, 99))
    routing.save(wide, tmp_path / "copy/r.safetensors")
    line = refused([*other, "--router", str(tmp_path / "copy/r.safetensors")], capsys)
    assert "embeddings are 24 wide, centroids 99" in line
    assert "no readable router" in refused([*other, "--router", "gone.safetensors"], capsys)
    (tmp_path / "run/results.json").unlink()                 # the masks alone are left
    for change in ({"identity": router.identity | {"seed": 9}}, {"mu": router.mu + 0.1},
                   {"z": ~router.z}):
        routing.save(dataclasses.replace(router, **change), path)
        line = refused([*command, "--method", "igp"], capsys)
        assert "is a router of another model or run" in line


@pytest.mark.parametrize("damage", [
    lambda text: text[:100], lambda text: "[]", lambda text: "{}", lambda text: "[" * 10**5,
    lambda text: text.replace('"ppl": ', '"ppl": 1'), lambda text: text.replace('"name"', '"nam"')])
def test_damaged_results_are_refused(command, tmp_path, capsys, damage):
    assert igp.main([*command, "--method", "dense"]) == 0
    path = tmp_path / "run/results.json"
    path.write_text(damage(path.read_text()))
    assert "results.json is not as this program wrote it" in refused(command, capsys)


def test_a_second_process_in_the_same_folder_is_refused(command, tmp_path, capsys):
    with hub.locked(tmp_path / "run", wait=False):
        assert "another process is at work" in refused(command, capsys)
    assert igp.main([*command, "--method", "dense"]) == 0


def test_a_killed_run_goes_on_mask_by_mask_and_task_by_task(command, tmp_path, capsys, monkeypatch):
    """Stopped between any two writes, the same command ends with the same bits and counts."""
    command += ["--tasks", "wiki_what", "--limit", "9"]
    whole, write, count = [*command, "--out", str(tmp_path / "whole")], routing.write, 0

    def bits(folder):
        results = json.loads((folder / "results.json").read_text())
        timed = ("seconds", "sha256", "peak_memory_bytes", "training_tokens_per_second", "training")
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in results["rows"]]
        return ([(folder / f"{name}.safetensors").read_bytes() for name in ("router", "static")],
                {k: v for k, v in results.items() if k not in (*timed, "arguments")}, rows)

    assert igp.main(whole) == 0
    wanted, name = bits(tmp_path / "whole"), "run"
    wanted[1]["rows"] = None

    def stops(path, data):
        nonlocal count
        count -= 1
        if not count:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(routing, "write", stops)
    for stop in range(1, 30):
        name, count = f"run{stop}", stop
        argv = [*command, "--out", str(tmp_path / name)]
        code = igp.main(argv)
        if code == 0:
            break
        assert code == 130 and "the same command goes on" in capsys.readouterr().err
        assert igp.main(argv) == 0
        found = bits(tmp_path / name)
        found[1]["rows"] = None
        assert found == wanted, stop
    assert 12 < stop < 29  # so many writes: stages, masks, tasks


def test_a_loss_that_is_not_finite_keeps_the_finished_clusters(command, tmp_path, capsys,
                                                               monkeypatch):
    train = igp.train_mask

    def fails(model, mask, *more):
        if mask["name"] == "igp, mask 1":
            model.model.norm.weight.fill_(torch.inf)
        return train(model, mask, *more)

    monkeypatch.setattr(igp, "train_mask", fails)
    line = refused([*command, "--method", "igp"], capsys)
    assert "igp, mask 1: loss nan" in line and "at step 0; try a lower --lr" in line
    held = routing.load(tmp_path / "run/router.safetensors").log_alpha
    assert held[0].isfinite().all() and held[1].isnan().all()


def test_a_model_without_finite_scores_is_refused(command, capsys, monkeypatch):
    load = llm.load

    def broken(*more):
        model = load(*more)
        model.model.norm.weight.fill_(torch.nan)
        return model

    monkeypatch.setattr(llm, "load", broken)
    assert "dense: log-likelihoods" in refused([*command, "--method", "dense"], capsys)


def test_a_full_disk_and_no_memory_are_one_line(command, tmp_path, capsys, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = refused([*command, "--method", "dense"], capsys)
        assert "results.json cannot be written (No space left on device)" in line
    assert igp.main([*command, "--method", "dense"]) == 0    # and goes on
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        def greedy(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(igp, "train_mask", greedy)
            line = refused([*command, "--method", "static"], capsys)
            assert "out of memory: try a smaller --batch-size" in line
    monkeypatch.setattr(igp, "train_mask", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):                   # our own mistakes show where
        igp.main([*command, "--method", "static"])


def test_dense_alone_may_skip_nothing(command, capsys):
    assert igp.main([*command, "--method", "dense", "--sparsity", "0"]) == 0


def test_development_mode_shows_the_traceback():
    """In hub.py by itself, which starts without torch."""
    code = "import sys, hub; sys.exit(hub.guarded('igp.py', lambda: hub.resolve('gone')))"
    for flags, status in ((["-X", "dev", "-W", "ignore"], 1), ([], 2)):
        done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == status and "gone" in done.stderr
        assert ("Traceback" in done.stderr) == (status == 1)


def test_help_shows_the_values_of_the_preset(capsys):
    def text(*more):
        with pytest.raises(SystemExit, match="0"):
            igp.main([*more, "--help"])
        return " ".join(capsys.readouterr().out.split())

    demo, paper = text(), text("--preset", "paper")
    for preset, shown in (("demo", demo), ("paper", paper)):
        for key, value in igp.PRESETS[preset].items():
            flag = shown.split(f"--{key.replace('_', '-')} {key.upper()}")[-1]
            assert f"(default: {value})" in flag.split(" --")[0], (preset, key)


# ------------------------------------------------------------------ what is printed


# ------------------------------------------------------------------ rivals, granularity, budget


@pytest.fixture
def deep(command, checkpoint, monkeypatch):
    """The command on a model of 9 layers, 18 blocks, with searches of a few tokens."""
    folder, _ = checkpoint("llama", num_hidden_layers=9)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    monkeypatch.setattr(baselines, "SHORTENED", (4, 12))
    return [*command[:1], str(folder), *command[2:]]


def test_all_methods_stand_in_one_table_with_their_cost(deep, tmp_path, capsys, monkeypatch):
    assert igp.main([*deep, "--method", "all", "--tasks", "wiki_what", "--limit", "5"]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert table[0] == (
        "| method | sparsity | wiki_what (n=5) | average | % of dense | skipped attention | "
        "skipped FFN | FLOPs | FLOPs + router | perplexity | forward tokens | seconds |")
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in igp.METHODS]
    rows = {row["name"]: row for row in
            json.loads((tmp_path / "run/results.json").read_text())["rows"]}
    for name in baselines.RIVALS:  # 3 of 9 layers: floor(0.3 * 9 + 0.5)
        assert rows[name]["attention_skipped"] == rows[name]["ffn_skipped"] == [3]
        z = routing.load(tmp_path / f"run/{name}.safetensors").z
        assert torch.equal(z[:, 0::2], z[:, 1::2]) or name == "evopress"
        assert z.shape == (1, 18) and rows[name]["training_tokens"] == 0
    training = 2 * 8 * 12  # clusters, samples, tokens at most
    assert 0 < rows["igp"]["training_tokens"] <= training
    cap = 2 * training + 2 * 32 * 12 * 9
    assert rows["sleb"]["forward_tokens"] <= cap < 4 * rows["evopress"]["forward_tokens"]
    assert rows["shortened-ppl"]["forward_tokens"] == 9 * 48
    assert rows["shortened-taylor"]["forward_tokens"] == 3 * 48
    assert rows["shortened-magnitude"]["forward_tokens"] == rows["dense"]["forward_tokens"] == 0
    for name in baselines.RIVALS:  # a finished method is not run again
        monkeypatch.setitem(baselines.RIVALS, name, (None, baselines.RIVALS[name][1]))
    monkeypatch.setattr(igp, "train_mask", None)
    assert igp.main([*deep, "--method", "all", "--tasks", "wiki_what", "--limit", "5"]) == 0
    assert capsys.readouterr().out.split("\n\n")[0].splitlines() == table


def test_a_rivals_mask_is_kept_when_its_row_is_not(deep, tmp_path, capsys, monkeypatch):
    assert igp.main([*deep, "--method", "sleb"]) == 0
    path = tmp_path / "run/results.json"
    path.unlink()
    monkeypatch.setattr(baselines, "sleb", None)
    monkeypatch.setitem(baselines.RIVALS, "sleb", (None, 2))
    assert igp.main([*deep, "--method", "sleb"]) == 0
    assert json.loads(path.read_text())["rows"][0]["attention_skipped"] == [3]
    router = routing.load(tmp_path / "run/sleb.safetensors")
    router.z[0, 0] = ~router.z[0, 0]
    routing.save(router, tmp_path / "run/sleb.safetensors")
    path.unlink()
    assert igp.main([*deep, "--method", "sleb"]) == 2
    assert "is a router of another model or run" in capsys.readouterr().err


def test_layers_and_flops_go_through_the_whole_pipeline(deep, tmp_path, capsys):
    assert igp.main([*deep, "--granularity", "layer", "--method", "igp,evopress"]) == 0
    for name in ("router", "evopress"):
        router = routing.load(tmp_path / f"run/{name}.safetensors")
        assert torch.equal(router.z[:, 0::2], router.z[:, 1::2])
        assert ((~router.z).sum(1) == 6).all()
        assert torch.equal(router.log_alpha[:, 0::2], router.log_alpha[:, 1::2])
    assert igp.main([*deep, "--method", "igp"]) == 2              # another granularity
    assert "holds a run with granularity=layer, not block" in capsys.readouterr().err
    out = str(tmp_path / "flops")
    assert igp.main([*deep, "--out", out, "--budget", "flops", "--method", "igp,sleb"]) == 0
    results = json.loads((tmp_path / "flops/results.json").read_text())
    assert results["budget"] == "flops"
    args = igp.parse([*deep, "--budget", "flops"])
    w = igp.gate_weights(llm.read_config(args.model), args)
    for z in routing.load(tmp_path / "flops/router.safetensors").z:
        assert w[~z].sum() >= 3 - 1e-4 > (w[~z].sum() - w[~z].min())
    igp_row, sleb = results["rows"]  # as much as 3 layers in texts of 12 tokens, judged on others
    assert sum(igp_row["ffn_skipped"]) and igp_row["flops_ratio"] <= sleb["flops_ratio"] + 0.02
    assert igp.main([*deep, "--out", out, "--budget", "flops", "--method", "igp"]) == 0


@pytest.mark.parametrize(("more", "says"), [
    (["--method", "shortened-ppl", "--sparsity", "0.4"],
     "--sparsity 0.4 skips 4 of 9 layers; shortened-ppl can skip 1 to 3"),
    (["--method", "sleb", "--sparsity", "0.9"], "skips 8 of 9 layers; sleb can skip 1 to 7"),
    (["--method", "all", "--sparsity", "0.03"], "skips 0 of 9 layers; "),
    (["--granularity", "layer", "--sparsity", "0.03"], "skips 0 of 9 layers; "),
    (["--budget", "flops", "--sparsity", "0.03"], "skips 0 of 9 layers; "),
    (["--method", "slab"], "--method slab is unknown; nearest: sleb"),
    (["--router", "r", "--method", "evopress"], "--router trains nothing"),
    (["--budget", "flop"], "--budget: invalid choice: 'flop'"),
])
def test_what_cannot_be_skipped_is_refused(deep, capsys, more, says):
    try:
        code = igp.main([*deep, *more])
    except SystemExit as e:
        code = e.code
    assert code == 2 and says in capsys.readouterr().err


# ------------------------------------------------------------------ --prompt

PROMPT = "w3 w50 w7 w7 w61"


@pytest.fixture
def prompted(command, checkpoint, tmp_path):
    """The command with --prompt and a router of two sure masks, made by hand, and that router."""
    path = tmp_path / "router.safetensors"
    mu = torch.nn.functional.normalize(torch.randn(2, 24, generator=torch.Generator().manual_seed(
        0)))
    z = torch.tensor([[1, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 0]]).bool()
    router = routing.Router(mu, z, torch.ones(2, 6), {"model": str(tmp_path / "qwen3-False-True")})
    routing.save(router, path)
    return [*command, "--router", str(path), "--prompt", PROMPT], router


def test_a_prompt_gets_the_text_of_its_own_mask(prompted, tmp_path, encoder, capsys, monkeypatch):
    """Against transformers with hooks; from a router alone: no text is read, no folder written."""
    command, router = prompted
    monkeypatch.setattr(hub, "calibration_texts", None)
    assert igp.main(command) == 0
    out = capsys.readouterr().out
    model = routing.open_encoder(encoder, "cpu", torch.float32)
    e = torch.from_numpy(routing.encode(model, [PROMPT]))
    k, square = ((e - router.mu) ** 2).sum(1).argmin(), ((e - router.mu) ** 2).sum(1).min()
    z = router.z[k]
    assert f"Cluster {k} of 2, |e - c_k|^2 = {square:.4f}. M^x skips {(~z[0::2]).sum()} " in out
    assert f"and {(~z[1::2]).sum()} FFN blocks of 6:\n{evaluate.picture(z)}\n" in out

    tokenizer, reference = make_tokenizer(), make_reference("qwen3")
    hook_gates(reference, z.float())
    ids = tokenizer.encode(PROMPT).ids
    new = reference.generate(torch.tensor([ids]), max_new_tokens=123, do_sample=False,
                             pad_token_id=0)[0, len(ids):].tolist()
    config = llm.read_config(tmp_path / "qwen3-False-True")
    assert len(new) == 123 and not config.eos_token_id       # up to max_position_embeddings
    assert f"\n\n{tokenizer.decode(new)}\n\n| 5 tokens of prompt |" in out
    assert not (tmp_path / "run").exists()

    rows = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ")[1:]
            for line in out.splitlines()[-2:]}
    t = len(ids) + len(new) - 1                              # the last one is not run
    share = llm.flops(config, t, z) / llm.flops(config, t)
    routed = routing.encoder_flops(encoder, 5) / llm.flops(config, t)
    assert rows["igp"][3:] == [f"{share:.1%}", f"{share + routed:.1%}"]
    assert rows["dense"][3:] == ["100.0%", "100.0%"]


def test_the_cost_table_counts_the_cache_and_times_both(prompted, capsys, monkeypatch):
    """A clock of ours: every look at it takes a second, so that a token takes one."""
    command, router = prompted
    clock = iter(range(10**6))
    monkeypatch.setattr(igp.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(igp, "NEW_TOKENS", 9)
    assert igp.main(command) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    kv = 2 * 2 * 14 * 10 * 4 / 2**20                         # a layer's, of 14 tokens
    assert rows[0][:4] == ["igp", "5", "1.0", f"{2 * kv:.3f}"]
    assert rows[1][:4] == ["dense", "5", "1.0", f"{3 * kv:.3f}"]


def test_a_prompt_trains_the_masks_it_needs_and_a_run_goes_on(command, tmp_path, capsys,
                                                              monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert igp.main([*command, "--prompt", "-"]) == 0
    out = capsys.readouterr().out
    assert "Cluster " in out and "| igp | " in out and "perplexity" not in out
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["rows"] == [] and len(results["training"]) == 3
    monkeypatch.setattr(igp, "train_mask", None)             # they are kept
    assert igp.main([*command, "--prompt", PROMPT]) == 0
    again = capsys.readouterr().out
    assert again.split("| 5 tokens")[0] == out.split("| 5 tokens")[0]
    assert igp.main([*command, "--method", "igp", "--tasks", ""]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "named"), [
    (["--prompt", ""], "--prompt has 0 tokens"), (["--prompt", " \n"], "--prompt has 0 tokens"),
    (["--prompt", "w1 " * 128], "--prompt has 128 tokens; give it a text of 1 to 127"),
    (["--router", "gone.safetensors"], "gone.safetensors"),
    (["--model", "."], "config.json")])
def test_a_prompt_that_cannot_be_answered_is_refused(prompted, capsys, monkeypatch, change, named):
    monkeypatch.setattr(llm, "load", None)                   # before the weights are read
    assert named in refused([*prompted[0], *change], capsys)


def test_a_prompt_under_a_foreign_router_is_refused(prompted, tmp_path, capsys):
    command, router = prompted
    for change, named in (({"identity": {"model": "qwen3-8b"}}, "was made for qwen3-8b"),
                          ({"mu": torch.ones(2, 99)}, "24 wide, centroids 99")):
        routing.save(dataclasses.replace(router, **change), tmp_path / "router.safetensors")
        assert named in refused(command, capsys)


def test_a_prompt_asks_igp_alone(capsys):
    for more in (["--method", "sleb"], ["--tasks", "piqa"]):
        with pytest.raises(SystemExit):
            igp.main(["--prompt", "x", *more])
        assert "--prompt asks igp for a text" in capsys.readouterr().err


def test_picture_and_matrix_report():
    z = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1]).bool()
    assert evaluate.picture(z) == "A █·██  F ██·█"
    bad = evaluate.matrix_report([[10.0, 9.0], [12.0, 11.0]], [5, 7])
    assert "not specialised" in bad and "for cluster 0," in bad
    assert "| 0 (5) | 10.00 | 9.00 |" in bad
    same = evaluate.matrix_report([[9.0, 9.0], [12.0, 11.0]], [5, 7])
    assert "not specialised" in same and "for cluster 0," in same
    good = evaluate.matrix_report([[9.0, 10.0], [None, None]], [5, 0])
    assert "lowest of every row" in good and "| 1 (0) | - | - |" in good
