"""A spec, a weights file or a module that nobody trusts cannot steer the terminal or a picture with its names."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphopt.cli import main
from graphopt.diff import Diff
from graphopt.diff.render.flowchart import to_dot, to_mermaid
from graphopt.diff.render.page import to_html
from graphopt.diff.render.picture import to_svg
from tests.cli.spec import SPEC
from tests.diff.passes import Ice, Say
from tests.diff.plans import plan

EVIL = "a\x1b]0;owned\x07\x1b[31m\x9b2J\x7f\r\u202eb"
TOML = "a\\u001b]0;owned\\u0007\\u001b[31m\\u009b2J\\u007f\\r\\u202eb"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

#: (what holds the characters, the spec as (old, new), command)
CASES = [
    ("name", ('name = "small"', f'name = "{TOML}"'), ["check", "s.toml"]),
    ("name", ('name = "small"', f'name = "{TOML}"'), ["apply", "s.toml", "--verify", "off"]),
    ("name", ('name = "small"', f'name = "{TOML}"'), ["diff", "s.toml", "--no-costs"]),
    ("name", ('name = "small"', f'name = "{TOML}"'), ["check", "s.toml", "--json"]),
    ("name", ('name = "small"', f'name = "{TOML}"'), ["diff", "s.toml", "--no-costs", "--dot", "-"]),
    ("key", ("epochs = 2", f'epochs = 2\n"{TOML}" = 1'), ["check", "s.toml"]),
    ("weights", ("[[pass]]", f'weights = "{TOML}"\n[[pass]]'), ["check", "s.toml"]),
    ("root", ("[data]", f'[data]\nname = "folder"\nroot = "{TOML}"'), ["check", "s.toml"]),
    ("pass", ('"freeze"', f'"{TOML}"'), ["check", "s.toml"]),
    ("select", ('"conv1"', f'"{TOML}"'), ["check", "s.toml"]),
    ("tensor", ("[[pass]]", 'weights = "evil.safetensors"\n[[pass]]'), ["check", "s.toml"]),
    ("path", None, ["check", f"{EVIL}.toml"]),
]


@pytest.mark.parametrize(("change", "command"), [case[1:] for case in CASES], ids=[f"{c[0]}-{c[2][0]}-{len(c[2])}" for c in CASES])
def test_nothing_reaches_the_terminal(change: tuple[str, str] | None, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if change:
        Path("s.toml").write_text(SPEC.replace(*change, 1))
    save_file({EVIL: torch.zeros(1)}, "evil.safetensors")
    main(command)
    out, err = capsys.readouterr()
    assert "owned" in out + err
    assert not CONTROL.findall(out + err)


def test_module_names_are_harmless_in_a_table_and_a_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = f"super().__init__()\n        self.add_module({EVIL!r}, torch.nn.Linear(4, 2))"
    code = f"import torch\nclass Net(torch.nn.Sequential):\n    def __init__(self):\n        {net}\n"
    (folder / "evil_module.py").write_text(code)
    main(["--debug", "inspect", "python/evil_module:Net", "--input", "4", "--trust"])
    out, err = capsys.readouterr()
    assert "owned" in out + err
    assert not CONTROL.findall(out + err)


def test_warnings_are_one_harmless_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: object, **__: object) -> None:
        warnings.warn(EVIL, UserWarning, stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.spec.load", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["check", "s.toml"]) == 130
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: a\\u001b]0;owned")
    assert not CONTROL.findall(warning)
    assert error == "error: interrupted"


def test_no_picture_holds_control_characters() -> None:
    shown = Diff.of(plan(Ice(select="stem"), Say(select="fc", status="frozen", detail={EVIL: EVIL}), costs=False), None)
    for text in (to_dot(shown), to_mermaid(shown), to_html(shown), to_svg(shown)):
        assert "owned" in text
        assert not CONTROL.findall(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL))
