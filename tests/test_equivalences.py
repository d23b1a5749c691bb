"""Eight rows make the same step however they are shared out: micro-batches, processes, ZeRO,
checkpointing."""

import json

import pytest
from pipeline import document_rows, run_script, short_run, write_model
from ranks import run_ranks
from safetensors.torch import load_file

STEPS = 6
RECIPE = {"max_steps": STEPS, "learning_rate": 1e-3, "warmup_steps": 2, "logging_steps": 1}

# transformers' own call of torch's former name of an argument
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture(scope="module")
def options(tmp_path_factory, tokenizer_dir):
    """A function: micro-batch and accumulation -> directory and command line of six steps."""
    root = tmp_path_factory.mktemp("equivalences")
    (root / "docs.jsonl").write_text(
        "\n".join(json.dumps(row, ensure_ascii=False) for row in document_rows())
    )
    data = [
        "--model_config",
        write_model(root / "model.json"),
        "--tokenizer",
        tokenizer_dir,
        "--block_size",
        "32",
    ]
    data += ["--train_files", root / "docs.jsonl", "--eval_ratio", "0.2"]

    def build(name, micro_batch, accumulation, *extra):
        sizes = {
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation,
        }
        return root / name, list(
            map(str, [*short_run(root / name, **RECIPE | sizes), *data, *extra])
        )

    return build


@pytest.fixture(scope="module")
def whole(options):
    """Eight rows in one micro-batch of one process."""
    directory, words = options("8x1", 8, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(directory.parent / "cache"))
        run_script(patch, "pretrain", *words)
    return directory


def assert_equal(directory, whole):
    """Loss and gradient norm of every step, and the weights at the end, within float error."""
    logs = []
    for path in (directory, whole):
        lines = [json.loads(line) for line in (path / "train_log.jsonl").read_text().splitlines()]
        logs.append([(line["loss"], line["grad_norm"]) for line in lines if "loss" in line])
    assert len(logs[0]) == STEPS
    for step, expected in zip(*logs, strict=True):
        assert step == pytest.approx(expected, rel=1e-4)
    weights, expected = (load_file(path / "model.safetensors") for path in (directory, whole))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        # Six AdamW steps move a weight by up to 4e-3; its ratio of moments enlarges float error of
        # tiny gradients.
        assert (weight - expected[name]).abs().max() < 2e-5, name


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "extra"),
    [(1, 8, ()), (2, 4, ()), (8, 1, ("--activation_checkpointing", "True"))],
    ids=["1x8", "2x4", "activation-checkpointing"],
)
def test_one_process_computes_the_same_step(
    micro_batch, accumulation, extra, options, whole, monkeypatch
):
    name = f"{micro_batch}x{accumulation}{'-'.join(extra)}"
    directory, words = options(name, micro_batch, accumulation, *extra)
    run_script(monkeypatch, "pretrain", *words)
    assert_equal(directory, whole)


@pytest.mark.parametrize("zero", [False, True], ids=["ddp", "zero2"])
def test_two_processes_compute_the_same_step(zero, options, whole):
    if zero:
        pytest.importorskip("deepspeed")
    extra = ("--deepspeed", "ds_config_zero2.json") if zero else ()
    directory, words = options("zero2" if zero else "ddp", 4, 1, *extra)
    said = run_ranks("pretrain.py", *words, log=directory.with_suffix(".log"))
    assert f"cpu x 2, {'DeepSpeed' if zero else 'plain'}" in said
    assert_equal(directory, whole)
