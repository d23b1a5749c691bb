"""Runs the common tests of the installed transformers, and measures MiniMind's results by its
twins'.

The run fails where MiniMind does worse than its twin: where it fails a test that the twin passes or
skips, skips one that the twin passes, or passes fewer subtests. What both fail or skip is not held
against it.
"""

import os
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from sdist import download, unpack

from minimind.common.errors import UserError

COUNTED = ("passed", "subtests passed", "skipped", "failed")
# Tests that MiniMind may skip though its twin passes, because they ask for what it leaves out on
# purpose.
LEFT_OUT = {"test_sliding_window_mask": "its attention has no sliding window"}


def pytest_configure(config):
    """Put the library's package `tests` on the path."""
    try:
        archive = download()
    except UserError as error:
        pytest.exit(str(error), returncode=os.EX_TEMPFAIL)
    directory = tempfile.TemporaryDirectory(prefix="transformers-tests-")
    config.add_cleanup(directory.cleanup)
    unpack(archive, Path(directory.name))
    sys.path.insert(0, directory.name)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """Below pytest's own report, set MiniMind's results beside its twins', and let that decide on
    the exit status."""
    yield
    classes = {item.cls for item in session.items}
    pairs = sorted((cls.__name__, cls.twin.__name__) for cls in classes if cls.twin in classes)
    if not pairs or session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return  # interrupted, or only a part was asked for: pytest's own verdict stands
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    results = outcomes_by_test(reporter.stats)
    complaints = [
        f"{ours}: {line}" for ours, twin in pairs for line in worse(results[ours], results[twin])
    ]
    for line in (*table(results, pairs), *complaints):
        reporter.write_line(line)
    session.exitstatus = pytest.ExitCode.TESTS_FAILED if complaints else pytest.ExitCode.OK


def outcomes_by_test(stats: dict[str, list]) -> dict[str, dict[str, Counter]]:
    """class -> test -> how often each outcome was reported: once for the test, and once for each
    subtest."""
    results = defaultdict(lambda: defaultdict(Counter))
    for category in (*COUNTED, "error"):
        for report in stats.get(category, []):
            _, class_name, test_name = report.nodeid.split("::")
            results[class_name][test_name]["failed" if category == "error" else category] += 1
    return results


def table(results: dict[str, dict[str, Counter]], pairs: list[tuple[str, str]]) -> list[str]:
    lines = [f"\n{'MiniMind / twin':32}" + "".join(f"{name:>17}" for name in COUNTED)]
    for pair in pairs:
        ours, twin = (sum(results[name].values(), Counter()) for name in pair)
        lines.append(
            f"{' / '.join(pair):32}"
            + "".join(f"{f'{ours[name]} / {twin[name]}':>17}" for name in COUNTED)
        )
    return [*lines, *(f"MiniMind may skip {test}: {why}." for test, why in LEFT_OUT.items())]


def worse(ours: dict[str, Counter], twin: dict[str, Counter]) -> list[str]:
    """The tests that the twin does better, each with what became of it in both."""
    return [
        f"{test}: {dict(ours[test])}, the twin {dict(outcomes)}"
        for test, outcomes in twin.items()
        if rank(ours[test]) > max(rank(outcomes), test in LEFT_OUT)
        or ours[test]["subtests passed"] < outcomes["subtests passed"]
    ]


def rank(outcomes: Counter) -> int:
    """0 if a test and its subtests passed, 1 if any was skipped, 2 if any failed or the test did
    not run."""
    return 2 if outcomes["failed"] or not outcomes else int(outcomes["skipped"] > 0)
