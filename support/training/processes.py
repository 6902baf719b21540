"""The processes of a training run: how they meet, what their device can do, and how they end together."""

import atexit
import os
import re
import signal
import warnings
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from support.device import refuse_unusable_gpu, set_up_cuda
from support.errors import OneProcessError, UserError, first_line, out_of_memory
from utils import Steps

SAVES_MEMORY = "add --gradient_checkpointing or --load_in_4bit, or lower --max_len and --max_pack_len"


def rank_and_world_size() -> tuple[int, int]:
    """Which process this is, and how many there are, as the launcher tells them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return rank_and_world_size()[0] == 0


def join_processes() -> torch.device:
    """Meet the other processes of the launcher, or be a group of one; returns this process's device."""
    refuse_unusable_gpu()
    set_up_cuda()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed  # here, so that --help and wrong arguments need not wait for it

    if "RANK" not in os.environ:  # port 0 is whichever is free when it is taken
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # some clusters set RANK alone, a process a host
    accelerator = deepspeed.get_accelerator()
    device = torch.device(accelerator.device_name(local_rank))
    if device.type == "cpu":  # on a GPU the mere look would probe every operation's compiler
        # DeepSpeed would first compile an all-reduce of its own, for most of a minute; gloo has one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        accelerator.set_device(local_rank)
    if not dist.is_initialized():
        # The others wait while the main process shows answers, and would give up after ten minutes.
        deepspeed.init_distributed(verbose=False, timeout=timedelta(hours=1))
        warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # it is the right one, set above
        atexit.register(dist.destroy_process_group)
    return device


def has_bfloat16() -> bool:
    """Whether the device computes in bfloat16. One that only emulates it is several times slower than in float32."""
    from deepspeed import get_accelerator

    if get_accelerator().device_name() == "cuda":  # before Ampere it is emulated
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # on a CPU before AVX-512 it is emulated


def precision(config: dict) -> torch.dtype:
    """The dtype of base and adapters that the DeepSpeed configuration asks for, if the device has it."""
    from deepspeed import get_accelerator

    if config["bf16"].get("enabled") and not has_bfloat16():
        config["bf16"]["enabled"] = False
        config["fp16"] = {"enabled": bool(get_accelerator().is_fp16_supported())}  # on the CPU None stands for no
        if is_main_process():
            print("this device has no bfloat16; training in", "float16" if config["fp16"]["enabled"] else "float32")
    if config["bf16"].get("enabled"):
        return torch.bfloat16
    return torch.float16 if config["fp16"].get("enabled") else torch.float32


@contextmanager
def one_line_for_each_end():
    """Use around a run: running out of memory, or losing another process, becomes one line."""
    try:
        yield
    except Exception as error:
        # The others may be waiting for this process, and NCCL would wait for them here.
        if dist.is_initialized() and dist.get_backend() == "nccl":
            atexit.unregister(dist.destroy_process_group)
            atexit.register(dist.distributed_c10d._abort_process_group)
        if not isinstance(error, RuntimeError):
            raise
        if out_of_memory(error):
            remedy = f"{SAVES_MEMORY}; --resume goes on from what is saved"
            raise OneProcessError(f"the device has too little memory free: {remedy}") from error
        if isinstance(error, dist.DistError) or re.search("gloo|NCCL", str(error)):
            raise UserError(
                f"the connection to another process failed or broke off ({first_line(error)[-200:]}): its own message "
                "stands above or on its host; --resume goes on from what is saved"
            ) from error
        raise


# What ends a run: Ctrl-C, `kill`, a terminal that is closed, and what clusters send some time before they kill.
ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@contextmanager
def stop_requests():
    """Yield a function that returns the signal by which the run was asked to stop, or None.

    Inside `with`, the signals of ENDING no longer kill, so that the run can save first. Under nohup SIGHUP
    stays ignored. The end of the `deepspeed` command counts as SIGTERM: it leaves its children behind, unseen, and
    on the same output directory.
    """
    requests, launcher = [], find_launcher()

    def asked_to_stop() -> int | None:
        if find_launcher() != launcher:
            requests.append(signal.SIGTERM)
        return requests[0] if requests else None

    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in ENDING if number != signal.SIGHUP or not under_nohup]
    handlers = [signal.signal(number, lambda number, _: requests.append(number)) for number in numbers]
    try:
        yield asked_to_stop
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def find_launcher() -> int | None:
    """The process that started `deepspeed.launcher.launch` on this host, which started this process."""
    try:
        parent = psutil.Process(os.getppid())
        return parent.ppid() if "deepspeed.launcher.launch" in parent.cmdline() else None
    except psutil.Error:
        return None


def step_loader(steps: Steps, first: int, device: torch.device) -> DataLoader:
    """The steps from number `first` on, laid out by a process beside the one that trains."""

    def leave_signals_to_parent(worker_id: int):
        # They may reach every process; the one that trains decides what becomes of its workers.
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)

    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, len(steps)),
        num_workers=1,
        multiprocessing_context="fork",  # shares the samples; from Python 3.14 on the default is to copy them
        prefetch_factor=4,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_parent,
    )
