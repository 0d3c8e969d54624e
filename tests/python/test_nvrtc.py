"""Every kernel is compiled by torch's own NVRTC for every architecture; no GPU is needed.

The table of registers and shared memory is printed and written to ``target/kernel-resources.md``;
that of all specialisations is kept in ``cuda/RESOURCES.md``.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import resources
from fourbit import _core, nvrtc

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "cuda" / "RESOURCES.md"


@pytest.fixture(autouse=True)
def _compiler():
    try:
        nvrtc.load()
    except _core.CudaError as error:
        pytest.skip(f"no NVRTC: {error}")


def kernels(wanted: str, target: int) -> set[str]:
    """What a file holds for an architecture."""
    return {
        name
        for file, dtypes, _, of_file in _core.kernel_register()
        for name, oldest, _ in of_file
        if file == wanted and max(oldest, min(oldest for _, oldest in dtypes)) <= target
    }


def registered() -> set[tuple[str, int]]:
    """Every kernel with every architecture that it is compiled for."""
    files = [file for file, *_ in _core.kernel_register()]
    return {(name, t) for t in resources.TARGETS for file in files for name in kernels(file, t)}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_kernel_spills_on_any_architecture(every, capsys):
    found = resources.all_usages(every=every)
    table = resources.table(found)
    with capsys.disabled():
        print(f"\n{table}")
    (ROOT / "target").mkdir(exist_ok=True)
    (ROOT / "target" / "kernel-resources.md").write_text(table)
    compiled = {(usage.kernel, usage.request.capability) for usage in found}
    assert compiled == registered()
    assert [usage for usage in found if usage.spill_bytes or usage.stack_bytes] == []
    # More would not fit a block of 256 threads twice into a multiprocessor's 65536.
    assert [usage for usage in found if usage.registers > 128] == []
    assert [usage for usage in found if usage.shared_bytes > 48 << 10] == []
    made_by, kept = resources.read(KEPT.read_text())
    if made_by == resources.compiler():
        for key, cells in resources.rows_of(found).items():
            of_kept = {target: kept[key].get(target) for target in cells}
            assert cells == of_kept, f"{key}: make cuda/RESOURCES.md again, as its head says"


def test_the_kept_table_has_every_kernel_and_no_spill():
    _, kept = resources.read(KEPT.read_text())
    assert {(key[0], target) for key, cells in kept.items() for target in cells} == registered()
    for request in resources.requests(every=True):
        double = "yes" if request.double_quant else "no"
        key = (request.dtype, str(request.block_size), str(request.code_bits), double)
        names = {
            row[0] for row, cells in kept.items() if row[1:] == key and request.capability in cells
        }
        assert names >= kernels(request.file, request.capability), request
    assert not [key for key, cells in kept.items() if any("*" in cell for cell in cells.values())]


def cuobjdump() -> str:
    """NVIDIA's tool, on the path or as triton brings it."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton", reason="cuobjdump comes with triton")
        found = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
        if not Path(found).exists():
            pytest.skip("this triton brings no cuobjdump")
    return found


def test_the_log_says_what_the_machine_code_says(tmp_path):
    tool = cuobjdump()
    request = resources.Request("adamw", 90, "float32")
    cubin, log = request.compiled()
    (tmp_path / "adamw.cubin").write_bytes(cubin)
    printed = subprocess.run(
        [tool, "-res-usage", str(tmp_path / "adamw.cubin")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    told = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", printed)
    in_code = {name: (int(registers), int(stack)) for name, registers, stack, _ in told}
    in_log = {u.kernel: (u.registers, u.stack_bytes) for u in resources.usages(request, log)}
    assert in_code == in_log


def test_what_cannot_be_compiled_is_named():
    with pytest.raises(_core.CudaError, match=r"quantize: it needs a card.*7\.5.*has 7\.0"):
        _core.compile_kernel("quantize", capability=70, dtype="float32")
    with pytest.raises(_core.CudaError, match=r"adamw: there is none for bfloat16"):
        _core.compile_kernel("adamw", capability=80, dtype="bfloat16")
    with pytest.raises(ValueError, match="no kernel file is named"):
        _core.compile_kernel("fft", capability=80, dtype="float32")


def test_a_card_newer_than_the_compiler_is_given_what_its_driver_can_compile():
    newest, _ = _core.compile_kernel("dequantize", capability=999, dtype="float32")
    assert re.search(rb"\.version.*\.target sm_\d+.*\.entry fourbit_dequantize", newest, re.DOTALL)
    assert newest.endswith(b"\0")
    code, _ = _core.compile_kernel("dequantize", capability=87, dtype="float32")
    assert code.startswith(b"\x7fELF")


# Of all functions that are looked up, those that matter here.
FAKE_NVRTC = """
#include <stddef.h>
#include <string.h>
static const char LOG[] = "error: no such thing";
int nvrtcVersion(int *major, int *minor) { *major = MAJOR; *minor = 8; return 0; }
int nvrtcGetNumSupportedArchs(int *count) { *count = 2; return 0; }
int nvrtcGetSupportedArchs(int *found) { found[0] = 90; found[1] = 80; return 0; }
int nvrtcCreateProgram(void **p, const char *a, const char *b, int c, void *d, void *e) {
    *p = p; return 0;
}
int nvrtcCompileProgram(void *p, int count, const char *const *options) { return 6; }
int nvrtcDestroyProgram(void **p) { return 0; }
int nvrtcGetProgramLogSize(void *p, size_t *size) { *size = sizeof LOG; return 0; }
int nvrtcGetProgramLog(void *p, char *log) { memcpy(log, LOG, sizeof LOG); return 0; }
int nvrtcGetCUBINSize(void *p, size_t *size) { return 1; }
int nvrtcGetCUBIN(void *p, char *image) { return 1; }
int nvrtcGetPTXSize(void *p, size_t *size) { return 1; }
int nvrtcGetPTX(void *p, char *image) { return 1; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler cc")
def test_what_the_compiler_refuses_is_told(monkeypatch, tmp_path):
    said = {}
    for major in (11, 13):
        library = tmp_path / f"libnvrtc.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-DMAJOR={major}", "-x", "c", "-", "-o", str(library)]
        subprocess.run(command, input=FAKE_NVRTC, check=True, text=True)
        code = (
            "from fourbit import _core, nvrtc\n"
            "try:\n"
            "    nvrtc.load()\n"
            "    _core.compile_kernel('quantize', capability=89, dtype='float32')\n"
            "except _core.CudaError as error: print(error)"
        )
        said[major] = in_fresh_process(code, **environment(monkeypatch, FOURBIT_NVRTC=str(library)))
    assert "it is of CUDA 11.8, and the kernels need CUDA 12 or later" in said[11]
    assert said[13] == (
        "kernel file quantize does not compile for sm_80 with NVRTC 13.8: error: no such thing"
    )


def in_fresh_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def environment(monkeypatch, **changes: str) -> dict[str, str]:
    import os

    return {**os.environ, **changes}


def test_it_is_found_without_torch_being_imported(monkeypatch):
    code = (
        "import sys\n"
        "from fourbit import nvrtc\n"
        "path, version = nvrtc.load()\n"
        "assert 'torch' not in sys.modules\n"
        "print(path, *version)"
    )
    path, major, _ = in_fresh_process(code, **environment(monkeypatch)).rsplit(" ", 2)
    cuda = nvrtc.torch_cuda()
    if cuda is not None:
        assert major == cuda.partition(".")[0]
    assert Path(path) == nvrtc.load()[0]


def test_where_it_is_missing_the_error_says_where_it_was_looked_for(monkeypatch, tmp_path):
    code = (
        "from fourbit import _core, nvrtc\n"
        "try: nvrtc.load()\n"
        "except _core.CudaError as error: print(error)"
    )
    missing = str(tmp_path / "libnvrtc.so")
    said = in_fresh_process(code, **environment(monkeypatch, FOURBIT_NVRTC=missing))
    assert missing in said
    assert "FOURBIT_NVRTC" in said
    assert "CUDA build of torch" in said
    # A library that is something else.
    other = _core.__file__
    said = in_fresh_process(code, **environment(monkeypatch, FOURBIT_NVRTC=other))
    assert "has no function nvrtcVersion" in said


def test_that_of_a_newer_cuda_than_torchs_is_not_taken(monkeypatch):
    monkeypatch.delenv("FOURBIT_NVRTC", raising=False)
    _, (major, _) = nvrtc.load()
    monkeypatch.setattr(nvrtc, "torch_cuda", lambda: f"{major - 1}.9")
    with pytest.raises(_core.CudaError, match=rf"is newer than CUDA {major - 1}\.9.*FOURBIT_NVRTC"):
        nvrtc.load()
    for older in (f"{major}.0", f"{major + 1}.0", None):
        monkeypatch.setattr(nvrtc, "torch_cuda", lambda older=older: older)
        nvrtc.load()


def test_where_none_is_found_the_error_is_one_sentence(monkeypatch):
    from cuda import pathfinder

    def fails(name):
        raise pathfinder.DynamicLibNotFoundError(f"no {name} here\n  looked there\n  and there")

    monkeypatch.delenv("FOURBIT_NVRTC", raising=False)
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", fails)
    with pytest.raises(
        _core.CudaError, match=r"was not found \(no nvrtc here\); install a CUDA bu"
    ):
        nvrtc.load()


@pytest.mark.parametrize(
    ("file", "major"),
    [("libnvrtc.so.13", 13), ("libnvrtc.so.12.8.93", 12), ("nvrtc64_130_0.dll", 13), ("x.so", 0)],
)
def test_the_version_is_in_the_name(file, major):
    assert nvrtc._major(f"/some/folder.so.7/{file}") == major
