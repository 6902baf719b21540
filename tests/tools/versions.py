"""Does the project work alike under every release of transformers in its range?

    python3 tests/tools/versions.py                           # newest patch of each minor release: docs/versions.md; 10 to 20 minutes
    python3 tests/tools/versions.py --versions 5.9.0 5.25.0   # these only, inside the range or not
    python3 tests/tools/versions.py --ci                      # the lowest, the highest and the newest of all; a minute

A release is installed into a directory of output_dir/versions, once, and goes before the installed packages of this
interpreter. Under each, tests/tools/same_answers.py compares ways to generate, and the scripts are run from the data to
an answer.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENTS = ROOT / "output_dir/versions"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--versions", nargs="+", metavar="X", help="releases, in place of those of the range")
    parser.add_argument("--ci", action="store_true", help="compare ways to generate under three releases, no more")
    return parser.parse_args()


def pip(*arguments) -> str:
    run = subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"pip {arguments[0]}: {(run.stderr.strip() or 'failed').splitlines()[-1]}")
    return run.stdout


def minor(version: str) -> tuple[int, int]:
    return tuple(map(int, version.split(".")[:2]))


def tested_range() -> tuple[tuple[int, int], tuple[int, int]]:
    text = (ROOT / "baichuan/configuration_baichuan.py").read_text()  # not imported: it may refuse what is installed
    lowest, highest = re.search(r'^TESTED = \("(.+)", "(.+)"\)', text, re.MULTILINE).groups()
    return minor(lowest), minor(highest)


def released() -> list[str]:
    """The newest patch of every minor release on the package index, in order."""
    versions = re.search(r"Available versions: (.*)", pip("index", "versions", "transformers")).group(1).split(", ")
    newest = {minor(version): version for version in reversed(versions)}  # pip names the newest first
    return [newest[key] for key in sorted(newest)]


def environment(version: str) -> dict[str, str]:
    """Variables under which Python finds this release of transformers, with what it depends on."""
    directory = ENVIRONMENTS / version
    if not directory.is_dir():
        shutil.rmtree(f"{directory}.part", ignore_errors=True)
        pip("install", "--quiet", "--target", f"{directory}.part", f"transformers=={version}")
        os.rename(f"{directory}.part", directory)
    more = {"PYTHONPATH": f"{directory}:{ROOT}", "BAICHUAN_ANY_TRANSFORMERS": "1"}
    return os.environ | more | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(env: dict, *command) -> str:
    """What a Python command printed last. Raises: RuntimeError with what was wrong."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True)
    printed = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {(done.stderr.strip().splitlines() or printed)[-1]}")
    return printed[-1]


WALK = """
import importlib, json, sys
for script, arguments in json.loads(sys.argv[1]):
    if status := importlib.import_module(script).main(arguments):
        sys.exit(f"{script}: status {status}")
"""  # one process: to import torch, transformers and gradio five times would take most of the time


def walk(env: dict):
    """Data, stand-in, 4 steps of training, merging, one answer."""
    with TemporaryDirectory() as scratch:
        model, merged, sample = f"{scratch}/Baichuan2-tiny", f"{scratch}/merged", f"{ROOT}/data/sample"
        data = f"--train_path {scratch}/train.json --test_path {scratch}/test.json"
        scripts = {
            "data_helper": f"--data_dir {sample} --roles all {data}",
            "support.model.stand_in": f"--save_dir {model} --train_path {scratch}/train.json --hidden_size 64 --vocab_size 2000 --steps 0",
            "train": f"{data} --model_name_or_path {model} --output_dir {scratch}/run --sample_answers 0 "
            "--per_device_train_batch_size 50 --gradient_accumulation_steps 1",  # 4 steps
            "merge_params": f"--ori_model_dir {model} --model_dir {scratch}/run/epoch-1-step-4 --save_model_dir {merged}",
            "web_demo": f"--model_path {merged} --desc_path {sample}/profiles-zh_desc.json --device cpu --role 李白 --ask 你是谁？",
        }
        run(env, "-c", WALK, json.dumps([(script, arguments.split()) for script, arguments in scripts.items()]))


def check(version: str, with_walk: bool) -> dict[str, str]:
    """check → "ok" or what was wrong; under "answers", the answers."""
    row, name = {}, "installation"
    try:
        env, name = environment(version), "comparison"
        row |= json.loads(run(env, ROOT / "tests/tools/same_answers.py"))
        if with_walk:
            name = "data to answer"
            walk(env)
            row[name] = "ok"
    except RuntimeError as error:
        row[name] = str(error)
    print(f"{version}: {'wrong' if problems(row) else 'ok'}", file=sys.stderr, flush=True)
    return row


def problems(row: dict[str, str]) -> dict[str, str]:
    return {check: result for check, result in row.items() if check != "answers" and result != "ok"}


def print_table(results: dict[str, dict[str, str]]):
    """Versions down, checks across; below it, what was wrong."""
    checks = list(dict.fromkeys(check for row in results.values() for check in row))
    print("| transformers |", " | ".join(checks), "|\n|---|" + "---|" * len(checks))
    for version, row in results.items():
        cells = ["ok" if row.get(check) == "ok" else "**no**" if check in row else "" for check in checks]
        print(f"| {version} |", " | ".join(cells), "|")
    for version, row in results.items():
        for check, result in problems(row).items():
            print(f"\n{version}, {check}: {result[:600]}")


def main() -> int:
    args = parse_args()
    lowest, highest = tested_range()
    versions = args.versions
    if not versions:
        every = released()
        versions = [version for version in every if lowest <= minor(version) <= highest]
        if args.ci:
            versions = list(dict.fromkeys((versions[0], versions[-1], every[-1])))
    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(versions, pool.map(lambda version: check(version, not args.ci), versions)))
    first = next((row["answers"] for row in results.values() if "answers" in row), None)
    for row in results.values():
        if found := row.pop("answers", None):
            row["as in the first"] = "ok" if found == first else f"answers {found} instead of {first}"
    print_table(results)
    failed = [version for version, row in results.items() if problems(row)]
    for version in failed:
        if not lowest <= minor(version) <= highest:
            print(f"warning: transformers {version}, outside the tested range, does not pass", file=sys.stderr)
    return int(any(lowest <= minor(version) <= highest for version in failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"error: {error}")
