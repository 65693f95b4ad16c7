"""The command dynamicvit: what it passes on to the commands behind it."""

import subprocess
import sys

import pytest
from conftest import ONE_THREAD, ROOT, TORCHRUN, launch
from dynamicvit.models import __version__
from dynamicvit.options import OneLineParser
from dynamicvit.tools import cli

import dynamicvit


@pytest.fixture(autouse=True)
def names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OneLineParser, "command", "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_goes_by_the_name_that_was_called(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: dynamicvit {name} ")


def test_version_and_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dynamicvit {__version__}\n"
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_the_package_shows_what_it_has() -> None:
    assert dynamicvit.__version__ == __version__ and "make_dynamic" in dir(dynamicvit)
    with pytest.raises(AttributeError, match="module 'dynamicvit' has no attribute 'make_dynamik'"):
        dynamicvit.make_dynamik  # noqa: B018


def test_wrong_words_are_one_line_and_status_2(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["acelerate"]) == 2
    assert capsys.readouterr().err == "error: no command 'acelerate'; did you mean accelerate?\n"
    assert cli.main(["predict"]) == 2
    assert "required" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_nothing_is_imported_for_the_list_of_commands() -> None:
    code = "import sys; from dynamicvit.tools.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ONE_THREAD).returncode == 0


def test_training_under_torchrun(tmp_path) -> None:
    command = [*TORCHRUN, "--nproc_per_node", "1", "-m", "dynamicvit.tools.cli", "train", "--eval", "--pretrained"]
    result = launch([*command, str(tmp_path / "none.pth")], ONE_THREAD | {"PYTHONPATH": str(ROOT)})
    assert "none.pth" in result.stderr and "Traceback (most recent call last)" not in result.stderr.split("error:")[0]
