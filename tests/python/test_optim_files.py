"""Optimizers in files: exact, never half there, and nothing that is damaged gets in."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import re
import shutil
import stat
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

import fourbit
import save_child
from fourbit import CheckpointError, NonFiniteError
from fourbit.optim import PagedAdamW, load_optimizer, save_optimizer

HERE = Path(__file__).parent
KEY = "fourbit.optimizer"


def parameters(shapes, dtype=torch.float32, seed=0) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in shapes]


def step(optimizer: PagedAdamW, number: int, *, without: frozenset[int] = frozenset()) -> None:
    """Gradients that depend on the number alone; some parameters have none."""
    source = torch.Generator().manual_seed(1000 + number)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=source).to(param.dtype)
        param.grad = None if index in without else gradient.to(param.device)
    optimizer.step()


def same(one: Any, two: Any) -> bool:
    """Of the same types, to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two)) and type(one) is type(two)
    return type(one) is type(two) and bool(one == two)


# --- round trips ----------------------------------------------------------------------------------

SHAPES = st.lists(
    st.sampled_from([(), (0,), (1,), (3, 5), (64, 64), (4096,), (70, 61), (2, 3, 7), (4097,)]),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(
    shapes=SHAPES,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    cut=st.integers(0, 5),
    widths=st.tuples(st.sampled_from([8, 32]), st.sampled_from([8, 32])),
    without=st.frozensets(st.integers(0, 5)),
    steps=st.integers(0, 2),
    lr=st.floats(1e-12, 1.0),
    named=st.booleans(),
)
def test_what_is_loaded_is_what_was_saved(
    tmp_path_factory, shapes, dtype, cut, widths, without, steps, lr, named
) -> None:
    def made(seed: int, bits: tuple[int, int], lr: float) -> PagedAdamW:
        params: list[Any] = parameters(shapes, dtype, seed)
        if named:
            params = [(f"layers.{index}.weight", param) for index, param in enumerate(params)]
        parts = [part for part in (params[:cut], params[cut:]) if part]
        groups = [
            {"params": part, "state_bits": width, "weight_decay": 0.1 * at, "note": f"group {at}"}
            for at, (part, width) in enumerate(zip(parts, bits, strict=False))
        ]
        return PagedAdamW(groups, lr=lr, betas=(0.8, 0.95))

    optimizer = made(0, widths, lr)
    for number in range(steps):
        step(optimizer, number, without=without)
    optimizer.skipped_updates = 7
    path = tmp_path_factory.mktemp("optimizer") / "optimizer.safetensors"
    save_optimizer(optimizer, path)
    other = made(1, (32, 32), 0.5)
    load_optimizer(other, path)
    assert same(optimizer.state_dict(), other.state_dict())
    assert other.skipped_updates == 7
    # The same state makes the same file.
    content = path.read_bytes()
    save_optimizer(other, path)
    assert path.read_bytes() == content


def stepped(bits: int = 8) -> PagedAdamW:
    """Three steps of a tensor with state of that width, and a small one; a third has no state."""
    optimizer = PagedAdamW(parameters([(90, 70), (40,), (8, 8)]), lr=1e-2, state_bits=bits)
    for number in range(3):
        step(optimizer, number, without=frozenset({2}))
    return optimizer


@pytest.mark.parametrize("bits", [8, 32])
def test_a_resumed_run_ends_in_the_same_bits(bits: int, tmp_path: Path) -> None:
    """With a schedule, from a file, in the middle."""
    shapes = [(90, 70), (40,), (8, 8)]
    runs = []
    for resumed in (False, True):
        params = parameters(shapes)
        optimizer = PagedAdamW(params, lr=1e-2, state_bits=bits)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
        for number in range(20):
            if resumed and number == 10:
                save_optimizer(optimizer, tmp_path / "x")
                params = [nn.Parameter(param.detach().clone()) for param in params]
                optimizer = PagedAdamW(params, state_bits=40 - bits)
                load_optimizer(optimizer, tmp_path / "x")
                before, schedule = (
                    schedule,
                    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, last_epoch=9),
                )
                schedule.load_state_dict(before.state_dict())
            step(optimizer, number)
            schedule.step()
        runs.append((params, optimizer.state_dict()))
    assert same([p.data for p in runs[0][0]], [p.data for p in runs[1][0]])
    assert same(runs[0][1]["state"], runs[1][1]["state"])
    assert runs[0][1]["param_groups"][0]["lr"] == runs[1][1]["param_groups"][0]["lr"]


def test_others_read_the_file(tmp_path: Path) -> None:
    optimizer = stepped()
    save_optimizer(optimizer, tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        options = json.loads(file.metadata()[KEY])
        assert options["version"] == 1
        assert options["param_groups"][0]["lr"] == 1e-2
        assert options["without_state"] == [2]
        for index, state in optimizer.state_dict()["state"].items():
            for field, value in state.items():
                assert torch.equal(file.get_tensor(f"state.{index}.{field}"), value)


def test_tensors_have_the_names_of_their_parameters(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    optimizer = PagedAdamW(model.named_parameters())
    step(optimizer, 0)
    save_optimizer(optimizer, tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        assert {name.rpartition(".")[0] for name in file.keys()} == {  # noqa: SIM118
            f"state.{name}" for name, _ in model.named_parameters()
        }
    load_optimizer(optimizer, tmp_path / "x")
    reordered = PagedAdamW([*model.named_parameters()][::-1])
    with pytest.raises(CheckpointError, match=r"parameter 0\.weight where .* has 1\.bias; give"):
        load_optimizer(reordered, tmp_path / "x")
    unnamed = PagedAdamW(model.parameters())
    load_optimizer(unnamed, tmp_path / "x")
    assert same(unnamed.state_dict()["state"], optimizer.state_dict()["state"])
    # And the other way.
    save_optimizer(PagedAdamW(model.parameters()), tmp_path / "x")
    load_optimizer(optimizer, tmp_path / "x")
    assert not optimizer.state_dict()["state"]


@pytest.mark.parametrize("name", ["", "line\nbreak", "x" * 1001, "\ud800"])
def test_names_that_no_tensor_can_have(name: str, tmp_path: Path) -> None:
    if name == "\ud800":
        # JSON in UTF-8 has no place for half a character, in a name or elsewhere.
        name = "é" * 501
    optimizer = PagedAdamW([(name, parameters([(3,)])[0])])
    step(optimizer, 0)
    save_optimizer(optimizer, tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        assert "state.0.exp_avg" in file.keys()  # noqa: SIM118
    load_optimizer(optimizer, tmp_path / "x")


def test_options_of_all_kinds(tmp_path: Path) -> None:
    params = parameters([(3,), (4,)])
    extra = {"names": ["a", "b"], "pair": (1, [2.5, None]), "flag": True, "count": 3, "inner": ""}
    optimizer = PagedAdamW(
        [{"params": params[:1], **extra}, {"params": params[1:], "lr": 1}],
        lr=torch.tensor(0.1, dtype=torch.float64),
    )
    save_optimizer(optimizer, tmp_path / "x")
    before = copy.deepcopy(optimizer.state_dict())
    other = PagedAdamW([{"params": params[:1]}, {"params": params[1:]}])
    load_optimizer(other, tmp_path / "x")
    assert same(other.state_dict(), before)
    for bad, message in (
        ({"note": {"a": 1}}, "option note is a dict"),
        ({"note": float("inf")}, "option note is inf"),
        ({"note": torch.ones(3)}, "option note is a tensor of 3 elements"),
        ({"note": "x" * (1 << 22)}, "header would take"),
    ):
        with pytest.raises(ValueError, match=message):
            save_optimizer(PagedAdamW([{"params": params[:1], **bad}]), tmp_path / "x")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
    load_optimizer(other, tmp_path / "x")


def test_what_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="is a AdamW, not a PagedAdamW"):
        save_optimizer(torch.optim.AdamW(parameters([(3,)])), tmp_path / "x")  # type: ignore[arg-type]
    optimizer = stepped(32)
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "more": 1})
    with pytest.raises(ValueError, match="entry 'more'"):
        save_optimizer(optimizer, tmp_path / "x")
    optimizer = stepped(32)
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"][3, 4] = torch.nan
    with pytest.raises(NonFiniteError, match=r"state\.0\.exp_avg has NaN"):
        save_optimizer(optimizer, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_optimizer_that_accelerate_has_wrapped(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    optimizer = stepped()
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert not isinstance(prepared, PagedAdamW)
    save_optimizer(prepared, tmp_path / "x")
    other = stepped(32)
    load_optimizer(accelerate.Accelerator(cpu=True).prepare(other), tmp_path / "x")
    assert same(other.state_dict(), optimizer.state_dict())


@pytest.mark.cuda
@pytest.mark.parametrize("bits", [8, 32])
def test_from_a_card_and_to_a_card(bits: int, tmp_path: Path) -> None:
    """The file does not say where state was, and the run goes on in the same bits."""
    shapes = [(90, 70), (3000, 2000), (40,)]
    params = [nn.Parameter(param.detach().cuda()) for param in parameters(shapes)]
    optimizer = PagedAdamW(params, state_bits=bits)
    for number in range(2):
        step(optimizer, number)
    save_optimizer(optimizer, tmp_path / "card")
    on_host = PagedAdamW(parameters(shapes), state_bits=bits)
    load_optimizer(on_host, tmp_path / "card")
    save_optimizer(on_host, tmp_path / "host")
    assert (tmp_path / "host").read_bytes() == (tmp_path / "card").read_bytes()
    again = [nn.Parameter(param.detach().clone()) for param in params]
    back = PagedAdamW(again, state_bits=bits)
    load_optimizer(back, tmp_path / "host")
    for one in (optimizer, back):
        step(one, 2)
    assert same([param.data for param in params], [param.data for param in again])


def test_sharded_state_is_sent_elsewhere(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = DTensor.from_local(torch.ones(4, 4), mesh)
        param = nn.Parameter(sharded)
        optimizer = PagedAdamW([param])
        param.grad = DTensor.from_local(torch.ones(4, 4), mesh)
        optimizer.step()
        with pytest.raises(ValueError, match=r"sharded over .* torch\.distributed\.checkpoint"):
            save_optimizer(optimizer, tmp_path / "x")
        assert not list(tmp_path.iterdir())
    finally:
        torch.distributed.destroy_process_group()


# --- how it is written ----------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="modes and links of POSIX")
def test_modes_and_links(tmp_path: Path) -> None:
    optimizer = stepped()
    before = os.umask(0o027)
    try:
        save_optimizer(optimizer, tmp_path / "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "y")
    save_optimizer(optimizer, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "y").read_bytes() == (tmp_path / "x").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"nowhere/x"):
        save_optimizer(optimizer, tmp_path / "nowhere" / "x")
    with pytest.raises(IsADirectoryError, match="disk"):
        save_optimizer(optimizer, tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "x"]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: Any) -> Path:
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("faults are injected with LD_PRELOAD, which takes Linux and a C compiler")
    library: Path = tmp_path_factory.mktemp("faults") / "faults.so"
    source = HERE / "faults.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def outcomes_of(shim: Path, mode: str, folder: Path) -> list[tuple[int, str]]:
    done = subprocess.run(
        [sys.executable, str(HERE / "save_child.py"), mode, str(folder)],
        env=os.environ | {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(status, message) for status, message in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: Any) -> list[bytes]:
    """The file before and after."""
    path = tmp_path_factory.mktemp("files") / "x"
    contents = []
    for steps in (1, 3):
        save_optimizer(save_child.stepped(steps), path)
        contents.append(path.read_bytes())
    return contents


def test_killed_at_every_file_operation(shim: Path, two_files: list[bytes], tmp_path: Path) -> None:
    outcomes = outcomes_of(shim, "kill", tmp_path)
    # Opened, written in several parts, flushed, renamed, the folder flushed.
    assert len(outcomes) > 6
    seen = []
    for at, (status, _) in enumerate(outcomes, 1):
        assert os.WIFSIGNALED(status) == (at < len(outcomes))
        content = (tmp_path / str(at) / save_child.NAME).read_bytes()
        assert content in two_files
        seen.append(two_files.index(content))
        left = [path.name for path in (tmp_path / str(at)).iterdir()]
        assert all(name == save_child.NAME or name.endswith(".tmp") for name in left)
        optimizer = save_child.stepped(0)
        load_optimizer(optimizer, tmp_path / str(at) / save_child.NAME)
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_every_file_operation(
    shim: Path, two_files: list[bytes], tmp_path: Path, code: int
) -> None:
    outcomes = outcomes_of(shim, str(code), tmp_path)
    assert len(outcomes) > 6
    for at, (status, message) in enumerate(outcomes, 1):
        path = tmp_path / str(at) / save_child.NAME
        assert os.WIFEXITED(status)
        assert path.read_bytes() in two_files
        if at < len(outcomes):
            assert message.startswith(f"{code}: ")
            assert str(path) in message
        # Nothing is left beside it.
        assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_short_writes_change_nothing(shim: Path, two_files: list[bytes], tmp_path: Path) -> None:
    outcomes = outcomes_of(shim, "short", tmp_path)
    assert outcomes == [(0, "")]
    assert (tmp_path / "1" / save_child.NAME).read_bytes() == two_files[1]


MEMORY = """
import sys, torch
from torch import nn
from pathlib import Path
from fourbit.optim import PagedAdamW, load_optimizer, save_optimizer

def peak(call):
    Path("/proc/self/clear_refs").write_text("5")
    read = lambda: [int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines()
                    if l.startswith(("VmRSS", "VmHWM"))]
    before = read()[1]
    call()
    return (read()[0] - before) >> 10

torch.set_num_threads(1)
params = [nn.Parameter(torch.zeros(1 << 20)) for _ in range(16)]
optimizer = PagedAdamW(params, state_bits=32)
for param in params:
    param.grad = torch.ones_like(param)
optimizer.step()
path = Path(sys.argv[1]) / "x"
save_optimizer(optimizer, Path(sys.argv[1]) / "warm")
print(peak(lambda: save_optimizer(optimizer, path)))
fresh = PagedAdamW(params, state_bits=32)
print(peak(lambda: load_optimizer(fresh, path)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_state_is_not_held_twice(tmp_path: Path) -> None:
    """128 MiB of state: nothing much more when saving, and once when loading."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        # glibc keeps holes between blocks of this size that it then does not use again.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    saving, loading = map(int, done.stdout.split())
    # A piece of at most 16 MiB, or a tensor of 4 MiB that is read, and what the allocator keeps.
    assert saving < 40
    assert 120 < loading < 128 + 40


# --- what is damaged ------------------------------------------------------------------------------


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
    with pytest.raises(CheckpointError, match=r"optimizer\.pt is not a safetensors file"):
        load_optimizer(optimizer, tmp_path / "optimizer.pt")
    model = fourbit.add_lora(nn.Sequential(nn.Linear(64, 64)), r=2)
    fourbit.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with pytest.raises(CheckpointError, match=r"holds no fourbit\.optimizer; it is a file of anot"):
        load_optimizer(optimizer, path)
    with pytest.raises(TypeError, match="not a PagedAdamW"):
        load_optimizer(torch.optim.AdamW(parameters([(3,)])), path)  # type: ignore[arg-type]


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    """A flipped bit is refused, or in a place that says nothing, and the same state is read."""
    path = tmp_path / "x"
    optimizer = PagedAdamW(parameters([(64, 64), (9,)]), state_bits=8)
    step(optimizer, 0)
    wanted = copy.deepcopy(optimizer.state_dict())
    save_optimizer(optimizer, path)
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    source = torch.Generator().manual_seed(0)
    target = PagedAdamW(parameters([(64, 64), (9,)]), state_bits=8)
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
            target = PagedAdamW(parameters([(64, 64), (9,)]), state_bits=8)
    # The value and the key of "format", no more.
    assert len(passed) < 30
    for cut in torch.randint(0, len(good), (200,), generator=source).tolist():
        path.write_bytes(good[:cut])
        with pytest.raises(CheckpointError):
            load_optimizer(target, path)
    assert same(target.state_dict(), untouched)


def test_a_header_of_a_million_tensors_is_not_parsed(tmp_path: Path) -> None:
    entry = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % index for index in range(1_000_000)) + "}").encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="are allowed"):
        load_optimizer(stepped(), tmp_path / "x")
