"""A real NFS server on loopback, and clients of any uid, as docs/install.md sets them up."""

import ctypes
import ctypes.util
import os
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

START_SECONDS = 60.0
SERVER = "ganesha.nfsd"
CONFIGURATION = """
NFS_CORE_PARAM {{
    Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1; Enable_RQUOTA = false;
}}
NFSV4 {{
    Graceless = true; RecoveryBackend = fs; RecoveryRoot = {directory}; Only_Numeric_Owners = true;
}}
LOG {{ Default_Log_Level = EVENT; }}
"""
EXPORT = """
EXPORT {{
    Export_Id = {number}; Path = {path}; Pseudo = /{name};
    Protocols = 4; Transports = TCP; SecType = sys;
    {options}
    FSAL {{ Name = VFS; }}
}}
"""


class _Url(ctypes.Structure):
    """libnfs's ``struct nfs_url``."""

    _fields_ = (("server", ctypes.c_char_p), ("path", ctypes.c_char_p), ("file", ctypes.c_char_p))


class Nfs:
    """A server that exports one directory under several names. It ends with the ``with`` block.

    ``exports`` has the options of each export, as ganesha writes them, by the export's name.
    """

    def __init__(self, directory: Path, path: Path, exports: Mapping[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        configuration, self._log = directory / "ganesha.conf", directory / "ganesha.log"
        text = CONFIGURATION.format(port=self._port, directory=directory)
        for number, (name, options) in enumerate(exports.items(), 1):
            text += EXPORT.format(number=number, path=path, name=name, options=options)
        configuration.write_text(text)
        self._process = subprocess.Popen(
            [SERVER, "-F", "-f", configuration, "-L", self._log, "-p", directory / "ganesha.pid"]
        )

    def __enter__(self) -> Self:
        """Wait until the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while not self._is_up():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"the NFS server did not start; see {self._log}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _is_up(self) -> bool:
        return self._log.exists() and "NFS SERVER INITIALIZED" in self._log.read_text()

    def read(self, export: str, name: str, uid: int) -> bytes | None:
        """Return a file's content as ``uid`` gets it, or None if it gets nothing."""
        cat = subprocess.run(
            ["nfs-cat", self._url(f"{export}/{name}", uid)], capture_output=True, check=False
        )
        return cat.stdout if cat.returncode == 0 else None

    def may_write(self, export: str, name: str, uid: int) -> bool:
        """Return whether the server answers that ``uid`` may write a file.

        The same right lets it renew the file's times.
        """
        return self._call(export, uid, "access", name, os.W_OK)

    def create(self, export: str, name: str, uid: int) -> bool:
        """Create a file as ``uid``, and return whether the server allowed it."""
        return self._call(export, uid, "creat", name, 0o644, ctypes.byref(ctypes.c_void_p()))

    def touch(self, export: str, name: str, uid: int) -> bool:
        """Set a file's times to the year 2001 as ``uid``, and return whether that was allowed."""
        return self._call(export, uid, "utimes", name, (ctypes.c_long * 4)(10**9, 0, 10**9, 0))

    def _call(self, export: str, uid: int, function: str, name: str, *arguments: object) -> bool:
        """Call libnfs's ``nfs_<function>`` as ``uid``, and return whether it succeeded.

        Each call comes from a client of its own: libnfs caches answers, and the server knows
        clients by their names.
        """
        nfs = ctypes.CDLL(ctypes.util.find_library("nfs"))
        nfs.nfs_init_context.restype = ctypes.c_void_p
        nfs.nfs_parse_url_dir.restype = ctypes.POINTER(_Url)
        context = ctypes.c_void_p(nfs.nfs_init_context())
        try:
            nfs.nfs4_set_client_name(context, f"client {time.monotonic_ns()}".encode())
            url = nfs.nfs_parse_url_dir(context, self._url(export, uid).encode()).contents
            if nfs.nfs_mount(context, url.server, url.path) != 0:
                raise RuntimeError(f"{export} cannot be mounted; see {self._log}")
            result: int = getattr(nfs, f"nfs_{function}")(context, name.encode(), *arguments)
            return result == 0
        finally:
            nfs.nfs_destroy_context(context)

    def _url(self, path: str, uid: int) -> str:
        return f"nfs://127.0.0.1/{path}?version=4&nfsport={self._port}&uid={uid}&gid={uid}"
