"""Arguments are answered before anything slow is imported, and a wrong environment is told in one line."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from support import command_line
from support.errors import UserError

SCRIPTS = ["data_helper.py", "train.py", "merge_params.py", "predict.py", "web_demo.py", "-m support.model.stand_in"]
SLOW = ["torch", "transformers", "numpy", "peft", "deepspeed", "gradio", "starlette", "uvicorn"]
WORKING = {  # arguments that are right as far as argparse sees
    "merge_params.py": ["--ori_model_dir", "a", "--model_dir", "b", "--save_model_dir", "c"],
    "predict.py": ["--model_path", "a"],
}


def run(script: str, *arguments: str, options=(), path="", cwd=ROOT, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, *script.split(), *arguments]
    environment = os.environ | {"PYTHONPATH": str(path)} | more
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def no_slow_modules(tmp_path_factory):
    """A directory whose modules stand before the real ones, and say so when they are imported."""
    directory = tmp_path_factory.mktemp("slow")
    for name in SLOW:
        (directory / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    return directory


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_are_read_first_and_help_is_readable_from_elsewhere(script, no_slow_modules, tmp_path):
    """In a terminal without Chinese, too. Of the files that come with the project, those beside the script are named."""
    name = script if script.startswith("-m") else str(ROOT / script)
    path = os.pathsep.join([str(no_slow_modules), str(ROOT)])  # for -m, which looks for the project there
    shown = run(name, "--help", path=path, cwd=tmp_path, PYTHONIOENCODING="ascii", COLUMNS="500")
    assert (shown.returncode, shown.stderr) == (0, "")
    flags = re.split(r"\n  (?=-)", shown.stdout)[1:]
    assert len(flags) > 4 and all(re.search("[a-z]{3} ", flag.split(None, 2)[-1]) for flag in flags), flags
    for default in re.findall(r"\(default: (\S+)\)", shown.stdout):
        if (ROOT / default).is_file() and not default.startswith("data/t"):  # train.json and test.json are the user's
            assert os.path.isabs(default), default
    wrong = run(script, *WORKING.get(script, []), "--孙", path=no_slow_modules, PYTHONIOENCODING="ascii")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unrecognized arguments: --\\u5b59 (--help explains every flag)\n"


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_outside_the_environment_one_line_says_how_to_enter_it(script):
    ended = run(script, *WORKING.get(script, []), options=["-S"])  # without the installed packages
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    assert ended.stderr.startswith("error: ") and "is not installed for this Python" in ended.stderr
    assert 'run "make setup"' in ended.stderr


@pytest.mark.parametrize("script", ["train.py", "predict.py", "-m support.model.stand_in"])
def test_an_untested_transformers_is_one_line(script, tmp_path):
    (tmp_path / "transformers.py").write_text("__version__ = '4.57.6'\ndef __getattr__(name): return object\n")
    (tmp_path / "peft.py").write_text("def __getattr__(name): return object\n")
    ended = run(script, *WORKING.get(script, []), path=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: transformers 4.57.6 is installed") and ended.stderr.count("\n") == 1


def test_numbers_are_within_their_range():
    parser = command_line.ArgumentParser()
    parser.add_argument("--steps", type=command_line.integer(1))
    parser.add_argument("--share", type=command_line.number(0, 1))
    parser.add_argument("--rate", type=command_line.number(positive=True))
    right = ["--steps", "1", "--share", "0", "--rate", "1e-4"]
    assert vars(parser.parse_args(right)) == {"steps": 1, "share": 0.0, "rate": 1e-4}
    for wrong in (
        "--steps 0",
        "--steps 2.5",
        "--steps 4294967296",
        "--share 1",
        "--share -0.1",
        "--rate 0",
        "--rate nan",
    ):
        with pytest.raises(UserError, match=wrong.split()[0]):
            parser.parse_args(wrong.split())


def test_flags_of_a_file_stand_before_those_of_the_line(tmp_path):
    path = tmp_path / "flags.json"
    path.write_text('{"lora_dim": 8, "is_skip": true, "compile": false, "patience": null, "seed": 1}')
    found = command_line.with_config(["--config", str(path), "--seed", "2"])
    assert found == ["--lora_dim=8", "--is_skip", "--seed=1", "--config", str(path), "--seed", "2"]
