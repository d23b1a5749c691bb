"""Start a new run, or resume the one in the output directory: decided once, by the main process."""

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.utils import broadcast_object_list

from minimind.common.errors import UserError
from minimind.common.files import write_json
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.training.definition import WORLD
from minimind.training.elastic import check_world_size
from minimind.training.output_directory import RUN, lock_directory, unlock_directory
from minimind.training.resume_decision import ResumeDecision
from minimind.training.saving import check_writable


def begin(args, definition: dict, pipeline: str) -> tuple[dict, dict]:
    """Decide whether the run is new or resumed, the same in all processes.

    Sets `args.resume_from_checkpoint` to the checkpoint to resume from, or None. No other run can
    use the directory until `unlock_directory`.

    Returns:
        The record in run.json ("run": its id, "pipeline", "started", "from": the checkpoint that
        --resume_from_checkpoint named, "extended": the lengths in steps at which it was complete
        before), and the accepted changes of the definition, each key with its old and new value.

    Raises:
        UserError: there is no checkpoint although one is required, the named one is broken, the
            definition has changed, the directory holds a complete run with another definition, or
            another run uses it.
        SystemExit: with code 0, the run is already complete.
    """
    outcome: dict[str, Any] = {}
    if is_main_process():
        try:
            outcome = _begin(args, definition, pipeline)
        except UserError as error:
            outcome = {"error": str(error)}
        except OSError as error:
            outcome = {"error": f"--output_dir {args.output_dir} cannot be used: {error}"}
        if "run" not in outcome:
            unlock_directory()
    (outcome,) = broadcast_object_list([outcome])
    if "error" in outcome:
        raise UserError(outcome["error"])
    if "run" not in outcome:
        raise SystemExit(0)

    args.resume_from_checkpoint = outcome["checkpoint"]
    if outcome["resized"]:
        check_world_size(outcome["saved"], definition, args)
        # Later checkpoints keep the batch of the first start, so that each restart computes its
        # own accumulation.
        definition |= {key: outcome["saved"][key] for key in WORLD}
    return outcome["run"], outcome["changes"]


def _begin(args, definition: dict, pipeline: str) -> dict:
    """The main process's part: decide, delete what is given up and write run.json.

    Returns {} for a complete run, else what `ResumeDecision.decide` returns and the record ("run").
    """
    output_dir = Path(args.output_dir)
    unlock_directory()
    if exists := output_dir.is_dir():
        lock_directory(output_dir)
    decision = ResumeDecision(args, definition)
    if problem := decision.record.get("problem"):
        say(f"notice: {problem}")
    if decision.has_nothing_to_do():
        say(
            f"{decision.stage['stage']} is complete in {output_dir} (step {decision.steps:,}):"
            " nothing to do. To train it again give another --output_dir, or"
            " --overwrite_output_dir true."
        )
        return {}

    outcome = decision.decide()
    checkpoint = outcome["checkpoint"]
    decision.make_room(checkpoint)
    check_writable(output_dir)
    if not exists:
        lock_directory(output_dir)

    started = time.strftime("%Y-%m-%d %H:%M:%S")
    record = {"run": uuid4().hex[:8], "pipeline": pipeline, "started": started}
    if checkpoint:
        record = {key: decision.record.get(key, value) for key, value in record.items()}
    record |= {"from": decision.origin, "extended": decision.extended}
    first_batch = {key: outcome["saved"][key] for key in WORLD} if outcome["resized"] else {}
    write_json(output_dir / RUN, {**record, "recipe": definition | first_batch})
    return {**outcome, "checkpoint": checkpoint and str(checkpoint), "run": record}
