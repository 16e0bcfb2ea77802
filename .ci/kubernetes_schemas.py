"""Turns API descriptions into one strict JSON schema per kind: KIND-GROUP-VERSION.json, as kubeconform names them.

Usage: kubernetes_schemas.py DIRECTORY SWAGGER.json CRD.yaml...

Strict means: an object whose fields are known accepts no others.
"""

import json
import pathlib
import sys

import yaml

PREFIX = "#/definitions/"
QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
INT_OR_STRING = "io.k8s.apimachinery.pkg.util.intstr.IntOrString"


def strict(node):
    """Closes every object whose properties are listed."""
    if isinstance(node, dict):
        open_ended = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
        if isinstance(node.get("properties"), dict) and not open_ended:
            node["additionalProperties"] = False
        if node.get("x-kubernetes-int-or-string"):
            node.pop("type", None)
            node.pop("format", None)
        for value in node.values():
            strict(value)
    elif isinstance(node, list):
        for value in node:
            strict(value)


def references(node):
    """Names of the definitions that a schema refers to."""
    if isinstance(node, dict):
        reference = node.get("$ref")
        if isinstance(reference, str) and reference.startswith(PREFIX):
            yield reference[len(PREFIX):]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def closure(definitions, name):
    """The definition and all that it needs."""
    found, todo = {}, [name]
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = definitions[name]
            todo.extend(references(definitions[name]))
    return found


def file_name(kind, group, version):
    return "-".join(part for part in [kind.lower(), group.split(".")[0], version.lower()] if part) + ".json"


def write(directory, kind, group, version, schema):
    (directory / file_name(kind, group, version)).write_text(json.dumps(schema))


def main():
    directory = pathlib.Path(sys.argv[1])
    definitions = json.loads(pathlib.Path(sys.argv[2]).read_text())["definitions"]
    strict(definitions)
    definitions[QUANTITY] = {"type": ["string", "number"]}
    definitions[INT_OR_STRING] = {"type": ["string", "integer"]}
    for name, definition in definitions.items():
        for kind in definition.get("x-kubernetes-group-version-kind", []):
            properties = definition.get("properties", {})
            if not {"apiVersion", "kind", "metadata"} <= properties.keys():
                continue
            schema = {"$ref": PREFIX + name, "definitions": closure(definitions, name)}
            write(directory, kind["kind"], kind["group"], kind["version"], schema)
    for path in sys.argv[3:]:
        crd = yaml.safe_load(pathlib.Path(path).read_text())["spec"]
        for version in crd["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            # The API server checks it; here it is what it is for every other kind.
            schema["properties"]["metadata"] = {"$ref": PREFIX + "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}
            strict(schema)
            schema["definitions"] = closure(definitions, "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
            write(directory, crd["names"]["kind"], crd["group"], version["name"], schema)


if __name__ == "__main__":
    main()
