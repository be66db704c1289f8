"""What a system call that failed means: for one file, or for the whole pass."""

import os

from ln_images import rules
from ln_images.model import Verdict
from ln_images.store import NOT_RESPONDING, Store


def judge_system_error(error: OSError, store: Store) -> Verdict:
    """Return the verdict on one file with which a system call failed.

    Raises TemporaryError if the whole file system does not respond any more.
    """
    if error.errno in NOT_RESPONDING:
        store.refuse_dead_file_system()
    return rules.judge_error(error, is_root=os.geteuid() == 0)
