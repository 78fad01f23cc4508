"""evaluate.py against transformers' full logits and lm-evaluation-harness, its metrics by hand."""
import json
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, hook_gates, make_golden_model, make_reference, make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

import evaluate
import hub
import model as llm
from evaluate import Question
from model import UserError

GROUPS = json.loads("""[
[[3, 4, 5], [[6, 7]]],
[[8], [[9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25], [34], [35, 36]]],
[[37, 38, 39, 40, 41, 42], [[43], [44, 45, 46, 47], [48, 49]]],
[[50, 51, 52], [[53, 54], [55, 56], [57, 58, 59, 60, 61]]],
[[62], [[63]]]
]""")  # [context, choices]


def by_hand(reference, context, continuation):
    """One request at a time, every position through the head, a float64 log-softmax."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = reference(ids).logits.double()
    log_p = logits.log_softmax(-1)[0, len(context) - 1:-1]
    targets = torch.tensor(continuation)
    return log_p.gather(1, targets[:, None]).sum().item()


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_packed_choices_score_as_each_does_alone_under_its_z(model, batch_tokens):
    """The context once, then the choices as branches: the same as one plain sequence a choice."""
    z = torch.ones(len(GROUPS), 6, dtype=torch.bool)
    z[1:3, 2] = z[4, 5] = False
    ours = evaluate.loglikelihoods(model, GROUPS, z, batch_tokens)
    for found, row, (context, choices) in zip(ours, z, GROUPS, strict=True):
        reference = make_reference("llama")
        hook_gates(reference, row.float())
        wanted = [by_hand(reference, context, y) for y in choices]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert found.dtype == np.float64


def test_batches_hold_like_lengths_of_one_z_and_no_more_tokens_than_asked(model):
    """And a context runs once; and no head on more than HEAD_ROWS positions."""
    shapes = []

    def record(_, given, out):
        shapes.append(given[0].shape)

    model.register_forward_hook(record)
    lengths = 5, 70, 20, 30, 30, 31
    groups = [([1], [[2] * n]) for n in lengths]
    z = torch.ones(6, 6, dtype=torch.bool)
    z[1, 0] = False
    evaluate.loglikelihoods(model, groups, z, 62)
    branching = [5, 6], [[7, 8], [9]]
    evaluate.loglikelihoods(model, [branching], None)
    assert shapes == [(1, 70), (2, 31), (2, 30), (1, 5), (1, 3)]
    model = Mock(head=Mock(wraps=torch.clone))
    targets = torch.ones(300, dtype=int)
    evaluate.log_probs(model, torch.zeros(300, 8), targets)
    rows = [len(call.args[0]) for call in model.head.mock_calls]
    assert rows == [128, 128, 44]


def test_too_long_requests_lose_their_left_end(checkpoint):
    """Each choice on its own, as lm-evaluation-harness cuts them: the last 4 that are read stay."""
    folder, reference = checkpoint(max_position_embeddings=4)
    model = llm.load(folder, "cpu", torch.float32)
    groups = json.loads("[[[1, 2, 3, 4], [[5, 6], [7]]], [[8], [[1, 2, 3, 4, 5, 6]]]]")
    kept = json.loads("[[[2, 3, 4], [5, 6]], [[1, 2, 3, 4], [7]], [[2], [3, 4, 5, 6]]]")
    found = np.concatenate(evaluate.loglikelihoods(model, groups, None))
    wanted = [by_hand(reference, *part) for part in kept]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def ask(choices, gold, contexts=None):
    contexts = contexts or ["c"] * len(choices)
    return Question(contexts, choices, gold, contexts[0])


@pytest.mark.parametrize(("first", "second", "loglik", "acc_norm"), [
    ("ab", "abcd", [-4, -6], 1),
    ("ab", "ab", [-5, -5], 0),
    ("", "abc", [-1, -90], 1),
    ("äöüß", "abcdef", [-5, -6], 1),                              # 4 characters, 8 bytes
])
def test_acc_and_acc_norm_by_hand(first, second, loglik, acc_norm):
    question = ask([first, second], 1)
    assert evaluate.right(question, np.array(loglik)) == (0, acc_norm)


def test_accuracy_is_a_mean_with_its_standard_error():
    loglik = np.array([-4.0, -6.0])
    choices = ["ab", "abcd"]
    questions = [ask(choices, gold) for gold in (0, 0, 1)]
    error = np.std([1, 1, 0], ddof=1) / math.sqrt(3)
    found = evaluate.accuracy(questions, [loglik] * 3)
    assert [*found.values()] == pytest.approx([3, 2 / 3, error, 1 / 3, error])
    blank = ask(["end", "end"], 1, ["a x", "a y"])                # WinoGrande's form, and n = 1
    found = evaluate.accuracy([blank], [loglik])
    assert [*found.values()] == [1, 0, None, None, None]


def test_choices_share_the_z_of_their_question(monkeypatch):
    """A question of one group, and one of two plain sequences, as in WinoGrande."""
    one = ask(["w3", "w4"], 0)
    two = ask(["w8", "w8"], 1, ["w9", "w7"])
    spy = Mock(return_value=np.split(np.arange(4), [2, 3]))
    monkeypatch.setattr(evaluate, "loglikelihoods", spy)
    z = torch.tensor([[0], [1]])
    found = evaluate.score(None, make_tokenizer(), [one, two], z, "auto")
    _, _, z = spy.call_args.args
    assert z.flatten().tolist() == [0, 1, 1]
    assert np.stack(found).tolist() == [[0, 1], [2, 3]]


def test_bos_as_the_tokenizer_does_always_or_never():
    plain, habit = make_tokenizer(), make_tokenizer(bos=True)
    for tokenizer, text, bos, ids in (
            (plain, "w1", 1, [1, 3]),
            (habit, "w1", "auto", [1, 3]),
            (habit, "w1", "off", [3]),
            (habit, "w1", 1, [1, 3]),
            (habit, "<bos> w1", 1, [1, 3])):                      # not doubled
        assert evaluate.encode(tokenizer, text, bos) == ids


def test_the_cut_between_context_and_continuation():
    """Trailing spaces go to the continuation; tokens may merge across; the context stays alone."""
    pieces = ["a", "b", "x", "Ġ", ":", "Ġb", "Ġx", "ĠĠ", ":Ġ"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = map(tuple, pieces[5:])
    merging = Tokenizer(models.BPE(ids, list(merges)))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for context, choice, group in (
            ("a", "b", ([0], [[5]])),                             # " b" is one token
            ("a ", "x", ([0], [[3, 6]])),
            ("a:", " b", ([0, 4], [[5]]))):                       # ":" and "Ġ" merge in the whole
        question = ask([choice], 0, [context])
        assert evaluate.choice_ids(question, merging, "auto") == [group]
    for context, choice in (
            ("", "a"),
            ("a", "")):
        question = ask([choice], 0, [context])
        with pytest.raises(UserError, match="no token"):
            evaluate.choice_ids(question, make_tokenizer(), "auto")


BLANK = "is embarassed, because Samantha made snide comments about the shirt Rebecca was wearing."
PROMPTS = {
    "openbookqa": (
        "Atomic 26 is drawn to a device, it could be",
        ["wood", "magnetized"], 1),
    "winogrande": (
        "People think ",
        [BLANK, BLANK], 1),
    "hellaswag": (
        "Roof shingle removal: A man sits. He Starts up. now",
        [" Ask him.", "is  up."], 1),
    "piqa": (
        "Question: Remove seeds from  strawberries\nAnswer:",
        ["use a straw", "no "], 0),
    "arc_easy": (
        "Question: Which is the function of the gallbladder?\nAnswer:",
        ["store bile", "b", "c"], 0),
    "arc_challenge": (
        "Question: Q\nAnswer:",
        list("vwxyz"), 4),
}


@pytest.mark.parametrize("task", ROWS)
def test_prompts_of_the_six_tasks(task):
    """Strings that published logs of lm-evaluation-harness show, and the footguns of each task."""
    context, choices, gold = PROMPTS[task]
    contexts = [context] * len(choices)
    if task == "winogrande":
        contexts = [context + "Samantha", context + "Rebecca"]
    question = evaluate.read_row(task, ROWS[task])
    assert question == Question(contexts, choices, gold, context)


@pytest.mark.parametrize("case", [
    'openbookqa {"question_stem": null} -> field question_stem is .None., expected a text',
    'arc_easy {"choices": []} -> choices.text is .None., expected a list of texts',
    'arc_challenge {"choices": {"text": ["a"], "label": ["D", "E"]}} -> answerKey is .E.',
    'arc_challenge {"choices": {"text": ["a", 3], "label": ["1", "2"]}} -> choices.text',
    'winogrande {"sentence": "no gap"} -> field sentence is .no gap., expected a blank _',
    'hellaswag {"endings": "ab"} -> field endings',
    'piqa {"label": -1} -> field label is .-1., expected one of 0, 1',
])
def test_a_row_that_is_none_names_its_field(case):
    change, named = case.split(" -> ")
    task, change = change.split(" ", 1)
    with pytest.raises(UserError, match=named):
        evaluate.read_row(task, ROWS[task] | json.loads(change))


# ------------------------------------------------------------------ against the harness itself

GOLDEN = ROOT / "tests/golden"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(model, tokenizer, lines of scores.jsonl)."""
    folder = tmp_path_factory.mktemp("golden")
    make_golden_model().save_pretrained(folder)
    model = llm.load(folder, "cpu", torch.float32)
    lines = map(json.loads, (GOLDEN / "scores.jsonl").open())
    return model, hub.load_tokenizer(GOLDEN), list(lines)


@pytest.mark.parametrize("bos", ["auto", "off"])
@pytest.mark.parametrize("task", evaluate.FIELDS)
def test_scores_equal_lm_evaluation_harness(golden, task, bos):
    """Its 0.4.13 on the same tiny model: every row's log-likelihoods and hits, and the means."""
    model, tokenizer, lines = golden
    mine = [x for x in lines if (x["task"], x["bos"]) == (task, bos)]
    *rows, means = mine
    given = hub.task_rows(task, str(GOLDEN), None)
    questions = [evaluate.read_row(task, row) for _, row in given]
    logliks = evaluate.score(model, tokenizer, questions, None, bos)
    for row, question, found in zip(rows, questions, logliks, strict=True):
        np.testing.assert_allclose(found, row["loglikelihood"], atol=1e-3, rtol=1e-5)
        hits = row["acc"], row["acc_norm"]
        assert evaluate.right(question, found) == hits
    scores = evaluate.accuracy(questions, logliks)
    wanted = {key: means.get(key, 12) for key in scores}          # n is 12
    assert scores == pytest.approx(wanted)


def test_wiki_what_asks_only_honest_questions():
    articles, of = [], {}
    for i in range(60):
        topic = ["Arts", "Geography", "Uncategorized"][i % 3]
        article = {"title": f"T{i}", "topic": topic, "description": f"thing {i}"}
        articles.append(article)
        of[f"thing {i}"] = article
    told = {"title": "Lake Foo", "topic": "Arts", "description": "A lake foo somewhere"}
    untold = told | {"description": None}
    judging = [*articles[:12], told, untold]
    questions = evaluate.wiki_what(articles, judging, np.random.default_rng(0))
    assert len(questions) == 8
    assert len({q.gold for q in questions}) > 1
    for q in questions:
        assert q.routed == f"Question: What is {of[q.choices[q.gold]]['title']}?\nAnswer:"
        assert len(set(q.choices)) == 4
        topics = {of[choice]["topic"] for choice in q.choices}
        assert len(topics) == 1


# ------------------------------------------------------------------------------ the report


ROWS_OF_A_RUN = """[
{"name": "dense", "z": [[1, 1, 1, 1]], "flops_ratio": 1.0, "flops_ratio_with_router": 1.0,
 "ppl": 10.0, "forward_tokens": 0,
 "tasks": {"piqa": {"n": 5, "acc": 0.6, "acc_stderr": 0.2, "acc_norm": null}}},
{"name": "igp", "z": [[1, 0, 1, 1], [0, 0, 1, 1]], "flops_ratio": 0.8, "ppl": 20.0,
 "flops_ratio_with_router": 0.9, "forward_tokens": 77, "cluster": [0, 1, 0], "tokens": [1, 2, 3],
 "tasks": {"piqa": {"n": 5, "acc": 0.3, "acc_stderr": null, "acc_norm": null}}},
{"name": "igp-mask-0", "z": [[1, 0, 1, 1]], "flops_ratio": 0.8, "ppl": 22.0, "tasks": {},
 "flops_ratio_with_router": 0.8, "forward_tokens": 0, "loglikelihood": [-1.0, -4.0, -3.0]},
{"name": "igp-mask-1", "z": [[0, 0, 1, 1]], "flops_ratio": 0.7, "ppl": 21.0, "tasks": {},
 "flops_ratio_with_router": 0.7, "forward_tokens": 0, "loglikelihood": [-2.0, -2.0, -6.0]}
]"""
REPORT = """\
| method | sparsity | piqa (n=5) | average | % of dense | skipped attention | \
skipped FFN | FLOPs | FLOPs + router | perplexity | forward tokens |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| dense | 0.0% | 60.00 ± 20.00 | 60.00 | 100.00% | 0 | 0 | 100.0% | 100.0% | 10.00 | 0 |
| igp | 37.5% | 30.00 ± - | 30.00 | 50.00% | 0.5 | 1 | 80.0% | 90.0% | 20.00 | 77 |
| igp-mask-0 | 25.0% | - | - | - | 0 | 1 | 80.0% | 80.0% | 22.00 | 0 |
| igp-mask-1 | 50.0% | - | - | - | 1 | 1 | 70.0% | 70.0% | 21.00 | 0 |

Masks, a cluster a row, layers from left to right (█ kept, · skipped):

     0  A ██  F ·█  7 texts
     1  A ·█  F ·█  8 texts

Perplexity by cluster and mask:

| cluster (texts) | mask 0 | mask 1 |
| --- | --- | --- |
| 0 (2) | 2.72 | 7.39 |
| 1 (1) | 7.39 | 2.72 |

Its own mask serves a cluster best (lowest on the diagonal) in 2 of 2 clusters."""


def test_report():
    rows = json.loads(ROWS_OF_A_RUN)
    assert evaluate.report(rows, ["7 texts", "8 texts"]) == REPORT
    alone = evaluate.report(rows[2:3], [])
    assert "average" not in alone and "Masks" not in alone


def test_a_mask_that_another_one_beats_is_not_counted():
    dense, igp, own, other = json.loads(ROWS_OF_A_RUN)
    other["loglikelihood"] = [x + 1 for x in own["loglikelihood"]]
    igp["cluster"] = [0, 0, 0]                                    # cluster 1 has no held-out text
    text = evaluate.report([dense, igp, own, other], [])
    assert "in 0 of 1 clusters" in text and "| 1 (" not in text
