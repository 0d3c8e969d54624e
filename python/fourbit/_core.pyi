"""The Rust core. Private: everything public is in the modules of ``fourbit``."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import NoReturn, TypedDict, final

from torch import Tensor

__version__: str
DEFAULT_CHUNK_BYTES: int
DEFAULT_MAX_SHARD_BYTES: int
FORMAT_VERSION: int
MAX_HEADER_BYTES: int
MAX_TENSORS: int
ADAMW_SEGMENT_BYTES: int
COUNTER_SLOTS: int
OLDEST_CAPABILITY: int
SLOT_COUNTERS: int

__all__ = [
    "ADAMW_SEGMENT_BYTES",
    "COUNTER_SLOTS",
    "DEFAULT_CHUNK_BYTES",
    "DEFAULT_MAX_SHARD_BYTES",
    "FORMAT_VERSION",
    "MAX_HEADER_BYTES",
    "MAX_TENSORS",
    "OLDEST_CAPABILITY",
    "SLOT_COUNTERS",
    "CardMemory",
    "CheckpointError",
    "CheckpointReader",
    "CheckpointWriter",
    "Codebook",
    "CudaError",
    "CudaProgram",
    "NonFiniteError",
    "__version__",
    "adamw8_step",
    "adamw32_step",
    "adamw_segments",
    "add_quantization_config",
    "build_kernel",
    "card_can_page",
    "card_free_memory",
    "card_memory_in_use",
    "compile_kernel",
    "convert",
    "cuda_devices",
    "cuda_driver_version",
    "dequantize",
    "dequantize_absmax",
    "fused_rows",
    "kept_module",
    "kernel_cache",
    "kernel_geometry",
    "kernel_register",
    "kernel_source",
    "linear",
    "linear_transposed",
    "load_nvrtc",
    "matched_modules",
    "matvec_tensor_takes",
    "product_cut",
    "quantize",
    "quantize_absmax",
    "quantized_layout",
    "raise_non_finite",
    "raise_scale_overflow",
    "read_header",
    "simd_backends",
    "small_files",
    "verify",
]

class CheckpointError(ValueError):
    """A checkpoint folder or file is damaged, incomplete or of an unknown format."""

class CudaError(RuntimeError):
    """A CUDA kernel could not be compiled, loaded or launched, or memory could not be had.

    The message says which and why.
    """

class NonFiniteError(ValueError):
    """A weight to be quantized is NaN or infinite; the message names the element."""

class _ArrayInterface(TypedDict):
    version: int
    typestr: str
    shape: tuple[int]
    data: tuple[int, bool]
    strides: None

class _CudaArrayInterface(_ArrayInterface):
    stream: None

@final
class Codebook:
    @staticmethod
    def by_name(name: str) -> Codebook: ...
    @staticmethod
    def from_entries(
        name: str, entries: list[tuple[int, float]], *, ties_upper: bool
    ) -> Codebook: ...
    @property
    def name(self) -> str: ...
    @property
    def code_bits(self) -> int: ...
    @property
    def ties_upper(self) -> bool: ...
    @property
    def values(self) -> list[float]: ...

def simd_backends() -> list[str]: ...
def kernel_register() -> list[
    tuple[str, list[tuple[str, int]], list[int], list[tuple[str, int, list[str]]]]
]: ...
def kernel_source(
    kernel: str,
    *,
    dtype: str,
    block_size: int = 64,
    codebook: Codebook | None = None,
    double_quant: bool = False,
) -> str: ...
def kernel_geometry(
    file_name: str,
    kernel: str,
    arguments: Sequence[int | float],
    *,
    capability: int,
    processors: int,
    dtype: str,
    block_size: int = 64,
    codebook: Codebook | None = None,
    double_quant: bool = False,
) -> tuple[list[int], int, int] | None: ...
def product_cut(
    file_name: str,
    *,
    rows: int,
    tile_rows: int,
    columns: int,
    depth: int,
    block_size: int,
    capability: int,
    processors: int,
) -> tuple[int, int, int]: ...
def matvec_tensor_takes(
    *, rows: int, columns: int, depth: int, block_size: int, capability: int
) -> bool: ...
def raise_non_finite(index: int, value: float) -> NoReturn: ...
def raise_scale_overflow() -> NoReturn: ...
def load_nvrtc(path: str | PathLike[str]) -> tuple[Path, tuple[int, int]]: ...
def compile_kernel(
    kernel: str,
    *,
    capability: int,
    dtype: str,
    block_size: int = 64,
    codebook: Codebook | None = None,
    double_quant: bool = False,
) -> tuple[bytes, str]: ...
def build_kernel(
    kernel: str,
    *,
    capability: int,
    dtype: str,
    block_size: int = 64,
    codebook: Codebook | None = None,
    double_quant: bool = False,
) -> tuple[bytes, bool]: ...
def kernel_cache() -> tuple[Path, int, int] | None: ...
def cuda_driver_version() -> tuple[int, int]: ...
def cuda_devices() -> list[tuple[str, int, int, int]]: ...

@final
class CudaProgram:
    def __new__(
        cls,
        kernel: str,
        *,
        device: int,
        dtype: str,
        block_size: int = 64,
        codebook: Codebook | None = None,
        double_quant: bool = False,
    ) -> CudaProgram: ...
    @property
    def capability(self) -> int: ...
    @property
    def processors(self) -> int: ...
    def launch(self, kernel: str, stream: int, arguments: Sequence[int | float]) -> None: ...

@final
class CardMemory:
    @staticmethod
    def managed(device: int, size: int) -> CardMemory: ...
    @staticmethod
    def page_locked(device: int, size: int) -> CardMemory: ...
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def __cuda_array_interface__(self) -> _CudaArrayInterface: ...
    @property
    def __array_interface__(self) -> _ArrayInterface: ...
    def prefetch(self, offset: int, size: int, *, to_card: bool, stream: int) -> bool: ...

def card_can_page(device: int) -> bool: ...
def card_free_memory(device: int) -> tuple[int, int]: ...
def card_memory_in_use() -> tuple[int, int]: ...
def adamw_segments(
    segments: Sequence[tuple[Sequence[int], int, Sequence[str], int, int, int]],
    *,
    first_tile: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> tuple[bytes, int]: ...
def adamw32_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    steps: list[Tensor],
    threads: int,
    maximize: bool = False,
) -> list[int]: ...
def adamw8_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avg_codes: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sq_codes: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    steps: list[Tensor],
    threads: int,
    maximize: bool = False,
) -> list[int]: ...
def quantize(
    input: Tensor,
    codebook: Codebook,
    block_size: int,
    packed: Tensor,
    absmax: Tensor,
    *,
    threads: int,
    backend: str | None = None,
) -> None: ...
def dequantize(
    packed: Tensor,
    absmax: Tensor,
    codebook: Codebook,
    block_size: int,
    output: Tensor,
    *,
    threads: int,
    backend: str | None = None,
) -> None: ...
def quantize_absmax(
    absmax: Tensor, codes: Tensor, nested_absmax: Tensor, *, threads: int
) -> float: ...
def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Codebook,
    block_size: int,
    shape: Sequence[int],
    bias: Tensor | None,
    output: Tensor,
    *,
    threads: int,
    backend: str | None = None,
) -> None: ...
def linear_transposed(
    y: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    codebook: Codebook,
    block_size: int,
    shape: Sequence[int],
    output: Tensor,
    *,
    threads: int,
    backend: str | None = None,
) -> None: ...
def fused_rows(
    dtype: str,
    code_bits: int,
    block_size: int,
    in_features: int,
    *,
    backend: str | None = None,
) -> int: ...
def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, offset: float, absmax: Tensor, *, threads: int
) -> None: ...

class _TensorReport(TypedDict):
    name: str
    action: str
    reason: str
    dtype: str
    shape: list[int]
    bytes_before: int
    bytes_after: int

class _ConversionReport(TypedDict):
    tensors: list[_TensorReport]
    copied: list[str]
    skipped: list[tuple[str, str]]
    bytes_before: int
    bytes_after: int
    shards: int
    shards_kept: int
    already_complete: bool
    seconds: float

class _VerifyReport(TypedDict):
    shards: int
    tensors: int
    quantized: int
    bytes: int
    files: int
    checksums: bool

class _TensorEntry(TypedDict):
    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str
    checksum: str | None
    reason: str | None

class _QuantizedEntry(TypedDict):
    name: str
    codebook: Codebook
    block_size: int
    dtype: str
    shape: list[int]
    double_quant: bool
    nested_offset: float | None
    parts: dict[str, str]
    reason: str | None

class _PartEntry(TypedDict):
    part: str
    name: str
    dtype: str
    shape: list[int]

@final
class CheckpointReader:
    def __new__(cls, path: str | PathLike[str]) -> CheckpointReader: ...
    def tensors(self) -> list[_TensorEntry]: ...
    def quantized(self) -> list[_QuantizedEntry]: ...
    def read_into(self, name: str, output: Tensor, *, verify: bool = True) -> None: ...
    @property
    def metadata(self) -> dict[str, dict[str, str]]: ...
    @property
    def format_version(self) -> int | None: ...

@final
class CheckpointWriter:
    def __new__(
        cls,
        path: str | PathLike[str],
        groups: list[list[tuple[str, str, list[int]]]],
        *,
        max_shard_bytes: int,
        files: list[tuple[str, bytes]],
    ) -> CheckpointWriter: ...
    def write(self, name: str, tensor: Tensor) -> None: ...
    def finish(self) -> None: ...
    def discard(self) -> None: ...

def quantized_layout(
    weight: str,
    *,
    codebook: Codebook,
    block_size: int,
    dtype: str,
    shape: list[int],
    nested_offset: float | None = None,
) -> tuple[list[_PartEntry], bytes]: ...
def add_quantization_config(
    config: str,
    *,
    codebook: Codebook,
    block_size: int,
    double_quant: bool,
    dtype: str,
    skipped: list[str],
    experts: bool = False,
) -> str: ...
def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    codebook: Codebook,
    block_size: int,
    double_quant: bool,
    only: list[str],
    skip: list[str],
    max_shard_bytes: int,
    chunk_bytes: int,
    threads: int,
    progress: Callable[[int, int, str], object] | None = None,
) -> _ConversionReport: ...
def verify(
    path: str | PathLike[str],
    *,
    threads: int,
    progress: Callable[[int, int], object] | None = None,
) -> _VerifyReport: ...
def read_header(
    path: str | PathLike[str],
) -> tuple[dict[str, str], list[tuple[str, str, list[int], int, int]]]: ...
def kept_module(name: str) -> str | None: ...
def matched_modules(
    only: list[str], skip: list[str], modules: list[str]
) -> tuple[list[bool], list[bool]]: ...
def small_files(folder: str | PathLike[str]) -> list[str]: ...
