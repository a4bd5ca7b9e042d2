"""Files that are whole or not there, and files that are checked before they are loaded."""

import errno
import io
import multiprocessing
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_fedhaw import files
from lightning_fedhaw.files import load_checked, remove_abandoned, write_bytes, write_whole

FORK = multiprocessing.get_context("fork")
CONTENT = {"weights": torch.arange(600.0), "nested": {"counts": [1, 2.5, "three"], "single": torch.tensor(3)}}


def saved(content=CONTENT) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def load(data: bytes) -> dict:
    return load_checked(io.BytesIO(data), "run/last.ckpt")


def is_content(found) -> bool:
    is_plain_equal = found["nested"]["counts"] == CONTENT["nested"]["counts"]
    return (
        is_plain_equal
        and torch.equal(found["weights"], CONTENT["weights"])
        and torch.equal(found["nested"]["single"], CONTENT["nested"]["single"])
    )


def test_a_flipped_bit_is_refused_by_name_or_changes_nothing():
    """The rest is padding and fields of the archive that nobody reads."""
    whole = saved()
    assert is_content(load(whole))
    draws = random.Random(5)
    refused = 0
    for _ in range(400):
        data = bytearray(whole)
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        try:
            found = load(bytes(data))
        except ValueError as error:
            refused += str(error).startswith("'run/last.ckpt' is ")
            continue
        assert is_content(found)
    assert refused > 200


def test_every_bit_of_a_weight_counts():
    whole = saved()
    place = whole.index(CONTENT["weights"].numpy().tobytes())
    for bit in range(0, 600 * 32, 997):
        data = bytearray(whole)
        data[place + bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="'run/last.ckpt' is damaged: its record .* does not match its checksum"):
            load(bytes(data))


def test_a_record_that_is_marked_as_a_folder_is_damaged():
    whole = bytearray(saved())
    entry = whole.rindex(b"PK\x01\x02")
    whole[entry + 38] ^= 0x10
    with pytest.raises(ValueError, match="is damaged"):
        load(bytes(whole))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off(share):
    whole = saved()
    with pytest.raises(
        ValueError, match=r"'run/last.ckpt' is (no checkpoint\.|cut off or damaged \(.*\)\. Resume from)"
    ):
        load(whole[: int(share * len(whole))])


def test_files_without_checksums_are_taken_as_they_are():
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("torch writes them always")
    torch.serialization.set_crc32_options(False)
    try:
        data = saved()
    finally:
        torch.serialization.set_crc32_options(True)
    assert is_content(load(data))


class Touch:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_code_is_never_run():
    with pytest.raises(ValueError, match=r"'run/last.ckpt' holds more than tensors .*system.* could run code"):
        load(saved({"state_dict": {}, "more": Touch()}))
    assert not Path("pwned").exists()


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "folder" / "last.ckpt"
    write_bytes(target, b"old")

    def fail(file):
        file.write(b"new")
        raise KeyError("of the writer")

    with pytest.raises(KeyError):
        write_whole(target, fail)
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_full_disk_is_called_so(tmp_path, number, room):
    """Torch hides the error of the disk behind one of its own: "unexpected pos 64 vs 0"."""

    class Full(io.BytesIO):
        def write(self, data):
            if self.tell() + len(data) > room:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    def save(file):
        torch.save(CONTENT, Full())

    target = tmp_path / "last.ckpt"
    with pytest.raises(OSError, match=r"The disk is full: '.*last.ckpt' was not written") as caught:
        write_whole(target, save)
    assert caught.value.errno == number
    assert not list(tmp_path.iterdir())


def write_beyond_a_limit(folder: str, answers) -> None:
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        write_whole(Path(folder) / "last.ckpt", partial(torch.save, torch.zeros(10_000)))
    except OSError as error:
        answers.send(str(error))


def test_a_real_limit_of_the_file_size_is_called_so(tmp_path):
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=write_beyond_a_limit, args=(str(tmp_path), theirs))
    process.start()
    assert ours.poll(60)
    assert "last.ckpt' was not written (File too large)" in ours.recv()
    process.join()
    assert not list(tmp_path.iterdir())


def other_files(folder: Path) -> list[Path]:
    """Files that look alike and are not this package's."""
    names = [".fedhaw-notes.part", "last.ckpt.part", f".fedhaw-{files._HOST}-12-short.part", "round=3.ckpt"]
    for name in names:
        (folder / name).write_text("mine")
    return [folder / name for name in names]


def test_only_the_files_of_dead_writers_are_removed(tmp_path):
    kept = other_files(tmp_path)
    dead = tmp_path / f".fedhaw-{files._HOST}-{os.getpid()}-{'0' * 32}.part"
    dead.write_text("half")
    elsewhere = tmp_path / f".fedhaw-00000000-12-{'1' * 32}.part"
    elsewhere.write_text("of another machine")
    old = tmp_path / f".fedhaw-00000000-12-{'2' * 32}.part"
    old.write_text("of another machine, two days ago")
    os.utime(old, (time.time() - 2 * 86400,) * 2)

    def write(file):
        file.write(b"whole")
        remove_abandoned(tmp_path)

    write_whole(tmp_path / "live.ckpt", write)
    assert (tmp_path / "live.ckpt").read_bytes() == b"whole"
    assert sorted(tmp_path.iterdir()) == sorted([*kept, elsewhere, tmp_path / "live.ckpt"])
    remove_abandoned(tmp_path / "no such folder")


def half_written(folder: str, started) -> None:
    def write(file):
        file.write(b"half")
        file.flush()
        started.set()
        time.sleep(60)

    write_whole(Path(folder) / "last.ckpt", write)


def test_the_half_written_file_of_a_killed_process_is_removed_and_that_of_a_live_one_is_not(tmp_path):
    started = FORK.Event()
    process = FORK.Process(target=half_written, args=(str(tmp_path), started))
    process.start()
    assert started.wait(60)
    remove_abandoned(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def write_often(path: str, number: int) -> None:
    for _ in range(25):
        write_whole(Path(path), partial(torch.save, torch.full((20_000,), float(number))))
        remove_abandoned(Path(path).parent)


def test_two_writers_of_one_file_never_disturb_each_other(tmp_path):
    path = tmp_path / "last.ckpt"
    writers = [FORK.Process(target=write_often, args=(str(path), number)) for number in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            with path.open("rb") as file:
                assert len(load_checked(file, "last.ckpt").unique()) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert list(tmp_path.iterdir()) == [path]
