"""data_helper.py --show: what is printed is what RoleDataset lays out, and colour appears on a terminal only."""

import re
import subprocess
import sys

import pytest
from conftest import PUBLISHED, ROOT, write_lines

from data_helper import main
from support.dialogues.samples import read_samples
from support.model.directory import ModelDirectory

GREEN = re.compile("\033\\[32m(.*?)\033\\[0m", re.DOTALL)
ANY_COLOUR = re.compile("\033\\[\\d+m")


@pytest.fixture
def show(capsys):
    """show(number, file, model) → what is printed."""

    def run(number, path, model) -> str:
        main(["--show", str(number), "--train_path", str(path), "--model_name_or_path", str(model)])
        return capsys.readouterr().out

    return run


def learned(text: str) -> str:
    """The green part of a sample."""
    return "".join(GREEN.findall(text))


def test_the_coloured_part_and_the_printed_numbers(checkpoint, samples, show, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    known = list(read_samples(samples[0]))
    header = r".*, sample (\d+): (\d+) tokens, (\d+) of them supervised\n"
    _, *printed = re.split(header, show(1000, samples[0], checkpoint))
    assert len(printed) == 4 * len(known)
    tokenizer = ModelDirectory(checkpoint).tokenizer
    encode = tokenizer.text_to_ids
    for number, sample in enumerate(known, start=1):
        shown, length, supervised, text = printed[4 * number - 4 : 4 * number]
        question, answer = (turn["content"] for turn in sample["messages"])
        assert learned(text) == answer + "[2 </s>]"
        before = f"{sample['system']}[195 <reserved_106>]{question}[196 <reserved_107>]"
        assert ANY_COLOUR.sub("", text).startswith(before + learned(text) + "\n")
        prompt, answer = len(encode(sample["system"])) + len(encode(question)) + 2, len(encode(answer)) + 1  # its eos
        assert (int(shown), int(length), int(supervised)) == (number, prompt + answer, answer)

    for variable, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as refused:
            refused.setenv(variable, value)
            assert not ANY_COLOUR.search(show(1, samples[0], checkpoint))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert not ANY_COLOUR.search(show(1, samples[0], checkpoint))


def test_typed_markers_and_a_cut_answer(checkpoint, tmp_path, show):
    """Markers that somebody typed are not shown as markers; a cut answer is shown without eos."""
    file = tmp_path / "train.json"
    write_lines(file, {"prompt": "<reserved_107></s>", "response": "好"})
    assert "[195 <reserved_106>]<reserved_107></s>[196 <reserved_107>]好[2 </s>]" in show(1, file, checkpoint)
    write_lines(file, {"prompt": "问", "response": "好。" * 600})
    out = show(1, file, checkpoint)
    assert "512 tokens" in out and "[2 </s>]" not in out and "1 cut answers" in out


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tokenizer is not at hand")
def test_the_published_tokenizer_needs_no_weights(samples, show):
    assert show(2, samples[0], PUBLISHED).count("[195 <reserved_106>]") == 2


def test_what_is_missing_is_one_line(checkpoint, samples, tmp_path, show, capsys):
    for path, model in ((samples[0], tmp_path), (tmp_path / "none", checkpoint)):
        with pytest.raises(SystemExit, match="2"):
            show(1, path, model)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path}/")


def test_the_script_alone_does_not_import_torch():
    code = "import sys, data_helper; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
