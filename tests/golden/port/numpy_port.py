"""Stages 1 and 2 of IG-Pruning in NumPy alone, with the gradients by hand: a port to learn from.

Source: arXiv:2511.02213. In the order of docs/porting.md; write.py runs all of it.
Left out: files, flags, sentence encoder, tokenizer, the cache of K and V; Qwen3's gradients.
Dims:   b texts, t tokens, d width, f FFN width, v vocabulary; k key and value heads, g query heads
        that read each, e their width; L layers, B = 2L blocks; M points, N clusters. z = 1 keeps.
Test:   python tests/golden/port/write.py FOLDER && python tests/golden/port/check.py FOLDER
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy import einsum
from safetensors.numpy import load_file

KIT = Path(__file__).parent

# ---------------------------------------------------------------------------- gates, Eq. 3-7

GATES = {"paper": (2 / 3, 1), "louizos": (3 / 2, 3 / 2)}
LEFT, RIGHT, EPS = -0.1, 1.1, 1e-6


def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


def sample_u(fraction):
    """Eq. 3, of the 24-bit fractions that torch draws."""
    return fraction * (1 - 2 * EPS) + EPS


def sample_z(log_alpha, u, gate):
    """z (b, B) of Eq. 4-6, and its derivative by log_alpha."""
    a, c = GATES[gate]
    s = sigmoid(a * np.log(u / (1 - u)) + c * log_alpha)
    s_bar = s * (RIGHT - LEFT) + LEFT
    slope = passes(s_bar) * (RIGHT - LEFT) * s * (1 - s) * c
    return s_bar.clip(0, 1), slope


def passes(s_bar):
    """The derivative of a clip to [0, 1]: 1 inside, and at both ends."""
    return (s_bar >= 0) & (s_bar <= 1)


def prob_zero(log_alpha, gate):
    """P(z = 0), and its derivative by log_alpha."""
    a, c = GATES[gate]
    p = sigmoid((math.log(-LEFT / RIGHT) - c * log_alpha) / a)
    return p, -p * (1 - p) * c / a


def lagrangian(t, s_target, lambda_1, lambda_2):
    """L_s of Eq. 7, and its derivatives by t, lambda_1 and lambda_2."""
    excess = t - s_target
    L_s = lambda_1 * excess + lambda_2 * excess**2
    return L_s, [lambda_1 + 2 * lambda_2 * excess, excess, excess**2]


def whole_share(s_target, n):
    """The share of whole blocks nearest to the target, a half up."""
    return math.floor(s_target * n + 0.5) / n


def harden(log_alpha, cost, share):
    """z: the smallest log_alpha become 0, of equals the first, until their costs reach share."""
    order = log_alpha.argsort(kind="stable")
    before = cost[order].cumsum() - cost[order]
    z = log_alpha == log_alpha
    z[order[before < share - 1e-6]] = False
    return z


def adam(gradients):
    """What the newest of the gradients (steps, ...) makes the step, to be multiplied by the rate.

    With bias corrected, m and v are means of g and g^2, weighted by beta^age.
    """
    age = np.arange(len(gradients))[::-1]
    m = np.average(gradients, 0, 0.9**age)
    v = np.average(gradients**2, 0, 0.999**age)
    return m / (np.sqrt(v) + 1e-8)


# ---------------------------------------------------------------------------- k-means, Eq. 2 and 9


def nearest(e, mu):
    """Labels of e (M, d_e), squared distances to the nearest mu (N, d_e), of equals the first."""
    distance = ((e[:, None] - mu) ** 2).sum(-1)                   # (M, N)
    return distance.argmin(1), distance.min(1)


def plus_plus(e, draws):
    """k-means++ starts (N, d_e), and p (N - 1, M), by which all but the first were drawn."""
    chosen, ps = [int(draws[0] * len(e))], []
    for draw in draws[1:]:
        _, distance = nearest(e, e[chosen])
        p = distance / distance.sum()
        chosen.append(p.cumsum().searchsorted(draw, "right"))
        ps.append(p)
    return e[chosen], np.array(ps)


def lloyd(e, mu):
    """mu, labels, inertia when no label changes; an empty cluster gets the farthest point."""
    old = None
    for _ in range(300):
        labels, distance = nearest(e, mu)
        for k in np.setdiff1d(range(len(mu)), labels):
            alone = np.bincount(labels)[labels] == 1
            labels[np.where(alone, -1, distance).argmax()] = k
        if np.array_equal(labels, old):
            break
        mu = np.array([e[labels == k].mean(0) for k in range(len(mu))])
        old = labels
    return mu, labels, distance.sum()


def kmeans(e, draws):
    """The best of as many starts as draws has rows; clusters numbered by their first points."""
    runs = [lloyd(e, plus_plus(e, row)[0]) for row in draws]
    mu, labels, inertia = min(runs, key=lambda run: run[2])
    _, first = np.unique(labels, return_index=True)
    order = first.argsort()
    return mu[order], order.argsort()[labels], inertia


def route(e, mu):
    """Eq. 9: k* of each e (n, d_e)."""
    return nearest(e, mu)[0]


# ---------------------------------------------------------------------------- the model


@dataclass
class Model:
    """config.json, the weights under their names there, and what rounds to the model's dtype."""

    config: SimpleNamespace
    W: dict
    cast: object

    def layer(self, i):
        """Layer i's weights by short names; those of heads are cut, (k, g, e, d) or (k, e, d)."""
        c, start = self.config, f"model.layers.{i}."
        w = {n.split(".")[-2]: x for n, x in self.W.items() if n.startswith(start)}
        heads = c.num_key_value_heads, -1, c.head_dim, c.hidden_size
        w["q"] = w["q_proj"].reshape(heads)
        w["k"], w["v"] = w["k_proj"].reshape(heads)[:, 0], w["v_proj"].reshape(heads)[:, 0]
        w["o"] = w["o_proj"].T.reshape(heads)
        return SimpleNamespace(**w)


def read_json(path):
    """A JSON file; objects have their fields as attributes."""
    return json.loads(path.read_text(encoding="utf-8"), object_hook=lambda x: SimpleNamespace(**x))


def open_model(name, dtype, cast=lambda x: x):
    """The Model in a folder of the kit."""
    W = load_file(KIT / name / "model.safetensors")
    W = {n: x.astype(dtype) for n, x in W.items()}
    return Model(read_json(KIT / name / "config.json"), W, cast)


def bf16(x):
    """float32 rounded to the nearest of those whose last 16 bits are 0, ties to even."""
    bits = np.float32(x).view(np.uint32)
    bits = bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16
    return bits.view(np.float32)


def norm(x, weight, model):
    """RMSNorm: x / sqrt(mean(x^2) + eps) is rounded before the weight multiplies it."""
    return model.cast(weight * model.cast(x * scale(x, model)))


def scale(x, model):
    """1 / sqrt(mean(x^2) + eps)."""
    return 1 / np.sqrt((x * x).mean(-1, keepdims=True) + model.config.rms_norm_eps)


def norm_back(dy, x, weight, model):
    """dx of RMSNorm: without the part of dn along n, as n's length is fixed."""
    dn, n = dy * weight, x * scale(x, model)
    return scale(x, model) * (dn - n * (dn * n).mean(-1, keepdims=True))


def rope_angles(c, positions):
    """cos and sin (t, e / 2) of position theta^(-2j / e), with llama3 scaling if asked."""
    rope = c.rope_parameters
    frequency = rope.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
    if rope.rope_type == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        turns = rope.original_max_position_embeddings * frequency / (2 * np.pi)
        keep = ((turns - low) / (high - low)).clip(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / rope.factor
    angle = positions[:, None] * frequency
    return np.cos(angle), np.sin(angle)


def rotate(x, cos, sin):
    """RoPE on the pairs (j, j + e / 2) of x (..., t, e). With -sin: its transpose."""
    x1, x2 = np.split(x, 2, -1)
    y = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return np.concatenate(y, -1).astype(x.dtype)


def log_softmax(x):
    """x - log(sum(e^x)) over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def attention(x, w, model, rope, attend):
    """Attn(x) (b, t, d), and what its gradient needs. attend (t, t): row may see column."""
    cast = model.cast
    q = cast(einsum("btd,kged->bkgte", x, w.q))
    k = cast(einsum("btd,ked->bkte", x, w.k))
    v = cast(einsum("btd,ked->bkte", x, w.v))
    if model.config.model_type == "qwen3":
        q, k = norm(q, w.q_norm, model), norm(k, w.k_norm, model)
    q, k = rotate(q, *rope), rotate(k, *rope)
    scores = einsum("bkgte,bkse->bkgts", q, k) / math.sqrt(w.q.shape[2])
    p = np.exp(log_softmax(np.where(attend, scores, -np.inf)))
    heads = cast(einsum("bkgts,bkse->bkgte", p, v))
    y = cast(einsum("bkgte,kged->btd", heads, w.o))
    return y, {"q": q, "k": k, "v": v, "softmax": p, "heads": heads}


def attention_back(dy, w, rope, tape):
    """dx (b, t, d) of Attn; einsum's letters say over what each gradient is summed."""
    p, (cos, sin) = tape.softmax, rope
    dheads = einsum("btd,kged->bkgte", dy, w.o)
    dv = einsum("bkgts,bkgte->bkse", p, dheads)
    dp = einsum("bkgte,bkse->bkgts", dheads, tape.v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / math.sqrt(w.q.shape[2])
    dq = rotate(einsum("bkgts,bkse->bkgte", ds, tape.k), cos, -sin)
    dk = rotate(einsum("bkgts,bkgte->bkse", ds, tape.q), cos, -sin)
    dx = einsum("bkgte,kged->btd", dq, w.q) + einsum("bkte,ked->btd", dk, w.k)
    return dx + einsum("bkte,ked->btd", dv, w.v)


def ffn(x, w, model):
    """W_down (silu(W_gate x) * W_up x), and what its gradient needs."""
    cast = model.cast
    gate, up = cast(x @ w.gate_proj.T), cast(x @ w.up_proj.T)
    inner = cast(cast(gate * sigmoid(gate)) * up)
    return cast(inner @ w.down_proj.T), {"gate": gate, "up": up, "inner": inner}


def ffn_back(dy, w, tape):
    """dx of the FFN."""
    gate, s = tape.gate, sigmoid(tape.gate)
    dinner = dy @ w.down_proj
    dgate = dinner * tape.up * s * (1 + gate * (1 - s))
    return dgate @ w.gate_proj + dinner * gate * s @ w.up_proj


def forward(model, tokens, z=1, positions=None, attend=None):
    """Hidden states (b, t, d), and a tape: each block's x, norm, output y, and what it needs."""
    t, c, tape = tokens.shape[1], model.config, []
    rope = rope_angles(c, np.arange(t) if positions is None else positions)
    attend = np.tri(t, dtype=bool) if attend is None else attend
    x = model.W["model.embed_tokens.weight"][tokens]
    z = z * np.ones((len(tokens), 2 * c.num_hidden_layers), x.dtype)
    for i, z_i in enumerate(model.cast(z).T[..., None, None]):
        w = model.layer(i // 2)
        weight = w.post_attention_layernorm if i % 2 else w.input_layernorm
        n = norm(x, weight, model)
        y, saved = ffn(n, w, model) if i % 2 else attention(n, w, model, rope, attend)
        tape.append(SimpleNamespace(x=x, norm=n, y=y, weight=weight, w=w, rope=rope, **saved))
        x = model.cast(x + z_i * y)
    tape.append(SimpleNamespace(x=x))
    return norm(x, model.W["model.norm.weight"], model), tape


def head(model):
    """(v, d): lm_head, or the embedding where the two are tied."""
    return model.W.get("lm_head.weight", model.W["model.embed_tokens.weight"])


# ---------------------------------------------------------------------------- training, Eq. 8


def next_log_p(model, hidden, tokens):
    """log P (b, t - 1) of every token after the first."""
    table = log_softmax(hidden[:, :-1] @ head(model).T)
    return np.take_along_axis(table, tokens[:, 1:, None], -1)[..., 0]


def lm_gradient(model, texts, z):
    """The mean loss of all predicted tokens; its gradient by z (b, B); by x after each block."""
    t = max(map(len, texts))
    tokens = np.array([x + [0] * (t - len(x)) for x in texts])
    real = np.arange(1, t) < np.array([[len(x)] for x in texts])
    hidden, tape = forward(model, tokens, z)
    targets = tokens[:, 1:][real]                                 # (m,)
    n = np.arange(len(targets))
    log_p = log_softmax(hidden[:, :-1][real] @ head(model).T)     # (m, v)
    dlogits = np.exp(log_p)
    dlogits[n, targets] -= 1
    dx = np.zeros_like(hidden)
    dx[:, :-1][real] = dlogits @ head(model) / len(n)
    dx = norm_back(dx, tape[-1].x, model.W["model.norm.weight"], model)
    dz, dxs = np.zeros_like(z), []
    for i in reversed(range(z.shape[1])):
        dxs.insert(0, dx)
        if z[:, i].any():                                         # else closed: no gradient
            at = tape[i]
            dz[:, i] = (dx * at.y).sum((1, 2))
            dy = z[:, i, None, None] * dx
            dn = ffn_back(dy, at.w, at) if i % 2 else attention_back(dy, at.w, at.rope, at)
            dx = dx + norm_back(dn, at.x, at.weight, model)
    return -log_p[n, targets].mean(), dz, np.array(dxs)


def train_mask(model, given, us):
    """log_alpha and lambdas before each step and at the end; t and the loss of each; us: its u."""
    s_target, b = given.s_target, given.batch_size
    steps, _, B = us.shape
    log_alpha = np.zeros((steps + 1, B), us.dtype) + math.log((1 - s_target) / s_target)
    lambdas = np.zeros((steps + 1, 2), us.dtype)
    gradients, ascents, ts, losses = (np.zeros_like(x[1:]) for x in
                                      (log_alpha, lambdas, lambdas[:, 0], lambdas[:, 0]))
    for i, u in enumerate(us):
        done = i / steps
        z, slope = sample_z(log_alpha[i], u, "paper")
        p, dp = prob_zero(log_alpha[i], "paper")
        ts[i] = (1 - done) * (1 - z.mean()) + done * p.mean()
        _, (dt, *ascents[i]) = lagrangian(ts[i], s_target, *lambdas[i])
        losses[i], dz, _ = lm_gradient(model, given.texts[i * b:][:b], z)
        dz = dz - dt * (1 - done) / z.size
        gradients[i] = (dz * slope).sum(0) + dt * done * dp / B
        lr = given.lr * min(1, (1 - done) / 0.4)
        log_alpha[i + 1] = log_alpha[i] - lr * adam(gradients[:i + 1])
        lambdas[i + 1] = lambdas[i] + given.lr_lambda * adam(ascents[:i + 1])
    return log_alpha, lambdas, ts, losses


# ---------------------------------------------------------------------------- scores


def pack(context, choices):
    """read (t, 3), a token's id, position and branch; predictors; and attend (t, t)."""
    n = len(context)
    read, predictors = [(x, i, 0) for i, x in enumerate(context)], []
    for c, y in enumerate(choices, 1):
        predictors += [n - 1, *range(len(read), len(read) + len(y) - 1)]
        read += [(x, n + i, c) for i, x in enumerate(y[:-1])]
    read = np.array(read)
    q, k = read[:, 2, None], read[:, 2]
    return read, np.array(predictors), np.tril((k == 0) | (k == q))


def log_p(model, context, choices, z=1):
    """log P of each choice after the context, in one sequence; if one is too long, each alone."""
    longest = model.config.max_position_embeddings
    if len(context) + max(map(len, choices)) - 1 <= longest:
        return packed(model, context, choices, z)
    found = []
    for y in choices:
        whole = (context + y)[-longest - 1:]
        n = max(1, len(whole) - len(y))
        found += packed(model, whole[:n], [whole[n:]], z)
    return found


def packed(model, context, choices, z):
    """log P of each choice, all in one sequence."""
    read, predictors, attend = pack(context, choices)
    hidden, _ = forward(model, read[None, :, 0], z, read[:, 1], attend)
    table = log_softmax(hidden[0, predictors] @ head(model).T)
    values = iter(table[np.arange(len(table)), sum(choices, [])])
    return [sum(float(next(values)) for _ in y) for y in choices]


def right(choices, gold, loglik):
    """acc and acc_norm: has the gold choice the largest log P, and log P a character?"""
    characters = [len(choice) for choice in choices]
    best = np.argmax([loglik, np.divide(loglik, characters)], 1)
    return best == gold


def generate(model, prompt, longest, z=1):
    """The likeliest ids after the prompt, one by one, EOS the last, `longest` with the prompt."""
    tokens = list(prompt)
    while len(tokens) < longest:
        hidden, _ = forward(model, np.array([tokens]), z)
        tokens.append(int((head(model) @ hidden[0, -1]).argmax()))
        if tokens[-1] == model.config.eos_token_id:
            break
    return tokens[len(prompt):]


def flops(c, t, z, qkv_always):
    """2 a multiply-add of the matmuls; a skipped attention is free, or pays q, k and v."""
    d, d_q = c.hidden_size, c.num_attention_heads * c.head_dim
    d_kv = c.num_key_value_heads * c.head_dim
    attentions, ffns = z[0::2].sum(), z[1::2].sum()
    qkv = 2 * t * d * (d_q + 2 * d_kv) * (len(z) // 2 if qkv_always else attentions)
    scores_and_o = 4 * t * t * d_q + 2 * t * d_q * d
    rest = 6 * t * d * c.intermediate_size * ffns + 2 * t * d * c.vocab_size
    return qkv + attentions * scores_and_o + rest
