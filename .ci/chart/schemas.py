"""Writes JSON schemas for kubeconform: Kubernetes' own kinds and the custom kinds that the chart uses.

Usage: schemas.py DIRECTORY

They come out of Go modules at pinned versions, so that the module proxy and its checksums are all that is needed:
Kubernetes' OpenAPI document, and the definitions of VolumeSnapshotClass, ServiceMonitor and PrometheusRule.
Every object is closed: a field that the schema does not name is an error.
"""

import json
import os
import subprocess
import sys
import zipfile

import yaml

KUBERNETES = ("k8s.io/kubernetes", "v1.36.3")
CUSTOM = [
    ("github.com/kubernetes-csi/external-snapshotter/client/v8", "v8.6.0",
     ["config/crd/snapshot.storage.k8s.io_volumesnapshotclasses.yaml"]),
    ("github.com/prometheus-operator/prometheus-operator", "v0.85.0",
     ["example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
      "example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml"]),
]
SCALARS = {
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["string", "integer"]},
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"type": ["string", "number"]},
}


def module(path, version, names):
    """The texts of files of a Go module."""
    found = subprocess.run(["go", "mod", "download", "-json", f"{path}@{version}"],
                           capture_output=True, text=True, check=False, cwd="/")
    answer = json.loads(found.stdout or "{}")
    if "Zip" not in answer:
        sys.exit(f"cannot download {path}@{version}: {answer.get('Error') or found.stderr}")
    with zipfile.ZipFile(answer["Zip"]) as archive:
        return [archive.read(f"{path}@{version}/{name}").decode() for name in names]


def close(schema):
    """Forbids what an object's schema does not name, all the way down."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: value if key in ("enum", "default", "required", "example") else close(value)
              for key, value in schema.items() if not (key == "description" and isinstance(value, str))}
    open_anyway = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-int-or-string")
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema and not open_anyway:
        closed["additionalProperties"] = False
    return closed


def references(schema, into):
    if isinstance(schema, list):
        for item in schema:
            references(item, into)
    elif isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            into.add(schema["$ref"].removeprefix("#/definitions/"))
        for value in schema.values():
            references(value, into)


def file_name(directory, group, version, kind):
    suffix = f"-{group.split('.')[0]}-{version}" if group else f"-{version}"
    return os.path.join(directory, f"{kind.lower()}{suffix}.json")


def write(directory, group, version, kind, schema):
    schema = dict(schema)
    properties = dict(schema["properties"])
    properties["apiVersion"] = {"type": "string", "enum": [f"{group}/{version}" if group else version]}
    properties["kind"] = {"type": "string", "enum": [kind]}
    schema["properties"] = properties
    schema["required"] = sorted(set(schema.get("required", [])) | {"apiVersion", "kind", "metadata"})
    with open(file_name(directory, group, version, kind), "w", encoding="utf-8") as out:
        json.dump(schema, out)


def kubernetes(directory):
    text, = module(*KUBERNETES, ["api/openapi-spec/swagger.json"])
    definitions = {name: SCALARS.get(name) or close(body) for name, body in json.loads(text)["definitions"].items()}
    for name, body in definitions.items():
        kinds = body.get("x-kubernetes-group-version-kind", [])
        if len(kinds) != 1 or "properties" not in body:
            continue
        needed, todo = set(), {name}
        while todo:
            current = todo.pop()
            found = set()
            references(definitions[current], found)
            todo |= found - needed
            needed |= found
        schema = dict(body)
        schema["definitions"] = {one: definitions[one] for one in needed}
        write(directory, kinds[0]["group"], kinds[0]["version"], kinds[0]["kind"], schema)


def custom(directory):
    for path, version, names in CUSTOM:
        for text in module(path, version, names):
            definition = yaml.safe_load(text)["spec"]
            for one in definition["versions"]:
                schema = close(one["schema"]["openAPIV3Schema"])
                write(directory, definition["group"], one["name"], definition["names"]["kind"], schema)


def main():
    directory = sys.argv[1]
    stamp = os.path.join(directory, "stamp")
    made_of = json.dumps([KUBERNETES, CUSTOM])
    if os.path.exists(stamp) and open(stamp, encoding="utf-8").read() == made_of:
        return
    os.makedirs(directory, exist_ok=True)
    kubernetes(directory)
    custom(directory)
    with open(stamp, "w", encoding="utf-8") as out:
        out.write(made_of)


main()
