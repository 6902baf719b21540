"""Who said it, and what a persona is worth: against readings one by one, by hand, and by broken models."""

import numpy as np
import pytest
import torch
from conftest import PERSONAS, ROLE_SAMPLES, adapter_weights, conversation, one_by_one, said, scalars
from peft import LoraConfig, get_peft_model

import train
import utils
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from support.dialogues.samples import read_samples
from support.scores import persona
from support.scores.likelihood import Likelihood
from support.scores.persona import Readings, WhoSaidIt, persona_scores, read_personas, who_said_it_now
from support.scores.table import Items, compare


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return BaichuanTokenizer.from_pretrained(checkpoint)


# ---------------------------------------------------------------- one by one


def test_every_answer_is_read_under_every_persona_and_under_none(model, tokenizer):
    scores = read_personas(Likelihood(model, tokenizer), ROLE_SAMPLES)
    assert scores.roles == list(PERSONAS)
    assert scores.is_author.argmax(1).tolist() == [0, 0, 1, 1, 2] and scores.question.tolist() == [0, 0, 0, 1, 1]
    for number, sample in enumerate(ROLE_SAMPLES):
        systems = [*PERSONAS.values(), ""]
        expected = [one_by_one(model, tokenizer, {**sample, "system": system}) for system in systems]
        assert scores.tokens[number] == len(expected[0])
        assert [*scores.nats[number], scores.without[number]] == pytest.approx([sum(x) for x in expected], abs=1e-4)


def test_an_answer_cut_under_one_persona_is_left_out(model, tokenizer):
    """Under a longer persona fewer of its tokens fit, and sums of different tokens cannot be compared."""
    long = said("皇帝", "朕" * 30, "你是谁？", "朕。")
    whole = read_personas(Likelihood(model, tokenizer), [*ROLE_SAMPLES, long])
    assert len(whole.is_author) == 6
    likelihood = Likelihood(model, tokenizer, max_len=30 + len(tokenizer.text_to_ids("你是谁？朕。")) + 3)
    assert 0 < len(likelihood([{**ROLE_SAMPLES[3], "system": "朕" * 30}])[0]) < whole.tokens[3]
    kept = read_personas(likelihood, [*ROLE_SAMPLES, long])
    assert len(kept.is_author) < 6 and kept.is_author[-1].tolist() == [False, False, False, True]
    nothing = read_personas(lambda samples: [np.empty(0)] * len(samples), ROLE_SAMPLES)
    assert len(nothing.tokens) == 0 and persona_scores(nothing) == {}


def test_own_loss_is_the_loss_that_training_reports(model, tokenizer, samples):
    """The same test set through `utils.evaluation`, which train.py logs as test_loss."""
    records = list(read_samples(samples[1]))
    scores = read_personas(Likelihood(model, tokenizer), records)
    data = utils.RoleDataset(records, tokenizer, 512, 256)
    batches = utils.Collator(data, "none", 0, 4)(np.arange(len(data)))
    expected = utils.evaluation(model, batches, "cpu", "sdpa")
    assert -scores.nats[scores.is_author].sum() / scores.tokens.sum() == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- by hand

# Three roles, six answers. By row: log-likelihood under the personas of A, B and C.
KINDS = ["general", "general", "general", "role-specific", "general", "general"]
HAND = Readings(
    roles=["A", "B", "C"],
    items=Items(["A", "A", "A", "A", "B", "C"], KINDS, [None] * 6, np.array([0, 0, 1, 2, 1, 3])),
    is_author=np.eye(3, dtype=bool)[[0, 0, 0, 0, 1, 2]],
    question=np.array([0, 0, 1, 2, 1, 3]),
    tokens=np.array([2, 2, 4, 5, 10, 8]),
    nats=np.array(
        [[-2, -4, -5], [-3, -1, -4], [-6, -8, -9], [-10, -15, -20], [-9, -20, -19], [-30, -30, -30]], dtype=float
    ),
    without=np.array([-5, -4, -9, -20, -19, -30], dtype=float),
)


def rows_of(models: dict[str, Readings], by="", label="", resamples=50) -> dict:
    scores = {name: persona_scores(said) for name, said in models.items()}
    return {row.measure: row for row in compare(scores, resamples, 1, by, label)}


def value_of(said: Readings, measure: str, *part) -> float:
    return rows_of({"model": said}, *part)[measure].models[0].value


def test_by_hand_accuracy_margin_and_confusion():
    # A: heard as A, B, A, A, so 3 of 4; margins (+2 / 2, −2 / 2, +2 / 4, +5 / 5). B: heard as A, margin −11 / 10. C: all
    # three are equal, so a third of it is heard as each, with a margin of 0.
    assert HAND.confusion() == pytest.approx(np.array([[3 / 4, 1 / 4, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))
    for role, accuracy, margin in (("A", 75, 1.5 / 4), ("B", 0, -1.1), ("C", 100 / 3, 0)):
        assert value_of(HAND, "who_said_it", "role", role) == pytest.approx(accuracy)
        assert value_of(HAND, "who_said_it_margin", "role", role) == pytest.approx(margin)
        assert rows_of({"model": HAND}, "role", role)["who_said_it"].beside == {"chance": pytest.approx(100 / 3)}
    assert value_of(HAND, "who_said_it") == pytest.approx((75 + 100 / 3) / 3)
    assert value_of(HAND, "who_said_it_margin") == pytest.approx((1.5 / 4 - 1.1) / 3)

    general = rows_of({"model": HAND}, "kind", "general")
    assert general["who_said_it"].count == 5 and general["who_said_it"].models[0].value == pytest.approx(100 / 3)
    shared = rows_of({"model": HAND})["who_said_it_shared"]  # question 1 alone: of A and of B
    assert (shared.count, shared.beside, shared.models[0].value) == (2, {"chance": 50}, 50)
    # Of role-specific questions there is one, of A: nobody to be taken for.
    assert "who_said_it" not in rows_of({"model": HAND}, "kind", "role-specific")


def test_who_always_hears_the_same_role_is_at_chance_among_those_who_answer():
    """Five roles, two of which have answers: C's persona, under which all is likeliest, is nobody's here."""
    items, own = Items(["A"] * 3 + ["B"], [None] * 4, [None] * 4, np.arange(4)), np.eye(5, dtype=bool)[[0, 0, 0, 1]]
    said = Readings(list("ABCDE"), items, own, np.arange(4), np.ones(4), np.tile([-2.0, -3, -1, -4, -5], (4, 1)), None)
    row = compare({"model": {"who_said_it": WhoSaidIt(said)}}, 5, 1)[0]
    assert row.models[0].value == row.beside["chance"] == 50
    assert said.confusion()[0].tolist() == [0, 0, 1, 0, 0]


def test_rounds_of_one_conversation_are_drawn_together():
    samples = [{**conversation("诗", *texts), "role": "李白"} for texts in ("甲乙", "甲乙丙丁", "丙丁")]
    found = read_personas(lambda read: [np.array([-1.0]) for _ in read], samples)
    assert found.question.tolist() == [0, 1, 2] and found.items.cluster.tolist() == [0, 0, 1]


def test_by_hand_what_the_persona_is_worth():
    # A: own −21 over 13 tokens; others (−4.5, −2.5, −8.5, −17.5) = −33; none −38.
    assert value_of(HAND, "loss", "role", "A") == pytest.approx(21 / 13)
    assert value_of(HAND, "worth_another", "role", "A") == pytest.approx(12 / 13)
    assert value_of(HAND, "worth_none", "role", "A") == pytest.approx(17 / 13)
    # B: own −20 over 10; others (−9 − 19) / 2; none −19. One answer alone has no spread.
    row = rows_of({"model": HAND}, "role", "B")["worth_another"]
    assert row.models[0] == pytest.approx((-0.6, -0.6, -0.6))
    assert value_of(HAND, "worth_none", "role", "B") == pytest.approx(-0.1)
    assert value_of(HAND, "loss") == pytest.approx((21 + 20 + 30) / (13 + 10 + 8))


def test_one_role_has_a_gain_against_none_alone():
    found = read_personas(lambda samples: [np.array([-1.0 - (not s["system"])]) for s in samples], ROLE_SAMPLES[:2])
    rows = rows_of({"model": found})
    assert set(rows) == {"loss", "worth_none"}
    assert rows["loss"].models[0].value == 1 and rows["worth_none"].models[0] == (1, 1, 1)


# ---------------------------------------------------------------- broken models


def test_a_model_that_knows_its_roles_is_heard_and_one_without_its_adapter_is_not(checkpoint, tokenizer):
    answers = {"孙悟空": "俺老孙在此！", "李白": "且饮一杯。", "张飞": "吃我一矛！"}
    questions = ["你是谁？", "你好。", "去哪里？", "几时回？"]
    samples = [said(role, PERSONAS[role], question, answers[role]) for role in answers for question in questions]
    data = utils.RoleDataset(samples, tokenizer, 512, 256)
    (batch,) = utils.Collator(data, "tree", 4096, 4)(data.in_tree_order(np.arange(len(data))))
    inputs = utils.model_inputs(batch, "cpu", "sdpa")
    torch.manual_seed(1)
    base = BaichuanForCausalLM.from_pretrained(checkpoint)
    targets = utils.find_all_linear_names(base)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    likelihood = Likelihood(model.eval(), tokenizer)
    tuned = read_personas(likelihood, samples)
    with model.disable_adapter():
        base = read_personas(likelihood, samples)
    assert tuned.confusion() == pytest.approx(np.eye(3))
    rows = rows_of({"base": base, "tuned": tuned}, resamples=200)
    assert rows["who_said_it"].models[1] == (100, 100, 100)
    assert rows["who_said_it"].differences[0].low > 0  # of so few answers a random model may get more than a third
    for role in PERSONAS:
        gains = [value_of(said, "worth_another", "role", role) for said in (tuned, base)]
        assert gains[0] > 1 and abs(gains[1]) < 0.5


def test_of_very_many_roles_the_most_frequent_are_read(monkeypatch):
    monkeypatch.setattr(persona, "MOST_ROLES", 2)
    scores = read_personas(lambda samples: [np.array([-1.0])] * len(samples), ROLE_SAMPLES)
    assert scores.roles == ["孙悟空", "李白"] and scores.nats.shape == (4, 2)


# ---------------------------------------------------------------- while training


def test_the_slice_costs_a_tenth_of_the_evaluation(monkeypatch):
    chosen = []
    monkeypatch.setattr(persona, "Likelihood", lambda *_, **shared: None)
    monkeypatch.setattr(persona, "read_personas", lambda _, samples: chosen.append(samples) or HAND)
    everything = [said(role, PERSONAS[role], f"第{number}问？", "好。") for role in PERSONAS for number in range(600)]
    found = who_said_it_now(everything, None, None)
    assert [sum(sample["role"] == role for sample in chosen[0]) for role in PERSONAS] == [15, 15, 15]
    assert len(chosen[0]) * 4 <= len(everything) / 10
    assert found["who_said_it_accuracy"] == pytest.approx((75 + 100 / 3) / 3)
    assert found["who_said_it_margin"] == pytest.approx((1.5 / 4 - 1.1) / 3)
    who_said_it_now(ROLE_SAMPLES, None, None)
    assert [sum(sample["role"] == role for sample in chosen[1]) for role in PERSONAS] == [2, 2, 1]
    assert who_said_it_now(ROLE_SAMPLES[:2], None, None) == {}


def test_training_shows_it_and_ends_with_the_same_weights(train_arguments, tmp_path, monkeypatch):
    flags = ["--save_model_step", 2, "--sample_answers", 0, "--lora_dropout", 0.3]
    train.main(train_arguments(tmp_path / "shown", *flags))
    accuracy = scalars(tmp_path / "shown", "who_said_it_accuracy")
    assert [step for step, _ in accuracy] == [2, 4, 5] and all(0 <= value <= 100 for _, value in accuracy)
    assert len({value for _, value in scalars(tmp_path / "shown", "who_said_it_margin")}) == 3
    monkeypatch.setattr(train, "who_said_it_now", lambda *_: {})
    train.main(train_arguments(tmp_path / "hidden", *flags))
    shown, hidden = (adapter_weights(tmp_path / name / "epoch-1-step-5") for name in ("shown", "hidden"))
    assert shown.keys() == hidden.keys() and all(torch.equal(shown[name], hidden[name]) for name in shown)
