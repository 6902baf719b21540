"""RoleBench files become data/train.json and data/test.json: one sample a line, ready for train.py.

    python3 data_helper.py                                     # 孙悟空, 李白 and 张飞, from the files in data/
    python3 data_helper.py --download                          # the same, after fetching the files data/ lacks
    python3 data_helper.py --data_dir data/sample --roles all  # the five roles of the sample in this repository

A sample is {"role", "system", "prompt", "response"}: a role's persona text, a question and one recorded answer to it.
data/README.md describes the files.
"""

import argparse
import json
import os
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

from support.arguments import ArgumentParser
from support.errors import UserError, entry_point
from support.files import whole_files
from support.json_files import parse_object, read_text, text_problem
from support.profiles import read_characters

# The persona text: what the model is told about the role it plays. Change it to your liking, then train again, since
# a model plays best to the words it was trained with. A brace that the model should see is written twice.
PERSONA = (
    "你就是{role}本人。\n人物简介：{description}\n"
    "无论别人问什么，你都要以{role}的身份，用{role}自己的口吻、性情和见识来回答，可以带上自己的口头禅。"
    "任何时候都不要说自己是语言模型或人工智能。话要说得自然：不要冗长啰嗦，也不要生硬刻板。"
)

# What people call a role besides its own name, and the titles that may follow: 张将军, 李白先生, 齐天大圣孙悟空.
OTHER_NAMES = {
    "孙悟空": ["悟空", "孙大圣", "大圣", "齐天大圣", "美猴王", "孙行者", "猴哥"],
    "李白": ["李太白", "太白", "李先生", "李翰林", "诗仙"],
    "张飞": ["张翼德", "翼德", "张将军", "三将军", "将军", "张三爷", "三爷"],
    "皇帝": ["皇上", "陛下", "圣上", "万岁", "万岁爷"],
    "华妃": ["华贵妃", "年世兰", "世兰", "娘娘", "贵妃娘娘"],
}
TITLES = ["先生", "将军", "大圣", "娘娘", "殿下", "陛下", "大人", "阁下", "老师", "诗人", "大哥", "兄"]

HUB_DATASET = "ZenMoore/RoleBench"
HUB_FILES = {  # name in --data_dir: name in the dataset
    "rolebench-zh_role_specific_train.jsonl": "rolebench-zh/role_specific/train.jsonl",
    "rolebench-zh_general_train.jsonl": "rolebench-zh/general/train.jsonl",
    "rolebench-zh_role_specific_test.jsonl": "rolebench-zh/role_specific/test.jsonl",
    "rolebench-zh_general_test.jsonl": "rolebench-zh/general/test.jsonl",
    "profiles-zh_desc.json": "profiles-zh/desc.json",
}
MOST_PROBLEMS = 20  # lines printed at most: a file in the wrong format would otherwise print thousands


def parse_args(argv=None):
    parser = ArgumentParser(description="Turn RoleBench files into the samples that train.py reads.")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="directory of the RoleBench files")
    parser.add_argument(
        "--desc_path",
        type=Path,
        default=argparse.SUPPRESS,  # it depends on --data_dir
        help="JSON file of the profiles, {role: profile} (default: profiles-zh_desc.json in --data_dir)",
    )
    parser.add_argument(
        "--train_path", type=Path, default=Path("data/train.json"), help="file for the training samples, replaced"
    )
    parser.add_argument(
        "--test_path", type=Path, default=Path("data/test.json"), help="file for the test samples, replaced"
    )
    parser.add_argument(
        "--roles", nargs="+", default=["孙悟空", "李白", "张飞"], help="names of the roles to keep, or all"
    )
    parser.add_argument(
        "--max_responses", type=int, default=2, help="number of recorded answers drawn for a question, at most"
    )
    parser.add_argument("--seed", type=int, default=1234, help="integer that decides which answers are drawn")
    parser.add_argument(
        "--download",
        action="store_true",
        help=f"first fetch the files that --data_dir lacks from {HUB_DATASET} on the Hugging Face hub; the environment "
        "variable HF_ENDPOINT names a mirror. Nothing else here uses the network",
    )
    args = parser.parse_args(argv)
    if "desc_path" not in args:
        args.desc_path = args.data_dir / "profiles-zh_desc.json"
    return args


# ---------------------------------------------------------------- the text of a sample


def persona(role: str, description: str) -> str:
    """The system prompt of a role: the same text in training, on the chat page and in the evaluation."""
    return PERSONA.format(role=role, description=description)


def conversation(system: str, prompt: str) -> list[dict]:
    """A question as the messages that `messages_to_ids` lays out; without a system text there is no system message."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    return messages if system else messages[1:]


def without_address(question: str, role: str) -> str:
    """Cut off the form of address that opens `question`: a name of the role, titles, then a comma, colon or "!".

    "孙大圣，你为何下山，去往何处？" becomes "你为何下山，去往何处？". A clause that only begins with the name
    ("张飞将来巡视，…"), a list ("张飞、关羽谁更勇？") and a question that is nothing but an address stay whole.
    """
    names = "|".join(map(re.escape, [role, *OTHER_NAMES.get(role, [])]))
    titles = "|".join(TITLES)
    address = re.match(rf"\s*(?:尊敬的|亲爱的)?(?:{names})(?:{names}|{titles}){{0,3}}\s*[，,：:！!]\s*", question)
    rest = question[address.end() :] if address else question
    return rest if any(map(str.isalnum, rest)) else question


def samples(row: dict, role_specific: bool, description: str, max_responses: int, seed: int) -> list[dict]:
    """The samples of one RoleBench line. But for the address, its text stays as it is, white space at the ends too."""
    role, question, answers = row["role"], row["question"], row["generated"]
    generator = random.Random(f"{seed} {role} {question}")  # its own, so its draw does not depend on what else is kept
    drawn = sorted(generator.sample(range(len(answers)), min(max_responses, len(answers))))
    prompt = without_address(question, role) if role_specific else question
    system = persona(role, description)
    return [{"role": role, "system": system, "prompt": prompt, "response": answers[i]} for i in drawn]


# ---------------------------------------------------------------- reading, with all problems found before any is told


def read_profiles(path: str | Path) -> dict[str, str]:
    """Read {role: profile}, without what else is said of a role. Raises: UserError with every problem of the file."""
    return {role: character["description"] for role, character in read_characters(path).items()}


def read_rows(path: str | Path, profiles: dict[str, str] | None) -> list[dict]:
    """Read one RoleBench file; blank lines are skipped. Every role needs a profile, unless `profiles` is None.

    Raises: UserError with every problem of every line.
    """
    rows, problems, strangers = [], [], set()
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # splitlines() would also cut at U+2028
        if not line.strip():
            continue
        try:
            row = parse_object(line, path, number)
        except UserError as error:
            problems += error.problems
            continue
        wrong, role = row_problems(row), row.get("role")
        if not wrong and profiles is not None and role not in profiles and role not in strangers:
            strangers.add(role)  # told once a file, since a missing profile concerns hundreds of lines
            wrong = [f"the role {role[:20]!r} has no profile: correct the name, or add a profile to --desc_path"]
        problems += [f"{path}:{number}: {problem}" for problem in wrong]
        rows.append(row)
    if problems:
        raise UserError(*problems)
    return rows


def row_problems(row: dict) -> list[str]:
    """What is wrong with the object of one line. Keys that are not used here, such as "type", may hold anything."""
    texts = {'"role"': row.get("role"), '"question"': row.get("question")}
    answers, problems = row.get("generated"), []
    if isinstance(answers, list) and answers:
        texts |= {f'answer {number} of "generated"': answer for number, answer in enumerate(answers, start=1)}
    else:
        problems.append('"generated" is missing or holds no list of answers: write "generated": ["…"]')
    return problems + [f"{what} {problem}" for what, text in texts.items() if (problem := text_problem(text))]


def read_samples(path: str | Path):
    """Yield the samples {"role", "system", "prompt", "response"} of a file that this script wrote, or of an older one.

    Older files have the keys instruction (the system text), input and output; without an input, the instruction is
    the question. A file is JSON lines, read as they come, or one JSON array, which has to fit into memory.

    Raises:
        UserError: at the first line that is no sample.
    """
    with open(path, encoding="utf-8", errors="surrogateescape") as file:  # a wrong byte is found in its line
        array = file.read(1) == "["
        file.seek(0)
        if array:
            records = parse_object('{"samples": ' + file.read() + "}", path)["samples"]
            for number, record in enumerate(records, start=1):
                yield as_sample(record, f"{path}: sample {number}")
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield as_sample(parse_object(line.rstrip("\n"), path, number), f"{path}:{number}")


def as_sample(record, place: str) -> dict[str, str]:
    """Check one record and give it today's keys. Raises: UserError, which names the place."""
    if not isinstance(record, dict):
        raise UserError(f'{place}: is not a JSON object: write {{"system": …, "prompt": …, "response": …}}')
    sample = {"role": record.get("role", "")}
    for key, older in (("system", "instruction"), ("prompt", "input"), ("response", "output")):
        sample[key] = record.get(key, record.get(older))
    if sample["prompt"] == "" and "instruction" in record:
        sample["system"], sample["prompt"] = "", sample["system"]
    for key, text in sample.items():
        if (problem := text_problem(text)) and not (key in ("role", "system") and text == ""):
            raise UserError(f'{place}: "{key}" {problem}')
    return sample


def example_questions(desc_path: str, roles, count: int = 4) -> dict[str, list[str]]:
    """A few short questions for each role, from the training file beside its description if there is one."""
    try:
        rows = read_rows(Path(desc_path).parent / "rolebench-zh_role_specific_train.jsonl", None)
    except UserError:  # the page can do without
        rows = []
    examples = {role: [] for role in roles}
    for row in rows:
        question = without_address(row["question"], row["role"])
        if len(question) <= 30 and len(examples.get(row["role"], range(count))) < count:
            examples[row["role"]].append(question)
    return examples


# ---------------------------------------------------------------- from the hub


def download(data_dir: Path) -> None:
    """Fetch the files `data_dir` lacks; they appear, by rename, once all have arrived. Raises: UserError."""
    from huggingface_hub import hf_hub_download, logging  # here, since only --download may touch the network

    logging.set_verbosity_error()  # it would tell of every retry; a failure is told below
    missing = dict(HUB_FILES)
    for name in HUB_FILES:
        if (data_dir / name).exists():
            print(f"{data_dir / name} is there already and stays: delete it to fetch it again")
            del missing[name]
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as arrivals:
        for name, remote in missing.items():
            print(f"fetching {remote} of {HUB_DATASET}", flush=True)
            try:
                hf_hub_download(HUB_DATASET, remote, repo_type="dataset", local_dir=arrivals)
            except Exception as error:  # the hub's, its HTTP client's or the system's: they share no narrower class
                reason = str(error.__cause__ or error).strip().split("\n")[0]
                raise UserError(
                    f"{data_dir / name}: cannot fetch {remote} of {HUB_DATASET}: {reason}: check the network, set "
                    "HF_ENDPOINT to a mirror of the hub, or fetch the file by hand and save it under this name"
                ) from None
        for name, remote in missing.items():
            (Path(arrivals) / remote).replace(data_dir / name)


# ---------------------------------------------------------------- the script


def read_all(args) -> tuple[dict[str, str], dict[str, list[dict]]]:
    """The profiles, and the rows of each file by its name. Raises: UserError with every problem of flags and files."""
    paths = {name: args.data_dir / name for name in HUB_FILES if name.startswith("rolebench")}
    profiles, rows, problems = None, {}, []
    if args.max_responses < 1:
        problems.append(f"--max_responses {args.max_responses}: is less than 1: give at least 1")
    taken = {os.path.realpath(path) for path in [args.desc_path, *paths.values()]}
    for flag, path in (("--train_path", args.train_path), ("--test_path", args.test_path)):
        if path.is_dir() or os.path.realpath(path) in taken:
            problems.append(f"{flag} {path}: is a directory, an input or the other output: choose another path")
        taken.add(os.path.realpath(path))

    try:
        profiles = read_profiles(args.desc_path)
        advice = f"has no profile in {args.desc_path}: choose from {', '.join(profiles)}, all"
        problems += [f"--roles {role}: {advice}" for role in args.roles if role not in {*profiles, "all"}]
    except UserError as error:
        problems += error.problems
    for name, path in paths.items():
        try:
            rows[name] = read_rows(path, profiles)
        except UserError as error:
            problems += error.problems

    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"and {len(problems) - MOST_PROBLEMS} more"]
    if problems:
        raise UserError(*problems)
    return profiles, rows


@entry_point
def main(argv=None):
    args = parse_args(argv)
    if args.download:
        download(args.data_dir)
    profiles, rows = read_all(args)
    roles = list(profiles) if "all" in args.roles else list(dict.fromkeys(args.roles))

    # In the order of the files, role-specific lines first: train.py shuffles every epoch itself.
    written = {"train": [], "test": []}
    for name, file_rows in rows.items():
        split = written["train" if name.endswith("train.jsonl") else "test"]
        for row in file_rows:
            if (role := row["role"]) in roles:
                split += samples(row, "role_specific" in name, profiles[role], args.max_responses, args.seed)
    for split, lines in written.items():
        if not lines:
            raise UserError(
                f"{args.data_dir}: no {split} line is of {', '.join(roles)}: add some, or choose other --roles"
            )

    with whole_files(args.train_path, args.test_path) as handles:
        for lines, handle in zip(written.values(), handles):
            handle.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in lines)

    counts = [Counter(sample["role"] for sample in lines) for lines in written.values()]
    print("  train    test  samples")
    for role in roles:
        print(f"{counts[0][role]:7,} {counts[1][role]:7,}  {role}")
    print(f"{counts[0].total():7,} {counts[1].total():7,}  written to {args.train_path} and {args.test_path}")


if __name__ == "__main__":
    main()
