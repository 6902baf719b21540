"""Files and directories are whole or absent, and a disk or a memory that is full is called so."""

import os

import pytest

from support import files
from support.errors import UserError


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new"
    with pytest.raises(KeyError), files.whole_directory(target) as directory:
        (directory / "part").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with files.whole_directory(target) as directory:
        (directory / "part").write_text("whole")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(UserError, match="exists already"), files.whole_directory(target):
        pass
    with files.whole_directory(target, overwrite=True) as directory:
        (directory / "other").write_text("newer")
    assert [path.name for path in target.iterdir()] == ["other"]


def test_what_a_killed_process_left_behind_goes(tmp_path):
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    dead, alive = tmp_path / f".new.{gone}.tmp", tmp_path / f".new.{os.getppid()}.tmp"
    dead.mkdir()
    alive.mkdir()
    own = tmp_path / f".new.{os.getpid()}.tmp"  # in a container the next process has the number of the killed one
    (own / "half").mkdir(parents=True)
    with files.whole_directory(tmp_path / "new") as directory:
        assert not dead.exists() and alive.exists() and list(directory.iterdir()) == []


def test_what_a_link_names_is_written(tmp_path):
    link, there = tmp_path / "here/link", tmp_path / "large_disk/there"
    link.parent.mkdir()
    there.parent.mkdir()
    link.symlink_to(there)
    for _ in range(2):
        with files.whole_directory(link, overwrite=True) as directory:
            assert directory.parent == there.parent
        assert link.is_symlink() and there.is_dir() and [path.name for path in there.parent.iterdir()] == ["there"]
    file = tmp_path / "here/file"
    file.symlink_to(there.parent / "file")
    with files.whole_files(file) as (handle,):
        handle.write("text")
    assert file.is_symlink() and (there.parent / "file").read_text() == "text"


def test_where_a_disk_is_mounted_nothing_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(files.Path, "is_mount", lambda path: path == tmp_path)
    with pytest.raises(UserError, match="a disk is mounted there"), files.whole_directory(tmp_path):
        pass


def test_files_appear_together_or_not_at_all(tmp_path):
    first, second = tmp_path / "a", tmp_path / "deeper/b"
    first.write_text("before")
    with pytest.raises(KeyError), files.whole_files(first, second) as (a, b):
        a.write("after")
        raise KeyError
    assert first.read_text() == "before" and not second.exists()
    with files.whole_files(first, second) as (a, b):
        a.write("after")
        b.write("后")
    assert first.read_text() == "after" and second.read_text(encoding="utf-8") == "后"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "deeper"]


def test_only_files_are_replaced(tmp_path):
    """Not a pipe, a directory or a device such as /dev/null, which root could replace."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(UserError, match="is no regular file"), files.whole_files(tmp_path / "a", tmp_path / name):
            pass
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"] and (tmp_path / "pipe").is_fifo()


def test_files_whose_names_begin_alike_do_not_remove_each_other(tmp_path):
    with files.whole_files(tmp_path / "x.json", tmp_path / "x") as handles:
        for handle in handles:
            handle.write("text")
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.json"}


@pytest.mark.parametrize(
    "error",
    [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), OSError(12, "Cannot allocate memory")],
)
def test_want_of_memory_while_writing_is_told_as_that(tmp_path, error):
    with pytest.raises(MemoryError, match="allocate memory"), files.writing(tmp_path / "state"):
        raise error


def test_a_full_disk_is_called_full(tmp_path):
    with (
        pytest.raises(UserError, match="state: cannot be written: the disk is full"),
        files.writing(tmp_path / "state"),
    ):
        raise OSError(28, "No space left on device")
