"""What gunicorn serves: Nova's and placement's own WSGI applications.

Nova's would parse gunicorn's options as its own, so they are removed.
"""

import importlib
import sys
from typing import Any


def application(module: str) -> Any:
    """Return the application of a module, unchanged."""
    sys.argv = sys.argv[:1]
    return importlib.import_module(module).application
