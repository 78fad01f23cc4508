"""evaluate.py against transformers' full logits and lm-evaluation-harness, its metrics by hand."""
import copy
import json
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

IDS = iter(range(97))
LENGTHS = [(3, [2]), (1, [25, 1, 2]), (6, [1, 4, 2]), (3, [2, 2, 5]), (1, [1])]
GROUPS = [([next(IDS) for _ in range(n)], [[next(IDS) for _ in range(m)] for m in choices])
          for n, choices in LENGTHS]  # (context, choices)


def by_hand(reference, context, continuation):
    """One request at a time, every position through the head, a float64 log-softmax."""
    with torch.no_grad():
        logits = reference(torch.tensor([context + continuation])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return sum(log_p[len(context) - 1 + j, y].item() for j, y in enumerate(continuation))


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_packed_choices_score_as_each_does_alone_under_its_z(checkpoint, batch_tokens):
    """The context once, then the choices as branches: the same as one plain sequence a choice."""
    z = torch.ones(len(GROUPS), 6, dtype=torch.bool)
    z[1:3, 2] = z[4, 5] = False
    folder, _ = checkpoint()
    model = llm.load(folder, "cpu", torch.float32)
    ours = evaluate.loglikelihoods(model, GROUPS, z, batch_tokens)
    for found, row, (context, choices) in zip(ours, z, GROUPS, strict=True):
        reference = make_reference("llama")
        hook_gates(reference, row.float())
        wanted = [by_hand(reference, context, y) for y in choices]
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        assert found.dtype == np.float64


def test_the_context_runs_once_and_the_head_in_parts():
    """The example of `_pack`; and no head on more than HEAD_ROWS positions."""
    inputs, predictors, _ = evaluate._pack([5, 6], [[7, 8], [9]])
    assert inputs.tolist() == [[5, 0, 0], [6, 1, 0], [7, 2, 1]] and predictors == [1, 2, 1]
    model = Mock(head=Mock(wraps=torch.clone))
    evaluate.log_probs(model, torch.zeros(300, 8), torch.ones(300, dtype=int))
    assert [len(call.args[0]) for call in model.head.mock_calls] == [128, 128, 44]


def test_batches_hold_like_lengths_of_one_z_and_no_more_tokens_than_asked():
    lengths, kinds = np.array([5, 70, 20, 30, 30, 31]), np.array([0, 1, 0, 0, 0, 0])
    batches = [batch.tolist() for batch in evaluate._batches(lengths, kinds, 62)]
    assert batches == [[5, 3], [4, 2], [0], [1]]


def test_too_long_requests_lose_their_left_end(checkpoint):
    """Each choice on its own, as lm-evaluation-harness cuts them: the last 4 that are read stay."""
    folder, reference = checkpoint(max_position_embeddings=4)
    model = llm.load(folder, "cpu", torch.float32)
    groups = [([1, 2, 3, 4], [[5, 6], [7]]), ([8], [[1, 2, 3, 4, 5, 6]])]
    found = np.concatenate(evaluate.loglikelihoods(model, groups, None))
    kept = [([2, 3, 4], [5, 6]), ([1, 2, 3, 4], [7]), ([2], [3, 4, 5, 6])]
    wanted = [by_hand(reference, context, y) for context, y in kept]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_perplexity_weighs_tokens_not_texts():
    ours = evaluate.perplexity(np.array([-2.0, -30.0]), np.array([1, 10]))
    assert ours == pytest.approx(np.exp(32 / 11))


def ask(choices, gold, contexts=None):
    contexts = contexts or ["c"] * len(choices)
    return Question(contexts, choices, gold, contexts[0])


@pytest.mark.parametrize(("choices", "gold", "loglik", "hits"), [
    (["ab", "abcd"], 1, [-4, -6], (0, 1)), (["ab", "ab"], 1, [-5, -5], (0, 0)),
    (["", "abc"], 1, [-1, -90], (0, 1)),  # characters; below, not bytes: 4 of them are 8
    (["äöüß", "abcdef"], 1, [-5, -6], (0, 1)),
])
def test_acc_and_acc_norm_by_hand(choices, gold, loglik, hits):
    assert evaluate.right(ask(choices, gold), np.array(loglik)) == hits


def test_accuracy_is_a_mean_with_its_standard_error():
    loglik = np.array([-4.0, -6.0])
    scores = evaluate.accuracy([ask(["ab", "abcd"], gold) for gold in (0, 0, 1)], [loglik] * 3)
    error = np.std([1, 1, 0], ddof=1) / 3**0.5
    assert scores == pytest.approx({"n": 3, "acc": 2 / 3, "acc_stderr": error, "acc_norm": 1 / 3,
                                    "acc_norm_stderr": error})
    blank = ask(["end", "end"], 1, ["a x", "a y"])                # WinoGrande's form, and n = 1
    assert evaluate.accuracy([blank], [loglik]) == {
        "n": 1, "acc": 0, "acc_stderr": None, "acc_norm": None, "acc_norm_stderr": None}


def test_choices_share_the_z_of_their_question(monkeypatch):
    """A question of one group, and one of two plain sequences, as in WinoGrande."""
    questions = [ask(["w3", "w4"], 0), ask(["w8", "w8"], 1, ["w9", "w7"])]
    spy = Mock(return_value=[np.array([1, 2]), np.array([3]), np.array([4])])
    monkeypatch.setattr(evaluate, "loglikelihoods", spy)
    found = evaluate.score(None, make_tokenizer(), questions, torch.tensor([[0], [1]]), "auto")
    _, groups, z = spy.call_args.args
    assert groups[1:] == [([11], [[10]]), ([9], [[10]])] and z.tolist() == [[0], [1], [1]]
    assert [x.tolist() for x in found] == [[1, 2], [3, 4]]


def test_bos_as_the_tokenizer_does_always_or_never():
    plain, habit = make_tokenizer(), make_tokenizer(bos=True)
    for bos, of_plain, of_habit in (("auto", [3], [1, 3]), ("off", [3], [3]), (1, [1, 3], [1, 3])):
        assert evaluate.encode(plain, "w1", bos) == of_plain
        assert evaluate.encode(habit, "w1", bos) == of_habit
    for bos in ("auto", 1):
        assert evaluate.encode(habit, "<bos> w1", bos) == [1, 3]  # not doubled


def test_the_cut_between_context_and_continuation():
    """Trailing spaces go to the continuation; tokens may merge across; the context stays alone."""
    pieces = ["a", "b", "x", "Ġ", ":", "Ġb", "Ġx", "ĠĠ", ":Ġ"]
    merges = [("Ġ", "b"), ("Ġ", "x"), ("Ġ", "Ġ"), (":", "Ġ")]
    merging = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for context, choice, group in (
            ("a", "b", ([0], [[5]])),                             # " b" is one token
            ("a ", "x", ([0], [[3, 6]])),
            ("a:", " b", ([0, 4], [[5]]))):                       # ":" and "Ġ" merge in the whole
        assert evaluate.choice_ids(ask([choice], 0, [context]), merging, "auto") == [group]
    for context, choice in (("", "w1"), ("w1", "")):
        with pytest.raises(UserError, match="no token"):
            evaluate.choice_ids(ask([choice], 0, [context]), make_tokenizer(), "auto")


PROMPTS = {
    "openbookqa": (["Atomic 26 is drawn to a device, it could be"] * 2, ["wood", "magnetized"], 1),
    "winogrande": (["People think Samantha", "People think Rebecca"],
                   ["is embarassed, because Samantha made snide comments about the shirt Rebecca "
                    "was wearing."] * 2, 1),
    "hellaswag": (["Roof shingle removal: A man sits. He Starts up. now"] * 2,
                  [" Ask him.", "is  up."], 1),
    "piqa": (["Question: Remove seeds from  strawberries\nAnswer:"] * 2, ["use a straw", "no "], 0),
    "arc_easy": (["Question: Which is the function of the gallbladder?\nAnswer:"] * 3,
                 ["store bile", "b", "c"], 0),
    "arc_challenge": (["Question: Q\nAnswer:"] * 5, list("vwxyz"), 4),
}


@pytest.mark.parametrize("task", ROWS)
def test_prompts_of_the_six_tasks(task):
    """Strings that published logs of lm-evaluation-harness show, and the footguns of each task."""
    question = evaluate.read_row(task, ROWS[task])
    assert (question.contexts, question.choices, question.gold) == PROMPTS[task]
    assert question.routed == ("People think " if task == "winogrande" else question.contexts[0])


@pytest.mark.parametrize(("task", "change", "named"), [
    ("openbookqa", {"question_stem": None}, "field question_stem is 'None', expected a text"),
    ("arc_easy", {"choices": []}, "choices.text is 'None', expected a list of texts"),
    ("arc_challenge", {"choices": {"text": ["a"], "label": ["D", "E"]}}, "answerKey is 'E'"),
    ("arc_challenge", {"choices": {"text": ["a", 3], "label": ["1", "2"]}}, "choices.text"),
    ("winogrande", {"sentence": "no gap"}, "field sentence is 'no gap', expected a blank _"),
    ("hellaswag", {"endings": "ab"}, "field endings"),
    ("piqa", {"label": -1}, "field label is '-1', expected one of 0, 1"),
])
def test_a_row_that_is_none_names_its_field(task, change, named):
    with pytest.raises(UserError, match=named):
        evaluate.read_row(task, ROWS[task] | change)


# ------------------------------------------------------------------ against the harness itself

GOLDEN = ROOT / "tests/golden"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(model, tokenizer, {task: questions}, lines of scores.jsonl)."""
    folder = tmp_path_factory.mktemp("golden")
    make_golden_model().save_pretrained(folder)
    questions = {task: [evaluate.read_row(task, row) for _, row in
                        hub.task_rows(task, str(GOLDEN), None)] for task in evaluate.FIELDS}
    lines = [json.loads(line) for line in (GOLDEN / "scores.jsonl").open()]
    return llm.load(folder, "cpu", torch.float32), hub.load_tokenizer(GOLDEN), questions, lines


@pytest.mark.parametrize("bos", ["auto", "off"])
@pytest.mark.parametrize("task", evaluate.FIELDS)
def test_scores_equal_lm_evaluation_harness(golden, task, bos):
    """Its 0.4.13 on the same tiny model: every row's log-likelihoods and hits, and the means."""
    model, tokenizer, questions, lines = golden
    *rows, means = [x for x in lines if x["task"] == task and x["bos"] == bos]
    logliks = evaluate.score(model, tokenizer, questions[task], None, bos)
    for row, question, found in zip(rows, questions[task], logliks, strict=True):
        np.testing.assert_allclose(found, row["loglikelihood"], atol=1e-3, rtol=1e-5)
        assert evaluate.right(question, found) == (row["acc"], row["acc_norm"]), row
    scores = evaluate.accuracy(questions[task], logliks) | {"task": task, "bos": bos}
    assert scores == pytest.approx(means | {"n": 12})


def test_wiki_what_asks_only_honest_questions():
    topics = ["Arts", "Geography", "Uncategorized"]
    articles = [{"title": f"T{i}", "topic": topics[i % 3], "description": f"thing number {i}"}
                for i in range(60)]
    told = {"title": "Lake Foo", "topic": "Arts", "description": "A lake foo somewhere"}
    judging = [*articles[:12], told, told | {"description": None}]
    questions = evaluate.wiki_what(articles, judging, np.random.default_rng(0))
    assert len(questions) == 8 and len({q.gold for q in questions}) > 1
    of = {a["description"]: a for a in articles}
    for q in questions:
        assert q.routed == f"Question: What is {of[q.choices[q.gold]]['title']}?\nAnswer:"
        assert len(set(q.choices)) == 4 and len({of[c]["topic"] for c in q.choices}) == 1


# ------------------------------------------------------------------------------ the report


def score(p, error):
    return {"n": 5, "acc": p, "acc_stderr": error, "acc_norm": None, "acc_norm_stderr": None}


ROWS_OF_A_RUN = [
    {"name": "dense", "z": [[1, 1, 1, 1]], "flops_ratio": 1.0, "flops_ratio_with_router": 1.0,
     "ppl": 10.0, "forward_tokens": 0, "tasks": {"piqa": score(0.6, 0.2)}},
    {"name": "igp", "z": [[1, 0, 1, 1], [0, 0, 1, 1]], "flops_ratio": 0.8, "ppl": 20.0,
     "flops_ratio_with_router": 0.9, "forward_tokens": 77, "tasks": {"piqa": score(0.3, None)},
     "cluster": [0, 1, 0], "tokens": [1, 2, 3]},
    {"name": "igp-mask-0", "z": [[1, 0, 1, 1]], "flops_ratio": 0.8, "ppl": 22.0, "tasks": {},
     "flops_ratio_with_router": 0.8, "forward_tokens": 0, "loglikelihood": [-1.0, -4.0, -3.0]},
    {"name": "igp-mask-1", "z": [[0, 0, 1, 1]], "flops_ratio": 0.7, "ppl": 21.0, "tasks": {},
     "flops_ratio_with_router": 0.7, "forward_tokens": 0, "loglikelihood": [-2.0, -2.0, -6.0]},
]
REPORT = """\
| method | sparsity | piqa (n=5) | average | % of dense | skipped attention | \
skipped FFN | FLOPs | FLOPs + router | perplexity | forward tokens |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| dense | 0.0% | 60.00 ± 20.00 | 60.00 | 100.00% | 0 | 0 | 100.0% | 100.0% | 10.00 | 0 |
| igp | 37.5% | 30.00 ± - | 30.00 | 50.00% | 0-1 | 1 | 80.0% | 90.0% | 20.00 | 77 |
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

Its own mask serves a cluster best (lowest on the diagonal) in 2 of 2 clusters. Routing has \
20.00, the best single mask for all, igp-mask-1, 21.00."""


def test_report():
    assert evaluate.report(ROWS_OF_A_RUN, ["7 texts", "8 texts"]) == REPORT
    alone = evaluate.report([ROWS_OF_A_RUN[2]], [])
    assert "average" not in alone and "Masks" not in alone


def test_a_mask_that_another_one_beats_is_not_counted():
    dense, igp, own, other = copy.deepcopy(ROWS_OF_A_RUN)
    other["loglikelihood"] = [x + 1 for x in own["loglikelihood"]]
    igp["cluster"] = [0, 0, 0]                                    # cluster 1 has no held-out text
    text = evaluate.report([dense, igp, own, other], [])
    assert "in 0 of 1 clusters" in text and "| 1 (" not in text
