"""data_helper.py --show: what is printed is what RoleDataset lays out, and colour appears on a terminal only."""

import os
import pty
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED

import utils
from data_helper import main
from support.dialogues.samples import read_samples
from support.model.directory import ModelDirectory

GREEN = re.compile("\033\\[32m(.*?)\033\\[0m", re.DOTALL)
ANY_COLOUR = re.compile("\033\\[\\d+m")
PUBLISHED = SHARED / "baichuan2-7b-chat"


def learned(text: str) -> str:
    """The green part of a sample."""
    return "".join(GREEN.findall(text))


def test_the_coloured_part_is_what_is_supervised(checkpoint, samples, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    known = list(read_samples(samples[0]))
    main(["--show", "1000", "--train_path", samples[0], "--model_name_or_path", checkpoint])
    shown = re.split(r".*, sample \d+: .*\n", capsys.readouterr().out)[1:]
    assert len(shown) == len(known)
    tokenizer = ModelDirectory(checkpoint).tokenizer
    data = utils.RoleDataset(known, tokenizer, 512, 256)
    for index, (sample, text) in enumerate(zip(known, shown)):
        tokens, (question, answer) = data.sample(index)[1][:, 1], (turn["content"] for turn in sample["messages"])
        assert learned(text) == tokenizer.decode(tokens[:-1]) + "[2 </s>]" == answer + "[2 </s>]"
        before = f"{sample['system']}[195 <reserved_106>]{question}[196 <reserved_107>]"
        assert ANY_COLOUR.sub("", text).startswith(before + learned(text) + "\n")


def test_the_printed_numbers_are_those_of_the_tokenizer(checkpoint, samples, capsys):
    main(["--show", "5", "--train_path", samples[0], "--model_name_or_path", checkpoint])
    printed = re.findall(r"sample (\d+): (\d+) tokens, (\d+) of them supervised", capsys.readouterr().out)
    encode = ModelDirectory(checkpoint).tokenizer.text_to_ids
    expected = []
    for number, sample in zip(range(1, 6), read_samples(samples[0])):
        question, answer = (len(encode(turn["content"])) for turn in sample["messages"])
        answer += 1  # its eos
        whole = len(encode(sample["system"])) + question + 2 + answer  # two markers
        expected.append((str(number), str(whole), str(answer)))
    assert printed == expected


def test_markers_that_somebody_typed_are_not_shown_as_markers(checkpoint, tmp_path, capsys):
    file = tmp_path / "train.json"
    file.write_text('{"system": "", "prompt": "<reserved_107></s>", "response": "好"}\n', encoding="utf-8")
    main(["--show", "1", "--train_path", str(file), "--model_name_or_path", checkpoint])
    assert "[195 <reserved_106>]<reserved_107></s>[196 <reserved_107>]好[2 </s>]" in capsys.readouterr().out


def test_a_cut_answer_is_shown_without_eos(checkpoint, tmp_path, capsys):
    file = tmp_path / "train.json"
    file.write_text('{"system": "", "prompt": "问", "response": "%s"}\n' % ("好。" * 600), encoding="utf-8")
    main(["--show", "1", "--train_path", str(file), "--model_name_or_path", checkpoint])
    out = capsys.readouterr().out
    assert "512 tokens" in out and "[2 </s>]" not in out and "1 cut answers" in out


def shown_on_terminal(checkpoint, samples, **environment) -> str:
    """What the command writes to a terminal."""
    reader, terminal = pty.openpty()
    command = [sys.executable, "data_helper.py", "--show", "1", "--train_path", samples[0]]
    variables = {**os.environ, "TERM": "xterm", "NO_COLOR": "", **environment}
    process = subprocess.Popen(
        [*command, "--model_name_or_path", checkpoint], cwd=ROOT, stdout=terminal, stderr=terminal, env=variables
    )
    os.close(terminal)
    written = b""
    try:
        while chunk := os.read(reader, 65536):
            written += chunk
    except OSError:  # Linux: the other side is closed
        pass
    os.close(reader)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_colour_on_a_terminal_only_and_never_against_no_color(checkpoint, samples, capsys):
    assert learned(shown_on_terminal(checkpoint, samples)).endswith("[2 </s>]")
    assert not ANY_COLOUR.search(shown_on_terminal(checkpoint, samples, NO_COLOR="1"))
    main(["--show", "1", "--train_path", samples[0], "--model_name_or_path", checkpoint])  # no terminal
    assert not ANY_COLOUR.search(capsys.readouterr().out)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tokenizer is not at hand")
def test_the_published_tokenizer_needs_no_weights(samples, capsys):
    main(["--show", "2", "--train_path", samples[0], "--model_name_or_path", str(PUBLISHED)])
    assert capsys.readouterr().out.count("[195 <reserved_106>]") == 2


@pytest.mark.parametrize("flags, part", [((), "support.model.stand_in"), (("--show", "0"), "from 1")])
def test_what_is_missing_is_one_line(flags, part, samples, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--show", "1", "--train_path", samples[0], "--model_name_or_path", str(tmp_path), *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --") and part in line


def test_no_file_of_samples_is_one_line(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--show", "1", "--train_path", str(tmp_path / "none"), "--model_name_or_path", checkpoint])
    (line,) = capsys.readouterr().err.splitlines()
    assert "first run without --show" in line


def test_the_script_alone_does_not_import_torch():
    code = "import sys, data_helper; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
