"""Under --time_budget the learning rate follows the clock, and the run ends with the budget."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pipeline import document_rows, run_script, short_run, write_model
from ranks import run_ranks
from small_run import STEPS, Ticks, under_budget
from transformers import SchedulerType, TrainerCallback, TrainerControl

from minimind.common.bounds import MOST, seconds_of
from minimind.common.errors import UserError
from minimind.stage_directory import read_stage, weights_hash
from minimind.training import run as training_run
from minimind.training import trainers
from minimind.training.arguments import PretrainConfig
from minimind.training.progress import reproducible
from minimind.training.schedules import TRIED
from minimind.training.time_budget import TimeBudget, seconds_since_start
from minimind.training.trainers import ScheduledTrainer

BIN = Path(sys.executable).parent
PEAK = 1e-2


# The option


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400), ("1d 1s", 86401), ("2H", 7200)],
)
def test_a_duration_is_read_with_its_units(text, seconds):
    assert seconds_of("--time_budget", text) == seconds
    assert seconds_of("--time_budget", "none") is None


@pytest.mark.parametrize("text", ["5", "-5m", "abc", "0s", "m", "30m1h", "nans", "9999d", "1:30"])
def test_a_duration_that_can_be_misread_is_refused(text):
    with pytest.raises(UserError, match="expected a duration with its unit"):
        seconds_of("--time_budget", text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_steps": 5}, "--max_steps both say when"),
        ({"lr_scheduler_type": "warmup_stable_decay", "lr_decay_steps": 9}, "--lr_decay_steps 9"),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 9}},
            "timescale counts steps",
        ),
    ],
)
def test_what_counts_steps_is_refused_beside_a_time_budget(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        PretrainConfig(output_dir=str(tmp_path), time_budget=60.0, use_cpu=True, **options)


def test_the_clock_starts_with_the_process():
    first = seconds_since_start()
    assert first > 0.1  # torch alone takes longer to import
    assert seconds_since_start() >= first


# The schedule, against the library's at the same share of its steps


def rates(name, steps, budget=None, stepped=1, **options):
    """The rate of each step over the peak: of a schedule of so many steps, or of that number and
    one within a budget whose every step takes a second."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    args = PretrainConfig(
        report_to="none", lr_scheduler_type=name, use_cpu=True, time_budget=budget, **options
    )
    trainer = ScheduledTrainer.__new__(ScheduledTrainer)
    trainer.args, trainer.lr_scheduler, trainer.optimizer = args, None, optimizer
    clock = Ticks()
    if budget:
        trainer.time_budget = TimeBudget(trainer, clock)
    schedule = trainer.create_scheduler(steps)
    state, found = SimpleNamespace(global_step=0, max_steps=MOST), []
    control = TrainerControl()
    while state.global_step < min(steps, state.max_steps):
        if budget:
            trainer.time_budget.on_step_begin(args, state, control, lr_scheduler=schedule)
        found.append(schedule.get_last_lr()[0] / PEAK)
        optimizer.step()
        for _ in range(stepped):
            schedule.step()
        state.global_step += 1
        clock.now += 1
        if budget:
            trainer.time_budget.on_step_end(args, state, control)
    return found


KWARGS = {
    "polynomial": {"lr_scheduler_kwargs": {"lr_end": 0.0}},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
}
SCHEDULED = [
    each.value for each in SchedulerType if each.value not in ("reduce_lr_on_plateau", "greedy")
]


@pytest.mark.parametrize("name", SCHEDULED)
def test_every_schedule_has_the_rates_of_the_library_at_the_same_share(name):
    options = {"learning_rate": PEAK, **KWARGS.get(name, {})}
    expected = rates(name, TRIED, **options)
    # The first step is not part of the schedule. Accelerate steps once for each process.
    found = rates(name, TRIED + 1, budget=TRIED + 1.0, stepped=2, **options)
    assert found[0] == expected[0]
    assert found[1:] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine_with_min_lr", "warmup_stable_decay"])
def test_after_the_warmup_the_number_of_steps_does_not_matter(name):
    options = {"learning_rate": PEAK, "warmup_steps": 0.1}
    expected = rates(name, 50, **options)
    found = rates(name, 51, budget=51.0, **options)[1:]
    assert found[5:] == pytest.approx(expected[5:], rel=1e-9)
    assert found[:5] == pytest.approx([(step / 50 + 1 / TRIED) / 0.1 for step in range(5)])


def test_a_warmup_in_steps_takes_that_many_whatever_their_time():
    options = {"learning_rate": PEAK, "warmup_steps": 5}
    assert rates("linear", 20, budget=20.0, **options) == pytest.approx(
        rates("linear", 20, **options), rel=1e-9
    )


# Runs


class Stall(TrainerCallback):
    """Something that takes some seconds at one event of a step."""

    def __init__(self, clock, event, step, seconds):
        self.clock, self.step, self.seconds = clock, step, seconds
        setattr(self, event, self.wait)

    def wait(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.clock.now += self.seconds


@pytest.fixture
def train(make_trainer):
    def run(budget, stall=None, seconds=None, **options):
        options = {"max_steps": -1, "lr_scheduler_type": "linear"} | options
        trainer = make_trainer(time_budget=float(budget), **options)
        clock = under_budget(trainer, **seconds or {})
        if stall:
            trainer.add_callback(Stall(clock, *stall))
        trainer.train()
        trainer.seconds = clock.now
        return trainer

    return run


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_a_run_ends_with_its_budget_and_repeats_its_data_for_that(train, make_trainer):
    trainer = train(STEPS + 1)
    assert trainer.state.global_step == trainer.state.max_steps == STEPS + 1
    found = logged(trainer, "learning_rate")
    assert found[0] == pytest.approx(PEAK)
    assert found[1:] == pytest.approx([PEAK * (1 - k / STEPS) for k in range(STEPS)])

    # 64 rows: 32 steps an epoch, each in another order
    trainer = train(70)
    assert trainer.state.global_step == 70
    assert trainer.state.epoch == pytest.approx(70 / 32)
    assert train(10).state.log_history[-1]["train_samples_per_second"] < 1e6


def test_start_up_counts_and_the_schedule_begins_after_it(train):
    trainer = train(20, seconds={"began": 13.5})
    assert logged(trainer, "learning_rate") == pytest.approx(
        [PEAK, *(PEAK * (1 - k / 5.5) for k in range(6))]
    )


def test_after_a_stall_the_schedule_is_where_the_clock_is(train):
    trainer = train(21, stall=("on_step_end", 5, 8.0))
    assert trainer.state.global_step == 13
    found = logged(trainer, "learning_rate")
    assert found[1:5] == pytest.approx([PEAK * (1 - k / 20) for k in range(4)])
    assert found[5:] == pytest.approx([PEAK * (1 - k / 20) for k in range(12, 20)])


def test_a_first_step_that_compiles_does_not_skip_the_warmup(train):
    slow = ("on_pre_optimizer_step", 0, 60.0)
    found = logged(train(161, stall=slow, warmup_steps=0.1), "learning_rate")
    assert len(found) == 101
    assert found[1] == pytest.approx(PEAK / (0.1 * TRIED))
    assert found[11] == pytest.approx(PEAK)


def test_a_budget_that_the_start_takes_is_one_message(train):
    with pytest.raises(UserError, match="--time_budget 12 s: the start alone took 15 s"):
        train(12, seconds={"began": 15.0})
    with pytest.raises(UserError, match="--time_budget 12 s: the start took 15 s"):
        train(12, seconds={"began": 9.0}, stall=("on_epoch_begin", 0, 6.0))
    assert train(12, seconds={"began": 11.5}).state.global_step == 2


# Scripts


@pytest.fixture
def pretrain(monkeypatch, tmp_path, tokenizer_dir):
    """Run pretrain.py, each time with a start-up of another length, perhaps killed after a step;
    returns its directory and log."""
    data, starts = tmp_path / "docs.jsonl", iter((0.5, 0.5, 700.0, 30.0, 4.0))
    data.write_text("\n".join(map(json.dumps, document_rows())))
    model = write_model(tmp_path / "model.json")
    words = ["--train_files", data, "--model_config", model, "--tokenizer", tokenizer_dir]

    class Kill(TrainerCallback):
        def __init__(self, step):
            self.step = step

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                raise KilledError

    def run(output, budget="12s", kill=None, seconds=None, argv=(), **options):
        class Clocked(TimeBudget):
            def __init__(self, trainer):
                super().__init__(trainer, Ticks(began=next(starts), **seconds or {}))

            def on_pre_optimizer_step(self, *args, **kwargs):
                self.clock.on_pre_optimizer_step(*args, **kwargs)

            def on_evaluate(self, *args, **kwargs):
                self.clock.on_evaluate(*args, **kwargs)
                super().on_evaluate(*args, **kwargs)

            def on_save(self, *args, **kwargs):
                self.clock.on_save(*args, **kwargs)
                super().on_save(*args, **kwargs)

        monkeypatch.setattr(trainers, "TimeBudget", Clocked)
        monkeypatch.setattr(training_run, "ADDITIONAL", [lambda trainer: Kill(kill)])
        given = {"max_steps": None, "time_budget": budget, "save_strategy": "steps"}
        given |= {"save_steps": 0.25, "logging_steps": 1, "block_size": 32, "eval_ratio": 0.2}
        directory = tmp_path / output
        run_script(monkeypatch, "pretrain", *short_run(directory, **given | options), *words, *argv)
        lines = (directory / "train_log.jsonl").read_text().splitlines()
        return directory, [json.loads(line) for line in lines]

    return run


class KilledError(Exception):
    """Stands for SIGKILL."""


def saved(directory):
    return sorted(int(path.name[11:]) for path in directory.glob("checkpoint-*"))


def test_time_for_the_evaluations_and_the_checkpoint_at_the_end_is_set_aside(pretrain):
    """A share of the steps is a share of the schedule."""
    options = {"eval_strategy": "steps", "eval_steps": 0.25, "save_total_limit": 9}
    costs = {"evaluation": 2.0, "saving": 3.0}
    directory, log = pretrain("run", "80s", seconds=costs, **options)
    steps = read_stage(directory)["steps"]
    evaluated = [entry["step"] for entry in log if "eval_loss" in entry]
    assert evaluated[0] == 0
    assert evaluated[-1] == steps
    assert saved(directory) == evaluated[1:]
    assert len(evaluated) == 1 + 4
    # Logged after that evaluation and the checkpoint, with 3 s left for the stage directory
    assert 80 * log[-1]["time_budget"] == pytest.approx(80 - 3, abs=1)


def test_a_resumed_run_is_the_undisturbed_one_and_a_longer_budget_extends_it(pretrain, capsys):
    whole, log = pretrain("whole")
    with pytest.raises(KilledError):
        pretrain("cut", kill=8)
    cut, resumed = pretrain("cut")
    assert "resuming from" in capsys.readouterr().out
    assert list(map(reproducible, log)) == list(map(reproducible, resumed))
    assert weights_hash(whole) == weights_hash(cut)
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [
            torch.load(each / f"checkpoint-{saved(each)[-1]}" / name, weights_only=True)
            for each in (whole, cut)
        ]
        assert str(states[0]) == str(states[1])
    shares = [entry["time_budget"] for entry in log if "loss" in entry]
    assert shares == pytest.approx([(k + 1.5) / 12 for k in range(len(shares))], abs=1e-4)

    # The same command does nothing; a shorter one is refused; a longer one takes up the schedule
    with pytest.raises(SystemExit) as stop:
        pretrain("cut")
    assert stop.value.code == 0
    changed = ["--allow_changed_recipe", "true"]
    with pytest.raises(SystemExit):
        pretrain("cut", "6s", argv=changed)
    assert "and --time_budget 6 s asks for no more" in capsys.readouterr().err
    _, longer = pretrain("cut", "20s", argv=changed)
    assert read_stage(cut)["steps"] == read_stage(whole)["steps"] + 8
    rates = [entry["learning_rate"] for entry in longer if "loss" in entry]
    assert rates[len(shares) - 1] < rates[len(shares)] > rates[-1]


# Several processes


@pytest.mark.slow
@pytest.mark.launcher
def test_processes_with_different_clocks_agree(tmp_path):
    """Under DeepSpeed where it is installed, else plain."""
    deepspeed = ["ds_config_zero2.json"] if (BIN / "deepspeed").exists() else []
    (tmp_path / "run").mkdir()
    run_ranks("tests/budget_run.py", tmp_path / "run", *deepspeed, log=tmp_path / "log")
    one, two = (
        json.loads((tmp_path / "run" / f"rates-{rank}.json").read_text()) for rank in (0, 1)
    )
    assert one == two
    # Of 12 s the start took 2; the first step, of the slower clock's 1 s, is not in the schedule
    assert one["rates"] == pytest.approx([PEAK, *(PEAK * (1 - k / 9) for k in range(9))])
