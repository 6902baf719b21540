"""What TensorBoard shows of a run beside its curves: answers to the same questions at every save."""

from baichuan.generation_utils import answer_batch, greedy
from support.model_directory import ModelDirectory
from support.samples import read_samples


def sample_answers(model, directory: ModelDirectory, test_path: str, per_role: int, conversation) -> dict[str, str]:
    """Greedy answers to the first test questions of each role, as Markdown: one sees the persona arrive.

    conversation: data_helper's, (system, question) → messages. Leaves the model in evaluation mode.
    """
    asked: dict[str, dict[str, list[dict]]] = {}
    for sample in read_samples(test_path):
        questions = asked.setdefault(sample["role"], {})
        question = next(turn["content"] for turn in sample["messages"] if turn["role"] == "user")
        if len(questions) < per_role:
            questions[question] = conversation(sample["system"], question)
    model.eval()
    conversations = [messages for questions in asked.values() for messages in questions.values()]
    config = greedy(directory.generation_config, 128)
    answers = iter(answer_batch(model, directory.tokenizer, conversations, config))  # all roles at once
    return {
        f"answers/{role}": "\n\n".join(f"**{question}**  \n{next(answers).text}" for question in questions)
        for role, questions in asked.items()
    }
