"""Checks that values.schema.json and the templates refuse what is wrong, saying where.

Usage: refusals.py CHART
"""

import json
import os
import subprocess
import sys
import tempfile

import yaml

# Values to set (as JSON), and a word of the answer.
WRONG = [
    ({"metdata": {"replicas": 3}}, "metdata"),
    ({"metadata": {"replica": 3}}, "replica"),
    ({"metadata": {"replicas": 2}}, "replicas"),
    ({"metadata": {"replicas": "3"}}, "replicas"),
    ({"metadata": {"port": 70000}}, "port"),
    ({"metadata": {"persistence": {"type": "hostpath"}}}, "type"),
    ({"metadata": {"persistence": {"size": "10 GB"}}}, "size"),
    ({"metadata": {"persistence": {"type": "hostPath", "nodes": ["a", "b"]}}}, "exactly 3 nodes"),
    ({"metadata": {"persistence": {"type": "hostPath", "nodes": ["a", "b", "b"]}}}, "nodes"),
    ({"metadata": {"persistence": {"storageClass": "ashlar"}}}, "needs the metadata"),
    ({"metadata": {"resources": {"request": {"cpu": "1"}}}}, "request"),
    ({"metadata": {"tolerations": [{"operater": "Exists"}]}}, "operater"),
    ({"storage": {"groups": []}}, "groups"),
    ({"storage": {"groups": [{"name": "a", "disk": ["/dev/sdb"]}]}}, "disk"),
    ({"storage": {"groups": [{"name": "a", "disks": ["sdb"]}]}}, "disks"),
    ({"storage": {"groups": [{"name": "a", "disks": ["/dev/$(reboot)"]}]}}, "disks"),
    ({"storage": {"groups": [{"name": "a", "disks": ["/dev/sd b"]}]}}, "disks"),
    ({"storage": {"groups": [{"name": "a", "files": [{"path": "/var/lib/ashlar/one", "size": "1G"}]}]}}, "size"),
    ({"storage": {"groups": [{"name": "a", "files": [{"path": "/home/one", "size": "1GiB"}]}]}}, "stateDir"),
    ({"storage": {"groups": [{"name": "a"}, {"name": "a"}]}}, "two storage groups"),
    ({"storage": {"groups": [{"name": "A"}]}}, "name"),
    ({"nbdClient": {"threads": 0}}, "threads"),
    ({"csi": {"driverName": "a/b"}}, "driverName"),
    ({"csi": {"controller": {"timeout": "fast"}}}, "timeout"),
    ({"storageClasses": [{"name": "a", "parameters": {"replicas": 3}}]}, "replicas"),
    ({"storageClasses": [{"name": "a", "parameters": {"replica": "3"}}]}, "replica"),
    ({"storageClasses": [{"name": "a", "parameters": {"csi.storage.k8s.io/fstype": "btrfs"}}]}, "fstype"),
    ({"storageClasses": [{"name": "a", "default": True}]}, "default"),
    ({"metadata": {"persistence": {"storageClass": "x"}},
      "storageClasses": [{"name": "a", "default": True}, {"name": "b", "default": True}]}, "more than one"),
    ({"sidecars": {"provisionner": {}}}, "provisionner"),
    ({"ipFamily": "ipv6"}, "ipFamily"),
    ({"kubeletDir": "/var/lib/kubelet/"}, "kubeletDir"),
    ({"imagePullSecrets": [{"name": "a"}]}, "imagePullSecrets"),
    ({"networkPolicy": {"nodeCIDRs": ["10.0.0.0"]}}, "nodeCIDRs"),
]


def template(chart, values):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values, file)
        file.flush()
        return subprocess.run(["helm", "template", "ashlar", chart, "--kube-version", "1.36.3", "-f", file.name],
                              capture_output=True, text=True, check=False)


def closed(schema, where):
    """Names of objects in the schema that accept any key."""
    if isinstance(schema, list):
        return [name for item in schema for name in closed(item, where)]
    if not isinstance(schema, dict):
        return []
    found = []
    if "properties" in schema and schema.get("type") == "object" and schema.get("additionalProperties") is not False:
        found.append(where)
    for key, value in schema.items():
        found += closed(value, f"{where}/{key}")
    return found


def commented(chart):
    """Keys of values.yaml that the schema does not know, and the other way round, at the first two levels."""
    with open(os.path.join(chart, "values.yaml"), encoding="utf-8") as file:
        values = yaml.safe_load(file)
    with open(os.path.join(chart, "values.schema.json"), encoding="utf-8") as file:
        schema = json.load(file)
    wrong = [f"not closed: {name}" for name in closed(schema, "")]
    for key, sub in schema["properties"].items():
        if key == "global":
            continue
        if key not in values:
            wrong.append(f"{key} is not in values.yaml")
        elif isinstance(values[key], dict):
            wrong += [f"{key}.{inner} is not in values.yaml" for inner in sub.get("properties", {})
                      if inner not in values[key]]
    return wrong


def main():
    chart = sys.argv[1]
    wrong = commented(chart)
    for values, word in WRONG:
        answer = template(chart, values)
        if answer.returncode == 0:
            wrong.append(f"accepted: {json.dumps(values)}")
        elif word not in answer.stderr:
            wrong.append(f"{json.dumps(values)}: the answer does not say {word!r}: {answer.stderr}")
    right = template(chart, {"metadata": {"persistence": {"storageClass": "x"}}, "storageClasses": [{"name": "a", "default": True}]})
    if right.returncode != 0:
        wrong.append(f"refused although right: {right.stderr}")
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(WRONG)} mistakes refused")


main()
