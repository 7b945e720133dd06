"""Make `.venv` from requirements.txt when it is missing or stale; `make` calls this before everything else.

Needs nothing but Python. Several at once wait for the first. What is installed is exactly what
requirements.txt locks, by hash, and the checkout itself.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
OLDEST = (3, 11)


def made_from():
    """What the environment depends on: the lock file, the project's own metadata, and where it lies.

    Not on this Python: one that was made with another is good for every command. `make clean` begins anew.
    """
    digest = hashlib.sha256(str(ROOT).encode())
    for name in ("requirements.txt", "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def works():
    """Whether the environment that is there can still start its Python."""
    try:
        return subprocess.run([VENV / "bin" / "python", "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def make():
    print("Making .venv from requirements.txt; this takes a minute or so.", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    pip = [
        VENV / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    subprocess.run([*pip, "--require-hashes", "-r", ROOT / "requirements.txt"], check=True, cwd=ROOT)
    subprocess.run([*pip, "--no-build-isolation", "--editable", ROOT], check=True, cwd=ROOT)


def main():
    if sys.version_info < OLDEST:
        return "lifelogger needs Python {}.{} or newer; name one: make PYTHON=python3.12".format(*OLDEST)
    with open(ROOT / ".venv.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp, wanted = VENV / "made-from", made_from()
        if stamp.exists() and stamp.read_text() == wanted and works():
            return 0
        try:
            make()
        except subprocess.CalledProcessError as error:
            shutil.rmtree(VENV, ignore_errors=True)
            command = " ".join(str(word) for word in error.cmd[:6])
            hint = " (on Debian: apt install python3-venv)" if "venv" in error.cmd else ""
            return f"{command} … failed with status {error.returncode}{hint}: see above"
        draft = stamp.with_name(f"{stamp.name}.{os.getpid()}")
        draft.write_text(wanted)
        draft.rename(stamp)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
