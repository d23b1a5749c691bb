"""Commands in forks of one process that has loaded the libraries, which takes seconds; each has its
caller's directory, environment and streams. As a script: calls one."""

import json
import os
import signal
import socket
import sys


def call(path, words):
    """Have a command run by the process that serves at a path; returns its exit status."""
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
    """Run the command in a fork of this process, send its exit status back, and end."""
    from minimind.common.forking import run_forked

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().read())
    status = run_forked(become, run, streams, *request)
    connection.sendall(str(status).encode())
    os._exit(0)


def become(run, streams, words, directory, environment):
    """Run the command with its caller's streams, directory and environment."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = map(open, range(3), "rww")
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    run(words)


if __name__ == "__main__":
    sys.exit(call(sys.argv[1], sys.argv[2:]))
