"""The weight files of a model directory, read and written one shard at a time."""

import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.errors import Problems, UserError, first_line, out_of_memory
from support.files import LFS_POINTER, kind_of_file, read_object, writing

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHARD_BYTES = 2 * 10**9  # of a file at most; a file is put together in memory


class Weights:
    """The tensors of a model directory, in each of the layouts that Baichuan2 is found in. Iterates over (name, tensor).

    Attributes:
        tensors: {name: (shape, dtype)}.
    Raises:
        UserError: there are no weights, or their files have problems.
    """

    def __init__(self, directory: Path):
        first = next((directory / name for name in WEIGHT_FILES if (directory / name).exists()), None)
        if first is None:
            raise UserError(f"{directory}: has no weights: there is no {', no '.join(WEIGHT_FILES)}")
        self.files = [first]
        if first.suffix == ".json":
            weight_map = read_object(first).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise UserError(f"{first}: is no index of weight files: fetch it again")
            self.files = [directory / name for name in sorted(set(weight_map.values()))]
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        with Problems() as problems:
            for file in self.files:
                for name, tensor in (problems.of(load_shard, file) or {}).items():
                    if not name.endswith("rotary_emb.inv_freq"):  # a table in older exports, which the model computes
                        self.tensors[name] = (tuple(tensor.shape), tensor.dtype)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            for name, tensor in load_shard(file).items():
                if name in self.tensors:
                    yield name, tensor

    @property
    def bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the values."""
        numbers: dict[torch.dtype, int] = {}
        for shape, dtype in self.tensors.values():
            numbers[dtype] = numbers.get(dtype, 0) + torch.Size(shape).numel()
        return max(numbers, key=numbers.get)

    def problems(self, model: torch.nn.Module) -> list[str]:
        """How the tensors differ from those of `model`, which may be on the meta device."""
        odd = [(name, dtype) for name, (_, dtype) in self.tensors.items() if dtype not in DTYPES]
        if odd:  # of quantised weights all names and shapes are others, too
            return [f"{odd[0][0]} is {odd[0][1]}: take weights in float32, float16 or bfloat16, not quantised ones"]
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        problems = [f"the weights lack {name}" for name in expected if name not in self.tensors]
        problems += [
            f"the weights hold {name}, which the model has not" for name in self.tensors if name not in expected
        ]
        for name, (shape, _) in self.tensors.items():
            if shape != expected.get(name, shape):
                problems.append(f"{name} has shape {shape}, config.json asks for {expected[name]}")
        return problems


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weight file. They are mapped, not read: only those that are used take memory.

    Raises:
        UserError: the file is missing or damaged, or a pickle that asks for more than tensors, and so may run code.
    """
    if not path.is_file():
        raise UserError(f"{path}: is missing: fetch it with the other files of the directory")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        # Files older than torch 1.6 are no zip archives, and have to be read.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if isinstance(tensors, dict) and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            return tensors
        reason = "holds other things than named tensors: get the weights as safetensors"
    except OSError:
        raise
    except Exception as error:  # what a damaged file does to torch, pickle and safetensors has no common class
        if out_of_memory(error):
            raise MemoryError(f"{path}: {first_line(error)}") from error
        reason = "is damaged or incomplete: fetch or write it again"
        if "unsupported global" in str(error).lower():  # torch's word for a function or class the pickle names
            reason = "is a pickle that asks for more than tensors, and may run code: get the weights as safetensors"
        if (kind := kind_of_file(path)) == LFS_POINTER:
            reason = kind
    raise UserError(f"{path}: {reason}")


def write_weights(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES):
    """Write safetensors files of at most `shard_bytes` (but for a larger tensor), and their index if there are several.

    Raises:
        UserError: a file cannot be written, because the disk is full, say.
    """
    files: list[tuple[Path, list[str]]] = []  # each with the names of its tensors
    shard, size, total = {}, 0, 0

    def write_shard():
        file = directory / f"shard-{len(files)}"
        with writing(directory.parent):
            save_file(shard, file, metadata={"format": "pt"})
        files.append((file, list(shard)))

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            write_shard()
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    write_shard()

    if len(files) == 1:
        files[0][0].rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, (file, names) in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        file.rename(directory / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
