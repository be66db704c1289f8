"""What gunicorn serves: Keystone's and Glance's own WSGI applications, with two changes.

Both parse ``sys.argv`` as their own options when they are imported, so it is emptied first. Glance
does not read the body of a refused upload, and gunicorn then closes the connection during the next
request. So we read the rest of each body after the application has answered.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def keystone() -> Any:
    """Return Keystone, unchanged."""
    return _application("keystone.wsgi.api")


def glance() -> Any:
    """Return Glance, which then reads the body of every request to its end."""
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
