"""Draw the attention mask of a real training step: images/prefix_mask.png.

python3 tests/tools/draw_mask.py        # a step of eight samples of data/sample, under a tokenizer trained on it
"""

import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import utils
from support.dialogues.samples import read_samples
from support.model.directory import ModelDirectory
from tests.tools.shared import ROOT, write_model

CELL, MARGIN, TOP = 2, 150, 40  # pixels
COLOURS = {"persona": (242, 177, 52), "sample": (47, 111, 159), "answer": (20, 65, 95)}


def kinds_of(data: utils.RoleDataset, indices, supervised: set[int]) -> list[str]:
    """Of each token of the row, as `tree_row` lays it out."""
    kinds, previous = [], np.empty(0)
    for index in indices:
        ids, persona = data.sample(index)[0], len(data.personas[data.persona[index]])
        for position in range(utils.shared_beginning(previous, ids), len(ids)):
            of_sample = "answer" if len(kinds) in supervised else "sample"
            kinds.append("persona" if position < persona else of_sample)
        previous = ids
    return kinds


def main():
    with TemporaryDirectory() as directory:
        tokenizer = ModelDirectory(write_model(directory)).tokenizer
        data = utils.RoleDataset(read_samples(f"{directory}/train.json"), tokenizer, 512, 256)
    collator = utils.Collator(data, "tree", 2048, 2)
    indices = utils.Steps(data, collator, step_size=8, epochs=1, seed=1234).samples(0)
    (row,) = collator(indices)
    supervised = {column + 1 for column in row["loss_positions"][:, 0].tolist()}
    kinds = kinds_of(data, indices, supervised)
    allowed, length = utils.tree_mask(row["end"])[0, 0].numpy(), len(kinds)
    pixels = np.full((length, length, 3), 255, dtype=np.uint8)
    for query, kind in enumerate(kinds):
        pixels[query, allowed[query]] = COLOURS[kind]
    for key, kind in enumerate(kinds):
        if kind == "persona":
            pixels[allowed[:, key], key] = COLOURS[kind]
    image = Image.new("RGB", (MARGIN + length * CELL + 20, TOP + length * CELL + 20), "white")
    image.paste(Image.fromarray(pixels.repeat(CELL, 0).repeat(CELL, 1)), (MARGIN, TOP))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    neighbours = enumerate(pairwise(kinds), start=1)
    new_blocks = [
        column
        for column, (a, b) in neighbours
        if (a == "persona") != (b == "persona") or (a, b) == ("answer", "sample")
    ]
    for start, end in pairwise([0, *new_blocks, length]):
        draw.line((MARGIN - 6, TOP + start * CELL, MARGIN + length * CELL, TOP + start * CELL), fill="#dddddd")
        label = "persona" if kinds[start] == "persona" else "question, answer"
        draw.text((8, TOP + (start + end) * CELL // 2 - 8), label, fill="black", font=font)
    padded = 8 * max(len(data.sample(index)[0]) for index in indices)
    title = f"a step of 8 samples: {length} tokens in one row, {padded} in padded rows; each token (down) sees (across)"
    draw.text((8, 10), title, fill="black", font=font)
    image.save(ROOT / "images/prefix_mask.png", optimize=True)
    print(f"{length} tokens, {len(supervised)} of them supervised; padded rows: {padded} tokens")


if __name__ == "__main__":
    main()
