"""Samples printed as the model reads them: control tokens in brackets with their ids, supervised tokens in colour."""

import os
import sys
from itertools import groupby
from pathlib import Path

GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


def print_samples(data, tokenizer, path: Path):
    """Print all samples of a `utils.RoleDataset`, which was read from `path`.

    A terminal shows supervised tokens green and other control tokens grey, unless its user refuses colours
    (https://no-color.org).
    """
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for index, number in enumerate(data.numbers):
        ids, loss_positions = data.sample(index)
        loss_positions[:, 0] += 1  # each token is predicted one column before
        learned = set(map(tuple, loss_positions.tolist()))
        tokens = []  # (id, whether it carries loss)
        for column, id in enumerate([*ids.tolist(), None]):
            if (column, data.eos) in learned:  # ends an answer, and is not among the ids
                tokens.append((data.eos, True))
            if id is not None:
                tokens.append((id, (column, id) in learned))
        print(f"{path}, sample {number}: {len(tokens)} tokens, {len(loss_positions)} of them supervised")
        print(sample_text(tokenizer, tokens, colour) + "\n")
    print(", ".join(f"{count} {name}" for name, count in data.counts.items() if count))


def sample_text(tokenizer, tokens: list[tuple[int, bool]], colour: bool) -> str:
    """The text of one sample. `tokens`: of the whole sample, persona included, each one's id and whether it carries loss."""
    controls = {tokenizer.user_token_id, tokenizer.assistant_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    text = ""
    for (learned, control), run in groupby(tokens, key=lambda pair: (pair[1], pair[0] in controls)):
        ids = [id for id, _ in run]
        words = tokenizer.decode(ids)
        if control:
            words = "".join(f"[{id} {tokenizer.convert_ids_to_tokens(id)}]" for id in ids)
        shade = GREEN if learned else GREY if control else ""
        text += f"{shade}{words}{PLAIN}" if colour and shade else words
    return text
