"""A disk that is full or read-only: what all processes learn, and what a stage reports."""

import errno
import subprocess

import pytest
from pipeline import document_rows, failure, run_script, short_run, write_model

from minimind.common.errors import UserError
from minimind.training import saving
from minimind.training.saving import NotWrittenError, check_writable

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.mark.parametrize(
    ("fault", "raised"),
    [((errno.ENOSPC, "No space left on device"), NotWrittenError), (None, RuntimeError)],
)
def test_what_one_process_could_not_write_all_processes_know(monkeypatch, tmp_path, fault, raised):
    monkeypatch.setattr(
        saving, "gather_object", lambda own: [*own, ("RuntimeError: unexpected pos", fault)]
    )
    with pytest.raises(raised, match="could not"):
        saving.Writing(tmp_path / "checkpoint-1", 0).check()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], capture_output=True
    ).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_really_full_disk_ends_a_stage_with_one_message(
    monkeypatch, tmp_path, write_jsonl, capsys, small_disk
):
    (small_disk / "filler").write_bytes(bytes(900_000))
    options = [*short_run(small_disk / "run", block_size=32, on_findings="warn"), "--train_files"]
    options += [write_jsonl("d.jsonl", document_rows())]
    message = failure(
        capsys,
        run_script,
        monkeypatch,
        "pretrain",
        *options,
        "--model_config",
        write_model(tmp_path / "m.json"),
    )
    assert "could not be written" in message
    assert "MB free" in message
    assert not (small_disk / "run" / "model.safetensors").exists()
    assert not (small_disk / "run" / "stage.json").exists()


def test_a_read_only_output_directory_is_refused_before_anything_runs(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        check_writable(small_disk / "run")
