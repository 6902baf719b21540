"""Files and directories are whole or absent, and a disk or a memory that is full is called so."""

import os

import pytest
import torch
from safetensors.torch import save_file

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
    for overwrite, remedy in ((None, "remove it"), (False, "remove it, or add --overwrite")):
        with pytest.raises(UserError, match=f"exists already.* {remedy}$"), files.whole_directory(target, overwrite):
            pass
    with files.whole_directory(target, overwrite=True) as directory:
        (directory / "other").write_text("newer")
    assert [path.name for path in target.iterdir()] == ["other"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_files_of_a_directory_may_be_read_by_whom_the_umask_allows(tmp_path, umask):
    """Those of safetensors, and copies of files with modes of their own, as those that open() makes."""
    before = os.umask(umask)
    try:
        with files.whole_directory(tmp_path / "new") as directory:
            (directory / "deeper").mkdir()
            save_file({"a": torch.zeros(1)}, directory / "deeper/a.safetensors")
            (directory / "b").touch(mode=0o400)
            (directory / "c").write_text("")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*")}
    assert modes == {"deeper": 0o777 & ~umask, **dict.fromkeys(("a.safetensors", "b", "c"), 0o666 & ~umask)}


def test_what_a_killed_process_left_behind_goes(tmp_path):
    (tmp_path / ".new.tmp/half").mkdir(parents=True)
    with files.whole_directory(tmp_path / "new") as directory:
        assert list(directory.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


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


def test_a_full_disk_is_called_full(tmp_path):
    with (
        pytest.raises(UserError, match="state: cannot be written: the disk is full"),
        files.writing(tmp_path / "state"),
    ):
        raise OSError(28, "No space left on device")
