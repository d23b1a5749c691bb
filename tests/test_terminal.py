"""The line on which a message of `minimind chat` is typed, in a terminal of our own."""

import os
import pty
import re
import stat
import subprocess
import sys
import termios
import unicodedata

import pytest

LEFT, UP, BACKSPACE, ENTER, CTRL_C, CTRL_D = "\x1b[D", "\x1b[A", "\x7f", "\r", "\x03", "\x04"
CODE = """
import faulthandler, pathlib, sys
faulthandler.dump_traceback_later(120, exit=True)  # should it wait for what is never typed
from minimind.common.terminal import read_messages
for message in read_messages(pathlib.Path(sys.argv[1]) if sys.argv[1:] else None):
    print(f"got {message!r}")
print("the end")
"""


class Terminal:
    """A program in a terminal of 24 x 80, whose screen is drawn from the controls that a line
    editor needs."""

    TOKEN = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|[^\x1b]", re.DOTALL)
    MOVES = {"A": (-1, 0), "B": (1, 0), "C": (0, 1), "D": (0, -1)}  # noqa: RUF012

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        environment = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = [sys.executable, "-c", CODE, *map(str, arguments)]
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        self.program = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
        os.close(slave)
        self.cells, self.row, self.column, self.unread = {}, 0, 0, b""

    def type(self, keys, *shown, column=None):
        """Type, and read until the rows down to the cursor end with `shown`, and its column is
        right."""
        os.write(self.master, keys.encode())
        column = width(shown[-1]) if column is None else column
        while self.column != column or self.rows()[-len(shown) :] != [
            row.rstrip() for row in shown
        ]:
            try:
                output = os.read(self.master, 4096)
            except OSError:  # what Linux says of a terminal whose program has ended
                output = b""
            assert output, f"expected {shown}, found {self.rows()}"
            self.unread += output
            self.draw()

    def rows(self):
        """The text of the rows down to the cursor's."""
        return [
            "".join(self.cells.get((row, at), " ") for at in range(80)).rstrip()
            for row in range(self.row + 1)
        ]

    def draw(self):
        """Draw what was read, except the beginning of a character or a control."""
        text = self.unread.decode(errors="ignore")
        complete = text[: text.rfind("\x1b")] if re.search(r"\x1b(\[[\d;?]*)?$", text) else text
        self.unread = self.unread[len(complete.encode()) :]
        for token in self.TOKEN.finditer(complete):
            character, number, control = token[0], token[1], token[2]
            if control in self.MOVES:
                self.row, self.column = (
                    at + step * int(number or 1)
                    for at, step in zip((self.row, self.column), self.MOVES[control], strict=True)
                )
            elif control in ("J", "K"):
                assert number in ("", "0")
                self.erase(below=control == "J")
            elif not control:
                self.put(character)

    def erase(self, below):
        for row, column in list(self.cells):
            if (row == self.row and column >= self.column) or (below and row > self.row):
                del self.cells[row, column]

    def put(self, character):
        if character == "\n":
            self.row += 1
        elif character == "\r":
            self.column = 0
        elif character == "\b":
            self.column -= 1
        elif character.isprintable():
            self.cells[self.row, self.column] = character
            if width(character) == 2:
                self.cells[self.row, self.column + 1] = ""
            self.column += width(character)


def width(text):
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


@pytest.fixture
def terminal(tmp_path):
    """A function that starts a terminal; its program ends with the test."""
    started = []

    def start(*arguments):
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for each in started:
        each.program.kill()
        each.program.wait()
        os.close(each.master)


def test_backspace_and_arrows_over_chinese_move_by_the_width_of_its_characters(terminal):
    line = terminal()
    line.type("", "> ")
    line.type("你好 a", "> 你好 a")
    line.type(BACKSPACE * 2, "> 你好")
    line.type(BACKSPACE, "> 你")
    line.type(LEFT, "> 你", column=2)
    line.type("我和", "> 我和你", column=6)
    line.type(ENTER, "got '我和你'", "> ")
    line.type(CTRL_D, "the end", "")
    assert line.program.wait() == 0


def test_a_paste_of_several_lines_is_one_message(terminal):
    line = terminal()
    line.type("", "> ")
    line.type("\x1b[200~one\n两行\n\n/new\x1b[201~", "> one", "  两行", "", "  /new")
    line.type(ENTER, "got 'one\\n两行\\n\\n/new'", "> ")


def test_ctrl_c_drops_the_line_and_on_an_empty_one_shows_how_to_end(terminal):
    line = terminal()
    line.type("", "> ")
    line.type("abc", "> abc")
    line.type(CTRL_C, "> abc", "> ")
    line.type(CTRL_C, "> ", "Ctrl-D or /exit ends the chat.", "> ")
    line.type(f"d{ENTER}", "got 'd'", "> ")


def test_the_arrow_reaches_messages_of_an_earlier_chat_which_only_this_user_may_read(
    terminal, tmp_path
):
    history = tmp_path / "cache" / "chat_history"
    line = terminal(history)
    line.type("", "> ")
    line.type("第一\x1b[200~\n行\x1b[201~", "> 第一", "  行")
    line.type(ENTER, "got '第一\\n行'", "> ")
    line.type(CTRL_D, "the end", "")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600

    line = terminal(history)
    line.type("", "> ")
    line.type(UP, "> 第一", "  行")
    line.type(ENTER, "got '第一\\n行'", "> ")


def test_without_a_history_nothing_is_kept(terminal, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    line = terminal()
    line.type("", "> ")
    line.type(f"a{ENTER}", "got 'a'", "> ")
    line.type(UP, "> a")
    line.type(ENTER, "got 'a'", "> ")
    line.type(CTRL_D, "the end", "")
    line.program.wait()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_history_that_cannot_be_written_does_not_end_the_chat(terminal, tmp_path):
    line = terminal(tmp_path)  # a directory
    line.type("", "> ")
    assert "notice: what you type is not remembered" in " ".join(line.rows())
    line.type(f"a{ENTER}", "got 'a'", "> ")
    line.type(CTRL_D, "the end", "")


def test_bytes_of_another_encoding_are_question_marks(terminal, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as with most locales
    done = subprocess.run([sys.executable, "-c", CODE], input=b"a\xff\n", capture_output=True)
    assert done.stdout.decode().splitlines() == ["got 'a?'", "the end"]
    monkeypatch.delenv("PYTHONIOENCODING")
    line = terminal(tmp_path / "history")
    line.type("", "> ")
    os.write(line.master, b"a\xff\r")
    line.type("", "got 'a?'", "> ")
    line.type(UP, "> a?")


def test_a_pipe_is_read_line_by_line():
    done = subprocess.run(
        [sys.executable, "-c", CODE], input="a\n\n /b\r\n你", capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["got 'a'", "got ''", "got ' /b'", "got '你'", "the end"]
