"""A real NFS server on loopback, and clients of any uid, as the production guide sets them up."""

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
NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1; Enable_RQUOTA = false; }}
NFSV4 {{ Graceless = true; RecoveryBackend = fs; RecoveryRoot = {directory}; Only_Numeric_Owners = true; }}
LOG {{ Default_Log_Level = EVENT; }}
"""
EXPORT = """
EXPORT {{
    Export_Id = {number}; Path = {path}; Pseudo = /{name}; Protocols = 4; Transports = TCP; SecType = sys;
    {options}
    FSAL {{ Name = VFS; }}
}}
"""


class _Url(ctypes.Structure):
    _fields_ = (("server", ctypes.c_char_p), ("path", ctypes.c_char_p), ("file", ctypes.c_char_p))


class Nfs:
    """A server that exports one directory under several names. It ends with the ``with`` block.

    ``exports`` are the options of each export, in ganesha's words, by its name.
    """

    def __init__(self, directory: Path, path: Path, exports: Mapping[str, str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        configuration, self._log = directory / "ganesha.conf", directory / "ganesha.log"
        configuration.write_text(
            CONFIGURATION.format(port=self._port, directory=directory)
            + "".join(
                EXPORT.format(number=number, path=path, name=name, options=options)
                for number, (name, options) in enumerate(exports.items(), 1)
            )
        )
        self._process = subprocess.Popen(
            [SERVER, "-F", "-f", configuration, "-L", self._log, "-p", directory / "ganesha.pid"]
        )

    def __enter__(self) -> Self:
        """Waits until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while "NFS SERVER INITIALIZED" not in (self._log.read_text() if self._log.exists() else ""):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"the NFS server did not start: see {self._log}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def read(self, export: str, name: str, uid: int) -> bytes | None:
        """A file's content as ``uid`` gets it, or None where it gets nothing."""
        cat = subprocess.run(
            ["nfs-cat", self._url(f"{export}/{name}", uid)], capture_output=True, check=False
        )
        return cat.stdout if cat.returncode == 0 else None

    def may(self, export: str, uid: int, what: str, name: str, *arguments: object) -> bool:
        """Whether the server lets ``uid`` do what libnfs's function ``nfs_<what>`` does.

        Each question comes from a client of its own: libnfs remembers, and the server knows clients
        by name.
        """
        nfs = ctypes.CDLL(ctypes.util.find_library("nfs"))
        nfs.nfs_init_context.restype = ctypes.c_void_p
        nfs.nfs_parse_url_dir.restype = ctypes.POINTER(_Url)
        context = ctypes.c_void_p(nfs.nfs_init_context())
        try:
            nfs.nfs4_set_client_name(context, f"client {time.monotonic_ns()}".encode())
            url = nfs.nfs_parse_url_dir(context, self._url(export, uid).encode()).contents
            if nfs.nfs_mount(context, url.server, url.path):
                raise RuntimeError(f"{export} cannot be mounted: see {self._log}")
            result: int = getattr(nfs, f"nfs_{what}")(context, name.encode(), *arguments)
            return result == 0
        finally:
            nfs.nfs_destroy_context(context)

    def may_write(self, export: str, name: str, uid: int) -> bool:
        """Whether the server says that ``uid`` may write a file.

        The same right lets it renew the file's times.
        """
        return self.may(export, uid, "access", name, os.W_OK)

    def may_create(self, export: str, name: str, uid: int) -> bool:
        """Whether ``uid`` may make a file, and if so makes it."""
        return self.may(export, uid, "creat", name, 0o644, ctypes.byref(ctypes.c_void_p()))

    def may_touch(self, export: str, name: str, uid: int) -> bool:
        """Whether ``uid`` may set a file's times, and if so sets them to the year 2001."""
        return self.may(export, uid, "utimes", name, (ctypes.c_long * 4)(10**9, 0, 10**9, 0))

    def _url(self, path: str, uid: int) -> str:
        return f"nfs://127.0.0.1/{path}?version=4&nfsport={self._port}&uid={uid}&gid={uid}"
