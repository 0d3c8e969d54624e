"""4-bit layers and their adapters under DDP and FSDP2: two processes on the CPU.

All checks run in one pair of processes, which takes seconds to start. What one process alone does
is the truth; every process computes it for itself.
"""

import copy
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fourbit
import processes
from conftest import REPOSITORY
from fourbit import distributed
from fourbit.experts import quantize_experts, set_experts
from fourbit.lora import LoraExperts, LoraLayer, load_adapter, lora_modules, remove_lora
from processes import WORLD

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

STEPS = 20
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


# --- gradients ------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Three, which two processes cannot cut evenly."""

    num_experts = 3
    is_transposed = has_bias = False
    has_gate = True

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 2 * 32, 64) / 8)
        self.down_proj = nn.Parameter(torch.randn(3, 64, 32) / 6)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return gate.sigmoid() * up


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
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


def inputs() -> Tensor:
    """A batch for each process."""
    return torch.randn(WORLD, 5, 64, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): distributed.whole(part.grad)
        for name, part in model.named_parameters()
        if part.grad is not None
    }


def expected_gradients() -> dict[str, Tensor]:
    model = adapted_model()
    sum(model(batch).square().mean() for batch in inputs()).div(WORLD).backward()
    return gradients(model)


def check_gradients_of_ddp(folder: Path) -> None:
    model = DistributedDataParallel(adapted_model())
    model(inputs()[dist.get_rank()]).square().mean().backward()
    expected, found = expected_gradients(), gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-7), name


def check_gradients_and_files_of_fsdp(folder: Path) -> None:
    for dtype in (None, torch.bfloat16):
        model = adapted_model()
        before = {n: p.clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        shard([*(m for m in model.modules() if isinstance(m, LoraLayer)), model], policy)
        model(inputs()[dist.get_rank()]).square().mean().backward()
        expected, found = expected_gradients(), gradients(model)
        assert found.keys() == expected.keys()
        # With a bfloat16 policy, three layers of products of 8 significant bits.
        tolerance = 1e-5 if dtype is None else 5e-2
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name
        for name, part in model.named_parameters():
            if name in before:
                assert torch.equal(distributed.whole(part), before[name]), name
        check_files_of_fsdp(model, folder / str(dtype))


def check_files_of_fsdp(model: nn.Module, folder: Path) -> None:
    """Every process calls, the first writes, and when they return the files are there for all."""
    fourbit.save_adapter(model, folder / "adapter")
    again = load_adapter(remove_lora(adapted_model()), folder / "adapter")
    pairs = zip(lora_modules(adapted_model()).values(), lora_modules(again).values(), strict=True)
    for layer, stored in pairs:
        for part, other in zip(layer.parameters(), stored.parameters(), strict=True):
            assert torch.equal(part, other)
    assert sum(isinstance(layer, LoraExperts) for layer in lora_modules(again).values()) == 1
    for what in (fourbit.merge, lambda m: fourbit.export_merged(m, folder / "never")):
        with pytest.raises(ValueError, match="sharded over processes"):
            what(model)
    base, alone = remove_lora(model), remove_lora(adapted_model())
    fourbit.save(base, folder / "base")
    if dist.get_rank() == 0:
        fourbit.save(alone, folder / "alone")
        stored, expected = (
            {p.name: p.read_bytes() for p in (folder / name).iterdir()}
            for name in ("base", "alone")
        )
        assert stored == expected
    # Whoever writes cannot; all are told, and nobody waits for ever.
    dist.barrier()
    error, said = (FileExistsError, "holds") if dist.get_rank() == 0 else (RuntimeError, "first")
    with pytest.raises(error, match=said):
        fourbit.save(base, folder / "base")


# --- twenty steps ---------------------------------------------------------------------------------


def our_llama() -> Any:
    from lora_models import llama, quantize_linears

    model = llama()
    quantize_linears(model)
    fourbit.add_lora(model, r=4, lora_dropout=0.0, init_lora_weights=False, seed=0)
    return model.train()


def peft_llama() -> Any:
    import peft

    from lora_models import llama, quantize_linears

    model = llama()
    quantize_linears(model)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    config = peft.LoraConfig(**options, init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).train()


def our_mixtral() -> Any:
    """Experts in 4 bits, with adapters on every linear layer and on every expert."""
    from lora_models import quantize_linears
    from moe_models import moe

    model = moe("Mixtral", torch.float32)
    quantize_linears(model)
    for module in list(model.modules()):
        if type(module).__name__ == "MixtralExperts":
            for name in ("gate_up_proj", "down_proj"):
                set_experts(module, name, quantize_experts(getattr(module, name).data, groups=4))
    fourbit.add_lora(model, r=4, lora_dropout=0.0, init_lora_weights=False, seed=0)
    assert any(isinstance(layer, LoraExperts) for layer in lora_modules(model).values())
    return model.train()


def steps(model: nn.Module, rows: slice) -> Iterator[float]:
    """Train on some rows of every batch; the loss of all rows after each step.

    At five times this learning rate AdamW doubles a difference of rounding every step: after 20,
    sums in two orders are 1e-5 to 1e-4 apart, depending on the BLAS's kernels. Here 1e-6.
    """
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer = fourbit.PagedAdamW(trained, lr=1e-3, state_bits=32)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 8, (WORLD, 12), generator=generator)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if rows != slice(None):
            dist.all_reduce(mean)
            mean /= WORLD
        yield mean.item()


def shard(modules: list[nn.Module], policy: MixedPrecisionPolicy | None = None) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    options = distributed.sharding_options(modules[-1])
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy(), **options)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, and last itself."""
    return [*(m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")), model]


def by_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def by_fsdp(model: nn.Module) -> nn.Module:
    shard(blocks(model))
    return model


def by_accelerate(model: nn.Module) -> nn.Module:
    """What ``accelerate launch`` with the configuration in examples/ makes of a model.

    On a machine without a card accelerate takes DDP whatever its configuration says, so its own
    preparation for FSDP2 is called directly.
    """
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    config = load_config_from_file(str(REPOSITORY / "examples" / "fsdp2.yaml"))
    options = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
    options["fsdp_version"] = options.pop("version")
    options["transformer_cls_names_to_wrap"] = ["LlamaDecoderLayer"]
    plugin = FullyShardedDataParallelPlugin(**options)
    stub = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        process_index=dist.get_rank(),
        num_processes=WORLD,
        torch_device_mesh=None,
    )
    return fsdp2_prepare_model(stub, model)


def check_twenty_steps(make: Callable[[], Any], spread: Callable[[Any], nn.Module]) -> nn.Module:
    single = make()
    before = copy.deepcopy(single.state_dict())
    expected = list(steps(single, slice(None)))
    assert expected[-1] < expected[0] - 0.5, "nothing is learned"
    model = spread(make())
    rank = dist.get_rank()
    losses = list(steps(model, slice(rank, rank + 1)))
    # Means over two processes are taken in another order.
    assert losses == pytest.approx(expected, rel=1e-5)
    gathered = get_model_state_dict(model, options=FULL)
    if rank == 0:
        assert gathered.keys() == before.keys()
        for name, tensor in before.items():
            if tensor.dtype == torch.uint8:
                assert torch.equal(gathered[name], tensor), f"{name} was touched"
            else:
                assert torch.allclose(gathered[name], single.state_dict()[name], atol=1e-5), name
    whole = sum(part.numel() * part.element_size() for part in single.parameters())
    held = distributed.local_bytes(model)
    print(f"{make.__name__} {spread.__name__}, rank {rank}: {held} of {whole} bytes", flush=True)
    packed = sum(part.numel() for part in single.parameters() if part.dtype == torch.uint8)
    if spread is not by_ddp and distributed.sharding_options(single):
        assert held == packed + (whole - packed) // WORLD
    elif spread is not by_ddp:
        # Each parameter's shards differ by a row at most, a few hundred bytes of the largest.
        assert held < 0.52 * whole
    return model


def check_our_adapters(folder: Path) -> None:
    check_twenty_steps(our_llama, by_ddp)
    model = check_twenty_steps(our_llama, by_fsdp)
    fourbit.save_adapter(model, folder / "adapter")
    # Everybody reads what the first has written, into a model that was never sharded.
    from lora_models import llama, logits, quantize_linears

    alone = llama()
    quantize_linears(alone)
    load_adapter(alone, folder / "adapter")
    assert torch.equal(logits(model.eval()), logits(alone.eval()))


def check_torch_that_cannot_shard_bytes(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_SHARDS_BYTES_SINCE", (999, 0))
        model = check_twenty_steps(our_llama, by_fsdp)
        assert distributed.sharding_options(model)
        fourbit.save_adapter(model, folder / "adapter")
        assert (folder / "adapter" / "adapter_config.json").is_file()
        patch.setattr(torch.distributed.fsdp, "fully_shard", lambda module: module)
        with pytest.raises(RuntimeError, match=r"neither shard 4-bit weights .* torch 2\.12"):
            distributed.sharding_options(model)


def check_experts(folder: Path) -> None:
    check_twenty_steps(our_mixtral, by_ddp)
    model = check_twenty_steps(our_mixtral, by_fsdp)
    fourbit.save_adapter(model, folder / "adapter")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    state = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        trained = sum(".lora_" in name for name in state)
        assert len(tensors) == trained
        name = "model.layers.1.self_attn.q_proj.lora_B.weight"
        assert torch.equal(tensors[f"base_model.model.{name}"], state[name])


def check_adapters_of_peft(folder: Path) -> None:
    check_twenty_steps(peft_llama, by_ddp)
    check_twenty_steps(peft_llama, by_fsdp)
    model: Any = check_twenty_steps(peft_llama, by_accelerate)
    # What accelerate's get_state_dict and transformers' Trainer do in the first process.
    state = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "peft", state_dict=state)
        tensors = load_file(folder / "peft" / "adapter_model.safetensors")
        assert tensors
        assert all(".lora_" in name for name in tensors)
        name = "base_model.model.model.layers.1.mlp.up_proj.lora_B"
        assert torch.equal(tensors[f"{name}.weight"], state[f"{name}.default.weight"])
        base = json.loads((folder / "peft" / "adapter_config.json").read_text())
        assert base["r"] == 4


def check_a_state_dict_fills_shards(folder: Path) -> None:
    """A model without data is sharded and then filled from the first process, as torch does it."""
    source = our_llama()
    with torch.device("meta"):
        model = copy.deepcopy(source).to("meta")
    shard(blocks(model))
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = source.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, state, options=options)
    for name, part in model.state_dict().items():
        assert torch.equal(distributed.whole(part), source.state_dict()[name]), name


def check_the_example(folder: Path) -> None:
    path = REPOSITORY / "examples" / "02_two_processes.py"
    spec = importlib.util.spec_from_file_location("two_processes", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for ddp in (False, True):
        options = SimpleNamespace(ddp=ddp, steps=1, batch_size=1, output=folder)
        example.train(options, torch.device("cpu"))
    assert (folder / "adapter" / "adapter_config.json").is_file()


def check_everything(folder: Path) -> None:
    for check in (
        check_gradients_of_ddp,
        check_gradients_and_files_of_fsdp,
        check_our_adapters,
        check_torch_that_cannot_shard_bytes,
        check_experts,
        check_adapters_of_peft,
        check_a_state_dict_fills_shards,
        check_the_example,
    ):
        mine = folder / check.__name__
        mine.mkdir(exist_ok=True)
        check(mine)


def test_two_processes(tmp_path: Path) -> None:
    processes.run(check_everything, tmp_path)
