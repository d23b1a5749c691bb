"""Commands in forks of one process that has imported the libraries, which takes seconds; each has
its caller's directory, environment, and streams."""

import atexit
import json
import os
import signal
import socket
import sys
import traceback


def call(path, words):
    """Run a command in a fork of the process that serves at a path; returns its exit status."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"3"], [0, 1, 2])
        server.sendall(json.dumps([words, os.environ["PWD"], dict(os.environ)]).encode())
        server.shutdown(socket.SHUT_WR)
        return int(server.recv(16))


def serve(path, run):
    """Call `run(words)` in a fork for each command that is called, until this process is ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(16)
    while True:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            answer(connection, run)
        connection.close()


def answer(connection, run):
    """Fork the command and send its exit status back; does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    words, directory, environment = json.loads(connection.makefile().read())
    child = os.fork()
    if child == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = map(open, range(3), "rww")
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)
        os._exit(status_of(run, words))
    for stream in streams:  # so that a reader sees the end of the child's output
        os.close(stream)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(str(status).encode())
    os._exit(0)


def status_of(run, words):
    """The exit status that Python has after `run(words)`."""
    status = 1
    try:
        run(words)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    sys.exit(call(sys.argv[1], sys.argv[2:]))
