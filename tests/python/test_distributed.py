"""4-bit layers and their adapters under DDP and FSDP2: two processes on the CPU."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fourbit
import processes
from fourbit.experts import quantize_experts, set_experts
from fourbit.lora import LoraExperts, LoraLayer, load_adapter, lora_modules, remove_lora
from processes import WORLD

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


class Experts(nn.Module):
    """Three, which two processes cannot cut evenly."""

    num_experts = 3
    is_transposed = has_bias = False
    has_gate = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * 32, 64) / 8)
        self.down_proj = nn.Parameter(torch.randn(3, 64, 32) / 6)

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate.sigmoid() * up


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = x[:, :3].softmax(dim=-1).topk(2)
        return self.experts(x, index, weights)


def adapted_model() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = ((64, 130), (130, 96), (96, 50))
    layers = (nn.Sequential(nn.Linear(*size), nn.Tanh()) for size in sizes)
    model = fourbit.quantize_model(nn.Sequential(Mixture(), *layers))
    experts = model[0].experts
    for name in ("gate_up_proj", "down_proj"):
        set_experts(experts, name, quantize_experts(getattr(experts, name).data, groups=3))
    fourbit.add_lora(model, r=4, lora_dropout=0.0, init_lora_weights=False)
    return model


def inputs() -> torch.Tensor:
    """A batch for each process."""
    return torch.randn(WORLD, 5, 64, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, part in model.named_parameters():
        if part.grad is not None:
            whole = part.grad.full_tensor() if hasattr(part.grad, "full_tensor") else part.grad
            found[name.removeprefix("module.")] = whole
    return found


def expected_gradients() -> dict[str, torch.Tensor]:
    model = adapted_model()
    sum(model(batch).square().mean() for batch in inputs()).div(WORLD).backward()
    return gradients(model)


def check_ddp() -> None:
    model = DistributedDataParallel(adapted_model())
    model(inputs()[dist.get_rank()]).square().mean().backward()
    expected, found = expected_gradients(), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-7), name


def check_fsdp(folder: Path, dtype: torch.dtype | None) -> None:
    model = adapted_model()
    packed = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
    mesh = init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for layer in (*(m for m in model.modules() if isinstance(m, LoraLayer)), model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    model(inputs()[dist.get_rank()]).square().mean().backward()
    expected, found = expected_gradients(), gradients(model)
    assert found.keys() == expected.keys()
    # With a bfloat16 policy, three layers of products of 8 significant bits.
    tolerance = 1e-5 if dtype is None else 5e-2
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name
    for name, part in model.named_parameters():
        if name in packed:
            assert torch.equal(part.full_tensor(), packed[name]), name
    fourbit.save_adapter(model, folder / "adapter")
    if dist.get_rank() == 0:
        whole = adapted_model()
        again = load_adapter(remove_lora(adapted_model()), folder / "adapter")
        for layer, stored in zip(
            lora_modules(whole).values(), lora_modules(again).values(), strict=True
        ):
            for part, other in zip(layer.parameters(), stored.parameters(), strict=True):
                assert torch.equal(part, other)
        assert sum(isinstance(layer, LoraExperts) for layer in lora_modules(again).values()) == 1
    for what in (fourbit.merge, lambda m: fourbit.export_merged(m, folder / "never")):
        with pytest.raises(ValueError, match="sharded over processes"):
            what(model)
    with pytest.raises(ValueError, match="sharded over processes"):
        fourbit.save(fourbit.remove_lora(model), folder / "never")
    assert not (folder / "never").exists()


def check_everything(folder: Path) -> None:
    check_ddp()
    for dtype in (None, torch.bfloat16):
        mine = folder / f"{dtype}-{dist.get_rank()}"
        mine.mkdir()
        check_fsdp(mine, dtype)


def test_two_processes(tmp_path: Path):
    processes.run(check_everything, tmp_path)
