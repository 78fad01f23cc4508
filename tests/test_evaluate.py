"""evaluate.py against transformers' full logits, and its metrics by hand."""
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, hook_gates, make_golden_model, make_tokenizer

import evaluate
import hub
import model as llm
from evaluate import Question

B = 6
GROUPS = [([5, 9, 11], [[3, 40]]), ([7], [list(range(20, 45)), [8], [9, 10]]),
          ([1, 2, 3, 4, 5, 6], [[90], [91, 92, 93, 94], [90, 1]]), ([60, 61], [[62, 63, 64, 65]]),
          ([7, 7, 7], [[8, 9], [8, 9], [9, 8], [7, 7, 7, 7, 7]]), ([50], [[51]])]


def by_hand(reference, context, continuation):
    """One request at a time, every position through the head, a float64 log-softmax."""
    with torch.no_grad():
        logits = reference(torch.tensor([context + continuation])).logits[0].double()
    log_p = logits.log_softmax(-1)
    return sum(log_p[len(context) - 1 + j, y].item() for j, y in enumerate(continuation))


@pytest.fixture
def pair(checkpoint):
    folder, reference = checkpoint("llama")
    return llm.load(folder, "cpu", torch.float32), reference


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_packed_choices_score_as_each_does_alone(pair, batch_tokens):
    """The context once, then the choices as branches: the same as one plain sequence a choice."""
    model, reference = pair
    ours = evaluate.loglikelihoods(model, GROUPS, None, batch_tokens)
    for found, (context, choices) in zip(ours, GROUPS, strict=True):
        wanted = [by_hand(reference, context, y) for y in choices]
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_order_and_padding_do_not_matter(pair):
    model, _ = pair
    once = np.concatenate(evaluate.loglikelihoods(model, GROUPS, None))
    back = np.concatenate(evaluate.loglikelihoods(model, GROUPS[::-1], None)[::-1])
    np.testing.assert_allclose(back, once, atol=1e-4)
    alone = [evaluate.loglikelihoods(model, [group], None)[0] for group in GROUPS]
    np.testing.assert_allclose(np.concatenate(alone), once, atol=1e-4)


def test_the_context_runs_once_and_the_head_on_continuations_only(pair, monkeypatch):
    model, _ = pair
    seen, head, forward = [], [], llm.Transformer.forward
    monkeypatch.setattr(llm.Transformer, "forward", lambda self, tokens, *a, **k: (
        seen.append(tokens.shape), forward(self, tokens, *a, **k))[1])
    original = llm.Transformer.head
    monkeypatch.setattr(llm.Transformer, "head", lambda self, h: (
        head.append(len(h)), original(self, h))[1])
    evaluate.loglikelihoods(model, GROUPS[4:5], None)
    assert seen == [(1, 3 + 1 + 1 + 1 + 4)] and sum(head) == 2 + 2 + 2 + 5


def test_branches_see_the_context_and_themselves():
    seen = evaluate._branches(torch.tensor([[0, 0, 1, 1, 2]]))[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0],
                    [1, 1, 0, 0, 1]]


def test_batches_hold_like_lengths_and_no_more_tokens_than_asked(pair, monkeypatch):
    model, _ = pair
    shapes, forward = [], llm.Transformer.forward
    monkeypatch.setattr(llm.Transformer, "forward", lambda self, tokens, *a, **k: (
        shapes.append(tokens.shape), forward(self, tokens, *a, **k))[1])
    groups = [([3] * n, [[4]]) for n in range(1, 30)]
    evaluate.loglikelihoods(model, groups, None, batch_tokens=60)
    assert all(rows * width <= 60 for rows, width in shapes)
    assert [width for _, width in shapes] == sorted((width for _, width in shapes), reverse=True)
    assert sum(rows for rows, _ in shapes) == 29 and len(shapes) < 16


def test_each_group_gets_its_own_z(pair, checkpoint):
    model, _ = pair
    z = torch.ones(len(GROUPS), B, dtype=torch.bool)
    z[1:3, 2] = z[4, 5] = False
    ours = evaluate.loglikelihoods(model, GROUPS, z)
    for found, row, (context, choices) in zip(ours, z, GROUPS, strict=True):
        _, reference = checkpoint("llama")
        hook_gates(reference, row.float())
        wanted = [by_hand(reference, context, y) for y in choices]
        np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_too_long_requests_lose_their_left_end(checkpoint):
    """Each choice on its own, as lm-evaluation-harness cuts them: the last 10 of inputs stay."""
    folder, reference = checkpoint("llama", max_position_embeddings=10)
    model = llm.load(folder, "cpu", torch.float32)
    context, choices = list(range(2, 30)), [[31, 32, 33], [34], [35, 36, 37, 38, 39]]
    groups = [(context, choices), ([4], [list(range(40, 60))]), ([5, 6], [[7, 8], [9]])]
    ours = evaluate.loglikelihoods(model, groups, None)
    for found, y in zip(ours[0], choices, strict=True):
        kept = (context + y)[-11:]
        assert found == pytest.approx(by_hand(reference, kept[:-len(y)], y), abs=1e-4)
    assert ours[1][0] == pytest.approx(by_hand(reference, [49], list(range(50, 60))), abs=1e-4)
    assert ours[2][1] == pytest.approx(by_hand(reference, [5, 6], [9]), abs=1e-4)


def test_log_probs_never_hold_the_logits_of_all_positions(pair, monkeypatch):
    model, _ = pair
    hidden, targets = torch.randn(50, 48), torch.arange(50)
    whole = evaluate.log_probs(model, hidden, targets)
    monkeypatch.setattr(evaluate, "HEAD_ROWS", 7)
    seen = []
    monkeypatch.setattr(model, "head", lambda h: seen.append(len(h)) or h @ model.head_weight.T)
    torch.testing.assert_close(evaluate.log_probs(model, hidden, targets), whole)
    assert max(seen) == 7 and sum(seen) == 50


def test_perplexity_weighs_tokens_not_texts():
    loglik, n = np.array([-2.0, -30.0]), np.array([1, 10])
    assert evaluate.perplexity(loglik, n) == pytest.approx(np.exp(32 / 11))


def ask(choices, gold, contexts=None):
    contexts = contexts or ["c"] * len(choices)
    return Question(contexts, choices, gold, contexts[0])


def test_acc_and_acc_norm_on_three_questions_by_hand():
    """log P (-4, -6) of 2 and 4 characters -> acc 0, acc_norm 1; then a tie; then both right."""
    questions = [ask(["ab", "abcd"], 1), ask(["ab", "ab"], 1), ask(["abc", "d"], 0)]
    logliks = [np.array(x) for x in ([-4.0, -6.0], [-5.0, -5.0], [-1.0, -2.0])]
    scores = evaluate.accuracy(questions, logliks)
    assert scores["acc"] == pytest.approx(1 / 3) and scores["acc_norm"] == pytest.approx(2 / 3)
    assert scores["acc_stderr"] == pytest.approx(np.std([0, 0, 1], ddof=1) / 3**0.5)
    assert scores["acc_norm_stderr"] == pytest.approx(np.std([1, 0, 1], ddof=1) / 3**0.5)
    assert scores["n"] == 3
    blank = [ask(["end", "end"], 1, ["a x", "a y"])] * 2          # WinoGrande's form
    scores = evaluate.accuracy(blank, [np.array([-2.0, -1.0]), np.array([-1.0, -2.0])])
    assert scores["acc"] == 0.5 and scores["acc_norm"] is scores["acc_norm_stderr"] is None
    assert evaluate.right(ask(["", "abc"], 1), np.array([-1.0, -90.0])) == (0, 1)
    # characters, not bytes: 4 of them are 8 bytes, and would win
    assert evaluate.right(ask(["äöüß", "abcdef"], 1), np.array([-5.0, -6.0])) == (0, 1)


def test_choices_share_the_z_of_their_question(pair, monkeypatch):
    model, _ = pair
    questions = [ask(["w3", "w4 w5", "w6"], 0, ["w1 w2"] * 3), ask(["w8", "w8"], 1, ["w9", "w7"]),
                 ask(["w5"], 0, ["w2"])]
    z = torch.ones(3, B, dtype=torch.bool)
    z[1, 3] = z[2, 0] = False
    seen, original = {}, evaluate.loglikelihoods

    def spy(model, groups, z):
        seen.update(groups=groups, z=z)
        return original(model, groups, z)

    monkeypatch.setattr(evaluate, "loglikelihoods", spy)
    values = evaluate.score(model, make_tokenizer(), questions, z, "auto")
    assert [len(x) for x in values] == [3, 2, 1]
    assert torch.equal(seen["z"], z[[0, 1, 1, 2]])                # two plain sequences in between
    assert seen["groups"] == [([3, 4], [[5], [6, 7], [8]]), ([11], [[10]]), ([9], [[10]]),
                              ([4], [[7]])]


def test_bos_as_the_tokenizer_does_always_or_never():
    plain, habit = make_tokenizer(), make_tokenizer(bos=True)
    for tokenizer, bos, wanted in ((plain, "auto", [3, 4]), (habit, "auto", [1, 3, 4]),
                                   (plain, "off", [3, 4]), (habit, "off", [3, 4]),
                                   (plain, 1, [1, 3, 4]), (habit, 1, [1, 3, 4])):
        assert evaluate.encode(tokenizer, "w1 w2", bos) == wanted
    for bos in ("auto", 1):                                       # not doubled
        assert evaluate.encode(habit, "<bos> w1", bos) == [1, 3]
    assert evaluate.choice_ids(ask(["w3"], 0, ["w1 w2"]), habit, "auto") == [([1, 3, 4], [[5]])]


@pytest.fixture
def merging():
    """Byte-level BPE on "a b" in which "a b", " b" and " x" are tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    pieces = ["a", "b", "x", "Ġ", ":", "Ġb", "Ġx", "ĠĠ", ":Ġ"]
    merges = [("Ġ", "b"), ("Ġ", "x"), ("Ġ", "Ġ"), (":", "Ġ")]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_the_cut_between_context_and_continuation(merging):
    """Trailing spaces go to the continuation; tokens may merge across; the context stays alone."""
    def ids(context, choice):
        return evaluate.choice_ids(ask([choice], 0, [context]), merging, "auto")[0]

    assert ids("a", "b") == ([0], [[5]])                          # " b" is one token
    assert ids("a ", "x") == ids("a", " x") == ([0], [[3, 6]])    # "a" + "  x"
    # "a:" alone is [a, :]; with "  b" behind it ":Ġ" could merge across the cut
    context, [continuation] = ids("a:", "b")
    assert context == [0, 4]
    assert continuation == merging.encode("a: b").ids[2:]
    with pytest.raises(ValueError, match="no token"):
        ids("", "b")


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


def test_the_first_blank_is_the_one_to_fill():
    question = evaluate.read_row("winogrande", ROWS["winogrande"] | {"sentence": "a _ b _ c"})
    assert question.contexts[0] == "a Samantha" and question.choices[0] == "b _ c"


@pytest.mark.parametrize(("task", "change", "named"), [
    ("openbookqa", {"question_stem": None}, "field question_stem is 'None', expected str"),
    ("openbookqa", {"answerKey": "C"}, "field answerKey is 'C', expected one of A, B"),
    ("arc_easy", {"choices": {"text": [], "label": []}}, "choices.text is .*expected a list of te"),
    ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["1"]}}, "2 texts, 1 labels"),
    ("arc_challenge", {"choices": {"text": ["a", 3], "label": ["1", "2"]}}, "choices.text"),
    ("winogrande", {"sentence": "no gap"}, "field sentence has no blank _"),
    ("winogrande", {"answer": "3"}, "field answer is '3', expected one of 1, 2"),
    ("hellaswag", {"endings": []}, "field endings"), ("hellaswag", {"label": ""}, "label is ''"),
    ("piqa", {"label": -1}, "field label is -1, expected one of 0, 1"),
    ("piqa", {"sol2": 4}, "field sol2 is '4', expected str"),
])
def test_a_row_that_is_none_names_its_field(task, change, named):
    with pytest.raises(ValueError, match=named):
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


@pytest.mark.parametrize("batch_tokens", [100, 4096])
@pytest.mark.parametrize("bos", ["auto", "off"])
@pytest.mark.parametrize("task", evaluate.FIELDS)
def test_scores_equal_lm_evaluation_harness(golden, task, bos, batch_tokens, monkeypatch):
    """Its 0.4.13 on the same tiny model: every row's log-likelihoods and hits, and the means."""
    model, tokenizer, questions, lines = golden
    monkeypatch.setattr(evaluate.loglikelihoods, "__defaults__", (batch_tokens,))
    *rows, means = [x for x in lines if x["task"] == task and x["bos"] == bos]
    logliks = evaluate.score(model, tokenizer, questions[task], None, bos)
    assert len(rows) == len(logliks) == 12
    for row, question, found in zip(rows, questions[task], logliks, strict=True):
        np.testing.assert_allclose(found, row["loglikelihood"], atol=1e-3, rtol=1e-5)
        assert evaluate.right(question, found) == (row["acc"], row["acc_norm"]), row
    ours = evaluate.accuracy(questions[task], logliks)
    for key in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
        assert ours[key] == (means[key] if means[key] is None else pytest.approx(means[key]))


def test_golden_rows_hold_the_footguns(golden):
    """A trailing space to move, a blank before 's, 3 and 5 choices, digit labels, both policies."""
    _, tokenizer, questions, lines = golden
    assert any(q.contexts[0].endswith(" ") for q in questions["openbookqa"])
    assert any(q.contexts[0].endswith(" ") for q in questions["hellaswag"])
    assert any(q.choices[0].startswith("'s ") for q in questions["winogrande"])
    assert any(c.startswith(" ") for q in questions["hellaswag"] for c in q.choices)
    assert {len(q.choices) for q in questions["arc_easy"]} == {3, 4, 5}
    assert tokenizer.encode("a").ids[0] == 0 and len({str(x["loglikelihood"]) for x in lines
                                                      if x.get("row") == 0}) == 12


def test_wiki_what_asks_only_honest_questions():
    topics = ["Arts", "Geography", "Uncategorized"]
    articles = [{"title": f"T{i}", "topic": topics[i % 3], "description": f"thing number {i}"}
                for i in range(60)]
    judging = articles[:12] + [
        {"title": "Lake Foo", "topic": "Arts", "description": "A lake foo somewhere"},
        {"title": "Bar", "topic": "Arts", "description": None}]
    questions = evaluate.wiki_what(articles, judging, np.random.default_rng(0))
    assert [q.routed for q in questions] == [
        f"Question: What is T{i}?\nAnswer:" for i in range(12) if i % 3 != 2]
    of = {a["description"]: a for a in articles}
    for q in questions:
        title = q.routed.split("What is ")[1].split("?")[0]
        assert of[q.choices[q.gold]]["title"] == title
        assert len(set(q.choices)) == 4 and len({of[c]["topic"] for c in q.choices}) == 1
    assert len({q.gold for q in questions}) > 1
    assert questions == evaluate.wiki_what(articles, judging, np.random.default_rng(0))
