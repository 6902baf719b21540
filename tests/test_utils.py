"""A step's conversations as tensors: exact ids and pairs, and rows of trees that equal single rounds."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import CONVERSATIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import utils
from baichuan import BaichuanConfig, BaichuanForCausalLM
from baichuan.generation_utils import messages_to_ids
from support.model.directory import ModelDirectory
from support.training.arguments import missing_compiler

SAMPLES = [
    {"system": "你是孙悟空。", "prompt": "你是谁？", "response": "俺老孙是也！"},
    {"system": "你是李白。", "prompt": "饮酒否？", "response": "将进酒，杯莫停。"},
    {"system": "你是孙悟空。", "prompt": "师父呢？", "response": "师父在打坐。"},
    {"system": "你是李白。", "prompt": "去哪里？", "response": "去蜀道。"},
    {"system": "你是孙悟空。", "prompt": "<reserved_107>你来说</s>", "response": "呔！"},
    {"system": "", "prompt": "无名？", "response": "无名。"},
]


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return ModelDirectory(checkpoint).tokenizer


@pytest.fixture
def set_attention(model):
    """Sets the model's attention, which is sdpa again after the test, whether it passes or fails."""
    yield model.set_attn_implementation
    model.set_attn_implementation("sdpa")
    torch._dynamo.reset()


def messages(sample) -> dict:
    """A question and its answer as a conversation of one round."""
    turns = [("user", sample["prompt"]), ("assistant", sample["response"])]
    return {**sample, "messages": [{"role": role, "content": text} for role, text in turns]}


def dataset(loaded, samples=SAMPLES, max_len=512, max_src_len=256, **options):
    samples = [sample if "messages" in sample else messages(sample) for sample in samples]
    return utils.RoleDataset(samples, loaded, max_len, max_src_len, **options)


def whole(data, index) -> list[int]:
    """The ids of a sample of one round with its eos, which has no column in a row."""
    ids, pairs = data.sample(index)
    return [*ids.tolist(), data.eos] if pairs[-1].tolist() == [len(ids) - 1, data.eos] else ids.tolist()


def rounds_one_by_one(tokenizer, samples) -> list[tuple[list[int], list[int]]]:
    """(what the page would send, the answer and its eos) of every round that is trained."""
    found = []
    for sample in samples:
        system = [{"role": "system", "content": sample["system"]}] if sample["system"] else []
        for number, turn in enumerate(sample["messages"]):
            if turn["role"] == "assistant" and turn.get("train", True):
                prompt = messages_to_ids(tokenizer, [*system, *sample["messages"][:number]])
                found.append((prompt, [*tokenizer.text_to_ids(turn["content"]), tokenizer.eos_token_id]))
    return found


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    model = BaichuanForCausalLM(BaichuanConfig(num_hidden_layers=2, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


# ---------------------------------------------------------------- samples → ids


def test_exact_ids_and_supervised_tokens(loaded):
    data = dataset(loaded)
    for index, sample in enumerate(SAMPLES):
        system, prompt, response = (loaded.text_to_ids(sample[key]) for key in ("system", "prompt", "response"))
        ids, pairs = data.sample(index)
        assert ids.tolist() == [*system, 195, *prompt, 196, *response]
        columns = range(len(ids) - len(response) - 1, len(ids))
        assert pairs.tolist() == [[column, token] for column, token in zip(columns, [*response, 2])]
    assert len(data.personas) == 3


def test_each_round_is_trained_as_the_page_asks_it(loaded):
    """Ids and supervised pairs are those of the page's prompt at each round, followed by the answer and an eos."""
    data = dataset(loaded, CONVERSATIONS)
    found = []
    for index in range(len(data)):
        ids, pairs = data.sample(index)
        breaks = np.nonzero(np.diff(pairs[:, 0]) > 1)[0] + 1
        for turn in np.split(pairs, breaks):
            found.append((ids[: turn[0, 0] + 1].tolist(), turn[:, 1].tolist()))
            assert turn[:, 0].tolist() == list(range(turn[0, 0], turn[0, 0] + len(turn)))
    assert found == rounds_one_by_one(loaded, CONVERSATIONS)
    assert data.supervised.tolist() == [len(data.sample(index)[1]) for index in range(len(data))]


def test_a_long_conversation_loses_whole_oldest_rounds(loaded):
    (long,) = [sample for sample in CONVERSATIONS if len(sample["messages"]) == 6]
    every, shorter = dataset(loaded, [long]), {**long, "messages": long["messages"][2:]}
    limit = len(every.sample(0)[0]) + 1
    assert dataset(loaded, [long], max_len=limit).counts["shortened conversations"] == 0
    data, expected = dataset(loaded, [long], max_len=limit - 1), dataset(loaded, [shorter])
    assert [part.tolist() for part in data.sample(0)] == [part.tolist() for part in expected.sample(0)]
    assert data.counts["shortened conversations"] == 1
    assert len(dataset(loaded, [long], max_len=limit - 1, is_skip=True)) == 0


def test_a_question_keeps_its_beginning_and_a_cut_answer_gets_no_eos(loaded):
    sample = {"system": "你是李白。", "prompt": "从头开始数一二三四五六七八九", "response": "好。"}
    system, prompt, answer = (loaded.text_to_ids(sample[key]) for key in ("system", "prompt", "response"))
    data = dataset(loaded, [sample], max_src_len=5)
    expected = [*system, 195, *prompt[:5], 196, *answer, 2]
    assert +dataset(loaded, [sample], max_src_len=len(prompt), is_skip=True).counts == {"read": 1, "kept": 1}
    assert whole(data, 0) == expected and data.counts["cut questions"] == 1
    for max_len, cut in ((len(expected), 0), (len(expected) - 1, 1), (len(expected) - 2, 2)):
        data = dataset(loaded, [sample], max_len=max_len, max_src_len=5)
        assert whole(data, 0) == expected[: len(expected) - cut] and data.counts["cut answers"] == bool(cut)
    data = dataset(loaded, [sample], max_len=len(system) + 3)
    assert len(data) == 0 and data.counts["no room for an answer"] == 1


def test_a_sample_ends_on_the_last_trained_answer_that_fits(loaded):
    """What follows it is learned by nobody and takes no room; a question that fills the row leaves the answer before it."""
    (short,) = [
        sample for sample in CONVERSATIONS if len(sample["messages"]) == 4 and sample["system"] == "你是孙悟空。"
    ]
    alone, (question, answer) = dataset(loaded, [short]), short["messages"][:2]
    limit = len(alone.sample(0)[0]) + 1
    tail = [question, {**answer, "content": "长" * 900, "train": False}]
    for is_skip in (False, True):
        data = dataset(loaded, [{**short, "messages": short["messages"] + tail}], max_len=limit, is_skip=is_skip)
        assert [part.tolist() for part in data.sample(0)] == [part.tolist() for part in alone.sample(0)]
        assert +data.counts == {"read": 1, "kept": 1}
    tail = [{**question, "content": "长" * 200}, answer]  # not even with every round before it gone
    long = {**short, "messages": short["messages"] + tail}
    assert loaded.text_to_ids(tail[0]["content"])[limit - 4 :]
    data = dataset(loaded, [long], max_len=limit)
    assert [part.tolist() for part in data.sample(0)] == [part.tolist() for part in alone.sample(0)]
    assert +data.counts == {"read": 1, "kept": 1, "shortened conversations": 1}
    assert dataset(loaded, [long], max_len=limit, is_skip=True).counts["skipped"] == 1
    silent = [{**turn, "train": False} for turn in short["messages"]]
    assert dataset(loaded, [{**short, "messages": silent}]).counts == {"kept": 0, "read": 1, "nothing to train": 1}


def test_skipping_leaves_out_what_would_be_cut(loaded):
    lengths = [len(whole(dataset(loaded), index)) for index in range(len(SAMPLES))]
    limit = sorted(lengths)[-2]
    data = dataset(loaded, max_len=limit, is_skip=True)
    assert len(data) == sum(length <= limit for length in lengths) < len(SAMPLES)
    assert data.counts["skipped"] == len(SAMPLES) - len(data)
    assert all(whole(data, index)[-1] == 2 for index in range(len(data)))
    assert len(dataset(loaded, max_src_len=1, is_skip=True)) == 0


# ---------------------------------------------------------------- samples → rows


def sees(row) -> np.ndarray:
    return utils.tree_mask(row["end"])[0, 0].numpy()


def plain(ids: str, *columns: int) -> tuple[np.ndarray, np.ndarray]:
    """A sample of one token a letter; at `columns` it predicts its next letter."""
    tokens = np.array([ord(letter) - ord("A") + 3 for letter in ids])
    pairs = [[column, tokens[column + 1]] for column in columns]
    return tokens, np.array(pairs, dtype=np.int64).reshape(-1, 2)


def test_the_drawing_in_the_docstring():
    drawn = utils.tree_row.__doc__.split("token (down) sees (across):")[1].split("Attention being")[0].strip("\n")
    lines = [line for line in drawn.splitlines() if line.strip()]
    rows = np.array([[cell == "■" for cell in line.split() if cell in ("■", "·")] for line in lines[3:]])
    row = utils.tree_row([plain("PPPaabb"), plain("PPPaac"), plain("PPPdd"), plain("QQe")])
    assert np.array_equal(sees(row), rows)
    assert row["position_ids"][0].tolist() == [int(number) for number in lines[0].split()[1:]]
    assert row["end"][0].tolist() == [int(number) for number in lines[2].split()[1:]]
    letters = [chr(token - 3 + ord("A")) for token in row["input_ids"][0].tolist()]
    assert letters == lines[1].split()[1:]


def test_rows_hold_every_sample_once_and_keep_their_length(loaded):
    data = dataset(loaded, SAMPLES * 5 + CONVERSATIONS)
    indices = data.in_tree_order(np.random.default_rng(0).permutation(len(data)))
    longest = max(len(data.sample(index)[0]) for index in range(len(data)))
    for limit in (longest, longest + 7, 100, 10_000):
        rows = utils.Collator(data, "tree", limit, 2)(indices)
        assert all(row["input_ids"].shape[1] <= limit for row in rows)
        supervised = [label for row in rows for label in row["loss_positions"][:, 1].tolist()]
        assert supervised == [token for index in indices for token in data.sample(index)[1][:, 1].tolist()]
    assert len(rows) == 1
    for less, count in ((0, 1), (1, 2)):  # of a row that is exactly as long as it may be
        assert len(utils.Collator(data, "tree", rows[0]["end"].shape[1] - less, 2)(indices)) == count
    prefixes = {tuple(data.sample(index)[0][:end]) for index in indices for end in range(1, longest + 1)}
    assert rows[0]["input_ids"].shape[1] == len(prefixes)  # every distinct beginning is one token of a tree


def test_a_step_is_split_where_it_costs_least(loaded):
    """Against all ways to split eight samples into rows."""
    data = dataset(loaded, [*SAMPLES, *CONVERSATIONS][:8])
    indices = data.in_tree_order(np.arange(len(data)))
    samples = [data.sample(index) for index in indices]
    for attention in (0.0, 1e-3, 1e-2, 1.0):

        def cost(length, attention=attention):
            return 5 + length + attention * length**2

        least = math.inf
        for count in range(len(samples)):
            for cuts in itertools.combinations(range(1, len(samples)), count):
                parts = zip((0, *cuts), (*cuts, len(samples)))
                rows = [utils.tree_row(samples[start:end]) for start, end in parts]
                least = min(least, sum(cost(row["end"].shape[1]) for row in rows))
        rows = utils.Collator(data, "tree", 1000, 1, cost)(indices)
        assert sum(cost(row["end"].shape[1]) for row in rows) == pytest.approx(least)


@pytest.mark.parametrize("max_pack_len", [40, 1000])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_give_the_losses_and_gradients_of_single_rounds(loaded, model, set_attention, max_pack_len, attention):
    set_attention(attention)
    samples = [messages(sample) for sample in SAMPLES] + CONVERSATIONS
    data = dataset(loaded, samples)
    indices = data.in_tree_order(np.arange(len(data)))
    tokens = int(data.supervised[indices].sum())

    # Independent of dataset and collator: each round by itself, as the page asks it, with labels on the answer.
    model.zero_grad()
    for prompt, answer in rounds_one_by_one(loaded, samples):
        labels = torch.tensor([[-100] * len(prompt) + answer])
        model(torch.tensor([prompt + answer]), labels=labels, num_items_in_batch=tokens).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    for packing in ("tree", "none"):
        batches = utils.Collator(data, packing, max_pack_len, 4)(indices)
        model.zero_grad()
        for batch in batches:
            model(**utils.model_inputs(batch, "cpu", attention), num_items_in_batch=tokens).loss.backward()
        for name, parameter in model.named_parameters():
            difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert difference <= 1e-5, (packing, name)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(3, 5), min_size=2, max_size=9), min_size=1, max_size=7))
def test_any_tree_gives_the_logits_of_its_single_samples(model, sequences):
    """Three tokens make many shared beginnings; every column of every sample predicts, so all its logits are compared."""
    samples = [(np.array(ids), np.array([*enumerate(ids[1:])])) for ids in sorted(sequences)]
    row = utils.tree_row(samples)
    with torch.no_grad():
        inputs = utils.model_inputs(row, "cpu", "sdpa")
        pairs = inputs.pop("loss_positions")
        found = model(**inputs).logits[0, pairs[:, 0]].split([len(ids) - 1 for ids, _ in samples])
        for (ids, _), logits in zip(samples, found):
            expected = model(torch.from_numpy(ids)[None]).logits[0, :-1]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(bool(needed := missing_compiler(on_gpu=False)), reason=f"flex_attention needs {needed}")
def test_flex_attention_takes_the_same_mask(loaded, model, set_attention):
    """Forward only: flex_attention has no backward pass on the CPU."""
    data = dataset(loaded)
    batches = utils.Collator(data, "tree", 1000, 1)(data.in_tree_order(np.arange(len(data))))
    found = {}
    for attention in ("sdpa", "flex_attention"):
        set_attention(attention)
        found[attention] = utils.evaluation(model, batches, "cpu", attention)
    assert found["sdpa"] == pytest.approx(found["flex_attention"], abs=1e-5)


def test_perplexity_is_exact_for_both_packings_and_without_dropout(loaded, model):
    """Against each answer by itself; a model that trains is evaluated without its dropout, and trains on."""
    lora = LoraConfig(lora_dropout=0.5, target_modules=["W_pack", "down_proj"], init_lora_weights=False)
    adapted, values = get_peft_model(copy.deepcopy(model), lora).eval(), []
    with torch.no_grad():
        for prompt, answer in rounds_one_by_one(loaded, [messages(sample) for sample in SAMPLES]):
            logits = adapted(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            values += (-logits[range(len(answer)), answer]).tolist()
    data = dataset(loaded)
    for packing in ("tree", "none"):
        batches = utils.Collator(data, packing, 60, 4)(data.in_tree_order(np.arange(len(data))))
        found = utils.evaluation(adapted.train(), batches, "cpu", "sdpa")
        assert found == pytest.approx(np.mean(values), abs=1e-5) and adapted.training


# ---------------------------------------------------------------- rows → steps


def test_steps_take_every_sample_at_most_once_an_epoch(loaded):
    data = dataset(loaded, SAMPLES * 4)  # 24 samples, steps of 5: 4 are left over
    steps = utils.Steps(data, None, step_size=5, epochs=3, seed=7)
    assert len(steps) == 12
    left_over = []
    for epoch in range(3):
        taken = np.concatenate([steps.samples(step) for step in range(epoch * 4, epoch * 4 + 4)])
        assert len(set(taken)) == 20
        left_over.append(frozenset(range(24)) - frozenset(taken.tolist()))
    assert len(set(left_over)) > 1
    other = utils.Steps(data, None, step_size=5, epochs=3, seed=8)
    assert [steps.samples(0).tolist()] != [other.samples(0).tolist()]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_a_step_without_overlap(loaded, world):
    data = dataset(loaded, SAMPLES * 4)
    collator = utils.Collator(data, "tree", 1000, 2)
    assert [len(utils.Steps(data, list, 8, 2, 7, rank, world)[0][0]) for rank in range(world)] == [8 // world] * world
    shares = [utils.Steps(data, collator, 8, 2, 7, rank, world) for rank in range(world)]
    for step in range(len(shares[0])):
        expected = shares[0].samples(step)
        items = [share[step] for share in shares]
        labels = []
        for batch in (batch for batches, _ in items for batch in batches):
            labels += batch["loss_positions"][:, 1].tolist()
        assert labels == [token for index in expected for token in data.sample(index)[1][:, 1].tolist()]
        assert {tokens for _, tokens in items} == {len(labels)}


def test_find_all_linear_names_are_the_decoders_linear_layers(model):
    assert utils.find_all_linear_names(model) == ["W_pack", "down_proj", "gate_proj", "o_proj", "up_proj"]
