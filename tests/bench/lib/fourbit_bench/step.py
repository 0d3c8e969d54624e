"""A QLoRA training step of a Llama of the 8B shape, against transformers + PEFT + bitsandbytes.

Both: random weights, r 64 on all linear layers, checkpointing, autocast to bf16, 8-bit AdamW, one
sequence. Theirs is prepared as their documentation has it (`prepare_model_for_kbit_training`, and
`BitsAndBytesConfig`'s layers put in by hand, since there is no folder to load from).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fourbit
from fourbit_bench.report import OURS, Row, faster
from fourbit_bench.timing import DEVICE, Call, compare, why
from fourbit_bench.weights import bitsandbytes

# The shape of Llama-3.1-8B. All its blocks where the card's memory holds them in 16 bits for a
# moment beside what is trained already; a quarter of them elsewhere.
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
BLOCKS, FEWER_BLOCKS = 32, 8
MEMORY_FOR_ALL_BLOCKS = 44 << 30
TOKENS = 2048
SMALL_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
RANK = 64
HF = "transformers + PEFT + bitsandbytes"
MEMORY_GOAL = 0.6


def rows(*, small: bool) -> Iterator[Row]:
    """One row, with the share of their peak memory that ours takes."""
    import transformers

    free, _ = torch.cuda.mem_get_info(DEVICE)
    blocks = BLOCKS if free >= MEMORY_FOR_ALL_BLOCKS else FEWER_BLOCKS
    blocks, tokens = (1, 16) if small else (blocks, TOKENS)
    shape = SMALL_SHAPE if small else SHAPE
    config = transformers.LlamaConfig(num_hidden_layers=blocks, **shape)
    ids = torch.randint(0, shape["vocab_size"], (1, tokens), device=DEVICE)

    def dense() -> Any:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with DEVICE:
                return transformers.LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)

    ours, our_peak = _measured(lambda: _ours(dense()), ids)
    theirs, their_peak = _measured(lambda: _theirs(dense()), ids)
    remarks: list[tuple[str, float, float | None]] = []
    if our_peak and their_peak:
        remarks.append((f"peak memory over {HF}", our_peak / their_peak, MEMORY_GOAL))
    yield Row(
        f"QLoRA step, {blocks} blocks of the 8B shape, r {RANK}, {tokens} tokens",
        compare({OURS: ours, HF: theirs}, 1, eager={OURS, HF}),
        goals=[faster(HF, 2)],
        remarks=remarks,
    )


def _measured(
    build: Callable[[], tuple[Any, torch.optim.Optimizer]], ids: Tensor
) -> tuple[Call | str, int]:
    """A step, and the most memory that one took, with the model; or why there is none."""
    try:
        before = torch.cuda.memory_allocated(DEVICE)
        call = _stepper(*build(), ids)
        gc.collect()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        for _ in range(2):
            call(0)
        torch.cuda.synchronize()
        return call, torch.cuda.max_memory_allocated(DEVICE) - before
    except Exception as error:
        return why(error), 0


def _ours(model: Any) -> tuple[Any, torch.optim.Optimizer]:
    fourbit.quantize_model(model)
    fourbit.prepare_for_training(model)
    fourbit.add_lora(model, r=RANK, lora_dropout=0.0)
    return model, fourbit.PagedAdamW(_trained(model), lr=1e-4)


def _theirs(model: Any) -> tuple[Any, torch.optim.Optimizer]:
    import peft

    library = bitsandbytes()
    if isinstance(library, str):
        raise ImportError(library)
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            new = library.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            weight = library.nn.Params4bit(layer.weight.data, quant_type="nf4", module=new)
            new.weight = weight.to(DEVICE)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)
    model.is_loaded_in_4bit = True
    model.config.use_cache = False
    options = {"use_reentrant": False}
    model = peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=options)
    adapter = peft.LoraConfig(r=RANK, lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(model, adapter)
    return model, library.optim.AdamW8bit(_trained(model), lr=1e-4)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _stepper(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> Callable[[int], None]:
    model.train()

    def call(_: int) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call
