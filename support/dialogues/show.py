"""Samples printed as the model reads them: control tokens in brackets with their ids, supervised tokens in colour."""

import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


def wants_colour(stream) -> bool:
    """Only a terminal shows colours, and only if its user does not refuse them (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def sample_text(tokenizer, tokens: Sequence[tuple[int, bool]], colour: bool) -> str:
    """The text of one sample.

    Args:
        tokens: of the whole sample, persona included, each one's id and whether it carries loss.
        colour: supervised tokens green, other control tokens grey.
    """
    controls = {tokenizer.user_token_id, tokenizer.assistant_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    parts = []
    for (learned, control), run in groupby(tokens, key=lambda pair: (pair[1], pair[0] in controls)):
        run_ids = [id for id, _ in run]
        if control:
            text = "".join(f"[{id} {tokenizer.convert_ids_to_tokens(id)}]" for id in run_ids)
        else:
            text = tokenizer.decode(run_ids)
        shade = GREEN if learned else GREY if control else ""
        parts.append(f"{shade}{text}{PLAIN}" if colour and shade else text)
    return "".join(parts)


def print_samples(data, tokenizer, path: Path):
    """Print all samples of a `utils.RoleDataset`, which was read from `path`."""
    colour = wants_colour(sys.stdout)
    for index, number in enumerate(data.numbers):
        ids, pairs = data.sample(index)
        learned = {(column + 1, token) for column, token in pairs.tolist()}  # each is predicted one column before
        tokens = []
        for column, id in enumerate(ids.tolist()):
            if (column, data.eos) in learned:  # ends an answer, and is not among the ids
                tokens.append((data.eos, True))
            tokens.append((id, (column, id) in learned))
        if (len(ids), data.eos) in learned:
            tokens.append((data.eos, True))
        print(f"{path}, sample {number}: {len(tokens)} tokens, {len(pairs)} of them supervised")
        print(sample_text(tokenizer, tokens, colour) + "\n")
    print(", ".join(f"{count} {name}" for name, count in data.counts.items() if count))
