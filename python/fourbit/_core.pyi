"""The Rust core. Private: everything public is in the modules of ``fourbit``."""

from torch import Tensor

__version__: str

class NonFiniteError(ValueError):
    """A weight to be quantized is NaN or infinite; the message names the element."""

class CheckpointError(ValueError):
    """A checkpoint folder or file is damaged, incomplete or of an unknown format."""

class Codebook:
    """A map from codes to values in [-1, 1]."""

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
    steps: list[int],
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
    steps: list[int],
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
def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, offset: float, absmax: Tensor, *, threads: int
) -> None: ...
