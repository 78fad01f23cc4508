"""Perplexity and zero-shot multiple choice, both from one sum: log P(continuation | context).

Source: the task definitions and metrics of lm-evaluation-harness 0.4, with which Sec. 4.1 of
        IG-Pruning, arXiv:2511.02213, evaluates. Zero-shot, no chat template.
Left out: few-shot prompts, generation tasks, log-likelihoods of bytes.
Dims:   b batch, t tokens, d width, v vocabulary; B blocks; n groups, or positions.
Why packing is allowed: a causal token sees only what is left of it. The choices of a question share
        their context, so it runs once: context, choice 1, choice 2, ... in one sequence, where each
        choice's tokens see the context and their own choice only (`_branches`) and count their
        positions from the context's end. Each then computes what it would alone.
"""
import re
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from model import Transformer

# Tokens of one batch, padding included. On a CPU few, whose activations stay in its caches.
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
HEAD_ROWS = 128  # positions that go through the head at a time: (128, v) float32 at most


def log_probs(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """log P(target) at each position, float32: hidden (n, d), targets (n,) -> (n,)."""
    parts = []
    for h, y in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        log_p = model.head(h).log_softmax(-1, dtype=torch.float32)  # (HEAD_ROWS, v)
        parts.append(log_p.gather(1, y[:, None])[:, 0])
    return torch.cat(parts)


@torch.inference_mode()
def loglikelihoods(model: Transformer, groups: list[tuple[list[int], list[list[int]]]],
                   z: Tensor | None, batch_tokens: int | None = None) -> list[np.ndarray]:
    """For each group (context ids, continuations) the log P of each continuation after it.

    Each is a float64 sum of float32 log P over its tokens; no list of ids is empty. z None (dense)
    or boolean (n, B), one per group. Groups of equal z run together, longest first, at most
    batch_tokens at a time (None: BATCH_TOKENS), padded on the right, which a causal model cannot
    see. Of a context and continuation longer than max_position_embeddings the last tokens are used.
    """
    batch_tokens = batch_tokens or BATCH_TOKENS[model.head_weight.device.type]
    longest, pieces = model.config.max_position_embeddings, []    # (group, first choice, ids, ids)
    for i, (context, choices) in enumerate(groups):
        if len(context) + max(map(len, choices)) - 1 <= longest:
            pieces.append((i, 0, context, choices))
            continue
        for c, y in enumerate(choices):                           # each cut on its own
            whole = (context + y)[-(longest + 1):]                # the last token predicts nothing
            n = min(len(y), len(whole) - 1)
            pieces.append((i, c, whole[:-n], [whole[-n:]]))
    keys = ["" if z is None else z[i].numpy().tobytes() for i, *_ in pieces]
    length = [len(context) + sum(len(y) - 1 for y in choices) for _, _, context, choices in pieces]
    order = sorted(range(len(pieces)), key=lambda p: (keys[p], -length[p]))
    out = [np.zeros(len(choices)) for _, choices in groups]
    with tqdm(total=len(pieces), desc="evaluation", leave=False, disable=None) as bar:
        while order:
            first = order[0]
            size = max(1, batch_tokens // length[first])
            batch = [p for p in order[:size] if keys[p] == keys[first]]
            order = order[len(batch):]
            same = None if z is None else z[pieces[first][0]]
            scores = _batch(model, [pieces[p][2:] for p in batch], same)
            for (i, c, _, choices), values in zip((pieces[p] for p in batch), scores, strict=True):
                out[i][c:c + len(choices)] = values
            bar.update(len(batch))
    return out


def _batch(model: Transformer, groups: list, z: Tensor | None) -> list[np.ndarray]:
    """`loglikelihoods` of one batch: one forward, then the head on the continuations only."""
    device, width = model.head_weight.device, 0
    ids, positions, branch, predictors, targets = [], [], [], [], []
    for context, choices in groups:
        n = len(context)
        tokens, places, which, rows = [*context], [*range(n)], [0] * n, []
        for c, y in enumerate(choices, 1):
            rows += [n - 1, *range(len(tokens), len(tokens) + len(y) - 1)]  # they predict y
            tokens += y[:-1]                                      # its last token predicts nothing
            places += range(n, n + len(y) - 1)                    # every choice starts at n
            which += [c] * (len(y) - 1)
            targets += y
        ids.append(tokens)
        positions.append(places)
        branch.append(which)
        predictors.append(rows)
        width = max(width, len(tokens))

    def padded(lists: list[list[int]]) -> Tensor:
        """(b, t) int64, zeroes on the right."""
        return torch.tensor([x + [0] * (width - len(x)) for x in lists], device=device)

    if all(len(choices) == 1 for _, choices in groups):           # nothing branches: plain causal
        hidden = model(padded(ids), z)                            # (b, t, d)
    else:
        hidden = model(padded(ids), z, positions=padded(positions),
                       attend=_branches(padded(branch)))
    rows = torch.cat([h[index] for h, index in zip(hidden, predictors, strict=True)])
    scores = log_probs(model, rows, torch.tensor(targets, device=device)).double().cpu()
    sums = [part.sum().item() for part in
            scores.split([len(y) for _, choices in groups for y in choices])]
    return np.split(np.array(sums), np.cumsum([len(choices) for _, choices in groups])[:-1])


def _branches(branch: Tensor) -> Tensor:
    """Who sees whom (b, 1, t, t): query row sees key column if it is to its left or itself, and
    belongs to the context (branch 0) or to the query's own branch. branch (b, t)."""
    t = branch.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=branch.device).tril()
    q, k = branch[:, :, None], branch[:, None, :]
    return (causal & ((k == 0) | (k == q)))[:, None]


def perplexity(loglik: np.ndarray, n_tokens: np.ndarray) -> float:
    """exp(-sum of log-likelihoods / sum of predicted tokens): every token weighs the same."""
    return float(np.exp(-loglik.sum() / n_tokens.sum()))


def loss(model: Transformer, z: Tensor, texts: list[list[int]]) -> float:
    """Mean -log P, in nats, of all texts' tokens after their first, under a boolean z (B,)."""
    requests = [(x[:1], [x[1:]]) for x in texts]
    sums = loglikelihoods(model, requests, z.expand(len(texts), -1))
    return -sum(x[0] for x in sums) / sum(len(x) - 1 for x in texts)


# ---------------------------------------------------------------------------- multiple choice


@dataclass(frozen=True)
class Question:
    """A row of a zero-shot task: which of `choices` follows its context, after one space?"""

    contexts: list[str]  # one for each choice; they are all the same but in WinoGrande
    choices: list[str]
    gold: int            # index of the right one
    routed: str          # what picks the mask (Eq. 9); all choices of a question share it


FIELDS = {  # task -> the fields read of a row in the hub's schema
    "openbookqa": {"question_stem": str, "choices": dict, "answerKey": str},
    "winogrande": {"sentence": str, "option1": str, "option2": str, "answer": str},
    "hellaswag": {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": str},
    "piqa": {"goal": str, "sol1": str, "sol2": str, "label": int},
    "arc_easy": {"question": str, "choices": dict, "answerKey": str},
    "arc_challenge": {"question": str, "choices": dict, "answerKey": str},
}


def read_row(task: str, row: dict) -> Question:
    """A row of one of the six tasks as lm-evaluation-harness prompts it.

    Silent: what is routed. The context; in WinoGrande, whose contexts differ, the sentence up to
    the blank.
    Raises ValueError, naming the field, for a row that is not in the task's schema.
    """
    for field, kind in FIELDS[task].items():
        value = row.get(field)
        if type(value) is not kind and not (field == "label" and type(value) in (int, str)):
            raise ValueError(f"field {field} is {str(value)[:40]!r}, expected {kind.__name__}")
    if task == "winogrande":  # the same end of the sentence after each option
        before, blank, after = row["sentence"].partition("_")
        if not blank:
            raise ValueError("field sentence has no blank _")
        contexts = [before + row["option1"], before + row["option2"]]
        return Question(contexts, [after.strip()] * 2, _gold("answer", row["answer"], ["1", "2"]),
                        before)
    if task == "hellaswag":
        context = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
        choices = [_clean(x) for x in _strings("endings", row["endings"])]
        key, labels = ("label", row["label"]), [str(i) for i in range(len(choices))]
    elif task == "piqa":
        context, choices = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]
        key, labels = ("label", row["label"]), ["0", "1"]
    else:
        choices = _strings("choices.text", row["choices"].get("text"))
        key, labels = ("answerKey", row["answerKey"].lstrip()), row["choices"].get("label")
        if len(_strings("choices.label", labels)) != len(choices):
            raise ValueError(f"field choices has {len(choices)} texts, {len(labels)} labels")
        context = (row["question_stem"] if task == "openbookqa"
                   else f"Question: {row['question']}\nAnswer:")
    return Question([context] * len(choices), choices, _gold(*key, labels), context)


def _gold(field: str, key: object, labels: list[str]) -> int:
    if str(key) not in labels:
        raise ValueError(f"field {field} is {key!r}, expected one of {', '.join(labels)}")
    return labels.index(str(key))


def _strings(field: str, value: object) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(x, str) for x in value):
        raise ValueError(f"field {field} is {str(value)[:40]!r}, expected a list of texts")
    return value


def _clean(text: str) -> str:
    """HellaSwag's mark-up removed, in the harness's order; spaces that this leaves stay."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode(tokenizer: Tokenizer, text: str, bos: int | str) -> list[int]:
    """Token ids of a text, after BOS where bos is an id, without it where bos is "off".

    Silent: BOS. "auto" is the tokenizer's own habit, as the harness has it since 0.4.9.2; when the
    paper was written it added none. Never doubled where the text begins with it.
    """
    ids = tokenizer.encode(text, add_special_tokens=bos != "off").ids
    if bos != "off" and ids[:2] == tokenizer.encode("").ids[:1] * 2:
        ids = ids[1:]
    return ids if isinstance(bos, str) or ids[:1] == [bos] else [bos, *ids]


def choice_ids(question: Question, tokenizer: Tokenizer, bos: int | str) -> list[tuple]:
    """[(context ids, [continuation ids, ...])]: one group, or one per choice if contexts differ.

    Context and continuation are encoded together, and as many tokens as the context has alone are
    cut off in front, so that tokens may merge across the boundary. White space that ends the
    context goes to the continuation's front.
    """
    pairs = []
    for context, choice in zip(question.contexts, question.choices, strict=True):
        bare = context.rstrip()
        ids = encode(tokenizer, bare, bos)
        whole = encode(tokenizer, f"{context} {choice}", bos)     # it begins with `bare`
        pairs.append((ids, whole[len(ids):]))
    if any(not context or not y for context, y in pairs):
        raise ValueError(f"{question.contexts[0][:60]!r}: context or choice has no token")
    if all(context == pairs[0][0] for context, _ in pairs):
        return [(pairs[0][0], [y for _, y in pairs])]
    return [(context, [y]) for context, y in pairs]


def score(model: Transformer, tokenizer: Tokenizer, questions: list[Question], z: Tensor | None,
          bos: int | str) -> list[np.ndarray]:
    """log P of each choice of each question. z None or boolean (len(questions), B)."""
    groups = [choice_ids(question, tokenizer, bos) for question in questions]
    owner = torch.tensor([i for i, group in enumerate(groups) for _ in group])
    values = loglikelihoods(model, sum(groups, []), None if z is None else z[owner])
    values = iter(values)
    return [np.concatenate([next(values) for _ in group]) for group in groups]


def right(question: Question, loglik: np.ndarray) -> tuple[int, int | None]:
    """(acc, acc_norm) of one question, each 0 or 1.

    acc: the gold choice has the largest log P; acc_norm: the largest log P / its characters, None
    where contexts differ and choices do not (WinoGrande). The first of equal maxima wins.
    Example: log P (-4, -6) of choices with 2 and 4 characters: acc picks the first (-4 > -6),
    acc_norm the second (-1.5 > -2).
    """
    acc = int(loglik.argmax() == question.gold)
    if len(set(question.contexts)) > 1:
        return acc, None
    with np.errstate(divide="ignore"):                            # an empty choice: -inf
        per_character = loglik / np.array([len(choice) for choice in question.choices])
    return acc, int(per_character.argmax() == question.gold)


def accuracy(questions: list[Question], logliks: list[np.ndarray]) -> dict:
    """acc and acc_norm, 0-1, with standard errors sqrt(p (1 - p) / (n - 1)) (nan for 1), and n."""
    hits = [right(q, x) for q, x in zip(questions, logliks, strict=True)]
    out, n = {"n": len(hits)}, len(hits)
    for key, values in zip(("acc", "acc_norm"), zip(*hits, strict=True), strict=True):
        p = None if values[0] is None else float(np.mean(values))
        error = None if p is None else (p * (1 - p) / (n - 1)) ** 0.5 if n > 1 else float("nan")
        out |= {key: p, f"{key}_stderr": error}
    return out


def wiki_what(articles: list[dict], judging: list[dict],
              generator: np.random.Generator) -> list[Question]:
    """What is {title}? The article's description against three others of the same topic.

    articles and judging: dicts with title, description, topic. Asked are the judging articles that
    have a topic and a description which does not repeat the title; distractors come from articles.
    """
    def usable(a: dict) -> bool:
        """A topic, and a description that does not give the answer away."""
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
        context = f"Question: What is {article['title']}?\nAnswer:"
        questions.append(Question([context] * 4, choices, gold, context))
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
    """results.json as Markdown: methods, clusters with masks, N x N matrix, seconds."""
    parts = [method_report(results["rows"])]
    if results["matrix"]:
        parts.append(cluster_report(results["clusters_found"], results["masks"]))
        sizes = [mask["judging_texts"] for mask in results["masks"]]
        parts.append(matrix_report(results["matrix"], sizes))
    spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in results["seconds"].items())
    parts.append(f"Seconds: {spent}; in all {sum(results['seconds'].values()):.0f}. Peak memory "
                 f"{results['peak_memory_bytes'] / 2**30:.1f} GiB.")
    return "\n\n".join(parts)


def method_report(rows: list[dict]) -> str:
    """The layout of Table 1, methods x tasks, average and share of the dense one; then the cost.

    acc_norm, or acc where there is no other (WinoGrande), in percent, ± its standard error; "-"
    where a method was not asked, or asked other questions than the first that was. Skipped blocks
    are those of the one mask, or of the least and the most of several.
    """
    asked, averages, lines = {}, {}, []
    for task, s in ((task, s) for row in rows for task, s in row["tasks"].items()):
        asked.setdefault(task, s)
    for row in rows:
        cells, values = [], []
        for task, first in asked.items():
            s = row["tasks"].get(task, {"questions": None})
            key = "acc" if s.get("acc_norm") is None else "acc_norm"
            same = s["questions"] == first["questions"]
            values.append(100 * s[key] if same else None)
            cells.append(f"{100 * s[key]:.2f} ± {100 * s[f'{key}_stderr']:.2f}" if same else "-")
        if asked:
            whole = None not in values
            average = averages[row["name"]] = sum(values) / len(values) if whole else None
            dense = averages.get("dense")
            cells += [f"{average:.2f}" if whole else "-",
                      f"{average / dense:.2%}" if whole and dense else "-"]
        skipped = ["-".join(map(str, sorted({min(n), max(n)}))) if n else "0"
                   for n in (row["attention_skipped"], row["ffn_skipped"])]
        lines.append([row["name"], f"{row['sparsity']:.1%}", *cells, *skipped,
                      f"{row['flops_ratio']:.1%}", f"{row['flops_ratio_with_router']:.1%}",
                      f"{row['ppl']:.2f}", row["forward_tokens"], f"{row['seconds']:.0f}"])
    return markdown([
        "method", "sparsity", *(f"{task} (n={s['n']})" for task, s in asked.items()),
        *(("average", "% of dense") if asked else ()), "skipped attention", "skipped FFN", "FLOPs",
        "FLOPs + router", "perplexity", "forward tokens", "seconds"], lines)


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
