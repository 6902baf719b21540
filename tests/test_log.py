"""What a run logs of its memory and speed."""

from contextlib import closing
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import scalars

from support.training.log import Log, peak_memory_gb, reset_peak_memory


def test_peak_memory_is_of_what_the_process_holds_by_itself(monkeypatch, tmp_path):
    """Neither 400 MB of a mapped file count nor 600 MB that were gone before; 200 MB do, though they are gone, too."""
    with open(tmp_path / "file", "wb") as file:
        file.truncate(400_000_000)
    mapped = np.memmap(tmp_path / "file", dtype=np.uint64, mode="r")
    assert mapped.sum() == 0
    held = psutil.Process().memory_info()
    np.zeros(75_000_000, dtype=np.uint64).fill(1)
    reset_peak_memory()
    np.zeros(25_000_000, dtype=np.uint64).fill(1)
    assert peak_memory_gb() == pytest.approx((held.rss - held.shared) / 1e9 + 0.2, abs=0.02)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 19_300_000_000)
    assert peak_memory_gb() == 19.3


def test_rates_are_those_since_the_last_report(monkeypatch, tmp_path):
    clock = iter([0.0, 4.0, 304.0, 400.0])  # begun; each report; begun again
    monkeypatch.setattr("support.training.log.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with closing(Log(tmp_path / "runs", 3, 0, [], main_process=True)) as log:
        log.add(1.0, 8, 700)
        log.add(3.0, 8, 500)
        log.report(2, learning_rate=1e-4, grad_norm=0.5)
        log.add(5.0, 8, 600)
        log.report(3, learning_rate=1e-4, grad_norm=0.5)
        assert "samples_s=0.0267" in log.bar.postfix  # a step of minutes has a speed, too
    for name, values in (("train_loss", (2, 5)), ("samples_per_second", (4, 2 / 75)), ("tokens_per_second", (300, 2))):
        assert scalars(tmp_path, name) == [(2, pytest.approx(values[0])), (3, pytest.approx(values[1]))]
    with closing(Log(tmp_path / "runs", 5, 3, [], main_process=True)) as log:
        assert (log.bar.n, log.bar.total) == (3, 5)  # of a run that goes on
