"""A run's directory: its adapters and states by their steps, and which adapter is the best one."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from support.files import CHECKPOINT, remove_directory, set_link


def checkpoints(directory) -> list[tuple[int, Path]]:
    """(step, directory) of all epoch-{e}-step-{s} in a directory, oldest first."""
    named = ((re.fullmatch(CHECKPOINT, path.name), path) for path in Path(directory).glob("epoch-*"))
    return sorted((int(match[1]), path) for match, path in named if match)


def newest_state(output_dir) -> tuple[int, Path | None]:
    """(step, directory) of the state to go on from; (0, None) when nothing is saved."""
    return max(checkpoints(Path(output_dir) / "state"), default=(0, None))


@dataclass
class Best:
    """The best adapter of a run so far. Its fields are kept in each state, for a run that is resumed.

    Raises: ValueError, TypeError for fields that are none.
    """

    name: str | None = None
    test_loss: float = math.inf
    saves_since: int = 0

    def __post_init__(self):
        self.test_loss, self.saves_since = float(self.test_loss), int(self.saves_since)
        if self.name is not None and not re.fullmatch(CHECKPOINT, self.name):
            raise ValueError(f"{self.name} is no adapter's name")

    def add(self, name: str, test_loss: float):
        """An adapter is about to be saved. Every process has the same loss, and so the same best."""
        self.saves_since += 1
        if test_loss < self.test_loss:
            self.name, self.test_loss, self.saves_since = name, test_loss, 0

    def keep(self, output_dir: Path, limit: int | None):
        """Let `best` name the best adapter; of the others keep the newest `limit` ones. On the main process."""
        set_link(output_dir / "best", self.name)
        for _, old in checkpoints(output_dir)[: -limit if limit else 0]:
            if old.name != self.name:
                remove_directory(old)

    def is_old(self, patience: int | None) -> bool:
        """Whether so many adapters have been saved since, without a better one, that the run is over."""
        return patience is not None and self.saves_since >= patience

    def report(self, output_dir: Path, patience: int | None) -> str:
        line = f"{output_dir / 'best'}: {self.name} with a loss of {self.test_loss:.4f} is the best adapter"
        if self.is_old(patience):
            line += f"; stopped, since {self.saves_since} saves brought no better one (--patience {patience})"
        return line
