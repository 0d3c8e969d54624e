"""Fine-tune a 4-bit model in several processes: sharded by FSDP2, or copied by DDP.

    torchrun --nproc-per-node 2 examples/02_two_processes.py
    torchrun --nproc-per-node 2 examples/02_two_processes.py --ddp
    accelerate launch --multi_gpu --num_processes 2 examples/02_two_processes.py

Each process takes its own share of every batch: on its own GPU, or on the CPU if there is none.
With FSDP2 each also holds only its own share of the model, 4-bit weights included. The adapter is
written once, by the first process, to ``runs/two_processes``.

A script on transformers' Trainer, TRL or accelerate needs no code for this, on GPUs:

    accelerate launch --config_file examples/fsdp2.yaml train.py
"""

import argparse
import json
import os
import resource
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

import fourbit
from fourbit.distributed import local_bytes, sharding_options

EXAMPLES = Path(__file__).resolve().parent
BASE = EXAMPLES / "base_model"
FAQ = EXAMPLES / "data" / "faq.jsonl"


def batches(rank: int, world: int, size: int):
    """For ever: the share of one process of each batch of conversations, as tokens."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    conversations = [json.loads(line)["messages"] for line in FAQ.read_text().splitlines()]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in conversations]
    order = torch.Generator().manual_seed(0)
    while True:
        chosen = torch.randint(0, len(texts), (world * size,), generator=order).tolist()
        mine = [texts[index] for index in chosen[rank::world]]
        yield tokenizer(mine, return_tensors="pt", padding=True, truncation=True, max_length=128)


def main() -> None:
    """Join the other processes, and train with them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ddp", action="store_true", help="a whole model in every process")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4, help="examples a process and step")
    parser.add_argument("--output", type=Path, default=EXAMPLES.parent / "runs" / "two_processes")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(options, device)
    dist.destroy_process_group()


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Convert, load, shard, train, save."""
    rank, world = dist.get_rank(), dist.get_world_size()
    quantized = options.output / "base-4bit"
    if rank == 0 and not quantized.exists():
        fourbit.convert(BASE, quantized)
    dist.barrier()

    model = fourbit.from_pretrained(quantized, dtype=torch.float32, device=device)
    fourbit.prepare_for_training(model, gradient_checkpointing=False)
    # The same seed: the copies of DDP and the shards of FSDP2 are of one adapter.
    fourbit.add_lora(model, r=16, lora_alpha=32, lora_dropout=0.0, seed=0)
    model.train()
    whole = local_bytes(model)
    if options.ddp:
        trained = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(device.type, (world,))
        settings = sharding_options(model)  # {} from torch 2.12 on
        for block in (*model.model.layers, model):
            fully_shard(block, mesh=mesh, **settings)
        trained = model

    parameters = [part for part in model.parameters() if part.requires_grad]
    optimizer = fourbit.PagedAdamW(parameters, lr=2e-3)
    for step, batch in zip(
        range(options.steps), batches(rank, world, options.batch_size), strict=False
    ):
        batch = batch.to(device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = trained(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step:>4}   loss {mean.item() / world:.3f}", flush=True)

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"process {rank} holds {local_bytes(model) / 1e6:.2f} MB of parameters, of "
        f"{whole / 1e6:.2f} MB; peak memory {peak:.0f} MiB, libraries included",
        flush=True,
    )
    # Every process calls for a sharded model, the first one writes.
    if rank == 0 or not options.ddp:
        fourbit.save_adapter(model, options.output / "adapter", base_model_name_or_path=str(BASE))
    dist.barrier()


if __name__ == "__main__":
    main()
