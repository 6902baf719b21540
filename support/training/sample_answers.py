"""What TensorBoard shows of a run beside its curves: answers to the same questions at every save."""

from collections.abc import Sequence

import torch

from support.dialogues.samples import conversation, first_question
from support.model.answering import answer_batch, greedy, in_batches, rows_that_fit
from support.model.directory import ModelDirectory

LONGEST, MOST_ROLES = 128, 20  # tokens of an answer, and roles of a test set with hundreds of them


def uncompiled(is_compiled: bool):
    """Use around answers: with --compile their many shapes would leave the compiler none for training."""
    return torch.compiler.set_stance("force_eager" if is_compiled else "default")


def generate_sample_answers(model, directory: ModelDirectory, samples: Sequence, per_role: int) -> dict[str, str]:
    """Greedy answers to the first test questions of each role, as Markdown: one sees the persona arrive.

    samples: as read_samples yields them. The model is in evaluation mode.
    """
    config, tokenizer = greedy(directory.generation_config, LONGEST), directory.tokenizer
    room = directory.config.model_max_length - LONGEST
    asked: dict[str, dict[str, list[dict]]] = {}  # role → question → messages
    for sample in samples:
        if sample["role"] in asked or len(asked) < MOST_ROLES:
            questions, question = asked.setdefault(sample["role"], {}), first_question(sample["messages"])
            # A persona that fills the context leaves no room for an answer.
            if len(questions) < per_role and len(tokenizer.text_to_ids(sample["system"])) < room:
                questions[question] = conversation(sample["system"], question)
    prompts = [messages for questions in asked.values() for messages in questions.values()]
    texts = ["".join(turn["content"] for turn in messages) for messages in prompts]
    longest = max(map(len, tokenizer.text_to_ids(texts)), default=0)

    rows = rows_that_fit(model, longest + LONGEST)  # all roles at once, where the memory holds them
    batches = in_batches(lambda batch: answer_batch(model, tokenizer, batch, config), prompts, rows, done=())
    answers, shown = (answer.text for _, batch in batches for answer in batch), {}
    for role, questions in asked.items():
        shown[f"answers/{role}"] = "\n\n".join(f"**{question}**  \n{next(answers)}" for question in questions)
    return shown
