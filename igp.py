"""IG-Pruning: an input picks which attention and FFN blocks of a frozen language model run.

Source: Qiao, Zhang, Feng 2025, "IG-Pruning: Input-Guided Block Pruning for Large Language Models",
        arXiv:2511.02213. This file is its Figure 2, from top to bottom: Stage 1 clusters texts and
        trains a mask per cluster; Stage 2 gives each input the mask of its nearest centroid. Then
        a run does both, stage by stage.
Left out: flags, inputs and the run folder (run.py); rival methods (baselines.py); sampled and
        batched generation.
Dims:   B = 2L blocks (attention 0, FFN 0, attention 1, ...), N clusters, M calibration texts; b
        texts of a step, n tokens that they predict; p texts that run together, w tokens of the
        longest, m that they predict; d width, v vocabulary; t the current sparsity of Eq. 7. z = 1
        keeps a block, 0 skips it. A gate is one z_i, of a block or of both blocks of a layer, and
        closed where it is 0; Recipe.gate names a reading of Eq. 4.
Tags:   Silent, the paper does not say, and what follows is our choice; Deviates, we do otherwise.
Run:    python igp.py    or    python igp.py --model FOLDER --sparsity 0.25
"""
import contextlib
import json
import math
import signal
import sys
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports run; see hub.guarded

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import baselines
import evaluate
import hub
import model as llm
import router as routing
from hardconcrete import (
    harden, lagrangian, prob_zero,
    sample_u, sample_z, whole_share)
from kmeans import kmeans
from model import UserError
from run import (
    TRAINED, Run, begin, digest, locked,
    once, once_each, open_run, parse, rank, tokenized)

RESTARTS = 10     # Silent: of k-means
FLAT = 0.6        # Silent: for this share of the steps log_alpha's rate is lr, then falls towards 0
NEW_TOKENS = 128  # Silent: the longest text that --prompt gives

# ------------------------------------------------------------------ Stage 1: clusters and masks


def clusters(e: np.ndarray, N: int, seed: int) -> dict[str, Tensor]:
    """Eq. 2: mu (N, d_e) float32 and labels (M,) of the texts' embeddings e (M, d_e), Eq. 1."""
    generator = np.random.default_rng(seed)
    mu, labels, _ = kmeans(e, N, generator, RESTARTS)
    return {
        "mu": torch.from_numpy(mu),
        "labels": torch.from_numpy(labels),
    }


@dataclass(frozen=True)
class Recipe:
    """What a mask's training is given besides model, texts and draws; for the flags see run.py."""

    s_target: float   # of Eq. 7
    cost: Tensor      # (B,), or (L,) if layers: a gate's weight in t; of sum 1, 1 / B in the paper
    gate: str         # which reading of Eq. 4, "paper" or "louizos"
    lr: float         # Adam's rate for log_alpha
    lr_lambda: float  # Adam's rate for lambda_1, lambda_2
    batch_size: int   # b
    micro_batch: int  # texts of a step that run at a time; for memory, else only roundings differ


def lm_gradient(model: llm.Transformer, texts: list,
                z: Tensor, micro_batch: int) -> tuple:
    """L_LM(x; W * z) of Eq. 8, the mean cross-entropy of all predicted tokens; its gradient by z.

    texts: b lists of at least 2 token ids; z float32 (b, B), or (b, L) if layers, on the CPU. A
    text's own row of z multiplies its blocks. micro_batch texts run at a time, and their gradients
    add up. Returns a float and a tensor like z. The weights are frozen, and get no gradient: a step
    costs about two forwards, where the training of weights costs three. A block whose z is 0 for
    all texts that run together costs nothing, and its gradient is left at 0: the clamp of Eq. 6
    passes none on, unless s_bar is 0 exactly. The model rounds z to its own dtype (Eq. 7 does not).
    The graph is cut at the hidden states (leaf): the head runs forward and backward on some
    positions at a time, so that the logits of all never exist at once.
    """
    z = z.detach().requires_grad_()
    z.grad = torch.zeros_like(z)                                 # also if no block runs
    n = sum(len(x) - 1 for x in texts)
    loss = torch.zeros((), device=model.head_weight.device)
    for first in range(0, len(texts), micro_batch):
        part = slice(first, first + micro_batch)
        rows = [torch.tensor(x) for x in texts[part]]
        padded = pad_sequence(rows, batch_first=True, padding_value=-1)  # (p, w)
        real = padded[:, 1:] >= 0                                # (p, w - 1) what is predicted
        ids = padded.clamp(0).to(loss.device)
        targets = ids[:, 1:][real]                               # (m,)
        per_gate = model.B // z.shape[1]                         # blocks of a gate: 1, or 2
        blocks = z[part].repeat_interleave(per_gate, 1)          # (p, B)
        hidden = model(ids, blocks)                              # (p, w, d)
        hidden = hidden[:, :-1][real]                            # (m, d)
        leaf = hidden.detach().requires_grad_()
        for h, y in evaluate.slices(leaf, targets):
            # the logits get no name, so that they are freed at once
            slice_loss = F.cross_entropy(model.head(h).float(), y, reduction="sum") / n
            slice_loss.backward()                                # into leaf.grad
            loss += slice_loss.detach()
        if hidden.requires_grad:                                 # not if every block is closed
            hidden.backward(leaf.grad)                           # into z.grad
    return loss.item(), z.grad


# Four choices decide what a mask's training gives:
# 1. The start. Silent: log_alpha = log((1 - s_target) / s_target), as Louizos et al. for a drop
#    rate: 1 - mean(z) begins near the target, and the lambdas, from 0, need not undo another start.
# 2. t of Eq. 7. Deviates: the paper's t, "the proportion of zeroes in the mask", has no gradient.
#    Ours is a blend of two, both weighted by cost: 1 - mean(z), which every gate between 0 and 1
#    feels, and P(z = 0) in closed form, the expectation of the paper's t. The blend goes from the
#    first to the second, so that in the end most skipped gates are exactly 0. The weight of the
#    second is step / steps, so that the last step's is just below 1.
# 3. Sums and rates. Deviates: Eq. 8 adds up the losses of a cluster's texts; here L_LM is the mean
#    over a step's predicted tokens, which sets its weight against L_s. Silent: steps, batches, and
#    a row of u for each text; that the lambdas ascend (the paper says "minimize"); one Adam for
#    all, betas 0.9 and 0.999, bias-corrected, 1e-8 added to the root; log_alpha's rate is constant,
#    then falls linearly (FLAT); the lambdas' rate is constant, and they are not clamped: lambda_2
#    only grows.
# 4. How z is made binary when the training is over: hardconcrete.harden. The share that it reaches
#    is rounded (whole_share), s_target is not.


def train_mask(model: llm.Transformer, texts: list, recipe: Recipe,
               generator: torch.Generator) -> tuple:
    """Eq. 8: log_alpha descends, the lambdas ascend on L_LM(x; W * z) + L_s, a step a batch.

    texts: lists of at least 2 token ids, in the order of the steps; the last step may be small.
    generator: on the CPU, for u, row by row. Returns log_alpha (B,), or (L,) if layers, and lambdas
    (2,), float32 on the CPU. Raises UserError when the loss is not finite, with the step.
    """
    s_target, cost = recipe.s_target, recipe.cost
    start = math.log((1 - s_target) / s_target)
    log_alpha = torch.full_like(cost, start).requires_grad_()
    lambdas = torch.zeros(2, requires_grad=True)
    descends = {"params": log_alpha, "lr": recipe.lr}
    ascends = {"params": lambdas, "lr": recipe.lr_lambda, "maximize": True}
    adam = torch.optim.Adam([descends, ascends])
    firsts = range(0, len(texts), recipe.batch_size)
    bar = tqdm(firsts, "mask", disable=None)
    for step, first in enumerate(bar):
        batch = texts[first:first + recipe.batch_size]
        done = step / len(firsts)                                # share of the training, below 1
        u = sample_u((len(batch), len(cost)), generator)         # (b, B or L)  Eq. 3
        z = sample_z(log_alpha, u, recipe.gate)                  # (b, B or L)  Eq. 4-6
        away = 1 - (z @ cost).mean()                             # share that z takes away
        zero = prob_zero(log_alpha, recipe.gate) @ cost          # share expected to be zero
        t = (1 - done) * away + done * zero                      # of Eq. 7, see choice 2
        L_s = lagrangian(t, s_target, *lambdas)                  # Eq. 7
        L_lm, gradient = lm_gradient(model, batch, z, recipe.micro_batch)  # of Eq. 8
        if not math.isfinite(L_lm):
            raise UserError(f"loss {L_lm} at step {step}; try a lower --lr or --dtype float32")
        adam.zero_grad()
        # Eq. 8's gradient: L_LM's by z, made above, and L_s go on to log_alpha and the lambdas
        torch.autograd.backward([z, L_s], [gradient, None])
        falling = (1 - done) / (1 - FLAT)
        adam.param_groups[0]["lr"] = recipe.lr * min(1, falling)
        adam.step()
        closed = int((z == 0).all(0).sum())                      # gates that no text opens
        bar.set_postfix(loss=L_lm, t=t.item(), closed=closed,
                        lambda_1=lambdas[0].item())
    return log_alpha.detach(), lambdas.detach()


# ------------------------------------------------------------------ Stage 2: an input and its mask


def cluster_of(router: routing.Router, encoder, texts: list[str]) -> np.ndarray:
    """Eq. 1 and 9: the cluster k* of each text (texts,); one cluster needs no embedding."""
    if len(router.mu) == 1:
        return np.zeros(len(texts), int)
    e = routing.encode(encoder, texts)                           # Eq. 1
    return routing.route(router, e).numpy()                      # Eq. 9


def answer(run: Run, router: routing.Router) -> None:
    """Prints a prompt's cluster and mask, and the text that follows it under this mask.

    Silent: what is routed is the prompt; its mask stays for all of the text. Greedy, without a
    chat template, up to an end-of-text id or NEW_TOKENS.
    """
    model, prompt = run.model, run.args.prompt
    e = routing.encode(run.encoder, [prompt])                    # Eq. 1
    [k] = routing.route(router, e)                               # Eq. 9
    z = router.z[k]                                              # Eq. 10
    square = ((e - router.mu[k].numpy()) ** 2).sum()
    print(f"Cluster {k} of {len(router.z)}, |e - c_k|^2 = {square:.4f}. M^x skips "
          f"{(~z).sum()} of {len(z)} blocks:\n{evaluate.picture(z)}\n")
    ids = evaluate.encode(run.tokenizer, prompt, run.args.bos)
    longest = min(len(ids) + NEW_TOKENS, run.config.max_position_embeddings)
    new, shown = [], 0
    for token in llm.generate(model, ids, model.new_cache(1, longest, z)):
        new.append(token)
        text = run.tokenizer.decode(new)
        if not text.endswith("\ufffd"):                          # half of a character
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print(text[shown:])


# ------------------------------------------------------------------ a run, stage by stage
# The same stages on files. once_each(jobs) takes path -> make, makes what is missing, and gives the
# contents in the same order; to tensors it adds the seconds that they took. A first reading may
# end here.


def gate_costs(config: llm.Config, budget: str,
               granularity: str, length: int) -> Tensor:
    """What each gate counts in t and in `harden`: float32 (B,), or (L,) for layers, of sum 1.

    Deviates: --budget flops counts a block by its share of the blocks' FLOPs in texts of `length`;
    the paper, and --budget blocks, counts every block alike. A layer's gate is that of both blocks
    (Sec. 4.3).
    """
    L = config.num_hidden_layers
    if granularity == "layer":                                   # all alike, by blocks or FLOPs
        return torch.full((L,), 1 / L)
    cost = torch.ones(2 * L)
    if budget == "flops":
        alone = torch.eye(2 * L, dtype=torch.bool)               # row i keeps block i alone
        head = llm.flops(config, length, torch.zeros(2 * L))     # without any block
        saved = [llm.flops(config, length, z) - head for z in alone]
        cost = torch.tensor(saved).float()
    return cost / cost.sum()


def draw(texts: list, count: int, generator: torch.Generator) -> list:
    """`count` of the texts in random order. Silent: too few of them come again in turn."""
    order = torch.randperm(len(texts), generator=generator)
    return [texts[order[i % len(order)]] for i in range(count)]


def trained(run: Run, name: str, k: int, texts: list[dict]) -> dict[str, Tensor]:
    """Eq. 3-8: mask k of igp, from the texts of its cluster, or of static; and its binary z.

    static, which the paper lacks, is one mask for all inputs, trained like one of igp's, but on as
    many samples as all of these. NumPy's SeedSequence mixes --seed, the method and k; PCG64 then
    draws the seed of torch's own generator. Epochs repeat one order; t's blend and the rate run
    once over all of them. Texts of one token are left out after the draw, so that there may be
    fewer than --samples.
    """
    args = run.args
    L = run.config.num_hidden_layers
    samples = args.samples
    if name == "static":
        samples *= args.clusters
    mixed = np.random.default_rng([args.seed, TRAINED.index(name), k])
    seed = int(mixed.integers(2**32))
    generator = torch.Generator().manual_seed(seed)              # gives the order first, then u
    drawn = draw(texts, samples, generator)
    drawn = tokenized(run.tokenizer, drawn, args.length)
    if not drawn:
        raise UserError("a cluster has no text of two tokens; use fewer --clusters")
    ids = [x["tokens"] for x in drawn] * args.epochs
    cost = gate_costs(run.config, args.budget, args.granularity, args.length)
    recipe = Recipe(args.sparsity, cost, args.gate, args.lr,
                    args.lr_lambda, args.batch_size, args.micro_batch)
    log_alpha, lambdas = train_mask(run.model, ids, recipe, generator)
    # a share of FLOPs is rounded to whole layers, so that it is that of rivals, who skip them
    units = len(cost) if args.budget == "blocks" else L
    z = harden(log_alpha, cost, whole_share(args.sparsity, units))
    per_gate = 2 * L // len(z)                                   # blocks: 1, or 2 if layers
    tokens = sum(len(x) - 1 for x in ids)
    return {
        "log_alpha": log_alpha.repeat_interleave(per_gate),      # (B,)
        "z": z.repeat_interleave(per_gate),                      # (B,)
        "lambdas": lambdas,
        "forward_tokens": torch.tensor(2 * tokens),              # a step is two forwards
    }


def searched(run: Run, name: str, k: int, texts: list[dict]) -> dict[str, Tensor]:
    """The one mask (k = 0) of a rival of baselines.py, or of the dense model; log_alpha is 1 or -1.

    Deviates: a rival reads its texts at full length, and may spend about as many forward tokens as
    igp's masks together; see baselines.CAP.
    """
    args = run.args
    L = run.config.num_hidden_layers
    z, spent = torch.ones(2 * L, dtype=torch.bool), 0
    if name != "dense":
        most = 2 * args.clusters * args.samples * args.epochs * args.length
        one_by_one = (tokenized(run.tokenizer, [x], None) for x in texts)  # when it is read
        search = baselines.Search(
            model=run.model,
            texts=(x["tokens"] for found in one_by_one for x in found),
            k=round(L * whole_share(args.sparsity, L)),
            tied=args.granularity == "layer",
            cap=baselines.CAP and baselines.CAP * most,
            generator=np.random.default_rng(args.seed),
        )
        find, _ = baselines.RIVALS[name]
        z, spent = find(search)
    return {
        "log_alpha": 2.0 * z - 1,
        "z": z,
        "forward_tokens": torch.tensor(spent),
    }


def stage_1(run: Run) -> dict[str, tuple]:
    """Eq. 1-8: name of a method -> its router, and what its masks' files hold."""
    args, methods, jobs = run.args, {}, {}
    groups = {name: [run.train] for name in args.method}         # the texts of each mask
    if run.router:
        groups.pop("igp", None)
        methods["igp"] = run.router, []
    if "igp" in groups:
        [found] = once_each({args.out / "clusters.safetensors": partial(clustered, run)})
        mu = found["mu"]
        groups["igp"] = [[] for _ in mu]
        for x, k in zip(run.train, found["labels"], strict=True):
            groups["igp"][k].append(x)
    for name, parts in groups.items():
        make = trained if name in TRAINED else searched
        for k, texts in enumerate(parts):
            path = args.out / "masks" / f"{name}-{k}.safetensors"
            jobs[path] = partial(make, run, name, k, texts)
    made = iter(once_each(jobs))                                 # Eq. 3-8
    for name, parts in groups.items():
        files = [next(made) for _ in parts]
        z = torch.stack([x["z"] for x in files])
        log_alpha = torch.stack([x["log_alpha"] for x in files])
        igp = name == "igp"
        centroids = mu if igp else torch.zeros(1, 1)             # one mask needs none
        router = routing.Router(centroids, z, log_alpha, run.identity)
        methods[name] = router, files
        if rank() == 0:
            file = "router.safetensors" if igp else f"{name}.safetensors"
            routing.save(router, args.out / file)
    return {name: methods[name] for name in args.method}


def clustered(run: Run) -> dict[str, Tensor]:
    """`clusters` of the training texts."""
    e = routing.encode(run.encoder, [x["text"] for x in run.train])  # Eq. 1
    return clusters(e, run.args.clusters, run.args.seed)         # Eq. 2


def judged(run: Run, name: str, router: routing.Router, files: list[dict]) -> list[dict]:
    """A row of the table, from the held-out texts, each under its own mask.

    files: what the files of the router's masks hold, for their tokens and seconds.
    Silent: what is routed. A text on what the encoder reads of it, so that the choice of its mask
    sees tokens that are then predicted; that is all it can tell of them.
    """
    texts = [x["text"] for x in run.held_out]
    ids = [x["tokens"] for x in run.held_out]
    n = [len(x) - 1 for x in ids]                                # predicted tokens
    k = cluster_of(router, run.encoder, texts)                   # Eq. 9
    z = router.z[k]                                              # (texts, B)  Eq. 10
    loglik = evaluate.judge(run.model, ids, z)                   # (texts,)
    ppl = evaluate.perplexity(loglik, np.array(n))
    dense = sum(llm.flops(run.config, x) for x in n)
    pruned = sum(llm.flops(run.config, x, own) for x, own in zip(n, z, strict=True))
    router_flops = 0
    if len(router.z) > 1:                                        # one mask needs no router
        router_flops = routing.encoder_flops(run.encoder, texts)
    row = {
        "name": name,
        "z": router.z.int().tolist(),
        "flops_ratio": pruned / dense,
        "flops_ratio_with_router": (pruned + router_flops) / dense,
        "ppl": ppl,
        "cluster": k.tolist(),
        "loglikelihood": loglik.tolist(),
        "tokens": n,
    }
    for key in ("forward_tokens", "seconds"):
        row[key] = sum(x[key].item() for x in files)
    return [row]


def ask(run: Run, task: str, router: routing.Router, asked: str) -> list[dict]:
    """A line a question; its choices share the mask that its context picks.

    Silent: what is routed. A question's mask is picked by its context alone.
    """
    questions = run.questions[task]
    texts = [question.routed for question in questions]
    k = cluster_of(router, run.encoder, texts)                   # Eq. 9
    z = router.z[k]                                              # (questions, B)  Eq. 10
    logliks = evaluate.score(run.model, run.tokenizer, questions, z, run.args.bos)
    lines = []
    for i, question in enumerate(questions):
        acc, acc_norm = evaluate.right(question, logliks[i])
        lines.append({
            "row": i,
            "cluster": int(k[i]),
            "contexts": question.contexts,
            "continuations": [f" {choice}" for choice in question.choices],
            "loglikelihood": logliks[i].tolist(),
            "acc": acc,
            "acc_norm": acc_norm,
            "gold": question.gold,
            "asked": asked,
        })
    return lines


def stage_2(run: Run, methods: dict) -> list[dict]:
    """Eq. 9, 10 and the evaluation of every method: the rows of the table."""
    out, jobs, controls = run.args.out, {}, {}
    if run.args.matrix and "igp" in methods:                     # each mask of igp for all texts
        router, _ = methods["igp"]
        for k in range(len(router.z)):
            alone = replace(router, mu=router.mu[[k]], z=router.z[[k]])
            controls[f"igp-mask-{k}"] = alone, []
    for name, method in (methods | controls).items():
        jobs[out / f"{name}.json"] = partial(judged, run, name, *method)
    rows = [row | {"tasks": {}} for [row] in once_each(jobs)]
    for task, questions in run.questions.items():
        jobs = {}
        asked = digest((run.args.bos, questions))
        for name in run.args.method:                             # in the order of rows
            path = out / f"{name}-{task}.jsonl"
            jobs[path] = partial(ask, run, task, methods[name][0], asked)
            if path.exists() and rank() == 0:
                held = [line["asked"] for line in once(path)]
                if held != [asked] * len(questions):             # other ones, or not all
                    path.unlink()
        once_each({})                                            # every process waits for that
        for row, lines in zip(rows, once_each(jobs), strict=False):  # controls are not asked
            logliks = [np.array(line["loglikelihood"]) for line in lines]
            row["tasks"][task] = evaluate.accuracy(questions, logliks)
    return rows


def describe(run: Run, path: Path) -> list[str]:
    """Of each cluster: how many texts, and how many of them have the commonest topic."""
    labels = once(path)["labels"].tolist() if path.exists() else []
    found = []
    for k in sorted(set(labels)):
        own = [x for x, label in zip(run.train, labels, strict=True) if label == k]
        topics = [str(x.get("topic", "of no topic")) for x in own]
        [(topic, hits)] = Counter(topics).most_common(1)
        found.append(f"{len(topics)} texts, {hits / len(topics):.0%} {topic}")
    return found


# ------------------------------------------------------------------ the run


def fitting(run: Run) -> int:
    """How many texts of a step fit in what is free on a CUDA device, at least 1; elsewhere all.

    What a step keeps of a text, logits included, is about its FLOPs / d numbers; docs/gpu.md has
    the exact sum, which for a single text may be 1.2 times as much.
    """
    args = run.args
    if "cuda" not in args.device:
        return args.batch_size
    free, _ = torch.cuda.mem_get_info(args.device)
    size = run.model.head_weight.itemsize
    a_text = size * llm.flops(run.config, args.length) // run.config.hidden_size
    return free // a_text or 1


def work(args) -> None:
    """A run, from its inputs to its report or to the answer to a prompt."""
    if torch.distributed.is_torchelastic_launched():             # torchrun: see run.once_each
        patience = timedelta(days=30)                            # of who waits for another's mask
        torch.distributed.init_process_group("gloo", timeout=patience)
    torch.backends.cuda.enable_cudnn_sdp(False)                  # off: it plans for every length
    run = open_run(args)
    writes = args.prompt is None or run.router is None
    lock = locked(args.out) if writes and rank() == 0 else contextlib.nullcontext()
    with lock:
        if writes:
            begin(run)
        run.model = llm.load(run.folder, args.device, getattr(torch, args.dtype))
        args.micro_batch = args.micro_batch or fitting(run)
        methods = stage_1(run)
        rows = stage_2(run, methods) if args.prompt is None else []
        if rank():
            return
        if args.prompt is not None:
            answer(run, methods["igp"][0])
            return
        topics = describe(run, args.out / "clusters.safetensors")
        results = {
            "arguments": vars(args),
            "torch": torch.__version__,
            "rows": rows,
            "clusters_found": topics,
        }
        data = json.dumps(results, indent=1, allow_nan=False, default=str)
        llm.write(args.out / "results.json", data.encode())
        print(evaluate.report(rows, topics))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after one line on stderr for what the user can mend."""
    return hub.guarded("igp.py", lambda: work(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
