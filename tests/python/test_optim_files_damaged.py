"""Files of optimizers that are damaged: refused by name, and the optimizer is as it was."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fourbit
from adamw_steps import parameters
from fourbit import CheckpointError
from fourbit.optim import PagedAdamW, load_optimizer, save_optimizer
from optimizers import KEY, same, step, stepped


class Damaged:
    """A file of an optimizer, taken apart; `write` puts it together with good checksums."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        self.header = json.loads(content[8 : 8 + length])
        self.strings = self.header.pop("__metadata__")
        self.options: Any = json.loads(self.strings[KEY])
        self.data = {
            name: bytearray(
                content[8 + length + entry["data_offsets"][0] :][
                    : entry["data_offsets"][1] - entry["data_offsets"][0]
                ]
            )
            for name, entry in self.header.items()
        }

    def set(self, name: str, tensor: torch.Tensor, dtype: str) -> None:
        self.header[name] = {"dtype": dtype, "shape": list(tensor.shape)}
        self.data[name] = bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy())

    def drop(self, *names: str) -> None:
        for name in names:
            del self.header[name], self.data[name]

    def write(self, text: str | None = None) -> None:
        text = json.dumps(self.options) if text is None else text
        strings = {KEY: text, f"fourbit.crc32.{KEY}": f"{zlib.crc32(text.encode()):08x}"}
        start = 0
        for name, entry in self.header.items():
            entry["data_offsets"] = [start, start + len(self.data[name])]
            start += len(self.data[name])
            strings[f"fourbit.crc32.{name}"] = f"{zlib.crc32(self.data[name]):08x}"
        header = json.dumps({"__metadata__": strings, **self.header}).encode()
        parts = (self.data[name] for name in self.header)
        self.path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(parts))


def group(damaged: Damaged) -> dict[str, Any]:
    only: dict[str, Any] = damaged.options["param_groups"][0]
    return only


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


DAMAGES: list[tuple[Callable[[Damaged], object], str]] = [
    (lambda d: d.options.update(version=2), "of version 2 and this fourbit reads 1"),
    (lambda d: d.options.pop("version"), "of version None"),
    (lambda d: setattr(d, "options", [1]), "of version None"),
    (lambda d: d.options.pop("skipped_updates"), "is not what is written there"),
    (lambda d: d.options.update(skipped_updates=-1), "is not what is written there"),
    (lambda d: d.options.update(skipped_updates=1.5), "is not what is written there"),
    (lambda d: d.options.update(param_groups={}), "is not what is written there"),
    (lambda d: d.options.update(param_groups=[{}]), "is not what is written there"),
    (lambda d: group(d).update(param_names=["a"]), "is not what is written there"),
    (lambda d: d.options.update(without_state=None), "is not what is written there"),
    # Parameters.
    (lambda d: group(d).update(params=[0, 1]), r"groups of \[2\] parameters.*has \[3\]"),
    (lambda d: d.options["param_groups"].append(group(d)), r"groups of \[3, 3\]"),
    (lambda d: group(d).update(params=[0, 0, 1]), "not numbered from 0"),
    (lambda d: group(d).update(params=[1, 2, 3]), "not numbered from 0"),
    (lambda d: group(d).update(params=[0, 1, 10**30]), "not numbered from 0"),
    # Options.
    (lambda d: group(d).update(lr=-1.0), r"lr is -1\.0"),
    (lambda d: group(d).update(lr="fast"), "lr is 'fast'"),
    (lambda d: group(d).update(lr=None), "lr is None"),
    (lambda d: group(d).update(lr=10**400), "too large"),
    (lambda d: group(d).update(betas=5), "len"),
    (lambda d: group(d).update(betas=["a", "b"]), "could not convert"),
    (lambda d: group(d).update(betas=[0.9, 1.0]), "betas are"),
    (lambda d: group(d).update(state_bits=16), "state_bits is 16"),
    (lambda d: group(d).update(state_bits=32), "is 8-bit where 32-bit state is needed"),
    (lambda d: group(d).update(more=nested(700)), "nested too deeply"),
    (lambda d: group(d).update(lr={"tensor": "lr"}), "tensor 'lr' is missing"),
    (lambda d: group(d).update(lr={"tensor": ["lr"]}), "is missing"),
    (lambda d: group(d).update(lr={"tensor": "state.0.exp_avg"}), "has many elements"),
    # Tensors.
    (lambda d: d.drop("state.0.exp_avg_sq"), "parameter 0 lacks exp_avg_sq"),
    (lambda d: d.drop("state.0.exp_avg_absmax"), "parameter 0 lacks exp_avg_absmax"),
    (lambda d: d.drop("state.1.step"), "parameter 1 lacks step"),
    (
        lambda d: d.drop("state.1.step", "state.1.exp_avg", "state.1.exp_avg_sq"),
        r"state\.1\.\* are missing",
    ),
    (lambda d: d.options.update(without_state=[]), r"state\.2\.\* are missing"),
    (lambda d: d.options.update(without_state=[1, 2]), r"state\.1\.\w+ belongs to nothing"),
    (lambda d: d.set("state.0.more", torch.ones(1), "F32"), "unknown field 'more'"),
    (lambda d: d.set("state.9.step", torch.ones(1), "F32"), r"state\.9\.step belongs to noth"),
    (lambda d: d.set("weight", torch.ones(1), "F32"), "weight belongs to nothing"),
    (lambda d: d.set("0.exp_avg", torch.ones(1), "F32"), r"0\.exp_avg belongs to nothing"),
    (lambda d: d.set("state.1.exp_avg", torch.ones(8, 5), "F32"), r"has shape \[8, 5\] where"),
    (lambda d: d.set("state.1.exp_avg", torch.ones(20), "F32"), r"has shape \[20\] where"),
    (
        lambda d: d.set("state.1.exp_avg", torch.ones(1000), "F32"),
        r"state\.1\.exp_avg has shape \[1000\], and its parameter \[40\]",
    ),
    (lambda d: d.set("state.1.step", torch.ones(2), "F32"), "step of parameter 1 has shape"),
    (lambda d: d.set("state.1.exp_avg", torch.ones(40).int(), "I32"), r"is torch\.int32 where"),
    (lambda d: d.header["state.0.exp_avg"].update(dtype="I8"), r"is torch\.int8 where"),
    (
        lambda d: d.set("state.1.exp_avg", torch.full((40,), torch.nan), "F32"),
        "exp_avg of parameter 1 holds NaN",
    ),
    (
        lambda d: d.set("state.0.exp_avg_absmax", torch.full((25,), torch.inf), "F32"),
        "exp_avg_absmax of parameter 0 holds NaN or infinity",
    ),
    (
        lambda d: d.set("state.1.exp_avg_sq", -torch.ones(40), "F32"),
        "exp_avg_sq of parameter 1 is negative",
    ),
    (lambda d: d.set("state.1.step", torch.tensor(1.5), "F32"), r"is 1\.5, not a count"),
]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_optimizer(stepped(), path)
    good = path.read_bytes()
    target = stepped(32)
    target.skipped_updates = 5
    before = copy.deepcopy(target.state_dict())
    for damage, message in DAMAGES:
        path.write_bytes(good)
        damaged = Damaged(path)
        damage(damaged)
        damaged.write()
        with pytest.raises(CheckpointError, match=message) as caught:
            load_optimizer(target, path)
        assert str(path) in str(caught.value), message
        assert same(target.state_dict(), before), message
        assert target.skipped_updates == 5
    # What the tool for damage writes is good where nothing was damaged.
    path.write_bytes(good)
    Damaged(path).write()
    load_optimizer(target, path)
    assert same(target.state_dict(), stepped().state_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is broken"),
        ('{"version": 1, "version": 1}', "'version' stands twice"),
        ('{"version": NaN}', "NaN is no number"),
        ("[" * 100_000, "is broken"),
        ("1", "of version None"),
    ],
)
def test_options_that_are_no_json(text: str, message: str, tmp_path: Path) -> None:
    optimizer = stepped()
    save_optimizer(optimizer, tmp_path / "x")
    Damaged(tmp_path / "x").write(text)
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(optimizer, tmp_path / "x")


FRAGMENTS = (
    *("0", "1", "-1", "2.5", "1e400", "true", "null", "[]", "{}", '""', '"lr"', "[[1]]", "{", "]"),
    *('"params"', '"betas":', '"param_names":["a","b","c"]', '{"tensor":"state.1.step"}', ","),
    *('{"list":[1]}', "\\ud800", "9" * 5000, '"state_bits":8', '"lr":"x"', ":", "é"),
)


def test_options_with_any_part_replaced(tmp_path: Path) -> None:
    """With good checksums: refused by name, or loaded; no other error, and never half of it."""
    optimizer = stepped()
    path = tmp_path / "x"
    save_optimizer(optimizer, path)
    damaged = Damaged(path)
    text = json.dumps(damaged.options)
    values = [
        match.span() for match in re.finditer(r'"\w+"|[\d.e-]+|\[[^\[\]]*\]|true|false', text)
    ]
    source = random.Random(3)
    target = stepped(32)
    before = copy.deepcopy(target.state_dict())
    refused = 0
    for _ in range(2500):
        if source.random() < 0.7:
            start, end = source.choice(values)
        else:
            start = source.randrange(len(text))
            end = start + source.randrange(12)
        damaged.write(text[:start] + source.choice(FRAGMENTS) + text[end:])
        try:
            load_optimizer(target, path)
        except CheckpointError:
            assert same(target.state_dict(), before)
            refused += 1
        else:
            assert same(target.state_dict()["state"], optimizer.state_dict()["state"])
            target = stepped(32)
    assert 1000 < refused < 2500


def test_files_of_other_kinds(tmp_path: Path) -> None:
    optimizer = stepped()
    with pytest.raises(FileNotFoundError):
        load_optimizer(optimizer, tmp_path / "nothing")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: this is a zip archive"):
        load_optimizer(optimizer, tmp_path / "optimizer.pt")
    model = fourbit.add_lora(nn.Sequential(nn.Linear(64, 64)), r=2)
    fourbit.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match=r"holds no fourbit\.optimizer; it is a file of anot"):
        load_optimizer(optimizer, path)
    with pytest.raises(TypeError, match="not a PagedAdamW"):
        load_optimizer(torch.optim.AdamW(parameters((3,))), path)  # type: ignore[arg-type]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    """A flipped bit is refused, or in a place that says nothing, and the same state is read."""
    path = tmp_path / "x"
    optimizer = PagedAdamW(parameters((64, 64), (9,)), state_bits=8)
    step(optimizer, 0)
    wanted = copy.deepcopy(optimizer.state_dict())
    save_optimizer(optimizer, path)
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    source = torch.Generator().manual_seed(0)
    target = PagedAdamW(parameters((64, 64), (9,)), state_bits=8)
    untouched = copy.deepcopy(target.state_dict())
    bits = [
        *torch.randint(0, 8 * (8 + length), (1500,), generator=source).tolist(),
        *torch.randint(8 * (8 + length), 8 * len(good), (500,), generator=source).tolist(),
    ]
    passed = []
    for bit in bits:
        broken = bytearray(good)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            load_optimizer(target, path)
        except CheckpointError:
            assert same(target.state_dict(), untouched)
        else:
            passed.append(bit)
            assert same(target.state_dict(), wanted), bit
            target = PagedAdamW(parameters((64, 64), (9,)), state_bits=8)
    # The value and the key of "format", no more.
    assert len(passed) < 30
    for cut in torch.randint(0, len(good), (200,), generator=source).tolist():
        path.write_bytes(good[:cut])
        with pytest.raises(CheckpointError):
            load_optimizer(target, path)
    assert same(target.state_dict(), untouched)


def test_a_header_of_a_million_tensors_is_refused(tmp_path: Path) -> None:
    entry = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % index for index in range(1_000_000)) + "}").encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="more than 262144 tensors"):
        load_optimizer(stepped(), tmp_path / "x")
