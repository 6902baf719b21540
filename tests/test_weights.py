"""Weight files: every layout is read alike, and files that are damaged, incomplete or too large are told."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from conftest import merge
from safetensors.torch import load_file, save_file

from baichuan import BaichuanForCausalLM
from support.errors import UserError, entry_point
from support.model.directory import ModelDirectory
from support.model.weights import Weights, write_weights


@pytest.mark.parametrize("layout", ["bin", "bin shards", "legacy bin", "safetensors shards", "inv_freq"])
def test_every_layout_of_the_base_is_read_alike(checkpoint, adapter, merged, tmp_path, layout):
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if layout == "safetensors shards":
        write_weights(base, tensors, shard_bytes=100_000)
        assert len(list(base.glob("model-*.safetensors"))) > 3
    elif layout == "bin shards":
        files = {name: f"pytorch_model-{number % 3}.bin" for number, name in enumerate(tensors)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in tensors if files[name] == file}, base / file)
        (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    elif layout == "inv_freq":
        table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
        save_file(tensors | table, base / "model.safetensors")
    else:
        torch.save(tensors, base / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "bin")
    found = dict(Weights(base))
    assert tensors.keys() == found.keys()
    assert all(torch.equal(tensors[name], found[name]) for name in tensors)
    assert BaichuanForCausalLM.from_pretrained(base).state_dict().keys() == tensors.keys()
    if layout == "bin shards":  # the whole script on one of them: it has no other way to the weights
        merge(base, adapter, tmp_path / "merged")
        assert (tmp_path / "merged/model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_the_dtype_is_that_of_the_largest_tensor(tmp_path):
    tensors = {"a": torch.ones(4), "b": torch.ones(9, dtype=torch.bfloat16), "c": torch.ones(8, dtype=torch.float16)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert Weights(tmp_path).dtype == torch.bfloat16


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemError('code of a pickle ran')",)


def test_bases_that_do_not_fit(checkpoint, tmp_path):
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")

    def error() -> str:
        with pytest.raises(UserError) as refused:
            ModelDirectory(base).check()
        return str(refused.value)

    for stored, problem in [
        (
            {name: tensors[name] for name in tensors if "model.norm" not in name},
            'Missing key(s) in state_dict: "model.norm',
        ),
        (tensors | {"model.extra": torch.ones(1)}, 'Unexpected key(s) in state_dict: "model.extra"'),
        (tensors | {"model.norm.weight": torch.ones(9)}, "size mismatch for model.norm.weight"),
    ]:
        save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
        assert f"{base}: the weights do not fit config.json: " in error() and problem in error()
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}, base / "model.safetensors")
    assert "lm_head.weight is torch.int8: take weights that are not quantised" in error()
    (base / "model.safetensors").write_bytes((Path(checkpoint) / "model.safetensors").read_bytes()[:-1000])
    assert "model.safetensors: cannot be read, fetch it again" in error()
    (base / "model.safetensors").unlink()
    assert "has no weights" in error()
    for zipped in (True, False):
        code = tensors | {"model.norm.weight": Evil()}
        torch.save(code, base / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert "may run code" in error()
    torch.save(tensors | {"epoch": 3}, base / "pytorch_model.bin")
    assert "holds other things than tensors" in error()
    (base / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "fetch it with git lfs pull" in error()
    (base / "pytorch_model.bin.index.json").write_text('{"weight_map": {"lm_head.weight": "pytorch_model-1.bin"}}')
    (base / "pytorch_model.bin").unlink()
    assert "pytorch_model-1.bin: cannot be read, fetch it again: [Errno 2] No such file" in error()


def test_a_file_larger_than_the_memory_is_not_called_damaged(checkpoint, tmp_path, capsys):
    """40 GB of zeros, which take no place on the disk."""
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    size = 40 * 10**9
    header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), hard))
    try:
        with pytest.raises(SystemExit, match="2"):
            entry_point(lambda argv: ModelDirectory(directory).check())()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert capsys.readouterr().err.startswith(f"error: too little memory is free: {directory}/model.safetensors: ")
