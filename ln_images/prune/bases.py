"""Mark, retire, restore and remove bases: the only code that renames or removes in the cache.

Each action checks again that the file is the one that was judged. No action ever replaces a file.
"""

import contextlib
import ctypes
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
    is_rename = decision.action in (Action.RESTORE, Action.RETIRE)
    try:
        with open_regular(stored_name(base), store.cache) as descriptor:
            if store.describe_open_file(descriptor) != base.file:
                return _changed()
            if is_rename and store.is_downloading(base.name):
                # Nova ends a download by a rename to the base's name, whatever has that name then.
                return Verdict(Outcome.KEPT, Reason.NOVA_IS_DOWNLOADING, "Nova is downloading it")
            _act(store, base, descriptor, decision.action, now)
    except (FileNotFoundError, NotRegularError):
        return _changed()
    except FileExistsError:
        return _name_taken(base)
    return decision.verdict


def stored_name(base: Base) -> str:
    """Return the name that a base has in the cache now."""
    return base.name + RETIRED_SUFFIX if base.retired else base.name


def other_name(base: Base) -> str:
    """Return the one of a base's two names that it does not have now."""
    return base.name if base.retired else base.name + RETIRED_SUFFIX


def _act(store: Store, base: Base, descriptor: int, action: Action | None, now: float) -> None:
    if action is Action.SET_MARK:
        _set_mark(descriptor, now)
    elif action is Action.REMOVE_MARK:
        os.removexattr(descriptor, UNUSED_SINCE_MARK)
    elif action is Action.RETIRE:
        # In the other order, a crash in between would leave a retired base with its old mark, and
        # the next pass would remove it.
        _set_mark(descriptor, now)
        _rename(store.cache, stored_name(base), other_name(base))
    elif action is Action.RESTORE:
        _rename(store.cache, stored_name(base), other_name(base))
        # The base may have no mark. If the mark cannot be removed, the next pass tries again.
        with contextlib.suppress(OSError):
            os.removexattr(descriptor, UNUSED_SINCE_MARK)
    elif action is Action.REMOVE:
        os.unlink(stored_name(base), dir_fd=store.cache)


def _changed() -> Verdict:
    return Verdict(
        Outcome.KEPT,
        Reason.CHANGED_MEANWHILE,
        "it has changed since the scan; the next pass judges it again",
    )


def _name_taken(base: Base) -> Verdict:
    # A base that is not retired does no harm. A server misses one that is not restored.
    outcome = Outcome.FAILED if base.retired else Outcome.KEPT
    return Verdict(
        outcome,
        Reason.NAME_TAKEN,
        f"another file has the name {other_name(base)}; follow docs/recovery.md",
    )


def _set_mark(descriptor: int, now: float) -> None:
    os.setxattr(descriptor, UNUSED_SINCE_MARK, f"{now:.6f}".encode())


def _rename(directory: int, old: str, new: str) -> None:
    """Rename in the cache. Raises OSError; FileExistsError if another file has the new name."""
    # Python's own rename replaces the file that has the new name.
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.renameat2(directory, old.encode(), directory, new.encode(), _RENAME_NOREPLACE)
    if result == 0:
        return
    error_number = ctypes.get_errno()
    if error_number in (errno.EINVAL, errno.ENOSYS):
        # NFS and CephFS have no RENAME_NOREPLACE. There we link and unlink.
        with contextlib.suppress(FileExistsError):
            os.link(old, new, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
    elif error_number != errno.EEXIST:
        raise OSError(error_number, os.strerror(error_number))
    # Both names exist now. If they are of one inode, we have just linked it, or an earlier run
    # ended between the link and the unlink. Then only the unlink is left to do.
    old_status = os.stat(old, dir_fd=directory, follow_symlinks=False)
    new_status = os.stat(new, dir_fd=directory, follow_symlinks=False)
    if not os.path.samestat(old_status, new_status):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.unlink(old, dir_fd=directory)
