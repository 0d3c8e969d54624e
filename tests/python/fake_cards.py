"""Tests on a CUDA driver without a card (``fake_driver.c``), each in a process of its own.

The driver's library is opened once in a process, so a test that is to get another one cannot run in
pytest's. ``on_fake_cards`` makes a test of a function that takes the Rust core and the driver's own
controls; what it raises fails the test.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent

CHILD = """
import importlib, sys
module, name = sys.argv[1:]
import fake_cards
from fourbit import _core
getattr(importlib.import_module(module), name).on_cards(_core, fake_cards.Driver())
"""


class Driver:
    """What tests tell the driver without a card, and ask it."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self.library.fake_record.restype = ctypes.c_void_p
        self.library.fake_last_fault.restype = ctypes.c_char_p
        self.library.fake_stream.restype = ctypes.c_size_t
        for name in ("faults", "live_count", "live_bytes", "resident"):
            getattr(self.library, f"fake_{name}").restype = ctypes.c_size_t

    def fail(self, function: str, *, call: int = 1, code: int = 1) -> None:
        """Let a call of a function fail, counted from now; call 0 for none any more."""
        self.library.fake_fail(function.encode(), ctypes.c_long(call), code)

    def calls(self, function: str) -> int:
        return self.library.fake_calls(function.encode())

    def hold(self, function: str = "") -> None:
        """Let calls of a function wait until another is held, or none."""
        self.library.fake_hold(function.encode())

    def holding(self) -> int:
        return self.library.fake_holding()

    def record(self) -> list[str]:
        """What was done since the last look."""
        text = self.library.fake_record()
        lines = ctypes.string_at(text).decode().splitlines()
        self.library.fake_let_go(ctypes.c_void_p(text))
        return lines

    def live(self) -> tuple[int, int]:
        """Pieces of memory, and their bytes."""
        return self.library.fake_live_count(), self.library.fake_live_bytes()

    def thread(self) -> tuple[int, int]:
        """Contexts on this thread's stack, and its capture mode; (0, 0) at first."""
        return self.library.fake_depth(), self.library.fake_mode()

    def reset_thread(self) -> None:
        self.library.fake_reset_thread()

    def capture(self, device: int) -> None:
        """Start to capture a graph on a card."""
        self.library.fake_capture(device)

    def end_capture(self) -> bool:
        """Whether the graph is whole."""
        return not self.library.fake_capture(-1)

    def at_work(self, device: int) -> None:
        self.library.fake_at_work(device)

    def reserve(self, device: int, size: int) -> None:
        """So many bytes of a card are somebody else's."""
        self.library.fake_reserve(device, ctypes.c_size_t(size))

    def resident(self, device: int) -> int:
        """Bytes of managed memory that are on a card."""
        return self.library.fake_resident(device)

    def stream(self) -> int:
        return self.library.fake_stream()

    def use(self, device: int) -> None:
        """Make a card's context current for this thread, as torch does."""
        self.library.fake_use(device)

    def assert_used_well(self) -> None:
        faults = self.library.fake_faults()
        assert faults == 0, f"{faults} misuses; the last: {self.library.fake_last_fault().decode()}"


#: Folders of compiled drivers, by the options.
_compiled: dict[tuple[str, ...], Path] = {}


def compiled(factory: pytest.TempPathFactory, *options: str) -> Path:
    """The folder of a compiled driver."""
    if options in _compiled:
        return _compiled[options]
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("a driver without a card takes Linux and a C compiler")
    folder = factory.mktemp("driver")
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    command = ["cc", "-shared", "-fPIC", "-O1", "-pthread", "-fvisibility=hidden", *warnings]
    library = ["-o", str(folder / "libcuda.so.1"), str(HERE / "fake_driver.c")]
    subprocess.run([*command, *options, *library], check=True)
    _compiled[options] = folder
    return folder


def environment(folder: Path, **settings: object) -> dict[str, str]:
    """That of a process whose driver is in a folder; settings as in the C file."""
    paths = [str(HERE), str(HERE.parents[1] / "tests" / "kernels"), *filter(None, sys.path)]
    return os.environ | {
        "LD_LIBRARY_PATH": os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")]),
        "PYTHONPATH": os.pathsep.join(paths),
        **{f"FAKE_CUDA_{name.upper()}": str(value) for name, value in settings.items()},
    }


def on_fake_cards(
    *options: str, **settings: object
) -> Callable[[Callable[[ModuleType, Driver], None]], Callable[..., None]]:
    """Make a test of what is to run on a driver without a card, compiled with options."""

    def decorate(on_cards: Callable[[ModuleType, Driver], None]) -> Callable[..., None]:
        def test(tmp_path_factory: pytest.TempPathFactory) -> None:
            folder = compiled(tmp_path_factory, *options)
            done = subprocess.run(
                [sys.executable, "-c", CHILD, on_cards.__module__, on_cards.__name__],
                env=environment(folder, **settings),
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

        test.__name__ = on_cards.__name__
        test.__doc__ = on_cards.__doc__
        test.on_cards = on_cards
        return test

    return decorate
