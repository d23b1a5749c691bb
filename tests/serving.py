"""A server in this process, for the tests of `minimind serve` and `minimind web`."""

import threading
from contextlib import contextmanager

from minimind.serving.server import listen, make_server


@contextmanager
def serving(app):
    """Serve an application on a free port; yields the address."""
    with listen("127.0.0.1", 0) as listening:
        server = make_server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
