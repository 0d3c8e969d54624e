"""Two published walk-throughs of QLoRA, as users have them, on a machine without bitsandbytes.

Usage: python takeover_child.py FOLDER STEPS; prints what the test looks at as JSON.
"""
# ruff: noqa: E402 - what is imported must not find bitsandbytes

import importlib.machinery
import importlib.metadata
import json
import sys
from pathlib import Path


def forget_bitsandbytes() -> None:
    """Neither a module nor a distribution of that name can be found any more."""
    finder = importlib.machinery.PathFinder
    find_spec, from_name = finder.find_spec, importlib.metadata.Distribution.from_name
    distributions = importlib.metadata.distributions

    def hidden(name: str) -> bool:
        return name.partition(".")[0] == "bitsandbytes"

    def missing(name: str) -> importlib.metadata.Distribution:
        if hidden(name):
            raise importlib.metadata.PackageNotFoundError(name)
        return from_name(name)

    finder.find_spec = staticmethod(
        lambda name, *rest: None if hidden(name) else find_spec(name, *rest)
    )
    importlib.metadata.Distribution.from_name = staticmethod(missing)
    importlib.metadata.distributions = lambda **options: (
        d for d in distributions(**options) if not hidden(d.metadata["Name"])
    )


forget_bitsandbytes()

import fourbit

assert "torch" not in sys.modules, "to import fourbit is quick"

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

fourbit.replace_bitsandbytes()

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BASE, FAQ = str(EXAMPLES / "base_model"), str(EXAMPLES / "data" / "faq.jsonl")
QUANTIZED = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(torch.arange(24).view(2, 12)).logits
    return output


def scores(model: torch.nn.Module) -> torch.Tensor:
    """As Trainer has left the model that it trained: in bfloat16's autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return logits(model).float()


def sft(folder: Path) -> dict[str, object]:
    """The paper's settings with SFTTrainer, from a model that is quantized as it is loaded."""
    model = AutoModelForCausalLM.from_pretrained(
        BASE, quantization_config=QUANTIZED, dtype=torch.bfloat16, device_map="auto"
    )
    layers = sum(type(module) is fourbit.Linear4bit for module in model.modules())
    model.save_pretrained(folder / "model")
    torch.save(logits(model), folder / "logits.pt")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "sft"),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            optim="paged_adamw_32bit",
            learning_rate=2e-4,
            bf16=True,
            use_cpu=True,
            max_length=64,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=FAQ, split="train"),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=LoraConfig(
            r=64, lora_alpha=16, lora_dropout=0.1, bias="none", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.save_model()
    optimizer = trainer.optimizer.optimizer
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "optimizer": type(optimizer).__name__,
        "state_bits": optimizer.param_groups[0]["state_bits"],
        "adapter": json.loads((folder / "sft" / "adapter_config.json").read_text())["r"],
        "layers": layers,
    }


def faq(folder: Path, steps: int) -> dict[str, object]:
    """Questions and answers with Trainer; then the same from the saved adapter."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(
        BASE, device_map="auto", trust_remote_code=True, quantization_config=QUANTIZED
    )
    model.gradient_checkpointing_enable()
    model = prepare_model_for_kbit_training(model)
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    def ask(model: torch.nn.Module) -> list[str]:
        answers = []
        for question in ("What is fourbit?", "What does NF4 stand for?"):
            chat = [{"role": "user", "content": question}]
            inputs = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            answers.append(tokenizer.decode(output[0]))
        return answers

    before, untrained = ask(model), scores(model)

    def tokenize(row: dict[str, list[dict[str, str]]]) -> dict[str, list[int]]:
        return tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))

    data: Dataset = load_dataset("json", data_files=FAQ, split="train").shuffle(seed=0)
    data = data.map(tokenize, remove_columns=data.column_names)
    model.config.use_cache = False
    trainer = Trainer(
        model=model,
        train_dataset=data,
        args=TrainingArguments(
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            learning_rate=2e-4,
            bf16=True,
            use_cpu=True,
            save_total_limit=3,
            logging_steps=1,
            output_dir=str(folder / "faq"),
            max_steps=steps,
            optim="paged_adamw_8bit",
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            report_to="tensorboard",
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    model.save_pretrained(str(folder / "trained"))
    model.config.use_cache = True
    after, trained = ask(model.eval()), scores(model)

    saved = PeftConfig.from_pretrained(str(folder / "trained"))
    again = AutoModelForCausalLM.from_pretrained(
        saved.base_model_name_or_path, quantization_config=QUANTIZED, device_map="auto"
    )
    again = PeftModel.from_pretrained(again, str(folder / "trained"))
    optimizer = trainer.optimizer.optimizer
    return {
        "dtypes": sorted(dtypes),
        "counted": model.get_nb_trainable_parameters(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "optimizer": type(optimizer).__name__,
        "state_bits": optimizer.param_groups[0]["state_bits"],
        "events": len(list((folder / "faq").rglob("events.out.tfevents*"))),
        "before": before,
        "after": after,
        "reloaded": ask(again),
        "same_scores": torch.equal(scores(again), trained),
        "learned": not torch.equal(trained, untrained),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        pass
    else:
        raise AssertionError("bitsandbytes is still there")
    results = {"sft": sft(folder), "faq": faq(folder, steps)}
    assert not any(name.partition(".")[0] == "bitsandbytes" for name in sys.modules)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
