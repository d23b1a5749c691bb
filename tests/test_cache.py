"""Faults in the cache and around it: an entry is used only if it is what was written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pyarrow as pa
import pytest
from conftest import CHINESE, ENGLISH
from pipeline import assistant, failure, run_cli, user

from minimind import cleaning
from minimind.cleaning import pipeline
from minimind.commands import chat
from minimind.common import cache
from minimind.common.cache import cache_directory, content_hash
from minimind.common.errors import UserError
from minimind.data import block_writer, chats, documents
from minimind.data.chats import load_conversations
from minimind.data.documents import load_blocks
from minimind.training import run as training_run
from minimind.training.data_arguments import DataArguments
from minimind.training.run import check_same_data

TEXTS = [f"{number}: {text}" for number in range(40) for text in (ENGLISH, CHINESE)]


@pytest.fixture(autouse=True)
def own_temporary_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "TEMPORARY", {})
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def data(write_jsonl):
    return Path(write_jsonl("train.jsonl", [{"text": text} for text in TEXTS]))


@pytest.fixture
def load(tokenizer, data, monkeypatch):
    """Load the rows of `data`, all of them."""
    # characters, so that the files have several record batches
    monkeypatch.setattr(block_writer, "BATCH", 200)

    def load():
        blocks = load_blocks(DataArguments([str(data)], eval_ratio=0.1), tokenizer, 16)
        return [
            [row["input_ids"].tolist() for row in part] for part in (blocks.train, blocks.eval)
        ], blocks.facts

    return load


def entry_of(root):
    (entry,) = (path for path in (root / "cache" / "blocks").iterdir() if path.is_dir())
    return entry


def write_with_the_same_time(path, content):
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace_with_the_same_size_and_time(path):
    status, other = path.stat(), path.with_name("other")
    other.write_text(path.read_text(encoding="utf-8").replace("quick", "swift"), encoding="utf-8")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_size == status.st_size


# Damage


def cut_at_a_batch_border(entry):
    path = entry / "train-0.arrow"
    with pa.OSFile(str(path)) as source:
        reader = pa.ipc.open_stream(source)
        reader.read_next_batch()
        end = source.tell()
    path.write_bytes(path.read_bytes()[:end])


def zero_some_tokens(entry):
    path = entry / "train-0.arrow"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    write_with_the_same_time(path, bytes(content))


def lose_the_held_out_rows(entry):
    (entry / "eval-0.arrow").unlink()


def raise_a_count(entry):
    path = entry / "manifest.json"
    changed = path.read_text().replace('"tokens": ', '"tokens": 1', 1)
    write_with_the_same_time(path, changed.encode())


def make_a_file_of_it(entry):
    shutil.rmtree(entry)
    entry.write_text("something else")


def make_the_manifest_a_directory(entry):
    (entry / "manifest.json").unlink()
    (entry / "manifest.json").mkdir()


def with_manifest(content):
    def write(entry):
        (entry / "manifest.json").write_bytes(content)

    return write


@pytest.mark.parametrize(
    "damage",
    [
        cut_at_a_batch_border,
        zero_some_tokens,
        lose_the_held_out_rows,
        raise_a_count,
        make_a_file_of_it,
        make_the_manifest_a_directory,
        *map(with_manifest, (b"", b"null", b'{"key": {')),
    ],
)
def test_damaged_rows_are_prepared_again_with_a_notice(load, tmp_path, capsys, damage):
    rows = load()
    damage(entry_of(tmp_path))
    capsys.readouterr()
    assert load() == rows
    assert capsys.readouterr().err.count("preparing it again") == 1
    assert load() == rows
    assert "preparing" not in "".join(capsys.readouterr())  # the third time nothing was left to do


def test_an_entry_under_the_name_of_another_is_rejected(load, tmp_path, data, tokenizer):
    rows, place = load(), entry_of(tmp_path)
    shutil.rmtree(place)
    load_blocks(DataArguments([str(data)], eval_ratio=0.5), tokenizer, 16)
    entry_of(tmp_path).rename(place)
    assert load() == rows


def test_all_files_of_an_entry_are_on_the_disk_before_it_has_its_name(load, tmp_path, monkeypatch):
    synced, sync, rename = set(), os.fsync, Path.rename

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def check(path, target):
        assert synced >= {file.stat().st_ino for file in path.iterdir()}
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", check)
    load()
    assert entry_of(tmp_path).stat().st_ino in synced


@pytest.mark.parametrize("damage", ["cut", "edited", "one more", "one not named", "no report"])
def test_a_cleaned_copy_that_was_damaged_is_cleaned_again(
    tmp_path, data, monkeypatch, capsys, damage
):
    # Starting processes takes longer than the cleaning
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rows_per_shard: 50\nsteps:\n  - exact_dedup\n")
    arguments = DataArguments([str(data)], clean_recipe=str(recipe))
    shards = arguments.expand([str(data)])
    assert len(shards) == 2
    expected, report = [shard.read_bytes() for shard in shards], shards[0].with_name("report.json")
    if damage == "cut":
        shards[0].write_bytes(expected[0][:100])
    elif damage == "edited":
        replace_with_the_same_size_and_time(shards[0])
    elif damage == "one more":
        shards[0].with_name("data-00002.jsonl").write_text('{"text": "poison"}\n')
    elif damage == "one not named":
        facts = json.loads(report.read_text(encoding="utf-8"))
        report.write_text(json.dumps(facts | {"shards": facts["shards"][:1]}), encoding="utf-8")
    else:
        report.write_bytes(b"")
    capsys.readouterr()
    assert [shard.read_bytes() for shard in arguments.expand([str(data)])] == expected
    assert capsys.readouterr().err.count("preparing it again") == (damage != "one more")


def test_a_damaged_result_of_clean_is_refused_where_the_user_put_it(tmp_path, data):
    procedure = cleaning.Procedure.from_dict({"steps": ["exact_dedup"]})
    cleaning.clean([data], tmp_path / "out", procedure, num_proc=1)
    shard = tmp_path / "out" / "data-00000.jsonl"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"data-00000.jsonl has 100 bytes, was .* is damaged. Remove it"
    ):
        cleaning.clean([data], tmp_path / "out", procedure, num_proc=1)
    assert shard.stat().st_size == 100


def test_damaged_files_of_the_embedded_corpus_are_restored_and_valid_ones_left_alone():
    paths = [Path(path) for path in DataArguments().or_embedded("sft").train_files]
    content, status = paths[0].read_bytes(), paths[0].stat()
    DataArguments().or_embedded("sft")
    assert paths[0].stat() == status
    write_with_the_same_time(paths[0], content.replace(b"lives", b"dwelt"))
    DataArguments().or_embedded("sft")
    assert paths[0].read_bytes() == content


# Inputs


def append_a_row(path):
    with path.open("a") as file:
        file.write('{"text": "one more"}\n')


@pytest.mark.parametrize("change", [append_a_row, replace_with_the_same_size_and_time, Path.unlink])
def test_a_file_that_changes_while_it_is_packed_is_refused_by_name_and_nothing_is_kept(
    load, data, tmp_path, monkeypatch, change
):
    prepare = documents._prepare

    def disturbed(*args, **options):
        facts = prepare(*args, **options)
        change(data)
        return facts

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="changed while it was read") as caught,
    ):
        patch.setattr(documents, "_prepare", disturbed)
        load()
    assert str(caught.value).startswith(f"{data}: ")
    assert not [path for path in (tmp_path / "cache" / "blocks").iterdir() if path.is_dir()]


def test_permissions_and_links_of_a_file_may_change_while_it_is_packed(load, data, monkeypatch):
    prepare, rows = documents._prepare, load()

    def disturbed(*args, **options):
        data.chmod(0o600)
        data.with_name("link").hardlink_to(data)
        return prepare(*args, **options)

    shutil.rmtree(cache_directory())
    monkeypatch.setattr(documents, "_prepare", disturbed)
    assert load() == rows


def test_a_file_that_changes_while_it_is_cleaned_is_refused_and_nothing_is_kept(
    tmp_path, data, monkeypatch
):
    finish = pipeline.Cleaning._finish_part
    monkeypatch.setattr(
        pipeline.Cleaning,
        "_finish_part",
        lambda self, part: finish(self, part) or append_a_row(data),
    )
    with pytest.raises(UserError, match="changed while it was read"):
        cleaning.clean(
            [data],
            tmp_path / "out",
            cleaning.Procedure.from_dict({"steps": ["exact_dedup"]}),
            num_proc=1,
        )
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and "out" in path.name]


def test_a_file_of_conversations_that_changes_while_it_is_read_is_refused(
    write_jsonl, tokenizer, monkeypatch
):
    rows = [{"messages": [user(f"question {number}"), assistant("answer")]} for number in range(20)]
    path, tokenize = write_jsonl("chats.jsonl", rows), chats.tokenize_conversations

    def disturbed(*args):
        append_a_row(Path(path))
        return tokenize(*args)

    monkeypatch.setattr(chats, "tokenize_conversations", disturbed)
    with pytest.raises(UserError, match="changed while it was read"):
        load_conversations(DataArguments([path], on_bad_rows="skip"), tokenizer, 64)


def test_a_large_file_is_hashed_again_only_after_a_touch(data, monkeypatch):
    monkeypatch.setattr(cache, "LARGE", 0)
    first = content_hash([data])
    with monkeypatch.context() as patch:
        patch.setattr(cache.xxhash, "xxh3_128", None)  # nothing is hashed
        assert content_hash([data]) == first
    replace_with_the_same_size_and_time(data)
    second = content_hash([data])
    monkeypatch.setattr(cache, "LARGE", 2**26)
    assert first != second == content_hash([data])


@pytest.mark.parametrize("found", [b"", b"\xff\xfe", b"1 2 3 4 5", "a directory"])
def test_a_broken_record_of_hashes_costs_only_time(data, tmp_path, monkeypatch, found):
    monkeypatch.setattr(cache, "LARGE", 0)
    expected = content_hash([data])
    (memory,) = (tmp_path / "cache" / "hashes").iterdir()
    memory.unlink()
    memory.mkdir() if found == "a directory" else memory.write_bytes(found)
    assert content_hash([data]) == expected


def test_processes_that_have_read_different_data_do_not_train_together(monkeypatch):
    old, new = ({"train": {"hash": digest}} for digest in "ab")
    monkeypatch.setattr(training_run, "gather_object", lambda mine: [*mine, old])
    check_same_data(old)
    with pytest.raises(UserError, match="have read different data"):
        check_same_data(new)


# A cache that cannot be used


def no_home(monkeypatch, tmp_path):
    def refuse():
        # As for a user without an entry and without $HOME
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MINIMIND_CACHE")
    monkeypatch.setattr(Path, "home", refuse)


def a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "file"))


def not_utf_8(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMIND_CACHE", f"{tmp_path}/caf\udce9")


def no_such_user(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMIND_CACHE", "~no-such-user/cache")


def no_blocks(monkeypatch, tmp_path):
    cache_directory()
    (tmp_path / "cache" / "blocks").write_text("")


def read_only(monkeypatch, tmp_path):
    def refuse(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(cache.tempfile, "TemporaryFile", refuse)


@pytest.mark.parametrize("spoil", [a_file, no_home, not_utf_8, no_such_user, no_blocks, read_only])
def test_a_temporary_directory_replaces_an_unusable_cache_with_one_notice(
    load, tmp_path, monkeypatch, capsys, spoil
):
    rows = load()
    shutil.rmtree(tmp_path / "cache")
    spoil(monkeypatch, tmp_path)
    capsys.readouterr()
    assert [load(), load()] == [rows, rows]
    output = capsys.readouterr()
    notices = output.err.count("cannot be used as the cache")
    assert notices == output.err.count("Set MINIMIND_CACHE to") == 1
    assert output.out.count("preparing") == 1
    (temporary,) = (tmp_path / "temporary").iterdir()
    assert len(list((temporary / "blocks").glob("*/manifest.json"))) == 1


def test_messages_name_a_cache_in_the_working_directory_from_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cache.shown(tmp_path / "cache" / "blocks") == Path("cache/blocks")
    assert cache.shown(tmp_path.parent) == tmp_path.parent


def test_complete_rows_in_a_read_only_cache_are_used(load, tmp_path, monkeypatch, capsys):
    rows = load()
    read_only(monkeypatch, tmp_path)
    capsys.readouterr()
    assert load() == rows
    assert capsys.readouterr() == ("", "")


def test_prepare_does_not_fall_back_to_a_temporary_directory(tmp_path, monkeypatch, capsys, data):
    a_file(monkeypatch, tmp_path)
    message = failure(capsys, run_cli, "prepare", "--train_files", data)
    expected = "nothing can be kept there (Not a directory). Set MINIMIND_CACHE"
    assert message.startswith(f"{tmp_path / 'file'}: {expected}")
    assert not list((tmp_path / "temporary").iterdir())


def test_the_processes_of_a_launch_share_the_temporary_directory_and_delete_it(tmp_path):
    script = """
from minimind.common.cache import cache_directory
print(cache_directory('blocks'), flush=True)
input()
"""
    environment = os.environ | {"MINIMIND_CACHE": "/dev/null/cache", "TMPDIR": str(tmp_path)}
    environment["LOCAL_WORLD_SIZE"] = "2"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment | {"LOCAL_RANK": str(rank)},
            text=True,
            **pipes,
        )
        for rank in range(2)
    ]
    directories = [process.stdout.readline().strip() for process in ranks]
    assert directories[0] == directories[1]
    assert Path(directories[0]).is_dir()
    errors = [process.communicate("\n")[1] for process in ranks]
    assert [text.count("cannot be used as the cache") for text in errors] == [1, 0]
    assert not Path(directories[0]).parent.exists()


def test_a_full_disk_is_one_error_and_leaves_no_rows(load, tmp_path, monkeypatch):
    def fill(part, rows):
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    monkeypatch.setattr(block_writer.BlockWriter, "_write", fill)
    expected = r"nothing can be kept there \(No space left on device\). Set MINIMIND_CACHE"
    with pytest.raises(UserError, match=expected):
        load()
    assert not [path for path in (tmp_path / "cache" / "blocks").iterdir() if path.is_dir()]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_without_file_locks_the_rows_are_prepared_anyway(load, tmp_path, monkeypatch, code):
    rows, entry = load(), entry_of(tmp_path)
    shutil.rmtree(entry)
    leftover = Path(f"{entry}.0.building")
    leftover.mkdir()

    def refuse(descriptor, how):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(filelock._unix.fcntl, "flock", refuse)
        assert load() == rows
    assert leftover.is_dir()  # another process may be at work in it
    shutil.rmtree(entry)
    assert load() == rows
    assert not leftover.exists()  # with the lock it is known to be left by a killed process


def test_without_a_lock_the_slower_of_two_processes_uses_the_rows_of_the_faster(
    load, tmp_path, monkeypatch
):
    prepare, rows = documents._prepare, load()
    shutil.rmtree(entry_of(tmp_path))

    def overtaken(*args, **options):
        monkeypatch.setattr(documents, "_prepare", prepare)
        # So that the other gets it
        (args[0].parent / f"{args[0].name.split('.')[0]}.lock").unlink()
        load()
        return prepare(*args, **options)

    monkeypatch.setattr(documents, "_prepare", overtaken)
    assert load() == rows
    assert entry_of(tmp_path)


def test_rows_in_use_outlive_their_cache(tokenizer, data, tmp_path):
    blocks = load_blocks(DataArguments([str(data)]), tokenizer, 16)
    before = [row["input_ids"].tolist() for row in blocks.train]
    shutil.rmtree(tmp_path / "cache")
    assert [row["input_ids"].tolist() for row in blocks.train] == before


def test_a_chat_without_a_usable_cache_has_no_history(tmp_path, monkeypatch, capsys):
    a_file(monkeypatch, tmp_path)
    assert chat.history_file() is None
    assert "what you type is not remembered" in capsys.readouterr().err
