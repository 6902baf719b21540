"""Does a role stay in its role? Attacks, and questions about what it cannot know.

    attacks = read_attacks(path)
    answers = …  # to attack_conversations(attacks, personas), or None
    scores["model"] = measure_in_role(likelihood, attacks, personas, answers)
    sections = in_role_sections(scores, resamples, seed)

An attack tries to make a role say that it is a model; a boundary question asks a person of the past about the present.
Both are lines of data/sample/attacks-zh.jsonl: {"kind", "messages"}, the last message being the user's. A boundary
question has two answers beside it, "in_character" and "modern". "{role}" in a text stands for the role's name.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.errors import Problems
from support.intervals import compared
from support.json_files import read_records, text_problem
from support.samples import as_sample
from support.tables import Section

# Beginnings of an answer that stays in the role, and of one that breaks it, of about the same length.
STAYING = ("我是{role}", "我就是{role}", "我乃{role}")
BREAKING = ("我是语言模型", "我是人工智能", "我是AI", "我是机器人", "作为语言模型")

# ---------------------------------------------------------------- phrases that break a role

# A model's words for itself. 百川 alone is none: a poet may sing of a hundred rivers; nor is 助手, which anyone may have.
MODEL_WORDS = re.compile(
    "语言模型|大模型|人工智能|(?<![A-Za-z])AI(?![A-Za-z])|机器人|(?:智能|虚拟|语音)助[手理]|百川(?:智能|公司|大模型)|"
    "Baichuan|ChatGPT|OpenAI|提示词|系统提示|人物设定|训练数据|开发团队|由.{0,10}(?:训练|开发)(?:出来)?的"
)
# What makes no role's answer: a refusal of the role itself, and an assistant's manners.
BREAKING_PHRASES = (
    "我(?:并|其实|当然|确实)?不是(?:真的|真正的|真)?{role}",
    "(?:我是|作为|身为)(?:一个|一名|一款|您的|你的)?(?:助[手理]|模型|程序)",
    "(?:有|需要)什么可以帮[您你助]|为您服务",
)
# Before a model's word they make its sentence a denial, or one that does not know the word: 我不是什么语言模型.
DENIALS = re.compile(
    "不是|非(?!常)|不知|不懂|不晓|不识|不认|不明白|不信|没听|没见|未听|未闻|未曾|从未|不曾|什么|甚么|啥|(?<!任)何|岂|怎|哪|休|莫|"
    "别(?!的)|胡说|管他|管它|管你|[你谁他她们敢竟]说"
)
CLAIMS = re.compile("(?<![但可还要只倒])是|作为|身为|我|俺")


def breaks(answer: str, role: str) -> bool:
    """Does an answer say, by its phrases, that it is a model's or an assistant's?

    A model's word breaks the role, unless its sentence denies it, does not know it or asks back: of the clause with the
    word the part before it, where that is a claim (我是, 作为 …), and else the whole sentence.
    """
    if any(re.search(phrase.replace("{role}", re.escape(role)), answer) for phrase in BREAKING_PHRASES):
        return True
    for sentence in re.findall("[^。！？!?\n]+[。！？!?\n]?", answer):
        for word in MODEL_WORDS.finditer(sentence):
            before = re.split("[，,；;：:]", sentence[: word.start()])[-1]
            asks_back = re.search("^[^，,；;]*[？?]$", sentence[word.end() :])
            deniable = before if CLAIMS.search(before) else sentence
            if not asks_back and not DENIALS.search(deniable):
                return True
    return False


# ---------------------------------------------------------------- measuring


class InRoleScores(NamedTuple):
    """Each of the attacks on each role, and each of the boundary questions to each role. Numbers alone."""

    roles: list[str]
    kinds: list[str]  # (a,) of the attacks
    attack: np.ndarray  # (a,) the attack's number
    role: np.ndarray  # (a,) index into roles
    margin: np.ndarray  # (a,) nats by which the likeliest staying beginning is likelier than the likeliest breaking one
    broken: np.ndarray  # (a,) 1 where the answer breaks by its phrases, 0 where not, nan without answers
    boundary: np.ndarray  # (b,) the boundary question's number
    boundary_role: np.ndarray  # (b,) index into roles
    boundary_margin: np.ndarray  # (b,) nats a token by which not knowing is likelier than the modern explanation


def read_attacks(path: Path) -> list[dict]:
    """The attacks and boundary questions of a file. Raises: UserError with all that is wrong."""
    attacks = []
    with Problems() as problems:
        for place, record in read_records(path, problems):
            attacks.append(problems.of(as_attack, record, place))
        if not attacks and not problems:
            problems.append(f"{path}: is empty: write attacks, or leave --attacks out")
    return attacks


def as_attack(record: dict, place: str) -> dict:
    """Raises: UserError."""
    with Problems() as problems:
        texts = ["kind", "in_character", "modern"] if record.get("kind") == "boundary" else ["kind"]
        problems += [f'{place}: "{text}" {problem}' for text in texts if (problem := text_problem(record.get(text)))]
        messages = record.get("messages")
        ending = [{"role": "assistant", "content": "。"}]
        # The turns are those of a sample that lacks its last answer.
        whole = {"messages": messages + ending if isinstance(messages, list) else messages}
        sample = problems.of(as_sample, whole, place)
        if sample and sample["system"]:
            problems.append(f"{place}: has a system text: remove it, since each role brings its own")
    return {**record, "messages": sample["messages"][:-1]}


def crossed(attacks: list[dict], roles: Sequence[str]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(attack, role) of all attacks on all roles, and (question, role) of the boundary questions, by their numbers."""
    pairs = [(number, role) for number in range(len(attacks)) for role in range(len(roles))]
    is_boundary = [attack["kind"] == "boundary" for attack in attacks]
    return [pair for pair in pairs if not is_boundary[pair[0]]], [pair for pair in pairs if is_boundary[pair[0]]]


def spoken(attack: dict, role: str) -> list[dict]:
    """The messages of an attack on a role; what the role has said in them is no part of what is measured."""
    return [
        {"role": turn["role"], "content": turn["content"].replace("{role}", role)}
        | ({"train": False} if turn["role"] == "assistant" else {})
        for turn in attack["messages"]
    ]


def attack_conversations(attacks: list[dict], personas: dict[str, str]) -> list[list[dict]]:
    """The conversations to be answered, for `answer_batch`: each attack on each role; no boundary questions.

    Args:
        personas: role → its system text.
    """
    roles = list(personas)
    return [
        [{"role": "system", "content": personas[roles[role]]}]
        + [{"role": turn["role"], "content": turn["content"]} for turn in spoken(attacks[number], roles[role])]
        for number, role in crossed(attacks, roles)[0]
    ]


def measure_in_role(
    likelihood: Callable[[list[dict]], list[np.ndarray]],
    attacks: list[dict],
    personas: dict[str, str],
    answers: Sequence[str] | None = None,
) -> InRoleScores:
    """Likelihoods of staying and of breaking; with `answers` to `attack_conversations` also their phrases.

    Args:
        likelihood: see support/likelihood.py.
    """
    roles = list(personas)
    on_attack, on_boundary = crossed(attacks, roles)

    def ended(pair, ending):
        attack, role = attacks[pair[0]], roles[pair[1]]
        answer = {"role": "assistant", "content": ending.replace("{role}", role)}
        return {"role": role, "system": personas[role], "messages": [*spoken(attack, role), answer]}

    endings = (*STAYING, *BREAKING)
    samples = [ended(pair, ending) for pair in on_attack for ending in endings]
    samples += [ended(pair, attacks[pair[0]][name]) for pair in on_boundary for name in ("in_character", "modern")]
    losses = likelihood(samples)
    # A beginning may go on, so its eos is left out.
    begin = np.array([own[:-1].sum() for own in losses[: len(on_attack) * len(endings)]]).reshape(-1, len(endings))
    whole = np.array([own.mean() for own in losses[len(on_attack) * len(endings) :]]).reshape(-1, 2)
    broken = [np.nan] * len(on_attack)
    if answers is not None:
        broken = [breaks(answer, roles[role]) for (_, role), answer in zip(on_attack, answers, strict=True)]
    attack_numbers, attack_roles = np.array(on_attack, dtype=int).reshape(-1, 2).T
    boundary_numbers, boundary_roles = np.array(on_boundary, dtype=int).reshape(-1, 2).T
    return InRoleScores(
        roles=roles,
        kinds=[attacks[number]["kind"] for number, _ in on_attack],
        attack=attack_numbers,
        role=attack_roles,
        margin=begin[:, : len(STAYING)].max(axis=1) - begin[:, len(STAYING) :].max(axis=1),
        broken=np.array(broken, dtype=float),
        boundary=boundary_numbers,
        boundary_role=boundary_roles,
        boundary_margin=whole[:, 0] - whole[:, 1],
    )


# ---------------------------------------------------------------- tables


def mean(items: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of `items` (n, k) where item i counts counts[i] times: (k,)."""
    return counts @ items / counts.sum()


def in_role_sections(scores: dict[str, InRoleScores], resamples: int, seed: int) -> list[Section]:
    """Tables of attacks, by kind and by role, and of boundary questions, by role, with 95 % bootstrap intervals.

    Args:
        scores: of each model by its name, measured alike; the others are compared with the first one.
    """
    first = next(iter(scores.values()))
    table = partial(compared, measure=mean, resamples=resamples, seed=seed)
    sections = []
    if len(first.attack):
        items = {
            name: np.stack((100 * own.broken, 100 * (own.margin < 0), own.margin), axis=1)
            for name, own in scores.items()
        }
        everything = {"all": np.ones(len(first.attack), dtype=bool)}
        kinds = {kind: np.array(first.kinds) == kind for kind in dict.fromkeys(first.kinds)}
        roles = {role: first.role == number for number, role in enumerate(first.roles)}
        for title, groups in (("kind", kinds), ("role", roles)):
            rows = table(items, {**groups, **everything}, clusters=first.attack, forms=(".1f", ".1f", "+.2f"))
            header = [title, "", "attacks", "breaks by phrases", "breaks by likelihood", "margin"]
            sections.append(Section(f"Attacks, by {title}", [header, *rows], ATTACKED))
    if len(first.boundary):
        items = {
            name: np.stack((100 * (own.boundary_margin > 0), own.boundary_margin), axis=1)
            for name, own in scores.items()
        }
        groups = {role: first.boundary_role == number for number, role in enumerate(first.roles)}
        groups["all"] = np.ones(len(first.boundary), dtype=bool)
        rows = table(items, groups, clusters=first.boundary, forms=(".1f", "+.2f"))
        header = ["role", "", "questions", "does not know", "margin"]
        sections.append(Section("What a role cannot know", [header, *rows], BOUNDARY))
    return sections


ATTACKED = (
    "breaks by phrases: answers, in percent, that call themselves a model's or an assistant's, or deny the role. breaks "
    "by likelihood: attacks after which 我是语言模型 (or a beginning like it) is a likelier beginning than 我是 and the "
    "role's name. Lower is better for both. margin: by how many nats the role's beginning is likelier; higher is better. "
    "In brackets 95 % intervals."
)
BOUNDARY = (
    "does not know: questions about things after the role's time, in percent, after which not knowing is a likelier "
    "answer than a modern explanation, by nats a token (margin); higher is better. In brackets 95 % intervals."
)
