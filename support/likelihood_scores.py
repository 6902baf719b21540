"""All that is measured with a model's own likelihoods, for a report: persona, staying in role, plain text.

personas = role_personas(questions)
measured["model"] = measure(likelihood, questions, attacks, attack_answers, texts)
sections = likelihood_sections(measured, resamples, seed)
"""

from collections.abc import Sequence
from typing import NamedTuple

from support.forgetting import PlainTextScores, measure_plain_text, plain_text_sections
from support.in_role import InRoleScores, in_role_sections, measure_in_role
from support.persona_scores import HEARD, PersonaScores, measure_persona, persona_sections, personas_of
from support.report import Picture
from support.tables import Section


class Measured(NamedTuple):
    """Of one model. Numbers alone: the model itself need not be kept."""

    persona: PersonaScores
    in_role: InRoleScores | None  # None where no sample names a role, or without attacks
    plain_text: PlainTextScores | None


def recorded_answers(questions: Sequence) -> list[dict]:
    """predict.py's questions with their recorded answers as samples, in which the last answer alone is supervised."""
    samples = []
    for question in questions:
        turns = [turn | {"train": False} if turn["role"] == "assistant" else turn for turn in question.messages]
        turns = [turn for turn in turns if turn["role"] != "system"]
        for reference in question.references:
            messages = [*turns, {"role": "assistant", "content": reference}]
            samples.append({"role": question.role, "system": question.system, "messages": messages})
    return samples


def role_personas(questions: Sequence) -> dict[str, str]:
    """The roles that are attacked: name → persona text. Those without a name have nobody to be."""
    return {role: system for role, system in personas_of(recorded_answers(questions)).items() if role}


def measure(
    likelihood,
    questions: Sequence,
    attacks: list[dict],
    attack_answers: Sequence[str] | None = None,
    texts: Sequence[str] = (),
) -> Measured:
    """Read everything under one model.

    Args:
        likelihood: see support/likelihood.py.
        questions: have role, system, kind, messages (the system's included) and references.
        attacks: see `read_attacks`.
        attack_answers: to `attack_conversations(attacks, role_personas(questions))`.
        texts: paragraphs that belong to no role.
    """
    personas = role_personas(questions)
    kinds = [question.kind for question in questions for _ in question.references]
    return Measured(
        measure_persona(likelihood, recorded_answers(questions), kinds),
        measure_in_role(likelihood, attacks, personas, attack_answers) if attacks and personas else None,
        measure_plain_text(likelihood, list(texts)) if texts else None,
    )


def likelihood_sections(models: dict[str, Measured], resamples: int, seed: int) -> list[Section]:
    """All tables, with 95 % bootstrap intervals; the models after the first are compared with it."""
    sections = []
    for name, make in (
        ("persona", persona_sections),
        ("in_role", in_role_sections),
        ("plain_text", plain_text_sections),
    ):
        scores = {model: getattr(measured, name) for model, measured in models.items()}
        if scores and None not in scores.values():
            sections += make(scores, resamples, seed)
    return sections


def heard_pictures(models: dict[str, Measured]) -> list[Picture]:
    """Of each model who is heard, over all kinds of questions."""
    return [
        Picture(f"Who is heard: {name}", measured.persona.roles, measured.persona.confusion(), HEARD)
        for name, measured in models.items()
        if len(measured.persona.roles) > 1 and len(measured.persona.role)
    ]
