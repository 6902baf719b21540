"""What a run logs of its memory."""

from types import SimpleNamespace

import torch

from support.training.log import peak_memory_gb


def test_peak_memory(monkeypatch):
    peak = SimpleNamespace(ru_maxrss=2_500_000)  # KiB
    monkeypatch.setattr("resource.getrusage", lambda who: peak)
    assert peak_memory_gb() == 2.56
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 19_300_000_000)
    assert peak_memory_gb() == 19.3
