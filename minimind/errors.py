"""The one kind of error that is shown to a user without a traceback."""

import os
import sys
from collections.abc import Callable
from functools import wraps


class UserError(Exception):
    """A mistake the user can mend.

    The message says what was given (file and line for data), what was expected, and what to do.
    """


def reports_user_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate an entry point: a `UserError` becomes one message on stderr and exit code 2.

    With several processes only rank 0 of each machine prints, since all of them meet the same mistake.
    """

    @wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if os.environ.get("LOCAL_RANK", "0") in ("0", "-1"):
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)

    return wrapped
