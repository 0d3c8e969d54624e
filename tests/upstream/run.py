"""Run the 4-bit tests of transformers and PEFT, from checkouts of them, in one mode.

    python tests/upstream/run.py --transformers DIR --peft DIR --mode config --out DIR

Beside what fourbit needs itself, PEFT's tests need the packages ``parameterized``, ``scipy`` and,
for one file, ``diffusers``. The other projects' files are not changed and nothing is downloaded.
Results are in ``DIR/MODE.jsonl``; ``report.py`` makes tables of them.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import models
from cases import FILES, FULL_SIZE

HERE = Path(__file__).parent
MODES = ("bitsandbytes", "portable", "takeover", "config")


def environment(out: Path, cache: Path, results: Path, mode: str, *, ours: bool) -> dict[str, str]:
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "HF_HOME": str(out / "hf_home"),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "RUN_SLOW": "1",  # transformers' mark for tests that load a model
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UPSTREAM_MODE": mode,
        "UPSTREAM_RESULTS": str(results),
        "UPSTREAM_CLASSES": "ours" if ours else "theirs",
    }


def run(checkout: Path, path: str, variables: dict[str, str], *selection: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q"]
    command += ["--rootdir", ".", "--tb=short", path, *selection]
    subprocess.run(command, cwd=checkout, env=variables, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for project in FILES:
        parser.add_argument(f"--{project}", type=Path, help=f"a checkout of {project}")
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="models and results")
    parser.add_argument("--our-classes", action="store_true", help="isinstance also takes ours")
    parser.add_argument("-k", default="", help="pytest's selection of tests")
    options = parser.parse_args()

    out = options.out.absolute()
    tiny, full = out / "hub", out / "hub-full"
    models.make(tiny, models.TINY)
    models.make(full, models.FULL_SIZE)
    name = f"{options.mode}-our-classes" if options.our_classes else options.mode
    results = out / f"{name}.jsonl"
    results.unlink(missing_ok=True)
    selection = ("-k", options.k) if options.k else ()
    for project, files in FILES.items():
        checkout = getattr(options, project)
        if checkout is None:
            continue
        for path in files:
            variables = environment(out, tiny, results, options.mode, ours=options.our_classes)
            run(checkout, path, variables, *selection)
        if FULL_SIZE[0] in files and not options.k:
            variables = environment(out, full, results, options.mode, ours=options.our_classes)
            run(checkout, FULL_SIZE[0], variables, "-k", FULL_SIZE[1])


if __name__ == "__main__":
    main()
