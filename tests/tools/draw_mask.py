"""Draw the attention mask of a real training step: images/prefix_mask.png.

python3 tests/tools/draw_mask.py        # a step of eight samples of data/sample, under a tokenizer trained on it
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from support.dialogues.samples import read_samples  # noqa: E402
from support.model.directory import ModelDirectory  # noqa: E402
from tests.tools.sample_model import write_model  # noqa: E402

CELL, MARGIN, TOP = 2, 150, 40  # pixels
COLOURS = {"persona": "#f2b134", "sample": "#2f6f9f", "answer": "#14415f"}


def main():
    with tempfile.TemporaryDirectory() as directory:
        model = write_model(directory)
        samples = read_samples(f"{directory}/train.json")
        data = utils.RoleDataset(samples, ModelDirectory(model).tokenizer, 512, 256)
    collator = utils.Collator(data, "tree", 2048, 2)
    indices = utils.Steps(data, collator, step_size=8, epochs=1, seed=1234).samples(0)
    (row,) = collator(indices)

    ends = row["end"][0].tolist()
    supervised = {column + 1 for column in row["loss_positions"][:, 0].tolist()}
    kinds, previous = [], np.empty(0)
    for index in indices:  # as `tree_row` lays them out
        ids, _ = data.sample(index)
        for position in range(utils.shared_beginning(previous, ids), len(ids)):
            persona = position < len(data.personas[data.persona[index]])
            kinds.append("persona" if persona else "answer" if len(kinds) in supervised else "sample")
        previous = ids
    allowed = utils.tree_mask(row["end"])[0, 0]
    length = len(ends)
    image = Image.new("RGB", (MARGIN + length * CELL + 20, TOP + length * CELL + 20), "white")
    draw = ImageDraw.Draw(image)
    for query in range(length):
        for key in allowed[query].nonzero()[:, 0].tolist():
            x, y = MARGIN + key * CELL, TOP + query * CELL
            colour = COLOURS["persona" if kinds[key] == "persona" else kinds[query]]
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=colour)
    font = ImageFont.load_default(size=14)
    start = 0
    for end in range(1, length + 1):
        if (
            end == length
            or (kinds[end] == "persona") != (kinds[start] == "persona")
            or kinds[end - 1 : end + 1]
            == [
                "answer",
                "sample",
            ]
        ):
            label = "persona" if kinds[start] == "persona" else "question, answer"
            y = TOP + start * CELL
            draw.line((MARGIN - 6, y, MARGIN + length * CELL, y), fill="#dddddd")
            draw.text((8, TOP + (start + end) * CELL // 2 - 8), label, fill="black", font=font)
            start = end
    padded = 8 * max(len(data.sample(i)[0]) for i in indices)
    title = f"a step of 8 samples: {length} tokens in one row, {padded} in padded rows; each token (down) sees (across)"
    draw.text((8, 10), title, fill="black", font=font)
    image.save(ROOT / "images/prefix_mask.png", optimize=True)
    print(
        f"images/prefix_mask.png: {length} tokens, {len(supervised)} of them supervised; padded rows: {padded} tokens"
    )


if __name__ == "__main__":
    main()
