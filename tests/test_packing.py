"""A step's samples as tensors: exact ids and labels, and prefix rows that equal the padded batch."""

import json

import numpy as np
import pytest
import torch
from conftest import SHARED

import data_helper
import utils
from baichuan import BaichuanConfig, BaichuanForCausalLM
from support.errors import UserError
from support.model_directory import ModelDirectory

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


def dataset(loaded, samples=SAMPLES, max_len=512, max_src_len=256, **options):
    return utils.RoleDataset(samples, loaded, max_len, max_src_len, **options)


def whole(data, index) -> list[int]:
    return [*data.personas[data.persona[index]], *data.sample(index)[0].tolist()]


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
    tokenizer = loaded
    data = dataset(loaded)
    for index, sample in enumerate(SAMPLES):
        system, prompt, response = (tokenizer.text_to_ids(sample[key]) for key in ("system", "prompt", "response"))
        assert whole(data, index) == [*system, 195, *prompt, 196, *response, 2]
        ids, answer = data.sample(index)
        assert ids[answer:].tolist() == [*response, 2]
    assert data.supervised_tokens(np.array([0, 1])) == sum(
        len(tokenizer.text_to_ids(sample["response"])) + 1 for sample in SAMPLES[:2]
    )
    assert len(data.personas) == 3
    assert data.counts == {"read": 6, "kept": 6, "cut questions": 0, "cut answers": 0}


def test_a_question_keeps_its_beginning(loaded):
    tokenizer = loaded
    sample = {"system": "你是李白。", "prompt": "从头开始数一二三四五六七八九", "response": "好。"}
    prompt = tokenizer.text_to_ids(sample["prompt"])
    data = dataset(loaded, [sample], max_src_len=5)
    assert whole(data, 0) == [*data.personas[0], 195, *prompt[:5], 196, *tokenizer.text_to_ids("好。"), 2]
    assert data.counts["cut questions"] == 1 and data.counts["cut answers"] == 0


def test_a_cut_answer_gets_no_eos(loaded):
    full = whole(dataset(loaded), 1)
    exact = dataset(loaded, SAMPLES[1:2], max_len=len(full))
    assert whole(exact, 0) == full and full[-1] == 2 and exact.counts["cut answers"] == 0
    cut = dataset(loaded, SAMPLES[1:2], max_len=len(full) - 1)
    assert whole(cut, 0) == full[:-1] and 2 not in whole(cut, 0) and cut.counts["cut answers"] == 1


def test_skipping_leaves_out_what_would_be_cut(loaded):
    lengths = [len(whole(dataset(loaded), index)) for index in range(len(SAMPLES))]
    limit = sorted(lengths)[-2]
    data = dataset(loaded, max_len=limit, is_skip=True)
    assert len(data) == sum(length <= limit for length in lengths) < len(SAMPLES)
    assert data.counts["skipped"] == len(SAMPLES) - len(data)
    assert all(whole(data, index)[-1] == 2 for index in range(len(data)))
    assert len(dataset(loaded, max_src_len=1, is_skip=True)) == 0


def test_no_room_for_an_answer_is_counted(loaded):
    persona = len(dataset(loaded).personas[0])
    data = dataset(loaded, SAMPLES[:1], max_len=persona + 3)
    assert len(data) == 0 and data.counts["no room for an answer"] == 1


def test_older_keys_and_arrays_give_the_same_samples(loaded, tmp_path):
    lines, array = tmp_path / "lines.json", tmp_path / "array.json"
    lines.write_text("\n".join(json.dumps(sample) for sample in SAMPLES) + "\n\n")
    older = [{"instruction": s["system"], "input": s["prompt"], "output": s["response"]} for s in SAMPLES]
    array.write_text(json.dumps(older, ensure_ascii=False, indent=1))
    first, second = (dataset(loaded, data_helper.read_samples(path)) for path in (lines, array))
    assert first.ids.tolist() == second.ids.tolist() and first.personas == second.personas
    array.write_text(json.dumps([{"instruction": "你是谁？", "input": "", "output": "我。"}]))
    sample = next(data_helper.read_samples(array))
    assert {key: sample[key] for key in ("role", "system", "prompt", "response")} == {
        **{"role": "", "system": "", "prompt": "你是谁？", "response": "我。"}
    }


@pytest.mark.parametrize(
    "text, place",
    [
        ('{"system": "", "prompt": "a", "response": "b"}\nnot json', "2"),
        ('{"system": "", "prompt": "a"}', "1"),
        ('{"system": "", "prompt": "a", "response": " "}', "1"),
        ('{"system": 1, "prompt": "a", "response": "b"}', "1"),
        ("[1]", " sample 1"),
        ("[", "1"),
        ("[" * 100_000, "1"),
    ],
)
def test_what_is_no_sample_is_named(tmp_path, text, place):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        list(data_helper.read_samples(path))
    assert error.value.problems[0].startswith(f"{path}:{place}: ")


# ---------------------------------------------------------------- samples → rows


def sees(row) -> np.ndarray:
    return utils.prefix_mask(row["segments"])[0, 0].numpy()


def test_the_drawing_in_the_docstring(loaded):
    """Two personas and three samples, drawn by hand in Collator's docstring; here with the lengths of real tokens."""
    data = dataset(loaded)
    (row,) = utils.Collator(data, "prefix", 512, 2)(np.array([0, 2, 1]))
    p, q = len(data.personas[0]), len(data.personas[1])
    a, b, c = (len(data.sample(index)[0]) for index in (0, 2, 1))
    expected = np.zeros((p + a + b + q + c,) * 2, dtype=bool)
    blocks = {"P": range(p), "a": range(p, p + a), "b": range(p + a, p + a + b)}
    blocks["Q"] = range(p + a + b, p + a + b + q)
    blocks["c"] = range(p + a + b + q, p + a + b + q + c)
    for who, whom in ("PP", "aP", "aa", "bP", "bb", "QQ", "cQ", "cc"):
        for query in blocks[who]:
            for key in blocks[whom]:
                expected[query, key] = key <= query
    assert np.array_equal(sees(row), expected)
    positions = [*range(p), *range(p, p + a), *range(p, p + b), *range(q), *range(q, q + c)]
    assert row["position_ids"][0].tolist() == positions


def test_rows_hold_every_sample_once_and_keep_their_length(loaded):
    data = dataset(loaded, SAMPLES * 5)
    indices = data.by_persona(np.random.default_rng(0).permutation(len(data)))
    longest = max(len(whole(data, index)) for index in range(len(data)))
    for limit in (longest, longest + 7, 100, 10_000):
        rows = utils.Collator(data, "prefix", limit, 2)(indices)
        assert all(row["input_ids"].shape[1] <= limit for row in rows)
        supervised = [label for row in rows for label in row["loss_positions"][:, 1].tolist()]
        assert supervised == [id for index in indices for id in data.sample(index)[0][data.sample(index)[1] :].tolist()]
    assert len(rows) == 1
    assert rows[0]["input_ids"].shape[1] == len(data.ids) + sum(map(len, data.personas))


def losses(model, data, batches) -> dict:
    """{(sample's last ids): loss of each supervised token}, independent of rows and order."""
    found = {}
    for batch in batches:
        inputs = utils.model_inputs(batch, "cpu", model.config._attn_implementation)
        positions = inputs.pop("loss_positions")
        logits = model(**inputs).logits.flatten(0, 1)[positions[:, 0]]
        values = torch.nn.functional.cross_entropy(logits, positions[:, 1], reduction="none")
        start = 0
        for end in (positions[:, 1] == 2).nonzero()[:, 0] + 1:
            found[tuple(positions[start:end, 1].tolist())] = values[start:end]
            start = end
    return found


@pytest.mark.parametrize("max_pack_len", [40, 1000])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prefix_rows_give_the_losses_and_gradients_of_single_samples(loaded, model, max_pack_len, attention):
    model.set_attn_implementation(attention)
    data = dataset(loaded)
    indices = data.by_persona(np.arange(len(data)))
    tokens = data.supervised_tokens(indices)

    # Independent of the collator: each sample by itself, with labels over the whole sequence.
    model.zero_grad()
    for index in indices:
        ids = torch.tensor([whole(data, index)])
        labels = ids.clone()
        labels[0, : len(data.personas[data.persona[index]]) + data.sample(index)[1]] = -100
        model(ids, labels=labels, num_items_in_batch=tokens).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    for packing in ("prefix", "none"):
        batches = utils.Collator(data, packing, max_pack_len, 4)(indices)
        model.zero_grad()
        for batch in batches:
            model(**utils.model_inputs(batch, "cpu", attention), num_items_in_batch=tokens).loss.backward()
        for name, parameter in model.named_parameters():
            difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
            assert difference <= 1e-5, (packing, name)
    model.set_attn_implementation("sdpa")


def test_flex_attention_takes_the_same_mask(loaded, model):
    """Forward only: flex_attention has no backward pass on the CPU."""
    data = dataset(loaded)
    batches = utils.Collator(data, "prefix", 1000, 1)(data.by_persona(np.arange(len(data))))
    found = {}
    for attention in ("sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        found[attention] = utils.evaluation(model, batches, "cpu", attention)
    model.set_attn_implementation("sdpa")
    assert found["sdpa"] == pytest.approx(found["flex_attention"], abs=1e-5)


def test_nothing_leaks_between_neighbours(loaded, model):
    """Changing one sample of a row leaves every other sample's losses as they were."""
    data = dataset(loaded)
    changed = dataset(
        loaded, [*SAMPLES[:2], {**SAMPLES[2], "prompt": "换了一个问题？", "response": "换了答案！"}, *SAMPLES[3:]]
    )
    indices = data.by_persona(np.arange(len(data)))
    with torch.no_grad():
        before, after = (losses(model, d, utils.Collator(d, "prefix", 1000, 1)(indices)) for d in (data, changed))
    common = before.keys() & after.keys()
    assert len(common) == len(SAMPLES) - 1
    for key in common:
        torch.testing.assert_close(before[key], after[key], atol=1e-5, rtol=0)


def test_perplexity_is_exact_and_the_same_for_both_packings(loaded, model):
    data = dataset(loaded)
    indices = data.by_persona(np.arange(len(data)))
    with torch.no_grad():
        single = [
            losses(model, data, utils.Collator(data, "none", 0, 1)(indices[i : i + 1])) for i in range(len(indices))
        ]
    values = torch.cat([value for found in single for value in found.values()])
    for packing in ("prefix", "none"):
        batches = utils.Collator(data, packing, 60, 4)(indices)
        assert utils.evaluation(model, batches, "cpu", "sdpa") == pytest.approx(values.mean().item(), abs=1e-6)


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
    collator = utils.Collator(data, "prefix", 1000, 2)
    shares = [utils.Steps(data, collator, 8, 2, 7, rank, world) for rank in range(world)]
    for step in range(len(shares[0])):
        expected = shares[0].samples(step)
        items = [share[step] for share in shares]
        labels = [
            label for batches, _ in items for batch in batches for label in batch["loss_positions"][:, 1].tolist()
        ]
        assert labels == [id for index in expected for id in data.sample(index)[0][data.sample(index)[1] :].tolist()]
        assert {tokens for _, tokens in items} == {len(labels)}


def test_find_all_linear_names_are_the_decoders_linear_layers(model):
    assert utils.find_all_linear_names(model) == ["W_pack", "down_proj", "gate_proj", "o_proj", "up_proj"]


if (SHARED / "rolebench").is_dir():

    def test_real_samples_under_the_real_tokenizer(tmp_path):
        """The figures of RoleBench that the design rests on: tokens of persona, question and answer."""
        train, test = str(tmp_path / "train.json"), str(tmp_path / "test.json")
        data_helper.main(["--data_dir", str(SHARED / "rolebench"), "--train_path", train, "--test_path", test])
        loaded = ModelDirectory(SHARED / "baichuan2-7b-chat").tokenizer
        data = dataset(loaded, data_helper.read_samples(train))
        assert data.counts["read"] == 8020
        persona = np.mean([len(data.personas[p]) for p in data.persona])
        answer = data.supervised_tokens(np.arange(len(data))) / len(data)
        assert 85 < persona < 110 and 25 < answer < 35
