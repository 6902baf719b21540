"""What a GPU will meet, as far as a machine without one can show it."""

from pathlib import Path

import pytest
import torch

from data_helper import conversation, read_samples
from support import processes, sample_answers
from support.errors import UserError
from support.model_directory import ModelDirectory, pick_device


@pytest.fixture
def nvidia(monkeypatch):
    """A machine with an NVIDIA device that CUDA cannot use."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0" or exists(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


@pytest.mark.parametrize("version, remedy", [("13.0", "update the driver"), (None, "install torch with CUDA")])
def test_a_gpu_that_cuda_cannot_use_is_an_error(nvidia, monkeypatch, version, remedy):
    monkeypatch.setattr(torch.version, "cuda", version)
    for choose in (processes.join_processes, lambda: pick_device("auto")):
        with pytest.raises(UserError, match=remedy):
            choose()
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert pick_device("auto") == torch.device("cpu")


def test_a_laptop_takes_the_books_line(monkeypatch):
    if Path("/dev/nvidia0").exists():
        pytest.skip("has a GPU")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert pick_device("auto") == torch.device("cpu")


def test_cudnn_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    pick_device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_gpu_named_by_its_uuid_is_refused_by_that_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6")
    with pytest.raises(UserError, match="by number alone"):
        processes.join_processes()


def test_sample_answers_are_those_of_each_role_by_itself(checkpoint, few_samples, monkeypatch):
    directory, calls, answer_batch = ModelDirectory(checkpoint), [], sample_answers.answer_batch
    model = directory.load()

    def counted(model, tokenizer, conversations, config):
        calls.append(len(conversations))
        config.max_new_tokens = 8
        return answer_batch(model, tokenizer, conversations, config)

    monkeypatch.setattr(sample_answers, "answer_batch", counted)
    texts = sample_answers.sample_answers(model, directory, few_samples[1], 1, conversation)
    assert calls == [len(texts)] and len(texts) > 1
    first = {}
    for sample in read_samples(few_samples[1]):
        first.setdefault(sample["role"], sample)
    for sample in first.values():
        (answer,) = counted(
            model,
            directory.tokenizer,
            [conversation(sample["system"], sample["prompt"])],
            sample_answers.greedy(directory.generation_config, 8),
        )
        assert texts[f"answers/{sample['role']}"] == f"**{sample['prompt']}**  \n{answer.text}"


@pytest.mark.parametrize("error, ends", [(None, "destroyed"), (UserError("no"), "aborted")])
def test_an_error_under_nccl_does_not_wait_for_the_others(monkeypatch, error, ends):
    ended = []
    monkeypatch.setattr(processes, "failed", [])
    monkeypatch.setattr(processes.dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: ended.append("destroyed"))
    monkeypatch.setattr(processes.dist.distributed_c10d, "_abort_process_group", lambda: ended.append("aborted"))
    try:
        with processes.one_line_for_each_end():
            if error:
                raise error
    except UserError:
        pass
    processes.leave_processes()
    assert ended == [ends]
