"""What only reports on a run does not end it."""

import pytest
from small_run import STEPS
from transformers import TrainerCallback

from minimind.training.callback_handler import Decoration
from minimind.training.progress import ProgressCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


def test_a_tracker_that_loses_its_network_does_not_end_the_run(make_trainer, monkeypatch, capsys):
    from transformers.integrations import TensorBoardCallback

    class Lost(TensorBoardCallback):
        def __init__(self):
            self.calls = 0

        def on_train_begin(self, *args, **kwargs):
            pass

        def on_log(self, *args, **kwargs):
            self.calls += 1
            raise ConnectionError("network is unreachable")

    trainer = make_trainer(guarded=False)
    lost = Lost()
    trainer.add_callback(lost)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert lost.calls == 1
    assert (
        capsys.readouterr().err.count(
            "notice: lost failed (ConnectionError: network is unreachable)"
        )
        == 1
    )


def test_a_log_file_that_cannot_be_written_does_not_end_the_run(make_trainer, tmp_path, capsys):
    trainer = make_trainer(guarded=False)
    trainer.add_callback(ProgressCallback(tmp_path / "gone"))
    trainer.train()
    assert capsys.readouterr().err.count("notice: progress failed (FileNotFoundError: ") == 1


def test_a_decoration_that_fails_is_asked_again_and_nothing_else_is_forgiven(make_trainer, capsys):
    class Failing:
        def on_log(self, *args, **kwargs):
            Broken.calls += 1
            raise KeyError("loss")

    class Broken(Failing, Decoration):
        calls = 0

    class NoDecoration(Failing, TrainerCallback):
        pass

    trainer = make_trainer(guarded=False)
    trainer.add_callback(Broken())
    trainer.train()
    assert Broken.calls == STEPS + 1
    assert (
        capsys.readouterr().err.count("notice: broken failed (KeyError: 'loss'); the run continues")
        == 1
    )

    trainer = make_trainer(guarded=False)
    trainer.add_callback(NoDecoration())
    with pytest.raises(KeyError):
        trainer.train()
