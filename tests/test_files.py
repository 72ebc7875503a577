"""Files: whole or not at all, found behind links, told apart by their digests, locked by one process at a time."""

import hashlib
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from timm_masterkeys import files
from timm_masterkeys.files import (
    atomic_path,
    file_sha256,
    folder_sha256,
    locked,
    tensors_sha256,
    walk_files,
    work_folder,
)


@pytest.mark.parametrize("existing", [True, False])
def test_writes_a_file_whole_and_at_once(tmp_path, monkeypatch, existing):
    monkeypatch.chdir(tmp_path)
    path = Path("bank.safetensors")
    if existing:
        path.write_bytes(b"old")
    with path.open("rb") if existing else nullcontext() as reader:
        with atomic_path(str(path)) as tmp:
            assert isinstance(tmp, Path) and tmp.parent == tmp_path
            assert tmp.name.startswith(".") and tmp.suffix != ".safetensors"  # no tool lists it
            tmp.write_bytes(b"new")
            assert path.exists() == existing
        assert not existing or reader.read() == b"old"  # who had it open keeps the old file whole
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["bank.safetensors"]


@pytest.mark.parametrize(("error", "existing"), [(RuntimeError, True), (OSError, False), (KeyboardInterrupt, True)])
def test_failure_half_way_keeps_the_old_file(tmp_path, error, existing):
    path = tmp_path / "bank.bin"
    if existing:
        path.write_bytes(b"old")
    with pytest.raises(error), atomic_path(path) as tmp:
        tmp.write_bytes(b"half of the n")
        raise error
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if existing else [])


def test_missing_folder_fails_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "no" / "bank.bin"):
        pytest.fail("the body must not run")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError), atomic_path(tmp_path / "bank.bin"):
            pytest.fail("the body must not run")
        assert os.listdir(tmp_path) == []
    finally:
        tmp_path.chmod(0o700)


def test_path_that_is_a_folder(tmp_path):
    path = tmp_path / "bank.bin"
    path.mkdir()
    with pytest.raises(OSError), atomic_path(path) as tmp:
        tmp.write_bytes(b"keys")
    assert os.listdir(tmp_path) == ["bank.bin"] and path.is_dir()


def test_writer_that_replaces_or_loses_the_temporary(tmp_path):
    path = tmp_path / "bank.bin"
    with atomic_path(path) as tmp:
        (tmp_path / "other").write_bytes(b"keys")
        (tmp_path / "other").replace(tmp)
    assert os.listdir(tmp_path) == ["bank.bin"]
    with pytest.raises(FileNotFoundError), atomic_path(path) as tmp:
        tmp.unlink()
    assert path.read_bytes() == b"keys"


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "bank.bin"
    with atomic_path(path) as first, atomic_path(path) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"  # the last to finish
    assert os.listdir(tmp_path) == ["bank.bin"]


def test_flushed_to_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, flushed = tmp_path / "bank.bin", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append((os.fstat(fd).st_size, path.exists())), fsync(fd)))
    with atomic_path(path) as tmp:
        tmp.write_bytes(b"keys")
    assert flushed == [(4, False)]


def test_full_disk_at_the_flush_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "bank.bin"
    path.write_bytes(b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_path(path) as tmp:
        tmp.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["bank.bin"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX modes")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_mode_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "bank.bin") as tmp:
            tmp.write_bytes(b"keys")
        assert os.umask(umask) == umask  # left as it was found
    finally:
        os.umask(before)
    assert (tmp_path / "bank.bin").stat().st_mode & 0o777 == 0o666 & ~umask


def test_files_are_found_behind_links_and_once(tmp_path):
    (tmp_path / ".data" / "cats").mkdir(parents=True)
    (tmp_path / ".data" / "cats" / "1.png").write_text("1")
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "2.png").write_text("2")
    (tmp_path / "dogs" / ".hidden.png").write_text("3")
    (tmp_path / "cats").symlink_to(tmp_path / ".data" / "cats", target_is_directory=True)
    (tmp_path / "dogs" / "back").symlink_to(tmp_path, target_is_directory=True)
    found = [path.relative_to(tmp_path).as_posix() for path in walk_files(tmp_path)]
    assert found == ["cats/1.png", "dogs/2.png"]
    before = folder_sha256(tmp_path)
    (tmp_path / ".data" / "cats" / "4.png").write_text("4")
    assert folder_sha256(tmp_path) != before


def test_tensors_have_one_digest_whatever_their_order():
    a, b = torch.arange(4.0), torch.arange(4)
    assert tensors_sha256({"a": a, "b": b}) == tensors_sha256({"b": b, "a": a.clone()})
    others = [
        {"a": a},
        {"a": b, "b": b},
        {"a": a, "b": b.float()},
        {"a": a.view(2, 2), "b": b},
        {"c": {"a": a, "b": b}},
    ]
    others += [{"a": a, "b": -b}, {"a": a, "b": [b]}, {"a": [], "b": {}}, {"a": {}, "b": []}, {"a": None, "b": "None"}]
    digests = {tensors_sha256(other) for other in [{"a": a, "b": b}, *others]}
    assert len(digests) == len(others) + 1
    with pytest.raises(TypeError, match="a object has no digest"):
        tensors_sha256({"a": object()})


def test_locks_are_held_and_told(tmp_path):
    with locked(tmp_path / "lock") as held, locked(tmp_path / "lock", wait=False) as again:
        assert held and not again
    with locked(tmp_path / "lock", wait=False) as held:
        assert held


def test_a_work_folder_goes_and_those_of_the_dead_too(tmp_path):
    dead = tmp_path / ".saving-00000000"
    dead.mkdir()
    dead.with_name(f"{dead.name}.lock").touch()
    (tmp_path / ".saving-mine").mkdir()  # nobody's: it has no lock
    with work_folder(tmp_path, "saving") as living:
        assert not dead.exists() and living.is_dir()
        with work_folder(tmp_path, "saving") as other:
            assert living.is_dir() and other.is_dir() and living != other
    assert [path.name for path in tmp_path.iterdir()] == [".saving-mine"]


def test_a_folder_that_was_changed_though_its_times_were_set_back(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"old")
    before, plain, changed = path.stat(), folder_sha256(tmp_path), folder_sha256(tmp_path, changed=True)
    path.write_bytes(b"new")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert folder_sha256(tmp_path) == plain and folder_sha256(tmp_path, changed=True) != changed


def test_a_link_that_leads_elsewhere_while_it_is_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SETTLED", -1)  # as if the files had been there for long
    link, opened = tmp_path / "latest", open
    for name in ("old", "new"):
        (tmp_path / name).write_text(name)

    def lead_to(name):
        link.unlink(missing_ok=True)
        link.symlink_to(name)

    lead_to("old")
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", lambda *args: lead_to("new") or opened(*args), raising=False)
        assert file_sha256(link) == hashlib.sha256(b"new").hexdigest()
    lead_to("old")
    assert file_sha256(link) == hashlib.sha256(b"old").hexdigest()
