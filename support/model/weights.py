"""The weight files of a model directory, read and written one shard at a time."""

import json
import pickle
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from support.errors import Problems, UserError, blaming
from support.files import LFS_POINTER, kind_of_file, read_object, writing

WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json"]
WEIGHT_FILES += ["pytorch_model.bin", "pytorch_model.bin.index.json"]
SHARD_BYTES = 2 * 10**9  # of a file at most; a file is put together in memory


class Weights:
    """The tensors of a model directory, in each of the layouts that Baichuan2 is found in. Iterates over (name, tensor).

    `tensors` is {name: a tensor of its shape and dtype, without values}. Raises: UserError.
    """

    def __init__(self, directory: Path):
        first = next((directory / name for name in WEIGHT_FILES if (directory / name).exists()), None)
        if first is None:
            raise UserError(f"{directory}: has no weights: there is no {', no '.join(WEIGHT_FILES)}")
        self.files, self.tensors = [first], {}
        if first.suffix == ".json":
            with blaming(f"{first}: is no index of weight files"):
                self.files = [directory / name for name in sorted(set(read_object(first)["weight_map"].values()))]
        with Problems() as problems:
            for file in self.files:
                for name, tensor in (problems.of(load_shard, file) or {}).items():
                    if not name.endswith("rotary_emb.inv_freq"):  # a table in older exports, which the model computes
                        self.tensors[name] = torch.empty_like(tensor, device="meta")
        for name, tensor in self.tensors.items():
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise UserError(f"{directory}: {name} is {tensor.dtype}: take weights that are not quantised")

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            for name, tensor in load_shard(file).items():
                if name in self.tensors:
                    yield name, tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def memory(self, dtype: torch.dtype, device: torch.device, four_bit: bool = False) -> int:
        """Bytes that the weights will take of a device's memory in a dtype, or the decoder's linear layers in four bits.

        On the CPU weights that keep their dtype take none: they are the mapped files.
        """
        needed = 0
        for name, tensor in self.tensors.items():
            if four_bit and ".layers." in name and tensor.ndim == 2:
                needed += 33 * tensor.numel() // 64  # half a byte each, and for 64 of them a scale of one byte
            elif device.type != "cpu" or tensor.dtype != dtype:
                needed += dtype.itemsize * tensor.numel()
        return needed

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the largest tensor; norms may be stored in another one."""
        return max(self.tensors.values(), key=torch.Tensor.numel).dtype


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weight file. They are mapped, not read: only those that are used take memory.

    Raises: UserError: it is missing or damaged, or a pickle that asks for more than tensors, and so may run code.
    """
    with blaming(f"{path}: cannot be read, fetch it again"):
        if kind_of_file(path) == LFS_POINTER:
            raise UserError(f"{path}: {LFS_POINTER}")
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            # Files older than torch 1.6 are no zip archives, and have to be read.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError:  # whose message advises to run the code
            tensors = None
    if isinstance(tensors, dict) and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        return tensors
    raise UserError(f"{path}: holds other things than tensors, and may run code: get the weights as safetensors")


def write_weights(
    directory: Path,
    planned: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]] | None = None,
    shard_bytes: int = SHARD_BYTES,
):
    """Write safetensors files of at most `shard_bytes` (but for a larger tensor), and their index if there are several.

    planned: the tensors, or their shapes and dtypes alone, on the meta device.
    tensors: then their values, one by one; a file is written as soon as it has all of its own.
    Raises: UserError: a file cannot be written.
    """
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in planned.items()}
    plan = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_bytes)
    shards = defaultdict(dict)
    for name, tensor in planned.items() if tensors is None else tensors:
        file = plan.tensor_to_filename[name]
        shards[file][name] = tensor.contiguous()
        if len(shards[file]) == len(plan.filename_to_tensors[file]):
            with writing(directory.parent):
                save_file(shards.pop(file), directory / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": dict(sorted(plan.tensor_to_filename.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
