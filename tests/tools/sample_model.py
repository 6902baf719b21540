"""A stand-in with random weights, from the dialogues of data/sample, for tools that need a model and no answers."""

from pathlib import Path

import data_helper
from support.model import stand_in

ROOT = Path(__file__).parents[2]


def write_sample(directory) -> tuple[str, str]:
    """train.json and test.json of the sample's five roles."""
    train, test = f"{directory}/train.json", f"{directory}/test.json"
    sample = ["--data_dir", str(ROOT / "data/sample"), "--roles", "all"]
    data_helper.main([*sample, "--train_path", train, "--test_path", test])
    return train, test


def write_model(directory, *flags) -> str:
    """The directory of the stand-in; `flags` are those of support.model.stand_in."""
    train, _ = write_sample(directory)
    model = f"{directory}/model"
    stand_in.main(["--save_dir", model, "--train_path", train, "--steps", "0", *map(str, flags)])
    return model
