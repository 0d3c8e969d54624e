"""Scripts as users of transformers, PEFT and TRL have them, to be run with either engine.

Nothing in here knows which engine computes: with fourbit, `fourbit.replace_bitsandbytes()` was
called before. A script returns what it measured, and the losses of its steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import peft
import torch
import transformers
import trl

from fourbit_bench.memory import peak_memory

Result: TypeAlias = "dict[str, Any]"
Script: TypeAlias = "Callable[[Path], Result]"

EXAMPLES = Path(__file__).resolve().parents[4] / "examples"
BASE = EXAMPLES / "base_model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 42
STEPS = 20


def quantization() -> Any:
    """The configuration of both published walk-throughs."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load(folder: Path = BASE, **options: Any) -> Any:
    """A model in 4 bits, from a folder in 16 bits unless it is in 4 bits already."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": "cpu"}, **options
    )


def conversations() -> list[dict[str, Any]]:
    """The questions and answers that the examples are trained on."""
    lines = (EXAMPLES / "data" / "faq.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses_of(trainer: Any) -> list[float]:
    """Of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(work: Path) -> Result:
    """The SFTTrainer walk-through: r 64, alpha 16, dropout 0.1, bf16, paged AdamW."""
    import datasets

    trainer = trl.SFTTrainer(
        model=load(quantization_config=quantization()),
        args=trl.SFTConfig(
            output_dir=str(work),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            optim="paged_adamw_32bit",
            lr_scheduler_type="constant",
            max_grad_norm=0.3,
            warmup_steps=1,
            logging_steps=1,
            bf16=True,
            max_length=256,
            gradient_checkpointing=True,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=SEED,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(conversations()),
        processing_class=transformers.AutoTokenizer.from_pretrained(BASE),
        peft_config=peft.LoraConfig(
            r=64, lora_alpha=16, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    return {"losses": losses_of(trainer)}


def faq(work: Path) -> Result:
    """The FAQ walk-through: Trainer, batch 1, accumulation 4, 80 steps, 8-bit paged AdamW."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    model = load(quantization_config=quantization())
    model.gradient_checkpointing_enable()
    model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=TARGETS,
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    texts = [
        tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in conversations()
    ]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(work),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            learning_rate=2e-4,
            max_steps=80,
            optim="paged_adamw_8bit",
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=SEED,
            disable_tqdm=True,
        ),
        train_dataset=[tokenizer(text, truncation=True) for text in texts],
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    model.save_pretrained(work / "adapter")
    reloaded = peft.PeftModel.from_pretrained(
        load(quantization_config=quantization()), work / "adapter"
    )
    question = [{"role": "user", "content": "What does NF4 stand for?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = reloaded.generate(**prompt, max_new_tokens=32, do_sample=False)
    text = tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"losses": losses_of(trainer), "answer": text}


def batches(vocabulary: int = 2048) -> list[torch.Tensor]:
    """Pieces of real text, always the same."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    text = (EXAMPLES / "data" / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    assert int(tokens.max()) < vocabulary
    return list(tokens[: STEPS * 4 * 128].reshape(STEPS, 4, 128))


def train(model: Any, parts: list[torch.Tensor]) -> list[float]:
    """A loop of one's own, with torch's optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    losses = []
    for part in parts:
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def loop(_work: Path, **lora: Any) -> Result:
    """PEFT in a loop of one's own."""
    torch.manual_seed(SEED)
    model = load(quantization_config=quantization())
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, **lora)
    )
    return {"losses": train(model, batches())}


def merge(_work: Path) -> Result:
    """Merging: is unmerging exact, and how far is the merged model from the adapted one?"""
    torch.manual_seed(SEED)
    model = peft.get_peft_model(
        load(quantization_config=quantization()),
        peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS),
    )
    parts = batches()
    losses = train(model, parts)
    model.eval()
    with torch.no_grad():
        before = model(input_ids=parts[0]).logits.float()
        model.merge_adapter()
        merged = model(input_ids=parts[0]).logits.float()
        model.unmerge_adapter()
        after = model(input_ids=parts[0]).logits.float()
    return {
        "losses": losses,
        "merged": ((merged - before).norm() / before.norm()).item(),
        "unmerged": ((after - before).norm() / before.norm()).item(),
    }


def big_folder(work: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Llama of 0.2 billion parameters, made once, beside the folders of the two engines."""
    folder = work.parent / "big"
    if not (folder / "config.json").is_file():
        torch.manual_seed(SEED)
        config = transformers.LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=8,
            vocab_size=2048,
            tie_word_embeddings=False,
            eos_token_id=None,
        )
        transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def files(work: Path) -> Result:
    """From a 16-bit folder to a 4-bit model, to a folder, and back: seconds, bytes, equality."""
    folder = big_folder(work)
    started = time.perf_counter()
    model = load(folder, quantization_config=quantization())
    loaded = time.perf_counter()
    model.save_pretrained(work / "saved")
    saved = time.perf_counter()
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
        del model
        reloaded_at = time.perf_counter()
        again = load(work / "saved")
        reloaded = time.perf_counter()
        equal = torch.equal(again(input_ids=tokens).logits, logits)
    size = sum(file.stat().st_size for file in (work / "saved").glob("*.safetensors"))
    return {
        "load_s": loaded - started,
        "save_s": saved - loaded,
        "reload_s": reloaded - reloaded_at,
        "file_mb": size / 1e6,
        "equal": equal,
    }


def generate(work: Path) -> Result:
    """Greedy decoding, a token at a time."""
    model = load(big_folder(work), quantization_config=quantization()).eval()
    prompt = torch.arange(16)[None]
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2)
    started = time.perf_counter()
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False
    )
    seconds = time.perf_counter() - started
    return {"ms_a_token": 1e3 * seconds / 24, "tokens": out[0, 16:].tolist()}


def step(work: Path) -> Result:
    """A training step of a larger model: 512 tokens, checkpointing, all linear layers."""
    torch.manual_seed(SEED)
    model = load(big_folder(work), quantization_config=quantization())
    model = peft.prepare_model_for_kbit_training(model)
    model = peft.get_peft_model(model, peft.LoraConfig(r=64, target_modules=TARGETS))
    part = torch.arange(512)[None] % 2048
    started = time.perf_counter()
    losses = train(model, [part] * 4)
    return {"losses": losses, "s_a_step": (time.perf_counter() - started) / 4}


def mixtral(work: Path) -> Result:
    """A mixture of experts: bytes in memory, and a LoRA fine-tune of the attention."""
    torch.manual_seed(SEED)
    config = transformers.MixtralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        vocab_size=2048,
        tie_word_embeddings=False,
    )
    folder = work / "dense"
    transformers.MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    model = load(folder, quantization_config=quantization())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(work / "saved")
    size = sum(file.stat().st_size for file in (work / "saved").glob("*.safetensors"))
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    return {"losses": train(model, batches()), "memory_mb": held / 1e6, "file_mb": size / 1e6}


def compiled(_work: Path) -> Result:
    """Graph breaks of a model with PEFT."""
    torch.manual_seed(SEED)
    model = peft.get_peft_model(
        load(quantization_config=quantization()), peft.LoraConfig(r=8, target_modules=TARGETS)
    )
    part = batches()[0]
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(input_ids=part, labels=part)
    return {"graph_breaks": found.graph_break_count}


def with_lora(**options: Any) -> Script:
    """The loop with other options of LoraConfig."""

    def script(work: Path) -> Result:
        return loop(work, **options)

    return script


SCRIPTS: dict[str, Script] = {
    "sft": sft,
    "faq": faq,
    "loop": loop,
    "rslora": with_lora(use_rslora=True),
    "dora": with_lora(use_dora=True),
    "loftq": with_lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig()),
    "pissa": with_lora(init_lora_weights="pissa"),
    "olora": with_lora(init_lora_weights="olora"),
    "merge": merge,
    "files": files,
    "generate": generate,
    "step": step,
    "mixtral": mixtral,
    "compiled": compiled,
}


def run(name: str, work: Path) -> Result:
    """Run one script; what it measured, with its time and its memory over that after importing."""
    torch.set_num_threads(2)
    imported = peak_memory()
    started = time.perf_counter()
    try:
        result = SCRIPTS[name](work)
    except Exception as error:  # what an engine cannot do is a result
        result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {**result, "seconds": time.perf_counter() - started, "peak": peak_memory() - imported}
