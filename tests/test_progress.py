"""The line of each log, the measures in it, and the held-out bits per byte of each source."""

import io
import json
import math
import re
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from pipeline import document_rows, run_script, short_run, write_model
from transformers import TrainerState, TrainingArguments

from minimind.costs import this_machine
from minimind.data.documents import load_blocks
from minimind.data.packing import BlockCollator
from minimind.evaluation import bits_per_nat
from minimind.stage_directory import read_stage
from minimind.training import progress as progress_module
from minimind.training.data_arguments import DataArguments
from minimind.training.progress import ProgressCallback, peak_memory
from minimind.training.trainers import BlockTrainer


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_dir):
    """pretrain.py for four steps on two sources; returns its log, its record and what it
    printed."""
    root, said = tmp_path_factory.mktemp("progress"), io.StringIO()

    def write(name, rows):
        (root / name).write_text("\n".join(json.dumps(row) for row in rows))
        return root / name

    zh = write("zh.jsonl", [{"text": f"敏捷的狐狸跳过了懒惰的狗 {n}" * 3} for n in range(40)])
    en = write("en.jsonl", [{"text": f"the quick brown fox runs home {n}"} for n in range(80)])
    words = ["--train_files", f"{zh}:0.5", f"{en}:0.5", "--eval_ratio", 0.3]
    words += ["--model_config", write_model(root / "model.json"), "--tokenizer", tokenizer_dir]
    options = {
        "max_steps": 4,
        "block_size": 16,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setenv("MINIMIND_CACHE", str(root / "cache"))
        run_script(patch, "pretrain", *short_run(root / "run", **options), *words)
    log = [json.loads(line) for line in (root / "run" / "train_log.jsonl").read_text().splitlines()]
    return log, read_stage(root / "run"), said.getvalue()


def test_a_line_tells_all_that_the_log_holds(run):
    log, _, said = run
    lines = [line for line in said.splitlines() if line.startswith("step") and " loss " in line]
    training = [entry for entry in log if "loss" in entry]
    assert len(lines) == len(training) == 3  # the first step, 2 and 4
    pattern = (
        r"step (\d)/4 +([\d.]+)%  loss ([\d.]+)  bpb ([\d.]+)  grad ([\d.]+)  lr ([\d.e+-]+)"
        r" +([\d,]+) tokens/s"
        r"(?:  MFU +[\d.]+%)?  ([\d.]+) GiB  \d+:\d\d:\d\d elapsed, \d+:\d\d:\d\d left"
    )
    for line, entry in zip(lines, training, strict=True):
        step, done, loss, bpb, grad, rate, speed, memory = re.fullmatch(pattern, line).groups()
        assert int(step) == entry["step"]
        assert float(done) == 100 * entry["step"] / 4
        assert float(loss) == pytest.approx(entry["loss"], abs=1e-4)
        assert float(bpb) == pytest.approx(entry["bits_per_byte"], abs=1e-4)
        assert float(grad) == pytest.approx(entry["grad_norm"], abs=1e-3)
        assert float(rate) == pytest.approx(entry["learning_rate"], rel=0.01, abs=1e-9)
        assert int(speed.replace(",", "")) == pytest.approx(entry["tokens_per_second"], abs=1)
        assert float(memory) == pytest.approx(entry["memory_gib"], abs=0.01)


def test_bits_per_byte_of_a_batch_are_its_loss_over_the_bytes_of_an_epoch_s_targets(run):
    log, record, _ = run
    sources = record["data"]["train"]["sources"]
    taken = [source["rows_per_epoch"] / source["blocks"] for source in sources]
    tokens, count = (
        sum(share * source[name] for share, source in zip(taken, sources, strict=True))
        for name in ("targets", "target_bytes")
    )
    for entry in log:
        if "loss" in entry:
            assert entry["bits_per_byte"] == pytest.approx(
                entry["loss"] / math.log(2) * tokens / count, abs=1e-5
            )


def test_held_out_bits_per_byte_are_told_for_each_source_and_weigh_up_to_the_whole(run):
    log, record, _ = run
    sources = record["data"]["eval"]["sources"]
    assert [source["name"] for source in sources] == ["zh", "en"]
    total = record["data"]["eval"]
    assert total["target_bytes"] == sum(source["target_bytes"] for source in sources)
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert len(evaluations) >= 3
    for entry in evaluations:
        bits = sum(
            entry[f"eval_bits_per_byte/{source['name']}"] * source["target_bytes"]
            for source in sources
        )
        assert entry["eval_bits_per_byte"] == pytest.approx(bits / total["target_bytes"], rel=1e-5)
        expected = entry["eval_loss"] * total["targets"] / total["target_bytes"] / math.log(2)
        assert entry["eval_bits_per_byte"] == pytest.approx(expected, rel=1e-6)
    assert "bits_per_byte/zh" in record["metrics"]["after"]


def is_chinese(text):
    return any("\u4e00" <= character <= "\u9fff" for character in text)


@pytest.mark.parametrize("given", ["held out of the training files", "eval files"])
def test_each_source_is_evaluated_on_its_own_rows_alone(
    given, model, tokenizer, write_jsonl, tmp_path
):
    zh = write_jsonl("zh.jsonl", [{"text": f"敏捷的狐狸跳过了懒惰的狗 {n}"} for n in range(60)])
    en = write_jsonl(
        "en.jsonl", [{"text": f"the quick brown fox runs home {n}"} for n in range(60)]
    )
    data = DataArguments(
        [f"{zh}:1x", f"{en}:2x"], [zh, en] if given == "eval files" else None, eval_ratio=0.5
    )
    blocks = load_blocks(data, tokenizer, 16)
    arguments = TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True
    )
    arguments.per_device_eval_batch_size = 7
    model.config.use_cache = False

    def evaluate(rows, counts):
        return BlockTrainer(
            model=model,
            args=arguments,
            eval_dataset=rows,
            data_collator=BlockCollator(0, 2),
            eval_counts=counts,
        ).evaluate()

    found = evaluate(blocks.eval, blocks.facts["eval"])
    first = 0
    for source in blocks.facts["eval"]["sources"]:
        rows = blocks.eval.select(range(first, first + source["blocks"]))
        texts = tokenizer.batch_decode([row["input_ids"] for row in rows])
        assert all(is_chinese(text) == (source["name"] == "zh") for text in texts)
        alone = evaluate(rows, source)
        key = f"eval_bits_per_byte/{source['name']}"
        assert found[key] == pytest.approx(alone["eval_bits_per_byte"], rel=1e-6)
        first += source["blocks"]
    assert first == len(blocks.eval)
    whole = evaluate(blocks.eval, {k: v for k, v in blocks.facts["eval"].items() if k != "sources"})
    assert found["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-5)


def test_one_source_gives_one_number(write_jsonl, tokenizer):
    train = write_jsonl("train.jsonl", document_rows())
    facts = load_blocks(DataArguments([train], eval_ratio=0.3), tokenizer, 16).facts
    assert "sources" not in facts["eval"]
    assert bits_per_nat(facts["train"]) == pytest.approx(
        facts["train"]["targets"] / facts["train"]["target_bytes"] / math.log(2)
    )


def test_where_the_bytes_are_not_known_no_bits_per_byte_are_told():
    assert bits_per_nat({"conversations": 3}) is None


def log_at(progress, seconds, step, tokens):
    """What a log adds after so many seconds, steps and tokens of a run of 10 steps."""
    state = TrainerState(
        max_steps=10, global_step=step, num_input_tokens_seen=tokens, is_world_process_zero=True
    )
    logs = {"loss": 2.0}
    progress.seconds = seconds
    progress.on_log(None, state, None, logs)
    return logs


def peaks_measured(monkeypatch, *peaks):
    """Let the machine show these peaks one after another; returns those that were not measured."""
    found, left = [peaks[0]], list(peaks[1:])
    device = SimpleNamespace(peak=lambda precision: max(found))
    monkeypatch.setattr(progress_module, "this_device", lambda: device)
    monkeypatch.setattr(
        progress_module, "measure_again", lambda precision: found.append(left.pop(0))
    )
    return left


@pytest.fixture
def progress(tmp_path):
    """The callback of a run whose model takes 2 FLOPs a token."""
    progress = ProgressCallback(tmp_path)
    progress.on_train_begin(
        None, TrainerState(num_input_tokens_seen=0, is_world_process_zero=True), None
    )
    progress.flops_per_token, progress.precision = 2.0, "fp32"
    return progress


def test_mfu_is_the_models_flops_over_the_peak(progress, monkeypatch, capsys):
    peaks_measured(monkeypatch, 8000.0)
    logs = log_at(progress, seconds=2.0, step=4, tokens=2000)
    assert logs["tokens_per_second"] == 1000.0
    assert logs["mfu"] == 0.25
    said = capsys.readouterr().out
    assert "step  4/10  40.0%" in said
    assert "MFU 25.0%" in said
    assert "0:00:02 elapsed, 0:00:03 left" in said


def test_a_peak_measured_beside_another_process_is_measured_again_and_no_run_is_above_it(
    progress, monkeypatch
):
    left = peaks_measured(monkeypatch, 1000.0, 8000.0, 7000.0)
    # 2,000 FLOP/s, above what was measured
    assert log_at(progress, seconds=2.0, step=2, tokens=2000)["mfu"] == 1.0
    assert log_at(progress, seconds=1000.0, step=3, tokens=2000 + 998 * 2000)["mfu"] == 0.5
    assert left == [7000.0]
    assert log_at(progress, seconds=1001.0, step=4, tokens=2000 + 998 * 2000 + 8000)["mfu"] == 1.0


def test_measuring_the_peak_costs_a_run_one_hundredth_of_its_time(progress, monkeypatch):
    left = peaks_measured(monkeypatch, *map(float, range(1000, 1010)))
    clock = iter(range(0, 1000, 5))  # each measurement takes 5 s
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(clock))
    for step in range(1, 10):
        log_at(progress, seconds=200.0 * step, step=step, tokens=step)
    assert 9 - len(left) == 4  # when 10 s, 510 s, 1,010 s and 1,510 s are over


def test_the_peak_of_a_cpu_is_the_best_that_was_ever_measured(monkeypatch):
    monkeypatch.setattr(this_machine, "FASTEST", {})
    first = this_machine.this_cpu()
    this_machine.measure_again("fp32")
    assert this_machine.this_cpu().peak_fp32 >= first.peak_fp32
    this_machine.FASTEST["cpu", torch.float32] = 1e18  # as a quieter moment would have shown
    this_machine.measure_again("fp32")
    assert this_machine.this_cpu().peak_fp32 == 1e18


def test_on_windows_which_has_no_resource_module_memory_is_what_the_system_says(monkeypatch):
    held = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=1, peak_wset=2**30))
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(progress_module.psutil, "Process", lambda: held)
    assert peak_memory() == 2**30


def test_memory_is_what_the_process_held_at_most():
    before = peak_memory()
    held = torch.ones(before // 4 + 2**26)  # 4 bytes each: 256 MiB more than all that was ever held
    assert before + 2**27 < peak_memory() < before + 4 * held.numel() + 2**28
