"""wandb that never crashes a run, asks a question or waits: online where a key is found and the server answers,
offline otherwise."""

import netrc
import os
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

from minimind.training.launch import is_main_process
from minimind.training.stages import Stage

PROBE_SECONDS = 5


def find_key(host: str) -> bool:
    """Whether wandb will find a login for `host`: $WANDB_API_KEY, or an entry in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
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

    probe = threading.Thread(target=connect, daemon=True)  # a name lookup has no time-out of its own
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


def start_tracking(stage: Stage, report: dict | None = None) -> None:
    """Open the wandb run of a stage, if `--report_to` asks for one, before the Trainer would.

    The run carries the stage's arguments and lineage and is grouped with the other stages of its pipeline. The
    Trainer's own callback finds it open and logs into it. The `report` of an inspection becomes tables in it.
    """
    if "wandb" not in stage.args.report_to:
        return
    os.environ.setdefault("WANDB_PROJECT", "minimind")
    if not is_main_process():
        return
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode is None and (reason := offline_reason()):
        mode = "offline"
        print(f"wandb: offline, because {reason}")

    def init(mode: str | None):
        return wandb.init(
            project=os.environ["WANDB_PROJECT"],
            name=os.environ.get("WANDB_NAME") or stage.args.run_name or f"{stage.name}: {stage.output_dir}",
            group=os.environ.get("WANDB_RUN_GROUP") or stage.lineage["pipeline"],
            job_type=stage.name,
            config={"stage": stage.name, **stage.lineage},
            mode=mode,
            id=stage.run["run"],  # a resumed stage goes on in its run
            resume="allow",
            # A killed run keeps all but its last second; the default loses up to 15.
            settings=wandb.Settings(init_timeout=30, silent=True, x_file_stream_transmit_interval=1),
        )

    os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
    try:
        run = init(mode)
    except Exception as error:  # a refused key or a server that fails half-way must not end a training run
        print(f"wandb: offline, because the server refused the run: {str(error).splitlines()[0]}")
        run = init("offline")
    if run.settings.mode in ("offline", "dryrun"):
        directory = Path(run.settings.sync_dir)
        print(f"wandb: look at the run now    wandb leet {directory}")
        print(f"wandb: upload it later        wandb sync {directory}", flush=True)
    else:
        print(f"wandb: {run.url}", flush=True)
    if report:
        run.log(report_tables(report), commit=False)


def report_tables(report: dict) -> dict:
    """The report of `inspection.Inspection` -> wandb tables of its roles, windows and findings."""
    import wandb

    columns = ["tokens", "trained", "trained_share"]
    roles = [[name, *(counts[column] for column in columns)] for name, counts in report["roles"].items()]
    windows = report["lengths"]["windows"]
    fields = ["severity", "name", "count", "text", "advice"]
    findings = [[*(each[field] for field in fields), ", ".join(each["places"])] for each in report["findings"]]
    return {
        "inspection/roles": wandb.Table(["role", *columns], roles),
        "inspection/lengths": wandb.Table([*windows[0]], [[*window.values()] for window in windows]),
        "inspection/findings": wandb.Table([*fields, "places"], findings),
    }
