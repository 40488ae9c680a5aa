"""What stops a command or a script: ctrl-C at any moment, and errors that its user can mend, each in one line."""

from isw_cli.script import in_one_line

import subprocess
import sys
from pathlib import Path

import pytest

from isw_cli.errors import InputError
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


SCRIPT = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def stop():
    while "torch" not in sys.modules: time.sleep(.01)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=stop, daemon=True).start()
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""


def test_ctrl_c_while_a_script_imports_is_one_line() -> None:
    script = Path(__file__).parents[2] / "examples" / "gate_pretrained.py"
    command = [sys.executable, "-c", SCRIPT.format(script=str(script)), "resnet18", "--data", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "\nstopped\n")


def test_a_script_that_is_imported_leaves_ctrl_c_alone() -> None:
    code = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
exec("from isw_cli.script import in_one_line", {"__name__": "load"})
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    subprocess.run([sys.executable, "-c", code], check=True)


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
