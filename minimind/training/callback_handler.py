"""The handler that calls a run's callbacks: those that only report never end the run."""

from collections.abc import Callable
from functools import partial

from transformers import TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from minimind.common.errors import decoration

CONTEXT = ("model", "processing_class", "optimizer", "lr_scheduler")
CONTEXT += ("train_dataloader", "eval_dataloader")


class Decoration(TrainerCallback):
    """A callback that only reports on a run: an error in it does not end the run."""


class RunCallbackHandler(CallbackHandler):
    """Identical to the library's except:

    The first error of a tracker or a `Decoration` is reported, and the run continues. A tracker is
    not called again after an error; ours are, since a full disk may have room again.

    After a checkpoint was left out there is no `on_save`: `on_left_out` is called instead, on the
    callbacks that have it.
    """

    left_out = False  # set by CheckpointingTrainer

    def __init__(self, handler: CallbackHandler):
        """Take over the callbacks of the library's handler."""
        super().__init__(handler.callbacks, *(getattr(handler, name) for name in CONTEXT[:4]))
        self.trackers = tuple(INTEGRATION_TO_CALLBACK.values())
        self.lost_trackers: set[TrainerCallback] = set()

    def call_event(self, event, args, state, control, **kwargs):
        kwargs |= {name: getattr(self, name) for name in CONTEXT}
        for callback in self.callbacks:
            call = partial(getattr(callback, event), args, state, control, **kwargs)
            if not isinstance(callback, (*self.trackers, Decoration)):
                control = call() or control
            elif callback not in self.lost_trackers:
                self._call_shielded(callback, call)
        return control

    def _call_shielded(self, callback: TrainerCallback, call: Callable) -> None:
        with decoration(type(callback).__name__.removesuffix("Callback").lower()):
            try:
                call()
            except Exception:
                if isinstance(callback, self.trackers):
                    self.lost_trackers.add(callback)
                raise

    def on_save(self, args, state, control, **kwargs):
        if not self.left_out:
            return super().on_save(args, state, control, **kwargs)
        control.should_save = False
        for callback in self.callbacks:
            if hasattr(callback, "on_left_out"):
                callback.on_left_out(args, state, control)
        return control
