import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from benchmarks.classic_recipe import group_texts
from benchmarks.time_to_quality import bits_per_byte, held_out_rows, reached
from minimind.data.packing import Wrapped
from minimind.evaluation import evaluate

TEXTS = [f"{number} brown foxes jump, 棕色狐狸 {number}" for number in range(7)]
# Two optimizers in one, of which a step counts once; the learning rate tells the weights apart
SCRIPT = """
    import sys, torch

    class Both(torch.optim.SGD):
        def step(self):
            torch.optim.SGD(self.param_groups[0]["params"], lr=1.0).step()
            super().step()

    model = torch.nn.Module()
    model.lm_head = torch.nn.Linear(1, 1, bias=False)
    model.forward = lambda x: model.lm_head(x)
    torch.nn.init.zeros_(model.lm_head.weight)
    optimizer = Both(model.parameters(), lr=1.0)
    for _ in range(int(sys.argv[1])):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    sys.exit(0)
"""


def test_bits_per_byte_of_saved_weights_are_those_of_minimind_evaluate(
    model, tokenizer, write_jsonl, tmp_path
):
    file = write_jsonl("held_out.jsonl", [{"text": text} for text in TEXTS])
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    expected = evaluate(model, tokenizer, [file], stage="pretrain")
    torch.nn.init.zeros_(model.lm_head.weight)
    rows = held_out_rows(TEXTS, tokenizer, tokenizer.eos_token_id)
    found = bits_per_byte(model, tmp_path / "weights.pt", tokenizer, rows)
    assert found == pytest.approx(expected["bits_per_byte"], rel=1e-5)


def test_held_out_rows_differ_only_in_the_token_before_the_document(tokenizer):
    rows = held_out_rows(TEXTS, tokenizer, tokenizer.eos_token_id, length=12)
    others = held_out_rows(TEXTS, tokenizer, tokenizer.bos_token_id, length=12)
    for row, other, text in zip(rows, others, TEXTS, strict=True):
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:11]
        assert row["input_ids"].tolist() == row["labels"].tolist() == [tokenizer.eos_token_id, *ids]
        assert other["input_ids"].tolist() == [tokenizer.bos_token_id, *ids]


def test_the_classic_recipe_groups_texts_into_the_rows_of_wrapped_packing(tokenizer):
    streams = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(TEXTS)["input_ids"]]
    groups = group_texts({"input_ids": streams}, block_size=16)
    rows = Wrapped(16).add(np.concatenate(streams)).ids.reshape(-1, 16).tolist()
    assert groups == {"input_ids": rows, "labels": rows}


def test_a_timed_script_keeps_the_weights_of_the_marks_and_of_the_end(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    words = [sys.executable, "benchmarks/timed_script.py", tmp_path, str(time.time()), "0,9999"]
    subprocess.run([*words, script, "3"], check=True)
    times = json.loads((tmp_path / "times.json").read_text())
    assert len(times["steps"]) == 3
    assert [point["steps"] for point in times["weights"]] == [1, 3]
    weights = [torch.load(point["file"])["lm_head.weight"].item() for point in times["weights"]]
    assert weights == [-2, -6]  # each step has two parts
    seconds = [point["seconds"] for point in times["weights"]]
    assert 0 < times["steps"][0] == seconds[0] < times["steps"][-1] <= seconds[1]


def test_ours_reaches_a_peer_with_the_shortest_run_that_is_as_good_at_its_end():
    ours = [("ours", 0, 10, 2.5), ("ours", 0, 40, 2.0), ("ours", 0, 90, 1.9), ("ours", 1, 10, 2.1)]
    peers = [("peer", 0, 80, 2.0), ("peer", 1, 80, 2.0)]
    keys = ("system", "seed", "seconds", "bits_per_byte")
    runs = [dict(zip(keys, run, strict=True)) for run in ours + peers]
    ratios = [each["ratio"] for each in reached({"runs": runs}, "peer")]
    assert ratios == [0.5, float("inf")]
