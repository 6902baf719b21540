"""Who said it, what a persona is worth, and plain text: against readings one by one, by hand, and by broken models."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import adapter_weights, scalars
from peft import LoraConfig, PeftModel, get_peft_model
from test_merge import make_adapter
from test_packing import CONVERSATIONS

import merge_params
import train
import utils
from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import messages_to_ids
from data_helper import read_samples
from support import persona_scores
from support.errors import UserError
from support.forgetting import PlainTextScores, measure_plain_text, plain_text_sections, read_plain_text
from support.intervals import compared
from support.likelihood import Likelihood
from support.model_directory import ModelDirectory
from support.persona_scores import (
    PersonaScores,
    mean_of_roles,
    measure_persona,
    persona_sections,
    who_said_it,
    who_said_it_now,
)


@pytest.fixture(scope="module")
def model(checkpoint):
    return BaichuanForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return BaichuanTokenizer.from_pretrained(checkpoint)


def said(role: str, system: str, question: str, answer: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"role": role, "system": system, "messages": turns}


PERSONAS = {"孙悟空": "你就是孙悟空。", "李白": "你是诗人李白，爱喝酒。", "张飞": "你叫张飞。"}
SAMPLES = [
    said("孙悟空", PERSONAS["孙悟空"], "你是谁？", "俺老孙是也！"),
    said("孙悟空", PERSONAS["孙悟空"], "你是谁？", "齐天大圣！"),
    said("李白", PERSONAS["李白"], "你是谁？", "我乃李太白。"),
    said("李白", PERSONAS["李白"], "饮酒否？", "将进酒，杯莫停。"),
    said("张飞", PERSONAS["张飞"], "饮酒否？", "拿大碗来！"),
]


def one_by_one(model, tokenizer, sample) -> list[float]:
    """The log-probabilities of each supervised token, by a whole pass for each answer of a sample."""
    found, system = [], [{"role": "system", "content": sample["system"]}] if sample["system"] else []
    for place, turn in enumerate(sample["messages"]):
        if turn["role"] == "assistant" and turn.get("train", True):
            prompt = messages_to_ids(tokenizer, [*system, *sample["messages"][:place]])
            answer = [*tokenizer.text_to_ids(turn["content"]), tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            found += [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
    return found


# ---------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("packing", ["tree", "none"])
def test_likelihoods_are_those_of_answers_read_one_by_one(model, tokenizer, packing):
    samples = [*SAMPLES, *CONVERSATIONS, *SAMPLES[:2]]
    found = Likelihood(model, tokenizer, utils, packing=packing)(samples)
    assert len(found) == len(samples)
    for sample, losses in zip(samples, found):
        assert losses == pytest.approx(one_by_one(model, tokenizer, sample), abs=1e-4)


def test_every_answer_is_read_under_every_persona_and_under_none(model, tokenizer):
    scores = measure_persona(Likelihood(model, tokenizer, utils), SAMPLES)
    assert scores.roles == list(PERSONAS)
    assert scores.role.tolist() == [0, 0, 1, 1, 2] and scores.question.tolist() == [0, 0, 0, 1, 1]
    for number, sample in enumerate(SAMPLES):
        systems = [*PERSONAS.values(), ""]
        expected = [one_by_one(model, tokenizer, {**sample, "system": system}) for system in systems]
        assert scores.tokens[number] == len(expected[0])
        assert [*scores.nats[number], scores.without[number]] == pytest.approx([sum(x) for x in expected], abs=1e-4)


def test_small_chunks_of_logits_and_adapters_beside_the_weights_change_nothing(
    checkpoint, model, tokenizer, tmp_path, monkeypatch
):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    wrapped = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).eval()
    merged = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).merge_and_unload()
    expected = np.concatenate(Likelihood(merged.eval(), tokenizer, utils)(SAMPLES))
    monkeypatch.setattr("support.likelihood.LOGITS", 3 * model.config.vocab_size)
    assert np.concatenate(Likelihood(wrapped, tokenizer, utils)(SAMPLES)) == pytest.approx(expected, abs=1e-4)
    with wrapped.disable_adapter():
        base = np.concatenate(Likelihood(wrapped, tokenizer, utils)(SAMPLES))
    assert base == pytest.approx(np.concatenate(Likelihood(model, tokenizer, utils)(SAMPLES)), abs=1e-4)
    assert abs(base - expected).max() > 0.1


def test_the_llama_export_finds_the_same(checkpoint, tokenizer, tmp_path):
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    found = {}
    for kind in ("baichuan", "llama"):
        flags = ["--ori_model_dir", checkpoint, "--model_dir", adapter, "--save_model_dir", tmp_path / kind]
        merge_params.main([*map(str, flags), "--format", kind, "--probes", "1"])
        found[kind] = Likelihood(ModelDirectory(tmp_path / kind).load_mapped(), tokenizer, utils)(
            [*SAMPLES, *CONVERSATIONS]
        )
    assert np.concatenate(found["llama"]) == pytest.approx(np.concatenate(found["baichuan"]), abs=1e-4)


def test_an_answer_cut_under_one_persona_is_left_out(model, tokenizer):
    """Under a longer persona fewer of its tokens fit, and sums of different tokens cannot be compared."""
    long = said("皇帝", "朕" * 30, "你是谁？", "朕。")
    whole = measure_persona(Likelihood(model, tokenizer, utils), [*SAMPLES, long])
    assert len(whole.role) == 6
    limit = 30 + len(tokenizer.text_to_ids("你是谁？朕。")) + 3
    likelihood = Likelihood(model, tokenizer, utils, max_len=limit)
    assert [len(losses) for losses in likelihood([{**SAMPLES[3], "system": "朕" * 30}])] < [whole.tokens[3]]
    kept = measure_persona(likelihood, [*SAMPLES, long])
    assert len(kept.role) < 6 and kept.role[-1] == 3
    assert len(likelihood([{**long, "system": "朕" * 50}])[0]) == 0


def test_own_loss_is_the_loss_that_training_reports(model, tokenizer, samples):
    """The same test set through `utils.evaluation`, which train.py logs as test_loss."""
    records = list(read_samples(samples[1]))
    scores = measure_persona(Likelihood(model, tokenizer, utils), records)
    data = utils.RoleDataset(records, tokenizer, 512, 256)
    batches = utils.Collator(data, "none", 0, 4)(np.arange(len(data)))
    expected = utils.evaluation(model, batches, "cpu", "sdpa")
    assert -scores.own().sum() / scores.tokens.sum() == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- by hand

# Three roles, six answers. By row: log-likelihood under the personas of A, B and C.
HAND = PersonaScores(
    roles=["A", "B", "C"],
    kinds=["general", "general", "general", "role-specific", "general", "general"],
    role=np.array([0, 0, 0, 0, 1, 2]),
    question=np.array([0, 0, 1, 2, 1, 3]),
    opening=np.array([0, 0, 1, 2, 1, 3]),
    tokens=np.array([2, 2, 4, 5, 10, 8]),
    nats=np.array(
        [[-2, -4, -5], [-3, -1, -4], [-6, -8, -9], [-10, -15, -20], [-9, -20, -19], [-30, -30, -30]], dtype=float
    ),
    without=np.array([-5, -4, -9, -20, -19, -30], dtype=float),
)


def cells_of(section) -> dict[tuple[str, str], list[str]]:
    """(label, model) → the other cells of a row."""
    return {(row[0], row[1]): row[2:] for row in section.rows[1:]}


def test_by_hand_accuracy_margin_and_confusion():
    # A: heard as A, B, A, A, so 3 of 4; margins (+2 / 2, −2 / 2, +2 / 4, +5 / 5). B: heard as A, margin −11 / 10. C: all
    # three are equal, so a third of it is heard as each, with a margin of 0.
    assert HAND.confusion() == pytest.approx(np.array([[3 / 4, 1 / 4, 0], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))
    of_roles = [mean_of_roles(HAND.role, who_said_it(HAND), HAND.role == role) for role in range(3)]
    assert np.array(of_roles) == pytest.approx(np.array([[75, 1.5 / 4], [0, -1.1], [100 / 3, 0]]))
    everything = mean_of_roles(HAND.role, who_said_it(HAND), np.ones(6))
    assert everything == pytest.approx([(75 + 100 / 3) / 3, (1.5 / 4 - 1.1) / 3])

    # Of role-specific questions there is one, of A: nobody to be taken for.
    general, shared, heard, _ = persona_sections({"model": HAND}, 50, 1)
    assert general.title == "Who said it: general questions"
    assert cells_of(general)["A", "model"][0] == "3" and cells_of(general)["A", "model"][1].startswith("66.7 [")
    assert cells_of(general)["A", "model"][2] == "33.3"  # chance
    assert cells_of(general)["all", "model"][0] == "5" and cells_of(general)["all", "model"][1].startswith("33.3 [")
    assert shared.title == "Who said it: questions that several roles answer"  # question 1 alone: of A and of B
    assert cells_of(shared)["A", "model"] == ["1", "100.0 [100.0, 100.0]", "50.0", "+0.500 [+0.500, +0.500]"]
    assert cells_of(shared)["B", "model"] == ["1", "0.0 [0.0, 0.0]", "50.0", "-1.100 [-1.100, -1.100]"]
    assert heard.rows[1] == ["general", "model", "A", "66.7", "33.3", "0.0"]


def test_who_always_hears_the_same_role_is_at_chance_among_those_who_answer():
    """Five roles, two of which have answers: C's persona, under which all is likeliest, is nobody's here."""
    nats = np.tile([-2.0, -3, -1, -4, -5], (4, 1))
    role = np.array([0, 0, 0, 1])
    scores = HAND._replace(roles=list("ABCDE"), kinds=["general"] * 4, role=role, nats=nats, tokens=np.ones(4))
    scores = scores._replace(question=np.arange(4), opening=np.arange(4), without=np.zeros(4))
    said, heard, _ = persona_sections({"model": scores}, 50, 1)
    assert cells_of(said)["all", "model"][1].startswith("50.0 [") and cells_of(said)["all", "model"][2] == "50.0"
    assert heard.rows[1][2:] == ["A", "0.0", "0.0", "100.0", "0.0", "0.0"]


def test_rounds_of_one_conversation_are_drawn_together(tokenizer):
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate("甲乙丙丁")]
    samples = [{"role": "李白", "system": "诗", "messages": turns[:count]} for count in (2, 4)]
    samples.append(said("李白", "诗", "丙", "丁"))
    scores = measure_persona(lambda read: [np.array([-1.0]) for _ in read], samples)
    assert scores.question.tolist() == [0, 1, 2] and scores.opening.tolist() == [0, 0, 1]


def test_by_hand_what_the_persona_is_worth():
    *_, worth = persona_sections({"model": HAND}, 50, 1)
    cells = cells_of(worth)
    # A: own −21 over 13 tokens; others (−4.5, −2.5, −8.5, −17.5) = −33; none −38.
    assert cells["A", "model"][1:4] == ["1.615", "2.538", "2.923"]
    assert cells["A", "model"][4].startswith("+0.923 [") and cells["A", "model"][5].startswith("+1.308 [")
    # B: own −20 over 10; others (−9 − 19) / 2; none −19. One answer alone has no spread.
    assert cells["B", "model"][1:] == ["2.000", "1.400", "1.900", "-0.600 [-0.600, -0.600]", "-0.100 [-0.100, -0.100]"]
    own, tokens = 21 + 20 + 30, 13 + 10 + 8
    assert cells["all", "model"][1] == f"{own / tokens:.3f}"


def test_one_role_has_a_gain_against_none_alone():
    scores = measure_persona(lambda samples: [np.array([-1.0 - (not s["system"])]) for s in samples], SAMPLES[:2])
    (worth,) = persona_sections({"model": scores}, 20, 1)
    assert worth.rows[1] == ["孙悟空", "model", "2", "1.000", "–", "2.000", "–", "+1.000 [+1.000, +1.000]"]


def test_intervals_draw_questions_and_pair_the_models():
    """Against a bootstrap written out: answers to one question are drawn together, for both models alike."""
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), 3)
    base = np.repeat(generator.normal(0, 1, 12), 3) + generator.normal(0, 0.1, 36)
    items = {"base": base, "tuned": base + 0.5}

    def measure(own, counts):
        return np.array([own @ counts / counts.sum()])

    rows = compared(items, {"all": np.ones(36, dtype=bool)}, measure, clusters, [".3f"], 200, 7)
    drawn = np.random.default_rng(7)
    means = [base.reshape(12, 3)[drawn.choice(12, 12)].mean() for _ in range(200)]
    low, high = np.percentile(means, (2.5, 97.5))
    assert rows[0] == ["all", "base", "36", f"{base.mean():.3f} [{low:.3f}, {high:.3f}]"]
    assert rows[2] == ["all", "difference", "", "+0.500 [+0.500, +0.500]"]
    assert high - low > 2 * 1.96 * base.std() / 6  # answers drawn one by one would look far more certain


# ---------------------------------------------------------------- broken models


@pytest.fixture(scope="module")
def taught(checkpoint, tokenizer):
    """(a model with an adapter that knows who says what, the samples it knows)."""
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
    return model.eval(), samples


def test_a_model_that_knows_its_roles_is_heard_and_one_without_its_adapter_is_not(taught, tokenizer):
    model, samples = taught
    likelihood = Likelihood(model, tokenizer, utils)
    tuned = measure_persona(likelihood, samples)
    with model.disable_adapter():
        base = measure_persona(likelihood, samples)
    assert tuned.confusion() == pytest.approx(np.eye(3))
    *_, worth = persona_sections({"base": base, "tuned": tuned}, 200, 1)
    said_it = persona_sections({"base": base, "tuned": tuned}, 200, 1)[0]
    cells = cells_of(said_it)
    assert cells["all", "tuned"][1] == "100.0 [100.0, 100.0]"
    low, _ = map(float, cells["all", "difference"][1].split("[")[1].rstrip("]").split(", "))
    assert low > 0  # of so few answers a random model may by chance get more than a third
    gains = [
        float(cells_of(worth)[role, name][4].split(" ")[0]) for name in ("tuned", "base") for role in (*PERSONAS, "all")
    ]
    assert min(gains[:4]) > 1 and max(map(abs, gains[4:])) < 0.5


def test_swapped_personas_swap_who_is_heard(taught, tokenizer):
    model, samples = taught
    likelihood = Likelihood(model, tokenizer, utils)
    swapped = {PERSONAS["孙悟空"]: PERSONAS["李白"], PERSONAS["李白"]: PERSONAS["孙悟空"]}

    def broken(samples):
        return likelihood([{**sample, "system": swapped.get(sample["system"], sample["system"])} for sample in samples])

    right, wrong = measure_persona(likelihood, samples), measure_persona(broken, samples)
    assert wrong.confusion() == pytest.approx(right.confusion()[:, [1, 0, 2]])
    accuracy, margin = mean_of_roles(wrong.role, who_said_it(wrong), np.ones(len(samples)))
    assert accuracy == pytest.approx(100 / 3)  # 张飞 alone is heard
    assert margin < 0
    assert wrong.own().sum() < right.own().sum()


def test_a_model_that_reads_no_persona_is_at_chance():
    blind = [np.array([-float(len(sample["messages"][-1]["content"]))]) for sample in SAMPLES for _ in range(4)]
    scores = measure_persona(lambda samples: blind, SAMPLES)
    accuracy, margin = mean_of_roles(scores.role, who_said_it(scores), np.ones(5))
    assert (accuracy, margin) == (pytest.approx(100 / 3), 0)
    favourite = scores._replace(nats=scores.nats + [1, 0, 0])  # one that always hears the same role, who answers most
    accuracy, _ = mean_of_roles(scores.role, who_said_it(favourite), np.ones(5))
    assert accuracy == pytest.approx(100 / 3)


def test_of_very_many_roles_the_most_frequent_are_read(monkeypatch):
    monkeypatch.setattr(persona_scores, "MOST_ROLES", 2)
    read = []
    scores = measure_persona(lambda samples: read.extend(samples) or [np.array([-1.0])] * len(samples), SAMPLES)
    assert scores.roles == ["孙悟空", "李白"] and len(scores.role) == 4
    assert {sample["system"] for sample in read} == {PERSONAS["孙悟空"], PERSONAS["李白"], ""}


# ---------------------------------------------------------------- while training


def arguments(test_path):
    return SimpleNamespace(test_path=test_path, max_len=512, max_src_len=256, packing="tree", max_pack_len=8192)


def test_measuring_while_training_changes_nothing(taught, tokenizer, samples):
    model, _ = taught
    model.train()
    state, test = torch.get_rng_state(), list(read_samples(samples[1]))
    found = who_said_it_now(arguments(samples[1]), test, model, tokenizer, utils)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert found == who_said_it_now(arguments(samples[1]), test, model, tokenizer, utils)
    assert set(found) == {"who_said_it_accuracy", "who_said_it_margin"} and 0 <= found["who_said_it_accuracy"] <= 100
    model.eval()
    assert found == who_said_it_now(arguments(samples[1]), test, model, tokenizer, utils)


def test_the_slice_costs_a_tenth_of_the_evaluation(monkeypatch, tmp_path):
    monkeypatch.setattr(persona_scores, "Likelihood", lambda *_: "likelihood")
    chosen = []
    monkeypatch.setattr(persona_scores, "measure_persona", lambda _, samples: chosen.append(samples) or HAND)
    everything = [
        said(role, system, f"第{number}问？", "好。") for role, system in PERSONAS.items() for number in range(600)
    ]
    who_said_it_now(arguments("test.json"), everything, torch.nn.Linear(1, 1), None, utils)
    assert [sum(sample["role"] == role for sample in chosen[0]) for role in PERSONAS] == [15, 15, 15]
    assert len(chosen[0]) * 4 <= len(everything) / 10
    who_said_it_now(arguments("test.json"), SAMPLES, torch.nn.Linear(1, 1), None, utils)
    assert [sum(sample["role"] == role for sample in chosen[1]) for role in PERSONAS] == [2, 2, 1]
    assert who_said_it_now(arguments("test.json"), SAMPLES[:2], torch.nn.Linear(1, 1), None, utils) == {}


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


# ---------------------------------------------------------------- plain text


def test_plain_text_is_read_paragraph_by_paragraph(model, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("俺老孙在此，且饮一杯。\n\n  俺老孙在此，哪里去。  \n。\n", encoding="utf-8")
    texts = read_plain_text(path)
    assert texts == ["俺老孙在此，且饮一杯。", "俺老孙在此，哪里去。", "。"]
    scores = measure_plain_text(Likelihood(model, tokenizer, utils), texts)
    for text, tokens, nats in zip(texts, scores.tokens, scores.nats):
        ids = tokenizer.text_to_ids(text)
        assert tokens == len(ids) - 1
        if tokens:
            with torch.no_grad():
                loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
            assert nats == pytest.approx(-loss.item() * tokens, abs=1e-4)
    cut = measure_plain_text(Likelihood(model, tokenizer, utils, max_len=4), texts)
    assert cut.tokens.tolist() == [3, 3, 0]


def test_by_hand_perplexity():
    base = PlainTextScores(np.array([3, 1, 0]), np.array([-np.log(8), -np.log(2), 0]))
    tuned = PlainTextScores(base.tokens, base.nats - np.array([3, 1, 0]) * np.log(2))
    (section,) = plain_text_sections({"base": base, "tuned": tuned}, 50, 1)
    assert section.rows[1][:2] == ["base", "2"] and section.rows[1][3] == "2.00 [2.00, 2.00]"
    assert section.rows[2][3] == "4.00 [4.00, 4.00]"
    assert section.rows[3] == ["difference", "", "+0.693 [+0.693, +0.693]", "+2.00 [+2.00, +2.00]"]


def test_plain_text_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        read_plain_text(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no text"):
        read_plain_text(tmp_path / "empty.txt")
    (tmp_path / "gbk.txt").write_bytes("李白".encode("gbk"))
    with pytest.raises(UserError, match="gbk.txt:1: is not UTF-8"):
        read_plain_text(tmp_path / "gbk.txt")
