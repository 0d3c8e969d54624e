"""Which tests of the other projects are about 4 bits."""

import re

# Project -> file of its checkout -> the names of its tests that count.
FILES: dict[str, dict[str, str]] = {
    "transformers": {"tests/quantization/bnb/test_4bit.py": r"."},
    "peft": {
        "tests/test_common_gpu.py": r"4bit|modules_to_save_grad",
        "tests/test_gpu_examples.py": (
            r"4bit|bnb-4bit|resize_embeddings|loading_with_quantization|olora_with_quantized"
            r"|replace_lora_weights|alora_forward|eva_initialization_consistency.*model_bnb"
        ),
        "tests/test_quantization.py": r"bnb_4bit",
        "tests/test_tuners_utils.py": r"linear_layers_lora_bnb_\d",
        "tests/test_torch_compile.py": r"compile",
    },
}

# Names that say 8 bits, or another method. `all_linear_..._bnb_N` takes 4 and 8 bits in turns.
NOT_4BIT = re.compile(
    r"8bit|quantized_model\[8\]|gptq|lora_bnb_\d*[13579]_|config_no_loftq|trainer_compile|pytorch_compile"
)


# Tests that count the parameters of a published model: they get it in its full size.
FULL_SIZE = ("tests/test_common_gpu.py", "print_4bit_expected")

# Tests that name a class of bitsandbytes or PEFT are run twice: the second time `isinstance` also
# takes ours, to see whether all the rest of the test holds.


def counts(test: str) -> bool:
    """Whether a test, by its pytest id, is one of ours to pass."""
    for files in FILES.values():
        for path, names in files.items():
            if test.startswith(path + "::"):
                name = test.split("::")[-1]
                return bool(re.search(names, name)) and not NOT_4BIT.search(name)
    return False


def asks_for_8_bits(test: str) -> bool:
    """Whether a test of these files wants 8 bits."""
    name = test.split("::")[-1]
    return bool(re.search(r"8bit|quantized_model\[8\]|lora_bnb_\d*[13579]_", name))
