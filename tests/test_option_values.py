"""Any value of any option, of the stages and of the commands, is taken or refused by one message that names it."""

import argparse
import os
from functools import cache

import pytest

from minimind.bounds import BOUNDS, check_options
from minimind.cli import build_parser
from minimind.errors import UserError
from minimind.planning.recipes import STAGES
from minimind.training import arguments
from minimind.training.arguments import parse
from minimind.training.help import StageParser

VALUES = ("-1", "0", "nan", "inf", "1e30", str(10**30), "banana", "")


def options_of(parser):
    """The options of a parser that take a value, each once."""
    return {
        action.dest: action
        for action in reversed(parser._actions)
        if action.default != argparse.SUPPRESS and action.nargs != 0
    }


def commands(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from commands(command)
            return
    yield parser


def stage_options():
    """(stage, option) of all stages; one that stages share stands once."""
    found = {}
    for stage in ("pretrain", "sft", "dpo"):
        for name, action in options_of(StageParser(STAGES[stage][1])).items():
            found.setdefault((name, str(action.default), action.nargs), (stage, name))
    return list(found.values())


@pytest.fixture
def refusal(tmp_path, monkeypatch):
    """The message by which the options of a stage are refused, or None."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arguments, "StageParser", cache(StageParser))  # milliseconds each, a thousand times
    before = dict(os.environ)

    def check(stage, *argv):
        try:
            parse(*STAGES[stage][1], argv=argv)
        except UserError as error:
            return str(error)
        finally:
            os.environ.clear()
            os.environ.update(before)

    return check


@pytest.mark.filterwarnings("ignore")  # the libraries' own about what is accepted
def test_every_value_of_every_option_of_a_stage_is_taken_or_refused_by_name(refusal):
    unnamed = {}
    for stage, name in stage_options():
        for value in VALUES:
            message = refusal(stage, f"--{name}={value}")
            if message is not None and (name not in message or len(message) > 1500):
                unnamed[name, value] = message
    assert unnamed == {}


def test_every_value_of_every_option_of_a_command_is_taken_or_refused_by_name():
    unnamed = {}
    for command in commands(build_parser()):
        words = [word for action in command._actions if not action.option_strings for word in ["x"]]
        for action in command._actions:
            if action.required and action.option_strings:
                words += [f"--{action.dest}", (action.choices or ["x"])[0]]
        for name, action in options_of(command).items():
            if not action.option_strings:
                continue
            for value in VALUES:
                try:
                    check_options(command._actions, command.parse_args([*words, f"--{name}={value}"]), command.prog)
                except UserError as error:
                    if name not in str(error):
                        unnamed[command.prog, name, value] = str(error)
    assert unnamed == {}


def test_every_number_among_the_options_has_bounds():
    parsers = [*commands(build_parser()), *(StageParser(types) for _, types in STAGES.values())]
    numbers = {
        name for parser in parsers for name, action in options_of(parser).items() if action.type in (int, float)
    }
    assert numbers - set(BOUNDS) == set()
