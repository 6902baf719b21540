"""What the chat page's own generator costs beside the model alone.

    python3 tests/tools/bench_chat.py                      # a random model of width 768 with 6 layers, on the CPU
    python3 tests/tools/bench_chat.py --device 0

First token: from calling the page's generator to its first text, over a bare forward of the same prompt (all of it, the
persona included); the persona's cache is there, as it is from a role's second question on. Tokens a second: over a whole
greedy answer of --tokens tokens, beside `model.generate` of the same prompt. Medians; the two take turns.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from data_helper import persona
from support.command_line import ArgumentParser
from support.device import pick_device
from support.dialogues.profiles import read_characters
from support.errors import entry_point
from support.page.speaker import Speaker
from tests.tools.sample_model import write_model

ROOT = Path(__file__).parents[2]
QUESTIONS = ["你是谁？", "你平生最得意的是哪一件事？说来听听。", "那时候身边都有谁？", "后来呢？", "再说得细一些。"]


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="a GPU's number; cpu; auto")
    parser.add_argument("--hidden_size", type=int, default=768, help="width of the random model")
    parser.add_argument("--num_hidden_layers", type=int, default=6, help="layers of the random model")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU; one is disturbed least by others")
    parser.add_argument("--repeats", type=int, default=5, help="times each is measured")
    return parser.parse_args(argv)


def seconds(call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def asked(system: str, rounds: int) -> list[dict]:
    """The messages of `rounds` earlier answers and a question."""
    messages = [{"role": "system", "content": system}]
    for question in QUESTIONS[:rounds]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "这个嘛，" * 12}]
    return [*messages, {"role": "user", "content": QUESTIONS[rounds]}]


def measure(speaker: Speaker, messages: list[dict], settings: dict, device: torch.device) -> dict[str, float]:
    """Seconds of one run of each."""
    model = speaker.model
    ids, _, _ = speaker.fit(messages, settings["max_new_tokens"])
    prompt = torch.tensor([ids], device=device)
    options = {name: value for name, value in settings.items() if name != "seed"}
    streams = []

    def first():
        streams.append(speaker.answer(messages, settings))
        next(streams[0])

    def whole():
        for _ in speaker.answer(messages, settings):
            pass

    with torch.no_grad():
        measured = {"forward": seconds(lambda: model(input_ids=prompt, logits_to_keep=1), device)}
    measured["first"] = seconds(first, device)
    streams.pop().close()
    measured["generate"] = seconds(
        lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options), device
    )
    measured["page"] = seconds(whole, device)
    return measured | {"length": len(ids)}


def medians(speaker: Speaker, rounds: int, tokens: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each after `rounds` earlier answers, and the length of the prompt."""
    profiles = read_characters(ROOT / "data/sample/profiles-zh_desc.json")
    role = next(iter(profiles))
    messages = asked(persona(role, profiles[role]["description"]), rounds)
    settings = {"do_sample": False, "seed": -1, "repetition_penalty": 1.05}
    settings |= {"min_new_tokens": tokens, "max_new_tokens": tokens}
    measure(speaker, messages, settings, device)  # warms up, and computes the persona's cache
    runs = [measure(speaker, messages, settings, device) for _ in range(repeats)]
    return {name: median(run[name] for run in runs) for name in runs[0]}


@entry_point
def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        sizes = ["--hidden_size", str(args.hidden_size), "--num_hidden_layers", str(args.num_hidden_layers)]
        path = write_model(directory, *sizes)
        speaker = Speaker.load(path, None, device)
    for rounds in (0, 4):
        found = medians(speaker, rounds, args.tokens, args.repeats, device)
        length, forward, first, generate, streamed = (
            found[name] for name in ("length", "forward", "first", "generate", "page")
        )
        print(
            f"prompt of {length} tokens, {rounds} earlier rounds: first text after {first * 1e3:.1f} ms, "
            f"{first / forward:.2f} times a bare forward of {forward * 1e3:.1f} ms; "
            f"{args.tokens / streamed:.1f} tokens/s on the page, "
            f"{generate / streamed:.2f} times the {args.tokens / generate:.1f} of generate alone",
            flush=True,
        )


if __name__ == "__main__":
    main()
