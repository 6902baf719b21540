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

from support.command_line import ArgumentParser, integer, number
from support.dialogues.cards import card_conversations, read_card
from support.dialogues.json_files import composed
from support.dialogues.profiles import read_characters
from support.dialogues.samples import as_sample, is_trained, read_rolebench, read_samples, split_off
from support.errors import Problems, UserError, blaming, entry_point
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
    share = number(below=1, positive=True)
    add("--test_share", type=share, default=0.1, help="part of the samples, 0 to 1, set aside without a test file")
    add("--train_path", type=Path, default=Path("data/train.json"), help="file for the training samples, replaced")
    add("--test_path", type=Path, default=Path("data/test.json"), help="file for the test samples, replaced")
    add("--roles", nargs="+", help="roles to keep, or all (default: 孙悟空 李白 张飞; of --conversations all)")
    add("--max_responses", type=integer(1), default=2, help="recorded answers drawn for a question of RoleBench's")
    add("--seed", type=int, default=1234, help="decides which answers are drawn, and what is set aside for the test")
    mirror = "HF_ENDPOINT in the environment names a mirror. Nothing else uses the network"
    add("--download", action="store_true", help=f"first fetch what --data_dir lacks from {HUB_DATASET}; {mirror}")
    add("--show", type=integer(1), metavar="N", help="only print N samples of --train_path, as the model will see them")
    add("--model_name_or_path", default="Baichuan2-7B-Chat/", help="directory of the model whose tokenizer --show uses")
    args = parser.parse_args(argv)
    args.desc_path = args.desc_path or rolebench_file(args.data_dir, "profiles-zh_desc.json")
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


def samples(row: dict, kind: str, characters: dict[str, dict], max_responses: int, seed: int) -> list[dict]:
    """The samples of one RoleBench line. But for the address, its text stays as it is, white space at the ends too."""
    role, question, answers = row["role"], row["question"], row["generated"]
    generator = random.Random(f"{seed} {role} {question}")  # its own, so its draw does not depend on what else is kept
    drawn = sorted(generator.sample(range(len(answers)), min(max_responses, len(answers))))
    prompt = question
    if kind == "role-specific" and role in characters:
        prompt = without_address(question, [role, *characters[role]["names"]])
    return [{"role": role, "system": "", "prompt": prompt, "response": answers[i], "kind": kind} for i in drawn]


def example_questions(desc_path: str, characters: dict[str, dict], count: int = 4) -> dict[str, list[str]]:
    """A few short questions for each character, from the training file beside its description if there is one."""
    try:
        rows = read_rolebench(Path(desc_path).with_name("rolebench-zh_role_specific_train.jsonl"))
    except UserError:  # the page can do without
        rows = []
    examples = {role: [] for role in characters}
    for row in rows:
        if (role := row["role"]) in examples:
            question = without_address(row["question"], [role, *characters[role]["names"]])
            if len(question) <= 30 and len(examples[role]) < count:
                examples[role].append(question)
    return examples


# ---------------------------------------------------------------- from the hub


def download(data_dir: Path) -> None:
    """Fetch the files `data_dir` lacks; each appears whole, by rename. Raises: UserError."""
    from huggingface_hub import hf_hub_download, logging  # here, since only --download may touch the network

    logging.set_verbosity_error()  # it would tell of every retry; a failure is told below
    data_dir.mkdir(parents=True, exist_ok=True)
    remedy = "check the network, set HF_ENDPOINT to a mirror of the hub, or fetch it by hand and give it this name"
    for name, remote in HUB_FILES.items():
        if (path := rolebench_file(data_dir, name)).exists():
            print(f"{path} is there already and stays: delete it to fetch it again")
            continue
        print(f"fetching {remote} of {HUB_DATASET}", flush=True)
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as arrivals,
            blaming(f"{path}: cannot fetch {remote} of {HUB_DATASET}: {remedy}"),
        ):
            Path(hf_hub_download(HUB_DATASET, remote, repo_type="dataset", local_dir=arrivals)).replace(path)


# ---------------------------------------------------------------- the script


def rolebench_file(data_dir: Path, name: str) -> Path:
    """Where a file of RoleBench is: under its name here or, in a clone of the hub's dataset, under its name there."""
    path, in_clone = data_dir / name, data_dir / HUB_FILES[name]
    return in_clone if in_clone.exists() and not path.exists() else path


def input_files(args) -> list[tuple[str, str, Path]]:
    """The files to read: split, kind of the questions (of RoleBench's files), path."""
    files = [("train", "", path) for path in args.conversations]
    files += [("test", "", path) for path in args.test_conversations]
    if not files:
        for name, remote in HUB_FILES.items():
            path = rolebench_file(args.data_dir, name)
            if remote.endswith(".jsonl") and path.exists():
                _, kind, split = remote.removesuffix(".jsonl").split("/")
                files.append((split, kind.replace("_", "-"), path))
    return files


def read_inputs(args) -> dict[str, list[dict]]:
    """The samples for training and test, in the order of the files, each once. Raises: UserError with all that is wrong."""
    written, seen = {"train": [], "test": []}, set()
    roles, left_out = set(), Counter()
    files = input_files(args)
    with Problems() as problems:
        if not files:
            problems.append(f"{args.data_dir}: has none of RoleBench's files: write one, or add --download")
        in_use = {os.path.realpath(path) for path in (args.desc_path, *(path for _, _, path in files))}
        for path in (args.train_path, args.test_path):
            if os.path.realpath(path) in in_use:
                problems.append(f"{path}: is an input or the other output: choose another path for what is written")
            in_use.add(os.path.realpath(path))
        characters = {}
        if not args.conversations or args.desc_path.exists():  # conversations may bring all system texts themselves
            characters = problems.of(read_characters, args.desc_path) or {}
        for split, kind, path in files:
            for sample in problems.of(samples_of_file, path, kind, args, characters, problems) or []:
                role = sample["role"]
                roles.add(role)
                if role not in args.roles and "all" not in args.roles:
                    left_out["of other roles"] += 1
                    continue
                if role and not sample["system"]:
                    if role not in characters:
                        problems.append(f"{path}: {role[:20]!r} has no profile in {args.desc_path}: add one")
                        continue
                    sample["system"] = persona(role, characters[role]["description"])
                if "messages" in sample and not any(map(is_trained, sample["messages"])):
                    left_out["not to be learned"] += 1
                    continue
                text = json.dumps(sample)
                if text in seen:
                    left_out["exact duplicates"] += 1
                    continue
                seen.add(text)
                written[split].append(sample)
        known = sorted(filter(None, roles)) if args.conversations else list(characters)
        strangers = [role for role in args.roles if known and role not in {*known, "all"}]
        problems += [f"--roles {role}: is none of the roles: choose from {', '.join(known)}, all" for role in strangers]
    if left_out:
        print("samples left out:", ", ".join(f"{count:,} {what}" for what, count in left_out.items()))
    return written


def samples_of_file(path: Path, kind: str, args, characters: dict[str, dict], problems: list[str]) -> list[dict]:
    """The samples of a file, or the examples in a character card, whose role then joins `characters`. Raises: UserError.

    "system" is "" where the file has no system text. What is wrong with single lines is added to `problems`.
    """
    if kind:
        rows = read_rolebench(path, problems)
        return [sample for row in rows for sample in samples(row, kind, characters, args.max_responses, args.seed)]
    if card := read_card(path):
        for role, character in read_characters(path).items():
            if characters.setdefault(role, character)["description"] != character["description"]:
                raise UserError(f"{path}: {role!r} differs in {args.desc_path}: keep one, or add --desc_path {path}")
        return [as_sample(example, f"{path}: its examples", merge=True) for example in card_conversations(card)]
    conversations = list(read_samples(path, args.merge_turns, problems))
    for sample in conversations:
        sample.pop("kind", None)
    return conversations


def show_samples(args):
    """Print samples as train.py lays them out, by its default limits. Raises: UserError."""
    import utils  # here, since these import torch, which nothing else in this script needs
    from support.dialogues.show import print_samples
    from support.model.directory import ModelDirectory

    tokenizer = ModelDirectory(args.model_name_or_path).tokenizer  # the weights may be absent
    samples = islice(read_samples(args.train_path), args.show)
    print_samples(utils.RoleDataset(samples, tokenizer, max_len=512, max_src_len=256), tokenizer, args.train_path)


@entry_point
def main(argv=None):
    args = parse_args(argv)
    if args.show:
        return show_samples(args)
    if args.download:
        download(args.data_dir)
    written = read_inputs(args)
    if written["train"] and not written["test"] and not args.test_conversations:
        written = split_off(written["train"], args.test_share, args.seed)
    for split, lines in written.items():
        if not lines:
            raise UserError(f"no samples for the {split} file, each counted once: add some, or choose other --roles")

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
