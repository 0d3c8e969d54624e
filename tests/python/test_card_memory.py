"""Memory for a card: its life, its counts, what fails. No GPU: on the driver of fake_driver.c.

Each test runs in a process of its own, without torch unless it says so.
"""

import ctypes
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fake_cards import Driver, environment, on_fake_cards

MIB = 1 << 20

INVALID_VALUE, OUT_OF_MEMORY, LAUNCH_FAILED = 1, 2, 719
GLOBAL = 0  # capture mode


def both(core):
    return (core.CardMemory.managed, core.CardMemory.page_locked)


def assert_nothing_left(core, driver: Driver) -> None:
    assert core.card_memory_in_use() == (0, 0)
    assert driver.live() == (0, 0)
    driver.assert_used_well()


class Seen:
    """What a library for CUDA arrays would make of memory; here the host can read it."""

    def __init__(self, memory) -> None:
        self.memory = memory
        told = dict(memory.__cuda_array_interface__)
        assert told.pop("stream") is None
        self.__array_interface__ = told


# --- what it is -----------------------------------------------------------------------------------


@on_fake_cards()
def test_memory_says_what_it_is(core, driver):
    for make, kind in zip(both(core), ("managed", "page-locked"), strict=True):
        memory = make(0, 12_345)
        assert memory.size == 12_345
        assert memory.kind == kind
        assert memory.address % 4096 == 0
        assert core.card_memory_in_use() == driver.live() == (1, 12_345)
        expected = [f"allocate {kind} 0 12345"]
        if kind == "managed":  # preferred location, accessed by
            expected += ["advise 3 0", "advise 5 0"]
        assert driver.record() == expected
        del memory
        assert driver.record() == ["synchronize 0", f"free {kind} 0 12345"]
        assert_nothing_left(core, driver)
    assert driver.thread() == (0, GLOBAL)


@on_fake_cards()
def test_each_kind_has_the_interface_of_its_readers_alone(core, driver):
    managed, page_locked = (make(0, 100) for make in both(core))
    expected = {"version": 3, "typestr": "|u1", "shape": (100,), "strides": None}
    place = {"data": (page_locked.address, False)}
    assert page_locked.__array_interface__ == expected | place
    place = {"data": (managed.address, False), "stream": None}
    assert managed.__cuda_array_interface__ == expected | place
    assert not hasattr(managed, "__array_interface__")
    assert not hasattr(page_locked, "__cuda_array_interface__")
    with pytest.raises(AttributeError, match="managed memory has no __array_interface__"):
        managed.__array_interface__  # noqa: B018
    for name in ("size", "address", "kind", "other"):
        with pytest.raises(AttributeError):
            setattr(managed, name, 1)
    with pytest.raises(TypeError):
        core.CardMemory()


@on_fake_cards(devices=2)
def test_sizes_that_cannot_be(core, driver):
    for make, kind in zip(both(core), ("managed", "page-locked"), strict=True):
        with pytest.raises(ValueError, match=f"0 bytes of {kind} memory.*at least 1"):
            make(0, 0)
        for size in (-1, 1 << 64):
            with pytest.raises(OverflowError):
                make(0, size)
        with pytest.raises(TypeError):
            make(0, 1.5)
        for size in (1 << 31, 1 << 62, (1 << 64) - 1):
            with pytest.raises(
                core.CudaError,
                match=rf"{size} bytes of {kind} memory cannot be had for GPU 1: .*OUT_OF_MEMORY "
                r"\(2\): out of memory; keep the optimizer's state in fewer bits, use another "
                "pager, or free memory",
            ):
                make(1, size)
        with pytest.raises(core.CudaError, match="cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
            make(2, 1)
    assert_nothing_left(core, driver)


# --- how long it lives ----------------------------------------------------------------------------


@on_fake_cards()
def test_it_lives_as_long_as_an_array_over_it(core, driver):
    for wrap, make in zip((Seen, lambda memory: memory), both(core), strict=True):
        memory = make(0, 4 * 1000)
        address = memory.address
        array = np.asarray(wrap(memory)).view(np.float32)
        assert array.ctypes.data == address
        array[:] = np.arange(1000)
        del memory
        part = array[500:502]
        del array
        gc.collect()
        assert core.card_memory_in_use() == (1, 4000)
        assert part.tolist() == [500, 501]
        written = (ctypes.c_float * 1000).from_address(address)
        assert list(written) == list(range(1000))
        del part, written
        assert_nothing_left(core, driver)


@on_fake_cards()
def test_it_lives_as_long_as_a_tensor_over_it(core, driver):
    import torch

    memory = core.CardMemory.page_locked(0, 4 * 1000)
    tensor = torch.from_numpy(np.asarray(memory)).view(torch.float32)
    assert tensor.data_ptr() == memory.address
    tensor.copy_(torch.arange(1000))
    del memory
    part = tensor[500:502].clone(), tensor[500:502]
    del tensor
    gc.collect()
    assert core.card_memory_in_use() == (1, 4000)
    assert torch.equal(*part)
    del part
    assert_nothing_left(core, driver)


@on_fake_cards()
def test_a_thousand_leave_nothing(core, driver):
    for make in both(core):
        for cycle in range(1000):
            memory = make(0, 1 + 37 * cycle)
            if memory.kind == "managed":
                assert memory.prefetch(0, memory.size, to_card=True, stream=0)
            del memory
        assert_nothing_left(core, driver)
    assert driver.calls("cuMemFree_v2") == driver.calls("cuMemFreeHost") == 1000
    assert driver.resident(0) == 0


@on_fake_cards()
def test_many_live_at_once_and_each_is_let_go_by_itself(core, driver):
    sizes = [random.Random(3).randrange(1, 50_000) for _ in range(200)]
    pieces = [both(core)[size % 2](0, size) for size in sizes]
    spans = sorted((piece.address, piece.address + piece.size) for piece in pieces)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert core.card_memory_in_use() == driver.live() == (200, sum(sizes))
    random.Random(4).shuffle(pieces)
    left = sum(sizes)
    while pieces:
        left -= pieces[-1].size
        pieces.pop()
        assert core.card_memory_in_use() == driver.live() == (len(pieces), left)
    assert_nothing_left(core, driver)


@on_fake_cards(devices=2)
def test_the_card_of_the_memory_is_waited_for_before_it_is_freed(core, driver):
    for make in both(core):
        memories = [make(device, 100) for device in (0, 1)]
        for device in (0, 1):
            driver.at_work(device)
        del memories
        assert_nothing_left(core, driver)


@on_fake_cards()
def test_a_cycle_of_references_is_freed_by_the_collector(core, driver):
    cycle = [core.CardMemory.page_locked(0, 100), core.CardMemory.managed(0, 100)]
    cycle.append(cycle)
    del cycle
    assert core.card_memory_in_use() == (2, 200)
    gc.collect()
    assert_nothing_left(core, driver)


@on_fake_cards()
def test_a_forked_child_leaves_its_parents_memory_alone(core, driver):
    pieces = [make(0, 100) for make in both(core)]
    child = os.fork()
    if child == 0:
        before = [driver.calls(name) for name in ("cuCtxGetCurrent", "cuMemFree_v2")]
        pieces.clear()
        after = [driver.calls(name) for name in ("cuCtxGetCurrent", "cuMemFree_v2")]
        os._exit(0 if before == after else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pieces.clear()
    assert_nothing_left(core, driver)


@on_fake_cards()
def test_what_lives_to_the_end_of_the_process_does_no_harm(core, driver):
    global kept
    kept = [make(0, 100) for make in both(core)]  # dropped while the interpreter is shut down


# --- threads --------------------------------------------------------------------------------------


@on_fake_cards()
def test_it_may_be_dropped_by_another_thread(core, driver):
    pieces = [make(0, 100) for make in both(core)]

    def work():
        pieces.clear()
        return driver.thread()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == (0, GLOBAL)
    assert_nothing_left(core, driver)


@on_fake_cards(devices=2)
def test_many_threads_are_counted_exactly(core, driver):
    kept = []

    def work(seed):
        draw = random.Random(seed)
        mine = []
        for _ in range(200):
            mine.append(draw.choice(both(core))(draw.randrange(2), draw.randrange(1, 5000)))
            if draw.random() < 0.6:
                mine.pop(draw.randrange(len(mine)))
        kept.extend(mine)
        return driver.thread()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(work, range(8))) == {(0, GLOBAL)}
    total = (len(kept), sum(piece.size for piece in kept))
    assert total[0] > 400
    assert core.card_memory_in_use() == driver.live() == total
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [kept.pop() for _ in range(total[0] // 8)], range(8)))
    kept.clear()
    assert_nothing_left(core, driver)


@on_fake_cards()
def test_the_driver_is_waited_for_without_the_gil(core, driver):
    """Otherwise no other thread could let the call go, and it would be a fault after a while."""
    pieces = [core.CardMemory.managed(0, 100)]
    for function, work in {
        "cuMemAllocManaged": lambda: core.CardMemory.managed(0, 100),
        "cuMemHostAlloc": lambda: core.CardMemory.page_locked(0, 100),
        "cuMemPrefetchAsync": lambda: pieces[0].prefetch(0, 100, to_card=True, stream=0),
        "cuMemGetInfo_v2": lambda: core.card_free_memory(0),
        "cuDeviceGetAttribute": lambda: core.card_can_page(0),
        "cuCtxSynchronize": pieces.clear,
    }.items():
        driver.hold(function)

        def release():
            while not driver.holding():
                time.sleep(0.001)
            driver.hold()

        other = threading.Thread(target=release)
        other.start()
        work()
        other.join()
    assert_nothing_left(core, driver)


# --- moving it ------------------------------------------------------------------------------------


@on_fake_cards(devices=2)
def test_prefetch_moves_a_part_in_a_stream(core, driver):
    memory = core.CardMemory.managed(1, 10 * 4096)
    stream = driver.stream()
    driver.record()
    assert memory.prefetch(0, memory.size, to_card=True, stream=0) is True
    assert driver.resident(1) == 10 * 4096
    assert memory.prefetch(4096, 8192, to_card=False, stream=stream) is True
    assert driver.resident(1) == 8 * 4096
    assert memory.prefetch(4096, 1, to_card=True, stream=stream) is True
    assert driver.resident(1) == 9 * 4096
    in_stream = driver.record()
    number = in_stream[1].rsplit(" ", 1)[1]
    assert number != "0"
    assert in_stream == [
        "prefetch 0 40960 1 0",
        f"prefetch 4096 8192 -1 {number}",
        f"prefetch 4096 1 1 {number}",
    ]
    assert driver.resident(0) == 0
    assert driver.thread() == (0, GLOBAL)


@on_fake_cards()
def test_prefetch_refuses_what_is_not_in_the_memory(core, driver):
    memory = core.CardMemory.managed(0, 1000)
    for offset, size in [
        (0, 1001),
        (1000, 1),
        (1001, 0),
        (999, 2),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        (2, (1 << 64) - 2),
    ]:
        with pytest.raises(
            ValueError, match=f"{size} bytes from byte {offset} on are not within the 1000 bytes"
        ):
            memory.prefetch(offset, size, to_card=True, stream=0)
    for offset, size in [(-1, 1), (0, -1), (1 << 64, 1)]:
        with pytest.raises(OverflowError):
            memory.prefetch(offset, size, to_card=True, stream=0)
    for offset in (0, 500, 1000):
        assert memory.prefetch(offset, 0, to_card=True, stream=0) is True
    with pytest.raises(TypeError):
        memory.prefetch(0, 1, True, 0)  # neither is said by its place
    assert driver.calls("cuMemPrefetchAsync") == 0
    page_locked = core.CardMemory.page_locked(0, 1000)
    with pytest.raises(TypeError, match="page-locked memory is never moved; only managed"):
        page_locked.prefetch(0, 1, to_card=True, stream=0)
    assert driver.calls("cuMemPrefetchAsync") == 0


@on_fake_cards(card=16 * MIB)
def test_prefetch_says_where_a_card_has_no_room(core, driver):
    memory = core.CardMemory.managed(0, 8 * MIB)
    array = np.asarray(Seen(memory))
    array[:] = 7
    driver.reserve(0, 12 * MIB)
    assert core.card_free_memory(0) == (4 * MIB, 16 * MIB)
    assert memory.prefetch(0, memory.size, to_card=True, stream=0) is False
    assert driver.resident(0) == 0
    assert memory.prefetch(0, 4 * MIB, to_card=True, stream=0) is True
    assert core.card_free_memory(0) == (0, 16 * MIB)
    assert memory.prefetch(4 * MIB, 4096, to_card=True, stream=0) is False
    assert memory.prefetch(0, memory.size, to_card=False, stream=0) is True
    assert core.card_free_memory(0) == (4 * MIB, 16 * MIB)
    assert (array == 7).all()
    del memory, array
    assert_nothing_left(core, driver)


@on_fake_cards(card=16 * MIB)
def test_what_a_driver_evicts_counts_as_free_for_others(core, driver):
    first, second = (core.CardMemory.managed(0, 12 * MIB) for _ in range(2))
    assert first.prefetch(0, first.size, to_card=True, stream=0)
    assert second.prefetch(0, second.size, to_card=True, stream=0)
    assert "evict 0 12582912" in driver.record()
    assert driver.resident(0) == 12 * MIB
    assert core.card_free_memory(0) == (4 * MIB, 16 * MIB)


@on_fake_cards()
def test_other_failures_of_prefetch_are_errors(core, driver):
    memory = core.CardMemory.managed(0, 1000)
    for code, name in [(INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"), (LAUNCH_FAILED, "unknown")]:
        driver.fail("cuMemPrefetchAsync", code=code)
        with pytest.raises(core.CudaError, match=rf"cuMemPrefetchAsync failed: {name}.*\({code}\)"):
            memory.prefetch(0, 1000, to_card=False, stream=0)
    for function in ("cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"):
        driver.fail(function)
        with pytest.raises(core.CudaError, match=function.removesuffix("_v2")):
            memory.prefetch(0, 1000, to_card=True, stream=0)
        driver.reset_thread()
    del memory
    assert_nothing_left(core, driver)


# --- cards ----------------------------------------------------------------------------------------


@on_fake_cards(devices=2)
def test_two_cards_whichever_is_current(core, driver):
    for current in (None, 0, 1):
        if current is not None:
            driver.use(current)
        before = driver.thread()
        pieces = [make(device, 100) for make in both(core) for device in (0, 1)]
        record = driver.record()
        for device in (0, 1):
            assert f"allocate managed {device} 100" in record
            assert f"allocate page-locked {device} 100" in record
            assert {f"advise 3 {device}", f"advise 5 {device}"} <= set(record)
        assert driver.thread() == before
        while pieces:
            pieces.pop()
            assert driver.thread() == before
        assert sum(line.startswith("free") for line in driver.record()) == 4
        assert_nothing_left(core, driver)


@on_fake_cards(devices=2)
def test_whether_a_card_can_page(core, driver):
    for managed in (0, 1):
        for concurrent in (0, 1):
            os.environ["FAKE_CUDA_MANAGED"] = str(managed)
            os.environ["FAKE_CUDA_CONCURRENT"] = str(concurrent)
            assert core.card_can_page(1) is bool(managed and concurrent)
    with pytest.raises(core.CudaError, match="CUDA_ERROR_INVALID_DEVICE"):
        core.card_can_page(2)
    assert driver.calls("cuDevicePrimaryCtxRetain") == 0, "a question makes no context"
    for call in (1, 2):
        driver.fail("cuDeviceGetAttribute", call=call)
        with pytest.raises(core.CudaError, match="cuDeviceGetAttribute failed"):
            core.card_can_page(0)


@on_fake_cards(devices=2, concurrent=0)
def test_a_card_that_cannot_page_gives_no_managed_memory(core, driver):
    """Windows and WSL: the driver refuses the advice; nothing is left behind."""
    with pytest.raises(
        core.CudaError, match=r"managed memory cannot.*cuMemAdvise failed: CUDA_ERR"
    ):
        core.CardMemory.managed(0, 100)
    assert_nothing_left(core, driver)
    assert core.CardMemory.page_locked(0, 100).size == 100
    assert_nothing_left(core, driver)


# --- drivers --------------------------------------------------------------------------------------


@on_fake_cards("-DcuMemAdvise=cuMemAdviseOfAnotherName")
def test_a_driver_without_these_functions_still_launches(core, driver):
    for make in both(core):
        with pytest.raises(
            core.CudaError, match=r"libcuda\.so\.1 has no function cuMemAdvise; it is"
        ):
            make(0, 100)
    assert core.cuda_devices() == [("Fake card 0", 64 * MIB, 90, 10)]
    assert core.card_can_page(0)


def test_without_a_driver_the_error_says_so(tmp_path):
    (tmp_path / "libcuda.so.1").write_text("this is no library")
    code = (
        "from fourbit import _core\n"
        "for make in (_core.CardMemory.managed, _core.CardMemory.page_locked):\n"
        "    try: make(0, 1)\n"
        "    except _core.CudaError as error: print(error)\n"
        "for ask in (_core.card_can_page, _core.card_free_memory):\n"
        "    try: ask(0)\n"
        "    except _core.CudaError as error: print(error)\n"
        "assert _core.card_memory_in_use() == (0, 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(Path(tmp_path)),
        check=True,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith("there is no CUDA driver on this machine")
