"""torch.compile: one graph for forward and backward with adapters, and for each token generated."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch._dynamo.utils import counters

import fourbit
from lora_models import llama, quantize_linears, shake, tokens


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def four_bit() -> Any:
    model = llama(num_hidden_layers=1, use_cache=False)
    quantize_linears(model)
    return model


def ours() -> Any:
    model = fourbit.add_lora(four_bit(), r=4, lora_dropout=0.0, seed=0)
    shake(model)
    return model


def pefts() -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(four_bit(), config)


@pytest.mark.parametrize("make", [ours, pefts])
def test_a_training_step_is_one_graph(make: Callable[[], Any]) -> None:
    eager = make().train()
    # The backend traces the backward pass too, and compiles nothing: what breaks, breaks before.
    compiled = torch.compile(copy.deepcopy(eager), backend="aot_eager", dynamic=False)
    for model in (eager, compiled):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    trained = [part for part in eager.parameters() if part.requires_grad]
    others = [part for part in compiled.parameters() if part.requires_grad]
    for part, other in zip(trained, others, strict=True):
        assert part.grad.any()
        torch.testing.assert_close(other.grad, part.grad, rtol=1e-5, atol=1e-6)


def test_generation_with_a_static_cache_is_compiled(plain_folder: Path) -> None:
    """As transformers does it unasked on a GPU, and on a CPU if it is told to."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain_folder, quantization_config=fourbit.NF4Config(), dtype=torch.float32
    )
    compiling = transformers.CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager")
    compiling._compile_all_devices = True
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens(), **length)
    found = model.generate(
        tokens(), **length, cache_implementation="static", compile_config=compiling
    )
    assert torch.equal(found, expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
