"""Converts in a process of its own, without torch, so that tests may kill, starve or measure it.

Usage: ``convert_child.py EXTENSION JSON``, where JSON holds ``source``, ``destination``, options of
``_core.convert``, and optionally ``file_bytes`` (a limit on file sizes), ``wait`` (a file to wait
for at the first progress call) and ``user`` (a user id to become). Prints JSON.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path


def load_core(path: str):
    spec = importlib.util.spec_from_file_location("fourbit._core", path)
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    return core


def peak_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise RuntimeError("no VmHWM")


def main() -> None:
    core = load_core(sys.argv[1])
    job = json.loads(sys.argv[2])
    if "file_bytes" in job:
        import resource

        limit = job["file_bytes"]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if "user" in job:
        os.setuid(job["user"])

    def progress(done: int, total: int, tensor: str) -> None:
        print(json.dumps({"done": done, "total": total, "tensor": tensor}), flush=True)
        while "wait" in job and not Path(job["wait"]).exists():
            time.sleep(0.001)

    before = peak_kib()
    result = {}
    try:
        report = core.convert(
            job["source"],
            job["destination"],
            codebook=core.Codebook.by_name("nf4"),
            block_size=64,
            double_quant=True,
            only=[],
            skip=[],
            max_shard_bytes=job.get("max_shard_bytes", 2 << 30),
            chunk_bytes=job.get("chunk_bytes", 64 << 20),
            threads=job.get("threads", 2),
            progress=progress,
        )
        result = {"shards_kept": report["shards_kept"], "shards": report["shards"]}
    except BaseException as error:
        result = {
            "error": type(error).__name__,
            "errno": getattr(error, "errno", None),
            "message": str(error),
        }
    result["peak_kib"] = peak_kib() - before
    print(json.dumps(result), flush=True)


main()
