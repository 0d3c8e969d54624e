"""Graphs, streams, devices and the cache of compiled kernels. How to run: see ``on_card.py``."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fourbit
from fourbit import _core, cuda_ops, nvrtc, ops
from on_card import (
    CARD,
    LONG_SLEEP_CYCLES,
    assert_product,
    assert_same_bytes,
    assert_same_parts,
    captured,
    layer,
    numbers,
    watched_synchronisations,
)

pytestmark = pytest.mark.cuda

# One for the matrix-vector kernel, one for tensor cores, one for the decoded weight.
ROWS = (1, 16, 128)
FROM_CODES = (1, 16, 64)


def bfloat16(*shape, seed=7):
    return numbers(*shape, dtype=torch.bfloat16, seed=seed)


# --- CUDA graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
def test_a_graph_follows_its_input(rows):
    on_card, on_cpu = layer(384, 1056)
    dense = on_cpu.dequantize(torch.bfloat16)
    x = bfloat16(rows, 1056).to(CARD)
    with torch.no_grad():
        graph, output = captured(lambda: on_card(x))
    for seed in (1, 2, 3):
        new = bfloat16(rows, 1056, seed=seed)
        x.copy_(new)
        graph.replay()
        assert_product(output, new, dense.T, on_cpu.bias)
        if rows in FROM_CODES:
            assert_same_bytes(output, on_card(x).cpu())


def test_a_graph_whose_sums_are_cut_into_parts_is_replayed_many_times():
    """The counters of arrived parts must start anew each time."""
    on_card, on_cpu = layer(48, 8192, bias=False)
    x = bfloat16(16, 8192)
    x_card = x.to(CARD)
    with torch.no_grad():
        graph, output = captured(lambda: on_card(x_card))
    graph.replay()
    assert_product(output, x, on_cpu.dequantize(torch.bfloat16).T, None)
    first = output.clone()
    for _ in range(50):
        output.zero_()
        graph.replay()
        assert torch.equal(output, first)


def test_a_graph_of_forward_and_backward():
    on_card, on_cpu = layer(384, 1056, bias=False)
    dense = on_cpu.dequantize(torch.bfloat16)
    gradient = bfloat16(16, 384, seed=9)
    x, gradient_card = bfloat16(16, 1056).to(CARD).requires_grad_(), gradient.to(CARD)
    graph, grad_x = captured(lambda: torch.autograd.grad(on_card(x), x, gradient_card)[0])
    new = bfloat16(16, 384, seed=10)
    gradient_card.copy_(new)
    graph.replay()
    assert_product(grad_x, new, dense, None)


def test_kernels_that_are_first_used_in_a_capture():
    """They are compiled and loaded there and then, which a capture forbids unless asked well."""
    on_card, on_cpu = layer(96, 160, bias=False, block_size=128)
    x = bfloat16(2, 160)
    x_card = x.to(CARD)
    cuda_ops._program.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = on_card(x_card)
        decoded = on_card.dequantize()
    graph.replay()
    assert_product(output, x, on_cpu.dequantize(torch.bfloat16).T, None)
    assert_same_bytes(decoded, on_cpu.dequantize())


def test_dequantize_is_captured_and_quantize_refuses():
    w = bfloat16(48, 96).to(CARD)
    quantized = fourbit.quantize(w)
    graph, decoded = captured(quantized.dequantize)
    graph.replay()
    assert_same_bytes(decoded, fourbit.quantize(w.cpu()).dequantize())
    scales = quantized.scales()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match=r"quantize looks at its result.*before the capture"):
            fourbit.quantize(w)
        with pytest.raises(RuntimeError, match="quantize_absmax looks at its result"):
            ops.quantize_absmax(scales)
        doubled = w * 2
    # The capture goes on as if nothing had been asked.
    graph.replay()
    assert_same_bytes(doubled, w.cpu() * 2)


# --- streams --------------------------------------------------------------------------------------


def behind_a_sleep(work):
    """What `work` returns on a stream that was still busy when all of it had been queued."""
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG_SLEEP_CYCLES)
        result = work()
        assert not side.query(), "the sleep was too short to show anything"
    side.synchronize()
    return result


@pytest.mark.parametrize("rows", ROWS)
def test_products_run_on_the_current_stream(rows):
    on_card, on_cpu = layer(384, 1056)
    new = bfloat16(rows, 1056)
    source, x = new.to(CARD), torch.zeros(rows, 1056, dtype=torch.bfloat16, device=CARD)
    with torch.no_grad():
        on_card(x)  # compiled before the clock runs

        def work():
            x.copy_(source)  # what would be read too early on any other stream
            return on_card(x)

        output = behind_a_sleep(work)
    assert_product(output, new, on_cpu.dequantize(torch.bfloat16).T, on_cpu.bias)


def test_decoding_and_backward_run_on_the_current_stream():
    on_card, on_cpu = layer(384, 1056, bias=False)
    dense = on_cpu.dequantize(torch.bfloat16)
    gradient = bfloat16(16, 384)
    source, target = gradient.to(CARD), torch.zeros(16, 384, dtype=torch.bfloat16, device=CARD)
    x = bfloat16(16, 1056).to(CARD).requires_grad_()
    real = on_card.weight.detach().clone()
    on_card.weight.data.zero_()

    def work():
        on_card.weight.data.copy_(real)
        target.copy_(source)
        return on_card.dequantize(), torch.autograd.grad(on_card(x), x, target)[0]

    work()
    target.zero_()
    on_card.weight.data.zero_()
    decoded, grad_x = behind_a_sleep(work)
    assert_same_bytes(decoded, dense)
    assert_product(grad_x, gradient, dense, None)


def test_quantize_runs_on_the_current_stream():
    """It waits for its own result, so the stream is idle when it returns."""
    w = bfloat16(300, 301)
    source, target = w.to(CARD), torch.zeros(300, 301, dtype=torch.bfloat16, device=CARD)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG_SLEEP_CYCLES)
        target.copy_(source)
        quantized = fourbit.quantize(target)
    side.synchronize()
    assert_same_parts(quantized, fourbit.quantize(w))


@pytest.mark.parametrize("rows", FROM_CODES)
def test_two_streams_share_a_weight(rows):
    on_card, _ = layer(48, 8192)
    inputs = [bfloat16(rows, 8192, seed=seed).to(CARD) for seed in (1, 2)]
    streams = [torch.cuda.Stream() for _ in inputs]
    with torch.no_grad():
        expected = [on_card(x) for x in inputs]
        torch.cuda.synchronize()
        outputs = [[], []]
        for _ in range(50):
            for stream, x, kept in zip(streams, inputs, outputs, strict=True):
                with torch.cuda.stream(stream):
                    kept.append(on_card(x))
        torch.cuda.synchronize()
    for kept, right in zip(outputs, expected, strict=True):
        assert all(torch.equal(output, right) for output in kept)


@pytest.mark.parametrize("rows", FROM_CODES)
def test_two_threads_share_a_weight(rows):
    on_card, _ = layer(384, 1056)
    x = bfloat16(rows, 1056).to(CARD)
    with torch.no_grad():
        expected = on_card(x)
    torch.cuda.synchronize()

    def work(_):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            outputs = [on_card(x) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        return outputs

    with ThreadPoolExecutor(2) as pool:
        for outputs in pool.map(work, range(2)):
            assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("rows", ROWS)
def test_products_do_not_wait_for_the_card(rows):
    on_card, _ = layer(384, 1056)
    x = bfloat16(rows, 1056).to(CARD).requires_grad_()
    gradient = bfloat16(rows, 384).to(CARD)

    def work():
        torch.autograd.grad(on_card(x), x, gradient)
        on_card.dequantize()

    work()
    with watched_synchronisations() as found:
        work()
    assert found == []
    with watched_synchronisations() as found:
        gradient.sum().item()
    assert found, "torch no longer reports what it waits for, and this test shows nothing"


# --- devices --------------------------------------------------------------------------------------


def second_card():
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees no second CUDA device")
    return torch.device("cuda", 1)


def test_a_second_card():
    """Without being made the current device."""
    other = second_card()
    on_card, on_cpu = layer(384, 1056)
    there = fourbit.Linear4bit.from_quantized(
        fourbit.quantize(numbers(384, 1056, dtype=torch.bfloat16).to(other)),
        bias=on_cpu.bias.detach().to(other),
    )
    assert torch.cuda.current_device() == CARD.index
    for ours, expected in zip(there.quantized()._parts(), on_cpu.quantized()._parts(), strict=True):
        assert torch.equal(ours.cpu(), expected)
    dense = on_cpu.dequantize(torch.bfloat16)
    for rows in ROWS:
        x = bfloat16(rows, 1056)
        with torch.no_grad():
            output = there(x.to(other))
            assert output.device == other
            assert_product(output.to(CARD), x, dense.T, on_cpu.bias)
            assert_product(on_card(x.to(CARD)), x, dense.T, on_cpu.bias)
    params = [torch.nn.Parameter(bfloat16(70, 80).to(device)) for device in (CARD, other)]
    optimizer = fourbit.PagedAdamW(params)
    for param in params:
        param.grad = bfloat16(70, 80, seed=9).to(param.device)
    optimizer.step()
    assert torch.equal(params[0].cpu(), params[1].cpu())


def test_operands_on_two_cards_are_refused_by_name():
    other = second_card()
    on_card, _ = layer(48, 96)
    with pytest.raises(RuntimeError, match=f"input is on {other} and the layer on {CARD}"):
        on_card(bfloat16(2, 96).to(other))
    quantized = on_card.quantized()
    layout = ("nf4", 64, (48, 96), torch.bfloat16)
    packed, absmax, *nested = quantized._parts()
    with pytest.raises(RuntimeError, match=f"absmax is on {other} and the codes are on {CARD}"):
        ops.dequantize(packed, absmax.to(other), *nested, *layout)


# --- compiled kernels -----------------------------------------------------------------------------

CHILD = """
import torch
import fourbit

dense = torch.nn.Linear(64, 64, dtype=torch.bfloat16, device="cuda")
layer = fourbit.Linear4bit.from_linear(dense)
x = torch.ones(100, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
for rows in (1, 16, 100):
    layer(x[:rows]).sum().backward()
fourbit.PagedAdamW([x]).step()
torch.cuda.synchronize()
"""


def test_a_second_process_compiles_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    monkeypatch.setenv("FOURBIT_CACHE_DIR", str(folder))

    def entries():
        subprocess.run([sys.executable, "-c", CHILD], check=True, env=os.environ)
        # A kernel that is compiled again is put in the entry's place, as a new file.
        status = {path.name: path.stat() for path in folder.iterdir()}
        return {name: (entry.st_ino, entry.st_mtime_ns) for name, entry in status.items()}

    first = entries()
    assert {name.partition("-")[0] for name in first} >= {"quantize", "double_quant", "adamw"}
    assert entries() == first
    nvrtc.load()
    capability = _core.cuda_devices()[0][2]
    _, cached = _core.build_kernel("quantize", capability=capability, dtype="bfloat16")
    assert cached
    assert entries() == first
