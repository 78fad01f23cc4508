"""docs/results.md and its figures, from the files of `python tests/study.py results`.

The page's words are in results.in.md; what was measured is put in here. Only study.py imports this.
Dims: B blocks, N clusters; loss is -log P in nats, n predicted tokens, both (texts,).
"""
import itertools
import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import evaluate
import hub
import model as llm
from run import once

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "igp", "svg.fonttype": "none",                # the same bytes every time
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "text.color": "#808080", "axes.labelcolor": "#808080", "axes.edgecolor": "#808080",
    "xtick.color": "#808080", "ytick.color": "#808080", "legend.frameon": False,
}
TICKS = (30, 40, 60, 80, 100, 150)  # of perplexity
OURS = ("static", "igp")
RIVALS = ("sleb", "shortened-ppl", "shortened-taylor", "shortened-magnitude", "evopress")
NAMES = OURS + RIVALS
COLOURS = dict(zip(NAMES, ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#8c6d31",
                           "#56b4e9"), strict=True))

# as its config.json has it
LLAMA3_8B = llm.Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 5e5, None, False,
                       (128001,))

# ------------------------------------------------------------------ what the files hold


def row(out, run, name):
    """What igp.py knows of a method of a run: masks, FLOPs, perplexity, log P of each text."""
    [found] = once(out / run / f"{name}.json")
    return found


def best_rival(out, run):
    """The `row` of the rival with the lowest perplexity."""
    return min((row(out, run, name) for name in RIVALS), key=lambda found: found["ppl"])


def hits(out, run, name):
    """task -> 0 or 1 of each question, by acc_norm, or acc where there is no other."""
    found = {}
    for task in evaluate.FIELDS:
        path = out / run / f"{name}-{task}.jsonl"
        if path.exists():
            lines = once(path)
            key = "acc" if lines[0]["acc_norm"] is None else "acc_norm"
            found[task] = np.array([line[key] for line in lines])
    return found


def loss_of(found):
    """(loss, n) of a `row`."""
    return -np.array(found["loglikelihood"]), np.array(found["tokens"])


def gap(loss, other, n):
    """How many nats a token a loss is above another one on the same texts; its standard error."""
    gaps = (loss - other) / n.mean()
    return gaps.mean(), gaps.std(ddof=1) / math.sqrt(len(gaps))


def points(own, other):
    """The same of two averages of tasks, in points: the questions are the same."""
    gaps = [100.0 * (own[task] - other[task]) for task in own]
    means = [x.mean() for x in gaps]
    errors = [x.var(ddof=1) / len(x) for x in gaps]
    return np.mean(means), math.sqrt(sum(errors)) / len(gaps)


def signed(value, digits=3):
    """A difference and its standard error, as they are printed."""
    mean, error = value
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"


def average(scores):
    """The mean of the tasks, in percent."""
    return np.mean([100 * x.mean() for x in scores.values()])


def perplexity(found):
    """exp(loss / n) of one kind's texts."""
    return math.exp(sum(found["loss"]) / sum(found["tokens"]))


# ------------------------------------------------------------------ methods


def rivals_line(out):
    """FLOPs (rising) and log perplexity of dense and of the best rival at 8, 16 and 22 blocks."""
    best = [row(out, "16", "dense")] + [best_rival(out, run) for run in ("8", "16", "22")]
    line = sorted((found["flops_ratio"], math.log(found["ppl"])) for found in best)
    return zip(*line, strict=True)


def methods(out, all_seeds):
    """A line a method and number of blocks."""
    whole = row(out, "16", "dense")
    flops, logs = rivals_line(out)
    first = {"blocks": 0, "method": "dense", "perplexity": f"{whole['ppl']:.2f}", "FLOPs": "100%"}
    table = [first]
    for run in ("8", *repeats("16", all_seeds), "22", "16-flops"):
        blocks = run.split("-")[0]
        for name in NAMES if run == blocks else OURS:
            found = row(out, run, name)
            loss, n = loss_of(found)
            z = 1 - np.array(found["z"])
            line = {
                "blocks": run.replace("-flops", " by FLOPs").replace("-seed-", ", seed "),
                "method": name,
                "perplexity": f"{found['ppl']:.2f}",
                "attention": f"{z[:, 0::2].sum(1).mean():.3g}",
                "FFN": f"{z[:, 1::2].sum(1).mean():.3g}",
                "FLOPs": f"{found['flops_ratio']:.1%}",
                "forward tokens": found["forward_tokens"],
            }
            for rival in ("sleb", "static"):
                other = row(out, blocks if rival == "sleb" else run, rival)
                if name != rival:
                    line[f"above {rival}"] = signed(gap(loss, loss_of(other)[0], n))
            if name in OURS:
                on_line = np.interp(found["flops_ratio"], flops, logs)
                line["above the rivals' line"] = f"{math.log(found['ppl']) - on_line:+.3f}"
            if name == "igp":
                line["FLOPs + router"] = f"{found['flops_ratio_with_router']:.1%}"
            table.append(line)
    return columns(table)


def columns(table):
    """A Markdown table with every column that any line has, "-" where a line lacks it."""
    head = dict.fromkeys(key for line in table for key in line)
    return evaluate.markdown([dict.fromkeys(head, "-") | line for line in table])


def chance(out):
    """task -> what guessing scores: of each question 1 / its choices."""
    asked = {task: once(out / "16" / f"dense-{task}.jsonl") for task in evaluate.FIELDS}
    return {task: np.array([1 / len(line["loglikelihood"]) for line in lines])
            for task, lines in asked.items()}


def tasks(out):
    """A line a method that was asked, with what sets it apart from SLEB and static."""
    dense, guessed = hits(out, "16", "dense"), chance(out)
    asked = [("16", "chance", guessed), ("16", "dense", dense)]
    for run in ("16", "16-flops", "8", "22"):
        asked += [(run, name, hits(out, run, name)) for name in NAMES]
    table = []
    for run, name, own in asked:
        if own:
            whole = name in ("chance", "dense")
            line = {"blocks": "-" if whole else run.replace("-flops", " by FLOPs"), "method": name}
            line |= {task: f"{100 * x.mean():.1f}" for task, x in own.items()}
            line["average"] = f"{average(own):.2f}"
            line["% of dense"] = f"{100 * average(own) / average(dense):.1f}"
            above = (average(own) - average(guessed)) / (average(dense) - average(guessed))
            line["% of dense above chance"] = f"{100 * above:.0f}"
            for rival in ("sleb", "static"):
                place = run.removesuffix("-flops") if rival == "sleb" else run
                other = hits(out, place, rival)
                if other and not whole and name != rival:
                    line[f"above {rival}"] = signed(points(own, other), 1)
            table.append(line)
    return columns(table)


def repeats(run, all_seeds):
    """The folders of a run with every seed."""
    return [run, *(f"{run}-seed-{seed}" for seed in all_seeds[1:])]


# ------------------------------------------------------------------ kinds of text


def mask_of(out, kind, samples, seed):
    """Of a mask of one kind of text: z (B,), its `study.losses`, and its own loss swapped."""
    before, after, _ = once(out / f"{kind}-{samples}-{seed}.json")
    return np.array(before["z"]), before["losses"], after["losses"][kind]


def kinds(out, samples, names, all_seeds):
    """Perplexity of each kind of text (row) under the masks of each (column), a seed each."""
    [whole] = once(out / "dense.json")
    table = []
    for kind in names:
        line = {"perplexity on": kind, "dense": f"{perplexity(whole[kind]):.2f}"}
        for own in names:
            ppl = [mask_of(out, own, samples, seed)[1][kind] for seed in all_seeds]
            cell = ", ".join(f"{perplexity(x):.2f}" for x in ppl)
            line[f"{own}'s masks"] = f"**{cell}**" if own == kind else cell
        table.append(line)
    return evaluate.markdown(table)


def under(out, samples, seed, choice):
    """(loss, n) of texts; choice: [(kind of text, kind whose mask these run under), ...]."""
    found = [mask_of(out, own, samples, seed)[1][kind] for kind, own in choice]
    return [np.concatenate([x[key] for x in found]) for key in ("loss", "tokens")]


def lead(out, samples, own, rivals, all_seeds):
    """How far a choice of `under` is above the best of others, on average over seeds: as `gap`."""
    gaps = []
    for seed in all_seeds:
        loss, n = under(out, samples, seed, own)
        others = [under(out, samples, seed, choice)[0] for choice in rivals]
        gaps.append(loss - min(others, key=np.sum))
    return gap(np.mean(gaps, 0), 0, n)


def distance(out, samples, kind, other, all_seeds):
    """Blocks in which masks of two kinds differ, or of two seeds of one: the mean of all pairs."""
    found = []
    for i in all_seeds:
        for j in all_seeds:
            if kind != other or i < j:
                z = mask_of(out, kind, samples, i)[0] != mask_of(out, other, samples, j)[0]
                found.append(z.sum())
    return np.mean(found)


def pairs(out, samples, names, all_seeds):
    """A line a pair of kinds: how far apart their masks are, and what the own ones are worth."""
    table = []
    for kind, other in itertools.combinations_with_replacement(names, 2):
        apart = distance(out, samples, kind, other, all_seeds)
        line = {"kinds": f"{kind}, {other}", "blocks apart": f"{apart:.1f}"}
        if kind != other:
            own = [(kind, kind), (other, other)]
            guests = [[(kind, other)], [(other, kind)]]
            alone = [[(kind, one), (other, one)] for one in (kind, other)]
            for name, choice, rivals in (
                    ("first's own mask above second's", own[:1], guests[:1]),
                    ("second's above first's", own[1:], guests[1:]),
                    ("each its own above the better mask for all", own, alone)):
                line[name] = signed(lead(out, samples, choice, rivals, all_seeds))
        table.append(line)
    return columns(table)


def worth(out, samples, names, all_seeds):
    """Which pairs of kinds deserve two masks: on both, every own mask beats every other's."""

    def losses(own, kind):
        return [sum(mask_of(out, own, samples, seed)[1][kind]["loss"]) for seed in all_seeds]

    found = {True: [], False: []}
    for kind, other in itertools.combinations(names, 2):
        apart = distance(out, samples, kind, other, all_seeds)
        sure = all(max(losses(own, own)) < min(losses(rival, own))
                   for own, rival in ((kind, other), (other, kind)))
        found[sure].append((apart, f"{kind} and {other} ({apart:.1f} blocks apart)"))
    told = {sure: ", ".join(text for _, text in sorted(found[sure])) or "none" for sure in found}
    return f"{told[True]}; all others: {told[False]}"


def routings(rows):
    """One line: perplexity under routings of a run's masks, and how far the router's is above some.

    The best single mask is that of the lowest perplexity on these very texts, so that routing has
    no easier rival. The random mask is the router's choice with the texts shuffled, on average:
    as often the same masks, but not for the right texts.
    """
    loss = {found["name"]: loss_of(found)[0] for found in rows}
    n = np.array(rows[0]["tokens"])
    masks = np.array([x for name, x in loss.items() if name.startswith("igp-mask-")])
    [k] = [found["cluster"] for found in rows if found["name"] == "igp"]
    often = np.bincount(k, minlength=len(masks)) / len(k)         # (N,)
    [z] = [np.array(found["z"]) for found in rows if found["name"] == "igp"]
    apart = [(a != b).sum() for a, b in itertools.combinations(z, 2)]
    home = [masks[:, np.equal(k, c)].sum(1).argmin() == c for c in range(len(z))]
    ways = {
        "router": loss["igp"],
        "best single mask": min(masks, key=np.sum),
        "random mask": often @ masks,
        "oracle": masks.min(0),
    }
    ways |= {name: loss[name] for name in ("static", "dense") if name in loss}
    line = {name: f"{evaluate.perplexity(-x, n):.2f}" for name, x in ways.items()}
    for name in ("random mask", "best single mask", "static"):
        if name in ways:
            line[f"router above {name}"] = signed(gap(loss["igp"], ways[name], n))
    line["blocks apart"] = f"{np.mean(apart):.3g}"
    line["best at home"] = f"{sum(home)} of {len(z)}"
    return line


def routed(out, run):
    """`routings` of a run's files."""
    names = [path.stem for path in sorted((out / run).glob("igp*.json"))]
    names += [name for name in ("dense", "static") if (out / run / f"{name}.json").exists()]
    return routings([row(out, run, name) for name in names])


def swaps(out, counts, names, all_seeds):
    """What one swap after the training does to a kind's own perplexity."""
    table = []
    for samples, kind in itertools.product(counts, names):
        line = {"samples": samples, "kind": kind}
        for seed in all_seeds:
            _, losses, swapped = mask_of(out, kind, samples, seed)
            ppl = perplexity(losses[kind]), perplexity(swapped)
            line[f"seed {seed}"] = " -> ".join(f"{x:.2f}" for x in ppl)
        table.append(line)
    return evaluate.markdown(table)


def recipes(out, files, all_seeds):
    """A line a recipe: perplexity of FineWeb-Edu's texts, and gates that no text of a step opens.

    files: recipe -> the beginning of its files' names.
    """
    table = []
    for name, file in files.items():
        ppl, closed = [], []
        for seed in all_seeds:
            before, _, trace = once(out / f"{file}-{seed}.json")
            ppl.append(perplexity(before["losses"]["FineWeb-Edu"]))
            last = np.array(trace)[-len(trace) // 10:]            # the last tenth of the steps
            closed.append(last[:, 3].mean())
        table.append({
            "recipe": name,
            "perplexity": ", ".join(f"{x:.2f}" for x in ppl),
            "closed gates at the end": ", ".join(f"{x:.1f}" for x in closed),
        })
    return evaluate.markdown(table)


# ------------------------------------------------------------------ figures


def figure_costs(out, all_seeds, path):
    """Perplexity against FLOPs."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    axes.set(yscale="log", xlabel="FLOPs, % of the dense model", ylabel="perplexity (log)")
    axes.minorticks_off()
    axes.set_yticks(TICKS, map(str, TICKS))
    whole, worst = row(out, "16", "dense"), row(out, "22", "static")
    axes.set_ylim(0.9 * whole["ppl"], 1.5 * worst["ppl"])
    axes.plot(100, whole["ppl"], "*", color="#808080", markersize=14, label="dense")
    for name in NAMES:
        found = [row(out, run, name) for run in ("8", "16", "22")]
        x, y = [100 * one["flops_ratio"] for one in found], [one["ppl"] for one in found]
        axes.plot(x, y, "o-", color=COLOURS[name], label=name, markersize=5)
        if name in OURS:
            for run in repeats("16", all_seeds)[1:]:
                again = row(out, run, name)
                axes.plot(100 * again["flops_ratio"], again["ppl"], "x", color=COLOURS[name])
            flops = row(out, "16-flops", name)
            axes.plot(100 * flops["flops_ratio"], flops["ppl"], "s", color=COLOURS[name])
        if name == "igp":
            x = [100 * one["flops_ratio_with_router"] for one in found]
            axes.plot(x, y, "o:", color=COLOURS[name], markerfacecolor="none",
                      label="igp, with the router's FLOPs")
    axes.legend(loc="lower left")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def figure_masks(out, path):
    """The masks of several runs, as in the paper's Fig. 4: FFN above, attention below."""
    runs = {"demo": "demo, 15 of 60", "16": "FineWeb-Edu, 16 of 60", "mixture": "four kinds, 16"}
    figure = Figure(figsize=(10, 3.5))
    axes = figure.subplots(2, len(runs), sharex=True)
    for column, (run, title) in enumerate(runs.items()):
        z = np.array(row(out, run, "igp")["z"])                   # (N, B)
        for j, kind in enumerate(("attention", "FFN")):
            panel = axes[1 - j][column]
            panel.pcolormesh(z[::-1, j::2], cmap="cividis_r", vmin=-0.4, vmax=1.2, edgecolors="w")
            panel.set(yticks=[], ylabel=kind if column == 0 else "")
        axes[0][column].set_title(title)
        axes[1][column].set_xlabel("layer")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def figure_training(out, file, s_target, path):
    """One mask's training: L_LM, t and lambda_1."""
    *_, trace = once(out / file)
    steps = np.array(trace)                                       # (steps, 4)
    figure = Figure(figsize=(8, 6))
    axes = figure.subplots(3, 1, sharex=True)
    names = ("L_LM of a step, nats a token", "t of Eq. 7", "lambda_1")
    for i, name in enumerate(names):
        axes[i].plot(steps[:, i], color=COLOURS["static"], linewidth=1)
        axes[i].set_ylabel(name)
    axes[1].axhline(s_target, color=COLOURS["igp"], linestyle="--", label="s_target")
    axes[1].legend()
    axes[2].set_xlabel("step")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


# ------------------------------------------------------------------ beside the paper

# Table 1's averages in percent of dense, and FLOPs: Table 2 for IG-Pruning, model.flops for layers.
PAPER = """\
| model | sparsity | IG-Pruning | its FLOPs | best rival | SLEB | Shortened LLaMA | EvoPress | \
their FLOPs |
|---|---|---|---|---|---|---|---|---|
| Llama-3-8B | 12.5 % | 98.29 | 96.7 % | 91.93 | 90.42 | 85.64 | 91.93 | 88.3 % |
| Llama-3-8B | 25 % | 87.18 | 89.8 % | 76.32 | 75.04 | 75.01 | 76.32 | 76.6 % |
| Llama-3-8B | 37.5 % | 69.51 | 75.8 % | 65.61 | 65.61 | 64.02 | 65.26 | 64.9 % |
| Qwen3-8B | 13.9 % | 96.01 | - | 90.37 | 90.09 | 87.49 | 90.37 | - |
| Qwen3-8B | 25 % | 86.35 | - | 81.29 | 80.62 | 78.56 | 81.29 | - |
| Qwen3-8B | 36.1 % | 71.96 | - | 68.82 | 68.82 | 62.48 | 68.18 | - |"""


def beside(out):
    """Our igp and best rival as a line of the paper's table."""
    dense, table = average(hits(out, "16", "dense")), []
    for run, share in (("8", "13.3 %"), ("16", "26.7 %"), ("22", "36.7 %")):
        line = {"model": "SmolLM2-135M", "sparsity": share}
        own, rivals = hits(out, run, "igp"), {}
        for name in RIVALS:
            found = hits(out, run, name)
            if found:
                rivals[name] = 100 * average(found) / dense
        if own:
            line["igp"] = f"{100 * average(own) / dense:.2f}"
            line["its FLOPs"] = f"{row(out, run, 'igp')['flops_ratio']:.1%}"
        if rivals:
            best = max(rivals, key=rivals.get)
            line["best of the rivals asked"] = f"{rivals[best]:.2f} ({best}, of {len(rivals)})"
            line["igp above it, points"] = signed(points(own, hits(out, run, best)), 1)
        line["rivals' FLOPs"] = f"{row(out, run, 'sleb')['flops_ratio']:.1%}"
        table.append(line)
    return columns(table)


# ------------------------------------------------------------------ the page


def glance(out):
    """What a reader with two minutes takes away: dense, ours and the best rivals at 16 blocks."""
    low = best_rival(out, "16")["name"]
    high = max(RIVALS, key=lambda name: average(hits(out, "16", name)))
    ours = [(run, name) for run in ("16", "16-flops") for name in OURS]
    empty = dict.fromkeys(("FLOPs", "with the router", "perplexity"), "-")
    table = [{"method": "guessing"} | empty | {"tasks, %": f"{average(chance(out)):.2f}"}]
    for run, name in dict.fromkeys((("16", "dense"), *ours, ("16", low), ("16", high))):
        found, scores = row(out, run, name), hits(out, run, name)
        line = {
            "method": f"{name} by FLOPs" if run == "16-flops" else name,
            "FLOPs": f"{found['flops_ratio']:.1%}",
            "with the router": f"{found['flops_ratio_with_router']:.1%}",
            "perplexity": f"{found['ppl']:.2f}",
            "tasks, %": f"{average(scores):.2f}",
        }
        loss, n = loss_of(found)
        if name != low:
            other, _ = loss_of(row(out, "16", low))
            line[f"nats above {low}"] = signed(gap(loss, other, n))
        if name != high:
            above = points(scores, hits(out, "16", high))
            line[f"points above {high}"] = signed(above, 1)
        table.append(line)
    return columns(table)


def summary(out, all_seeds):
    """The same for other budgets and seeds."""
    lines = []
    for run in ("8", "16", "22"):
        again = repeats(run, all_seeds) if run == "16" else [run]
        told = []
        for name in OURS:
            ppl = [f"{row(out, x, name)['ppl']:.2f}" for x in again]
            told.append(f"{name} {', '.join(ppl)}")
        best = best_rival(out, run)
        told.append(f"the best rival, {best['name']}, {best['ppl']:.2f}")
        lines.append(f"Perplexity with {run} of 60 blocks skipped: {'; '.join(told)}.")
    return "\n".join(f"* {line}" for line in lines)


def gains(out, all_seeds):
    """And for routing: a line a run of the runs that it is about."""
    wheres = {
        "code and Wikipedia, 15 of 60": repeats("demo", all_seeds),
        "FineWeb-Edu alone, 16 of 60": repeats("16", all_seeds),
        "four kinds in one, 16 of 60": ["mixture"],
    }
    table = []
    for where, runs in wheres.items():
        for seed, run in enumerate(runs):
            found = routed(out, run)
            line = {"texts": where, "seed": seed}
            for other in ("random mask", "best single mask", "static"):
                line[f"router above {other}"] = found[f"router above {other}"]
            table.append(line)
    return evaluate.markdown(table)


def router_of(out, config, larger):
    """The router's FLOPs on FineWeb-Edu's judging texts, in percent of a larger model's dense ones.

    config: of the model that the files are about.
    """
    found = row(out, "16", "igp")
    share = found["flops_ratio_with_router"] - found["flops_ratio"]
    own, wanted = (sum(llm.flops(x, n) for n in found["tokens"]) for x in (config, larger))
    return f"{share * own / wanted:.2%}"


def block(lines):
    """Printed text as it is."""
    return "```\n" + "\n".join(lines) + "\n```"


def write(out, plan, docs):
    """results.md and its three figures in the folder docs; plan: the module study."""
    figure_costs(out, plan.SEEDS, docs / "costs.svg")
    figure_masks(out, docs / "masks.svg")
    figure_training(out, f"FineWeb-Edu-{plan.SAMPLES[-1]}-0.json", plan.SHARES["16"],
                    docs / "training.svg")
    few, many = plan.SAMPLES
    [stamp] = once(out / "stamp.json")
    own = llm.read_config(hub.model_folder(hub.EMBEDDED))
    demo, bench, scoring, mixture = (
        once(out / f"{name}.json") for name in ("timed", "bench", "scoring", "mixture"))
    runs = []
    for run in ("demo-8", "demo", "demo-22", "8", "16", "22"):
        runs += repeats(run, plan.SEEDS) if run in plan.AGAIN else [run]
    ways = {
        "t moves (igp.train_mask)": f"FineWeb-Edu-{few}",
        "t = 1 - mean(z) throughout": "sampled",
        "t = P(z = 0) throughout": "closed",
        "Louizos' form of Eq. 4": "louizos",
    }
    words = Path(__file__).with_name("results.in.md").read_text(encoding="utf-8")
    page = words.format(
        **stamp, router_of_8b=router_of(out, own, LLAMA3_8B),
        few=few, many=many, few_tokens=48 * few, many_tokens=48 * many, each=plan.EACH,
        glance=glance(out), summary=summary(out, plan.SEEDS),
        gains=gains(out, plan.SEEDS), methods=methods(out, plan.SEEDS), tasks=tasks(out),
        few_kinds=kinds(out, few, plan.KINDS, plan.SEEDS),
        many_kinds=kinds(out, many, plan.KINDS, plan.SEEDS),
        few_worth=worth(out, few, plan.KINDS, plan.SEEDS),
        many_worth=worth(out, many, plan.KINDS, plan.SEEDS),
        few_pairs=pairs(out, few, plan.KINDS, plan.SEEDS),
        many_pairs=pairs(out, many, plan.KINDS, plan.SEEDS),
        routing=columns([{"run": run} | routed(out, run) for run in [*runs, "mixture"]]),
        swaps=swaps(out, plan.SAMPLES, plan.KINDS, plan.SEEDS),
        recipes=recipes(out, ways, plan.SEEDS),
        paper=PAPER, beside=beside(out), mixture=block(mixture[mixture.index("") + 1:]),
        demo=block(demo[1:]), minutes=f"{demo[0] / 60:.1f}",
        bench="\n".join(bench[1:] + scoring[5:]),                  # one head for both
    )
    (docs / "results.md").write_text(page, encoding="utf-8")
