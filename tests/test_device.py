"""What a GPU will meet, as far as a machine without one can show it."""

import gc
import re
import subprocess
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, alone, free_port
from test_merge_params import make_adapter

import merge_params
import train
from support.device import pick_device
from support.dialogues.samples import conversation, first_question, read_samples
from support.errors import UserError
from support.model.adapter import load_adapter
from support.model.answering import Answer
from support.model.directory import ModelDirectory
from support.training import processes, sample_answers
from support.training.log import peak_memory_gb


@pytest.fixture
def nvidia(monkeypatch):
    """A machine with an NVIDIA device that CUDA cannot use."""
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/nvidia3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


@pytest.mark.parametrize("version, remedy", [("13.0", "update the driver"), (None, "install torch with CUDA")])
def test_a_gpu_that_cuda_cannot_use_is_an_error(nvidia, monkeypatch, version, remedy):
    monkeypatch.setattr(torch.version, "cuda", version)
    for choose in (processes.join_processes, lambda: pick_device("auto"), lambda: pick_device("0")):
        with pytest.raises(UserError, match=f"{remedy}.*; to compute on the CPU, set DS_ACCELERATOR=cpu"):
            choose()
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert pick_device("auto") == torch.device("cpu")


# Python runs this at its start.
HAS_NVIDIA = """
import glob
there = glob.glob
glob.glob = lambda pattern, **more: ["/dev/nvidia0"] if "nvidia" in str(pattern) else there(pattern, **more)
"""


def test_the_remedy_for_a_gpu_that_cuda_cannot_use_works_under_the_launcher(train_arguments, tmp_path):
    """As typed: first the error with its remedy, then the same command with what the remedy says."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(HAS_NVIDIA)
    flags = train_arguments(tmp_path / "run", "--sample_answers", 0, "--dry_run")
    command = ["deepspeed", "--master_port", free_port(), "train.py", *flags]
    env = alone() | {"PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": "0", "LOCAL_SIZE": "1"}
    env.pop("DS_ACCELERATOR", None)
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True)
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode and "there is an NVIDIA GPU" in error
    remedy = re.search(r"to compute on the CPU, set (\S+)=(\S+) in the environment", error)
    env[remedy[1]] = remedy[2]
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True)
    assert ended.returncode == 0 and "on 1 × cpu" in ended.stdout, ended.stderr


def test_a_number_of_a_gpu_that_is_hidden_or_not_there(nvidia, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="--device 0: CUDA finds 0 GPUs here"):
        pick_device("0")


def test_a_laptop_takes_the_books_line(monkeypatch):
    monkeypatch.setattr("glob.glob", lambda pattern: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
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


class GPU:
    """DeepSpeed's accelerator, on a machine without one."""

    def device_name(self, number=None):
        return "cuda" if number is None else f"cuda:{number}"

    def set_device(self, number):
        self.device = number


def test_peak_memory(monkeypatch):
    assert peak_memory_gb() >= 0.99 * psutil.Process().memory_info().rss / 1e9
    peak = SimpleNamespace(ru_maxrss=2_500_000)  # KiB
    monkeypatch.setattr("resource.getrusage", lambda who: peak)
    assert peak_memory_gb() == 2.56
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 19_300_000_000)
    assert peak_memory_gb() == 19.3


def test_no_compiler_is_looked_for_on_a_gpu(monkeypatch):
    """Even a look into `__compatible_ops__` would try every operation's compiler."""
    import deepspeed

    class Untouched(dict):
        def __setitem__(self, name, value):
            raise AssertionError(name)

        __getitem__ = get = __contains__ = __iter__ = __setitem__

    gpu = GPU()
    monkeypatch.setattr(deepspeed, "get_accelerator", lambda: gpu)
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", Untouched())
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert processes.join_processes() == torch.device("cuda:1") and gpu.device == 1


def test_merging_holds_one_model_at_a_time(checkpoint, tmp_path, monkeypatch):
    """A card of 24 GB has room for one: base and adapter are gone before the merged model is loaded."""
    loaded, load = [], merge_params.load_in_float32

    def watched(directory, device):
        assert not any(reference() is not None for model in loaded for reference in model)
        model = load(directory, device)
        loaded.append([weakref.ref(parameter) for parameter in model.parameters()])
        return model

    monkeypatch.setattr(merge_params, "load_in_float32", watched)
    flags = {"--ori_model_dir": checkpoint, "--save_model_dir": tmp_path / "merged"}
    flags["--model_dir"] = make_adapter(checkpoint, tmp_path / "adapter")
    gc.disable()  # chance would have it that the first one is gone
    try:
        merge_params.main([str(part) for pair in flags.items() for part in pair])
    finally:
        gc.enable()
    assert len(loaded) == 2


def test_an_adapter_goes_where_its_model_is(checkpoint, tmp_path, monkeypatch):
    """PEFT alone would take it to the first GPU, whichever was chosen."""
    asked = []
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: asked.append("cuda") or "cuda")
    model = load_adapter(ModelDirectory(checkpoint).load(), make_adapter(checkpoint, tmp_path / "adapter"))
    assert not asked and {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_the_timer_that_would_synchronise_is_off(train_arguments, tmp_path, monkeypatch):
    """DeepSpeed takes the setting: at the start of a pass its timer does nothing."""
    import deepspeed

    engines, initialize = [], deepspeed.initialize

    def watched(**arguments):
        engines.append(initialize(**arguments)[0])
        return (engines[0],)

    monkeypatch.setattr(deepspeed, "initialize", watched)
    train.main(train_arguments(tmp_path, "--ds_file", ROOT / "ds_zero2_no_offload.json", "--sample_answers", 0))
    assert engines[0].tput_timer.config.enabled is False and engines[0].tput_timer.start_time == 0


def test_sample_answers_are_those_of_each_role_by_itself(checkpoint, few_samples, monkeypatch):
    directory, calls, answer_batch = ModelDirectory(checkpoint), [], sample_answers.answer_batch
    model = directory.load()

    def counted(model, tokenizer, conversations, config):
        calls.append(len(conversations))
        config.max_new_tokens = 8
        return answer_batch(model, tokenizer, conversations, config)

    monkeypatch.setattr(sample_answers, "answer_batch", counted)
    texts = sample_answers.sample_answers(model, directory, read_samples(few_samples[1]), 1)
    assert calls == [len(texts)] and len(texts) > 1
    first = {}
    for sample in read_samples(few_samples[1]):
        first.setdefault(sample["role"], sample)
    for sample in first.values():
        (answer,) = counted(
            model,
            directory.tokenizer,
            [conversation(sample["system"], first_question(sample["messages"]))],
            sample_answers.greedy(directory.generation_config, 8),
        )
        assert texts[f"answers/{sample['role']}"] == f"**{first_question(sample['messages'])}**  \n{answer.text}"


def test_sample_answers_of_many_roles(checkpoint, few_samples, monkeypatch):
    """So many at a time as the memory holds, of the first twenty roles."""
    directory, calls = ModelDirectory(checkpoint), []
    sample = next(iter(read_samples(few_samples[1])))
    samples = [sample | {"role": f"第{number}个"} for number in range(30)]

    def answer_batch(model, tokenizer, conversations, config):
        calls.append(len(conversations))
        return [Answer("好", True)] * len(conversations)

    monkeypatch.setattr(sample_answers, "answer_batch", answer_batch)
    monkeypatch.setattr(sample_answers, "rows_that_fit", lambda model, tokens: 8)
    texts = sample_answers.sample_answers(directory.load(), directory, samples, 2)
    assert calls == [8, 8, 4] and list(texts) == [f"answers/第{number}个" for number in range(20)]
    samples[0]["system"] = "龘" * 1500  # by its bytes, 4,500 tokens: no room for an answer
    texts = sample_answers.sample_answers(directory.load(), directory, samples, 2)
    assert list(texts) == [f"answers/第{number}个" for number in range(1, 21)]
    assert sample_answers.sample_answers(directory.load(), directory, samples[:1], 2) == {}


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


def test_the_mask_is_converted_once_and_needs_no_copy(checkpoint, monkeypatch):
    """The kernel would turn a boolean mask into numbers in each layer, and copy one whose rows are not aligned."""
    length, used = 21, []
    sees = torch.ones(1, 1, length, length).tril().bool()
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask=None, **others):
        used.append(attn_mask)
        return attend(*arguments, attn_mask=attn_mask, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = ModelDirectory(checkpoint).load(torch.bfloat16)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + length)[None], attention_mask=sees, use_cache=False)
    assert len(used) == model.config.num_hidden_layers > 1
    assert len({mask.data_ptr() for mask in used}) == 1
    mask = used[0]
    assert mask.dtype == torch.bfloat16 and mask.stride(-1) == 1 and all(step % 16 == 0 for step in mask.stride()[:-1])
    assert torch.equal(mask, torch.where(sees, 0.0, -torch.inf).to(torch.bfloat16))
