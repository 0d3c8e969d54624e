"""What is asked of the CUDA driver beside memory, on that of ``fake_driver.c``, without a card.

Nothing here computes. That it also works on a card is shown by the tests marked ``cuda``.
"""

import pytest

import fourbit
from fake_cards import on_fake_cards
from fourbit import _core, nvrtc

MIB = 1 << 20

ARGUMENTS = (4096, 8192, 0, 0, 12288, 1000)  # addresses that no kernel will read


def program(core, device=0):
    return core.CudaProgram("dequantize", device=device, dtype="float32")


def needs_nvrtc(test):
    """Skip a test where there is no NVRTC, and give it an empty cache."""

    def checked(tmp_path_factory, monkeypatch, tmp_path):
        try:
            nvrtc.load()
        except _core.CudaError as error:
            pytest.skip(f"no NVRTC: {error}")
        monkeypatch.setenv("FOURBIT_CACHE_DIR", str(tmp_path))
        test(tmp_path_factory)

    checked.__name__ = test.__name__
    checked.__doc__ = test.__doc__
    checked.on_cards = test.on_cards
    return checked


@on_fake_cards(devices=3, card=48 * MIB)
def test_cards_are_listed(core, driver):
    assert core.cuda_driver_version() == (13, 0)
    assert core.cuda_devices() == [(f"Fake card {i}", 48 * MIB, 90, 10) for i in range(3)]
    for function in (
        "cuDriverGetVersion",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceTotalMem_v2",
        "cuDeviceGetAttribute",
    ):
        driver.fail(function)
        with pytest.raises(core.CudaError, match=f"{function.removesuffix('_v2')} failed"):
            core.cuda_driver_version() and core.cuda_devices()
    assert driver.calls("cuDevicePrimaryCtxRetain") == 0, "a question makes no context"
    assert driver.thread() == (0, 0)
    driver.assert_used_well()


@on_fake_cards(devices=0)
def test_no_card(core, driver):
    assert core.cuda_devices() == []
    with pytest.raises(core.CudaError, match=r"cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        core.card_free_memory(0)


@on_fake_cards(devices=2)
def test_the_doctor_tells_the_cards(core, driver):
    found = {finding.subject: finding.found for finding in fourbit.doctor().findings}
    assert "Fake card 0" in found["GPU 0"]
    assert "compute capability 9.0" in found["GPU 1"]
    assert driver.thread() == (0, 0)
    driver.assert_used_well()


@needs_nvrtc
@on_fake_cards(devices=2)
def test_a_kernel_is_launched_on_its_card_whichever_is_current(core, driver):
    nvrtc.load()
    programs = [program(core, device) for device in (0, 1)]
    assert (programs[1].capability, programs[1].processors) == (90, 10)
    for current in (None, 0, 1):
        if current is not None:
            driver.use(current)
        before = driver.thread()
        driver.record()
        for one in programs:
            one.launch("fourbit_dequantize", 0, ARGUMENTS)
        assert [line.rsplit(" ", 4)[0] for line in driver.record()] == ["launch 0", "launch 1"]
        assert driver.thread() == before
    with pytest.raises(core.CudaError, match="cuDeviceGet failed"):
        program(core, 2)
    driver.assert_used_well()


@needs_nvrtc
@on_fake_cards()
def test_every_call_of_loading_and_launching_may_fail(core, driver):
    nvrtc.load()
    one = program(core)
    contexts = ("cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2")
    exchange = "cuThreadExchangeStreamCaptureMode"
    functions = ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncGetAttribute")
    loading = (*contexts, exchange, *functions, "cuFuncSetAttribute")
    for work, names in [
        (lambda: program(core), ("cuDevicePrimaryCtxRetain", *loading)),
        (
            lambda: one.launch("fourbit_dequantize", 0, ARGUMENTS),
            (*contexts, "cuLaunchKernel"),
        ),
    ]:
        for function in names:
            for call in (1, 2) if function == exchange else (1,):
                driver.fail(function, call=call, code=719)
                with pytest.raises(
                    core.CudaError, match=rf"{function.removesuffix('_v2')} failed: unknown.*719"
                ):
                    work()
                # What itself restores the thread cannot be made up for.
                depth, mode = driver.thread()
                assert depth == (function == "cuCtxPopCurrent_v2")
                assert mode == (2 if (function, call) == (exchange, 2) else 0)
                driver.reset_thread()
        work()
        assert driver.thread() == (0, 0)
    driver.assert_used_well()


@needs_nvrtc
@on_fake_cards()
def test_a_kernel_may_be_loaded_while_a_graph_is_captured(core, driver):
    nvrtc.load()
    driver.capture(0)
    program(core).launch("fourbit_dequantize", 0, ARGUMENTS)
    assert driver.end_capture()
    driver.assert_used_well()
