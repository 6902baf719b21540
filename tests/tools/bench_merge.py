"""Peak memory and time of a merge: python3 tests/tools/bench_merge.py --gigabytes 3 [--hidden_size 1024 --dtype float32]
What rounding leaves of an update, and what wrong merges hold of it: python3 tests/tools/bench_merge.py --rounding

A random base, in shards of 0.5 GB, and an adapter of rank 16 are written to a temporary directory and merged there by
merge_params.py in a process of its own, whose resident memory is read from /proc (Linux).
"""

import argparse
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from baichuan import BaichuanConfig, BaichuanForCausalLM
from support.model.directory import ModelDirectory
from tests.tools.shared import ROOT, with_lora, write_model


def write_base_and_adapter(scratch: str, args) -> list[str]:
    """Their directories."""
    directory = write_model(scratch, "--hidden_size", args.hidden_size, "--num_hidden_layers", 1)
    opened = ModelDirectory(directory)
    config, generation_config = BaichuanConfig.from_pretrained(directory), opened.generation_config
    dtype = getattr(torch, args.dtype)
    layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size  # numbers
    config.num_hidden_layers = round(args.gigabytes * 1e9 / (dtype.itemsize * layer))
    model = BaichuanForCausalLM._from_config(config, dtype=dtype)
    model.generation_config = generation_config
    Path(directory, "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="500MB")
    with_lora(model).save_pretrained(f"{scratch}/adapter")
    return [directory, f"{scratch}/adapter"]


def print_rounding():
    """Shares as merge_params.py's proof computes them, of a random weight (standard deviation 0.02) of 1,024 rows."""
    print("width  dtype     B       right    twice    × 0.9    × 1.1    other A")
    for width in (128, 1024, 4096):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for spread in (3e-5, 1e-4, 3e-4, 5e-4, 1e-3, 4e-3):
                torch.manual_seed(0)
                weight = (0.02 * torch.randn(1024, width)).to(dtype).float()
                a, other_a = ((2 * torch.rand(16, width) - 1) / width**0.5 for _ in range(2))  # as PEFT begins
                b = spread * torch.randn(1024, 16)
                update, other = 4 * b @ a, 4 * b @ other_a
                sums = [weight + new for new in (update, update.to(dtype).float(), 0.9 * update, 1.1 * update, other)]
                gains = [total.to(dtype).float() - weight for total in sums]
                shares = [torch.sum(gain * update) / torch.sum(update * update) for gain in gains]
                name = str(dtype).removeprefix("torch.")
                print(f"{width:5}  {name:8}  {spread:.0e}", *(f"{share:8.4f}" for share in shares))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3, help="size of the base, 10^9 bytes")
    parser.add_argument("--hidden_size", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounding", action="store_true", help="print what rounding leaves of updates instead")
    args = parser.parse_args()
    if args.rounding:
        return print_rounding()
    with TemporaryDirectory() as scratch:
        base, adapter = write_base_and_adapter(scratch, args)
        flags = ["--ori_model_dir", base, "--model_dir", adapter, "--save_model_dir", f"{scratch}/merged"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen([sys.executable, str(ROOT / "merge_params.py"), *flags])
        peaks = {"VmHWM": 0, "RssAnon": 0}  # kB: all that was resident, mapped files included; and without these
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for name, kilobytes in re.findall(r"(VmHWM|RssAnon):\s+(\d+)", status):
                peaks[name] = max(peaks[name], int(kilobytes))
            time.sleep(0.02)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        size = sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
    peak, anonymous = (kilobytes * 1024 / 1e9 for kilobytes in peaks.values())
    print(f"base {size / 1e9:.2f} GB: peak {peak:.2f} GB, {anonymous:.2f} GB of it no pages of files")
    print(f"{seconds:.0f} s, {processor:.0f} s of the processor")
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
