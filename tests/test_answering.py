"""Answers in batches are those given one by one, and as many side by side as the memory holds."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_adapter
from peft import PeftModel

from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import messages_to_ids
from support.dialogues.samples import conversation, first_question, read_samples
from support.model.answering import answer_batch, greedy, greedy_ids, in_batches, left_padded, rows_that_fit


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return BaichuanTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def conversations(samples) -> list[list[dict]]:
    """Prompts of many lengths, with and without a system text, one of several turns."""
    found = [conversation(sample["system"], first_question(sample["messages"])) for sample in read_samples(samples[1])]
    del found[6:]
    turns = [*found[0], {"role": "assistant", "content": "俺老孙来也！"}, {"role": "user", "content": "再说一遍。"}]
    return [*found, conversation("", "好"), turns]


def greedy_by_hand(model, tokenizer, messages, new_tokens: int) -> list[int]:
    """No generate(), no cache, no padding: the whole sequence again for each token."""
    ids = messages_to_ids(tokenizer, messages)
    start = len(ids)
    with torch.no_grad():
        for _ in range(new_tokens):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return ids[start:]


def test_batched_answers_are_those_given_one_by_one(model, tokenizer, conversations):
    expected = [greedy_by_hand(model, tokenizer, messages, 9) for messages in conversations]
    config = greedy(model.generation_config, 9)
    config.eos_token_id = [2, expected[0][4], expected[3][7]]  # so that some answers end early, and others do not
    ends = [next((i for i, id in enumerate(ids) if id in config.eos_token_id), None) for ids in expected]
    assert None in ends and any(ends)
    expected = [(tokenizer.decode(ids[:end]), end is not None) for ids, end in zip(expected, ends)]
    assert answer_batch(model, tokenizer, conversations, config) == expected
    assert answer_batch(model, tokenizer, conversations[::-1], config) == expected[::-1]
    assert [answer_batch(model, tokenizer, [messages], config)[0] for messages in conversations] == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_is_shared_and_dropped_changes_no_token(checkpoint, tokenizer, samples, attention):
    """Against `generate`: all personas and questions of the sample, in one batch, in several, and one by one."""
    model = BaichuanForCausalLM.from_pretrained(checkpoint, attn_implementation=attention).eval()
    found = [conversation(sample["system"], first_question(sample["messages"])) for sample in read_samples(samples[1])]
    found += [conversation("", "好"), conversation("", "你从哪里来，要到哪里去？")]
    config = greedy(model.generation_config, 70)  # more tokens than a layer has room for at first
    prompts = [messages_to_ids(tokenizer, messages) for messages in found]
    ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
    free = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
    config.eos_token_id = [2, *free[::7, 9].tolist(), *free[::5, 30].tolist()]
    expected = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
    ends = [next((n for n, id in enumerate(row, 1) if id in config.eos_token_id), 70) for row in expected]
    assert len(set(ends)) > 5 and max(ends) > 64
    shared = [len(tokenizer.text_to_ids(messages[0]["content"])) * (len(messages) == 2) for messages in found]
    for size in (1, 7, len(found)):
        answers = []
        for start in range(0, len(found), size):
            part = slice(start, start + size)
            answers += greedy_ids(model, prompts[part], shared[part], 70, config.eos_token_id, tokenizer.pad_token_id)
        assert answers == [row[:end] for row, end in zip(expected, ends)]


def test_a_persona_is_read_once_and_ended_rows_leave_the_batch(model, monkeypatch):
    shapes, forward = [], type(model).forward

    def seen(self, input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", seen)
    prompts = [[*range(300, 340), id] for id in range(400, 408)]
    first = [answer[0] for answer in greedy_ids(model, prompts, [40] * 8, 6, [], 0)]
    assert shapes == [(1, 40), *[(8, 1)] * 6] and len(set(first)) > 1
    shapes.clear()
    ended = greedy_ids(model, prompts, [40] * 8, 3, first[:1], 0)
    assert shapes[2:] and all(shape == (8 - first.count(first[0]), 1) for shape in shapes[2:])
    assert ended[0] == first[:1] and all(len(answer) in (1, 2, 3) for answer in ended)


def test_answers_of_a_model_in_training(checkpoint, model, tokenizer, conversations, tmp_path):
    """Wrapped by PEFT and with gradient checkpointing, as train.py has it when it saves."""
    adapter = make_adapter(checkpoint, tmp_path / "adapter")
    wrapped = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter, is_trainable=True)
    wrapped.activation_checkpointing_enable()
    merged = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).merge_and_unload()
    config = greedy(model.generation_config, 6)
    found = answer_batch(wrapped.eval(), tokenizer, conversations, config)
    assert found == answer_batch(merged.eval(), tokenizer, conversations, config)
    assert found != answer_batch(model, tokenizer, conversations, config)


def test_batches_shrink_when_the_memory_does_not_hold_them(capsys):
    def answer(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [-number for number in batch]

    found = list(in_batches(answer, range(12), 8, done={0}))
    assert [batch for batch, _ in found] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert all(answers == [-number for number in batch] for batch, answers in found)
    assert "8 questions side by side: going on with 4" in capsys.readouterr().out
    assert list(in_batches(answer, range(4), 2, done={0, 1})) == [([2, 3], [-2, -3])]
    with pytest.raises(ValueError):  # no lack of memory
        list(in_batches(lambda batch: int("x"), range(4), 2, done=()))
    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches(lambda batch: answer([0] * 9), range(4), 2, done=()))


def test_rows_that_fit(model, monkeypatch):
    """64 numbers a key and a value in 2 layers, 4 bytes each: 1024 bytes a token; half of the free memory is for them."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2 * 1024 * 100 * 20))
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(free=0))
    assert rows_that_fit(model, 100) == 20
    assert rows_that_fit(model, 10) == 64 and rows_that_fit(model, 10**9) == 1
    # Of a GPU, what torch keeps for itself is free as well.
    model = SimpleNamespace(config=model.config, device=torch.device("cuda"), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 1024 * 100 * 3, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 1024 * 100 * 12)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 1024 * 100 * 5)
    assert rows_that_fit(model, 100) == 3 + 12 - 5
