"""Tables of results: how many tests pass in each mode, and why each of the others does not.

    python tests/upstream/report.py DIR

`REASONS` says why, by what a failure says; what it does not know is listed with its message.
"""

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from run import MODES

PASSED = "passed"

# With bitsandbytes as it is: a forward pass repacks the weights for AVX-512 BF16, and PEFT, which
# does not know of that, dequantizes them to something else.
REPACKED = "PEFT reads weights that bitsandbytes has repacked for the processor"

# An expression for a test and one for its message -> why it does not pass.
REASONS: list[tuple[str, str, str]] = [
    (r"multi_gpu|multi_accelerator|adaption_prompt", r"", "needs two GPUs"),
    (r"wrap_fsdp", r"", "FSDP1 on a GPU (FSDP refuses a machine without an accelerator)"),
    (
        r"memory_footprint",
        r"within",
        "the ratio of bytes of the real checkpoint; then it asserts the class `Params4bit`",
    ),
    (
        r"original_dtype",
        r"",
        "asserts `config._pre_quantization_dtype`, which transformers 5.23 does not set",
    ),
    (r"bat.*bnb_4bit", r"non-zero init", "skips itself: not for this method"),
    (r"loftq_4bit_dora", r"", "expected to fail by PEFT itself (xfail)"),
    (
        r"loftq_using_callable",
        r"",
        "an error factor of a trained checkpoint (random weights leave LoftQ little)",
    ),
    (r"wrong_config|load_in_8_bit", r"not raised", "tests the class `BitsAndBytesConfig` itself"),
    (
        r"dtype_assignment",
        r"not raised",
        "asserts that `model.to(torch.float16)` is refused; here it casts what is not 4-bit",
    ),
    (r"generate_compile", r"not raised", "asserts that compiling fails; here it works"),
    (
        r"serialization|_safe|with_keep_in_fp32|head_class|olora_with_quantized|4bit_merge_lora"
        r"|merge_and_disable|dora_inference|bnb_4bit_quantization",
        r"False is not true|isinstance",
        "asserts a class of bitsandbytes or of PEFT's layers for it (`Params4bit`, `Linear4bit`)",
    ),
    (r"lora-target-param", r"target_parameters", "`target_parameters` on a 4-bit weight: refused"),
    (
        r"compute_dtype_diverges",
        r"",
        "asserts `bnb_4bit_compute_dtype` in place of the model's dtype; here there is none",
    ),
    (r"hira", r"size of tensor|computes with", "HiRA computes with the weight: refused by name"),
    (r"road_merging", r"cannot be merged", "merging RoAd into 4 bits: refused by name"),
    (
        r"resize_embeddings",
        r"did not match Half",
        "asserts that embeddings were cast to float32; here they keep their dtype",
    ),
    (
        r"with_local_model",
        r"DID NOT RAISE",
        "asserts an error for a folder that is not named; here it is found",
    ),
    (
        r"pissa_conversion",
        r"block_n",
        "a layer of bitsandbytes itself, in a shape that it cannot repack on this processor",
    ),
    (r"4bit_|test_quantization|compile", r"allclose|check failed", REPACKED),
    (r"", r"", ""),
]


def load(folder: Path, mode: str) -> dict[str, dict[str, Any]]:
    """The last result of each test."""
    path = folder / f"{mode}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {record["test"]: record for record in map(json.loads, lines)}


def reason(test: str, record: dict[str, Any]) -> str:
    message = record["message"]
    for name, said, why in REASONS:
        if re.search(name, test) and re.search(said, message):
            return why or message.replace("\n", " ")[:160]
    raise AssertionError("the last entry takes everything")


def main() -> None:
    folder = Path(sys.argv[1])
    results = {mode: load(folder, mode) for mode in MODES}
    results = {mode: found for mode, found in results.items() if found}
    tests = sorted({test for found in results.values() for test in found})
    files = dict.fromkeys(test.partition("::")[0] for test in tests)

    print("| file | tests |", " | ".join(results), "|")
    print("|---|---:|", "---:|" * len(results), sep="")
    for file in [*files, ""]:
        of_file = [test for test in tests if test.startswith(file)]
        row = [f"`{file}`" if file else "all", str(len(of_file))]
        row += [
            str(sum(found.get(test, {}).get("outcome") == PASSED for test in of_file))
            for found in results.values()
        ]
        print("|", " | ".join(row), "|")

    why: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for mode, found in results.items():
        for test, record in found.items():
            if record["outcome"] != PASSED:
                why[reason(test, record)][mode].add(test.partition("::")[2].replace("::", "."))
    print("\n| why not |", " | ".join(results), "| which |")
    print("|---|", "---:|" * len(results), "---|", sep="")
    for text, by_mode in sorted(why.items(), key=lambda item: -len(set().union(*item[1].values()))):
        counts = " | ".join(str(len(by_mode[mode])) for mode in results)
        short = Counter(
            re.sub(r"\[.*", "", name) for name in sorted(set().union(*by_mode.values()))
        )
        listed = ", ".join(f"`{n}` ({c})" if c > 1 else f"`{n}`" for n, c in short.items())
        print(f"| {text} | {counts} | {listed} |")


if __name__ == "__main__":
    main()
