"""Optimizers in files: exact, never half there, and nothing that is damaged gets in."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

import save_child
from adamw_steps import parameters
from fourbit import CheckpointError, NonFiniteError
from fourbit.optim import PagedAdamW, load_optimizer, save_optimizer
from optimizers import KEY, same, step, stepped

HERE = Path(__file__).parent


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
        params: list[Any] = parameters(*shapes, dtype=dtype, seed=seed)
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


@pytest.mark.parametrize("bits", [8, 32])
def test_a_resumed_run_ends_in_the_same_bits(bits: int, tmp_path: Path) -> None:
    """With a schedule, from a file, in the middle."""
    shapes = [(90, 70), (40,), (8, 8)]
    runs = []
    for resumed in (False, True):
        params = parameters(*shapes)
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


@pytest.mark.parametrize("name", ["", "line\nbreak", "x" * 1001, "é" * 501])
def test_names_that_no_tensor_can_have(name: str, tmp_path: Path) -> None:
    optimizer = PagedAdamW([(name, parameters((3,))[0])])
    step(optimizer, 0)
    save_optimizer(optimizer, tmp_path / "x")
    with safe_open(tmp_path / "x", "pt") as file:
        assert "state.0.exp_avg" in file.keys()  # noqa: SIM118
    load_optimizer(optimizer, tmp_path / "x")


def test_options_of_all_kinds(tmp_path: Path) -> None:
    params = parameters((3,), (4,))
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
    ):
        with pytest.raises(ValueError, match=message):
            save_optimizer(PagedAdamW([{"params": params[:1], **bad}]), tmp_path / "x")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]
    load_optimizer(other, tmp_path / "x")


def test_what_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="is a AdamW, not a PagedAdamW"):
        save_optimizer(torch.optim.AdamW(parameters((3,))), tmp_path / "x")  # type: ignore[arg-type]
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
    params = [nn.Parameter(param.detach().cuda()) for param in parameters(*shapes)]
    optimizer = PagedAdamW(params, state_bits=bits)
    for number in range(2):
        step(optimizer, number)
    save_optimizer(optimizer, tmp_path / "card")
    on_host = PagedAdamW(parameters(*shapes), state_bits=bits)
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
