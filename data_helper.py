"""Recorded dialogues become data/train.json and data/test.json: one sample a line, ready for train.py.

    python3 data_helper.py                                     # 孙悟空, 李白 and 张飞, from RoleBench's files in data/
    python3 data_helper.py --download                          # the same, after fetching the files data/ lacks
    python3 data_helper.py --data_dir data/sample --roles all  # the five roles of the sample in this repository
    python3 data_helper.py --show 3                            # three samples as the model will see them
    python3 data_helper.py --conversations mine.json           # conversations of your own, of several rounds

A sample is {"role", "system", "prompt", "response"}: a role's persona text, a question and one recorded answer to it;
or {"role", "system", "messages"}, a conversation. In test.json "kind" says whether RoleBench's question is role-specific
or general. data/README.md describes the files.
"""

import json
import os
import random
import re
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

from support.command_line import ArgumentParser
from support.dialogues.cards import card_conversations, read_card
from support.dialogues.json_files import composed
from support.dialogues.profiles import read_characters
from support.dialogues.samples import as_sample, read_rolebench, read_samples, split_off
from support.errors import Problems, UserError, entry_point
from support.files import whole_files

# The persona text: what the model is told about the role it plays. Change it to your liking, then train again, since
# a model plays best to the words it was trained with. A brace that the model should see is written twice.
PERSONA = (
    "你就是{role}本人。\n人物简介：{description}\n"
    "无论别人问什么，你都要以{role}的身份，用{role}自己的口吻、性情和见识来回答，可以带上自己的口头禅。"
    "任何时候都不要说自己是语言模型或人工智能。话要说得自然：不要冗长啰嗦，也不要生硬刻板。"
)

# The titles that may follow a role's name: 张将军, 李白先生, 齐天大圣孙悟空.
TITLES = ["先生", "将军", "大圣", "娘娘", "殿下", "陛下", "大人", "阁下", "老师", "诗人", "大哥", "兄"]
ALL_IS_A_ROLE = "--roles all: a role has that name: rename it, or name the roles that you want"

HUB_DATASET = "ZenMoore/RoleBench"
HUB_FILES = {  # name in --data_dir: name in the dataset
    "rolebench-zh_role_specific_train.jsonl": "rolebench-zh/role_specific/train.jsonl",
    "rolebench-zh_general_train.jsonl": "rolebench-zh/general/train.jsonl",
    "rolebench-zh_role_specific_test.jsonl": "rolebench-zh/role_specific/test.jsonl",
    "rolebench-zh_general_test.jsonl": "rolebench-zh/general/test.jsonl",
    "profiles-zh_desc.json": "profiles-zh/desc.json",
}


def parse_args(argv=None):
    parser = ArgumentParser(description="Turn recorded dialogues into the samples that train.py reads.")
    add = parser.add_argument
    add("--data_dir", type=Path, default=Path("data"), help="directory of the RoleBench files")
    add("--desc_path", type=Path, help="JSON file of the profiles (default: profiles-zh_desc.json in --data_dir)")
    add("--conversations", nargs="+", type=Path, default=[], help="files of your own, read instead of RoleBench's")
    add("--test_conversations", nargs="+", type=Path, default=[], help="the same for the test, instead of --test_share")
    add("--merge_turns", action="store_true", help="join turns of the same speaker that follow each other")
    add("--test_share", type=float, default=0.1, help="part of the samples, 0 to 1, set aside without a test file")
    add("--train_path", type=Path, default=Path("data/train.json"), help="file for the training samples, replaced")
    add("--test_path", type=Path, default=Path("data/test.json"), help="file for the test samples, replaced")
    add("--roles", nargs="+", help="roles to keep, or all (default: 孙悟空 李白 张飞; of --conversations all)")
    add("--max_responses", type=int, default=2, help="recorded answers drawn for a question of RoleBench's, at most")
    add("--seed", type=int, default=1234, help="decides which answers are drawn, and what is set aside for the test")
    mirror = "HF_ENDPOINT in the environment names a mirror. Nothing else uses the network"
    add("--download", action="store_true", help=f"first fetch what --data_dir lacks from {HUB_DATASET}; {mirror}")
    add("--show", type=int, metavar="N", help="only print N samples of --train_path, as the model will see them")
    add("--model_name_or_path", default="Baichuan2-7B-Chat/", help="directory of the model whose tokenizer --show uses")
    args = parser.parse_args(argv)
    args.desc_given = args.desc_path is not None
    args.desc_path = args.desc_path or rolebench_file(args.data_dir, "profiles-zh_desc.json")
    args.all_named = "all" in (args.roles or [])
    args.roles = list(map(composed, args.roles or (["all"] if args.conversations else ["孙悟空", "李白", "张飞"])))
    return args


# ---------------------------------------------------------------- the text of a sample


def persona(role: str, description: str) -> str:
    """The system prompt of a role: the same text in training, on the chat page and in the evaluation."""
    return PERSONA.format(role=role, description=description)


def without_address(question: str, names: list[str]) -> str:
    """Cut off the form of address that opens `question`: a name of the role, titles, then a comma, colon or "!".

    "孙大圣，你为何下山，去往何处？" becomes "你为何下山，去往何处？". A clause that only begins with the name
    ("张飞将来巡视，…"), a list ("张飞、关羽谁更勇？") and a question that is nothing but an address stay whole.
    """
    names = "|".join(map(re.escape, names))
    titles = "|".join(TITLES)
    address = re.match(rf"\s*(?:尊敬的|亲爱的)?(?:{names})(?:{names}|{titles}){{0,3}}\s*[，,：:！!]\s*", question)
    rest = question[address.end() :] if address else question
    return rest if any(map(str.isalnum, rest)) else question


def samples(row: dict, role_specific: bool, character: dict, max_responses: int, seed: int) -> list[dict]:
    """The samples of one RoleBench line. But for the address, its text stays as it is, white space at the ends too."""
    role, question, answers = row["role"], row["question"], row["generated"]
    generator = random.Random(f"{seed} {role} {question}")  # its own, so its draw does not depend on what else is kept
    drawn = sorted(generator.sample(range(len(answers)), min(max_responses, len(answers))))
    prompt = question
    if role_specific:
        prompt = without_address(question, [role, *character["names"]])
    system = persona(role, character["description"])
    kind = "role-specific" if role_specific else "general"
    return [{"role": role, "system": system, "prompt": prompt, "response": answers[i], "kind": kind} for i in drawn]


def example_questions(desc_path: str, roles, count: int = 4) -> dict[str, list[str]]:
    """A few short questions for each role, from the training file beside its description if there is one."""
    try:
        characters = read_characters(desc_path)
        in_clone = Path(desc_path).parts[-2:] == ("profiles-zh", "desc.json")
        data_dir = Path(desc_path).parents[1 if in_clone else 0]
        rows = read_rolebench(rolebench_file(data_dir, "rolebench-zh_role_specific_train.jsonl"), None)
    except UserError:  # the page can do without
        characters, rows = {}, []
    examples = {role: [] for role in roles}
    for row in rows:
        if (role := row["role"]) in examples:
            question = without_address(row["question"], [role, *characters[role]["names"]])
            if len(question) <= 30 and len(examples[role]) < count:
                examples[role].append(question)
    return examples


# ---------------------------------------------------------------- from the hub


def download(data_dir: Path) -> None:
    """Fetch the files `data_dir` lacks; they appear, by rename, once all have arrived. Raises: UserError."""
    from huggingface_hub import hf_hub_download, logging  # here, since only --download may touch the network

    logging.set_verbosity_error()  # it would tell of every retry; a failure is told below
    missing = dict(HUB_FILES)
    for name in HUB_FILES:
        if (path := rolebench_file(data_dir, name)).exists():
            print(f"{path} is there already and stays: delete it to fetch it again")
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


def flag_problems(args) -> list[str]:
    """What is wrong with the flags by themselves."""
    problems = []
    if args.max_responses < 1:
        problems.append(f"--max_responses {args.max_responses}: is less than 1: give at least 1")
    if not 0 < args.test_share < 1:
        problems.append(f"--test_share {args.test_share}: is not between 0 and 1: give a part, such as 0.1")
    if not args.conversations and (args.test_conversations or args.merge_turns):
        problems.append("--test_conversations and --merge_turns: belong to --conversations: add it, or leave them out")
    inputs = [args.desc_path, *args.conversations, *args.test_conversations, *rolebench_paths(args).values()]
    taken = set(map(os.path.realpath, inputs))
    for flag, path in (("--train_path", args.train_path), ("--test_path", args.test_path)):
        if path.exists() and not path.is_file() or os.path.realpath(path) in taken:
            problems.append(f"{flag} {path}: is no regular file, an input or the other output: choose another path")
        taken.add(os.path.realpath(path))
    return problems


def rolebench_file(data_dir: Path, name: str) -> Path:
    """Where a file of RoleBench is: under its name here or, in a clone of the hub's dataset, under its name there."""
    path, in_clone = data_dir / name, data_dir / HUB_FILES[name]
    return in_clone if in_clone.exists() and not path.exists() else path


def rolebench_paths(args) -> dict[str, Path]:
    return {name: rolebench_file(args.data_dir, name) for name in HUB_FILES if name.startswith("rolebench")}


def from_rolebench(args) -> dict[str, list[dict]]:
    """The samples for training and test. Raises: UserError with every problem of flags and files."""
    with Problems() as problems:
        problems += flag_problems(args)
        characters = problems.of(read_characters, args.desc_path) or {}
        advice = f"has no profile in {args.desc_path}: choose from {', '.join(characters)}, all"
        problems += [
            f"--roles {role}: {advice}" for role in args.roles if characters and role not in {*characters, "all"}
        ]
        if args.all_named and "all" in characters:
            problems.append(ALL_IS_A_ROLE)
        paths = {name: path for name, path in rolebench_paths(args).items() if path.exists()}
        rows = {name: problems.of(read_rolebench, path, characters or None) or [] for name, path in paths.items()}
        if not paths:
            problems.append(f"{args.data_dir}: has none of RoleBench's files: write one, or add --download")
    roles = characters if "all" in args.roles else args.roles
    written = {"train": [], "test": []}  # in the order of the files: train.py shuffles every epoch itself
    for name, file_rows in rows.items():
        split = written["train" if name.endswith("train.jsonl") else "test"]
        for row in file_rows:
            if (role := row["role"]) in roles:
                split += samples(row, "role_specific" in name, characters[role], args.max_responses, args.seed)
    return written


def from_conversations(args) -> dict[str, list[dict]]:
    """The samples for training and test, each once. Raises: UserError with every problem of flags and files."""
    written, seen = {"train": [], "test": []}, set()
    found, strangers, everyone = Counter(), set(), "all" in args.roles  # found: conversations of each role
    merged = Counter() if args.merge_turns else None
    with Problems() as problems:
        problems += flag_problems(args)
        characters = {}
        if args.desc_given or args.desc_path.exists():  # a file of one's own may hold all system texts itself
            characters = problems.of(read_characters, args.desc_path) or {}
        files = [("train", path) for path in args.conversations] + [("test", path) for path in args.test_conversations]
        problems += [f"{path}: there is no such file: correct the path" for _, path in files if not path.is_file()]
        for split, path in files:
            if not path.is_file():
                continue
            for sample in problems.of(samples_of_file, path, merged, problems, characters) or []:
                role, system = sample["role"], sample["system"]
                found[role] += 1
                if role not in args.roles and not everyone:
                    continue
                if role and not system and role in characters:
                    system = persona(role, characters[role]["description"])
                elif role and not system and role not in strangers:
                    strangers.add(role)
                    problems.append(
                        f"{path}: {role[:20]!r} has no system text and no profile in {args.desc_path}: add one"
                    )
                sample = {"role": role, "system": system, "messages": sample["messages"]}
                text = json.dumps(sample)
                if text not in seen:
                    seen.add(text)
                    written[split].append(sample)
        if args.all_named and "all" in found:
            problems.append(ALL_IS_A_ROLE)
        names = ", ".join(filter(None, found))
        absent = [role for role in args.roles if found and role not in {*found, "all"}]
        problems += [f"--roles {role}: no conversation is of that role: choose from {names}, all" for role in absent]
    wanted = found.total() if everyone else sum(found[role] for role in set(args.roles))
    left_out = f"{found.total() - wanted:,} of other roles, {wanted - len(seen):,} exact duplicates"
    print(f"{found.total():,} conversations read; left out: {left_out}")
    if args.merge_turns:
        print(f"{merged['turns']:,} turns joined with the turn of the same speaker before them")
    return written


def samples_of_file(path: Path, merged: Counter | None, problems: list[str], characters: dict[str, dict]):
    """The samples of a file, or the examples in a character card, whose role then joins `characters`. Raises: UserError."""
    if (card := read_card(path)) is None:
        return read_samples(path, merged, problems)
    for role, character in read_characters(path).items():
        characters.setdefault(role, character)
    examples = [as_sample(example, f"{path}: its examples", Counter()) for example in card_conversations(card)]
    if not examples:
        raise UserError(
            f"{path}: the character card has no example of a question and its answer: write some (data/README.md)"
        )
    return examples


def show_samples(args):
    """Print samples as train.py lays them out, by its default limits. Raises: UserError."""
    if args.show < 1:
        raise UserError(f"--show {args.show}: give a number from 1")
    if not args.train_path.is_file():
        raise UserError(f"{args.train_path}: is not a file: first run without --show")
    import utils  # here, since these import torch, which nothing else in this script needs
    from support.dialogues.show import print_samples
    from support.model.directory import ModelDirectory

    if not (Path(args.model_name_or_path) / "tokenizer.model").is_file():
        raise UserError(
            f"--model_name_or_path {args.model_name_or_path}: holds no tokenizer.model: name a model directory, or make "
            "a small one: python3 -m support.model.stand_in"
        )
    tokenizer = ModelDirectory(args.model_name_or_path).tokenizer  # the weights may be absent
    samples = islice(read_samples(args.train_path), args.show)
    print_samples(utils.RoleDataset(samples, tokenizer, max_len=512, max_src_len=256), tokenizer, args.train_path)


@entry_point
def main(argv=None):
    args = parse_args(argv)
    if args.show is not None:
        show_samples(args)
        return
    if args.download:
        download(args.data_dir)
    written = from_conversations(args) if args.conversations else from_rolebench(args)
    if written["train"] and not written["test"] and not args.test_conversations:
        written = split_off(written["train"], args.test_share, args.seed)
    for split, lines in written.items():
        if not lines:
            source = ", ".join(map(str, args.conversations or [args.data_dir]))
            where = "training" if split == "train" else "the test that are not in training, too"
            raise UserError(f"{source}: no samples for {where}: add some, or choose other --roles")

    for sample in written["train"]:
        sample.pop("kind", None)  # predict.py's table goes by it, training does not
    with whole_files(args.train_path, args.test_path) as handles:
        for lines, handle in zip(written.values(), handles):
            handle.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in lines)

    counts = [Counter(sample["role"] for sample in lines) for lines in written.values()]
    print("  train    test  samples")
    for role in counts[0] | counts[1]:
        print(f"{counts[0][role]:7,} {counts[1][role]:7,}  {role or '(no role)'}")
    print(f"{counts[0].total():7,} {counts[1].total():7,}  written to {args.train_path} and {args.test_path}")


if __name__ == "__main__":
    main()
