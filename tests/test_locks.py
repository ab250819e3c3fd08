"""Locks between processes, which are forked from the test process; what they say goes through pipes."""

import contextlib
import errno
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

from pad.errors import InputError
from pad.store import locks
from pad.store.locks import claim, each_once, holder, in_turn, only_writer, remove_leftovers

FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def another(path, lock=claim):
    """A process that holds the lock until the block ends, or it is killed."""
    (held, holds), (go, goes) = FORK.Pipe(), FORK.Pipe()

    def hold():
        with lock(path) as got:
            holds.send(got)
            goes.recv()

    process = FORK.Process(target=hold, daemon=True)
    process.start()
    try:
        assert held.poll(20) and held.recv() is True
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):
            go.send(None)
        process.join(20)


def test_one_process_at_a_time_has_a_lock_and_its_file_goes_with_it(tmp_path):
    path = tmp_path / "made" / "for it" / ".lock"
    with another(path) as process:
        with claim(path) as held:
            assert not held
        assert holder(path) == f"process {process.pid} on {socket.gethostname()}"
        with pytest.raises(InputError, match=f"the folder is being written by process {process.pid} on "):
            with only_writer(path, "the folder"):
                pytest.fail("went on")
        assert path.exists()
    assert not (tmp_path / "made").exists(), "nothing is left"
    with claim(path) as held, claim(path) as twice:
        assert held and not twice
    with only_writer(path, "the folder"):
        (path.parent / "file").touch()
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_killed_process_holds_nothing(tmp_path):
    path = tmp_path / ".lock"
    with another(path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert path.exists()
        with claim(path) as held:
            assert held and holder(path).startswith(f"process {os.getpid()} on ")
    assert not path.exists()


def test_an_error_lets_go(tmp_path):
    for lock in (claim(tmp_path / ".lock"), only_writer(tmp_path / ".lock", ""), in_turn(tmp_path / ".lock", "")):
        with pytest.raises(KeyboardInterrupt), lock:
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["ends", "is killed"])
def test_who_waits_goes_on_when_the_other(tmp_path, how):
    path, done = tmp_path / ".lock", FORK.Event()

    def wait():
        with in_turn(path, "the ranking"):
            done.set()

    with another(path) as process:
        waiting = FORK.Process(target=wait, daemon=True)
        waiting.start()
        assert not done.wait(0.3)
        if how == "is killed":
            os.kill(process.pid, signal.SIGKILL)
            assert done.wait(20)
    assert done.wait(20)
    waiting.join(20)
    assert waiting.exitcode == 0 and not path.exists()


def test_waiting_is_said(tmp_path, caplog):
    path = tmp_path / ".lock"
    with caplog.at_level("INFO", logger="pad"), another(path) as process:
        threading.Timer(0.2, os.kill, (process.pid, signal.SIGKILL)).start()
        with in_turn(path, "the ranking"):
            pass
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for process {process.pid} on {socket.gethostname()}, at work on the ranking"
    ]


def test_many_processes_never_hold_one_lock_together(tmp_path):
    """Each adds one to a number in a file, again and again: none is lost, though the lock's file comes and goes."""
    number, path = tmp_path / "number", tmp_path / "folder" / ".lock"
    number.write_text("0")

    def count():
        for _ in range(50):
            with in_turn(path, "counting"):
                found = int(number.read_text())
                time.sleep(0)
                number.write_text(str(found + 1))

    processes = [FORK.Process(target=count, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert number.read_text() == "200" and not list(tmp_path.glob("folder/*"))


@pytest.mark.parametrize("error", [FileExistsError, FileNotFoundError])
def test_a_folder_that_another_process_removes_in_between_leaves_no_lock_out(tmp_path, monkeypatch, error):
    """mkdir finds the folder there, and then it is gone: what follows must still be guarded."""
    path, mkdir, calls = tmp_path / "folder" / ".lock", os.mkdir, []

    def racing(folder, *arguments, **more):
        calls.append(folder)
        if len(calls) == 1:
            raise error(17, "File exists", str(folder))
        mkdir(folder, *arguments, **more)

    monkeypatch.setattr(os, "mkdir", racing)
    with in_turn(path, "counting"), claim(path) as second:
        assert not second, "nobody held it"
    assert len(calls) > 1 and not path.parent.exists()


def test_a_file_in_place_of_the_folder_is_not_waited_for(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(FileExistsError), claim(tmp_path / "folder" / ".lock"):
        pass


def test_what_nobody_has_begun_comes_first_then_what_others_had(tmp_path):
    def lock_of(item):
        return tmp_path / f".{item}.lock"

    worked = []

    def work(item):
        with claim(lock_of(item)) as again:
            assert not again, "it is held"
        worked.append(item)
        if item == 2:
            os.kill(process.pid, signal.SIGKILL)

    with another(lock_of(1)) as process:
        each_once([0, 1, 2], lock_of, work, "item {}".format)
    assert worked == [0, 2, 1] and not list(tmp_path.iterdir())


def test_nothing_is_begun_or_waited_for_once_it_is_enough(tmp_path):
    def lock_of(item):
        return tmp_path / f".{item}.lock"

    worked = []
    with another(lock_of(0)):
        each_once(range(4), lock_of, worked.append, "item {}".format, lambda: len(worked) < 2)
        assert worked == [1, 2]
        each_once(range(2), lock_of, worked.append, "item {}".format, lambda: len(worked) < 3)
    assert worked == [1, 2, 1]


def test_several_processes_do_each_item_once(tmp_path):
    done = tmp_path / "done"
    done.touch()

    def work(item):
        if f"{item}\n" not in done.read_text():
            time.sleep(0.01)
            with open(done, "a") as handle:
                handle.write(f"{item}\n")

    def share():
        each_once(range(9), lambda item: tmp_path / f".{item}.lock", work, "item {}".format)
        assert len(done.read_text().split()) == 9, "whoever ends, all is done"

    processes = [FORK.Process(target=share, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3
    assert sorted(done.read_text().split()) == [str(item) for item in range(9)] and list(tmp_path.iterdir()) == [done]


def test_a_file_system_without_locks_is_said_once_and_work_goes_on(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_without", set())
    for name in ("a", "b"):
        with claim(tmp_path / name) as held, in_turn(tmp_path / f"{name}2", ""):
            assert held
    assert len(caplog.records) == 1 and "without locks" in caplog.text and not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_waiting_locks_guard_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(locks.os, "open", refuse)
    with in_turn(tmp_path / ".lock", "the ZCA"):
        pass
    with pytest.raises(PermissionError), claim(tmp_path / ".lock"):
        pytest.fail("went on")
    with pytest.raises(PermissionError), in_turn(tmp_path / ".lock", ""):
        raise PermissionError("of the work itself")


def test_a_full_disk_leaves_a_lock_without_a_name(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    with claim(tmp_path / ".lock") as held:
        assert held and holder(tmp_path / ".lock") == "another process"


def test_files_that_killed_processes_left_are_removed_and_others_kept(tmp_path):
    for name in (".lock", ".expert_0001.lock"):
        (tmp_path / name).write_text("123 there")
    (tmp_path / "lock").touch()
    (tmp_path / ".other.lock").write_text("of another program\n")
    (tmp_path / ".link.lock").symlink_to(tmp_path / "lock")
    with another(tmp_path / ".expert_0002.lock"):
        remove_leftovers(tmp_path)
        kept = [".expert_0002.lock", ".link.lock", ".other.lock", "lock"]
        assert sorted(path.name for path in tmp_path.iterdir()) == kept
    remove_leftovers(tmp_path / "not there")
