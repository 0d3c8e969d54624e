"""`PagedAdamW` on the sharded parameters of FSDP2: two processes on the CPU."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import emulate
import emulated_optimizer
import processes
from fake_card import FakeCard
from fourbit.optim import PagedAdamW
from processes import WORLD

FULL = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")


def sharded_model() -> nn.Module:
    """Weights whose rows and blocks the two shards divide unevenly, and one that has a single row.

    The last leaves nothing to the second process.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 77), nn.Tanh(), nn.Linear(77, 500), nn.Linear(500, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    return model


def backward(model: nn.Module, step: int) -> None:
    model.zero_grad()
    inputs = torch.randn(8, 70, generator=torch.Generator().manual_seed(step))
    model(inputs).square().mean().backward()


def check_shards_step_as_plain_tensors(bits: int) -> None:
    model = sharded_model()
    params = [*model.parameters()]
    locals_ = [nn.Parameter(p.to_local().detach().clone()) for p in params]
    wholes = [nn.Parameter(p.full_tensor().detach().clone()) for p in params]
    # A shard may be too small for 8 bits where the whole is not, and then the whole decides.
    compared = [p for p in locals_ if p.numel() >= 4096]
    assert compared
    optimizer = PagedAdamW(params, lr=1e-2, state_bits=bits)
    plain = PagedAdamW(compared, lr=1e-2, state_bits=bits)
    whole = PagedAdamW(wholes, lr=1e-2, state_bits=bits)
    for step in range(4):
        backward(model, step)
        for param, shard, full in zip(params, locals_, wholes, strict=True):
            shard.grad = param.grad.to_local().clone()
            full.grad = param.grad.full_tensor().clone()
        for one in (optimizer, plain, whole):
            one.step()
    for param, shard in zip(params, locals_, strict=True):
        if shard in plain.state:
            assert torch.equal(param.to_local(), shard)
    for param, full in zip(params, wholes, strict=True):
        if bits == 32 or param.numel() < 4096:
            assert torch.equal(param.full_tensor(), full)
        for field, value in optimizer.state[param].items():
            assert isinstance(value, DTensor) == (field != "step")


def check_full_state_dict_resumes(bits: int) -> None:
    model = sharded_model()
    optimizer = PagedAdamW(model.parameters(), lr=1e-2, state_bits=bits)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    weights = [p.full_tensor().detach().clone() for p in model.parameters()]
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=FULL))
    resumed_model = sharded_model()
    for param, weight in zip(resumed_model.parameters(), weights, strict=True):
        shard = distribute_tensor(weight, param.device_mesh, param.placements)
        param.to_local().data.copy_(shard.to_local())
    resumed = PagedAdamW(resumed_model.parameters(), lr=1e-2, state_bits=bits)
    set_optimizer_state_dict(resumed_model, resumed, saved, options=FULL)
    for step in range(3, 6):
        for one, other in ((model, optimizer), (resumed_model, resumed)):
            backward(one, step)
            other.step()
    for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())
        for field, value in optimizer.state[a].items():
            other = resumed.state[b][field]
            if isinstance(value, DTensor):
                assert value.placements == other.placements
                value, other = value.to_local(), other.to_local()
            assert torch.equal(value, other)


def check_all_shards_skip_together() -> None:
    model = sharded_model()
    params = [*model.parameters()]
    before = params[0].full_tensor().detach().clone()
    optimizer = PagedAdamW(params)
    backward(model, 0)
    if dist.get_rank() == 1:
        params[0].grad.to_local()[0, 0] = torch.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert any("update of parameter 0" in str(warning.message) for warning in caught)
    assert torch.equal(params[0].full_tensor(), before)
    assert optimizer.state[params[0]]["step"] == 0
    assert optimizer.state[params[1]]["step"] == 1
    assert optimizer.skipped_updates == 1


def check_paged_shards_step_as_resident_ones(bits: int) -> None:
    """On a card that is not there; a full state dict of one pager goes on with the other."""
    card = FakeCard(3 * emulated_optimizer.PAGE)
    with pytest.MonkeyPatch.context() as patch:
        emulated_optimizer.patch(patch, card)
        models = [sharded_model(), sharded_model()]
        resident, paged = (
            PagedAdamW(model.parameters(), lr=1e-2, state_bits=bits, pager=pager)
            for model, pager in zip(models, ("resident", "unified"), strict=True)
        )
        for step in range(4):
            for model, optimizer in zip(models, (resident, paged), strict=True):
                backward(model, step)
                optimizer.step()
            if step == 1:
                saved = copy.deepcopy(get_optimizer_state_dict(models[0], resident, options=FULL))
                set_optimizer_state_dict(models[1], paged, saved, options=FULL)
        for a, b in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(a.to_local(), b.to_local())
            for field, value in paged.state[b].items():
                other = resident.state[a][field]
                if isinstance(value, DTensor):
                    assert value.placements == other.placements
                    assert value.shape == other.shape
                    value, other = value.to_local(), other.to_local()
                    if field in ("exp_avg", "exp_avg_sq") and value.numel():
                        assert card.find(value.data_ptr()) is not None
                assert torch.equal(value, other)
        assert paged.paging_report().paged_steps > 0
        with pytest.raises(ValueError, match=r'sharded parameters .* use "unified"'):
            PagedAdamW(models[0].parameters(), pager="pinned")
        # "auto" chose for a plain parameter; sharded ones that join it are refused by name.
        card.shares = False
        plain = nn.Parameter(torch.zeros(5000))
        plain.grad = torch.ones(5000)
        joined = PagedAdamW([plain])
        joined.step()
        assert joined.paging_report().pagers == {"cpu": "pinned"}
        joined.add_param_group({"params": list(models[0].parameters())})
        with pytest.raises(ValueError, match=r'sharded parameters .* use "resident"'):
            joined.step()


def check_everything(_: Path) -> None:
    for bits in (32, 8):
        check_shards_step_as_plain_tensors(bits)
        check_full_state_dict_resumes(bits)
        if not emulate.unavailable():
            check_paged_shards_step_as_resident_ones(bits)
    check_all_shards_skip_together()


def test_two_processes(tmp_path: Path):
    processes.run(check_everything, tmp_path)
