"""What a run logs of its memory and speed."""

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from conftest import scalars

from support.training.log import Log, peak_memory_gb


def test_peak_memory(monkeypatch):
    peak = SimpleNamespace(ru_maxrss=2_500_000)  # KiB
    monkeypatch.setattr("resource.getrusage", lambda who: peak)
    assert peak_memory_gb() == 2.56
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 19_300_000_000)
    assert peak_memory_gb() == 19.3


def test_rates_are_those_since_the_last_report(monkeypatch, tmp_path):
    clock = iter([0.0, 4.0, 6.0])  # begun; each report
    monkeypatch.setattr("support.training.log.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with closing(Log(tmp_path / "runs", 3, 0, [], main_process=True)) as log:
        log.add(1.0, 8, 700)
        log.add(3.0, 8, 500)
        log.report(2, learning_rate=1e-4, grad_norm=0.5)
        log.add(5.0, 8, 600)
        log.report(3, learning_rate=1e-4, grad_norm=0.5)
    for name, values in (("train_loss", (2, 5)), ("samples_per_second", (4, 4)), ("tokens_per_second", (300, 300))):
        assert scalars(tmp_path, name) == [(2, pytest.approx(values[0])), (3, pytest.approx(values[1]))]
