"""What a command does with the run in its output directory.

The same command again resumes an interrupted run, and has nothing to do after a complete one. A
command that differs is refused with a list of the differences, and with what to add to resume, to
extend a complete run, or to delete it and start over.
"""

from pathlib import Path

from minimind.common.errors import UserError
from minimind.common.files import read_json
from minimind.common.language import say
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
from minimind.training.output_directory import (
    RECIPE,
    RUN,
    STAGE,
    checkpoints,
    clear,
    delete_checkpoint,
    read_record,
)


class ResumeDecision:
    """What a command does with the run in its output directory; only `make_room` writes.

    `record`, `stage`: the contents of run.json and stage.json. `option`: --resume_from_checkpoint.
    `origin`: the checkpoint that the run began from, by its name inside the directory or its path
    elsewhere. `complete`: whether the stage directory belongs to this run, at its full length.
    `replaces`: whether the old run is deleted.
    """

    def __init__(self, args, definition: dict):
        self.args, self.definition, self.output_dir = args, definition, Path(args.output_dir)
        self.record, self.stage = (read_record(self.output_dir, name) for name in (RUN, STAGE))
        self.holds_run = bool(self.record or self.stage or checkpoints(self.output_dir))
        self.steps = self.stage.get("steps", 0)
        self.changes = changed(self.record["recipe"], definition) if self.record else {}
        self.extended = self.record.get("extended", [])
        self.complete = bool(self.stage) and self.stage.get("extended", []) == self.extended

        self.option, self.origin = args.resume_from_checkpoint, self.record.get("from")
        if self.names_checkpoint:
            path = Path(self.option).resolve()
            inside = path.parent == self.output_dir.resolve()
            name = path.name if inside else str(path)
            if self.record and name == self.origin and not self.changes:
                self.option = "auto"  # the same command again: its own checkpoints are newer
            self.origin = name
        self.replaces = self._is_replaced()

    @property
    def names_checkpoint(self) -> bool:
        """Whether the command names a checkpoint by its path."""
        return self.option not in ("auto", "true", "false")

    @property
    def names_other_run(self) -> bool:
        """Whether the command names a checkpoint in another directory."""
        return self.names_checkpoint and Path(self.origin).is_absolute()

    def has_nothing_to_do(self) -> bool:
        """Whether the run is complete, and this command is the same."""
        same = self.complete and self.record and not self.changes and not self.names_other_run
        return bool(same) and not self.replaces

    def _is_replaced(self) -> bool:
        """Whether --overwrite_output_dir deletes the run: not this very run, interrupted."""
        if not (self.args.overwrite_output_dir and self.holds_run):
            return False
        if self.option == "auto":
            return bool(self.complete or self.changes)
        return self.option == "false" or self.names_other_run

    def decide(self) -> dict:
        """Choose the checkpoint to resume from.

        Returns "checkpoint", or None; its definition ("saved"), the accepted "changes" since, and
        whether it was written by another number of processes ("resized"). Raises UserError.
        """
        # Choose by the options and the content of the directory
        problems: list[str] = []
        if self.replaces:
            self._start_over(keep_origin=self.names_checkpoint)
            checkpoint = self._named_checkpoint() if self.origin else None
        elif self.complete:
            checkpoint = self._end_of_complete()
        else:
            checkpoint, problems = self._choose()
        overwrites = self.option == "auto" and self.args.overwrite_output_dir
        if checkpoint and overwrites and self._is_of_another_run(checkpoint):
            checkpoint = None  # an interrupted run, but not this one
            self._start_over()
        for problem in problems:
            say(problem)
        if checkpoint is None:
            self.origin = None
            if problems:
                say(f"no complete checkpoint is left in {self.output_dir}: starting over")
            return {"checkpoint": None, "resized": False, "changes": {}}

        # Compare with what the checkpoint was written with
        saved, manifest = _definition(checkpoint), read_manifest(checkpoint)
        processes = {saved.get("processes"), manifest["processes"]}
        resized = processes != {self.definition["processes"]}
        accept = self.args.allow_changed_recipe
        changes = _accepted_changes(checkpoint, saved, self.definition, accept)
        if any(is_about(key, WORLD) for key in changes):
            # The rows per step are those of this command
            saved |= {key: self.definition[key] for key in WORLD}
        self._check_length(checkpoint, manifest, changes)
        if self.complete and not self.replaces:
            self._extend(manifest["step"])
        say(f"resuming from {checkpoint}")
        return {"checkpoint": checkpoint, "saved": saved, "resized": resized, "changes": changes}

    def _start_over(self, keep_origin: bool = False) -> None:
        """Replace the old run by a new one."""
        self.replaces, self.extended = True, []
        self.origin = self.origin if keep_origin else None

    def _is_of_another_run(self, checkpoint: Path) -> bool:
        """Whether a checkpoint has another definition, and the change was not accepted."""
        same = not changed(_definition(checkpoint), self.definition)
        return not same and not self.args.allow_changed_recipe

    def _choose(self) -> tuple[Path | None, list[str]]:
        """The checkpoint of an unfinished run that --resume_from_checkpoint selects, and the
        problems of newer ones."""
        if self.option == "false":
            if existing := checkpoints(self.output_dir):
                raise UserError(
                    f"--resume_from_checkpoint false, but {self.output_dir} holds an unfinished run"
                    f" ({existing[0].name}). Leave the option out to resume, give another"
                    " --output_dir, or delete the run with --overwrite_output_dir true."
                )
            return None, []
        if self.names_checkpoint:
            return self._named_checkpoint(), []
        checkpoint, problems = last_complete_checkpoint(self.output_dir)
        if checkpoint is None and self.origin and Path(self.origin).is_absolute():
            return self._named_checkpoint(), problems  # the run has none of its own yet
        if checkpoint is None and self.option == "true":
            raise UserError(
                "--resume_from_checkpoint true: there is no complete checkpoint in"
                f" {self.output_dir}.{_indented(problems)}"
            )
        return checkpoint, problems

    def _named_checkpoint(self) -> Path:
        """The checkpoint that the command names, or that the run began from; raises UserError where
        it is broken, or the directory holds another run."""
        checkpoint = self.output_dir / self.origin  # an absolute path stays as it is
        if self.names_other_run and self.holds_run and not self.replaces:
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} is not of the run in --output_dir"
                f" {self.output_dir}, and the two would mix. Give another --output_dir, or delete"
                " that run and start over with --overwrite_output_dir true."
            )
        if not checkpoint.is_dir():
            raise UserError(f"--resume_from_checkpoint {checkpoint}: no such directory.")
        if problem := problem_of(checkpoint):
            complete = [
                str(path) for path in checkpoints(checkpoint.parent) if not problem_of(path)
            ]
            hint = f" Complete: {', '.join(complete)}." if complete else ""
            raise UserError(
                f"--resume_from_checkpoint {checkpoint} is not a complete checkpoint:"
                f" {problem}.{hint}"
            )
        return checkpoint

    def _end_of_complete(self) -> Path:
        """The checkpoint from which a complete run is extended; raises UserError where the command
        does not extend it."""
        if self.names_other_run:
            return self._named_checkpoint()  # which refuses it
        if not self.record:
            raise UserError(
                f"--output_dir {self.output_dir} holds a complete {self.stage['stage']}, and no"
                " run.json that tells its recipe. Give another --output_dir, or delete that run"
                " and start over with --overwrite_output_dir true."
            )
        if self.option == "false" or not self._is_longer():
            raise UserError(
                f"--output_dir {self.output_dir} holds a complete run of another"
                f" recipe:\n{listed(self.changes)}\nGive another --output_dir, or delete that run"
                " and start over with --overwrite_output_dir true."
            )
        if not self.args.allow_changed_recipe:
            raise UserError(
                f"--output_dir {self.output_dir} holds a complete run of another"
                f" recipe:\n{listed(self.changes)}\nExtend it with --allow_changed_recipe true,"
                " give another --output_dir, or delete that run and start over with"
                " --overwrite_output_dir true."
            )
        if self.names_checkpoint:
            return self._named_checkpoint()
        checkpoint, problems = last_complete_checkpoint(self.output_dir)
        if checkpoint is None:
            raise UserError(
                f"the complete run in --output_dir {self.output_dir} cannot be extended: no"
                f" complete checkpoint of it is left.{_indented(problems)}\nStart another run from"
                f" its weights: --model_name_or_path {self.output_dir} and another --output_dir."
            )
        return checkpoint

    def _is_longer(self) -> bool:
        """Whether the command may train more steps than the complete run; see `_check_length`."""
        length_changed = any(key in self.changes for key in LENGTH)
        return length_changed and not 0 < self.definition["max_steps"] <= self.steps

    def _check_length(self, checkpoint: Path, manifest: dict, changes: dict) -> None:
        """Raise UserError where the command ends before the checkpoint, or adds no step to a
        complete run."""
        step = manifest["step"]
        name, last, reached = "max_steps", self.definition["max_steps"], step
        if budget := self.definition.get("time_budget"):
            # The last step of the same budget may have ended after it
            name, last = "time_budget", budget
            reached = manifest.get("elapsed", 0) if name in changes else 0
        elif last <= 0:
            name, last = "num_train_epochs", self.definition["num_train_epochs"]
            reached = read_json(checkpoint / "trainer_state.json", "").get("epoch") or 0
        extending = self.complete and not self.replaces
        if reached > last or (extending and reached == last):
            unit = " s" if budget else ""
            reached, last = f"{reached:g}{unit}", f"{last:g}{unit}"
            raise UserError(
                f"{checkpoint} has {step:,} steps behind it ({name} {reached}), and --{name} {last}"
                f" asks for no more. Give a larger --{name}, or another --output_dir."
            )

    def _extend(self, step: int) -> None:
        """Record and report that a complete run becomes a longer one."""
        self.extended = [*self.extended, self.steps]
        again = (
            f"; steps {step + 1:,} to {self.steps:,} are trained again" if step < self.steps else ""
        )
        say(
            f"extending the complete run of {self.steps:,} steps, whose stage directory stays as it"
            f" is until the longer one is complete{again}"
        )

    def make_room(self, checkpoint: Path | None) -> None:
        """Delete what the coming run gives up.

        Raises:
            UserError: that was not requested, or something that is not ours has the name of a
                checkpoint to come.
        """
        step = 0 if checkpoint is None else read_manifest(checkpoint)["step"]
        strangers = [
            path for path in checkpoints(self.output_dir, foreign=True) if _step(path) > step
        ]
        if strangers:
            raise UserError(
                f"{strangers[-1]} is no checkpoint of a run of ours, and its name may be needed for"
                " one. Move it away, or give another --output_dir."
            )
        if self.replaces:
            clear(self.output_dir)
        elif checkpoint and self.names_checkpoint:
            newer = [path for path in checkpoints(self.output_dir) if _step(path) > step]
            complete = [path.name for path in newer if not problem_of(path, hashes=False)]
            if complete and not self.args.overwrite_output_dir:
                raise UserError(
                    f"--resume_from_checkpoint {checkpoint} would give up the newer"
                    f" {', '.join(complete)}. Branch off into another --output_dir, or delete what"
                    " is newer with --overwrite_output_dir true."
                )
            for path in newer:
                delete_checkpoint(path)


def _indented(lines: list[str]) -> str:
    return "".join(f"\n  {line}" for line in lines)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _definition(checkpoint: Path) -> dict:
    remedy = "Remove this checkpoint: the run continues from the one before."
    return read_json(checkpoint / RECIPE, remedy)


def _accepted_changes(checkpoint: Path, saved: dict, now: dict, accept: bool) -> dict:
    """Report and return the changes of the definition; raise UserError where they make it another
    run and were not accepted."""
    changes = changed(saved, now)
    decisive = {key: values for key, values in changes.items() if is_about(key, DECISIVE)}
    if decisive:
        raise UserError(
            f"{checkpoint} cannot be resumed by this command, it is of another model or recipe:\n"
            f"{listed(decisive)}\nRestore the old values, or start over in another --output_dir."
        )
    if changes and not accept:
        raise UserError(
            f"{checkpoint} was written with another recipe, and resuming would produce what neither"
            f" recipe produces:\n{listed(changes)}\nRestore the old values, start over in another"
            " --output_dir, or accept the change with --allow_changed_recipe true."
        )
    if changes:
        say(f"resuming with a changed recipe:\n{listed(changes)}")
    others = differences(saved, now).items()
    if information := {key: values for key, values in others if is_about(key, INFORMATION)}:
        say(
            "the last bits may differ from an undisturbed run, since these"
            f" changed:\n{listed(information)}"
        )
    return changes
