"""Writes the porter's kit: inputs, models, expected values, and the values of usual mistakes.

Run:  python tests/golden/port/make.py    (rewrites this folder's data; the same bytes every time)
Expected values are what the project's own functions return, in float32 on a CPU. The values of a
mistake are what they return with one part replaced by a wrong one; see `mistakes`.
"""
import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn import functional as F

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]

import wrong  # noqa: E402  (beside this file)

import evaluate  # noqa: E402
import hardconcrete  # noqa: E402
import igp  # noqa: E402
import kmeans  # noqa: E402
import model as llm  # noqa: E402
import router  # noqa: E402

PLACES = 64  # of an array, evenly spaced, at which the values of a mistake are kept
SEED = 5     # of the training's own draws

# Every axis has a size of its own; 6 * 10 heads are not 24 wide.
CONFIGS = {
    "llama": {
        "model_type": "llama", "vocab_size": 53, "hidden_size": 24, "intermediate_size": 36,
        "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
        "max_position_embeddings": 26, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "eos_token_id": 40,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "qwen3": {
        "model_type": "qwen3", "vocab_size": 47, "hidden_size": 28, "intermediate_size": 44,
        "num_hidden_layers": 3, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8,
        "max_position_embeddings": 30, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "eos_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
}


def write_model(folder: Path, config: dict, seed: int) -> None:
    """A checkpoint of random weights: float32, but each of them a bf16 number."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    with torch.device("meta"):
        names = llm.Transformer(llm.read_config(folder)).state_dict()
    rng, weights = np.random.default_rng(seed), {}
    for name, x in names.items():
        w = rng.standard_normal(x.shape).astype(np.float32) * 0.25
        w = w + 1 if "norm" in name else w
        weights[name] = torch.from_numpy(w).bfloat16().float().numpy()
    save_file(weights, folder / "model.safetensors")


# ---------------------------------------------------------------------------- inputs


def arrays() -> dict:
    """inputs.safetensors. Draws are data, so that no port needs a generator of torch's or NumPy's.

    Points of which several are equally near have integer coordinates, so that their ties are exact.
    """
    rng = np.random.default_rng(3)
    generator = torch.Generator().manual_seed(1)
    x = {
        "gates.fraction": torch.rand((3, 8), generator=generator).numpy(),
        "gates.log_alpha": rng.normal(0, 1.5, 8),
        "gates.upstream": rng.normal(0, 1, (3, 8)),
        "clip.s_bar": np.array([-0.1, 0, 0.5, 1, 1.05]),
        "harden.log_alpha": np.array([0.5, -1, 2, -1, 0.25, 0.5, 3, -1]),
        "adam.gradient": rng.normal(0, [1, 0.1, 0.01, 1e-3, 1e-4], (3, 5)),
        "tied.e": rng.integers(-2, 3, (9, 2)),
        "tied.mu": np.array([[1, 1], [-1, 1], [1, -1], [1, 1]]),
        "empty.e": np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [16, 0], [7, 7], [8, 7], [7, 8]]),
        "empty.mu": np.array([[0, 0], [8, 0], [7, 7], [90, 90], [95, 90]]),
        "kmeans.draws": rng.random((3, 4)),
        "route.e": np.array([[0, 0], [3, 0], [0, -4], [5, 5], [-1, 2], [1, 7]]),
        "route.mu": np.array([[9, 9], [1, 0], [-1, 0], [0, -2], [3, 2]]),
        "llama.soft_z": rng.random((3, 8)).round(3),
        "loss.z": rng.random((3, 8)).round(3),
    }
    centres = rng.normal(0, 2, (6, 5))
    x["kmeans.e"] = centres[rng.integers(6, size=19)] + rng.normal(0, 1, (19, 5))
    x["loss.z"][:, 3] = 0                                         # closed for every text
    x["loss.z"][[0, 1, 2], [1, 6, 4]] = 0, 1, 0                   # closed for one, open for one
    x["loss.z"][1, 4] = 1
    x = {name: np.float32(value) for name, value in x.items()}
    x["llama.tokens"] = rng.integers(0, 53, (3, 13))
    x["qwen3.tokens"] = rng.integers(0, 47, (3, 13))
    x["llama.hard_z"] = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)
    x["llama.row_z"] = np.array([[0, 1, 1, 1, 1, 1, 0, 1], [1, 1, 1, 0, 1, 0, 1, 1],
                                 [1, 0, 1, 1, 1, 1, 1, 0]], bool)
    generator = torch.Generator().manual_seed(SEED)
    us = [hardconcrete.sample_u((2, 8), generator) for _ in range(4)]
    x["train.u"] = torch.stack(us).numpy()
    return x


def lists() -> dict:
    """inputs.json: single numbers, and lists of lists that are not all of one length."""
    rng = np.random.default_rng(4)

    def ids(n):
        return rng.integers(1, 53, n).tolist()

    questions = [
        ("same length wins", ["ab", "abcd"], 0, [-4, -6]),
        ("the first of equals", ["abc", "abc"], 1, [-3, -3]),
        ("two letters, four bytes", ["éé", "abc"], 0, [-5, -6]),
        ("one sign, four bytes", ["🙂", "ab"], 1, [-3, -5]),
    ]
    return {
        "lagrangian": {"t": 0.5, "s_target": 0.2, "lambda_1": 2.0, "lambda_2": 4.0},
        "shares": [[0.25, 8], [0.3125, 8], [0.4375, 8], [0.267, 60], [0.25, 30]],
        "adam": {"lr": 0.1},
        "harden": {"share": 0.25, "length": 13},
        "loss": {"texts": [ids(13), ids(7), ids(10)]},
        "train": {"texts": [ids(n) for n in (9, 12, 12, 5, 8, 10, 11, 11)], "s_target": 0.25,
                  "lr": 0.2, "lr_lambda": 0.1, "batch_size": 2},
        "groups": [[ids(6), [ids(3), ids(1), ids(4)]], [ids(4), [ids(5)]],
                   [ids(20), [ids(3), ids(11)]], [ids(2), [ids(2), ids(2)]]],
        "questions": [{"what": what, "choices": choices, "gold": gold, "log_p": log_p}
                      for what, choices, gold, log_p in questions],
        "perplexity": {"log_p": [-20.5, -3.25, -61.0], "tokens": [9, 1, 30]},
        "generate": {"prompt": ids(4), "longest": 12},
        "flops": {"t": [1, 7, 13]},
    }


# ---------------------------------------------------------------------------- expected values


@dataclass
class Kit:
    """What the functions below read: tensors and lists of the inputs, and the models."""

    x: dict
    given: dict
    llama: llm.Transformer
    qwen3: llm.Transformer
    bf16: llm.Transformer


def gates(kit):
    """Eq. 3-7 and their gradients, in both readings of Eq. 4."""
    given, x, out = kit.given["lagrangian"], kit.x, {}
    out["gates.u"] = hardconcrete.sample_u((3, 8), torch.Generator().manual_seed(1))
    for gate in ("paper", "louizos"):
        log_alpha = x["gates.log_alpha"].clone().requires_grad_()
        z = hardconcrete.sample_z(log_alpha, out["gates.u"], gate)
        [dz] = torch.autograd.grad((z * x["gates.upstream"]).sum(), log_alpha)
        p = hardconcrete.prob_zero(log_alpha, gate)
        [dp] = torch.autograd.grad(p.sum(), log_alpha)
        out |= {f"z.{gate}": z, f"dz.{gate}": dz, f"zero.{gate}": p, f"dzero.{gate}": dp}
    s_bar = x["clip.s_bar"].clone().requires_grad_()
    [out["clip.slope"]] = torch.autograd.grad(s_bar.clamp(0, 1).sum(), s_bar)
    names = "t", "lambda_1", "lambda_2"
    numbers = [torch.tensor(given[name], requires_grad=True) for name in names]
    t, lambda_1, lambda_2 = numbers
    L_s = hardconcrete.lagrangian(t, given["s_target"], lambda_1, lambda_2)
    out["lagrangian"] = L_s[None]
    out["dlagrangian"] = torch.stack(torch.autograd.grad(L_s, numbers))
    return out


def hardening(kit):
    """How soft gates become a mask."""
    length, share = kit.given["harden"]["length"], kit.given["harden"]["share"]
    equal, cost = (igp.gate_costs(kit.llama.config, budget, "block", length)
                   for budget in ("blocks", "flops"))
    log_alpha = kit.x["harden.log_alpha"]
    shares = [hardconcrete.whole_share(*pair) for pair in kit.given["shares"]]
    return {
        "shares": torch.tensor(shares),
        "cost.flops": cost,
        "harden.blocks": hardconcrete.harden(log_alpha, equal, share),
        "harden.flops": hardconcrete.harden(log_alpha, cost, share),
    }


def adam(kit):
    """Three steps, down and up, from 0."""
    down, up = (torch.zeros(5, requires_grad=True) for _ in range(2))
    lr, rows = kit.given["adam"]["lr"], []
    both = torch.optim.Adam([{"params": down, "lr": lr},
                             {"params": up, "lr": lr, "maximize": True}])
    for gradient in kit.x["adam.gradient"]:
        down.grad, up.grad = gradient.clone(), gradient.clone()
        both.step()
        rows.append(torch.stack((down, up)).detach())
    descends, ascends = torch.stack(rows, 1)
    return {"adam.descends": descends, "adam.ascends": ascends}


class Draws:
    """A generator for k-means++ whose draws in [0, 1) are given; it keeps every p."""

    power = 1

    def __init__(self, draws):
        self.draws, self.ps = iter(np.ravel(draws)), []

    def integers(self, n):
        """0 .. n - 1."""
        return int(next(self.draws) * n)

    def choice(self, n, p):
        """The first index at which the sum of p passes the draw."""
        p = p**self.power / (p**self.power).sum()
        self.ps.append(p)
        return int(p.cumsum().searchsorted(next(self.draws), "right"))


def clusters(kit):
    """Eq. 2: starts, labels, empty clusters, ties, restarts; and Eq. 9."""
    x = {name: value.numpy() for name, value in kit.x.items()}
    e, draws, out = x["kmeans.e"], x["kmeans.draws"], {}
    generator = Draws(draws)
    starts = kmeans.plus_plus(e, 4, generator)
    out["starts.p"], out["starts"] = np.array(generator.ps), starts
    out["tied.labels"], out["tied.distance"] = kmeans.nearest(x["tied.e"], x["tied.mu"])
    out["nearest.labels"], out["nearest.distance"] = kmeans.nearest(e, starts)
    found = {
        "lloyd": kmeans.lloyd(e, starts),
        "empty": kmeans.lloyd(x["empty.e"], x["empty.mu"]),
        "kmeans": kmeans.kmeans(e, 4, Draws(draws), 3),
    }
    for name, (mu, labels, inertia) in found.items():
        out |= {f"{name}.labels": labels, f"{name}.mu": mu, f"{name}.inertia": np.array([inertia])}
    out = {name: torch.tensor(value) for name, value in out.items()}
    z, log_alpha = torch.ones(5, 8).bool(), torch.ones(5, 8)
    out["route.k"] = router.route(router.Router(kit.x["route.mu"], z, log_alpha, {}), x["route.e"])
    return out


def watched(model, run):
    """run()'s result; what modules were given and gave, each by name; and Q, K, V, softmax(Q K^T).

    The last four are those of the first attention.
    """
    given, gave, first = {}, {}, []
    attention = F.scaled_dot_product_attention

    def keep(name, args, y):
        given[name], gave[name] = args[0], y

    def sdpa(q, k, v, *args, **options):
        one = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:3], -1).contiguous()
        first.append((q, k, v, attention(q, k, one, *args, **options)))
        return attention(q, k, v, *args, **options)

    hooks = [module.register_forward_hook(lambda _, args, y, name=name: keep(name, args, y))
             for name, module in model.named_modules() if name]
    with patch.object(F, "scaled_dot_product_attention", sdpa):
        result = run()
    for hook in hooks:
        hook.remove()
    return result, given, gave, first[0]


def stream(model, given):
    """x before every block and after the last (B + 1, b, t, d)."""
    norms = [f"model.layers.{i}.{name}" for i in range(model.config.num_hidden_layers)
             for name in ("input_layernorm", "post_attention_layernorm")]
    return torch.stack([given[name] for name in [*norms, "model.norm"]])


@torch.no_grad()
def forward(kit):
    """Every intermediate of one dense forward of Llama; then its result under other z."""
    x, model = kit.x, kit.llama
    tokens = x["llama.tokens"]
    hidden, given, gave, (q, k, v, softmax) = watched(model, lambda: model(tokens))
    first = "model.layers.0."
    cos, sin = llm.rope_angles(model.config, torch.arange(13))
    out = {
        "rope": torch.stack((cos, sin))[..., 0, :5],
        "x0": given[first + "input_layernorm"],
        "norm": given[first + "self_attn"],
        "q": q, "k": k, "v": v, "softmax": softmax,
        "heads": given[first + "self_attn.o_proj"].unflatten(2, (6, 10)).transpose(1, 2),
        "attention": gave[first + "self_attn"],
        "x1": given[first + "post_attention_layernorm"],
        "inner": given[first + "mlp.down_proj"],
        "ffn": gave[first + "mlp"],
        "x": stream(model, given),
        "hidden": hidden,
        "logits": model.head(hidden),
        "log_p": evaluate.log_probs(model, hidden[0], tokens[0].roll(-1))[:-1],
    }
    for name in ("hard_z", "row_z", "soft_z"):
        out[name] = model(tokens, x[f"llama.{name}"])
    return {f"llama.{name}": value for name, value in out.items()}


@torch.no_grad()
def qwen3(kit):
    """Norms on the heads of q and k, a tied head."""
    hidden, _, _, (q, k, *_) = watched(kit.qwen3, lambda: kit.qwen3(kit.x["qwen3.tokens"]))
    return {"qwen3.q": q, "qwen3.k": k, "qwen3.hidden": hidden,
            "qwen3.logits": kit.qwen3.head(hidden)}


@torch.no_grad()
def bf16(kit):
    """Llama in bf16, as on a CPU: the scores are float32."""
    x, model = kit.x, kit.bf16
    hidden, given, gave, _ = watched(model, lambda: model(x["llama.tokens"]))
    first = "model.layers.0."
    soft = model(x["llama.tokens"], x["llama.soft_z"])
    out = {"norm": given[first + "self_attn"], "attention": gave[first + "self_attn"],
           "inner": given[first + "mlp.down_proj"], "x": stream(model, given),
           "hidden": hidden, "z": x["llama.soft_z"].bfloat16(), "soft_z": soft}
    return {f"bf16.{name}": value.float() for name, value in out.items()}


def losses(kit):
    """L_LM and its gradients by z and by x after every block."""
    z, texts, model = kit.x["loss.z"], kit.given["loss"]["texts"], kit.llama
    seen = {}

    def before(module, args):
        if module is norms[0]:                                    # of the last forward only
            seen.clear()
        if args[0].requires_grad:
            args[0].retain_grad()
        seen[module] = args[0]

    norms = []
    for layer in model.model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    norms.append(model.model.norm)
    hooks = [norm.register_forward_pre_hook(before) for norm in norms]
    loss, dz = igp.lm_gradient(model, texts, z, len(texts))
    for hook in hooks:
        hook.remove()
    xs = [seen.get(norm) for norm in norms[1:]]
    for i in reversed(range(len(xs))):                            # a closed block: x stays
        xs[i] = xs[i + 1] if xs[i] is None else xs[i]
    zero = torch.zeros_like(xs[-1])                               # of x that no z reaches
    dx = torch.stack([zero if x.grad is None else x.grad for x in xs])
    return {"loss": torch.tensor([loss]), "loss.dz": dz, "loss.dx": dx}


def training(kit):
    """Four steps of igp.train_mask; what its parts are handed is kept on the way."""
    given, rows, ts, lms = kit.given["train"], [], [], []
    sample_z, lagrangian, lm_gradient = igp.sample_z, igp.lagrangian, igp.lm_gradient

    def seen_z(log_alpha, u, gate):
        rows.append([log_alpha.detach().clone()])
        return sample_z(log_alpha, u, gate)

    def seen_t(t, s_target, *lambdas):
        rows[-1].append(torch.stack(lambdas).detach().clone())
        ts.append(t.detach())
        return lagrangian(t, s_target, *lambdas)

    def seen_loss(*args):
        loss, gradient = lm_gradient(*args)
        lms.append(loss)
        return loss, gradient

    cost = torch.ones(8) / 8
    recipe = igp.Recipe(given["s_target"], cost, "paper", given["lr"], given["lr_lambda"],
                        given["batch_size"], given["batch_size"])
    with patch.multiple(igp, sample_z=seen_z, lagrangian=seen_t, lm_gradient=seen_loss):
        end = igp.train_mask(kit.llama, given["texts"], recipe,
                             torch.Generator().manual_seed(SEED))
    log_alpha, lambdas = map(torch.stack, zip(*rows, end, strict=True))
    share = hardconcrete.whole_share(given["s_target"], 8)
    out = {"train.z": hardconcrete.harden(log_alpha[-1], cost, share)}
    for name, values in (("t", torch.stack(ts)), ("loss", torch.tensor(lms)),
                         ("log_alpha", log_alpha), ("lambdas", lambdas)):
        out |= {f"train.{name}.{step}": value[None] for step, value in enumerate(values)}
    return out


def choices(kit):
    """Packing, log P of every choice, what is right, perplexity."""
    given, groups, model = kit.given, kit.given["groups"], kit.llama
    read, predictors, _ = evaluate._pack(*groups[0])
    out = {"choices.read": read, "choices.predictors": torch.tensor(predictors),
           "choices.attend": evaluate._branches(read[None, :, 2])[0, 0]}
    z = kit.x["llama.hard_z"].expand(len(groups), -1)
    for name, masks in (("choices.log_p", None), ("choices.masked", z)):
        found = evaluate.loglikelihoods(model, groups, masks)
        out[name] = torch.from_numpy(np.concatenate(found))
    hits = []
    for x in given["questions"]:
        question = evaluate.Question(["c"] * len(x["choices"]), x["choices"], x["gold"], "c")
        hits.append(evaluate.right(question, np.array(x["log_p"], float)))
    out["right"] = torch.tensor(hits)
    both = (np.array(given["perplexity"][name]) for name in ("log_p", "tokens"))
    out["perplexity"] = torch.tensor([evaluate.perplexity(*both)])
    return out


def text(kit):
    """Greedy ids, dense and under a z."""
    given, out = kit.given["generate"], {}
    for name, z in (("generate.dense", None), ("generate.masked", kit.x["llama.hard_z"])):
        cache = kit.llama.new_cache(1, given["longest"], z)
        out[name] = torch.tensor(list(llm.generate(kit.llama, given["prompt"], cache)))
    return out


def cost(kit):
    """FLOPs, a row a t: dense, and under a z, by both rules."""
    zs = torch.ones(8).bool(), kit.x["llama.hard_z"]
    rows = {rule: [[llm.flops(kit.llama.config, t, z, rule) for z in zs]
                   for t in kit.given["flops"]["t"]] for rule in ("free", "table2")}
    return {f"flops.{rule}": torch.tensor(values) for rule, values in rows.items()}


PARTS = (gates, hardening, adam, clusters, forward, qwen3, bf16, losses, training, choices, text,
         cost)

# ---------------------------------------------------------------------------- files

CLASSES = {  # of tolerances: share of the largest value, and why
    "exact": (0, "whole numbers and yes or no: exact"),
    "one": (2**-22, "one float32 formula of few operations: 4 roundings"),
    "formula": (2**-19, "a few float32 operations: 32 roundings of the largest value"),
    "sums": (2**-17, "a chain of float32 sums of up to 60 terms: 128 roundings of the largest"),
    "squares": (2**-13, "|e|^2 - 2 e.mu + |mu|^2 rounds as |e|^2 does, which is the larger number"),
    "gradients": (2**-15, "float32 sums back through 8 blocks: 512 roundings of the largest"),
    "steps": (2**-14, "training: Adam divides by a root of small gradients, and four steps chain"),
    "bf16.one": (2**-12, "no value is near a bf16 tie: each has one right rounding, of 2^-9"),
    "bf16": (2**-5, "bf16: a sum near a tie goes either way, and what follows chains, 8 roundings "
                    "of 2^-8"),
}


def open_kit(folder: Path) -> Kit:
    """Inputs and models, made anew in `folder`."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        write_model(folder / name, config, seed)
    x, given = arrays(), lists()
    save_file(x, folder / "inputs.safetensors")
    (folder / "inputs.json").write_text(json.dumps(given, indent=1, ensure_ascii=False) + "\n",
                                        encoding="utf-8")
    llama, qwen = (llm.load(folder / name, "cpu", torch.float32) for name in CONFIGS)
    low = llm.load(folder / "llama", "cpu", torch.bfloat16)
    return Kit({name: torch.from_numpy(value) for name, value in x.items()}, given,
               llama, qwen, low)


def to_numpy(found: dict) -> dict:
    """Name -> array: float32, int64 or bool, contiguous."""
    out = {}
    for name, value in found.items():
        value = value.detach().numpy()
        kind = np.float32 if value.dtype.kind == "f" else value.dtype
        out[name] = np.ascontiguousarray(value, kind)
    return out


def entries(expected: dict) -> list:
    """The manifest's rows, from entries.txt, with what the arrays say of themselves."""
    rows, kinds = [], {True: "bool"}
    for line in (HERE / "entries.txt").read_text(encoding="utf-8").splitlines():
        if line and line[0] != "#":
            name, needs, kind, where, what = (cell.strip() for cell in line.split("|"))
            value = expected[name]
            share, why = CLASSES[kind]
            size = float(np.abs(value).max())
            tolerance = float(f"{share * size:.2g}")
            rows.append({"name": name, "dtype": kinds.get(value.dtype == bool, str(value.dtype)),
                         "shape": list(value.shape), "needs": needs.split(),
                         "tolerance": tolerance, "why": why, "where": where, "what": what})
    return rows


def places(size: int) -> np.ndarray:
    """Evenly spaced indices of a flat array, PLACES at most."""
    return np.unique(np.linspace(0, size - 1, PLACES).astype(int))


def mistaken(kit: Kit, expected: dict, rows: list) -> tuple:
    """"mistake|vector" -> its values at `places`, and mistake -> a sentence."""
    tolerance = {row["name"]: row["tolerance"] for row in rows}
    values, sentences = {}, {}
    for name, (sentence, parts, patches) in wrong.mistakes(kit, Draws).items():
        sentences[name] = sentence
        with ExitStack() as stack:
            for target, attribute, value in patches:
                stack.enter_context(patch.object(target, attribute, value, create=True))
            found = {}
            for part in PARTS:
                if part.__name__ in parts.split():
                    found |= to_numpy(part(kit))
        for vector, value in found.items():
            a, b = (np.float64(x).ravel()[places(x.size)] for x in (value, expected[vector]))
            if a.shape != b.shape or not np.abs(a - b).max() <= 3 * tolerance[vector]:
                values[f"{name}|{vector}"] = a
    return values, sentences


def main(folder: Path = HERE) -> None:
    """Writes models, inputs, expected values, mistakes and manifest into `folder`."""
    kit = open_kit(folder)
    expected = {}
    for part in PARTS:
        expected |= to_numpy(part(kit))
    rows = entries(expected)
    expected = {row["name"]: expected[row["name"]] for row in rows}
    values, sentences = mistaken(kit, expected, rows)
    save_file(expected, folder / "expected.safetensors")
    save_file(values, folder / "mistakes.safetensors")
    manifest = {"vectors": rows, "mistakes": sentences}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
