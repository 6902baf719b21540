"""What TensorBoard shows of a run beside its curves: answers to the same questions at every save."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from support.dialogues.samples import first_question
from support.model.answering import answer_batch, greedy, in_batches, rows_that_fit
from support.model.directory import ModelDirectory


def uncompiled(args):
    """Around answers: they run the layers as written. Their many shapes would leave the compiler none for training."""
    return torch.compiler.set_stance("force_eager") if args.compile else nullcontext()


LONGEST, MOST_ROLES = 128, 20  # tokens of an answer, and roles of a test set with hundreds of them


def sample_answers(model, directory: ModelDirectory, samples: Sequence, per_role: int, conversation) -> dict[str, str]:
    """Greedy answers to the first test questions of each role, as Markdown: one sees the persona arrive.

    conversation: data_helper's, (system, question) → messages. Leaves the model in evaluation mode.
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
    conversations = [messages for questions in asked.values() for messages in questions.values()]
    if not conversations:
        return {}

    def answer(numbers):
        return answer_batch(model, tokenizer, [conversations[number] for number in numbers], config)

    texts = ["".join(turn["content"] for turn in messages) for messages in conversations]
    longest = max(map(len, tokenizer.text_to_ids(texts)))
    rows = rows_that_fit(model, longest + LONGEST)  # all roles at once, where the memory holds them
    found = in_batches(answer, range(len(conversations)), rows, done=())
    answers = iter([own for _, batch in found for own in batch])
    return {
        f"answers/{role}": "\n\n".join(f"**{question}**  \n{next(answers).text}" for question in questions)
        for role, questions in asked.items()
    }
