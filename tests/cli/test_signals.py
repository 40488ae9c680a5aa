"""What stops a command or a script: ctrl-C at any moment, and errors that its user can mend, each in one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from isw_cli.errors import InputError, in_one_line
from isw_plugin.errors import SettingError

STOP = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may ignore it
def stop():
    while {module!r} not in sys.modules: time.sleep(.01)
    time.sleep({seconds})
    os.kill(os.getpid(), signal.{name})
threading.Thread(target=stop, daemon=True).start()
from isw_cli.entry import main
main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("module", "seconds"), [("torch", 0), ("timm.models.resnet", 3)], ids=["imports", "work"])
def test_a_signal_is_one_line(module: str, seconds: float, name: str, tmp_path: Path) -> None:
    """Packages take seconds to be imported, and some swallow what comes meanwhile."""
    command = [sys.executable, "-c", STOP.format(module=module, seconds=seconds, name=name), "bench", "resnet50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1].endswith(": stopped; nothing was written")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [InputError("no\nsuch"), SettingError("no such"), FileNotFoundError("no such")])
def test_an_error_that_a_user_can_mend_is_one_line(error: Exception) -> None:
    with pytest.raises(SystemExit, match=r"^error: no such$"), in_one_line():
        raise error


@pytest.mark.parametrize(("resumable", "said"), [(False, "stopped"), (True, "stopped: run the same command again")])
def test_ctrl_c_of_a_script_is_one_line(resumable: bool, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="130"), in_one_line(resumable):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.strip().startswith(said)


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), in_one_line():
        raise ZeroDivisionError
