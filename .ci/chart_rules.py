"""What must hold in every rendering of the chart, whatever the values. Usage: chart_rules.py RENDERED.yaml..."""

import pathlib
import sys

import yaml

problems = []


def require(condition, text):
    if not condition:
        problems.append(text)


def check_rbac(document):
    name = document["metadata"]["name"]
    for rule in document["rules"]:
        words = rule["apiGroups"] + rule["resources"] + rule["verbs"]
        require("*" not in words, f"{name}: a wildcard")
        require("secrets" not in rule["resources"], f"{name}: may read secrets")
        require(not {"escalate", "bind", "impersonate"} & set(rule["verbs"]), f"{name}: may widen its own rights")


def check_pod(name, kind, spec):
    tokens = spec.get("automountServiceAccountToken")
    require(tokens is False or name.endswith("csi-controller"), f"{name}: has a token of the Kubernetes API")
    for container in spec.get("initContainers", []) + spec["containers"]:
        where = f"{name}/{container['name']}"
        security = container.get("securityContext", {})
        require(security.get("readOnlyRootFilesystem"), f"{where}: can write to its image")
        if not security.get("privileged"):
            require(security.get("allowPrivilegeEscalation") is False, f"{where}: may escalate")
            require(security["capabilities"]["drop"] == ["ALL"], f"{where}: keeps capabilities")
        require("requests" in container.get("resources", {}) or container["name"] in ("guard", "own-directory"),
                f"{where}: requests no resources")
        if spec.get("hostNetwork"):
            require(not container.get("ports"), f"{where}: declares a port on the host's network")
    privileged = [c["name"] for c in spec["containers"] if c.get("securityContext", {}).get("privileged")]
    allowed = {"storage-daemon", "nbd-client", "csi-driver"}
    require(set(privileged) <= allowed, f"{name}: privileged {privileged}")
    require(not privileged or kind == "DaemonSet", f"{name}: privileged, and no DaemonSet")
    require(spec.get("priorityClassName") or kind == "Job", f"{name}: no priority class")


def check_nbd_client(document):
    update = document["spec"]["updateStrategy"]
    require(update["type"] == "RollingUpdate", "nbd-client: not a rolling update")
    require(update["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}, "nbd-client: no hand-over")
    spec = document["spec"]["template"]["spec"]
    require(spec["hostNetwork"], "nbd-client: not on the host's network")
    kinds = {v["name"]: next(k for k in v if k != "name") for v in spec["volumes"]}
    require(kinds["state"] == kinds["run"] == "hostPath", "nbd-client: its state does not outlive the pod")
    require("livenessProbe" not in spec["containers"][0], "nbd-client: a probe could kill it")


def check(path):
    documents = [d for d in yaml.safe_load_all(pathlib.Path(path).read_text()) if d]
    names = [(d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"]) for d in documents]
    require(len(names) == len(set(names)), f"{path}: an object is there twice")
    accounts = {d["metadata"]["name"] for d in documents if d["kind"] == "ServiceAccount"}
    roles = {(d["kind"], d["metadata"]["name"]) for d in documents if d["kind"] in ("Role", "ClusterRole")}
    for document in documents:
        kind, name = document["kind"], document["metadata"]["name"]
        if kind in ("Role", "ClusterRole"):
            check_rbac(document)
        if kind in ("RoleBinding", "ClusterRoleBinding"):
            reference = document["roleRef"]
            require((reference["kind"], reference["name"]) in roles, f"{name}: no such role")
            require(all(s["name"] in accounts for s in document["subjects"]), f"{name}: no such account")
        if kind in ("DaemonSet", "Deployment", "StatefulSet", "Job"):
            template = document["spec"]["template"]
            check_pod(name, kind, template["spec"])
            require(template["spec"]["serviceAccountName"] in accounts, f"{name}: no such account")
            if kind != "Job":
                labels, wanted = template["metadata"]["labels"], document["spec"]["selector"]["matchLabels"]
                require(wanted.items() <= labels.items(), f"{name}: does not select its own pods")
        if kind == "DaemonSet" and name.endswith("-nbd-client"):
            check_nbd_client(document)
        if kind == "CSIDriver":
            spec = document["spec"]
            require(spec["attachRequired"] is True, "CSIDriver: attaching is the fencing point")
            require(spec["fsGroupPolicy"] == "File", "CSIDriver: fsGroupPolicy")
        if kind == "StatefulSet":
            policy = document["spec"]["persistentVolumeClaimRetentionPolicy"]
            require(set(policy.values()) == {"Retain"}, "metadata: claims are deleted with it")
        if kind == "PersistentVolume":
            require(document["spec"]["persistentVolumeReclaimPolicy"] == "Retain", f"{name}: is not retained")
    selectors = [
        tuple(sorted(d["spec"]["selector"]["matchLabels"].items())) for d in documents
        if d["kind"] in ("DaemonSet", "Deployment", "StatefulSet")
    ]
    require(len(selectors) == len(set(selectors)), f"{path}: two workloads select the same pods")


for path in sys.argv[1:]:
    check(path)
for problem in problems:
    print(f"WRONG {problem}")
sys.exit(bool(problems))
