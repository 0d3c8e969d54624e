"""The README's examples run as they stand, one after the other."""

import re

from conftest import REPOSITORY


def test_every_python_example_runs(tmp_path, monkeypatch):
    text = (REPOSITORY / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    # Examples write next to themselves and read from the repository.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, example {number + 1}", "exec"), namespace)
    for folder in ("tiny-4bit", "adapter", "merged", "network-4bit"):
        assert (tmp_path / folder).is_dir()
