"""Memory for a card where calls of the driver fail, or a graph is captured. No GPU is needed.

As in ``test_card_memory.py``, on the driver of ``fake_driver.c``.
"""

import contextlib
import random

import pytest

from fake_cards import on_fake_cards
from test_card_memory import GLOBAL, LAUNCH_FAILED, MIB, assert_nothing_left, both

RELAXED = 2

WAITED = ("cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuThreadExchangeStreamCaptureMode")


def made(core, make):
    """Memory, or what the error says."""
    try:
        return make(0, 100), None
    except core.CudaError as error:
        return None, str(error)


@on_fake_cards(devices=2)
def test_every_call_of_an_allocation_may_fail(core, driver):
    named = [
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuDeviceGetAttribute",
        *WAITED,
        "cuCtxPopCurrent_v2",
    ]
    for make, own in [
        (core.CardMemory.managed, ("cuMemAllocManaged", "cuMemAdvise")),
        (core.CardMemory.page_locked, ("cuMemHostAlloc",)),
    ]:
        for current in (None, 1):
            failed = {}
            for function in [*named, *own]:
                for call in range(1, 20):
                    if current is not None:
                        driver.use(current)
                    before = driver.thread()
                    driver.fail(function, call=call, code=999)
                    counted = driver.calls(function)
                    memory, error = made(core, make)
                    if memory is not None:
                        assert driver.calls(function) - counted < call
                        driver.fail(function, call=0)
                        del memory
                        break
                    failed[function] = call
                    assert f"{function.removesuffix('_v2')} failed: unknown" in error
                    if function in (*WAITED, *own, "cuCtxPopCurrent_v2"):
                        assert "100 bytes of " in error
                        assert "cannot be had for GPU 0" in error
                    assert_nothing_left(core, driver)
                    # What itself restores the thread cannot be made up for.
                    depth, mode = driver.thread()
                    assert depth == before[0] + (function == "cuCtxPopCurrent_v2")
                    restores = function == "cuThreadExchangeStreamCaptureMode" and call > 1
                    assert mode == (RELAXED if restores else GLOBAL)
                    driver.reset_thread()
                else:
                    raise AssertionError(f"{function} was called 20 times")
                driver.reset_thread()
            expected = dict.fromkeys([*named, *own], 1) | {"cuDeviceGetAttribute": 4}
            expected["cuThreadExchangeStreamCaptureMode"] = 2
            if "cuMemAdvise" in own:
                expected["cuMemAdvise"] = 2
            assert failed == expected
    assert_nothing_left(core, driver)


@on_fake_cards()
def test_what_cannot_be_waited_for_is_freed_later(core, driver):
    for make in both(core):
        for later in ("allocation", "drop"):
            for function in (*WAITED, "cuCtxSynchronize"):
                memory, other = make(0, 100), make(0, 7)
                driver.fail(function)
                del memory
                assert core.card_memory_in_use() == driver.live() == (2, 107)
                assert driver.thread() == (0, GLOBAL)
                if later == "allocation":
                    other = (other, make(0, 3))
                    assert core.card_memory_in_use() == driver.live() == (2, 10)
                del other
                assert_nothing_left(core, driver)


@on_fake_cards()
def test_a_failed_free_counts_and_is_not_tried_again(core, driver):
    """The address may be somebody else's by then."""
    for make, function in zip(both(core), ("cuMemFree_v2", "cuMemFreeHost"), strict=True):
        before = core.card_memory_in_use()
        memory = make(0, 100)
        driver.fail(function, code=LAUNCH_FAILED)
        del memory
        assert driver.thread() == (0, GLOBAL)
        calls = driver.calls(function)
        for _ in range(3):
            other = make(0, 5)
            del other
        assert driver.calls(function) == calls + 3
        assert core.card_memory_in_use() == driver.live() == (before[0] + 1, before[1] + 100)
    driver.assert_used_well()


@on_fake_cards()
def test_what_fails_after_the_memory_is_freed_changes_nothing(core, driver):
    for make in both(core):
        for function, call in [("cuThreadExchangeStreamCaptureMode", 2), ("cuCtxPopCurrent_v2", 1)]:
            memory = make(0, 100)
            driver.fail(function, call=call)
            del memory
            driver.reset_thread()
            assert_nothing_left(core, driver)


@on_fake_cards()
def test_free_memory_may_fail(core, driver):
    for function in ("cuMemGetInfo_v2", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"):
        driver.fail(function)
        with pytest.raises(core.CudaError, match=f"{function.removesuffix('_v2')} failed"):
            core.card_free_memory(0)
        driver.reset_thread()
    assert core.card_free_memory(0) == (64 * MIB, 64 * MIB)


@on_fake_cards(devices=2)
def test_memory_comes_and_goes_while_another_card_captures(core, driver):
    driver.capture(1)
    for make in both(core):
        memory = make(0, 100)
        del memory
        assert_nothing_left(core, driver)
    assert driver.end_capture()


@on_fake_cards()
def test_what_is_let_go_while_its_card_captures_is_freed_afterwards(core, driver):
    before = [make(0, 100) for make in both(core)]
    driver.capture(0)
    during = [make(0, 10) for make in both(core)]
    assert driver.end_capture(), "an allocation broke the capture"
    driver.capture(0)
    before.clear()
    # The card cannot be waited for: the memory is not pulled from under its kernels.
    assert core.card_memory_in_use() == driver.live() == (4, 220)
    driver.end_capture()
    during.clear()
    assert_nothing_left(core, driver)


@on_fake_cards(devices=2, card=MIB)
def test_any_order_of_things(core, driver):
    """Random schedules with failures: counts agree with the driver's, and nothing is misused."""
    functions = [
        *WAITED,
        "cuMemAllocManaged",
        "cuMemAdvise",
        "cuMemHostAlloc",
        "cuMemPrefetchAsync",
    ]
    for seed in range(40):
        random_schedule(core, driver, random.Random(seed), functions)
        for function in functions:
            driver.fail(function, call=0)
        driver.assert_used_well()
        # What could not be waited for goes with the next.
        core.CardMemory.managed(0, 1)
        assert_nothing_left(core, driver)


def random_schedule(core, driver, draw, functions):
    pieces = []
    for _ in range(120):
        if draw.random() < 0.1:
            driver.fail(draw.choice(functions), call=draw.randrange(1, 4))
        managed = [piece for piece in pieces if piece.kind == "managed"]
        with contextlib.suppress(core.CudaError):
            match draw.choice(["make", "make", "drop", "move", "move"]):
                case "make":
                    make = draw.choice(both(core))
                    pieces.append(make(draw.randrange(2), draw.randrange(1, MIB // 2)))
                case "drop" if pieces:
                    del managed  # or it would keep what is dropped
                    del pieces[draw.randrange(len(pieces))]
                case "move" if managed:
                    memory = draw.choice(managed)
                    offset = draw.randrange(memory.size)
                    size = draw.randrange(memory.size - offset + 1)
                    memory.prefetch(offset, size, to_card=draw.random() < 0.7, stream=0)
                    del memory
        assert core.card_memory_in_use() == driver.live()
        assert driver.live()[0] >= len(pieces)
        assert driver.live()[1] >= sum(piece.size for piece in pieces)
        assert driver.resident(0) <= MIB
        assert driver.resident(1) <= MIB
        driver.reset_thread()  # where a call failed that restores it
