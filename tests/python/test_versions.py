"""Which versions of other libraries are supported, and that the core needs none of them.

The rest of the tests shows that the newest versions work; ``tests/oldest.sh`` runs those that
``tests/oldest.txt`` names, these among them, on the oldest.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import fourbit
from conftest import REPOSITORY
from fourbit import diagnosis
from fourbit.experts import quantize_experts, set_experts
from fourbit.integrations import on_import, versions
from fourbit.integrations.versions import SUPPORTED, installed, is_too_old, is_untried, require
from lora_models import llama
from moe_models import moe
from test_trainers import losses, trained, trainer

LIBRARIES = [name for name in SUPPORTED if name != "torch"]

CORE = """
import importlib.abc, sys
from pathlib import Path

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Nothing())
import torch
from torch import nn
import fourbit

base, folder = Path(sys.argv[1]), Path(sys.argv[2])
q = fourbit.quantize(torch.randn(64, 64))
assert q.dequantize().shape == (64, 64)
fourbit.convert(base, folder / "converted")
assert fourbit.verify(folder / "converted").checksums

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8))

model = fourbit.quantize_model(network())
fourbit.prepare_for_training(model, gradient_checkpointing=False)
assert isinstance(model[0], fourbit.Linear4bit)
fourbit.save(model, folder / "saved")
fourbit.add_lora(model, r=4, target_modules=["0", "2"])
optimizer = fourbit.PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
x = torch.randn(16, 64)
losses = []
for _ in range(5):
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0]
fourbit.save_adapter(model, folder / "adapter")
fourbit.save_optimizer(optimizer, folder / "optimizer.safetensors")
twin = fourbit.load_adapter(fourbit.load(network(), folder / "saved"), folder / "adapter")
model.eval(), twin.eval()
assert torch.equal(twin(x), model(x))
fourbit.merge(twin)
fourbit.unmerge(twin)
assert torch.equal(twin(x), model(x))
fourbit.export_merged(model, folder / "merged")
assert fourbit.doctor().findings
try:
    fourbit.from_pretrained(folder / "converted")
except ImportError as error:
    assert 'pip install "fourbit[hf]"' in str(error), error
else:
    raise AssertionError("a model of transformers without transformers")
assert not {names} & set(sys.modules)
"""


def test_the_core_works_alone(tmp_path: Path) -> None:
    others = {"transformers", "peft", "trl", "accelerate", "datasets", "tokenizers"}
    others |= {"huggingface_hub", "bitsandbytes", "typer", "rich", "matplotlib", "tensorboard"}
    base = REPOSITORY / "examples" / "base_model"
    code = CORE.format(names=others)
    command = [sys.executable, "-c", code, str(base), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pip_is_asked_for_the_oldest_versions() -> None:
    asked = (REPOSITORY / "pyproject.toml").read_text()
    for name, known in SUPPORTED.items():
        assert re.findall(rf'"{name}>=([\d.]+)"', asked) == [known.oldest]


def test_the_libraries_here_are_the_oldest_or_the_newest() -> None:
    """What a pass of these tests says is said of one of the two, and not of a mixture."""
    here = {name: str(installed(name)) for name in LIBRARIES}
    oldest = [here[name].startswith(f"{SUPPORTED[name].oldest}.") for name in LIBRARIES]
    newest = [not is_too_old_for_newest(name, version) for name, version in here.items()]
    assert all(oldest) or all(newest), here


def is_too_old_for_newest(name: str, version: str) -> bool:
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    return numbers < [int(part) for part in SUPPORTED[name].newest.split(".")]


def test_every_test_for_the_oldest_versions_exists() -> None:
    for line in (REPOSITORY / "tests" / "oldest.txt").read_text().splitlines():
        path, _, name = line.partition("::")
        assert f"\ndef {name}(" in (REPOSITORY / path).read_text() or not name, line


@pytest.mark.parametrize(
    ("version", "too_old", "untried"),
    [
        ("5.5.4", True, False),
        ("4.57.6", True, False),
        ("5.6.0", False, False),
        ("5.6.0.dev0", False, False),
        ("5.23.7", False, False),
        ("5.24.0", False, True),
        ("6.0.0rc1", False, True),
    ],
)
def test_versions_are_compared_as_numbers(
    version: str, too_old: bool, untried: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_too_old("transformers", version) == too_old
    assert is_untried("transformers", version) == untried
    monkeypatch.setattr(versions, "installed", lambda name: version)
    monkeypatch.setattr(diagnosis, "installed", lambda name: version)
    (found,) = (f for f in fourbit.doctor().findings if f.subject == "transformers")
    assert found.found.startswith(version)
    assert (found.status == "broken") == too_old
    assert ("newer than" in found.found) == untried
    if not too_old:
        require("transformers")
        return
    assert "pip install --upgrade transformers" in str(found.advice)
    with pytest.raises(ImportError, match=rf"transformers {re.escape(version)} is too old.*5\.6"):
        require("transformers")
    # What is imported works without us, and says why we are not there.
    with pytest.warns(UserWarning, match="not registered with transformers.*too old"):
        on_import._register("transformers.quantizers.auto")


def test_what_needs_a_later_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda name: "0.20.0")
    model = moe("Mixtral")
    for name, module in model.named_modules():
        if name.endswith("experts"):
            quantized = quantize_experts(module.down_proj.data)
            set_experts(module, "down_proj", quantized)
    config = peft.LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
    with pytest.raises(ImportError, match=r"peft 0\.20\.0 is too old for target_param.*: 0\.21"):
        peft.get_peft_model(model, config)


def test_other_methods_of_peft_that_need_a_later_version_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(versions, "installed", lambda name: "0.20.0")
    model = fourbit.quantize_model(llama(torch.float32))
    with pytest.raises(ImportError, match=r"peft 0\.20\.0 is too old for methods of PEFT other"):
        peft.get_peft_model(model, peft.IA3Config(target_modules=["q_proj"]))


def test_a_short_run_of_sfttrainer(plain_folder: Path, tmp_path: Path) -> None:
    """Quantized on the fly, trained with PEFT, saved, and loaded by PEFT."""
    run: Any = trainer("config", plain_folder, tmp_path)
    base = {n: p.clone() for n, p in run.model.named_parameters() if p.dtype == torch.uint8}
    run.train()
    assert len(losses(run)) == 2
    for name, part in run.model.named_parameters():
        assert name not in base or torch.equal(part, base[name])
    run.model.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        plain_folder, quantization_config=fourbit.NF4Config(), dtype=torch.bfloat16
    )
    loaded = dict(peft.PeftModel.from_pretrained(again, tmp_path / "adapter").named_parameters())
    assert {name for name in loaded if ".lora_" in name} == trained(run).keys()
    for name, part in {**trained(run), **base}.items():
        assert torch.equal(loaded[name], part), name
