"""Going on with another number of processes."""

from minimind.errors import UserError


def check_world_size(saved: dict, now: dict, args) -> None:
    """Called in every process when a checkpoint is continued by another number of processes than wrote it.

    Args:
        saved: the run's recipe (`resume.recipe_of`), with "processes", "per_device_train_batch_size" and
            "gradient_accumulation_steps" of its first start.
        now: the recipe of this command.
        args: the training arguments; `resume_from_checkpoint` is the path of the checkpoint, whose manifest has the
            number of processes that wrote it.

    Raises:
        UserError: the run cannot go on with this number of processes.
    """
    raise UserError(
        f"{args.resume_from_checkpoint} is of a run with {saved['processes']} processes, this command starts "
        f"{now['processes']}. Start as many as before, or begin anew in another --output_dir."
    )
