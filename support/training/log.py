"""What one sees of a run: TensorBoard's curves and texts, and the progress bar."""

import resource
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


def peak_memory_gb() -> float:
    """The most that this process has held since `reset_peak_memory`, in 10⁹ bytes: of tensors on its GPU; or, without one,
    resident, less the files that it maps now, whose pages the system takes back when it needs them.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return (peak - psutil.Process().memory_info().shared) / 1e9


def reset_peak_memory():
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # not every sandbox lets one write there
            Path("/proc/self/clear_refs").write_text("5")


class Log:
    """TensorBoard events and the progress bar, on the main process; elsewhere it does nothing.

    Args:
        done: steps of the state that a resumed run goes on from.
        losses: losses since the last report, as saved in that state.
    """

    def __init__(self, directory: Path, total_steps: int, done: int, losses: list[float], main_process: bool):
        # purge_step hides what an interrupted run logged beyond the state that this one goes on from.
        self.writer = SummaryWriter(directory, purge_step=done + 1) if main_process else None
        self.bar = tqdm(desc="training", total=total_steps, initial=done, unit="step", disable=not main_process)
        self.losses, self.samples, self.tokens, self.start = losses, 0, 0, time.perf_counter()

    def close(self):
        self.bar.close()
        if self.writer:
            self.writer.close()

    def add(self, loss: float, samples: int, tokens: int):
        self.bar.update()
        self.losses.append(loss)
        self.samples += samples
        self.tokens += tokens

    def report(self, step: int, learning_rate: float, grad_norm: float):
        """Means since the last call; grad_norm is the one before clipping."""
        now = time.perf_counter()
        loss, samples_s = sum(self.losses) / len(self.losses), self.samples / (now - self.start)
        values = {"train_loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
        values |= {"samples_per_second": samples_s, "tokens_per_second": self.tokens / (now - self.start)}
        self.show(step, values | {"peak_memory_gb": peak_memory_gb()})
        self.bar.set_postfix(loss=f"{loss:.3f}", samples_s=f"{samples_s:.3g}")
        self.losses, self.samples, self.tokens, self.start = [], 0, 0, now

    def show(self, step: int, values: dict[str, float | str]):
        """A point of each curve; of texts, Markdown, which TensorBoard shows under TEXT."""
        if self.writer:
            for name, value in values.items():
                add = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
                add(name, value, step)
            self.writer.flush()
