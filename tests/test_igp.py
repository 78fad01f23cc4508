"""igp.py and run.py: training steps against autograd on transformers, and whole runs."""
import contextlib
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, ROWS, WORDS, edit_json, hook_gates, make_reference, make_tokenizer
from safetensors.torch import load_file, save_file
from torch.distributed.run import main as torchrun
from torch.utils.flop_counter import FlopCounterMode

import baselines
import evaluate
import hub
import igp
import model as llm
import router as routing
import run as inputs
from hardconcrete import prob_zero, sample_u, sample_z

B = 6
TEXTS = [list(range(n)) for n in (5, 3, 20, 4)]
COST = torch.full((B,), 1 / B)
RECIPE = igp.Recipe(
    0.25, COST, "paper",
    0.2, 2.0, 4, 4)                                               # rates, batch, micro-batch


def seeded():
    return torch.Generator().manual_seed(3)


# ------------------------------------------------------------------ the training step


def losses(z, x, layers=3):
    """-log P of the tokens x after the first, under z (B,), in transformers with hooks."""
    ids = torch.tensor([x])
    reference = make_reference("llama", num_hidden_layers=layers)
    hook_gates(reference, z)
    logits = reference(ids).logits[0, :-1]
    return F.cross_entropy(logits, ids[0, 1:], reduction="none")


def loss_of_texts(z):
    """Their mean over TEXTS under z (texts, B): a text at a time, so that nothing is padded."""
    found = [losses(*both) for both in zip(z, TEXTS, strict=True)]
    return torch.cat(found).mean()


@pytest.mark.parametrize("case", [
    "Adam blocks block paper 4",
    "SGD blocks block paper 4",
    "SGD flops block louizos 3",
    "SGD blocks layer paper 1"])
def test_steps_are_eq_8_by_autograd_on_transformers(model, monkeypatch, case):
    """Five steps, over which t moves and the rate falls; SGD's show the gradients themselves."""
    optimiser, budget, granularity, gate, micro_batch = case.split()
    kind = getattr(torch.optim, optimiser)
    monkeypatch.setattr(torch.optim, "Adam", kind)
    monkeypatch.setattr(evaluate, "HEAD_ROWS", 7)
    cost = igp.gate_costs(model.config, budget, granularity, 16)
    given = replace(RECIPE, cost=cost, gate=gate, micro_batch=int(micro_batch))
    trained = igp.train_mask(model, TEXTS * 5, given, seeded())

    generator = seeded()
    log_alpha = torch.full_like(cost, 3).log().requires_grad_()  # 0.75 / 0.25
    lambdas = torch.zeros(2, requires_grad=True)
    descent = kind([log_alpha], lr=0.2)
    ascent = kind([lambdas], lr=2.0, maximize=True)
    for done in (0, 0.2, 0.4, 0.6, 0.8):
        u = sample_u((4, len(cost)), generator)
        z = sample_z(log_alpha, u, gate)
        soft = 1 - (z @ cost).mean()
        t = (1 - done) * soft + done * prob_zero(log_alpha, gate) @ cost
        descent.param_groups[0]["lr"] = 0.1 if done == 0.8 else 0.2
        loss = loss_of_texts(z.repeat_interleave(B // len(cost), 1))
        loss = loss + lambdas[0] * (t - 0.25) + lambdas[1] * (t - 0.25) ** 2
        log_alpha.grad, lambdas.grad = torch.autograd.grad(loss, (log_alpha, lambdas))
        descent.step()
        ascent.step()
    torch.testing.assert_close(trained, (log_alpha, lambdas), rtol=1e-4, atol=1e-5)


def test_blocks_closed_for_all_texts_at_hand_do_not_run(model):
    z = torch.rand((4, B), generator=seeded())
    z[:, [1, 4]] = z[0, 2] = 0
    ran = []
    for i, name in enumerate(("self_attn", "mlp") * 3):
        block = getattr(model.model.layers[i // 2], name)
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    loss, gradient = igp.lm_gradient(model, TEXTS, z, 9)
    assert ran == [0, 2, 3, 5]
    parts = igp.lm_gradient(model, TEXTS, z, 3)                   # three texts and one
    torch.testing.assert_close(parts, (loss, gradient))
    wanted = loss_of_texts(z.requires_grad_())
    wanted.backward()
    z.grad[:, [1, 4]] = 0                                         # as the clamp has it
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(gradient, z.grad, rtol=1e-4, atol=1e-6)
    _, gradient = igp.lm_gradient(model, TEXTS, torch.zeros(4, B), 4)
    assert not gradient.any()


def test_a_step_costs_two_forwards_and_never_holds_all_logits(model, monkeypatch):
    texts = [list(range(2, 42))] * 4
    z = torch.ones(4, B)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.head(model(torch.tensor(texts), z))
    head = Mock(wraps=model.head)
    monkeypatch.setattr(model, "head", head)
    monkeypatch.setattr(evaluate, "HEAD_ROWS", 8)
    with FlopCounterMode(display=False) as step:
        igp.lm_gradient(model, texts, z, 4)
    assert 1.7 < step.get_total_flops() / forward.get_total_flops() <= 2.1
    rows = [len(call.args[0]) for call in head.call_args_list]
    assert max(rows) == 8


def test_what_cannot_be_trained_is_named(model):
    run = Mock(args=inputs.parse([]), config=model.config)
    run.tokenizer.encode.return_value.ids = [5]                   # one token
    with pytest.raises(llm.UserError, match="a cluster has no text of two tokens"):
        igp.trained(run, "igp", 0, [{"text": "a"}])
    model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(llm.UserError, match="loss nan at step 0; try a lower --lr"):
        igp.train_mask(model, TEXTS, RECIPE, seeded())


def test_a_gates_cost_is_its_share_of_blocks_or_of_their_flops(model):
    attention = 2 * 48 * (60 + 2 * 20 + 60) + 4 * 16 * 60         # of a token
    cost = torch.tensor([attention, 6 * 48 * 80] * 3)
    found = igp.gate_costs(model.config, "flops", "block", 16)
    torch.testing.assert_close(found, cost / cost.sum())
    found = igp.gate_costs(model.config, "flops", "layer", 16)
    torch.testing.assert_close(found, torch.full((3,), 1 / 3))


def test_draw_shuffles_and_repeats_in_turn():
    texts = list(range(7))
    drawn = igp.draw(texts, 17, seeded())
    assert sorted(drawn[:7]) == texts != drawn[:7]
    assert drawn == (drawn[:7] * 3)[:17]


# ------------------------------------------------------------------ whole runs

SAMPLES, LENGTH, JUDGED = 24, 6, 16  # no lead of `make_home` has fewer than 6 tokens
ASKED = ["--tasks", "wiki_what", "--limit", "9"]


def flags(home):
    return ("--preset demo --calibration wikipedia --texts 60 --sparsity 0.3 --dtype float32 "
            f"--samples {SAMPLES} --length {LENGTH} --judged {JUDGED} --device cpu --tasks= "
            f"--model {home / 'model'} --tasks-dir {home / 'tasks'}").split()


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """The folder of a run of all methods, to be left as it is, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    printed = io.StringIO()
    more = ["--method", "all", "--out", str(out)]
    with contextlib.redirect_stdout(printed):
        assert igp.main([*flags(home), *ASKED, *more]) == 0
    return out, printed.getvalue()


@pytest.fixture
def command(home, tmp_path):
    return [*flags(home), "--out", str(tmp_path / "run")]


@pytest.fixture
def again(command, finished, tmp_path):
    """The command of `finished` for a copy of its folder."""
    shutil.copytree(finished[0], tmp_path / "run")
    return [*command, *ASKED, "--method", "all"]


def results(folder):
    """The rows of results.json, in which nothing may be NaN, by name; and all of it."""
    text = (folder / "results.json").read_text()
    whole = json.loads(text, parse_constant=pytest.fail)
    return {row["name"]: row for row in whole["rows"]}, whole


def refused(argv, capsys):
    """The one line of a refusal."""
    capsys.readouterr()
    try:
        status = igp.main(argv)
    except SystemExit as e:
        status = e.code
    err = re.sub("making .*\n", "", capsys.readouterr().err)
    assert status == 2
    assert re.fullmatch("igp.py: error: .*\n", err)
    return err


def test_all_methods_stand_in_one_table(home, finished):
    out, printed = finished
    rows, whole = results(out)
    assert [*rows] == [*inputs.METHODS, "igp-mask-0", "igp-mask-1"]
    for name in rows:
        assert printed.count(f"\n| {name} |") == 1
    config = llm.read_config(home / "model")
    skipped = []
    for name, row in rows.items():
        z, n = torch.tensor(row["z"]), row["tokens"]
        skipped.append((1 - z).sum(1).tolist())
        flops = partial(llm.flops, config)
        cost = sum(map(flops, n, z[row["cluster"]]))
        assert row["flops_ratio"] == cost / sum(map(flops, n))
        assert (row["flops_ratio_with_router"] > row["flops_ratio"]) == (name == "igp")
        assert row["ppl"] == np.exp(-sum(row["loglikelihood"]) / sum(n))
    assert skipped == [[0], [5], [5, 5], *[[4]] * 5, [5], [5]]    # 2 of 8 layers
    assert rows["static"]["forward_tokens"] == 2 * 2 * SAMPLES * (LENGTH - 1)
    cap = 2 * 2 * SAMPLES * LENGTH                                # baselines.CAP
    assert cap / 4 < rows["sleb"]["forward_tokens"] <= cap
    assert rows["igp-mask-1"]["z"] == rows["igp"]["z"][1:]
    assert whole["clusters_found"] == ["30 texts, 90% A", "30 texts, 100% B"]


@pytest.fixture
def by_hand(tmp_path, finished):
    """A router of two masks that surely differ, and its file, which names no model."""
    router = routing.load(finished[0] / "router.safetensors")
    router.z[:] = torch.rand(2, 16, generator=seeded()) > 0.4
    router.identity = {}
    path = f"{tmp_path}/hand.safetensors"
    routing.save(router, path)
    return router, path


def nearest(router, text):
    """k* of a text and |e - c_k|^2, by the distances themselves."""
    encoder = routing.open_encoder(hub.encoder_folder(), "cpu", torch.float32)
    e = torch.tensor(routing.encode(encoder, [text]))
    squares = ((e - router.mu) ** 2).sum(1)
    return squares.argmin().item(), squares.min()


def test_texts_and_questions_run_under_their_own_z(command, by_hand, tmp_path, monkeypatch):
    """Recomputed a text at a time, with transformers and hooks."""
    router, path = by_hand
    row = {"sol1": "w44 w45 w46 w47", "sol2": "w3", "label": 0}
    lines = [json.dumps(row | {"goal": " ".join(WORDS[i:i + 9])}) for i in (0, 20, 45, 65)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(igp, "train_mask", None)
    more = f"--router {path} --tasks piqa --tasks-dir {tmp_path}".split()
    assert igp.main([*command, *more]) == 0
    tokenizer = make_tokenizer()

    def check(value, text, k, read, start=1):
        """The text ran under z of its nearest centroid; what it is routed on, and from where."""
        assert k == nearest(router, read)[0]
        ids = tokenizer.encode(text).ids[:JUDGED]
        found = losses(router.z[k], ids, 8)[start - 1:].sum()
        assert value == pytest.approx(-found.item(), rel=1e-4)
        return k

    row = results(tmp_path / "run")[0]["igp"]
    texts = hub.split(hub.calibration_texts("wikipedia", None))[2][:5]
    for x, k, value in zip(texts, row["cluster"], row["loglikelihood"], strict=False):
        check(value, x["text"], k, x["text"])
    seen = set()
    for line in map(json.loads, (tmp_path / "run/igp-piqa.jsonl").open()):
        context = line["contexts"][0]
        for y, value in zip(line["continuations"], line["loglikelihood"], strict=True):
            seen.add(check(value, context + y, line["cluster"], context, 11))
    assert seen == {0, 1}


def content(folder):
    """Every file of a run, but for what a clock measured; masks are in the routers."""
    found = set()
    for path in folder.glob("*.*"):
        if path.stem not in ("clusters", "results"):
            data = re.sub(b'"seconds": [^,}]*', b"", path.read_bytes())
            found.add((path.name, data))
    return found


def test_a_mask_has_a_seed_and_the_texts_of_its_cluster(command, tmp_path, monkeypatch):
    texts, _ = inputs.read_texts(inputs.parse(command))
    draw = Mock(wraps=igp.draw)
    monkeypatch.setattr(igp, "draw", draw)
    for seed in "78":
        more = f"--method static,igp --seed {seed} --judged 2 --out {tmp_path / seed}".split()
        assert igp.main([*command, *more]) == 0
        found = load_file(tmp_path / seed / "clusters.safetensors")
        router = routing.load(tmp_path / seed / "router.safetensors")
        assert torch.equal(router.mu, found["mu"])
        wanted = [(texts, 2 * SAMPLES)]
        for k, log_alpha in enumerate(router.log_alpha):
            own = [texts[i] for i in (found["labels"] == k).nonzero()]
            wanted.append((own, SAMPLES))
            mask = load_file(tmp_path / seed / f"masks/igp-{k}.safetensors")
            assert torch.equal(mask["log_alpha"], log_alpha)
            assert not router.z[k, log_alpha.argsort()[:5]].any()  # floor(0.3 * 16 + 0.5)
        assert [call.args[:2] for call in draw.call_args_list[-3:]] == wanted
    seeds = {call.args[2].initial_seed() for call in draw.call_args_list}
    assert len(seeds) == 6


def test_tasks_join_and_other_questions_are_asked_anew(command, tmp_path, capsys):
    command += ["--tasks-dir", str(tmp_path), "--tasks"]
    for more, label, made in (
            ("piqa", 0, 2),
            ("wiki_what,piqa --limit=2", 0, 4),
            ("piqa --limit=2", 0, 0),
            ("piqa --limit=2 --bos=off", 0, 2),
            ("piqa --limit=2 --bos=off", 1, 2)):
        row = json.dumps(ROWS["piqa"] | {"label": label})
        (tmp_path / "piqa.jsonl").write_text(f"{row}\n" * 5)
        assert igp.main([*command, *more.split()]) == 0
        assert capsys.readouterr().err.count(".jsonl\n") == made
        for name in ("dense", "igp"):
            scores = results(tmp_path / "run")[0][name]["tasks"]["piqa"]
            lines = (tmp_path / f"run/{name}-piqa.jsonl").open()
            hits = [json.loads(x)["acc_norm"] for x in lines]
            assert scores["n"] == len(hits) == (2 if "limit" in more else 5)
            assert scores["acc_norm"] == np.mean(hits)


# Of `--method dense,igp --tasks wiki_what`.
FILES = """.lock arguments.json clusters.safetensors masks/dense-0.safetensors
masks/igp-0.safetensors masks/igp-1.safetensors dense.safetensors router.safetensors dense.json
igp.json igp-mask-0.json igp-mask-1.json dense-wiki_what.jsonl igp-wiki_what.jsonl results.json"""


def test_a_run_killed_between_any_two_writes_goes_on_to_the_same_bits(
        command, tmp_path, finished, monkeypatch):
    """Each time it makes one file more, and half of another, before it is killed."""
    command += ["--method", "dense,igp", *ASKED]
    write, killed, left = llm.write, 0, 0

    def stops(path, data):
        nonlocal left
        if not path.exists() and not left:
            path.with_name(f"{path.name}.part").write_bytes(data[:9])
            raise KeyboardInterrupt
        left -= not path.exists()
        write(path, data)

    monkeypatch.setattr(llm, "write", stops)
    monkeypatch.setattr(routing, "write", stops)
    while igp.main(command) == 130:
        killed += 1
        left = 1
    run = tmp_path / "run"
    files = {str(path.relative_to(run)) for path in run.rglob("*.*")}
    assert killed == 14 and files == {*FILES.split()}
    assert content(run) <= content(finished[0])


@pytest.mark.parametrize("case", [
    "--model lama3-8b -> --model lama3-8b is no folder",
    "--out /proc/none -> /proc/none",
    "--calibration gone.jsonl -> --calibration gone.jsonl is no file",
    "--foo -> --foo; --help",
    "--gate x -> --gate: invalid",
    "--sparsity 0.01 -> skips 0 of 16 blocks; 1 to 15",
    "--sparsity 0.99 -> skips 16 of 16",
    "--sparsity 0.05 --granularity layer -> skips 0 of 8 layers",
    "--sparsity 0.05 --budget flops -> skips 0 of 8 layers",
    "--sparsity 0.9 --method sleb -> skips 7 of 8 layers; 1 to 6 can be skipped by sleb",
    "--sparsity 0.4 --method all -> skips 3 of 8 layers; 1 to 2",
    "--sparsity 0 -> use --method dense",
    "--sparsity nan -> --sparsity nan",
    "--clusters 61 -> 61 is more than the 60 texts",
    "--clusters 0 -> --clusters 0 is not a number from 1 up",
    "--lr inf -> --lr inf is not",
    "--length 1 -> --length 1 is not a number from 2 up",
    "--seed -1 -> --seed -1 is not",
    "--method dense,statik -> --method dense,statik is not of dense, static",
    "--method= -> --method names none",
    "--tasks wiki_waht -> --tasks wiki_waht is not of",
    "--router x --method static -> --method names none, or one that --router cannot serve",
    "--router gone.safetensors -> gone.safetensors is no readable router",
    "--device tpu -> --device tpu is not here",
    "--device hpu -> --device hpu is not here",
    "--router= -> --router '' is no path",
    "--out a\x07 -> --out 'a\\x07' is no path",
    "--tasks piqa --tasks-dir gone -> gone/piqa.jsonl",
    "--prompt= -> --prompt has 0 tokens",
    "--prompt " + "w1_" * 129 + " -> --prompt has 129 tokens; give it a text of 1 to 128"])
def test_what_a_user_can_mend_is_one_line_before_the_weights_are_read(
        command, tmp_path, capsys, monkeypatch, case):
    change, named = case.split(" -> ")
    monkeypatch.setattr(llm, "load", None)
    argv = [x.replace("1_", "1 ") for x in change.split()]
    assert named in refused([*command, *argv], capsys)
    assert not (tmp_path / "run").exists()


def test_a_folder_keeps_one_value_of_each_setting(again, capsys):
    again += ["--method", "igp"]
    args = inputs.parse(again)
    others = {"sparsity": 0.4, "router": args.out / "router.safetensors"}
    for key in (*inputs.SETTINGS, "router"):
        held = getattr(args, key)
        _, _, _, *choices = inputs.SETTINGS.get(key, [None] * 3)
        other = others.get(key) or (choices[-1] if choices else held + 1)
        line = refused([*again, f"--{key.replace('_', '-')}={other}"], capsys)
        assert f"holds a run with another {key}: {held}, now " in line


@pytest.fixture
def own(command, home, tmp_path, monkeypatch):
    """The command for a copy of the model and of the texts, files to be edited."""
    shutil.copytree(home / "model", tmp_path / "model")
    shutil.copytree(home / "cache/all-MiniLM-L6-v2", tmp_path / "encoder")
    monkeypatch.setattr(hub, "encoder_folder", lambda: tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    shutil.copy(home / "texts.jsonl", "wikipedia_de")             # more clusters than texts: unused
    files = "--model model --calibration wikipedia_de --method dense --clusters 61"
    return [*command, *files.split()]


def test_other_contents_under_the_same_names_are_refused_by_name(own, tmp_path, capsys):
    assert igp.main(own) == 0
    assert not [*tmp_path.glob("run/*wiki_what*")]                # these are no leads
    names = {tmp_path / "wikipedia_de": "what is read"}
    for path in tmp_path.glob("model/[cmt]*"):                    # weights and their index, too
        names[path] = path.name
    for path in tmp_path.rglob("encoder/**/*.safetensors"):
        names[path] = f"encoder's {path.name}"
    assert len(names) > 6
    for path, name in names.items():
        before = path.read_bytes()
        flipped = before[:-1] + bytes([before[-1] ^ 1])
        binary = path.suffix == ".safetensors"
        path.write_bytes(flipped if binary else before.replace(b" ", b"  "))
        assert f"holds a run with another {name}: " in refused(own, capsys)
        path.write_bytes(before)


def test_a_router_of_another_model_is_refused(command, by_hand, capsys, monkeypatch):
    router, path = by_hand
    routing.save(replace(router, mu=torch.ones(2, 99)), path)
    assert "24 wide, the router's centroids 99" in refused([*command, "--router", path], capsys)
    monkeypatch.setattr(llm, "load", None)                        # before the weights are read
    for field, value, named in (
            ("z", torch.ones(2, 8) > 0, "give the --model that it was made for"),
            ("identity", {"model": "m", "files": {}}, "was made for m, and --model")):
        routing.save(replace(router, **{field: value}), path)
        assert named in refused([*command, "--router", path], capsys)


def test_another_models_tokenizer_and_a_bad_row_are_refused(own, tmp_path, capsys):
    edit_json(tmp_path / "model/config.json", bos_token_id=97)
    assert "--bos on: bos_token_id" in refused([*own, "--bos=on"], capsys)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list("abcdefghijklmnopqrst"))
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    assert "has ids up to 101, but vocab_size is 97" in refused(own, capsys)
    make_tokenizer().save("model/tokenizer.json")
    own += "--tasks piqa --tasks-dir .".split()
    for row, named in (
            ({"goal": "w1"}, "piqa.jsonl line 1: field sol1"),
            ({"goal": "w1", "sol1": "w2", "sol2": "", "label": 0}, "choice '' has no token")):
        (tmp_path / "piqa.jsonl").write_text(json.dumps(row))
        assert named in refused(own, capsys)


def test_a_finished_run_makes_nothing_again_but_names_damaged_files(
        again, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(igp, "train_mask", None)
    for name in ("arguments.json", "masks/igp-0.safetensors", "igp.json", "igp-wiki_what.jsonl"):
        path = tmp_path / "run" / name
        before = path.read_bytes()
        path.write_bytes(before[:len(before) // 2])
        assert f"{name} is damaged" in refused(again, capsys)
        path.write_bytes(before)
    with inputs.locked(tmp_path / "run"):
        assert "another process is at work" in refused(again, capsys)
    assert igp.main(again) == 0
    out, err = capsys.readouterr()
    assert out == finished[1] and "making " not in err
    (tmp_path / "run/arguments.json").unlink()
    assert "holds masks, but no arguments.json" in refused(again, capsys)


def test_a_topic_may_be_anything(tmp_path):
    path = tmp_path / "clusters.safetensors"
    save_file({"labels": torch.tensor([0, 0])}, path)
    texts = SimpleNamespace(train=[{"topic": ["x"]}, {"topic": ["x"]}])
    assert igp.describe(texts, path) == ["2 texts, 100% ['x']"]


def test_the_smallest_allowed_values_run(command, tmp_path):
    least = ("--clusters 1 --texts 1 --samples 1 --length 2 --epochs 1 --batch-size 1 "
                    "--micro-batch 1 --lr 0 --lr-lambda 0 --judged 2 --limit 1 --seed 0").split()
    more = "--tasks wiki_what,piqa,winogrande --method dense,static,igp,sleb".split()
    assert igp.main([*command, *least, *more]) == 0
    rows, _ = results(tmp_path / "run")
    assert rows["igp"]["tasks"]["piqa"]["n"] == 1


def test_layers_and_flops_go_through_a_whole_run(command, home, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "OFFSPRING", 4)                # for speed
    command += ["--judged=2"]
    more = "--granularity layer --method igp,evopress --epochs 2 --no-matrix".split()
    assert igp.main([*command, *more]) == 0
    rows, _ = results(tmp_path / "run")
    assert [*rows] == ["igp", "evopress"]
    assert rows["igp"]["forward_tokens"] == 2 * 2 * 2 * SAMPLES * (LENGTH - 1)
    for name in ("router", "evopress"):
        router = routing.load(tmp_path / f"run/{name}.safetensors")
        assert torch.equal(router.log_alpha[:, 0::2], router.log_alpha[:, 1::2])
        assert torch.equal(router.z[:, 0::2], router.z[:, 1::2])
        assert ((~router.z).sum(1) == 4).all()
    more = f"--budget flops --method igp --out {tmp_path}/flops".split()
    assert igp.main([*command, *more]) == 0
    config = llm.read_config(home / "model")
    cost = igp.gate_costs(config, "flops", "block", LENGTH)
    for z in routing.load(tmp_path / "flops/router.safetensors").z:
        gone = cost[~z]                                           # as much as 2 of 8 layers
        assert gone.sum() >= 0.25 - 1e-6 > gone.sum() - gone.min()


CHILD = """
import sys
sys.modules |= dict.fromkeys(["fcntl", "resource"])
sys.path.insert(0, "{root}")
import {files}
hub.CACHE = hub.Path("{cache}")
router.open_encoder = print  # which would take seconds, and is not needed
sys.exit(igp.main())
"""


@pytest.mark.embedded                                             # not for its files: it is long
def test_two_processes_without_unix_make_the_files_of_one(
        command, home, finished, tmp_path, capfd):
    """Every file of the project is imported where fcntl and resource are not."""
    files = ", ".join(path.stem for path in ROOT.glob("*.py"))
    child = CHILD.format(root=ROOT, files=files, cache=home / "cache")
    (tmp_path / "child.py").write_text(child)
    two = f"--standalone --nproc-per-node=2 --log-dir={tmp_path} {tmp_path}/child.py".split()
    torchrun([*two, *command, *ASKED, "--method=dense,static"])   # raises if a process fails
    assert capfd.readouterr().out.count("| static |") == 1
    assert content(tmp_path / "run") <= content(finished[0])


def test_a_process_waits_for_anothers_mask_for_days(monkeypatch):
    """Not half an hour, which is torch's own limit of a barrier."""
    begun = Mock(side_effect=llm.UserError)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", begun)
    assert igp.main([]) == 2
    assert begun.call_args.kwargs["timeout"].days >= 7


def test_broken_weights_are_named(command, capsys, monkeypatch):
    nan = Mock(side_effect=lambda _, texts, z: np.full(len(texts), np.nan))
    monkeypatch.setattr(evaluate, "judge", nan)
    command += ["--method=dense"]
    assert "dense.json would hold what is no number" in refused(command, capsys)
    monkeypatch.undo()
    monkeypatch.setattr(evaluate, "score", lambda *_: [np.full(4, np.nan)] * 99)
    assert "dense-wiki_what.jsonl would hold" in refused([*command, "--tasks=wiki_what"], capsys)


# ------------------------------------------------------------------ --prompt

PROMPT = "w60 w70 w65 w75 w44"  # of cluster 1


def test_a_prompt_gets_the_text_of_its_own_mask(command, by_hand, tmp_path, capsys, monkeypatch):
    """As transformers with hooks; from a router alone no text is read and nothing written."""
    router, path = by_hand
    monkeypatch.setattr(hub, "calibration_texts", None)
    assert igp.main([*command, "--router", path, "--prompt", PROMPT]) == 0
    k, square = nearest(router, PROMPT)
    z = router.z[k]
    reference = make_reference("llama", num_hidden_layers=8)
    hook_gates(reference, z)
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    new = reference.generate(ids, max_length=128, do_sample=False)[0, 5:]
    assert capsys.readouterr().out == (
        f"Cluster {k} of 2, |e - c_k|^2 = {square:.4f}. M^x skips {(~z).sum()} of 16 blocks:\n"
        f"{evaluate.picture(z)}\n\n{tokenizer.decode(new.tolist())}\n")
    assert not (tmp_path / "run").exists()


def test_a_prompt_from_standard_input_trains_what_a_run_goes_on_with(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(PROMPT.encode())))
    monkeypatch.setattr(igp, "NEW_TOKENS", 9)
    assert igp.main([*command, "--prompt", "-"]) == 0
    first = capsys.readouterr().out
    monkeypatch.setattr(igp, "train_mask", None)                  # the masks are kept
    assert igp.main([*command, "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out == first
