"""study.py: every recipe runs, and the controls are what they say, on tiny models."""
import argparse
import json

import numpy as np
import pytest
import study
import torch
from conftest import ROWS, make_tokenizer

import hub
import igp
import model as llm
import router as routing

B = 6
TEXTS = [[5, 9, 11, 3, 40, 7], [7, 20, 21], list(range(30, 50)), [1, 2, 3, 4], [9, 8, 7, 6, 5]]


@pytest.fixture
def model(checkpoint):
    return llm.load(checkpoint("llama")[0], "cpu", torch.float32)


def test_every_recipe_trains_a_mask_that_skips_the_target(model, monkeypatch):
    monkeypatch.setattr(igp, "WIDTH", 2)
    monkeypatch.setattr(igp, "SWAPPED", 3)
    monkeypatch.setitem(igp.PRESETS, "demo", igp.PRESETS["demo"] | {
        "samples": 40, "clusters": 1, "length": 12})
    args = igp.parse(["--sparsity", "0.34"])
    draw, drawn, swap, swaps = igp.draw, [], igp.swap, []
    monkeypatch.setattr(igp, "swap", lambda *given: swaps.append(given[2]) or swap(*given))
    monkeypatch.setattr(igp, "draw", lambda texts, n, *rest: drawn.append(n) or draw(
        texts, n, *rest))
    train_mask, starts = igp.train_mask, []
    monkeypatch.setattr(igp, "train_mask", lambda model, mask, *rest: (
        starts.append(mask["log_alpha"][0].item()), train_mask(model, mask, *rest)))
    default = study.train(model, TEXTS, args, study.RECIPES["default"], 0)
    before = igp.sample_u, igp.lagrangian
    for name, recipe in study.RECIPES.items():
        swaps.clear()
        starts.clear()
        z = study.train(model, TEXTS, args, recipe, 0)
        assert (~z).sum() == 2, name
        if "share" in recipe:
            assert drawn[-1] == recipe["share"] * drawn[0]
        assert len(swaps) == recipe.get("swaps", 1), name
        assert all(len(x) == 3 for x in swaps)
        assert recipe.get("start") in (None, starts[0])
    assert before == (igp.sample_u, igp.lagrangian)
    assert torch.equal(default, study.train(model, TEXTS, args, {}, 0))


def test_controls_are_recomputed_by_hand(checkpoint, encoder, tmp_path, monkeypatch, capsys):
    folder, _ = checkpoint("llama")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    monkeypatch.setattr(hub, "encoder_folder", lambda: encoder)
    rng, texts = np.random.default_rng(0), tmp_path / "texts.jsonl"
    words = [[f"w{i}" for i in rng.integers(0, 80, rng.integers(5, 30))] for _ in range(60)]
    texts.write_text("\n".join(json.dumps({"text": " ".join(x)}) for x in words))
    out = tmp_path / "run"
    assert igp.main(["--model", str(folder), "--calibration", str(texts), "--clusters", "2",
                     "--samples", "8", "--length", "12", "--sparsity", "0.3", "--out", str(out),
                     "--preset", "demo", "--dtype", "float32", "--method", "igp,static"]) == 0
    router = routing.load(out / "router.safetensors")
    router.z[:] = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0]]).bool()
    routing.save(router, out / "router.safetensors")
    for task, row in ROWS.items():
        (tmp_path / f"{task}.jsonl").write_text("\n".join([json.dumps(row)] * 2))
    capsys.readouterr()
    study.controls(argparse.Namespace(run=str(out), tasks_dir=str(tmp_path), limit=2))
    printed = capsys.readouterr().out
    model = llm.load(folder, "cpu", torch.float32)
    args = argparse.Namespace(**json.loads((out / "results.json").read_text())["arguments"])
    _, _, chosen, judging = study.opened(args)
    table = np.array([[study.losses(model, z, [x["tokens"]])[0] for x in judging]
                      for z in router.z])
    n = sum(len(x["tokens"]) - 1 for x in judging)
    e = routing.encode(routing.open_encoder(encoder, "cpu", torch.float32),
                       [x["text"] for x in judging])
    k = ((e[:, None] - router.mu.numpy()) ** 2).sum(2).argmin(1)
    best = np.argmin([sum(study.losses(model, z, [x["tokens"] for x in chosen]))
                      for z in router.z])
    for name, total in (("nearest centroid (Eq. 9)", sum(table[k, range(len(k))])),
                        (f"best single mask ({best})", table[best].sum()),
                        ("random mask, in expectation", table.mean(0).sum()),
                        ("oracle: the best mask of each text", table.min(0).sum())):
        assert f"| {name} | {np.exp(total / n):.2f} |" in printed
    for i, total in enumerate(table.sum(1)):                      # Fig. 1
        assert f"\n| {i} | {np.exp(total / n):.2f} | " in printed.split("| mask | perplexity |")[1]
    gap = (table.mean(0) - table[best]).mean() / (n / len(judging))
    assert f" | {gap:+.4f} ± " in printed and " | +0.0000 ± 0.0000 |" in printed
    assert "| static: N = 1, all tokens |" in printed and "Perplexity by cluster" in printed


def test_mixes_hold_as_many_texts_of_each_source(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(f"a{i}" for i in range(7)))
    (tmp_path / "b.txt").write_text("\n".join(f"b{i}" for i in range(5)))
    sources = [str(tmp_path / "a.txt"), "code", str(tmp_path / "b.txt")]
    study.mix(argparse.Namespace(file=str(tmp_path / "mix.jsonl"), sources=sources))
    rows = hub.calibration_texts(str(tmp_path / "mix.jsonl"), None)
    assert [x["topic"] for x in rows] == ["a"] * 5 + ["code"] * 5 + ["b"] * 5
    assert len({x["text"] for x in rows}) == 15 and "5 texts of each" in capsys.readouterr().out
