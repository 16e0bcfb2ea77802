"""Flags that the sidecars of the Kubernetes project know, read from their Go modules at the versions that are pinned."""

import functools
import json
import re
import subprocess
import zipfile

MODULES = {
    "csi-provisioner": "github.com/kubernetes-csi/external-provisioner/v6",
    "csi-attacher": "github.com/kubernetes-csi/external-attacher/v4",
    "csi-resizer": "github.com/kubernetes-csi/external-resizer/v2",
    "csi-snapshotter": "github.com/kubernetes-csi/external-snapshotter/v8",
}
# Not on the module proxy at their versions.
BY_HAND = {
    "csi-node-driver-registrar": {"csi-address", "kubelet-registration-path", "v"},
    # Named by constants in its source.
    "csi-snapshot-metadata": {"csi-address", "timeout", "port", "http-endpoint", "tls-cert", "tls-key", "v"},
    "livenessprobe": {"csi-address", "health-port", "probe-timeout", "v"},
}


@functools.cache
def flags(name, tag):
    """Flags of an image, without dashes."""
    if name in BY_HAND:
        return BY_HAND[name]
    path = MODULES[name]
    go_mod = files(path, tag, "go.mod")["go.mod"]
    library = "github.com/kubernetes-csi/csi-lib-utils"
    version = re.search(rf"{library} (\S+)", go_mod).group(1)
    # -v is of the library that logs.
    return go_flags(path, tag, "cmd/") | go_flags(library, version, "standardflags/") | {"v"}


def go_flags(path, version, under):
    found = set()
    for text in files(path, version, under).values():
        pattern = r"\w+\.(?:\w*Var|String|Bool|Int|Duration|Float64|Uint)\((?:&?[\w.]+(?:\(&?\w+\))?, )?\"([a-z0-9-]+)\""
        found |= set(re.findall(pattern, text))
    return found


def files(path, version, under):
    answer = subprocess.run(
        ["go", "mod", "download", "-json", f"{path}@{version}"], capture_output=True, text=True, check=False, cwd="/"
    )
    archive = json.loads(answer.stdout or "{}").get("Zip")
    if not archive:
        raise OSError(f"cannot download {path}@{version}: {answer.stdout}{answer.stderr}")
    prefix = f"{path}@{version}/"
    with zipfile.ZipFile(archive) as content:
        return {
            name.removeprefix(prefix): content.read(name).decode()
            for name in content.namelist()
            if name.startswith(prefix + under) and name.endswith((".go", "go.mod"))
        }
