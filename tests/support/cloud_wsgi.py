"""What gunicorn serves: Keystone's and Glance's own WSGI applications, unchanged but for two traps.

Both parse ``sys.argv`` as their own options when imported, so it is emptied first. Glance leaves
the body of a refused upload unread, and gunicorn then cuts the connection under the next request,
so what is left of a body is read to its end after the application has answered.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def keystone() -> Any:
    """Keystone, as it is."""
    return _application("keystone.wsgi.api")


def glance() -> Any:
    """Glance, with every request's body read to its end."""
    application = _application("glance.wsgi.api")

    def drained(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        answer: Iterable[bytes] = application(environ, start_response)
        try:
            yield from answer
        finally:
            if hasattr(answer, "close"):
                answer.close()
            while environ["wsgi.input"].read(1 << 20):
                pass

    return drained


def _application(module: str) -> Any:
    sys.argv = sys.argv[:1]
    return importlib.import_module(module).application
