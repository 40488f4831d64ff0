#!/usr/bin/python3
"""A pretended nvidia-smi, in an instance: answers queries for the GPU that the offer named."""

import sys

GPU: dict[str, str] = {}  # field -> value; the lab writes it here (tests/lab/instances.py)
UNITS = {"memory": "MiB", "power": "W", "clocks": "MHz", "utilization": "%"}


def with_unit(field: str, value: str) -> str:
    """As nvidia-smi prints it unless told nounits."""
    unit = UNITS.get(field.split(".")[0])
    return f"{value} {unit}" if unit else value


def main() -> int:
    """Entry point."""
    options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:])
    query = options.get("query-gpu")
    if query is None:
        print(f"GPU 0: {GPU['name']} (UUID: {GPU['uuid']})")
        return 0
    form = options.get("format", "").split(",")
    fields = query.split(",")
    for field in fields:
        if field not in GPU:
            print(f'Field "{field}" is not a valid field to query.')
            return 2
    if "noheader" not in form:
        print(", ".join(fields))
    plain = "nounits" in form
    print(", ".join(GPU[field] if plain else with_unit(field, GPU[field]) for field in fields))
    return 0


sys.exit(main())
