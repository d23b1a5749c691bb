"""The shipped chat templates, and limits on all others: a template is somebody else's program.

A program from a stranger's tokenizer may loop, allocate or write without end. `bounded` limits its
time and memory, `BoundedSandbox` the size of its numbers, and the renderer the size of its text.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from jinja2.filters import do_round
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from transformers.utils import chat_template_utils

from minimind.common.errors import BadRowError, UserError
from minimind.tokenizer import CHAT_TEMPLATE

TEMPLATES = {path.stem: path for path in sorted(CHAT_TEMPLATE.parent.glob("*.jinja"))}
SHIPPED = frozenset(path.read_text(encoding="utf-8") for path in TEMPLATES.values())

# Limits for one conversation, which usually takes a millisecond and a few times its own size
SECONDS = 60  # of processor time
MEMORY, PER_CHARACTER = 2**31, 64  # bytes beyond what the process already uses
WRITTEN, WRITTEN_PER_CHARACTER = 2**20, 64  # characters
BITS = 4096  # of an integer
ADVICE = "Give the tokenizer another one, or fine-tune with --chat_template."
STATUS = Path("/proc/self/statm")  # Linux


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Identical to the library's except: integers stay small, because one operation on large ones
    can take hours, and nothing in this process could interrupt it."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.filters["round"] = lambda value, precision=0, method="common": do_round(
            value, min(precision, BITS // 4), method
        )

    def call_binop(self, context, operator, left, right):
        """Called for each of the operators above; raises SecurityError."""
        if isinstance(left, int) and isinstance(right, int):
            size = left.bit_length()
            bits = size * right if operator == "**" else size + right.bit_length()
            if bits > BITS:
                raise SecurityError(f"found a number of more than {BITS:,} bits")
        return super().call_binop(context, operator, left, right)


chat_template_utils.ImmutableSandboxedEnvironment = BoundedSandbox  # templates are compiled there


class OutOfTimeError(BaseException):
    """Not an Exception, because jinja catches those around constants that it evaluates early."""


@contextmanager
def bounded(characters: int = 0, shipped: bool = False) -> Iterator[None]:
    """A block that renders a conversation of so many characters within limits.

    A `shipped` template has no limits, because setting them takes a tenth of a millisecond; its
    failures are reported like any other's.

    Raises:
        BadRowError: the template refuses the conversation, or fails.
        UserError: it takes more time or memory than any template needs, so it would also do so for
            other conversations.
    """
    memory = MEMORY + PER_CHARACTER * characters
    try:
        with (
            nullcontext() if shipped else _limited_memory(memory),
            nullcontext() if shipped else _limited_time(),
        ):
            yield
    except MemoryError:
        raise UserError(
            f"the chat template takes more than {memory / 2**30:.0f} GiB of memory. {ADVICE}"
        ) from None
    except OutOfTimeError:
        raise UserError(
            f"the chat template takes more than {SECONDS} s of the processor for one conversation."
            f" {ADVICE}"
        ) from None
    except Exception as error:  # it is a program: anything can go wrong in it
        raise BadRowError(f"the chat template refuses the conversation: {error}") from None


@contextmanager
def _limited_memory(size: int) -> Iterator[None]:
    """A block with at most `size` more bytes, where the system reports what is in use."""
    if not STATUS.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(STATUS.read_text().split()[0]) * resource.getpagesize() + size
    tighter = [each for each in (soft, hard) if each != resource.RLIM_INFINITY and each < limit]
    resource.setrlimit(resource.RLIMIT_AS, (min([limit, *tighter]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _limited_time() -> Iterator[None]:
    """A block that OutOfTimeError ends after SECONDS; only a main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number, frame) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGVTALRM, stop) or signal.SIG_DFL
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
