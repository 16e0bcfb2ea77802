"""Checks that what the chart and the documents tell people and containers to run exists in the programs.

Usage: chart_flags.py DIRECTORY_OF_PROGRAMS RENDERED.yaml... [-- DOCUMENT.md...]

- Every subcommand and flag, in containers' arguments, in the chart's scripts, and in the documents' examples, is
  known to the program (its --help, and that of its subcommands).
- Every flag of a sidecar is in its source, at the version that the chart pins.
- Every program that a container names is one of ours and in the Dockerfile; every script is in the ConfigMap.
- Every absolute path among a container's arguments and variables lies under one of its mounts.

What charts/ashlar/ci/pending.txt lists is announced and not there yet: it is reported as skipped.
"""

import functools
import pathlib
import re
import shlex
import subprocess
import sys

import yaml

import chart_sidecars

PROGRAMS = ["ashlar", "csi-driver", "metadata-raft", "nbd-client", "storage-daemon"]
CHART = pathlib.Path("charts/ashlar")
# Programs of the base image.
BASE = {"/bin/sh", "/bin/chown"}
OWN_PATHS = ("/dev/termination-log",)

problems = []
skipped = set()
checked = set()
pending = [
    line.split("#")[0].split()
    for line in (CHART / "ci/pending.txt").read_text().splitlines()
    if line.split("#")[0].strip()
] if (CHART / "ci/pending.txt").exists() else []


def is_pending(program, what):
    return any(p in (program, "*") and w in (what, "*") for p, w in pending)


class Missing(Exception):
    pass


@functools.lru_cache(maxsize=None)
def help_of(path):
    """Flags (with whether they take a value) and subcommands of a program or subcommand."""
    binary = DIRECTORY / path[0]
    if not binary.exists():
        raise Missing(path[0])
    text = subprocess.run(
        [str(binary), *path[1:], "--help"], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    flags = {"--help": False}
    for match in re.finditer(r"^ +(?:-\w, )?(--[a-z0-9-]+)( <| \[|=)?", text, re.MULTILINE):
        flags[match.group(1)] = match.group(2) is not None
    for match in re.finditer(r"^ +-(\w), --([a-z0-9-]+)( <)?", text, re.MULTILINE):
        flags["-" + match.group(1)] = match.group(3) is not None
    section = re.search(r"^Commands:\n((?: .*\n|\n)*)", text, re.MULTILINE)
    commands = set(re.findall(r"^  ([a-z][a-z0-9-]*)", section.group(1), re.MULTILINE)) if section else set()
    return flags, commands - {"help"}


def check(where, words):
    """Checks one command line."""
    try:
        walk(where, words)
    except Missing as missing:
        program = str(missing)
        if is_pending(program, "*"):
            skipped.add(f"{program} is not built: its arguments were not checked")
        else:
            problems.append(f"{where}: the program {program} is not in {DIRECTORY}")


def walk(where, words):
    program, path, rest = words[0], (words[0],), list(words[1:])
    flags, commands = help_of(path)
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and word != "-":
            flag, _, value = word.partition("=")
            if flag not in flags:
                report(where, program, path, flag)
            elif flags[flag] and not value and "=" not in word and rest:
                rest.pop(0)
        elif word in commands:
            path += (word,)
            flags, commands = help_of(path)
            # Before and after a subcommand: options of the whole program are repeated by its help, or are not.
            checked.add(" ".join(path))
        elif commands and not word.isupper():
            report(where, program, path, word)
            return
    checked.add(" ".join(path))


def report(where, program, path, what):
    if is_pending(program, what):
        skipped.add(f"{' '.join(path)} {what} is not there yet: not checked")
    else:
        problems.append(f"{where}: `{' '.join(path)}` does not know {what}")


def commands_in(text):
    """Command lines of our programs in a shell script, each as words, in the order of the text."""
    text = re.sub(r"\\\n", " ", text)
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("#") or line.startswith("echo ") or "refuse \"" in line and "ashlar" not in line.split("refuse")[0]:
            continue
        line = line.split(" || refuse")[0]
        for match in re.finditer(r"(?:^|\$\(|exec |until |if |! |=|then |do )(" + "|".join(PROGRAMS) + r") ([^|&;<>)]*)", line):
            words = re.sub(r"\s2$", "", match.group(2).rstrip())
            # A variable is a value, whatever it holds; "$@" stays, for the caller.
            words = re.sub(r"\$\{?[A-Za-z_]\w*(:-[^}]*)?\}?", "VALUE", words)
            yield [match.group(1), *shlex.split(words)]
    for match in re.finditer(r'set -- ((?:"?\$@"? )?--.*)', text):
        words = re.sub(r"\$\{?[A-Za-z_]\w*\}?", "VALUE", match.group(1))
        yield ["set", *shlex.split(words)]


@functools.lru_cache(maxsize=None)
def script(name):
    """Command lines of a script, and the one that gets the script's own arguments."""
    lines = list(commands_in((CHART / "scripts" / name).read_text()))
    receiver = next((line for line in lines if line[0] != "set" and "$@" in line), None)
    for line in lines:
        words = [w for w in line if w != "$@"]
        if line[0] == "set":
            words = [w for w in receiver if w != "$@"] + words[1:]
        check(f"scripts/{name}", words)
    return receiver


def containers(documents):
    for document in documents:
        template = (document.get("spec") or {}).get("template") or {}
        spec = template.get("spec") or {}
        for container in spec.get("initContainers", []) + spec.get("containers", []):
            yield document, container


def check_sidecar(where, container):
    name, _, tag = container["image"].rpartition("/")[2].partition(":")
    known = chart_sidecars.flags(name, tag)
    for argument in container.get("args", []):
        flag = argument.lstrip("-").partition("=")[0]
        if flag not in known:
            problems.append(f"{where}: {name} {tag} does not know --{flag}")


def check_container(where, container, scripts):
    command = container.get("command")
    if not command:
        check_sidecar(where, container)
        return
    arguments = [str(a) for a in container.get("args", [])]
    known = BASE | {f"/usr/local/bin/{p}" for p in PROGRAMS}
    if command[0] not in known:
        problems.append(f"{where}: runs {command[0]}, which the image does not have")
        return
    program = pathlib.PurePath(command[0]).name
    if program in PROGRAMS:
        check(where, [program, *command[1:], *arguments])
    if program == "sh":
        name = pathlib.PurePath(command[1]).name
        if name not in scripts:
            problems.append(f"{where}: runs {command[1]}, which is not in the ConfigMap")
            return
        receiver = script(name)
        if arguments:
            if receiver is None:
                problems.append(f"{where}: has arguments, but {name} passes none on")
            else:
                check(where, [w for w in receiver if w != "$@"] + arguments)
    mounts = [m["mountPath"] for m in container.get("volumeMounts", [])]
    texts = arguments + command[1:] + [str(e.get("value", "")) for e in container.get("env", [])]
    for text in texts:
        for path in re.findall(r"(?:^|[= ]|unix://)(/[^ *?\[]*)", text):
            inside = any(path == m or path.startswith(m + "/") for m in mounts)
            if not inside and not path.startswith(OWN_PATHS):
                problems.append(f"{where}: {path} is under no mount of the container")


def check_document(path):
    if not pathlib.Path(path).exists():
        skipped.add(f"{path} is not there yet: its examples were not checked")
        return
    text = pathlib.Path(path).read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for block in blocks:
        for line in re.sub(r"\\\n", " ", block).splitlines():
            line = re.sub(r"^\s*kubectl .* exec .* -- ", "", line).split(" #")[0].strip()
            words = shlex.split(re.split(r" [|>&]", line)[0], comments=True)
            if words and words[0] in PROGRAMS:
                check(path, words)
    for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        words = span.split()
        if len(words) > 1 and words[0] in PROGRAMS:
            check(path, [re.sub(r"[\[\]]", "", w) for w in words if w not in ("...", "|")])


def check_dockerfile():
    if not pathlib.Path("Dockerfile").exists():
        skipped.add("what is in the image: there is no Dockerfile yet")
        return
    text = pathlib.Path("Dockerfile").read_text()
    for program in PROGRAMS:
        if program not in text:
            problems.append(f"Dockerfile: {program} is not in the image")


def main():
    global DIRECTORY
    DIRECTORY = pathlib.Path(sys.argv[1])
    arguments, documents = sys.argv[2:], []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, documents = arguments[:at], arguments[at + 1:]
    count = 0
    for file in arguments:
        loaded = [d for d in yaml.safe_load_all(pathlib.Path(file).read_text()) if d]
        scripts = next(d["data"] for d in loaded if d["kind"] == "ConfigMap" and d["metadata"]["name"].endswith("-scripts"))
        for document, container in containers(loaded):
            count += 1
            where = f"{document['kind']} {document['metadata']['name']}, container {container['name']}"
            check_container(where, container, set(scripts))
    for document in documents:
        check_document(document)
    check_dockerfile()
    for line in sorted(skipped):
        print(f"SKIPPED {line}")
    for line in sorted(set(problems)):
        print(f"WRONG {line}")
    print(f"{count} containers, {len(checked)} different commands checked: {len(set(problems))} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
