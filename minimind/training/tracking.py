"""Trackers that never crash a run, ask a question or wait.

wandb        online where a key is found and the server answers, offline otherwise
trackio      a SQLite file; `trackio show --project minimind` opens the board in a browser
tensorboard  event files in the stage directory
swanlab      files to be uploaded later, unless $SWANLAB_MODE says otherwise
"""

import importlib.util
import netrc
import os
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from transformers.integrations import INTEGRATION_TO_CALLBACK

from minimind.common.errors import UserError, decoration, first_line, install
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.common.streams import printable

PROBE_SECONDS = 5
PROJECT = "minimind"
# Extras of pyproject.toml
EXTRAS = {"trackio": "board", "tensorboard": "board", "swanlab": "swanlab"}


def find_key(host: str) -> bool:
    """Whether wandb will find a login for `host`: $WANDB_API_KEY, or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    home = os.path.expanduser("~")  # noqa: PTH111, Path raises where there is none
    path = Path(os.environ.get("NETRC") or Path(home) / ".netrc")
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def server_answers(host: str, port: int) -> bool:
    """Whether a connection to the server opens within a few seconds, name lookup included."""
    opened = threading.Event()

    def connect():
        try:
            socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
            opened.set()
        except OSError:
            return

    # A name lookup has no time-out of its own
    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return opened.is_set()


def offline_reason() -> str | None:
    """Why wandb must run offline, or None if it can be online."""
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    if not find_key(url.hostname):
        return "no wandb key was found"
    if not server_answers(url.hostname, url.port or (443 if url.scheme == "https" else 80)):
        return f"{url.hostname} does not answer"
    return None


def start_tracking(stage, report: dict | None = None) -> None:
    """Open the runs of a stage in the trackers that `--report_to` asks for, before the Trainer
    would.

    Each carries the stage's arguments and lineage and is grouped with the other stages of its
    pipeline. The Trainer's own callbacks find them open and log into them. The `report` of an
    inspection becomes tables in wandb's.

    Raises:
        UserError: a tracker that does not exist or is not installed.
    """
    if not stage.args.report_to:
        return
    for name in stage.args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"--report_to {name}: expected none or some of"
                f" {', '.join(INTEGRATION_TO_CALLBACK)}."
            )
        if name in EXTRAS and importlib.util.find_spec(name) is None:
            raise UserError(
                f"--report_to {name}: it is not installed. Install it ({install(EXTRAS[name])}, or "
                f"pip install {name}), or leave it out."
            )
    stage.args.run_name = printable(stage.args.run_name or f"{stage.kind}: {stage.output_dir}")
    starts = {
        "wandb": _wandb,
        "trackio": _trackio,
        "tensorboard": _tensorboard,
        "swanlab": _swanlab,
    }
    for name in list(stage.args.report_to):
        opened = False
        with decoration(name):
            if name in starts:
                starts[name](stage)
            INTEGRATION_TO_CALLBACK[name]()  # as the Trainer will, which lets its errors through
            opened = True
        if not opened:
            stage.args.report_to.remove(name)
    if report and "wandb" in stage.args.report_to and is_main_process():
        with decoration("the inspection's tables in wandb"):
            import wandb

            wandb.log(report_tables(report), commit=False)


def track_samples(rows: Sequence[dict], step: int) -> None:
    """Show samples (step, prompt, text; the newest last) in the trackers that have a run open."""
    tables = {"wandb": _wandb_table, "trackio": _trackio_table, "swanlab": _swanlab_texts}
    for name, show in tables.items():
        if tracker := sys.modules.get(name):
            with decoration(f"the table of samples in {name}"):
                show(tracker, rows, step)


def _wandb_table(wandb, rows: Sequence[dict], step: int) -> None:
    if wandb.run is not None:
        table = wandb.Table(
            ["step", "prompt", "text"], [[row["step"], row["prompt"], row["text"]] for row in rows]
        )
        wandb.log({"samples": table, "train/global_step": step})


def _trackio_table(trackio, rows: Sequence[dict], step: int) -> None:
    if trackio.context_vars.current_run.get() is not None:
        import pandas

        trackio.log({"samples": trackio.Table(dataframe=pandas.DataFrame(list(rows)))})


def _swanlab_texts(swanlab, rows: Sequence[dict], step: int) -> None:
    if _swanlab_run(swanlab) is not None:
        new = [
            swanlab.Text(row["text"], caption=row["prompt"]) for row in rows if row["step"] == step
        ]
        swanlab.log({"samples": new}, step=step)


def _swanlab_run(swanlab):
    """The open run or None; some versions raise where there is none."""
    try:
        return swanlab.get_run()
    except RuntimeError:
        return None


def _trackio(stage) -> None:
    if stage.args.project == "huggingface":  # the library's default
        stage.args.project = PROJECT
    if stage.args.trackio_space_id is None:
        stage.args.trackio_static_space_id = False  # nothing leaves this machine
    if not is_main_process():
        return
    import trackio

    trackio.init(
        project=stage.args.project,
        name=stage.args.run_name,
        group=stage.lineage["pipeline"],
        config={"stage": stage.kind, **stage.lineage},
        resume="allow",
        embed=False,
    )
    say(f"trackio: look at the run          trackio show --project {stage.args.project}")


def _tensorboard(stage) -> None:
    directory = os.environ.setdefault(
        "TENSORBOARD_LOGGING_DIR", str(stage.output_dir / "tensorboard")
    )
    if is_main_process():
        say(f"tensorboard: look at the run      tensorboard --logdir {directory}")


def _swanlab(stage) -> None:
    if not is_main_process():
        return
    import swanlab

    directory = os.environ.setdefault("SWANLAB_LOG_DIR", str(stage.output_dir / "swanlog"))
    options = {
        "project": os.environ.get("SWANLAB_PROJECT", PROJECT),
        "experiment_name": stage.args.run_name,
        "group": stage.lineage["pipeline"],
        "config": {"stage": stage.kind, **stage.lineage},
        "logdir": directory,
    }
    try:
        swanlab.init(**options, mode=os.environ.get("SWANLAB_MODE", "offline"))
    except Exception as error:  # a refused key, a server that does not answer
        say(f"swanlab: offline, because the run could not be opened: {first_line(error)}")
        swanlab.init(**options, mode="offline")
    say(f"swanlab: upload it later          swanlab sync {directory}/run-*")


def _wandb(stage) -> None:
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    if not is_main_process():
        return
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and (reason := offline_reason()):
        mode = "offline"
        say(f"wandb: offline, because {reason}")

    def init(mode: str | None):
        return wandb.init(
            project=os.environ["WANDB_PROJECT"],
            name=os.environ.get("WANDB_NAME") or stage.args.run_name,
            group=os.environ.get("WANDB_RUN_GROUP") or stage.lineage["pipeline"],
            job_type=stage.kind,
            config={"stage": stage.kind, **stage.lineage},
            mode=mode,
            id=stage.run["run"],  # a resumed stage goes on in its run
            resume="allow",
            # A killed run keeps all but its last second; the default loses up to 15.
            settings=wandb.Settings(
                init_timeout=30, silent=True, x_file_stream_transmit_interval=1
            ),
        )

    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    try:
        run = init(mode)
    except (
        Exception
    ) as error:  # a refused key or a server that fails half-way must not end a training run
        say(f"wandb: offline, because the server refused the run: {first_line(error)}")
        run = init("offline")
    if run.settings.mode in ("offline", "dryrun"):
        directory = Path(run.settings.sync_dir)
        say(f"wandb: look at the run now    wandb leet {directory}")
        say(f"wandb: upload it later        wandb sync {directory}")
    else:
        say(f"wandb: {run.url}")


def report_tables(report: dict) -> dict:
    """The report of `inspection.Inspection` -> wandb tables of its roles, windows and findings."""
    import wandb

    columns = ["tokens", "trained", "trained_share"]
    roles = [
        [name, *(counts[column] for column in columns)] for name, counts in report["roles"].items()
    ]
    windows = report["lengths"]["windows"]
    fields = ["severity", "name", "count", "text", "advice"]
    findings = [
        [*(each[field] for field in fields), ", ".join(each["places"])]
        for each in report["findings"]
    ]
    return {
        "inspection/roles": wandb.Table(["role", *columns], roles),
        "inspection/lengths": wandb.Table(
            [*windows[0]], [[*window.values()] for window in windows]
        ),
        "inspection/findings": wandb.Table([*fields, "places"], findings),
    }
