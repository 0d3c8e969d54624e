"""The text that is compiled for a card: what stands in ``cuda/``, and tables of the codebooks."""

from pathlib import Path

import pytest
import torch

import emulate
import fourbit
from fourbit import _core
from fourbit.codebook import Codebook, by_name

CUDA = Path(__file__).resolve().parents[2] / "cuda"
FILES = {name: dtypes for name, dtypes, _, _ in _core.kernel_register()}
BOOKS = [
    by_name("nf4"),
    by_name("fp4"),
    by_name("int4"),
    Codebook({0: 1.0, 3: -1.0, 2: 1e-40}, ties="upper", name="source-two-bit"),
    Codebook({i: (i - 100) / 155 for i in range(0, 256, 3)}, name="source-byte"),
]


def parse(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """The definitions, and the files after them."""
    head, *parts = source.split('#line 1 "cuda/')
    definitions = {}
    for line in head.splitlines():
        word, name, value = line.split(" ", 2)
        assert word == "#define"
        definitions[name] = value
    return definitions, dict(part.split('"\n', 1) for part in parts)


def numbers(braces: str) -> list[float]:
    items = braces.strip("{}").replace("__builtin_bit_cast(float, 0x7fc00000)", "nan").split(", ")
    return [float.fromhex(item.rstrip("f")) for item in items]


def test_every_file_of_the_folder_is_registered():
    assert set(FILES) == {path.stem for path in CUDA.glob("*.cu")}


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_those_of_the_folder(name):
    definitions, files = parse(_core.kernel_source(name, dtype=FILES[name][0][0]))
    assert definitions["ELEMENT"] in ("f32", "f16", "bf16")
    own = (CUDA / f"{name}.cu").read_text()
    others = [h for h in ("vector.cuh", "product.cuh") if f'#include "{h}"' in own]
    assert list(files) == ["common.cuh", *others, f"{name}.cu"]
    for file, text in files.items():
        original = (CUDA / file).read_text().splitlines()
        kept = [
            "" if line == "#pragma once" or line.startswith("#include") else line
            for line in original
        ]
        assert text.splitlines() == kept, "line numbers of errors must be those of the file"
        assert "#include" not in text


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_definitions_are_those_of_the_twin_in_python(book, double_quant):
    for dtype, block_size in ((torch.float32, 32), (torch.float16, 4096), (torch.bfloat16, 64)):
        specialisation = emulate.Specialisation(dtype, block_size, book, double_quant)
        expected = emulate.definitions(specialisation)
        source = _core.kernel_source(
            "dequantize",
            dtype=str(dtype).removeprefix("torch."),
            block_size=block_size,
            codebook=book.core,
            double_quant=double_quant,
        )
        definitions, _ = parse(source)
        assert expected.keys() <= definitions.keys()
        for name, value in expected.items():
            if not value.startswith("{") or name == "CODEBOOK_CODES":
                assert definitions[name] == value, name
                continue
            ours, theirs = numbers(definitions[name]), numbers(value)
            as_bits = [
                torch.tensor(list_, dtype=torch.float64).view(torch.int64)
                for list_ in (ours, theirs)
            ]
            assert torch.equal(*as_bits), name


def test_the_unsigned_map_is_the_reference_one():
    definitions, _ = parse(_core.kernel_source("adamw", dtype="float32"))
    values = torch.tensor(numbers(definitions["UNSIGNED_VALUES"]))
    expected = fourbit.reference.dynamic_map(signed=False)
    assert torch.equal(values, expected)
    midpoints = torch.tensor(numbers(definitions["UNSIGNED_MIDPOINTS"]))
    assert torch.equal(midpoints, (expected[:-1] + expected[1:]) / 2)


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match=r"no kernel file is named \"fft\".*quantize"):
        _core.kernel_source("fft", dtype="float32")
    with pytest.raises(TypeError, match="int8"):
        _core.kernel_source("quantize", dtype="int8")
    with pytest.raises(ValueError, match="block size 48"):
        _core.kernel_source("quantize", dtype="float32", block_size=48)


def geometry(kernel, *arguments, file="quantize", processors=132, dtype="bfloat16"):
    return _core.kernel_geometry(
        file, kernel, arguments, capability=90, processors=processors, dtype=dtype
    )


def test_geometry_covers_the_work_and_ends_at_the_card():
    tile = 256 * 4 * 8
    for count, blocks in ((1, 1), (tile, 1), (tile + 1, 2), (2**33, 8 * 132), (2**62, 8 * 132)):
        assert geometry("fourbit_quantize", 16, 16, 16, count, 16) == ([blocks, 1, 1], 256, 0)
    assert geometry("fourbit_quantize", 16, 16, 16, 0, 16) is None
    # Elements of four bytes: half as many of them fill a block.
    assert geometry("fourbit_quantize", 16, 16, 16, tile, 16, dtype="float32")[0] == [2, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((16, 16, 16, 5), "4 arguments where it takes 5"),
        ((0, 16, 16, 5, 16), "argument input is 0, and it must be an address"),
        ((16, 16, 16, -1, 16), "argument count is -1, and it must be from 0"),
        ((16, 16, 16, 0.5, 16), "argument count is 0.5, and it must be a whole number"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"kernel fourbit_quantize: .*{message}"):
        geometry("fourbit_quantize", *arguments)
    with pytest.raises(ValueError, match="no kernel is named"):
        geometry("fourbit_none", *arguments)
