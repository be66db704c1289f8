"""What gunicorn serves: Nova's and placement's own WSGI applications.

Nova's takes gunicorn's options for its own.
"""

import importlib
import sys
from typing import Any


def application(module: str) -> Any:
    """The application of a module, as it is."""
    sys.argv = sys.argv[:1]
    return importlib.import_module(module).application
