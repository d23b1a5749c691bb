"""Chat templates as what they are, programs of somebody else: bounded in time, memory and what they
write."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jinja2.filters import do_round
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from transformers.utils import chat_template_utils

from minimind.common.errors import BadRowError, UserError

# For one conversation, where a thousandth of a second and a few of its own sizes are usual.
SECONDS = 60  # of the processor
MEMORY, PER_CHARACTER = 2**31, 64  # bytes beyond what the process has already
WRITTEN, WRITTEN_PER_CHARACTER = 2**20, 64  # characters
BITS = 4096  # of a whole number
ADVICE = "Give the tokenizer another one, or fine-tune with --chat_template."
STATUS = Path("/proc/self/statm")  # Linux


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """Identical to the library's except: whole numbers stay small. With large ones a single
    operation takes hours, and nothing in this process could interrupt it."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.filters["round"] = lambda value, precision=0, method="common": do_round(
            value, min(precision, BITS // 4), method
        )

    def call_binop(self, context, operator, left, right):
        """Called for each of the operators above; raises SecurityError."""
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * right
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            if bits > BITS:
                raise SecurityError(f"found a number of more than {BITS:,} bits")
        return super().call_binop(context, operator, left, right)


chat_template_utils.ImmutableSandboxedEnvironment = BoundedSandbox  # templates are compiled there


class OutOfTimeError(BaseException):
    """Past `except Exception`, which jinja has around what it computes when it compiles."""


@contextmanager
def bounded(characters: int = 0, shipped: bool = False) -> Iterator[None]:
    """A block in which a template runs on a conversation of so many characters, whatever the
    template does.

    A `shipped` one has no limits, whose setting takes a tenth of a millisecond; its failures are
    told all the same.

    Raises:
        BadRowError: the template refuses the conversation, or fails. UserError: it takes more time
        or memory than any template needs, and would for other conversations.
    """
    memory = MEMORY + PER_CHARACTER * characters
    try:
        with ExitStack() as limits:
            for limited in () if shipped else (_limited_memory(memory), _limited_time()):
                limits.enter_context(limited)
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
    """Let the process take `size` bytes more and no others, where the system can say what it
    has."""
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
    """Raise OutOfTimeError after SECONDS of the processor; only the main thread can be
    interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop) or signal.SIG_DFL
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(number, frame) -> None:
    raise OutOfTimeError
