"""What a port writes for check.py, here numpy_port.py: the model of a port's own script.

Run:  python tests/golden/port/write.py FOLDER && python tests/golden/port/check.py FOLDER
"""
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent


def gate_vectors(port, x, given):
    """Gates, hardening, Adam."""
    u, log_alpha, out = port.sample_u(x["gates.fraction"]), x["gates.log_alpha"], {}
    for gate in port.GATES:
        z, slope = port.sample_z(log_alpha, u, gate)
        p, dp = port.prob_zero(log_alpha, gate)
        dz = (slope * x["gates.upstream"]).sum(0)
        out |= {f"z.{gate}": z, f"dz.{gate}": dz, f"zero.{gate}": p, f"dzero.{gate}": dp}
    number = given.lagrangian
    L_s, dL_s = port.lagrangian(number.t, number.s_target, number.lambda_1, number.lambda_2)
    g = x["adam.gradient"]
    steps = np.array([port.adam(g[:i + 1]) for i in range(len(g))]).cumsum(0) * given.adam.lr
    return out | {
        "gates.u": u, "clip.slope": port.passes(x["clip.s_bar"]), "lagrangian": [L_s],
        "dlagrangian": dL_s, "shares": [port.whole_share(*pair) for pair in given.shares],
        "adam.descends": -steps, "adam.ascends": steps,
    }


def cost_vectors(port, x, given, c):
    """FLOPs, and masks by them."""
    out, one, z = {}, np.eye(8), x["llama.hard_z"]
    for rule in "free", "table2":
        always, both = rule == "table2", (one[0] >= 0, z)
        rows = [[port.flops(c, t, row, always) for row in both] for t in given.flops.t]
        out[f"flops.{rule}"] = rows
    t = given.harden.length
    nothing = port.flops(c, t, one[0] * 0, False)
    cost = np.array([port.flops(c, t, row, False) - nothing for row in one])
    cost = cost / cost.sum()
    for name, value in ("blocks", one[0] * 0 + 1 / 8), ("flops", cost):
        out[f"harden.{name}"] = port.harden(x["harden.log_alpha"], value, given.harden.share)
    return out | {"cost.flops": cost}


def cluster_vectors(port, x):
    """k-means and routing."""
    e, draws = x["kmeans.e"], x["kmeans.draws"]
    starts, p = port.plus_plus(e, draws[0])
    out = {"starts": starts, "starts.p": p, "route.k": port.route(x["route.e"], x["route.mu"])}
    for name, found in (
        ("tied", port.nearest(x["tied.e"], x["tied.mu"])), ("nearest", port.nearest(e, starts)),
    ):
        out |= {f"{name}.labels": found[0], f"{name}.distance": found[1]}
    for name, (mu, labels, inertia) in (
        ("lloyd", port.lloyd(e, starts)), ("empty", port.lloyd(x["empty.e"], x["empty.mu"])),
        ("kmeans", port.kmeans(e, draws)),
    ):
        out |= {f"{name}.mu": mu, f"{name}.labels": labels, f"{name}.inertia": [inertia]}
    return out


def forward_vectors(port, x, model, name):
    """One dense forward with all that is between, and others by their z."""
    tokens = x[f"{name[:5].replace('bf16', 'llama')}.tokens"]
    hidden, tape = port.forward(model, tokens)
    at, then = tape[0], tape[1]
    out = {
        "rope": at.rope, "x0": at.x, "norm": at.norm, "q": joined(at.q), "k": at.k, "v": at.v,
        "softmax": joined(at.softmax), "heads": joined(at.heads), "attention": at.y, "x1": then.x,
        "inner": then.inner, "ffn": then.y, "x": [block.x for block in tape], "hidden": hidden,
        "logits": hidden @ port.head(model).T,
        "log_p": port.next_log_p(model, hidden, tokens)[0],
    }
    if name != "qwen3":
        out["z"] = model.cast(x["llama.soft_z"])
        out |= {z: port.forward(model, tokens, x[f"llama.{z}"])[0]
                for z in ("hard_z", "row_z", "soft_z")}
    return {f"{name}.{key}": value for key, value in out.items()}


def joined(x):
    """(b, k, g, t, n) -> (b, h, t, n)."""
    return x.reshape(len(x), -1, *x.shape[3:])


def use_vectors(port, x, given, model):
    """Losses, training, choices, texts."""
    z = x["llama.hard_z"]
    loss, dz, dx = port.lm_gradient(model, given.loss.texts, x["loss.z"])
    log_alpha, lambdas, t, lm = port.train_mask(model, given.train, x["train.u"])
    cost = np.ones(8) / 8
    out = {
        "loss": [loss], "loss.dz": dz, "loss.dx": dx,
        "train.z": port.harden(log_alpha[-1], cost, port.whole_share(given.train.s_target, 8)),
        "right": [port.right(q.choices, q.gold, q.log_p) for q in given.questions],
        "perplexity": [np.exp(-sum(given.perplexity.log_p) / sum(given.perplexity.tokens))],
    }
    for key, rows in ("log_alpha", log_alpha), ("lambdas", lambdas), ("t", t), ("loss", lm):
        out |= {f"train.{key}.{step}": row[None] for step, row in enumerate(rows)}
    packing = port.pack(*given.groups[0])
    for key, value in zip(("read", "predictors", "attend"), packing, strict=True):
        out[f"choices.{key}"] = value
    text = given.generate
    for names, mask in (("log_p", "dense"), 1), (("masked", "masked"), z):
        found = [port.log_p(model, *group, mask) for group in given.groups]
        out[f"choices.{names[0]}"] = sum(found, [])
        out[f"generate.{names[1]}"] = port.generate(model, text.prompt, text.longest, mask)
    return out


def parts(port, dtype):
    """Yields name -> array, part by part in the manifest's order; bf16 is made of float32."""
    x, given = load_file(HERE / "inputs.safetensors"), port.read_json(HERE / "inputs.json")
    x = {name: a.astype(dtype) if a.dtype == np.float32 else a for name, a in x.items()}
    llama = port.open_model("llama", dtype)
    yield gate_vectors(port, x, given)
    yield cost_vectors(port, x, given, llama.config)
    yield cluster_vectors(port, x)
    yield forward_vectors(port, x, llama, "llama")
    yield forward_vectors(port, x, port.open_model("qwen3", dtype), "qwen3")
    yield forward_vectors(port, x, port.open_model("llama", np.float32, port.bf16), "bf16")
    yield use_vectors(port, x, given, llama)


def vectors(port, dtype):
    """Name -> array, of all that manifest.json has."""
    found = {}
    for part in parts(port, dtype):
        found |= part
    names = [row.name for row in port.read_json(HERE / "manifest.json").vectors]
    return {name: np.ascontiguousarray(found[name]) for name in names}


if __name__ == "__main__":
    import numpy_port
    save_file(vectors(numpy_port, np.float32), Path(sys.argv[1]) / "port.safetensors")
