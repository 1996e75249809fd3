"""The recipes of the container images, read into steps, and a root file system in which steps are run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = "/etc/certificates-of-here.crt"  # inside: those that this machine trusts


@dataclass
class Stage:
    """A stage of an image. base: what it starts from. steps: (what, words) in order."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def packages(self) -> set[str]:
        """The packages of the distribution that the stage installs itself."""
        text = ";".join(words for what, words in self.steps if what == "RUN")
        found = re.search(r"apt-get install -y --no-install-recommends(.*?)(?:&&|;|$)", text)
        return set(found[1].split()) if found else set()

    def commands(self, pattern: str) -> list[str]:
        """Single commands of the stage that match."""
        text = ";".join(words for what, words in self.steps if what == "RUN")
        return [part.strip() for part in re.split(r"&&|;", text) if re.search(pattern, part)]


def dockerfile(text: str) -> list[Stage]:
    """The stages of a Dockerfile."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found: list[Stage] = []
    for line in joined.splitlines():
        what, _, words = line.partition(" ")
        if what == "FROM":
            base, _, name = words.partition(" AS ")
            found.append(Stage(base, name))
        elif found:
            found[-1].steps.append((what, " ".join(words.split())))
    return found


def definition(text: str) -> list[Stage]:
    """The stages of an Apptainer definition; %post becomes RUN, %files COPY, %environment ENV."""
    found: list[Stage] = []
    section = ""
    for line in text.replace("\\\n", " ").splitlines():
        words = " ".join(line.split())
        header = re.match(r"(Bootstrap|From|Stage): (.*)", words)
        if not words or words.startswith("#"):
            continue
        if header is not None:
            section = ""
            if header[1] == "Bootstrap":
                found.append(Stage("", ""))
            elif header[1] == "From":
                found[-1].base = header[2]
            else:
                found[-1].name = header[2]
        elif words.startswith("%"):
            section = words
        elif section == "%post":
            found[-1].steps.append(("RUN", words))
        elif section.startswith("%files"):
            origin = section.removeprefix("%files").replace(" from ", "--from=")
            found[-1].steps.append(("COPY", f"{origin} {words}".strip()))
        elif section == "%environment":
            found[-1].steps.append(("ENV", words.removeprefix("export ")))
    return found


@dataclass
class Machine:
    """A root file system in which commands run. user, cwd, variables: as the steps so far have set them."""

    folder: Path
    user: str = "root"
    cwd: str = "/"
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> str:
        """The user's own folder."""
        return f"/home/{self.user}" if self.user != "root" else "/root"

    def call(self, command: str, *, seconds: float = 3000) -> str:
        """Runs a shell command inside; returns what it printed on both outputs."""
        environment = {"PATH": PATH, "HOME": self.home, **pip_of_here(), **self.variables}
        inside = f"cd {shlex.quote(self.cwd)} && {command}"
        done = subprocess.run(
            ["chroot", f"--userspec={self.user}", str(self.folder), "/bin/sh", "-c", inside],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
        return done.stdout

    def run(self, stage: Stage, images: Mapping[str, Path]) -> None:
        """Takes the steps of a stage. images: earlier stages' folders, by name."""
        for what, words in stage.steps:
            if what == "RUN":
                self.call(words)
            elif what == "COPY":
                self._copy(words.split(), images)
            elif what == "ENV":
                self._set(words)
            elif what == "USER":
                self.user = words
            elif what == "WORKDIR":
                self.cwd = words
                self.call_as_root(f"mkdir -p {words}")

    def call_as_root(self, command: str) -> None:
        Machine(self.folder).call(command)

    def _set(self, words: str) -> None:
        for one in shlex.split(words):
            name, _, value = one.partition("=")
            path = self.variables.get("PATH", PATH)
            self.variables[name] = value.replace("${PATH}", path)

    def _copy(self, words: list[str], images: Mapping[str, Path]) -> None:
        options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
        *sources, target = [word for word in words if not word.startswith("--")]
        origin = images[options["from"]] if "from" in options else None
        goal = self.folder / (target if target.startswith("/") else f"{self.cwd}/{target}").lstrip("/")
        for source in sources:
            if origin is not None:
                goal.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-a", "-T", str(origin / source.lstrip("/")), str(goal)], check=True)
            else:
                _copy_from_checkout(source, goal, many=len(sources) > 1)
        if "chown" in options:
            self.call_as_root(f"chown -R {options['chown']} {target}")


def _copy_from_checkout(source: str, goal: Path, *, many: bool) -> None:
    """What git knows of the source, which is what a clean checkout holds."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", source]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines():
        inside = name if source == "." else str(Path(name).relative_to(source)) if name != source else ""
        position = goal / inside if inside else goal / name if many or goal.is_dir() else goal
        position.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, position)


def pip_of_here() -> dict[str, str]:
    """How pip is set up on this machine, for the inside."""
    found = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    return {**found, "PIP_CERT": CERTIFICATES}


def _local_sources() -> list[Path]:
    """Files and folders of this machine that its pip is set up with, but for certificates."""
    listed = subprocess.check_output(["python3", "-m", "pip", "config", "list"], text=True).splitlines()
    values = [line.partition("=")[2].strip("'\"") for line in listed if not line.partition("=")[0].endswith(".cert")]
    found = [Path(word.removeprefix("file://")) for value in values for word in value.split()]
    shown = subprocess.run(["python3", "-m", "pip", "config", "debug"], capture_output=True, text=True, check=False)
    found += [Path(path) for path in re.findall(r"(/\S+), exists: True", shown.stdout)]
    return sorted({_top(path) for path in found if path.is_absolute() and path.exists()})


def _top(path: Path) -> Path:
    """The index itself, whose files may be beside its pages."""
    return path.parent if path.name == "simple" else path


def mirror_of_here() -> tuple[str, str]:
    """(address, release) of the distribution's packages as apt is set up on this machine."""
    lines = subprocess.check_output(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"], text=True
    ).splitlines()
    release = re.search(r"VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text())
    assert release is not None and lines
    return next(line.split()[0] for line in lines if line.endswith(f" {release[1]}")), release[1]


def init_distributed(folder: Path) -> None:
    """A root with the distribution's smallest set of packages, and what this machine's apt reads."""
    address, release = mirror_of_here()
    subprocess.run(["debootstrap", "--variant=minbase", release, str(folder), address], check=True, capture_output=True)
    for path in ("/etc/resolv.conf", "/etc/hosts"):
        shutil.copy(path, folder / path.lstrip("/"))
    for path in (
        "/etc/apt/apt.conf.d",
        "/etc/apt/sources.list.d",
        "/etc/ssl/certs",
        "/usr/local/share/ca-certificates",
    ):
        if Path(path).is_dir():
            shutil.copytree(path, folder / path.lstrip("/"), dirs_exist_ok=True)
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", folder / CERTIFICATES.lstrip("/"))


@contextmanager
def layered(base: Path, folder: Path) -> Iterator[Path]:
    """A root that starts as another one and keeps its changes to itself, with the kernel's file systems mounted."""
    upper, work, root = (folder / name for name in ("upper", "work", "root"))
    for each in (upper, work, root):
        each.mkdir(parents=True)
    with ExitStack() as mounts:
        layers = f"lowerdir={base},upperdir={upper},workdir={work}"
        _mount(mounts, root, "-t", "overlay", "overlay", "-o", layers)
        _mount(mounts, root / "proc", "-t", "proc", "proc")
        _mount(mounts, root / "dev", "--rbind", "/dev")
        for source in _local_sources():
            position = root / str(source).lstrip("/")
            if source.is_dir():
                position.mkdir(parents=True, exist_ok=True)
            else:
                position.parent.mkdir(parents=True, exist_ok=True)
                position.touch()
            _mount(mounts, position, "--bind", str(source))
        yield root


def _mount(mounts: ExitStack, position: Path, *words: str) -> None:
    subprocess.run(["mount", *words, str(position)], check=True, capture_output=True)
    if "--rbind" in words:
        subprocess.run(["mount", "--make-rslave", str(position)], check=True)
    mounts.callback(
        subprocess.run, ["umount", "--recursive", "--lazy", str(position)], check=False, capture_output=True
    )
