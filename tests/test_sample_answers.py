"""The answers that training shows: of each role, and as many at a time as fit."""

from support.dialogues.samples import conversation, first_question, read_samples
from support.model.answering import Answer
from support.model.directory import ModelDirectory
from support.training import sample_answers


def test_sample_answers_are_those_of_each_role_by_itself(checkpoint, few_samples, monkeypatch):
    directory, calls, answer_batch = ModelDirectory(checkpoint), [], sample_answers.answer_batch
    model = directory.load()

    def counted(model, tokenizer, conversations, config):
        calls.append(len(conversations))
        config.max_new_tokens = 8
        return answer_batch(model, tokenizer, conversations, config)

    monkeypatch.setattr(sample_answers, "answer_batch", counted)
    texts = sample_answers.sample_answers(model, directory, read_samples(few_samples[1]), 1)
    assert calls == [len(texts)] and len(texts) > 1
    first = {}
    for sample in read_samples(few_samples[1]):
        first.setdefault(sample["role"], sample)
    for sample in first.values():
        (answer,) = counted(
            model,
            directory.tokenizer,
            [conversation(sample["system"], first_question(sample["messages"]))],
            sample_answers.greedy(directory.generation_config, 8),
        )
        assert texts[f"answers/{sample['role']}"] == f"**{first_question(sample['messages'])}**  \n{answer.text}"


def test_sample_answers_of_many_roles(checkpoint, few_samples, monkeypatch):
    """So many at a time as the memory holds, of the first twenty roles."""
    directory, calls = ModelDirectory(checkpoint), []
    sample = next(iter(read_samples(few_samples[1])))
    samples = [sample | {"role": f"第{number}个"} for number in range(30)]

    def answer_batch(model, tokenizer, conversations, config):
        calls.append(len(conversations))
        return [Answer("好", True)] * len(conversations)

    monkeypatch.setattr(sample_answers, "answer_batch", answer_batch)
    monkeypatch.setattr(sample_answers, "rows_that_fit", lambda model, tokens: 8)
    texts = sample_answers.sample_answers(directory.load(), directory, samples, 2)
    assert calls == [8, 8, 4] and list(texts) == [f"answers/第{number}个" for number in range(20)]
    samples[0]["system"] = "龘" * 1500  # by its bytes, 4,500 tokens: no room for an answer
    texts = sample_answers.sample_answers(directory.load(), directory, samples, 2)
    assert list(texts) == [f"answers/第{number}个" for number in range(1, 21)]
    assert sample_answers.sample_answers(directory.load(), directory, samples[:1], 2) == {}
