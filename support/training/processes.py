"""The processes of a training run: how they meet, what their device can do, and how they end together."""

import atexit
import os
import re
import signal
import traceback
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

    if torch.cuda.is_available() and re.search("GPU-|MIG-", os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        raise UserError("CUDA_VISIBLE_DEVICES: DeepSpeed knows GPUs by number alone: name 0, 1, … (nvidia-smi -L)")
    if "RANK" not in os.environ:  # port 0 is whichever is free when it is taken
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.setdefault("LOCAL_RANK", "0")  # some clusters set RANK alone, a process a host
    # On the CPU DeepSpeed would first compile an all-reduce of its own, for most of a minute; gloo has one.
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() == "cpu":  # on a GPU the mere look would probe every operation's compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    if not dist.is_initialized():
        # The others wait while the main process shows answers, and would give up after ten minutes.
        deepspeed.init_distributed(verbose=False, timeout=timedelta(hours=1))
        warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")  # it is the right one, set above
        atexit.register(leave_processes)
    return torch.device(accelerator.device_name(local_rank) if accelerator.device_name() != "cpu" else "cpu")


def leave_processes():
    """Leave the group. After an error the others may be waiting for this process, and NCCL would wait for them here."""
    if failed and dist.get_backend() == "nccl":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


failed = []  # the error that ended the run on this process, if any


def has_bfloat16() -> bool:
    """Whether the device computes in bfloat16. One that only emulates it is several times slower than in float32."""
    from deepspeed import get_accelerator

    device = get_accelerator()
    if device.device_name() == "cuda":  # before Ampere it is emulated
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.device_name() == "cpu":  # before AVX-512 it is emulated
        return device.is_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.is_bf16_supported()


def precision(config: dict) -> torch.dtype:
    """The dtype of base and adapters that the DeepSpeed configuration asks for, if the device has it."""
    from deepspeed import get_accelerator

    if config.get("bf16", {}).get("enabled") and not has_bfloat16():
        config["bf16"]["enabled"] = False
        config["fp16"] = {"enabled": bool(get_accelerator().is_fp16_supported())}  # on the CPU None stands for no
        if is_main_process():
            print("this device has no bfloat16; training in", "float16" if config["fp16"]["enabled"] else "float32")
    if config.get("bf16", {}).get("enabled"):
        return torch.bfloat16
    return torch.float16 if config.get("fp16", {}).get("enabled") else torch.float32


@contextmanager
def blaming_configuration(ds_file):
    """Use around DeepSpeed's start: errors about its configuration become a UserError, others stay what they are.

    DeepSpeed has no class for them. An error counts as one if it is an AssertionError, or if its traceback passes through
    the code that reads the configuration or builds the optimizer.
    """
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        configuring = any(
            re.search(r"deepspeed/.*config[^/]*\.py$", frame.filename)
            or frame.name in ("_configure_basic_optimizer", "_do_sanity_check", "get_data_types")
            for frame in frames
        )
        if out_of_memory(error) or not (configuring or isinstance(error, AssertionError)):
            raise
        raise UserError(f"{ds_file}: DeepSpeed refuses the configuration: {first_line(error)}") from error


def first_problem(problem: str | None) -> str | None:
    """The first problem of any rank, on all ranks, since only rank 0 prints."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return next(filter(None, found), None)


def refuse_differences(identity: dict):
    """Raise UserError on every process if `identity`, what the run is, differs between them."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, identity)
    differing = [name for name in identity if any(other.get(name) != identity[name] for other in found)]
    if differing:
        raise UserError(f"the processes differ in {', '.join(differing)}: give all hosts the same files and flags")


@contextmanager
def one_line_for_each_end():
    """Use around a run: running out of memory, or losing another process, becomes one line."""
    try:
        yield
    except Exception as error:
        failed.append(error)
        if not isinstance(error, RuntimeError):
            raise
        text = str(error)
        if out_of_memory(error):
            raise OneProcessError(
                "the device has too little memory free: lower --per_device_train_batch_size or --max_len and "
                "--max_pack_len, or add --gradient_checkpointing; --resume goes on from what is saved"
            ) from error
        if isinstance(error, dist.DistError) or re.search("gloo|NCCL", text):
            raise UserError(
                f"the connection to another process failed or broke off ({text.splitlines()[0][-200:]}): its own message "
                "stands above or on its host; --resume goes on from what is saved"
            ) from error
        raise


class StopRequest:
    """True once Ctrl-C, SIGTERM or the end of the `deepspeed` command has asked the run to stop.

    Inside `with`, the signals no longer kill, so that the run can save first. The launcher's end counts too: a
    `deepspeed` command that is killed leaves its children behind, unseen, and on the same output directory.
    """

    def __enter__(self):
        self.signal = None
        self._launcher = self._find_launcher()
        self._handlers = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _remember(self, number, _):
        self.signal = number

    def __bool__(self) -> bool:
        if self.signal is None and self._find_launcher() != self._launcher:
            self.signal = signal.SIGTERM
        return self.signal is not None

    @staticmethod
    def _find_launcher() -> int | None:
        """The process that started `deepspeed.launcher.launch` on this host, which started this process."""
        try:
            parent = psutil.Process(os.getppid())
            return parent.ppid() if "deepspeed.launcher.launch" in parent.cmdline() else None
        except psutil.Error:
            return None


def step_loader(steps: Steps, first: int, device: torch.device) -> DataLoader:
    """The steps from number `first` on, laid out by a process beside the one that trains."""
    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, len(steps)),
        num_workers=1,
        prefetch_factor=4,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals_to_parent,
    )


def leave_signals_to_parent(worker_id: int):
    """Ctrl-C reaches every process of the terminal; the one that trains decides what becomes of its workers.

    The launcher passes SIGTERM on to them as well. They end with the one that trains, however it ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
