"""Folders made once: by one of many processes, again after damage, and not at all where nothing can be written."""

import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from timm_masterkeys.errors import CheckpointError
from timm_masterkeys.names.cache import cache_folder, clear_entries, list_entries, load_or_make


def save(made, folder):
    folder.mkdir()
    (folder / "config.json").write_text(made)


def load(folder):
    text = (folder / "config.json").read_text()
    if not text.startswith("made"):
        raise CheckpointError("altered")
    return text


class Maker:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return f"made {self.calls}"


def test_made_once(tmp_path):
    make = Maker()
    assert [load_or_make(tmp_path / "new", "net", make, save, load) for _ in range(3)] == ["made 1"] * 3
    assert load_or_make(tmp_path / "new", "other", make, save, load) == "made 2"
    assert sorted(entry.path.name for entry in list_entries(tmp_path / "new")) == ["net", "other"]


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_damage_is_made_anew(tmp_path, damage):
    make = Maker()
    load_or_make(tmp_path, "net", make, save, load)
    config = tmp_path / "net" / "config.json"
    config.write_text("x") if damage == "altered" else config.unlink()
    assert load_or_make(tmp_path, "net", make, save, load) == "made 2"
    assert load_or_make(tmp_path, "net", make, save, load) == "made 2"


def test_errors_of_the_caller_are_not_damage(tmp_path):
    make = Maker()
    load_or_make(tmp_path, "net", make, save, load)

    def refuse(folder):
        raise TypeError("no such argument")

    for _ in range(2):
        with pytest.raises(TypeError):
            load_or_make(tmp_path, "net", make, save, refuse)
    assert make.calls == 1 and load(tmp_path / "net") == "made 1"


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    make = Maker()
    assert load_or_make(tmp_path / "file" / "cache", "net", make, save, load) == "made 1"
    assert load_or_make(tmp_path / "file" / "cache", "net", make, save, load) == "made 2"
    assert "cannot be written" in caplog.text


def test_a_full_disk_only_costs_time(tmp_path, caplog):
    def save_elsewhere(made, folder):
        if folder.is_relative_to(tmp_path):
            raise OSError(28, "No space left on device")
        save(made, folder)

    assert load_or_make(tmp_path, "net", Maker(), save_elsewhere, load) == "made 1"
    assert "No space left" in caplog.text and not list_entries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".net.lock"]


def slowly(root, counter):
    def make():
        with counter.get_lock():
            counter.value += 1
        time.sleep(0.5)
        return "made"

    return load_or_make(root, "net", make, save, load)


def test_threads_make_it_once(tmp_path):
    counter = multiprocessing.get_context("spawn").Value("i", 0)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: slowly(tmp_path, counter), range(8))) == {"made"}
    assert counter.value == 1


def test_who_comes_while_another_clears_rubbish_does_not_think_the_cache_unwritable(tmp_path, monkeypatch):
    made, steps = [], {name: getattr(tempfile, name) for name in ("mkdtemp", "TemporaryFile")}

    def cleared(name, *args, **kwargs):
        done = steps[name](*args, **kwargs)
        for rubbish in () if made else tmp_path.glob(".net.*/"):
            shutil.rmtree(rubbish)
        return done

    for name in steps:
        monkeypatch.setattr(tempfile, name, partial(cleared, name))
    assert load_or_make(tmp_path, "net", lambda: made.append(1) or "made", save, load) == "made"
    assert (tmp_path / "net").is_dir()


def test_a_killed_process_leaves_no_lock_and_its_rubbish_goes(tmp_path):
    def make_forever():
        (tmp_path / "started").touch()
        time.sleep(60)

    pid = os.fork()
    if pid == 0:
        load_or_make(tmp_path, "net", lambda: "made", lambda made, folder: (folder.mkdir(), make_forever()), load)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.glob(".net.*/"))) == 1
    assert load_or_make(tmp_path, "net", Maker(), save, load) == "made 1"
    assert not list(tmp_path.glob(".net.*/"))


def test_list_and_clear(tmp_path):
    assert list_entries(tmp_path / "none") == [] and clear_entries(tmp_path / "none") == 0
    for name in ("a", "b"):
        load_or_make(tmp_path, name, Maker(), save, load)
    os.utime(tmp_path / "b", (1, 1))
    assert [entry.path.name for entry in list_entries(tmp_path)] == ["a", "b"]
    assert list_entries(tmp_path)[0].size == len("made 1")
    load_or_make(tmp_path, "b", Maker(), save, load)
    assert list_entries(tmp_path)[0].path.name == "b"
    (tmp_path / ".c.xyz").mkdir()
    assert clear_entries(tmp_path) == 2 and not list(tmp_path.iterdir())


def test_where(monkeypatch, tmp_path):
    monkeypatch.delenv("TIMM_MASTERKEYS_CACHE", raising=False)
    assert cache_folder(tmp_path) == tmp_path / "timm_masterkeys"
    assert cache_folder().name == "timm_masterkeys"
    monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path / "own"))
    assert cache_folder(tmp_path) == cache_folder() == tmp_path / "own"
