"""Many visitors at once on the chat page, over loopback.

    python3 tests/tools/load_chat.py                                  # 20 visitors × 3 questions each, on a small random model
    python3 tests/tools/load_chat.py --model_path Baichuan2-tiny --visitors 50

Each visitor holds a conversation of its own, with an answer after each question. Prints the median and the slowest time from asking to the first text, and the server's memory before, between
and after.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from web_client import FORM, Server, Visitor

from support.arguments import ArgumentParser
from support.errors import entry_point
from tests.tools.sample_model import write_model


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", help="model to serve (default: a random one, made for this)")
    parser.add_argument("--visitors", type=int, default=20, help="conversations at once")
    parser.add_argument("--questions", type=int, default=3, help="rounds of each conversation")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of an answer, at most")
    parser.add_argument("--waves", type=int, default=3, help="times all visitors come, anew")
    return parser.parse_args(argv)


def converse(url: str, name: int, questions: int, tokens: int) -> list[float]:
    """One visitor. Returns seconds to the first text of each answer; raises AssertionError for anything amiss."""
    visitor, waits = Visitor(url), []
    for number in range(questions):
        body = visitor.body(f"我是{name}号，这是第{number + 1}问。", max_new_tokens=tokens, seed=name, do_sample=True)
        start, first = time.monotonic(), None
        with visitor.http.stream("POST", "/answer", json=body) as stream:
            for line in map(json.loads, stream.iter_lines()):
                if "text" in line and first is None:
                    first = time.monotonic() - start
        assert line.get("text") and "cut" in line, line
        visitor.messages = [*body["messages"], {"role": "assistant", "content": line["text"]}]
        waits.append(first)
    return waits


def run(url: str, visitors: int, questions: int, tokens: int) -> list[float]:
    waits, failures = [], []

    def one(name):
        try:
            waits.extend(converse(url, name, questions, tokens))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(name,)) for name in range(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert len(waits) == visitors * questions
    return waits


def resident(process) -> float:
    """MiB of memory of a process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@entry_point
def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        model_path = args.model_path
        if model_path is None:
            model_path = write_model(directory)
        server = Server(Path(directory) / "log", model_path)
        try:
            Visitor(server.url).ask("你好。", **{name: FORM[name] for name in ("role", "description")})
            memory = [resident(server.process)]
            for wave in range(args.waves):
                start = time.monotonic()
                waits = run(server.url, args.visitors, args.questions, args.tokens)
                memory.append(resident(server.process))
                print(
                    f"wave {wave + 1}: {len(waits)} answers in {time.monotonic() - start:.1f} s, no error; first text after "
                    f"{median(waits):.2f} s (median), {max(waits):.2f} s (slowest); memory {memory[-1]:.0f} MiB",
                    flush=True,
                )
            print(
                f"memory at the start {memory[0]:.0f} MiB, after each wave {', '.join(f'{m:.0f}' for m in memory[1:])}"
            )
        finally:
            server.close()


if __name__ == "__main__":
    main()
