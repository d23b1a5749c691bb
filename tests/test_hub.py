import json
import shutil
import socket

import datasets
import huggingface_hub
import pytest
from reading import GOOD, refusal, write

from minimind.common.cache import content_hash
from minimind.data.files import read_rows
from minimind.data.sources import expand, total_size


@pytest.fixture
def cached_dataset(tmp_path, monkeypatch):
    """owner/name with the config "zh" and the splits train and test, as `datasets` keeps it after a
    download."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    splits = {
        name: write(tmp_path / f"{name}.jsonl", f'{{"text": "{name}"}}\n' + GOOD)
        for name in ("train", "test")
    }
    builder = datasets.load_dataset_builder(
        "json", "zh", data_files=splits, cache_dir=str(tmp_path / "built")
    )
    builder.download_and_prepare()
    cached = tmp_path / "hub" / "owner___name" / "zh" / "0.0.0" / "0123abcd"
    shutil.copytree(builder.cache_dir, cached)
    for path in cached.glob("json-*"):
        path.rename(cached / path.name.replace("json-", "name-"))
    facts = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(
        json.dumps(facts | {"config_name": "zh", "dataset_name": "name"})
    )


@pytest.mark.parametrize(
    ("given", "split"),
    [
        ("", "train"),
        (":zh", "train"),
        (":zh:test", "test"),
        ("::test", "test"),
        ("@0123abcd", "train"),
    ],
)
def test_a_dataset_of_the_hub_gives_the_rows_of_one_split(cached_dataset, given, split):
    spelling = f"hf://datasets/owner/name{given}"
    found = list(read_rows([spelling], "skip", progress=pytest.fail))
    assert found == [
        (f"{spelling}:row 1", {"text": split}),
        (f"{spelling}:row 2", {"text": "good"}),
    ]
    (file,) = expand([spelling])
    assert str(file) == spelling
    assert total_size([file]) == 0
    assert list(read_rows([file])) == found


def test_the_hash_of_a_dataset_of_the_hub_follows_its_split_and_revision(cached_dataset, tmp_path):
    def hash_of(given):
        return content_hash(expand([f"hf://datasets/owner/name{given}"]))

    first = hash_of("")
    assert first == hash_of(":zh:train") != hash_of(":zh:test")
    (cached,) = (tmp_path / "hub" / "owner___name" / "zh" / "0.0.0").iterdir()
    cached.rename(cached.with_name("4567ef"))
    assert hash_of("") != first


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "hf://datasets/owner/other",
            [
                *(
                    "Couldn't reach 'owner/other'",
                    "HF_HUB_OFFLINE is set",
                    "HF_ENDPOINT=https://hf-mirror.com",
                ),
                *("https://huggingface.co/datasets/owner/other", "modelscope download --dataset"),
            ],
        ),
        (
            "hf://datasets/owner/name:en",
            ["ValueError", "'en'", "'zh'", "Check the name, config and split"],
        ),
        ("hf://datasets/owner/name:zh:dev", ["Bad split: dev", "['train', 'test']"]),
        ("hf://datasets/owner/name@v2", ["only revision 0123abcd is in the cache"]),
        ("hf://datasets/json", ["not the name of a dataset"]),
        (
            "hf://datasets/owner/name/train.jsonl",
            ["not the name of a dataset", "expected hf://datasets/OWNER/NAME"],
        ),
        ("hf://datasets/", ["not the name of a dataset"]),
        ("owner/name", ["does not exist", "or hf://datasets/OWNER/NAME"]),
    ],
)
def test_a_dataset_out_of_reach_is_one_clear_message(cached_dataset, given, words):
    message = refusal(lambda: list(read_rows([given])))
    assert message.startswith(f"{given}: ")
    assert all(word in message for word in words), message


@pytest.fixture
def dead_hub(monkeypatch):
    """The address of a Hub that refuses connections; waiting for it fails."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for config, name in (
            (datasets.config, "HF_ENDPOINT"),
            (huggingface_hub.constants, "ENDPOINT"),
        ):
            monkeypatch.setattr(config, name, address)
        for config in (datasets.config, huggingface_hub.constants):
            monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited for {seconds} s"))
        yield address


def test_a_hub_out_of_reach_is_tried_once_and_the_message_names_the_ways_round_it(
    dead_hub, cached_dataset
):
    message = refusal(lambda: expand(["hf://datasets/owner/other"]))
    assert f"{dead_hub} does not answer" in message
    assert "HF_HUB_OFFLINE" not in message
    assert "HF_ENDPOINT=https://hf-mirror.com" in message


def test_a_dataset_in_the_cache_is_read_without_waiting_for_a_hub_out_of_reach(
    dead_hub, cached_dataset
):
    rows = [
        row
        for _, row in read_rows(["hf://datasets/owner/name::test"], "skip", progress=pytest.fail)
    ]
    assert rows == [{"text": "test"}, {"text": "good"}]
    assert not datasets.config.HF_HUB_OFFLINE
