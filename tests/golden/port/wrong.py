"""Usual mistakes of a port, each as a wrong part that make.py puts into the project's own code."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

import evaluate
import hardconcrete
import igp
import kmeans
import model as llm
import router

MODULES = hardconcrete, kmeans, router, llm, evaluate, igp
FORWARD = "forward qwen3"

# The right parts, which wrong ones call.
sample_u, prob_zero = hardconcrete.sample_u, hardconcrete.prob_zero
lagrangian, harden = hardconcrete.lagrangian, hardconcrete.harden
nearest, right, flops = kmeans.nearest, evaluate.right, llm.flops
rotate, rope_angles, sdpa = llm.rotate, llm.rope_angles, F.scaled_dot_product_attention
run, lm_gradient, log_probs = llm.Transformer.forward, igp.lm_gradient, evaluate.log_probs
loglikelihoods, pack, norm = evaluate.loglikelihoods, evaluate._pack, llm.RMSNorm.forward


def everywhere(name, value):
    """Patches of every module that has the name, as each imports it by itself."""
    return [(module, name, value) for module in MODULES if hasattr(module, name)]


# ---------------------------------------------------------------------------- gates and Adam


def pass_all(x, low, high=None):
    """A clip whose gradient is 1 everywhere; with one bound, which is none of a gate, as it is."""
    if high is None:
        return torch.clamp(x, low)
    return x + (F.hardtanh(x, low, high) - x).detach()


def one_u(shape, generator):
    """The first row of u for every text."""
    return sample_u(shape, generator)[:1].expand(*shape)


def half_even(s_target, n):
    """Rounds a half to the even number."""
    return round(s_target * n) / n


def absolute(t, s_target, lambda_1, lambda_2):
    """|t - s_target| where Eq. 7 has a square."""
    return lambda_1 * (t - s_target) + lambda_2 * (t - s_target).abs()


class WrongAdam:
    """Adam by hand, with a mistake: bias not corrected, eps in the root, or all descend."""

    corrected, eps_inside, ascends = True, False, True

    def __init__(self, groups):
        self.param_groups = groups
        self.state = [[0, 0] for _ in groups]
        self.steps = 0

    def zero_grad(self):
        """Forgets the gradients."""
        for group in self.param_groups:
            group["params"].grad = None

    @torch.no_grad()
    def step(self):
        """A step of every group."""
        self.steps += 1
        for group, state in zip(self.param_groups, self.state, strict=True):
            g = group["params"].grad
            up = group.get("maximize") and self.ascends
            g = -g if up else g
            state[0] = 0.9 * state[0] + 0.1 * g
            state[1] = 0.999 * state[1] + 0.001 * g * g
            c1 = 1 - 0.9**self.steps if self.corrected else 1
            c2 = 1 - 0.999**self.steps if self.corrected else 1
            m, v = state[0] / c1, state[1] / c2
            root = (v + 1e-8).sqrt() if self.eps_inside else v.sqrt() + 1e-8
            group["params"] -= group["lr"] * m / root


class Uncorrected(WrongAdam):
    """m and v as they are."""

    corrected = False


class EpsInside(WrongAdam):
    """sqrt(v + eps)."""

    eps_inside = True


class AllDescend(WrongAdam):
    """The lambdas descend too."""

    ascends = False


class Soft:
    """t stays 1 - mean(z): what stands for P(z = 0) is 1 - mean(z) of the draw before it."""

    sample_z = staticmethod(hardconcrete.sample_z)
    z = None

    def draw(self, *args):
        """z, which is kept."""
        self.z = self.sample_z(*args)
        return self.z

    def zero(self, *_):
        """1 - mean of the z that was kept."""
        return 1 - self.z.mean(0)


# ---------------------------------------------------------------------------- clusters


def last_nearest(e, mu):
    """Of equally near centroids the last."""
    labels, distance = nearest(e, mu[::-1])
    return len(mu) - 1 - labels, distance


def root_nearest(e, mu):
    """Distances that are not squared."""
    labels, distance = nearest(e, mu)
    return labels, distance**0.5


def dot_nearest(e, mu):
    """The largest dot product."""
    return (e @ mu.T).argmax(1), np.zeros(len(e))


def cosine_nearest(e, mu):
    """Centroids of length 1."""
    return nearest(e, mu / np.linalg.norm(mu, axis=1, keepdims=True))


# ---------------------------------------------------------------------------- the forward


def interleaved(x, cos, sin):
    """RoPE on the pairs (2j, 2j + 1)."""
    cos, sin = (a[..., :a.shape[-1] // 2] for a in (cos, sin))
    x1, x2 = x[..., 0::2], x[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1).flatten(-2)


def unscaled(config, positions):
    """rope_scaling is ignored."""
    return rope_angles(replace(config, rope_scaling=None), positions)


def all_scaled(config, positions):
    """Every frequency is divided by the factor."""
    factor = config.rope_scaling["factor"] if config.rope_scaling else 1
    return unscaled(config, positions / factor)


def hard_scaled(config, positions):
    """llama3 scaling without the blend: a frequency below the high one is divided."""
    scaling = config.rope_scaling
    if scaling:
        scaling = scaling | {"low_freq_factor": scaling["high_freq_factor"] * (1 - 1e-7)}
    return rope_angles(replace(config, rope_scaling=scaling), positions)


def by_pair(config, positions):
    """theta^(-j / d_h) where it is -2j."""
    return rope_angles(replace(config, rope_theta=config.rope_theta**0.5), positions)


def plus_one(self, x):
    """RMSNorm with 1 + weight."""
    return norm(self, x) + norm(self, x) / self.weight


def centred(self, x):
    """LayerNorm: the mean is taken out."""
    return norm(self, x - x.mean(-1, keepdim=True))


def eps_outside(self, x):
    """eps beside the root."""
    return self.weight * (x / (x.float().square().mean(-1, keepdim=True).sqrt() + self.eps)).to(x)


def low_norm(self, x):
    """All of RMSNorm in x's dtype."""
    return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def late_norm(self, x):
    """The weight multiplies before anything is rounded."""
    quotient = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
    return (self.weight.float() * quotient).to(x)


def no_head_norm(self, x):
    """No norm where x has an axis of heads."""
    return x if x.ndim == 4 else norm(self, x)


def no_last_norm(model):
    """No norm after the last block; the others as they are."""
    last = {id(model.model.norm)}
    return lambda self, x: x if id(self) in last else norm(self, x)


def tiled(q, k, v, *args, **options):
    """Query head j reads K/V head j % h_kv."""
    group = q.shape[1] // k.shape[1]
    return sdpa(q, k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1), *args,
                **options | {"enable_gqa": False})


def scaled_by(f):
    """Scores times f(d_h)."""
    def attention(q, *args, **options):
        return sdpa(q, *args, **options, scale=f(q.shape[-1]))
    return attention


def all_seen(q, k, v, *args, **options):
    """A token sees those to its right."""
    return sdpa(q, k, v, enable_gqa=True)


def strictly(q, k, v, *args, **options):
    """A token sees those to its left, not itself; the first sees itself."""
    t = q.shape[2]
    attend = torch.ones(t, t).tril(-1).bool()
    attend[0, 0] = True
    return sdpa(q, k, v, attend, enable_gqa=True)


def swapped_ffn(self, x):
    """W_down (silu(W_up x) * W_gate x)."""
    return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))


def plain_ffn(self, x):
    """W_down silu(W_gate x), W_up forgotten."""
    return self.down_proj(F.silu(self.gate_proj(x)))


def with_z(change):
    """The forward under change(z)."""
    def forward(self, tokens, z=None, *args, **options):
        z = z if z is None else change(z)
        return run(self, tokens, z, *args, **options)
    return forward


def halves(z):
    """z read as all attentions, then all FFNs."""
    L = z.shape[-1] // 2
    return torch.stack((z[..., :L], z[..., L:]), -1).flatten(-2)


def first_embedding(self):
    """The embedding is the head, tied or not."""
    return self.model.embed_tokens.weight


# ---------------------------------------------------------------------------- losses, scores


def late(self, *args, **options):
    """The row that has read a token scores it: everything one place late."""
    return run(self, *args, **options).roll(-1, 1)


def summed(model, texts, z, micro_batch):
    """The sum over tokens."""
    loss, gradient = lm_gradient(model, texts, z, micro_batch)
    n = sum(len(x) - 1 for x in texts)
    return loss * n, gradient * n


def by_text(model, texts, z, micro_batch):
    """The mean over texts of each one's mean."""
    parts = [lm_gradient(model, [x], z[i:i + 1], 1) for i, x in enumerate(texts)]
    loss, gradient = zip(*parts, strict=True)
    return sum(loss) / len(texts), torch.cat(gradient) / len(texts)


def with_padding(model, texts, z, micro_batch):
    """Zeroes on the right are predicted too."""
    longest = max(map(len, texts))
    return lm_gradient(model, [x + [0] * (longest - len(x)) for x in texts], z, micro_batch)


def never_closed(model, texts, z, micro_batch):
    """A closed gate gets its gradient all the same."""
    return lm_gradient(model, texts, z.clamp(min=1e-30), micro_batch)


def mean_gradient(model, texts, z, micro_batch):
    """The gradient by z divided by the texts once more."""
    loss, gradient = lm_gradient(model, texts, z, micro_batch)
    return loss, gradient / len(texts)


def unbranched(self, *args, attend=None, **options):
    """Plain causal: a choice sees those before it."""
    return run(self, *args, **options)


def run_on(self, *args, positions=None, **options):
    """Positions run on from one choice to the next."""
    return run(self, *args, **options)


def pack_unbranched(context, choices):
    """All of one branch."""
    read, predictors, choices = pack(context, choices)
    read[:, 2] = 0
    return read, predictors, choices


def pack_run_on(context, choices):
    """Positions 0, 1, 2, ... to the end."""
    read, predictors, choices = pack(context, choices)
    read[:, 1] = torch.arange(len(read))
    return read, predictors, choices


def pack_late(context, choices):
    """Each token is predicted by the row after."""
    read, predictors, choices = pack(context, choices)
    return read, [min(row + 1, len(read) - 1) for row in predictors], choices


def pack_neighbour(context, choices):
    """Each choice's first token is predicted by the row before it, not by the context's last."""
    read, predictors, choices = pack(context, choices)
    row, found = len(context) - 1, []
    for y in choices:
        found += range(row, row + len(y))
        row += len(y) - 1
    return read, found, choices


def divided(*args):
    """The mean of a choice's tokens, not their sum."""
    found = loglikelihoods(*args)
    return [value / np.array(list(map(len, choices)))
            for value, (_, choices) in zip(found, args[1], strict=True)]


def cut_together(model, groups, z):
    """If one choice is too long, the context is cut once, for all."""
    longest = model.config.max_position_embeddings
    cut = [(context[max(0, len(context) + max(map(len, ys)) - 1 - longest):], ys)
           for context, ys in groups]
    return loglikelihoods(model, cut, z)


def cut_alone(model, groups, z):
    """Too long a choice is cut to `longest` tokens, its last one counted in."""
    longest = model.config.max_position_embeddings
    cut = []
    for context, ys in groups:
        over = max(0, len(context) + max(map(len, ys)) - 1 - longest)
        cut += [(context[max(0, len(context) + len(y) - longest):] if over else context, [y])
                for y in ys]
    found = np.concatenate(loglikelihoods(model, cut, None if z is None else z[:1].expand(
        len(cut), -1)))
    ends = np.cumsum([len(ys) for _, ys in groups])[:-1]
    return np.split(found, ends)


def last_right(question, loglik):
    """Of equal maxima the last."""
    turned = replace(question, choices=question.choices[::-1],
                     gold=len(loglik) - 1 - question.gold)
    return right(turned, loglik[::-1])


def by_bytes(x):
    """len, but bytes for a text."""
    return len(x.encode()) if isinstance(x, str) else len(x)


def by_text_ppl(loglik, n_tokens):
    """Every text weighs the same."""
    return float(np.exp(-(loglik / n_tokens).mean()))


def causal_flops(config, t, *args):
    """Half of the scores."""
    whole, double = flops(config, t, *args), flops(config, 2 * t, *args)
    return whole - (double - 2 * whole) // 4


def headless_flops(config, *args):
    """Without the head."""
    return flops(replace(config, vocab_size=0), *args)


# ---------------------------------------------------------------------------- the table


def mistakes(kit, draws) -> dict:
    """Name -> (what it is, make.py's parts that it changes, patches: object, attribute, value)."""
    T, norms, soft = llm.Transformer, llm.RMSNorm, Soft()
    attention, adam = "scaled_dot_product_attention", "adam training"
    losses = "losses training"
    zero_start = SimpleNamespace(log=lambda x: 0.0, isfinite=math.isfinite)
    low_start = SimpleNamespace(log=lambda x: -math.log(x), isfinite=math.isfinite)
    return gate_mistakes(soft) | cluster_mistakes(draws) | {
        "adam-uncorrected": ("Adam's m and v are not corrected for their start at 0", adam,
                             [(torch.optim, "Adam", Uncorrected)]),
        "adam-eps": ("Adam's eps stands inside the root", adam,
                     [(torch.optim, "Adam", EpsInside)]),
        "lambda-descends": ("the lambdas descend; they ascend", adam,
                            [(torch.optim, "Adam", AllDescend)]),
        "rope-interleaved": ("RoPE pairs (2j, 2j + 1); it pairs (j, j + d_h / 2)", FORWARD,
                             [(llm, "rotate", interleaved)]),
        "rope-unscaled": ("rope_scaling is ignored", FORWARD, [(llm, "rope_angles", unscaled)]),
        "rope-all-scaled": ("every frequency is divided by rope_scaling's factor; only long "
                            "wavelengths are", FORWARD, [(llm, "rope_angles", all_scaled)]),
        "rope-hard": ("llama3 scaling without its blend between the two bounds", FORWARD,
                      [(llm, "rope_angles", hard_scaled)]),
        "rope-exponent": ("RoPE's frequencies are theta^(-j / d_h); they are theta^(-2j / d_h)",
                          FORWARD, [(llm, "rope_angles", by_pair)]),
        "rope-backwards": ("RoPE turns the other way", FORWARD,
                           [(llm, "rotate", lambda x, cos, sin: rotate(x, cos, -sin))]),
        "norm-plus-one": ("RMSNorm multiplies by 1 + weight", FORWARD,
                          [(norms, "forward", plus_one)]),
        "norm-centred": ("LayerNorm: the mean is taken out first", FORWARD,
                         [(norms, "forward", centred)]),
        "norm-eps": ("RMSNorm's eps stands beside the root, not inside", FORWARD,
                     [(norms, "forward", eps_outside)]),
        "norm-bf16": ("RMSNorm's mean is bf16; it is float32", "bf16",
                      [(norms, "forward", low_norm)]),
        "norm-late": ("RMSNorm's weight multiplies before the quotient is rounded", "bf16",
                      [(norms, "forward", late_norm)]),
        "no-qk-norm": ("Qwen3's norms of q and k are missing", "qwen3",
                       [(norms, "forward", no_head_norm)]),
        "no-last-norm": ("the norm after the last block is missing", "forward losses choices text",
                         [(norms, "forward", no_last_norm(kit.llama))]),
        "gqa-tiled": ("query head j reads K/V head j % h_kv; it reads j // (h / h_kv)", FORWARD,
                      [(F, attention, tiled)]),
        "unscaled-scores": ("scores are not divided by sqrt(d_h)", FORWARD,
                            [(F, attention, scaled_by(lambda d_h: 1.0))]),
        "scores-by-width": ("scores are divided by sqrt(d); it is sqrt(d_h)",
                            "forward losses training choices",
                            [(F, attention, scaled_by(lambda _: kit.llama.config.hidden_size
                                                      ** -0.5))]),
        "not-causal": ("a token sees those to its right", FORWARD, [(F, attention, all_seen)]),
        "not-itself": ("a token does not see itself", "forward qwen3 bf16 losses training",
                       [(F, attention, strictly)]),
        "gelu": ("the FFN has GELU; it is silu", FORWARD, [(F, "silu", F.gelu)]),
        "gate-up": ("the FFN's gate and up are exchanged", FORWARD,
                    [(llm.FFN, "forward", swapped_ffn)]),
        "no-up": ("the FFN's up is missing", FORWARD, [(llm.FFN, "forward", plain_ffn)]),
        "z-halves": ("z is read as all attentions, then all FFNs; they alternate", FORWARD,
                     [(T, "forward", with_z(halves))]),
        "z-polarity": ("z = 1 skips a block; it keeps it", FORWARD,
                       [(T, "forward", with_z(lambda z: 1 - z.float()))]),
        "z-first-row": ("every text runs under the first one's z", "forward",
                        [(T, "forward", with_z(lambda z: z[0] if z.ndim == 2 else z))]),
        "z-rounded-up": ("a soft z counts as 1", FORWARD,
                         [(T, "forward", with_z(lambda z: z > 0))]),
        "z-stream": ("z multiplies the residual stream too; only the block's output", FORWARD,
                     [(T, "forward", with_z(lambda z: z.float().clamp(min=1e-30))),
                      (torch, "addcmul", lambda x, z, y: z * (x + y))]),
        "tied": ("the embedding serves as head though the two are not tied", FORWARD,
                 [(T, "head_weight", property(first_embedding))]),
        "scores-late": ("the row that has read a token scores it: scores one place late",
                        "losses training", [(T, "forward", late)]),
        "log-p-late": ("the row that has read a token scores it: scores one place late", "forward",
                       [(evaluate, "log_probs",
                         lambda model, h, y: log_probs(model, h.roll(-1, 0), y))]),
        "loss-sum": ("the loss is a sum over tokens; it is a mean", losses,
                     [(igp, "lm_gradient", summed)]),
        "loss-by-text": ("the loss is a mean of the texts' means; every token weighs the same",
                         losses, [(igp, "lm_gradient", by_text)]),
        "padding": ("padding is predicted too", losses, [(igp, "lm_gradient", with_padding)]),
        "closed-gradient": ("a gate that is 0 for every text gets a gradient", losses,
                            [(igp, "lm_gradient", never_closed)]),
        "z-mean": ("the gradient by z is divided by the texts once more", losses,
                   [(igp, "lm_gradient", mean_gradient)]),
        "rate-constant": ("log alpha's rate does not fall over the last 40 % of the steps",
                          "training", [(igp, "FLAT", 1 - 1e-9)]),
        "start-zero": ("log alpha starts at 0; it starts at log((1 - s) / s)", "training",
                       [(igp, "math", zero_start)]),
        "start-turned": ("log alpha starts at log(s / (1 - s)); it is log((1 - s) / s)",
                         "training", [(igp, "math", low_start)]),
        "t-soft": ("t stays 1 - mean(z); it moves to P(z = 0)", "training",
                   [(igp, "prob_zero", soft.zero), (igp, "sample_z", soft.draw)]),
        "one-u": ("all texts of a step share one u", "training", [(igp, "sample_u", one_u)]),
    } | score_mistakes(kit)


def gate_mistakes(soft) -> dict:
    """Those of hardconcrete.py."""
    gates, shares = "gates training", "hardening training"
    beta = {"paper": (1.5, 1.0), "louizos": (2 / 3, 2 / 3)}
    other = {"paper": (1.5, 1.5), "louizos": (2 / 3, 1.0)}
    return {
        "u-raw": ("u is not scaled into [1e-6, 1 - 1e-6]", gates, [(hardconcrete, "EPS", 0.0)]),
        "inv-beta": ("1/beta = 2/3 is read as beta: 3/2 stands where 2/3 should", gates,
                     everywhere("GATES", beta)),
        "other-gate": ('the gates "paper" and "louizos" are exchanged', gates,
                       everywhere("GATES", other)),
        "unstretched": ("s is not stretched to [-0.1, 1.1]", gates,
                        [(hardconcrete, "STRETCH_L", -1e-30), (hardconcrete, "STRETCH_R", 1.0)]),
        "clip-strict": ("the clip passes no gradient at exactly 0 and 1; it does", "gates",
                        [(torch.Tensor, "clamp", F.hardtanh)]),
        "clip-leaks": ("the clip passes its gradient outside [0, 1]", "gates training",
                       [(torch.Tensor, "clamp", pass_all)]),
        "prob-kept": ("P(z > 0) where P(z = 0) is asked", gates,
                      everywhere("prob_zero", lambda *args: 1 - prob_zero(*args))),
        "excess-sign": ("Eq. 7 has s_target - t; it is t - s_target", gates,
                        everywhere("lagrangian", lambda t, s, *lambdas:
                                   lagrangian(2 * s - t, s, *lambdas))),
        "excess-absolute": ("lambda_2 multiplies |t - s_target|; it is the square", gates,
                            everywhere("lagrangian", absolute)),
        "share-even": ("a half of a block is rounded to the even number; it goes up", shares,
                       everywhere("whole_share", half_even)),
        "share-down": ("the share of blocks is rounded down", shares,
                       everywhere("whole_share", lambda s, n: math.floor(s * n) / n)),
        "harden-largest": ("the largest log alpha are skipped; it is the smallest", shares,
                           everywhere("harden", lambda x, *args: harden(-x, *args))),
        "harden-turned": ("the hardened z is 1 for skipped blocks; 1 keeps", shares,
                          everywhere("harden", lambda *args: ~harden(*args))),
        "harden-ties": ("of equal log alpha the last is skipped first; it is the first", shares,
                        everywhere("harden", lambda x, cost, share:
                                   harden(x.flip(0), cost.flip(0), share).flip(0))),
    }


def cluster_mistakes(draws) -> dict:
    """Those of kmeans.py and of routing."""
    part, numbers = "clusters", np.arange(99)
    nobody = np.zeros(0, int)
    return {
        "starts-root": ("k-means++ draws by the distance; it is its square", part,
                        [(draws, "power", 0.5)]),
        "nearest-last": ("of equally near centroids the last; it is the first", part,
                         everywhere("nearest", last_nearest)),
        "not-squared": ("distances are not squared", part, everywhere("nearest", root_nearest)),
        "empty-left": ("an empty cluster's mean is 0 / 0; it gets the farthest point", part,
                       [(np, "setdiff1d", lambda *_: nobody)]),
        "empty-steals": ("an empty cluster takes the farthest point of all, also one that is alone "
                         "in its own", part, [(np, "bincount", lambda labels: numbers * 0)]),
        "first-restart": ("the first start, not that of least inertia", part,
                          [(kmeans, "min", lambda runs, key: runs[0])]),
        "last-restart": ("the last start, not that of least inertia", part,
                         [(kmeans, "min", lambda runs, key: runs[-1])]),
        "numbered-as-drawn": ("clusters keep their starts' order; they are numbered by their first "
                              "points", part,
                              [(np, "unique", lambda labels, **_: (None, numbers[:4]))]),
        "route-dot": ("the route is the largest dot product; it is the least distance", part,
                      [(router, "nearest", dot_nearest)]),
        "route-cosine": ("centroids are scaled to length 1 before the route; they stay as they "
                         "are", part, [(router, "nearest", cosine_nearest)]),
    }


def score_mistakes(kit) -> dict:
    """Those of evaluate.py, of generation, and of FLOPs."""
    T, choices = llm.Transformer, "choices"
    endless = replace(kit.llama.config, eos_token_id=())
    logliks = "loglikelihoods"
    return {
        "choices-see": ("a choice sees those before it; only the context and itself", choices,
                        [(T, "forward", unbranched), (evaluate, "_pack", pack_unbranched)]),
        "positions-run-on": ("positions run on from one choice to the next; each starts at the "
                             "context's end", choices,
                             [(T, "forward", run_on), (evaluate, "_pack", pack_run_on)]),
        "choices-late": ("the row after a token scores it: scores one place late", choices,
                         [(evaluate, "_pack", pack_late)]),
        "choices-neighbour": ("a choice's first token is scored by the row before it; by the "
                              "context's last", choices, [(evaluate, "_pack", pack_neighbour)]),
        "log-p-mean": ("log P of a choice is the mean over its tokens; it is the sum", choices,
                       [(evaluate, logliks, divided)]),
        "cut-together": ("where a choice is too long, the context is cut once for all choices; "
                         "each is cut by itself", choices, [(evaluate, logliks, cut_together)]),
        "cut-short": ("too long a choice is cut to the longest input; one more fits, as its last "
                      "token is not read", choices, [(evaluate, logliks, cut_alone)]),
        "bytes": ("acc_norm divides by bytes; it is by code points", choices,
                  [(evaluate, "len", by_bytes)]),
        "last-maximum": ("of equal maxima the last choice; it is the first", choices,
                         [(evaluate, "right", last_right)]),
        "ppl-by-text": ("perplexity weighs every text the same; it is every token", choices,
                        [(evaluate, "perplexity", by_text_ppl)]),
        "no-eos": ("the text goes on after EOS", "text", [(kit.llama, "config", endless)]),
        "flops-single": ("a multiply-add counts 1; it is 2", "cost",
                         [(llm, "flops", lambda *args: flops(*args) // 2)]),
        "flops-causal": ("half of the scores are counted; it is all of t x t", "cost",
                         [(llm, "flops", causal_flops)]),
        "flops-headless": ("the head is not counted", "cost", [(llm, "flops", headless_flops)]),
    }
