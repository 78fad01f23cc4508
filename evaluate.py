"""Perplexity and zero-shot multiple choice, both from one sum: log P(continuation | context).

Source: the definitions of lm-evaluation-harness (acc, acc_norm, their standard errors), which
        Sec. 4.1 of IG-Pruning, arXiv:2511.02213, evaluates with.
Left out: the paper's six tasks; the one task here, wiki_what, needs no download.
Dims:   b batch, t tokens, d width, v vocabulary; B blocks; n requests, or positions.
"""
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from model import Transformer

BATCH_TOKENS = 4096  # tokens of one batch, padding included
HEAD_ROWS = 128      # positions that go through the head at a time: (128, v) float32 at most


def log_probs(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """log P(target) at each position, float32: hidden (n, d), targets (n,) -> (n,)."""
    parts = []
    for h, y in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        log_p = model.head(h).log_softmax(-1, dtype=torch.float32)  # (HEAD_ROWS, v)
        parts.append(log_p.gather(1, y[:, None])[:, 0])
    return torch.cat(parts)


@torch.inference_mode()
def loglikelihoods(model: Transformer, requests: list[tuple[list[int], list[int]]],
                   z: Tensor | None, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
    """log P(continuation | context), summed over the continuation's tokens, for each request.

    requests: (context ids, continuation ids), neither empty; of more than max_position_embeddings
    tokens the last ones are used. z None (dense) or boolean (n, B), one per request. Returns (n,)
    float64, in the order of the requests. Requests of equal z run together, longest first, padded
    on the right, which a causal model cannot see.
    """
    keys = ["" if z is None else z[r].numpy().tobytes() for r in range(len(requests))]
    length = [min(len(c) + len(y) - 1, model.config.max_position_embeddings) for c, y in requests]
    order = sorted(range(len(requests)), key=lambda r: (keys[r], -length[r]))
    out = np.zeros(len(requests))
    with tqdm(total=len(requests), desc="evaluation", leave=False, disable=None) as bar:
        while order:
            first = order[0]
            size = max(1, batch_tokens // length[first])
            batch = [r for r in order[:size] if keys[r] == keys[first]]
            order = order[len(batch):]
            same = None if z is None else z[first]
            out[batch] = _batch(model, [requests[r] for r in batch], same)
            bar.update(len(batch))
    return out


def _batch(model: Transformer, requests: list, z: Tensor | None) -> np.ndarray:
    """`loglikelihoods` of one batch: one forward, then the head on the continuations only."""
    device, longest = model.head_weight.device, model.config.max_position_embeddings
    inputs = [(c + y)[:-1][-longest:] for c, y in requests]       # the last token predicts nothing
    width = max(map(len, inputs))
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in inputs], device=device)
    hidden = model(tokens, z)                                     # (b, t, d)
    rows, kept = [], []
    for h, ids, (_, y) in zip(hidden, inputs, requests, strict=True):
        rows.append(h[max(0, len(ids) - len(y)):len(ids)])        # they predict y
        kept.append(y[len(y) - len(rows[-1]):])
    scores = log_probs(model, torch.cat(rows), torch.tensor(sum(kept, []), device=device))
    return np.array([part.sum() for part in scores.double().cpu().split([len(y) for y in kept])])


def perplexity(loglik: np.ndarray, n_tokens: np.ndarray) -> float:
    """exp(-sum of log-likelihoods / sum of predicted tokens): every token weighs the same."""
    return float(np.exp(-loglik.sum() / n_tokens.sum()))


# ---------------------------------------------------------------------------- multiple choice


@dataclass(frozen=True)
class Question:
    """A row of a zero-shot task: which of `choices` follows `context`? `gold` is its index."""

    context: str
    choices: list[str]
    gold: int


def choice_requests(question: Question, tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """(context ids, continuation ids) per choice, as lm-evaluation-harness cuts them.

    Context and " " + choice are encoded together and the context's own ids cut off in front, so
    that tokens may merge across the boundary.
    Silent: BOS. The tokenizer's own habit, as the harness does today.
    """
    context = tokenizer.encode(question.context).ids
    whole = [tokenizer.encode(f"{question.context} {choice}").ids for choice in question.choices]
    return [(context, ids[len(context):]) for ids in whole]


def multiple_choice(model: Transformer, tokenizer: Tokenizer, questions: list[Question],
                    z: Tensor | None) -> dict:
    """acc and acc_norm, 0-1, with standard errors, and n. z None or boolean (len(questions), B).

    acc: the gold choice has the largest log P; acc_norm: the largest log P / its characters.
    The first of equal maxima wins. Standard error sqrt(p (1 - p) / (n - 1)), nan for n = 1.
    Example: log P (-4, -6) of choices with 2 and 4 characters: acc picks the first (-4 > -6),
    acc_norm the second (-1.5 > -2).
    """
    requests = [choice_requests(question, tokenizer) for question in questions]
    n_choices = [len(group) for group in requests]
    repeat = None if z is None else z.repeat_interleave(torch.tensor(n_choices), dim=0)
    loglik = loglikelihoods(model, sum(requests, []), repeat)
    loglik = np.split(loglik, np.cumsum(n_choices)[:-1])
    right, right_norm = [], []
    for question, scores in zip(questions, loglik, strict=True):
        right.append(scores.argmax() == question.gold)
        per_character = scores / [len(choice) for choice in question.choices]
        right_norm.append(per_character.argmax() == question.gold)
    n = len(questions)
    out = {"acc": float(np.mean(right)), "acc_norm": float(np.mean(right_norm)), "n": n}
    for key in ("acc", "acc_norm"):
        p = out[key]
        out[f"{key}_stderr"] = (p * (1 - p) / (n - 1)) ** 0.5 if n > 1 else float("nan")
    return out


def wiki_what(articles: list[dict], judging: list[dict],
              generator: np.random.Generator) -> list[Question]:
    """What is {title}? The article's description against three others of the same topic.

    articles and judging: dicts with title, description, topic. Asked are the judging articles that
    have a topic and a description which does not repeat the title; distractors come from articles.
    """
    def usable(a: dict) -> bool:
        return (a["topic"] != "Uncategorized" and bool(a["description"])
                and a["title"].casefold() not in a["description"].casefold())

    pool = {}
    for article in filter(usable, articles):
        pool.setdefault(article["topic"], set()).add(article["description"])
    pool = {topic: sorted(descriptions) for topic, descriptions in pool.items()}
    questions = []
    for article in filter(usable, judging):
        others = [d for d in pool[article["topic"]] if d != article["description"]]
        if len(others) < 3:
            continue
        choices = [others[i] for i in generator.choice(len(others), 3, replace=False)]
        gold = int(generator.integers(4))
        choices.insert(gold, article["description"])
        questions.append(Question(f"Question: What is {article['title']}?\nAnswer:", choices, gold))
    return questions


# ---------------------------------------------------------------------------- the report


def markdown(head: list, rows: list[list]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def picture(z: Tensor) -> str:
    """Attention (A) and FFN (F) blocks from the first layer to the last: █ kept, · skipped."""
    return "  ".join(name + " " + "".join("·█"[kept] for kept in row.int())
                     for name, row in (("A", z[0::2]), ("F", z[1::2])))


def report(results: dict) -> str:
    """results.json as Markdown: methods, N x N matrix, clusters with their masks, seconds."""
    first, rows = results["rows"][0]["tasks"], []
    tasks = [task for task in first if all(task in row["tasks"] for row in results["rows"])]
    for row in results["rows"]:
        scores = [row["tasks"][task] for task in tasks]
        rows.append([
            row["name"], " ".join(map(str, row["attention_skipped"])) or "-",
            " ".join(map(str, row["ffn_skipped"])) or "-", f"{row['flops_ratio']:.1%}",
            f"{row['flops_ratio_with_router']:.1%}", f"{row['ppl']:.2f}",
            *(f"{100 * s['acc_norm']:.1f} ± {100 * s['acc_norm_stderr']:.1f}" for s in scores),
            row["training_tokens"], f"{row['seconds']:.0f}"])
    head = ["method", "skipped attention", "skipped FFN", "FLOPs", "FLOPs + router", "perplexity",
            *(f"{task} (n={first[task]['n']})" for task in tasks), "training tokens", "seconds"]
    parts = [markdown(head, rows)]
    if results["matrix"]:
        parts.append(cluster_report(results["clusters_found"], results["masks"]))
        sizes = [mask["judging_texts"] for mask in results["masks"]]
        parts.append(matrix_report(results["matrix"], sizes))
    spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in results["seconds"].items())
    parts.append(f"Seconds: {spent}; in all {sum(results['seconds'].values()):.0f}. Peak memory "
                 f"{results['peak_memory_bytes'] / 2**30:.1f} GiB.")
    return "\n\n".join(parts)


def cluster_report(found: list[dict], masks: list[dict]) -> str:
    """A line a cluster: what it holds, its mask, and what that costs; parts of results.json.

    found: empty with a router from elsewhere. Purity is the share of a cluster's commonest topic
    among its texts that have one. FLOPs are those of all judging texts under the one mask.
    """
    rows = []
    for k, mask in enumerate(masks):
        of, z, purity = found[k] if found else {}, torch.tensor(mask["z"]), "-"
        if of.get("topic"):
            purity = f"{of['of_topic'] / of['with_topic']:.0%} {of['topic']}"
        nearest = "; ".join(of.get("nearest", "-")).replace("|", "/")
        rows.append([k, of.get("texts", "-"), purity, nearest, int((z[0::2] == 0).sum()),
                     int((z[1::2] == 0).sum()), f"{mask['flops_ratio']:.1%}",
                     f"{mask['flops_ratio_with_router']:.1%}"])
    head = ["cluster", "texts", "purity", "nearest to the centroid", "skipped attention",
            "skipped FFN", "FLOPs", "FLOPs + router"]
    parts = [markdown(head, rows)]
    hits, labelled = (sum(x[key] for x in found) for key in ("of_topic", "with_topic"))
    if labelled:
        parts.append(f"{hits / labelled:.0%} of the {labelled} texts with a topic have their "
                     "cluster's commonest one.")
    parts.append("Masks, a cluster a row, layers from left to right (█ kept, · skipped):")
    parts.append("\n".join(f"    {k:2}  {picture(torch.tensor(mask['z']))}"
                           for k, mask in enumerate(masks)))
    return "\n\n".join(parts)


def matrix_report(matrix: list, sizes: list[int]) -> str:
    """Perplexity of cluster i's judging texts (row) under mask j (column), and what it says."""
    rows = [[f"{i} ({n})", *("-" if x is None else f"{x:.2f}" for x in row)]
            for i, (row, n) in enumerate(zip(matrix, sizes, strict=True))]
    head = ["cluster (texts)", *(f"mask {j}" for j in range(len(matrix)))]
    equalled = [str(i) for i, row in enumerate(matrix)
                if sizes[i] and min(row[:i] + row[i + 1:]) <= row[i]]
    verdict = "The diagonal is the lowest of every row: each cluster's own mask serves it best."
    if equalled:
        verdict = ("The masks have not specialised: the diagonal is not the lowest of its row for "
                   f"cluster {', '.join(equalled)}, which another's mask serves as well or better.")
    return f"Perplexity by cluster and mask:\n\n{markdown(head, rows)}\n\n{verdict}"
