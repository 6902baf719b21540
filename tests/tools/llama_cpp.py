"""Serve a LLaMA export with llama.cpp, without compiling it; Ctrl-C ends it.

    python3 tests/tools/llama_cpp.py output_dir/epoch-1-step-1002-llama       # prints the address to give to predict.py --engine

pip fetches two packages, once, into output_dir/llama_cpp: xllamacpp, which is llama.cpp's own server as a library, and the
source of llama-cpp-python, in which llama.cpp's convert_hf_to_gguf.py lies. Nothing of this environment is changed.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

DIRECTORY = Path(__file__).resolve().parents[2] / "output_dir/llama_cpp"
SERVER, CONVERTER = "xllamacpp==2026.10.11549", "llama-cpp-python==0.3.36"
SIDE_BY_SIDE = 4  # questions that are answered at once


def packages(directory: Path) -> Path:
    """Install the server and the converter, unless they are there."""
    if not directory.is_dir():
        part = directory.with_name(directory.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", "--no-deps", "--target", part, SERVER], check=True)
        with TemporaryDirectory() as scratch:
            source = ["--no-deps", "--no-binary", ":all:", "--dest", scratch, CONVERTER]
            subprocess.run([*pip, "download", *source], check=True)
            with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
                wanted = r"[^/]+/vendor/llama\.cpp/(convert_hf_to_gguf\.py|conversion/|gguf-py/gguf/)"
                archive.extractall(scratch, [file for file in archive if re.match(wanted, file.name)], filter="data")
            shutil.move(next(Path(scratch).glob("*/vendor/llama.cpp")), part / "llama.cpp")
        os.rename(part, directory)
    return directory


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("export", type=Path, help="directory that merge_params.py --format llama has written")
    parser.add_argument("--port", type=int, default=8080, help="0: any free one")
    args = parser.parse_args()
    directory = packages(DIRECTORY)
    with TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "role.gguf"
        convert = [directory / "llama.cpp/convert_hf_to_gguf.py", args.export, "--outfile", gguf, "--outtype", "f32"]
        converted = subprocess.run([sys.executable, *convert], capture_output=True, text=True)
        if converted.returncode:
            sys.exit(converted.stderr)
        sys.path.insert(0, str(directory))
        import xllamacpp

        ends = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # also in the server's threads: they wait for sigwait
        settings = xllamacpp.CommonParams()
        settings.model.path, settings.port = str(gguf), args.port
        settings.n_parallel, settings.n_ctx = SIDE_BY_SIDE, SIDE_BY_SIDE * 4096
        server = xllamacpp.Server(settings)
        print(f"{server.listening_address}/v1", flush=True)
        signal.sigwait(ends)


if __name__ == "__main__":
    main()
