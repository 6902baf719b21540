"""Whose voice is it, and is it more than memory? Answers beside the recorded ones that a model was trained on."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from support.dialogues.samples import is_trained, read_samples

COPY = 0.5  # of an answer's characters in one piece of a training answer: from here on it is called a copy


def read_training(path: Path, questions: Sequence, text: dict[str, str]) -> tuple:
    """(Style or None, Recall or None, remarks): what style and copies are measured with, and what is left out of that.

    text: see `table.texts`. Raises: UserError.
    """
    if not path.is_file():
        return None, None, [text["no training"].format(path)]
    recorded: dict[str, dict[str, None]] = {}  # role → its distinct answers, in order
    asked, remarks = set(), []
    for sample in read_samples(path):
        for turn in sample["messages"]:
            if turn["role"] == "user":
                asked.add(turn["content"])
            elif is_trained(turn):
                recorded.setdefault(sample["role"], {})[turn["content"]] = None
    roles = dict.fromkeys(question.role for question in questions)
    if strangers := [role or text["no role"] for role in roles if role not in recorded]:
        remarks.append(text["no answers of"].format(path, text["comma"].join(strangers)))
    if len(recorded) == 1:
        remarks.append(text["one role"].format(path))
    if known := sum(question.prompt in asked for question in questions):
        remarks.append(text["caveat"].format(known))
    recall = Recall({role: list(texts) for role, texts in recorded.items()})
    return Style(recall.recorded) if len(recorded) > 1 else None, recall, remarks


class Style:
    """Says of a text which role it sounds like, by its characters and their pairs and triples.

    Character n-grams are what authorship is usually told by (Stamatatos 2009, doi 10.1002/asi.21001): they hold
    particles, forms of address and punctuation. Their tf-idf goes into a logistic regression. Every role weighs alike,
    however many answers it has.
    """

    def __init__(self, recorded: dict[str, list[str]]):  # of two roles at least
        from sklearn.feature_extraction.text import TfidfVectorizer  # here: half a second, for those who score style
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        texts = [text for answers in recorded.values() for text in answers]
        roles = [role for role, answers in recorded.items() for _ in answers]
        # The regression holds some forty numbers a role and feature while it learns, 1.3 GB at most.
        most = max(50_000, 4_000_000 // len(recorded))
        characters = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), max_features=most)
        self.pipeline = make_pipeline(characters, LogisticRegression(class_weight="balanced", C=10, max_iter=1000))
        self.pipeline.fit(texts, roles)

    def roles_of(self, texts: Sequence[str]) -> list[str]:
        """The role that each text sounds like most; "" for a text without a character."""
        roles = self.pipeline.predict(texts) if texts else []
        return [str(role) if text.strip() else "" for role, text in zip(roles, texts)]


class Nearest(NamedTuple):
    share: float  # of the answer's characters that the longest common piece has, in [0, 1]
    text: str  # the training answer that has the piece


class Recall:
    """Finds the training answer of a role that has the longest piece, character by character, in common with an answer.

    Verbatim pieces are what memorisation is told by (Lee et al. 2022, arXiv 2107.06499; Carlini et al. 2023,
    arXiv 2202.07646). There they have 50 tokens; answers here are shorter, so what counts is the share of the answer.
    """

    def __init__(self, recorded: dict[str, list[str]]):
        self.recorded = recorded
        self.joined = {role: "\0".join(texts) for role, texts in recorded.items()}

    def nearest(self, role: str, answer: str) -> Nearest:
        """The first of the longest pieces decides."""
        piece, text = "", self.joined.get(role, "")
        for start in range(len(answer)):
            while start + len(piece) < len(answer) and answer[start : start + len(piece) + 1] in text:
                piece = answer[start : start + len(piece) + 1]
        texts = self.recorded.get(role, []) if piece else []
        return Nearest(len(piece) / max(1, len(answer)), next((text for text in texts if piece in text), ""))
