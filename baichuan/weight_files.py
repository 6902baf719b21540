"""The weight files of a model directory, read and written so that memory holds one shard at most."""

import json
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from utils import UserError

SHARD_BYTES = 5 * 10**9  # of a file of the result, and so of memory
LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file. They are mapped, not read: memory is taken by those that are used.

    Raises:
        UserError: the file is damaged, or a pickle that asks for more than tensors, which could run code.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        else:  # files older than torch 1.6 are no zip archives, and cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            return tensors
        reason = "holds other things than tensors by name: convert it to safetensors"
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, AttributeError, KeyError) as error:
        reason = "is damaged or incomplete: fetch or write it again"
        if "nsupported" in str(error):  # torch: "Unsupported global", "Unsupported operand", …
            reason = "is a pickle that asks for more than tensors and might run code: get the weights as safetensors"
    raise UserError(f"{path}: {reason}")


class Weights:
    """The tensors of a model directory, one shard after another, in each layout that Baichuan2 is published in.

    Attributes:
        tensors: {name: (shape, dtype)}.
    Raises:
        UserError: no weights, or every problem of their files.
    """

    def __init__(self, directory: Path):
        layout = next((directory / name for name in LAYOUTS if (directory / name).exists()), None)
        if layout is None:
            raise UserError(f"{directory}: holds no weights: there is none of {', '.join(LAYOUTS)}")
        self.files, self.tensors, problems = [layout], {}, []
        if layout.suffix == ".json":
            self.files = [directory / name for name in sorted(set(read_json(layout).get("weight_map", {}).values()))]
        for file in self.files:
            if not file.exists():
                problems.append(f"{file}: is missing, though {layout.name} names it: fetch it again")
                continue
            try:
                self.tensors |= {name: (tuple(t.shape), t.dtype) for name, t in load_shard(file).items()}
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)
        # Some older exports carry this table; the model computes it.
        self.tensors = {name: kind for name, kind in self.tensors.items() if not name.endswith("rotary_emb.inv_freq")}

    @property
    def bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """That of most numbers."""
        sizes = {dtype: 0 for _, dtype in self.tensors.values()}
        for shape, dtype in self.tensors.values():
            sizes[dtype] += torch.Size(shape).numel()
        return max(sizes, key=sizes.get)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self.files:
            yield from ((name, tensor) for name, tensor in load_shard(file).items() if name in self.tensors)

    def problems(self, model: torch.nn.Module) -> list[str]:
        """How the tensors differ from those of `model`, which may be on the meta device."""
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        problems = [f"lacks the tensor {name}" for name in expected.keys() - self.tensors]
        problems += [f"holds a tensor {name}, which is not the model's" for name in self.tensors.keys() - expected]
        for name in expected.keys() & self.tensors:
            shape, dtype = self.tensors[name]
            if shape != expected[name]:
                problems.append(f"{name} has shape {shape}, config.json asks for {expected[name]}")
            elif dtype not in BOUNDS:
                problems.append(f"{name} is {dtype}: merge into float32, float16 or bfloat16, not a quantised base")
        return sorted(problems)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: correct the directory") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON: fetch or write it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object: fetch or write it again")
    return value


def write_weights(directory: Path, tensors, shard_bytes: int = SHARD_BYTES):
    """Write safetensors files of at most `shard_bytes`, as far as single tensors allow, and their index if several."""
    shards, shard, size, total = [], {}, 0, 0

    def close_shard():
        path = directory / f"shard-{len(shards)}"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append((path, list(shard)))

    try:
        for name, tensor in tensors:
            if shard and size + tensor.nbytes > shard_bytes:
                close_shard()
                shard, size = {}, 0
            shard[name] = tensor.contiguous()
            size, total = size + tensor.nbytes, total + tensor.nbytes
        close_shard()
    except SafetensorError as error:
        raise UserError(f"{directory.parent}: cannot write the weights: {error}") from None
    if len(shards) == 1:
        shards[0][0].rename(directory / "model.safetensors")
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        path.rename(directory / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
