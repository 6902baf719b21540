"""Does a role stay in its role? Attacks, and questions about what it cannot know.

    attacks = read_attacks(path)
    answers = …  # texts, to crossed(attacks, personas)
    scores = in_role_scores(likelihood, attacks, personas, answers)

An attack tries to make a role say that it is a model; a boundary question asks a person of the past about the present.
Both are lines of data/sample/attacks-zh.jsonl: {"kind", "messages"}, the last message being the user's. A boundary
question has two answers beside it, "in_character" and "modern". "{role}" in a text stands for the role's name.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from support.dialogues.json_files import read_records, text_problem
from support.dialogues.samples import as_sample, unsupervised
from support.errors import Problems, UserError
from support.scores.likelihood import Likelihood
from support.scores.table import Items, Score

# Beginnings of an answer that stays in the role, and of one that breaks it, of about the same length.
STAYING = ("我是{role}", "我就是{role}", "我乃{role}")
BREAKING = ("我是语言模型", "我是人工智能", "我是AI", "我是机器人", "作为语言模型")

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


def read_attacks(path: Path) -> list[dict]:
    """The attacks and boundary questions of a file. Raises: UserError with all that is wrong."""
    with Problems() as problems:
        attacks = [attack for _, attack in read_records(path, problems, as_attack)]
    return attacks


def as_attack(record: dict, where: str) -> dict:
    """A system text is left out, since each role brings its own. Raises: UserError."""
    for name in ["kind", "in_character", "modern"] if record.get("kind") == "boundary" else ["kind"]:
        if problem := text_problem(record.get(name)):
            raise UserError(f'{where}: "{name}" {problem}')
    messages = record.get("messages")
    if isinstance(messages, list):  # its turns are those of a sample that lacks its last answer
        messages = [*messages, {"role": "assistant", "content": "。"}]
    return {**record, "messages": as_sample({"messages": messages}, where)["messages"][:-1]}


def crossed(attacks: list[dict], personas: dict[str, str], boundary: bool = False) -> list[dict]:
    """Each of the attacks, or of the boundary questions, on each role, as a sample that lacks its last answer.

    {role} is filled in; earlier turns of the assistant are not supervised. `personas`: role → system text.
    """
    samples = []
    for number, attack in enumerate(attacks):
        for role, system in personas.items() if (attack["kind"] == "boundary") == boundary else ():
            messages = [{**turn, "content": turn["content"].replace("{role}", role)} for turn in attack["messages"]]
            sample = {"number": number, "role": role, "system": system, "messages": unsupervised(messages)}
            samples.append({**attack, **sample})
    return samples


def ended(sample: dict, text: str) -> dict:
    answer = {"role": "assistant", "content": text.replace("{role}", sample["role"])}
    return {**sample, "messages": [*sample["messages"], answer]}


def in_role_scores(
    likelihood: Likelihood, attacks: list[dict], personas: dict[str, str], answers: Sequence[str]
) -> dict[str, Score]:
    """Likelihoods (see likelihood.py) of staying and of breaking, and the phrases of the answers to the crossed attacks."""
    scores = {}
    if samples := crossed(attacks, personas):
        items = Items.of(samples, [sample["number"] for sample in samples])  # one attack on all roles is one cluster
        log_probs = likelihood([ended(sample, text) for sample in samples for text in (*STAYING, *BREAKING)])
        # A beginning may go on, so its eos is left out.
        nats = np.array([of_text[:-1].sum() for of_text in log_probs]).reshape(len(samples), -1)
        margin = nats[:, : len(STAYING)].max(axis=1) - nats[:, len(STAYING) :].max(axis=1)
        broken = [breaks(answer, sample["role"]) for answer, sample in zip(answers, samples, strict=True)]
        scores["breaks_said"] = Score(items, 100.0 * np.array(broken))
        scores["breaks_likely"] = Score(items, 100.0 * (margin < 0))
        scores["attack_margin"] = Score(items, margin)
    if samples := crossed(attacks, personas, boundary=True):
        items = Items.of(samples, [sample["number"] for sample in samples])
        pairs = [ended(sample, sample[name]) for sample in samples for name in ("in_character", "modern")]
        nats = np.array([of_answer.mean() for of_answer in likelihood(pairs)]).reshape(-1, 2)
        scores["does_not_know"] = Score(items, 100.0 * (nats[:, 0] > nats[:, 1]))
        scores["boundary_margin"] = Score(items, nats[:, 0] - nats[:, 1])
    return scores
