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
    if sys.argv[1] == "fail":
        raise ValueError("own")
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize(("argument", "code", "error"), [("3", 3, ""), ("fail", 1, "ValueError: own")])
def test_as_if_the_script_ran_alone(tmp_path, argument, code, error):
    (tmp_path / "beside.py").write_text("VALUE = 7")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    script = os.path.relpath(path)
    done = run("-m", "timm_masterkeys.launch", script, argument, "--model", "a b")
    assert done.returncode == code and error in done.stderr
    assert json.loads(done.stdout) == [[script, argument, "--model", "a b"], os.getcwd(), 7, True, str(path)]


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
