"""The answers that training shows: of each role, and as many at a time as fit."""

from conftest import turns

from support.dialogues.samples import conversation, first_question, read_samples
from support.model.answering import Answer
from support.model.directory import ModelDirectory
from support.training import sample_answers


def test_sample_answers_are_those_of_each_role_by_itself(checkpoint, model, few_samples, monkeypatch):
    monkeypatch.setattr(sample_answers, "LONGEST", 8)
    directory, samples = ModelDirectory(checkpoint), list(read_samples(few_samples[1]))
    texts = sample_answers.generate_sample_answers(model, directory, samples, 1)
    first = {}
    for sample in samples:
        first.setdefault(sample["role"], sample)
    assert len(first) > 1 and len(texts) == len(first)
    for role, sample in first.items():
        question = first_question(sample["messages"])
        config = sample_answers.greedy(directory.generation_config, 8)
        asked = [conversation(sample["system"], question)]
        (answer,) = sample_answers.answer_batch(model, directory.tokenizer, asked, config)
        assert texts[f"answers/{role}"] == f"**{question}**  \n{answer.text}"


def test_sample_answers_of_many_roles(checkpoint, model, few_samples, monkeypatch):
    """So many at a time as the memory holds, of the first twenty roles; two questions of each."""
    directory, calls, lengths = ModelDirectory(checkpoint), [], []
    samples = [
        {"role": f"第{number}个", "system": "", "messages": turns(question, "好")}
        for number in range(30)
        for question in ("甲？", "甲？", "乙乙？", "丙？")
    ]

    def answer_batch(model, tokenizer, conversations, config):
        calls.append(len(conversations))
        return [Answer("好", True)] * len(conversations)

    monkeypatch.setattr(sample_answers, "answer_batch", answer_batch)
    monkeypatch.setattr(sample_answers, "rows_that_fit", lambda model, tokens: lengths.append(tokens) or 16)
    texts = sample_answers.generate_sample_answers(model, directory, samples, 2)
    assert calls == [16, 16, 8] and lengths == [len(directory.tokenizer.text_to_ids("乙乙？")) + 128]
    assert texts == {f"answers/第{number}个": "**甲？**  \n好\n\n**乙乙？**  \n好" for number in range(20)}
    for sample in samples[:4]:
        sample["system"] = "龘" * 1500  # by its bytes, 4,500 tokens: no room for an answer
    assert sample_answers.generate_sample_answers(model, directory, samples[:4], 2) == {"answers/第0个": ""}
