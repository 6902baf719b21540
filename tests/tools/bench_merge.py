"""Peak memory of a merge: python3 tests/tools/bench_merge.py --gigabytes 3

A random base in bfloat16, in shards, and an adapter of rank 16 are written to a temporary directory and merged there by
merge_params.py in a process of its own, whose resident memory is read from /proc (Linux).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peft import LoraConfig, get_peft_model

from baichuan import BaichuanForCausalLM
from tests.tools.sample_model import write_model
from utils import find_all_linear_names

ROOT = Path(__file__).parents[2]


def write_base(directory: Path, gigabytes: float, shard_size: str, layout: str):
    Path(write_model(directory.parent, "--hidden_size", 2048, "--num_hidden_layers", 1)).rename(directory)
    config = BaichuanForCausalLM.config_class.from_pretrained(directory)
    layer = 2 * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)  # bytes
    config.num_hidden_layers = round(gigabytes * 1e9 / layer)
    torch.set_default_dtype(torch.bfloat16)
    model = BaichuanForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    (directory / "model.safetensors").unlink()
    if layout == "bin":
        config.save_pretrained(directory)
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    else:
        generation_config = (directory / "generation_config.json").read_bytes()
        model.save_pretrained(directory, max_shard_size=shard_size)
        (directory / "generation_config.json").write_bytes(generation_config)
    return model


def write_adapter(model, directory: Path):
    settings = {"r": 16, "lora_alpha": 64, "target_modules": find_all_linear_names(model), "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(directory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3, help="size of the base, 10^9 bytes")
    parser.add_argument("--shard_size", default="500MB", help="of a file of the base")
    parser.add_argument("--layout", choices=("safetensors", "bin"), default="safetensors", help="bin: a single file")
    args, more = parser.parse_known_args()  # the rest is for merge_params.py

    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = Path(scratch, "base"), Path(scratch, "adapter")
        write_adapter(write_base(base, args.gigabytes, args.shard_size, args.layout), adapter)
        size = sum(file.stat().st_size for file in base.glob("*model*") if file.suffix in (".safetensors", ".bin"))
        flags = ["--ori_model_dir", base, "--model_dir", adapter, "--save_model_dir", Path(scratch, "merged"), *more]
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, str(ROOT / "merge_params.py"), *map(str, flags)], cwd=ROOT)
        peaks = {"VmHWM": 0, "RssAnon": 0}  # kB: all that was resident, mapped files included; and without these
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                break
            for name in peaks:
                if found := re.search(rf"{name}:\s+(\d+)", status):
                    peaks[name] = max(peaks[name], int(found[1]))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        gigabytes = {name: round(kilobytes * 1024 / 1e9, 2) for name, kilobytes in peaks.items()}
        print(json.dumps({"base": round(size / 1e9, 2), **gigabytes, "seconds": round(seconds), "rc": process.wait()}))


if __name__ == "__main__":
    main()
