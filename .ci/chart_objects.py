"""Prints the path of every object in a values file that has fixed keys, as `helm --set` writes it ("a.b.")."""

import pathlib
import sys

import yaml

# Maps of free keys: labels, selectors, Kubernetes' own objects.
FREE = {"nodeSelector", "podAnnotations", "labels", "annotations", "parameters", "matchLabels"}


def walk(value, path):
    print(path)
    for key, inner in value.items():
        if isinstance(inner, dict) and key not in FREE:
            walk(inner, f"{path}{key}.")


walk(yaml.safe_load(pathlib.Path(sys.argv[1]).read_text()), "")
