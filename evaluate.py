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
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import Transformer, UserError

BATCH_TOKENS = 1024  # of one batch, padding included: few, whose activations stay in a CPU's caches
HEAD_ROWS = 128      # positions that go through the head at a time: (128, v) float32 at most


def slices(hidden: Tensor, targets: Tensor):
    """Both (n, ...), HEAD_ROWS rows at a time; 4 times as many on a GPU: each reads the head."""
    rows = HEAD_ROWS if hidden.is_cpu else 4 * HEAD_ROWS
    return zip(hidden.split(rows), targets.split(rows), strict=True)


def log_probs(model: Transformer, hidden: Tensor, targets: Tensor) -> Tensor:
    """log P(target) at each position, float32: hidden (n, d), targets (n,) -> (n,)."""
    parts = []
    for h, y in slices(hidden, targets):
        log_p = model.head(h).log_softmax(-1, dtype=torch.float32)  # (rows, v)
        column = y[:, None]
        parts.append(log_p.gather(1, column)[:, 0])
    return torch.cat(parts)


@torch.inference_mode()
def loglikelihoods(model: Transformer, groups: list, z: Tensor | None,
                   batch_tokens: int | None = None) -> list:
    """For each group (context ids, [continuation ids, ...]) the log P of each continuation.

    Each is a float64 sum of float32 log P over its tokens; no list of ids is empty. z None (dense)
    or boolean (n, B), one per group. A group is one sequence (`_pack`), or several if it is too
    long (`_fit`). Those of equal z run together, at most batch_tokens at a time (`_batches`; None:
    BATCH_TOKENS, 16 times as many on a GPU), padded on the right, which a causal model cannot see.
    """
    longest = model.config.max_position_embeddings
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS if model.head_weight.is_cpu else 16 * BATCH_TOKENS
    if z is None:
        z = torch.ones(len(groups), model.B, dtype=torch.bool)
    sequences, owners = [], []
    for i, (context, choices) in enumerate(groups):
        for part in _fit(context, choices, longest):
            sequences.append(_pack(*part))
            owners.append(i)
    masks, kinds = z[owners].unique(dim=0, return_inverse=True)   # kinds: each one's row of masks
    lengths = np.array([len(inputs) for inputs, _, _ in sequences])
    batches = list(_batches(lengths, kinds.numpy(), batch_tokens))
    found = [None] * len(sequences)                               # of each its choices' log P
    for batch in tqdm(batches, "evaluation", leave=False, disable=None):
        shared = masks[kinds[batch[0]]]                           # (B,) the z of them all
        sums = iter(_run(model, [sequences[p] for p in batch], shared))
        for p in batch:
            found[p] = next(sums)
    values = chain(*found)                                        # in the groups' order
    return [np.array([next(values) for _ in choices]) for _, choices in groups]


def _fit(context, choices, longest):
    """[(context, choices)] where the model has a position for every token that it reads.

    Else a sequence for each choice, also for those that would fit: each is cut by itself, from the
    left, to its last `longest` + 1 tokens, the last of which is predicted but not read.
    """
    if len(context) + max(map(len, choices)) - 1 <= longest:
        return [(context, choices)]
    parts = []
    for y in choices:
        whole = (context + y)[-(longest + 1):]
        start = max(1, len(whole) - len(y))                       # one token of context stays
        parts.append((whole[:start], [whole[start:]]))
    return parts


def _pack(context, choices):
    """A sequence: what is read, (t, 3) int64: id, position, branch; predictors; and the choices.

    Predictors are the rows of what is read before each token of choice 1, choice 2, ...
    Example: context [5, 6] with choices [7, 8] and [9] -> (5, 0, 0), (6, 1, 0), (7, 2, 1), and
    predictors [1, 2, 1]: 6 predicts 7, 7 predicts 8, and 6 predicts 9; 8 and 9 predict nothing.
    """
    n = len(context)
    inputs = [(token, i, 0) for i, token in enumerate(context)]
    predictors = []
    for c, y in enumerate(choices, 1):
        start = len(inputs)
        for i, token in enumerate(y[:-1]):
            inputs.append((token, n + i, c))
        predictors += [n - 1, *range(start, len(inputs))]
    return torch.tensor(inputs), predictors, choices


def _batches(lengths, kinds, batch_tokens):
    """Indices of sequences that run together: of one kind, the longest first, b t <= batch_tokens.

    lengths, kinds: integers (sequences,). A sequence above batch_tokens runs alone.
    """
    order = np.lexsort((-lengths, kinds))                         # stable
    while len(order):
        longest = order[0]
        batch = order[:max(1, batch_tokens // lengths[longest])]
        batch = batch[kinds[batch] == kinds[longest]]
        order = order[len(batch):]
        yield batch


def _run(model, sequences, z):
    """log P of each sequence's choices: one forward, then the head on their predictors only."""
    inputs, predictors, choices = zip(*sequences, strict=True)
    inputs = pad_sequence(inputs, batch_first=True)               # (b, t, 3), zeroes on the right
    ids, positions, branch = inputs.to(model.head_weight.device).unbind(-1)
    one = all(len(ys) == 1 for ys in choices)                     # nothing branches: plain causal
    attend = None if one else _branches(branch)
    hidden = model(ids, z, positions=positions, attend=attend)    # (b, t, d)
    rows = [h[index] for h, index in zip(hidden, predictors, strict=True)]
    continuations = [*chain(*choices)]
    targets = torch.tensor([*chain(*continuations)], device=ids.device)
    log_p = log_probs(model, torch.cat(rows), targets)
    parts = log_p.cpu().double().split([len(y) for y in continuations])
    sums = iter([part.sum().item() for part in parts])
    return [[next(sums) for _ in ys] for ys in choices]


def _branches(branch):
    """Who sees whom (b, 1, t, t): query row sees key column if it is to its left or itself, and
    belongs to the context (branch 0) or to the query's own branch. branch (b, t)."""
    q, k = branch[:, :, None], branch[:, None, :]
    return ((k == 0) | (k == q)).tril()[:, None]


def perplexity(loglik: np.ndarray, n_tokens: np.ndarray) -> float:
    """exp(-sum of log-likelihoods / sum of predicted tokens), float64: every token weighs the same.

    loglik (texts,) of `loglikelihoods`, in nats; n_tokens (texts,): a text's tokens less the first.
    """
    return float(np.exp(-loglik.sum() / n_tokens.sum()))


def judge(model: Transformer, texts: list, z: Tensor) -> np.ndarray:
    """log P of each text after its first token, under its own mask: float64 (texts,), in nats.

    texts: lists of at least 2 token ids; z boolean (texts, B).
    """
    requests = [(x[:1], [x[1:]]) for x in texts]
    return np.concatenate(loglikelihoods(model, requests, z))


# ---------------------------------------------------------------------------- multiple choice


@dataclass(frozen=True)
class Question:
    """A row of a zero-shot task: which of `choices` follows its context, after one space?"""

    contexts: list[str]  # one for each choice; they are all the same but in WinoGrande
    choices: list[str]
    gold: int            # index of the right one
    routed: str          # what picks the mask (Eq. 9); all choices of a question share it


FIELDS = {  # task -> the fields read of a row in the hub's schema, the right choice's name last
    "openbookqa": "question_stem choices.text choices.label answerKey",
    "winogrande": "sentence option1 option2 answer",
    "hellaswag": "activity_label ctx_a ctx_b endings label",
    "piqa": "goal sol1 sol2 label",
    "arc_easy": "question choices.text choices.label answerKey",
    "arc_challenge": "question choices.text choices.label answerKey",
}
LISTS = ("choices.text", "choices.label", "endings")


def read_row(task: str, row: dict) -> Question:
    """A row of one of the six tasks as lm-evaluation-harness prompts it.

    Silent: what is routed. The context; in WinoGrande, whose contexts differ, the sentence up to
    the blank, which is its first "_".
    Raises UserError, naming the field, for a row that is not in the task's schema.
    """
    *names, last = FIELDS[task].split()
    values = [_field(row, name) for name in names]
    key = str(row.get(last)).lstrip()                             # the hub has 1, "1", "A" and " A"
    options = None
    if task == "winogrande":
        sentence, *options = values                               # the contexts end in them
        context, blank, end = sentence.partition("_")
        choices = [end.strip()] * 2
        labels = ["1", "2"]
        if not blank:
            raise UserError(f"field sentence is {sentence[:40]!r}, expected a blank _ in it")
    elif task == "hellaswag":
        activity, a, b, endings = values
        context = _clean(f"{activity}: {a} {b.capitalize()}")
        choices = [_clean(ending) for ending in endings]
        labels = list("0123456789")
    elif task == "piqa":
        goal, *choices = values
        context = f"Question: {goal}\nAnswer:"
        labels = ["0", "1"]
    else:
        question, choices, labels = values
        context = question if task == "openbookqa" else f"Question: {question}\nAnswer:"
    labels = labels[:len(choices)]
    if key not in labels:
        raise UserError(f"field {last} is {key!r}, expected one of {', '.join(labels)}")
    contexts = [context + option for option in options or [""] * len(choices)]
    return Question(contexts, choices, labels.index(key), context)


def _field(row, name):
    """The text, or the list of texts, that a row has under this name."""
    value = row
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    kind, texts = "a text", [value]
    if name in LISTS:
        kind, texts = "a list of texts", value
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise UserError(f"field {name} is {str(value)[:40]!r}, expected {kind}")
    return value


def _clean(text):
    """HellaSwag's mark-up removed, in the harness's order; spaces that this leaves stay."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def encode(tokenizer: Tokenizer, text: str, bos: int | str) -> list:
    """Token ids (ints) of a text, after BOS where bos is an id, without it where bos is "off".

    Silent: BOS. "auto" is the tokenizer's own habit, as the harness has it since 0.4.9.2; when the
    paper was written it added none. Never doubled where the text begins with it.
    """
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    start = [bos]
    if bos == "auto":
        start = tokenizer.encode("").ids[:1]
    if bos == "off" or ids[:1] == start:
        return ids
    return start + ids


def choice_ids(question: Question, tokenizer: Tokenizer, bos: int | str) -> list:
    """[(context ids, [continuation ids, ...])]: one group, or one per choice if contexts differ.

    Context and continuation are encoded together, and as many tokens as the context has alone are
    cut off in front, so that tokens may merge across the boundary. White space that ends the
    context goes to the continuation's front.
    Raises UserError for a context or a choice without a token.
    """
    groups = {}
    for context, choice in zip(question.contexts, question.choices, strict=True):
        ids = encode(tokenizer, context.rstrip(), bos)
        whole = encode(tokenizer, f"{context} {choice}", bos)
        if not ids or len(whole) <= len(ids):
            raise UserError(f"{context[:60]!r}: context or choice {choice[:60]!r} has no token")
        groups.setdefault(tuple(ids), []).append(whole[len(ids):])
    return [(list(ids), continuations) for ids, continuations in groups.items()]


def score(model: Transformer, tokenizer: Tokenizer, questions: list, z: Tensor | None,
          bos: int | str) -> list:
    """log P of each choice of each question, float64. z None or boolean (len(questions), B)."""
    groups = [choice_ids(question, tokenizer, bos) for question in questions]
    owners = [i for i, parts in enumerate(groups) for _ in parts]
    if z is not None:
        z = z[owners]
    logliks = loglikelihoods(model, [*chain(*groups)], z)
    ends = np.cumsum([len(question.choices) for question in questions])
    return np.split(np.concatenate(logliks), ends[:-1])


def right(question: Question, loglik: np.ndarray):
    """(acc, acc_norm) of one question, each 0 or 1.

    acc: the gold choice has the largest log P; acc_norm: the largest log P / its characters, None
    where contexts differ and choices do not (WinoGrande). Characters are Unicode code points of the
    choice without the space before it, not bytes. The first of equal maxima wins.
    Example: log P (-4, -6) of choices with 2 and 4 characters: acc picks the first (-4 > -6),
    acc_norm the second (-1.5 > -2).
    """
    acc = int(loglik.argmax() == question.gold)
    if len(set(question.contexts)) > 1:
        return acc, None
    characters = [len(choice) or 1e-9 for choice in question.choices]  # an empty one never wins
    normed = loglik / np.array(characters)
    return acc, int(normed.argmax() == question.gold)


def accuracy(questions: list, logliks: list) -> dict:
    """n, acc, acc_stderr, acc_norm, acc_norm_stderr, shares 0-1; None where there is none.

    Each is a mean p of `right`, with the standard error sqrt(p (1 - p) / (n - 1)), None for n = 1.
    """
    n = len(questions)
    scores = {"n": n}
    accs, norms = zip(*map(right, questions, logliks), strict=True)
    for key, values in {"acc": accs, "acc_norm": norms}.items():
        p = error = None
        if None not in values:
            p = sum(values) / n
            error = (p * (1 - p) / (n - 1)) ** 0.5 if n > 1 else None
        scores |= {key: p, f"{key}_stderr": error}
    return scores


def wiki_what(articles: list, judging: list, generator: np.random.Generator) -> list:
    """Questions: What is {title}? The article's description against three others of its topic.

    articles: dicts with title, description, topic; judging: some of them. Asked are the judging
    ones that have a topic and a description which does not repeat the title; distractors come from
    all articles.
    """
    questions = []
    pools = defaultdict(set)                                      # topic -> usable descriptions
    for article in articles:
        description = article["description"] or ""
        told = article["title"].casefold() in description.casefold()
        if description and not told:
            pools[article["topic"]].add(description)
    pools["Uncategorized"].clear()
    for article in judging:
        own, pool = article["description"], pools[article["topic"]]
        if own in pool and len(pool) > 3:
            others = sorted(pool - {own})
            choices = generator.choice(others, 3, replace=False).tolist()
            gold = int(generator.integers(4))
            choices.insert(gold, own)
            context = f"Question: What is {article['title']}?\nAnswer:"
            questions.append(Question([context] * 4, choices, gold, context))
    return questions


# ---------------------------------------------------------------------------- the report


def markdown(rows: list) -> str:
    """A Markdown table of dicts, column -> cell; "-" where a row lacks a column of the first."""
    head = list(rows[0])
    table = [head, ["---"] * len(head)]
    for row in rows:
        table.append([row.get(column, "-") for column in head])
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in table)


def picture(z: Tensor) -> str:
    """Attention (A) and FFN (F) blocks from the first layer to the last: █ kept, · skipped."""
    blocks = ["·█"[int(kept)] for kept in z]
    return f"A {''.join(blocks[0::2])}  F {''.join(blocks[1::2])}"


def report(rows: list, topics: list) -> str:
    """Methods; a line a cluster with its mask; the matrix and its verdict.

    rows: of igp.stage_2, dense first if it is there; those named igp-mask-k hold mask k alone.
    topics: of each cluster, a text; none where a router was given.
    """
    parts = [markdown([_method(row, rows[0]) for row in rows])]
    alone = [row for row in rows if row["name"].startswith("igp-mask-")]
    for igp in rows:
        if igp["name"] == "igp":
            masks = ["Masks, a cluster a row, layers from left to right (█ kept, · skipped):\n"]
            for k, z in enumerate(igp["z"]):
                topic = topics[k] if topics else ""
                masks.append(f"    {k:2}  {picture(z)}  {topic}")
            parts.append("\n".join(masks))
            if alone:
                parts.append(_matrix(igp, alone))
    return "\n\n".join(parts)


def _method(row, first):
    """A method's cells, in the layout of Table 1; then what it skips, costs, and gives.

    acc_norm, or acc where there is no other (WinoGrande), in percent, ± its standard error. Skipped
    blocks are a mean over the masks.
    """
    z = np.array(row["z"])                                        # (N, B)
    cells = {"method": row["name"], "sparsity": f"{1 - z.mean():.1%}"}
    for task, scores in row["tasks"].items():
        value, error = _headline(scores)
        error = "-" if error is None else f"{100 * error:.2f}"
        cells[f"{task} (n={scores['n']})"] = f"{100 * value:.2f} ± {error}"
    if row["tasks"]:
        own, dense = _average(row), _average(first)
        cells["average"] = f"{100 * own:.2f}"
        of_dense = first["name"] == "dense" and dense > 0
        cells["% of dense"] = f"{own / dense:.2%}" if of_dense else "-"
    for j, kind in enumerate(("attention", "FFN")):
        skipped = (1 - z[:, j::2]).sum(1)                         # (N,)
        cells[f"skipped {kind}"] = f"{skipped.mean():.3g}"
    cells["FLOPs"] = f"{row['flops_ratio']:.1%}"
    cells["FLOPs + router"] = f"{row['flops_ratio_with_router']:.1%}"
    cells["perplexity"] = f"{row['ppl']:.2f}"
    cells["forward tokens"] = row["forward_tokens"]
    return cells


def _headline(scores):
    """The score that counts, acc_norm, or acc where there is no other; and its standard error."""
    key = "acc" if scores["acc_norm"] is None else "acc_norm"
    return scores[key], scores[f"{key}_stderr"]


def _average(row):
    """Mean over the tasks, 0-1."""
    return np.mean([_headline(scores)[0] for scores in row["tasks"].values()])


def _matrix(igp, alone):
    """Perplexity of cluster i's held-out texts (row) under mask j (column), and what it says."""
    cluster = np.array(igp["cluster"])
    n = np.array(igp["tokens"])
    loglik = np.array([row["loglikelihood"] for row in alone])    # (N, texts)
    rows, best_served = [], 0
    for i in np.unique(cluster):                                  # those that have texts
        own = cluster == i
        ppl = [perplexity(x, n[own]) for x in loglik[:, own]]     # (N,)
        row = {"cluster (texts)": f"{i} ({own.sum()})"}
        rows.append(row | {f"mask {j}": f"{x:.2f}" for j, x in enumerate(ppl)})
        best_served += np.argmin(ppl) == i
    return (f"Perplexity by cluster and mask:\n\n{markdown(rows)}\n\nIts own mask serves a cluster "
            f"best (lowest on the diagonal) in {best_served} of {len(rows)} clusters.")
