"""The curves of preference training: what is logged, against the formulas; what they say at the
end, with each pattern planted; and stopping by them."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from pipeline import pair_rows, run_script, short_run

from minimind.common.errors import UserError
from minimind.stage_directory import read_stage
from minimind.training.arguments import DPOStageConfig
from minimind.training.callbacks import Baseline
from minimind.training.command_line import parse
from minimind.training.plots import read_log
from minimind.training.preference_metrics import PreferenceMetrics
from minimind.training.preference_reading import read_curves

# TRL 1.16 asks for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# Metrics of one batch


class Library:
    """What the mix-in uses of TRL's trainer."""

    def _compute_loss(self, model, inputs, return_outputs):
        assert model(**inputs).log_probs is not None
        return torch.tensor(0.5)

    def log(self, logs, start_time):
        means = {key: sum(values) / len(values) for key, values in self._metrics["train"].items()}
        self.logged = logs | means


class Trainer(PreferenceMetrics, Library):
    model = SimpleNamespace(training=True)

    def __init__(self, ld_alpha=None):
        self.ld_alpha, self._metrics = ld_alpha, {"train": defaultdict(list)}


# Two pairs; the first token is the prompt's. Replies of 3 and 1, and of 1 and 2 tokens.
MASK = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]])
POLICY = [[-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0], [-2.0, 0.0, 0.0], [-1.0, -1.0, 0.0]]
REFERENCE = [[-1.0, -2.5, -3.5], [-0.4, 0.0, 0.0], [-1.5, 0.0, 0.0], [-1.0, -1.5, 0.0]]


def logged(*masks, references=REFERENCE, trainer=None):
    """What a trainer logs after one batch, or after some with these masks."""
    trainer, output = trainer or Trainer(), SimpleNamespace(log_probs=torch.tensor(POLICY))
    for mask in masks or [MASK]:
        inputs = {"completion_mask": mask}
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = (
            torch.tensor(references).sum(dim=1).chunk(2)
        )
        assert trainer._compute_loss(lambda **_: output, inputs, False) == 0.5
    trainer.log({})
    return trainer.logged


def log_odds(mean):
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


def test_the_metrics_of_two_pairs_are_those_of_the_formulas():
    # log policy - log reference: +1, -0.1 of the chosen replies, -0.5, +0.5 of the rejected ones
    assert logged() == pytest.approx(
        {
            "kl/reply": (1 - 0.1 - 0.5 + 0.5) / 4,
            "kl/token": (1 - 0.1 - 0.5 + 0.5) / (3 + 1 + 1 + 2),
            "log_odds_chosen": (log_odds(-2) - log_odds(-2) + log_odds(-0.5) - log_odds(-1)) / 2,
            "lengths/chosen": 2.0,
            "lengths/rejected": 1.5,
            "lengths/chosen_longer": 0.5,
            "lengths/chosen_shorter": 0.5,
            "rewards/accuracies_longer": 1.0,
            "rewards/accuracies_shorter": 0.0,
        }
    )


def test_without_a_reference_there_is_no_kl_and_mean_log_probabilities_decide():
    trainer = Trainer()
    trainer.has_reference = False
    found = logged(trainer=trainer)
    assert not {"kl/reply", "kl/token"} & found.keys()
    # Means of -2 against -2, and of -0.5 against -1
    assert (found["rewards/accuracies_longer"], found["rewards/accuracies_shorter"]) == (0, 1)


def test_ld_alpha_weighs_the_tail_of_the_longer_reply():
    weighted = [[-1.0, -1.25, -1.75], REFERENCE[1], REFERENCE[2], [-1.0, -0.75, 0.0]]
    found = logged(references=weighted, trainer=Trainer(ld_alpha=0.5))
    assert found["kl/reply"] == pytest.approx((0.5 - 0.1 - 0.5 + 0.25) / 4)


def test_the_accuracy_of_a_kind_of_pairs_is_over_all_its_pairs_of_all_batches():
    equal = torch.tensor([[0, 1, 1, 0]] * 4)
    one_kind = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]])
    found = logged(MASK, one_kind, equal)
    # Longer: of MASK the first pair, which is right, and both of `one_kind`, of which one is
    assert found["lengths/chosen_longer"] == pytest.approx(3 / 6)
    assert found["rewards/accuracies_longer"] == pytest.approx(2 / 3)
    assert "rewards/accuracies_longer" not in logged(equal)


# The end of a run

STEPS = (10, 20, 30, 40, 50, 60, 70, 80)
PAIRS = 200


def healthy():
    """The curves of a run in which everything is as it should be, from 0 to 1."""
    return {
        "margins": lambda t: 1.2 * t,
        "chosen": lambda t: 0.4 * t,
        "eval_margins": lambda t: t,
        "eval_chosen": lambda t: 0.3 * t,
        "entropy": lambda t: 1.5 - 0.2 * t,
        "eval_accuracies": lambda t: 0.5 + 0.4 * t,
        "longer": (0.5, 0.92),
        "shorter": (0.5, 0.88),
    }


def log_of(curves, with_held_out=True):
    log = []
    for step in (0, *STEPS):
        t = step / STEPS[-1]
        (longer, right_longer), (shorter, right_shorter) = curves["longer"], curves["shorter"]
        for prefix in ("", "eval_") if with_held_out else ("",):
            margin, chosen = (
                curves.get(f"{prefix}{kind}", curves[kind])(t) for kind in ("margins", "chosen")
            )
            values = {
                "loss": 0.69 - margin / 2,
                "rewards/margins": margin,
                "rewards/chosen": chosen,
                "rewards/rejected": chosen - margin,
                "entropy": curves["entropy"](t),
                "lengths/chosen_longer": longer,
                "lengths/chosen_shorter": shorter,
                "rewards/accuracies_longer": right_longer,
                "rewards/accuracies_shorter": right_shorter,
                "rewards/accuracies": curves["eval_accuracies"](t),
            }
            if step or prefix:
                log.append({"step": step} | {prefix + key: v for key, v in values.items()})
    return log


def names(log, pairs=PAIRS):
    return [finding["name"] for finding in read_curves(log, pairs)]


def rise_and_fall(t):
    return 1.6 * t if t <= 0.5 else 1.6 - 1.6 * t + 0.2


PLANTED = {
    "chosen_fell": {
        "chosen": lambda t: -0.8 * t,
        "eval_chosen": lambda t: -0.6 * t,
    },
    "rewards_did_not_move": {
        "margins": lambda t: 0.02 * t,
        "chosen": lambda t: 0.01 * t,
        "eval_margins": lambda t: 0.02 * t,
        "eval_chosen": lambda t: 0.01 * t,
    },
    "chance": {"eval_accuracies": lambda t: 0.5 + 0.05 * t},
    "below_chance": {"eval_accuracies": lambda t: 0.5 - 0.2 * t},
    "length": {"longer": (0.8, 0.97), "shorter": (0.2, 0.2)},
    "one_length": {"longer": (0.98, 0.97), "shorter": (0.02, 1.0)},
    "overfitting": {"margins": lambda t: 3 * t, "eval_margins": lambda t: 0.4 * t},
    "overfitting, later": {"eval_margins": rise_and_fall},
    "entropy": {"entropy": lambda t: 1.5 - t},
    "entropy_rose": {"entropy": lambda t: 0.2 + 0.5 * t},
}


@pytest.mark.parametrize("pattern", PLANTED)
def test_a_planted_pattern_is_found_and_nothing_else(pattern):
    found = read_curves(log_of(healthy() | PLANTED[pattern]), PAIRS)
    assert [finding["name"] for finding in found] == [pattern.split(",")[0]]
    assert all(finding["text"] and finding["advice"].endswith(".") for finding in found)


# Values that come close to a pattern
NEAR = {
    "nothing": {},
    "chosen replies that fall a little": {"eval_chosen": lambda t: -0.1 * t},
    "short replies that are judged a little worse": {"longer": (0.8, 0.95), "shorter": (0.2, 0.75)},
    "held-out margins that are lower": {"margins": lambda t: 3 * t},
    "entropy that falls a little": {"entropy": lambda t: 1.5 - 0.6 * t},
    "a low entropy that rises a little": {"entropy": lambda t: 0.1 + 0.2 * t},
    "a high entropy that rises by less than as much again": {"entropy": lambda t: 2 + t},
    "a dip within the noise": {"eval_margins": lambda t: min(t, 0.9)},
}


@pytest.mark.parametrize("curves", NEAR)
def test_a_healthy_run_gets_no_finding(curves):
    assert names(log_of(healthy() | NEAR[curves])) == []


def test_the_number_of_held_out_pairs_decides_what_is_chance():
    accuracy = {"eval_accuracies": lambda t: 0.5 + 0.06 * t}
    assert names(log_of(healthy() | accuracy), 200) == ["chance"]
    assert names(log_of(healthy() | accuracy), 2000) == []


def test_without_held_out_pairs_the_training_curves_are_read():
    assert names(log_of(healthy(), with_held_out=False), 0) == []
    assert names(log_of(healthy() | PLANTED["chosen_fell"], False), 0) == ["chosen_fell"]
    assert names(log_of(healthy() | PLANTED["rewards_did_not_move"], False), 0) == [
        "rewards_did_not_move"
    ]


@pytest.mark.parametrize(
    "pattern", ["chosen_fell", "rewards_did_not_move", "overfitting", "entropy_rose"]
)
def test_the_rewards_of_rated_replies_are_read_without_accuracies(pattern):
    log = [
        {key: value for key, value in entry.items() if "accuracies" not in key}
        for entry in log_of(healthy() | PLANTED[pattern])
    ]
    (found,) = read_curves(log, PAIRS)
    assert found["name"] == pattern
    assert "loss_type" not in found["advice"]  # KTO has no SFT term


def test_a_run_without_rewards_is_not_read():
    assert read_curves([{"step": 1, "loss": 2.0}], 10) is None


# A run


@pytest.fixture
def base(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_run_logs_reads_and_draws_its_curves(base, monkeypatch, tmp_path, write_jsonl, capsys):
    stage, beta = tmp_path / "dpo", 0.5
    options = short_run(
        stage,
        max_prompt_length=64,
        max_completion_length=64,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        beta=beta,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        sample_steps=-1,
        on_findings="warn",
    )
    rows = ["--train_files", write_jsonl("pairs.jsonl", pair_rows()), "--eval_ratio", 0.25]
    run_script(monkeypatch, "train_dpo", *options, *rows, "--model_name_or_path", base)

    # The metrics agree with TRL's
    log = read_log(stage / "train_log.jsonl")
    for prefix, count in (("", 4), ("eval_", 3)):
        entries = [
            {key.removeprefix(prefix): value for key, value in entry.items()}
            for entry in log
            if f"{prefix}kl/reply" in entry
        ]
        assert len(entries) == count
        for entry in entries:
            rewards = entry["rewards/chosen"] + entry["rewards/rejected"]
            assert entry["kl/reply"] == pytest.approx(rewards / 2 / beta, abs=1e-4)
            right = sum(
                entry.get(f"rewards/accuracies_{kind}", 0) * entry[f"lengths/chosen_{kind}"]
                for kind in ("longer", "shorter")
            )
            assert right == pytest.approx(entry["rewards/accuracies"], abs=1e-4)
            assert entry["lengths/chosen"] > entry["lengths/rejected"]
    assert entries[-1]["kl/reply"] != 0

    # The findings, at three places
    findings = read_stage(stage)["reading"]
    report, said = (stage / "report.html").read_text(), capsys.readouterr().out
    assert findings == read_curves(log, 4)
    for finding in findings:
        assert f"{finding['severity']}: {finding['text']} {finding['advice']}\n" in said
        assert finding["text"].split("'")[0] in report
    assert findings or "the curves of this run show nothing unusual" in said
    assert "What the curves say" in report
    assert "KL to the reference" in report


# Stopping by them


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("eval_rewards/margins", True),
        ("rewards/accuracies", True),
        ("rewards/chosen", True),
        ("logps/chosen", True),
        ("rewards/rejected", False),
        ("eval_kl/token", False),
        ("eval_loss", False),
    ],
)
def test_higher_or_lower_is_better_as_the_metric_means_it(metric, greater, tmp_path):
    words = ["--eval_strategy", "epoch", "--early_stopping_patience", "1"]
    words += ["--metric_for_best_model", metric, "--output_dir", str(tmp_path / "run")]
    (config,) = parse(DPOStageConfig, argv=words)
    assert config.greater_is_better is greater


def test_a_run_stops_early_when_the_held_out_margin_no_longer_rises(
    base, monkeypatch, tmp_path, write_jsonl, capsys
):
    """It trains on pairs in one order, and is evaluated on the same pairs swapped."""
    rows = pair_rows()[:8]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    options = short_run(
        tmp_path / "dpo",
        max_steps=20,
        max_prompt_length=64,
        max_completion_length=64,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=1,
        early_stopping_patience=2,
        metric_for_best_model="eval_rewards/margins",
        sample_steps=-1,
        on_findings="warn",
    )
    files = ["--train_files", write_jsonl("pairs.jsonl", rows)]
    files += ["--eval_files", write_jsonl("swapped.jsonl", swapped)]
    run_script(monkeypatch, "train_dpo", *options, *files, "--model_name_or_path", base)
    record, said = read_stage(tmp_path / "dpo"), capsys.readouterr().out
    assert "stopping early: 2 evaluations did not improve eval_rewards/margins" in said
    assert record["steps"] == 2
    assert record["best"] == {"metric": "eval_rewards/margins", "value": 0.0, "step": 0}


def test_a_metric_that_no_evaluation_has_is_refused_with_those_there_are():
    args = type("Args", (), {"metric_for_best_model": "eval_rewards/margin"})
    metrics = {"eval_loss": 1.0, "eval_rewards/margins": 0.1, "eval_runtime": 2.0}
    state = type("State", (), {"global_step": 0})
    with pytest.raises(UserError, match=r"has no such metric, only eval_loss, eval_rewards/marg"):
        Baseline().on_evaluate(args, state, None, metrics)
