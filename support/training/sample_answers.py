"""What TensorBoard shows of a run beside its curves: answers to the same questions at every save."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from support.dialogues.samples import conversation, first_question
from support.model.answering import answer_batch, greedy, in_batches, rows_that_fit
from support.model.directory import ModelDirectory


def uncompiled(compiled: bool):
    """Use around answers of a model whose layers are compiled: their many shapes would leave the compiler none for training."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


LONGEST, MOST_ROLES = 128, 20  # tokens of an answer, and roles of a test set with hundreds of them


def sample_answers(model, directory: ModelDirectory, samples: Sequence, per_role: int) -> dict[str, str]:
    """Greedy answers to the first test questions of each role, as Markdown: one sees the persona arrive.

    samples: as read_samples yields them. Leaves the model in evaluation mode.
    """
    config, tokenizer = greedy(directory.generation_config, LONGEST), directory.tokenizer
    room = directory.config.model_max_length - LONGEST
    asked: dict[str, dict[str, list[dict]]] = {}
    for sample in samples:
        if sample["role"] not in asked and len(asked) == MOST_ROLES:
            continue
        # A persona that fills the context leaves none for an answer. A character is four tokens at most, its bytes.
        if 4 * len(sample["system"]) >= room and len(tokenizer.text_to_ids(sample["system"])) >= room:
            continue
        questions = asked.setdefault(sample["role"], {})
        question = first_question(sample["messages"])
        if len(questions) < per_role:
            questions[question] = conversation(sample["system"], question)
    model.eval()
    prompts = [messages for questions in asked.values() for messages in questions.values()]
    if not prompts:
        return {}

    def answer(numbers):
        return answer_batch(model, tokenizer, [prompts[number] for number in numbers], config)

    texts = ["".join(turn["content"] for turn in messages) for messages in prompts]
    longest = max(map(len, tokenizer.text_to_ids(texts)))
    rows = rows_that_fit(model, longest + LONGEST)  # all roles at once, where the memory holds them
    answers = []
    for _, batch in in_batches(answer, range(len(prompts)), rows, done=()):
        answers += batch
    shown, left = {}, iter(answers)
    for role, questions in asked.items():
        lines = [f"**{question}**  \n{next(left).text}" for question in questions]
        shown[f"answers/{role}"] = "\n\n".join(lines)
    return shown
