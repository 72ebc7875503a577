"""``python -m timm_masterkeys.launch`` runs a script as if it ran alone, with the names registered."""

import json
import os
import signal
import subprocess
import sys

import pytest
from forked import run

from timm_masterkeys import launch

SCRIPT = """
import json, os, sys
import beside
if __name__ == "__main__":
    import timm
    print(json.dumps([sys.argv, os.getcwd(), beside.VALUE, timm.is_model_pretrained("convnext_atto.mk8"), __file__]))
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.slow
def test_as_if_the_script_ran_alone(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").write_text("VALUE = 7")
    script = tmp_path / "scripts" / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "timm_masterkeys.launch", "scripts/train.py", "3", "--model", "a b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    argv, cwd, value, registered, file = json.loads(done.stdout)
    assert argv == ["scripts/train.py", "3", "--model", "a b"]
    assert os.path.samefile(cwd, tmp_path) and os.path.samefile(tmp_path / file, script)
    assert value == 7 and registered


SPAWNING = """
import timm, torch
from torch.multiprocessing import spawn
from torch.utils.data import DataLoader, Dataset

class Known(Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return timm.is_model_pretrained("convnext_atto.mk8")

def work(rank, file):
    with open(file, "w") as out:
        print(timm.is_model_pretrained("convnext_atto.mk8"), __name__, *sys.argv, file=out)

import sys
if __name__ == "__main__":
    spawn(work, (sys.argv[1],))
    print([bool(known) for known in DataLoader(Known(), num_workers=1, multiprocessing_context="spawn")])
"""


@pytest.mark.slow
def test_spawned_processes_know_the_names(tmp_path):
    (tmp_path / "train.py").write_text(SPAWNING)
    done = run("-m", "timm_masterkeys.launch", tmp_path / "train.py", tmp_path / "written.txt")
    assert (done.returncode, done.stdout) == (0, "[True]\n"), done.stderr
    written = (tmp_path / "written.txt").read_text().split()
    assert written == ["True", "__mp_main__", str(tmp_path / "train.py"), str(tmp_path / "written.txt")]


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [(["no.py"], 2, "", "no.py"), ([], 2, "", "SCRIPT"), (["--help"], 0, "SCRIPT", "")],
)
def test_errors_and_help(monkeypatch, capsys, arguments, code, out, err):
    monkeypatch.setattr(sys, "argv", ["launch", *arguments])
    with pytest.raises(SystemExit) as ended:
        launch.main()
    printed = capsys.readouterr()
    assert ended.value.code == code
    assert all(text in got if text else not got for text, got in ((out, printed.out), (err, printed.err)))


def test_names_are_registered_and_an_error_of_the_script_is_its_own(tmp_path):
    code = "import sys, timm\nprint(timm.is_model('convnext_atto.mk8_d2_in1k'), *sys.argv[1:])\nraise ValueError('own')"
    (tmp_path / "fails.py").write_text(code)
    failed = run("-m", "timm_masterkeys.launch", tmp_path / "fails.py", "--model", "x")
    assert (failed.returncode, failed.stdout) == (1, "True --model x\n") and "ValueError: own" in failed.stderr


@pytest.mark.slow
def test_ctrl_c(tmp_path):
    (tmp_path / "waits.py").write_text("import time\nprint('ready', flush=True)\ntime.sleep(60)")
    command = [sys.executable, "-m", "timm_masterkeys.launch", str(tmp_path / "waits.py")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs with "&"
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (-signal.SIGINT, 130) and "KeyboardInterrupt" in errors
