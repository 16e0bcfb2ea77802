"""Checks what rendered templates run against the programs: every path, subcommand, flag and variable must exist.

Usage: flags.py BINARIES RENDERED.yaml...

Ashlar's programs are asked for their help, subcommand by subcommand. The sidecars' flags are read from their Go
modules at the version that the chart pins. Shell scripts of the chart are looked through for calls of Ashlar's programs.
"""

import functools
import json
import os
import re
import subprocess
import sys
import zipfile

import yaml

PROGRAMS = ("metadata-raft", "storage-daemon", "nbd-client", "csi-driver", "ashlar")
INSTALLED = "/usr/local/bin/"
SCRIPTS = "/etc/ashlar/"
CHART = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../charts/ashlar")
DOCKERFILE = os.path.join(CHART, "../../Dockerfile")
# Go modules of the sidecars. The other two are not on the module proxy: their flags are listed by hand.
MODULES = {
    "csi-provisioner": "github.com/kubernetes-csi/external-provisioner/v6",
    "csi-attacher": "github.com/kubernetes-csi/external-attacher/v4",
    "csi-resizer": "github.com/kubernetes-csi/external-resizer/v2",
    "csi-snapshotter": "github.com/kubernetes-csi/external-snapshotter/v8",
}
BY_HAND = {
    "csi-node-driver-registrar": {"csi-address", "kubelet-registration-path"},
    "livenessprobe": {"csi-address", "health-port"},
}
problems = []


def problem(where, text):
    problems.append(f"{where}: {text}")


class Help:
    """What `PROGRAM SUBCOMMAND... --help` says."""

    def __init__(self, binaries, words):
        path = os.path.join(binaries, words[0])
        answer = subprocess.run([path, *words[1:], "--help"], capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            sys.exit(f"{' '.join(words)} --help failed: {answer.stderr}")
        # Long lines are wrapped, also within [env: NAME=].
        text = re.sub(r"\[env:\s+", "[env: ", answer.stdout)
        self.flags = set(re.findall(r"^\s+(?:-\w, )?(--[a-z0-9-]+)", text, re.M))
        self.short = set(re.findall(r"^\s+(-\w), --", text, re.M))
        # Flags without a value have nothing in angle brackets behind them.
        self.values = set(re.findall(r"^\s+(?:-\w, )?(--[a-z0-9-]+)(?:=| )\s*<", text, re.M))
        self.short_values = set(re.findall(r"^\s+(-\w), --[a-z0-9-]+(?:=| )\s*<", text, re.M))
        self.variables = set(re.findall(r"\[env: ([A-Z0-9_]+)=", text))
        commands = re.search(r"^Commands:\n((?:  .*\n|\n)+)", text, re.M)
        self.commands = set(re.findall(r"^  ([a-z][a-z0-9-]*)", commands.group(1), re.M)) if commands else set()
        usage = re.search(r"^Usage: (.*(?:\n {7,}.*)*)", text, re.M)
        usage = re.sub(r"\[[^\]]*\]", "", usage.group(1)) if usage else ""
        self.required = set(re.findall(r"(--[a-z0-9-]+)", usage))
        # Which variable may stand for which required flag.
        self.variable_of = {}
        flag = None
        for line in text.splitlines():
            found = re.match(r"^\s+(?:-\w, )?(--[a-z0-9-]+)", line)
            flag = found.group(1) if found else flag
            for variable in re.findall(r"\[env: ([A-Z0-9_]+)=", line):
                self.variable_of[flag] = variable


@functools.cache
def help_of(binaries, words):
    return Help(binaries, list(words))


def check_call(where, binaries, words, variables, complete):
    """One call of one of Ashlar's programs, and the variables that are set for it alone. `complete`: all its
    arguments are known."""
    path = (words[0],)
    help_text = help_of(binaries, path)
    given, rest = set(), list(words[1:])
    while rest:
        word = rest.pop(0)
        if word in ("$@", '"$@"'):
            complete = False
        elif word.startswith("--"):
            flag, equals, _ = word.partition("=")
            given.add(flag)
            if flag not in help_text.flags:
                problem(where, f"{' '.join(path)} has no {flag}")
            elif not equals and flag in help_text.values and rest:
                rest.pop(0)
        elif re.fullmatch(r"-\w", word):
            if word not in help_text.short:
                problem(where, f"{' '.join(path)} has no {word}")
            elif word in help_text.short_values and rest:
                rest.pop(0)
        elif help_text.commands:
            if word not in help_text.commands:
                problem(where, f"{' '.join(path)} has no command {word}")
                return
            path += (word,)
            help_text = help_of(binaries, path)
    if help_text.commands:
        problem(where, f"{' '.join(path)} needs a command")
    if complete:
        for flag in help_text.required - given:
            if help_text.variable_of.get(flag) not in variables:
                problem(where, f"{' '.join(path)} is not given {flag}")
    if variables is not None and complete:
        for variable in variables:
            if variable.startswith("ASHLAR_") and variable not in help_text.variables:
                problem(where, f"{' '.join(path)} does not read {variable}")


def calls_of(script):
    """Calls of Ashlar's programs in a shell script, as lists of words."""
    calls = []
    lines = re.sub(r"\\\n\s*", " ", script).splitlines()
    for line in lines:
        line = line.strip()
        # What is only said to people is no call.
        if line.startswith(("#", "echo", "say", "hint=")):
            continue
        for part in re.split(r"&&|\|\||[;|()&]|\bif\b|\buntil\b|\bthen\b|\bexec\b", line):
            part = re.sub(r"[0-9]?>.*$", "", part.strip())
            words = part.split()
            if words and words[0] in PROGRAMS:
                calls.append(words)
    return calls


def run_by(script):
    """The call to which a script appends its arguments."""
    own = [words for words in calls_of(script) if '"$@"' in words and words[1] in ("serve", "node")]
    return own[0][: own[0].index('"$@"')] if own else None


@functools.cache
def installed(stage):
    """Programs of an image, as the Dockerfile has them."""
    text = open(DOCKERFILE, encoding="utf-8").read()
    body = re.search(rf"^FROM \S+ AS {stage}\n(.*?)(?=^FROM |\Z)", text, re.M | re.S)
    if not body:
        sys.exit(f"the Dockerfile has no stage {stage}")
    found = set()
    for sources in re.findall(r"^COPY --from=binaries ((?:\S+ |\\\n\s*)+)/usr/local/bin/", body.group(1), re.M):
        found |= {os.path.basename(word) for word in sources.split() if word != "\\"}
    return found


def check_container(where, binaries, container):
    image = container["image"].rsplit("/", 1)[-1]
    name, _, tag = image.partition(":")
    command = container.get("command", [])
    arguments = [str(a) for a in container.get("args", [])]
    variables = {e["name"] for e in container.get("env", [])}
    for text in command + arguments:
        for variable in re.findall(r"\$\(([A-Z_]+)\)", text):
            if variable not in variables:
                problem(where, f"$({variable}) is not set")
    read = variables - set(re.findall(r"\$\(([A-Z_]+)\)", " ".join(arguments)))
    if name in ("ashlar", "ashlar-node"):
        present = installed(name)
        scripts = []
        if not command:
            problem(where, "no command")
        elif command[0].startswith(INSTALLED):
            program = command[0].removeprefix(INSTALLED)
            if program not in PROGRAMS or program not in present:
                problem(where, f"the image {name} has no {command[0]}")
                return
            check_call(where, binaries, [program, *command[1:], *arguments], read, True)
        elif command[:1] == ["/bin/sh"] and command[1].startswith(SCRIPTS):
            script = open(os.path.join(CHART, "files", command[1].removeprefix(SCRIPTS)), encoding="utf-8").read()
            scripts.append(script)
            prefix = run_by(script)
            if prefix is None:
                problem(where, f"{command[1]} runs nothing with the arguments")
                return
            read_by_script = {v for v in variables if re.search(rf"\${{?{v}\b", script)}
            # The readiness script reads the same variables.
            for probe in ("readinessProbe", "startupProbe"):
                probed = container.get(probe, {}).get("exec", {}).get("command", [None])[-1]
                if probed:
                    other = open(os.path.join(CHART, "files", os.path.basename(probed)), encoding="utf-8").read()
                    scripts.append(other)
                    read_by_script |= {v for v in variables if re.search(rf"\${{?{v}\b", other)}
            check_call(where, binaries, prefix + arguments, read - read_by_script, True)
        elif command == ["/bin/sh", "-c"]:
            scripts.append(arguments[0])
        elif command[0] not in ("/bin/chown",):
            problem(where, f"unknown command {command}")
        for script in scripts:
            for words in calls_of(script):
                if words[0] not in present:
                    problem(where, f"the image {name} has no {words[0]}")
                check_call(where, binaries, words, None, False)
    else:
        known = sidecar_flags(name, tag)
        for argument in arguments:
            flag = argument.lstrip("-").partition("=")[0]
            if flag not in known:
                problem(where, f"{image} has no --{flag}")


@functools.cache
def sidecar_flags(name, tag):
    if name in BY_HAND:
        return BY_HAND[name]
    path = MODULES[name]
    flags = go_flags(path, tag, "cmd/")
    go_mod = go_files(path, tag, "go.mod")["go.mod"]
    library = "github.com/kubernetes-csi/csi-lib-utils"
    version = re.search(rf"{library} (\S+)", go_mod).group(1)
    return flags | go_flags(library, version, "standardflags/")


def go_flags(path, version, under):
    flags = set()
    for text in go_files(path, version, under).values():
        flags |= set(re.findall(r"\w+\.(?:\w*Var|String|Bool|Int|Duration|Float64|Uint)\((?:&?[\w.]+, )?\"([a-z0-9-]+)\"", text))
    return flags


def go_files(path, version, under):
    answer = subprocess.run(["go", "mod", "download", "-json", f"{path}@{version}"],
                            capture_output=True, text=True, check=False, cwd="/")
    archive = json.loads(answer.stdout or "{}").get("Zip")
    if not archive:
        sys.exit(f"cannot download {path}@{version}: {answer.stdout}{answer.stderr}")
    prefix = f"{path}@{version}/"
    with zipfile.ZipFile(archive) as files:
        return {n.removeprefix(prefix): files.read(n).decode() for n in files.namelist()
                if n.startswith(prefix + under) and n.endswith((".go", "go.mod"))}


def main():
    binaries, checked = sys.argv[1], 0
    for rendered in sys.argv[2:]:
        for document in yaml.safe_load_all(open(rendered, encoding="utf-8")):
            spec = ((document or {}).get("spec") or {}).get("template", {}).get("spec", {})
            for container in spec.get("initContainers", []) + spec.get("containers", []):
                where = f"{os.path.basename(rendered)}: {document['metadata']['name']}/{container['name']}"
                check_container(where, binaries, container)
                checked += 1
    if problems:
        sys.exit("\n".join(problems))
    if not checked:
        sys.exit("no container was found")
    print(f"{checked} containers checked")


main()
