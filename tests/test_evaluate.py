"""evaluate.py against transformers' full logits, and its metrics by hand."""
import numpy as np
import pytest
import torch
from conftest import hook_gates, make_tokenizer

import evaluate
import model as llm
from evaluate import Question

B = 6
REQUESTS = [([5, 9, 11], [3, 40]), ([7], list(range(20, 45))), ([1, 2, 3, 4, 5, 6], [90]),
            ([60, 61], [62, 63, 64, 65]), ([7, 7, 7], [8, 9]), ([50], [51])]


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


@pytest.mark.parametrize("batch_tokens", [1, 16, 10_000])
def test_loglikelihoods_equal_full_logits_at_any_batch_size(pair, batch_tokens):
    model, reference = pair
    ours = evaluate.loglikelihoods(model, REQUESTS, None, batch_tokens)
    np.testing.assert_allclose(ours, [by_hand(reference, *r) for r in REQUESTS], atol=1e-4)


def test_order_and_padding_do_not_matter(pair):
    model, _ = pair
    once = evaluate.loglikelihoods(model, REQUESTS, None)
    back = evaluate.loglikelihoods(model, REQUESTS[::-1], None)[::-1]
    np.testing.assert_allclose(back, once, atol=1e-5)
    alone = [evaluate.loglikelihoods(model, [r], None)[0] for r in REQUESTS]
    np.testing.assert_allclose(alone, once, atol=1e-4)


def test_each_request_gets_its_own_z(pair, checkpoint):
    model, _ = pair
    z = torch.ones(len(REQUESTS), B, dtype=torch.bool)
    z[1:3, 2] = z[4, 5] = False
    ours = evaluate.loglikelihoods(model, REQUESTS, z)
    for r, request in enumerate(REQUESTS):
        _, reference = checkpoint("llama")
        hook_gates(reference, z[r].float())
        assert ours[r] == pytest.approx(by_hand(reference, *request), abs=1e-4)


def test_too_long_requests_lose_their_left_end(checkpoint):
    folder, reference = checkpoint("llama", max_position_embeddings=10)
    model = llm.load(folder, "cpu", torch.float32)
    context, continuation = list(range(2, 30)), [31, 32, 33]
    requests = [(context, continuation), ([4], list(range(40, 60)))]
    ours = evaluate.loglikelihoods(model, requests, None)
    kept = (context + continuation)[-11:]
    assert ours[0] == pytest.approx(by_hand(reference, kept[:-3], kept[-3:]), abs=1e-4)
    assert ours[1] == pytest.approx(by_hand(reference, [49], list(range(50, 60))), abs=1e-4)


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


def test_acc_and_acc_norm_on_three_questions_by_hand(monkeypatch):
    """log P (-4, -6) of 2 and 4 characters -> acc 0, acc_norm 1; then a tie; then both right."""
    questions = [Question("c", ["ab", "abcd"], 1), Question("c", ["ab", "ab"], 1),
                 Question("c", ["abc", "d"], 0)]
    monkeypatch.setattr(evaluate, "loglikelihoods",
                        lambda *_: np.array([-4.0, -6.0, -5.0, -5.0, -1.0, -2.0]))
    scores = evaluate.multiple_choice(None, make_tokenizer(), questions, None)
    assert scores["acc"] == pytest.approx(1 / 3) and scores["acc_norm"] == pytest.approx(2 / 3)
    assert scores["acc_stderr"] == pytest.approx(np.std([0, 0, 1], ddof=1) / 3**0.5)
    assert scores["acc_norm_stderr"] == pytest.approx(np.std([1, 0, 1], ddof=1) / 3**0.5)
    assert scores["n"] == 3


def test_choices_share_the_z_of_their_question(pair):
    model, reference = pair
    questions = [Question("w1 w2", ["w3", "w4 w5", "w6"], 0), Question("w9", ["w8", "w7"], 1)]
    z = torch.ones(2, B, dtype=torch.bool)
    z[1, 3] = False
    seen = {}
    original = evaluate.loglikelihoods

    def spy(model, requests, z):
        seen.update(requests=requests, z=z)
        return original(model, requests, z)

    evaluate.loglikelihoods = spy
    try:
        evaluate.multiple_choice(model, make_tokenizer(), questions, z)
    finally:
        evaluate.loglikelihoods = original
    assert torch.equal(seen["z"], z[[0, 0, 0, 1, 1]])
    assert seen["requests"][1] == ([3, 4], [6, 7]) and seen["requests"][3] == ([11], [10])


def test_context_is_cut_out_of_the_joint_encoding_and_bos_is_not_doubled():
    question = Question("w1 w2", ["w3"], 0)
    assert evaluate.choice_requests(question, make_tokenizer(bos=True)) == [([1, 3, 4], [5])]


def test_wiki_what_asks_only_honest_questions():
    topics = ["Arts", "Geography", "Uncategorized"]
    articles = [{"title": f"T{i}", "topic": topics[i % 3], "description": f"thing number {i}"}
                for i in range(60)]
    judging = articles[:12] + [
        {"title": "Lake Foo", "topic": "Arts", "description": "A lake foo somewhere"},
        {"title": "Bar", "topic": "Arts", "description": None}]
    questions = evaluate.wiki_what(articles, judging, np.random.default_rng(0))
    assert [q.context for q in questions] == [
        f"Question: What is T{i}?\nAnswer:" for i in range(12) if i % 3 != 2]
    of = {a["description"]: a for a in articles}
    for q in questions:
        title = q.context.split("What is ")[1].split("?")[0]
        assert of[q.choices[q.gold]]["title"] == title
        assert len(set(q.choices)) == 4 and len({of[c]["topic"] for c in q.choices}) == 1
    assert len({q.gold for q in questions}) > 1
    assert questions == evaluate.wiki_what(articles, judging, np.random.default_rng(0))
