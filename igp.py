"""IG-Pruning: an input picks which attention and FFN blocks of a frozen language model run.

Source: Qiao, Zhang, Feng 2025, "IG-Pruning: Input-Guided Block Pruning for Large Language Models",
        arXiv:2511.02213. This file is its Figure 2: Stage 1 clusters calibration texts and trains
        a mask per cluster, Stage 2 gives each input the mask of its nearest centroid.
Left out: rival methods (baselines.py); sampled and batched generation.
Dims:   B = 2L blocks (attention 0, FFN 0, attention 1, ...), N clusters, M calibration texts;
        b texts and w tokens in a batch, d hidden width, v vocabulary. Here t is the current
        sparsity of Eq. 7. z = 1 keeps a block, 0 skips it.
Run:    python igp.py    or    python igp.py --model FOLDER --sparsity 0.25
"""
import argparse
import contextlib
import copy
import hashlib
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from tqdm import tqdm

import baselines
import evaluate
import hub
import model as llm
import router as routing
from hardconcrete import GATES, blocks_to_skip, harden, lagrangian, sample_u, sample_z
from kmeans import closest, kmeans, purity

TRAINED = ("static", "igp")
METHODS = ("dense", *TRAINED, *baselines.RIVALS)
TASKS = ("wiki_what", *evaluate.FIELDS)
# "paper": rates, N, samples and length of Table 5. Silent: its M, epochs and batch size.
# "demo": sized for minutes on two CPU cores. Deviates: twice the rate of log_alpha.
PRESETS = {
    "demo": {"calibration": "wikipedia", "clusters": 4, "texts": 1200, "samples": 160, "length": 48,
             "epochs": 1, "batch_size": 4, "lr": 0.2, "lr_lambda": 0.1},
    "paper": {"calibration": "fineweb-edu", "clusters": 16, "texts": 50_000, "samples": 1000,
              "length": 512, "epochs": 1, "batch_size": 4, "lr": 0.1, "lr_lambda": 0.1},
}
# Deviates: this share of the tokens trains one start for all masks, at a constant rate. The paper
# trains each mask from scratch.
SHARED = {"demo": 0.6, "paper": 0.0}
RESTARTS = 10    # Silent: of k-means
SWAPPED, WIDTH = 32, 4  # training texts of a cluster, and gates on either side, that `swap` tries
# Silent: tokens of a held-out text that are judged. Table 5's training length; the demo's minutes.
JUDGED = {"demo": 128, "paper": 512}
NEW_TOKENS = 128  # Silent: the longest text that --prompt gives
# What masks are made from: a run folder holds one value of each.
IDENTITY = ("model", "calibration", "texts", "clusters", "samples", "length", "epochs",
            "batch_size", "lr", "lr_lambda", "gate", "granularity", "budget", "sparsity", "seed",
            "dtype", "preset", "router")

# ------------------------------------------------------------------ Stage 1: training a mask


def lm_loss(model: llm.Transformer, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L_LM of Eq. 8, the mean cross-entropy, and its gradient by hidden (n, d); targets (n,).

    The gradient by a row of logits is softmax - onehot(target), over n. The head runs on HEAD_ROWS
    positions at a time, so that logits (n, v) never exist as a whole.
    """
    rows, loss, gradients = evaluate.HEAD_ROWS, torch.zeros((), device=hidden.device), []
    for h, y in zip(hidden.detach().split(rows), targets.split(rows), strict=True):
        p = model.head(h).log_softmax(-1, dtype=torch.float32)   # (HEAD_ROWS, v)
        loss -= p.gather(1, y[:, None]).sum()
        p = p.exp_().scatter_add_(1, y[:, None], -torch.ones_like(p[:, :1]))
        gradients.append(p.to(h.dtype) @ model.head_weight)      # (HEAD_ROWS, d), model's dtype
    return loss / len(targets), torch.cat(gradients) / len(targets)


def gate_weights(config: llm.Config, args: argparse.Namespace) -> Tensor:
    """What each gate counts in t and s_target, float32: (B,), or (L,) with --granularity layer.

    Deviates: --budget flops counts a block by its share of the blocks' FLOPs, in texts of --length;
    the paper, and --budget blocks, counts every block alike. A layer's gate is that of both blocks
    (Sec. 4.3). Only their ratios count; with flops a layer's two blocks count 1 together.
    """
    weight = torch.ones(config.num_hidden_layers, 2)
    if args.budget == "flops":
        gone = torch.ones(2, 2 * config.num_hidden_layers, dtype=torch.bool)
        gone[[0, 1], [0, 1]] = False                             # an attention, or an FFN block
        dense, *rest = (llm.flops(config, args.length, z) for z in (None, *gone))
        saved = torch.tensor([dense - x for x in rest])          # by skipping either
        weight = weight * (saved / saved.sum())
    return weight.sum(1) if args.granularity == "layer" else weight.flatten()


def hard_z(log_alpha: Tensor, weight: Tensor, args: argparse.Namespace) -> Tensor:
    """The binary z (B,) of the gates (B,), or (L,) if layers.

    --budget flops: it skips at least what floor(s L + 1/2) whole layers cost, as rivals drop, s
    being --sparsity; s_target of Eq. 7 is s itself, unrounded.
    """
    if args.budget == "flops":                                   # weight's sum is L
        z = harden(log_alpha, blocks_to_skip(args.sparsity, round(weight.sum().item())), weight)
    else:
        z = harden(log_alpha, blocks_to_skip(args.sparsity, len(weight)))
    return z.repeat_interleave(2) if args.granularity == "layer" else z


def new_mask(weight: Tensor, args: argparse.Namespace, name: str) -> dict:
    """What is trained for one mask, log_alpha and lambda_1, lambda_2, with its optimiser.

    weight: of `gate_weights`. All in float32 on the CPU, whatever the model's dtype and device.
    Silent: the start. log_alpha = log((1 - s) / s), as Louizos et al. start for a drop rate s, here
    s_target: t begins within 0.03 of it, so that the lambdas need not first undo another start.
    """
    start = math.log((1 - args.sparsity) / args.sparsity)
    log_alpha = torch.full(weight.shape, start, requires_grad=True)
    lambdas = torch.zeros(2, requires_grad=True)  # they ascend as soon as t is not s_target
    adam = torch.optim.Adam([{"params": [log_alpha], "lr": args.lr},
                             {"params": [lambdas], "lr": args.lr_lambda, "maximize": True}])
    return {"name": name, "weight": weight, "log_alpha": log_alpha, "lambdas": lambdas,
            "adam": adam}


def train_mask(model: llm.Transformer, mask: dict, steps: list, args: argparse.Namespace,
               generator: torch.Generator) -> None:
    """Eq. 8: log_alpha descends, the lambdas ascend on L_LM(x; W * z) + L_s. Trains mask in place.

    steps: (texts, rate) pairs, texts being lists of token ids, at least 2 each, and rate in 0-1 a
    factor of --lr. generator: on the CPU, for u. Only z gets gradients, so that a step costs two
    forwards, not three.
    Raises ValueError when the loss is not finite, with the step.
    Silent: one u per text; L_LM is the mean over tokens; Adam with betas 0.9, 0.999, eps 1e-8.
    Deviates: t is 1 - mean(z) of the sampled z, not its share of zeroes: all gates feel it. The
    mean is weighted by `gate_weights`.
    """
    log_alpha, lambdas, adam = mask["log_alpha"], mask["lambdas"], mask["adam"]
    share = mask["weight"] / mask["weight"].sum()
    device, bar = model.head_weight.device, tqdm(steps, mask["name"], disable=None)
    for step, (texts, rate) in enumerate(bar):
        w = max(map(len, texts))
        tokens = torch.tensor([x + [0] * (w - len(x)) for x in texts], device=device)  # (b, w)
        targets = torch.tensor(sum([x[1:] for x in texts], []), device=device)         # (n,)
        u = sample_u((len(texts), len(log_alpha)), generator)    # (b, B or L)  Eq. 3
        z = sample_z(log_alpha, u, args.gate)                    # (b, B or L)  Eq. 4-6
        t = 1 - (z @ share).mean()                               # t of Eq. 7, as we count it
        L_s = lagrangian(t, args.sparsity, *lambdas)             # Eq. 7
        gates = z.repeat_interleave(model.B // len(share), 1)    # (b, B)
        hidden = model(tokens, gates.to(device))                 # (b, w, d)
        hidden = torch.cat([h[:len(x) - 1] for h, x in zip(hidden, texts, strict=True)])  # (n, d)
        L_lm, gradient = lm_loss(model, hidden, targets)
        if not torch.isfinite(L_lm + L_s.detach().to(device)):
            raise ValueError(f"{mask['name']}: loss {L_lm} + {L_s} at step {step}; "
                             "try a lower --lr or --dtype float32")
        adam.zero_grad()
        torch.autograd.backward([hidden, L_s], [gradient, None])  # the gradient of Eq. 8
        adam.param_groups[0]["lr"] = args.lr * rate
        adam.step()
        bar.set_postfix(loss=f"{L_lm:.2f}", t=f"{t:.2f}", closed=int((z == 0).all(0).sum()),
                        lambda_1=f"{lambdas[0]:.2f}", lambda_2=f"{lambdas[1]:.2f}")


def swap(model: llm.Transformer, log_alpha: Tensor, texts: list, hard) -> tuple[Tensor, int]:
    """log_alpha with one gate moved over the threshold, if its hard mask's loss on texts falls.

    Tried is each of the WIDTH kept gates nearest to the threshold, and of as many skipped ones:
    hard(log_alpha), the boolean z (B,), then meets its target by what is nearest to the threshold
    on the other side. log_alpha is float32 (B,), or (L,) if layers. Returns also the forward tokens
    that this took.

    Deviates: the paper hardens the trained log_alpha as it is. Gates are soft in training, so that
    which of two almost equal ones ends on which side of the threshold is noise.
    """
    order, n = log_alpha.argsort().tolist(), len(log_alpha)
    on = hard(log_alpha).view(n, -1)[:, 0]
    lowest, highest = log_alpha.min() - 1, log_alpha.max() + 1
    candidates = {tuple(hard(log_alpha).tolist()): log_alpha}
    for i in [i for i in order if on[i]][:WIDTH] + [i for i in order if not on[i]][-WIDTH:]:
        moved = log_alpha.clone()
        moved[i] = lowest if on[i] else highest
        candidates.setdefault(tuple(hard(moved).tolist()), moved)
    losses = {z: evaluate.loss(model, torch.tensor(z), texts) for z in candidates}
    return candidates[min(losses, key=losses.get)], len(losses) * sum(map(len, texts))


def draw(texts: list[list[int]], n: int, args: argparse.Namespace,
         generator: torch.Generator) -> list[list[list[int]]]:
    """n texts in random order, cut to --length, in batches.

    They are n / --epochs different ones, in turn; fewer where there are fewer.
    """
    order = torch.randperm(len(texts), generator=generator)[:max(1, n // args.epochs)].tolist()
    texts = [texts[order[i % len(order)]][:args.length] for i in range(n)]
    return [texts[i:i + args.batch_size] for i in range(0, n, args.batch_size)]


# ------------------------------------------------------------------ a run and its inputs


@dataclass
class Run:
    """Every input of a run, open before anything expensive starts."""

    args: argparse.Namespace
    out: Path                   # the run folder
    model: llm.Transformer
    tokenizer: object
    bos: int | str              # see evaluate.encode
    encoder: object             # the sentence encoder
    encoder_folder: Path
    train: list[dict]           # texts of Stage 1, each with "text" and "tokens"
    judge: list[dict]           # held-out texts of the final table, likewise
    questions: dict             # task -> list of evaluate.Question
    results: dict               # becomes results.json
    router: routing.Router | None = None  # of --router
    shared: dict | None = None  # the start of all masks, once trained

    def save(self) -> None:
        """Rewrites results.json, whole or not at all, with a checksum of itself."""
        whole = self.results | {"sha256": checksum(self.results)}
        routing.write(self.out / "results.json", json.dumps(whole, indent=1).encode())


def checksum(results: dict) -> str:
    """SHA-256 of results.json without its "sha256": a row that was changed is not resumed from."""
    return hashlib.sha256(json.dumps(results).encode()).hexdigest()


def open_run(args: argparse.Namespace) -> Run:
    """Fetches and opens every input, cheap checks first; ValueError for what does not fit."""
    if args.prompt == "-":
        args.prompt = sys.stdin.read()
    name, out, texts = hub.resolve(args.model), Path(args.out), []
    results = {} if bare(args) else open_results(args, out)
    from_hub = [] if args.tasks_dir else [task for task in args.tasks if task in hub.HUB_TASKS]
    texts_of = "wikipedia" if bare(args) else args.calibration  # nothing of the hub if none is read
    hub.check_access(name, texts_of, from_hub)
    if not bare(args) and args.calibration not in hub.HUB_TEXTS:
        texts = hub.calibration_texts(args.calibration, None)
        hub.split(texts)                                         # enough of them?
    questions = {task: open_task(task, args) for task in args.tasks}
    folder = hub.model_folder(name)
    config = llm.check_weights(folder).config
    check_sparsity(config, args)
    tokenizer, bos = hub.load_tokenizer(folder), args.bos
    bos = bos_id(folder, config) if bos == "on" else bos
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise ValueError(f"{folder}/tokenizer.json has ids up to {largest}, but vocab_size is "
                         f"{config.vocab_size}: they belong to different models")
    B = 2 * config.num_hidden_layers
    router = finished_router(args.router, name, B) if args.router else None
    if args.prompt is not None:
        check_prompt(args.prompt, tokenizer, bos, config)
    encoder_folder, dtype = hub.encoder_folder(), getattr(torch, args.dtype)
    encoder = routing.open_encoder(encoder_folder, args.device, dtype)
    train, judge = ([], []) if bare(args) else open_texts(texts, tokenizer, config, args)
    if router is not None:                                       # of this encoder's width?
        routing.route(router, routing.encode(encoder, ["x"]))
    return Run(args, out, llm.load(folder, args.device, dtype), tokenizer, bos, encoder,
               encoder_folder, train, judge, questions, results, router)


def bare(args: argparse.Namespace) -> bool:
    """--prompt with --router: nothing is trained or judged, no text is read, no folder written."""
    return args.prompt is not None and args.router is not None


def open_texts(texts: list[dict], tokenizer, config: llm.Config,
               args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Run.train and Run.judge, with their tokens; texts: all of --calibration, [] for the hub's."""
    texts = texts or hub.calibration_texts(args.calibration, args.texts + 2 * hub.JUDGING)
    # Silent: BOS of calibration and judging texts. The tokenizer's own habit.
    encodings = tokenizer.encode_batch([x["text"] for x in texts])
    for text, encoding in zip(texts, encodings, strict=True):
        text["tokens"] = encoding.ids[:config.max_position_embeddings]
    train, _, judge = hub.split([x for x in texts if len(x["tokens"]) > 1])
    train, judged = train[:args.texts], JUDGED[args.preset]
    if args.clusters > len(train):
        raise ValueError(f"--clusters {args.clusters} is more than the {len(train)} texts")
    return train, [x | {"tokens": x["tokens"][:judged]} for x in judge]


def check_prompt(text: str, tokenizer, bos: int | str, config: llm.Config) -> None:
    """ValueError for a prompt without a token, or with no room for another one."""
    longest = config.max_position_embeddings
    n = len(evaluate.encode(tokenizer, text, bos)) if text.strip() else 0
    if not 0 < n < longest:
        raise ValueError(f"--prompt has {n} tokens; give it a text of 1 to {longest - 1} "
                         f"(max_position_embeddings is {longest})")


def check_sparsity(config: llm.Config, args: argparse.Namespace) -> None:
    """ValueError where a method cannot skip as much as --sparsity says."""
    L = config.num_hidden_layers
    for name in (name for name in args.method if name != "dense"):
        rival = name in baselines.RIVALS
        layers = rival or args.granularity == "layer" or args.budget == "flops"
        n = L if layers else 2 * L
        most = L - baselines.RIVALS[name][1] if rival else n - 1
        skipped, unit = blocks_to_skip(args.sparsity, n), "layers" if layers else "blocks"
        if not 0 < skipped <= most:
            raise ValueError(f"--sparsity {args.sparsity} skips {skipped} of {n} {unit}; {name} "
                             f"can skip 1 to {most} (for 0: --method dense)")


def bos_id(folder: Path, config: llm.Config) -> int:
    """bos_token_id of config.json, for --bos on; ValueError where it is no id of the vocabulary."""
    bos = llm.read_json(folder / "config.json").get("bos_token_id")
    if not isinstance(bos, int) or not 0 <= bos < config.vocab_size:
        raise ValueError(f"--bos on: bos_token_id of {folder}/config.json is {bos!r}, expected "
                         "an id of the vocabulary; use --bos auto or off")
    return bos


def open_task(task: str, args: argparse.Namespace) -> list[evaluate.Question]:
    """The questions of a task; ValueError with file, line and field for a row that is none."""
    if task == "wiki_what":
        articles = hub.calibration_texts("wikipedia", None)
        rows = evaluate.wiki_what(articles, hub.split(articles)[2], np.random.default_rng(0))
        return rows[:args.limit]
    questions = []
    for where, row in hub.task_rows(task, args.tasks_dir, args.limit):
        try:
            questions.append(evaluate.read_row(task, row))
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
    return questions


def finished_router(path: str, model: str | Path, B: int) -> routing.Router:
    """The router of --router; ValueError if it was made for another model (as `hub.resolve`d)."""
    router = routing.load(path)
    made_for = router.identity.get("model")
    known = hub.HUB_MODELS | {None: str(model)}                  # by hand, without an identity
    same = Path(str(known.get(made_for, made_for))).name == Path(model).name
    if not same or router.z.shape[1] != B:
        raise ValueError(f"{path} was made for {made_for} with {router.z.shape[1]} blocks, but "
                         f"--model {model} has {B}; give the --model that it was made for")
    return router


def open_results(args: argparse.Namespace, out: Path) -> dict:
    """results.json of this very run, begun earlier, or a new one.

    Raises ValueError for a folder that holds another run, or a file that `Run.save` did not write.
    """
    path = out / "results.json"
    if path.exists():
        try:
            results = json.loads(path.read_bytes())
            whole = results.pop("sha256") == checksum(results)
        except (ValueError, RecursionError, KeyError, AttributeError, TypeError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is not as this program wrote it; delete it (finished masks "
                             "stay) or choose another --out")
        for key in IDENTITY:
            if (held := results["arguments"].get(key)) != getattr(args, key):
                raise ValueError(f"{out} holds a run with {key}={held}, not {getattr(args, key)}; "
                                 "choose another --out")
        return results
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    git = subprocess.run(git, capture_output=True, text=True).stdout if shutil.which("git") else ""
    packages = ("torch", "numpy", "safetensors", "tokenizers", "sentence-transformers")
    return {"model": args.model, "sparsity_target": args.sparsity, "budget": args.budget,
            "clusters": args.clusters, "calibration": args.calibration, "seed": args.seed,
            "preset": args.preset, "arguments": vars(args),
            "versions": {name: version(name) for name in packages},
            "git": git.strip() or None, "rows": [], "matrix": None, "masks": [],
            "clusters_found": [], "seconds": {}, "training": {}, "peak_memory_bytes": 0}


@contextlib.contextmanager
def stage(run: Run, name: str):
    """Times a stage into results.json, and says so on stderr."""
    results, start = run.results, time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    results["seconds"][name] = results["seconds"].get(name, 0.0) + seconds
    unit = 1 if sys.platform == "darwin" else 1024               # Linux counts in KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if run.args.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
    results["peak_memory_bytes"] = max(results["peak_memory_bytes"], peak)
    run.save()
    print(f"{name}: {seconds:.0f} s", file=sys.stderr)


# ------------------------------------------------------------------ Stage 1: a mask per cluster


def train_timed(run: Run, mask: dict, steps: list, generator: torch.Generator) -> None:
    """`train_mask`; the mask's cost goes to results["training"]: a step is two forwards."""
    start = time.perf_counter()
    train_mask(run.model, mask, steps, run.args, generator)
    tokens = sum(len(x) - 1 for texts, _ in steps for x in texts)
    run.results["training"][mask["name"]] = {                    # a mask trained again counts once
        "tokens": tokens, "forward_tokens": 2 * tokens, "seconds": time.perf_counter() - start}
    run.results["training_tokens_per_second"] = tokens / (time.perf_counter() - start)


def swap_timed(run: Run, mask: dict, texts: list) -> Tensor:
    """`swap` of a trained mask; the cost is added to what its training took."""
    start, cost = time.perf_counter(), run.results["training"][mask["name"]]
    log_alpha, tokens = swap(run.model, mask["log_alpha"].detach(), texts,
                             lambda x: hard_z(x, mask["weight"], run.args))
    cost["forward_tokens"] += tokens
    cost["seconds"] += time.perf_counter() - start
    return log_alpha


def shared_start(run: Run) -> dict:
    """The mask from which all others go on: trained once, on texts of every cluster.

    It is not saved: a run that was stopped trains it again, to the same bits.
    """
    if run.shared is None:
        args, generator = run.args, torch.Generator().manual_seed(run.args.seed * 2**20)
        run.shared = new_mask(gate_weights(run.model.config, args), args, "shared start")
        n = round(args.samples * args.epochs * args.clusters * SHARED[args.preset])
        batches = draw([x["tokens"] for x in run.train], n, args, generator)
        train_timed(run, run.shared, [(x, 1.0) for x in batches], generator)
    return run.shared


def begun_router(run: Run, path: Path, mu: np.ndarray) -> routing.Router:
    """The router at `path`, as far as it was trained before; a new one where there is none.

    Raises ValueError for a file that this very run did not write.
    """
    args, shape = run.args, (len(mu), run.model.B)
    identity, weight = {key: getattr(args, key) for key in IDENTITY}, gate_weights(
        run.model.config, args)
    new = routing.Router(torch.from_numpy(mu), torch.ones(shape, dtype=torch.bool),
                         torch.full(shape, torch.nan), identity)
    if not path.exists():
        return new
    old = routing.load(path)
    trained = ~old.log_alpha.isnan().any(1)

    def hardened(log_alpha: Tensor) -> Tensor:
        """The z (B,) of a row of the file."""
        if path.stem in baselines.RIVALS:
            return log_alpha > 0
        return hard_z(log_alpha.view(len(weight), -1)[:, 0], weight, args)

    if (old.identity != identity or old.z.shape != new.z.shape or old.mu.shape != new.mu.shape
            or not torch.allclose(old.mu, new.mu, atol=0.01)     # another machine rounds otherwise
            or any(not torch.equal(z, hardened(log_alpha))
                   for z, log_alpha in zip(old.z[trained], old.log_alpha[trained], strict=True))):
        raise ValueError(f"{path} is a router of another model or run; delete it, or choose "
                         "another --out")
    return old


def train_masks(run: Run, method: str, mu: np.ndarray, labels: np.ndarray) -> routing.Router:
    """Eq. 3-8 for each cluster: the router of `method`, saved after every finished mask.

    mu (N, d_e), labels (M,) of run.train. Masks that the run folder already holds are kept.
    static is the case N = 1, and gets the tokens of all of igp's masks together, for training and
    for `swap`.
    Silent: log_alpha's rate falls linearly to 0 in a mask's own steps.
    """
    args, N, B = run.args, len(mu), run.model.B
    path = run.out / ("router.safetensors" if method == "igp" else f"{method}.safetensors")
    router = begun_router(run, path, mu)
    n = round(args.samples * args.epochs * (1 - SHARED[args.preset]) * args.clusters / N)
    for k in (k for k in range(N) if router.log_alpha[k].isnan().any()):
        number = 2 + k if method == "igp" else 1                 # a generator of its own per mask
        generator = torch.Generator().manual_seed(args.seed * 2**20 + number)
        mask = copy.deepcopy(shared_start(run)) | {"name": f"{method}, mask {k}"}
        batches = draw([run.train[i]["tokens"] for i in np.flatnonzero(labels == k)], n, args,
                       generator)
        train_timed(run, mask, [(x, 1 - i / len(batches)) for i, x in enumerate(batches)],
                    generator)
        log_alpha = swap_timed(run, mask, sum(batches, [])[-SWAPPED * args.clusters // N:])
        router.log_alpha[k] = log_alpha.repeat_interleave(B // len(log_alpha))
        router.z[k] = hard_z(log_alpha, mask["weight"], args)
        run.save()                                               # first: it counts what is trained
        routing.save(router, path)
    return router


def search_rival(run: Run, name: str) -> routing.Router:
    """The one z of a rival of baselines.py, as a router with N = 1, saved; log_alpha is 1 or -1.

    Deviates: a rival may spend as many forward tokens as igp's masks together, see baselines.CAP.
    """
    args, L = run.args, run.model.config.num_hidden_layers
    d_e = routing.encode(run.encoder, [run.train[0]["text"]]).shape[1]
    path = run.out / f"{name}.safetensors"
    router = begun_router(run, path, np.zeros((1, d_e), np.float32))
    if router.log_alpha.isnan().any():
        cap = baselines.CAP and round(baselines.CAP * forward_tokens(args))
        search = baselines.Search(
            run.model, [x["tokens"] for x in run.train], blocks_to_skip(args.sparsity, L),
            args.granularity == "layer", cap, np.random.default_rng(args.seed))
        start = time.perf_counter()
        router.z[0], spent = baselines.RIVALS[name][0](search)
        router.log_alpha[0] = 2.0 * router.z[0] - 1
        run.results["training"][name] = {"tokens": 0, "forward_tokens": spent,
                                         "seconds": time.perf_counter() - start}
        run.save()
        routing.save(router, path)
    return router


def training_tokens(args: argparse.Namespace) -> int:
    """At most so many tokens train all masks of a method together."""
    return args.samples * args.epochs * args.clusters * args.length


def forward_tokens(args: argparse.Namespace) -> int:
    """At most so many forward tokens make all masks of a method: training, then `swap`."""
    swapped = args.clusters * SWAPPED * args.length * (2 * WIDTH + 1)
    return 2 * training_tokens(args) + swapped                   # a step is two forwards


def describe(run: Run, e: np.ndarray, mu: np.ndarray, labels: np.ndarray) -> list[dict]:
    """What each cluster of run.train holds: size, commonest topic, the texts nearest to mu."""
    topics = [None if x.get("topic") == "Uncategorized" else x.get("topic") for x in run.train]
    titles = [x.get("title") or " ".join(x["text"].split())[:40] for x in run.train]
    return [{"texts": size, "topic": topic, "of_topic": hits, "with_topic": labelled,
             "nearest": [titles[i] for i in near]}
            for size, (topic, hits, labelled), near in
            zip(np.bincount(labels).tolist(), purity(labels, topics), closest(e, mu, 3),
                strict=True)]


# ------------------------------------------------------------------ Stage 2


def clusters_of(run: Run, router: routing.Router, texts: list[str]) -> np.ndarray:
    """Eq. 1 and 9: the cluster of each text; with one cluster nothing needs to be encoded."""
    if len(router.mu) == 1:
        return np.zeros(len(texts), int)
    return routing.route(router, routing.encode(run.encoder, texts)).numpy()


def judge(run: Run, name: str, router: routing.Router | None) -> dict:
    """A method's row of the table, on the held-out texts; router None is the dense model.

    Silent: what is routed. A text on all of it, so that its route has seen what it predicts, at
    most log2 N bits of it.
    """
    model, config, each = run.model, run.model.config, np.arange(len(run.judge))
    masks = torch.ones(1, model.B, dtype=torch.bool) if router is None else router.z
    k = 0 * each if router is None else clusters_of(run, router, [x["text"] for x in run.judge])
    requests = [(x["tokens"][:1], [x["tokens"][1:]]) for x in run.judge]
    n = np.array([len(y) for _, (y,) in requests])               # predicted tokens per text
    different, which = masks.unique(dim=0, return_inverse=True)  # equal masks are judged once
    table = np.array([evaluate.loglikelihoods(model, requests, z.expand(len(n), -1))
                      for z in different])[which.numpy(), :, 0]  # (N, texts)
    if not (-table.sum(1) / n.sum() < 700).all():                # e^700 is almost infinite; or NaN
        raise ValueError(f"{name}: log-likelihoods of the held-out texts are not finite; check "
                         "the model's weights, or try --dtype float32")
    dense = sum(llm.flops(config, int(t)) for t in n)
    cost = np.array([[llm.flops(config, int(t), z) for t in n] for z in masks]) / dense
    routed = sum(routing.encoder_flops(run.encoder_folder, int(t)) for t in n) / dense
    routed = routed if len(masks) > 1 else 0.0                   # one mask needs no router
    if name == "igp":
        run.results["masks"] = [
            {"z": z.int().tolist(), "judging_texts": int((k == i).sum()),
             "flops_ratio": cost[i].sum(), "flops_ratio_with_router": cost[i].sum() + routed}
            for i, z in enumerate(masks)]
        run.results["matrix"] = [
            [evaluate.perplexity(row[k == i], n[k == i]) if (k == i).any() else None
             for row in table] for i in range(len(masks))]
    skipped = [] if router is None else (~masks).view(len(masks), -1, 2).sum(1).tolist()
    own = ("shared start", name) if name in TRAINED else (name,)
    spent = [x for part, x in run.results["training"].items() if part.split(",")[0] in own]
    return {"name": name, "sparsity": 1 - masks.double().mean().item(),
            "attention_skipped": [a for a, _ in skipped], "ffn_skipped": [f for _, f in skipped],
            "flops_ratio": cost[k, each].sum(),
            "flops_ratio_with_router": cost[k, each].sum() + routed,
            "ppl": evaluate.perplexity(table[k, each], n),       # Eq. 10
            "tasks": {}, "training_tokens": sum(x["tokens"] for x in spent),
            "forward_tokens": sum(x["forward_tokens"] for x in spent),
            "seconds": sum(x["seconds"] for x in spent)}


def ask(run: Run, name: str, task: str, router: routing.Router | None) -> dict:
    """A task's scores under a method; with --log-samples also a line a question, in a file.

    Silent: what is routed. A question on its context alone, so that its choices share one z.
    """
    questions, z, k = run.questions[task], None, [None] * len(run.questions[task])
    if router is not None:
        k = clusters_of(run, router, [q.routed for q in questions]).tolist()
        z = router.z[k]                                          # Eq. 10
    logliks = evaluate.score(run.model, run.tokenizer, questions, z, run.bos)
    if run.args.log_samples:
        lines = []
        for i, (q, x) in enumerate(zip(questions, logliks, strict=True)):
            acc, acc_norm = evaluate.right(q, x)
            lines.append(json.dumps({
                "row": i, "contexts": q.contexts, "continuations": [f" {y}" for y in q.choices],
                "loglikelihood": x.tolist(), "acc": acc, "acc_norm": acc_norm, "gold": q.gold,
                "cluster": k[i]}) + "\n")
        routing.write(samples_file(run, name, task), "".join(lines).encode())
    return evaluate.accuracy(questions, logliks) | {"questions": fingerprint(run, task)}


def samples_file(run: Run, name: str, task: str) -> Path:
    """Where --log-samples writes."""
    return run.out / f"samples-{name}-{task}.jsonl"


def fingerprint(run: Run, task: str) -> str:
    """Tells one set of questions and --bos from another: what is finished is not asked again."""
    return hashlib.sha256(repr((run.bos, run.questions[task])).encode()).hexdigest()[:16]


def is_asked(run: Run, row: dict, task: str) -> bool:
    """Whether a method's row holds the scores of these very questions."""
    return row["tasks"].get(task, {}).get("questions") == fingerprint(run, task)


# ------------------------------------------------------------------ the command line


def best_dtype(device: str) -> str:
    """bfloat16 on GPUs and on CPUs that multiply it in hardware, else float32."""
    has = any("bf16" in name for name, there in torch.cpu.get_capabilities().items() if there)
    return "bfloat16" if has or not device.startswith("cpu") else "float32"


def parser(defaults: dict) -> argparse.ArgumentParser:
    """Every flag; `defaults` are the preset and its values."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"igp.py: error: {message}; --help lists the flags\n")
    add = p.add_argument
    add("--model", default=hub.EMBEDDED, help=f"{hub.EMBEDDED}, {', '.join(hub.HUB_MODELS)}, a hub "
        "id, or a folder with config.json, tokenizer.json and *.safetensors")
    add("--method", help=f"comma-separated, of {', '.join(METHODS)}, or all; static is igp with "
        "N = 1; if not given dense,static,igp, or with --router dense,igp")
    add("--sparsity", type=float, default=0.25, help="share of blocks (see --budget) to skip, 0-1")
    add("--budget", choices=("blocks", "flops"), default="blocks", help="what --sparsity is a "
        "share of, in igp and static: the number of blocks, or their FLOPs")
    add("--granularity", choices=("block", "layer"), default="block", help="igp, static and "
        "evopress skip attention and FFN blocks by themselves, or whole layers, as other rivals do")
    add("--preset", choices=PRESETS, help="sets the next nine flags where they are not given; demo "
        f"for {hub.EMBEDDED}, paper (Table 5) for any other model")
    # Stage 1
    add("--calibration", help=f"wikipedia, {', '.join(hub.HUB_TEXTS)}, a .jsonl or a text file")
    add("--clusters", type=int, help="N, the number of clusters and masks")
    add("--texts", type=int, help="M, the number of texts to cluster")
    add("--samples", type=int, help="texts to train each cluster's mask on")
    add("--length", type=int, help="of a training text, in tokens")
    add("--epochs", type=int, help="passes over the samples")
    add("--batch-size", type=int, help="texts in a training step")
    add("--lr", type=float, help="Adam's rate for log_alpha")
    add("--lr-lambda", type=float, help="Adam's rate for lambda_1 and lambda_2")
    add("--gate", choices=GATES, default="paper", help="which reading of Eq. 4")
    # Stage 2
    add("--router", help="apply this router.safetensors, train nothing")
    add("--prompt", help="a text to go on from, or - for standard input, under igp's mask for it, "
        "instead of evaluating")
    add("--tasks", help=f"zero-shot, comma-separated, of {', '.join(TASKS)}; '' for none; if not "
        "given all but the first with --tasks-dir or a calibration from the hub, else the first "
        "with wikipedia")
    add("--tasks-dir", help="folder with <task>.jsonl in the hub's schema; if not given, the hub")
    add("--limit", type=int, help="ask only the first so many questions of a task")
    add("--bos", choices=("auto", "on", "off"), default="auto",
        help="begin a question with BOS: as the tokenizer does by itself, always, or never")
    add("--log-samples", action="store_true", help="write samples-<method>-<task>.jsonl into --out")
    # the run
    add("--seed", type=int, default=0, help="of k-means, gates and batch order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of the model; auto is bfloat16 where the hardware multiplies it")
    add("--out", help="run folder; if not given, runs/<model>-<sparsity>-<preset>")
    p.set_defaults(**defaults)
    return p


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, under the preset they ask for, checked as far as no file is needed."""
    first, _ = parser({}).parse_known_args([x for x in argv if x not in ("-h", "--help")])
    preset = first.preset or ("demo" if first.model == hub.EMBEDDED else "paper")
    p = parser({"preset": preset, **PRESETS[preset]})             # so that --help shows its values

    def error(message: str) -> None:
        """One line on stderr and exit status 2."""
        p.exit(2, f"igp.py: error: {message}\n")

    args = p.parse_args(argv)
    if args.prompt is not None:
        if args.method not in (None, "igp") or args.tasks:
            error("--prompt asks igp for a text, no tasks; leave --method and --tasks out")
        args.method, args.tasks = "igp", ""
    if args.tasks is None:
        args.tasks = {"wikipedia": "wiki_what"}.get(args.calibration, "")
        if args.tasks_dir or args.calibration in hub.HUB_TEXTS:
            args.tasks = ",".join(evaluate.FIELDS)
    if args.method is None:
        args.method = "dense,igp" if args.router else ",".join(("dense", *TRAINED))
    elif "all" in args.method.split(","):
        args.method = ",".join(METHODS)
    for key, known in (("method", METHODS), ("tasks", TASKS)):
        names = [name.strip() for name in getattr(args, key).split(",") if name.strip()]
        for name in set(names) - set(known):
            error(f"--{key} {name} is unknown; nearest: {hub.near(name, known)}")
        setattr(args, key, [name for name in known if name in names])
    check(args, error)
    args.out = args.out or f"runs/{Path(args.model).name}-{args.sparsity}-{args.preset}"
    args.dtype = best_dtype(args.device) if args.dtype == "auto" else args.dtype
    return args


def check(args: argparse.Namespace, error) -> None:
    """Calls error(message) for a value outside its range."""
    if not args.method:
        error(f"--method is empty; expected of {', '.join(METHODS)}")
    if args.router and set(args.method) - {"dense", "igp"}:
        error("--router trains nothing; --method can be dense, igp or both")
    if not 0 < args.sparsity < 1 and (args.sparsity, args.method) != (0, ["dense"]):
        error(f"--sparsity {args.sparsity} is not between 0 and 1; for 0 use --method dense")
    least = {"clusters": 1, "texts": 1, "samples": 1, "length": 2, "epochs": 1, "batch_size": 1,
             "lr": 0, "lr_lambda": 0, "limit": 2, "seed": 0}
    for key, low in least.items():
        if getattr(args, key) is not None and not low <= getattr(args, key) < 2**31:
            error(f"--{key.replace('_', '-')} {getattr(args, key)} is not a number from {low} up")
    kind, _, index = args.device.partition(":")
    here = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(kind, 0)
    if not (index or "0").isdecimal() or int(index or 0) >= here:
        error(f"--device {args.device} is not here; use --device cpu")


def estimate(run: Run) -> float:
    """Minutes that are left to train and evaluate, from their FLOPs and the speed of one matmul."""
    args, config, done = run.args, run.model.config, run.results["training"]
    rows = {row["name"]: row for row in run.results["rows"]}
    w, seconds = run.model.model.layers[0].mlp.up_proj.weight, []
    x = torch.ones(1024, w.shape[1]).to(w)
    for _ in range(10):                                          # the first ones are slow
        begin = time.perf_counter()
        float((x @ w.T)[0, 0])
        seconds.append(time.perf_counter() - begin)
    rate = 0.6 * 2 * len(x) * w.numel() / min(seconds)           # 0.6: tests/bench.py training
    # start, trained: in forward tokens; judged: in passes over run.judge; asked: in characters
    start = trained = judged = asked = 0
    for name in args.method:
        N = 1 if name != "igp" else args.clusters if run.router is None else len(run.router.z)
        masks = [f"{name}, mask {k}" for k in range(N)] if name in TRAINED else [name]
        left = sum(mask not in done for mask in masks) / len(masks)
        if name in TRAINED and left and not args.router:
            start = SHARED[args.preset] * 2 * training_tokens(args)
            trained += left * (forward_tokens(args) - start)
        elif name in baselines.RIVALS:                           # with CAP at most as much as igp
            trained += left * forward_tokens(args)
        if name not in rows and args.prompt is None:             # at most; equal masks once
            judged += N
        asked += sum(len(q.routed) + sum(map(len, q.choices)) for task in run.questions
                     if not is_asked(run, rows.get(name, {"tasks": {}}), task)
                     for q in run.questions[task])
    tokens = start + trained + judged * sum(len(x["tokens"]) for x in run.judge)
    tokens += asked / 4                                          # about 4 characters a token
    return tokens * llm.flops(config, args.length) / args.length / rate / 60


def stage_1(run: Run) -> dict:
    """The router of every method of --method, trained, searched, or given; None for dense."""
    args, results, routers = run.args, run.results, {"dense": None, "igp": run.router}
    for name in (name for name in args.method if name in baselines.RIVALS):
        with stage(run, f"search of {name}"):
            routers[name] = search_rival(run, name)
    masked = [name for name in args.method if name in TRAINED and routers.get(name) is None]
    if masked:                                                   # Stage 1: mask candidates
        with stage(run, "encoding"):
            texts = [x["text"] for x in run.train]
            e = routing.encode(run.encoder, texts)               # Eq. 1
    for name in masked:
        with stage(run, "clustering"):
            N, generator = args.clusters if name == "igp" else 1, np.random.default_rng(args.seed)
            mu, labels, _ = kmeans(e, N, generator, RESTARTS)    # Eq. 2
            if name == "igp":
                results["clusters_found"] = describe(run, e, mu, labels)
        with stage(run, f"masks of {name}"):
            routers[name] = train_masks(run, name, mu, labels)   # Eq. 3-8
    return routers


def stage_2(run: Run, routers: dict) -> str:
    """Routing (Eq. 9, 10) and evaluation of every method; the report."""
    args, results = run.args, run.results
    for name in args.method:
        row = next((row for row in results["rows"] if row["name"] == name), None)
        if row is None:
            with stage(run, f"texts of {name}"):
                row = judge(run, name, routers[name])
                results["rows"].append(row)
        for task in run.questions:
            lines = samples_file(run, name, task)
            if not is_asked(run, row, task) or args.log_samples and not lines.exists():
                with stage(run, f"{task} of {name}"):
                    row["tasks"][task] = ask(run, name, task, routers[name])
    return evaluate.report(results)


def answer(run: Run, router: routing.Router) -> str:
    """Stage 2 of --prompt: prints its mask and the text as it comes; returns the cost as a table.

    Silent: what is routed. The prompt; its mask stays for all of the text. Greedy, without a chat
    template. The FLOPs are those of prompt and text, as one forward.
    """
    model, prompt, rows = run.model, run.args.prompt, []
    e = routing.encode(run.encoder, [prompt])                    # Eq. 1
    k = int(routing.route(router, e)[0])                         # Eq. 9
    z = router.z[k]                                              # Eq. 10
    square = ((e[0] - router.mu[k].numpy()) ** 2).sum()
    print(f"Cluster {k} of {len(router.mu)}, |e - c_k|^2 = {square:.4f}. M^x skips "
          f"{(~z[0::2]).sum()} attention and {(~z[1::2]).sum()} FFN blocks of {model.B}:\n"
          f"{evaluate.picture(z)}\n")
    ids = evaluate.encode(run.tokenizer, prompt, run.bos)
    longest = min(len(ids) + NEW_TOKENS, model.config.max_position_embeddings)
    next(llm.generate(model, ids, model.new_cache(1, longest)))  # reads the weights once, untimed
    for name, mask in (("igp", z), ("dense", None)):
        cache, seconds = model.new_cache(1, longest, mask), []
        stream, start = DecodeStream(skip_special_tokens=True), time.perf_counter()
        for token in llm.generate(model, ids, cache):
            seconds.append(time.perf_counter() - start)
            text = stream.step(run.tokenizer, token)
            if name == "igp" and text:
                print(text, end="", flush=True)
            start = time.perf_counter()
        t, decode, routed = cache.length, sum(seconds[1:]), 0.0
        dense = llm.flops(model.config, t)
        ratio = llm.flops(model.config, t, mask) / dense
        if mask is not None and len(router.mu) > 1:              # one mask needs no router
            routed = routing.encoder_flops(run.encoder_folder, len(ids)) / dense
        rows.append([name, f"{len(ids) / seconds[0]:.0f}",
                     f"{(len(seconds) - 1) / decode:.1f}" if decode else "-",
                     f"{cache.bytes / 2**20:.3f}", f"{ratio:.1%}",
                     f"{ratio + routed:.1%}"])
    return "\n\n" + evaluate.markdown(
        [f"{len(ids)} tokens of prompt", "prefill tokens/s", "decode tokens/s",
         f"K and V of {longest} tokens, MiB", "FLOPs", "FLOPs + router"], rows)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after one line on stderr for what the user can mend."""
    args = parse(sys.argv[1:] if argv is None else argv)
    out = Path(args.out)

    def work() -> None:
        """The run, alone in its folder."""
        new = not out.exists()
        try:
            with contextlib.nullcontext() if bare(args) else hub.locked(out, wait=False):
                run = open_run(args)
                plan = "" if bare(args) else (f"; training and evaluation take about "
                                              f"{estimate(run):.0f} minutes; writing {out}")
                print(f"{args.model} on {args.device}, {args.dtype}, {torch.get_num_threads()} "
                      f"threads{plan}", file=sys.stderr)
                routers = stage_1(run)
                print(stage_2(run, routers) if args.prompt is None
                      else answer(run, routers["igp"]))
        finally:
            if new and out.exists() and not any(out.iterdir()):
                out.rmdir()                                      # refused: nothing is left behind

    return hub.guarded("igp.py", work)


if __name__ == "__main__":
    sys.exit(main())
