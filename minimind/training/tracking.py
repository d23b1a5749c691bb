"""Trackers that never crash a run: the library logs into them, and a failing one is left out.

wandb        see wandb_tracking.py
trackio      a SQLite file; `trackio show --project minimind` opens the board in a browser
tensorboard  event files in the stage directory
swanlab      files to be uploaded later, unless $SWANLAB_MODE says otherwise
"""

import importlib.util
import os
import sys
from collections.abc import Sequence

from transformers.integrations import INTEGRATION_TO_CALLBACK

from minimind.common.errors import UserError, decoration, first_line, install
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.common.streams import printable
from minimind.training import wandb_tracking
from minimind.training.wandb_tracking import PROJECT

# Extras of pyproject.toml
EXTRAS = {"trackio": "board", "tensorboard": "board", "swanlab": "swanlab"}


def start_tracking(stage, report: dict | None = None) -> None:
    """Prepare the trackers that `--report_to` names, before the Trainer creates their callbacks.

    wandb and swanlab receive an open run, with the stage's lineage and grouped with the other
    stages of its pipeline. The `report` of an inspection becomes tables in wandb.

    Raises:
        UserError: a tracker that does not exist or is not installed.
    """
    args = stage.args
    if not args.report_to:
        return
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            choices = ", ".join(INTEGRATION_TO_CALLBACK)
            raise UserError(f"--report_to {name}: expected none or some of {choices}.")
        if name in EXTRAS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report_to {name}: it is not installed. Install it ({install(EXTRAS[name])}, or "
                f"pip install {name}), or leave it out."
            )
    args.run_name = printable(args.run_name or f"{stage.name}: {stage.output_dir}")

    prepare = {
        "wandb": wandb_tracking.open_wandb_run,
        "trackio": _prepare_trackio,
        "tensorboard": _prepare_tensorboard,
        "swanlab": _prepare_swanlab,
    }
    working = []
    for name in args.report_to:
        with decoration(name):
            if name in prepare:
                prepare[name](stage)
            INTEGRATION_TO_CALLBACK[name]()  # the Trainer lets errors of its constructor through
            working.append(name)
    args.report_to[:] = working

    if report and "wandb" in working and is_main_process():
        with decoration("the inspection's tables in wandb"):
            wandb_tracking.log_inspection(report)


def _prepare_trackio(stage) -> None:
    if stage.args.project == "huggingface":  # the library's default
        stage.args.project = PROJECT
    if stage.args.trackio_space_id is None:
        stage.args.trackio_static_space_id = False  # nothing leaves this machine
    if is_main_process():
        say(f"trackio: look at the run          trackio show --project {stage.args.project}")


def _prepare_tensorboard(stage) -> None:
    default = str(stage.output_dir / "tensorboard")
    directory = os.environ.setdefault("TENSORBOARD_LOGGING_DIR", default)
    if is_main_process():
        say(f"tensorboard: look at the run      tensorboard --logdir {directory}")


def _prepare_swanlab(stage) -> None:
    """Open the run: the library's callback asks swanlab for the open one, and fails if there is
    none (swanlab 0.10)."""
    if not is_main_process():
        return
    import swanlab

    directory = os.environ.setdefault("SWANLAB_LOG_DIR", str(stage.output_dir / "swanlog"))
    options = {
        "project": os.environ.get("SWANLAB_PROJECT", PROJECT),
        "experiment_name": stage.args.run_name,
        "group": stage.lineage["pipeline"],
        "config": {"stage": stage.name, **stage.lineage},
        "logdir": directory,
    }
    try:
        swanlab.init(**options, mode=os.environ.get("SWANLAB_MODE", "offline"))
    except Exception as error:  # the key is refused, or the server does not answer
        say(f"swanlab: offline, because the run could not be opened: {first_line(error)}")
        swanlab.init(**options, mode="offline")
    say(f"swanlab: upload it later          swanlab sync {directory}/run-*")


# Samples


def track_samples(rows: Sequence[dict], step: int) -> None:
    """Show samples (step, prompt, text; the newest last) in the trackers that have a run open."""
    log = {
        "wandb": wandb_tracking.log_samples,
        "trackio": _log_to_trackio,
        "swanlab": _log_to_swanlab,
    }
    for name, log_samples in log.items():
        if tracker := sys.modules.get(name):
            with decoration(f"the table of samples in {name}"):
                log_samples(tracker, rows, step)


def _log_to_trackio(trackio, rows: Sequence[dict], step: int) -> None:
    if trackio.context_vars.current_run.get() is not None:
        import pandas

        trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(list(rows)))})


def _log_to_swanlab(swanlab, rows: Sequence[dict], step: int) -> None:
    try:
        run = swanlab.get_run()
    except RuntimeError:  # what some versions raise instead of returning None
        return
    if run is not None:
        texts = [(row["text"], row["prompt"]) for row in rows if row["step"] == step]
        new = [swanlab.Text(text, caption=prompt) for text, prompt in texts]
        swanlab.log({"samples": new}, step=step)
