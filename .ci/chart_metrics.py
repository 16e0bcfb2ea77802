"""Checks that every ashlar_ metric in rules and dashboard is in the reference. Usage: chart_metrics.py REFERENCE RENDERED"""

import json
import pathlib
import re
import sys

import yaml

reference, rendered = map(pathlib.Path, sys.argv[1:])
# A histogram's series have names of their own.
SERIES = re.compile(r"_(bucket|sum|count)$")
documents = [d for d in yaml.safe_load_all(rendered.read_text()) if d]
boards = [json.loads(text) for d in documents if d["metadata"]["name"].endswith("-dashboard") for text in d["data"].values()]
rules = [r for d in documents if d["kind"] == "PrometheusRule" for g in d["spec"]["groups"] for r in g["rules"]]
expressions = [t["expr"] for b in boards for p in b["panels"] for t in p["targets"]] + [r["expr"] for r in rules]
if not boards or not rules:
    sys.exit("there is no dashboard or no rule: the check sees nothing")
for expression in expressions:
    # What a typing error unbalances. (Prometheus itself is not there to ask.)
    if any(expression.count(a) != expression.count(b) for a, b in ("()", "[]", "{}")) or expression.count('"') % 2:
        sys.exit(f"not balanced: {expression}")
for rule in rules:
    if not {"summary", "description"} <= rule["annotations"].keys() or "severity" not in rule["labels"]:
        sys.exit(f"{rule['alert']}: needs summary, description and severity")
used = {SERIES.sub("", m) for m in re.findall(r"\bashlar_[a-z0-9_]+", " ".join(expressions))}
if not used:
    sys.exit("no metric is used: the check sees nothing")
if not reference.exists():
    print(f"SKIPPED the names of {len(used)} metrics: {reference} is not there yet")
    sys.exit(0)
known = set(re.findall(r"\bashlar_[a-z0-9_]+", reference.read_text()))
unknown = used - known
# A program that has no metric in the reference has none yet; one misspelt name among others is a mistake.
for prefix in sorted({re.match(r"ashlar_[a-z]+_", name).group() for name in unknown}):
    if not any(name.startswith(prefix) for name in known):
        absent = {name for name in unknown if name.startswith(prefix)}
        print(f"SKIPPED the names of {len(absent)} metrics: {reference} has no {prefix}* yet")
        unknown -= absent
for name in sorted(unknown):
    print(f"WRONG {name} is in rules or dashboard, and not in {reference}")
print(f"{len(used)} metrics, {len(unknown)} unknown")
sys.exit(bool(unknown))
