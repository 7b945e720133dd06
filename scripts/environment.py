"""Make `.venv` from requirements.txt when it is missing or stale; `make` calls this before everything else.

With `benchmarks` as its argument it makes `benchmarks/.venv`, which has what the benchmarks need besides.

Needs nothing but Python. Several at once wait for the first. What is installed is exactly what the
requirements.txt files lock, by hash, and the checkout itself.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = (3, 11)


class Environment:
    """A virtual environment in `folder`, made of lock files of which a later one adds to those before."""

    def __init__(self, folder, locks):
        self.folder, self.locks = ROOT / folder, locks
        self.stamp = self.folder / "made-from"

    def made_from(self):
        """What it depends on: the lock files, the project's own metadata, and where it lies.

        Not on this Python: one made with another is good for every command. `make clean` begins anew.
        """
        digest = hashlib.sha256(str(ROOT).encode())
        for name in (*self.locks, "pyproject.toml"):
            digest.update((ROOT / name).read_bytes())
        return digest.hexdigest()

    def works(self):
        """Whether what is there can still start its Python."""
        try:
            return subprocess.run([self.folder / "bin" / "python", "-c", ""], check=False).returncode == 0
        except OSError:
            return False

    def fresh(self, wanted):
        return self.stamp.exists() and self.stamp.read_text() == wanted and self.works()

    def make(self):
        name = self.folder.relative_to(ROOT)
        print(f"Making {name} from {' and '.join(self.locks)}; this takes a minute or so.", flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        pip = [
            self.folder / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        for lock in self.locks:
            subprocess.run([*pip, "--require-hashes", "-r", ROOT / lock], check=True, cwd=ROOT)
        subprocess.run([*pip, "--no-build-isolation", "--editable", ROOT], check=True, cwd=ROOT)


ENVIRONMENTS = {
    "": Environment(".venv", ["requirements.txt"]),
    "benchmarks": Environment("benchmarks/.venv", ["requirements.txt", "benchmarks/requirements.txt"]),
}


def main(which=""):
    if sys.version_info < OLDEST:
        return "lifelogger needs Python {}.{} or newer; name one: make PYTHON=python3.12".format(*OLDEST)
    environment = ENVIRONMENTS[which]
    with open(f"{environment.folder}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = environment.made_from()
        if environment.fresh(wanted):
            return 0
        try:
            environment.make()
        except subprocess.CalledProcessError as error:
            shutil.rmtree(environment.folder, ignore_errors=True)
            command = " ".join(str(word) for word in error.cmd[:6])
            hint = " (on Debian: apt install python3-venv)" if "venv" in error.cmd else ""
            return f"{command} … failed with status {error.returncode}{hint}: see above"
        draft = environment.stamp.with_name(f"{environment.stamp.name}.{os.getpid()}")
        draft.write_text(wanted)
        draft.rename(environment.stamp)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
