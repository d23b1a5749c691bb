"""A new run, or an old one that continues: what a command finds in its output directory, and what
it does there.

The same command again continues an interrupted run, and has nothing to do after a complete one.
Another command is told what differs, and what to add to continue, to extend a complete run, or to
delete it and begin anew.
"""

import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.utils import broadcast_object_list

from minimind.common.errors import UserError
from minimind.common.files import read_json, write_json
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.training.checkpoints import last_complete_checkpoint, problem_of, read_manifest
from minimind.training.definition import (
    DECISIVE,
    INFORMATION,
    LENGTH,
    WORLD,
    changed,
    differences,
    is_about,
    listed,
)
from minimind.training.elastic import check_world_size
from minimind.training.output_directory import (
    RECIPE,
    RUN,
    STAGE,
    checkpoints,
    clear,
    delete_checkpoint,
    lock_directory,
    read_record,
    unlock_directory,
)
from minimind.training.saving import check_writable


def begin(args, recipe: dict, pipeline: str) -> tuple[dict, dict]:
    """Decide between a new run and an old one that continues, the same in all processes.

    Returns what run.json says of the run ("run": its id, "pipeline", "started", "from": the
    checkpoint that --resume_from_checkpoint named, "extended": the lengths in steps that it was
    complete with before), and the changes of its recipe that were accepted, each key with its old
    and new value.

    Sets `args.resume_from_checkpoint` to the checkpoint to continue from, or None. Until
    `unlock_directory` no other run can use the directory.

    Raises:
        UserError: there is nothing to continue from and there should be, the checkpoint given is
            broken, the recipe has changed, the directory holds a run that is complete with another
            recipe, or another run uses it.
        SystemExit: with code 0, the run is complete already.
    """
    decision: dict[str, Any] = {}
    if is_main_process():
        try:
            decision = _decide(args, recipe, pipeline)
        except UserError as error:
            decision = {"error": str(error)}
        except OSError as error:
            decision = {"error": f"--output_dir {args.output_dir} cannot be used: {error}"}
        if "run" not in decision:
            unlock_directory()
    (decision,) = broadcast_object_list([decision])
    if "error" in decision:
        raise UserError(decision["error"])
    if decision.get("complete"):
        raise SystemExit(0)
    args.resume_from_checkpoint = decision["checkpoint"]
    if decision["resized"]:
        check_world_size(decision["saved"], recipe, args)
        # Later checkpoints keep the batch as the recipe had it, so that each restart works out its
        # own accumulation.
        recipe |= {key: decision["saved"][key] for key in WORLD}
    return decision["run"], decision["changes"]


def _decide(args, recipe: dict, pipeline: str) -> dict:
    output_dir = Path(args.output_dir)
    unlock_directory()
    if found := output_dir.is_dir():
        lock_directory(output_dir)
    start = Start(args, recipe)
    if problem := start.run.get("problem"):
        say(f"notice: {problem}")
    if start.has_nothing_to_do():
        say(
            f"{start.stage['stage']} is complete in {output_dir} (step {start.steps:,}): nothing to"
            " do. To train it again give another --output_dir, or --overwrite_output_dir true."
        )
        return {"complete": True}
    decision = start.decide()
    start.make_room(decision["checkpoint"])
    check_writable(output_dir)
    if not found:
        lock_directory(output_dir)
    run = {
        "run": uuid4().hex[:8],
        "pipeline": pipeline,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if decision["checkpoint"]:
        run = {key: start.run.get(key, value) for key, value in run.items()}
    run |= {"from": start.source, "extended": start.extended}
    kept = {key: decision["saved"][key] for key in WORLD} if decision["resized"] else {}
    write_json(output_dir / RUN, {**run, "recipe": recipe | kept})
    checkpoint = decision["checkpoint"]
    return {**decision, "checkpoint": checkpoint and str(checkpoint), "run": run}


class Start:
    """A command and what it finds in its output directory; nothing is written before `make_room`.

    `run`, `stage`: what run.json and stage.json say. `source`: the checkpoint that the run began
    from, by its name inside of the directory or its path elsewhere. `complete`: the stage directory
    is of this run, at its full length.
    """

    def __init__(self, args, recipe: dict):
        self.args, self.recipe, self.output_dir = args, recipe, Path(args.output_dir)
        self.run, self.stage = (read_record(self.output_dir, name) for name in (RUN, STAGE))
        self.steps = self.stage.get("steps", 0)
        self.changes = changed(self.run["recipe"], recipe) if self.run else {}
        self.extended = self.run.get("extended", [])
        self.complete = bool(self.stage) and self.stage.get("extended", []) == self.extended
        self.asked, self.source = args.resume_from_checkpoint, self.run.get("from")
        if self.asked not in ("auto", "true", "false"):
            path = Path(self.asked).resolve()
            inside = path.parent == self.output_dir.resolve()
            given = path.name if inside else str(path)
            if self.run and given == self.source and not self.changes:
                self.asked = "auto"  # the same command again: its own checkpoints are newer
            self.source = given

    @property
    def elsewhere(self) -> bool:
        """Whether the command names a checkpoint of another directory."""
        return self.asked not in ("auto", "true", "false") and Path(self.source).is_absolute()

    @property
    def path(self) -> Path | None:
        """The checkpoint that the command names, or that the run began from in another
        directory."""
        # An absolute path stays as it is
        return self.output_dir / self.source if self.source else None

    def has_nothing_to_do(self) -> bool:
        """Whether the run is complete, and this command asks for the same."""
        same = self.complete and self.run and not self.changes and not self.elsewhere
        return bool(same) and not self.is_to_be_deleted()

    def is_to_be_deleted(self) -> bool:
        """Whether --overwrite_output_dir deletes what is there: not this very run, interrupted."""
        held = self.run or self.stage or checkpoints(self.output_dir)
        if not (self.args.overwrite_output_dir and held) or self.asked == "true":
            return False
        if self.asked == "auto":
            return bool(self.complete or self.changes)
        return self.asked == "false" or self.elsewhere

    def decide(self) -> dict:
        """The "checkpoint" to continue from or None, its recipe ("saved"), the "changes" since, and
        whether it is of another number of processes ("resized"); raises UserError."""
        self.anew = self.is_to_be_deleted()
        problems: list[str] = []
        if self.anew:
            self.extended = []
            self.source = None if self.asked in ("auto", "false") else self.source
            checkpoint = self.path and self.given()
        elif self.complete:
            checkpoint = self.end_of_complete()
        else:
            checkpoint, problems = self.choose()
        if (
            checkpoint
            and self.asked == "auto"
            and self.args.overwrite_output_dir
            and self.is_of_another(checkpoint)
        ):
            checkpoint, self.anew, self.extended, self.source = None, True, [], None
        for problem in problems:
            say(problem)
        if checkpoint is None:
            self.source = None
            if problems:
                say(f"no whole checkpoint is left in {self.output_dir}: beginning anew")
            return {"checkpoint": None, "resized": False, "changes": {}}
        saved, manifest = _recipe(checkpoint), read_manifest(checkpoint)
        resized = {saved.get("processes"), manifest["processes"]} != {self.recipe["processes"]}
        changes = _check_recipe(checkpoint, saved, self.recipe, self.args.allow_changed_recipe)
        if any(is_about(key, WORLD) for key in changes):
            # The rows per step are what this command asks for
            saved |= {key: self.recipe[key] for key in WORLD}
        self.check_length(checkpoint, manifest["step"])
        if self.complete and not self.anew:
            self.extend(manifest["step"])
        say(f"going on from {checkpoint}")
        return {"checkpoint": checkpoint, "saved": saved, "resized": resized, "changes": changes}

    def is_of_another(self, checkpoint: Path) -> bool:
        """Whether a checkpoint was written with another recipe, and that was not accepted."""
        return (
            bool(changed(_recipe(checkpoint), self.recipe)) and not self.args.allow_changed_recipe
        )

    def choose(self) -> tuple[Path | None, list[str]]:
        """The checkpoint of an unfinished run that --resume_from_checkpoint means, and what is
        wrong with newer ones."""
        if self.asked == "false":
            if found := checkpoints(self.output_dir):
                raise UserError(
                    f"--resume_from_checkpoint false, but {self.output_dir} holds an unfinished run"
                    f" ({found[0].name}). Leave the option out to go on, give another --output_dir,"
                    " or delete the run with --overwrite_output_dir true."
                )
            return None, []
        if self.asked not in ("auto", "true"):
            return self.given(), []
        checkpoint, problems = last_complete_checkpoint(self.output_dir)
        if checkpoint is None and self.source and Path(self.source).is_absolute():
            return self.given(), problems  # nothing of its own yet
        if checkpoint is None and self.asked == "true":
            details = "".join(f"\n  {problem}" for problem in problems)
            raise UserError(
                "--resume_from_checkpoint true: there is no whole checkpoint in"
                f" {self.output_dir}.{details}"
            )
        return checkpoint, problems

    def given(self) -> Path:
        """The checkpoint given by its path; raises UserError where the directory is another run's,
        or it is broken."""
        checkpoint = self.path
        held = self.run or self.stage or checkpoints(self.output_dir)
        if self.elsewhere and held and not self.anew:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} is not of the run in --output_dir"
                f" {self.output_dir}, and the two would mix. Give another --output_dir, or delete"
                " that run and begin again with --overwrite_output_dir true."
            )
        if not checkpoint.is_dir():
            raise UserError(f"--resume_from_checkpoint {checkpoint}: no such directory.")
        if problem := problem_of(checkpoint):
            whole = [path for path in checkpoints(checkpoint.parent) if problem_of(path) is None]
            hint = f" Whole: {', '.join(map(str, whole))}." if whole else ""
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} is not a whole checkpoint: {problem}.{hint}"
            )
        return checkpoint

    def end_of_complete(self) -> Path:
        """The checkpoint from which a complete run is extended; raises UserError where that is not
        asked for."""
        if self.elsewhere:
            return self.given()  # refused
        if not self.run:
            raise UserError(
                f"--output_dir {self.output_dir} holds a complete {self.stage['stage']}, and no"
                " run.json that says of which recipe. Give another --output_dir, or delete that"
                " run and begin again with --overwrite_output_dir true."
            )
        if self.asked == "false" or not self.is_longer():
            raise UserError(
                f"--output_dir {self.output_dir} holds a complete run of another"
                f" recipe:\n{listed(self.changes)}\nGive another --output_dir, or delete that run"
                " and begin again with --overwrite_output_dir true."
            )
        if not self.args.allow_changed_recipe:
            raise UserError(
                f"--output_dir {self.output_dir} holds a complete run of another"
                f" recipe:\n{listed(self.changes)}\nExtend it with --allow_changed_recipe true,"
                " give another --output_dir, or delete that run and begin again with"
                " --overwrite_output_dir true."
            )
        if self.asked not in ("auto", "true"):
            return self.given()
        checkpoint, problems = last_complete_checkpoint(self.output_dir)
        if checkpoint is None:
            details = "".join(f"\n  {problem}" for problem in problems)
            raise UserError(
                f"the complete run in --output_dir {self.output_dir} cannot be extended: no"
                f" complete checkpoint of it is left.{details}\nBegin another run from its weights:"
                f" --model_name_or_path {self.output_dir} and another --output_dir."
            )
        return checkpoint

    def is_longer(self) -> bool:
        """Whether the command may ask for more steps than the complete run has; `check_length`
        knows."""
        changed_length = any(key in self.changes for key in LENGTH)
        return changed_length and not 0 < self.recipe["max_steps"] <= self.steps

    def check_length(self, checkpoint: Path, step: int) -> None:
        """Raises UserError where the command asks for no step after the checkpoint's, or for
        fewer."""
        last = self.recipe["max_steps"]
        reached = step
        if last <= 0:
            last = self.recipe["num_train_epochs"]
            reached = read_json(checkpoint / "trainer_state.json", "").get("epoch") or 0
        extending = self.complete and not self.anew
        if reached > last or (extending and reached == last):
            name = LENGTH[self.recipe["max_steps"] <= 0]
            raise UserError(
                f"{checkpoint} has {step:,} steps behind it ({name} {reached:g}), and --{name}"
                f" {last:g} asks for no more. Give a larger --{name}, or another --output_dir."
            )

    def extend(self, step: int) -> None:
        """Note and say that a complete run becomes a longer one."""
        self.extended = [*self.extended, self.steps]
        again = (
            f"; steps {step + 1:,} to {self.steps:,} are trained again" if step < self.steps else ""
        )
        say(
            f"extending the complete run of {self.steps:,} steps, whose stage directory stays as it"
            f" is until the longer one is complete{again}"
        )

    def make_room(self, checkpoint: Path | None) -> None:
        """Delete what the run to come gives up.

        Raises:
            UserError: that was not asked for, or something that is not ours stands where a
            checkpoint will be.
        """
        step = 0 if checkpoint is None else read_manifest(checkpoint)["step"]
        strangers = [
            path for path in checkpoints(self.output_dir, foreign=True) if _number(path) > step
        ]
        if strangers:
            raise UserError(
                f"{strangers[-1]} is no checkpoint of a run of ours, and stands where one may be"
                " written. Move it away, or give another --output_dir."
            )
        if self.anew:
            clear(self.output_dir)
        elif checkpoint and self.asked not in ("auto", "true"):
            newer = [path for path in checkpoints(self.output_dir) if _number(path) > step]
            whole = [path.name for path in newer if problem_of(path, hashes=False) is None]
            if whole and not self.args.overwrite_output_dir:
                raise UserError(
                    f"--resume_from_checkpoint {checkpoint} would give up the newer"
                    f" {', '.join(whole)}. Branch off into another --output_dir, or delete what is"
                    " newer with --overwrite_output_dir true."
                )
            for path in newer:
                delete_checkpoint(path)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _recipe(checkpoint: Path) -> dict:
    return read_json(
        checkpoint / RECIPE, "Remove this checkpoint: the run continues from the one before."
    )


def _check_recipe(checkpoint: Path, saved: dict, now: dict, accept: bool) -> dict:
    """Say what changed and return it; raises UserError where the run would be another and that was
    not accepted."""
    changes = changed(saved, now)
    information = {
        key: pair for key, pair in differences(saved, now).items() if is_about(key, INFORMATION)
    }
    decisive = {key: pair for key, pair in changes.items() if is_about(key, DECISIVE)}
    if decisive:
        raise UserError(
            f"{checkpoint} cannot be continued by this command, it is of another model or recipe:\n"
            f"{listed(decisive)}\nPut the old values back, or begin anew in another --output_dir."
        )
    if changes and not accept:
        raise UserError(
            f"{checkpoint} was written with another recipe, and going on would give what neither"
            f" gives:\n{listed(changes)}\nPut the old values back, begin anew in another"
            " --output_dir, or accept the change with --allow_changed_recipe true."
        )
    if changes:
        say(f"going on with a changed recipe:\n{listed(changes)}")
    if information:
        say(
            "the last bits may differ from an undisturbed run, since these"
            f" changed:\n{listed(information)}"
        )
    return changes
