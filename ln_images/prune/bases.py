"""Mark, retire, restore and remove bases: the only code that renames or removes in the cache.

Each action checks again that the file is the one that was judged. No action ever replaces a file.
"""

import contextlib
import errno
import os

from ln_images.model import Base, Outcome, Reason, Verdict
from ln_images.prune.rules import Action, Decision
from ln_images.scan import RETIRED_SUFFIX
from ln_images.store import UNUSED_SINCE_MARK, NotRegularError, Store, open_regular

_RENAME_NOREPLACE = 1  # linux/fs.h


def carry_out(store: Store, base: Base, decision: Decision, now: float) -> Verdict:
    """Do what was decided about a base, and return the verdict that is true afterwards.

    The caller holds the lock. ``now``, in seconds since the epoch, becomes the mark of a base that
    is marked or retired. Raises OSError.
    """
    try:
        with open_regular(stored_name(base), store.cache) as descriptor:
            if store.open_file(descriptor) != base.file:
                return _changed()
            return _carry_out(store, base, descriptor, decision, now)
    except (FileNotFoundError, NotRegularError):
        return _changed()


def stored_name(base: Base) -> str:
    """Return the name that a base has in the cache now."""
    return base.name + RETIRED_SUFFIX if base.retired else base.name


def other_name(base: Base) -> str:
    """Return the one of a base's two names that it does not have now."""
    return base.name if base.retired else base.name + RETIRED_SUFFIX


def _carry_out(
    store: Store, base: Base, descriptor: int, decision: Decision, now: float
) -> Verdict:
    action = decision.action
    renames = action in (Action.RESTORE, Action.RETIRE)
    if renames and store.is_downloading(base.name):
        # The download would replace what has the name.
        return Verdict(Outcome.KEPT, Reason.NOVA_IS_DOWNLOADING, "Nova is downloading it")
    if action is Action.SET_MARK:
        _set_mark(descriptor, now)
    elif action is Action.REMOVE_MARK:
        os.removexattr(descriptor, UNUSED_SINCE_MARK)
    elif action is Action.REMOVE:
        os.unlink(stored_name(base), dir_fd=store.cache)
    elif action is Action.RETIRE:
        # In the other order, a crash in between would leave a retired base with its old mark, and
        # the next pass would remove it.
        _set_mark(descriptor, now)
        return _rename(store, base, decision.verdict)
    elif action is Action.RESTORE:
        verdict = _rename(store, base, decision.verdict)
        if verdict is decision.verdict:
            # Without a mark, or if that fails, the next pass removes it.
            with contextlib.suppress(OSError):
                os.removexattr(descriptor, UNUSED_SINCE_MARK)
        return verdict
    return decision.verdict


def _changed() -> Verdict:
    return Verdict(Outcome.KEPT, Reason.CHANGED_MEANWHILE, "it has changed since it was looked at")


def _set_mark(descriptor: int, now: float) -> None:
    os.setxattr(descriptor, UNUSED_SINCE_MARK, f"{now:.6f}".encode())


def _rename(store: Store, base: Base, verdict: Verdict) -> Verdict:
    """Give a base its other name. Return ``verdict``, or why another file has that name."""
    old, new = stored_name(base), other_name(base)
    try:
        _rename_without_replacing(store.cache, old, new)
    except FileExistsError:
        outcome = Outcome.FAILED if base.retired else Outcome.KEPT
        return Verdict(
            outcome,
            Reason.NAME_TAKEN,
            f"another file has the name {new}; follow docs/recovery.md",
        )
    return verdict


def _rename_without_replacing(directory: int, old: str, new: str) -> None:
    """Rename in the cache. Raises FileExistsError if the new name is another file's.

    NFS and CephFS have no rename that replaces nothing (EINVAL). There we link and unlink. A crash
    between the two leaves both names to one inode, and the next pass ends that.
    """
    # Python's own rename replaces what has the new name.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.renameat2(directory, old.encode(), directory, new.encode(), _RENAME_NOREPLACE)
    if result == 0:
        return
    number = ctypes.get_errno()
    if number not in (errno.EINVAL, errno.ENOSYS, errno.EEXIST):
        raise OSError(number, os.strerror(number))
    try:
        os.link(old, new, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    except FileExistsError:
        statuses = [os.stat(name, dir_fd=directory, follow_symlinks=False) for name in (old, new)]
        if not os.path.samestat(*statuses):
            raise
    os.unlink(old, dir_fd=directory)
