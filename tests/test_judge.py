"""The judge on a tiny random model: formats, votes, orders, streams, and work that is done once."""

import json

import pytest

from flexjudge_fast import (
    InvalidArgumentError,
    Judge,
    Judgement,
    PromptError,
    RequestTooLargeError,
    Response,
    Verdict,
)
from flexjudge_fast.judge import TextEvent
from tests.models import write_checkpoint

QUICK = {"max_think_tokens": 8}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    write_checkpoint(folder)
    return Judge.from_pretrained(folder, kv_cache_memory="128MiB")


def test_the_four_formats(judge):
    score = judge.score("Q", "A", scale=(1, 5), **QUICK)
    assert score.scores[0] in range(1, 6) and score.winner is None
    pair = judge.compare("Q", ["A", "B"], **QUICK)
    assert pair.winner in (0, 1, "tie")
    rank = judge.rank("Q", ["A", "B", "C", "D"], temperature=1.0, **QUICK)
    assert sorted(rank.ranking) == [0, 1, 2, 3] and len(set(rank.scores)) == 4
    choice = judge.choose("Q", ["A", "B"], **QUICK)
    assert choice.choice in ("A>B", "B>A", "A=B=Good", "A=B=Bad")
    for verdict in (score, pair, rank, choice):
        assert verdict.finish_reason == "answer"
        assert all(sum(probs.values()) == pytest.approx(1) for probs in verdict.score_probs)
        assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict
        assert repr(verdict).startswith("<Verdict") and "<table>" in verdict._repr_html_()


def test_decimals(judge):
    verdict = judge.score("Q", "A", scale=(1.0, 3.0), temperature=1.0, votes=8, **QUICK)
    assert set(verdict.score_probs[0]) >= {"1", "1.0", "2.7", "3.0"}
    assert all(1 <= vote.scores[0] <= 3 for vote in verdict.votes)


def test_score_probs_are_the_models_own(judge):
    """The distribution, ten apart from one, equals the one read off full-prompt logits."""
    verdict = judge.score("Q", "A", scale=(1, 10), max_think_tokens=0, temperature=0)
    engine = judge.engine
    from flexjudge_fast.prompts.builder import build_messages

    judgement = Judgement("score", "Q", ("A",), max_think_tokens=0)
    prompt = list(engine.encode(build_messages(judgement, judge.template, (0,))).token_ids)
    base = prompt + engine.tokenizer.encode_text("<answer>")
    digit = {d: engine.tokenizer.encode_text(d)[0] for d in "0123456789"}
    first = engine.logits(base)[-1].double()
    first = first[[digit[d] for d in "123456789"]].softmax(0)
    second = engine.logits([*base, digit["1"]])[-1].double()
    ten = float(second[[digit["0"], engine.tokenizer.encode_text("</answer>")[0]]].softmax(0)[0])
    want = {str(i + 1): float(p) for i, p in enumerate(first)}
    want["10"], want["1"] = want["1"] * ten, want["1"] * (1 - ten)
    assert verdict.score_probs[0] == pytest.approx(want, abs=1e-5)
    assert verdict.expected_scores[0] == pytest.approx(sum(int(v) * p for v, p in want.items()), abs=1e-4)


def test_votes_compute_the_prompt_once(judge):
    before = judge.engine.stats().num_forward_tokens
    verdict = judge.score("a question nobody asked before", "A", votes=8, temperature=1.0, **QUICK)
    computed = judge.engine.stats().num_forward_tokens - before
    assert len(verdict.votes) == 8
    # The prompt once, then each vote's own tokens and one probe for "10"; forced tokens are counted too.
    assert computed <= verdict.usage.prompt - verdict.usage.cached + verdict.usage.generated + 8
    assert len({vote.reasoning for vote in verdict.votes}) > 1


def test_both_orders_recompute_only_behind_the_first_difference(judge):
    verdict = judge.compare("another question", ["first answer", "second answer"], order="both", **QUICK)
    texts = []

    def stream(event: TextEvent) -> None:
        texts.append(event)

    assert [vote.order for vote in verdict.votes] == [(0, 1), (1, 0)]
    assert verdict.order_consistent in (True, False)
    from flexjudge_fast.prompts.builder import build_messages

    judgement = Judgement("pair", "another question", ("first answer", "second answer"))
    orders = [
        judge.engine.encode(build_messages(judgement, judge.template, o)).token_ids for o in ((0, 1), (1, 0))
    ]
    shared = next(i for i, (a, b) in enumerate(zip(*orders, strict=False)) if a != b)
    fresh = Judge(judge.engine)
    before = judge.engine.stats().num_cached_tokens
    fresh.compare("another question", ["first answer", "second answer"], order="both", stream=stream, **QUICK)
    assert judge.engine.stats().num_cached_tokens - before >= shared + len(orders[0]) - 1
    assert verdict.usage.cached >= shared
    assert {event.order for event in texts} == {(0, 1), (1, 0)}


def test_a_verdict_does_not_depend_on_the_batch(judge):
    judgements = [Judgement("pair", f"question {i}", ("yes", "no"), votes=2, **QUICK) for i in range(6)]
    together = {v.index: v.votes for v in judge.run(judgements)}
    for i, judgement in enumerate(judgements):
        (alone,) = judge.run([judgement])
        assert [v.scores for v in alone.votes] == [v.scores for v in together[i]]
        assert [v.reasoning for v in alone.votes] == [v.reasoning for v in together[i]]


def test_one_bad_judgement_spoils_nothing(judge):
    items = [
        Judgement("score", "Q", ("A",), **QUICK),
        Judgement("score", "Q" * 9000, ("A",), **QUICK),
        "not a judgement",
        Judgement("score", "Q2", ("A",), **QUICK),
    ]
    verdicts = {v.index: v for v in judge.run(items)}
    assert [verdicts[i].finish_reason for i in range(4)] == ["answer", "error", "error", "answer"]
    with pytest.raises(RequestTooLargeError):
        judge.score("Q" * 9000, "A")


def test_guided_off_without_an_answer_is_no_tie(judge):
    verdict = judge.compare("Q", ["A", "B"], guided="off", max_tokens=12)
    assert (verdict.finish_reason, verdict.winner, verdict.scores) == ("no_answer", None, None)


def test_max_tokens_still_gets_an_answer(judge):
    verdict = judge.compare("Q", ["A", "B"], max_tokens=90)
    assert verdict.finish_reason == "answer"
    assert verdict.usage.generated <= 90


def test_random_order_is_keyed_by_content(judge):
    orders = {
        judge.compare(f"Q{i}", ["A", "B"], order="random", max_think_tokens=0).votes[0].order
        for i in range(8)
    }
    assert orders == {(0, 1), (1, 0)}


def test_own_template(judge, tmp_path):
    from importlib.resources import files

    text = (files("flexjudge_fast.prompts") / "default.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('name = "default"', 'name = "mine"'))
    assert judge.score("Q", "A", template=path, **QUICK).provenance.template.startswith("mine@")
    path.write_text(text.replace("{rubric}", "{rubrick}"))
    with pytest.raises(PromptError, match=r"score\.system.*rubrick"):
        Judge(judge.engine, template=path)
    with pytest.raises(PromptError, match="nowhere"):
        judge.score("Q", "A", template=tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"scale": (5, 1)}, "scale"),
        ({"scale": (1, float("nan"))}, "scale"),
        ({"scale": (1,)}, "scale"),
        ({"votes": 0}, "votes"),
        ({"order": "sideways"}, "order"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"guided": "maybe"}, "guided"),
        ({"rubric": ""}, "rubric"),
        ({"images": "a.png"}, "images"),
        ({"colour": "red"}, "colour"),
        ({"stream": True}, "stream"),
    ],
)
def test_bad_arguments_are_named(judge, options, name):
    with pytest.raises(InvalidArgumentError, match=name):
        judge.score("Q", "A", **options)


def test_bad_texts_are_named(judge):
    for call in (
        lambda: judge.score("", "A"),
        lambda: judge.score("Q", "\ud800"),
        lambda: judge.score("Q", Response()),
        lambda: judge.compare("Q", ["A"]),
        lambda: judge.compare("Q", "AB"),
        lambda: judge.rank("Q", [str(i) for i in range(11)]),
        lambda: Judgement.from_dict({"instruction": "Q", "responses": ["A"], "colour": 1}),
    ):
        with pytest.raises(InvalidArgumentError):
            call()


def test_max_tokens_that_hold_no_answer_are_refused(judge):
    with pytest.raises(InvalidArgumentError, match="max_tokens=5"):
        judge.compare("Q", ["A", "B"], max_tokens=5)


def test_a_scale_whose_scores_all_begin_alike(judge):
    """10 to 15: the first digit leaves no choice, and still every score has its probability."""
    verdict = judge.score("Q", "A", scale=(10, 15), max_think_tokens=0)
    assert verdict.scores[0] in range(10, 16)
    assert sum(verdict.score_probs[0].values()) == pytest.approx(1)
    assert all(p > 0 for p in verdict.score_probs[0].values())
