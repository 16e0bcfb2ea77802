"""Checks that every ashlar_ metric in rules and dashboard is in the reference. Usage: chart_metrics.py REFERENCE RENDERED"""

import pathlib
import re
import sys

reference, rendered = map(pathlib.Path, sys.argv[1:])
# A histogram's series have names of their own.
SERIES = re.compile(r"_(bucket|sum|count)$")
used = {SERIES.sub("", m) for m in re.findall(r"\bashlar_[a-z0-9_]+", rendered.read_text())}
if not used:
    sys.exit("no metric is used: the check sees nothing")
if not reference.exists():
    print(f"SKIPPED the names of {len(used)} metrics: {reference} is not there yet")
    sys.exit(0)
known = set(re.findall(r"\bashlar_[a-z0-9_]+", reference.read_text()))
unknown = sorted(used - known)
for name in unknown:
    print(f"WRONG {name} is in rules or dashboard, and not in {reference}")
print(f"{len(used)} metrics, {len(unknown)} unknown")
sys.exit(bool(unknown))
