"""Folders made once: by one of many processes, again after damage, and not at all where nothing can be written."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from timm_masterkeys.timm_plugin import cache
from timm_masterkeys.timm_plugin.cache import MARK, cache_folder, cached_network, clear_entries, list_entries


def save(made, key, folder):
    (folder / "config.json").write_text(json.dumps({"made_by": MARK, "made": made}))


def is_whole(folder):
    try:
        return json.loads((folder / "config.json").read_text())["made"].startswith("made")
    except (OSError, ValueError, LookupError):
        return False


@pytest.fixture(autouse=True)
def strings_for_networks(monkeypatch):
    monkeypatch.setattr(cache, "_save", save)
    monkeypatch.setattr(cache, "_is_whole", is_whole)


def load_or_make(root, name, make):
    with cached_network(root / name, {}, make) as saved:
        return json.loads((saved.folder / "config.json").read_text())["made"]


class Maker:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return f"made {self.calls}"


@pytest.mark.parametrize("damage", [lambda config: config.write_text("x"), lambda config: config.unlink()])
def test_made_once_and_anew_after_damage(tmp_path, caplog, damage):
    make = Maker()
    assert [load_or_make(tmp_path, "net", make) for _ in range(2)] == ["made 1"] * 2
    damage(tmp_path / "net" / "config.json")
    assert [load_or_make(tmp_path, "net", make) for _ in range(2)] == ["made 2"] * 2
    assert "is damaged and is made anew" in caplog.text


def test_a_folder_with_files_of_others_is_left_alone(tmp_path, caplog):
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "precious.txt").write_text("mine")
    assert load_or_make(tmp_path, "net", Maker()) == "made 1"
    assert os.listdir(tmp_path / "net") == ["precious.txt"] and "precious.txt" in caplog.text


def test_errors_of_the_caller_are_not_damage(tmp_path):
    make = Maker()
    for _ in range(2):
        with pytest.raises(OSError, match="no such argument"), cached_network(tmp_path / "net", {}, make):
            raise OSError("no such argument")
    assert make.calls == 1 and load_or_make(tmp_path, "net", make) == "made 1"


def test_what_cannot_be_made_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        load_or_make(tmp_path, "net", lambda: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == [".net.lock"]


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    make = Maker()
    for entry in (tmp_path / "file" / "cache" / "net", None):  # and without a place in the cache
        with cached_network(entry, {}, make) as saved:
            assert is_whole(saved.folder)
        assert not saved.folder.exists()
    assert make.calls == 2 and caplog.text.count("cannot be written") == 1


def test_a_full_disk_only_costs_time(tmp_path, caplog, monkeypatch):
    def save_elsewhere(made, key, folder):
        if folder.is_relative_to(tmp_path):
            raise OSError(28, "No space left on device")
        save(made, key, folder)

    monkeypatch.setattr(cache, "_save", save_elsewhere)
    assert load_or_make(tmp_path, "net", Maker()) == "made 1"
    assert "No space left" in caplog.text and not list_entries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".net.lock"]


def test_threads_make_it_once(tmp_path):
    make = Maker()

    def slowly():
        time.sleep(0.2)
        return make()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: load_or_make(tmp_path, "net", slowly), range(8))) == {"made 1"}


def test_a_killed_process_leaves_no_lock_and_its_rubbish_goes(tmp_path, monkeypatch):
    def save_forever(made, key, folder):
        (tmp_path / "started").touch()
        time.sleep(60)

    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(cache, "_save", save_forever)
        load_or_make(tmp_path, "net", Maker())
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(list(tmp_path.glob(".net-*/"))) == 1
    assert load_or_make(tmp_path, "net", Maker()) == "made 1"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".net.lock", "net", "started"]


def test_list_and_clear(tmp_path):
    assert list_entries(tmp_path / "none") == [] and clear_entries(tmp_path / "none") == 0
    for name in ("a", "b"):
        load_or_make(tmp_path, name, Maker())
    os.utime(tmp_path / "b", (1, 1))
    assert [entry.path.name for entry in list_entries(tmp_path)] == ["a", "b"]
    assert list_entries(tmp_path)[0].size == (tmp_path / "a" / "config.json").stat().st_size
    load_or_make(tmp_path, "b", Maker())
    assert [entry.path.name for entry in list_entries(tmp_path)] == ["b", "a"]
    assert clear_entries(tmp_path) == 2 and not list_entries(tmp_path)


def test_where(monkeypatch, tmp_path):
    monkeypatch.delenv("TIMM_MASTERKEYS_CACHE", raising=False)
    assert cache_folder(tmp_path) == tmp_path / "timm_masterkeys"
    assert cache_folder().name == "timm_masterkeys"
    monkeypatch.setenv("TIMM_MASTERKEYS_CACHE", str(tmp_path / "own"))
    assert cache_folder(tmp_path) == cache_folder() == tmp_path / "own" / "timm_masterkeys"
