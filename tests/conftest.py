"""Shared by all tests: no network, a cache of their own, and a model, tokenizer and data small
enough for seconds."""

import atexit
import gc
import json
import os
import shutil
import tempfile
from functools import partial

os.environ.update(
    HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", MINIMIND_LANG="en"
)
# seconds, for its service to start, on a machine however busy
os.environ["WANDB__SERVICE_WAIT"] = "600"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the tests of test_gpu.py run where it is set
# Read when trackio is imported, which TRL does
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")

import pytest
import torch

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.common import errors
from minimind.data.template_choice import set_chat_template
from minimind.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

# Nothing of a test has to outlive a power cut, and a short run waits for a hundred of these
os.fsync = lambda descriptor: None

atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)

# At these sizes a second thread gains nothing, and stalls where other work runs
torch.set_num_threads(1)

# The library's tests, run by scripts/conformance.sh with settings of their own
collect_ignore = ["conformance"]

ENGLISH = "the quick brown fox jumps over the lazy dog and runs home"
CHINESE = "敏捷的棕色狐狸跳过了懒惰的狗然后跑回家"


def pytest_collection_finish():
    """Leave what the imports made out of garbage collections, of which every training makes one: it
    is a million objects, and a quarter of the time of a short run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def pictures(request):
    """The charts of a run are drawn only where a file of tests is marked `pictures`: they take half
    of the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.node.get_closest_marker("pictures"):
            patch.setattr("minimind.training.plots.line_chart", lambda *args: "<svg></svg>")
            patch.setattr("minimind.training.report.bar_chart", lambda *args: "<svg></svg>")
            patch.setattr("minimind.training.run.plot_loss", lambda log, path, *args: path.touch())
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def nothing_has_failed(monkeypatch):
    # A decoration's failure is said once for each process
    monkeypatch.setattr(errors, "FAILED", set())


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([ENGLISH, CHINESE] * 20, vocab_size=300)


@pytest.fixture(scope="session")
def tokenizer_dir(tokenizer, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def default():
    """The shipped tokenizer."""
    return load_tokenizer()


@pytest.fixture(params=["default", "tiny"])
def either(request, tokenizer, default):
    return default if request.param == "default" else tokenizer


@pytest.fixture
def llama2():
    tokenizer = load_tokenizer()
    set_chat_template(tokenizer, "llama2")
    return tokenizer


@pytest.fixture
def chatty(tokenizer_dir):
    """The tiny tokenizer with a chat template."""
    tokenizer = load_tokenizer(tokenizer_dir)
    set_chat_template(tokenizer, "chatml")
    return tokenizer


@pytest.fixture
def config(tokenizer):
    return MiniMindConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return MiniMindForCausalLM(config)


@pytest.fixture
def write_jsonl(tmp_path):
    """Write rows to a jsonl file; a string is written as the line it is."""

    def write(name, rows):
        path = tmp_path / name
        lines = [
            row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def bytewise():
    """A tokenizer in which each byte is a token, so that tokens can be counted by hand."""
    return train_tokenizer([""], vocab_size=259)


@pytest.fixture
def make_trainer(config, tokenizer, tmp_path):
    """Make a small trainer, see `small_run.small_trainer`; other tests need not import it."""
    from small_run import small_trainer

    return partial(small_trainer, config, tokenizer, tmp_path / "run")
