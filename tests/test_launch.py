"""``python -m timm_masterkeys.launch`` runs a script as if it ran alone, with the names registered."""

import os
import signal
import subprocess
import sys

SCRIPT = """
import json, os, sys
import beside
if __name__ == "__main__":
    import timm
    print(json.dumps([sys.argv, os.getcwd(), beside.VALUE, timm.is_model_pretrained("convnext_atto.mk8"), __file__]))
    sys.exit(int(sys.argv[1]))
"""


def launch(args, **kwargs):
    command = [sys.executable, "-m", "timm_masterkeys.launch", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def test_as_if_the_script_ran_alone(tmp_path):
    import json

    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "beside.py").write_text("VALUE = 7")
    script = tmp_path / "scripts" / "train.py"
    script.write_text(SCRIPT)
    done = launch(["scripts/train.py", "3", "--model", "a b"], cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    argv, cwd, value, registered, file = json.loads(done.stdout)
    assert argv == ["scripts/train.py", "3", "--model", "a b"]
    assert os.path.samefile(cwd, tmp_path) and os.path.samefile(
        file if os.path.isabs(file) else tmp_path / file, script
    )
    assert value == 7 and registered


def test_errors_and_help(tmp_path):
    missing = launch([str(tmp_path / "no.py")])
    assert missing.returncode == 2 and "no.py" in missing.stderr and "Traceback" not in missing.stderr
    assert launch([]).returncode == 2
    shown = launch(["--help"])
    assert shown.returncode == 0 and "SCRIPT" in shown.stdout
    (tmp_path / "fails.py").write_text("raise ValueError('of the script')")
    failed = launch([str(tmp_path / "fails.py")])
    assert failed.returncode == 1 and "of the script" in failed.stderr


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
